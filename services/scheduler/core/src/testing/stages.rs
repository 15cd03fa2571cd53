//! Jobs that consist of stages, and whoever makes the next one.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{Epoch, JobId};

use super::desk::{Desk, failed, finished, job, running};
use crate::sim::rng::Rng;
use crate::{Action, Answer, Cause, EventKind, Input, JobKey, Look, Outcome, Refusal, Request, State};

fn staged() -> Request {
    Request { is_staged: true, ..Request::default() }
}

fn stage_of(parent: &JobKey) -> Request {
    Request { parent: Some(parent.job.clone()), ..Request::default() }
}

fn stage(desk: &mut Desk, parent: &JobKey, name: &str) -> JobKey {
    desk.submit(&format!("{}.{name}", parent.job), stage_of(parent))
}

fn look(desk: &Desk, key: &JobKey, look: Look) -> Input {
    Input::Looked { key: key.clone(), version: desk.row(key).version, look }
}

fn due(desk: &Desk) -> Vec<&str> {
    desk.core.due().map(|key| key.job.as_str()).collect()
}

/// A desk with a worker, a job of stages and its first stage, which runs.
fn begun() -> (Desk, JobKey, JobKey) {
    let mut desk = Desk::new();
    desk.register("w", 9, Vec::new());
    let parent = desk.submit("p", staged());
    assert_eq!((desk.state(&parent), due(&desk)), ("waiting stages_pending".to_owned(), vec!["p"]));
    let first = stage(&mut desk, &parent, "first");
    desk.done(running(&first, 1));
    (desk, parent, first)
}

#[test]
fn a_job_of_stages_ends_with_the_last_of_them() {
    let (mut desk, parent, first) = begun();
    let wait = look(&desk, &parent, Look::Wait);
    desk.done(wait.clone());
    desk.repeated(wait);
    assert!(due(&desk).is_empty());
    let early = look(&desk, &parent, Look::Done);
    assert!(matches!(desk.refused(early), Refusal::WrongState { .. }), "a stage runs");
    desk.done(finished(&first, 1, Outcome::Succeeded));
    assert_eq!(due(&desk), ["p"]);
    let idle = look(&desk, &parent, Look::Wait);
    assert!(matches!(desk.refused(idle), Refusal::WrongState { .. }), "nothing would move it");
    let second = stage(&mut desk, &parent, "second");
    assert_eq!(desk.state(&second), "starting granted");
    desk.done(finished(&second, 1, Outcome::Succeeded));
    // Others may wait for the whole.
    let after = Request { after: [parent.job.clone()].into(), ..Request::default() };
    let later = desk.submit("later", after);
    let done = look(&desk, &parent, Look::Done);
    desk.done(done.clone());
    assert!(matches!(desk.refused(done), Refusal::WrongState { .. }));
    assert_eq!((desk.state(&parent), desk.state(&later)), ("succeeded finished".into(), "starting granted".into()));
    let told: Vec<_> = desk.store.log.iter().filter(|event| event.key == parent).map(|event| &event.kind).collect();
    let of = |stage: &JobKey, state| EventKind::Stage { stage: stage.job.clone(), state };
    let between = [
        of(&first, State::Queued),
        of(&first, State::Succeeded),
        of(&second, State::Queued),
        of(&second, State::Succeeded),
    ];
    assert!(told[1..5].iter().copied().eq(&between), "{told:?}");
    let late = Input::Submit { key: job("p.late"), request: stage_of(&parent), finished: BTreeMap::new() };
    assert!(matches!(desk.refused(late), Refusal::WrongState { .. }));
}

#[test]
fn a_look_that_was_overtaken_changes_nothing() {
    let (mut desk, parent, first) = begun();
    let old = look(&desk, &parent, Look::Wait);
    desk.done(finished(&first, 1, Outcome::Succeeded));
    assert!(matches!(desk.refused(old), Refusal::JobChanged { .. }));
    assert_eq!(due(&desk), ["p"], "the end of the stage is not missed");
}

#[test]
fn a_stage_that_fails_fails_its_parent_and_ends_the_others() {
    for cancel in [false, true] {
        let (mut desk, parent, first) = begun();
        let second = stage(&mut desk, &parent, "second");
        desk.done(running(&second, 1));
        let third = desk.submit("p.third", Request { after: [second.job.clone()].into(), ..stage_of(&parent) });
        if cancel {
            desk.done(Input::Cancel { key: first.clone() });
            desk.done(finished(&first, 1, Outcome::Stopped));
        } else {
            desk.done(failed(&first, 1, Cause::DataFault));
        }
        assert_eq!(desk.state(&parent), "failed stage_failed");
        assert_eq!(desk.state(&second), "stopping(cancel) parent_ended");
        assert_eq!(desk.state(&third), "cancelled parent_ended");
        desk.restart();
        desk.done(finished(&second, 1, Outcome::Stopped));
        assert_eq!(desk.state(&second), "cancelled parent_ended");
        assert!(due(&desk).is_empty());
    }
}

/// As many stages as may fail leave the others alone; one more ends them all.
#[test]
fn some_stages_may_fail() {
    for too_many in [false, true] {
        let mut desk = Desk::new();
        desk.register("w", 9, Vec::new());
        let parent = desk.submit("p", Request { may_fail: 2, ..staged() });
        let stages: Vec<JobKey> = ["a", "b", "c", "d"].map(|name| stage(&mut desk, &parent, name)).into();
        for stage in &stages {
            desk.done(running(stage, 1));
        }
        desk.done(failed(&stages[0], 1, Cause::DataFault));
        assert_eq!((desk.state(&parent), due(&desk)), ("waiting stages_pending".to_owned(), vec!["p"]));
        desk.restart();
        desk.done(Input::Cancel { key: stages[1].clone() });
        desk.done(finished(&stages[1], 1, Outcome::Stopped));
        assert_eq!(desk.state(&stages[2]), "running started");
        if too_many {
            desk.done(failed(&stages[2], 1, Cause::DataFault));
            assert_eq!(desk.state(&parent), "failed stage_failed");
            assert_eq!(desk.state(&stages[3]), "stopping(cancel) parent_ended");
            continue;
        }
        desk.done(finished(&stages[2], 1, Outcome::Succeeded));
        let early = look(&desk, &parent, Look::Done);
        assert!(matches!(desk.refused(early), Refusal::WrongState { .. }), "a stage runs");
        desk.done(finished(&stages[3], 1, Outcome::Succeeded));
        let done = look(&desk, &parent, Look::Done);
        desk.done(done);
        assert_eq!(desk.state(&parent), "succeeded finished");
    }
}

#[test]
fn cancelling_a_parent_cancels_its_stages() {
    let (mut desk, parent, first) = begun();
    let waiting = desk.submit("p.waiting", Request { after: [first.job.clone()].into(), ..stage_of(&parent) });
    let actions = desk.done(Input::Cancel { key: parent.clone() });
    assert!(matches!(actions.as_slice(), [Action::Stop { .. }]), "{actions:?}");
    assert_eq!(desk.state(&parent), "cancelled cancel_asked");
    assert_eq!(desk.state(&first), "stopping(cancel) parent_ended");
    assert_eq!(desk.state(&waiting), "cancelled parent_ended");
    desk.done(finished(&first, 1, Outcome::Succeeded));
    assert_eq!(desk.state(&first), "cancelled parent_ended");
    assert!(due(&desk).is_empty() && desk.core.dependants.is_empty());
}

/// A stage that comes after a job that has failed is hopeless, and so is its parent.
#[test]
fn what_a_stage_comes_after_may_have_failed_already() {
    let (mut desk, parent, _) = begun();
    let other = desk.submit("other", Request::default());
    desk.done(Input::Cancel { key: other.clone() });
    desk.done(finished(&other, 1, Outcome::Stopped));
    let late = Request { after: [other.job].into(), ..stage_of(&parent) };
    let late = desk.submit("p.late", late);
    assert_eq!(desk.state(&late), "failed dependency_failed");
    assert_eq!(desk.state(&parent), "failed stage_failed");
}

#[test]
fn a_stage_that_cannot_be_made_fails_the_job() {
    let (mut desk, parent, first) = begun();
    let broken = look(&desk, &parent, Look::Broken(Cause::SpecFault));
    desk.done(broken);
    assert_eq!(desk.state(&parent), "failed failure(spec_fault)");
    assert_eq!(desk.state(&first), "stopping(cancel) parent_ended");
}

#[test]
fn only_a_job_of_stages_takes_stages() {
    let mut desk = Desk::new();
    let plain = desk.submit("plain", Request::default());
    for (parent, what) in [(plain.clone(), "a job without stages"), (job("nobody"), "nobody")] {
        let key = job(&format!("{}.a", parent.job));
        let input = Input::Submit { key, request: stage_of(&parent), finished: BTreeMap::new() };
        assert!(matches!(desk.refused(input), Refusal::WrongState { .. } | Refusal::UnknownJob { .. }), "{what}");
    }
    let at = look(&desk, &plain, Look::Wait);
    desk.refused(at);
}

/// The stages of a job by name, and those that each comes after.
const PLAN: [(&str, &[&str]); 5] = [("a", &[]), ("b", &[]), ("c", &["a"]), ("d", &["a", "b"]), ("e", &["c", "d"])];

/// Whoever makes stages: reads rows, and acts on what was read later, when it may be true no more.
#[derive(Default)]
struct Maker {
    read: Option<(u64, BTreeMap<String, State>)>,
}

impl Maker {
    fn read(&mut self, desk: &Desk, parent: &JobKey) {
        let prefix = format!("{}.", parent.job);
        let rows = desk.store.jobs.iter();
        let stages =
            rows.filter_map(|(key, row)| Some((key.job.as_str().strip_prefix(&prefix)?.to_owned(), row.state)));
        self.read = Some((desk.store.jobs[parent].version, stages.collect()));
    }

    /// Makes one stage that can be made, or says what there is to say.
    fn act(&mut self, desk: &mut Desk, parent: &JobKey) {
        let Some((version, stages)) = self.read.take() else { return };
        let has = |name: &str| stages.get(name) == Some(&State::Succeeded);
        let next = PLAN.iter().find(|(name, after)| !stages.contains_key(*name) && after.iter().all(|name| has(name)));
        if let Some((name, _)) = next {
            let input = Input::Submit {
                key: job(&format!("{}.{name}", parent.job)),
                request: stage_of(parent),
                finished: BTreeMap::new(),
            };
            let effects = desk.step(input);
            assert!(!matches!(effects.answer, Answer::Refused(Refusal::JobExists { .. })), "made twice: {name}");
            return;
        }
        let is_done = PLAN.iter().all(|(name, _)| has(name));
        let look = if is_done { Look::Done } else { Look::Wait };
        desk.step(Input::Looked { key: parent.clone(), version, look });
    }
}

/// Random histories of three jobs of stages, with restarts at any moment: when calm returns each of them ends; none of its
/// stages was made twice or before its time; and it has succeeded when all of them have, and only then.
#[test]
fn whatever_happens_no_stage_is_lost_or_doubled() {
    let mut ends = BTreeMap::<State, u32>::new();
    for seed in 0..150 {
        // Neighbouring seeds give one sequence, moved by a place.
        let mut rng = Rng::new(seed * 1_000_003);
        let mut desk = Desk::new();
        let parents: Vec<JobKey> = (0..3).map(|n| desk.submit(&format!("p{n}"), staged())).collect();
        let mut makers = [Maker::default(), Maker::default(), Maker::default()];
        // More than they ever need: nobody confirms here that a cohort is gone.
        desk.register("w", 1000, Vec::new());
        for turn in 0..600 {
            let is_calm = turn > 150;
            let at = rng.below(3) as usize;
            match rng.below(if is_calm { 7 } else { 10 }) {
                0 | 1 => makers[at].read(&desk, &parents[at]),
                2 | 3 => makers[at].act(&mut desk, &parents[at]),
                4..=6 => end_one(&mut desk, &mut rng, is_calm),
                7 => {
                    desk.restart();
                    makers = Default::default();
                    let cohorts = desk.core.cohorts().flat_map(|cohort| cohort.attempts.first().cloned());
                    let held: Vec<_> = cohorts.map(|attempt| attempt.key).collect();
                    let holding = held.iter().map(|key| desk.holding(key)).collect();
                    desk.register("w", 1000, holding);
                }
                8 if rng.chance(100) => {
                    let keys: Vec<JobKey> = desk.core.jobs().map(|job| job.key.clone()).collect();
                    if let Some(key) = rng.pick(&keys).cloned() {
                        desk.step(Input::Cancel { key });
                    }
                }
                _ => {
                    let is_final = |job: &&crate::Job| job.state.is_final() && job.request.parent.is_some();
                    let ended = desk.core.jobs().find(is_final).map(|job| job.key.clone());
                    if let Some(key) = ended {
                        desk.step(Input::Forget { key });
                    }
                }
            }
        }
        for parent in &parents {
            let row = &desk.store.jobs[parent];
            assert!(row.state.is_final(), "seed {seed}: {} is {} {:?}", parent, row.state, row.pending);
            *ends.entry(row.state).or_default() += 1;
            check(&desk, parent, seed);
        }
    }
    let reached: BTreeSet<_> = ends.iter().filter(|(_, n)| **n > 5).map(|(state, _)| *state).collect();
    assert_eq!(reached, BTreeSet::from([State::Succeeded, State::Failed, State::Cancelled]), "{ends:?}");
}

/// An attempt that runs ends, or a wait is cut short.
fn end_one(desk: &mut Desk, rng: &mut Rng, is_calm: bool) {
    let can_end = |job: &&crate::Job| job.state.is_live() || job.state == State::Backoff;
    let keys: Vec<JobKey> = desk.core.jobs().filter(can_end).map(|job| job.key.clone()).collect();
    let Some(key) = rng.pick(&keys).cloned() else { return };
    if desk.row(&key).state == State::Backoff {
        desk.step(Input::Retry { key });
        return;
    }
    let Epoch(epoch) = desk.row(&key).epoch;
    let outcome = match rng.below(if is_calm { 100 } else { 60 }) {
        0 => Outcome::Failed(Cause::DataFault),
        1 | 2 if !is_calm => Outcome::Failed(Cause::Hung),
        _ => Outcome::Succeeded,
    };
    desk.step(finished(&key, epoch, outcome));
}

fn check(desk: &Desk, parent: &JobKey, seed: u64) {
    let id = |name: &str| JobId::new(format!("{}.{name}", parent.job)).unwrap();
    let state = |name: &str| desk.store.jobs.get(&JobKey::new(parent.project.clone(), id(name))).map(|job| job.state);
    let all = PLAN.iter().all(|(name, _)| state(name) == Some(State::Succeeded));
    let row = &desk.store.jobs[parent];
    let fits = match row.state {
        State::Succeeded => all,
        // It may have been cancelled before anybody looked.
        State::Cancelled => true,
        _ => !all,
    };
    assert!(fits, "seed {seed}: {parent} is {}", row.state);
    let is_idle = |name: &str| state(name).is_none_or(State::is_final);
    assert!(PLAN.iter().all(|(name, _)| is_idle(name)), "seed {seed}: a stage of {parent} goes on");
    let at = |name: &str, wanted: &dyn Fn(&EventKind) -> bool| {
        let of =
            desk.store.log.iter().enumerate().filter(|(_, event)| event.key.job == id(name) && wanted(&event.kind));
        of.map(|(at, _)| at).collect::<Vec<_>>()
    };
    for (name, after) in PLAN {
        let made = at(name, &|kind| matches!(kind, EventKind::Submitted { .. }));
        assert!(made.len() <= 1, "seed {seed}: {name} of {parent} was made {} times", made.len());
        for before in after.iter().filter(|_| !made.is_empty()) {
            let done = at(before, &|kind| matches!(kind, EventKind::Moved { to: State::Succeeded, .. }));
            assert!(
                done.first() < made.first() && !done.is_empty(),
                "seed {seed}: {name} was made before {before} ended"
            );
        }
    }
}
