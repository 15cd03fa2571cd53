//! The process's peak memory, and what the machine has left.

/// The largest resident memory so far, in bytes; 0 where the system does not say.
pub(crate) fn peak_bytes() -> u64 {
    field("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Bytes that the machine can give to this process without swapping; `None` where the system does not say.
pub(crate) fn available_bytes() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// The bytes that a line of one of Linux's tables names in kilobytes.
fn field(table: &str, name: &str) -> Option<u64> {
    let table = std::fs::read_to_string(table).ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_used_some_memory() {
        assert!(super::peak_bytes() > 1 << 20);
        assert!(super::available_bytes().unwrap() > 1 << 20);
    }
}
