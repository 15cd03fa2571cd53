//! `attune doctor`: what this build is and what it finds on this machine.

use serde_json::{Map, Value};

use crate::print::{Column, Failure, Out, Table};

pub(super) fn run(out: &mut Out) -> Result<(), Failure> {
    let facts = facts();
    if out.is_json() {
        return out.document(&Map::from_iter(facts.into_iter().map(|(name, value)| (name.to_owned(), value))));
    }
    let mut table = Table::new([Column::left("WHAT"), Column::left("FOUND")]);
    for (name, value) in facts {
        let text = match value {
            Value::String(text) => text,
            Value::Null => "unknown".to_owned(),
            Value::Number(bytes) if name.ends_with("_bytes") => gibibytes(bytes.as_u64().unwrap_or_default()),
            other => other.to_string(),
        };
        table.row([name.trim_end_matches("_bytes").replace('_', " "), text]);
    }
    out.table(&table)
}

fn facts() -> Vec<(&'static str, Value)> {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    let cores = std::thread::available_parallelism().map(usize::from).ok();
    vec![
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH).into()),
        ("processor", field(&processor, "model name").into()),
        ("cores", cores.into()),
        ("kernel_profile", attune_trainer::kernel::profile().into()),
        ("memory_total_bytes", kilobytes(&memory, "MemTotal").into()),
        ("memory_available_bytes", kilobytes(&memory, "MemAvailable").into()),
        ("memory_limit_bytes", limit.trim().parse::<u64>().ok().into()),
    ]
}

/// The value of a line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    line.map(|value| value.trim().to_owned())
}

/// A line of `/proc/meminfo` in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let number = field(text, name)?.split_whitespace().next()?.parse::<u64>().ok()?;
    number.checked_mul(1024)
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_files_are_read_by_name() {
        let memory = "MemTotal:       2097152 kB\nMemAvailable:   1048576 kB\n";
        assert_eq!(kilobytes(memory, "MemAvailable"), Some(1 << 30));
        assert_eq!(kilobytes(memory, "Swap"), None);
        assert_eq!(field("model name\t: A B\n", "model name").as_deref(), Some("A B"));
        assert_eq!(gibibytes(3 << 29), "1.5 GiB");
    }
}
