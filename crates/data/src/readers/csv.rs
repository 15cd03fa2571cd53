//! CSV with a header line, as RFC 4180 has it: quoted fields may hold commas, quotes (doubled) and line breaks.

use std::io::Read;
use std::sync::Arc;

use ::csv::{ByteRecord, ErrorKind};
use serde_json::{Map, Value};

use super::{Item, MAX_LINE_BYTES, Row};
use crate::error::Error;
use crate::origin::{Origin, Reason, RowFault, Unit};

pub(super) struct Reader {
    name: Arc<str>,
    columns: Vec<String>,
    input: ::csv::Reader<Recent>,
    done: bool,
}

/// Keeps the bytes read since the current record began. Fails once they are beyond the limit: an unclosed quote would
/// otherwise pull the whole file into one field.
struct Recent {
    input: Box<dyn Read + Send>,
    bytes: Vec<u8>,
    /// Offset of the first of them in the file.
    at: u64,
}

impl Recent {
    /// A record begins at the offset `byte` of the file.
    fn begin(&mut self, byte: u64) {
        let passed = usize::try_from(byte.saturating_sub(self.at)).unwrap_or(usize::MAX).min(self.bytes.len());
        self.bytes.drain(..passed);
        self.at = byte;
    }

    /// Line ends before the record's first character. The parser takes them for part of the record that follows: the line
    /// feed of the CRLF before it, and empty lines.
    fn leading_lines(&self) -> u64 {
        let leading = self.bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
        leading.filter(|byte| **byte == b'\n').count() as u64
    }
}

impl Read for Recent {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.bytes.extend_from_slice(&buffer[..count]);
        if self.bytes.len() > MAX_LINE_BYTES + buffer.len() {
            let message = format!("a record is longer than {MAX_LINE_BYTES} bytes; is a quote left open?");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
        }
        Ok(count)
    }
}

impl Reader {
    pub(super) fn open(name: &Arc<str>, input: Box<dyn Read + Send>) -> Result<Self, Error> {
        let input = Recent { input, bytes: Vec::new(), at: 0 };
        let mut input = ::csv::ReaderBuilder::new().flexible(true).from_reader(input);
        let file_error = |message: String| Error::File { file: name.to_string(), message };
        let header = input.byte_headers().map_err(|e| file_error(format!("the header cannot be read: {e}")))?.clone();
        let mut columns = Vec::with_capacity(header.len());
        for (index, column) in header.iter().enumerate() {
            if index == 0 && (column.starts_with(b"\xff\xfe") || column.starts_with(b"\xfe\xff")) {
                return Err(file_error("is UTF-16; save it as UTF-8".to_owned()));
            }
            let column = std::str::from_utf8(column)
                .map_err(|_| file_error(format!("the name of column {} is not UTF-8", index + 1)))?
                .trim();
            if columns.iter().any(|other| other == column) {
                return Err(file_error(format!("the header has the column {column:?} twice")));
            }
            columns.push(column.to_owned());
        }
        Ok(Self { name: Arc::clone(name), columns, input, done: false })
    }

    fn next_item(&mut self) -> Result<Option<Item>, Error> {
        let (byte, line) = (self.input.position().byte(), self.input.position().line());
        self.input.get_mut().begin(byte);
        let mut record = ByteRecord::new();
        let more = self.input.read_byte_record(&mut record);
        let number = line + self.input.get_ref().leading_lines();
        let more = more.map_err(|e| {
            let file_error = |message: String| Error::File { file: format!("{}:{number}", self.name), message };
            match e.into_kind() {
                ErrorKind::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => file_error(e.to_string()),
                ErrorKind::Io(source) => Error::Read { file: self.name.to_string(), source },
                other => file_error(format!("{other:?}")),
            }
        })?;
        if !more {
            return Ok(None);
        }
        let origin = Origin { file: Arc::clone(&self.name), number, unit: Unit::Line };
        Ok(Some(match self.fields(&record) {
            Ok(fields) => Ok(Row { origin, fields }),
            Err(fault) => Err(fault.at(origin)),
        }))
    }

    fn fields(&self, record: &ByteRecord) -> Result<Map<String, Value>, RowFault> {
        if record.len() != self.columns.len() {
            let message = format!("the record has {} columns; the header has {}", record.len(), self.columns.len());
            return Err(RowFault::new(Reason::ColumnCount, message));
        }
        let mut fields = Map::with_capacity(self.columns.len());
        for (column, value) in self.columns.iter().zip(record) {
            let value = std::str::from_utf8(value).map_err(|_| {
                RowFault::new(Reason::InvalidUtf8, format!("`{column}` is not UTF-8; save the file as UTF-8"))
            })?;
            fields.insert(column.clone(), Value::String(value.to_owned()));
        }
        Ok(fields)
    }
}

impl Iterator for Reader {
    type Item = Result<Item, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.next_item().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn read(bytes: &[u8]) -> Vec<String> {
        match Reader::open(&"a.csv".into(), Box::new(Cursor::new(bytes.to_vec()))) {
            Err(error) => vec![error.to_string()],
            Ok(reader) => reader
                .map(|item| match item {
                    Ok(Ok(row)) => format!("{}: {}", row.origin.number, Value::Object(row.fields)),
                    Ok(Err(bad)) => bad.to_string(),
                    Err(error) => error.to_string(),
                })
                .collect(),
        }
    }

    #[test]
    fn quoted_fields_hold_commas_quotes_and_line_breaks() {
        assert_eq!(
            read(b"\xef\xbb\xbfprompt,completion\r\n\"a, \"\"b\"\"\",\"c\r\nd\"\r\n\r\ne,f"),
            [
                "2: {\"prompt\":\"a, \\\"b\\\"\",\"completion\":\"c\\r\\nd\"}",
                "5: {\"prompt\":\"e\",\"completion\":\"f\"}"
            ]
        );
    }

    #[test]
    fn each_bad_record_is_named_and_reading_goes_on() {
        assert_eq!(
            read(b"text,label\na,1\nb\nc,2,3\n\xff,4\nd,5\n"),
            [
                "2: {\"text\":\"a\",\"label\":\"1\"}",
                "a.csv:3: the record has 1 columns; the header has 2",
                "a.csv:4: the record has 3 columns; the header has 2",
                "a.csv:5: `text` is not UTF-8; save the file as UTF-8",
                "6: {\"text\":\"d\",\"label\":\"5\"}",
            ]
        );
        assert_eq!(read(b"text,text\na,b\n"), ["a.csv: the header has the column \"text\" twice"]);
        assert_eq!(read(b"\xff\xfet\0"), ["a.csv: is UTF-16; save it as UTF-8"]);
    }

    #[test]
    fn an_open_quote_does_not_swallow_the_file() {
        let mut bytes = b"text\n\"open".to_vec();
        bytes.resize(MAX_LINE_BYTES + (1 << 17), b'x');
        let found = read(&bytes);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("is a quote left open?"), "{}", found[0]);
    }
}
