//! JSON Lines: one object per line; blank lines are passed over, a byte-order mark and CRLF are accepted.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use serde_json::Value;

use super::{Item, MAX_LINE_BYTES, Row};
use crate::error::Error;
use crate::origin::{Origin, Reason, RowFault, Unit};

pub(super) struct Reader {
    name: Arc<str>,
    input: BufReader<Box<dyn Read + Send>>,
    line: u64,
    line_bytes_max: usize,
    done: bool,
}

/// What reading one line found.
enum Line {
    Text(Vec<u8>),
    TooLong,
    End,
}

impl Reader {
    pub(super) fn new(name: &Arc<str>, input: Box<dyn Read + Send>) -> Self {
        let input = BufReader::with_capacity(1 << 16, input);
        Self { name: Arc::clone(name), input, line: 0, line_bytes_max: MAX_LINE_BYTES, done: false }
    }

    /// The next line without its end. A line beyond the limit is passed over without being held.
    fn read_line(&mut self) -> std::io::Result<Line> {
        let mut line = Vec::new();
        let mut too_long = false;
        loop {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                return Ok(match (too_long, line.is_empty()) {
                    (true, _) => Line::TooLong,
                    (false, true) => Line::End,
                    (false, false) => Line::Text(line),
                });
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(chunk.len());
            if line.len() + taken > self.line_bytes_max {
                too_long = true;
                line = Vec::new();
            }
            if !too_long {
                line.extend_from_slice(&chunk[..taken]);
            }
            let used = taken + usize::from(end.is_some());
            self.input.consume(used);
            if end.is_some() {
                return Ok(if too_long { Line::TooLong } else { Line::Text(line) });
            }
        }
    }

    fn origin(&self) -> Origin {
        Origin { file: Arc::clone(&self.name), number: self.line, unit: Unit::Line }
    }

    fn next_item(&mut self) -> Result<Option<Item>, Error> {
        loop {
            let line = self.read_line().map_err(|source| Error::Read { file: self.name.to_string(), source })?;
            self.line += 1;
            let mut line = match line {
                Line::End => return Ok(None),
                Line::TooLong => {
                    let message = format!("the line is longer than {} bytes; split the row", self.line_bytes_max);
                    return Ok(Some(Err(RowFault::new(Reason::LineTooLong, message).at(self.origin()))));
                }
                Line::Text(line) => line,
            };
            if self.line == 1 {
                if line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff") {
                    let message = "is UTF-16; save it as UTF-8".to_owned();
                    return Err(Error::File { file: self.name.to_string(), message });
                }
                if line.starts_with(b"\xef\xbb\xbf") {
                    line.drain(..3);
                }
            }
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let item = parse(&line).map_err(|fault| fault.at(self.origin()));
            return Ok(Some(item.map(|fields| Row { origin: self.origin(), fields })));
        }
    }
}

fn parse(line: &[u8]) -> Result<serde_json::Map<String, Value>, RowFault> {
    let text = std::str::from_utf8(line).map_err(|e| {
        let byte = e.valid_up_to() + 1;
        RowFault::new(Reason::InvalidUtf8, format!("byte {byte} of the line is not UTF-8; save the file as UTF-8"))
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => {
            let message = format!("the line is {}; expected an object such as {{\"text\": …}}", kind(&other));
            Err(RowFault::new(Reason::NotAnObject, message))
        }
        Err(e) => {
            let words = e.to_string();
            let words = words.rsplit_once(" at line").map_or(words.as_str(), |(words, _)| words);
            let message = format!("not valid JSON at column {}: {words}", e.column());
            Err(RowFault::new(Reason::InvalidJson, message))
        }
    }
}

/// The kind of a JSON value with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
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

    /// Each row as `line: fields`, each bad row and error as its message.
    fn read_with(bytes: &[u8], line_bytes_max: usize) -> Vec<String> {
        let mut reader = Reader::new(&"a.jsonl".into(), Box::new(Cursor::new(bytes.to_vec())));
        reader.line_bytes_max = line_bytes_max;
        reader
            .map(|item| match item {
                Ok(Ok(row)) => format!("{}: {}", row.origin.number, Value::Object(row.fields)),
                Ok(Err(bad)) => bad.to_string(),
                Err(error) => error.to_string(),
            })
            .collect()
    }

    fn read(bytes: &[u8]) -> Vec<String> {
        read_with(bytes, 1 << 10)
    }

    #[test]
    fn byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_accepted() {
        assert_eq!(
            read(b"\xef\xbb\xbf{\"a\":1}\r\n\r\n  \n{\"b\":\"\xc3\xa4\"}"),
            ["1: {\"a\":1}", "4: {\"b\":\"ä\"}"]
        );
        assert!(read(b"").is_empty());
        assert!(read(b"\n\n").is_empty());
    }

    #[test]
    fn each_bad_line_is_named_and_reading_goes_on() {
        insta::assert_debug_snapshot!(
            read(b"{\"a\": 1}\n{\"a\": }\n[1]\n\xff\n{\"a\": 1} x\n{\"a\"\n{\"b\":2}\n"),
            @r#"
        [
            "1: {\"a\":1}",
            "a.jsonl:2: not valid JSON at column 7: expected value",
            "a.jsonl:3: the line is a list; expected an object such as {\"text\": …}",
            "a.jsonl:4: byte 1 of the line is not UTF-8; save the file as UTF-8",
            "a.jsonl:5: not valid JSON at column 10: trailing characters",
            "a.jsonl:6: not valid JSON at column 4: EOF while parsing an object",
            "7: {\"b\":2}",
        ]
        "#
        );
    }

    #[test]
    fn a_line_beyond_the_limit_is_passed_over() {
        let mut bytes = format!("{{\"a\":\"{}\"}}\n", "x".repeat(100_000)).into_bytes();
        bytes.extend_from_slice(b"{\"b\":2}\n");
        let found = read_with(&bytes, 90_000);
        assert_eq!(found, ["a.jsonl:1: the line is longer than 90000 bytes; split the row", "2: {\"b\":2}"]);
        let endless = vec![b'x'; 200_000];
        assert_eq!(read_with(&endless, 90_000), ["a.jsonl:1: the line is longer than 90000 bytes; split the row"]);
    }

    #[test]
    fn utf_16_is_refused_as_a_whole() {
        assert_eq!(read(b"\xff\xfe{\0}\0\n\0"), ["a.jsonl: is UTF-16; save it as UTF-8"]);
    }
}
