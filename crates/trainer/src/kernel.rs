//! What floating-point results depend on beside the plan: instruction set and library versions.

use std::sync::OnceLock;

use attune_models::pass::{self, Activations};
use attune_tensor::kernels::Kernels;

/// The version of this code as lineage records it.
pub const CODE_VERSION: &str = concat!("attune ", env!("CARGO_PKG_VERSION"));

/// The kernel profile of this process. Runs with the same plan, code and profile give the same bits.
pub fn profile() -> String {
    let cpu: &dyn Kernels = attune_tensor::kernels::cpu();
    format!("{} {} gemm-0.19 {}", cpu.profile(), std::env::consts::ARCH, instructions())
}

/// Floating-point operations a second of the fastest product in this process; measured once.
pub(crate) fn gemm_peak(activations: Activations) -> f64 {
    static F32: OnceLock<f64> = OnceLock::new();
    static BF16: OnceLock<f64> = OnceLock::new();
    let known = match activations {
        Activations::F32 => &F32,
        Activations::Bf16 => &BF16,
    };
    *known.get_or_init(|| pass::gemm_peak(activations))
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
