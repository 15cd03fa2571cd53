//! The process that trains, as its agent sees it: a request and commands in, events out.

use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attune_spec::id::Step;
use attune_trainer::attempt::run_attempt;
use attune_trainer::protocol::{Cohort, Command, Event, FailureClass, Request, Tagged, VERSION};
use candle_core::{DType, Device, Tensor};

use crate::support::{Small, files};

/// The process's input: lines as they are sent; it never ends, for then the process would.
struct Lines {
    lines: Receiver<String>,
    /// Told each time the reader comes for more, which means that it has dealt with everything before.
    asked: Sender<()>,
    rest: Vec<u8>,
}

impl Read for Lines {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            // Nobody counts once the run is over.
            let _ = self.asked.send(());
            match self.lines.recv() {
                Ok(line) => self.rest = format!("{line}\n").into_bytes(),
                Err(_) => loop {
                    std::thread::park();
                },
            }
        }
        let n = into.len().min(self.rest.len());
        into[..n].copy_from_slice(&self.rest[..n]);
        self.rest.drain(..n);
        Ok(n)
    }
}

type Reaction = Box<dyn FnMut(&Tagged<Event>) -> Option<Tagged<Command>> + Send>;

/// The agent: hears events, and answers some with a command that is dealt with before the run goes on.
struct Agent {
    events: Arc<Mutex<Vec<Tagged<Event>>>>,
    line: Vec<u8>,
    commands: Sender<String>,
    asked: Receiver<()>,
    reaction: Reaction,
}

impl Write for Agent {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let event: Tagged<Event> = serde_json::from_slice(&self.line).unwrap();
        self.line.clear();
        let command = (self.reaction)(&event);
        self.events.lock().unwrap().push(event);
        if let Some(command) = command {
            // The reader asks for the first time before the request and once after each line.
            while self.asked.try_recv().is_ok() {}
            self.commands.send(serde_json::to_string(&command).unwrap()).unwrap();
            self.asked.recv_timeout(Duration::from_secs(20)).unwrap();
        }
        Ok(())
    }
}

/// Runs a process of one lane.
fn attempt(
    first: &str,
    mut reaction: impl FnMut(&Event) -> Option<Command> + Send + 'static,
) -> (ExitCode, Vec<Event>) {
    let only = move |told: &Tagged<Event>| reaction(&told.message).map(|message| Tagged { lane: 0, message });
    let (code, events) = process(first, Box::new(only));
    assert!(events.iter().all(|told| told.lane == 0));
    (code, events.into_iter().map(|told| told.message).collect())
}

fn process(first: &str, reaction: Reaction) -> (ExitCode, Vec<Tagged<Event>>) {
    let ((commands, lines), (asking, asked)) = (channel(), channel());
    commands.send(first.to_owned()).unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let agent = Agent { events: Arc::clone(&events), line: Vec::new(), commands, asked, reaction };
    let code = run_attempt(BufReader::new(Lines { lines, asked: asking, rest: Vec::new() }), agent, |_| Ok(()));
    let events = events.lock().unwrap().clone();
    (code, events)
}

fn of(request: &Request) -> String {
    serde_json::to_string(request).unwrap()
}

#[test]
fn a_run_that_is_asked_to_stop_saves_itself_and_goes_on_to_the_same_bytes() {
    let small = Small::new();
    let (_, whole) = small.finish(small.plan(&[]), 1);
    let (request, _work) = small.request(small.plan(&[]), 2, None);
    let (code, events) = attempt(&of(&request), |event| match event {
        Event::Progress { step: Step(3), .. } => Some(Command::CheckpointAndStop),
        _ => None,
    });
    assert_eq!(code, ExitCode::SUCCESS);
    let [.., Event::Checkpoint { step, folder }, Event::Stopped { step: stopped }] = events.as_slice() else {
        panic!("{events:?}")
    };
    assert_eq!((*step, *stopped), (Step(4), Step(4)), "the step that begins after the command is the last");
    // It goes on with another number of ranks.
    let (request, _work) = small.request(small.plan(&[]), 1, Some(folder));
    let (code, events) = attempt(&of(&request), |_| None);
    assert_eq!(code, ExitCode::SUCCESS);
    assert!(events.iter().any(|event| matches!(event, Event::Running { step: Step(4), .. })));
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{:?}", events.last());
    assert_eq!(files(&events), whole);
}

#[test]
fn a_checkpoint_on_demand_changes_nothing_and_its_folder_goes_once_it_is_stored() {
    let small = Small::new();
    let (_, whole) = small.finish(small.plan(&[]), 1);
    let (request, work) = small.request(small.plan(&[]), 1, None);
    let (code, events) = attempt(&of(&request), |event| match event {
        Event::Progress { step: Step(3), .. } => Some(Command::Checkpoint),
        Event::Checkpoint { step, .. } => Some(Command::CheckpointStored { step: *step }),
        _ => None,
    });
    assert_eq!(code, ExitCode::SUCCESS);
    let checkpoints = events.iter().filter(|event| matches!(event, Event::Checkpoint { .. })).count();
    assert_eq!(checkpoints, 1);
    assert!(!work.path().join("checkpoint-3").is_dir());
    assert_eq!(files(&events), whole);
}

#[test]
fn lanes_are_told_apart_by_their_numbers() {
    let small = Small::with_weights();
    let plan = |seed: &str| small.plan(&[("tune.from_scratch", "false"), ("tune.seed", seed)]);
    let whole = ["1", "2", "3"].map(|seed| small.finish(plan(seed), 1).1);
    let (requests, _works): (Vec<_>, Vec<_>) =
        ["1", "2", "3", "4"].map(|seed| small.request(plan(seed), 1, None)).into_iter().unzip();
    let first = serde_json::to_string(&Cohort { version: VERSION, lanes: requests }).unwrap();
    let (code, events) = process(
        &first,
        Box::new(|told| match (told.lane, &told.message) {
            (1, Event::Progress { step: Step(3), .. }) => Some(Tagged { lane: 1, message: Command::Checkpoint }),
            (1, Event::Checkpoint { step, .. }) => {
                Some(Tagged { lane: 1, message: Command::CheckpointStored { step: *step } })
            }
            (3, Event::Progress { step: Step(2), .. }) => Some(Tagged { lane: 3, message: Command::Leave }),
            _ => None,
        }),
    );
    assert_eq!(code, ExitCode::SUCCESS);
    let of = |lane: u32| -> Vec<Event> {
        events.iter().filter(|told| told.lane == lane).map(|told| told.message.clone()).collect()
    };
    for (lane, whole) in (0..).zip(&whole) {
        assert!(files(&of(lane)) == *whole, "lane {lane}");
        let saved = of(lane).iter().filter(|event| matches!(event, Event::Checkpoint { .. })).count();
        assert_eq!(saved, usize::from(lane == 1), "lane {lane}");
    }
    assert_eq!(of(3).last(), Some(&Event::Stopped { step: Step(2) }), "who leaves writes nothing");
}

/// The last event of an attempt that fails.
fn failure(first: &str) -> (FailureClass, String, Vec<String>) {
    let (code, mut events) = attempt(first, |_| None);
    assert_eq!(code, ExitCode::from(1));
    match events.pop() {
        Some(Event::Failed { class, message, faults }) => {
            (class, message, faults.into_iter().map(|fault| fault.path.to_string()).collect())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_that_is_not_understood_is_a_failure() {
    let (class, message, _) = failure("{\"version\": 1}");
    assert_eq!(class, FailureClass::Internal);
    let of_none = Cohort { version: VERSION, lanes: Vec::new() };
    assert_eq!(failure(&serde_json::to_string(&of_none).unwrap()).1, "the request has no lane");
    assert!(message.starts_with("the request is not understood: missing field"), "{message}");
    let small = Small::new();
    let (mut request, _work) = small.request(small.plan(&[]), 1, None);
    request.version = 7;
    assert_eq!(failure(&of(&request)).1, "the request has version 7; this program reads 2");
}

fn rewrite(base: &Path, name: &str, tensor: Tensor) {
    let file = base.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    assert!(tensors.insert(name.to_owned(), tensor).is_some());
    candle_core::safetensors::save(&tensors, file).unwrap();
}

type Damage = fn(&Path);
const NORM: &str = "model.layers.1.input_layernorm.weight";

#[test]
fn what_is_wrong_with_the_inputs_is_named_in_the_failure() {
    let cases: [(&str, Damage, &str, &str); 10] = [
        ("whole", |_| {}, "", ""),
        (
            "truncated",
            |base| {
                let file = base.join("model.safetensors");
                let bytes = std::fs::read(&file).unwrap();
                std::fs::write(file, &bytes[..bytes.len() - 7]).unwrap();
            },
            "base/model.safetensors: is no complete safetensors file",
            "",
        ),
        (
            "shape",
            |base| rewrite(base, NORM, Tensor::ones(17, DType::F32, &Device::Cpu).unwrap()),
            "base/model.safetensors: tensor \"model.layers.1.input_layernorm.weight\" has shape [17]",
            "",
        ),
        (
            "not finite",
            |base| rewrite(base, NORM, Tensor::full(f32::NAN, 16, &Device::Cpu).unwrap()),
            "input base: tensor model.layers.1.input_layernorm.weight holds a value that is not finite",
            "",
        ),
        (
            "model type",
            |base| {
                let config = std::fs::read_to_string(base.join("config.json")).unwrap();
                std::fs::write(base.join("config.json"), config.replace("\"llama\"", "\"lama\"")).unwrap();
            },
            "base/config.json: `model_type` is \"lama\"",
            "",
        ),
        (
            "weights",
            |base| std::fs::remove_file(base.join("model.safetensors")).unwrap(),
            "base/model.safetensors: cannot be opened",
            "",
        ),
        (
            "json",
            |base| {
                std::fs::write(base.with_file_name("sums.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"b\",}\n").unwrap()
            },
            "sums.jsonl:2: ",
            "",
        ),
        (
            "empty",
            |base| std::fs::write(base.with_file_name("sums.jsonl"), "").unwrap(),
            "sums.jsonl: holds no row",
            "",
        ),
        (
            "missing",
            |base| std::fs::remove_file(base.with_file_name("sums.jsonl")).unwrap(),
            "sums.jsonl: there is no such file",
            "",
        ),
        (
            "context",
            |base| {
                let config = std::fs::read_to_string(base.join("config.json")).unwrap();
                let short = config.replace("\"max_position_embeddings\":64", "\"max_position_embeddings\":16");
                let short = short.replace("\"max_position_embeddings\": 64", "\"max_position_embeddings\": 16");
                std::fs::write(base.join("config.json"), short).unwrap();
            },
            "`data.max_length` is 32; the base's context is 16",
            "data.max_length",
        ),
    ];
    for (name, damage, expected, field) in cases {
        let small = Small::with_weights();
        let base = small.path("base");
        damage(&base);
        let plan = small.plan(&[("tune.from_scratch", "false"), ("tune.steps", "1")]);
        let (request, _work) = small.request(plan, 1, None);
        if expected.is_empty() {
            let (code, events) = attempt(&of(&request), |_| None);
            assert_eq!(code, ExitCode::SUCCESS, "{name}: {:?}", events.last());
            continue;
        }
        let (class, message, faults) = failure(&of(&request));
        let message = message.replace(&format!("{}/", small.path("").display()), "");
        let message = message.replace(&small.path("").display().to_string(), "");
        assert!(message.starts_with(expected), "{name}: {message}");
        assert_eq!(class, FailureClass::Input, "{name}: {message}");
        assert_eq!(faults, if field.is_empty() { vec![] } else { vec![field.to_owned()] }, "{name}");
    }
}
