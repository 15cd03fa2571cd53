//! A worker of the simulation: it keeps its side of the contract, except where a fault says otherwise.

use std::collections::BTreeMap;

use attune_spec::id::{CohortId, Digest, Name, Step, WorkerId};

use super::rng::Rng;
use crate::{
    Action, Answer, Attempt, Cause, Commit, Declined, Device, Devices, Granted, Holding, Input, JobKey, Offer, Outcome,
    Refusal, Session, Share,
};

/// What a job does when it runs, by the first letter of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nature {
    /// It runs to its end.
    Honest,
    /// Its specification is at fault.
    Faulty,
    /// It dies before its first checkpoint, every time.
    Flaky,
    /// It kills its worker.
    Poison,
    /// It kills its worker before anybody has heard that the offer arrived.
    Swift,
}

impl Nature {
    pub(crate) fn of(key: &JobKey) -> Self {
        match key.job.as_str().as_bytes()[0] {
            b'b' => Self::Faulty,
            b'f' => Self::Flaky,
            b'p' => Self::Poison,
            b'q' => Self::Swift,
            _ => Self::Honest,
        }
    }
}

/// Steps that every job has to take, and between two checkpoints.
pub(crate) const N_STEPS: u64 = 20;
const CHECKPOINT_EVERY: u64 = 4;

/// What an agent wants done.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "messages are most of it")]
pub(crate) enum Out {
    /// Send this; with a ticket, the answer is wanted.
    Send(Input, Option<u64>),
    /// Wake it after this many milliseconds.
    Timer(u64, Alarm),
    /// The process dies.
    Die,
}

/// What an agent's own timers are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alarm {
    /// Heartbeat, repetition of unanswered reports, fence.
    Beat,
    /// The child of this cohort does something.
    Work(CohortId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Stopping,
    /// All results are pushed; the success is to be reported.
    Complete,
    /// The end is reported, or nobody wants to hear of it.
    Over,
}

/// A cohort: one process.
#[derive(Debug, Clone)]
struct Held {
    share: Share,
    lanes: Vec<Lane>,
}

impl Held {
    fn lane(&mut self, attempt: &Attempt) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.attempt == *attempt)
    }
}

#[derive(Debug, Clone)]
struct Lane {
    attempt: Attempt,
    phase: Phase,
    step: u64,
    saved: u64,
    ignores_stop: bool,
    /// The commit whose answer it waits for.
    pending: Option<u64>,
}

impl Lane {
    fn new(granted: Granted, ignores_stop: bool) -> Self {
        let step = granted.checkpoint.map_or(0, |checkpoint| checkpoint.step.0);
        let phase = Phase::Starting;
        Self { attempt: granted.attempt, phase, step, saved: step, ignores_stop, pending: None }
    }
}

/// Memory of a processor's device.
pub(crate) const DEVICE_BYTES: u64 = 100;

/// What differs between agents and times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Knobs {
    pub(crate) ttl_ms: u64,
    /// Chance per step that a child dies, in a thousand.
    pub(crate) crash: u64,
    /// Chance that a child ignores the request to stop, in a thousand.
    pub(crate) stubborn: u64,
    /// Chance that a worker refuses an offer, in a thousand.
    pub(crate) refuse: u64,
    /// Whether workers kill their children when their lease is over. The core must not rely on it.
    pub(crate) fences: bool,
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) id: WorkerId,
    pub(crate) devices: Devices,
    /// Timers and answers of an earlier life are void.
    pub(crate) life: u64,
    pub(crate) session: Session,
    is_welcome: bool,
    beat: u64,
    sent_ms: BTreeMap<u64, u64>,
    lease_until_ms: u64,
    held: BTreeMap<CohortId, Held>,
    outbox: BTreeMap<u64, (CohortId, Option<Attempt>, Input)>,
    n_tickets: u64,
    n_unanswered: u64,
}

impl Agent {
    pub(crate) fn new(id: WorkerId, devices: Devices) -> Self {
        Self {
            id,
            devices,
            life: 0,
            session: Session(0),
            is_welcome: false,
            beat: 0,
            sent_ms: BTreeMap::new(),
            lease_until_ms: 0,
            held: BTreeMap::new(),
            outbox: BTreeMap::new(),
            n_tickets: 0,
            n_unanswered: 0,
        }
    }

    /// A new process; its children live on only if `adopts`.
    pub(crate) fn start(&mut self, session: Session, now_ms: u64, adopts: bool, out: &mut Vec<Out>) {
        self.life += 1;
        if !adopts {
            self.held.clear();
        }
        self.outbox.clear();
        // Only what still runs is taken over.
        self.held.values_mut().for_each(|held| held.lanes.retain(|lane| lane.phase != Phase::Over));
        self.held.retain(|_, held| !held.lanes.is_empty());
        for (cohort, held) in &mut self.held {
            for lane in &mut held.lanes {
                lane.pending = None;
                // It does not remember what was answered: it commits once more.
                lane.saved = 0;
                if lane.phase == Phase::Complete {
                    lane.phase = Phase::Running;
                }
            }
            out.push(Out::Timer(20, Alarm::Work(*cohort)));
        }
        self.connect(session, now_ms, out);
        out.push(Out::Timer(500, Alarm::Beat));
    }

    /// A new connection.
    pub(crate) fn connect(&mut self, session: Session, now_ms: u64, out: &mut Vec<Out>) {
        (self.session, self.is_welcome, self.beat, self.n_unanswered) = (session, false, 0, 0);
        self.sent_ms = BTreeMap::from([(0, now_ms)]);
        self.outbox.retain(|_, (_, _, input)| !matches!(input, Input::CohortGone { .. }));
        let holding = self.held.iter().map(|(cohort, held)| Holding {
            cohort: *cohort,
            attempts: held.lanes.iter().map(|lane| lane.attempt.clone()).collect(),
            device: held.share.device,
            n_devices: held.share.n_devices,
        });
        let register = Input::Register {
            worker: self.id.clone(),
            session,
            devices: self.devices,
            memory: BTreeMap::from([(Device::Cpu, DEVICE_BYTES)]),
            labels: BTreeMap::new(),
            process: Name::new(format!("life-{}", self.life)).ok(),
            outdated: false,
            draining: false,
            holding: holding.collect(),
        };
        out.push(Out::Send(register, None));
    }

    pub(crate) fn alarm(&mut self, alarm: Alarm, now_ms: u64, knobs: Knobs, rng: &mut Rng, out: &mut Vec<Out>) {
        if knobs.fences && now_ms > self.lease_until_ms && self.is_welcome {
            // No answer for a whole lease, by its own clock: it lets go of everything.
            self.held.clear();
            self.outbox.clear();
            self.is_welcome = false;
        }
        match alarm {
            Alarm::Beat => {
                self.n_unanswered += 1;
                if self.is_welcome {
                    self.beat += 1;
                    self.sent_ms.insert(self.beat, now_ms);
                    let (worker, session, beat) = (self.id.clone(), self.session, self.beat);
                    let holding = self.held.keys().copied().collect();
                    out.push(Out::Send(Input::Heartbeat { worker, session, beat, holding }, None));
                }
                for (ticket, (_, _, input)) in &self.outbox {
                    out.push(Out::Send(input.clone(), Some(*ticket)));
                }
                out.push(Out::Timer(knobs.ttl_ms / 3, Alarm::Beat));
            }
            Alarm::Work(cohort) => self.work(cohort, knobs, rng, out),
        }
    }

    /// Whether it has had no answer for so long that it should connect again.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.n_unanswered > 3
    }

    fn work(&mut self, cohort: CohortId, knobs: Knobs, rng: &mut Rng, out: &mut Vec<Out>) {
        let Some(held) = self.held.get_mut(&cohort) else { return };
        let leads = held.share.rank == 0;
        let alive = held.lanes.iter_mut().filter(|lane| lane.phase != Phase::Over);
        let alive: Vec<Attempt> = alive.map(|lane| lane.attempt.clone()).collect();
        if !alive.is_empty() && rng.chance(knobs.crash) {
            return self.crash(cohort, &alive, rng, out);
        }
        out.push(Out::Timer(rng.between(50, 400), Alarm::Work(cohort)));
        if leads {
            for attempt in &alive {
                self.work_on(cohort, attempt, out);
            }
        }
    }

    /// The process dies. Its worker says so of the whole, or of each attempt that still ran.
    fn crash(&mut self, cohort: CohortId, alive: &[Attempt], rng: &mut Rng, out: &mut Vec<Out>) {
        let Some(held) = self.held.get_mut(&cohort) else { return };
        held.lanes.iter_mut().for_each(|lane| lane.phase = Phase::Over);
        let cause = Cause::ChildKilled { signal: 9 };
        if rng.chance(500) {
            let input = Input::CohortCrashed { worker: self.id.clone(), cohort, cause };
            self.report(cohort, None, input, out);
            return;
        }
        let outcome = if alive.len() > 1 { Outcome::Crashed(cause) } else { Outcome::Failed(cause) };
        for attempt in alive {
            self.finish(cohort, attempt, outcome, out);
        }
    }

    fn work_on(&mut self, cohort: CohortId, attempt: &Attempt, out: &mut Vec<Out>) {
        let Some(lane) = self.held.get_mut(&cohort).and_then(|held| held.lane(attempt)) else { return };
        if lane.pending.is_some() {
            return;
        }
        let key = attempt.key.clone();
        match lane.phase {
            Phase::Starting if Nature::of(&key) == Nature::Faulty => {
                self.finish(cohort, attempt, Outcome::Failed(Cause::SpecFault), out);
            }
            Phase::Starting => {
                lane.phase = Phase::Running;
                let (epoch, worker) = (attempt.epoch, self.id.clone());
                self.report(cohort, Some(attempt), Input::AttemptRunning { key, epoch, worker }, out);
            }
            Phase::Running => {
                lane.step += 1;
                match Nature::of(&key) {
                    Nature::Flaky if lane.step == 2 => {
                        self.finish(cohort, attempt, Outcome::Failed(Cause::Hung), out);
                    }
                    Nature::Poison if lane.step == 2 => out.push(Out::Die),
                    Nature::Faulty | Nature::Flaky | Nature::Poison | Nature::Swift => {}
                    Nature::Honest if lane.step >= N_STEPS => {
                        lane.phase = Phase::Complete;
                        self.commit(cohort, attempt, Commit::Output, out);
                    }
                    Nature::Honest if lane.step.is_multiple_of(CHECKPOINT_EVERY) => self.save(cohort, attempt, out),
                    Nature::Honest => {}
                }
            }
            Phase::Complete => self.finish(cohort, attempt, Outcome::Succeeded, out),
            Phase::Stopping if lane.ignores_stop => {}
            Phase::Stopping if lane.saved < lane.step => self.save(cohort, attempt, out),
            Phase::Stopping => self.finish(cohort, attempt, Outcome::Stopped, out),
            Phase::Over => {}
        }
    }

    fn save(&mut self, cohort: CohortId, attempt: &Attempt, out: &mut Vec<Out>) {
        let Some(lane) = self.held.get_mut(&cohort).and_then(|held| held.lane(attempt)) else { return };
        let step = lane.step;
        self.commit(cohort, attempt, Commit::Checkpoint(Step(step)), out);
    }

    fn commit(&mut self, cohort: CohortId, attempt: &Attempt, commit: Commit, out: &mut Vec<Out>) {
        let Attempt { key, epoch } = attempt.clone();
        let digest = digest_of(&key, commit);
        let worker = self.id.clone();
        let ticket = self.report(cohort, Some(attempt), Input::Commit { key, epoch, worker, commit, digest }, out);
        if let Some(lane) = self.held.get_mut(&cohort).and_then(|held| held.lane(attempt)) {
            lane.pending = Some(ticket);
            if let Commit::Checkpoint(step) = commit {
                lane.saved = step.0;
            }
        }
    }

    fn finish(&mut self, cohort: CohortId, attempt: &Attempt, outcome: Outcome, out: &mut Vec<Out>) {
        let Some(lane) = self.held.get_mut(&cohort).and_then(|held| held.lane(attempt)) else { return };
        lane.phase = Phase::Over;
        let Attempt { key, epoch } = attempt.clone();
        let worker = self.id.clone();
        self.report(cohort, Some(attempt), Input::AttemptFinished { key, epoch, worker, outcome }, out);
    }

    /// Sends something until it is answered.
    fn report(&mut self, cohort: CohortId, attempt: Option<&Attempt>, input: Input, out: &mut Vec<Out>) -> u64 {
        self.n_tickets += 1;
        self.outbox.insert(self.n_tickets, (cohort, attempt.cloned(), input.clone()));
        out.push(Out::Send(input, Some(self.n_tickets)));
        self.n_tickets
    }

    /// The answer to a report.
    pub(crate) fn answered(&mut self, ticket: u64, answer: &Answer) {
        let Some((cohort, attempt, input)) = self.outbox.remove(&ticket) else { return };
        let Some(held) = self.held.get_mut(&cohort) else { return };
        let Some(lane) = attempt.and_then(|attempt| held.lane(&attempt)) else { return };
        if lane.pending == Some(ticket) {
            lane.pending = None;
        }
        match answer {
            // A checkpoint overtaken by its own successor is no reason to die.
            Answer::Done | Answer::Repeated | Answer::Refused(Refusal::OlderCheckpoint { .. }) => {}
            Answer::Refused(_) if matches!(input, Input::AttemptRunning { .. }) => {}
            Answer::Refused(_) => lane.phase = Phase::Over,
        }
    }

    /// What the scheduler wants.
    pub(crate) fn told(&mut self, action: Action, knobs: Knobs, rng: &mut Rng, out: &mut Vec<Out>) {
        match action {
            Action::Offer(Offer { cohort, attempts, share, gang: _, ttl: _ }) => {
                if self.held.contains_key(&cohort) {
                    return;
                }
                let worker = self.id.clone();
                if rng.chance(knobs.refuse) {
                    let why = *rng.pick(&[Declined::Full, Declined::Full, Declined::Unable]).unwrap_or(&Declined::Full);
                    out.push(Out::Send(Input::OfferRefused { worker, cohort, why }, None));
                    return;
                }
                if attempts.iter().any(|granted| Nature::of(&granted.attempt.key) == Nature::Swift) {
                    return out.push(Out::Die);
                }
                if rng.chance(500) {
                    out.push(Out::Send(Input::OfferAccepted { worker, cohort }, None));
                }
                let lane = |granted| Lane::new(granted, rng.chance(knobs.stubborn));
                let lanes = attempts.into_iter().map(lane).collect();
                self.held.insert(cohort, Held { share, lanes });
                out.push(Out::Timer(rng.between(20, 600), Alarm::Work(cohort)));
            }
            Action::Stop { cohort, attempt, .. } => {
                if let Some(lane) = self.held.get_mut(&cohort).and_then(|held| held.lane(&attempt))
                    && matches!(lane.phase, Phase::Starting | Phase::Running)
                {
                    lane.phase = Phase::Stopping;
                }
            }
            Action::Drop { cohort, attempt, .. } => {
                if let Some(held) = self.held.get_mut(&cohort) {
                    held.lanes.retain(|lane| lane.attempt != attempt);
                }
            }
            Action::Release { cohort, .. } => {
                self.held.remove(&cohort);
                self.outbox.retain(|_, (of, ..)| *of != cohort);
                let (worker, session) = (self.id.clone(), self.session);
                self.report(cohort, None, Input::CohortGone { worker, session, cohort }, out);
            }
            Action::Welcome { session, .. } if session == self.session => {
                self.is_welcome = true;
                self.renewed(0, knobs);
            }
            Action::Renewed { session, beat, .. } if session == self.session => self.renewed(beat, knobs),
            Action::Welcome { .. } | Action::Renewed { .. } => {}
        }
    }

    fn renewed(&mut self, beat: u64, knobs: Knobs) {
        if let Some(sent_ms) = self.sent_ms.get(&beat) {
            self.lease_until_ms = self.lease_until_ms.max(sent_ms + knobs.ttl_ms);
            self.n_unanswered = 0;
        }
    }
}

/// The same work gives the same bytes, whoever does it.
pub(crate) fn digest_of(key: &JobKey, commit: Commit) -> Digest {
    let mut bytes = [0; 32];
    for (byte, from) in bytes.iter_mut().zip(key.to_string().bytes().rev()) {
        *byte = from;
    }
    bytes[31] = match commit {
        Commit::Checkpoint(Step(step)) => u8::try_from(step).unwrap_or(254),
        Commit::Output => 255,
    };
    Digest::from_bytes(bytes)
}
