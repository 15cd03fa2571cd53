//! Lanes: several runs side by side in one process, over one base.
//!
//! Each lane is a run like any other, on a thread of its own, with its own outside; it starts, is steered and ends for
//! itself. What it does depends on nothing of the others: its outputs are bit for bit those of the run alone, whichever
//! lanes are there, whatever becomes of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::control::Control;
use crate::error::Error;
use crate::protocol::Request;
use crate::run::{self, End};
use crate::setup::Bases;

/// Runs each request to its end, side by side. `ended` is told of each, with the lane's number, as soon as it ends; the
/// failure or panic of one lane is its own.
///
/// Runs of more than one rank cannot be lanes.
pub fn run(lanes: &[(&Request, &dyn Control)], ended: &(dyn Fn(usize, Result<End, Error>) + Sync)) {
    let bases = Bases::default();
    std::thread::scope(|scope| {
        for (number, (request, control)) in lanes.iter().enumerate() {
            let bases = &bases;
            scope.spawn(move || {
                let end = catch_unwind(AssertUnwindSafe(|| lane(bases, request, *control)))
                    .unwrap_or_else(|panic| Err(Error::Panic(run::words(&*panic))));
                ended(number, end);
            });
        }
    });
}

fn lane(bases: &Bases, request: &Request, control: &dyn Control) -> Result<End, Error> {
    if request.ranks != 1 {
        let message = format!("makes {} ranks; a job that shares its base has one", request.ranks);
        return Err(Error::Faults(vec![attune_spec::Fault::new("resources.devices_per_worker", message)]));
    }
    run::run_over(bases, request, control)
}
