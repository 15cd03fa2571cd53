//! What floating-point results depend on beside the plan: instruction set and library versions.

use std::sync::{Mutex, PoisonError};

use attune_models::pass::{self, Activations};
use attune_tensor::kernels::Kernels;

/// The version of this code as lineage records it.
pub const CODE_VERSION: &str = concat!("attune ", env!("CARGO_PKG_VERSION"));

/// The kernel profile of this process on the processor.
pub fn profile() -> String {
    profile_of(attune_tensor::kernels::cpu())
}

/// The kernel profile of passes by these kernels: runs with the same plan, code and profile give the same bits. Graphs of
/// components run on the processor, whatever the rest does.
pub(crate) fn profile_of(kernels: &dyn Kernels) -> String {
    format!("{} {} gemm-0.19 {}", kernels.profile(), std::env::consts::ARCH, instructions())
}

/// Floating-point operations a second of the fastest product of these kernels in this process; measured once.
pub(crate) fn gemm_peak(kernels: &'static dyn Kernels, activations: Activations) -> f64 {
    static KNOWN: Mutex<Vec<(&str, Activations, f64)>> = Mutex::new(Vec::new());
    let key = kernels.profile();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, _, peak)) = known.iter().find(|(profile, of, _)| *profile == key && *of == activations) {
        return *peak;
    }
    let peak = pass::gemm_peak(kernels, activations);
    known.push((key, activations, peak));
    peak
}

/// What the matrix library takes, which graphs of components run on.
#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    // The order is that in which the library prefers them.
    if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512f"
    } else if std::arch::is_x86_feature_detected!("fma") {
        "fma"
    } else {
        "baseline"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> &'static str {
    "baseline"
}
