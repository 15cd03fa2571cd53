//! What the processor can do at most: fused multiply-adds in registers, and the best of large matrix products.

use std::time::Instant;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::Failure;

/// Seconds spent on each measurement.
const SECONDS: f64 = 0.6;

/// Everything in GFLOP/s, with all threads of the pool.
pub(crate) fn measure() -> Result<Value, Failure> {
    let mut library: f64 = 0.0;
    for n in [1024, 2048] {
        let (a, b) = (Tensor::randn(0f32, 1.0, (n, n), &Device::Cpu)?, Tensor::randn(0f32, 1.0, (n, n), &Device::Cpu)?);
        library = library.max(best(2.0 * (n as f64).powi(3), || a.matmul(&b).map(|_| ()))?);
    }
    let threads = rayon::current_num_threads();
    let fma = best((threads * REPEATS * CHAINS * LANES * 2) as f64, || {
        (0..threads).into_par_iter().for_each(|seed| {
            std::hint::black_box(chains(seed as f32));
        });
        Ok::<_, candle_core::Error>(())
    })?;
    Ok(json!({"threads": threads, "fma_f32_gflops": fma, "gemm_crate_f32_gflops": library}))
}

/// The fastest of the runs of `f` within [`SECONDS`].
fn best<E>(flops: f64, mut f: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let (begun, mut fastest) = (Instant::now(), f64::INFINITY);
    while begun.elapsed().as_secs_f64() < SECONDS {
        let started = Instant::now();
        f()?;
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    Ok((flops / fastest / 1e8).round() / 10.0)
}

/// Independent chains of multiply-adds, enough to hide the latency of one: 4 cycles, 2 a cycle.
const CHAINS: usize = 12;
const LANES: usize = 8;
const REPEATS: usize = 1 << 22;

#[cfg(target_arch = "x86_64")]
fn chains(seed: f32) -> f32 {
    #[target_feature(enable = "avx2,fma")]
    fn wide(seed: f32) -> f32 {
        fused(seed)
    }
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        #[expect(unsafe_code, reason = "calls a function that is compiled for instructions beyond the baseline")]
        // SAFETY: the processor has both features, by the line above.
        unsafe {
            wide(seed)
        }
    } else {
        fused(seed)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn chains(seed: f32) -> f32 {
    fused(seed)
}

#[inline(always)]
fn fused(seed: f32) -> f32 {
    let mut sums = [[seed; LANES]; CHAINS];
    let (a, b) = (std::hint::black_box(0.999_f32), std::hint::black_box(1e-3_f32));
    for _ in 0..REPEATS {
        for chain in &mut sums {
            for lane in chain {
                *lane = lane.mul_add(a, b);
            }
        }
    }
    sums.iter().flatten().sum()
}
