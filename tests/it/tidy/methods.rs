//! Methods: one file each, in its point's list, with all parts of its documentation, and its name at home only.

use std::collections::BTreeMap;

use super::repository::{File, before_tests, none, rust, test_only};

/// The parts of a method's documentation, in their order.
const PARTS: &[&str] = &["# Update", "# Symbols", "# Cost", "# Limits", "# Departures", "# Paper"];

/// What defines a method; its own examples are none.
const SPEC: &str = "crates/spec/src/method/";

/// Files that hold a method: the type that implements it and its registered name.
fn methods(all: &[File]) -> Vec<(&File, String, String)> {
    let mut found = Vec::new();
    let tests = test_only(all);
    for file in all.iter().filter(|file| file.path.contains("/src/") && !file.path.starts_with(SPEC)) {
        let code = before_tests(file);
        if tests.contains(file.path.as_str()) || !code.contains("impl Method for ") {
            continue;
        }
        let kind = code.split("impl Method for ").nth(1).and_then(|rest| rest.split([' ', '{', '<']).next());
        let name = code.split("Card::new(").nth(1).and_then(|rest| rest.split('"').nth(1));
        found.push((file, kind.unwrap_or_default().to_owned(), name.unwrap_or_default().to_owned()));
    }
    found
}

#[test]
fn every_method_is_in_the_list_of_its_point() {
    let all = rust();
    let mut violations = Vec::new();
    for (file, kind, name) in methods(&all) {
        if kind.is_empty() || name.is_empty() {
            violations.push(format!("{}: has no `impl Method for …` with a `Card::new(\"name\", …)`", file.path));
            continue;
        }
        let head = format!("{}/mod.rs", file.folder());
        let line = format!("entry::<{}::{kind}>()", file.stem());
        let listed = all.iter().any(|other| other.path == head && other.text.contains(&line));
        if !listed {
            violations.push(format!("{}: {head} has no `{line}`", file.path));
        }
    }
    // The lists show that the rule above looks for the right words.
    let lists = |file: &&File| {
        file.path.contains("/src/") && !file.path.starts_with(SPEC) && before_tests(file).contains("entry::<")
    };
    if methods(&all).is_empty() {
        violations
            .extend(all.iter().filter(lists).map(|file| format!("{}: lists methods, and none was found", file.path)));
    }
    none("methods that cannot be named in a job file:", &violations);
}

#[test]
fn every_method_has_all_parts_of_its_documentation() {
    let all = rust();
    let mut violations = Vec::new();
    for (file, ..) in methods(&all) {
        let doc: Vec<_> = file
            .text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .map(|line| line.trim_start_matches("//!").trim())
            .collect();
        let mut parts = doc.iter().enumerate().filter(|(_, line)| line.starts_with("# "));
        for part in PARTS {
            match parts.next() {
                Some((at, line)) if line == part => {
                    let body = doc[at + 1..].iter().take_while(|line| !line.starts_with("# "));
                    if body.clone().all(|line| line.is_empty()) {
                        violations.push(format!(
                            "{}:{}: {part:?} says nothing; write \"none\" and why",
                            file.path,
                            at + 1
                        ));
                    }
                }
                Some((at, line)) => {
                    violations.push(format!("{}:{}: {line:?} stands where {part:?} belongs", file.path, at + 1));
                    break;
                }
                None => {
                    violations.push(format!("{}: {part:?} is missing", file.path));
                    break;
                }
            }
        }
        if doc.first().is_none_or(|first| first.is_empty() || first.starts_with('#')) {
            violations.push(format!("{}:1: does not begin with a sentence that says what it does", file.path));
        }
    }
    none("documentation of methods:", &violations);
}

#[test]
fn every_method_has_its_generated_description() {
    let all = rust();
    let described: BTreeMap<_, _> = std::fs::read_dir(super::repository::root().join("crates/spec/methods"))
        .expect("the folder of descriptions is there")
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().strip_suffix(".json").map(|name| (name.to_owned(), ())))
        .collect();
    if described.is_empty() {
        println!("skipped: no method has been described yet (crates/spec/methods has no .json file)");
        return;
    }
    let names: BTreeMap<_, _> = methods(&all).into_iter().map(|(file, _, name)| (name, file.path.clone())).collect();
    let mut violations: Vec<_> = names
        .iter()
        .filter(|(name, _)| !described.contains_key(*name))
        .map(|(name, path)| format!("{path}: crates/spec/methods/{name}.json is missing; generate it"))
        .collect();
    violations.extend(
        described
            .keys()
            .filter(|name| !names.contains_key(*name))
            .map(|name| format!("crates/spec/methods/{name}.json: no method has this name; delete it")),
    );
    none("descriptions of methods:", &violations);
}

/// Where a method's name is right outside its own file, and why.
const ABROAD: &[(&str, &[&str], &str)] = &[
    (
        "crates/spec/src/job/tune.rs",
        &["adamw", "cosine", "plain", "sft"],
        "what a job file means when it leaves a field out",
    ),
    ("crates/spec/src/job/data.rs", &["static"], "what a job file means when it leaves a field out"),
    ("crates/spec/src/recipes/mam.rs", &["prefix-tuning", "bottleneck"], "what a preset is a stack of"),
    ("crates/spec/src/recipes/autopeft_stack.rs", &["prefix-tuning", "bottleneck"], "what a preset is a stack of"),
    ("crates/spec/src/recipes/asymmetric_lora.rs", &["lora", "orthonormal"], "what a preset is a stack of"),
    ("crates/adapt/src/adapters/adalora.rs", &["orthogonal"], "a parameter of its own, not the start"),
    ("crates/adapt/src/adapters/adamss.rs", &["orthogonal"], "PEFT's word for how its tensors start"),
    ("crates/architecture/src/rope_config.rs", &["linear", "dynamic"], "Hugging Face's words for rope scaling"),
    ("crates/architecture/src/site.rs", &["linear"], "a kind of site, not the schedule"),
    (
        "crates/merge/src/words.rs",
        &["dare-linear", "dare-ties", "linear", "magnitude-prune", "task-arithmetic", "ties"],
        "what words of PEFT's mean",
    ),
    ("services/attune/src/demo/world.rs", &["mora"], "the end of a town's name"),
];

/// A name in a string elsewhere is a decision about a method outside of it: the card or the trait must answer instead.
#[test]
fn names_of_methods_stay_at_home() {
    let all = rust();
    let tests = test_only(&all);
    let home: BTreeMap<String, &str> =
        methods(&all).into_iter().map(|(file, _, name)| (name, file.path.as_str())).collect();
    let mut violations = Vec::new();
    for file in all.iter().filter(|file| file.path.contains("/src/") && !tests.contains(file.path.as_str())) {
        for (number, line) in before_tests(file).lines().enumerate().map(|(i, line)| (i + 1, line)) {
            if line.trim_start().starts_with("//") {
                continue;
            }
            for literal in line.split('"').skip(1).step_by(2) {
                let Some(at_home) = home.get(literal).map(|home| *home == file.path) else { continue };
                let allowed = ABROAD.iter().any(|(path, names, _)| *path == file.path && names.contains(&literal));
                if !at_home && !allowed {
                    violations
                        .push(format!("{}:{number}: {literal:?} is a method; ask its card or its trait", file.path));
                }
            }
        }
    }
    let gone = ABROAD.iter().filter(|(path, ..)| !all.iter().any(|file| file.path == *path));
    violations.extend(gone.map(|(path, ..)| format!("{path}: is listed as an exception and is not there")));
    none("names of methods outside their own files:", &violations);
}
