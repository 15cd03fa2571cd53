//! Typed columns beside the rows or the documents of a batch.

use serde::{Deserialize, Serialize};

/// What a column has one value for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Axis {
    /// One value a row.
    Row,
    /// One value a document.
    Doc,
}

/// The values of a column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Values {
    /// Token ids, class labels, graph nodes.
    U32(Vec<u32>),
    /// Weights, advantages.
    F32(Vec<f32>),
    /// Log-probabilities.
    F64(Vec<f64>),
    /// Vectors of `width` numbers, one after the other.
    Vectors {
        /// The numbers of each.
        width: usize,
        /// The numbers of all.
        numbers: Vec<f32>,
    },
}

impl Values {
    /// Appends values of the same type; says whether they were.
    pub(crate) fn extend(&mut self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vectors { width, numbers: all }, Self::Vectors { width: of_more, numbers: more })
                if width == of_more =>
            {
                all.extend(more);
            }
            (Self::U32(all), Self::U32(more)) => all.extend(more),
            (Self::F32(all), Self::F32(more)) => all.extend(more),
            (Self::F64(all), Self::F64(more)) => all.extend(more),
            _ => return false,
        }
        true
    }

    /// Those at these places; 0 where there is none.
    pub(crate) fn at(&self, places: &[Option<usize>]) -> Self {
        fn at<T: Copy + Default>(values: &[T], places: &[Option<usize>]) -> Vec<T> {
            places.iter().map(|place| place.map(|place| values[place]).unwrap_or_default()).collect()
        }
        match self {
            Self::U32(values) => Self::U32(at(values, places)),
            Self::F32(values) => Self::F32(at(values, places)),
            Self::F64(values) => Self::F64(at(values, places)),
            Self::Vectors { width, numbers } => {
                let mut some = vec![0.0; places.len() * width];
                for (to, place) in some.chunks_exact_mut((*width).max(1)).zip(places) {
                    if let Some(place) = place {
                        to.copy_from_slice(&numbers[place * width..(place + 1) * width]);
                    }
                }
                Self::Vectors { width: *width, numbers: some }
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::U32(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Vectors { width, numbers } => numbers.len().checked_div(*width).unwrap_or_default(),
        }
    }
}

/// A typed column beside the rows or the documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// What it has one value for.
    pub axis: Axis,
    /// The values.
    pub values: Values,
}
