//! LoRA that acts from an invocation on: up to where a few given tokens stand, a text goes through as in the base, so that what was
//! kept of it for the base, or for another such adapter, need not be computed again.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T         for rows t from the first token of the last invocation in their document on
//! y_to = x_ti W_oi^T                                          for all others, and in documents without an invocation
//! s    = alpha / r        or, with rslora,  alpha / sqrt(r)
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri`, uniform in ±1/sqrt(i) at first (Kaiming with a = sqrt(5)); `lora_B` `B_or`, 0 at first; both f32 and trained.
//! `drop` is dropout on the component's input. The invocation is `tokens`, by number, or the tokens of a `text`.
//!
//! # Cost
//! `r*(i+o)` parameters per linear; `2 r (i+o)` extra FLOPs per token forward that comes after an invocation, and none for others.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit; so it is in every document without an invocation, and in the rows before one. Invoked at the
//! first token of every document it is LoRA.
//!
//! # Departures
//! none; agrees with PEFT on whole texts. Where a text is generated, each row stays what it was when it was computed: an invocation
//! that the model itself writes acts from its last token on, where PEFT, which looks at the prompt alone, does nothing. A first batch
//! none of whose documents has an invocation is refused: nothing would train.
//!
//! # Paper
//! Activated LoRA: Fine-tuned LLMs for Intrinsics. Greenewald, Lastras, Parnell, Shah, Popa, Zizzo, Gunasekara, Rawat, Cox, 2025.

use std::collections::BTreeMap;
use std::ops::Range;

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Error, Layout, Locals, Row, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::scaling::{self, Scaling};
use crate::parts::{factors, keys};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// The key of PEFT's configuration that has the invocation.
const OWN: &str = "alora_invocation_tokens";

/// Parameters of Activated LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The tokens of the invocation, by number.
    tokens: Vec<u32>,
    /// The text of the invocation, in place of `tokens`.
    text: String,
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
    rslora: bool,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// The paper's rank: keys and values before an invocation are the base's, which takes more of what comes after. PEFT's scaling by it is 1.
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            text: String::new(),
            rank: 32,
            alpha: 32.0,
            dropout: 0.0,
            rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Alora {
    scaling: Scaling,
    dropout: f64,
    /// Whether there is a text, whose tokens nobody could tell if there are none.
    of_text: bool,
    /// The invocation.
    tokens: Vec<u32>,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Rows>,
    /// The map of all others.
    rows: Rows,
}

#[derive(Debug, Clone, Copy)]
struct Rows {
    scale: f64,
    dropout: f64,
}

impl Method for Alora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        fused: true,
        aliases: &["activated-lora"],
        paper: Some(Paper {
            title: "Activated LoRA: Fine-tuned LLMs for Intrinsics",
            authors: "Kristjan Greenewald, Luis Lastras, Thomas Parnell, Vraj Shah, Lucian Popa, Giulio Zizzo, Chulaka Gunasekara, Ambrish \
                      Rawat, David Cox",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i + o)",
        merges: Merges::No,
        peft_type: Some("LORA"),
        rules: &[
            Rule {
                when: "text == \"\"",
                require: "count(tokens) > 0",
                message: "is empty; expected the numbers of the invocation's tokens, or its `text`",
                path: "tokens",
            },
            Rule {
                when: "count(tokens) > 0",
                require: "text == \"\"",
                message: "says what `tokens` say already; expected one of the two",
                path: "text",
            },
        ],
        ..Card::new(
            "alora",
            Point::Adapter,
            "LoRA that acts from an invocation on: up to where a few given tokens stand, a text goes through as in the base, so that what \
             was kept of it for the base need not be computed again.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let Config { mut tokens, text, rank, alpha, dropout, rslora, rank_pattern, alpha_pattern } = config;
        let scaling = Scaling { rank, alpha, rslora, ranks: rank_pattern, alphas: alpha_pattern };
        let mut faults = scaling.faults();
        let of_text = !text.is_empty();
        if let Some(words) = cx.words.filter(|_| of_text) {
            // Every text may begin with tokens that are not its own.
            let begins = words.tokens("").unwrap_or_default();
            match words.tokens(&text) {
                Ok(all) => tokens = all.strip_prefix(begins.as_slice()).unwrap_or(&all).to_vec(),
                Err(message) => faults.push(Fault::new("text", message)),
            }
            if tokens.is_empty() && faults.is_empty() {
                faults.push(Fault::new("text", "has no tokens"));
            }
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let rows = |scale| Rows { scale, dropout };
        let (own, rows) = (scaling.own(rows), rows(scaling.factor()));
        Ok(Box::new(Self { scaling, dropout, of_text, tokens, own, rows }))
    }
}

impl Alora {
    fn rows_at(&self, site: &str) -> &Rows {
        self.own.get(site).unwrap_or(&self.rows)
    }
}

/// The first of a document's own rows, which come after some `earlier` tokens, from the start of the last of these `tokens` on; none
/// without them.
fn invoked(tokens: &[u32], earlier: &[u32], own: &[Row]) -> Option<usize> {
    let is = |at: usize, token: u32| match at.checked_sub(earlier.len()) {
        None => earlier[at] == token,
        Some(row) => own[row] == Row::Token(token),
    };
    let last = (earlier.len() + own.len()).checked_sub(tokens.len()).filter(|_| !tokens.is_empty())?;
    let starts = |at: &usize| tokens.iter().enumerate().all(|(place, token)| is(at + place, *token));
    Some((0..=last).rev().find(starts)?.saturating_sub(earlier.len()))
}

impl Adapter for Alora {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut faults = Vec::new();
        for (at, token) in self.tokens.iter().enumerate().filter(|(_, token)| **token as usize >= arch.vocab) {
            let path = if self.of_text { "text".to_owned() } else { format!("tokens[{at}]") };
            let message = format!("has token {token}; the base has tokens 0 to {}", arch.vocab - 1);
            faults.push(Fault::new(path.as_str(), message));
        }
        match factors::attach(sites, A, B, |site| self.scaling.rank_at(site)) {
            Ok(attachments) if faults.is_empty() => Ok(attachments),
            attached => {
                faults.extend(attached.err().into_iter().flatten());
                Err(faults)
            }
        }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.tokens.is_empty() {
            return Err(Error::Refused("an invocation by its text needs the base's tokeniser".to_owned()));
        }
        factors::kaiming(at, rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Delta(self.rows_at(at.site.as_str()))
    }

    fn acts_on(&self, layout: &Layout) -> Option<Vec<Range<u32>>> {
        let rows = layout.docs().iter().filter_map(|doc| {
            let own = &layout.rows()[doc.rows.start as usize..doc.rows.end as usize];
            let first = invoked(&self.tokens, &doc.earlier, own)?;
            Some(doc.rows.start + first as u32..doc.rows.end)
        });
        Some(rows.filter(|rows| !rows.is_empty()).collect())
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("it acts on some rows of a text, and a weight on all of them"))
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.dropout, ..self.scaling.lora_config() };
        let mut peft = scaling::peft(&config, vec![(A, "lora_A.weight"), (B, "lora_B.weight")]);
        peft.config.insert(OWN.to_owned(), json!(self.tokens));
        Some(peft)
    }
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&(h_tr * self.scale)?, tensors.get(B)?, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        Some(FusedRows::LowRank { down: A, up: B, scale: self.scale, dropout: self.dropout })
    }
}

/// Whether a configuration of PEFT's LoRA is Activated LoRA's.
pub(super) fn is_alora(config: &Map<String, Value>) -> bool {
    config.get(OWN).is_some_and(|tokens| !tokens.is_null())
}

/// What `adapter_config.json` of a PEFT Activated LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let modules = keys::without_inner(modules, "lora_");
    let (lora, mut params) = scaling::from_peft(config, &modules, Some(OWN))?;
    let said = config.get(OWN).cloned().unwrap_or_default();
    let tokens: Vec<u32> = serde_json::from_value(said.clone()).unwrap_or_default();
    if tokens.is_empty() {
        return Err(vec![Fault::new(OWN, format!("is {said}; expected the numbers of one token or more"))]);
    }
    params.insert("dropout".to_owned(), json!(lora.lora_dropout));
    params.insert("tokens".to_owned(), json!(tokens));
    Ok((MethodRef { method: Alora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use attune_points::layout::{NO_LABEL, Source};
    use attune_spec::id::Step;
    use attune_spec::method::Words;

    use super::*;

    /// Every text begins with token 30.
    #[derive(Debug)]
    struct Letters;

    impl Words for Letters {
        fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
            let letters = text.bytes().filter(u8::is_ascii_lowercase).map(|letter| u32::from(letter - b'a'));
            Ok(std::iter::once(30).chain(letters).collect())
        }
    }

    fn build(params: Value, words: Option<&dyn Words>) -> Result<Box<dyn Adapter>, String> {
        let config = serde_json::from_value(params).unwrap();
        let built = Alora::build(config, &BuildCx { steps: Step(1), domains: &[], words });
        built.map_err(|faults| faults[0].to_string())
    }

    #[test]
    fn the_last_invocation_counts_from_its_first_token_on() {
        let rows = |tokens: &[u32]| tokens.iter().map(|token| Row::Token(*token)).collect::<Vec<_>>();
        let first = |earlier: &[u32], own: &[u32]| invoked(&[7, 7, 8], earlier, &rows(own));
        assert_eq!(first(&[], &[1, 7, 7, 8, 2, 7, 7, 8, 3]), Some(5));
        assert_eq!(first(&[], &[7, 7, 7, 8]), Some(1));
        assert_eq!(first(&[], &[1, 7, 7]), None);
        assert_eq!(first(&[], &[7]), None);
        // Rows after one that went through before; one that ends in them is theirs from its end on.
        assert_eq!(
            (first(&[7, 7, 8, 1], &[2, 3]), first(&[1, 7, 7], &[8, 2]), first(&[1, 7], &[8, 2])),
            (Some(0), Some(0), None)
        );
        assert_eq!(invoked(&[], &[], &rows(&[1])), None);
    }

    #[test]
    fn rows_of_other_components_are_no_tokens() {
        let adapter = build(json!({"tokens": [4, 5]}), None).unwrap();
        let mut layout = Layout::new();
        let before = [0, 1].map(|index| (Row::Virtual { slot: 0, index }, NO_LABEL));
        let tokens = |tokens: &[u32]| tokens.iter().map(|token| (Row::Token(*token), NO_LABEL)).collect::<Vec<_>>();
        layout.push(Source::default(), before.into_iter().chain(tokens(&[3, 4, 5, 6])));
        layout.push(Source::default(), tokens(&[4, 6, 5]));
        layout.push(Source::default(), tokens(&[4, 5]));
        assert_eq!(adapter.acts_on(&layout), Some(vec![3..6, 9..11]));
    }

    #[test]
    fn an_invocation_is_tokens_or_a_text_without_what_every_text_begins_with() {
        let of_text = build(json!({"text": "ab"}), Some(&Letters)).unwrap();
        assert_eq!(of_text.peft().unwrap().config[OWN], json!([0, 1]));
        assert_eq!(build(json!({"text": "12"}), Some(&Letters)).err().unwrap(), "`text` has no tokens");
        let alone = build(json!({"text": "ab"}), None).unwrap();
        let at = Attachment { site: "q_proj".into(), tensors: Vec::new() };
        let table = Tensor::zeros((2, 2), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let refused = alone.init(&at, &table, &mut Rng::new(1, "init")).unwrap_err();
        assert!(refused.to_string().contains("needs the base's tokeniser"), "{refused}");
    }

    #[test]
    fn a_folder_without_an_invocation_is_refused_or_another_method_s() {
        let config = json!({"peft_type": "LORA", "r": 2, "alora_invocation_tokens": []});
        let faults = from_peft(config.as_object().unwrap(), &["h.0.q_proj".to_owned()]).unwrap_err();
        assert_eq!(faults[0].to_string(), "`alora_invocation_tokens` is []; expected the numbers of one token or more");
        assert!(!is_alora(json!({"alora_invocation_tokens": null}).as_object().unwrap()));
    }
}
