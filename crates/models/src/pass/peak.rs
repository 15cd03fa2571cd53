//! The fastest matrix product of this machine: what utilisation is measured against.

use attune_tensor::kernels::{Gemm, Kernels as _, Operand, cpu};
use attune_tensor::view::ViewMut;
use half::bf16;

use crate::pass::arena::Activations;
use crate::pass::times::Stopwatch;

/// Rows, columns and depth of the product: large enough to keep every thread busy, small enough for the caches.
const SIZES: [usize; 3] = [512, 768, 768];
/// Products that are timed; the fastest counts.
const ROUNDS: usize = 8;

/// Floating-point operations a second of the kernels' product of matrices in the type of the activations, with all threads
/// of the pool: the best of a few. Takes some hundredths of a second.
pub fn gemm_peak(activations: Activations) -> f64 {
    match activations {
        Activations::F32 => measure(1.0f32),
        Activations::Bf16 => measure(bf16::ONE),
    }
}

fn measure<T: Copy>(one: T) -> f64
where
    for<'a> attune_tensor::view::MatRef<'a>: From<attune_tensor::view::View<'a, T>>,
{
    use attune_tensor::view::View;
    let [m, n, k] = SIZES;
    let (a, b, mut c) = (vec![one; m * k], vec![one; n * k], vec![0.0f32; m * n]);
    let seconds = (0..ROUNDS).map(|_| {
        let of = Gemm::new(Operand::plain(View::new(&a, m, k)), Operand::transposed(View::new(&b, n, k)));
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
            assert!(gemm_peak(activations) > 1e7);
        }
    }
}
