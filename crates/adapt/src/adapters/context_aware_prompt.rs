//! Demonstrations before every document whose embeddings move a little, each within a ball of its own: learning in context that is
//! trained on, and stays near to what the demonstrations say.
//!
//! # Update
//! ```text
//! x_td = [E_pd + m_p δ_pd; E_td]         p < P tokens of demonstrations, E_td the embeddings of a document's tokens, from position P on
//! δ_p <- δ_p min(1, ε_p / |δ_p|)         after each update,   ε_p = bound_p sqrt(d / 2048)
//! m_p  = 0 where p is of a label, else 1         bound_p = `bound` where p is of an input, `format_bound` around these
//! L    = (Σ_t nll_t + Σ_p decay^a(p) nll_p) / (how many t and p there are)         t supervised, p before a label's token
//! ```
//!
//! # Symbols
//! `prompt` `E_pd`, `[P, d]` once for the whole base, f32, fixed: the rows of the table of tokens that `tokens` names. `delta` `δ_pd`,
//! `[P, d]`, f32, trained, 0 at first; it does not decay. `types` says of each token what it is of, PEFT's numbers: of the k-th
//! demonstration, from 0, 4k + 1 what stands before and behind its input, 4k + 2 its input, 4k + 3 what stands before its label, 4k + 4
//! its label; left out, all are of what stands around. `a` is 1 for the last label before a document, 2 for the one before it, and so
//! on. The loss is that of training; a validation loss is of documents alone.
//!
//! # Cost
//! `P*d` parameters in all, those of labels among them, where the stream is `d` wide; P rows more in each document, which count in its
//! positions and in a batch, and of which those before labels' tokens have logits. It does not merge.
//!
//! # Limits
//! It starts as the base with the demonstrations before every document. With bounds of 0 it stays that; without bounds and
//! `learn_labels` it is prompt tuning from a text, but for labels, which never move.
//!
//! # Departures
//! PEFT projects before each pass what is projected here after each update: the same. It learns the demonstrations' labels in a document
//! without any of its own as well; here such a document teaches nothing. An adapter that is read is rows, as PEFT keeps it, without
//! bounds or labels: prompt tuning. PEFT's data may name the parts of a document as well (`input_type_mask`), which is labels' business
//! here.
//!
//! # Paper
//! Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods. Blau, Kimhi, Belinkov, Bronstein, Baskin, 2024.

use std::collections::BTreeSet;
use std::sync::Arc;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, SequenceMap, Trained};
use attune_points::engine::{self, Batch, Engine, Job, Source, StepReport, StepRule};
use attune_points::layout::{Axis, Column, LABELS, LabelCounts, NO_LABEL, Values};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Level, Needs, Objective};
use attune_points::{Error, Layout, Locals, Owner, Row, TensorId, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const PROMPT: &str = "prompt";
const DELTA: &str = "delta";

/// Parameters of context-aware prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The tokens of the demonstrations, by number.
    tokens: Vec<u32>,
    /// What each of them is of: 1 what stands around an input, 2 the input, 3 what stands before the label, 4 the label, and so on from 5 in
    /// the next demonstration. All are of what stands around, if it is left out.
    types: Vec<u32>,
    /// How far an input's tokens may move, for a width of 2048.
    #[schemars(range(min = 0.0, max = 1e6))]
    bound: f64,
    /// How far those may move that stand around inputs and labels.
    #[schemars(range(min = 0.0, max = 1e6))]
    format_bound: f64,
    /// Whether the demonstrations' own labels are learned along with documents'.
    learn_labels: bool,
    /// Factor on the loss of a demonstration's label for each label between it and the document, its own among them.
    #[schemars(range(min = 0.0, max = 1.0))]
    decay: f64,
}

impl Default for Config {
    /// PEFT's values. The paper's factor on labels is 0.95.
    fn default() -> Self {
        Self { tokens: Vec::new(), types: Vec::new(), bound: 0.1, format_bound: 0.1, learn_labels: true, decay: 1.0 }
    }
}

pub(super) struct ContextAwarePrompt {
    config: Config,
}

impl Method for ContextAwarePrompt {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
            authors: "Tsachi Blau, Moshe Kimhi, Yonatan Belinkov, Alexander Bronstein, Chaim Baskin",
            year: 2024,
        }),
        applies: &[SiteKind::Embedding],
        targets: prompt::TARGETS,
        parameters: "0",
        shared: "count(tokens)*o",
        rows_before: "count(tokens)",
        moves: Some("documents come after demonstrations"),
        merges: Merges::No,
        peft_type: Some("CPT"),
        rules: &[
            Rule {
                when: "true",
                require: "count(tokens) > 0",
                message: "is empty; expected the numbers of the demonstrations' tokens",
                path: "tokens",
            },
            Rule {
                when: "count(types) > 0",
                require: "count(types) == count(tokens)",
                message: "are not as many as `tokens`; expected one for each of them, or none",
                path: "types",
            },
        ],
        ..Card::new(
            "context-aware-prompt",
            Point::Adapter,
            "Demonstrations before every document whose embeddings move a little, each within a ball of its own: learning in context \
             that is trained on, and stays near to what the demonstrations say.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl ContextAwarePrompt {
    fn length(&self) -> usize {
        self.config.tokens.len()
    }

    /// What each token is of.
    fn types(&self) -> Vec<u32> {
        let Config { tokens, types, .. } = &self.config;
        if types.is_empty() { vec![1; tokens.len()] } else { types.clone() }
    }

    /// What each row is asked for, if that is a token of a label, and how much it counts.
    fn labels(&self) -> Vec<Option<(u32, f64)>> {
        let (types, Config { tokens, decay, .. }) = (self.types(), &self.config);
        let is_label = |of: &u32| *of > 0 && of.is_multiple_of(4);
        let numbers: BTreeSet<u32> = types.iter().copied().filter(is_label).collect();
        let of_next = |place: usize| {
            let of = types.get(place + 1).filter(|of| is_label(of))?;
            let after = numbers.range(of..).count() as i32;
            Some((tokens[place + 1], decay.powi(after)))
        };
        (0..tokens.len()).map(|place| of_next(place).filter(|_| self.config.learn_labels)).collect()
    }

    /// How far each token may move in a stream of this width.
    fn bounds(&self, width: usize) -> Vec<f64> {
        let scale = (width as f64 / 2048.0).sqrt();
        let bound = |of: &u32| match of % 4 {
            0 => 0.0,
            2 => self.config.bound * scale,
            _ => self.config.format_bound * scale,
        };
        self.types().iter().map(bound).collect()
    }
}

impl Adapter for ContextAwarePrompt {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut faults = Vec::new();
        if self.types().iter().all(|of| of.is_multiple_of(4)) {
            faults.push(Fault::new(
                "types",
                "says that all tokens are of labels, which never move; expected others among them",
            ));
        }
        let beyond = self.config.tokens.iter().enumerate().filter(|(_, token)| **token as usize >= arch.vocab);
        for (at, token) in beyond {
            let path = format!("tokens[{at}]");
            faults.push(Fault::new(path.as_str(), format!("is {token}; the base has tokens 0 to {}", arch.vocab - 1)));
        }
        let shape = [self.length(), arch.hidden];
        let tensors = vec![
            TensorSpec { train: false, ..prompt::trained(PROMPT, shape) },
            TensorSpec { decay: false, ..prompt::trained(DELTA, shape) },
        ];
        match prompt::attach(arch, sites, self.length() as u32, tensors) {
            Ok(attachments) if faults.is_empty() => Ok(attachments),
            attached => {
                faults.extend(attached.err().into_iter().flatten());
                Err(faults)
            }
        }
    }

    fn init(&self, at: &Attachment, table: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let rows_pd = prompt::rows_at(table, self.config.tokens.iter().copied())?;
        starts::each(at, rng, |spec| match spec.local {
            PROMPT => Start::Is(rows_pd.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Sequence(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let at = of.attachments.first()?;
        let spec = at.tensors.iter().find(|spec| spec.local == DELTA)?;
        let owner = Owner::Bank { slot: of.slot, set: 0 };
        let id = TensorId { owner, name: spec.name(at.site.as_str()) };
        Some(Box::new(Demonstrated { id, slot: of.slot, bounds: self.bounds(spec.shape[1]), labels: self.labels() }))
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No(prompt::UNMERGED))
    }

    fn peft(&self) -> Option<Peft> {
        let Config { tokens, bound, format_bound, decay, .. } = &self.config;
        let own = json!({
            "cpt_token_ids": tokens,
            "cpt_mask": vec![1; tokens.len()],
            "cpt_tokens_type_mask": self.types(),
            "opt_weighted_loss_type": if *decay < 1.0 { "decay" } else { "none" },
            "opt_loss_decay_factor": decay,
            "opt_projection_epsilon": bound,
            "opt_projection_format_epsilon": format_bound,
        });
        Some(prompt::peft("CPT", self.length() as u32, &own))
    }
}

impl SequenceMap for ContextAwarePrompt {
    fn length(&self) -> usize {
        self.length()
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (prompt_pd, delta_pd) = (tensors.get(PROMPT)?, tensors.get(DELTA)?);
        let moves: Vec<f64> = self.types().iter().map(|of| if of.is_multiple_of(4) { 0.0 } else { 1.0 }).collect();
        let moves_p1 = Tensor::from_vec(moves, (self.length(), 1), &Device::Cpu)?.to_dtype(delta_pd.dtype())?;
        Ok((prompt_pd + delta_pd.broadcast_mul(&moves_p1)?)?)
    }
}

/// Steps that learn labels of demonstrations, and after which no row of a tensor is longer than its bound.
struct Demonstrated {
    id: TensorId,
    slot: u16,
    bounds: Vec<f64>,
    labels: Vec<Option<(u32, f64)>>,
}

impl Demonstrated {
    /// What a row of a demonstration is asked for, and how much it counts.
    fn asked(&self, row: Row) -> Option<(u32, f64)> {
        match row {
            Row::Virtual { slot, index } if slot == self.slot => self.labels.get(index as usize).copied().flatten(),
            _ => None,
        }
    }

    /// How many labels' tokens each document has before it.
    fn count(&self) -> u64 {
        self.labels.iter().flatten().count() as u64
    }

    /// The batch with the labels of demonstrations before documents that have some of their own.
    fn labelled(&self, layout: &Layout) -> attune_points::Result<Layout> {
        let mut labels = layout.labels().to_vec();
        for doc in layout.docs() {
            let rows = doc.rows.start as usize..doc.rows.end as usize;
            if labels[rows.clone()].iter().all(|label| *label == NO_LABEL) {
                continue;
            }
            for (label, row) in labels[rows.clone()].iter_mut().zip(&layout.rows()[rows]) {
                *label = self.asked(*row).map_or(*label, |(token, _)| token);
            }
        }
        let mut labelled = layout.clone();
        labelled.set_column(LABELS, Column { axis: Axis::Row, values: Values::U32(labels) })?;
        Ok(labelled)
    }

    /// The gradient of the loss with the labels of demonstrations, then an update.
    fn update(&self, engine: &mut dyn Engine, batch: &Batch) -> attune_points::Result<StepReport> {
        let (theta, objective) = (engine.theta().clone(), engine.objective());
        let of = WithLabels { documents: &*objective, rule: self };
        let labelled = |(part, layout): &(u32, Arc<Layout>)| Ok((*part, Arc::new(self.labelled(layout)?)));
        let parts = batch.parts.iter().map(labelled).collect::<attune_points::Result<Vec<_>>>()?;
        let tokens = batch.counts.tokens + batch.counts.documents * self.count();
        let scale = 1.0 / of.denominator().of(LabelCounts { tokens, ..batch.counts });
        let parts = engine.grads(&theta, &parts, &of, scale)?;
        let (gradients, loss) = engine.reduce(parts)?;
        let grad_norm = engine.update(gradients)?;
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
    }
}

/// The loss of documents, with the weights of demonstrations' labels.
struct WithLabels<'a> {
    documents: &'a dyn Objective,
    rule: &'a Demonstrated,
}

impl Objective for WithLabels<'_> {
    fn needs(&self) -> Needs {
        self.documents.needs()
    }

    fn denominator(&self) -> Denominator {
        self.documents.denominator()
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> attune_points::Result<ChunkLoss> {
        let ChunkLoss::CrossEntropy { mut weight_t } = self.documents.chunk(chunk)? else {
            let message = "labels of demonstrations are learned by cross-entropy, and the objective has another loss";
            return Err(Error::Refused(message.to_owned()));
        };
        for (weight, row) in weight_t.iter_mut().zip(chunk.rows) {
            *weight *= self.rule.asked(chunk.layout.rows()[row.row as usize]).map_or(1.0, |(_, weight)| weight);
        }
        Ok(ChunkLoss::CrossEntropy { weight_t })
    }
}

/// The rows, those that are longer than their bounds scaled down to these.
fn bounded(rows_pd: &Tensor, bounds: &[f64]) -> attune_points::Result<Tensor> {
    let mut rows = rows_pd.to_vec2::<f32>()?;
    for (row, bound) in rows.iter_mut().zip(bounds) {
        let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        if length > *bound {
            let factor = bound / length;
            row.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
        }
    }
    Ok(Tensor::from_vec(rows.concat(), rows_pd.shape(), rows_pd.device())?)
}

impl StepRule for Demonstrated {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        let of = job.objective;
        let adds_tokens = of.level() == Level::Chunk && of.denominator() == Denominator::Tokens && of.copies() == 1;
        (self.count() > 0 && !adds_tokens).then(|| {
            "learns the labels of its demonstrations along with documents', and the objective is no mean over tokens: expected one that \
             is, or `learn_labels: false`"
                .to_owned()
        })
    }

    fn step(&mut self, _: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let report = if self.count() > 0 { self.update(engine, &batch)? } else { engine::update_on(engine, &batch)? };
        let mut theta = engine.theta().clone();
        let moved =
            theta.get(&self.id).ok_or_else(|| Error::Refused(format!("{} is not among the parameters", self.id)))?;
        let bounded = bounded(moved, &self.bounds)?;
        theta.put(&self.id, bounded);
        engine.set(theta);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(tokens: &[u32], types: &[u32]) -> ContextAwarePrompt {
        let (tokens, types) = (tokens.to_vec(), types.to_vec());
        let config = Config { tokens, types, bound: 0.2, format_bound: 0.1, decay: 0.5, ..Config::default() };
        ContextAwarePrompt { config }
    }

    #[test]
    fn labels_are_asked_of_the_rows_before_them_and_count_the_less_the_earlier_they_stand() {
        let (tokens, types) = ([9, 1, 2, 3, 4, 5, 6], [4, 1, 4, 4, 6, 8, 9]);
        let mut of = method(&tokens, &types);
        let labels = [None, Some((2, 0.25)), Some((3, 0.25)), None, Some((5, 0.5)), None, None];
        assert_eq!(of.labels(), labels);
        let id = TensorId::input_embeddings();
        let rule = Demonstrated { id, slot: 1, bounds: Vec::new(), labels: of.labels() };
        let mut layout = Layout::new();
        let before = |slot| (0..7).map(move |index| (Row::Virtual { slot, index }, NO_LABEL));
        let token = |label| (Row::Token(1), label);
        layout.push(Default::default(), before(0).chain(before(1)).chain([token(3), token(NO_LABEL)]));
        layout.push(Default::default(), before(1).chain([token(NO_LABEL)]));
        let labelled = rule.labelled(&layout).unwrap();
        let found: Vec<(u32, u32)> = labelled.supervised().iter().map(|row| (row.row, row.label)).collect();
        assert_eq!(found, [(8, 2), (9, 3), (11, 5), (14, 3)], "of the first document alone");
        assert_eq!(labelled.counts().tokens, layout.counts().tokens + layout.counts().documents * rule.count());
        of.config.learn_labels = false;
        assert!(of.labels().iter().all(Option::is_none));
    }

    #[test]
    fn rows_are_scaled_down_to_the_bounds_of_their_kind_and_short_ones_stay() {
        let bounds = method(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 6]).bounds(512);
        assert_eq!(bounds, [0.05, 0.1, 0.05, 0.0, 0.1]);
        let rows = [[0.03f32, 0.04], [0.3, 0.4], [0.0, -0.5], [1.0, 0.0], [0.0, 0.0]];
        let found = bounded(&Tensor::new(&rows, &Device::Cpu).unwrap(), &bounds).unwrap().to_vec2::<f32>().unwrap();
        let expected = [[0.03f32, 0.04], [0.06, 0.08], [0.0, -0.05], [0.0, 0.0], [0.0, 0.0]];
        for (found, expected) in found.iter().flatten().zip(expected.as_flattened()) {
            assert!((found - expected).abs() < 1e-7, "{found} and {expected}");
        }
        assert_eq!(found[0], expected[0], "what is within its bound keeps its bits");
    }

    #[test]
    fn labels_stay_where_they_are() {
        let method = method(&[1, 2], &[2, 4]);
        let rows = |values: [[f64; 2]; 2]| Tensor::new(&values, &Device::Cpu).unwrap();
        let tensors = [(PROMPT, rows([[1.0, 2.0], [3.0, 4.0]])), (DELTA, rows([[0.5, 0.25], [9.0, 9.0]]))];
        let made = method.graph(&Locals::new("wte", tensors)).unwrap().to_vec2::<f64>().unwrap();
        assert_eq!(made, [[1.5, 2.25], [3.0, 4.0]]);
    }

    #[test]
    fn demonstrations_of_which_nothing_moves_are_refused() {
        let config =
            r#"{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 11}"#;
        let arch = Architecture::from_json(config.as_bytes()).unwrap();
        let said = |tokens: &[u32], types: &[u32]| {
            let faults = method(tokens, types).attach(&arch, &arch.sites()).unwrap_err();
            faults.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(said(&[1, 2], &[4, 8])[0].contains("all tokens are of labels"));
        assert_eq!(said(&[1, 11], &[]), ["`tokens[1]` is 11; the base has tokens 0 to 10"]);
    }
}
