//! What each family calls its modules: the table from a [`Place`] to a Hugging Face module path.

use crate::site::Place;

/// A module: its place, its path with `{}` for the layer (and a second one for the expert), and the end of the path that
/// names it in every layer.
type Module = (Place, &'static str, &'static str);

/// The modules of a family.
#[derive(Debug)]
pub(crate) struct Modules {
    /// What the paths of everything but the head start with. A file of the trunk alone leaves it out.
    pub(crate) prefix: &'static str,
    modules: &'static [Module],
}

impl Modules {
    /// The path and the role of the module at `place`, in `layer` and of `expert` where it has them.
    ///
    /// # Panics
    /// If the family has no such place: its row in the table of families asks for one that its modules lack.
    pub(crate) fn of(&self, place: Place, layer: Option<u32>, expert: Option<u32>) -> (String, &'static str) {
        let found = self.modules.iter().find(|module| module.0 == place);
        let Some((_, path, role)) = found else { panic!("no module of this family is its {place:?}") };
        let numbers = layer.into_iter().chain(expert);
        let path = numbers.fold((*path).to_owned(), |path, number| path.replacen("{}", &number.to_string(), 1));
        (path, role)
    }
}

impl Modules {
    /// Whether the family has a module at `place`.
    pub(crate) fn has(&self, place: Place) -> bool {
        self.modules.iter().any(|module| module.0 == place)
    }
}

impl PartialEq for Modules {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// Llama, Mistral, Qwen2 and Qwen3.
pub(crate) static LLAMA: Modules = Modules {
    prefix: "model.",
    modules: &[
        (Place::Embedding, "model.embed_tokens", "embed_tokens"),
        (Place::Attention, "model.layers.{}.self_attn", "self_attn"),
        (Place::AttentionNorm, "model.layers.{}.input_layernorm", "input_layernorm"),
        (Place::Query, "model.layers.{}.self_attn.q_proj", "q_proj"),
        (Place::Key, "model.layers.{}.self_attn.k_proj", "k_proj"),
        (Place::Value, "model.layers.{}.self_attn.v_proj", "v_proj"),
        (Place::QueryNorm, "model.layers.{}.self_attn.q_norm", "q_norm"),
        (Place::KeyNorm, "model.layers.{}.self_attn.k_norm", "k_norm"),
        (Place::Output, "model.layers.{}.self_attn.o_proj", "o_proj"),
        (Place::Mlp, "model.layers.{}.mlp", "mlp"),
        (Place::MlpNorm, "model.layers.{}.post_attention_layernorm", "post_attention_layernorm"),
        (Place::Gate, "model.layers.{}.mlp.gate_proj", "gate_proj"),
        (Place::Up, "model.layers.{}.mlp.up_proj", "up_proj"),
        (Place::Down, "model.layers.{}.mlp.down_proj", "down_proj"),
        (Place::FinalNorm, "model.norm", "norm"),
        (Place::Head, "lm_head", "lm_head"),
        (Place::Classifier, "score", "score"),
    ],
};

/// OLMoE and Qwen3-MoE.
pub(crate) static OLMOE: Modules = Modules {
    prefix: "model.",
    modules: &[
        (Place::Embedding, "model.embed_tokens", "embed_tokens"),
        (Place::Attention, "model.layers.{}.self_attn", "self_attn"),
        (Place::AttentionNorm, "model.layers.{}.input_layernorm", "input_layernorm"),
        (Place::Query, "model.layers.{}.self_attn.q_proj", "q_proj"),
        (Place::Key, "model.layers.{}.self_attn.k_proj", "k_proj"),
        (Place::Value, "model.layers.{}.self_attn.v_proj", "v_proj"),
        (Place::QueryNorm, "model.layers.{}.self_attn.q_norm", "q_norm"),
        (Place::KeyNorm, "model.layers.{}.self_attn.k_norm", "k_norm"),
        (Place::Output, "model.layers.{}.self_attn.o_proj", "o_proj"),
        (Place::Mlp, "model.layers.{}.mlp", "mlp"),
        (Place::MlpNorm, "model.layers.{}.post_attention_layernorm", "post_attention_layernorm"),
        (Place::Router, "model.layers.{}.mlp.gate", "gate"),
        (Place::Gate, "model.layers.{}.mlp.experts.{}.gate_proj", "gate_proj"),
        (Place::Up, "model.layers.{}.mlp.experts.{}.up_proj", "up_proj"),
        (Place::Down, "model.layers.{}.mlp.experts.{}.down_proj", "down_proj"),
        (Place::FinalNorm, "model.norm", "norm"),
        (Place::Head, "lm_head", "lm_head"),
        (Place::Classifier, "score", "score"),
    ],
};

/// Mixtral.
pub(crate) static MIXTRAL: Modules = Modules {
    prefix: "model.",
    modules: &[
        (Place::Embedding, "model.embed_tokens", "embed_tokens"),
        (Place::Attention, "model.layers.{}.self_attn", "self_attn"),
        (Place::AttentionNorm, "model.layers.{}.input_layernorm", "input_layernorm"),
        (Place::Query, "model.layers.{}.self_attn.q_proj", "q_proj"),
        (Place::Key, "model.layers.{}.self_attn.k_proj", "k_proj"),
        (Place::Value, "model.layers.{}.self_attn.v_proj", "v_proj"),
        (Place::Output, "model.layers.{}.self_attn.o_proj", "o_proj"),
        (Place::Mlp, "model.layers.{}.block_sparse_moe", "block_sparse_moe"),
        (Place::MlpNorm, "model.layers.{}.post_attention_layernorm", "post_attention_layernorm"),
        (Place::Router, "model.layers.{}.block_sparse_moe.gate", "gate"),
        (Place::Gate, "model.layers.{}.block_sparse_moe.experts.{}.w1", "w1"),
        (Place::Up, "model.layers.{}.block_sparse_moe.experts.{}.w3", "w3"),
        (Place::Down, "model.layers.{}.block_sparse_moe.experts.{}.w2", "w2"),
        (Place::FinalNorm, "model.norm", "norm"),
        (Place::Head, "lm_head", "lm_head"),
        (Place::Classifier, "score", "score"),
    ],
};

/// GPT-2.
pub(crate) static GPT2: Modules = Modules {
    prefix: "transformer.",
    modules: &[
        (Place::Embedding, "transformer.wte", "wte"),
        (Place::Positions, "transformer.wpe", "wpe"),
        (Place::Attention, "transformer.h.{}.attn", "attn"),
        (Place::AttentionNorm, "transformer.h.{}.ln_1", "ln_1"),
        (Place::QueryKeyValue, "transformer.h.{}.attn.c_attn", "c_attn"),
        (Place::Output, "transformer.h.{}.attn.c_proj", "attn.c_proj"),
        (Place::Mlp, "transformer.h.{}.mlp", "mlp"),
        (Place::MlpNorm, "transformer.h.{}.ln_2", "ln_2"),
        (Place::Up, "transformer.h.{}.mlp.c_fc", "c_fc"),
        (Place::Down, "transformer.h.{}.mlp.c_proj", "mlp.c_proj"),
        (Place::FinalNorm, "transformer.ln_f", "ln_f"),
        (Place::Head, "lm_head", "lm_head"),
        (Place::Classifier, "score", "score"),
    ],
};

/// BERT. Its heads have no prefix, so [`Modules::prefix`] is the trunk's. Its MLP is no module: the one that ends it stands for
/// it.
pub(crate) static BERT: Modules = Modules {
    prefix: "bert.",
    modules: &[
        (Place::Embedding, "bert.embeddings.word_embeddings", "word_embeddings"),
        (Place::Positions, "bert.embeddings.position_embeddings", "position_embeddings"),
        (Place::TokenTypes, "bert.embeddings.token_type_embeddings", "token_type_embeddings"),
        (Place::EmbeddingNorm, "bert.embeddings.LayerNorm", "embeddings.LayerNorm"),
        (Place::Attention, "bert.encoder.layer.{}.attention", "attention"),
        (Place::Query, "bert.encoder.layer.{}.attention.self.query", "query"),
        (Place::Key, "bert.encoder.layer.{}.attention.self.key", "key"),
        (Place::Value, "bert.encoder.layer.{}.attention.self.value", "value"),
        (Place::Output, "bert.encoder.layer.{}.attention.output.dense", "attention.output.dense"),
        (Place::AttentionNorm, "bert.encoder.layer.{}.attention.output.LayerNorm", "attention.output.LayerNorm"),
        (Place::Mlp, "bert.encoder.layer.{}.output", "output"),
        (Place::Up, "bert.encoder.layer.{}.intermediate.dense", "intermediate.dense"),
        (Place::Down, "bert.encoder.layer.{}.output.dense", "output.dense"),
        (Place::MlpNorm, "bert.encoder.layer.{}.output.LayerNorm", "output.LayerNorm"),
        (Place::Pooler, "bert.pooler.dense", "pooler.dense"),
        (Place::Classifier, "classifier", "classifier"),
    ],
};
