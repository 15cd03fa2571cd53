//! Sites: the named places of a model that hold weights and can be adapted.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

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
    },
    /// A table of shape `[vocab, width]` of which rows are looked up.
    Embedding {
        /// Number of rows.
        vocab: usize,
        /// Width of a row.
        width: usize,
    },
    /// Root-mean-square normalisation with a scale of shape `[width]`.
    Norm {
        /// Width of the scale.
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
        }
    }

    /// Shape of the weight.
    pub fn weight_shape(&self) -> Vec<usize> {
        match *self {
            Self::Linear { output, input, .. } => vec![output, input],
            Self::Embedding { vocab, width } => vec![vocab, width],
            Self::Norm { width } => vec![width],
        }
    }

    /// Number of parameters: weight and bias.
    pub const fn parameters(&self) -> u64 {
        match *self {
            Self::Linear { output, input, bias } => output as u64 * input as u64 + if bias { output as u64 } else { 0 },
            Self::Embedding { vocab, width } => vocab as u64 * width as u64,
            Self::Norm { width } => width as u64,
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
    /// The decoder layer that it belongs to, from 0; none for the embedding, the last norm and the head.
    pub layer: Option<u32>,
    /// The same place in every layer: `q_proj`, `input_layernorm`, `embed_tokens`, `lm_head`, …
    pub role: &'static str,
}

impl Site {
    /// Output and input width of a linear; of an embedding, width and number of rows.
    pub const fn out_in(&self) -> Option<(usize, usize)> {
        match self.kind {
            SiteKind::Linear { output, input, .. } => Some((output, input)),
            SiteKind::Embedding { vocab, width } => Some((width, vocab)),
            SiteKind::Norm { .. } => None,
        }
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
    /// Its shape.
    pub shape: Vec<usize>,
    /// The site that it belongs to.
    pub site: SiteId,
    /// Which tensor of that site.
    pub part: TensorPart,
}
