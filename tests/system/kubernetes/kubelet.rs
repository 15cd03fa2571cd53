//! A node: it starts what the Pods that are placed on it say, as processes here, and ends them as it is told.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::server::Api;
use super::world::{Kind, is_deleted, is_over, name};

/// What runs of a Pod.
struct Container {
    child: Child,
    /// Its node's folder, which goes with it.
    _folder: tempfile::TempDir,
    /// Since when it is told to end.
    told: Option<Instant>,
}

/// A node with the Secrets of the cluster, by their names and keys.
pub(super) struct Kubelet {
    pub(super) api: Arc<Api>,
    pub(super) secrets: BTreeMap<String, BTreeMap<String, String>>,
    /// Where containers' standard error goes.
    pub(super) log: PathBuf,
    /// What runs, by the names of Pods.
    pub(super) processes: Arc<Mutex<BTreeMap<String, i32>>>,
}

impl Kubelet {
    /// Works until it is dropped.
    pub(super) async fn work(self) {
        let mut containers: BTreeMap<String, Container> = BTreeMap::new();
        loop {
            let pods: BTreeMap<String, Value> =
                self.api.world.all(Kind::Pod).into_iter().map(|pod| (name(&pod), pod)).collect();
            for (name, pod) in &pods {
                let is_mine = pod["spec"]["nodeName"].is_string() && !is_over(pod);
                if is_mine && !containers.contains_key(name) && !is_deleted(pod) {
                    containers.insert(name.clone(), self.start(pod));
                    self.api.world.run(name);
                }
            }
            let mut ended = Vec::new();
            for (name, container) in &mut containers {
                let pod = pods.get(name);
                if let Some(status) = container.child.try_wait().unwrap() {
                    ended.push((name.clone(), pod.is_some(), status));
                } else if pod.is_none_or(is_deleted) {
                    // One that is gone from the list without its node's word was deleted without grace.
                    let grace = pod.and_then(|pod| pod["metadata"]["deletionGracePeriodSeconds"].as_u64()).unwrap_or(0);
                    let id = Pid::from_raw(i32::try_from(container.child.id().unwrap()).unwrap());
                    match container.told {
                        None => {
                            kill(id, Signal::SIGTERM).unwrap();
                            container.told = Some(Instant::now());
                        }
                        Some(told) if told.elapsed() >= Duration::from_secs(grace) => {
                            kill(id, Signal::SIGKILL).unwrap()
                        }
                        Some(_) => {}
                    }
                }
            }
            for (name, is_known, status) in ended {
                containers.remove(&name);
                if is_known {
                    let reason = if status.success() { "Completed" } else { "Error" };
                    self.api.world.end(&name, status.code().unwrap_or(137), reason, "");
                }
            }
            let ids = containers.iter().filter_map(|(name, container)| Some((name.clone(), container.child.id()?)));
            *self.processes.lock().unwrap() = ids.map(|(name, id)| (name, i32::try_from(id).unwrap())).collect();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts a Pod's one container, with its volumes as folders here.
    fn start(&self, pod: &Value) -> Container {
        let folder = tempfile::tempdir().unwrap();
        let container = &pod["spec"]["containers"][0];
        let mut places: Vec<(String, PathBuf)> = Vec::new();
        for mount in container["volumeMounts"].as_array().unwrap() {
            let volumes = pod["spec"]["volumes"].as_array().unwrap();
            let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
            let place = folder.path().join(volume["name"].as_str().unwrap());
            std::fs::create_dir(&place).unwrap();
            if let Some(secret) = volume.get("secret") {
                let has = &self.secrets[secret["secretName"].as_str().unwrap()];
                for item in secret["items"].as_array().unwrap() {
                    std::fs::write(place.join(item["path"].as_str().unwrap()), &has[item["key"].as_str().unwrap()])
                        .unwrap();
                }
            } else {
                assert!(volume["emptyDir"]["sizeLimit"].is_string(), "{volume}");
            }
            places.push((mount["mountPath"].as_str().unwrap().to_owned(), place));
        }
        // A container sees its volumes where they are mounted; here whatever names such a place is led to its folder.
        let seen = |word: &Value| {
            let word = word.as_str().unwrap().replace("$$", "$");
            let place = places
                .iter()
                .find(|(at, _)| word.strip_prefix(at).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
            place.map_or_else(|| word.clone(), |(at, place)| word.replacen(at, &place.display().to_string(), 1))
        };
        let mut words =
            [&container["command"], &container["args"]].into_iter().flat_map(|list| list.as_array().unwrap()).map(seen);
        let mut command = Command::new(words.next().unwrap());
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        command.args(words).env_clear().env("PATH", "/usr/bin:/bin").env("NO_COLOR", "1").kill_on_drop(true);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Container { child, _folder: folder, told: None }
    }
}
