//! One job on one, two and four processes, as workers start them: that the result is the same, what each keeps in memory, and
//! where the time goes.
//!
//! `cargo bench -p attune --features failpoints --profile dev --bench gangs`; `-- STEPS` changes how much. Each process has one thread.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on stops, and prints what it found"
)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;

use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, Reference, read_value, read_yaml};
use attune_spec::method::Catalogue;
use attune_trainer::protocol::{self, Event, OutputRole, Peer, Request, Seat, Summary, VERSION};

const CONFIG: &str = r#"{
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": true, "rope_theta": 10000.0, "initializer_range": 0.02
}"#;

const JOB: &str = "
version: 1
name: gang
base: ./base
data:
  domains: [{name: texts, source: ./texts.jsonl}]
  max_length: 256
tune:
  from_scratch: true
  optimizer: {method: adamw, lr: 0.0003}
  batch_tokens: 2048
  logical_shards: 4
  seed: 7
";

fn write_world(folder: &Path) {
    let base = folder.join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("config.json"), CONFIG).unwrap();
    for (name, bytes) in attune_data::tokenizer::byte_level_files(&["<|endoftext|>"], None) {
        std::fs::write(base.join(name), bytes).unwrap();
    }
    let text =
        |row: usize| (0..40).map(|word| format!("{} ", (row * 7919 + word * 104_729) % 9973)).collect::<String>();
    let rows: String = (0..400).map(|row| format!("{{\"text\": \"{}\"}}\n", text(row))).collect();
    std::fs::write(folder.join("texts.jsonl"), rows).unwrap();
}

fn plan(folder: &Path, adapter: &str, steps: u64) -> Plan {
    let yaml = format!("{JOB}  steps: {steps}\n  adapter: {adapter}\n");
    let spec = read_value(&read_yaml(&yaml).unwrap(), Catalogue::embedded()).unwrap();
    let resolve = |reference: &Reference| {
        let path = folder.join(reference.to_string().trim_start_matches("./"));
        Ok(Input::Path(path.display().to_string()))
    };
    Plan::resolve(&spec, Catalogue::embedded(), resolve).unwrap()
}

/// A process that trains, and what it says.
struct Process {
    child: Child,
    input: ChildStdin,
}

fn start(rank: u32, request: &Request, told: mpsc::Sender<(u32, Event)>) -> Process {
    let mut child = Command::new(env!("CARGO_BIN_EXE_attune"))
        .arg("attempt")
        .env("RAYON_NUM_THREADS", "1")
        .env("CANDLE_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "{}", serde_json::to_string(request).unwrap()).unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in output.lines() {
            let event: protocol::Tagged<Event> = serde_json::from_str(&line.unwrap()).unwrap();
            if told.send((rank, event.message)).is_err() {
                return;
            }
        }
    });
    Process { child, input }
}

/// What a run on some processes came to.
struct Found {
    result: Vec<u8>,
    summaries: BTreeMap<u32, Summary>,
    /// Seconds of the leading process's steps but the first, by kind of work.
    seconds: BTreeMap<String, f64>,
    steps: usize,
}

fn run(plan: &Plan, size: u32) -> Found {
    let (tell, told) = mpsc::channel();
    let works: Vec<tempfile::TempDir> = (0..size).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut processes: Vec<Process> = (0..size)
        .map(|rank| {
            let seat = (size > 1).then(|| Seat { rank, size, host: "127.0.0.1".parse().unwrap() });
            let (inputs, work) = (BTreeMap::new(), works[rank as usize].path().to_owned());
            let (name, plan) = ("gang".to_owned(), plan.clone());
            let request =
                Request { version: VERSION, name, plan, inputs, work, ranks: 1, card: None, resume: None, seat };
            start(rank, &request, tell.clone())
        })
        .collect();
    drop(tell);
    let mut peers: BTreeMap<u32, Peer> = BTreeMap::new();
    let (mut summaries, mut seconds, mut steps, mut folder) = (BTreeMap::new(), BTreeMap::new(), 0, PathBuf::new());
    for (rank, event) in told {
        match event {
            Event::Listening { peer } => {
                peers.insert(rank, peer);
                if peers.len() == size as usize {
                    let command = protocol::Command::Peers { peers: peers.values().cloned().collect() };
                    for process in &mut processes {
                        writeln!(process.input, "{}", serde_json::to_string(&command).unwrap()).unwrap();
                    }
                }
            }
            Event::Metrics { step, metrics, .. } if rank == 0 && step.0 > 1 => {
                let times =
                    metrics.iter().filter_map(|metric| Some((metric.name.strip_prefix("time/")?, metric.value)));
                let mut is_step = false;
                for (work, time) in times {
                    is_step = true;
                    *seconds.entry(work.to_owned()).or_insert(0.0) += time;
                }
                steps += usize::from(is_step);
            }
            Event::Output { role: OutputRole::Result, folder: made, .. } => folder = made,
            Event::Finished { summary } => {
                summaries.insert(rank, summary);
            }
            Event::Failed { message, .. } => panic!("rank {rank}: {message}"),
            _ => {}
        }
    }
    for process in &mut processes {
        assert!(process.child.wait().unwrap().success());
    }
    let file = ["adapter_model.safetensors", "model.safetensors"].map(|name| folder.join(name));
    let file = file.iter().find(|file| file.try_exists().unwrap()).unwrap();
    Found { result: std::fs::read(file).unwrap(), summaries, seconds, steps }
}

fn main() {
    let number = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let steps: u64 = number.unwrap_or(6);
    let folder = tempfile::tempdir().unwrap();
    write_world(folder.path());
    for adapter in ["{method: full}", "{method: lora, rank: 16, alpha: 32}"] {
        let plan = plan(folder.path(), adapter, steps);
        println!("{adapter}, 2048 tokens a step in 4 logical shards, {steps} steps");
        println!("processes  seconds a step  of which exchange  peak memory of each (MiB)");
        let mut first: Option<Vec<u8>> = None;
        for size in [1, 2, 4] {
            let found = run(&plan, size);
            let all: f64 = found.seconds.values().sum();
            let collective = found.seconds.get("collective").copied().unwrap_or_default();
            let n = found.steps.max(1) as f64;
            let memory: Vec<String> =
                found.summaries.values().map(|summary| format!("{}", summary.peak_memory_bytes >> 20)).collect();
            println!(
                "{size:>9}  {:>14.2}  {:>11.2} ({:.0} %)  {}",
                all / n,
                collective / n,
                100.0 * collective / all,
                memory.join(", ")
            );
            let same = *first.get_or_insert_with(|| found.result.clone()) == found.result;
            assert!(same, "the bytes of one process");
        }
    }
}
