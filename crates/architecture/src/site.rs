//! Sites: the named places of a model that hold weights and can be adapted.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::decoder::Architecture;
use attune_spec::method;
use serde::{Deserialize, Serialize};

/// A site's name: its Hugging Face module path, `model.layers.3.self_attn.q_proj`. Cheap to clone; ordered as text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SiteId(Arc<str>);

impl SiteId {
    /// A site of this module path.
    pub fn new(path: impl Into<Arc<str>>) -> Self {
        Self(path.into())
    }

    /// The module path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last component of the path, `q_proj`.
    pub fn module(&self) -> &str {
        self.0.rsplit('.').next().unwrap_or(&self.0)
    }

    /// The name of this site's weight in a safetensors file.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.0)
    }

    /// The name of this site's bias in a safetensors file.
    pub fn bias(&self) -> String {
        format!("{}.bias", self.0)
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for SiteId {
    fn from(path: &str) -> Self {
        Self(path.into())
    }
}

impl From<String> for SiteId {
    fn from(path: String) -> Self {
        Self(path.into())
    }
}

impl AsRef<str> for SiteId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for SiteId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What a site computes, with the sizes of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// `y = x Wᵀ (+ b)` with `W` of shape `[output, input]`.
    Linear {
        /// Width of `y`.
        output: usize,
        /// Width of `x`.
        input: usize,
        /// Whether there is a bias of shape `[output]`.
        bias: bool,
        /// Whether files hold `W` as `[input, output]`, as GPT-2's `Conv1D` does and as PEFT's `fan_in_fan_out` says.
        /// Everybody but the files sees `[output, input]`.
        transposed: bool,
    },
    /// A table of shape `[vocab, width]` of which rows are looked up.
    Embedding {
        /// Number of rows.
        vocab: usize,
        /// Width of a row.
        width: usize,
    },
    /// Normalisation with a scale of shape `[width]`.
    Norm {
        /// Width of the scale.
        width: usize,
        /// Whether there is a bias of the same shape.
        bias: bool,
    },
    /// A whole attention or MLP between two points of the residual stream: rows of the stream's width in and out, no tensors
    /// of its own.
    Block {
        /// Width of the stream.
        width: usize,
    },
}

impl SiteKind {
    /// The word for it in messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Embedding { .. } => "embedding",
            Self::Norm { .. } => "norm",
            Self::Block { .. } => "block",
        }
    }

    /// Shape of the weight; empty for a block, which has none.
    pub fn weight_shape(&self) -> Vec<usize> {
        match *self {
            Self::Linear { output, input, .. } => vec![output, input],
            Self::Embedding { vocab, width } => vec![vocab, width],
            Self::Norm { width, .. } => vec![width],
            Self::Block { .. } => Vec::new(),
        }
    }

    /// Width of the bias, if there is one.
    pub const fn bias_width(&self) -> Option<usize> {
        match *self {
            Self::Linear { output, bias: true, .. } => Some(output),
            Self::Norm { width, bias: true } => Some(width),
            Self::Linear { .. } | Self::Embedding { .. } | Self::Norm { .. } | Self::Block { .. } => None,
        }
    }

    /// Whether files hold the weight transposed.
    pub const fn transposed(&self) -> bool {
        matches!(self, Self::Linear { transposed: true, .. })
    }

    /// Number of parameters: weight and bias.
    pub const fn parameters(&self) -> u64 {
        let weight = match *self {
            Self::Linear { output, input, .. } => output as u64 * input as u64,
            Self::Embedding { vocab, width } => vocab as u64 * width as u64,
            Self::Norm { width, .. } => width as u64,
            Self::Block { .. } => 0,
        };
        match self.bias_width() {
            Some(width) => weight + width as u64,
            None => weight,
        }
    }
}

/// What a site is to its block: the same word whatever a family calls the module. A block finds its sites by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The table of tokens.
    Embedding,
    /// The table of learned positions.
    Positions,
    /// The table of token types.
    TokenTypes,
    /// On the embedding.
    EmbeddingNorm,
    /// Attention as a whole.
    Attention,
    /// Before attention, or after it where norms come last.
    AttentionNorm,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Queries, keys and values in one linear, one after the other.
    QueryKeyValue,
    /// On queries, before they are turned.
    QueryNorm,
    /// On keys, before they are turned.
    KeyNorm,
    /// From the heads back to the stream.
    Output,
    /// The MLP, or the mixture of experts, as a whole.
    Mlp,
    /// Before the MLP, or after it where norms come last.
    MlpNorm,
    /// Logits of experts.
    Router,
    /// The half of a gated MLP, or of an expert, that goes through the activation.
    Gate,
    /// Into the MLP or the expert.
    Up,
    /// Out of the MLP or the expert.
    Down,
    /// Before the head.
    FinalNorm,
    /// Logits over tokens.
    Head,
    /// Before a classifier of documents, with a tanh.
    Pooler,
    /// Logits over classes.
    Classifier,
}

impl Place {
    /// Whether the matrix there may be held in few bits: of the linears of attentions and MLPs, those of experts among them. Tables,
    /// heads and routers stay as they are, for little would be won and much lost.
    pub const fn quantizes(self) -> bool {
        match self {
            Self::Query
            | Self::Key
            | Self::Value
            | Self::QueryKeyValue
            | Self::Output
            | Self::Gate
            | Self::Up
            | Self::Down => true,
            Self::Embedding
            | Self::Positions
            | Self::TokenTypes
            | Self::EmbeddingNorm
            | Self::Attention
            | Self::AttentionNorm
            | Self::QueryNorm
            | Self::KeyNorm
            | Self::Mlp
            | Self::MlpNorm
            | Self::Router
            | Self::FinalNorm
            | Self::Head
            | Self::Pooler
            | Self::Classifier => false,
        }
    }
}

/// A place in a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its module path.
    pub id: SiteId,
    /// What it computes.
    pub kind: SiteKind,
    /// The decoder layer that it belongs to, from 0; none for the embedding and the head.
    pub layer: Option<u32>,
    /// The expert of the layer that it belongs to, from 0.
    pub expert: Option<u32>,
    /// What it is to its block.
    pub place: Place,
    /// The shortest end of the path that means this place in every layer (and expert) and no other: `q_proj`, `attn.c_proj`,
    /// `embed_tokens`, …
    pub role: &'static str,
}

impl Site {
    /// Output and input width of a linear; of an embedding, width and number of rows; of a block, the stream's width twice.
    pub const fn out_in(&self) -> Option<(usize, usize)> {
        match self.kind {
            SiteKind::Linear { output, input, .. } => Some((output, input)),
            SiteKind::Embedding { vocab, width } => Some((width, vocab)),
            SiteKind::Norm { .. } => None,
            SiteKind::Block { width } => Some((width, width)),
        }
    }

    /// What expressions of cards call its sizes: input and output width `i` and `o`, the widths `d` of the model's stream and `k` of its
    /// keys, the heads `h` of an attention, the layers of the model (`model_layers`), whether it has a bias (`b`), leads out of an MLP (`down`) or of that or an attention (`out`), is a `table`, or an attention as a whole
    /// (`attention`), as 0 or 1. A norm's scale and bias are one column.
    pub fn sizes(&self, architecture: &Architecture) -> serde_json::Map<String, serde_json::Value> {
        let (output, input) = self.out_in().unwrap_or_else(|| (self.kind.parameters() as usize, 1));
        let bias = matches!(self.kind, SiteKind::Linear { bias: true, .. });
        let sizes = [
            ("i", input),
            ("o", output),
            ("d", architecture.hidden),
            ("k", architecture.kv_width()),
            ("h", architecture.heads),
            ("model_layers", architecture.layers),
            ("b", usize::from(bias)),
            ("down", usize::from(self.place == Place::Down)),
            ("table", usize::from(matches!(self.kind, SiteKind::Embedding { .. }))),
            ("attention", usize::from(self.place == Place::Attention)),
            ("out", usize::from(matches!(self.place, Place::Output | Place::Down))),
        ];
        sizes.map(|(name, size)| (name.to_owned(), size.into())).into_iter().collect()
    }
}

impl Site {
    /// Whether it is a linear that reads the very rows that another of the same model reads: queries, keys and values do, and the
    /// halves of a gated MLP.
    pub fn reads_with(&self, other: &Self) -> bool {
        if !matches!(self.kind, SiteKind::Linear { .. }) || !matches!(other.kind, SiteKind::Linear { .. }) {
            return false;
        }
        let together: &[Place] = match self.place {
            Place::Query | Place::Key | Place::Value => &[Place::Query, Place::Key, Place::Value],
            Place::Gate | Place::Up => &[Place::Gate, Place::Up],
            _ => return self.id == other.id,
        };
        let block = |site: &Self| site.id.as_str().len() - site.id.module().len();
        let same_block = self.id.as_str()[..block(self)] == other.id.as_str()[..block(other)];
        together.contains(&other.place) && same_block
    }

    /// What a method has to apply to, to be put on it.
    pub const fn offers(&self) -> method::SiteKind {
        match (self.kind, self.place) {
            (SiteKind::Linear { .. }, _) => method::SiteKind::Linear,
            (SiteKind::Embedding { .. }, _) => method::SiteKind::Embedding,
            (SiteKind::Norm { .. }, _) => method::SiteKind::Norm,
            (SiteKind::Block { .. }, Place::Attention) => method::SiteKind::Attention,
            (SiteKind::Block { .. }, _) => method::SiteKind::Mlp,
        }
    }

    /// The local names of its own tensors: `weight`, and `bias` where it has one; a block has none.
    pub const fn locals(&self) -> &'static [&'static str] {
        if matches!(self.kind, SiteKind::Block { .. }) {
            return &[];
        }
        if self.kind.bias_width().is_some() { &["weight", "bias"] } else { &["weight"] }
    }
}

/// Which tensor of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorPart {
    /// `<site>.weight`.
    Weight,
    /// `<site>.bias`.
    Bias,
}

/// A tensor that the files of a model must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in safetensors files.
    pub name: String,
    /// Its shape as everybody but the files sees it.
    pub shape: Vec<usize>,
    /// Whether files hold the transpose.
    pub transposed: bool,
    /// The site that it belongs to.
    pub site: SiteId,
    /// What that site is to its block.
    pub place: Place,
    /// Which tensor of that site.
    pub part: TensorPart,
}

impl TensorInfo {
    /// Its shape in files.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}
