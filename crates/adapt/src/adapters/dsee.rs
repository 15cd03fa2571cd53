//! A low-rank change, and a handful of single entries where the weight itself stands out of its own low rank; for small budgets, in which entries that
//! were exceptional before are let be so in another way. The base beside them may be pruned on the way, by what has been learned until then.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (z_ti A_ri^T) B_or^T + Σ_k v_k z_t,q(k) e_p(k)                 z = drop(x)           s = alpha / r
//! ```
//! Places are found in the weight, before the first step: with D = 0 and R one random row,
//! ```text
//! rounds times:  twice:  L = orthonormal columns of (W - D) R^T,  R = L^T (W - D),  D = entries of W - L R of `threshold` at least
//!                R <- R, and the first rows of the triangle of W - L R - D, five more
//! (p, q)(k):     where D is largest, then where W - L R is
//! ```
//! With `prune`, at the share `prunes_at` of the steps, that share of all entries of all linears goes whose sum is least, and the rest of the steps
//! trains what is left:
//! ```text
//! W'_oi = M_oi W_oi + s (B A)_oi + D_oi                or, with `mask_delta`, M_oi (W_oi + s (B A)_oi + D_oi)                  y_to = x_ti W'_oi^T
//! M_oi  = [|W_oi + s (B A)_oi + D_oi| is not among the least]                              D_oi = Σ_k v_k [o = p(k), i = q(k)]
//! ```
//! With `prune_heads` and `prune_neurons` each head scales what it gives by a number of its own, and so does each neuron of an MLP: columns of the
//! linears that lead out of them. With that share of the steps the given share of each attention's heads and of each MLP's neurons goes, those of
//! the smallest numbers:
//! ```text
//! W''_oi = W'_oi g_u(i) c_u(i)                      u(i) the head or neuron of column i                        loss + gate_loss · Σ |c_u|  until some are gone
//! g_u    = [|c_u| is not among the least of its layer]
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, and `values` `v_k`, f32, trained; A starts uniform in ±1/sqrt(i), B and v at 0. `indices` the flat places
//! i p(k) + q(k), i64, ascending, never trained. With `prune`, `mask` M, a bit for each entry, 64 of them an i64, all 1 until it prunes. `gates` `c_u`, trained, 1 at the start, and
//! `gates_left` `g_u`, bits like those of the mask.
//!
//! # Cost
//! `r*(i+o) + entries` parameters per linear, and places of as many as the latter beside them, further a number for each head or neuron that may go; `2 r (i+o) + 2 entries` extra FLOPs per token forward.
//! The search takes some `20 rounds² i o` FLOPs a weight, once. With `prune`, each pass makes another weight in place of it, forward and in reverse, at
//! `2 r i o` FLOPs each, and the gradient by it; where it prunes, three such sums of each weight.
//!
//! # Limits
//! With B = 0 and v = 0 it is the base, bit for bit, until that is pruned. A merged model has the shape of the base, with columns of zeros for heads and
//! neurons that are gone. With v = 0 it is LoRA. Merged, a weight has that many zeros only with
//! `mask_delta`; without, the change fills them.
//!
//! # Departures
//! Heads and neurons that stay keep their numbers, which go on learning. It goes on after pruning with the optimiser's
//! numbers and the schedule that it has. The authors search for a hundred rounds; five directions a round, some ten are enough where a weight is of low
//! rank beside what stands out.
//!
//! # Paper
//! DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models. Chen, Chen, Chen, Awadallah, Wang, Cheng, 2023. The
//! search: Greedy Bilateral Sketch, Completion & Smoothing. Zhou, Tao, 2013.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, Trained, WeightMap};
use attune_points::engine::{self, Engine, StepReport, StepRule};
use attune_points::{Locals, Owner, TensorId, TensorName, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::masks::{self, MASK};
use crate::parts::sparse::{INDICES, VALUES};
use crate::parts::starts::{self, Start};
use crate::parts::structures::{self, GATES, LEFT, Structures};
use crate::parts::{anew, factors, linears, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// Where the single entries are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Search {
    /// Where the weight is farthest from its own low rank.
    #[default]
    Decomposed,
    /// Where the weight is largest.
    Magnitude,
    /// Anywhere.
    Random,
}

/// Parameters of DSEE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the low-rank part.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of its scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Single entries of each weight.
    #[schemars(range(min = 1, max = 1_000_000))]
    entries: u32,
    /// Where they are.
    search: Search,
    /// Rounds of the search by a decomposition.
    #[schemars(range(min = 1, max = 200))]
    rounds: u32,
    /// The least that an entry stands out by in it.
    #[schemars(range(min = 0.0, max = 1e6))]
    threshold: f64,
    /// Share of the base's weights that goes on the way; 0 for none.
    #[schemars(range(min = 0.0, max = 0.99))]
    prune: f64,
    /// Share of the heads of each attention that go on the way as a whole; 0 for none.
    #[schemars(range(min = 0.0, max = 0.99))]
    prune_heads: f64,
    /// Share of the neurons of each MLP that do.
    #[schemars(range(min = 0.0, max = 0.99))]
    prune_neurons: f64,
    /// Weight of the sizes of their gates in the loss until then.
    #[schemars(range(min = 0.0, max = 1.0))]
    gate_loss: f64,
    /// Share of the job's steps after which all of these go.
    #[schemars(range(min = 0.0, max = 1.0))]
    prunes_at: f64,
    /// Lets the change, too, be 0 where the weight has gone.
    mask_delta: bool,
}

impl Default for Config {
    /// The paper's entries and threshold, and LoRA's rank, on a base that stays whole; the rounds are ours.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            entries: 64,
            search: Search::Decomposed,
            rounds: 10,
            threshold: 0.01,
            prune: 0.0,
            prune_heads: 0.0,
            prune_neurons: 0.0,
            gate_loss: 1e-4,
            prunes_at: 0.5,
            mask_delta: false,
        }
    }
}

pub(super) struct Dsee {
    config: Config,
}

impl Method for Dsee {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
            authors: "Xuxi Chen, Tianlong Chen, Weizhu Chen, Ahmed Hassan Awadallah, Zhangyang Wang, Yu Cheng",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + entries + if(prune_heads > 0, (out - down)*h, 0) + if(prune_neurons > 0, down*i, 0)",
        fixed: "entries",
        start_numbers: "38*o*i",
        merges: Merges::Weight,
        rules: &[
            Rule {
                when: "prune > 0 or prune_heads > 0 or prune_neurons > 0",
                require: "dropout == 0",
                message: "is for a change on rows, and where something is pruned it is made within the weight; expected 0",
                path: "dropout",
            },
            Rule {
                when: "mask_delta",
                require: "prune > 0",
                message: "is true, and nothing is pruned: expected `prune` beside it",
                path: "mask_delta",
            },
        ],
        ..Card::new(
            "dsee",
            Point::Adapter,
            "A low-rank change, and a handful of single entries where the weight itself stands out of its own low rank; for small budgets, \
             in which entries that were exceptional before are let be so in another way. The base beside them may be pruned on the way, by \
             what has been learned until then.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Dsee {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }

    fn prunes(&self) -> bool {
        self.config.prune > 0.0
    }

    fn structures(&self) -> Structures {
        Structures { heads: self.config.prune_heads, neurons: self.config.prune_neurons }
    }
}

impl Config {
    /// The flat places of `count` entries of a weight, ascending.
    fn places(&self, weight: &dyn Weight, count: usize, rng: &Rng) -> attune_points::Result<Tensor> {
        let (o, i) = weight.shape();
        let scores = match self.search {
            Search::Random => return sparse::some(o * i, count, &rng.named(INDICES)),
            Search::Magnitude => weight.dense(DType::F32)?.abs()?,
            Search::Decomposed => {
                let directions = &mut rng.named("directions");
                sparse::standing_out(&weight.dense(DType::F64)?, self.rounds, self.threshold, directions)?
            }
        };
        let scores = scores.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut places: Vec<i64> = sparse::largest(&scores, count).into_iter().map(|place| place as i64).collect();
        places.sort_unstable();
        Ok(Tensor::new(places, &Device::Cpu)?)
    }
}

impl Adapter for Dsee {
    fn attach(&self, architecture: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (count, structures) = (self.config.entries as usize, self.structures());
        let faults = structures.faults(sites);
        if !faults.is_empty() {
            return Err(faults);
        }
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.config.rank, site, (o, i))?;
            if count > o * i {
                let message = format!("is {count}; {} is {o} by {i}, so {} is the most", site.id, o * i);
                return Err(Fault::new("entries", message));
            }
            let tensors = [
                TensorSpec::trained(A, [r, i]),
                TensorSpec::trained(B, [o, r]),
                TensorSpec::trained(VALUES, [count]),
                TensorSpec::fixed(INDICES, [count]),
            ];
            let mask = self.prunes().then(|| masks::spec(o * i));
            Ok(tensors.into_iter().chain(mask).chain(structures.specs(site, i, architecture)).collect())
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let places = self.config.places(weight, self.config.entries as usize, rng)?;
        let (o, i) = weight.shape();
        let mask = if self.prunes() { Some(masks::whole(o * i)?) } else { None };
        let gates = at.tensors.iter().find(|spec| spec.local == GATES).map_or(0, |spec| spec.shape[0]);
        let left = masks::whole(gates)?;
        starts::each(at, rng, |spec| match (spec.local, &mask) {
            (A, _) => Start::kaiming(spec),
            (INDICES, _) => Start::Is(places.clone()),
            (MASK, Some(mask)) => Start::Is(mask.clone()),
            (GATES, _) => Start::Constant(1.0),
            (LEFT, _) => Start::Is(left.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        let is_gated = at.tensors.iter().any(|spec| spec.local == GATES);
        if self.prunes() || is_gated { Port::Weight(self) } else { Port::Delta(self) }
    }

    fn penalty(&self, _: &Attachment, tensors: &Locals) -> attune_points::Result<Option<Tensor>> {
        structures::penalty(tensors, self.config.gate_loss)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let prunes = self.prunes() || self.structures().any();
        prunes.then(|| Box::new(Pruning::new(self, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(B)?.dtype())?;
        Ok(Merged::Weight { weight: WeightMap::graph(self, &w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Dsee {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let z_ti = dropped(x_ti, self.config.dropout, cx)?;
        let h_tr = ops::linear(&z_ti, tensors.get(A)?, None)?;
        let y_to = ops::linear(&(h_tr * self.scale())?, tensors.get(B)?, None)?;
        let places = tensors.get(INDICES)?.to_vec1::<i64>()?;
        let width = x_ti.dim(1)? as i64;
        let of = |place: fn(i64, i64) -> i64| -> Vec<i64> { places.iter().map(|&at| place(at, width)).collect() };
        let (rows, columns) = (of(|at, width| at / width), of(|at, width| at % width));
        let (rows, columns) = (Tensor::new(rows, x_ti.device())?, Tensor::new(columns, x_ti.device())?);
        let by_entry_tk = z_ti.index_select(&columns, 1)?.broadcast_mul(tensors.get(VALUES)?)?;
        Ok(y_to.index_add(&rows, &by_entry_tk, 1)?)
    }
}

/// A weight with a low-rank change and single entries added to it.
fn summed(w_oi: &Tensor, tensors: &Locals, scale: f64) -> attune_points::Result<Tensor> {
    let low_oi = (w_oi + (ops::matmul(tensors.get(B)?, tensors.get(A)?)? * scale)?)?;
    sparse::added(&low_oi, tensors.get(INDICES)?, tensors.get(VALUES)?)
}

impl WeightMap for Dsee {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let sum_oi = if self.config.mask_delta {
            masks::kept(&summed(w_oi, tensors, self.scale())?, tensors)?
        } else {
            summed(&masks::kept(w_oi, tensors)?, tensors, self.scale())?
        };
        structures::scaled(&sum_oi, tensors)
    }
}

/// The usual steps, after one of which the least entries of all weights go, and the heads and neurons of the smallest gates.
struct Pruning {
    share: f64,
    structures: Structures,
    scale: f64,
    /// The number of steps after which.
    at: u64,
    places: Vec<Place>,
}

/// A weight that is pruned, and what is added to it.
struct Place {
    site: String,
    slot: u16,
    /// Its gates, if it has any, and whether they are of heads.
    gates: Option<(usize, bool)>,
}

impl Pruning {
    fn new(dsee: &Dsee, of: &Trained<'_>) -> Self {
        let Config { prunes_at, prune, .. } = dsee.config;
        let at = (prunes_at * of.steps.0 as f64).round() as u64;
        let place = |at: &&Attachment| {
            let of_local = |local| at.tensors.iter().find(|spec| spec.local == local);
            let width = of_local(A).map_or(0, |spec| spec.shape[1]);
            // A neuron is a column, and a head several.
            let gates = of_local(GATES).map(|spec| (spec.shape[0], spec.shape[0] < width));
            Place { site: at.site.to_string(), slot: of.slot, gates }
        };
        let places = of.attachments.iter().map(place).collect();
        let (structures, scale) = (dsee.structures(), dsee.scale());
        Self { share: prune, structures, scale, at: at.clamp(1, of.steps.0.max(1)), places }
    }

    /// The sizes of all entries of a weight as what they sum up to, as whole numbers in their order.
    fn sizes(&self, place: &Place, engine: &dyn Engine) -> attune_points::Result<Vec<u32>> {
        let of = |local: &'static str| Ok((local, anew::held(engine.theta(), &place.id(local))?));
        let tensors = [A, B, VALUES, INDICES].into_iter().map(of).collect::<attune_points::Result<Vec<_>>>()?;
        let tensors = Locals::new(place.site.as_str(), tensors);
        let sum_oi = summed(&engine.weight(&place.site)?, &tensors, self.scale)?;
        // Numbers of 32 bits that are not negative are in the order of their bits.
        Ok(sum_oi.abs()?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }

    /// Which entries of each weight stay, and how many of all go.
    fn masks(&self, engine: &dyn Engine) -> attune_points::Result<(Vec<Tensor>, u64)> {
        let mut all = 0;
        for place in &self.places {
            all += self.sizes(place, engine)?.len() as u64;
        }
        let gone = (self.share * all as f64).round() as u64;
        let pieces = |take: &mut dyn FnMut(&[u32])| {
            self.places.iter().try_for_each(|place| {
                take(&self.sizes(place, engine)?);
                Ok(())
            })
        };
        let (least, mut equal) = masks::threshold(all - gone, pieces)?;
        let mask = |place: &Place| {
            let stays = |size: u32| {
                let first = size == least && equal > 0;
                equal -= u64::from(first);
                size > least || first
            };
            masks::packed(&self.sizes(place, engine)?.into_iter().map(stays).collect::<Vec<_>>())
        };
        Ok((self.places.iter().map(mask).collect::<attune_points::Result<_>>()?, gone))
    }
}

impl Place {
    fn id(&self, local: &str) -> TensorId {
        TensorId { owner: Owner::Bank { slot: self.slot, set: 0 }, name: TensorName::new(&*self.site, local) }
    }
}

impl StepRule for Pruning {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let mut report = engine::usual_step(engine)?;
        if step.next().0 == self.at {
            let mut theta = engine.theta().clone();
            if self.share > 0.0 {
                let (masks, gone) = self.masks(engine)?;
                for (place, mask) in self.places.iter().zip(masks) {
                    theta.put(&place.id(MASK), mask);
                }
                report.metrics.push(("pruned".to_owned(), gone as f64));
            }
            for (name, of_heads) in [("pruned_heads", true), ("pruned_neurons", false)] {
                let gated = self.places.iter().filter_map(|place| Some((place, place.gates?.0, place.gates?.1)));
                let gated: Vec<_> = gated.filter(|(.., heads)| *heads == of_heads).collect();
                let mut gone = 0;
                for (place, count, _) in &gated {
                    let goes = self.structures.goes(of_heads, *count);
                    let gates = anew::held(engine.theta(), &place.id(GATES))?;
                    theta.put(&place.id(LEFT), structures::left(&gates, goes)?);
                    gone += goes;
                }
                report.metrics.extend((!gated.is_empty()).then(|| (name.to_owned(), gone as f64)));
            }
            engine.set(theta);
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;

    use super::*;
    use crate::parts::toy::Toy;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn found(search: Search, w: &Tensor, count: usize) -> Vec<i64> {
        let config = Config { search, ..Config::default() };
        config.places(w, count, &Rng::new(3, "init")).unwrap().to_vec1::<i64>().unwrap()
    }

    #[test]
    fn what_stands_out_of_a_low_rank_is_found_and_not_by_chance() {
        let low = normal("left", &[96, 5]).matmul(&normal("right", &[5, 80])).unwrap();
        let spikes = sparse::some(96 * 80, 64, &Rng::new(5, "spikes")).unwrap();
        let sizes = (normal("signs", &[64]).sign().unwrap() * 22.0).unwrap();
        let w = sparse::added(&low, &spikes, &sizes).unwrap();
        let spikes = spikes.to_vec1::<i64>().unwrap();
        let of = |search| found(search, &w, 64).iter().filter(|place| spikes.contains(place)).count();
        let (decomposed, random) = (of(Search::Decomposed), of(Search::Random));
        assert!(decomposed >= 61, "{decomposed} of 64");
        assert!(random <= 5, "{random} of 64 by chance");
    }

    /// Spikes smaller than most entries of the low rank: the weight's size does not show them.
    #[test]
    fn what_is_small_by_itself_may_stand_out() {
        let low = (normal("left", &[48, 1]).matmul(&normal("right", &[1, 40])).unwrap() * 3.0).unwrap();
        let spikes = sparse::some(48 * 40, 12, &Rng::new(5, "spikes")).unwrap();
        let sizes = (normal("signs", &[12]).sign().unwrap() * 2.0).unwrap();
        let w = sparse::added(&low, &spikes, &sizes).unwrap();
        let spikes = spikes.to_vec1::<i64>().unwrap();
        let of = |search| found(search, &w, 12).iter().filter(|place| spikes.contains(place)).count();
        let (decomposed, magnitude) = (of(Search::Decomposed), of(Search::Magnitude));
        assert!(decomposed >= 8 && magnitude <= 1, "{decomposed} and {magnitude} of 12");
    }

    #[test]
    fn there_are_as_many_places_as_asked_for_once_each() {
        let w = (normal("w", &[6, 7]) * 1e-4).unwrap();
        for search in [Search::Decomposed, Search::Magnitude, Search::Random] {
            for count in [1, 20, 42] {
                let places = found(search, &w, count);
                assert!(places.len() == count && places.is_sorted_by(|a, b| a < b), "{search:?}");
            }
        }
        let zero = Tensor::zeros((6, 7), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(found(Search::Decomposed, &zero, 3), [0, 1, 2]);
    }

    #[test]
    fn rows_go_through_factors_and_entries() {
        let dsee = Dsee { config: Config { rank: 2, alpha: 3.0, ..Config::default() } };
        let places = Tensor::new(&[1i64, 8, 9, 29], &Device::Cpu).unwrap();
        let locals =
            [(A, normal("a", &[2, 6])), (B, normal("b", &[5, 2])), (VALUES, normal("v", &[4])), (INDICES, places)];
        let locals = Locals::new("up", locals);
        let at = Attachment { site: SiteId::new("up"), tensors: Vec::new() };
        let w = normal("w", &[5, 6]);
        let Merged::Weight { weight, .. } = dsee.merge(&at, &locals, &w).unwrap() else { panic!("no weight") };
        let (x, layout) = (normal("x", &[3, 6]), attune_points::Layout::new());
        let cx = RowCx { site: &at.site, output: 5, dropout: None, layout: &layout, rows: None };
        let rows = RowMap::graph(&dsee, &x, &locals, &cx).unwrap();
        let by_hand = x.matmul(&(&weight - &w).unwrap().t().unwrap()).unwrap();
        assert!(largest(&(rows - by_hand).unwrap()) < 1e-12);
        let low = (locals.get(B).unwrap().matmul(locals.get(A).unwrap()).unwrap() * 1.5).unwrap();
        let single = ((weight - w).unwrap() - low).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let places: Vec<usize> = (0..30).filter(|&at| single[at].abs() > 1e-12).collect();
        assert_eq!(places, [1, 8, 9, 29]);
    }

    /// Two weights of different sizes: what goes is the least of both together, by what they are with what was learned.
    #[test]
    fn the_least_of_all_weights_go_once_and_never_come_back() {
        let config = Config { prune: 0.4, prunes_at: 0.5, rank: 1, entries: 3, ..Config::default() };
        let of = |mask_delta| Dsee { config: Config { mask_delta, ..config.clone() } };
        let at = |site: &str, (o, i): (usize, usize)| {
            let factors = vec![TensorSpec::trained(A, [1, i]), TensorSpec::trained(B, [o, 1])];
            let own = [factors, vec![TensorSpec::trained(VALUES, [3]), TensorSpec::fixed(INDICES, [3])]].concat();
            Attachment { site: SiteId::new(site), tensors: [own, vec![masks::spec(o * i)]].concat() }
        };
        let shapes = [("up", (6, 5)), ("down", (5, 8))];
        let weight = |site: &str, (o, i): (usize, usize)| {
            (normal(site, &[o, i]).to_dtype(DType::F32).unwrap() * if site == "up" { 0.1 } else { 1.0 }).unwrap()
        };
        let start = |site: &str, local: &str| {
            let (_, (o, i)) = shapes.into_iter().find(|(name, _)| *name == site).unwrap();
            match local {
                INDICES => Tensor::new(&[0i64, 7, 9], &Device::Cpu).unwrap(),
                MASK => masks::whole(o * i).unwrap(),
                // The first entry of both is what was learned alone.
                VALUES => Tensor::new(&[50f32, 0.0, 0.0], &Device::Cpu).unwrap(),
                A => Tensor::zeros((1, i), DType::F32, &Device::Cpu).unwrap(),
                _ => Tensor::zeros((o, 1), DType::F32, &Device::Cpu).unwrap(),
            }
        };
        let mut toy = Toy::new(shapes.map(|(site, shape)| at(site, shape)).to_vec(), start, 0.1, |_, _| None);
        toy.weights = shapes.iter().map(|(site, shape)| ((*site).to_owned(), weight(site, *shape))).collect();
        let mut rule = of(false).step_rule(&toy.trained(4)).unwrap();
        let stays = |toy: &Toy| shapes.map(|(site, (o, i))| masks::unpacked(&toy.value(site, MASK), o * i).unwrap());
        let mut told = Vec::new();
        for step in 0..4 {
            assert_eq!(stays(&toy).concat().into_iter().filter(|stays| *stays).count(), if step < 2 { 70 } else { 42 });
            told.extend(rule.step(Step(step), &mut toy).unwrap().metrics);
        }
        assert_eq!(told, [("pruned".to_owned(), 28.0)]);
        let [up, down] = stays(&toy);
        assert!(up[0] && down[0], "what was learned counts");
        // The small weight loses nearly all of it, and the large one little.
        assert!(up.iter().filter(|stays| **stays).count() < 10 && down.iter().filter(|stays| **stays).count() > 32);
        for mask_delta in [true, false] {
            let (dsee, w) = (of(mask_delta), weight("up", (6, 5)));
            let local = |local: &'static str| (local, toy.value("up", local));
            let b = normal("b", &[6, 1]).to_dtype(DType::F32).unwrap();
            let a = normal("a", &[1, 5]).to_dtype(DType::F32).unwrap();
            let locals = Locals::new("up", [(A, a), (B, b), local(VALUES), local(INDICES), local(MASK)]);
            let made = WeightMap::graph(&dsee, &w, &locals).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let zeros = made.iter().zip(&up).filter(|(made, stays)| **made == 0.0 && !**stays).count();
            assert_eq!(zeros, if mask_delta { up.iter().filter(|stays| !**stays).count() } else { 0 });
        }
    }

    #[test]
    fn heads_and_neurons_of_the_smallest_gates_go_and_the_others_go_on() {
        let config =
            Config { prune_heads: 0.34, prune_neurons: 0.5, rank: 1, entries: 1, prunes_at: 0.5, ..Config::default() };
        let at = |site: &str, (o, i): (usize, usize), gates: usize| {
            let own = [(A, vec![1, i]), (B, vec![o, 1]), (VALUES, vec![1]), (GATES, vec![gates])];
            let own = own.map(|(local, shape)| TensorSpec::trained(local, shape)).into_iter();
            let fixed = [TensorSpec::fixed(INDICES, [1]), TensorSpec::fixed(LEFT, [1])];
            Attachment { site: SiteId::new(site), tensors: own.chain(fixed).collect() }
        };
        let start = |site: &str, local: &str| match (local, site) {
            (GATES, "o_proj") => Tensor::new(&[0.9f32, -0.2, 1.1], &Device::Cpu).unwrap(),
            (GATES, _) => Tensor::new(&[0.9f32, -0.2, 1.1, 0.1], &Device::Cpu).unwrap(),
            (INDICES, _) => Tensor::new(&[0i64], &Device::Cpu).unwrap(),
            (LEFT, "o_proj") => masks::whole(3).unwrap(),
            (LEFT, _) => masks::whole(4).unwrap(),
            _ => Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
        };
        let sites = vec![at("o_proj", (6, 6), 3), at("down_proj", (6, 4), 4)];
        let mut toy = Toy::new(sites, start, 0.1, |_, _| None);
        let mut rule = Dsee { config }.step_rule(&toy.trained(4)).unwrap();
        let left = |toy: &Toy, site, n| masks::unpacked(&toy.value(site, LEFT), n).unwrap();
        let mut told = Vec::new();
        for step in 0..4 {
            let gone = if step < 2 { [true; 4] } else { [true, false, true, false] };
            assert_eq!((left(&toy, "o_proj", 3), left(&toy, "down_proj", 4)), (gone[..3].to_vec(), gone.to_vec()));
            told.extend(rule.step(Step(step), &mut toy).unwrap().metrics);
        }
        assert_eq!(told, [("pruned_heads".to_owned(), 1.0), ("pruned_neurons".to_owned(), 2.0)]);
    }
}
