//! What floating-point results depend on beside the plan: instruction set and library versions.

/// The version of this code as lineage records it.
pub const CODE_VERSION: &str = concat!("attune ", env!("CARGO_PKG_VERSION"));

/// The kernel profile of this process. Runs with the same plan, code and profile give the same bits.
pub fn profile() -> String {
    format!("cpu {} {} gemm-0.19", std::env::consts::ARCH, instructions())
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    // The order is that in which the matrix library prefers them.
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
