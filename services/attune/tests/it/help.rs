//! Help, usage, completions, and a reader that goes away.

use std::process::Stdio;

use crate::support::{Place, run};

/// All that are shown.
const COMMANDS: [&str; 25] = [
    "demo",
    "up",
    "submit",
    "jobs",
    "artifacts",
    "workers",
    "projects",
    "methods",
    "validate",
    "data",
    "generate",
    "classify",
    "embed",
    "experiment",
    "fairness",
    "answers",
    "drift",
    "merge",
    "convert",
    "tokens",
    "audit",
    "scheduler",
    "worker",
    "doctor",
    "completions",
];

#[test]
fn help_shows_every_command_and_the_exit_statuses() {
    let ran = run(&["--help"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    for line in COMMANDS {
        assert!(ran.stdout.contains(&format!("\n  {line} ")), "{line}: {}", ran.stdout);
    }
    assert!(!ran.stdout.contains("\n  attempt "), "{}", ran.stdout);
    assert!(ran.stdout.contains("Exit status: 0 done, 1 the job or call failed, 2 wrong usage"), "{}", ran.stdout);
}

#[test]
fn help_of_every_command_has_an_example() {
    for command in COMMANDS.iter().filter(|command| **command != "doctor") {
        let ran = run(&[command, "--help"]);
        assert_eq!(ran.status, 0, "{}", ran.all());
        assert!(ran.stdout.contains("Example"), "{}", ran.stdout);
    }
}

#[test]
fn wrong_usage_is_said_with_status_two() {
    let ran = run(&["methods", "shwo", "lora"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (2, ""));
    assert!(ran.stderr.contains("unrecognized subcommand 'shwo'") && ran.stderr.contains("'show'"), "{}", ran.stderr);
    let ran = run(&["validate", "job.yaml", "--set", "rank"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains("expected PATH=VALUE, such as tune.adapter.rank=16"), "{}", ran.stderr);
    assert_eq!(run(&[]).status, 2);
}

#[test]
fn the_version_is_one_line() {
    let ran = run(&["--version"]);
    assert_eq!(ran.all(), format!("exit status 0\n--- stdout\nattune {}\n--- stderr\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_are_scripts_that_know_the_commands() {
    for (shell, mark) in [("bash", "complete -F _attune"), ("zsh", "#compdef attune"), ("fish", "complete -c attune")] {
        let ran = run(&["completions", shell]);
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
        assert!(ran.stdout.contains(mark) && ran.stdout.contains("validate"), "{shell}: {}", ran.stdout);
    }
    assert_eq!(run(&["completions", "cmd"]).status, 2);
}

#[test]
fn a_reader_that_goes_away_is_success() {
    let place = Place::new();
    let mut child =
        place.command(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Nobody reads: whatever is written after this meets a closed pipe.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn doctor_says_what_a_report_of_a_problem_needs() {
    let ran = run(&["doctor"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.starts_with("WHAT") && ran.stdout.contains("kernel profile"), "{}", ran.stdout);
    let found = run(&["doctor", "--json"]).json();
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert!(found["cores"].as_u64().unwrap() > 0 && found["kernel_profile"].is_string(), "{found}");
}
