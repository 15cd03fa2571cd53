//! `attune attempt`: the protocol on standard input and output; `attune generate` with what it leaves behind.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_trainer::protocol::{Event, OutputRole, Request, Summary, VERSION};

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

/// Runs `steps` steps of one of the demonstration's jobs on `base`; the folder of the result, and what the run was like.
fn train(place: &Place, job: &str, base: &Path, work: &str, steps: u64) -> (PathBuf, Summary) {
    let mut value = read_yaml(&std::fs::read_to_string(place.path().join(job)).unwrap()).unwrap();
    let base = base.to_str().unwrap();
    for (path, text) in [("base", base), ("tune.steps", &steps.to_string())] {
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
    let request = Request {
        version: VERSION,
        name,
        plan,
        inputs: BTreeMap::new(),
        work,
        ranks: 1,
        card: None,
        resume: None,
        seat: None,
    };
    let (events, status, log) = attempt(place, &serde_json::to_string(&request).unwrap());
    assert_eq!(status, Some(0), "{events:?}\n{log}");
    let Some(Event::Finished { summary }) = events.last() else { panic!("{events:?}") };
    let result = events.iter().find_map(|event| match event {
        Event::Output { role: OutputRole::Result, folder, .. } => Some(folder.clone()),
        _ => None,
    });
    (result.unwrap(), summary.clone())
}

#[test]
fn a_request_that_is_not_understood_is_a_failed_event() {
    let (events, status, log) = attempt(&Place::new(), "{\"version\": 1}");
    assert_eq!((status, log.as_str()), (Some(1), ""));
    let [Event::Failed { message, .. }] = events.as_slice() else { panic!("{events:?}") };
    assert!(message.starts_with("the request is not understood"), "{message}");
}

/// Every other question of the demonstration's validation set, with its answer: none of them is trained on.
fn held_out(place: &Place) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(place.path().join("chat.valid.jsonl")).unwrap();
    let pair = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let said = |turn: usize| row["messages"][turn]["content"].as_str().unwrap().to_owned();
        (said(0), said(1))
    };
    text.lines().map(pair).step_by(5).collect()
}

/// A shorter demonstration: the base learns the world from its texts, and the adapter makes it answer questions that no
/// row of training asks or answers.
#[test]
fn a_base_from_nothing_learns_a_world_and_an_adapter_makes_it_answer() {
    let place = Place::with_demo();
    let (base, summary) = train(&place, "text.yaml", &place.path().join("base"), "text", 100);
    let (before, after) = (summary.before["world"], summary.after["world"]);
    assert!(before > 5.0 && after < 0.5, "loss {before} before, {after} after");
    let (adapter, summary) = train(&place, "chat.yaml", &base, "chat", 70);
    let (before, after) = (summary.before["chat"], summary.after["chat"]);
    assert!(before > 2.0 && after < 0.6, "loss {before} before, {after} after");
    let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
    let right = |adapters: &[&str]| {
        let answered = |(question, answer): &&(String, String)| {
            let say = [&["generate", "--base", base, "--prompt", question, "--max-tokens", "24"], adapters].concat();
            place.run(&say).stdout.trim_end() == answer
        };
        held_out(&place).iter().filter(answered).count()
    };
    let (asked, without, with) = (held_out(&place).len(), right(&[]), right(&["--adapter", adapter]));
    assert!(
        asked >= 9 && without == 0 && with * 4 >= asked * 3,
        "{asked} asked, right: {without} before, {with} after"
    );
    says_what_it_is_asked_to(&place, base, adapter);
    tells_what_questions_are_about(&place, base);
    finds_what_answers_a_question(&place, base);
}

/// A head on the same base: questions of the kinds that it was trained on, about towns whose questions of that kind it was not.
fn tells_what_questions_are_about(place: &Place, base: &str) {
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/classes.yaml"));
    std::fs::write(place.path().join("topic.yaml"), example.unwrap().replace("../attune-demo/files/", "./")).unwrap();
    let (adapter, summary) = train(place, "topic.yaml", Path::new(base), "topic", 40);
    let (before, after) = (summary.before["questions"], summary.after["questions"]);
    assert!(after < 0.3 * before, "loss {before} before, {after} after");
    let rows = std::fs::read_to_string(place.path().join("topic.valid.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let said = |name: &str| rows.iter().map(|row| row[name].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let (texts, labels) = (said("text"), said("label"));
    let classify = ["classify", "--base", base, "--adapter", adapter.to_str().unwrap()];
    let all: Vec<&str> = classify.into_iter().chain(texts.iter().map(String::as_str)).collect();
    let ran = place.run(&all);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    let found: Vec<&str> = ran.stdout.lines().map(|line| line.split('\t').next().unwrap()).collect();
    let right = found.iter().zip(&labels).filter(|(found, label)| *found == label).count();
    assert!(found.len() == labels.len() && right * 10 >= labels.len() * 9, "{right} of {}", labels.len());
    // One text, as JSON: the probabilities of all classes.
    let ran = place.run(&[&classify[..], &["--json", &texts[0]]].concat()).json();
    let scores = ran["classes"][0]["scores"].as_object().unwrap();
    let sum: f64 = scores.values().map(|score| score.as_f64().unwrap()).sum();
    assert!(scores.len() == 4 && (sum - 1.0).abs() < 1e-6 && ran["classes"][0]["label"] == labels[0].as_str(), "{ran}");
    let set = format!("base={base}");
    let stats = place.run(&["data", "stats", "--job", "topic.yaml", "--set", &set]);
    assert!(stats.stdout.contains("topic.train.jsonl: river 36, bread 36, sign 36, market 36"), "{}", stats.all());
    let preview = place.run(&["data", "preview", "--job", "topic.yaml", "--set", &set, "--rows", "1"]);
    assert!(preview.stdout.contains("⟦?: river⟧"), "{}", preview.all());
    let wrong = |arguments: &[&str]| place.run(arguments).stderr;
    let without = wrong(&["classify", "--base", base, "Who?"]);
    assert!(without.contains("LlamaForCausalLM has no head over classes"), "{without}");
    let paired = wrong(&[&classify[..], &["--pair", "a", "b", "c"]].concat());
    assert!(paired.contains("--pair is for one text; 2 are named"), "{paired}");
    let spoken = wrong(&["generate", "--base", base, "--adapter", adapter.to_str().unwrap(), "--prompt", "Who?"]);
    assert!(spoken.contains("tells classes apart"), "{spoken}");
}

/// The job file that the examples have for vectors, and what is found by them.
fn finds_what_answers_a_question(place: &Place, base: &str) {
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/embeddings.yaml"));
    std::fs::write(place.path().join("search.yaml"), example.unwrap().replace("../attune-demo/files/", "./")).unwrap();
    let (adapter, summary) = train(place, "search.yaml", Path::new(base), "search", 40);
    let (before, after) = (summary.before["questions"], summary.after["questions"]);
    assert!(after < 0.3 * before, "loss {before} before, {after} after");
    let rows = std::fs::read_to_string(place.path().join("search.valid.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let embed = ["embed", "--base", base, "--adapter", adapter.to_str().unwrap(), "--json", "--normalize"];
    let vectors = |name: &str| -> Vec<Vec<f64>> {
        let texts = rows.iter().map(|row| row[name].as_str().unwrap());
        let ran = place.run(&embed.into_iter().chain(texts).collect::<Vec<_>>());
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
        let vector = |line: &str| {
            let told: serde_json::Value = serde_json::from_str(line).unwrap();
            told["vector"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        ran.stdout.lines().map(vector).collect()
    };
    let (queries, passages) = (vectors("query"), vectors("positive"));
    let alike = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert!((alike(&queries[0], &queries[0]) - 1.0).abs() < 1e-5);
    let nearest = |query: &Vec<f64>| {
        (0..passages.len()).max_by(|a, b| alike(query, &passages[*a]).total_cmp(&alike(query, &passages[*b])))
    };
    // Two questions have the same answer, in two wordings.
    let is_right = |(at, query): (usize, &Vec<f64>)| nearest(query).is_some_and(|found| found / 2 == at / 2);
    let right = queries.iter().enumerate().filter(|one| is_right(*one)).count();
    assert!(right * 10 >= queries.len() * 8, "{right} of {}", queries.len());
    let set = format!("base={base}");
    let preview = place.run(&["data", "preview", "--job", "search.yaml", "--set", &set, "--rows", "1"]);
    assert!(preview.stdout.contains(", positive: "), "{}", preview.all());
    let wrong = |arguments: &[&str]| place.run(arguments).stderr;
    let wide = wrong(&[&embed[..], &["--dims", "4096", "Who?"]].concat());
    assert!(wide.contains("--dims is 4096; the model's vectors have"), "{wide}");
    let spoken = wrong(&["generate", "--base", base, "--adapter", adapter.to_str().unwrap(), "--prompt", "Who?"]);
    assert!(spoken.contains("gives vectors, and no text"), "{spoken}");
}

fn says_what_it_is_asked_to(place: &Place, base: &str, adapter: &str) {
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
