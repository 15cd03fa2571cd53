//! The supported kinds of decoder, and where they differ.

use std::fmt;

/// A kind of decoder, named by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `llama`: Llama 1 to 3 and the many models of that form.
    Llama,
    /// `mistral`: sliding-window attention in all layers, if `sliding_window` is given.
    Mistral,
    /// `qwen2`: bias on q, k and v; sliding windows in some layers, if `use_sliding_window`.
    Qwen2,
}

/// How a family's attention windows are configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// Full causal attention everywhere.
    None,
    /// `sliding_window` holds for every layer.
    Every,
    /// `use_sliding_window` switches it on; `layer_types` or `max_window_layers` say where.
    ByLayer,
}

/// What a missing field means, and which fields are read at all; the values are those of Hugging Face's config classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FamilyRow {
    pub(crate) family: Family,
    pub(crate) name: &'static str,
    pub(crate) kv_heads: Option<u64>,
    pub(crate) max_position: u64,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    /// Bias on q, k, v whatever the file says.
    pub(crate) qkv_bias: bool,
    /// Whether `attention_bias` (q, k, v and o) and `mlp_bias` are read.
    pub(crate) bias_fields: bool,
    pub(crate) window: WindowRule,
}

pub(crate) const FAMILIES: &[FamilyRow] = &[
    FamilyRow {
        family: Family::Llama,
        name: "llama",
        kv_heads: None,
        max_position: 2048,
        bos: Some(1),
        eos: Some(2),
        qkv_bias: false,
        bias_fields: true,
        window: WindowRule::None,
    },
    FamilyRow {
        family: Family::Mistral,
        name: "mistral",
        kv_heads: Some(8),
        max_position: 131_072,
        bos: Some(1),
        eos: Some(2),
        qkv_bias: false,
        bias_fields: false,
        window: WindowRule::Every,
    },
    FamilyRow {
        family: Family::Qwen2,
        name: "qwen2",
        kv_heads: Some(32),
        max_position: 32_768,
        bos: None,
        eos: None,
        qkv_bias: true,
        bias_fields: false,
        window: WindowRule::ByLayer,
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

    /// The value of `model_type`.
    pub fn name(self) -> &'static str {
        FAMILIES.iter().find(|row| row.family == self).map_or("unknown", |row| row.name)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
