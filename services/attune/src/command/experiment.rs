//! `attune experiment`: a grid of jobs, and a table and a plot of what came of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_artifacts::canonical;
use attune_proto::convert::time::unix_ms;
use attune_proto::words::state_words;
use attune_proto::{Client, v1};
use attune_search::{Place, Search, Tried};
use attune_spec::id::Digest;
use serde_json::{Value, json};

use super::jobs;
use super::submit::Prepared;
use crate::advise::{RULES_FILE, derive};
use crate::experiment::matrix::{Cell, Matrix};
use crate::experiment::record::{self, Record};
use crate::experiment::searched::{self, Seen};
use crate::experiment::{curve, plot, report};
use crate::print::{Failure, Out, note};
use crate::remote::{self, Server, block_on};
use crate::words;

/// How often a job is asked whether it has ended.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs grids of jobs and compares what came of them.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune experiment run adapters.yaml                 adapters/results.jsonl, table.md and plot.svg
  attune experiment run adapters.yaml --at-once 4     the same with four jobs in the queue
  attune experiment report adapters.yaml              table and plot again, of what there is")]
pub(crate) enum Command {
    /// Runs the jobs of a grid that have no result yet, one line of JSON for each, and draws table and plot.
    Run(Run),
    /// Draws table and plot of the results that are there.
    Report(One),
}

/// Which grid.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// The grid: `version`, `name`, `job` (a job file), `vary` (a list of axes), `report` (`rows`, `mean_over`, `general`, `stability`), and
    /// `search` and `then` if not all of its jobs are run.
    #[arg(value_name = "FILE")]
    file: String,
    /// Where results, table and plot are; the folder named as the file, beside it, if it is left out.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
}

/// Which grid, and how it is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    #[command(flatten)]
    one: One,
    /// How many jobs are submitted at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    at_once: u32,
    /// Runs jobs that failed before once more; a search goes on without them.
    #[arg(long)]
    retry: bool,
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    match command {
        Command::Run(arguments) => {
            let grid = Grid::read(&arguments.one)?;
            let ran = block_on(grid.run(arguments, server, out));
            // What there is is drawn whatever came of the rest, which is what went wrong first.
            let drawn = grid.report(out);
            ran.and(drawn)
        }
        Command::Report(one) => Grid::read(one)?.report(out),
    }
}

/// A job of a grid, checked.
struct Asked {
    cell: Cell,
    spec: Digest,
    prepared: Prepared,
}

/// A grid and where its results are.
struct Grid {
    matrix: Matrix,
    folder: PathBuf,
    /// The file of its jobs.
    job: String,
    /// All its jobs; none of a grid with a search, which asks for them one by one.
    asked: Vec<Asked>,
    search: Option<Box<dyn Search>>,
}

/// Who runs the jobs.
struct Runner<'a> {
    how: &'a Run,
    client: Client,
    cache: PathBuf,
}

impl Grid {
    /// Reads a grid and checks each of its jobs as `attune submit` would; those of a search when it asks for them.
    fn read(one: &One) -> Result<Self, Failure> {
        let matrix = Matrix::read(&one.file)?;
        let job = matrix.job_file(&one.file);
        let folder = one.to.clone().unwrap_or_else(|| Path::new(&one.file).with_extension(""));
        let search = matrix.search().map_err(|faults| Failure::invalid(&one.file, faults))?;
        let mut grid = Self { matrix, folder, job, asked: Vec::new(), search };
        if grid.search.is_some() {
            return Ok(grid);
        }
        let mut faults = Vec::new();
        for cell in grid.matrix.cells() {
            let title = cell.title();
            match grid.ask(cell) {
                Ok(asked) => grid.asked.push(asked),
                Err(failure) if failure.faults.is_empty() => return Err(failure),
                Err(failure) => faults.extend(failure.faults.into_iter().map(|fault| {
                    let message = format!("{} (of {title})", fault.message);
                    attune_spec::Fault::new(fault.path, message)
                })),
            }
        }
        if faults.is_empty() { Ok(grid) } else { Err(Failure::invalid(&one.file, faults)) }
    }

    /// Checks a job.
    fn ask(&self, cell: Cell) -> Result<Asked, Failure> {
        let prepared = Prepared::read(&self.job, &cell.set, false)?.quietly();
        // Of what is written, so that a field that comes later makes no job another one.
        Ok(Asked { spec: canonical::digest(prepared.written()), cell, prepared })
    }

    fn results(&self) -> PathBuf {
        self.folder.join("results.jsonl")
    }

    async fn run(&self, how: &Run, server: &Server, out: &mut Out) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.folder).map_err(|error| Failure::file(&self.folder, &error))?;
        let runner = Runner { how, client: server.connect().await?, cache: remote::cache_folder()? };
        let Some(search) = &self.search else {
            let asked: Vec<&Asked> = self.asked.iter().collect();
            return self.run_all(&asked, &runner, out).await;
        };
        // Whatever has a result is not run again, so one that was cut off goes on where it was.
        let mut progress = Progress::default();
        loop {
            self.advance(&**search, &mut progress)?;
            let again = if progress.waiting.is_empty() { self.left_to_run_again(&progress.seen)? } else { Vec::new() };
            let left: Vec<&Asked> = progress.waiting.iter().map(|(_, asked)| asked).chain(&again).collect();
            if left.is_empty() {
                return Ok(());
            }
            self.run_all(&left, &runner, out).await?;
            if progress.waiting.is_empty() {
                // Nothing follows from what was run once more.
                return Ok(());
            }
        }
    }

    /// Goes on with a search as far as results are there: to jobs whose results it waits for, or to its end.
    fn advance(&self, search: &dyn Search, progress: &mut Progress) -> Result<(), Failure> {
        let records = record::read(&self.results())?;
        let latest = |spec: &Digest| records.iter().rev().find(|record| record.spec == *spec);
        let space = self.matrix.space();
        loop {
            if progress.waiting.iter().any(|(_, asked)| latest(&asked.spec).is_none()) {
                return Ok(());
            }
            for (place, asked) in std::mem::take(&mut progress.waiting) {
                let Some(record) = latest(&asked.spec) else { continue };
                progress.tried.push(Tried { outcome: searched::outcome(record), place: place.clone() });
                progress.seen.push(self.seen(place, &asked, record, &latest)?);
            }
            // What is valid is checked once, and kept for when it is asked for.
            let (mut valid, mut unfit) = (BTreeMap::new(), None);
            let mut fits = |place: &Place| match self.ask(self.matrix.cell(place)) {
                Ok(asked) => {
                    valid.insert(place.clone(), asked);
                    true
                }
                Err(failure) => {
                    unfit.get_or_insert(failure);
                    false
                }
            };
            let next = search.next(&space, &progress.tried, &mut fits);
            if let (true, true, Some(failure)) = (next.is_empty(), progress.tried.is_empty(), unfit) {
                // No job of the space is valid: this is why one of them is not.
                return Err(failure);
            }
            progress.waiting = next.into_iter().filter_map(|place| valid.remove_entry(&place)).collect();
            if progress.waiting.is_empty() {
                return Ok(());
            }
        }
    }

    /// What came of a job, and of the same run once more, if it was.
    fn seen<'r>(
        &self,
        place: Place,
        asked: &Asked,
        record: &Record,
        latest: &impl Fn(&Digest) -> Option<&'r Record>,
    ) -> Result<Seen, Failure> {
        let then = match self.matrix.then(&asked.cell) {
            Some(then) => latest(&self.ask(then)?.spec).cloned(),
            None => None,
        };
        Ok(Seen { place, cell: asked.cell.clone(), record: record.clone(), then })
    }

    /// All jobs of a search with results, those among them of which others are still waited for.
    fn seen_so_far(&self, search: &dyn Search) -> Result<Vec<Seen>, Failure> {
        let mut progress = Progress::default();
        self.advance(search, &mut progress)?;
        let Progress { mut seen, waiting, .. } = progress;
        let records = record::read(&self.results())?;
        let latest = |spec: &Digest| records.iter().rev().find(|record| record.spec == *spec);
        for (place, asked) in waiting {
            if let Some(record) = latest(&asked.spec) {
                seen.push(self.seen(place, &asked, record, &latest)?);
            }
        }
        Ok(seen)
    }

    /// The jobs that no other one beats, where they are to be run once more and were not.
    fn left_to_run_again(&self, seen: &[Seen]) -> Result<Vec<Asked>, Failure> {
        let left = searched::best(seen).into_iter().filter(|seen| seen.then.is_none());
        left.filter_map(|seen| self.matrix.then(&seen.cell)).map(|cell| self.ask(cell)).collect()
    }

    /// Runs those of the jobs that have no result yet.
    async fn run_all(&self, asked: &[&Asked], runner: &Runner<'_>, out: &mut Out) -> Result<(), Failure> {
        let Runner { how, client, cache } = runner;
        let known = record::read(&self.results())?;
        let tries = |spec: &Digest| known.iter().filter(|record| record.spec == *spec).count();
        let is_done = |asked: &&Asked| {
            let mut of = known.iter().filter(|record| record.spec == asked.spec);
            of.any(|record| record.error.is_none() || !how.retry)
        };
        let left: Vec<&Asked> = asked.iter().copied().filter(|asked| !is_done(asked)).collect();
        note(&format!("{} of {} jobs are left to run", left.len(), asked.len()));
        let (mut flying, mut waiting, mut done) = (VecDeque::new(), left.iter(), 0);
        loop {
            while flying.len() < how.at_once as usize {
                let Some(asked) = waiting.next() else { break };
                // The same job is not made twice by who goes on after a fall.
                let request = format!("{}-{}-{}", self.matrix.name, asked.spec, tries(&asked.spec));
                let answer = asked.prepared.clone().create(client, request, false).await?;
                let job = answer.job.ok_or_else(|| Failure::failed("the server's answer holds no job"))?.job_id;
                flying.push_back((*asked, job));
            }
            let Some((asked, job)) = flying.pop_front() else { return Ok(()) };
            let record = self.outcome(client, asked, &job, cache).await?;
            record::append(&self.results(), &record)?;
            done += 1;
            if out.is_json() {
                out.record(&record)?;
            } else {
                note(&format!("{done} of {}: {}: {}", left.len(), asked.cell.title(), told(&record)));
            }
        }
    }

    /// Waits for a job's end and tells what came of it.
    async fn outcome(&self, client: &Client, asked: &Asked, job: &str, cache: &Path) -> Result<Record, Failure> {
        let ended = loop {
            let found = jobs::get(client, job).await?;
            if state_words(found.state()).is_some_and(|words| words.is_final) {
                break found;
            }
            tokio::time::sleep(PAUSE).await;
        };
        let error = jobs::end(&ended).err().map(|failure| failure.message);
        let of_role =
            |role: &str| ended.outputs.iter().find(|output| output.role == role).map(|output| output.digest.clone());
        let report = match of_role("report") {
            None => Value::Null,
            Some(digest) => {
                let folder =
                    remote::fetch(client, &remote::Place::Stored(digest), v1::ArtifactKind::Report, cache).await?;
                let file = folder.join("report.json");
                let bytes = std::fs::read(&file).map_err(|error| Failure::file(&file, &error))?;
                serde_json::from_slice(&bytes)
                    .map_err(|error| Failure::failed(format!("{}: {error}", file.display())))?
            }
        };
        let artifact = match ended.outputs.first() {
            None => None,
            Some(output) => Some(remote::artifact(client, &output.digest).await?),
        };
        let causes = artifact.as_ref().and_then(|artifact| artifact.causes.clone()).unwrap_or_default();
        // Of a result that another job gave before, bit by bit, these are the facts of that one.
        let facts = artifact.and_then(|artifact| artifact.commit?.facts).unwrap_or_default();
        let ms = |time: Option<&prost_types::Timestamp>| time.map_or(0, unix_ms) as f64;
        Ok(Record {
            experiment: self.matrix.name.clone(),
            place: asked.cell.place.iter().cloned().collect(),
            spec: asked.spec,
            job: job.to_owned(),
            error,
            validation: validation(&report),
            curves: curves(&report),
            trained_parameters: report["trained_parameters"].as_u64().unwrap_or_default(),
            steps: report["steps"].as_u64().unwrap_or_default(),
            tokens: report["tokens"].as_u64().unwrap_or_default(),
            tokens_per_second: facts.tokens_per_second,
            peak_memory_bytes: facts.peak_memory_bytes,
            // A job that is a recipe has no start of its own: its stages have.
            seconds: (ms(ended.end_time.as_ref()) - ms(ended.start_time.as_ref().or(ended.create_time.as_ref()))) / 1e3,
            code_version: causes.code_version,
            kernel_profile: causes.kernel_profile,
        })
    }

    /// Writes table and plot of the results that are there.
    fn report(&self, out: &mut Out) -> Result<(), Failure> {
        let (results, jobs, table, panels, more) = match &self.search {
            Some(search) => {
                let seen = self.seen_so_far(&**search)?;
                let table = searched::markdown(&self.matrix, &seen);
                (seen.len(), search.evaluations(), table, searched::panels(&self.matrix, &seen), Vec::new())
            }
            None => {
                let specs: BTreeSet<Digest> = self.asked.iter().map(|asked| asked.spec).collect();
                let records = record::read(&self.results())?;
                let records = report::Compared::latest(&records, &specs);
                let compared = report::Compared::of(&self.matrix, &records);
                let mut more = Vec::new();
                if records.iter().any(|record| !record.curves.is_empty()) {
                    more.push(("curves.csv", curve::csv(&records)));
                }
                if derive::has_axes(&records) {
                    match derive::rules(&self.matrix.name, &records) {
                        Ok(rules) => more.push((RULES_FILE, rules.text())),
                        Err(why) => note(&format!("no rules follow from these results: {why}")),
                    }
                }
                let table = compared.markdown(&self.matrix, &records);
                (records.len(), self.asked.len(), table, compared.panels(), more)
            }
        };
        if results == 0 {
            return Err(Failure::failed(format!("{} has no results of this grid", self.results().display())));
        }
        let mut written = Vec::new();
        let plot = plot::svg(&self.matrix.name, &panels);
        for (name, text) in [("table.md", table), ("plot.svg", plot)].into_iter().chain(more) {
            let file = self.folder.join(name);
            std::fs::write(&file, text).map_err(|error| Failure::file(&file, &error))?;
            written.push(file);
        }
        if out.is_json() {
            let files = &written;
            return out.record(&json!({"results": results, "jobs": jobs, "files": files}));
        }
        for file in written {
            out.line(&file.display().to_string())?;
        }
        Ok(())
    }
}

/// How far a search is.
#[derive(Default)]
struct Progress {
    /// The jobs with results, in the order in which it asked for them.
    seen: Vec<Seen>,
    /// The same as the search takes them.
    tried: Vec<Tried>,
    /// Jobs whose results it waits for, all together.
    waiting: Vec<(Place, Asked)>,
}

/// First and last loss of each validation set of a report.
fn validation(report: &Value) -> BTreeMap<String, [f64; 2]> {
    let mut losses: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    for measured in report["validation"].as_array().into_iter().flatten() {
        for (set, loss) in measured["loss"].as_object().into_iter().flatten() {
            let loss = loss.as_f64().unwrap_or(f64::NAN);
            losses.entry(set.clone()).or_insert([loss; 2])[1] = loss;
        }
    }
    losses
}

/// All losses of each validation set of a report, where there are more than the first and the last.
fn curves(report: &Value) -> BTreeMap<String, Vec<(u64, f64)>> {
    let mut curves: BTreeMap<String, Vec<(u64, f64)>> = BTreeMap::new();
    for measured in report["validation"].as_array().into_iter().flatten() {
        let step = measured["step"].as_u64().unwrap_or_default();
        for (set, loss) in measured["loss"].as_object().into_iter().flatten() {
            // What is no number is written as none.
            let curve = curves.entry(set.clone()).or_default();
            curve.extend(loss.as_f64().map(|loss| (step, loss)));
        }
    }
    curves.retain(|_, curve| curve.len() > 2);
    curves
}

/// A record in a line.
fn told(record: &Record) -> String {
    if let Some(error) = &record.error {
        return error.lines().next().unwrap_or_default().to_owned();
    }
    let losses = record.validation.iter().map(|(set, [before, after])| format!("{set} {before:.4} → {after:.4}"));
    let losses = losses.collect::<Vec<_>>().join(", ");
    format!("{losses}, {} parameters, {}", record.trained_parameters, words::seconds(record.seconds as u64))
}
