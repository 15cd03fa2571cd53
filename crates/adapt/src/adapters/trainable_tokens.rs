//! Rows of their own for a few tokens, which train while the rest of the table stays: for tokens that are new to the base, or
//! that shall mean something else, such as the marks of a chat.
//!
//! # Update
//! ```text
//! x_td[t] = R_kd[k]     where row t has the k-th of the tokens; E_vd[token of t] elsewhere
//! logits_tv[token_k] = h_td · R_kd[k]     where the head has the table as its weight
//! ```
//!
//! # Symbols
//! `trainable_tokens_delta` `R_kd`, `[tokens, d]` once for the table, f32, trained: the rows that stand for the table's own
//! `E_vd`, as which they start. It is no difference in spite of its name, which is PEFT's. It does not decay: a row that does not
//! occur stays.
//!
//! # Cost
//! `d` parameters per token, where the stream is `d` wide. No pass makes the table anew or takes a gradient of it: where it is a
//! head's weight, `2 d` extra FLOPs per token and logit.
//!
//! # Limits
//! With rows as in the table it is the base, but for the rounding of logits. What the model makes of a text without these tokens
//! does not change, and where the head has a weight of its own no logit does.
//!
//! # Departures
//! none; agrees with PEFT on the table that reads tokens. PEFT can put rows on a head with a weight of its own as well, which is
//! not here. `words` are ours: each has to be one token of the base's tokeniser.
//!
//! # Paper
//! Common practice; there is none.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, TableMap};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Point, Rule, SiteKind, Words};
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const ROWS: &str = "trainable_tokens_delta";
const PEFT_TYPE: &str = "TRAINABLE_TOKENS";

/// Parameters of trainable tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Tokens whose rows train, by number.
    tokens: Vec<u32>,
    /// More of them, by the text that each is for the base's tokeniser.
    words: Vec<String>,
}

pub(super) struct TrainableTokens {
    /// Those by number, then those by text.
    tokens: Vec<u32>,
}

impl Method for TrainableTokens {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        applies: &[SiteKind::Embedding],
        targets: prompt::TARGETS,
        parameters: "0",
        shared: "(count(tokens) + count(words))*o",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        rules: &[Rule {
            when: "count(words) == 0",
            require: "count(tokens) > 0",
            message: "is empty; expected the numbers of the tokens whose rows train, or `words`",
            path: "tokens",
        }],
        ..Card::new(
            "trainable-tokens",
            Point::Adapter,
            "Rows of their own for a few tokens, which train while the rest of the table stays: for tokens that are new to the base, \
             or that shall mean something else, such as the marks of a chat.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let mut named: Vec<(u32, String)> =
            config.tokens.iter().enumerate().map(|(at, token)| (*token, format!("tokens[{at}]"))).collect();
        let mut faults = Vec::new();
        for (at, text) in config.words.iter().enumerate() {
            let path = format!("words[{at}]");
            match token_of(text, cx.words) {
                Ok(token) => named.push((token, path)),
                Err(message) => faults.push(Fault::new(path.as_str(), message)),
            }
        }
        let mut first: BTreeMap<u32, &str> = BTreeMap::new();
        for (token, path) in &named {
            match first.get(token) {
                None => drop(first.insert(*token, path)),
                Some(before) => {
                    let message = format!("is token {token}, as {before} is; expected each of them once");
                    faults.push(Fault::new(path.as_str(), message));
                }
            }
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Box::new(Self { tokens: named.into_iter().map(|(token, _)| token).collect() }))
    }
}

/// The one token that a text is.
fn token_of(text: &str, words: Option<&dyn Words>) -> Result<u32, String> {
    let words = words.ok_or("needs the base's tokeniser, which is not at hand here; expected `tokens` by number")?;
    // Every text may begin with tokens that are not its own.
    let begins = words.tokens("").unwrap_or_default();
    let all = words.tokens(text)?;
    match all.strip_prefix(begins.as_slice()).unwrap_or(&all) {
        [token] => Ok(*token),
        own => Err(format!(
            "is {text:?}, which is {} tokens to the base's tokeniser; expected a text that is one",
            own.len()
        )),
    }
}

impl Adapter for TrainableTokens {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut faults = Vec::new();
        for (at, token) in self.tokens.iter().enumerate().filter(|(_, token)| **token as usize >= arch.vocab) {
            let path = format!("tokens[{at}]");
            faults.push(Fault::new(path.as_str(), format!("is {token}; the base has tokens 0 to {}", arch.vocab - 1)));
        }
        let Some(table) = sites.iter().find(|site| site.place == Place::Embedding) else {
            faults.push(Fault::new("targets", "names no table of tokens: leave it out, or name that table"));
            return Err(faults);
        };
        if !faults.is_empty() {
            return Err(faults);
        }
        let rows = TensorSpec {
            scope: Scope::Group(table.id.to_string()),
            decay: false,
            quiet: Some("its tokens may not occur"),
            ..TensorSpec::trained(ROWS, [self.tokens.len(), arch.hidden])
        };
        Ok(vec![Attachment { site: table.id.clone(), tensors: vec![rows] }])
    }

    fn init(&self, at: &Attachment, table: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let rows_kd = prompt::rows_at(table, self.tokens.iter().copied())?;
        starts::each(at, rng, |_| Start::Is(rows_kd.clone()))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Table(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, table: &dyn Weight) -> attune_points::Result<Merged> {
        let rows_kd = tensors.get(ROWS)?;
        let table_vd = table.dense(rows_kd.dtype())?;
        // What is multiplied with 1 and what is added to 0 keep their bits.
        let mut kept = vec![1.0f64; table_vd.dim(0)?];
        self.tokens.iter().for_each(|token| kept[*token as usize] = 0.0);
        let kept = Tensor::from_vec(kept, (table_vd.dim(0)?, 1), &Device::Cpu)?.to_dtype(rows_kd.dtype())?;
        let places = Tensor::new(self.tokens.as_slice(), &Device::Cpu)?;
        let weight = table_vd.broadcast_mul(&kept)?.index_add(&places, rows_kd, 0)?;
        Ok(Merged::Weight { weight, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let own = [("token_indices", json!(self.tokens)), ("init_weights", json!(true))];
        Some(Peft { config: keys::written(PEFT_TYPE, own), tensors: PeftTensors::Each(vec![(ROWS, ROWS)]) })
    }
}

impl TableMap for TrainableTokens {
    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok(tensors.get(ROWS)?.clone())
    }
}

/// What `adapter_config.json` of PEFT's trainable tokens says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let tokens: Vec<u32> = keys.get("token_indices", Vec::new());
    keys.finish()?;
    let params = Map::from_iter([("tokens".to_owned(), json!(tokens))]);
    // Rows of a tied head are there again under its name, which the configuration does not say.
    let said: Vec<&str> = match config.get("target_modules") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let is_said = |module: &&String| {
        said.iter().any(|name| module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    };
    let own: Vec<String> = modules.iter().filter(is_said).cloned().collect();
    let targets = if own.is_empty() { modules.to_vec() } else { own };
    Ok((MethodRef { method: TrainableTokens::CARD.name.to_owned(), params }, Targets::Many(targets)))
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Step;
    use candle_core::DType;

    use super::*;

    /// A letter is a token, and every text begins with one that is none.
    #[derive(Debug)]
    struct Letters;

    impl Words for Letters {
        fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
            Ok([99].into_iter().chain(text.bytes().map(|letter| u32::from(letter - b'a'))).collect())
        }
    }

    fn build(params: Value, words: Option<&dyn Words>) -> Result<Box<dyn Adapter>, Vec<String>> {
        let config = serde_json::from_value(params).unwrap();
        let built = TrainableTokens::build(config, &BuildCx { steps: Step(1), domains: &[], words });
        built.map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    fn architecture() -> Architecture {
        let config =
            br#"{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 11}"#;
        Architecture::from_json(config).unwrap()
    }

    fn attached(adapter: &dyn Adapter) -> Result<Vec<Attachment>, Vec<String>> {
        let architecture = architecture();
        let attached = adapter.attach(&architecture, &architecture.sites());
        attached.map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn numbers_come_before_texts_and_start_as_the_table_s_rows() {
        let adapter = build(json!({"tokens": [7, 2], "words": ["d"]}), Some(&Letters)).unwrap();
        let at = attached(&*adapter).unwrap().remove(0);
        assert_eq!((at.site.as_str(), at.tensors[0].shape.as_slice()), ("transformer.wte", &[3, 8][..]));
        let table =
            Tensor::arange(0.0f32, 11.0, &Device::Cpu).unwrap().reshape((11, 1)).unwrap().repeat((1, 8)).unwrap();
        let (locals, _) = adapter.init(&at, &table, &mut Rng::new(1, "init")).unwrap();
        let first = locals.get(ROWS).unwrap().narrow(1, 0, 1).unwrap().flatten_all().unwrap();
        assert_eq!(first.to_vec1::<f32>().unwrap(), [7.0, 2.0, 3.0]);
        let Port::Table(map) = adapter.port(&at) else { panic!("no rows in a table") };
        assert_eq!(map.tokens(), [7, 2, 3]);
    }

    #[test]
    fn merged_the_table_has_the_rows_and_all_others_their_bits() {
        let adapter = build(json!({"tokens": [7, 2]}), None).unwrap();
        let at = attached(&*adapter).unwrap().remove(0);
        let table = Rng::new(1, "table").normal_tensor(&[11, 8][..], 1.0, DType::F32).unwrap();
        let rows = Rng::new(1, "rows").normal_tensor(&[2, 8][..], 1.0, DType::F32).unwrap();
        let merged = adapter.merge(&at, &Locals::new("wte", [(ROWS, rows.clone())]), &table).unwrap();
        let Merged::Weight { weight, .. } = merged else { panic!("no weight") };
        let [made, table, rows] = [weight, table, rows].map(|x| x.to_vec2::<f32>().unwrap());
        for (token, row) in made.iter().enumerate() {
            let expected = match token {
                7 => &rows[0],
                2 => &rows[1],
                other => &table[other],
            };
            assert_eq!(row, expected, "token {token}");
        }
    }

    #[test]
    fn a_tied_head_s_copy_of_the_rows_is_no_target() {
        let modules = ["lm_head", "model.embed_tokens"].map(str::to_owned);
        let read = |targets: Value| {
            let config = json!({"token_indices": [3, 1], "target_modules": targets});
            let (method, targets) = from_peft(config.as_object().unwrap(), &modules).unwrap();
            assert_eq!(serde_json::to_value(method).unwrap()["tokens"], json!([3, 1]));
            targets
        };
        let table = Targets::Many(vec!["model.embed_tokens".to_owned()]);
        assert_eq!(read(json!("model.embed_tokens")), table);
        assert_eq!(read(json!(["embed_tokens"])), table);
        assert_eq!(read(json!(null)), Targets::Many(modules.to_vec()));
    }

    #[test]
    fn what_names_a_token_twice_or_none_of_the_base_is_refused() {
        let refused = |params: Value, words: Option<&dyn Words>| build(params, words).err().unwrap();
        let twice = refused(json!({"tokens": [3, 4, 3], "words": ["e"]}), Some(&Letters));
        assert_eq!(twice[0], "`tokens[2]` is token 3, as tokens[0] is; expected each of them once");
        assert_eq!(twice[1], "`words[0]` is token 4, as tokens[1] is; expected each of them once");
        let long = refused(json!({"words": ["abc"]}), Some(&Letters));
        assert!(long[0].contains("\"abc\", which is 3 tokens"), "{long:?}");
        assert!(refused(json!({"words": ["a"]}), None)[0].contains("expected `tokens` by number"));
        let beyond = attached(&*build(json!({"tokens": [3, 11]}), None).unwrap()).unwrap_err();
        assert_eq!(beyond, ["`tokens[1]` is 11; the base has tokens 0 to 10"]);
    }
}
