//! What came of the jobs of a grid, a line of JSON each, appended as they end.

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::path::Path;

use attune_spec::id::Digest;
use serde::{Deserialize, Serialize};

use crate::print::Failure;

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// The grid.
    pub(crate) experiment: String,
    /// The value on each axis.
    pub(crate) place: BTreeMap<String, String>,
    /// A digest of everything that the job says.
    pub(crate) spec: Digest,
    /// The job.
    pub(crate) job: String,
    /// What it said when it did not succeed; none if it did.
    pub(crate) error: Option<String>,
    /// First and last loss of each validation set.
    pub(crate) validation: BTreeMap<String, [f64; 2]>,
    /// All losses of each with their steps, where it was measured on the way as well.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) curves: BTreeMap<String, Vec<(u64, f64)>>,
    /// Parameters that trained.
    pub(crate) trained_parameters: u64,
    /// Optimiser steps.
    pub(crate) steps: u64,
    /// Tokens seen.
    pub(crate) tokens: u64,
    /// Training speed.
    pub(crate) tokens_per_second: f64,
    /// The most memory that its process had.
    pub(crate) peak_memory_bytes: u64,
    /// From the start of its last attempt to its end; of a recipe, which has stages, from its making.
    pub(crate) seconds: f64,
    /// The code that ran it.
    pub(crate) code_version: String,
    /// The kernels that ran it.
    pub(crate) kernel_profile: String,
}

/// Reads all records of a file; none if there is no such file.
pub(crate) fn read(file: &Path) -> Result<Vec<Record>, Failure> {
    let opened = match std::fs::File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::file(file, &error)),
    };
    let mut records = Vec::new();
    for (number, line) in std::io::BufReader::new(opened).lines().enumerate() {
        let line = line.map_err(|error| Failure::file(file, &error))?;
        let record = serde_json::from_str(&line);
        let wrong = |error| Failure::usage(format!("{}:{}: is no record: {error}", file.display(), number + 1));
        records.push(record.map_err(wrong)?);
    }
    Ok(records)
}

/// Appends a record; it is on disk when this returns.
pub(crate) fn append(file: &Path, record: &Record) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        let mut opened = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
        let mut line = serde_json::to_string(record).map_err(std::io::Error::other)?;
        line.push('\n');
        opened.write_all(line.as_bytes())?;
        opened.sync_data()
    };
    write().map_err(|error| Failure::file(file, &error))
}

#[cfg(test)]
pub(crate) fn of(place: &[(&str, &str)], parameters: u64, losses: &[(&str, f64)]) -> Record {
    Record {
        experiment: "test".to_owned(),
        place: place.iter().map(|(axis, value)| ((*axis).to_owned(), (*value).to_owned())).collect(),
        spec: Digest::from_bytes([0; 32]),
        job: "j-1".to_owned(),
        error: None,
        validation: losses.iter().map(|(set, loss)| ((*set).to_owned(), [3.0, *loss])).collect(),
        curves: BTreeMap::new(),
        trained_parameters: parameters,
        steps: 10,
        tokens: 1000,
        tokens_per_second: 500.0,
        peak_memory_bytes: 64 << 20,
        seconds: 2.0,
        code_version: "0".to_owned(),
        kernel_profile: "cpu".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_appended_and_a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("results.jsonl");
        assert_eq!(read(&file).unwrap(), []);
        let records = [of(&[("method", "lora")], 10, &[("a", 1.5)]), of(&[("method", "full")], 900, &[])];
        records.iter().for_each(|record| append(&file, record).unwrap());
        assert_eq!(read(&file).unwrap(), records);
        std::fs::write(&file, "{}\n").unwrap();
        let message = read(&file).unwrap_err().message;
        assert!(message.contains("results.jsonl:1: is no record: missing field"), "{message}");
    }
}
