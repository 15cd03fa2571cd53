//! Some optimiser steps on one batch, measured: Attune's side of the comparison of speed. Prints one JSON line.
//!
//! `step CASE.json`, `step peak` (the fastest matrix products here) or `step lanes` (jobs on one base side by side, against the
//! same jobs in turn). `benches/peers/compare.py` writes the case and runs
//! both sides in turn; `benches/peers/step_torch.py` is the other one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "an example that cannot go on stops, and prints what it found"
)]
#![allow(clippy::disallowed_methods, reason = "this program measures time")]

mod case;
mod lanes;
mod memory;
mod peak;
mod tune;

use std::time::{SystemTime, UNIX_EPOCH};

use attune_models::pass::{Stopwatch, Times, Work};
use serde_json::{Value, json};

use crate::case::Case;
use crate::tune::Tune;

type Failure = Box<dyn std::error::Error>;

// As the binary does: the default allocator gives memory back to the system and asks for it again at every step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Failure> {
    let line = match std::env::args().nth(1).as_deref() {
        Some("peak") => peak::measure()?,
        Some("lanes") => lanes::measure(&std::env::args().skip(2).collect::<Vec<_>>())?,
        Some(path) => run(&Case::read(path.as_ref())?)?,
        None => return Err("usage: step CASE.json | step peak | step lanes [f32|bf16 [ROUNDS [TOKENS]]]".into()),
    };
    println!("{line}");
    Ok(())
}

fn run(case: &Case) -> Result<Value, Failure> {
    let started = Stopwatch::start();
    let mut tune = Tune::open(case)?;
    let loaded = json!({"seconds": started.elapsed().as_secs_f64(), "mib": memory::resident_mib()});
    let peak_of_loading = memory::peak_mib();
    memory::forget_peak()?;

    let mut first_step_unix = None;
    let (mut losses, mut seconds, mut cpu) = (Vec::new(), Vec::new(), 0.0);
    let mut spent = Spent::default();
    for step in 0..case.warmup + case.steps {
        let watch = Stopwatch::start();
        let cpu_before = memory::cpu_seconds();
        let done = tune.step()?;
        let step_seconds = watch.elapsed().as_secs_f64();
        losses.push(done.loss);
        first_step_unix.get_or_insert(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64());
        if step >= case.warmup {
            seconds.push(step_seconds);
            cpu += memory::cpu_seconds() - cpu_before;
            spent.times += done.times;
            spent.optimiser += done.optimiser.as_secs_f64();
        }
    }
    let peak_of_steps = memory::peak_mib();
    Ok(json!({
        "tokens": tune.n_rows(),
        "step_seconds": seconds,
        "cpu_seconds_per_step": cpu / case.steps.max(1) as f64,
        "breakdown_ms": spent.per_step_ms(seconds.iter().sum(), seconds.len()),
        "model_gflop": tune.step_flops() / 1e9,
        "loss_first": losses.first(),
        "loss_last": losses.last(),
        "trained": tune.trained(),
        "loaded": loaded,
        "peak_steps_mib": peak_of_steps,
        "peak_mib": peak_of_steps.max(peak_of_loading),
        "device_mib": case.device_bytes()?.map(|bytes| bytes >> 20),
        "first_step_unix": first_step_unix,
        "threads": rayon::current_num_threads(),
        "profile": attune_trainer::kernel::profile(),
    }))
}

/// Where the time of the measured steps went.
#[derive(Default)]
struct Spent {
    times: Times,
    optimiser: f64,
}

impl Spent {
    /// Milliseconds a step by kind of work; what no kind claims is `rest`.
    fn per_step_ms(&self, total: f64, steps: usize) -> Value {
        let mut parts: Vec<(&str, f64)> =
            Work::ALL.iter().map(|&work| (work.name(), self.times.of(work).as_secs_f64())).collect();
        parts.push(("optimiser", self.optimiser));
        let claimed: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
        parts.push(("rest", total - claimed));
        let ms = |seconds: f64| (seconds / steps.max(1) as f64 * 1e5).round() / 100.0;
        parts
            .into_iter()
            .map(|(name, seconds)| (name.to_owned(), json!(ms(seconds))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }
}
