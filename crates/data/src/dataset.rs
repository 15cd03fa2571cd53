//! A file's rows as tokens in memory.

use attune_points::View;
use attune_spec::job::{Form, OnBadRow};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::classes::Labelled;
use crate::encode::{Classed, Encoded, Encoder};
use crate::error::Error;
use crate::forms;
use crate::origin::{BadRow, BadRows, Reason, RowFault};
use crate::readers;
use crate::source::Source;

/// Rows that are tokenised together: enough to keep every thread busy, few enough to stop soon at a bad one.
const BATCH_ROWS: usize = 1024;

/// How a file is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// How rows are to be understood; recognised from the first row's columns when it is `None`.
    pub form: Option<Form>,
    /// What happens to a row that cannot be used.
    pub on_bad_row: OnBadRow,
    /// Only the first rows are read, if this is given.
    pub rows: Option<u64>,
}

/// What reading a file found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The file as written.
    pub file: String,
    /// The form of its rows.
    pub form: Form,
    /// Rows that are used.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them that are learned, or have a class; of queries and passages the queries.
    pub trained_tokens: u64,
    /// How many have each class, in the order of their numbers, where there are classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<u64>,
    /// Rows whose end was cut off.
    pub truncated: u64,
    /// Rows that are left out.
    pub bad: BadRows,
}

/// The rows of a file as documents: tokens, end to end, and a mark on each that is learned. A row is one document, the two answers of
/// a pair, or a query and its passages.
#[derive(Debug, Clone)]
pub struct Dataset {
    ids: Vec<u32>,
    trained: Vec<bool>,
    /// The class of each row, and which of two texts it is of, where there are classes.
    classed: Option<Classed>,
    /// The rows that have classes.
    labelled: Option<Labelled>,
    /// Where each document ends in `ids`.
    ends: Vec<usize>,
    parted: Parted,
    report: Report,
}

/// Which documents are whose row's.
#[derive(Debug, Clone)]
enum Parted {
    /// Each row's are in these roles.
    Alike(&'static [View]),
    /// Each row's are a query and its passages; where the documents of each row end.
    Retrieved(Vec<usize>),
}

/// A document: its role in its row, its tokens and marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'a> {
    /// What it is to its row.
    pub view: View,
    /// The tokens.
    pub ids: &'a [u32],
    /// Which of them are learned, or have a class.
    pub trained: &'a [bool],
    /// What has classes.
    pub classed: Option<ClassedRows<'a>>,
}

/// What a document has beside its tokens where there are classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassedRows<'a> {
    /// The class of each row, [`attune_points::layout::NO_LABEL`] for those that have none.
    pub labels: &'a [u32],
    /// Which of two texts each token belongs to.
    pub types: &'a [u32],
}

impl Document<'_> {
    /// How many tokens come before the last run of them that is learned; at least one, for the first is never predicted.
    pub fn prompt_tokens(&self) -> usize {
        let learned = self.trained.iter().rposition(|learned| *learned).unwrap_or(0);
        self.trained[..learned].iter().rposition(|learned| !*learned).map_or(1, |last| last + 1)
    }
}

impl Dataset {
    /// Reads and tokenises a file.
    ///
    /// # Errors
    /// [`Error::BadRows`] with file and line under `on_bad_row: fail`; [`Error::NoRows`] if nothing usable is in it; errors of
    /// the file as a whole.
    pub fn read(source: &Source, encoder: &Encoder, reading: Reading) -> Result<Self, Error> {
        let mut rows = readers::open(source)?;
        let file = source.name().to_string();
        let mut form = reading.form;
        let mut dataset = Building::default();
        let mut left = reading.rows.unwrap_or(u64::MAX);
        loop {
            let mut batch = Vec::with_capacity(BATCH_ROWS);
            while batch.len() < BATCH_ROWS && left > 0 {
                let Some(row) = rows.next().transpose()? else { break };
                left -= 1;
                batch.push(row);
            }
            if batch.is_empty() {
                break;
            }
            if form.is_none() {
                form = first_form(&file, &batch, encoder)?;
            }
            let encode = |row: readers::Item| -> Result<Vec<Encoded>, BadRow> {
                let row = row?;
                // A file of nothing but unreadable rows has no form; its rows are bad for that reason already.
                let Some(form) = form else {
                    return Err(RowFault::new(Reason::MissingField, "no row says the form").at(row.origin));
                };
                let record = forms::read(form, &row.fields);
                record.and_then(|record| encoder.encode(&record)).map_err(|fault| fault.at(row.origin))
            };
            let encoded: Vec<Result<Vec<Encoded>, BadRow>> = batch.into_par_iter().map(encode).collect();
            for row in encoded {
                dataset.push(row);
            }
            if reading.on_bad_row == OnBadRow::Fail && !dataset.bad.is_empty() {
                dataset.bad.stopped_early = true;
                return Err(Error::BadRows(Box::new(dataset.bad)));
            }
        }
        let mut dataset = dataset.finish(file, form)?;
        if let Some(classes) = encoder.classes() {
            dataset.labelled = Some(classes.of);
            dataset.report.classes = dataset.counted(classes.names.len());
        }
        Ok(dataset)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        match &self.parted {
            Parted::Alike(views) => self.ends.len() / views.len(),
            Parted::Retrieved(ends) => ends.len(),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The documents of row `index`.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    pub fn row(&self, index: usize) -> impl Iterator<Item = Document<'_>> {
        let documents = match &self.parted {
            Parted::Alike(views) => index * views.len()..(index + 1) * views.len(),
            Parted::Retrieved(ends) => index.checked_sub(1).map_or(0, |before| ends[before])..ends[index],
        };
        documents.enumerate().map(move |(at, document)| {
            let view = match (&self.parted, at.checked_sub(1)) {
                (Parted::Alike(views), _) => views[at],
                (Parted::Retrieved(_), None) => View::Query,
                (Parted::Retrieved(_), Some(passage)) => View::Passage(u16::try_from(passage).unwrap_or(u16::MAX)),
            };
            self.document(document, view)
        })
    }

    /// The roles of the documents of the row that has most of them.
    pub fn views(&self) -> Vec<View> {
        match &self.parted {
            Parted::Alike(views) => views.to_vec(),
            Parted::Retrieved(_) => {
                let longest = (0..self.len()).max_by_key(|&index| self.row(index).count());
                longest.map(|index| self.row(index).map(|document| document.view).collect()).unwrap_or_default()
            }
        }
    }

    /// Tokens of row `index`.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    pub fn tokens_of(&self, index: usize) -> usize {
        self.row(index).map(|document| document.ids.len()).sum()
    }

    /// All documents, row by row.
    pub fn documents(&self) -> impl Iterator<Item = Document<'_>> {
        (0..self.len()).flat_map(|index| self.row(index))
    }

    fn document(&self, index: usize, view: View) -> Document<'_> {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let range = start..self.ends[index];
        let classed = self.classed.as_ref();
        let classed = classed.map(|classed| ClassedRows {
            labels: &classed.labels[range.clone()],
            types: &classed.types[range.clone()],
        });
        Document { view, ids: &self.ids[range.clone()], trained: &self.trained[range], classed }
    }

    /// What reading the file found.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The lengths of all documents, in order.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.documents().map(|document| document.ids.len())
    }

    /// How many rows have each of so many classes.
    fn counted(&self, classes: usize) -> Vec<u64> {
        let mut counts = vec![0; classes];
        for label in self.classed.iter().flat_map(|classed| &classed.labels) {
            if let Some(count) = counts.get_mut(*label as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// The rows of its documents that have classes, where there are some.
    pub const fn labelled(&self) -> Option<Labelled> {
        self.labelled
    }

    /// A digest of tokens, marks, classes and borders: what a run saw, however the file was stored.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for Document { ids, trained, classed, .. } in self.documents() {
            hasher.update(&(ids.len() as u64).to_le_bytes());
            for (id, trained) in ids.iter().zip(trained) {
                hasher.update(&id.to_le_bytes());
                hasher.update(&[u8::from(*trained)]);
            }
            for number in classed.iter().flat_map(|classed| classed.labels.iter().chain(classed.types)) {
                hasher.update(&number.to_le_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }
}

/// The form that the first readable row's columns say.
fn first_form(file: &str, batch: &[readers::Item], encoder: &Encoder) -> Result<Option<Form>, Error> {
    let Some(row) = batch.iter().find_map(|row| row.as_ref().ok()) else { return Ok(None) };
    let form = match encoder.classes() {
        Some(classes) => forms::of_head(classes.of, &row.fields),
        None => forms::recognise(&row.fields),
    };
    form.map(Some).map_err(|words| Error::File { file: file.to_owned(), message: format!("its columns {words}") })
}

/// The roles of the documents of a row, where every row has the same.
const fn views(form: Form) -> Option<&'static [View]> {
    Some(match form {
        Form::Chat
        | Form::PromptCompletion
        | Form::Alpaca
        | Form::Text
        | Form::Classification
        | Form::TokenClassification => &[View::Main],
        Form::Preference => &[View::Chosen, View::Rejected],
        Form::Retrieval => return None,
    })
}

#[derive(Default)]
struct Building {
    ids: Vec<u32>,
    trained: Vec<bool>,
    classed: Option<Classed>,
    ends: Vec<usize>,
    /// Where the documents of each row end.
    rows: Vec<usize>,
    truncated: u64,
    bad: BadRows,
}

impl Building {
    fn push(&mut self, row: Result<Vec<Encoded>, BadRow>) {
        match row {
            Ok(documents) => {
                self.truncated += u64::from(documents.iter().any(|document| document.truncated));
                for encoded in documents {
                    self.ids.extend(&encoded.ids);
                    self.trained.extend(&encoded.trained);
                    if let Some(Classed { labels, types }) = encoded.classed {
                        let all = self.classed.get_or_insert_with(|| Classed { labels: Vec::new(), types: Vec::new() });
                        all.labels.extend(labels);
                        all.types.extend(types);
                    }
                    self.ends.push(self.ids.len());
                }
                self.rows.push(self.ends.len());
            }
            Err(bad) => self.bad.push(bad),
        }
    }

    fn finish(self, file: String, form: Option<Form>) -> Result<Dataset, Error> {
        let Self { ids, trained, classed, ends, rows, truncated, bad } = self;
        let (false, Some(form)) = (ends.is_empty(), form) else {
            let message = match bad.first.first() {
                None => "holds no row".to_owned(),
                Some(first) => {
                    format!("holds no usable row; {} were left out, the first because {}", bad.count(), first.message)
                }
            };
            return Err(Error::NoRows { file, message });
        };
        // The first token of a document is never predicted, but may have a class.
        let firsts = std::iter::once(0).chain(ends.iter().copied().take(ends.len() - 1));
        let unpredicted = if classed.is_some() { 0 } else { firsts.filter(|&start| trained[start]).count() };
        let report = Report {
            file,
            form,
            rows: rows.len() as u64,
            tokens: ids.len() as u64,
            trained_tokens: (trained.iter().filter(|trained| **trained).count() - unpredicted) as u64,
            classes: Vec::new(),
            truncated,
            bad,
        };
        let parted = views(form).map_or(Parted::Retrieved(rows), Parted::Alike);
        Ok(Dataset { ids, trained, classed, labelled: None, ends, parted, report })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use attune_points::layout::NO_LABEL;
    use attune_spec::job::TooLong;

    use super::*;
    use crate::classes::Classes;
    use crate::tokenizer::byte_level;

    fn read(text: &str, name: &str, on_bad_row: OnBadRow, form: Option<Form>) -> Result<Dataset, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let encoder = Encoder::new(byte_level(&["<|endoftext|>"]), None, 64, TooLong::Refuse).unwrap();
        let source = Source::parse(path.to_str().unwrap()).unwrap();
        let reading = Reading { form, on_bad_row, rows: None };
        let shown = folder.path().display().to_string();
        Dataset::read(&source, &encoder, reading).map_err(|error| error.to_string().replace(&shown, "DIR"))
    }

    /// A data set of texts, for tests of what comes after reading.
    pub(crate) fn texts(texts: &[String]) -> Dataset {
        let rows: Vec<String> = texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
        read(&rows.join("\n"), "a.jsonl", OnBadRow::Fail, None).unwrap()
    }

    #[test]
    fn documents_keep_their_order_and_their_marks() {
        let dataset = texts(&["ab".to_owned(), "c".to_owned()]);
        let documents: Vec<Document<'_>> = dataset.documents().collect();
        let document = |ids, trained| Document { view: View::Main, ids, trained, classed: None };
        assert_eq!(documents, [document(&[97, 98, 256], &[true; 3]), document(&[99, 256], &[true; 2])]);
        assert_eq!(dataset.report().trained_tokens, 3);
        assert_ne!(dataset.digest(), texts(&["a".to_owned(), "bc".to_owned()]).digest());
    }

    #[test]
    fn a_bad_row_fails_with_file_and_line_or_is_skipped_and_counted() {
        let text = "{\"text\": \"good\"}\n{\"text\": }\n{\"text\": 3}\n{\"text\": \"also good\"}\n";
        let error = read(text, "a.jsonl", OnBadRow::Fail, None).unwrap_err();
        assert_eq!(
            error,
            "DIR/a.jsonl:2: not valid JSON at column 10: expected value (and at least 1 more bad row; `on_bad_row: skip` leaves them out)"
        );
        let dataset = read(text, "a.jsonl", OnBadRow::Skip, None).unwrap();
        assert_eq!((dataset.len(), dataset.report().bad.count()), (2, 2));
        assert_eq!(dataset.report().bad.by_reason[&Reason::WrongType], 1);
        let long = format!("{{\"text\": \"{}\"}}\n", "x".repeat(100));
        let error = read(&long, "a.jsonl", OnBadRow::Fail, None).unwrap_err();
        assert!(error.starts_with("DIR/a.jsonl:1: has 101 tokens; `data.max_length` is 64"), "{error}");
    }

    #[test]
    fn files_without_a_usable_row_say_so() {
        assert_eq!(read("", "a.jsonl", OnBadRow::Fail, None).unwrap_err(), "DIR/a.jsonl: holds no row");
        let error = read("[1]\n", "a.jsonl", OnBadRow::Skip, None).unwrap_err();
        assert!(
            error
                .starts_with("DIR/a.jsonl: holds no usable row; 1 were left out, the first because the line is a list"),
            "{error}"
        );
        let error = read("{\"question\": \"a\"}\n", "a.jsonl", OnBadRow::Fail, None).unwrap_err();
        assert!(error.contains("[\"question\"] are no known form"), "{error}");
        let error = read("{\"question\": \"a\"}\n", "a.jsonl", OnBadRow::Fail, Some(Form::Text)).unwrap_err();
        assert!(error.starts_with("DIR/a.jsonl:1: `text` is missing"), "{error}");
    }

    #[test]
    fn csv_rows_are_read_by_their_header() {
        let dataset = read("prompt,completion\n\"a, b\",c\nd,e\n", "a.csv", OnBadRow::Fail, None).unwrap();
        let document = dataset.row(0).next().unwrap();
        assert_eq!(document.ids, [97, 44, 32, 98, 99, 256]);
        assert_eq!(document.trained, [false, false, false, false, true, true]);
        assert_eq!(dataset.report().form, Form::PromptCompletion);
    }

    #[test]
    fn rows_have_classes_and_each_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let rows = "{\"text\": \"ab\", \"label\": \"yes\"}\n{\"text\": \"c\", \"text_pair\": \"d\", \"label\": 2}\n\
                    {\"text\": \"e\", \"label\": \"yes\"}\n";
        std::fs::write(&path, rows).unwrap();
        let classes = Classes { names: ["no", "yes", "who"].map(str::to_owned).to_vec(), of: Labelled::Last };
        let encoder = Encoder::new(byte_level(&["<|endoftext|>"]), None, 64, TooLong::Refuse).unwrap();
        let encoder = encoder.with_classes(Some(classes));
        let reading = Reading { form: None, on_bad_row: OnBadRow::Fail, rows: None };
        let dataset = Dataset::read(&Source::parse(path.to_str().unwrap()).unwrap(), &encoder, reading).unwrap();
        assert_eq!((dataset.report().form, &dataset.report().classes[..]), (Form::Classification, &[0, 2, 1][..]));
        let first = dataset.row(0).next().unwrap();
        assert_eq!((first.ids, first.classed.unwrap().labels), (&[97, 98][..], &[NO_LABEL, 1][..]));
        assert_eq!((dataset.labelled(), dataset.report().trained_tokens), (Some(Labelled::Last), 3));
    }

    #[test]
    fn a_row_of_a_pair_is_two_documents() {
        let text =
            "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"cd\"}\n{\"chosen\": \"e\", \"rejected\": \"f\"}\n";
        let dataset = read(text, "a.jsonl", OnBadRow::Fail, None).unwrap();
        assert_eq!((dataset.len(), dataset.report().form, dataset.report().rows), (2, Form::Preference, 2));
        let documents: Vec<Document<'_>> = dataset.row(0).collect();
        assert_eq!(
            documents[0],
            Document { view: View::Chosen, ids: &[97, 98, 256], trained: &[false, true, true], classed: None }
        );
        assert_eq!((documents[1].view, documents[1].ids), (View::Rejected, &[97, 99, 100, 256][..]));
        assert_eq!((dataset.tokens_of(0), dataset.tokens_of(1)), (7, 4));
    }
}
