//! `attune workers render`: what an engine would be asked for a worker.

use crate::support::Place;

const SLURM: &str = "{name: gpu, max: 2, server: 'https://scheduler:7070', program: /opt/attune, \
                     slurm: {memory: 4G, work_dir: /scratch, prologue: 'module load cuda'}}";

#[test]
fn an_engine_of_command_lines_shows_them() {
    let place = Place::new();
    place.write("slurm.yaml", SLURM);
    let ran = place.run(&["workers", "render", "slurm.yaml"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 0
    --- stdout
    sbatch --parsable --export=NIL --no-requeue --nodes=1 --ntasks=1 --chdir=/ --job-name=attune-gpu --comment=r-000000000000000000 --cpus-per-task=1 --mem=4G --output=/dev/null --signal=B:TERM@90 SCRIPT /opt/attune worker --server https://scheduler:7070 --name gpu-r-000000000000000000 --work-dir /scratch/r-000000000000000000 --devices 1 --cards 0 --grace 60 --label attune.request=r-000000000000000000 --discard-work-dir

    # SCRIPT
    #!/bin/sh
    module load cuda
    exec "$@"
    --- stderr
    "#);
    place.write(
        "here.yaml",
        "{name: here, max: 2, program: /opt/attune, processes: {work_dir: '/var/lib/the workers'}}",
    );
    let ran = place.run(&["workers", "render", "here.yaml"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 0
    --- stdout
    /opt/attune worker --server http://127.0.0.1:7070 --name here-r-000000000000000000 --work-dir '/var/lib/the workers/1' --devices 1 --cards 0 --grace 60 --label attune.request=r-000000000000000000 --until-stdin-closes
    --- stderr
    "#);
    let ran = place.run(&["workers", "render", "here.yaml", "--rights", "attune"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (2, ""));
    assert!(ran.stderr.contains("here.yaml: its engine has no accounts; --rights is for Kubernetes"), "{}", ran.stderr);
}

const KUBERNETES: &str = "
name: gpu
max: 8
worker: {devices: 8, cards: 1, labels: {zone: \"it's $(here)\"}, grace: 90s}
server: https://scheduler.internal:7070
kubernetes:
  namespace: tuning
  image: registry.internal/attune:0.1.0
  memory: 64Gi
  disk: 200Gi
  time: 8h
  token: {secret: attune-worker, key: token}
  ca: {config_map: attune-ca}
  labels: {kueue.x-k8s.io/queue-name: tuning}
  pod:
    nodeSelector: {example.com/card: a100}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    imagePullSecrets: [{name: registry}]
    containers: [{name: worker, env: [{name: ATTUNE_LOG, value: info}]}]
";

#[cfg(not(feature = "kubernetes"))]
#[test]
fn a_build_that_does_not_speak_to_kubernetes_says_which_does() {
    let place = Place::new();
    place.write("pool.yaml", KUBERNETES);
    let ran = place.run(&["workers", "render", "pool.yaml"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: pool.yaml has 1 fault
      `kubernetes` needs a build that speaks to Kubernetes: `cargo install --path services/attune --features kubernetes`
    "#);
}

#[cfg(feature = "kubernetes")]
#[test]
fn a_job_of_kubernetes_is_its_manifest_and_the_rights_are_a_role() {
    let place = Place::new();
    place.write("pool.yaml", KUBERNETES);
    let ran = place.run(&["workers", "render", "pool.yaml"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 0
    --- stdout
    apiVersion: batch/v1
    kind: Job
    metadata:
      labels:
        app.kubernetes.io/component: worker
        app.kubernetes.io/managed-by: attune
        app.kubernetes.io/name: attune
        attune.pool: gpu
        attune.request: r-000000000000000000
        kueue.x-k8s.io/queue-name: tuning
      name: attune-r-000000000000000000
      namespace: tuning
    spec:
      backoffLimit: 0
      completions: 1
      parallelism: 1
      template:
        metadata:
          labels:
            app.kubernetes.io/component: worker
            app.kubernetes.io/managed-by: attune
            app.kubernetes.io/name: attune
            attune.pool: gpu
            attune.request: r-000000000000000000
            kueue.x-k8s.io/queue-name: tuning
        spec:
          activeDeadlineSeconds: 28800
          automountServiceAccountToken: false
          containers:
          - args:
            - worker
            - --server
            - https://scheduler.internal:7070
            - --name
            - gpu-r-000000000000000000
            - --work-dir
            - /var/lib/attune
            - --devices
            - "8"
            - --cards
            - "1"
            - --grace
            - "90"
            - --label
            - attune.request=r-000000000000000000
            - --label
            - zone=it's $$(here)
            - --token-file
            - /etc/attune/token/token
            - --ca
            - /etc/attune/ca/ca.crt
            env:
            - name: ATTUNE_LOG
              value: info
            image: registry.internal/attune:0.1.0
            name: worker
            resources:
              limits:
                memory: 64Gi
                nvidia.com/gpu: "1"
              requests:
                cpu: "8"
                ephemeral-storage: 200Gi
                memory: 64Gi
            securityContext:
              allowPrivilegeEscalation: false
              capabilities:
                drop:
                - ALL
              readOnlyRootFilesystem: true
            terminationMessagePolicy: FallbackToLogsOnError
            volumeMounts:
            - mountPath: /var/lib/attune
              name: work
            - mountPath: /tmp
              name: tmp
            - mountPath: /etc/attune/token
              name: token
              readOnly: true
            - mountPath: /etc/attune/ca
              name: ca
              readOnly: true
          enableServiceLinks: false
          imagePullSecrets:
          - name: registry
          nodeSelector:
            example.com/card: a100
          restartPolicy: Never
          securityContext:
            fsGroup: 65532
            runAsGroup: 65532
            runAsNonRoot: true
            runAsUser: 65532
            seccompProfile:
              type: RuntimeDefault
          terminationGracePeriodSeconds: 120
          tolerations:
          - effect: NoSchedule
            key: nvidia.com/gpu
            operator: Exists
          volumes:
          - emptyDir:
              sizeLimit: 200Gi
            name: work
          - emptyDir:
              sizeLimit: 1Gi
            name: tmp
          - name: token
            secret:
              defaultMode: 288
              items:
              - key: token
                path: token
              secretName: attune-worker
          - configMap:
              items:
              - key: ca.crt
                path: ca.crt
              name: attune-ca
            name: ca
      ttlSecondsAfterFinished: 600
    --- stderr
    "#);
    let ran = place.run(&["workers", "render", "pool.yaml", "--rights", "ops:attune"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 0
    --- stdout
    apiVersion: rbac.authorization.k8s.io/v1
    kind: Role
    metadata:
      name: attune-scheduler
      namespace: tuning
    rules:
    - apiGroups:
      - batch
      resources:
      - jobs
      verbs:
      - create
      - delete
      - list
    - apiGroups:
      - ""
      resources:
      - pods
      verbs:
      - delete
      - list
    - apiGroups:
      - ""
      resources:
      - events
      verbs:
      - list
    ---
    apiVersion: rbac.authorization.k8s.io/v1
    kind: RoleBinding
    metadata:
      name: attune-scheduler
      namespace: tuning
    roleRef:
      apiGroup: rbac.authorization.k8s.io
      kind: Role
      name: attune-scheduler
    subjects:
    - kind: ServiceAccount
      name: attune
      namespace: ops
    --- stderr
    "#);
    let told = place.run(&["workers", "render", "pool.yaml", "--json"]).json();
    assert_eq!(told["pool"], "gpu");
    assert!(told["rendered"].as_str().unwrap().contains("kind: Job"), "{told}");
    let ran = place.run(&["workers", "render", "pool.yaml", "--rights", "ops:"]);
    assert_eq!(ran.status, 2, "{}", ran.all());
}
