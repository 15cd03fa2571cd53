//! What each row of a packed batch is.
//!
//! Activations are `[T, D]`: documents end to end, no padding. A layout says for each of the T rows which token (or
//! virtual row) it holds and for each document which rows it owns; everything else about rows and documents travels in
//! typed columns. Documents never see one another.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use crate::column::{Axis, Column, Values};
use crate::error::{Error, Result};

/// Label of a row that is not supervised.
pub const NO_LABEL: u32 = u32::MAX;

/// The column of next-token labels, one `u32` a row; [`NO_LABEL`] where the row is not supervised.
pub const LABELS: &str = "labels";

/// The column of token types, one `u32` a row: which of two texts a row belongs to. Missing means 0 for all.
pub const TOKEN_TYPES: &str = "token_types";

/// The column of log-probabilities of labels under a reference model, one `f64` a row; meaningless where a row is not
/// supervised.
pub const REFERENCE: &str = "reference_logp";

/// The column of log-probabilities of labels, one `f64` a row; meaningless where a row is not supervised.
pub const LOGP: &str = "logp";

/// The column of the loss's gradient by the log-probabilities of labels, one `f64` a row.
pub const DLOGP: &str = "dlogp";

/// The column of log-probabilities of labels under the parameters that a text was made with, one `f64` a row; meaningless
/// where a row is not supervised.
pub const MADE: &str = "made_logp";

/// The column of documents' vectors, one each.
pub const VECTORS: &str = "vectors";

/// The column of the loss's gradient by documents' vectors, one each.
pub const DVECTORS: &str = "dvectors";

/// The column of rewards, one `f64` a document; not a number where nothing could judge it.
pub const REWARD: &str = "reward";

/// What one row of a batch holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Row {
    /// A token of the vocabulary.
    Token(u32),
    /// A row that a slot's sequence adapter fills (prompt tuning): planned at packing, counted in the token budget.
    Virtual {
        /// The slot of the stack that fills it.
        slot: u16,
        /// Which of the slot's rows.
        index: u32,
    },
    /// A vector that a column carries (an image patch, an embedding).
    Payload {
        /// Which payload column.
        column: u16,
        /// Which vector of that column.
        index: u32,
    },
}

/// Which role a document plays for its example.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum View {
    /// The only document of the example.
    Main,
    /// The preferred answer of a pair.
    Chosen,
    /// The other answer of a pair.
    Rejected,
    /// What the teacher reads.
    Teacher,
    /// One of several sampled answers.
    Sample(u16),
    /// The query of a retrieval group.
    Query,
    /// A passage of a retrieval group.
    Passage(u16),
}

/// One document: a contiguous run of rows with positions from 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doc {
    /// The rows it owns.
    pub rows: Range<u32>,
    /// The example it comes from: its index in its domain.
    pub example: u64,
    /// Its role for that example.
    pub view: View,
    /// The job it belongs to among those that share the batch.
    pub lane: u16,
    /// The domain of the data mixture it was drawn from.
    pub domain: u16,
    /// Documents of one pair or group share this number; unique within a batch.
    pub group: u32,
    /// The tokens that went through the model before its rows, in earlier passes: none of a document that is whole.
    pub earlier: Arc<[u32]>,
}

impl Doc {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        (self.rows.end - self.rows.start) as usize
    }
}

/// One supervised row: the model at `row` is asked for `label`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Supervised {
    /// Index of the row in the batch.
    pub row: u32,
    /// The token that follows.
    pub label: u32,
}

/// A packed batch: rows, documents, columns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    rows: Vec<Row>,
    docs: Vec<Doc>,
    columns: BTreeMap<String, Column>,
}

impl Layout {
    /// An empty batch to which documents are added.
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch of one document without labels, as generation and scoring use it.
    pub fn single(tokens: &[u32]) -> Self {
        let mut layout = Self::new();
        layout.push(Source::default(), tokens.iter().map(|&token| (Row::Token(token), NO_LABEL)));
        layout
    }

    /// Appends a document; each row comes with its label ([`NO_LABEL`] if it is not supervised).
    pub fn push(&mut self, source: Source, rows: impl IntoIterator<Item = (Row, u32)>) {
        let start = self.rows.len() as u32;
        let labels = self
            .columns
            .entry(LABELS.to_owned())
            .or_insert_with(|| Column { axis: Axis::Row, values: Values::U32(Vec::new()) });
        let Values::U32(labels) = &mut labels.values else { unreachable!("labels are integers by construction") };
        for (row, label) in rows {
            self.rows.push(row);
            labels.push(label);
        }
        let Source { example, view, lane, domain, group } = source;
        let group = group.unwrap_or(self.docs.len() as u32);
        let rows = start..self.rows.len() as u32;
        self.docs.push(Doc { rows, example, view, lane, domain, group, earlier: Arc::default() });
    }

    /// Says of the last document that these tokens went through the model before its rows, in earlier passes.
    pub fn follow(&mut self, earlier: &[u32]) {
        if let Some(doc) = self.docs.last_mut() {
            doc.earlier = earlier.into();
        }
    }

    /// Says of the rows of the last document which of two texts each is of.
    ///
    /// # Panics
    /// If there are not as many as it has rows.
    pub fn typed(&mut self, types: &[u32]) {
        let Some(last) = self.docs.last() else { return };
        assert_eq!(types.len(), last.n_rows(), "a type for each row of the last document");
        let start = last.rows.start as usize;
        let mut all = match self.columns.remove(TOKEN_TYPES) {
            Some(Column { axis: Axis::Row, values: Values::U32(all) }) => all,
            _ => Vec::new(),
        };
        // Rows before it that nothing was said of are of the first text.
        all.resize(start, 0);
        all.extend(types);
        self.columns.insert(TOKEN_TYPES.to_owned(), Column { axis: Axis::Row, values: Values::U32(all) });
    }

    /// Gives two rows each other's labels.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn swap_labels(&mut self, a: usize, b: usize) {
        if let Some(Column { values: Values::U32(labels), .. }) = self.columns.get_mut(LABELS) {
            labels.swap(a, b);
        }
    }

    fn types(&self) -> Option<&[u32]> {
        match self.columns.get(TOKEN_TYPES) {
            Some(Column { axis: Axis::Row, values: Values::U32(types) }) => Some(types),
            _ => None,
        }
    }

    /// The documents of several batches in one, one after the other, with the columns that all of them have, and the types of
    /// rows where any has them. Groups stay apart.
    pub fn concat<'l>(layouts: impl IntoIterator<Item = &'l Self>) -> Self {
        let mut whole: Option<Self> = None;
        for layout in layouts {
            let Some(whole) = &mut whole else {
                whole = Some(layout.clone());
                continue;
            };
            let start = whole.rows.len() as u32;
            let group = whole.docs.iter().map(|doc| doc.group + 1).max().unwrap_or(0);
            let shifted = |doc: &Doc| Doc {
                rows: doc.rows.start + start..doc.rows.end + start,
                group: doc.group + group,
                ..doc.clone()
            };
            let types = (whole.types().is_some() || layout.types().is_some()).then(|| {
                let of = |layout: &Self| layout.types().map_or_else(|| vec![0; layout.rows.len()], <[u32]>::to_vec);
                [of(whole), of(layout)].concat()
            });
            whole.docs.extend(layout.docs.iter().map(shifted));
            whole.rows.extend(&layout.rows);
            whole.columns.retain(|name, column| match layout.columns.get(name) {
                Some(other) if other.axis == column.axis => column.values.extend(&other.values),
                _ => false,
            });
            if let Some(types) = types {
                let column = Column { axis: Axis::Row, values: Values::U32(types) };
                whole.columns.insert(TOKEN_TYPES.to_owned(), column);
            }
        }
        whole.unwrap_or_default()
    }

    /// The batch with its documents `copies` times, one batch after the other. What comes after the first is not supervised; it
    /// keeps its examples and views, so that dropout is the same in all. Columns of rows and documents are repeated.
    #[must_use]
    pub fn with_copies(&self, copies: usize) -> Self {
        let mut copy = self.clone();
        if let Some(Column { values: Values::U32(labels), .. }) = copy.columns.get_mut(LABELS) {
            labels.fill(NO_LABEL);
        }
        Self::concat(std::iter::once(self).chain(std::iter::repeat_n(&copy, copies.saturating_sub(1))))
    }

    /// The batch with some of its documents only, with their columns.
    #[must_use]
    pub fn of_docs(&self, keep: impl Fn(usize, &Doc) -> bool) -> Self {
        let kept: Vec<usize> = (0..self.docs.len()).filter(|&at| keep(at, &self.docs[at])).collect();
        let own = |doc: &Doc| doc.rows.clone().map(|row| (Some(row as usize), self.rows[row as usize])).collect();
        self.remade(&kept, own)
    }

    /// The batch with these rows before those of each document, not supervised; other columns have 0 there.
    #[must_use]
    pub fn begun_with(&self, before: &[Row]) -> Self {
        if before.is_empty() {
            return self.clone();
        }
        let all: Vec<usize> = (0..self.docs.len()).collect();
        let mut begun = self.remade(&all, |doc| {
            let own = doc.rows.clone().map(|row| (Some(row as usize), self.rows[row as usize]));
            before.iter().map(|&row| (None, row)).chain(own).collect()
        });
        if let Some(Column { values: Values::U32(labels), .. }) = begun.columns.get_mut(LABELS) {
            for doc in &begun.docs {
                labels[doc.rows.start as usize..][..before.len()].fill(NO_LABEL);
            }
        }
        begun
    }

    /// The batch without some of its rows, with their columns. Documents stay.
    #[must_use]
    pub fn without(&self, leave_out: impl Fn(&Row) -> bool) -> Self {
        let all: Vec<usize> = (0..self.docs.len()).collect();
        self.remade(&all, |doc| {
            let own = doc.rows.clone().map(|row| (Some(row as usize), self.rows[row as usize]));
            own.filter(|(_, row)| !leave_out(row)).collect()
        })
    }

    /// The documents `kept`, each of the rows that `of` makes of it: new ones, or those at some place.
    fn remade(&self, kept: &[usize], of: impl Fn(&Doc) -> Vec<(Option<usize>, Row)>) -> Self {
        let (mut places, mut rows, mut docs) = (Vec::new(), Vec::new(), Vec::with_capacity(kept.len()));
        for &at in kept {
            let start = rows.len() as u32;
            for (place, row) in of(&self.docs[at]) {
                places.push(place);
                rows.push(row);
            }
            docs.push(Doc { rows: start..rows.len() as u32, ..self.docs[at].clone() });
        }
        let of_docs: Vec<Option<usize>> = kept.iter().map(|&at| Some(at)).collect();
        let column = |(name, column): (&String, &Column)| {
            let places = match column.axis {
                Axis::Row => &places,
                Axis::Doc => &of_docs,
            };
            (name.clone(), Column { axis: column.axis, values: column.values.at(places) })
        };
        Self { rows, docs, columns: self.columns.iter().map(column).collect() }
    }

    /// Adds or replaces a column.
    ///
    /// # Errors
    /// [`Error::Refused`] if the number of values is not the number of rows or documents.
    pub fn set_column(&mut self, name: &str, column: Column) -> Result<()> {
        let expected = match column.axis {
            Axis::Row => self.rows.len(),
            Axis::Doc => self.docs.len(),
        };
        if column.values.len() != expected {
            let got = column.values.len();
            return Err(Error::Refused(format!("column {name:?} has {got} values; expected {expected}")));
        }
        self.columns.insert(name.to_owned(), column);
        Ok(())
    }

    /// All columns by their names.
    pub fn columns(&self) -> impl Iterator<Item = (&str, &Column)> {
        self.columns.iter().map(|(name, column)| (name.as_str(), column))
    }

    /// A column by name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.get(name)
    }

    /// What each row holds.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The documents, in row order.
    pub fn docs(&self) -> &[Doc] {
        &self.docs
    }

    /// Number of rows, T.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// The label of each row, [`NO_LABEL`] where it is not supervised.
    pub fn labels(&self) -> &[u32] {
        match self.columns.get(LABELS) {
            Some(Column { values: Values::U32(labels), .. }) => labels,
            _ => &[],
        }
    }

    /// The supervised rows, in row order.
    pub fn supervised(&self) -> Vec<Supervised> {
        let labelled = self.labels().iter().enumerate().filter(|(_, label)| **label != NO_LABEL);
        labelled.map(|(row, &label)| Supervised { row: row as u32, label }).collect()
    }

    /// The position of each row within its document.
    pub fn positions(&self) -> Vec<u32> {
        self.docs.iter().flat_map(|doc| 0..doc.rows.end - doc.rows.start).collect()
    }

    /// What objectives divide by.
    pub fn counts(&self) -> LabelCounts {
        let is_supervised = |doc: &&Doc| {
            let rows = doc.rows.start as usize..doc.rows.end as usize;
            self.labels().get(rows).is_some_and(|labels| labels.iter().any(|&label| label != NO_LABEL))
        };
        let groups: BTreeSet<u32> = self.docs.iter().filter(is_supervised).map(|doc| doc.group).collect();
        LabelCounts {
            tokens: self.labels().iter().filter(|&&label| label != NO_LABEL).count() as u64,
            documents: self.docs.iter().filter(is_supervised).count() as u64,
            groups: groups.len() as u64,
        }
    }
}

/// Where a document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its index in its domain.
    pub example: u64,
    /// Its role for that example.
    pub view: View,
    /// The job it belongs to among those that share the batch.
    pub lane: u16,
    /// The domain of the mixture.
    pub domain: u16,
    /// The pair or group it belongs to; a group of its own if `None`.
    pub group: Option<u32>,
}

impl Default for Source {
    fn default() -> Self {
        Self { example: 0, view: View::Main, lane: 0, domain: 0, group: None }
    }
}

/// How much is supervised in a batch, a step or a data set; counts add.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelCounts {
    /// Supervised rows.
    pub tokens: u64,
    /// Documents with at least one supervised row.
    pub documents: u64,
    /// Groups of documents with at least one supervised row. A group is never cut by the parts of a step.
    pub groups: u64,
}

impl std::ops::Add for LabelCounts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            documents: self.documents + other.documents,
            groups: self.groups + other.groups,
        }
    }
}

impl std::iter::Sum for LabelCounts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), std::ops::Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_documents() -> Layout {
        let mut layout = Layout::new();
        layout.push(Source::default(), [(Row::Token(5), NO_LABEL), (Row::Token(6), 7)]);
        layout.push(Source { example: 1, ..Source::default() }, [(Row::Token(8), NO_LABEL)]);
        layout
    }

    #[test]
    fn batches_are_put_together_with_groups_apart_and_the_columns_of_all() {
        let (mut a, mut b) = (two_documents(), two_documents());
        let column = |values| Column { axis: Axis::Row, values };
        a.set_column(LOGP, column(Values::F64(vec![1.0, 2.0, 3.0]))).unwrap();
        b.set_column(LOGP, column(Values::F64(vec![4.0, 5.0, 6.0]))).unwrap();
        b.set_column("of one", column(Values::F32(vec![0.0; 3]))).unwrap();
        let whole = Layout::concat([&b, &a]);
        assert_eq!(whole.column(LOGP), Some(&column(Values::F64(vec![4.0, 5.0, 6.0, 1.0, 2.0, 3.0]))));
        assert_eq!(whole.column("of one"), None);
        let groups: Vec<u32> = whole.docs().iter().map(|doc| doc.group).collect();
        assert_eq!((groups, whole.docs()[3].rows.clone()), (vec![0, 1, 2, 3], 5..6));
        assert_eq!(whole.counts(), a.counts() + b.counts());
        assert_eq!(Layout::concat([]), Layout::new());
    }

    #[test]
    fn rows_without_a_type_are_of_the_first_text() {
        let mut layout = two_documents();
        layout.typed(&[1]);
        assert_eq!(layout.types(), Some(&[0, 0, 1][..]));
        let plain = two_documents();
        assert_eq!(Layout::concat([&plain, &layout]).types(), Some(&[0, 0, 0, 0, 0, 1][..]));
        assert_eq!(Layout::concat([&layout, &plain, &Layout::new()]).types(), Some(&[0, 0, 1, 0, 0, 0][..]));
        assert_eq!(layout.begun_with(&[Row::Virtual { slot: 0, index: 0 }]).types(), Some(&[0, 0, 0, 0, 1][..]));
        assert_eq!(Layout::concat([&plain, &plain]).types(), None);
    }

    #[test]
    fn copies_are_of_the_same_examples_and_supervised_once() {
        let layout = two_documents();
        let three = layout.with_copies(3);
        assert_eq!((three.n_rows(), three.counts()), (9, layout.counts()));
        assert_eq!(three.supervised(), layout.supervised());
        let examples: Vec<u64> = three.docs().iter().map(|doc| doc.example).collect();
        assert_eq!(examples, [0, 1, 0, 1, 0, 1]);
        assert_eq!(layout.with_copies(1), layout);
    }

    #[test]
    fn some_documents_keep_their_rows_and_columns() {
        let mut layout = two_documents();
        let column = |axis, values| Column { axis, values };
        layout.set_column(LOGP, column(Axis::Row, Values::F64(vec![1.0, 2.0, 3.0]))).unwrap();
        layout.set_column("weights", column(Axis::Doc, Values::F32(vec![4.0, 5.0]))).unwrap();
        let last = layout.of_docs(|at, _| at == 1);
        assert_eq!((last.rows(), last.docs()[0].rows.clone(), last.docs()[0].example), (&[Row::Token(8)][..], 0..1, 1));
        assert_eq!(last.column(LOGP), Some(&column(Axis::Row, Values::F64(vec![3.0]))));
        assert_eq!(last.column("weights"), Some(&column(Axis::Doc, Values::F32(vec![5.0]))));
        assert_eq!(layout.of_docs(|_, _| true), layout);
        let vectors = |numbers: &[f32]| column(Axis::Doc, Values::Vectors { width: 2, numbers: numbers.to_vec() });
        layout.set_column(VECTORS, vectors(&[1.0, 2.0, 3.0, 4.0])).unwrap();
        assert_eq!(layout.of_docs(|at, _| at == 1).column(VECTORS), Some(&vectors(&[3.0, 4.0])));
        let twice = Layout::concat([&layout, &layout.of_docs(|at, _| at == 0)]);
        assert_eq!(twice.column(VECTORS), Some(&vectors(&[1.0, 2.0, 3.0, 4.0, 1.0, 2.0])));
        assert!(layout.set_column(DVECTORS, vectors(&[1.0; 6])).is_err());
    }

    #[test]
    fn rows_before_documents_count_in_positions_and_are_not_supervised() {
        let mut layout = two_documents();
        let values = Values::F64(vec![1.0, 2.0, 3.0]);
        layout.set_column(LOGP, Column { axis: Axis::Row, values }).unwrap();
        let before = [0, 1].map(|index| Row::Virtual { slot: 3, index });
        let begun = layout.begun_with(&before);
        assert_eq!(begun.positions(), [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!((&begun.rows()[..2], begun.rows()[4]), (&before[..], before[0]));
        let [NO_LABEL, NO_LABEL, rest @ ..] = begun.labels() else { panic!("labels of rows before: {begun:?}") };
        assert_eq!(rest[..2], layout.labels()[..2]);
        assert_eq!(begun.counts(), layout.counts());
        assert_eq!(begun.column(LOGP).unwrap().values, Values::F64(vec![0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 3.0]));
        assert_eq!(begun.without(|row| matches!(row, Row::Virtual { .. })), layout);
        assert_eq!(layout.begun_with(&[]), layout);
    }

    #[test]
    fn positions_restart_and_labels_are_counted() {
        let layout = two_documents();
        assert_eq!(layout.positions(), [0, 1, 0]);
        assert_eq!(layout.supervised(), [Supervised { row: 1, label: 7 }]);
        assert_eq!(layout.counts(), LabelCounts { tokens: 1, documents: 1, groups: 1 });
        assert_eq!(layout.docs()[1].rows, 2..3);
        assert_eq!(layout.docs()[1].group, 1);
    }

    #[test]
    fn a_column_must_fit_its_axis() {
        let mut layout = two_documents();
        let weights = |n| Column { axis: Axis::Doc, values: Values::F32(vec![1.0; n]) };
        assert!(layout.set_column("weights", weights(2)).is_ok());
        let error = layout.set_column("weights", weights(3)).unwrap_err();
        assert_eq!(error.to_string(), "column \"weights\" has 3 values; expected 2");
    }
}
