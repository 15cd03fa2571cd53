//! The one task that owns the core: takes one thing at a time, stores what follows, answers, and acts.
//!
//! When something cannot be stored, the core is ahead of the database and is thrown away: a new one is made from the
//! stored rows, and every worker is asked to register again. Nobody is told of anything that is not stored.

#[cfg(test)]
mod history;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use attune_proto::v1::{self, connect_response::Message};
use attune_scheduler_core::supply::{Order, Supply};
use attune_scheduler_core::{Action, Answer, Cause, Core, Counters, Input, JobKey, Outcome, Settings, Worker};
use attune_spec::id::{CohortId, Project, WorkerId};
use attune_store::Store;
use attune_store::change::Write;
use attune_telemetry::Stop;
use tokio::sync::{Notify, mpsc};
use tonic::Status;

use crate::clock::{self, Clock};
use crate::config::Config;
use crate::error::Error;
use crate::front::{Ask, Letter, Mail, Reply, Seen, Standing, Stock, Submission};
use crate::hub::Hub;
use crate::ledger::{self, Extra, Ledger, NEXT_COHORT, NEXT_ORDER, Output, Transaction};
use crate::links::Links;
use crate::messages::Writer;
use crate::{rows, status};

/// The wait before the database is asked again for a new start.
const RELOAD_WAIT: Duration = Duration::from_millis(250);

/// The state of the scheduler.
pub(crate) struct Desk {
    settings: Settings,
    clock: Clock,
    store: Store,
    hub: Hub,
    core: Core,
    ledger: Ledger,
    links: Links,
    writer: Writer,
    n_workers_max: usize,
    n_finished_max: usize,
    finished: VecDeque<JobKey>,
    prune: mpsc::Sender<JobKey>,
    /// Woken while some job's stages are to be looked at.
    due: Arc<Notify>,
}

impl Desk {
    /// The desk as it was when the database was last written. Jobs whose checkpoints may be too many go to `prune`; whoever
    /// looks at stages waits for `due`.
    pub(crate) async fn open(
        config: &Config,
        store: Store,
        hub: Hub,
        clock: Clock,
        prune: mpsc::Sender<JobKey>,
        due: Arc<Notify>,
    ) -> Result<Self, Error> {
        let settings = config.settings();
        let (core, ledger) = restore(&store, settings, clock).await?;
        if let Some(last) = store.last_job().await? {
            clock::ids_follow(&last);
        }
        tracing::info!(jobs = core.jobs().count(), cohorts = core.cohorts().count(), "scheduler restored");
        let desk = Self {
            settings,
            clock,
            hub,
            core,
            ledger,
            links: Links::default(),
            writer: Writer::new(store.clone(), config.timings),
            store,
            n_workers_max: config.limits.workers,
            n_finished_max: config.limits.finished_jobs,
            finished: VecDeque::new(),
            prune,
            due,
        };
        desk.tell_due();
        Ok(desk)
    }

    fn tell_due(&self) {
        if self.core.due().next().is_some() {
            self.due.notify_one();
        }
    }

    /// Works until `stop`, or until the database fails for good.
    pub(crate) async fn run(mut self, mut mail: Mail, stop: Stop) -> Result<(), Error> {
        loop {
            let wake = self.core.wake().map(|wake| wake.since(self.clock.now()));
            // All arms are safe to drop: a letter is taken whole or not at all, and the others hold nothing.
            tokio::select! {
                biased;
                () = stop.requested() => return Ok(()),
                () = sleep(wake) => {
                    let tick = self.step(Input::Tick, Extra::default()).await?;
                    if let Ok((_, actions)) = tick {
                        self.act(actions).await;
                    }
                }
                letter = mail.next() => match letter {
                    Some(letter) => self.take(letter).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    /// Answers one letter. An error ends the scheduler.
    async fn take(&mut self, letter: Letter) -> Result<(), Error> {
        let Letter { ask, reply } = letter;
        let (answer, actions) = match ask {
            Ask::Step { input, extra } => stepped(self.step(*input, *extra).await?),
            Ask::Succeed { input, extra, outputs } => stepped(self.succeed(*input, *extra, outputs).await?),
            Ask::Register { input, link } => {
                let Input::Register { worker, session, .. } = &*input else {
                    return Ok(());
                };
                let (worker, session) = (worker.clone(), *session);
                if self.links.len() >= self.n_workers_max && !self.links.contains(&worker) {
                    (Err(attune_proto::Class::QuotaExceeded.status("as many workers as allowed are connected")), vec![])
                } else {
                    let done = self.step(*input, Extra::default()).await?;
                    if matches!(done, Ok((Answer::Done, _))) {
                        tracing::info!(%worker, session = session.0, "worker registered");
                        self.links.insert(worker, link);
                    }
                    stepped(done)
                }
            }
            Ask::Submit(submission) => match self.submit(*submission).await? {
                Ok((job, actions)) => (Ok(Reply::Job(Box::new(job))), actions),
                Err(status) => (Err(status), vec![]),
            },
            Ask::Write(writes) => (self.write(&writes).await.map(|()| Reply::Written), vec![]),
            Ask::Relay { worker, peer } => {
                self.relay(&worker, &peer);
                (Ok(Reply::Written), vec![])
            }
            Ask::Delete { project, digest, record } => {
                let now = Clock::utc();
                let deleted = self.store.delete_artifact(&project, digest, false, now, record.as_deref()).await;
                (deleted.map(|(deleted, _)| Reply::Deleted(deleted)).map_err(status::store), vec![])
            }
            Ask::Blocked(key) => (Ok(Reply::Blocked(self.core.blocked(&key))), vec![]),
            Ask::Workers => (Ok(Reply::Workers(self.workers())), vec![]),
            Ask::Projects => (Ok(Reply::Projects(self.projects())), vec![]),
            Ask::Project(project) => (Ok(Reply::Project(self.standing(&project))), vec![]),
            Ask::Due => (Ok(Reply::Due(self.core.due().cloned().collect())), vec![]),
            Ask::Supply(stock) => {
                let (supply, orders, actions) = self.supply(*stock).await?;
                (Ok(Reply::Supply(Box::new(supply), orders)), actions)
            }
        };
        // Whoever asked may have gone; what was asked is done all the same.
        let _ = reply.send(answer);
        self.act(actions).await;
        Ok(())
    }

    /// Decides how many workers to have, and drains those that are to be given back, before anything else is granted.
    async fn supply(&mut self, stock: Stock) -> Result<(Supply, Vec<Order>, Vec<Action>), Error> {
        let Stock { mut supply, listed, refused } = stock;
        let now = self.clock.now();
        for pool in &refused {
            supply.refused(pool, now);
        }
        let orders = supply.step(&self.core, listed, now);
        let mut actions = Vec::new();
        for order in &orders {
            let Order::GiveBack { worker, .. } = order else { continue };
            match self.step(Input::Drain { worker: worker.clone() }, Extra::default()).await? {
                Ok((_, more)) => actions.extend(more),
                // It drains by itself when it is told to end.
                Err(error) => tracing::warn!(%error, %worker, "a worker that is given back was not drained"),
            }
        }
        Ok((supply, orders, actions))
    }

    /// Passes what a worker says of its process on to the rest of its gang. Whoever is not connected asks for it again.
    fn relay(&mut self, worker: &WorkerId, peer: &v1::GangPeer) {
        let Some(cohort) = self.core.cohort(CohortId(peer.cohort_id)) else { return };
        if cohort.share(worker).is_none_or(|share| share.rank != peer.rank) {
            tracing::warn!(%worker, cohort = peer.cohort_id, rank = peer.rank, "a worker speaks for a gang's rank that is not its own");
            return;
        }
        let others = cohort.shares.iter().map(|share| &share.worker).filter(|other| *other != worker);
        for other in others {
            self.links.send(other, None, Message::GangPeer(peer.clone()));
        }
    }

    /// The workers, by name; those that are away and have new work kept from them among them.
    fn workers(&self) -> Vec<Seen> {
        let jobs = |worker: &Worker| {
            let cohorts = worker.occupied.keys().filter_map(|cohort| self.core.cohort(*cohort));
            cohorts.flat_map(|cohort| cohort.attempts.iter().map(|attempt| attempt.key.clone())).collect()
        };
        let seen = |worker: &Worker| Seen {
            is_cordoned: self.core.cordoned().contains(&worker.id),
            jobs: jobs(worker),
            worker: worker.clone(),
        };
        self.core.workers().map(seen).collect()
    }

    /// The projects that have something or may not have all.
    fn projects(&self) -> BTreeMap<Project, Standing> {
        let projects = self.core.projects().into_iter();
        projects.map(|project| (project.clone(), self.standing(project))).collect()
    }

    fn standing(&self, project: &Project) -> Standing {
        let (usage, n_queued) = self.core.usage(project);
        Standing { policy: self.core.policy(project), usage, n_queued }
    }

    /// One step: what became of it and what is to be done, once all of it is stored.
    async fn step(&mut self, input: Input, extra: Extra) -> Result<Result<(Answer, Vec<Action>), Status>, Error> {
        let gone = match &input {
            Input::Disconnect { worker, session } => Some((worker.clone(), *session)),
            _ => None,
        };
        let effects = self.core.step(input, self.clock.now());
        if let Some((worker, session)) = gone {
            self.links.remove(&worker, session);
        }
        let now = Clock::moment();
        let transaction = match effects.answer {
            Answer::Done => self.ledger.record(&effects.changes, extra, now),
            Answer::Repeated | Answer::Refused(_) => self.ledger.record(&effects.changes, Extra::default(), now),
        };
        match self.commit(transaction).await? {
            Ok(_) => Ok(Ok((effects.answer, effects.actions))),
            Err(status) => Ok(Err(status)),
        }
    }

    /// The end of an attempt with its results: what it names must be committed, and the job's tags move to it.
    async fn succeed(
        &mut self,
        input: Input,
        mut extra: Extra,
        outputs: Vec<Output>,
    ) -> Result<Result<(Answer, Vec<Action>), Status>, Error> {
        let Input::AttemptFinished { key, epoch, worker, .. } = input else {
            return self.step(input, extra).await;
        };
        let is_live = self.core.job(&key).is_some_and(|job| job.is_live(epoch));
        let mut outcome = Outcome::Succeeded;
        if is_live {
            let committed = self.ledger.outputs(&key);
            let missing = outputs.iter().find(|named| committed.iter().all(|output| output.digest != named.digest));
            if let Some(missing) = missing {
                let message = format!("the worker names {} as a result, which was never committed", missing.digest);
                outcome = Outcome::Failed(Cause::Internal);
                extra.failure = Some(v1::Failure { message, ..crate::log::failure_of(Cause::Internal) });
            } else {
                let outputs = if outputs.is_empty() { committed.to_vec() } else { outputs };
                extra.tags = match self.store.job(&key.project, &key.job).await {
                    Ok(row) => ledger::tags(&row, &outputs),
                    Err(error) => return Ok(Err(status::store(error))),
                };
            }
        }
        self.step(Input::AttemptFinished { key, epoch, worker, outcome }, extra).await
    }

    /// Takes a job in, once per request.
    async fn submit(
        &mut self,
        submission: Submission,
    ) -> Result<Result<(attune_store::job::Job, Vec<Action>), Status>, Error> {
        let Submission { job, request, id, record } = submission;
        let before = match &id {
            Some(id) => self.store.job_of_request(&job.project, id).await,
            None => match self.store.job(&job.project, &job.job).await {
                Err(attune_store::Error::NotFound { .. }) => Ok(None),
                found => found.map(Some),
            },
        };
        match before {
            Ok(None) => {}
            Ok(Some(before)) => return Ok(Ok((before, vec![]))),
            Err(error) => return Ok(Err(status::store(error))),
        }
        // Deletions go through this desk too, so what is found now is there in the transaction.
        for input in &job.inputs {
            if let Err(error) = self.store.artifact(&job.project, input.digest).await {
                return Ok(Err(status::store(error)));
            }
        }
        let mut finished = BTreeMap::new();
        for dependency in &request.after {
            match self.store.job(&job.project, dependency).await {
                Ok(row) => finished.extend(rows::final_state(row.state).map(|state| (dependency.clone(), state))),
                // The core knows what to say about a job that does not exist.
                Err(attune_store::Error::NotFound { .. }) => {}
                Err(error) => return Ok(Err(status::store(error))),
            }
        }
        let key = JobKey::new(job.project.clone(), job.job.clone());
        let effects = self.core.step(Input::Submit { key, request, finished }, self.clock.now());
        if let Answer::Refused(refusal) = &effects.answer {
            return Ok(Err(status::refusal(refusal)));
        }
        let writes = record.map(Write::Audit).into_iter().collect();
        let extra = Extra { new_job: Some(job), writes, ..Extra::default() };
        let transaction = self.ledger.record(&effects.changes, extra, Clock::moment());
        let stored = self.commit_as(transaction, id.as_ref()).await?;
        Ok(stored.and_then(|job| {
            let job = job.ok_or_else(|| attune_proto::Class::Internal.status("the submitted job was not stored"))?;
            Ok((job, effects.actions))
        }))
    }

    async fn write(&self, writes: &[Write]) -> Result<(), Status> {
        fail::fail_point!("scheduler::before_writes");
        let applied = self.store.apply(writes).await.map_err(status::store)?;
        let told = applied.events.into_iter().filter_map(|event| Some((event.event.project, event.event.job?)));
        let measured = writes.iter().filter_map(|write| match write {
            Write::Metrics { project, job, .. } => Some((project.clone(), job.clone())),
            _ => None,
        });
        for (project, job) in told.chain(measured) {
            self.hub.wake(&JobKey::new(project, job));
        }
        Ok(())
    }

    async fn commit(
        &mut self,
        transaction: Transaction,
    ) -> Result<Result<Option<attune_store::job::Job>, Status>, Error> {
        self.commit_as(transaction, None).await
    }

    /// Stores a transaction, or starts anew from what is stored. An error ends the scheduler.
    async fn commit_as(
        &mut self,
        transaction: Transaction,
        request: Option<&attune_store::job::Request>,
    ) -> Result<Result<Option<attune_store::job::Job>, Status>, Error> {
        if transaction.is_empty() {
            return Ok(Ok(None));
        }
        let Transaction { new_job, writes, jobs, to_prune, ended } = transaction;
        let stored = store(&self.store, new_job, &writes, request).await;
        match stored {
            Ok(job) => {
                for key in &jobs {
                    self.hub.wake(key);
                }
                for key in to_prune {
                    // What is not looked at now is looked at with the job's next checkpoint.
                    let _ = self.prune.try_send(key);
                }
                self.finished.extend(ended);
                self.forget_finished();
                self.tell_due();
                Ok(Ok(job))
            }
            // Whoever leads now goes on from the database; so would this one, and be refused again. And a disk that has lost a
            // write once says nothing of it when it is asked again: who starts anew reads what is really there.
            Err(error @ (attune_store::Error::Replaced { .. } | attune_store::Error::NotDurable(_))) => {
                Err(error.into())
            }
            Err(error) => {
                tracing::error!(%error, "a change could not be stored; the scheduler starts anew from the database");
                self.reload().await?;
                Ok(Err(status::store(error)))
            }
        }
    }

    fn forget_finished(&mut self) {
        while self.finished.len() > self.n_finished_max {
            let Some(key) = self.finished.pop_front() else { return };
            self.ledger.forget(&key);
            let effects = self.core.step(Input::Forget { key }, self.clock.now());
            debug_assert!(effects.changes.is_empty() && effects.actions.is_empty(), "{effects:?}");
        }
    }

    /// Makes the core anew from the database, as often as it takes.
    async fn reload(&mut self) -> Result<(), Error> {
        self.links.end_all("the scheduler starts anew from its database; register again");
        self.finished.clear();
        loop {
            match restore(&self.store, self.settings, self.clock).await {
                Ok((core, ledger)) => {
                    (self.core, self.ledger) = (core, ledger);
                    self.tell_due();
                    return Ok(());
                }
                Err(Error::Store(error)) if error.is_retryable() => {
                    tracing::error!(%error, "the database cannot be read");
                    tokio::time::sleep(RELOAD_WAIT).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Performs actions. Any of them may be lost: workers learn what they missed.
    async fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            let session = match &action {
                Action::Welcome { session, .. } | Action::Renewed { session, .. } => Some(*session),
                Action::Offer(_) | Action::Stop { .. } | Action::Drop { .. } | Action::Release { .. } => None,
            };
            if !self.links.contains(action.worker()) {
                continue;
            }
            match self.writer.message(&action).await {
                Ok(message) => self.links.send(action.worker(), session, message),
                Err(error) => tracing::error!(%error, ?action, "an action was lost"),
            }
        }
    }
}

/// Stores what a step changes.
async fn store(
    store: &Store,
    new_job: Option<Box<attune_store::job::NewJob>>,
    writes: &[Write],
    request: Option<&attune_store::job::Request>,
) -> attune_store::Result<Option<attune_store::job::Job>> {
    fail::fail_point!("scheduler::before_transaction", |what| Err(crate::planted::failure(what.as_deref())));
    let job = match new_job {
        Some(job) => Some(store.create_job(&job, writes, request).await?.job),
        None => store.apply(writes).await.map(|_| None)?,
    };
    fail::fail_point!("scheduler::after_transaction", |what| Err(crate::planted::failure(what.as_deref())));
    Ok(job)
}

fn stepped(done: Result<(Answer, Vec<Action>), Status>) -> (Result<Reply, Status>, Vec<Action>) {
    match done {
        Ok((answer, actions)) => (Ok(Reply::Answer(answer)), actions),
        Err(status) => (Err(status), vec![]),
    }
}

async fn sleep(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Core and ledger of what is stored.
async fn restore(store: &Store, settings: Settings, clock: Clock) -> Result<(Core, Ledger), Error> {
    let unfinished = store.unfinished().await?;
    let jobs = unfinished.jobs.iter().map(|row| Ok(rows::job(row)?.0)).collect::<Result<Vec<_>, Error>>()?;
    let cohorts = unfinished.cohorts.iter().map(rows::cohort).collect::<Result<Vec<_>, Error>>()?;
    let first = Counters::default();
    let counter = |name: &str| unfinished.counters.get(name).copied();
    let counters = Counters {
        next_cohort: counter(NEXT_COHORT).map_or(first.next_cohort, CohortId),
        next_order: counter(NEXT_ORDER).unwrap_or(first.next_order),
    };
    let ledger = Ledger::restore(&unfinished)?;
    let rules = rows::rules(&unfinished.rules)?;
    let core = Core::restore(settings, jobs, cohorts, rules, counters, clock.now())?;
    Ok((core, ledger))
}
