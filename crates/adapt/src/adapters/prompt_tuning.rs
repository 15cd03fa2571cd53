//! Trained rows before those of every document, in the place of embeddings of tokens: the cheapest way to steer a frozen base, good
//! where this is large or what is wanted could be said in words.
//!
//! # Update
//! ```text
//! x_td = [P_pd; E_td]         p < length, E_td the embeddings of a document's tokens, from position length on
//! ```
//!
//! # Symbols
//! `prompt` `P_pd`, `[length, d]` once for the whole base, f32, trained. It starts as rows of the table of tokens, drawn or of a `text`,
//! or normal with standard deviation `std`.
//!
//! # Cost
//! `length*d` parameters in all, where the stream is `d` wide; `length` rows more in each document, which count in its positions
//! and in a batch. It does not merge.
//!
//! # Limits
//! Rows that are the embeddings of a text are that text before every document. What stands in the stream of a document's own rows
//! below the first attention is the base's.
//!
//! # Departures
//! The default start is PEFT's `SAMPLE_VOCAB`, not its `RANDOM`: rows drawn from the whole table (the paper draws among its 5 000 most
//! frequent). An encoder's vector of a document is of these rows too, and its first row is one of them, as in PEFT.
//!
//! # Paper
//! The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant, 2021.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, SequenceMap};
use attune_points::{Error, Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const PROMPT: &str = "prompt";

/// What the rows start as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum From {
    /// Rows of the table of tokens, drawn at random.
    #[default]
    Vocabulary,
    /// The rows of a text's tokens.
    Text,
    /// Normal values.
    Normal,
}

/// Parameters of prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows before each document.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// What they start as.
    start: From,
    /// The text of a start from text: its first tokens, or all of them again and again, as many as there are rows.
    text: String,
    /// Standard deviation of a normal start.
    #[schemars(range(min = 0.0, max = 10.0))]
    std: f64,
}

impl Default for Config {
    /// The paper gains little beyond 20 rows; the standard deviation is PEFT's.
    fn default() -> Self {
        Self { length: 20, start: From::default(), text: String::new(), std: 1.0 }
    }
}

pub(super) struct PromptTuning {
    config: Config,
    /// The tokens of the text to start from, where somebody could tell them.
    told: Option<Vec<u32>>,
}

impl Method for PromptTuning {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "The Power of Scale for Parameter-Efficient Prompt Tuning",
            authors: "Brian Lester, Rami Al-Rfou, Noah Constant",
            year: 2021,
        }),
        applies: &[SiteKind::Embedding],
        targets: prompt::TARGETS,
        parameters: "0",
        shared: "length*o",
        rows_before: "length",
        moves: Some("documents come after rows that are no part of them"),
        merges: Merges::No,
        peft_type: Some("PROMPT_TUNING"),
        ..Card::new(
            "prompt-tuning",
            Point::Adapter,
            "Trained rows before those of every document, in the place of embeddings of tokens: the cheapest way to steer a frozen \
             base, good where this is large or what is wanted could be said in words.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let of_text = config.start == From::Text;
        if of_text == config.text.trim().is_empty() {
            let message = if of_text {
                "is empty; expected the text that rows start as"
            } else {
                "is given, and rows do not start from it: expected `start: text` beside it"
            };
            return Err(vec![Fault::new("text", message)]);
        }
        let tokens = cx.words.filter(|_| of_text).map(|words| words.tokens(&config.text));
        let told = match tokens.transpose() {
            Ok(told) if told.as_ref().is_some_and(Vec::is_empty) => Err("has no tokens".to_owned()),
            told => told,
        };
        let told = told.map_err(|message| vec![Fault::new("text", message)])?;
        Ok(Box::new(Self { config, told }))
    }
}

impl PromptTuning {
    /// The tokens whose rows of the table it starts as.
    fn tokens(&self, table: &dyn Weight, rng: &mut Rng) -> attune_points::Result<Vec<u32>> {
        if self.config.start == From::Vocabulary {
            return Ok(prompt::drawn(table, self.config.length, rng));
        }
        let (vocabulary, length) = (table.shape().0, self.config.length as usize);
        let refused = |message: String| Error::Refused(message);
        let told = self.told.as_ref();
        let told = told.ok_or_else(|| refused("a start from a text needs the base's tokeniser".to_owned()))?;
        match told.iter().find(|id| **id as usize >= vocabulary) {
            None => Ok(told.iter().copied().cycle().take(length).collect()),
            Some(id) => {
                Err(refused(format!("token {id} of its text is outside of the base's vocabulary of {vocabulary}")))
            }
        }
    }
}

impl Adapter for PromptTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let tensors = vec![prompt::trained(PROMPT, [self.config.length as usize, arch.hidden])];
        prompt::attach(arch, sites, self.config.length, tensors)
    }

    fn init(&self, at: &Attachment, table: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.config.start == From::Normal {
            return starts::each(at, rng, |_| Start::Normal(self.config.std));
        }
        let rows_pd = prompt::rows_at(table, self.tokens(table, rng)?)?;
        starts::each(at, rng, |_| Start::Is(rows_pd.clone()))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Sequence(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No(prompt::UNMERGED))
    }

    fn peft(&self) -> Option<Peft> {
        // PEFT's start from a text names a tokeniser, without which it reads no such file; how rows started matters no more.
        let start = if self.config.start == From::Normal { "RANDOM" } else { "SAMPLE_VOCAB" };
        Some(prompt::peft("PROMPT_TUNING", self.config.length, &json!({"prompt_tuning_init": start})))
    }
}

impl SequenceMap for PromptTuning {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok(tensors.get(PROMPT)?.clone())
    }
}

/// What `adapter_config.json` of PEFT's rows before documents says in our words, however they were made.
pub(super) fn from_peft(config: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let (length, targets) = prompt::from_peft(config)?;
    let is_normal = config.get("prompt_tuning_init").is_some_and(|init| init == "RANDOM");
    let start = if is_normal { From::Normal } else { From::Vocabulary };
    let params = Map::from_iter([("length".to_owned(), json!(length)), ("start".to_owned(), json!(start))]);
    Ok((MethodRef { method: PromptTuning::CARD.name.to_owned(), params }, targets))
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Step;
    use attune_spec::method::Words;
    use candle_core::Device;

    use super::*;

    #[derive(Debug)]
    struct Letters;

    impl Words for Letters {
        fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
            Ok(text.bytes().filter(u8::is_ascii_lowercase).map(|letter| u32::from(letter - b'a')).collect())
        }
    }

    fn build(params: Value, words: Option<&dyn Words>) -> Result<Box<dyn Adapter>, String> {
        let config = serde_json::from_value(params).unwrap();
        let built = PromptTuning::build(config, &BuildCx { steps: Step(1), domains: &[], words });
        built.map_err(|faults| faults[0].to_string())
    }

    /// The first number of each row that it starts with, of a table whose row `i` is all `i`.
    fn started(adapter: &dyn Adapter, vocabulary: usize, length: usize) -> attune_points::Result<Vec<f32>> {
        let table =
            Tensor::arange(0.0f32, vocabulary as f32, &Device::Cpu)?.reshape((vocabulary, 1))?.repeat((1, 4))?;
        let tensors = vec![prompt::trained(PROMPT, [length, 4])];
        let at = Attachment { site: "wte".into(), tensors };
        let (locals, _) = adapter.init(&at, &table, &mut Rng::new(3, "init"))?;
        Ok(locals.get(PROMPT)?.narrow(1, 0, 1)?.flatten_all()?.to_vec1()?)
    }

    #[test]
    fn a_text_is_repeated_or_cut_to_the_number_of_rows() {
        for (text, length, expected) in
            [("abc", 7, vec![0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0]), ("bad", 2, vec![1.0, 0.0])]
        {
            let params = json!({"length": length, "start": "text", "text": text});
            let adapter = build(params, Some(&Letters)).unwrap();
            assert_eq!(started(&*adapter, 26, length).unwrap(), expected);
        }
    }

    #[test]
    fn drawn_rows_are_of_the_table_and_normal_ones_are_not() {
        let drawn = started(&*build(json!({"length": 200}), None).unwrap(), 11, 200).unwrap();
        assert!(drawn.iter().all(|id| id.fract() == 0.0 && (0.0..11.0).contains(id)));
        assert!((0..11).all(|id| drawn.contains(&(id as f32))));
        let normal = json!({"length": 200, "start": "normal", "std": 0.1});
        let normal = started(&*build(normal, None).unwrap(), 11, 200).unwrap();
        assert!(normal.iter().all(|value| value.abs() < 0.6) && normal.iter().any(|value| value.fract() != 0.0));
    }

    #[test]
    fn what_a_text_cannot_start_is_said() {
        let refused = |params: Value| build(params, Some(&Letters)).err().unwrap();
        assert_eq!(refused(json!({"start": "text"})), "`text` is empty; expected the text that rows start as");
        assert!(refused(json!({"text": "abc"})).contains("expected `start: text` beside it"));
        assert_eq!(refused(json!({"start": "text", "text": "12"})), "`text` has no tokens");
        let text = || json!({"length": 3, "start": "text", "text": "xyz"});
        let alone = build(text(), None).unwrap();
        assert!(started(&*alone, 26, 3).unwrap_err().to_string().contains("needs the base's tokeniser"));
        let small = build(text(), Some(&Letters)).unwrap();
        assert!(started(&*small, 25, 3).unwrap_err().to_string().contains("token 25 of its text is outside"));
    }

    #[test]
    fn a_pair_of_encoder_and_decoder_is_refused() {
        let read = |value: Value| from_peft(value.as_object().unwrap(), &[]);
        let config = json!({"num_virtual_tokens": 5, "num_transformer_submodules": 2});
        assert!(read(config).unwrap_err()[0].to_string().contains("is 2; expected 1"));
        assert!(read(json!({"num_virtual_tokens": 0})).unwrap_err()[0].to_string().contains("expected 1 to 4096"));
        let (method, _) = read(json!({"num_virtual_tokens": 5, "prompt_tuning_init": "TEXT"})).unwrap();
        assert_eq!(serde_json::to_value(method).unwrap()["length"], 5);
    }
}
