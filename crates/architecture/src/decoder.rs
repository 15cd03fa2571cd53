//! The model: a table of tokens, layers of attention and MLP around one residual stream, and a head. An encoder is one whose
//! rows see all others. Families differ in what stands at each of these places, and [`Architecture`] says what.

use std::fmt;

use crate::activation::Activation;
use crate::error::Error;
use crate::family::Family;
use crate::head::HeadKind;
use crate::modules::Modules;
use crate::rope::Rope;
use crate::site::{Place, Site, SiteId, SiteKind, TensorInfo, TensorPart};

/// A model's structure. Built from a `config.json` only, so its fields are in range and agree with each other.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Architecture {
    /// The kind of model.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP, or inside each expert.
    pub inner: usize,
    /// Number of layers.
    pub layers: usize,
    /// Of a model that repeats layers of another, whose weights these share: which of that one's layers each is. `None` for a
    /// model of its own.
    pub origins: Option<Vec<u32>>,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even under rotary positions.
    pub head_dim: usize,
    /// Number of rows of the embedding and of a head over tokens.
    pub vocab: usize,
    /// What the model gives out.
    pub head: HeadKind,
    /// Length of context that the model declares.
    pub max_position: u64,
    /// How all norms are computed.
    pub norm: NormKind,
    /// Where the norms of a layer stand.
    pub placement: NormPlacement,
    /// How rows know their position.
    pub positions: Positions,
    /// Rows of a table of token types (first and second text), whose rows are added to the embedding.
    pub token_types: Option<usize>,
    /// Whether there is a norm on the embedding.
    pub embedding_norm: bool,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// How queries, keys and values are stored.
    pub projections: Projections,
    /// The MLP of a layer, or each expert.
    pub mlp: MlpKind,
    /// The experts of a layer, where each row goes through a few of several MLPs.
    pub experts: Option<Experts>,
    /// Whether a row sees itself and earlier ones only.
    pub causal: bool,
    /// For each layer the attention window: a row sees itself and `window - 1` rows before it; none is full attention, as
    /// wherever attention is not causal.
    pub windows: Vec<Option<u64>>,
    /// Whether the head's weight is the embedding's.
    pub tied: bool,
    /// Whether files hold the linears of layers as `[input, output]`.
    pub transposed: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub output_bias: bool,
    /// Whether the linears of the MLP have a bias.
    pub mlp_bias: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Whether fresh weights that write to the stream (o and down) are divided by `sqrt(2 layers)`.
    pub scaled_init: bool,
    /// Beginning-of-sequence ids.
    pub bos: Vec<u32>,
    /// End-of-sequence ids.
    pub eos: Vec<u32>,
    pub(crate) modules: &'static Modules,
}

/// A normalisation; `eps` keeps the divisor from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · w`.
    Rms {
        /// Added to the mean square.
        eps: f64,
    },
    /// `(x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · w + b`.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

impl NormKind {
    /// Whether it has a bias.
    pub const fn has_bias(&self) -> bool {
        matches!(self, Self::Layer { .. })
    }
}

/// Where the norms of a layer stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// `x + f(norm(x))`.
    Pre,
    /// `norm(x + f(x))`.
    Post,
}

/// How rows know their position in their document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Queries and keys are turned.
    Rope(Rope),
    /// A row of a trained table is added to the embedding; the table is the site [`Place::Positions`].
    Learned {
        /// Rows of the table.
        rows: usize,
        /// The row of position 0.
        offset: usize,
    },
}

impl Positions {
    /// The rotary embedding, if positions are turned.
    pub const fn rope(&self) -> Option<&Rope> {
        match self {
            Self::Rope(rope) => Some(rope),
            Self::Learned { .. } => None,
        }
    }

    /// Whether a document of `length` rows is rotated differently from a shorter one.
    pub fn changes_at(&self, length: usize) -> bool {
        self.rope().is_some_and(|rope| rope.changes_at(length))
    }

    /// The longest document that there are positions for, if there is such a bound.
    pub const fn longest(&self) -> Option<usize> {
        match *self {
            Self::Rope(_) => None,
            Self::Learned { rows, offset } => Some(rows - offset),
        }
    }
}

/// Norms on queries and keys, of the model's [`NormKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// There are none.
    None,
    /// Over each head, with one scale for all of them.
    PerHead,
    /// Over all heads together.
    Whole,
}

/// How queries, keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// One linear each.
    Separate,
    /// One linear whose outputs are all queries, then all keys, then all values.
    Fused,
}

/// The MLP of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(f(gate(x)) · up(x))`.
    Gated(Activation),
    /// `down(f(up(x)))`.
    Plain(Activation),
}

/// A mixture of experts in place of the MLP.
///
/// # Update
/// ```text
/// probs_te = softmax(h_td R_edᵀ)          R the router, E experts
/// y_td     = sum over the k likeliest e of  w_te MLP_e(h_td)        w = probs, or probs / their sum over those k
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Number of experts.
    pub count: usize,
    /// Experts that each row goes through.
    pub per_token: usize,
    /// Whether the weights of a row's experts are made to add up to 1.
    pub normalised: bool,
    /// What the load-balancing loss is multiplied by where it is used.
    pub balance: f64,
}

impl MlpKind {
    /// Its activation.
    pub const fn activation(&self) -> Activation {
        match *self {
            Self::Gated(activation) | Self::Plain(activation) => activation,
        }
    }
}

/// What a block computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlockKind {
    /// Token ids (with token types, learned positions and a norm, where there are such) to rows.
    Embedding,
    /// Norm, attention and residual of a layer.
    Attention {
        /// The layer, from 0.
        layer: u32,
    },
    /// Norm, MLP and residual of a layer.
    Mlp {
        /// The layer, from 0.
        layer: u32,
    },
    /// Norm, router, experts and residual of a layer.
    Experts {
        /// The layer, from 0.
        layer: u32,
    },
    /// Last norm, where norms come first, and head.
    Head,
}

impl fmt::Display for BlockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Attention { layer } => write!(f, "layers.{layer}.attention"),
            Self::Mlp { layer } => write!(f, "layers.{layer}.mlp"),
            Self::Experts { layer } => write!(f, "layers.{layer}.experts"),
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

impl BlockInfo {
    /// Its site at `place`; of several experts' the first one's.
    pub fn site(&self, place: Place) -> Option<&Site> {
        self.sites.iter().find(|site| site.place == place)
    }
}

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
        blocks.push(BlockInfo { kind: BlockKind::Embedding, sites: self.embedding_sites() });
        for layer in 0..self.layers as u32 {
            blocks.push(BlockInfo { kind: BlockKind::Attention { layer }, sites: self.attention_sites(layer) });
            blocks.push(match self.experts {
                None => BlockInfo { kind: BlockKind::Mlp { layer }, sites: self.mlp_sites(layer) },
                Some(_) => BlockInfo { kind: BlockKind::Experts { layer }, sites: self.mlp_sites(layer) },
            });
        }
        blocks.push(BlockInfo { kind: BlockKind::Head, sites: self.head_sites() });
        blocks
    }

    pub(crate) fn embedding_sites(&self) -> Vec<Site> {
        let table = |place, vocab| self.at(place, None, None, SiteKind::Embedding { vocab, width: self.hidden });
        let mut sites = vec![table(Place::Embedding, self.vocab)];
        if let Positions::Learned { rows, .. } = self.positions {
            sites.push(table(Place::Positions, rows));
        }
        sites.extend(self.token_types.map(|rows| table(Place::TokenTypes, rows)));
        if self.embedding_norm {
            sites.push(self.norm_at(Place::EmbeddingNorm, None, self.hidden));
        }
        sites
    }

    pub(crate) fn attention_sites(&self, layer: u32) -> Vec<Site> {
        let (query, kv, hidden) = (self.query_width(), self.kv_width(), self.hidden);
        let linear = |place, output, input, bias| self.linear_at(place, layer, None, [output, input], bias);
        let norm = |place, width| self.norm_at(place, Some(layer), width);
        let mut sites = match self.projections {
            Projections::Separate => vec![
                linear(Place::Query, query, hidden, self.qkv_bias),
                linear(Place::Key, kv, hidden, self.qkv_bias),
                linear(Place::Value, kv, hidden, self.qkv_bias),
            ],
            Projections::Fused => vec![linear(Place::QueryKeyValue, query + 2 * kv, hidden, self.qkv_bias)],
        };
        match self.qk_norm {
            QkNorm::None => {}
            QkNorm::PerHead => {
                sites.extend([norm(Place::QueryNorm, self.head_dim), norm(Place::KeyNorm, self.head_dim)]);
            }
            QkNorm::Whole => sites.extend([norm(Place::QueryNorm, query), norm(Place::KeyNorm, kv)]),
        }
        sites.push(linear(Place::Output, hidden, query, self.output_bias));
        self.whole(Place::Attention, layer, norm(Place::AttentionNorm, hidden), sites)
    }

    pub(crate) fn mlp_sites(&self, layer: u32) -> Vec<Site> {
        let hidden = self.hidden;
        let mut sites = Vec::new();
        match self.experts {
            None => self.push_mlp(&mut sites, layer, None),
            Some(Experts { count, .. }) => {
                sites.push(self.linear_at(Place::Router, layer, None, [count, hidden], false));
                (0..count as u32).for_each(|expert| self.push_mlp(&mut sites, layer, Some(expert)));
            }
        }
        self.whole(Place::Mlp, layer, self.norm_at(Place::MlpNorm, Some(layer), hidden), sites)
    }

    /// The linears of a layer's MLP or of one of its experts.
    fn push_mlp(&self, sites: &mut Vec<Site>, layer: u32, expert: Option<u32>) {
        let (hidden, inner) = (self.hidden, self.inner);
        let mut push = |place, o_i| sites.push(self.linear_at(place, layer, expert, o_i, self.mlp_bias));
        if matches!(self.mlp, MlpKind::Gated(_)) {
            push(Place::Gate, [inner, hidden]);
        }
        push(Place::Up, [inner, hidden]);
        push(Place::Down, [hidden, inner]);
    }

    /// The sites of a block in the order in which it uses them; the block itself is what is between norm and stream.
    fn whole(&self, place: Place, layer: u32, norm: Site, mut sites: Vec<Site>) -> Vec<Site> {
        sites.push(self.at(place, Some(layer), None, SiteKind::Block { width: self.hidden }));
        match self.placement {
            NormPlacement::Pre => sites.insert(0, norm),
            NormPlacement::Post => sites.push(norm),
        }
        sites
    }

    pub(crate) fn at(&self, place: Place, layer: Option<u32>, expert: Option<u32>, kind: SiteKind) -> Site {
        let (path, role) = self.modules.of(place, layer, expert);
        Site { id: path.into(), kind, layer, expert, place, role }
    }

    pub(crate) fn norm_at(&self, place: Place, layer: Option<u32>, width: usize) -> Site {
        self.at(place, layer, None, SiteKind::Norm { width, bias: self.norm.has_bias() })
    }

    fn linear_at(&self, place: Place, layer: u32, expert: Option<u32>, o_i: [usize; 2], bias: bool) -> Site {
        let kind = SiteKind::Linear { output: o_i[0], input: o_i[1], bias, transposed: self.transposed };
        self.at(place, Some(layer), expert, kind)
    }

    /// All sites in forward order. The list is built anew by each call: keep it.
    pub fn sites(&self) -> Vec<Site> {
        self.blocks().into_iter().flat_map(|block| block.sites).collect()
    }

    /// The site of this name.
    pub fn site(&self, id: &str) -> Option<Site> {
        self.sites().into_iter().find(|site| site.id.as_str() == id)
    }

    /// Standard deviation of a fresh matrix at `place`.
    pub fn initial_std(&self, place: Place) -> f64 {
        match place {
            Place::Output | Place::Down if self.scaled_init => {
                self.initializer_range / (2.0 * self.layers as f64).sqrt()
            }
            _ => self.initializer_range,
        }
    }

    /// The head's name and that of the table of tokens, if they are one matrix.
    pub fn tie(&self) -> Option<(SiteId, SiteId)> {
        let of = |place| SiteId::from(self.modules.of(place, None, None).0);
        self.tied.then(|| (of(Place::Head), of(Place::Embedding)))
    }

    /// The tensors that the model's files hold, in forward order. A tied head has none of its own.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let mut tensors = Vec::new();
        for Site { id, kind, place, .. } in self.sites() {
            if (self.tied && place == Place::Head) || matches!(kind, SiteKind::Block { .. }) {
                continue;
            }
            tensors.push(TensorInfo {
                name: id.weight(),
                shape: kind.weight_shape(),
                transposed: kind.transposed(),
                site: id.clone(),
                place,
                part: TensorPart::Weight,
            });
            if let Some(width) = kind.bias_width() {
                let (name, shape) = (id.bias(), vec![width]);
                let part = TensorPart::Bias;
                tensors.push(TensorInfo { name, shape, transposed: false, site: id, place, part });
            }
        }
        tensors
    }

    /// What the names of the trunk's modules begin with in a model with a head, and do not in one of the trunk alone.
    pub const fn trunk_prefix(&self) -> &'static str {
        self.modules.prefix
    }

    /// The names under which files may hold the tensor `name`, likeliest first: a folder of the trunk alone leaves out the
    /// prefix that the model with a head puts before it, and files from TensorFlow's time call a norm's tensors `gamma` and
    /// `beta`.
    pub fn spellings(&self, name: &str) -> Vec<String> {
        let old = [(".weight", ".gamma"), (".bias", ".beta")].into_iter().find_map(|(new, old)| {
            let module = name.strip_suffix(new).filter(|module| module.ends_with("LayerNorm"))?;
            Some(format!("{module}{old}"))
        });
        let with_prefix = std::iter::once(name.to_owned()).chain(old);
        let bare = |name: &String| name.strip_prefix(self.modules.prefix).map(str::to_owned);
        with_prefix.flat_map(|name| [bare(&name), Some(name)].into_iter().flatten().rev()).collect()
    }

    /// The pairs of tensors that are one: the name that is not in the files, and the one that stands for it.
    pub fn ties(&self) -> Vec<(String, String)> {
        self.tie().map(|(head, embedding)| (head.weight(), embedding.weight())).into_iter().collect()
    }
}
