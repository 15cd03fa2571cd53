//! `attune data`: looks at data before it is trained on.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use attune_architecture::Architecture;
use attune_data::dataset::Report;
use attune_data::origin::BadRows;
use attune_data::preview::{self, Statistics};
use attune_data::{Classes, Dataset, Encoder, Reading, Source, Tokenizer, View};
use attune_spec::job::{Form, OnBadRow, Reference, TooLong, TuneSpec};
use serde::Deserialize as _;
use serde::de::IntoDeserializer as _;
use serde::de::value::Error as ValueError;
use serde_json::json;

use crate::job_file::{self, Assignment};
use crate::print::{Column, Failure, Out, Progress, Table, USAGE};

/// The longest document where no job says it.
const MAX_LENGTH: u32 = 1024;

/// Looks at data before it is trained on.
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "Files are read with the tokenizer and chat template of a base: name both, or a job file that does.

Examples:
  attune data preview --base ./base chats.jsonl --rows 2
  attune data validate --job job.yaml
  attune data stats --job job.yaml --json"
)]
pub(crate) enum Command {
    /// Shows rows as the model will read them, with what it will learn between ⟦ and ⟧.
    Preview(Preview),
    /// Checks every row and says which cannot be used, with file and line.
    Validate(Files),
    /// Counts rows and tokens, and shows how long documents are.
    Stats(Files),
}

/// Which rows are shown.
#[derive(Debug, clap::Args)]
pub(crate) struct Preview {
    #[command(flatten)]
    files: Files,
    /// How many rows of each file are shown.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: u64,
}

/// Which files are read, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// JSONL, CSV or Parquet files: paths or s3://bucket/key.
    #[arg(value_name = "SOURCE", required_unless_present = "job", conflicts_with = "job")]
    sources: Vec<String>,
    /// The folder with the tokenizer; the job's base if it is left out.
    #[arg(long, value_name = "FOLDER", required_unless_present = "job")]
    base: Option<PathBuf>,
    /// Reads the data, validation sets and base that this job file names.
    #[arg(long, value_name = "FILE")]
    job: Option<String>,
    /// Sets a field of the job file to a YAML value.
    #[arg(long, value_name = "PATH=VALUE", requires = "job")]
    set: Vec<Assignment>,
    /// How rows are to be understood: chat, prompt_completion, alpaca, text or preference; the columns say it if it is left out. Rows
    /// with classes are those of a job, which says which there are.
    #[arg(long, value_name = "FORM", conflicts_with = "job")]
    form: Option<FormName>,
    /// A chat template in place of the base's: `chatml`, or the text of a Jinja template.
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "job")]
    template: Option<String>,
    /// The longest document, in tokens; 1024 if it is left out.
    #[arg(long, value_name = "TOKENS", conflicts_with = "job")]
    max_length: Option<u32>,
}

/// A form of rows as it is written on the command line.
#[derive(Debug, Clone, Copy)]
struct FormName(Form);

impl FromStr for FormName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Form::deserialize(text.into_deserializer()).map(Self).map_err(|error: ValueError| error.to_string())
    }
}

/// A file to read.
struct File {
    source: Source,
    form: Option<Form>,
}

/// The classes of a job's rows, where its head has some: which row of a text has its class, the model says.
fn classes(tune: &TuneSpec, base: &Path) -> Result<Option<Classes>, Failure> {
    let Some(head) = &tune.head else { return Ok(None) };
    let path = base.join("config.json");
    let text = std::fs::read(&path).map_err(|error| Failure::file(&path, &error))?;
    let unusable = |words: String| Failure::usage(format!("{}: {words}", path.display()));
    let architecture = Architecture::from_json(&text).map_err(|error| unusable(error.to_string()))?;
    let architecture = architecture.over(head).map_err(|fault| unusable(fault.to_string()))?;
    Ok(attune_trainer::classes::of(head, &architecture))
}

/// What is needed to read the files.
struct Opened {
    encoder: Encoder,
    files: Vec<File>,
    on_bad_row: OnBadRow,
}

impl Opened {
    fn open(files: &Files) -> Result<Self, Failure> {
        match &files.job {
            Some(job) => Self::of_job(job, files),
            None => {
                let tokenizer = Tokenizer::open(files.base.as_deref().unwrap_or_else(|| ".".as_ref()))?;
                let max_length = files.max_length.unwrap_or(MAX_LENGTH);
                let template = files.template.as_deref();
                let form = files.form.map(|form| form.0);
                let named = files.sources.iter().map(|source| Ok(File { source: Source::parse(source)?, form }));
                Ok(Self {
                    encoder: Encoder::new(tokenizer, template, max_length, TooLong::default())?,
                    files: named.collect::<Result<_, Failure>>()?,
                    on_bad_row: OnBadRow::default(),
                })
            }
        }
    }

    fn of_job(file: &str, files: &Files) -> Result<Self, Failure> {
        let job = job_file::read(file, &files.set)?;
        let base = files.base.clone().or_else(|| job.local(&job.spec.base)).ok_or_else(|| {
            let base = &job.spec.base;
            Failure::usage(format!("{file}: base {base} is not a folder on this machine"))
                .with_hint("name a folder with its tokenizer: --base FOLDER")
        })?;
        let data = &job.spec.data;
        let domains = data.domains.iter().map(|domain| (&domain.source, domain.form));
        let validation = data.validation.iter().map(|set| (&set.source, set.form));
        let mut named = Vec::new();
        for (reference, form) in domains.chain(validation) {
            let source = match (reference, job.local(reference)) {
                // Shown as it is written in the job, with the folder that it starts from.
                (_, Some(path)) => Source::parse(&path.to_string_lossy())?,
                (Reference::Url(url), None) => Source::parse(url)?,
                (reference, None) => {
                    return Err(Failure::usage(format!(
                        "{file}: {reference} is an artifact, not a file on this machine"
                    )));
                }
            };
            named.push(File { source, form });
        }
        let tokenizer = Tokenizer::open(&base)?;
        let encoder = Encoder::new(tokenizer, data.template.as_deref(), data.max_length, data.too_long)?
            .with_classes(classes(&job.spec.tune, &base)?);
        Ok(Self { encoder, files: named, on_bad_row: data.on_bad_row })
    }

    /// Reads every file. `each` gets one at a time, so that no more than one is in memory.
    fn read_each(
        &self,
        on_bad_row: OnBadRow,
        rows: Option<u64>,
        mut each: impl FnMut(&File, Result<Dataset, attune_data::Error>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut progress = Progress::new("reading", self.files.len() as u64);
        for (index, file) in self.files.iter().enumerate() {
            progress.at(index as u64, file.source.name());
            let reading = Reading { form: file.form, on_bad_row, rows };
            each(file, Dataset::read(&file.source, &self.encoder, reading))?;
        }
        Ok(())
    }
}

pub(super) fn run(command: &Command, out: &mut Out) -> Result<(), Failure> {
    match command {
        Command::Preview(preview) => show(preview, out),
        Command::Validate(files) => validate(files, out),
        Command::Stats(files) => statistics(files, out),
    }
}

fn show(arguments: &Preview, out: &mut Out) -> Result<(), Failure> {
    let opened = Opened::open(&arguments.files)?;
    let tokenizer = opened.encoder.tokenizer();
    opened.read_each(opened.on_bad_row, Some(arguments.rows), |file, dataset| {
        let dataset = dataset?;
        let rows = (0..dataset.len()).flat_map(|index| dataset.row(index).map(move |document| (index, document)));
        for (index, document) in rows {
            let view = match document.view {
                View::Chosen => Some("chosen".to_owned()),
                View::Rejected => Some("rejected".to_owned()),
                View::Query => Some("query".to_owned()),
                View::Passage(0) => Some("positive".to_owned()),
                View::Passage(number) => Some(format!("negative {number}")),
                _ => None,
            };
            let text = preview::marked(document, tokenizer, opened.encoder.classes())?;
            let ordered = preview::ordered(document, file.source.name());
            let learned = ordered.labels_mask.iter().filter(|mark| **mark == 1).count();
            if out.is_json() {
                out.record(&json!({
                    "file": &**file.source.name(), "row": index + 1, "view": view, "text": text, "tokens": ordered.ids.len(),
                    "learned_tokens": learned, "ids": ordered.ids, "labels_mask": ordered.labels_mask,
                }))?;
            } else {
                let (name, row, tokens) = (file.source.name(), index + 1, ordered.ids.len());
                let view = view.map_or_else(String::new, |view| format!(", {view}"));
                out.line(&format!("── {name}, row {row}{view}: {tokens} tokens, {learned} learned"))?;
                out.line(text.trim_end_matches('\n'))?;
            }
        }
        Ok(())
    })
}

/// What checking one file found.
struct Checked {
    file: String,
    usable_rows: u64,
    bad: BadRows,
    /// Why the file as a whole cannot be read.
    error: Option<String>,
}

fn validate(files: &Files, out: &mut Out) -> Result<(), Failure> {
    let opened = Opened::open(files)?;
    let mut checked = Vec::new();
    opened.read_each(OnBadRow::Skip, None, |file, dataset| {
        let file = file.source.name().to_string();
        checked.push(match dataset {
            Ok(dataset) => {
                let Report { rows, bad, .. } = dataset.report().clone();
                Checked { file, usable_rows: rows, bad, error: None }
            }
            // Trouble with the store is nothing that the file could be blamed for.
            Err(error @ attune_data::Error::Remote { .. }) => return Err(error.into()),
            Err(error) => Checked { file, usable_rows: 0, bad: BadRows::default(), error: Some(error.to_string()) },
        });
        Ok(())
    })?;
    let is_bad = |checked: &Checked| checked.error.is_some() || !checked.bad.is_empty();
    if out.is_json() {
        let entry = |checked: &Checked| {
            json!({
                "file": checked.file, "valid": !is_bad(checked), "usable_rows": checked.usable_rows,
                "bad_rows": checked.bad.count(), "by_reason": checked.bad.by_reason, "first": checked.bad.first,
                "error": checked.error,
            })
        };
        out.document(&checked.iter().map(entry).collect::<Vec<_>>())?;
        return if checked.iter().any(is_bad) { Err(Failure::silent(USAGE)) } else { Ok(()) };
    }
    for checked in checked.iter().filter(|checked| !is_bad(checked)) {
        let rows = if checked.usable_rows == 1 { "row" } else { "rows" };
        out.line(&format!("{}: {} {rows}, all usable", checked.file, checked.usable_rows))?;
    }
    let bad: Vec<String> = checked.iter().filter(|checked| is_bad(checked)).map(findings).collect();
    if bad.is_empty() { Ok(()) } else { Err(Failure::usage(bad.join("\n"))) }
}

/// What is wrong with a file, for people: the first bad rows in full, the others counted.
fn findings(checked: &Checked) -> String {
    if let Some(error) = &checked.error {
        return error.clone();
    }
    let (bad, total) = (checked.bad.count(), checked.bad.count() + checked.usable_rows);
    let mut text = format!("{}: {bad} of {total} rows cannot be used", checked.file);
    for row in &checked.bad.first {
        text.push_str(&format!("\n  {row}"));
    }
    let shown = checked.bad.first.len() as u64;
    if bad > shown {
        let reasons = checked.bad.by_reason.iter().map(|(reason, count)| format!("{reason} {count}"));
        text.push_str(&format!("\n  and {} more; by reason: {}", bad - shown, reasons.collect::<Vec<_>>().join(", ")));
    }
    text
}

fn statistics(files: &Files, out: &mut Out) -> Result<(), Failure> {
    let opened = Opened::open(files)?;
    let mut found: Vec<Statistics> = Vec::new();
    opened.read_each(opened.on_bad_row, None, |_, dataset| {
        found.push(preview::statistics(&dataset?));
        Ok(())
    })?;
    if out.is_json() {
        return out.document(&found);
    }
    let mut table = Table::new([
        Column::left("FILE"),
        Column::left("FORM"),
        Column::right("ROWS"),
        Column::right("TOKENS"),
        Column::right("LEARNED"),
        Column::right("CUT"),
        Column::right("BAD"),
        Column::left("LENGTHS"),
    ]);
    for Statistics { report, lengths } in &found {
        let form = serde_json::to_value(report.form).ok().and_then(|form| form.as_str().map(str::to_owned));
        let lengths: Vec<String> = lengths.iter().map(|(name, tokens)| format!("{name} {tokens}")).collect();
        table.row([
            report.file.clone(),
            form.unwrap_or_default(),
            report.rows.to_string(),
            report.tokens.to_string(),
            report.trained_tokens.to_string(),
            report.truncated.to_string(),
            report.bad.count().to_string(),
            lengths.join(", "),
        ]);
    }
    out.table(&table)?;
    for Statistics { report, .. } in found.iter().filter(|found| !found.report.classes.is_empty()) {
        let names = opened.encoder.classes().map_or(&[][..], |classes| &classes.names);
        let each: Vec<String> =
            names.iter().zip(&report.classes).map(|(name, count)| format!("{name} {count}")).collect();
        out.line(&format!("classes of {}: {}", report.file, each.join(", ")))?;
    }
    Ok(())
}
