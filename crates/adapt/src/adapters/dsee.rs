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
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, and `values` `v_k`, f32, trained; A starts uniform in ±1/sqrt(i), B and v at 0. `indices` the flat places
//! i p(k) + q(k), i64, ascending, never trained. With `prune`, `mask` M, a bit for each entry, 64 of them an i64, all 1 until it prunes.
//!
//! # Cost
//! `r*(i+o) + entries` parameters per linear, and places of as many as the latter beside them; `2 r (i+o) + 2 entries` extra FLOPs per token forward.
//! The search takes some `20 rounds² i o` FLOPs a weight, once. With `prune`, each pass makes another weight in place of it, forward and in reverse, at
//! `2 r i o` FLOPs each, and the gradient by it; where it prunes, three such sums of each weight.
//!
//! # Limits
//! With B = 0 and v = 0 it is the base, bit for bit, until that is pruned. With v = 0 it is LoRA. Merged, a weight has that many zeros only with
//! `mask_delta`; without, the change fills them.
//!
//! # Departures
//! The base is pruned entry by entry; heads and channels as a whole, by gates that are learned, are not here. It goes on after that with the optimiser's
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
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::masks::{self, MASK};
use crate::parts::sparse::{INDICES, VALUES};
use crate::parts::starts::{self, Start};
use crate::parts::{anew, factors, linears, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// How many directions a round of the search adds.
const MORE: usize = 5;

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
    /// Share of the job's steps after which it goes.
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
        parameters: "rank*(i+o) + entries",
        merges: Merges::Weight,
        rules: &[
            Rule {
                when: "prune > 0",
                require: "dropout == 0",
                message: "is for a change on rows, and with `prune` it is made within the weight; expected 0",
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
}

impl Config {
    /// The flat places of `count` entries of a weight, ascending.
    fn places(&self, weight: &dyn Weight, count: usize, rng: &Rng) -> attune_points::Result<Tensor> {
        let (o, i) = weight.shape();
        let scores = match self.search {
            Search::Random => return sparse::some(o * i, count, &rng.named(INDICES)),
            Search::Magnitude => weight.dense(DType::F32)?.abs()?,
            Search::Decomposed => self.standing_out(&weight.dense(DType::F64)?, &mut rng.named("directions"))?,
        };
        let scores = scores.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut places: Vec<i64> = sparse::largest(&scores, count).into_iter().map(|place| place as i64).collect();
        places.sort_unstable();
        Ok(Tensor::new(places, &Device::Cpu)?)
    }

    /// By how much each entry stands out of the low rank of a weight; those below the threshold come below 0, in the order of theirs.
    fn standing_out(&self, w_oi: &Tensor, rng: &mut Rng) -> attune_points::Result<Tensor> {
        let (o, i) = w_oi.dims2()?;
        let mut r_ki = rng.normal_tensor((1, i), 1.0, DType::F64)?;
        let mut d_oi = w_oi.zeros_like()?;
        let mut rest_oi = w_oi.clone();
        for round in 1..=self.rounds {
            let mut low_oi = w_oi.zeros_like()?;
            for _ in 0..2 {
                let smooth_oi = (w_oi - &d_oi)?;
                let (l_ok, _) = linalg::qr(&ops::matmul(&smooth_oi, &r_ki.t()?.contiguous()?)?)?;
                r_ki = ops::matmul(&l_ok.t()?.contiguous()?, &smooth_oi)?;
                low_oi = ops::matmul(&l_ok, &r_ki)?;
                rest_oi = (w_oi - &low_oi)?;
                let stands = rest_oi.abs()?.ge(self.threshold)?;
                d_oi = stands.where_cond(&rest_oi, &rest_oi.zeros_like()?)?;
            }
            let more = MORE.min(o.min(i) - r_ki.dim(0)?);
            if round == self.rounds || more == 0 {
                break;
            }
            // The first rows of a triangle are what the first columns span of all others.
            let left_oi = ((w_oi - low_oi)? - &d_oi)?;
            if left_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()? == 0.0 {
                break;
            }
            let (first_om, _) = linalg::qr(&left_oi.narrow(1, 0, more)?.contiguous()?)?;
            r_ki = Tensor::cat(&[&r_ki, &ops::matmul(&first_om.t()?.contiguous()?, &left_oi)?], 0)?;
        }
        // Those of the sparse part come before all others, whose order is that of what they are off by.
        let beside = (rest_oi.abs()? - rest_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)?;
        let stands = d_oi.ne(0.0)?;
        Ok(stands.where_cond(&d_oi.abs()?, &(beside - 1.0)?)?)
    }
}

impl Adapter for Dsee {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let count = self.config.entries as usize;
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
            Ok(tensors.into_iter().chain(self.prunes().then(|| masks::spec(o * i))).collect())
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let places = self.config.places(weight, self.config.entries as usize, rng)?;
        let (o, i) = weight.shape();
        let mask = if self.prunes() { Some(masks::whole(o * i)?) } else { None };
        starts::each(at, rng, |spec| match (spec.local, &mask) {
            (A, _) => Start::kaiming(spec),
            (INDICES, _) => Start::Is(places.clone()),
            (MASK, Some(mask)) => Start::Is(mask.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        if self.prunes() { Port::Weight(self) } else { Port::Delta(self) }
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        self.prunes().then(|| Box::new(Pruning::new(&self.config, self.scale(), of)) as Box<dyn StepRule>)
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
        if self.config.mask_delta {
            return masks::kept(&summed(w_oi, tensors, self.scale())?, tensors);
        }
        summed(&masks::kept(w_oi, tensors)?, tensors, self.scale())
    }
}

/// The usual steps, after one of which the least entries of all weights go.
struct Pruning {
    share: f64,
    scale: f64,
    /// The number of steps after which.
    at: u64,
    places: Vec<Place>,
}

/// A weight that is pruned, and what is added to it.
struct Place {
    site: String,
    slot: u16,
}

impl Pruning {
    fn new(config: &Config, scale: f64, of: &Trained<'_>) -> Self {
        let at = (config.prunes_at * of.steps.0 as f64).round() as u64;
        let places = of.attachments.iter().map(|at| Place { site: at.site.to_string(), slot: of.slot });
        Self { share: config.prune, scale, at: at.clamp(1, of.steps.0.max(1)), places: places.collect() }
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
            let (masks, gone) = self.masks(engine)?;
            let mut theta = engine.theta().clone();
            for (place, mask) in self.places.iter().zip(masks) {
                theta.put(&place.id(MASK), mask);
            }
            engine.set(theta);
            report.metrics.push(("pruned".to_owned(), gone as f64));
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
}
