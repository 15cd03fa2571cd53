//! Files to rows. A reader yields each row with its place, and each row it cannot read as a [`BadRow`]; only a file that
//! is damaged as a whole ends the reading.

mod csv;
mod jsonl;
mod parquet;

use serde_json::{Map, Value};

pub(crate) use jsonl::kind;

use crate::error::Error;
use crate::origin::{BadRow, Origin};
use crate::source::{Format, Source};

/// The longest line or record that is read, in bytes. A longer one is a bad row, and is not held in memory.
pub(crate) const MAX_LINE_BYTES: usize = 16 << 20;

/// One row: its columns in file order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) origin: Origin,
    pub(crate) fields: Map<String, Value>,
}

/// A row, or why it is none.
pub(crate) type Item = Result<Row, BadRow>;

/// The rows of a file, in order. An `Err` of the outer result is about the file and ends the iteration.
pub(crate) type Rows = Box<dyn Iterator<Item = Result<Item, Error>> + Send>;

/// Opens a source and starts to read its rows.
pub(crate) fn open(source: &Source) -> Result<Rows, Error> {
    let input = source.open()?;
    let name = source.name();
    Ok(match source.format() {
        Format::JsonLines => Box::new(jsonl::Reader::new(name, input.into_read())),
        Format::Csv => Box::new(csv::Reader::open(name, input.into_read())?),
        Format::Parquet => Box::new(parquet::Reader::open(name, input)?),
    })
}
