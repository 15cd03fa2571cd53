//! The fastest matrix product of this machine: what utilisation is measured against.

use attune_tensor::kernels::{Gemm, Kernels as _, Operand, cpu};
use attune_tensor::view::{MatRef, View, ViewMut};
use half::bf16;

use crate::pass::arena::Activations;
use crate::pass::times::Stopwatch;

/// Rows, columns and depth of the product: large enough to keep every thread busy, small enough for the caches.
const SIZES: [usize; 3] = [256, 512, 512];
/// Products that are timed; the fastest counts.
const ROUNDS: usize = 8;

/// Floating-point operations a second of the kernels' product of matrices in the type of the activations, with all threads
/// of the pool: the best of a few. Takes about a hundredth of a second.
pub fn gemm_peak(activations: Activations) -> f64 {
    let [m, n, k] = SIZES;
    match activations {
        Activations::F32 => {
            let (a, b) = (vec![1.0f32; m * k], vec![1.0f32; n * k]);
            measure(View::new(&a, m, k).into(), View::new(&b, n, k).into())
        }
        Activations::Bf16 => {
            let (a, b) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
            measure(View::new(&a, m, k).into(), View::new(&b, n, k).into())
        }
    }
}

fn measure(a_mk: MatRef<'_>, b_nk: MatRef<'_>) -> f64 {
    let (m, n, k) = (a_mk.rows(), b_nk.rows(), a_mk.cols());
    let mut c = vec![0.0f32; m * n];
    let of = Gemm::new(Operand::plain(a_mk), Operand::transposed(b_nk));
    let seconds = (0..ROUNDS).map(|_| {
        let watch = Stopwatch::start();
        cpu().gemm(ViewMut::new(&mut c, m, n), &of);
        watch.elapsed().as_secs_f64()
    });
    2.0 * (m * n * k) as f64 / seconds.fold(f64::INFINITY, f64::min).max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_multiplies() {
        for activations in [Activations::F32, Activations::Bf16] {
            let peak = gemm_peak(activations);
            assert!(peak.is_finite() && peak > 0.0);
        }
    }
}
