//! News of attempts: numbered by their worker, recorded once, acknowledged when stored.
//!
//! A report that is refused for good (its attempt is over) is acknowledged too, so that nobody sends it for ever. One
//! that cannot be stored now is not: the connection ends, and the worker sends it again.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_proto::Class;
use attune_proto::convert::id::{AttemptId, attempt, field};
use attune_proto::convert::time::unix_ms;
use attune_proto::v1::{self, attempt_finished, attempt_report::Report, connect_response::Message};
use attune_scheduler_core::{Answer, Input, JobKey, Outcome};
use attune_spec::id::{Digest, Step, Tokens, WorkerId};
use attune_store::UtcMs;
use attune_store::change::Write;
use attune_store::event::NewEvent;
use attune_store::metric::NewPoint;
use serde_json::Value;
use tonic::Status;

use crate::clock::Clock;
use crate::context::Context;
use crate::ledger::{Extra, Output};
use crate::links::Outgoing;
use crate::log;

/// Longest name of a metric.
const METRIC_NAME_BYTES_MAX: usize = 200;

/// Why the connection cannot go on.
pub(crate) enum Broken {
    /// The worker has gone.
    Gone,
    /// Something could not be stored now.
    Failed(Status),
}

/// The reports of one connection.
pub(crate) struct Reports {
    context: Arc<Context>,
    worker: WorkerId,
    outgoing: Outgoing,
    /// What is known of each attempt that was heard of.
    seen: BTreeMap<AttemptId, Seen>,
}

/// What a connection knows of an attempt.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The number of its last recorded report.
    number: u64,
    /// Whether this worker leads its gang. The numbers of the others' reports are not stored: they tell little, and what one of
    /// them says twice, after its connection broke, changes nothing or is read twice.
    leads: bool,
}

/// What is to be done about a report.
enum Taken {
    /// These are stored.
    Writes(Vec<Write>),
    /// The core is told, and these are stored if it agrees.
    Step(Box<Input>, Box<Extra>),
    /// The same, for an end with results.
    Success(Box<Input>, Box<Extra>, Vec<Output>),
}

impl Reports {
    pub(crate) fn new(context: Arc<Context>, worker: WorkerId, outgoing: Outgoing) -> Self {
        Self { context, worker, outgoing, seen: BTreeMap::new() }
    }

    /// Records a report and acknowledges it.
    pub(crate) async fn take(&mut self, report: v1::AttemptReport) -> Result<(), Broken> {
        let id = match attempt("attempt_report.attempt", report.attempt.as_ref()) {
            Ok(id) => id,
            Err(faults) => {
                tracing::warn!(worker = %self.worker, ?faults, "a report names no attempt");
                return Ok(());
            }
        };
        let number = report.sequence;
        let is_last = matches!(report.report, Some(Report::Finished(_)));
        match self.recorded(&id).await? {
            // It is not its attempt, or there never was one: refused for good.
            None => tracing::warn!(worker = %self.worker, attempt = %id, "a report about an attempt of somebody else"),
            Some(seen) if number <= seen.number => {}
            Some(seen) => {
                let number_to_store = seen.leads.then_some(number);
                if let Some(taken) = report.report.and_then(|report| self.read(&id, number_to_store, report)) {
                    self.store(&id, taken).await?;
                }
                self.seen.insert(id.clone(), Seen { number, ..seen });
            }
        }
        if is_last {
            // Nothing follows; what is sent again is looked up again.
            self.seen.remove(&id);
        }
        let ack = v1::ReportAck { attempt: Some(v1::AttemptRef::from(&id)), sequence: number };
        let ack = v1::ConnectResponse { message: Some(Message::ReportAck(ack)) };
        self.outgoing.send(Ok(ack)).await.map_err(|_| Broken::Gone)
    }

    /// What is recorded; nothing when the attempt is not this worker's.
    async fn recorded(&mut self, id: &AttemptId) -> Result<Option<Seen>, Broken> {
        if let Some(seen) = self.seen.get(id) {
            return Ok(Some(*seen));
        }
        let attempts = self.context.store.attempts(&id.project, &id.job).await;
        let attempts = attempts.map_err(|error| Broken::Failed(crate::status::store(error)))?;
        let own = attempts.into_iter().find(|row| row.epoch == id.epoch && row.workers.contains(&self.worker));
        Ok(own.map(|row| {
            let leads = row.workers.first() == Some(&self.worker);
            Seen { number: if leads { row.reported } else { 0 }, leads }
        }))
    }

    /// What a report means; `number` is stored with it.
    fn read(&self, id: &AttemptId, number: Option<u64>, report: Report) -> Option<Taken> {
        let now = Clock::utc();
        let AttemptId { project, job, epoch } = id;
        let key = JobKey::new(project.clone(), job.clone());
        let reported =
            number.map(|number| Write::Reported { project: project.clone(), job: job.clone(), epoch: *epoch, number });
        let event = |kind: &str, data: Value| {
            Write::Event(NewEvent {
                project: project.clone(),
                job: Some(job.clone()),
                epoch: Some(*epoch),
                kind: kind.to_owned(),
                data,
                time: now,
            })
        };
        let progress = |progress: Value| Write::Progress {
            project: project.clone(),
            job: job.clone(),
            epoch: *epoch,
            progress,
            now,
        };
        let worker = self.worker.clone();
        Some(match report {
            // Known otherwise: an offer that arrived shows in the heartbeats, a checkpoint in its commit.
            Report::Started(_) | Report::Checkpoint(_) => Taken::Writes(reported.into_iter().collect()),
            Report::Running(running) => {
                let begun = v1::JobProgress {
                    step: running.step,
                    total_steps: running.total_steps,
                    ..v1::JobProgress::default()
                };
                let writes = [progress(log::progress(&begun, now))].into_iter().chain(reported).collect();
                let input = Input::AttemptRunning { key, epoch: *epoch, worker };
                Taken::Step(Box::new(input), Box::new(Extra { writes, ..Extra::default() }))
            }
            Report::Progress(told) => {
                let data = log::progress(&told, now);
                let told = [progress(data.clone()), event(log::PROGRESS, data)];
                Taken::Writes(told.into_iter().chain(reported).collect())
            }
            Report::Metrics(metrics) => {
                if metrics.dropped > 0 {
                    tracing::warn!(attempt = %id, dropped = metrics.dropped, "metric points were dropped by the worker");
                }
                let points = metrics.points.into_iter().filter_map(|told| point(told, now)).collect();
                let (project, job, epoch) = (project.clone(), job.clone(), *epoch);
                let measured = Write::Metrics { project, job, epoch, points };
                Taken::Writes([measured].into_iter().chain(reported).collect())
            }
            Report::Note(told) => {
                Taken::Writes([event(log::NOTE, log::note(&told))].into_iter().chain(reported).collect())
            }
            Report::Finished(finished) => {
                let mut extra = Extra { writes: reported.into_iter().collect(), ..Extra::default() };
                let input = |outcome| Box::new(Input::AttemptFinished { key, epoch: *epoch, worker, outcome });
                match finished.outcome {
                    Some(attempt_finished::Outcome::Succeeded(succeeded)) => {
                        let outputs = succeeded.outputs.into_iter().filter_map(|output| {
                            let digest = field::<Digest>("digest", &output.digest).ok()?;
                            Some(Output { role: output.role, digest })
                        });
                        Taken::Success(input(Outcome::Succeeded), Box::new(extra), outputs.collect())
                    }
                    Some(attempt_finished::Outcome::Stopped(_)) => {
                        Taken::Step(input(Outcome::Stopped), Box::new(extra))
                    }
                    Some(attempt_finished::Outcome::Failed(failure)) => {
                        let cause = log::cause(&failure);
                        let outcome = if finished.shared { Outcome::Crashed(cause) } else { Outcome::Failed(cause) };
                        extra.failure = Some(failure);
                        Taken::Step(input(outcome), Box::new(extra))
                    }
                    // An outcome of a newer worker: the attempt is over, and nobody here knows how.
                    None => {
                        Taken::Step(input(Outcome::Failed(attune_scheduler_core::Cause::Internal)), Box::new(extra))
                    }
                }
            }
        })
    }

    async fn store(&self, id: &AttemptId, taken: Taken) -> Result<(), Broken> {
        let stored = match taken {
            Taken::Writes(writes) => self.context.front.write(writes).await.map(|()| Answer::Done),
            Taken::Step(input, extra) => self.context.front.step_with(*input, *extra).await,
            Taken::Success(input, extra, outputs) => self.context.front.succeed(*input, *extra, outputs).await,
        };
        match stored {
            Ok(Answer::Done | Answer::Repeated) => Ok(()),
            Ok(Answer::Refused(refusal)) => {
                tracing::info!(attempt = %id, %refusal, "a report changed nothing");
                Ok(())
            }
            Err(status) => match Class::of(&status) {
                Class::StaleEpoch | Class::NotFound => {
                    tracing::info!(attempt = %id, %status, "a report of an attempt that is over");
                    Ok(())
                }
                _ => Err(Broken::Failed(status)),
            },
        }
    }
}

fn point(told: v1::MetricPoint, now: UtcMs) -> Option<NewPoint> {
    let is_name = !told.name.is_empty() && told.name.len() <= METRIC_NAME_BYTES_MAX;
    let time = told.time.as_ref().map(|time| UtcMs(i64::try_from(unix_ms(time)).unwrap_or(i64::MAX)));
    is_name.then(|| NewPoint {
        name: told.name,
        step: Step(told.step),
        value: told.value,
        tokens: Tokens(told.tokens),
        time: time.unwrap_or(now),
    })
}
