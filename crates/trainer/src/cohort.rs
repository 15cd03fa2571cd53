//! Lanes: several runs side by side in one process, over one base.
//!
//! Each lane is a run like any other, on a thread of its own, with its own outside; it starts, is steered and ends for
//! itself. Where lanes compute, they meet, and their micro-batches go through the base together. What a lane does depends on
//! nothing of the others: its outputs are bit for bit those of the run alone, whichever lanes are there, whatever becomes
//! of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use attune_spec::job::plan::ROWS_PER_PASS;

use crate::control::Control;
use crate::error::Error;
use crate::meeting::Meeting;
use crate::protocol::Request;
use crate::run::{self, End};
use crate::setup::Bases;
use crate::together::Company;

/// Runs each request to its end, side by side. `ended` is told of each, with the lane's number, as soon as it ends; the
/// failure or panic of one lane is its own.
///
/// Runs of more than one rank cannot be lanes.
pub fn run(lanes: &[(&Request, &dyn Control)], ended: &(dyn Fn(usize, Result<End, Error>) + Sync)) {
    let (bases, meeting) = (Bases::default(), Meeting::new());
    let rows = || lanes.iter().map(|(request, _)| request.plan.rows_at_once(1));
    let full = rows().max().unwrap_or_default().max(ROWS_PER_PASS.into());
    let largest_pass = rows().sum::<u64>().min(full);
    std::thread::scope(|scope| {
        for (number, (request, control)) in lanes.iter().enumerate() {
            let (bases, meeting) = (&bases, &meeting);
            scope.spawn(move || {
                let end = catch_unwind(AssertUnwindSafe(|| {
                    lane(bases, Company { meeting, lane: number, largest_pass }, request, *control)
                }))
                .unwrap_or_else(|panic| Err(Error::Panic(run::words(&*panic))));
                ended(number, end);
            });
        }
    });
}

/// Leaves the meeting when its run is over, however it ends: the others wait no more for it.
struct Leaves<'a>(Company<'a>);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn lane(bases: &Bases, company: Company<'_>, request: &Request, control: &dyn Control) -> Result<End, Error> {
    let _leaves = Leaves(company);
    if request.all_ranks() != 1 {
        let message = format!("makes {} ranks; a job that shares its base has one", request.all_ranks());
        return Err(Error::Faults(vec![attune_spec::Fault::new("resources.devices_per_worker", message)]));
    }
    run::run_over(bases, Some(company), request, control)
}
