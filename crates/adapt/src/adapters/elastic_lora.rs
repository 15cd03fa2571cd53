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
//! bits > 0       Q = d_og (clamp(round(W'_oi / d_og) + z_og, 0, 2^bits - 1) - z_og) in place of that sum W'    g groups of `group_size` inputs
//!                ∂Q/∂W' = 1 where nothing is clamped, else 0
//! searched       after the last step r* of each group, and the width of each MLP, are those of a choice that no other one beats in both the
//!                validation loss and its numbers, of `evaluations` that NSGA-II tries: the one of least loss with a share `most` of the numbers
//! narrowest < 1  at each step one of `widths` widths is drawn for each MLP, from the whole one to that share of it, and only its first channels are
//!                open: rows of the weight, the bias and the change that lead into others are 0; at the last as `left` says
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained, of `rank`; A starts uniform in ±1/sqrt(i), B at 0. The scaling is of `rank` whatever r' is.
//! `drop` is dropout on the input. `grid_step` d and `grid_zero` z, f32, are of the weight as it starts, P where it is pruned: from its least to its
//! largest number in each group, with 0 among the values. `mask` M, a bit for each entry, 64 of them an i64; `open`, f32, 1 for each channel of an MLP that is open; neither trains.
//!
//! # Cost
//! `rank*(i+o)` parameters per linear; `2 rank (i+o)` extra FLOPs per token forward, as LoRA's, whichever r' is drawn. Where it is pruned or masked, and
//! before MLPs that are elastic, each pass makes another weight in place of it, forward and in reverse, at `2 rank i o` FLOPs each, and the gradient
//! by it. `sparsity` looks at `examples` examples before the first step.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit, unless that is pruned. With `smallest` as `rank` it is LoRA. Until the last step the whole of it is what is
//! validated and what a checkpoint holds. What is left in the end is written down alone: factors of the rank that is left, which are LoRA's where nothing
//! is made of the weight. With `bits` the model starts as what few bits make of it, and what is merged are exactly the values that it trained with.
//! A change that is not masked is not merged into a weight that is pruned, for nothing would be left of the zeros.
//!
//! # Departures
//! The choice at the end needs no search unless one is asked for, and that one counts parameters rather than operations. Steps and zeros of few
//! bits are those of the range of each group, SQFT's those that GPTQ finds; what is merged is written as numbers, which are on the grid. Channels that are closed in the end stay, as zeros, in the weight that leads into the MLP. LoNAS takes layers
//! of other widths from a list; widths are equally far from each other here.
//!
//! # Paper
//! Low-Rank Adapters Meet Neural Architecture Search for LLM Compression. Muñoz, Yuan, Jain, 2025; Shears: Unstructured Sparsity with Neural
//! Low-rank Adapter Search. Muñoz, Yuan, Jain, 2024. What is pruned: A Simple and Effective Pruning Approach for Large Language Models. Sun, Liu,
//! Bair, Kolter, 2023.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Compacted, Merged, Peft, Port, Trained, WeightMap};
use attune_points::engine::StepRule;
use attune_points::stats::What;
use attune_points::{Error, Locals, Params, Stats, StatsRequest, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::Rows as Counting;
use crate::parts::elastic::{self, A, B, Beside, Elastic, Within};
use crate::parts::gates::OPEN;
use crate::parts::grid::{self, Grid};
use crate::parts::masks::{self, MASK};
use crate::parts::scaling::Scaling;
use crate::parts::starts::{self, Start};
use crate::parts::subnetworks::Search;
use crate::parts::supernet::{self, About, Left, Ranks};
use crate::parts::{factors, own};

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
    /// Bits of each number of the weight with its change; 0 for whole numbers.
    #[schemars(range(min = 0, max = 8))]
    bits: u32,
    /// Inputs of a group whose numbers share a step, with `bits`.
    #[schemars(range(min = 1, max = 65536))]
    group_size: u32,
    /// Share of an MLP's channels that the narrowest one has; 1 for MLPs that are always whole.
    #[schemars(range(min = 0.01, max = 1.0))]
    narrowest: f64,
    /// From the whole MLP to the narrowest one, how many widths.
    #[schemars(range(min = 2, max = 64))]
    widths: u32,
    /// Choices of what is left that are tried, with `left: searched`.
    #[schemars(range(min = 1, max = 100_000))]
    evaluations: u32,
    /// How many of them at a time.
    #[schemars(range(min = 2, max = 1000))]
    population: u32,
    /// What is found has at most this share of the numbers of all of it.
    #[schemars(range(min = 0.0, max = 1.0))]
    most: f64,
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
            bits: 0,
            group_size: 128,
            narrowest: 1.0,
            widths: 5,
            evaluations: 200,
            population: 8,
            most: 1.0,
            extracted: false,
        }
    }
}

impl Config {
    /// Its ranks, and which are left.
    fn ranks(&self) -> Ranks {
        let Self { rank, step, smallest, left, .. } = *self;
        Ranks { rank, step, smallest, left, at: self.ranks.clone() }
    }

    /// What it makes of the weight, if it does not stay beside it.
    const fn is_of_weights(&self) -> bool {
        self.sparsity > 0.0 || self.masked || self.bits > 0
    }

    /// What weights with their changes are held in.
    fn grid(&self) -> Option<Grid> {
        (self.bits > 0).then_some(Grid { bits: self.bits, group: self.group_size as usize })
    }

    /// How what is left is searched for.
    fn search(&self) -> Option<Search> {
        let (evaluations, population) = (self.evaluations as usize, self.population as usize);
        (self.left == Left::Searched).then_some(Search { evaluations, population, most: self.most })
    }
}

pub(super) struct ElasticLora {
    config: Config,
    ranks: Ranks,
    rows: Beside,
    weights: Within,
    /// Of the sites that it was put on last.
    sites: Mutex<BTreeMap<String, About>>,
}

impl Method for ElasticLora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
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
        graph_numbers: "o*i",
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
                when: "sparsity > 0 or masked or narrowest < 1 or bits > 0",
                require: "dropout == 0",
                message: "is for a change on rows, and with `sparsity`, `masked`, `bits` or `narrowest` it is made within the weight; expected 0",
                path: "dropout",
            },
            Rule {
                when: "true",
                require: "bits != 1",
                message: "is 1, with which a number and 0 are all that there is; expected 2 to 8, or 0 for whole numbers",
                path: "bits",
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
        let rows = Beside { scale, dropout: config.dropout };
        let weights = Within { scale, masked: config.masked, grid: config.grid() };
        Self { ranks: config.ranks(), config, rows, weights, sites: Mutex::default() }
    }

    /// What it wants to know before the base is pruned.
    fn request(&self) -> StatsRequest {
        let what = What::InputNorms { rows: self.config.rows.counted() };
        StatsRequest { what, examples: self.config.examples, domains: None }
    }

    fn started(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        mask: Option<&Tensor>,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let of_grid = self.weights.grid.map(|grid| grid.of_kept(weight, mask)).transpose()?;
        starts::each(at, rng, |spec| match (spec.local, mask, &of_grid) {
            (A, ..) => Start::kaiming(spec),
            (OPEN, ..) => Start::Constant(1.0),
            (MASK, Some(mask), _) => Start::Is(mask.clone()),
            (grid::STEP, _, Some((step, _))) => Start::Is(step.clone()),
            (grid::ZERO, _, Some((_, zero))) => Start::Is(zero.clone()),
            _ => Start::Constant(0.0),
        })
    }
}

fn has(at: &Attachment, local: &str) -> bool {
    at.tensors.iter().any(|spec| spec.local == local)
}

impl Adapter for ElasticLora {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        *self.sites.lock().unwrap_or_else(PoisonError::into_inner) = supernet::about(sites, arch);
        let rank = |site: &str| if self.config.extracted { self.ranks.left_at(site) as u32 } else { self.config.rank };
        let mut attachments = factors::attach(sites, A, B, rank)?;
        for (at, site) in attachments.iter_mut().zip(sites) {
            let (o, i) = (at.tensors[1].shape[0], at.tensors[0].shape[1]);
            if self.config.sparsity > 0.0 {
                at.tensors.push(masks::spec(o * i));
            }
            at.tensors.extend(self.weights.grid.into_iter().flat_map(|grid| grid.specs((o, i))));
            if self.config.narrowest < 1.0 && site.place == Place::Up {
                at.tensors.push(TensorSpec::fixed(OPEN, [o]));
            }
        }
        let faults = self.ranks.faults(sites);
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if has(at, MASK) {
            let message = "a base that is pruned needs what is measured of its inputs";
            return Err(Error::Refused(message.to_owned()));
        }
        self.started(at, weight, None, rng)
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
        self.started(at, weight, Some(&masks::by_inputs(weight, inputs, self.config.sparsity)?), rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if self.config.is_of_weights() || has(at, OPEN) { Port::Weight(&self.weights) } else { Port::Delta(&self.rows) }
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let widths = |channels| {
            let widths = supernet::widths(channels, self.config.narrowest, self.config.widths);
            self.config.left.of(&widths).map(|left| (widths, left))
        };
        let rule = Elastic::of(of, &self.ranks, &sites, &widths, self.config.search());
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
        if self.config.extracted {
            return Ok(None);
        }
        let mut extracted = Config { extracted: true, ..self.config.clone() };
        if self.config.left == Left::Searched {
            extracted.left = Left::Middle;
            extracted.ranks = elastic::ranks_of(&self.ranks.all(), at, params)?;
            let last = extracted.ranks().last() as u32;
            extracted.ranks.retain(|_, rank| *rank != last);
        }
        let left = extracted.ranks();
        if at.iter().all(|at| left.left_at(at.site.as_str()) == self.config.rank as usize) {
            return Ok(None);
        }
        let (mut attachments, mut cut) = (at.to_vec(), Params::new());
        for at in &mut attachments {
            let left = left.left_at(at.site.as_str());
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
        Ok(Some(Compacted { adapter: Box::new(Self::new(extracted)), attachments, params: cut }))
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
            let last = self.ranks.last();
            Scaling { rank: last as u32, alpha: of(last), rslora: false, ranks: self.config.ranks.clone(), alphas }
        } else {
            Scaling { rank, alpha, rslora: false, ranks: BTreeMap::new(), alphas: BTreeMap::new() }
        };
        let mut lora = scaling.lora_config();
        lora.lora_dropout = dropout;
        Some(own::as_lora(Self::CARD.name, &self.config, &lora))
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorName;
    use attune_points::adapter::{RowCx, RowMap as _};
    use attune_points::stats::{Norms, Stat};
    use attune_spec::id::Step;
    use candle_core::{DType, Device};

    use super::*;

    const SITE: &str = "model.layers.0.mlp.up_proj";

    fn config(rank: u32, step: u32, smallest: u32, left: Left) -> Config {
        Config { rank, step, smallest, left, ..Config::default() }
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

    /// Inputs of these squares.
    fn measured(lora: &ElasticLora, at: &Attachment, squares: [f64; 10]) -> Stats {
        let norms = Norms { sum_i: Tensor::new(&squares, &Device::Cpu).unwrap(), rows: 3, documents: 1 };
        let mut stats = Stats::none();
        stats.insert(lora.calibrate().remove(0), at.site.clone(), Stat::Norms(norms));
        stats
    }

    /// A pair of factors of rank 4 in 32 bits.
    fn of_rank_4() -> [Tensor; 2] {
        [normal("a", &[4, 3]), normal("b", &[2, 4])].map(|x| x.to_dtype(DType::F32).unwrap())
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
            let mut squares = [1.0; 10];
            squares[7] = 0.0;
            let stats = measured(&lora, &at, squares);
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

    /// The grid is that of what is left of the weight, which starts on it; and what trains moves from value to value of it.
    #[test]
    fn in_few_bits_it_starts_as_the_pruned_weight_on_its_grid() {
        let w = normal("w", &[6, 10]);
        let config = Config { sparsity: 0.4, masked: true, bits: 3, group_size: 4, ..config(2, 1, 1, Left::Middle) };
        let lora = ElasticLora::new(config);
        let grid = Grid { bits: 3, group: 4 };
        let at = at([pair(6, 2, 10), vec![masks::spec(60)], grid.specs((6, 10)).to_vec()].concat());
        let stats = measured(&lora, &at, [1.0; 10]);
        let (started, _) = lora.init_by(&at, &w, &stats, &mut Rng::new(1, "init")).unwrap();
        let wide = |x: &Tensor| if x.dtype().is_float() { x.to_dtype(DType::F64).unwrap() } else { x.clone() };
        let started = Locals::new(SITE, started.iter().map(|(local, x)| (local, wide(x))).collect::<Vec<_>>());
        let kept = (&w * masks::as_matrix(started.get(MASK).unwrap(), &w).unwrap()).unwrap();
        let made = WeightMap::graph(&lora.weights, &w, &started).unwrap();
        assert_eq!(size(&(&made - grid.onto(&kept, &started).unwrap()).unwrap()), 0.0);
        let moved = started
            .iter()
            .map(|(local, tensor)| (local, if local == B { normal("b", &[6, 2]) } else { tensor.clone() }));
        let moved = Locals::new(SITE, moved.collect::<Vec<_>>());
        let after = WeightMap::graph(&lora.weights, &w, &moved).unwrap();
        let codes = grid.codes(&after, &moved).unwrap();
        assert_eq!(size(&(grid.onto(&after, &moved).unwrap() - &after).unwrap()), 0.0);
        assert!(size(&(codes - grid.codes(&made, &moved).unwrap()).unwrap()) > 0.0);
        let zeros = kept.eq(0.0).unwrap().to_dtype(DType::F64).unwrap();
        assert_eq!(size(&(after * zeros).unwrap()), 0.0);
    }

    /// What is written down of a run that has ended is a LoRA of the rank that is left, which computes what the first ranks of the whole do.
    #[test]
    fn what_is_left_is_a_lora_of_its_rank_by_the_scaling_of_the_whole() {
        for (left, rank) in [(Left::Middle, 3), (Left::Smallest, 1)] {
            let lora = ElasticLora::new(config(4, 1, 1, left));
            let at = [at(pair(2, 4, 3))];
            let mut params = Params::new();
            let [a, b] = of_rank_4();
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

    /// What was found at each site is read from what is left of it.
    #[test]
    fn what_a_search_left_is_written_down_with_its_ranks() {
        let lora = ElasticLora::new(config(4, 1, 1, Left::Searched));
        let sites = [SITE, "model.layers.1.mlp.up_proj"];
        let at = sites.map(|site| Attachment { site: SiteId::new(site), tensors: pair(2, 4, 3) });
        let mut params = Params::new();
        for (at, rank) in at.iter().zip([3, 1]) {
            let [a, b] = of_rank_4();
            params.insert_declared(&at.tensors[0], at.site.as_str(), elastic::first(&a, 0, rank).unwrap());
            params.insert_declared(&at.tensors[1], at.site.as_str(), elastic::first(&b, 1, rank).unwrap());
        }
        let Compacted { adapter, attachments, .. } = lora.compacted(&at, &params).unwrap().unwrap();
        let ranks: Vec<usize> = attachments.iter().map(|at| at.tensors[0].shape[0]).collect();
        assert_eq!(ranks, [3, 1]);
        // 3 is the one in the middle, so that the other one alone has to be named.
        let peft = adapter.peft().unwrap();
        assert_eq!((&peft.config["r"], &peft.config["rank_pattern"][sites[1]]), (&3.into(), &1.into()));
        assert_eq!(peft.config["alpha_pattern"][sites[1]].as_f64(), Some(64.0 / 4.0));
    }

    #[test]
    fn a_single_rank_is_of_usual_steps_and_the_file_is_loras() {
        let plain = ElasticLora::new(config(4, 1, 4, Left::Middle));
        assert!(plain.step_rule(&Trained { slot: 0, attachments: Vec::new(), steps: Step(3) }).is_none());
        let config = plain.peft().unwrap().config;
        assert!(own::is_own(&config) && config["peft_type"] == "LORA");
        assert_eq!((&config["r"], &config["lora_alpha"]), (&4.into(), &64.into()));
    }
}
