//! Parquet through the record reader: columns may be texts, numbers, booleans, lists and structs (so that `messages` is a
//! list of structs). Codecs: none, Snappy, Zstandard, gzip.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ::parquet::column::page::Page;
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::RowIter;
use ::parquet::record::{Field, Row as Record};
use serde_json::{Map, Value};

use super::{Item, Row};
use crate::error::Error;
use crate::origin::{Origin, Unit};
use crate::source::Input;

pub(super) struct Reader {
    name: Arc<str>,
    rows: RowIter<'static>,
    number: u64,
    rows_total: u64,
    done: bool,
}

impl Reader {
    pub(super) fn open(name: &Arc<str>, input: Input) -> Result<Self, Error> {
        let (rows, rows_total) = guarded(name, || {
            let reader: Box<dyn FileReader> = match input {
                Input::File(file) => Box::new(SerializedFileReader::new(file)?),
                Input::Bytes(bytes) => Box::new(SerializedFileReader::new(bytes)?),
            };
            dictionaries(&*reader)?;
            let rows_total = reader.metadata().file_metadata().num_rows();
            Ok((RowIter::from_file_into(reader), rows_total))
        })?;
        let rows_total = u64::try_from(rows_total).map_err(|_| damaged(name, "it says a negative number of rows"))?;
        Ok(Self { name: Arc::clone(name), rows, number: 0, rows_total, done: false })
    }
}

/// Looks at the size of every dictionary before it is read: the library makes room for as many values as a page says that it has, which
/// a few bytes can say of billions. A value takes a byte at least.
fn dictionaries(reader: &dyn FileReader) -> ::parquet::errors::Result<()> {
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        for column in 0..group.num_columns() {
            let mut pages = group.get_column_page_reader(column)?;
            while let Some(page) = pages.peek_next_page()? {
                if !page.is_dict {
                    pages.skip_next_page()?;
                    continue;
                }
                if let Some(Page::DictionaryPage { buf, num_values, .. }) = pages.get_next_page()?
                    && num_values as usize > buf.len()
                {
                    let name = group.metadata().column(column).column_path().string();
                    let (bytes, said) = (buf.len(), num_values);
                    return Err(ParquetError::General(format!(
                        "column {name:?} says {said} values of a dictionary of {bytes} bytes"
                    )));
                }
            }
        }
    }
    Ok(())
}

fn damaged(name: &str, words: &str) -> Error {
    Error::File { file: name.to_owned(), message: format!("is not a sound Parquet file: {words}") }
}

/// Runs a call into the Parquet library. The library panics on some damaged files; that, too, is an error of the file.
fn guarded<T>(name: &str, call: impl FnOnce() -> ::parquet::errors::Result<T>) -> Result<T, Error> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(damaged(name, &error.to_string())),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it cannot be decoded");
            Err(damaged(name, words))
        }
    }
}

impl Iterator for Reader {
    type Item = Result<Item, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let place = format!("{} row {}", self.name, self.number + 1);
        let next = guarded(&place, || self.rows.next().transpose());
        match next {
            Ok(Some(record)) => {
                self.number += 1;
                let origin = Origin { file: Arc::clone(&self.name), number: self.number, unit: Unit::Row };
                Some(Ok(Ok(Row { origin, fields: object(&record) })))
            }
            Ok(None) => {
                self.done = true;
                let words = format!("it says {} rows and holds {}", self.rows_total, self.number);
                (self.number != self.rows_total).then(|| Err(damaged(&self.name, &words)))
            }
            Err(error) => {
                self.done = true;
                Some(Err(error))
            }
        }
    }
}

fn object(record: &Record) -> Map<String, Value> {
    record.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => (*value).into(),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => value.to_f32().into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(value) => value.as_str().into(),
        // Writers that leave out the UTF-8 annotation still mean text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => Value::Array(bytes.data().iter().map(|byte| Value::from(*byte)).collect()),
        },
        Field::Decimal(_) => field.to_string().into(),
        Field::Group(record) => Value::Object(object(record)),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => Value::Object(
            map.entries()
                .iter()
                .map(|(key, entry)| {
                    let key = value(key);
                    (key.as_str().map_or_else(|| key.to_string(), str::to_owned), value(entry))
                })
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use ::parquet::data_type::{ByteArray, ByteArrayType};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;
    use bytes::Bytes;

    use super::*;

    /// A file with one text column `text` in two row groups.
    fn texts(compression: Compression, groups: &[&[&str]]) -> Vec<u8> {
        let schema = Arc::new(parse_message_type("message rows { required binary text (UTF8); }").unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        for group in groups {
            let mut row_group = writer.next_row_group().unwrap();
            let mut column = row_group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = group.iter().map(|text| ByteArray::from(*text)).collect();
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            row_group.close().unwrap();
        }
        writer.close().unwrap();
        bytes
    }

    fn read(bytes: Vec<u8>) -> Vec<String> {
        match Reader::open(&"a.parquet".into(), Input::Bytes(Bytes::from(bytes))) {
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
    fn all_codecs_and_row_groups_are_read_in_order() {
        let gzip = Compression::GZIP(GzipLevel::default());
        let zstd = Compression::ZSTD(ZstdLevel::default());
        for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY, gzip, zstd] {
            let found = read(texts(codec, &[&["a", "b"], &["ä"]]));
            assert_eq!(found, ["1: {\"text\":\"a\"}", "2: {\"text\":\"b\"}", "3: {\"text\":\"ä\"}"], "{codec:?}");
        }
        assert!(read(texts(Compression::SNAPPY, &[])).is_empty());
    }

    #[test]
    fn a_list_of_structs_is_a_conversation() {
        let schema = "message rows { optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
        let mut row_group = writer.next_row_group().unwrap();
        for values in [["user", "assistant"], ["hi", "hello"]] {
            let mut column = row_group.next_column().unwrap().unwrap();
            let values = values.map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&values, Some(&[4, 4]), Some(&[0, 1])).unwrap();
            column.close().unwrap();
        }
        row_group.close().unwrap();
        writer.close().unwrap();
        insta::assert_snapshot!(read(bytes)[0], @r#"1: {"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#);
    }

    /// A fuzzer found it: 250 bytes, as hexadecimal digits, for which the library would make room for nine gigabytes.
    const BOUNDLESS: [&str; 5] = [
        "504152311504151e15224c15f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f10615001200000f38",
        "0100000061010000006201000000631506150c150c5c1506150015061510158a041500121c0000000601020324001504192c",
        "35001806736368656d61150200150c250218047465787425004c1c0000001606191c191c26001c150c193500061019180474",
        "657874150216061676167a26462608292c15041500150200150015101502003c160619061926000600000016761606260816",
        "7a002820706172717565742d6370702d6172726f772076657273696f6e2032362e302e31191c1c0000009200000050415231",
    ];

    #[test]
    fn a_dictionary_of_more_values_than_bytes_is_refused() {
        let digits: Vec<u8> =
            BOUNDLESS.concat().bytes().map(|digit| char::from(digit).to_digit(16).unwrap() as u8).collect();
        let found = read(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect());
        assert!(found[0].contains("values of a dictionary of"), "{found:?}");
    }

    #[test]
    fn damage_anywhere_is_an_error_and_never_a_panic() {
        let sound = texts(Compression::SNAPPY, &[&["some text", "more text"], &["the last text"]]);
        assert!(read(sound[..sound.len() / 2].to_vec())[0].contains("is not a sound Parquet file"));
        assert!(read(b"PAR1".to_vec())[0].contains("is not a sound Parquet file"));
        assert!(read(b"{\"text\": 1}\n".to_vec())[0].contains("is not a sound Parquet file"));
        let mut refused = 0;
        for index in 0..sound.len() {
            let mut bytes = sound.clone();
            bytes[index] ^= 0x55;
            let found = read(bytes);
            refused += usize::from(found.iter().any(|line| line.contains("is not a sound Parquet file")));
        }
        assert!(refused > sound.len() / 4, "only {refused} of {} damaged files were refused", sound.len());
    }
}
