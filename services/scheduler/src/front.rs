//! How everybody else speaks with the desk: a letter, and an answer.

use std::collections::BTreeMap;

use attune_proto::v1;
use attune_scheduler_core::placement::Blocked;
use attune_scheduler_core::supply::{Listed, Order, Supply};
use attune_scheduler_core::{Answer, Input, JobKey, Policy, Request, Usage, Worker};
use attune_spec::id::{Digest, Name, Project, WorkerId};
use attune_store::artifact::Deleted;
use attune_store::audit::Record;
use attune_store::change::Write;
use attune_store::job::{Job, NewJob};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::guard::Caller;
use crate::ledger::{Extra, Output};
use crate::links::Link;
use crate::status;

/// A job to be taken in.
#[derive(Debug)]
pub(crate) struct Submission {
    /// What is stored of it.
    pub(crate) job: Box<NewJob>,
    /// What the core must know of it.
    pub(crate) request: Request,
    /// The caller's request id, with the digest of what it asked for; a stage is told by its own id.
    pub(crate) id: Option<attune_store::job::Request>,
    /// The record of the call.
    pub(crate) record: Option<Box<Record>>,
}

/// A worker as the core sees it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// The worker.
    pub(crate) worker: Worker,
    /// Whether somebody keeps new work from it.
    pub(crate) is_cordoned: bool,
    /// The jobs that it runs.
    pub(crate) jobs: Vec<JobKey>,
}

/// Where a project stands.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Standing {
    /// What it may have.
    pub(crate) policy: Policy,
    /// What it occupies.
    pub(crate) usage: Usage,
    /// Its jobs that have neither ended nor run.
    pub(crate) n_queued: u32,
}

/// What the desk is asked.
#[derive(Debug)]
pub(crate) enum Ask {
    /// One step of the core, with what is stored beside it.
    Step { input: Box<Input>, extra: Box<Extra> },
    /// A step that ends an attempt well, with the results that its worker names.
    Succeed { input: Box<Input>, extra: Box<Extra>, outputs: Vec<Output> },
    /// A worker registers on this connection.
    Register { input: Box<Input>, link: Link },
    /// A job is taken in.
    Submit(Box<Submission>),
    /// Writes that the core has no part in.
    Write(Vec<Write>),
    /// A worker of a gang says something to the others of it.
    Relay { worker: WorkerId, peer: v1::GangPeer },
    /// An artifact is deleted.
    Delete { project: Project, digest: Digest, record: Option<Box<Record>> },
    /// Why a queued job is not granted.
    Blocked(JobKey),
    /// The workers.
    Workers,
    /// What projects have and may have.
    Projects,
    /// The same of one.
    Project(Project),
    /// The jobs whose stages are to be looked at.
    Due,
    /// How many workers to have.
    Supply(Box<Stock>),
}

/// What decides how many workers to have, and what it goes by.
#[derive(Debug)]
pub(crate) struct Stock {
    /// What decides.
    pub(crate) supply: Supply,
    /// What the engines have that could be asked.
    pub(crate) listed: BTreeMap<Name, Listed>,
    /// The pools whose engines refused to start a worker.
    pub(crate) refused: Vec<Name>,
}

/// What the desk answers.
#[derive(Debug)]
pub(crate) enum Reply {
    /// What became of a step.
    Answer(Answer),
    /// The job of a submission, and whether it is new.
    Job(Box<Job>),
    /// The writes are stored.
    Written,
    /// The artifact is gone.
    Deleted(Deleted),
    /// Why a queued job is not granted.
    Blocked(Option<Blocked>),
    /// The workers, by name.
    Workers(Vec<Seen>),
    /// The projects that have something or may not have all, by name.
    Projects(BTreeMap<Project, Standing>),
    /// One project.
    Project(Standing),
    /// The jobs whose stages are to be looked at.
    Due(Vec<JobKey>),
    /// What decides how many workers to have, and what it orders. Those that are to be given back are drained.
    Supply(Box<Supply>, Vec<Order>),
}

/// A question with where its answer goes.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) ask: Ask,
    pub(crate) reply: oneshot::Sender<Result<Reply, Status>>,
}

/// Where letters arrive. Signs of life go before everything else, which may have much to store: a worker whose sign waits for
/// longer than its lease ends what it runs.
#[derive(Debug)]
pub(crate) struct Mail {
    beats: mpsc::Receiver<Letter>,
    letters: mpsc::Receiver<Letter>,
}

impl Mail {
    /// The next letter; none once nobody can write any more. Loses nothing when it is dropped.
    pub(crate) async fn next(&mut self) -> Option<Letter> {
        tokio::select! {
            biased;
            Some(letter) = self.beats.recv() => Some(letter),
            letter = self.letters.recv() => letter,
        }
    }
}

/// Cheap to clone; all clones speak with the same desk.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    beats: mpsc::Sender<Letter>,
    letters: mpsc::Sender<Letter>,
}

impl Front {
    /// A front, and where its letters arrive; `waiting` of each kind may wait.
    pub(crate) fn new(waiting: usize) -> (Self, Mail) {
        let (letters, arrive) = mpsc::channel(waiting.max(1));
        let (beats, beating) = mpsc::channel(waiting.max(1));
        (Self { beats, letters }, Mail { beats: beating, letters: arrive })
    }

    async fn ask(&self, ask: Ask) -> Result<Reply, Status> {
        asked(&self.letters, ask).await
    }

    /// A worker's sign of life, which is heard before what anybody else asks.
    pub(crate) async fn beat(&self, input: Input) -> Result<Answer, Status> {
        let ask = Ask::Step { input: Box::new(input), extra: Box::default() };
        answer(asked(&self.beats, ask).await?)
    }

    /// One step of the core; its changes are stored when this returns.
    pub(crate) async fn step(&self, input: Input) -> Result<Answer, Status> {
        self.step_with(input, Extra::default()).await
    }

    /// The same, with what is stored if the input takes effect.
    pub(crate) async fn step_with(&self, input: Input, extra: Extra) -> Result<Answer, Status> {
        answer(self.ask(Ask::Step { input: Box::new(input), extra: Box::new(extra) }).await?)
    }

    /// A step that a caller asks for: if it takes effect, it is stored with the record of the call.
    pub(crate) async fn step_for(&self, caller: &Caller, input: Input, mut extra: Extra) -> Result<Answer, Status> {
        extra.writes.extend(caller.record().map(Write::Audit));
        let answer = self.step_with(input, extra).await?;
        if matches!(answer, Answer::Done) {
            caller.is_recorded();
        }
        Ok(answer)
    }

    /// The end of an attempt with its results, the main one first.
    pub(crate) async fn succeed(&self, input: Input, extra: Extra, outputs: Vec<Output>) -> Result<Answer, Status> {
        answer(self.ask(Ask::Succeed { input: Box::new(input), extra: Box::new(extra), outputs }).await?)
    }

    /// A worker's registration.
    pub(crate) async fn register(&self, input: Input, link: Link) -> Result<Answer, Status> {
        answer(self.ask(Ask::Register { input: Box::new(input), link }).await?)
    }

    /// Passes on where a process of a gang listens.
    pub(crate) async fn relay(&self, worker: WorkerId, peer: v1::GangPeer) -> Result<(), Status> {
        self.ask(Ask::Relay { worker, peer }).await.map(drop)
    }

    /// Takes a job in, or gives the one that the same request made before.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Job, Status> {
        match self.ask(Ask::Submit(Box::new(submission))).await? {
            Reply::Job(job) => Ok(*job),
            other => Err(unexpected(&other)),
        }
    }

    /// Stores what the core has no part in.
    pub(crate) async fn write(&self, writes: Vec<Write>) -> Result<(), Status> {
        match self.ask(Ask::Write(writes)).await? {
            Reply::Written => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The same for a caller, with the record of its call.
    pub(crate) async fn write_for(&self, caller: &Caller, mut writes: Vec<Write>) -> Result<(), Status> {
        writes.extend(caller.record().map(Write::Audit));
        self.write(writes).await?;
        caller.is_recorded();
        Ok(())
    }

    /// Deletes an artifact's row for a caller, with the record of its call.
    pub(crate) async fn delete(&self, caller: &Caller, project: Project, digest: Digest) -> Result<Deleted, Status> {
        match self.ask(Ask::Delete { project, digest, record: caller.record() }).await? {
            Reply::Deleted(deleted) => {
                caller.is_recorded();
                Ok(deleted)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// The jobs whose stages are to be looked at.
    pub(crate) async fn due(&self) -> Result<Vec<JobKey>, Status> {
        match self.ask(Ask::Due).await? {
            Reply::Due(keys) => Ok(keys),
            other => Err(unexpected(&other)),
        }
    }

    /// What is to be asked of engines. Workers that are to be given back are drained when this returns.
    pub(crate) async fn supply(&self, stock: Stock) -> Result<(Supply, Vec<Order>), Status> {
        match self.ask(Ask::Supply(Box::new(stock))).await? {
            Reply::Supply(supply, orders) => Ok((*supply, orders)),
            other => Err(unexpected(&other)),
        }
    }

    /// The workers, by name.
    pub(crate) async fn workers(&self) -> Result<Vec<Seen>, Status> {
        match self.ask(Ask::Workers).await? {
            Reply::Workers(workers) => Ok(workers),
            other => Err(unexpected(&other)),
        }
    }

    /// The projects that have something or may not have all.
    pub(crate) async fn projects(&self) -> Result<BTreeMap<Project, Standing>, Status> {
        match self.ask(Ask::Projects).await? {
            Reply::Projects(projects) => Ok(projects),
            other => Err(unexpected(&other)),
        }
    }

    /// What one project has and may have.
    pub(crate) async fn project(&self, project: &Project) -> Result<Standing, Status> {
        match self.ask(Ask::Project(project.clone())).await? {
            Reply::Project(standing) => Ok(standing),
            other => Err(unexpected(&other)),
        }
    }

    /// Why a queued job is not granted; nothing when it is not queued.
    pub(crate) async fn blocked(&self, key: JobKey) -> Result<Option<Blocked>, Status> {
        match self.ask(Ask::Blocked(key)).await? {
            Reply::Blocked(blocked) => Ok(blocked),
            other => Err(unexpected(&other)),
        }
    }
}

async fn asked(letters: &mpsc::Sender<Letter>, ask: Ask) -> Result<Reply, Status> {
    let (reply, answer) = oneshot::channel();
    letters.send(Letter { ask, reply }).await.map_err(|_| status::shuts_down())?;
    answer.await.map_err(|_| status::shuts_down())?
}

fn answer(reply: Reply) -> Result<Answer, Status> {
    match reply {
        Reply::Answer(answer) => Ok(answer),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> Status {
    tracing::error!(?reply, "the desk answered another question");
    attune_proto::Class::Internal.status("the scheduler mixed up two answers")
}

#[cfg(test)]
mod tests {
    use attune_scheduler_core::Session;
    use futures::FutureExt;

    use super::*;

    #[test]
    fn signs_of_life_go_before_what_came_earlier() {
        let (front, mut mail) = Front::new(4);
        let mut asked = Box::pin(front.workers());
        let worker = WorkerId::new("w").unwrap();
        let input = Input::Heartbeat { worker, session: Session(0), beat: 1, holding: Vec::new() };
        let mut beaten = Box::pin(front.beat(input));
        assert!((&mut asked).now_or_never().is_none() && (&mut beaten).now_or_never().is_none());
        let mut next = || mail.next().now_or_never().flatten().map(|letter| letter.ask);
        assert!(matches!(next(), Some(Ask::Step { .. })));
        assert!(matches!(next(), Some(Ask::Workers)));
        drop((asked, beaten));
        drop(front);
        assert!(matches!(mail.next().now_or_never(), Some(None)), "nobody can write any more");
    }
}
