//! One run on several processes: the same bytes as on one, and the end of all when one is lost.
//!
//! Each process is a thread here, with a request, a work folder and an outside of its own; what they say to each other goes
//! over real connections.

#![expect(clippy::result_large_err, reason = "ends are handed from threads as they are")]
#![expect(clippy::disallowed_methods, reason = "how soon a rank's loss is seen is what is looked at")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use attune_collective::Peer;
use attune_spec::id::Step;
use attune_spec::job::Plan;
use attune_trainer::Error;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, FailureClass, Request, Seat};
use attune_trainer::run::{End, run};

use crate::bits::KINDS;
use crate::support::{Outside, Small, files};

/// Where the processes of a run are told of each other.
#[derive(Default)]
struct Table {
    seen: Mutex<BTreeMap<u32, Peer>>,
    came: Condvar,
}

/// The outside of one process.
struct Seated<'t> {
    outside: Outside,
    table: &'t Table,
    seat: Seat,
}

impl Control for Seated<'_> {
    fn stop_requested(&self) -> bool {
        self.outside.stop_requested()
    }

    fn take_checkpoint_request(&self) -> bool {
        false
    }

    fn emit(&self, event: Event) {
        self.outside.emit(event);
    }

    fn meet(&self, own: &Peer) -> Result<Option<Vec<Peer>>, Error> {
        let mut seen = self.table.seen.lock().unwrap();
        seen.insert(self.seat.rank, own.clone());
        self.table.came.notify_all();
        let size = self.seat.size as usize;
        let seen = self.table.came.wait_while(seen, |seen| seen.len() < size).unwrap();
        Ok(Some(seen.values().cloned().collect()))
    }
}

/// What each process of a run ended with.
pub(crate) struct Ends {
    ends: Vec<Result<End, Error>>,
    events: Vec<Vec<Event>>,
    _works: Vec<tempfile::TempDir>,
}

/// Runs each request on a process of `plans.len()`, with this many ranks each.
pub(crate) fn gang(small: &Small, plans: &[Plan], ranks: u32, resume: Option<&Path>, stop_after: Option<u64>) -> Ends {
    let (table, size) = (Table::default(), plans.len() as u32);
    let made: Vec<(Request, tempfile::TempDir)> =
        plans.iter().map(|plan| small.request(plan.clone(), ranks, resume)).collect();
    let outsides: Vec<Seated<'_>> = (0..size)
        .map(|rank| Seated {
            outside: stop_after.filter(|_| rank == 0).map_or_else(Outside::default, Outside::stopping_after),
            table: &table,
            seat: Seat { rank, size, host: IpAddr::V4(Ipv4Addr::LOCALHOST) },
        })
        .collect();
    let ends = std::thread::scope(|scope| {
        let start = |((request, _), outside): (&(Request, _), _)| {
            let (mut request, outside): (Request, &Seated<'_>) = (request.clone(), outside);
            request.seat = Some(outside.seat.clone());
            scope.spawn(move || run(&request, outside))
        };
        let threads: Vec<_> = made.iter().zip(&outsides).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let events = outsides.into_iter().map(|seated| seated.outside.events.into_inner().unwrap()).collect();
    Ends { ends, events, _works: made.into_iter().map(|(_, work)| work).collect() }
}

/// The files of a run that ended well; all but the first process make none.
pub(crate) fn finished(ends: &Ends) -> BTreeMap<String, Vec<u8>> {
    for (end, events) in ends.ends.iter().zip(&ends.events) {
        assert!(matches!(end, Ok(End::Finished(_))), "{end:?}");
        assert!(matches!(events.last(), Some(Event::Finished { .. })));
    }
    let makes = |event: &Event| matches!(event, Event::Output { .. } | Event::Checkpoint { .. });
    assert!(!ends.events[1..].iter().flatten().any(makes), "only the first process makes anything");
    files(&ends.events[0])
}

#[test]
fn several_processes_give_the_bytes_of_one() {
    let small = Small::with_weights();
    for (name, changes) in KINDS {
        let plan = small.plan(&[changes, &[("tune.steps", "5")]].concat());
        let (_, one) = small.finish(plan.clone(), 1);
        let two = gang(&small, &[plan.clone(), plan], 1, None, None);
        assert!(finished(&two) == one, "{name} on two processes");
    }
}

#[test]
fn processes_with_several_ranks_give_the_bytes_of_one() {
    let small = Small::with_weights();
    for (steps, accumulation) in [("5", "1"), ("3", "2")] {
        let plan = small.plan(&[("tune.steps", steps), ("tune.accumulation", accumulation)]);
        let (_, one) = small.finish(plan.clone(), 1);
        for (processes, ranks) in [(1, 1), (2, 2), (4, 1)] {
            let ends = gang(&small, &vec![plan.clone(); processes], ranks, None, None);
            assert!(finished(&ends) == one, "{processes} processes of {ranks} ranks");
        }
    }
}

#[test]
fn a_run_that_stops_on_two_processes_goes_on_by_itself_or_on_four() {
    let small = Small::new();
    let plan = small.plan(&[]);
    let (_, undisturbed) = small.finish(plan.clone(), 1);
    let stopped = gang(&small, &[plan.clone(), plan.clone()], 1, None, Some(4));
    let ends: Vec<_> = stopped.ends.iter().map(|end| end.as_ref().unwrap()).collect();
    assert_eq!(ends, [&End::Stopped(Step(4)); 2]);
    let checkpoint = stopped.events[0].iter().find_map(|event| match event {
        Event::Checkpoint { folder, .. } => Some(folder.clone()),
        _ => None,
    });
    let checkpoint = checkpoint.unwrap();
    let four = gang(&small, &vec![plan.clone(); 4], 1, Some(&checkpoint), None);
    let adapter = "Result/adapter_model.safetensors";
    assert_eq!(finished(&four)[adapter], undisturbed[adapter]);
    let (request, _work) = small.request(plan, 1, Some(&checkpoint));
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert_eq!(files(&outside.events.into_inner().unwrap())[adapter], undisturbed[adapter]);
}

#[test]
fn a_process_that_fails_ends_the_others_which_say_that_it_is_gone() {
    let small = Small::new();
    let plan = small.plan(&[("tune.logical_shards", "3")]);
    let mut broken = plan.clone();
    broken.base = attune_spec::job::plan::Input::Path("/nowhere".to_owned());
    let watch = Instant::now();
    let ends = gang(&small, &[plan.clone(), broken, plan], 1, None, None).ends;
    assert!(watch.elapsed() < Duration::from_secs(60), "at once, not when patience ends");
    let classes: Vec<FailureClass> = ends.iter().map(|end| end.as_ref().unwrap_err().class()).collect();
    assert_eq!(classes, [FailureClass::LostRank, FailureClass::Input, FailureClass::LostRank]);
}

#[test]
fn processes_that_do_not_do_the_same_are_refused() {
    let small = Small::new();
    let ends = gang(&small, &[small.plan(&[]), small.plan(&[("tune.seed", "8")])], 1, None, None).ends;
    for end in ends {
        let error = end.unwrap_err();
        assert_eq!(error.faults()[0].path.as_str(), "resources.labels", "{error}");
    }
}

/// F27: a bit of a weight that one rank loses for a single step does not reach a checkpoint or a result, although the update
/// of that step gives the rank the right value again.
#[cfg(feature = "failpoints")]
#[test]
fn a_lost_bit_is_found_before_anything_is_kept() {
    let _planted = fail::FailScenario::setup();
    let small = Small::new();
    // Each rank comes by once a step: all at step 2. With checkpoints it shows at the next one, without at the end.
    for (processes, ranks, every, found) in [(2, 1, "4", 4), (2, 2, "4", 4), (2, 1, "1000", 8)] {
        let all = processes as u32 * ranks;
        fail::cfg("trainer::bit_lost", &format!("{all}*off->{all}*return(1)->off")).unwrap();
        let plan = small.plan(&[("tune.checkpoint.every_steps", every), ("tune.steps", "8")]);
        let ends = gang(&small, &vec![plan; processes], ranks, None, None);
        for (end, other) in ends.ends.iter().zip([1, 0]) {
            let error = end.as_ref().unwrap_err();
            let Error::Diverged { own, own_digest, rank, digest, step } = error else { panic!("{error}") };
            assert!(*step == Step(found) && own_digest != digest, "{error}");
            assert!([own, rank].contains(&&1), "the rank that differs is one of the two that are named: {error}");
            assert!(ranks > 1 || *rank == other, "{error}");
            let words = error.to_string();
            assert!([own_digest, digest].iter().all(|digest| words.contains(&digest.to_string())), "{words}");
            assert_eq!(error.class(), FailureClass::Corrupt);
            assert!(error.class().is_retryable());
        }
        let is_kept = |event: &Event| matches!(event, Event::Checkpoint { .. } | Event::Output { .. });
        assert!(!ends.events.iter().flatten().any(is_kept));
    }
}
