//! Which room may see which: the arrows of the architecture, from what cargo resolves.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use super::repository::{none, root};

/// The packages of the workspace that each may use, in its own code (tests may use more).
const ARROWS: &[(&str, &[&str])] = &[
    ("attune-spec", &[]),
    ("attune-telemetry", &[]),
    ("attune-tensor", &[]),
    ("attune-architecture", &["spec"]),
    ("attune-artifacts", &["spec"]),
    ("attune-proto", &["spec"]),
    ("attune-store", &["spec"]),
    ("attune-scheduler-core", &["spec"]),
    ("attune-scheduler", &["architecture", "artifacts", "proto", "scheduler-core", "spec", "store", "telemetry"]),
    ("attune-points", &["architecture", "spec", "tensor"]),
    ("attune-models", METHOD_ROOM),
    ("attune-adapt", METHOD_ROOM),
    ("attune-objective", METHOD_ROOM),
    ("attune-data", METHOD_ROOM),
    ("attune-optim", METHOD_ROOM),
    ("attune-continual", METHOD_ROOM),
    ("attune-merge", METHOD_ROOM),
    ("attune-probe", METHOD_ROOM),
    ("attune-search", METHOD_ROOM),
    ("attune-collective", METHOD_ROOM),
    ("attune-trainer", TRAINER),
    ("attune-untrusted", &["architecture", "artifacts", "data", "proto", "spec"]),
    ("attune-worker", &["architecture", "artifacts", "proto", "spec", "telemetry", "trainer"]),
    ("attune", EVERYTHING),
    ("attune-system-tests", EVERYTHING),
];

/// A room of methods sees no other room of methods.
const METHOD_ROOM: &[&str] = &["architecture", "artifacts", "points", "spec", "tensor"];

/// The trainer sees all lists, and nothing of the control plane.
const TRAINER: &[&str] = &[
    "adapt",
    "architecture",
    "artifacts",
    "collective",
    "continual",
    "data",
    "merge",
    "models",
    "objective",
    "optim",
    "points",
    "probe",
    "search",
    "spec",
    "tensor",
];

const EVERYTHING: &[&str] = &["*"];

/// Rooms that must build where no numeric library is.
const CONTROL: &[&str] = &[
    "attune-spec",
    "attune-architecture",
    "attune-artifacts",
    "attune-proto",
    "attune-store",
    "attune-scheduler-core",
    "attune-scheduler",
    "attune-telemetry",
];

/// Rooms that must be usable as a library, without a server or a database.
const TRAINING: &[&str] = &[
    "attune-tensor",
    "attune-points",
    "attune-models",
    "attune-data",
    "attune-adapt",
    "attune-objective",
    "attune-optim",
    "attune-continual",
    "attune-merge",
    "attune-probe",
    "attune-search",
    "attune-collective",
    "attune-trainer",
];

/// What cargo resolved: for each package of the workspace its direct dependencies, and everything below them. Neither
/// holds what only tests use.
struct Graph {
    direct: BTreeMap<String, BTreeSet<String>>,
    all: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn resolve() -> Self {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let host = run(Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("-vV"));
        let host = host.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc says its host").to_owned();
        // With the host alone nothing has to be downloaded that no build needs.
        let text = run(Command::new(cargo).current_dir(root()).args([
            "metadata",
            "--offline",
            "--locked",
            "--format-version",
            "1",
            "--filter-platform",
            &host,
        ]));
        let metadata: Value = serde_json::from_str(&text).expect("cargo writes JSON");
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let names: BTreeMap<String, String> =
            list(&metadata["packages"]).iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
        let below: BTreeMap<String, BTreeSet<String>> = list(&metadata["resolve"]["nodes"])
            .iter()
            .map(|node| {
                let used = list(&node["deps"])
                    .into_iter()
                    .filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].as_str() != Some("dev")));
                (text(&node["id"]), used.map(|dep| text(&dep["pkg"])).collect())
            })
            .collect();
        let (mut direct, mut all) = (BTreeMap::new(), BTreeMap::new());
        for member in list(&metadata["workspace_members"]).iter().map(text) {
            let mut seen = BTreeSet::new();
            let mut open = vec![member.clone()];
            while let Some(at) = open.pop() {
                for next in below.get(&at).into_iter().flatten().filter(|next| *next != &member) {
                    if seen.insert(next.clone()) {
                        open.push(next.clone());
                    }
                }
            }
            let named = |ids: &BTreeSet<String>| ids.iter().filter_map(|id| names.get(id).cloned()).collect();
            direct.insert(names[&member].clone(), named(&below[&member]));
            all.insert(names[&member].clone(), named(&seen));
        }
        Self { direct, all }
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("it writes UTF-8")
}

#[test]
fn rooms_see_only_what_they_may() {
    let graph = Graph::resolve();
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let mut violations = Vec::new();
    for (package, used) in &graph.direct {
        let Some(allowed) = allowed.get(package.as_str()) else {
            violations.push(format!("{package}: is a new room; say here what it may see"));
            continue;
        };
        for other in used.iter().filter_map(|other| other.strip_prefix("attune-")) {
            if !allowed.contains(&other) && *allowed != EVERYTHING {
                violations.push(format!("{package}: uses attune-{other}; it may see {allowed:?}"));
            }
        }
    }
    none("arrows between rooms:", &violations);
}

#[test]
fn the_control_half_is_free_of_numeric_libraries() {
    let graph = Graph::resolve();
    let mut violations = below(&graph, CONTROL, |name| {
        name.starts_with("candle") || name.starts_with("gemm") || name == "tokenizers" || name == "attune-tensor"
    });
    // Only a look at the other half shows that the names above are the right ones.
    if !graph.all.get("attune-trainer").is_some_and(|all| all.contains("candle-core")) {
        violations.push("attune-trainer: does not use candle-core; this rule looks for the wrong names".into());
    }
    none("numeric libraries in the control half:", &violations);
}

#[test]
fn the_training_half_is_free_of_servers_and_databases() {
    let graph = Graph::resolve();
    let mut violations = below(&graph, TRAINING, |name| {
        name.starts_with("sqlx") || name.starts_with("tonic") || name.starts_with("axum") || name == "libsqlite3-sys"
    });
    if !graph.all.get("attune-scheduler").is_some_and(|all| all.contains("tonic") && all.contains("sqlx")) {
        violations.push("attune-scheduler: does not use tonic and sqlx; this rule looks for the wrong names".into());
    }
    none("servers and databases in the training half:", &violations);
}

/// The core decides and does nothing else: no clock, no randomness, no input or output can reach it.
#[test]
fn the_scheduling_core_uses_names_and_errors_only() {
    let graph = Graph::resolve();
    let core: Vec<_> = graph.direct["attune-scheduler-core"].iter().map(String::as_str).collect();
    assert_eq!(core, ["attune-spec", "thiserror"]);
}

fn below(graph: &Graph, rooms: &[&str], forbidden: impl Fn(&str) -> bool) -> Vec<String> {
    let mut violations = Vec::new();
    for room in rooms {
        // A room that has not been started has nothing below it.
        for name in graph.all.get(*room).into_iter().flatten().filter(|name| forbidden(name)) {
            violations.push(format!("{room}: uses {name}, directly or through others"));
        }
    }
    violations
}
