//! The decoder: RMSNorm, rotary grouped-query attention and SwiGLU, layer upon layer.

use std::fmt;

use crate::error::Error;
use crate::family::Family;
use crate::rope::Rope;
use crate::site::{Site, SiteId, SiteKind, TensorInfo, TensorPart};

/// A model's structure. Built from a `config.json` only, so its fields are in range and agree with each other.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Architecture {
    /// The kind of decoder.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub inner: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Number of rows of the embedding and of the head.
    pub vocab: usize,
    /// Length of context that the model declares.
    pub max_position: u64,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// For each layer the attention window: a row sees itself and `window - 1` rows before it; none is full causal.
    pub windows: Vec<Option<u64>>,
    /// Whether the head's weight is the embedding's.
    pub tied: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Beginning-of-sequence ids.
    pub bos: Vec<u32>,
    /// End-of-sequence ids.
    pub eos: Vec<u32>,
}

/// What a block computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlockKind {
    /// Token ids to rows.
    Embedding,
    /// Norm, attention and residual of a layer.
    Attention {
        /// The layer, from 0.
        layer: u32,
    },
    /// Norm, SwiGLU and residual of a layer.
    Mlp {
        /// The layer, from 0.
        layer: u32,
    },
    /// Last norm and head.
    Head,
}

impl fmt::Display for BlockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Attention { layer } => write!(f, "layers.{layer}.attention"),
            Self::Mlp { layer } => write!(f, "layers.{layer}.mlp"),
            Self::Head => f.write_str("head"),
        }
    }
}

/// A block and its sites in the order in which it uses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// What it computes.
    pub kind: BlockKind,
    /// Its sites.
    pub sites: Vec<Site>,
}

/// The embedding's module path.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The last norm's module path.
pub const FINAL_NORM: &str = "model.norm";
/// The head's module path.
pub const HEAD: &str = "lm_head";

impl Architecture {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error`] naming every field at fault.
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        crate::config::read(json)
    }

    /// Width of all query heads together.
    pub const fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The blocks in forward order: embedding, attention and MLP of each layer, head.
    pub fn blocks(&self) -> Vec<BlockInfo> {
        let mut blocks = Vec::with_capacity(2 * self.layers + 2);
        let plain = |id: &str, kind, role| Site { id: id.into(), kind, layer: None, role };
        let (vocab, width) = (self.vocab, self.hidden);
        blocks.push(BlockInfo {
            kind: BlockKind::Embedding,
            sites: vec![plain(EMBEDDING, SiteKind::Embedding { vocab, width }, "embed_tokens")],
        });
        for layer in 0..self.layers as u32 {
            blocks.push(BlockInfo { kind: BlockKind::Attention { layer }, sites: self.attention_sites(layer) });
            blocks.push(BlockInfo { kind: BlockKind::Mlp { layer }, sites: self.mlp_sites(layer) });
        }
        blocks.push(BlockInfo {
            kind: BlockKind::Head,
            sites: vec![
                plain(FINAL_NORM, SiteKind::Norm { width }, "norm"),
                plain(HEAD, SiteKind::Linear { output: vocab, input: width, bias: false }, "lm_head"),
            ],
        });
        blocks
    }

    fn attention_sites(&self, layer: u32) -> Vec<Site> {
        let (query, kv, hidden) = (self.query_width(), self.kv_width(), self.hidden);
        let linear = |role, output, input, bias| {
            let id = SiteId::from(format!("model.layers.{layer}.self_attn.{role}"));
            Site { id, kind: SiteKind::Linear { output, input, bias }, layer: Some(layer), role }
        };
        vec![
            self.norm_site(layer, "input_layernorm"),
            linear("q_proj", query, hidden, self.qkv_bias),
            linear("k_proj", kv, hidden, self.qkv_bias),
            linear("v_proj", kv, hidden, self.qkv_bias),
            linear("o_proj", hidden, query, self.output_bias),
        ]
    }

    fn mlp_sites(&self, layer: u32) -> Vec<Site> {
        let (hidden, inner, bias) = (self.hidden, self.inner, self.mlp_bias);
        let linear = |role, output, input| {
            let id = SiteId::from(format!("model.layers.{layer}.mlp.{role}"));
            Site { id, kind: SiteKind::Linear { output, input, bias }, layer: Some(layer), role }
        };
        vec![
            self.norm_site(layer, "post_attention_layernorm"),
            linear("gate_proj", inner, hidden),
            linear("up_proj", inner, hidden),
            linear("down_proj", hidden, inner),
        ]
    }

    fn norm_site(&self, layer: u32, role: &'static str) -> Site {
        let id = SiteId::from(format!("model.layers.{layer}.{role}"));
        Site { id, kind: SiteKind::Norm { width: self.hidden }, layer: Some(layer), role }
    }

    /// All sites in forward order. The list is built anew by each call: keep it.
    pub fn sites(&self) -> Vec<Site> {
        self.blocks().into_iter().flat_map(|block| block.sites).collect()
    }

    /// The site of this name.
    pub fn site(&self, id: &str) -> Option<Site> {
        self.sites().into_iter().find(|site| site.id.as_str() == id)
    }

    /// The tensors that the model's files hold, in forward order. A tied head has none of its own.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let mut tensors = Vec::new();
        for site in self.sites() {
            if self.tied && site.id.as_str() == HEAD {
                continue;
            }
            let shape = site.kind.weight_shape();
            if let SiteKind::Linear { output, bias: true, .. } = site.kind {
                let (name, site) = (site.id.bias(), site.id.clone());
                let bias = TensorInfo { name, shape: vec![output], site, part: TensorPart::Bias };
                tensors.push(TensorInfo {
                    name: bias.site.weight(),
                    shape,
                    site: bias.site.clone(),
                    part: TensorPart::Weight,
                });
                tensors.push(bias);
            } else {
                tensors.push(TensorInfo { name: site.id.weight(), shape, site: site.id, part: TensorPart::Weight });
            }
        }
        tensors
    }

    /// The pairs of tensors that are one: the name that is not in the files, and the one that stands for it.
    pub fn ties(&self) -> Vec<(String, String)> {
        if self.tied { vec![(format!("{HEAD}.weight"), format!("{EMBEDDING}.weight"))] } else { Vec::new() }
    }
}
