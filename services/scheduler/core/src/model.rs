//! Every history within small bounds, by `stateright`.
//!
//! The network is not modelled: any message that could ever have been sent may arrive at any time, any number of times or
//! never, and workers may claim to run anything that was ever offered to them. That covers loss, doubling, reordering,
//! delay without limit, zombies and liars. Time is not modelled either: any deadline may end at any time. The scheduler may
//! die at any time and start again from its rows.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, Step, WorkerId};
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::plant::Plant;
use crate::testing::Store;
use crate::timers::Timer;
use crate::{
    Answer, Attempt, Cause, Change, Commit, Core, Device, Devices, Holding, Input, JobKey, Outcome, Request, Resources,
    Rules, Session, Settings, State, Timestamp, Wanted, invariants,
};

/// Workers, and what is asked of them.
struct Small {
    n_workers: u32,
    jobs: Vec<(&'static str, Request)>,
    /// Histories end when a job gets beyond this epoch.
    max_epoch: u64,
    /// What people may wish for.
    wishes: &'static [fn(JobKey) -> Input],
    plant: Option<Plant>,
}

/// The scheduler and what an observer remembers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Situation {
    core: Core,
    /// Every grant so far: the attempt, its cohort and its gang.
    grants: Vec<(Attempt, CohortId, Vec<WorkerId>)>,
    /// The newest epoch that committed, and the final state, of each job.
    books: BTreeMap<JobKey, (Epoch, Option<State>)>,
    broken: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum Act {
    Input(Input),
    Ends(Timer),
    Restart,
}

const NOW: Timestamp = Timestamp::from_millis(0);

fn settings() -> Settings {
    Settings { quarantine_after: 2, ..Settings::default() }
}

fn workers(n: u32) -> impl Iterator<Item = WorkerId> {
    (0..n).map(|n| WorkerId::new(format!("w{n}")).unwrap())
}

fn key(name: &str) -> JobKey {
    JobKey::new(Project::default(), JobId::new(name).unwrap())
}

fn gang(n_workers: u32) -> Request {
    let resources = Resources {
        n_workers: NonZeroU32::new(n_workers).unwrap(),
        device: Wanted::Only(Device::Cpu),
        ..Resources::default()
    };
    Request { resources, max_attempts: NonZeroU32::new(2).unwrap(), ..Request::default() }
}

/// Takes out what grows without end and decides nothing here: versions, and the numbers of connections and heartbeats.
fn normalise(core: &mut Core) {
    for job in core.jobs.values_mut() {
        job.version = 0;
    }
    for worker in core.workers.values_mut() {
        (worker.session, worker.beat) = (Session(0), 0);
    }
}

impl Small {
    fn registration(&self, worker: WorkerId, holding: Vec<Holding>) -> Input {
        let devices = Devices { n_cpu: 1, n_cuda: 0 };
        let (memory, labels, process) = (BTreeMap::new(), BTreeMap::new(), None);
        Input::Register {
            worker,
            session: Session(1),
            devices,
            memory,
            labels,
            process,
            outdated: false,
            draining: false,
            holding,
        }
    }

    /// Everything that somebody may say about an attempt, rightly or not.
    fn reports(attempt: &Attempt, worker: &WorkerId, is_shared: bool) -> impl Iterator<Item = Input> + use<> {
        let (key, epoch, worker) = (attempt.key.clone(), attempt.epoch, worker.clone());
        let digest = Digest::from_bytes([7; 32]);
        let commit = |commit| Input::Commit { key: key.clone(), epoch, worker: worker.clone(), commit, digest };
        let ended = |outcome| Input::AttemptFinished { key: key.clone(), epoch, worker: worker.clone(), outcome };
        [
            Input::AttemptRunning { key: key.clone(), epoch, worker: worker.clone() },
            commit(Commit::Checkpoint(Step(1))),
            commit(Commit::Output),
            ended(Outcome::Succeeded),
            ended(Outcome::Stopped),
            ended(Outcome::Failed(Cause::Hung)),
            ended(Outcome::Failed(Cause::SpecFault)),
        ]
        .into_iter()
        .chain(is_shared.then(|| ended(Outcome::Crashed(Cause::Hung))))
        .collect::<Vec<_>>()
        .into_iter()
    }

    fn observe(before: &Situation, after: &mut Situation, input: &Input, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Commit(commit) => {
                    let newest = before.grants.iter().rev().find(|(attempt, ..)| attempt.key == commit.key);
                    let is_newest = newest.is_some_and(|(attempt, _, gang)| {
                        attempt.epoch == commit.epoch && gang.first() == Some(&commit.worker)
                    });
                    let book = after.books.entry(commit.key.clone()).or_default();
                    if !is_newest || book.0 > commit.epoch || book.1.is_some() {
                        after.broken = Some(format!("{input:?} committed after {newest:?}"));
                    }
                    book.0 = commit.epoch;
                }
                Change::Policy(..) | Change::Cordon(..) => {}
                Change::Job(job) => {
                    let book = after.books.entry(job.key.clone()).or_default();
                    if book.1.is_some() {
                        after.broken = Some(format!("{} ended twice", job.key));
                    }
                    book.1 = Some(job.state).filter(|state| state.is_final());
                }
                Change::Cohort(cohort) => {
                    let gang: Vec<WorkerId> = cohort.shares.iter().map(|share| share.worker.clone()).collect();
                    // A cohort that is written again has lost a member.
                    let is_known = before.grants.iter().any(|(_, id, _)| *id == cohort.id);
                    for attempt in cohort.attempts.iter().filter(|_| !is_known) {
                        if before.grants.iter().any(|(a, ..)| a.key == attempt.key && a.epoch >= attempt.epoch) {
                            after.broken = Some(format!("{attempt:?} was granted twice"));
                        }
                        after.grants.push((attempt.clone(), cohort.id, gang.clone()));
                    }
                }
                Change::CohortEnded(_) | Change::Counters(_) | Change::Event(_) => {}
            }
        }
    }
}

impl Model for Small {
    type State = Situation;
    type Action = Act;

    fn init_states(&self) -> Vec<Situation> {
        let mut core = Core::new(settings(), NOW);
        core.plant = self.plant;
        for (name, request) in &self.jobs {
            let input = Input::Submit { key: key(name), request: request.clone(), finished: BTreeMap::new() };
            assert_eq!(core.step(input, NOW).answer, Answer::Done);
        }
        normalise(&mut core);
        vec![Situation { core, grants: Vec::new(), books: BTreeMap::new(), broken: None }]
    }

    fn actions(&self, at: &Situation, acts: &mut Vec<Act>) {
        acts.push(Act::Restart);
        acts.extend(at.core.timers.iter().map(|(timer, _)| Act::Ends(timer.clone())));
        let mut say = |input| acts.push(Act::Input(input));
        for (name, _) in &self.jobs {
            for wish in self.wishes {
                say(wish(key(name)));
            }
        }
        for (attempt, cohort, gang) in &at.grants {
            for worker in gang {
                let n_lanes = at.grants.iter().filter(|(_, other, _)| other == cohort).count();
                Self::reports(attempt, worker, n_lanes > 1).for_each(&mut say);
                say(Input::CohortGone { worker: worker.clone(), session: Session(0), cohort: *cohort });
                let cause = Cause::ChildKilled { signal: 9 };
                say(Input::CohortCrashed { worker: worker.clone(), cohort: *cohort, cause });
            }
            // A forged token.
            let forged = Attempt { epoch: attempt.epoch.next(), ..attempt.clone() };
            Self::reports(&forged, &gang[0], false).for_each(&mut say);
        }
        for worker in workers(self.n_workers) {
            let mut offered: BTreeMap<CohortId, Vec<Attempt>> = BTreeMap::new();
            for (attempt, cohort, _) in at.grants.iter().filter(|(_, _, gang)| gang.contains(&worker)) {
                offered.entry(*cohort).or_default().push(attempt.clone());
            }
            let holding = |(cohort, attempts): (&CohortId, &Vec<Attempt>)| Holding {
                cohort: *cohort,
                attempts: attempts.clone(),
                device: Device::Cpu,
                n_devices: 1,
            };
            // It runs nothing, or the newest, or everything that it was ever offered.
            for n_known in [0, 1, offered.len()] {
                let held: Vec<Holding> = offered.iter().rev().take(n_known).map(holding).collect();
                if held.len() < n_known || (n_known == 1 && offered.len() == 1) {
                    continue;
                }
                let cohorts = held.iter().map(|held| held.cohort).collect();
                say(Input::Heartbeat { worker: worker.clone(), session: Session(0), beat: 1, holding: cohorts });
                // Of several lanes it may have lost the last.
                let mut lost = held.clone();
                let has_several =
                    lost.last_mut().is_some_and(|held| held.attempts.len() > 1 && held.attempts.pop().is_some());
                if has_several {
                    say(self.registration(worker.clone(), lost));
                }
                say(self.registration(worker.clone(), held));
            }
            say(Input::Disconnect { worker: worker.clone(), session: Session(0) });
        }
    }

    fn next_state(&self, before: &Situation, act: Act) -> Option<Situation> {
        let mut after = before.clone();
        let input = match act {
            Act::Input(input) => input,
            Act::Ends(timer) => {
                after.core.timers.set(timer, NOW);
                Input::Tick
            }
            Act::Restart => {
                let unfinished = before.core.jobs().filter(|job| !job.state.is_final()).cloned();
                let cohorts = before.core.cohorts().cloned();
                let rules = Rules::default();
                let restored = Core::restore(settings(), unfinished, cohorts, rules, before.core.counters, NOW);
                match restored {
                    Ok(core) => after.core = Core { plant: self.plant, ..core },
                    Err(error) => after.broken = Some(error.to_string()),
                }
                return Some(after);
            }
        };
        let effects = after.core.step(input.clone(), NOW);
        if effects.answer != Answer::Done {
            if after.core == before.core {
                return None;
            }
            after.broken = Some(format!("{input:?} was {:?} and changed the state", effects.answer));
        }
        Self::observe(before, &mut after, &input, &effects.changes);
        normalise(&mut after.core);
        Some(after)
    }

    fn within_boundary(&self, at: &Situation) -> bool {
        at.core.jobs().all(|job| job.epoch.0 <= self.max_epoch)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn any(at: &Situation, truth: impl Fn(&crate::Job) -> bool) -> bool {
            at.core.jobs().any(truth)
        }
        vec![
            Property::always("only the live epoch commits, and a final state stays", |_, at: &Situation| {
                at.broken.is_none()
            }),
            Property::always("the invariants hold", |_, at: &Situation| invariants::all(&at.core).is_ok()),
            Property::always("a restart forgets nothing", |_, at: &Situation| {
                let store = Store {
                    jobs: at.core.jobs.clone(),
                    cohorts: at.core.cohorts.clone(),
                    counters: at.core.counters,
                    ..Store::default()
                };
                store.check_restores(&at.core).is_ok()
            }),
            Property::sometimes(SUCCEEDS_LATER, |_, at: &Situation| {
                any(at, |job| job.state == State::Succeeded && job.checkpoint.is_some_and(|c| c.epoch < job.epoch))
            }),
            Property::sometimes(TWO_COMMIT, |_, at: &Situation| {
                any(at, |job| {
                    job.checkpoint.is_some_and(|c| c.epoch == Epoch(1))
                        && !job.outputs.is_empty()
                        && job.epoch == Epoch(2)
                })
            }),
            Property::sometimes(PAUSED, |_, at: &Situation| any(at, |job| job.state == State::Paused)),
            Property::sometimes(CANCELLED, |_, at: &Situation| any(at, |job| job.state == State::Cancelled)),
            Property::sometimes(GIVEN_UP, |_, at: &Situation| {
                any(at, |job| matches!(job.reason, crate::Reason::AttemptsExhausted(_) | crate::Reason::Quarantined(_)))
            }),
            Property::sometimes(WAITS, |_, at: &Situation| any(at, |job| job.state == State::Backoff)),
            Property::sometimes(SHARED, |_, at: &Situation| at.core.cohorts().any(|cohort| cohort.attempts.len() > 1)),
            Property::sometimes(SPARED, |_, at: &Situation| any(at, |job| job.solo && job.n_failed == 0)),
            Property::sometimes(ALONE, |_, at: &Situation| {
                at.core.workers.is_empty() && any(at, |job| job.state == State::Running)
            }),
        ]
    }
}

const WISHES: &[fn(JobKey) -> Input] = &[
    |key| Input::Cancel { key },
    |key| Input::Pause { key },
    |key| Input::Resume { key },
    |key| Input::Retry { key },
    |key| Input::Preempt { key },
];

const SUCCEEDS_LATER: &str = "a job succeeds after another attempt committed";
const TWO_COMMIT: &str = "two epochs commit, one after the other";
const PAUSED: &str = "a job is paused";
const CANCELLED: &str = "a job is cancelled";
const GIVEN_UP: &str = "a job is given up";
const WAITS: &str = "a job waits after a failure";
const SHARED: &str = "two jobs share a process";
const SPARED: &str = "a shared process dies and nobody is charged";
const ALONE: &str = "every worker is lost while a job runs";

/// Walks every history. What must never be never is, what may be once is, and the number of situations is known: neither
/// can the model shrink unnoticed.
fn check(model: Small, may_be: &[&'static str], n_situations: usize) {
    let checker = model.checker().threads(2).spawn_bfs().join();
    for property in checker.model().properties() {
        let name = property.name;
        let found = checker.discovery(name);
        match property.expectation {
            stateright::Expectation::Always => {
                let Some(path) = found else { continue };
                panic!("{name:?} does not hold after {:?}", path.into_actions());
            }
            stateright::Expectation::Sometimes | stateright::Expectation::Eventually => {
                assert_eq!(found.is_some(), may_be.contains(&name), "{name}");
            }
        }
    }
    assert_eq!(checker.unique_state_count(), n_situations);
}

/// Whether the larger models are to be checked, which takes minutes.
fn is_large() -> bool {
    let is_large = std::env::var_os("ATTUNE_MODEL_LARGE").is_some();
    if !is_large {
        println!("skipped: set ATTUNE_MODEL_LARGE=1 to check the larger models");
    }
    is_large
}

fn small(n_workers: u32, jobs: &[(&'static str, Request)], max_epoch: u64, n_wishes: usize) -> Small {
    Small { n_workers, jobs: jobs.to_vec(), max_epoch, wishes: &WISHES[..n_wishes], plant: None }
}

fn lane() -> Request {
    Request { share: Some(Digest::from_bytes([1; 32])), ..gang(1) }
}

fn behind_a() -> Request {
    Request { after: [JobId::new("a").unwrap()].into(), ..gang(2) }
}

#[test]
fn one_job_and_every_wish() {
    let may_be = [SUCCEEDS_LATER, TWO_COMMIT, PAUSED, CANCELLED, GIVEN_UP, WAITS, ALONE];
    check(small(1, &[("a", gang(1))], 2, 5), &may_be, 9_386);
}

#[test]
fn one_job_and_two_workers() {
    let may_be = [SUCCEEDS_LATER, TWO_COMMIT, CANCELLED, GIVEN_UP, WAITS, ALONE];
    check(small(2, &[("a", gang(1))], 2, 1), &may_be, 41_199);
}

#[test]
fn a_gang_of_two() {
    check(small(2, &[("a", gang(2))], 1, 5), &[PAUSED, CANCELLED, WAITS, ALONE], 3_265);
}

#[test]
fn a_gang_behind_a_job() {
    check(small(2, &[("a", gang(1)), ("b", behind_a())], 1, 0), &[WAITS, ALONE], 33_797);
}

#[test]
fn two_lanes() {
    check(small(1, &[("a", lane()), ("b", lane())], 1, 0), &[SHARED, SPARED, WAITS, ALONE], 17_801);
}

#[test]
fn three_attempts() {
    if is_large() {
        let may_be = [SUCCEEDS_LATER, TWO_COMMIT, PAUSED, CANCELLED, GIVEN_UP, WAITS, ALONE];
        check(small(1, &[("a", gang(1))], 3, 5), &may_be, 65_712);
    }
}

#[test]
fn two_workers_and_every_wish() {
    if is_large() {
        let may_be = [SUCCEEDS_LATER, TWO_COMMIT, PAUSED, CANCELLED, GIVEN_UP, WAITS, ALONE];
        check(small(2, &[("a", gang(1))], 2, 5), &may_be, 92_487);
    }
}

#[test]
fn two_attempts_of_a_gang() {
    if is_large() {
        let may_be = [SUCCEEDS_LATER, TWO_COMMIT, CANCELLED, GIVEN_UP, WAITS, ALONE];
        check(small(2, &[("a", gang(2))], 2, 1), &may_be, 68_816);
    }
}

/// A model is worth what it finds.
#[test]
fn planted_defects_are_found() {
    for plant in [
        Plant::EpochUnchecked,
        Plant::CommitAfterEnd,
        Plant::EpochReused,
        Plant::StopForgotten,
        Plant::HoldingIgnored,
        Plant::LeaseEndless,
    ] {
        let model = Small { plant: Some(plant), ..small(1, &[("a", gang(1))], 2, 5) };
        let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let always = |name: &&'static str| {
            let properties = checker.model().properties();
            properties.iter().any(|p| p.name == *name && p.expectation == stateright::Expectation::Always)
        };
        let found: Vec<&str> = checker.discoveries().into_keys().filter(|name| always(name)).collect();
        assert!(!found.is_empty(), "{plant:?} was not found");
        println!("{plant:?}: {found:?}");
    }
}
