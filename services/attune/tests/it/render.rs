//! `attune workers render`: what an engine would be asked for a worker.

use crate::support::Place;

const SLURM: &str = "{name: gpu, max: 2, server: 'https://scheduler:7070', program: /opt/attune, \
                     slurm: {memory: 4G, work_dir: /scratch, prologue: 'module load cuda'}}";

#[test]
fn an_engine_of_command_lines_shows_them() {
    let place = Place::new();
    place.write("slurm.yaml", SLURM);
    let ran = place.run(&["workers", "render", "slurm.yaml"]);
    insta::assert_snapshot!(ran.all(), @r##""##);
    place.write(
        "here.yaml",
        "{name: here, max: 2, program: /opt/attune, processes: {work_dir: '/var/lib/the workers'}}",
    );
    let ran = place.run(&["workers", "render", "here.yaml"]);
    insta::assert_snapshot!(ran.all(), @r##""##);
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
    insta::assert_snapshot!(ran.all(), @r##"
    exit status 2
    --- stdout
    --- stderr
    error: pool.yaml has 1 fault
      `kubernetes` needs a build that speaks to Kubernetes: `cargo install --path services/attune --features kubernetes`
    "##);
}

#[cfg(feature = "kubernetes")]
#[test]
fn a_job_of_kubernetes_is_its_manifest_and_the_rights_are_a_role() {
    let place = Place::new();
    place.write("pool.yaml", KUBERNETES);
    let ran = place.run(&["workers", "render", "pool.yaml"]);
    insta::assert_snapshot!(ran.all(), @r##""##);
    let ran = place.run(&["workers", "render", "pool.yaml", "--rights", "ops:attune"]);
    insta::assert_snapshot!(ran.all(), @r##""##);
    let told = place.run(&["workers", "render", "pool.yaml", "--json"]).json();
    assert_eq!(told["pool"], "gpu");
    assert!(told["rendered"].as_str().unwrap().contains("kind: Job"), "{told}");
    let ran = place.run(&["workers", "render", "pool.yaml", "--rights", "ops:"]);
    assert_eq!(ran.status, 2, "{}", ran.all());
}
