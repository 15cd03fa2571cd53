//! The keys and values of a text before those of every document, as the base makes them, some of which train: what the base would know
//! with the text in its context, at the price of so many keys, and then more of it than so many tokens can say.
//!
//! # Update
//! ```text
//! o_th = softmax([q_th K_pᵀ, q_th K_tᵀ] / sqrt(W)) [V_p; V_t]         for each head, p < length, documents' rows t from position length on
//! K_p = [S_sk; T_mk],  V_p = [U_sk; Y_mk]         s = sinks,  m = length - sinks
//! ```
//!
//! # Symbols
//! `keys` `T_mk` and `values` `Y_mk` at each attention, f32, trained; `sink_keys` `S_sk` and `sink_values` `U_sk`, fixed: what
//! attentions look at where they look at nothing, which a model does not bear to lose. They start as the keys and values of the first
//! `length` tokens of a `text`, read by the base (with the adapters that the job reads) alone from position 0 on; keys as they are
//! compared there, turned by their positions. Or they start normal with standard deviation `std`.
//!
//! # Cost
//! `2*(length - sinks)*k` parameters an attention, where keys and values of a row are `k` wide; `length` keys more for each query, no
//! query more. A start from a text takes one pass over `length` tokens. It does not merge. With 128 rows and documents of 256 a step
//! takes some 2.2 of LoRA's by the clock: a query looks at twice as many keys as it has before it there on average.
//!
//! # Limits
//! Started from a text of `length` tokens it is the base with that text before every document, but for rounding. With all of them
//! `sinks` nothing would train.
//!
//! # Departures
//! None from PEFT in what is computed. A text of fewer tokens than `length` is refused, as there, and no chat template is put around
//! it. Self-study, by which the paper trains (conversations about the text that the base itself makes, learned from the base's own
//! distributions with the text in its context), is data and an objective: neither is here. A sliding window does not hide these keys,
//! so that with one it is not the base with the text before documents; nor is it where a longer document changes how all positions
//! turn.
//!
//! # Paper
//! Cartridges: Lightweight and general-purpose long context representations via self-study. Eyuboglu, Ehrlich, Arora, Guha, Zinsley,
//! Liu, Tennien, Rudra, Zou, Mirhoseini, Ré, 2025.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, AttentionMap, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Error, Locals, Stats, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};

const KEYS: &str = "keys";
const VALUES: &str = "values";
const SINK_KEYS: &str = "sink_keys";
const SINK_VALUES: &str = "sink_values";

/// The most keys of one component.
const LENGTH_MAX: u64 = 65536;

/// What keys and values start as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum From {
    /// Normal values.
    #[default]
    Normal,
    /// Those of a text.
    Text,
}

/// Parameters of cartridges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Keys and values at each attention.
    #[schemars(range(min = 1, max = 65536))]
    length: u32,
    /// How many of them, the first ones, never train.
    #[schemars(range(max = 65535))]
    sinks: u32,
    /// What they start as.
    start: From,
    /// The text of a start from text, of which the first tokens count, as many as there are keys.
    text: String,
    /// Standard deviation of a normal start.
    #[schemars(range(min = 0.0, max = 10.0))]
    std: f64,
}

impl Default for Config {
    /// The least of the paper's lengths; PEFT's sink and random start. The paper starts from a text.
    fn default() -> Self {
        Self { length: 128, sinks: 1, start: From::default(), text: String::new(), std: 1.0 }
    }
}

pub(super) struct Cartridge {
    config: Config,
    /// The tokens to start from, as many as there are keys, where somebody could tell them.
    told: Option<Vec<u32>>,
}

impl Method for Cartridge {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "Cartridges: Lightweight and general-purpose long context representations via self-study",
            authors: "Sabri Eyuboglu, Ryan Ehrlich, Simran Arora, Neel Guha, Dylan Zinsley, Emily Liu, Will Tennien, Atri Rudra, James \
                      Zou, Azalia Mirhoseini, Christopher Ré",
            year: 2025,
        }),
        applies: &[SiteKind::Attention],
        targets: "all",
        parameters: "2*(length - sinks)*k",
        moves: Some("its keys and values are of no document, and documents begin at a later position"),
        fixed: "2*sinks*k",
        merges: Merges::No,
        peft_type: Some("CARTRIDGE"),
        rules: &[Rule {
            when: "true",
            require: "sinks < length",
            message: "leaves no key to train; expected less than `length`",
            path: "sinks",
        }],
        ..Card::new(
            "cartridge",
            Point::Adapter,
            "The keys and values of a text before those of every document, as the base makes them, some of which train: what the base would \
             know with the text in its context, at the price of so many keys.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let fault = |message: String| vec![Fault::new("text", message)];
        let of_text = config.start == From::Text;
        if of_text == config.text.trim().is_empty() {
            let message = if of_text {
                "is empty; expected the text whose keys and values they start as"
            } else {
                "is given, and keys and values do not start from it: expected `start: text` beside it"
            };
            return Err(fault(message.to_owned()));
        }
        let tokens = cx.words.filter(|_| of_text).map(|words| words.tokens(&config.text));
        let mut told = tokens.transpose().map_err(fault)?;
        if let Some(told) = &mut told {
            let (found, length) = (told.len(), config.length as usize);
            if found < length {
                return Err(fault(format!("has {found} tokens; expected at least {length}, the `length`")));
            }
            told.truncate(length);
        }
        Ok(Box::new(Self { config, told }))
    }
}

impl Adapter for Cartridge {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (mut faults, mut attachments) = (Vec::new(), Vec::new());
        let [length, sinks] = [self.config.length, self.config.sinks].map(|count| count as usize);
        for site in sites {
            if site.place != Place::Attention {
                let message = format!("names {}, which is a {}; expected attentions", site.id, site.kind.name());
                faults.push(Fault::new("targets", message));
                continue;
            }
            let k = arch.kv_width();
            let train = [KEYS, VALUES].map(|local| TensorSpec::trained(local, [length.saturating_sub(sinks), k]));
            let stay = [SINK_KEYS, SINK_VALUES].map(|local| TensorSpec::fixed(local, [sinks, k]));
            let tensors = train.into_iter().chain(stay.into_iter().filter(|_| sinks > 0)).collect();
            attachments.push(Attachment { site: site.id.clone(), tensors });
        }
        if length as u64 >= arch.max_position {
            let message = format!("is {length}; the base has {} positions in all", arch.max_position);
            faults.push(Fault::new("length", message));
        }
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.config.start == From::Text {
            let message = "a start from a text needs what the base makes of it, and its tokeniser";
            return Err(Error::Refused(message.to_owned()));
        }
        starts::each(at, rng, |_| Start::Normal(self.config.std))
    }

    fn reads(&self) -> Option<&[u32]> {
        self.told.as_deref()
    }

    fn init_by(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        stats: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let Some(told) = &self.told else { return self.init(at, weight, rng) };
        let made = stats.of_text(told, &at.site)?;
        Ok((Locals::new(at.site.as_str(), self.parted(&made.keys_tk, &made.values_tk)?), BaseEdit::None))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Attention(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("keys and values are no change of a weight"))
    }

    fn peft(&self) -> Option<Peft> {
        let config = json!({
            "peft_type": "CARTRIDGE",
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "num_virtual_tokens": self.config.length,
            "num_frozen_tokens": self.config.sinks,
            "num_transformer_submodules": 1,
        });
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::Joined("prompt_embeddings") })
    }
}

impl Cartridge {
    /// The tensors that are these keys and values.
    fn parted(&self, keys_pk: &Tensor, values_pk: &Tensor) -> attune_points::Result<Vec<(&'static str, Tensor)>> {
        let (all, sinks) = (keys_pk.dim(0)?, self.config.sinks as usize);
        let part = |x: &Tensor, start, end| x.narrow(0, start, end - start)?.contiguous();
        let mut parts = vec![(KEYS, part(keys_pk, sinks, all)?), (VALUES, part(values_pk, sinks, all)?)];
        if sinks > 0 {
            parts.extend([(SINK_KEYS, part(keys_pk, 0, sinks)?), (SINK_VALUES, part(values_pk, 0, sinks)?)]);
        }
        Ok(parts)
    }
}

impl AttentionMap for Cartridge {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let whole = |sink: &str, local: &str| -> attune_points::Result<Tensor> {
            let trained = tensors.get(local)?;
            Ok(if self.config.sinks == 0 { trained.clone() } else { Tensor::cat(&[tensors.get(sink)?, trained], 0)? })
        };
        Ok((whole(SINK_KEYS, KEYS)?, whole(SINK_VALUES, VALUES)?))
    }

    fn tensors(&self, keys: &Tensor, values: &Tensor) -> attune_points::Result<Option<Vec<(&'static str, Tensor)>>> {
        self.parted(keys, values).map(Some)
    }
}

/// What `adapter_config.json` of a PEFT cartridge says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let number = |key: &str, range: std::ops::RangeInclusive<u64>, default: Option<u64>| {
        let said = config.get(key).filter(|said| !said.is_null());
        let number = if said.is_none() { default } else { said.and_then(Value::as_u64) };
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let said = said.unwrap_or(&Value::Null);
            vec![Fault::new(key, format!("is {said}; expected {} to {}", range.start(), range.end()))]
        })
    };
    let length = number("num_virtual_tokens", 1..=LENGTH_MAX, None)?;
    let sinks = number("num_frozen_tokens", 0..=length - 1, Some(1))?;
    let params = Map::from_iter([("length".to_owned(), json!(length)), ("sinks".to_owned(), json!(sinks))]);
    Ok((MethodRef { method: Cartridge::CARD.name.to_owned(), params }, Targets::from(Cartridge::CARD.targets)))
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Step;
    use attune_spec::method::Words;

    use super::*;

    #[derive(Debug)]
    struct Letters;

    impl Words for Letters {
        fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
            Ok(text.bytes().filter(u8::is_ascii_lowercase).map(|letter| u32::from(letter - b'a')).collect())
        }
    }

    #[test]
    fn the_first_tokens_of_a_text_are_read_and_a_short_text_is_refused() {
        let build = |params: Value| {
            let config = serde_json::from_value(params).unwrap();
            let cx = BuildCx { steps: Step(1), domains: &[], words: Some(&Letters) };
            Cartridge::build(config, &cx).map_err(|faults| faults[0].to_string())
        };
        let of = |length: u32, text: &str| build(json!({"length": length, "start": "text", "text": text}));
        assert_eq!(of(3, "dabc").unwrap().reads(), Some(&[3, 0, 1][..]));
        assert_eq!(of(5, "dabc").err().unwrap(), "`text` has 4 tokens; expected at least 5, the `length`");
        assert!(of(5, " ").err().unwrap().contains("is empty; expected the text"));
        assert!(build(json!({"text": "abc"})).err().unwrap().contains("expected `start: text` beside it"));
        assert_eq!(build(json!({})).unwrap().reads(), None);
    }

    #[test]
    fn a_folder_in_which_nothing_trains_is_refused() {
        let read = |value: Value| from_peft(value.as_object().unwrap(), &[]);
        let said = |value: Value| serde_json::to_value(read(value).unwrap().0).unwrap();
        assert_eq!(said(json!({"num_virtual_tokens": 4}))["sinks"], 1);
        assert_eq!(said(json!({"num_virtual_tokens": 4, "num_frozen_tokens": 0}))["sinks"], 0);
        let faults = read(json!({"num_virtual_tokens": 4, "num_frozen_tokens": 4})).unwrap_err();
        assert_eq!(faults[0].to_string(), "`num_frozen_tokens` is 4; expected 0 to 3");
    }
}
