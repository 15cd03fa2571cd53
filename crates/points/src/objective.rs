//! The point `Objective`: layout and outputs to loss.
//!
//! An objective of level `Chunk` sees one chunk of supervised rows at a time; the logits of the whole batch never exist.
//! Levels that need whole documents, pairs or groups join with their first users.

use crate::error::Result;
use crate::layout::{LabelCounts, Layout, Supervised};

/// What the sum of an objective's losses is divided by; known for the whole optimiser step (all micro-batches, all ranks)
/// before the first backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denominator {
    /// The number of supervised tokens.
    Tokens,
    /// The number of documents with a supervised token.
    Documents,
}

impl Denominator {
    /// The divisor for a step with these counts, at least 1.
    pub fn of(self, counts: LabelCounts) -> f64 {
        let count = match self {
            Self::Tokens => counts.tokens,
            Self::Documents => counts.documents,
        };
        count.max(1) as f64
    }
}

/// A chunk of supervised rows.
pub struct ChunkView<'a> {
    /// The batch.
    pub layout: &'a Layout,
    /// The rows of the chunk and their labels.
    pub rows: &'a [Supervised],
}

/// How the loss of a chunk is to be computed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ChunkLoss {
    /// `sum_t weight_t * -log softmax(logits_t)[label_t]`, which the engine fuses with the head.
    CrossEntropy {
        /// One weight for each row of the chunk.
        weight_t: Vec<f64>,
    },
}

/// A loss.
pub trait Objective: Send + Sync {
    /// What the sum of losses is divided by.
    fn denominator(&self) -> Denominator;

    /// The loss of a chunk.
    ///
    /// # Errors
    /// A column that the data does not carry.
    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss>;
}
