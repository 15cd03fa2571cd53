//! The part of a provider file that says how Pods are made.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use attune_scheduler_core::supply::REQUEST_LABEL;
use attune_spec::FieldPath;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde_json::Value;

use super::super::config::{DAY, Reader};
use super::super::fields;
use super::{POOL_LABEL, manifest};

/// The user and group as which workers run, unless the file says otherwise: nobody's, as in images that have no other.
const USER: i64 = 65532;
/// How long Jobs that have ended stay to be looked at.
const KEPT: Duration = Duration::from_secs(600);
/// What a card is called where NVIDIA's device plugin offers it.
const CARD: &str = "nvidia.com/gpu";

#[derive(Debug, serde::Deserialize)]
struct Written {
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
    namespace: String,
    image: String,
    token: Option<WrittenToken>,
    ca: Option<WrittenCa>,
    identity: Option<WrittenIdentity>,
    cpu: Option<Amount>,
    memory: Amount,
    disk: Amount,
    card: Option<String>,
    time: Option<String>,
    kept: Option<String>,
    user: Option<i64>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    pod: PodSpec,
}

#[derive(Debug, serde::Deserialize)]
struct WrittenToken {
    secret: String,
    key: Option<String>,
}

#[derive(Debug, serde::Deserialize)]
struct WrittenCa {
    secret: Option<String>,
    config_map: Option<String>,
    key: Option<String>,
}

#[derive(Debug, serde::Deserialize)]
struct WrittenIdentity {
    secret: String,
}

/// An amount as Kubernetes writes it, such as `500m` or `64Gi`; a plain number is one as well.
#[derive(Debug, Clone)]
struct Amount(String);

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount such as 8, 500m or 64Gi")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Amount, E> {
                Ok(Amount(number.to_string()))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Amount, E> {
                Ok(Amount(number.to_string()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
                Ok(Amount(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A key of a Secret or ConfigMap, which Pods see as a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// The name of the object.
    pub(super) of: String,
    pub(super) key: String,
}

/// Where the authorities' certificates lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Authority {
    Secret(Key),
    ConfigMap(Key),
}

/// How Pods are made, and how the API server is reached.
#[derive(Debug, Clone)]
pub(in super::super) struct Settings {
    /// The file that says where the API server is and who asks; what the scheduler's own Pod or its environment says if absent.
    pub(super) kubeconfig: Option<PathBuf>,
    /// The file's context; its current one if absent.
    pub(super) context: Option<String>,
    pub(super) namespace: String,
    pub(super) image: String,
    /// Attune's program in the image; what the image starts if absent.
    pub(super) program: Option<PathBuf>,
    /// The worker's token.
    pub(super) token: Option<Key>,
    pub(super) authority: Option<Authority>,
    /// The Secret of the worker's certificate and its key, of type `kubernetes.io/tls`.
    pub(super) identity: Option<String>,
    /// Processors asked for; more may be used where they are idle.
    pub(super) cpu: Quantity,
    /// Memory asked for, and the most.
    pub(super) memory: Quantity,
    /// Room for what the worker keeps while it lasts: inputs, checkpoints, results.
    pub(super) disk: Quantity,
    /// What a card is called as a resource.
    pub(super) card: String,
    /// The longest time that a Pod runs.
    pub(super) time: Option<Duration>,
    /// How long a Job stays to be looked at after its end.
    pub(super) kept: Duration,
    /// The user and group as which the worker runs.
    pub(super) user: i64,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    /// What is laid over the Pod, entry by entry, as Kubernetes merges strategically.
    pub(super) pod: PodSpec,
}

impl Settings {
    /// Reads the part `kubernetes` of a file; nothing if it is so wrong that faults are all there is to say.
    pub(in super::super) fn read(reader: &mut Reader, value: &Value, meant: Meant) -> Option<Self> {
        let written: Written = match fields::read(value, FieldPath::from("kubernetes")) {
            Ok(written) => written,
            Err(faults) => {
                reader.faults.extend(faults);
                return None;
            }
        };
        let Written { kubeconfig, context, namespace, image, card, user, labels, annotations, pod, .. } = &written;
        reader.absolute("kubernetes.kubeconfig", kubeconfig.as_ref());
        if !is_label(namespace) {
            let what = format!("is {namespace:?}; expected the name of a namespace, 1 to 63 of a-z, 0-9 and '-'");
            reader.fault("kubernetes.namespace", what);
        }
        if image.is_empty() || image.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
            reader.fault("kubernetes.image", format!("is {image:?}; expected an image such as registry/attune:0.1.0"));
        }
        if meant.needs_token && written.token.is_none() {
            let what = "is missing; expected the Secret of a worker's token, for callers are asked who they are";
            reader.fault("kubernetes.token", what);
        }
        let token = written.token.as_ref().map(|token| {
            let key = token.key.as_deref().unwrap_or("token");
            reader.key("kubernetes.token", ("secret", &token.secret), key)
        });
        let authority = written.ca.as_ref().and_then(|ca| reader.authority(ca));
        let identity = written.identity.as_ref().map(|identity| {
            reader.object("kubernetes.identity.secret", &identity.secret);
            identity.secret.clone()
        });
        let card = card.clone().unwrap_or_else(|| CARD.to_owned());
        if !is_qualified(&card) || !card.contains('/') {
            let what = format!("is {card:?}; expected the name of a resource such as {CARD}");
            reader.fault("kubernetes.card", what);
        }
        let cpu = written.cpu.clone().unwrap_or_else(|| Amount(meant.cpu.to_string()));
        let (cpu, memory, disk) = (
            reader.amount("cpu", &cpu),
            reader.amount("memory", &written.memory),
            reader.amount("disk", &written.disk),
        );
        let user = user.unwrap_or(USER);
        if !(1..=i64::from(u32::MAX)).contains(&user) {
            reader.fault("kubernetes.user", format!("is {user}; expected the number of a user that is not root"));
        }
        let time = written.time.as_ref();
        let time = time.map(|_| reader.time("kubernetes.time", time, Duration::ZERO, (60, 365 * DAY)));
        let kept = reader.time("kubernetes.kept", written.kept.as_ref(), KEPT, (0, 365 * DAY));
        reader.labels(labels);
        for name in annotations.keys().filter(|name| !is_qualified(name)) {
            reader.fault(&format!("kubernetes.annotations.{name}"), "is not the name of an annotation");
        }
        reader.overlay(pod);
        Some(Self {
            kubeconfig: kubeconfig.clone(),
            context: context.clone(),
            namespace: namespace.clone(),
            image: image.clone(),
            program: meant.program,
            token,
            authority,
            identity,
            cpu,
            memory,
            disk,
            card,
            time,
            kept,
            user,
            labels: labels.clone(),
            annotations: annotations.clone(),
            pod: pod.clone(),
        })
    }
}

/// What other parts of the file, and the scheduler itself, say.
#[derive(Debug)]
pub(in super::super) struct Meant {
    /// Processors of a worker.
    pub(in super::super) cpu: u32,
    /// Attune's program in the image, if the file names it.
    pub(in super::super) program: Option<PathBuf>,
    /// Whether workers need a token.
    pub(in super::super) needs_token: bool,
}

impl Reader {
    fn object(&mut self, path: &str, name: &str) {
        if !is_subdomain(name) {
            self.fault(path, format!("is {name:?}; expected the name of an object, of a-z, 0-9, '-' and '.'"));
        }
    }

    fn key(&mut self, path: &str, (field, of): (&str, &str), key: &str) -> Key {
        self.object(&format!("{path}.{field}"), of);
        if !is_key(key) {
            self.fault(&format!("{path}.key"), format!("is {key:?}; expected a key such as token or ca.crt"));
        }
        Key { of: of.to_owned(), key: key.to_owned() }
    }

    fn authority(&mut self, written: &WrittenCa) -> Option<Authority> {
        let key = written.key.as_deref().unwrap_or("ca.crt");
        match (&written.secret, &written.config_map) {
            (Some(of), None) => Some(Authority::Secret(self.key("kubernetes.ca", ("secret", of), key))),
            (None, Some(of)) => Some(Authority::ConfigMap(self.key("kubernetes.ca", ("config_map", of), key))),
            (None, None) | (Some(_), Some(_)) => {
                self.fault("kubernetes.ca", "names none or both of `secret` and `config_map`; expected one");
                None
            }
        }
    }

    fn amount(&mut self, field: &str, amount: &Amount) -> Quantity {
        if !is_amount(&amount.0) {
            let what = format!("is {:?}; expected an amount above zero such as 8, 500m or 64Gi", amount.0);
            self.fault(&format!("kubernetes.{field}"), what);
        }
        Quantity(amount.0.clone())
    }

    fn labels(&mut self, labels: &BTreeMap<String, String>) {
        for (name, value) in labels {
            let path = format!("kubernetes.labels.{name}");
            if [REQUEST_LABEL, POOL_LABEL].contains(&name.as_str()) || name.starts_with("app.kubernetes.io/") {
                self.fault(&path, "is a label that Attune sets itself");
            } else if !is_qualified(name) || !(value.is_empty() || is_word(value)) {
                self.fault(&path, format!("is {value:?}; expected a label and its value as Kubernetes has them"));
            }
        }
    }

    /// Refuses what would make a Pod something else than one worker of this pool.
    fn overlay(&mut self, pod: &PodSpec) {
        let mut own = |is_there: bool, field: &str, instead: &str| {
            if is_there {
                self.fault(&format!("kubernetes.pod.{field}"), format!("is what {instead} says"));
            }
        };
        own(pod.active_deadline_seconds.is_some(), "activeDeadlineSeconds", "`kubernetes.time`");
        own(pod.termination_grace_period_seconds.is_some(), "terminationGracePeriodSeconds", "`worker.grace`");
        own(pod.restart_policy.is_some(), "restartPolicy", "Attune itself, which asks for another worker");
        own(pod.ephemeral_containers.is_some(), "ephemeralContainers", "`kubectl debug`, of a Pod that runs");
        for (idx, container) in pod.containers.iter().enumerate() {
            let path = |field: &str| format!("containers[{idx}].{field}");
            let Container { name, image, command, args, .. } = container;
            own(image.is_some(), &path("image"), "`kubernetes.image`");
            own(command.is_some(), &path("command"), "`program`");
            own(args.is_some(), &path("args"), "Attune itself");
            if name != manifest::CONTAINER {
                let what = format!(
                    "is {name:?}; expected {:?}: a Pod ends with its containers, so what serves it belongs into initContainers",
                    manifest::CONTAINER
                );
                self.fault(&format!("kubernetes.pod.containers[{idx}].name"), what);
                return;
            }
        }
    }
}

fn is_alphanumeric(byte: Option<&u8>) -> bool {
    byte.is_some_and(u8::is_ascii_alphanumeric)
}

/// Letters, digits and `-`, `_`, `.` between them: the value of a label, and the last part of its name.
fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && is_alphanumeric(bytes.first())
        && is_alphanumeric(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

/// The name of a namespace.
fn is_label(text: &str) -> bool {
    is_word(text) && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// The name of an object.
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// The name of a label, an annotation or a resource.
fn is_qualified(text: &str) -> bool {
    text.split_once('/').map_or_else(|| is_word(text), |(domain, name)| is_subdomain(domain) && is_word(name))
}

/// The key of a Secret or ConfigMap.
fn is_key(text: &str) -> bool {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=253).contains(&text.len()) && text.bytes().all(letters) && !text.starts_with("..") && text != "."
}

/// Digits, perhaps with a point, and a unit; not zero.
fn is_amount(text: &str) -> bool {
    const UNITS: [&str; 14] = ["", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let at = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    number.parse::<f64>().is_ok_and(|number| number > 0.0) && UNITS.contains(&unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_amounts_are_those_that_kubernetes_takes() {
        for amount in ["8", "0.5", "500m", "64Gi", "1.5G"] {
            assert!(is_amount(amount), "{amount}");
        }
        for amount in ["", "0", "Gi", "64GB", "64 Gi", "-1", "1..5", "8e3x", "inf", "."] {
            assert!(!is_amount(amount), "{amount}");
        }
        assert!(is_qualified("nvidia.com/gpu") && is_qualified("zone") && !is_qualified("Kueue.x/Q_1"));
        assert!(!is_qualified("a/b/c") && !is_qualified("-a") && !is_qualified(""));
        assert!(is_subdomain("attune-worker.v1") && !is_subdomain("Attune") && !is_subdomain("a..b"));
        assert!(is_key("ca.crt") && is_key(".hidden") && !is_key("..") && !is_key("a/b") && !is_key(""));
    }

    fn faults(text: &str, needs_token: bool) -> Vec<String> {
        let defaults = crate::providers::Defaults { program: "/attune".into(), server: None, needs_token };
        let read = crate::providers::read(text, &defaults);
        read.unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_faults_are_named_with_their_places() {
        let text = r"
name: gpu
max: 2
server: https://scheduler:7070
token_file: /etc/attune/worker.token
kubernetes:
  namespace: Tuning
  image: 'two words'
  kubeconfig: config
  memory: 64GB
  disk: 0
  card: gpu
  user: 0
  time: 5s
  ca: {secret: a, config_map: b}
  identity: {secret: Upper}
  labels: {attune.pool: mine, '-odd': x, zone: 'not a value'}
  annotations: {'a/b/c': x}
  pod:
    restartPolicy: Always
    terminationGracePeriodSeconds: 5
    containers:
    - {name: worker, image: other, args: [x]}
    - {name: side}
";
        let expected = [
            "`token_file` is a file of a machine",
            "`kubernetes.kubeconfig` is \"config\"; expected a path from the root",
            "`kubernetes.namespace` is \"Tuning\"; expected the name of a namespace",
            "`kubernetes.image` is \"two words\"; expected an image",
            "`kubernetes.token` is missing; expected the Secret",
            "`kubernetes.ca` names none or both",
            "`kubernetes.identity.secret` is \"Upper\"; expected the name of an object",
            "`kubernetes.card` is \"gpu\"; expected the name of a resource such as nvidia.com/gpu",
            "`kubernetes.memory` is \"64GB\"; expected an amount above zero",
            "`kubernetes.disk` is \"0\"; expected an amount above zero",
            "`kubernetes.user` is 0; expected the number of a user that is not root",
            "`kubernetes.time` is \"5s\"; expected a time",
            "`kubernetes.labels.-odd` is \"x\"; expected a label",
            "`kubernetes.labels.attune.pool` is a label that Attune sets itself",
            "`kubernetes.labels.zone` is \"not a value\"; expected a label",
            "`kubernetes.annotations.a/b/c` is not the name of an annotation",
            "`kubernetes.pod.terminationGracePeriodSeconds` is what `worker.grace` says",
            "`kubernetes.pod.restartPolicy` is what Attune itself",
            "`kubernetes.pod.containers[0].image` is what `kubernetes.image` says",
            "`kubernetes.pod.containers[0].args` is what Attune itself",
            "`kubernetes.pod.containers[1].name` is \"side\"; expected \"worker\"",
        ];
        let found = faults(text, true);
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}; expected {expected}");
        }
        assert_eq!(found.len(), expected.len(), "{found:#?}");
    }

    #[test]
    fn fields_that_nobody_knows_are_named_with_the_nearest_in_kubernetes_own_parts_as_well() {
        let text = "
name: gpu
max: 2
kubernetes:
  namespace: tuning
  imge: attune
  memory: 4Gi
  disk: 1Gi
  token: {secert: a}
  pod:
    nodeSelektor: {zone: a}
    tolerations: [{key: a, efect: NoSchedule}]
    securityContext: {runAsUser: nobody}
";
        let expected = [
            "`kubernetes.imge` is not a known field; did you mean \"image\"?",
            "`kubernetes.pod.nodeSelektor` is not a known field; did you mean \"nodeSelector\"?",
            "`kubernetes.pod.tolerations[0].efect` is not a known field; did you mean \"effect\"?",
            "`kubernetes.pod.securityContext.runAsUser` is string \"nobody\"; expected i64",
        ];
        let with_token = faults(text, false);
        assert_eq!(
            with_token[..2],
            [
                "`server` is missing; expected the scheduler's URL, as workers reach it".to_owned(),
                expected[0].to_owned(),
            ]
        );
        let found = faults(&text.replace("  token: {secert: a}\n", ""), false);
        assert_eq!(found[1..], expected.map(str::to_owned));
    }
}
