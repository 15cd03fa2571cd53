//! Jobs on one base as lanes of one process, against the same jobs in turn: whole runs, as the attempt process makes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use attune_data::tokenizer::byte_level_files;
use attune_models::pass::Stopwatch;
use attune_models::{Base, export};
use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, Reference, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, Request, Summary, VERSION};
use attune_trainer::run::End;
use attune_trainer::{cohort, run};
use candle_core::DType;
use serde_json::{Value, json};

use crate::{Failure, memory};

/// The small model of `benches/peers/shapes.py`.
const CONFIG: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": false, "rope_theta": 10000.0, "initializer_range": 0.02
}"#;

/// A job whose every step is one document.
const JOB: &str = "
version: 1
name: lane
base: ./base
data:
  domains: [{name: text, source: ./text.jsonl}]
  too_long: truncate
tune:
  adapter: {method: lora, targets: all-linear}
  optimizer: {method: adamw, lr: 1e-4}
  logical_shards: 1
";

/// The rank of each job's adapter.
const RANKS: [u32; 8] = [2, 4, 8, 16, 32, 4, 8, 16];
/// Steps of each job.
const STEPS: u32 = 24;

/// Runs all jobs in turn and then side by side, some times: `[precision [rounds [tokens of a job's step]]]`.
pub(crate) fn measure(arguments: &[String]) -> Result<Value, Failure> {
    let precision = arguments.first().map_or("f32", String::as_str);
    let rounds: usize = arguments.get(1).map_or(Ok(3), |rounds| rounds.parse())?;
    let tokens: u32 = arguments.get(2).map_or(Ok(256), |tokens| tokens.parse())?;
    let folder = tempfile::tempdir()?;
    prepare(folder.path())?;
    let plans = RANKS
        .iter()
        .zip(1..)
        .map(|(&rank, seed)| plan(folder.path(), precision, tokens, rank, seed))
        .collect::<Result<Vec<_>, _>>()?;
    let mut all = Vec::new();
    for _ in 0..rounds {
        let (alone, first) = (Times::default(), Times::default());
        let turn = measured(folder.path(), &plans, |requests| {
            let one = |request: &Request| run::run(request, &alone).map_err(Failure::from);
            requests.iter().map(one).collect()
        })?;
        let together = measured(folder.path(), &plans, |requests| {
            // The passes of all lanes are those of each.
            let others = Times::default();
            let outside = |lane| if lane == 0 { &first as &dyn Control } else { &others };
            let lanes: Vec<(&Request, &dyn Control)> =
                requests.iter().enumerate().map(|(lane, request)| (request, outside(lane))).collect();
            let ends = Mutex::new(BTreeMap::new());
            cohort::run(&lanes, &|lane, end| {
                ends.lock().unwrap().insert(lane, end);
            });
            ends.into_inner()?.into_values().map(|end| end.map_err(Failure::from)).collect()
        })?;
        // In turn each run's steps take their own time; side by side all take the time of the longest.
        let steps = (turn.seconds.iter().sum::<f64>(), together.seconds.iter().copied().fold(0.0, f64::max));
        all.push(json!({
            "ratio": steps.0 / steps.1,
            "cpu_ratio": turn.cpu_seconds / together.cpu_seconds,
            "in_turn": turn.json(steps.0, alone),
            "together": together.json(steps.1, first),
        }));
    }
    let mut ratios: Vec<f64> = all.iter().filter_map(|round| round["ratio"].as_f64()).collect();
    ratios.sort_by(f64::total_cmp);
    Ok(json!({
        "case": format!("S-lanes-{precision}-{tokens}"),
        "ranks": RANKS,
        "tokens_a_step": tokens,
        "steps": STEPS,
        "ratio": ratios.get(ratios.len() / 2),
        "rounds": all,
        "threads": rayon::current_num_threads(),
        "profile": attune_trainer::kernel::profile(),
    }))
}

/// Sums up where the time of steps went.
#[derive(Default)]
struct Times(Mutex<BTreeMap<String, f64>>);

impl Control for Times {
    fn stop_requested(&self) -> bool {
        false
    }

    fn take_checkpoint_request(&self) -> bool {
        false
    }

    fn emit(&self, event: Event) {
        let Event::Metrics { metrics, .. } = event else { return };
        let mut times = self.0.lock().unwrap();
        for metric in metrics {
            if let Some(work) = metric.name.strip_prefix("time/") {
                *times.entry(work.to_owned()).or_default() += metric.value;
            }
        }
    }
}

/// What some runs took.
struct Measured {
    /// Tokens of all of them.
    tokens: u64,
    /// Time of each one's steps.
    seconds: Vec<f64>,
    /// From the start of the first to the end of the last.
    whole: f64,
    cpu_seconds: f64,
    peak_mib: f64,
}

impl Measured {
    fn json(&self, seconds: f64, times: Times) -> Value {
        let ms = |seconds: f64| (seconds / f64::from(STEPS) * 1e5).round() / 100.0;
        let times = times.0.into_inner().unwrap_or_default();
        let times: BTreeMap<String, f64> = times.into_iter().map(|(name, seconds)| (name, ms(seconds))).collect();
        json!({
            "tokens_per_second": self.tokens as f64 / seconds,
            "whole_seconds": self.whole,
            "cpu_seconds": self.cpu_seconds,
            "peak_mib": self.peak_mib,
            "ms_for_a_step_of_all": times,
        })
    }
}

fn measured(
    folder: &Path,
    plans: &[Plan],
    runs: impl FnOnce(&[Request]) -> Result<Vec<End>, Failure>,
) -> Result<Measured, Failure> {
    let works = plans.iter().map(|_| tempfile::tempdir_in(folder)).collect::<Result<Vec<_>, _>>()?;
    let request = |(plan, work): (&Plan, &tempfile::TempDir)| Request {
        version: VERSION,
        name: "lane".to_owned(),
        plan: plan.clone(),
        inputs: BTreeMap::new(),
        work: work.path().to_owned(),
        ranks: 1,
        card: None,
        resume: None,
        seat: None,
    };
    let requests: Vec<Request> = plans.iter().zip(&works).map(request).collect();
    memory::forget_peak()?;
    let (watch, cpu) = (Stopwatch::start(), memory::cpu_seconds());
    let ends = runs(&requests)?;
    let (whole, cpu_seconds) = (watch.elapsed().as_secs_f64(), memory::cpu_seconds() - cpu);
    let summaries: Vec<Summary> = ends
        .into_iter()
        .map(|end| match end {
            End::Finished(summary) => Ok(summary),
            End::Stopped(step) => Err(Failure::from(format!("stopped at step {step}"))),
        })
        .collect::<Result<_, _>>()?;
    Ok(Measured {
        tokens: summaries.iter().map(|summary| summary.tokens.0).sum(),
        seconds: summaries.iter().map(|summary| summary.tokens.0 as f64 / summary.tokens_per_second).collect(),
        whole,
        cpu_seconds,
        peak_mib: memory::peak_mib(),
    })
}

/// A base with random weights, its tokenizer, and text.
fn prepare(folder: &Path) -> Result<(), Failure> {
    let (made, base) = (folder.join("made"), folder.join("base"));
    std::fs::create_dir(&made)?;
    std::fs::write(made.join("config.json"), CONFIG)?;
    let random = Base::from_scratch(&made, 1)?;
    export::write(&random, &BTreeMap::new(), DType::F32, &made, &base)?;
    for (name, bytes) in byte_level_files(&["<|endoftext|>"], None) {
        std::fs::write(base.join(name), bytes)?;
    }
    // A byte is a token: each row fills a document.
    let row = |n: usize| {
        let words: String = (0..64).map(|word| format!("{:03} ", (n * 131 + word * word * 17) % 1000)).collect();
        format!("{}\n", json!({"text": words}))
    };
    Ok(std::fs::write(folder.join("text.jsonl"), (0..64).map(row).collect::<String>())?)
}

fn plan(folder: &Path, precision: &str, tokens: u32, rank: u32, seed: u32) -> Result<Plan, Failure> {
    let mut value = read_yaml(JOB)?;
    for (path, text) in [
        ("tune.precision", precision.to_owned()),
        ("tune.adapter.rank", rank.to_string()),
        ("tune.adapter.alpha", (2 * rank).to_string()),
        ("tune.seed", seed.to_string()),
        ("tune.batch_tokens", tokens.to_string()),
        ("data.max_length", tokens.to_string()),
        ("tune.steps", STEPS.to_string()),
    ] {
        set_path(&mut value, path, &text).map_err(|fault| format!("{fault:?}"))?;
    }
    let spec = read_value(&value, Catalogue::embedded()).map_err(|error| error.to_string())?;
    let resolve = |reference: &Reference| {
        let path: PathBuf = folder.join(reference.to_string().trim_start_matches("./"));
        Ok(Input::Path(path.display().to_string()))
    };
    Plan::resolve(&spec, Catalogue::embedded(), resolve).map_err(|faults| format!("{faults:?}").into())
}
