//! One LoRA of which every smaller rank is trained as well, a random one of them a step: what it is cut to is chosen at the end; where the rank that a
//! server can bear, or that a task needs, is not known before. The base beside it may be pruned, and MLPs may be elastic as well.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T                    s = alpha / rank
//! at each step   r' drawn among rank, rank - step, …, smallest for each group of linears that read the same rows,
//!                and of A the first r' rows, of B the first r' columns, take part and learn
//! at the last    all but the first r* are 0, where r* is the one in the middle, the largest or the smallest of these, or that of `ranks`
//! sparsity > 0   P_oi = M_oi W_oi in place of W, where of each row of M that share is 0 whose |w_oi| ‖x_i‖ are least, measured before the first step
//! masked         W_oi + s · (B A)_oi [W_oi ≠ 0], or the same of P: what is 0 in the weight stays 0
//! narrowest < 1  at each step one of `widths` widths is drawn for each MLP, from the whole one to that share of it, and only its first channels are
//!                open: rows of the weight, the bias and the change that lead into others are 0; at the last as `left` says
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained, of `rank`; A starts uniform in ±1/sqrt(i), B at 0. The scaling is of `rank` whatever r' is.
//! `drop` is dropout on the input. `mask` M, a bit for each entry, 64 of them an i64; `open`, f32, 1 for each channel of an MLP that is open; neither trains.
//!
//! # Cost
//! `rank*(i+o)` parameters per linear; `2 rank (i+o)` extra FLOPs per token forward, as LoRA's, whichever r' is drawn. Where it is pruned or masked, and
//! before MLPs that are elastic, each pass makes another weight in place of it, forward and in reverse, at `2 rank i o` FLOPs each, and the gradient
//! by it. `sparsity` looks at `examples` examples before the first step.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit, unless that is pruned. With `smallest` as `rank` it is LoRA. Until the last step the whole of it is what is
//! validated and what a checkpoint holds. What is left in the end is written down alone: factors of the rank that is left, which are LoRA's where nothing
//! is made of the weight. A change that is not masked is not merged into a weight that is pruned, for nothing would be left of the zeros.
//!
//! # Departures
//! The choice at the end needs no search; one among jobs of other `left` and `ranks` is the sweep's. Weights have whole numbers: SQFT's form whose sum is
//! quantised anew at each step is not here. Channels that are closed in the end stay, as zeros, in the weight that leads into the MLP. LoNAS takes layers
//! of other widths from a list; widths are equally far from each other here.
//!
//! # Paper
//! Low-Rank Adapters Meet Neural Architecture Search for LLM Compression. Muñoz, Yuan, Jain, 2025; Shears: Unstructured Sparsity with Neural
//! Low-rank Adapter Search. Muñoz, Yuan, Jain, 2024. What is pruned: A Simple and Effective Pruning Approach for Large Language Models. Sun, Liu,
//! Bair, Kolter, 2023.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Compacted, FusedRows, Merged, Peft, Port, RowCx, RowMap, Trained, WeightMap,
};
use attune_points::engine::StepRule;
use attune_points::stats::What;
use attune_points::{Error, Locals, Owner, Params, Stats, StatsRequest, TensorId, TensorName, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::Rows as Counting;
use crate::parts::dropout::dropped;
use crate::parts::elastic::{self, A, B, Elastic, Mlp, Pair, Within};
use crate::parts::gates::OPEN;
use crate::parts::masks::{self, MASK};
use crate::parts::scaling::Scaling;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, own};

/// What is left in the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Left {
    /// The one in the middle of all.
    #[default]
    Middle,
    /// The largest, all of it.
    Largest,
    /// The smallest.
    Smallest,
}

impl Left {
    /// Which of some that come with the largest first.
    fn of(self, all: &[usize]) -> Option<usize> {
        let at = match self {
            Self::Middle => all.len().saturating_sub(1) / 2,
            Self::Largest => 0,
            Self::Smallest => all.len().saturating_sub(1),
        };
        all.get(at).copied()
    }
}

/// Parameters of elastic LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The largest rank.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// From one rank to the next.
    #[schemars(range(min = 1, max = 4096))]
    step: u32,
    /// The smallest rank, or the least that steps from the largest lead to above it.
    #[schemars(range(min = 1, max = 4096))]
    smallest: u32,
    /// What is left in the end, of ranks and of widths.
    left: Left,
    /// The rank that is left at single sites, by whole path, where it is another one; the same at all that read the same rows.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    ranks: BTreeMap<String, u32>,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Share of the base's weights that is 0 before anything trains; 0 for none.
    #[schemars(range(min = 0.0, max = 0.99))]
    sparsity: f64,
    /// How many examples of the training data say which.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// Which of their rows count.
    rows: Counting,
    /// Keeps the change, too, at 0 where the weight is 0.
    masked: bool,
    /// Share of an MLP's channels that the narrowest one has; 1 for MLPs that are always whole.
    #[schemars(range(min = 0.01, max = 1.0))]
    narrowest: f64,
    /// From the whole MLP to the narrowest one, how many widths.
    #[schemars(range(min = 2, max = 64))]
    widths: u32,
    /// What is left is all that is there: what folders of a run that has ended say.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    extracted: bool,
}

impl Default for Config {
    /// The authors' values, without dropout, on the base as it is.
    fn default() -> Self {
        Self {
            rank: 32,
            step: 8,
            smallest: 16,
            left: Left::Middle,
            ranks: BTreeMap::new(),
            alpha: 64.0,
            dropout: 0.0,
            sparsity: 0.0,
            examples: 128,
            rows: Counting::Tokens,
            masked: false,
            narrowest: 1.0,
            widths: 5,
            extracted: false,
        }
    }
}

impl Config {
    /// The ranks, the largest first.
    fn all_ranks(&self) -> Vec<usize> {
        let all = (0..).map_while(|n| self.rank.checked_sub(n * self.step));
        all.take_while(|rank| *rank >= self.smallest).map(|rank| rank as usize).collect()
    }

    /// The one that is left in the end at most sites.
    fn last(&self) -> usize {
        self.left.of(&self.all_ranks()).unwrap_or(self.rank as usize)
    }

    /// The one that is left at a site.
    fn left_at(&self, site: &str) -> usize {
        self.ranks.get(site).map_or_else(|| self.last(), |rank| *rank as usize)
    }

    /// The widths of an MLP of so many channels, the whole one first.
    fn all_widths(&self, channels: usize) -> Vec<usize> {
        let last = f64::from(self.widths.max(2) - 1);
        let share = |n: u32| 1.0 - (1.0 - self.narrowest) * f64::from(n) / last;
        let mut all: Vec<usize> =
            (0..self.widths).map(|n| ((share(n) * channels as f64).round() as usize).max(1)).collect();
        all.dedup();
        all
    }

    /// What it makes of the weight, if it does not stay beside it.
    const fn is_of_weights(&self) -> bool {
        self.sparsity > 0.0 || self.masked
    }

    /// What is wrong with the ranks of single sites.
    fn faults(&self, sites: &[Site]) -> Vec<Fault> {
        let all = self.all_ranks();
        let fault = |message: String| Fault::new("ranks", message);
        let mut faults = Vec::new();
        for (path, rank) in &self.ranks {
            let Some(site) = sites.iter().find(|site| site.id.as_str() == path) else {
                faults.push(fault(format!("names {path:?}, which is none of its sites")));
                continue;
            };
            if !all.contains(&(*rank as usize)) {
                faults.push(fault(format!("has {rank} for {path:?}; expected one of {all:?}")));
            }
            let beside =
                sites.iter().find(|other| other.reads_with(site) && self.left_at(other.id.as_str()) != *rank as usize);
            if let Some(other) = beside {
                let message = format!(
                    "has {rank} for {path:?}, and {} for {}, which reads the same rows: expected the same rank for both",
                    self.left_at(other.id.as_str()),
                    other.id
                );
                faults.push(fault(message));
            }
        }
        faults
    }
}

pub(super) struct ElasticLora {
    config: Config,
    rows: Rows,
    weights: Within,
    /// Of the sites that it was put on last, the first that reads what each does.
    groups: Mutex<BTreeMap<String, String>>,
}

#[derive(Clone, Copy)]
struct Rows {
    scale: f64,
    dropout: f64,
}

impl Method for ElasticLora {
    const CARD: Card = Card {
        aliases: &["nls", "shears", "sqft", "lonas"],
        paper: Some(Paper {
            title: "Low-Rank Adapters Meet Neural Architecture Search for LLM Compression",
            authors: "J. Pablo Muñoz, Jinjie Yuan, Nilesh Jain",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        input_statistics: "8*i*(sparsity > 0)",
        merges: Merges::Factors,
        stays_beside: "sparsity > 0 and not masked",
        rules: &[
            Rule {
                when: "true",
                require: "smallest <= rank",
                message: "is more than the largest rank; expected `rank` at most",
                path: "smallest",
            },
            Rule {
                when: "sparsity > 0 or masked or narrowest < 1",
                require: "dropout == 0",
                message: "is for a change on rows, and with `sparsity`, `masked` or `narrowest` it is made within the weight; expected 0",
                path: "dropout",
            },
        ],
        ..Card::new(
            "elastic-lora",
            Point::Adapter,
            "One LoRA of which every smaller rank is trained as well, a random one of them a step: what it is cut to is chosen at the end; \
             where the rank that a server can bear, or that a task needs, is not known before. The base beside it may be pruned, and MLPs \
             may be elastic as well.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self::new(config)))
    }
}

impl ElasticLora {
    fn new(config: Config) -> Self {
        let scale = config.alpha / f64::from(config.rank);
        let (rows, weights) = (Rows { scale, dropout: config.dropout }, Within { scale, masked: config.masked });
        Self { config, rows, weights, groups: Mutex::default() }
    }

    /// What it wants to know before the base is pruned.
    fn request(&self) -> StatsRequest {
        let what = What::InputNorms { rows: self.config.rows.counted() };
        StatsRequest { what, examples: self.config.examples, domains: None }
    }

    fn started(
        &self,
        at: &Attachment,
        mask: Option<&Tensor>,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match (spec.local, mask) {
            (A, _) => Start::kaiming(spec),
            (OPEN, _) => Start::Constant(1.0),
            (MASK, Some(mask)) => Start::Is(mask.clone()),
            _ => Start::Constant(0.0),
        })
    }
}

fn has(at: &Attachment, local: &str) -> bool {
    at.tensors.iter().any(|spec| spec.local == local)
}

impl Adapter for ElasticLora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let first = |site: &Site| sites.iter().find(|other| other.reads_with(site)).unwrap_or(site).id.to_string();
        *self.groups.lock().unwrap_or_else(PoisonError::into_inner) =
            sites.iter().map(|site| (site.id.to_string(), first(site))).collect();
        let rank = |site: &str| if self.config.extracted { self.config.left_at(site) as u32 } else { self.config.rank };
        let mut attachments = factors::attach(sites, A, B, rank)?;
        for (at, site) in attachments.iter_mut().zip(sites) {
            let (o, i) = (at.tensors[1].shape[0], at.tensors[0].shape[1]);
            if self.config.sparsity > 0.0 {
                at.tensors.push(masks::spec(o * i));
            }
            if self.config.narrowest < 1.0 && site.place == Place::Up {
                at.tensors.push(TensorSpec::fixed(OPEN, [o]));
            }
        }
        let faults = self.config.faults(sites);
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if has(at, MASK) {
            let message = "a base that is pruned needs what is measured of its inputs";
            return Err(Error::Refused(message.to_owned()));
        }
        self.started(at, None, rng)
    }

    fn calibrate(&self) -> Vec<StatsRequest> {
        if self.config.sparsity > 0.0 { vec![self.request()] } else { Vec::new() }
    }

    fn init_by(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        stats: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        if !has(at, MASK) {
            return self.init(at, weight, rng);
        }
        let inputs = stats.norms(&self.request(), &at.site)?;
        self.started(at, Some(&masks::by_inputs(weight, inputs, self.config.sparsity)?), rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if self.config.is_of_weights() || has(at, OPEN) { Port::Weight(&self.weights) } else { Port::Delta(&self.rows) }
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let id = |site: &str, local: &str| TensorId {
            owner: Owner::Bank { slot: of.slot, set: 0 },
            name: TensorName::new(site, local),
        };
        let pair = |at: &&Attachment| {
            let site = at.site.as_str();
            let group = groups.get(site).map_or(site, String::as_str).to_owned();
            Pair { site: site.to_owned(), group, a: id(site, A), b: id(site, B), left: self.config.left_at(site) }
        };
        let mlp = |at: &&Attachment| {
            let site = at.site.as_str();
            let spec = at.tensors.iter().find(|spec| spec.local == OPEN)?;
            let widths = self.config.all_widths(spec.shape[0]);
            let left = self.config.left.of(&widths)?;
            Some(Mlp { site: site.to_owned(), open: id(site, OPEN), left, widths })
        };
        let (pairs, mlps) =
            (of.attachments.iter().map(pair).collect(), of.attachments.iter().filter_map(mlp).collect());
        let rule = Elastic { ranks: self.config.all_ranks(), steps: of.steps.0, pairs, mlps };
        let one = rule.ranks.len() < 2 && rule.mlps.is_empty();
        (!one && !self.config.extracted).then(|| Box::new(rule) as Box<dyn StepRule>)
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        if matches!(self.port(at), Port::Delta(_)) {
            let (left, right) = (tensors.get(B)?.clone(), tensors.get(A)?.clone());
            return Ok(Merged::Factors { left, right, scale: self.rows.scale });
        }
        if has(at, MASK) && !self.config.masked {
            return Ok(Merged::No("the base is pruned and the change is not: `masked` keeps both sparse"));
        }
        let w_oi = weight.dense(tensors.get(B)?.dtype())?;
        let bias = weight.bias(w_oi.dtype())?.filter(|_| has(at, OPEN));
        let bias = bias.map(|bias| self.weights.bias(&bias, &w_oi, tensors)).transpose()?;
        Ok(Merged::Weight { weight: WeightMap::graph(&self.weights, &w_oi, tensors)?, bias })
    }

    fn compacted(&self, at: &[Attachment], params: &Params) -> attune_points::Result<Option<Compacted>> {
        if self.config.extracted
            || at.iter().all(|at| self.config.left_at(at.site.as_str()) == self.config.rank as usize)
        {
            return Ok(None);
        }
        let (mut attachments, mut cut) = (at.to_vec(), Params::new());
        for at in &mut attachments {
            let left = self.config.left_at(at.site.as_str());
            for spec in &mut at.tensors {
                let name = spec.name(at.site.as_str());
                let held = params.get(&name).ok_or_else(|| Error::Refused(format!("{name} has no value")))?;
                let dim = match spec.local {
                    A => 0,
                    B => 1,
                    _ => {
                        cut.insert_declared(spec, at.site.as_str(), held.clone());
                        continue;
                    }
                };
                // A run that was ended before its last step has all ranks.
                if !elastic::is_cut(held, dim, left)? {
                    return Ok(None);
                }
                spec.shape[dim] = left;
                cut.insert_declared(spec, at.site.as_str(), held.narrow(dim, 0, left)?.contiguous()?);
            }
        }
        let adapter = Box::new(Self::new(Config { extracted: true, ..self.config.clone() }));
        Ok(Some(Compacted { adapter, attachments, params: cut }))
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, alpha, dropout, .. } = self.config;
        if self.config.is_of_weights() || self.config.narrowest < 1.0 {
            return Some(own::peft(Self::CARD.name, &self.config));
        }
        // What PEFT divides by is the rank that is there.
        let of = |rank: usize| self.rows.scale * rank as f64;
        let scaling = if self.config.extracted {
            let alphas = self.config.ranks.iter().map(|(site, rank)| (site.clone(), of(*rank as usize))).collect();
            let last = self.config.last();
            Scaling { rank: last as u32, alpha: of(last), rslora: false, ranks: self.config.ranks.clone(), alphas }
        } else {
            Scaling { rank, alpha, rslora: false, ranks: BTreeMap::new(), alphas: BTreeMap::new() }
        };
        let mut lora = scaling.lora_config();
        lora.lora_dropout = dropout;
        Some(own::as_lora(Self::CARD.name, &self.config, &lora))
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

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::stats::{Norms, Stat};
    use attune_spec::id::Step;
    use candle_core::{DType, Device};

    use super::*;

    const SITE: &str = "model.layers.0.mlp.up_proj";

    fn config(rank: u32, step: u32, smallest: u32, left: Left) -> Config {
        Config { rank, step, smallest, left, ..Config::default() }
    }

    #[test]
    fn ranks_go_down_by_steps_and_the_one_in_the_middle_is_left() {
        for (config, ranks, last) in [
            (Config::default(), vec![32, 24, 16], 24),
            (config(32, 4, 28, Left::Middle), vec![32, 28], 32),
            (config(8, 3, 1, Left::Smallest), vec![8, 5, 2], 2),
            (config(4, 1, 1, Left::Largest), vec![4, 3, 2, 1], 4),
            (config(4, 9, 4, Left::Middle), vec![4], 4),
        ] {
            assert_eq!((config.all_ranks(), config.last()), (ranks, last));
        }
        let own = Config { ranks: BTreeMap::from([(SITE.to_owned(), 16)]), ..Config::default() };
        assert_eq!((own.left_at(SITE), own.left_at("elsewhere")), (16, 24));
        let narrow = Config { narrowest: 0.5, ..Config::default() };
        assert_eq!(narrow.all_widths(11008), [11008, 9632, 8256, 6880, 5504]);
    }

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn at(tensors: Vec<TensorSpec>) -> Attachment {
        Attachment { site: SiteId::new(SITE), tensors }
    }

    fn pair(o: usize, r: usize, i: usize) -> Vec<TensorSpec> {
        vec![TensorSpec::trained(A, [r, i]), TensorSpec::trained(B, [o, r])]
    }

    fn size(x: &Tensor) -> f64 {
        x.abs().unwrap().sum_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar().unwrap()
    }

    /// What is pruned is 0 when it starts and, masked, for ever; a weight that was sparse before is no less so then.
    #[test]
    fn a_pruned_weight_stays_sparse_where_the_change_is_masked() {
        let w = normal("w", &[6, 10]);
        let w = (&w * w.abs().unwrap().ge(0.3).unwrap().to_dtype(DType::F64).unwrap()).unwrap();
        for masked in [true, false] {
            let lora =
                ElasticLora::new(Config { sparsity: 0.4, masked, rank: 2, step: 1, smallest: 1, ..Config::default() });
            let at = at([pair(6, 2, 10), vec![masks::spec(60)]].concat());
            let mut stats = Stats::none();
            let mut squares = [1.0; 10];
            squares[7] = 0.0;
            let norms = Norms { sum_i: Tensor::new(&squares, &Device::Cpu).unwrap(), rows: 3, documents: 1 };
            stats.insert(lora.calibrate().remove(0), at.site.clone(), Stat::Norms(norms));
            assert!(lora.init(&at, &w, &mut Rng::new(1, "init")).is_err());
            let (started, _) = lora.init_by(&at, &w, &stats, &mut Rng::new(1, "init")).unwrap();
            let words = started.get(MASK).unwrap().clone();
            let stays = masks::unpacked(&words, 60).unwrap();
            assert!(stays.chunks(10).all(|row| row.iter().filter(|stays| **stays).count() == 6 && !row[7]));
            let locals =
                Locals::new(SITE, [(A, normal("a", &[2, 10])), (B, normal("b", &[6, 2])), (MASK, words.clone())]);
            let made = WeightMap::graph(&lora.weights, &w, &locals).unwrap();
            let still = Locals::new(
                SITE,
                [(A, normal("a", &[2, 10])), (B, normal("b", &[6, 2]).zeros_like().unwrap()), (MASK, words)],
            );
            let pruned = WeightMap::graph(&lora.weights, &w, &still).unwrap();
            let zeros = |x: &Tensor| x.eq(0.0).unwrap().to_dtype(DType::F64).unwrap();
            assert!(size(&zeros(&pruned)) >= 24.0);
            // Where the pruned weight is 0 and what is made of it is not.
            let filled = size(&(zeros(&pruned) * (zeros(&made) - 1.0).unwrap()).unwrap());
            assert_eq!(filled > 0.0, !masked);
            match lora.merge(&at, &locals, &w).unwrap() {
                Merged::Weight { weight, .. } => assert!(masked && size(&(weight - made).unwrap()) == 0.0),
                Merged::No(why) => assert!(!masked && why.contains("masked")),
                other => panic!("{other:?}"),
            }
            let peft = lora.peft().unwrap();
            assert!(own::is_own(&peft.config) && peft.config["peft_type"] == "ELASTIC_LORA");
        }
    }

    /// What is written down of a run that has ended is a LoRA of the rank that is left, which computes what the first ranks of the whole do.
    #[test]
    fn what_is_left_is_a_lora_of_its_rank_by_the_scaling_of_the_whole() {
        for (left, rank) in [(Left::Middle, 3), (Left::Smallest, 1)] {
            let lora = ElasticLora::new(config(4, 1, 1, left));
            let at = [at(pair(2, 4, 3))];
            let mut params = Params::new();
            let narrow = |x: Tensor| x.to_dtype(DType::F32).unwrap();
            let (a, b) = (narrow(normal("a", &[4, 3])), narrow(normal("b", &[2, 4])));
            params.insert_declared(&at[0].tensors[0], SITE, a.clone());
            params.insert_declared(&at[0].tensors[1], SITE, b.clone());
            assert!(lora.compacted(&at, &params).unwrap().is_none(), "before the last step all ranks are there");
            let (a, b) = (elastic::first(&a, 0, rank).unwrap(), elastic::first(&b, 1, rank).unwrap());
            params.insert(TensorName::new(SITE, A), a.clone());
            params.insert(TensorName::new(SITE, B), b.clone());
            let Compacted { adapter, attachments, params } = lora.compacted(&at, &params).unwrap().unwrap();
            let of = |local: &str| params.get(&TensorName::new(SITE, local)).unwrap().clone();
            assert_eq!((of(A).dims(), of(B).dims()), ([rank, 3].as_slice(), [2, rank].as_slice()));
            assert_eq!(attachments[0].tensors, pair(2, rank, 3));
            let x = Rng::new(1, "x").normal_tensor((5, 3), 1.0, DType::F32).unwrap();
            let (site, layout) = (SiteId::new(SITE), attune_points::Layout::new());
            let cx = RowCx { site: &site, output: 2, dropout: None, layout: &layout, rows: None };
            let whole = lora.rows.graph(&x, &Locals::new(SITE, [(A, a), (B, b)]), &cx).unwrap();
            let Port::Delta(map) = adapter.port(&attachments[0]) else { panic!("no rows") };
            let alone = map.graph(&x, &Locals::new(SITE, [(A, of(A)), (B, of(B))]), &cx).unwrap();
            assert!(size(&(whole - alone).unwrap()) < 1e-5);
            // PEFT divides the numerator by the rank that is there.
            let peft = adapter.peft().unwrap();
            let number = |key: &str| peft.config[key].as_f64().unwrap();
            assert_eq!((number("r"), number("lora_alpha")), (rank as f64, 64.0 / 4.0 * rank as f64));
            assert!(adapter.step_rule(&Trained { slot: 0, attachments: vec![&at[0]], steps: Step(3) }).is_none());
            assert!(adapter.compacted(&attachments, &params).unwrap().is_none());
        }
    }

    #[test]
    fn a_single_rank_is_of_usual_steps_and_the_file_is_loras() {
        let plain = ElasticLora::new(config(4, 1, 4, Left::Middle));
        assert!(plain.step_rule(&Trained { slot: 0, attachments: Vec::new(), steps: Step(3) }).is_none());
        let peft = plain.peft().unwrap();
        assert_eq!(
            (&peft.config["peft_type"], &peft.config["r"], &peft.config["lora_alpha"]),
            (&"LORA".into(), &4.into(), &64.into())
        );
        assert!(own::is_own(&peft.config));
    }
}
