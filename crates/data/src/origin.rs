//! Where a row came from, and why it could not be used.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The place of a row in its file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The file as the user wrote it (path or URL).
    pub file: Arc<str>,
    /// Line or row number; the first is 1.
    pub number: u64,
    /// What `number` counts.
    pub unit: Unit,
}

/// What an origin's number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Lines of a text file (JSON Lines, CSV).
    Line,
    /// Rows of a columnar file (Parquet).
    Row,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit {
            Unit::Line => write!(f, "{}:{}", self.file, self.number),
            Unit::Row => write!(f, "{} row {}", self.file, self.number),
        }
    }
}

/// Why a row could not be used; a closed list, so that skipped rows can be counted by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The line is not UTF-8.
    InvalidUtf8,
    /// The line is longer than the reader accepts.
    LineTooLong,
    /// The line is not JSON.
    InvalidJson,
    /// The line is JSON, but not an object.
    NotAnObject,
    /// The record has another number of columns than the header.
    ColumnCount,
    /// A column that the form needs is not there.
    MissingField,
    /// A value has another type than the form needs.
    WrongType,
    /// A text that must say something is empty.
    EmptyText,
    /// A message's role is not one of a conversation's.
    UnknownRole,
    /// A class is not one of the head's.
    UnknownLabel,
    /// The chat template refused the conversation or does not reproduce the assistant's text.
    Template,
    /// The tokeniser refused the text.
    Tokenizer,
    /// Nothing in the row would be trained on.
    NoTrainedToken,
    /// The row has more tokens than `max_length`.
    TooLong,
}

impl Reason {
    /// The name under which the reason is counted.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidUtf8 => "invalid_utf8",
            Self::LineTooLong => "line_too_long",
            Self::InvalidJson => "invalid_json",
            Self::NotAnObject => "not_an_object",
            Self::ColumnCount => "column_count",
            Self::MissingField => "missing_field",
            Self::WrongType => "wrong_type",
            Self::EmptyText => "empty_text",
            Self::UnknownRole => "unknown_role",
            Self::UnknownLabel => "unknown_label",
            Self::Template => "template",
            Self::Tokenizer => "tokenizer",
            Self::NoTrainedToken => "no_trained_token",
            Self::TooLong => "too_long",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a row, before its place is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowFault {
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

impl RowFault {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    pub(crate) fn at(self, origin: Origin) -> BadRow {
        BadRow { origin, reason: self.reason, message: self.message }
    }
}

/// A row that could not be used: where it is, what is wrong, what would be right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{origin}: {message}")]
pub struct BadRow {
    /// The row's place.
    pub origin: Origin,
    /// The class of the fault.
    pub reason: Reason,
    /// What is wrong and what would be right; lower case, no full stop.
    pub message: String,
}

/// The bad rows of a file: the first ones in full, all of them counted by reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRows {
    /// The first bad rows, in file order; at most [`BadRows::KEPT`].
    pub first: Vec<BadRow>,
    /// How many rows each reason cost.
    pub by_reason: BTreeMap<Reason, u64>,
    /// Whether reading stopped before the end of the file, so that there may be more.
    pub stopped_early: bool,
}

impl BadRows {
    /// How many bad rows are kept in full.
    pub const KEPT: usize = 20;

    /// Notes one bad row.
    pub fn push(&mut self, bad: BadRow) {
        *self.by_reason.entry(bad.reason).or_default() += 1;
        if self.first.len() < Self::KEPT {
            self.first.push(bad);
        }
    }

    /// Number of bad rows seen.
    pub fn count(&self) -> u64 {
        self.by_reason.values().sum()
    }

    /// Whether no bad row was seen.
    pub fn is_empty(&self) -> bool {
        self.by_reason.is_empty()
    }
}

impl fmt::Display for BadRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.first.first() else { return f.write_str("no bad row") };
        write!(f, "{first}")?;
        let more = self.count() - 1;
        if more == 0 && self.stopped_early {
            f.write_str(" (and perhaps more; `on_bad_row: skip` leaves bad rows out)")?;
        } else if more > 0 {
            let least = if self.stopped_early { "at least " } else { "" };
            let rows = if more == 1 { "row" } else { "rows" };
            write!(f, " (and {least}{more} more bad {rows}; `on_bad_row: skip` leaves them out)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(number: u64) -> BadRow {
        let origin = Origin { file: "a.jsonl".into(), number, unit: Unit::Line };
        RowFault::new(Reason::EmptyText, "`text` is empty").at(origin)
    }

    #[test]
    fn the_first_bad_row_is_shown_and_the_others_are_counted() {
        let mut rows = BadRows::default();
        rows.push(bad(3));
        assert_eq!(rows.to_string(), "a.jsonl:3: `text` is empty");
        let early = BadRows { stopped_early: true, ..rows.clone() };
        assert_eq!(
            early.to_string(),
            "a.jsonl:3: `text` is empty (and perhaps more; `on_bad_row: skip` leaves bad rows out)"
        );
        for number in 4..40 {
            rows.push(bad(number));
        }
        assert_eq!(rows.first.len(), BadRows::KEPT);
        assert_eq!(
            rows.to_string(),
            "a.jsonl:3: `text` is empty (and 36 more bad rows; `on_bad_row: skip` leaves them out)"
        );
    }

    #[test]
    fn reasons_are_counted_under_the_name_they_serialise_to() {
        for reason in [Reason::InvalidUtf8, Reason::NotAnObject, Reason::NoTrainedToken, Reason::TooLong] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }
}
