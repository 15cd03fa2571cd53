//! Rows of its own at each attention, which documents look at apart from their own ones, and a gate that is shut at first: starts
//! as the base exactly, and opens as far as it helps.
//!
//! # Update
//! ```text
//! o_th = softmax(q_th K_tᵀ / sqrt(W)) V_t + g softmax(q_th K_pᵀ / sqrt(W)) V_p         K_p = R_pd W_kᵀ, V_p = R_pd W_vᵀ, p < length
//! ```
//!
//! # Symbols
//! `adaption_prompt` `R_pd`, `[1, length, d]`, f32, trained, normal; `adaption_gate` `g`, `[1]`, f32, trained, 0: at each attention.
//! `W_k` and `W_v` are the base's own, with their biases; no position turns `K_p`.
//!
//! # Cost
//! `length*d + 1` parameters an attention, where the stream is `d` wide; `length` keys more for each query and `length` rows through
//! two linears once. It does not merge.
//!
//! # Limits
//! With its gates shut it is the base to the last bit, whatever its rows are. What it adds is no longer than `g` times its longest
//! value.
//!
//! # Departures
//! The paper has a gate for each head, PEFT one. It sits at all attentions by default, where the paper leaves out the lowest ones:
//! name those of the last layers; PEFT's files know no others. PEFT's variant for GPT-2 adds beyond the last linear of the
//! attention, which this one does not. What other components do to the linears of keys and values is not done to its rows.
//!
//! # Paper
//! LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang, Han, Liu, Zhou, Lu, Qiao, Li, Gao, 2023.

use attune_architecture::{Architecture, Place, Projections, QkNorm, Site};
use attune_points::adapter::{Adapter, AsideMap, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};

const PROMPT: &str = "adaption_prompt";
const GATE: &str = "adaption_gate";

/// Parameters of adaption prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows at each attention.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
}

impl Default for Config {
    /// The paper's length.
    fn default() -> Self {
        Self { length: 10 }
    }
}

pub(super) struct AdaptionPrompt {
    config: Config,
}

impl Method for AdaptionPrompt {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        aliases: &["llama-adapter"],
        paper: Some(Paper {
            title: "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
            authors: "Renrui Zhang, Jiaming Han, Chris Liu, Aojun Zhou, Pan Lu, Yu Qiao, Hongsheng Li, Peng Gao",
            year: 2023,
        }),
        applies: &[SiteKind::Attention],
        targets: "all",
        parameters: "length*i + 1",
        merges: Merges::No,
        peft_type: Some("ADAPTION_PROMPT"),
        ..Card::new(
            "adaption-prompt",
            Point::Adapter,
            "Rows of its own at each attention, which documents look at apart from their own ones, and a gate that is shut at first: \
             starts as the base exactly, and opens as far as it helps.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for AdaptionPrompt {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (mut faults, mut attachments) = (Vec::new(), Vec::new());
        let shape = [1, self.config.length as usize, arch.hidden];
        for site in sites {
            if site.place == Place::Attention {
                let quiet = Some("the gate on its rows starts at 0");
                let tensors =
                    vec![TensorSpec { quiet, ..TensorSpec::trained(PROMPT, shape) }, TensorSpec::trained(GATE, [1])];
                attachments.push(Attachment { site: site.id.clone(), tensors });
            } else {
                let message = format!("names {}, which is a {}; expected attentions", site.id, site.kind.name());
                faults.push(Fault::new("targets", message));
            }
        }
        if arch.projections == Projections::Fused || arch.qk_norm != QkNorm::None {
            let message = format!(
                "names attentions of {}, whose keys are not those of one linear alone: expected a base with one for keys and no norm \
                 on these",
                arch.class_name()
            );
            faults.push(Fault::new("targets", message));
        }
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == GATE { Start::Constant(0.0) } else { Start::Normal(1.0) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Aside(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("what an attention finds beside documents is no change of a weight"))
    }

    fn peft(&self) -> Option<Peft> {
        let config = json!({
            "peft_type": "ADAPTION_PROMPT",
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "adapter_len": self.config.length,
        });
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::LastLayers("adapter_layers", vec![(PROMPT, PROMPT), (GATE, GATE)]) })
    }
}

impl AsideMap for AdaptionPrompt {
    fn graph(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        Ok((tensors.get(PROMPT)?.squeeze(0)?, tensors.get(GATE)?.clone()))
    }
}

/// What `adapter_config.json` of PEFT's adaption prompts says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let said = config.get("adapter_len").cloned().unwrap_or_default();
    let Some(length) = said.as_u64().filter(|length| (1..=4096).contains(length)) else {
        return Err(vec![Fault::new("adapter_len", format!("is {said}; expected 1 to 4096"))]);
    };
    let params = Map::from_iter([("length".to_owned(), json!(length))]);
    Ok((MethodRef { method: AdaptionPrompt::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a base whose keys are not one linear's rows would not be keys.
    #[test]
    fn a_base_with_another_kind_of_keys_is_refused() {
        let method = AdaptionPrompt { config: Config::default() };
        for (family, more) in [("gpt2", ""), ("qwen3", ", \"head_dim\": 4")] {
            let config = format!(
                "{{\"model_type\": \"{family}\", \"hidden_size\": 8, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2, \"n_positions\": 16, \
                 \"intermediate_size\": 12, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"num_key_value_heads\": 1, \
                 \"vocab_size\": 11, \"max_position_embeddings\": 16, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\"{more}}}"
            );
            let arch = Architecture::from_json(config.as_bytes()).unwrap();
            let sites: Vec<Site> = arch.sites().into_iter().filter(|site| site.place == Place::Attention).collect();
            let faults = method.attach(&arch, &sites).unwrap_err();
            assert!(faults[0].to_string().contains("not those of one linear alone"), "{}", faults[0]);
        }
    }
}
