//! The fastest matrix product of this machine: what utilisation is measured against.

use attune_tensor::kernels::{Gemm, Kernels, Operand};

use crate::pass::arena::{Activations, Arena};
use crate::pass::times::Stopwatch;

/// Rows, columns and depth of the product: large enough to keep every thread busy, small enough for the caches.
const SIZES: [usize; 3] = [256, 512, 512];
/// The same for a device with memory of its own, which has thousands of units to keep busy.
const SIZES_OF_DEVICE: [usize; 3] = [4096; 3];
/// Products that are timed; the fastest counts.
const ROUNDS: usize = 8;

/// Floating-point operations a second of a product of matrices by these kernels in the type of the activations, with all
/// threads of the pool: the best of a few. Takes about a hundredth of a second.
pub fn gemm_peak(kernels: &'static dyn Kernels, activations: Activations) -> f64 {
    let [m, n, k] = if kernels.free_bytes().is_some() { SIZES_OF_DEVICE } else { SIZES };
    let arena = Arena::new(kernels);
    let ones = |rows: usize, cols: usize| {
        let mut wide = arena.rows(rows, cols);
        kernels.fill(wide.view_mut(), 1.0);
        let mut mat = arena.mat(rows, cols, activations);
        kernels.convert(wide.view().into(), mat.view_mut());
        mat
    };
    let (a_mk, b_nk, mut c_mn) = (ones(m, k), ones(n, k), arena.rows(m, n));
    let of = Gemm::new(Operand::plain(a_mk.view()), Operand::transposed(b_nk.view()));
    kernels.wait();
    let seconds = (0..ROUNDS).map(|_| {
        let watch = Stopwatch::start();
        kernels.gemm(c_mn.view_mut(), &of);
        kernels.wait();
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
            let peak = gemm_peak(attune_tensor::kernels::cpu(), activations);
            assert!(peak.is_finite() && peak > 0.0);
        }
    }
}
