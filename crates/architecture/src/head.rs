//! What stands above the trunk: a vocabulary, classes, or a vector per document.

use attune_spec::Fault;
use attune_spec::job::{HeadPooling, HeadSpec, HeadTask};

use crate::decoder::{Architecture, NormPlacement};
use crate::site::{Place, Site, SiteKind};

/// What a model gives out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadKind {
    /// Logits over the vocabulary, for every row.
    Tokens,
    /// Logits over classes, for one row of each document: the label on that row is the document's class. Encoders with a
    /// pooler put it and a tanh before the classifier.
    Sequence {
        /// Number of classes.
        labels: usize,
        /// The document's row.
        row: PooledRow,
    },
    /// Logits over classes, for every row.
    Rows {
        /// Number of classes.
        labels: usize,
    },
    /// A vector per document, without weights of its own.
    Embedding(Pooling),
}

/// The row that stands for its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PooledRow {
    /// The first, where encoders have their `[CLS]`.
    First,
    /// The last, the only one that has seen a whole document under causal attention.
    Last,
}

/// How the rows of a document become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// One row.
    Row(PooledRow),
}

impl HeadKind {
    /// Number of logits, of a head that has any.
    pub const fn labels(&self) -> Option<usize> {
        match *self {
            Self::Sequence { labels, .. } | Self::Rows { labels } => Some(labels),
            Self::Tokens | Self::Embedding(_) => None,
        }
    }
}

impl Architecture {
    /// The same trunk under another head.
    ///
    /// # Errors
    /// A head that this family has no modules for.
    pub fn with_head(mut self, head: HeadKind) -> Result<Self, Fault> {
        let needed = match head {
            HeadKind::Tokens => Some(Place::Head),
            HeadKind::Sequence { .. } | HeadKind::Rows { .. } => Some(Place::Classifier),
            HeadKind::Embedding(_) => None,
        };
        if needed.is_some_and(|place| !self.modules.has(place)) {
            return Err(Fault::new("head", format!("is {head:?}, which models of family {} do not have", self.family)));
        }
        self.tied &= head == HeadKind::Tokens;
        self.head = head;
        Ok(self)
    }

    /// The same trunk under a job's head. A document's class is asked of its first row where rows see all others, else of its last.
    ///
    /// # Errors
    /// A head that this family has no modules for; windows where rows are to see all others.
    pub fn over(self, spec: &HeadSpec) -> Result<Self, Fault> {
        let labels = spec.labels.len();
        let row = if self.causal { PooledRow::Last } else { PooledRow::First };
        let head = match spec.task {
            HeadTask::Classification => HeadKind::Sequence { labels, row },
            HeadTask::TokenClassification => HeadKind::Rows { labels },
            HeadTask::Embedding => HeadKind::Embedding(match spec.pooling.unwrap_or_default() {
                HeadPooling::Mean => Pooling::Mean,
                HeadPooling::First => Pooling::Row(PooledRow::First),
                HeadPooling::Last => Pooling::Row(PooledRow::Last),
            }),
        };
        let family = self.family;
        let trunk = if spec.bidirectional && self.causal {
            // Models that are told so otherwise keep their windows, on both sides of a row.
            if self.windows.iter().flatten().any(|window| *window < self.max_position) {
                let message = "is true, but rows of this model see a part of their document only, by its windows";
                return Err(Fault::new("tune.head.bidirectional", message));
            }
            self.bidirectional()
        } else {
            self
        };
        trunk.with_head(head).map_err(|_| {
            Fault::new("tune.head", format!("is given, but models of family {family} have no classifier here"))
        })
    }

    /// The same model with rows that see all rows of their document, as encoders' do, without windows.
    #[must_use]
    pub fn bidirectional(mut self) -> Self {
        self.causal = false;
        self.windows.fill(None);
        self
    }

    /// The name of Hugging Face's class for this model, as `architectures` in `config.json` has it.
    pub fn class_name(&self) -> String {
        let (class, tokens) = self.family.class();
        match self.head {
            HeadKind::Tokens => format!("{class}{tokens}"),
            HeadKind::Sequence { .. } => format!("{class}ForSequenceClassification"),
            HeadKind::Rows { .. } => format!("{class}ForTokenClassification"),
            HeadKind::Embedding(_) => format!("{class}Model"),
        }
    }

    /// Number of logits of a row: the vocabulary, or the classes; 0 for a head without logits.
    pub const fn logits_width(&self) -> usize {
        match self.head {
            HeadKind::Tokens => self.vocab,
            HeadKind::Sequence { labels, .. } | HeadKind::Rows { labels } => labels,
            HeadKind::Embedding(_) => 0,
        }
    }

    pub(crate) fn head_sites(&self) -> Vec<Site> {
        let (input, width) = (self.hidden, self.hidden);
        let linear = |place, output, bias| {
            self.at(place, None, None, SiteKind::Linear { output, input, bias, transposed: false })
        };
        let mut sites = Vec::new();
        // Where norms come last, the last layer's is the last.
        if self.placement == NormPlacement::Pre {
            sites.push(self.norm_at(Place::FinalNorm, None, width));
        }
        match self.head {
            HeadKind::Tokens => sites.push(linear(Place::Head, self.vocab, false)),
            HeadKind::Sequence { labels, .. } => {
                let pooler = self.modules.has(Place::Pooler);
                sites.extend(pooler.then(|| linear(Place::Pooler, width, true)));
                // Encoders' classifiers have a bias; the scores of decoders have none.
                sites.push(linear(Place::Classifier, labels, pooler));
            }
            HeadKind::Rows { labels } => sites.push(linear(Place::Classifier, labels, true)),
            HeadKind::Embedding(_) => {}
        }
        sites
    }
}
