//! Tunes a base with LoRA and writes down all that another trainer needs to repeat it: the starting adapter, the tokens of
//! each step in their order with the learning rate, the validation documents, and logits of the result.
//!
//! `reference BASE TRAIN.jsonl VALIDATION.jsonl OUT [FIELD=VALUE]...`, where a field is one of the job file's, such as
//! `tune.steps=200`. `benches/peers/README.md` says how the other side is run.

#![allow(clippy::unwrap_used, reason = "an example that cannot go on stops")]

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use attune_data::loader::Domain;
use attune_data::preview::ordered;
use attune_data::{Dataset, Encoder, Loader, MIXINGS, Packing, Reading, Source, Tokenizer};
use attune_models::{Base, Model, Pass};
use attune_points::Layout;
use attune_spec::id::Step;
use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, read_value, read_yaml, set_path};
use attune_spec::method::{BuildCx, Catalogue};
use attune_trainer::component;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, Request, Summary, VERSION};
use attune_trainer::run::{End, run};
use candle_core::{Device, Tensor};
use serde_json::json;

const JOB: &str = include_str!("reference.yaml");

type Failure = Box<dyn std::error::Error>;

/// Shows losses as they come, and keeps the learning rate of each step.
#[derive(Default)]
struct Screen {
    rates: Mutex<Vec<f64>>,
}

impl Control for Screen {
    fn stop_requested(&self) -> bool {
        false
    }

    fn take_checkpoint_request(&self) -> bool {
        false
    }

    fn emit(&self, event: Event) {
        let Event::Metrics { step, metrics, .. } = event else { return };
        let value = |name: &str| metrics.iter().find(|metric| metric.name == name).map(|metric| metric.value);
        self.rates.lock().unwrap().extend(value("train/lr"));
        if let Some(loss) = value("eval/validation/loss") {
            say(&format!("validation loss at step {step}: {loss:.4}"));
        } else if step.0.is_multiple_of(20)
            && let (Some(loss), Some(speed)) = (value("train/loss"), value("train/tokens_per_second"))
        {
            say(&format!("step {step}: loss {loss:.4}, {speed:.0} tokens/s"));
        }
    }
}

fn say(text: &str) {
    // Nobody reads: nothing is lost.
    let _ = writeln!(std::io::stderr(), "{text}");
}

struct Paths {
    base: PathBuf,
    train: PathBuf,
    validation: PathBuf,
    out: PathBuf,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, train, validation, out, fields @ ..] = arguments.as_slice() else {
        return Err("usage: reference BASE TRAIN.jsonl VALIDATION.jsonl OUT [FIELD=VALUE]...".into());
    };
    let paths = Paths { base: base.into(), train: train.into(), validation: validation.into(), out: out.into() };
    let fields: Vec<(&str, &str)> =
        fields.iter().map(|field| field.split_once('=').ok_or("expected FIELD=VALUE")).collect::<Result<_, _>>()?;
    std::fs::create_dir_all(&paths.out)?;

    // One step at a learning rate of zero leaves the starting values where they are.
    let still = [("tune.optimizer.lr", "0"), ("tune.steps", "1")];
    let changes: Vec<_> = fields.iter().copied().chain(still).collect();
    let (still, ranks) = plan(&paths, &changes)?;
    go(&paths, still, ranks, "initial", &Screen::default())?;

    let screen = Screen::default();
    let (plan, ranks) = plan(&paths, &fields)?;
    let summary = go(&paths, plan.clone(), ranks, "tuned", &screen)?;
    let rates = screen.rates.into_inner().unwrap();
    write_order(&paths, &plan, &rates)?;
    write_logits(&paths)?;
    std::fs::write(paths.out.join("attune.json"), serde_json::to_vec_pretty(&summary)?)?;
    say(&serde_json::to_string_pretty(&summary)?);
    Ok(())
}

/// The plan of the job with some fields changed, and its number of ranks.
fn plan(paths: &Paths, changes: &[(&str, &str)]) -> Result<(Plan, u32), Failure> {
    let mut value = read_yaml(JOB).map_err(|error| error.to_string())?;
    for (field, text) in changes {
        set_path(&mut value, field, text).map_err(|fault| fault.to_string())?;
    }
    let spec = read_value(&value, Catalogue::embedded()).map_err(|error| error.to_string())?;
    let plan = Plan::resolve(&spec, Catalogue::embedded(), |reference| {
        let path = match reference.to_string().as_str() {
            "./base" => &paths.base,
            "./train" => &paths.train,
            _ => &paths.validation,
        };
        Ok(Input::Path(path.display().to_string()))
    });
    let plan = plan.map_err(|faults| format!("{faults:?}"))?;
    Ok((plan, spec.resources.devices_per_worker))
}

/// Runs a plan in the folder `name`.
fn go(paths: &Paths, plan: Plan, ranks: u32, name: &str, screen: &Screen) -> Result<Summary, Failure> {
    let work = paths.out.join(name);
    std::fs::create_dir_all(&work)?;
    let inputs = BTreeMap::new();
    let request = Request {
        version: VERSION,
        name: name.to_owned(),
        plan,
        inputs,
        work,
        ranks,
        card: None,
        resume: None,
        seat: None,
    };
    match run(&request, screen)? {
        End::Finished(summary) => Ok(summary),
        End::Stopped(step) => Err(format!("stopped at step {step}").into()),
    }
}

fn read(plan: &Plan, path: &Path, encoder: &Encoder) -> Result<Dataset, Failure> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let reading = Reading { form: None, on_bad_row: plan.on_bad_row, rows: None };
    Ok(Dataset::read(&Source::cached(path, &name)?, encoder, reading)?)
}

/// The documents of each step and of the validation set, as `benches/peers/tune_lora.py` reads them.
fn write_order(paths: &Paths, plan: &Plan, rates: &[f64]) -> Result<(), Failure> {
    let tokenizer = Tokenizer::open(&paths.base)?;
    let encoder = Encoder::new(tokenizer, plan.template.as_deref(), plan.max_length, plan.too_long)?;
    let data = Arc::new(read(plan, &paths.train, &encoder)?);
    let packing = Packing {
        answers: None,
        batch_tokens: plan.batch_tokens,
        logical_shards: plan.logical_shards,
        accumulation: plan.accumulation,
        max_length: plan.max_length,
        before: Arc::default(),
    };
    let weights: Vec<_> = plan.domains.iter().map(|domain| (domain.name.clone(), domain.weight)).collect();
    let cx = BuildCx { steps: Step(rates.len() as u64), domains: &weights, words: None };
    let mixing = MIXINGS.build(&plan.mixing, &"data.mixing".into(), &cx).map_err(|faults| format!("{faults:?}"))?;
    let domains = vec![Domain { name: "train".to_owned(), data: Arc::clone(&data) }];
    let mut loader = Loader::new(plan.seed, domains, mixing, packing, plan.length);
    let mut steps = std::io::BufWriter::new(std::fs::File::create(paths.out.join("steps.jsonl"))?);
    for (step, lr) in (0..).map(Step).zip(rates) {
        let batch = loader.batch(step)?;
        let docs = batch.parts.iter().flat_map(|(_, layout)| layout.docs());
        let documents: Vec<_> =
            docs.flat_map(|doc| data.row(doc.example as usize)).map(|document| ordered(document, "train")).collect();
        writeln!(steps, "{}", json!({"documents": documents, "lr": lr}))?;
    }
    steps.flush()?;
    let set = read(plan, &paths.validation, &encoder)?;
    let documents: Vec<_> = set.documents().map(|document| ordered(document, "validation")).collect();
    std::fs::write(paths.out.join("validation.jsonl"), json!({ "documents": documents }).to_string() + "\n")?;
    Ok(())
}

/// Logits of the tuned adapter on the first validation documents, for `crates/adapt/golden/check_peft_reads.py`.
fn write_logits(paths: &Paths) -> Result<(), Failure> {
    let text = std::fs::read_to_string(paths.out.join("validation.jsonl"))?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    let documents = value["documents"].as_array().ok_or("no documents")?;
    let base = Base::open(&paths.base, attune_spec::job::Precision::F32)?;
    let adapter = paths.out.join("tuned/adapter");
    let (base, stack, theta) = component::frozen(base, [adapter.as_path()])?;
    let model = Model::new(base, stack);
    let (mut ids, mut lengths, mut logits) = (Vec::new(), Vec::new(), Vec::new());
    for document in documents.iter().take(4) {
        let own: Vec<u32> = serde_json::from_value(document["ids"].clone())?;
        let layout = Layout::single(&own);
        logits.push(model.logits(&Pass { theta: &theta, layout: &layout, dropout: None })?);
        lengths.push(own.len() as i64);
        ids.extend(own.into_iter().map(i64::from));
    }
    let tensors = HashMap::from([
        ("input_ids", Tensor::new(ids.as_slice(), &Device::Cpu)?),
        ("doc_lengths", Tensor::new(lengths.as_slice(), &Device::Cpu)?),
        ("logits", Tensor::cat(&logits, 0)?),
    ]);
    candle_core::safetensors::save(&tensors, paths.out.join("logits.safetensors"))?;
    Ok(())
}
