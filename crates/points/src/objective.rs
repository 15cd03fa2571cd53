//! The point `Objective`: layout and outputs to loss.
//!
//! The logits of a whole batch never exist. An objective of level [`Level::Chunk`] sees one chunk of supervised rows at a
//! time. Above that, a first sweep of the head finds the log-probability of every supervised row's label, the objective
//! turns those of a scope (a document, a group of documents, a whole part) into a loss and its gradient by each, and a
//! second sweep takes that gradient to the model. Where documents have vectors and no logits, the objective turns those of a part or
//! of a whole step into losses and their gradient by each.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use crate::error::{Error, Result};
use crate::layout::{LabelCounts, Layout, Supervised};

/// How much of a part an objective sees at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Level {
    /// Some supervised rows: losses that are sums over rows.
    #[default]
    Chunk,
    /// A document.
    Document,
    /// All documents of a group: the answers of a pair, the samples of a prompt. They follow each other in the layout.
    Group,
    /// All documents of a part.
    Part,
    /// All documents of an optimiser step, of all micro-batches on all ranks.
    Step,
}

/// What the sum of an objective's losses is divided by; known for the whole optimiser step (all micro-batches, all ranks)
/// before the first backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denominator {
    /// The number of supervised tokens.
    Tokens,
    /// The number of documents with a supervised token.
    Documents,
    /// The number of groups with a supervised token.
    Groups,
}

impl Denominator {
    /// The divisor for a step with these counts, at least 1.
    pub fn of(self, counts: LabelCounts) -> f64 {
        let count = match self {
            Self::Tokens => counts.tokens,
            Self::Documents => counts.documents,
            Self::Groups => counts.groups,
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

/// A loss of each row of a chunk by its logits.
pub trait LogitsLoss: fmt::Debug + Send + Sync {
    /// Losses `[C]` by `logits_cv`, which is in f32 or f64, in differentiable operations only. Of an objective with copies
    /// they are the logits of each copy of the rows, one copy after the other, `[copies C, V]`.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor>;
}

/// How the loss of a chunk is to be computed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ChunkLoss {
    /// `sum_t weight_t * -log softmax(logits_t)[label_t]`, which the engine fuses with the head.
    CrossEntropy {
        /// One weight for each row of the chunk.
        weight_t: Vec<f64>,
    },
    /// The sum of these losses of the chunk's rows. Its gradient is that of the graph.
    Logits(Arc<dyn LogitsLoss>),
}

/// The vectors of a part's documents, or of a whole step's.
pub struct VectorsView<'a> {
    /// The batch.
    pub layout: &'a Layout,
    /// A vector for each document, `[N, D]`, in f32 or f64.
    pub y_nd: &'a Tensor,
}

/// The losses that vectors have.
#[derive(Debug, Clone)]
pub struct VectorsLoss {
    /// The loss of each document; 0 of those without.
    pub loss_n: Vec<f64>,
    /// The gradient of their sum by each vector, `[N, D]` in the type of the vectors.
    pub dy_nd: Tensor,
    /// Further numbers by name, to be averaged as the loss is.
    pub beside: Vec<(&'static str, f64)>,
}

/// What a first sweep found of a scope.
pub struct ScopeView<'a> {
    /// The batch.
    pub layout: &'a Layout,
    /// The scope's documents among the layout's.
    pub docs: Range<usize>,
    /// Its supervised rows and their labels; at least one.
    pub rows: &'a [Supervised],
    /// The log-probability of each of the labels.
    pub logp_t: &'a [f64],
    /// The same under the reference; empty unless the objective needs it.
    pub reference_t: &'a [f64],
}

impl ScopeView<'_> {
    /// Which of the scope's supervised rows belong to a document (one of `docs`).
    pub fn rows_of(&self, doc: usize) -> Range<usize> {
        let rows = &self.layout.docs()[doc].rows;
        let at = |row: u32| self.rows.partition_point(|supervised| supervised.row < row);
        at(rows.start)..at(rows.end)
    }
}

/// The loss of a scope.
#[derive(Debug, Clone, PartialEq)]
pub struct ScopeLoss {
    /// The loss.
    pub loss: f64,
    /// Its gradient by the log-probability of each of the scope's rows.
    pub dlogp_t: Vec<f64>,
    /// Further numbers by name, to be averaged as the loss is.
    pub beside: Vec<(&'static str, f64)>,
}

impl ScopeLoss {
    /// The loss that `graph` makes of the log-probabilities, `[t]` in f64 to a number, and its gradient.
    ///
    /// # Errors
    /// Whatever the operations raise; [`Error::Refused`] if the loss does not depend on the log-probabilities.
    pub fn by_graph(logp_t: &[f64], graph: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let leaf = Var::from_tensor(&Tensor::new(logp_t, &Device::Cpu)?)?;
        let loss = graph(leaf.as_tensor())?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(leaf.as_tensor());
        let gradient = gradient.ok_or_else(|| {
            Error::Refused("a loss does not depend on the log-probabilities that it was given".to_owned())
        })?;
        let loss = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        Ok(Self { loss, dlogp_t: gradient.to_vec1::<f64>()?, beside: Vec::new() })
    }
}

/// Answers that a model gives to the prompts of a batch by itself, before the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answers {
    /// How many to each prompt.
    pub each: u16,
    /// The most tokens of one, the one that ends it included.
    pub max_tokens: u32,
    /// How tokens are chosen: 0 takes the likeliest.
    pub temperature: f64,
    /// The smallest set of tokens whose probabilities reach this sum is sampled from.
    pub top_p: f64,
    /// Whether those that reached the limit teach nothing.
    pub finished_only: bool,
}

/// What an objective needs beside the batch and the model's own outputs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Needs {
    /// The log-probabilities of labels under a reference: the model as it is without what trains. They come in the column
    /// [`crate::layout::REFERENCE`], from whoever has them.
    pub reference: bool,
    /// Pairs: documents of which each group is a chosen answer and a rejected one.
    pub pairs: bool,
    /// Vectors of documents, in the place of logits: the loss is [`Objective::vectors`], of level [`Level::Part`] or [`Level::Step`].
    pub vectors: bool,
    /// Rows are prompts: what is learned of them are the model's own answers, which are a group, with their rewards in the
    /// column [`crate::layout::REWARD`].
    pub answers: Option<Answers>,
}

/// A loss.
pub trait Objective: Send + Sync {
    /// How much it sees at once.
    fn level(&self) -> Level {
        Level::Chunk
    }

    /// What it needs beside the batch.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// What the sum of losses is divided by.
    fn denominator(&self) -> Denominator;

    /// How many times the batch holds its documents ([`Layout::with_copies`]). A chunk is then of rows of the first, and its loss
    /// is one by the logits of all copies of these rows. Asked of level [`Level::Chunk`] only.
    fn copies(&self) -> usize {
        1
    }

    /// The loss of a chunk. Asked of level [`Level::Chunk`] only.
    ///
    /// # Errors
    /// A column that the data does not carry.
    fn chunk(&self, _chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Err(Error::Refused(format!("an objective of level {:?} has no loss of a chunk", self.level())))
    }

    /// The losses of vectors. Asked of objectives that need such only.
    ///
    /// # Errors
    /// A view or a column that the data does not carry; whatever its operations raise.
    fn vectors(&self, _vectors: &VectorsView<'_>) -> Result<VectorsLoss> {
        Err(Error::Refused("this objective compares no vectors".to_owned()))
    }

    /// The loss of a scope. Asked of levels above [`Level::Chunk`].
    ///
    /// # Errors
    /// A column, a view or a document that the data does not carry.
    fn scope(&self, _scope: &ScopeView<'_>) -> Result<ScopeLoss> {
        Err(Error::Refused(format!("an objective of level {:?} has no loss of a scope", self.level())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{NO_LABEL, Row, Source};

    #[test]
    fn a_scope_knows_the_rows_of_its_documents_and_the_gradient_of_a_graph() {
        let mut layout = Layout::new();
        layout.push(Source::default(), [(Row::Token(1), NO_LABEL), (Row::Token(2), 3)]);
        layout.push(Source::default(), [(Row::Token(1), 2), (Row::Token(2), 3), (Row::Token(3), NO_LABEL)]);
        let rows = layout.supervised();
        let scope =
            ScopeView { layout: &layout, docs: 0..2, rows: &rows, logp_t: &[-1.0, -2.0, -3.0], reference_t: &[] };
        assert_eq!((scope.rows_of(0), scope.rows_of(1)), (0..1, 1..3));
        let loss = ScopeLoss::by_graph(scope.logp_t, |logp_t| Ok(logp_t.sqr()?.sum_all()?)).unwrap();
        assert_eq!(loss, ScopeLoss { loss: 14.0, dlogp_t: vec![-2.0, -4.0, -6.0], beside: Vec::new() });
        let constant = ScopeLoss::by_graph(scope.logp_t, |_| Ok(Tensor::new(1.0f64, &Device::Cpu)?));
        assert!(constant.unwrap_err().to_string().contains("does not depend"));
    }

    #[test]
    fn a_scoped_objective_refuses_chunks() {
        struct Scoped;
        impl Objective for Scoped {
            fn level(&self) -> Level {
                Level::Group
            }
            fn denominator(&self) -> Denominator {
                Denominator::Groups
            }
        }
        let layout = Layout::new();
        let error = Scoped.chunk(&ChunkView { layout: &layout, rows: &[] }).unwrap_err();
        assert_eq!(error.to_string(), "an objective of level Group has no loss of a chunk");
        let counts = LabelCounts { tokens: 9, documents: 4, groups: 2 };
        assert_eq!(Scoped.denominator().of(counts), 2.0);
    }
}
