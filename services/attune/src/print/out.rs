//! Standard output: a table or text for people, JSON for programs.

use std::io::{BufWriter, Stdout, Write};

use serde::Serialize;

use super::{Failure, Table, plain};

/// Standard output.
pub(crate) struct Out {
    json: bool,
    stdout: BufWriter<Stdout>,
}

impl Out {
    /// Standard output for programs (`json`) or for people.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, stdout: BufWriter::new(std::io::stdout()) }
    }

    /// Whether a program reads.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Text as it stands.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        self.stdout.write_all(text.as_bytes()).map_err(|error| Failure::output(&error))
    }

    /// Text and a line break; nothing in it steers a terminal.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.text(&plain(text))?;
        self.text("\n")
    }

    /// A table.
    pub(crate) fn table(&mut self, table: &Table) -> Result<(), Failure> {
        self.text(&table.to_string())
    }

    /// The one JSON document of a command that does not stream.
    pub(crate) fn document(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value);
        self.line(&text.map_err(|error| Failure::failed(format!("the result has no JSON form: {error}")))?)
    }

    /// One JSON document of a stream, on a line of its own, visible at once.
    pub(crate) fn record(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value);
        self.line(&text.map_err(|error| Failure::failed(format!("the result has no JSON form: {error}")))?)?;
        self.flush()
    }

    /// Makes everything visible.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.stdout.flush().map_err(|error| Failure::output(&error))
    }
}
