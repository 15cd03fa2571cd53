//! `attune fairness`: what runs of few directions keep of their base that a run of all weights gets rid of.

use std::path::{Path, PathBuf};

use attune_proto::v1::ArtifactKind;
use attune_spec::job::read_yaml;
use attune_trainer::audit::bootstrap::Bootstrap;
use attune_trainer::audit::fairness::toxicity::Lexicon;
use attune_trainer::audit::fairness::verdict::Against;
use attune_trainer::audit::fairness::{Audit, Decisions, Generations, Question};
use attune_trainer::audit::measure::Folder;
use serde::Deserialize;

use super::looks;
use crate::print::{Failure, Out, note};
use crate::remote::{self, Server, block_on};

/// Holds runs of few directions against a run of all weights: what each took off the losses, gaps between groups and toxicity of
/// the base.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune fairness runs.yaml

FILE is YAML. Folders are paths beside it, or digests or tags of the server's:

  version: 1
  base: ./base
  reference: {model: ./full}                # or {adapter: ./r64}, the largest rank in its place; without one nothing is mitigated
  runs:
    - {name: r2, adapter: ./r2}
    - {name: r8, adapter: ./r8}
  target: ./held-out.jsonl                  # like what was learned
  known: ./general.jsonl                    # what the base knew
  decisions: {questions: ./questions.jsonl, options: [yes, no], positive: yes}      # rows of prompt, label and group
  generations: {prompts: ./prompts.jsonl, lexicon: ./words.txt, each: 4, max_tokens: 32}

Writes `report.json` and `report.md`.")]
pub(crate) struct Arguments {
    /// What is looked at.
    #[arg(value_name = "FILE")]
    file: String,
    /// The folder of the report; that of FILE without its ending if it is left out.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    version: u32,
    base: String,
    #[serde(default)]
    reference: Option<Trained>,
    runs: Vec<Run>,
    target: PathBuf,
    #[serde(default)]
    known: Option<PathBuf>,
    #[serde(default)]
    rows: Option<u64>,
    #[serde(default = "max_length")]
    max_length: u32,
    #[serde(default)]
    decisions: Option<AskedDecisions>,
    #[serde(default)]
    generations: Option<AskedGenerations>,
    #[serde(default = "ranks")]
    ranks: Vec<usize>,
    #[serde(default = "least")]
    least: f64,
    #[serde(default = "resamples")]
    resamples: u32,
    #[serde(default = "level")]
    level: f64,
    #[serde(default)]
    seed: u64,
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Trained {
    Model(String),
    Adapter(String),
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    name: String,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    adapter: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedDecisions {
    questions: PathBuf,
    options: Vec<String>,
    positive: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedGenerations {
    prompts: PathBuf,
    lexicon: PathBuf,
    #[serde(default = "each")]
    each: u32,
    #[serde(default = "max_tokens")]
    max_tokens: u32,
}

#[derive(Debug, Deserialize)]
struct QuestionRow {
    prompt: String,
    label: String,
    group: String,
}

#[derive(Debug, Deserialize)]
struct PromptRow {
    prompt: String,
}

const fn max_length() -> u32 {
    256
}

fn ranks() -> Vec<usize> {
    vec![1, 2, 4, 8, 16, 32, 64]
}

const fn least() -> f64 {
    0.8
}

const fn resamples() -> u32 {
    2000
}

const fn level() -> f64 {
    0.95
}

const fn each() -> u32 {
    4
}

const fn max_tokens() -> u32 {
    32
}

/// Where what a file names lies: beside it.
struct Beside<'f> {
    folder: &'f Path,
    server: &'f Server,
}

impl Beside<'_> {
    async fn place(&self, text: &str, kind: ArtifactKind) -> Result<PathBuf, Failure> {
        let beside = self.folder.join(text);
        let text = if beside.is_dir() { beside.display().to_string() } else { text.to_owned() };
        let place = text.parse().map_err(|error| Failure::usage(format!("{text:?}: {error}")))?;
        remote::folder(&place, kind, self.server).await
    }

    async fn trained(&self, trained: &Trained) -> Result<Folder, Failure> {
        Ok(match trained {
            Trained::Model(text) => Folder::Model(self.place(text, ArtifactKind::Model).await?),
            Trained::Adapter(text) => Folder::Adapter(self.place(text, ArtifactKind::Adapter).await?),
        })
    }
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let file = Path::new(&arguments.file);
    let text = std::fs::read_to_string(file).map_err(|error| Failure::file(file, &error))?;
    let usage = |message: String| Failure::usage(format!("{}: {message}", file.display()));
    let value = read_yaml(&text).map_err(|error| usage(error.to_string()))?;
    let asked: Asked = serde_json::from_value(value).map_err(|error| usage(error.to_string()))?;
    check(&asked).map_err(usage)?;
    let beside = Beside { folder: file.parent().unwrap_or_else(|| Path::new("")), server };
    let (base, reference, runs) = block_on(async {
        let base = beside.place(&asked.base, ArtifactKind::Model).await?;
        let reference = match &asked.reference {
            None => None,
            Some(trained) => Some((trained, beside.trained(trained).await?)),
        };
        let mut runs = Vec::with_capacity(asked.runs.len());
        for run in &asked.runs {
            let trained = match (&run.model, &run.adapter) {
                (Some(model), _) => Trained::Model(model.clone()),
                (None, adapter) => Trained::Adapter(adapter.clone().unwrap_or_default()),
            };
            runs.push((run.name.clone(), beside.trained(&trained).await?));
        }
        Ok((base, reference, runs))
    })?;
    let decisions = asked.decisions.as_ref().map(|asked| questions(asked, &beside)).transpose()?;
    let lexicon = asked.generations.as_ref().map(|asked| lexicon(&beside.folder.join(&asked.lexicon))).transpose()?;
    let generations = match (&asked.generations, &lexicon) {
        (Some(asked), Some(lexicon)) => {
            let prompts: Vec<PromptRow> = looks::rows(&beside.folder.join(&asked.prompts))?;
            let prompts = prompts.into_iter().map(|row| row.prompt).collect();
            Some(Generations { prompts, each: asked.each, max_tokens: asked.max_tokens, scorer: lexicon })
        }
        _ => None,
    };
    let audit = Audit {
        base: &base,
        runs: &runs,
        reference: reference.map(|(trained, folder)| match trained {
            Trained::Model(name) => (Against::Full, name.clone(), folder),
            Trained::Adapter(name) => (Against::LargestRank, name.clone(), folder),
        }),
        target: beside.folder.join(&asked.target),
        known: asked.known.as_ref().map(|known| beside.folder.join(known)),
        rows: asked.rows,
        max_length: asked.max_length,
        decisions,
        generations,
        ranks: &asked.ranks,
        least: asked.least,
        bootstrap: Bootstrap { resamples: asked.resamples, level: asked.level, seed: asked.seed },
    };
    let report = audit.run(|name| note(&format!("looking at {name}")))?;
    let to = arguments.to.clone().unwrap_or_else(|| file.with_extension(""));
    looks::tell(&report, &report.markdown(), Some(&to), out)
}

/// What is wrong with what is asked, if anything is.
fn check(asked: &Asked) -> Result<(), String> {
    if asked.version != 1 {
        return Err(format!("`version` is {}; this build reads version 1", asked.version));
    }
    if asked.runs.is_empty() {
        return Err("`runs` is empty; expected one run or more".to_owned());
    }
    if let Some(at) = asked.runs.iter().position(|run| run.model.is_some() == run.adapter.is_some()) {
        return Err(format!("`runs[{at}]` has to have either `model` or `adapter`"));
    }
    if let Some(AskedDecisions { options, positive, .. }) = &asked.decisions
        && (options.len() < 2 || !options.contains(positive))
    {
        return Err(format!("`decisions.positive` is {positive:?}; expected one of two `options` or more"));
    }
    let shares = [("least", asked.least), ("level", asked.level)];
    if let Some((name, share)) = shares.into_iter().find(|(_, share)| !(*share > 0.0 && *share < 1.0)) {
        return Err(format!("`{name}` is {share}; expected a share above 0 and below 1"));
    }
    if !(100..=100_000).contains(&asked.resamples) {
        return Err(format!("`resamples` is {}; expected 100 to 100000", asked.resamples));
    }
    Ok(())
}

fn questions(asked: &AskedDecisions, beside: &Beside<'_>) -> Result<Decisions, Failure> {
    let rows: Vec<QuestionRow> = looks::rows(&beside.folder.join(&asked.questions))?;
    let question = |QuestionRow { prompt, label, group }| Question { prompt, label, group };
    let questions: Vec<Question> = rows.into_iter().map(question).collect();
    if let Some(question) = questions.iter().find(|question| !asked.options.contains(&question.label)) {
        let message = format!(
            "{}: has the label {:?}, which is none of the options {}",
            asked.questions.display(),
            question.label,
            asked.options.join(", ")
        );
        return Err(Failure::usage(message));
    }
    Ok(Decisions { questions, options: asked.options.clone(), positive: asked.positive.clone() })
}

fn lexicon(path: &Path) -> Result<Lexicon, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    Lexicon::parse(&text).map_err(|(line, message)| Failure::usage(format!("{}:{line}: {message}", path.display())))
}
