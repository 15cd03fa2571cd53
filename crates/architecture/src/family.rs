//! The supported kinds of model, and where they differ: a row of the table each.
//!
//! A model of the same mathematics is a row here and its module names in `modules`. OLMo-2 (norms after attention and MLP),
//! OPT (learned positions with offset 2, ReLU), GPT-NeoX (fused projections by head, parallel MLP), Phi and Gemma (parallel
//! blocks, scaled embeddings, norms of `1 + w`), Qwen2-MoE (an expert that every row goes through), RoBERTa (BERT with positions
//! from 2 and a dense layer in its classifier) and ModernBERT (windows in some layers, rotary, gated) each ask for one more column of `FamilyRow` and the place in [`crate::Architecture`] that it fills; T5, ViT and CLIP
//! for blocks of their own (cross-attention, patches).

use std::fmt;

use crate::activation::Activation;
use crate::decoder::{NormPlacement, Projections, QkNorm};
use crate::head::{HeadKind, Pooling};
use crate::modules::{self, Modules};

/// A kind of model, named by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `llama`: Llama 1 to 3 and the many models of that form.
    Llama,
    /// `mistral`: sliding-window attention in all layers, if `sliding_window` is given.
    Mistral,
    /// `qwen2`: bias on q, k and v; sliding windows in some layers, if `use_sliding_window`.
    Qwen2,
    /// `qwen3`: norms on the heads of queries and keys; windows as in Qwen2.
    Qwen3,
    /// `olmoe`: experts in place of the MLP, norms on whole queries and keys.
    Olmoe,
    /// `mixtral`: Mistral with experts in place of the MLP, whose weights add up to 1.
    Mixtral,
    /// `qwen3_moe`: Qwen3 with experts in place of the MLP in every layer.
    Qwen3Moe,
    /// `gpt2`: layer norm, learned positions, a plain MLP, one linear for q, k and v.
    Gpt2,
    /// `bert`: an encoder with norms after attention and MLP, token types and learned positions.
    Bert,
}

/// How a family's attention windows are configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// Full attention everywhere.
    None,
    /// `sliding_window` holds for every layer, a common width where it is missing.
    Every,
    /// `sliding_window` holds for every layer, where it is given.
    IfGiven,
    /// `use_sliding_window` switches it on; `layer_types` or `max_window_layers` say where.
    ByLayer,
}

/// How a family's rows know their position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PositionRule {
    /// `rope_theta`, `rope_scaling`, `rope_parameters`.
    Rope,
    /// A table of as many rows as the model declares positions, and this many before them.
    Learned { offset: u64 },
}

/// The names of fields that families spell differently.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldNames {
    pub(crate) hidden: &'static str,
    pub(crate) inner: &'static str,
    pub(crate) layers: &'static str,
    pub(crate) heads: &'static str,
    pub(crate) max_position: &'static str,
    pub(crate) eps: &'static str,
    pub(crate) activation: &'static str,
}

/// Which linears have a bias.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BiasRule {
    /// q, k and v whatever the file says.
    pub(crate) qkv: bool,
    /// o and the MLP whatever the file says.
    pub(crate) others: bool,
    /// Whether `attention_bias` (q, k, v and o) is read.
    pub(crate) attention_field: bool,
    /// Whether `mlp_bias` is read.
    pub(crate) mlp_field: bool,
}

/// How a family's experts are configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertRule {
    /// The fields that may hold their number, the usual one first, and the number where none does.
    pub(crate) count: (&'static [&'static str], u64),
    /// `num_experts_per_tok` where it is missing.
    pub(crate) per_token: u64,
    /// Whether the weights of a row's experts are made to add up to 1, where `norm_topk_prob` does not say so.
    pub(crate) normalised: bool,
    /// Whether `norm_topk_prob` is read.
    pub(crate) normalised_field: bool,
    /// `router_aux_loss_coef` where it is missing.
    pub(crate) balance: f64,
}

/// What a missing field means, and which fields are read at all; the values are those of Hugging Face's config classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FamilyRow {
    pub(crate) family: Family,
    pub(crate) name: &'static str,
    pub(crate) fields: &'static FieldNames,
    pub(crate) modules: &'static Modules,
    /// What the class names in `architectures` start with.
    pub(crate) class: &'static str,
    /// The head of a class that names none.
    pub(crate) head: HeadKind,
    pub(crate) causal: bool,
    /// Token types and a norm on the embedding.
    pub(crate) token_types: Option<u64>,
    /// Layer norm in place of root mean squares.
    pub(crate) layer_norm: bool,
    pub(crate) eps: f64,
    pub(crate) placement: NormPlacement,
    pub(crate) positions: PositionRule,
    pub(crate) qk_norm: QkNorm,
    pub(crate) projections: Projections,
    /// Gated MLP.
    pub(crate) gated: bool,
    pub(crate) activation: Activation,
    /// Experts in place of the MLP.
    pub(crate) experts: Option<ExpertRule>,
    /// The family that is this one with experts in place of the MLP, if there is one.
    pub(crate) with_experts: Option<Family>,
    /// Width inside the MLP as a multiple of the hidden width, where the field may be missing.
    pub(crate) inner_factor: Option<u64>,
    pub(crate) transposed: bool,
    pub(crate) bias: BiasRule,
    pub(crate) kv_heads: Option<u64>,
    pub(crate) head_dim: Option<u64>,
    pub(crate) max_position: u64,
    /// `rope_theta`.
    pub(crate) theta: f64,
    pub(crate) window: WindowRule,
    pub(crate) tied: bool,
    pub(crate) scaled_init: bool,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    /// Fields that change the mathematics in a way that is not supported: the one value that is.
    pub(crate) fixed: &'static [(&'static str, bool)],
    /// The same for words.
    pub(crate) words: &'static [(&'static str, &'static str)],
    /// The same for fields that have to be missing or null.
    pub(crate) absent: &'static [&'static str],
    /// The same for numbers that have to be the given one.
    pub(crate) numbers: &'static [(&'static str, f64)],
}

const LLAMA_FIELDS: FieldNames = FieldNames {
    hidden: "hidden_size",
    inner: "intermediate_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    max_position: "max_position_embeddings",
    eps: "rms_norm_eps",
    activation: "hidden_act",
};

const LLAMA: FamilyRow = FamilyRow {
    family: Family::Llama,
    name: "llama",
    fields: &LLAMA_FIELDS,
    modules: &modules::LLAMA,
    class: "Llama",
    head: HeadKind::Tokens,
    causal: true,
    token_types: None,
    layer_norm: false,
    eps: 1e-6,
    placement: NormPlacement::Pre,
    positions: PositionRule::Rope,
    qk_norm: QkNorm::None,
    projections: Projections::Separate,
    gated: true,
    activation: Activation::Silu,
    experts: None,
    with_experts: Some(Family::Mixtral),
    inner_factor: None,
    transposed: false,
    bias: BiasRule { qkv: false, others: false, attention_field: true, mlp_field: true },
    kv_heads: None,
    head_dim: None,
    max_position: 2048,
    theta: 10_000.0,
    window: WindowRule::None,
    tied: false,
    scaled_init: false,
    bos: Some(1),
    eos: Some(2),
    fixed: &[],
    words: &[],
    absent: &[],
    numbers: &[],
};

const QWEN2: FamilyRow = FamilyRow {
    family: Family::Qwen2,
    name: "qwen2",
    class: "Qwen2",
    with_experts: None,
    bias: BiasRule { qkv: true, others: false, attention_field: false, mlp_field: false },
    kv_heads: Some(32),
    max_position: 32_768,
    window: WindowRule::ByLayer,
    bos: None,
    eos: None,
    ..LLAMA
};

pub(crate) const FAMILIES: &[FamilyRow] = &[
    LLAMA,
    FamilyRow {
        family: Family::Mistral,
        name: "mistral",
        class: "Mistral",
        bias: BiasRule { qkv: false, others: false, attention_field: false, mlp_field: false },
        kv_heads: Some(8),
        max_position: 131_072,
        window: WindowRule::Every,
        ..LLAMA
    },
    QWEN2,
    FamilyRow {
        family: Family::Qwen3,
        name: "qwen3",
        class: "Qwen3",
        qk_norm: QkNorm::PerHead,
        bias: BiasRule { qkv: false, others: false, attention_field: true, mlp_field: false },
        head_dim: Some(128),
        with_experts: Some(Family::Qwen3Moe),
        ..QWEN2
    },
    FamilyRow {
        family: Family::Olmoe,
        name: "olmoe",
        class: "Olmoe",
        modules: &modules::OLMOE,
        eps: 1e-5,
        qk_norm: QkNorm::Whole,
        experts: Some(ExpertRule {
            count: (&["num_experts"], 64),
            per_token: 8,
            normalised: false,
            normalised_field: true,
            balance: 0.01,
        }),
        with_experts: None,
        bias: BiasRule { qkv: false, others: false, attention_field: true, mlp_field: false },
        max_position: 4096,
        bos: None,
        eos: Some(50_279),
        absent: &["clip_qkv"],
        ..LLAMA
    },
    FamilyRow {
        family: Family::Mixtral,
        name: "mixtral",
        class: "Mixtral",
        modules: &modules::MIXTRAL,
        eps: 1e-5,
        experts: Some(ExpertRule {
            count: (&["num_local_experts"], 8),
            per_token: 2,
            normalised: true,
            normalised_field: false,
            balance: 0.001,
        }),
        with_experts: None,
        bias: BiasRule { qkv: false, others: false, attention_field: false, mlp_field: false },
        kv_heads: Some(8),
        max_position: 131_072,
        theta: 1e6,
        window: WindowRule::IfGiven,
        numbers: &[("router_jitter_noise", 0.0)],
        ..LLAMA
    },
    FamilyRow {
        family: Family::Qwen3Moe,
        name: "qwen3_moe",
        class: "Qwen3Moe",
        fields: &FieldNames { inner: "moe_intermediate_size", ..LLAMA_FIELDS },
        modules: &modules::OLMOE,
        qk_norm: QkNorm::PerHead,
        experts: Some(ExpertRule {
            count: (&["num_experts", "num_local_experts"], 128),
            per_token: 8,
            normalised: false,
            normalised_field: true,
            balance: 0.001,
        }),
        with_experts: None,
        bias: BiasRule { qkv: false, others: false, attention_field: true, mlp_field: false },
        kv_heads: Some(4),
        max_position: 32_768,
        bos: None,
        eos: None,
        fixed: &[("use_sliding_window", false)],
        numbers: &[("decoder_sparse_step", 1.0)],
        ..LLAMA
    },
    FamilyRow {
        family: Family::Gpt2,
        name: "gpt2",
        class: "GPT2",
        fields: &FieldNames {
            hidden: "n_embd",
            inner: "n_inner",
            layers: "n_layer",
            heads: "n_head",
            max_position: "n_positions",
            eps: "layer_norm_epsilon",
            activation: "activation_function",
        },
        modules: &modules::GPT2,
        layer_norm: true,
        eps: 1e-5,
        positions: PositionRule::Learned { offset: 0 },
        projections: Projections::Fused,
        gated: false,
        with_experts: None,
        activation: Activation::GeluTanh,
        inner_factor: Some(4),
        transposed: true,
        bias: BiasRule { qkv: true, others: true, attention_field: false, mlp_field: false },
        max_position: 1024,
        tied: true,
        scaled_init: true,
        bos: Some(50_256),
        eos: Some(50_256),
        fixed: &[
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ],
        ..LLAMA
    },
    FamilyRow {
        family: Family::Bert,
        name: "bert",
        fields: &FieldNames { eps: "layer_norm_eps", ..LLAMA_FIELDS },
        modules: &modules::BERT,
        class: "Bert",
        head: HeadKind::Embedding(Pooling::Mean),
        causal: false,
        token_types: Some(2),
        layer_norm: true,
        eps: 1e-12,
        placement: NormPlacement::Post,
        positions: PositionRule::Learned { offset: 0 },
        gated: false,
        with_experts: None,
        activation: Activation::Gelu,
        bias: BiasRule { qkv: true, others: true, attention_field: false, mlp_field: false },
        max_position: 512,
        bos: None,
        eos: None,
        fixed: &[("is_decoder", false), ("add_cross_attention", false)],
        words: &[("position_embedding_type", "absolute")],
        ..LLAMA
    },
];

/// `sliding_window` of Mistral and Qwen2 when the field is missing.
pub(crate) const WINDOW_DEFAULT: u64 = 4096;
/// `max_window_layers` of Qwen2 when the field is missing.
pub(crate) const MAX_WINDOW_LAYERS_DEFAULT: u64 = 28;

impl Family {
    /// All supported families.
    pub fn all() -> impl Iterator<Item = Self> {
        FAMILIES.iter().map(|row| row.family)
    }

    /// Its row of the table.
    pub(crate) fn row(self) -> &'static FamilyRow {
        FAMILIES.iter().find(|row| row.family == self).unwrap_or(&LLAMA)
    }

    /// What the names of Hugging Face's classes start with, and how that of the model with a head over tokens goes on.
    pub(crate) fn class(self) -> (&'static str, &'static str) {
        (self.row().class, if self == Self::Gpt2 { "LMHeadModel" } else { "ForCausalLM" })
    }

    /// The value of `model_type`.
    pub fn name(self) -> &'static str {
        self.row().name
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
