//! `attune demo`: the main job, end to end, on material that is made here.

use std::path::{Path, PathBuf};
use std::time::Instant;

use attune_data::Message;
use attune_points::generate::Sampling;
use attune_proto::{Client, v1};
use attune_spec::job::Precision;
use serde_json::{Value, json};

use super::submit::Prepared;
use super::{artifacts, jobs};
use crate::demo::{self, CHAT_JOB, TEXT_JOB, World};
use crate::print::{Failure, Out, note};
use crate::remote::{Place, Server, block_on, fetch};
use crate::speaker::Speaker;
use crate::stack::{SchedulerArguments, Stack, Workers};
use crate::words;

/// The seed of the demonstration's world.
const SEED: u64 = 7;
/// The folder that is used when none is named.
const FOLDER: &str = "attune-demo";
/// Number of held-out questions that are asked before and after.
const QUESTIONS: usize = 3;

/// Trains a tiny model from nothing and then teaches it to answer, through a real scheduler and worker.
///
/// A small invented world is written, a base that knows nothing, and two jobs: one trains all of the base's weights on
/// plain text, one trains an adapter on questions and answers. Nothing is downloaded.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  attune demo
  attune demo --files demo && attune validate demo/text.yaml")]
pub(crate) struct Arguments {
    /// Where the demonstration keeps everything; it can be looked at afterwards.
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    data_dir: PathBuf,
    /// Only writes the world, the base and the job files into this folder.
    #[arg(long, value_name = "FOLDER", conflicts_with = "data_dir")]
    files: Option<PathBuf>,
    /// The seed of the world.
    #[arg(long, value_name = "N", default_value_t = SEED)]
    seed: u64,
}

pub(super) fn run(arguments: &Arguments, out: &mut Out) -> Result<(), Failure> {
    match &arguments.files {
        Some(folder) => files(folder, arguments.seed, out),
        None => block_on(whole(&arguments.data_dir, arguments.seed, out)),
    }
}

fn files(folder: &Path, seed: u64, out: &mut Out) -> Result<(), Failure> {
    let written = demo::write(folder, &World::new(seed))?;
    if out.is_json() {
        let jobs = [TEXT_JOB, CHAT_JOB].map(|job| folder.join(job.file));
        return out.document(&json!({"files": written, "jobs": jobs}));
    }
    for path in written {
        out.line(&path.display().to_string())?;
    }
    Ok(())
}

/// A question and its answers.
struct Sample {
    question: String,
    expected: String,
    before: String,
    after: String,
}

#[expect(clippy::disallowed_methods, reason = "the shell says how long it took")]
async fn whole(folder: &Path, seed: u64, out: &mut Out) -> Result<(), Failure> {
    let begun = Instant::now();
    let world = World::new(seed);
    let files = folder.join("files");
    demo::write(&files, &world)?;
    // Questions come in two wordings each; one about each of the first towns, which are asked about different things.
    let mut samples: Vec<Sample> = world
        .held_out()
        .iter()
        .step_by(2)
        .take(QUESTIONS)
        .map(|pair| Sample {
            question: pair.question.clone(),
            expected: pair.answer.clone(),
            before: String::new(),
            after: String::new(),
        })
        .collect();

    note("starting a scheduler and a worker");
    let workers = Workers { count: 1, devices: 1, cards: Some(0), cache_bytes_max: None };
    let stack = Stack::start(&SchedulerArguments::private(), folder, workers).await?;
    let server = Server::at(&stack.url);
    let shown = Box::pin(show(&server, folder, &files, &mut samples, out)).await;
    let ended = stack.end().await;
    let shown = shown?;
    ended?;
    let took = begun.elapsed();
    if out.is_json() {
        let mut shown = shown;
        if let Some(object) = shown.as_object_mut() {
            object.insert("seconds".to_owned(), json!(took.as_secs_f64()));
        }
        return out.document(&shown);
    }
    out.line(&format!("\nAll of this took {}. To go on from here:\n", words::seconds(took.as_secs())))?;
    let data_dir = folder.display();
    let question = samples.first().map(|sample| sample.question.as_str()).unwrap_or_default();
    out.line(&format!("  attune up --data-dir {data_dir} &"))?;
    out.line(&format!("  attune submit {} --set tune.adapter.rank=16 --watch", files.join(CHAT_JOB.file).display()))?;
    out.line(&format!("  attune generate --base demo-base:latest --adapter demo-guide:latest --prompt \"{question}\""))
}

/// Runs both jobs and shows what came of them.
async fn show(
    server: &Server,
    folder: &Path,
    files: &Path,
    samples: &mut [Sample],
    out: &mut Out,
) -> Result<Value, Failure> {
    let client = server.connect().await?;
    let cache = folder.join("cache");
    heading(out, "A base learns a small invented world from plain text: all of its weights, from random ones.")?;
    let text = Box::pin(train(&client, &files.join(TEXT_JOB.file), out)).await?;
    let base = fetch(&client, &Place::Stored("demo-base:latest".to_owned()), v1::ArtifactKind::Model, &cache).await?;
    answer(&base, &[], samples, |sample, said| sample.before = said)?;

    heading(out, "An adapter teaches it to answer questions; the base stays as it is.")?;
    let chat = Box::pin(train(&client, &files.join(CHAT_JOB.file), out)).await?;
    let adapter =
        fetch(&client, &Place::Stored("demo-guide:latest".to_owned()), v1::ArtifactKind::Adapter, &cache).await?;
    answer(&base, &[adapter], samples, |sample, said| sample.after = said)?;
    let found = artifacts::walk(&client, "demo-guide:latest", v1::LineageDirection::Ancestors).await?;
    if out.is_json() {
        let sample = |sample: &Sample| {
            json!({
                "question": sample.question, "expected": sample.expected,
                "before": sample.before, "after": sample.after,
            })
        };
        return Ok(json!({
            "jobs": [text, chat],
            "samples": samples.iter().map(sample).collect::<Vec<_>>(),
            "lineage": found.edges.len(),
            "data_dir": folder,
        }));
    }
    heading(out, "Questions that no training row asks, before and after:")?;
    for sample in samples {
        out.line(&format!("  {}", sample.question))?;
        out.line(&format!("    before: {}", sample.before))?;
        out.line(&format!("    after:  {}", sample.after))?;
        out.line(&format!("    truth:  {}", sample.expected))?;
    }
    heading(out, "Where the adapter comes from:")?;
    out.text(&artifacts::tree(&found, false))?;
    Ok(Value::Null)
}

fn heading(out: &mut Out, text: &str) -> Result<(), Failure> {
    if out.is_json() {
        return Ok(());
    }
    out.line(&format!("\n{text}"))?;
    out.flush()
}

/// Submits a job, follows it to its end and says how the validation loss changed.
async fn train(client: &Client, file: &Path, out: &mut Out) -> Result<Value, Failure> {
    let prepared = Prepared::read(&file.display().to_string(), &[], false)?;
    let answer = prepared.create(client, uuid::Uuid::now_v7().to_string(), false).await?;
    let job = answer.job.ok_or_else(|| Failure::failed("the server's answer holds no job"))?.job_id;
    jobs::follow_to_end(client, &job, &mut None).await?;
    let loss = jobs::validation(client, &job).await?;
    for (set, (before, after)) in &loss {
        if !out.is_json() {
            out.line(&format!("  job {job}: validation loss of {set}: {before:.3} before, {after:.3} after"))?;
        }
    }
    out.flush()?;
    let loss: serde_json::Map<_, _> =
        loss.into_iter().map(|(set, (before, after))| (set, json!({"before": before, "after": after}))).collect();
    Ok(json!({"id": job, "validation_loss": loss}))
}

/// Asks all questions.
fn answer(
    base: &Path,
    adapters: &[PathBuf],
    samples: &mut [Sample],
    keep: impl Fn(&mut Sample, String),
) -> Result<(), Failure> {
    let speaker = Speaker::open(base, adapters, Precision::F32)?;
    for sample in samples {
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0, max_tokens: 24, stop: Vec::new() };
        let said = speaker.answer(&[Message::new("user", &*sample.question)], sampling, |_| Ok(()))?;
        keep(sample, said.text.trim().replace('\n', " "));
    }
    Ok(())
}
