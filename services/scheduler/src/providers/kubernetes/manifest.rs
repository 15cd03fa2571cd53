//! The Job of a worker, from what the file says.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use attune_scheduler_core::supply::{Pool, REQUEST_LABEL, RequestId};
use k8s_openapi::DeepMerge as _;
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, KeyToPath, PodSecurityContext, PodSpec,
    PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::super::launch::Launch;
use super::POOL_LABEL;
use super::settings::{Authority, Key, Settings};

/// The name of the worker's container.
pub(super) const CONTAINER: &str = "worker";
/// Where a worker keeps its things.
const WORK_DIR: &str = "/var/lib/attune";
const TOKEN_DIR: &str = "/etc/attune/token";
const CA_DIR: &str = "/etc/attune/ca";
const IDENTITY_DIR: &str = "/etc/attune/identity";
/// Room for temporary files of libraries; Attune's own lie in the work folder.
const TEMPORARY: &str = "1Gi";
/// Mode of files with secrets: the worker's group, which they belong to, reads them.
const SECRET_MODE: i32 = 0o440;
/// Time beyond their grace that workers have between SIGTERM and SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// The name of a request's Job.
pub(super) fn name(request: &RequestId) -> String {
    format!("attune-{request}")
}

/// What lists everything of a pool.
pub(super) fn pool_selector(pool: &Pool) -> String {
    format!("{POOL_LABEL}={}", pool.name)
}

/// What lists everything of a request.
pub(super) fn request_selector(request: &RequestId) -> String {
    format!("{REQUEST_LABEL}={request}")
}

/// The files by which a worker in a Pod knows the scheduler and is known there.
pub(super) fn with_files(launch: Launch, settings: &Settings) -> Launch {
    let file = |folder: &str, name: &str| PathBuf::from(folder).join(name);
    let identity = || (file(IDENTITY_DIR, "tls.crt"), file(IDENTITY_DIR, "tls.key"));
    Launch {
        token_file: settings.token.as_ref().map(|_| file(TOKEN_DIR, "token")),
        ca: settings.authority.as_ref().map(|_| file(CA_DIR, "ca.crt")),
        identity: settings.identity.as_ref().map(|_| identity()),
        ..launch
    }
}

/// The Job of a request.
pub(super) fn job(pool: &Pool, launch: &Launch, settings: &Settings, request: &RequestId) -> Job {
    let own = [
        ("app.kubernetes.io/name", "attune".to_owned()),
        ("app.kubernetes.io/component", "worker".to_owned()),
        ("app.kubernetes.io/managed-by", "attune".to_owned()),
        (POOL_LABEL, pool.name.to_string()),
        (REQUEST_LABEL, request.to_string()),
    ];
    let mut labels = settings.labels.clone();
    labels.extend(own.map(|(name, value)| (name.to_owned(), value)));
    let annotations = Some(settings.annotations.clone()).filter(|annotations| !annotations.is_empty());
    let metadata = ObjectMeta { labels: Some(labels), annotations, ..ObjectMeta::default() };
    let mut pod = pod(pool, launch, settings, request);
    pod.merge_from(settings.pod.clone());
    Job {
        metadata: ObjectMeta {
            name: Some(name(request)),
            namespace: Some(settings.namespace.clone()),
            ..metadata.clone()
        },
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            completions: Some(1),
            parallelism: Some(1),
            ttl_seconds_after_finished: Some(i32::try_from(settings.kept.as_secs()).unwrap_or(i32::MAX)),
            template: PodTemplateSpec { metadata: Some(metadata), spec: Some(pod) },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// A Pod before anything is laid over it.
fn pod(pool: &Pool, launch: &Launch, settings: &Settings, request: &RequestId) -> PodSpec {
    let files = files(settings);
    let (volumes, volume_mounts): (Vec<_>, Vec<_>) = files.into_iter().unzip();
    let user = Some(settings.user);
    let container = Container {
        name: CONTAINER.to_owned(),
        image: Some(settings.image.clone()),
        command: settings.program.as_ref().map(|program| vec![literal(&program.to_string_lossy())]),
        args: Some(
            launch
                .arguments(pool, request, WORK_DIR.as_ref())
                .iter()
                .map(|argument| literal(&argument.to_string_lossy()))
                .collect(),
        ),
        resources: Some(resources(pool, settings)),
        volume_mounts: Some(volume_mounts),
        // What a worker said last is why it failed, and is there where nobody collects logs.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        ..Container::default()
    };
    let grace = launch.grace + LAST_WORDS;
    PodSpec {
        containers: vec![container],
        volumes: Some(volumes),
        restart_policy: Some("Never".to_owned()),
        active_deadline_seconds: settings.time.map(seconds),
        termination_grace_period_seconds: Some(seconds(grace)),
        automount_service_account_token: Some(false),
        // Addresses of others' services are no business of a worker's.
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: user,
            run_as_group: user,
            fs_group: user,
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// An argument that Kubernetes passes on as it stands: it would put variables in the place of `$(NAME)`, and reads `$$` as `$`.
fn literal(argument: &str) -> String {
    argument.replace('$', "$$")
}

fn resources(pool: &Pool, settings: &Settings) -> ResourceRequirements {
    let Settings { cpu, memory, disk, card, .. } = settings;
    let one = |name: &str, amount: &Quantity| (name.to_owned(), amount.clone());
    let mut limits = BTreeMap::from([one("memory", memory)]);
    // A card is asked for by its limit alone. Processors have none: idle ones would lie fallow beside a worker that waits for them.
    if pool.devices.n_cuda > 0 {
        limits.insert(card.clone(), Quantity(pool.devices.n_cuda.to_string()));
    }
    let requests = BTreeMap::from([one("cpu", cpu), one("memory", memory), one("ephemeral-storage", disk)]);
    ResourceRequirements { limits: Some(limits), requests: Some(requests), claims: None }
}

/// The folders that a worker sees, and where.
fn files(settings: &Settings) -> Vec<(Volume, VolumeMount)> {
    let mount = |name: &str, path: &str, is_read: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: is_read.then_some(true),
        ..VolumeMount::default()
    };
    let volume = |name: &str| Volume { name: name.to_owned(), ..Volume::default() };
    let room = |size: Quantity| Some(EmptyDirVolumeSource { size_limit: Some(size), medium: None });
    let item =
        |key: &Key, path: &str| Some(vec![KeyToPath { key: key.key.clone(), path: path.to_owned(), mode: None }]);
    let secret = |name: &str, items: Option<Vec<KeyToPath>>| {
        Some(SecretVolumeSource {
            secret_name: Some(name.to_owned()),
            items,
            default_mode: Some(SECRET_MODE),
            optional: None,
        })
    };
    let mut all = vec![
        (Volume { empty_dir: room(settings.disk.clone()), ..volume("work") }, mount("work", WORK_DIR, false)),
        (Volume { empty_dir: room(Quantity(TEMPORARY.to_owned())), ..volume("tmp") }, mount("tmp", "/tmp", false)),
    ];
    if let Some(token) = &settings.token {
        let volume = Volume { secret: secret(&token.of, item(token, "token")), ..volume("token") };
        all.push((volume, mount("token", TOKEN_DIR, true)));
    }
    if let Some(authority) = &settings.authority {
        let volume = match authority {
            Authority::Secret(key) => Volume { secret: secret(&key.of, item(key, "ca.crt")), ..volume("ca") },
            Authority::ConfigMap(key) => Volume {
                config_map: Some(ConfigMapVolumeSource {
                    name: key.of.clone(),
                    items: item(key, "ca.crt"),
                    ..ConfigMapVolumeSource::default()
                }),
                ..volume("ca")
            },
        };
        all.push((volume, mount("ca", CA_DIR, true)));
    }
    if let Some(identity) = &settings.identity {
        let volume = Volume { secret: secret(identity, None), ..volume("identity") };
        all.push((volume, mount("identity", IDENTITY_DIR, true)));
    }
    all
}
