//! `attune attempt`: the protocol on standard input and output; `attune generate` with what it leaves behind.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_trainer::protocol::{Event, OutputRole, Request, VERSION};

use crate::support::Place;

/// Runs a request through the binary: its events, its exit status, and what it logged.
fn attempt(place: &Place, request: &str) -> (Vec<Event>, Option<i32>, String) {
    let mut child = place
        .command(&["attempt"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its input stays open until it is done: without it the process ends as an orphan.
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "{request}").unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let events = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    drop(input);
    let output = child.wait_with_output().unwrap();
    (events, output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A few steps of one of the demonstration's jobs on `base`; the folder of the result.
fn train(place: &Place, job: &str, base: &Path, work: &str) -> PathBuf {
    let mut value = read_yaml(&std::fs::read_to_string(place.path().join(job)).unwrap()).unwrap();
    let base = base.to_str().unwrap();
    for (path, text) in [("base", base), ("tune.steps", "2"), ("data.validation[0].rows", "2")] {
        set_path(&mut value, path, text).unwrap();
    }
    let spec = read_value(&value, Catalogue::embedded()).unwrap();
    let resolve = |reference: &attune_spec::job::Reference| {
        let path = reference.to_string();
        Ok(Input::Path(place.path().join(path.trim_start_matches("file://")).display().to_string()))
    };
    let plan = Plan::resolve(&spec, Catalogue::embedded(), resolve).unwrap();
    let work = place.path().join(work);
    std::fs::create_dir(&work).unwrap();
    let name = spec.name.to_string();
    let request = Request { version: VERSION, name, plan, inputs: BTreeMap::new(), work, ranks: 1, resume: None };
    let (events, status, log) = attempt(place, &serde_json::to_string(&request).unwrap());
    assert_eq!(status, Some(0), "{events:?}\n{log}");
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
    let result = events.into_iter().find_map(|event| match event {
        Event::Output { role: OutputRole::Result, folder, .. } => Some(folder),
        _ => None,
    });
    result.unwrap()
}

#[test]
fn a_request_that_is_not_understood_is_a_failed_event() {
    let (events, status, log) = attempt(&Place::new(), "{\"version\": 1}");
    assert_eq!((status, log.as_str()), (Some(1), ""));
    let [Event::Failed { message, .. }] = events.as_slice() else { panic!("{events:?}") };
    assert!(message.starts_with("the request is not understood"), "{message}");
}

#[test]
fn what_two_attempts_leave_behind_answers() {
    let place = Place::with_demo();
    let base = train(&place, "text.yaml", &place.path().join("base"), "text");
    let adapter = train(&place, "chat.yaml", &base, "chat");
    let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
    let say = ["generate", "--base", base, "--adapter", adapter, "--prompt", "Who are you?", "--max-tokens", "5"];
    let (text, json) = (place.run(&say), place.run(&[&say[..], &["--json"]].concat()));
    assert_eq!((text.status, text.stderr.as_str()), (0, ""));
    let said = json.json();
    assert_eq!(text.stdout, format!("{}\n", said["text"].as_str().unwrap()));
    assert!(said["tokens"].as_u64().unwrap() <= 5 && said["finish"].is_string(), "{said}");
    let ran = place.run(&["generate", "--base", base, "--prompt", "The", "--raw", "--max-tokens", "3", "--json"]);
    assert_eq!((ran.status, &ran.json()["tokens"]), (0, &3.into()), "{}", ran.all());
    let say = |option: &str| place.run(&["generate", "--base", base, "--prompt", "The", option, "-1"]).stderr;
    insta::assert_snapshot!(say("--temperature"), @r"
    error: invalid value '-1' for '--temperature <T>': expected 0 or more

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(say("--top-p"), @r"
    error: invalid value '-1' for '--top-p <P>': expected more than 0 and at most 1

    For more information, try '--help'.
    ");
}
