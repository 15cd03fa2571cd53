//! What the process holds and has used, as Linux counts it.

use crate::Failure;

fn field(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next()?.parse::<f64>().ok());
    (number.unwrap_or(0.0) / 1024.0 * 10.0).round() / 10.0
}

/// Resident memory.
pub(crate) fn resident_mib() -> f64 {
    field("VmRSS")
}

/// The most that was resident since [`forget_peak`].
pub(crate) fn peak_mib() -> f64 {
    field("VmHWM")
}

/// The peak so far becomes the present size: loading may hold a file and its copy at once.
pub(crate) fn forget_peak() -> Result<(), Failure> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}

/// Processor seconds of all threads so far, to a hundredth.
pub(crate) fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is the program's name, which may hold spaces: what follows it is counted from its closing bracket.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
