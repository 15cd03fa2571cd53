//! One LoRA of which every smaller rank is trained as well, a random one of them a step: what it is cut to is chosen at the end; where the rank that a
//! server can bear, or that a task needs, is not known before.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T                    s = alpha / rank
//! at each step   r' drawn among rank, rank - step, …, smallest for each group of linears that read the same rows,
//!                and of A the first r' rows, of B the first r' columns, take part and learn
//! at the last    all but the first r* are 0, where r* is the one in the middle, the largest or the smallest of these
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained, of `rank`; A starts uniform in ±1/sqrt(i), B at 0. The scaling is of `rank` whatever r' is.
//! `drop` is dropout on the input.
//!
//! # Cost
//! `rank*(i+o)` parameters per linear; `2 rank (i+o)` extra FLOPs per token forward, as LoRA's, whichever r' is drawn.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With `smallest` as `rank` it is LoRA. Until the last step the whole of it is what is validated
//! and what a checkpoint holds.
//!
//! # Departures
//! It is what LoNAS, Shears and SQFT have in common: the base is neither pruned nor quantised here, its own widths stay, and the rank at the end is one of
//! the three that need no search. The adapter's file is LoRA's of `rank`, with zeros where it was cut.
//!
//! # Paper
//! Low-Rank Adapters Meet Neural Architecture Search for LLM Compression. Muñoz, Yuan, Jain, 2025; Shears: Unstructured Sparsity with Neural
//! Low-rank Adapter Search. Muñoz, Yuan, Jain, 2024.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Merged, Peft, Port, RowCx, RowMap, Trained};
use attune_points::engine::{Engine, Source, StepReport, StepRule};
use attune_points::{Locals, Owner, TensorId, TensorName, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::{anew, factors, own};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// What is left in the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Left {
    /// The rank in the middle of all.
    #[default]
    Middle,
    /// The largest, all of it.
    Largest,
    /// The smallest.
    Smallest,
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
    /// What is left in the end.
    left: Left,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// The authors' values, without dropout.
    fn default() -> Self {
        Self { rank: 32, step: 8, smallest: 16, left: Left::Middle, alpha: 64.0, dropout: 0.0 }
    }
}

impl Config {
    /// The ranks, the largest first.
    fn ranks(&self) -> Vec<usize> {
        let all = (0..).map_while(|n| self.rank.checked_sub(n * self.step));
        all.take_while(|rank| *rank >= self.smallest).map(|rank| rank as usize).collect()
    }

    /// The one that is left in the end.
    fn last(&self) -> usize {
        let ranks = self.ranks();
        let at = match self.left {
            Left::Middle => ranks.len().saturating_sub(1) / 2,
            Left::Largest => 0,
            Left::Smallest => ranks.len().saturating_sub(1),
        };
        ranks.get(at).copied().unwrap_or(self.rank as usize)
    }
}

pub(super) struct ElasticLora {
    config: Config,
    rows: Rows,
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
        aliases: &["nls", "shears", "lonas"],
        paper: Some(Paper {
            title: "Low-Rank Adapters Meet Neural Architecture Search for LLM Compression",
            authors: "J. Pablo Muñoz, Jinjie Yuan, Nilesh Jain",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        merges: Merges::Factors,
        rules: &[Rule {
            when: "true",
            require: "smallest <= rank",
            message: "is more than the largest rank; expected `rank` at most",
            path: "smallest",
        }],
        ..Card::new(
            "elastic-lora",
            Point::Adapter,
            "One LoRA of which every smaller rank is trained as well, a random one of them a step: what it is cut to is chosen at the end; \
             where the rank that a server can bear, or that a task needs, is not known before.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let rows = Rows { scale: config.alpha / f64::from(config.rank), dropout: config.dropout };
        Ok(Box::new(Self { config, rows, groups: Mutex::default() }))
    }
}

impl Adapter for ElasticLora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let first = |site: &Site| sites.iter().find(|other| other.reads_with(site)).unwrap_or(site).id.to_string();
        *self.groups.lock().unwrap_or_else(PoisonError::into_inner) =
            sites.iter().map(|site| (site.id.to_string(), first(site))).collect();
        factors::attach(sites, A, B, |_| self.config.rank)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        factors::kaiming(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(&self.rows)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        if self.config.ranks().len() < 2 {
            return None;
        }
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = |at: &&Attachment| {
            let site = at.site.as_str();
            let id = |local: &str| TensorId {
                owner: Owner::Bank { slot: of.slot, set: 0 },
                name: TensorName::new(site, local),
            };
            let group = groups.get(site).map_or(site, String::as_str);
            Pair { site: site.to_owned(), group: group.to_owned(), a: id(A), b: id(B) }
        };
        let pairs = of.attachments.iter().map(pair).collect();
        let (ranks, last) = (self.config.ranks(), self.config.last());
        Some(Box::new(Elastic { ranks, last, steps: of.steps.0, pairs }))
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::Factors { left: tensors.get(B)?.clone(), right: tensors.get(A)?.clone(), scale: self.rows.scale })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, alpha, dropout, .. } = self.config;
        Some(own::as_lora(Self::CARD.name, &self.config, (rank, alpha, dropout)))
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

/// Steps of which each trains some ranks of each group.
struct Elastic {
    ranks: Vec<usize>,
    /// The rank that is left after the last step.
    last: usize,
    steps: u64,
    pairs: Vec<Pair>,
}

/// The factors of a site.
struct Pair {
    site: String,
    /// The first site that reads the same rows.
    group: String,
    a: TensorId,
    b: TensorId,
}

/// The first `rank` rows or columns of a matrix, and 0 behind them.
fn first(tensor: &Tensor, dim: usize, rank: usize) -> attune_points::Result<Tensor> {
    let all = tensor.dim(dim)?;
    if rank >= all {
        return Ok(tensor.clone());
    }
    let none = tensor.narrow(dim, rank, all - rank)?.zeros_like()?;
    Ok(Tensor::cat(&[&tensor.narrow(dim, 0, rank)?, &none], dim)?)
}

impl Elastic {
    /// The rank of each site, drawn once for each group.
    fn drawn(&self, rng: &Rng) -> Vec<usize> {
        let rank = |pair: &Pair| self.ranks[rng.named(&pair.group).below(self.ranks.len() as u64) as usize];
        self.pairs.iter().map(rank).collect()
    }
}

impl StepRule for Elastic {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let ranks = self.drawn(&engine.rng("ranks"));
        let mut part = engine.theta().clone();
        // Rows of A behind columns of B that are 0 neither matter nor have a gradient.
        for (pair, rank) in self.pairs.iter().zip(&ranks) {
            let b_or = first(&anew::held(&part, &pair.b)?, 1, *rank)?;
            part.put(&pair.b, b_or);
        }
        let objective = engine.objective();
        let scale = 1.0 / objective.denominator().of(batch.counts);
        let parts = engine.grads(&part, &batch.parts, &*objective, scale)?;
        let (mut gradients, loss) = engine.reduce(parts)?;
        for (pair, rank) in self.pairs.iter().zip(&ranks) {
            if let Some(gradient) = gradients.get(&pair.b).cloned() {
                gradients.set(&pair.b, first(&gradient, 1, *rank)?);
            }
        }
        let grad_norm = engine.update(gradients)?;
        let mut report = StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() };
        let is_last = step.next().0 == self.steps;
        if is_last {
            let mut theta: Theta = engine.theta().clone();
            for pair in &self.pairs {
                for (id, dim) in [(&pair.a, 0), (&pair.b, 1)] {
                    let cut = first(&anew::held(&theta, id)?, dim, self.last)?;
                    theta.put(id, cut);
                }
                report.metrics.push((format!("rank/{}", pair.site), self.last as f64));
            }
            engine.set(theta);
        }
        let mean = ranks.iter().sum::<usize>() as f64 / ranks.len().max(1) as f64;
        report.metrics.push(("rank".to_owned(), if is_last { self.last as f64 } else { mean }));
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorSpec;
    use candle_core::{DType, Device};

    use super::*;
    use crate::parts::toy::{self, Toy};

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
            assert_eq!((config.ranks(), config.last()), (ranks, last));
        }
    }

    fn elastic(config: Config) -> ElasticLora {
        let rows = Rows { scale: config.alpha / f64::from(config.rank), dropout: 0.0 };
        ElasticLora { config, rows, groups: Mutex::default() }
    }

    fn at(site: &str) -> Attachment {
        let spec = TensorSpec::trained;
        Attachment { site: SiteId::new(site), tensors: vec![spec(A, [4, 3]), spec(B, [2, 4])] }
    }

    /// Three sites, of which the first two are a group, whose gradients are 1 everywhere, but of A where B is 0.
    fn toy(elastic: &ElasticLora) -> Toy {
        let sites = ["a.q", "a.k", "a.o"];
        *elastic.groups.lock().unwrap() =
            sites.iter().zip(["a.q", "a.q", "a.o"]).map(|(site, group)| (site.to_string(), group.to_owned())).collect();
        let start = |site: &str, local: &str| {
            let shape = if local == A { [4, 3] } else { [2, 4] };
            Rng::new(1, site).named(local).normal_tensor(&shape[..], 1.0, DType::F32).unwrap()
        };
        let gradient = |theta: &Theta, id: &TensorId| {
            let b = theta.get(&toy::id(id.name.owner(), B)).unwrap();
            let seen = b.ne(0.0).unwrap().to_dtype(DType::F32).unwrap().narrow(0, 0, 1).unwrap();
            Some(match id.name.local() {
                A => seen.t().unwrap().broadcast_as((4, 3)).unwrap().contiguous().unwrap(),
                _ => Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap(),
            })
        };
        Toy::new(sites.map(at).to_vec(), start, 1.0, gradient)
    }

    /// How many columns of B, and rows of A, a step has moved.
    fn moved(toy: &Toy, before: &Theta, site: &str) -> [usize; 2] {
        [(B, 0), (A, 1)].map(|(local, dim)| {
            let then = before.get(&toy::id(site, local)).unwrap();
            let by = (toy.value(site, local) - then).unwrap().abs().unwrap().max(dim).unwrap();
            by.to_vec1::<f32>().unwrap().iter().filter(|by| **by > 0.0).count()
        })
    }

    #[test]
    fn a_group_learns_in_one_rank_a_step_and_all_ranks_have_their_turn() {
        let lora = elastic(config(4, 1, 1, Left::Largest));
        let mut toy = toy(&lora);
        let mut rule = lora.step_rule(&toy.trained(60)).unwrap();
        let mut counts = BTreeMap::<usize, usize>::new();
        let mut apart = 0;
        for step in 0..60 {
            let before = toy.theta.clone();
            let report = rule.step(Step(step), &mut toy).unwrap();
            let [q, k, o] = ["a.q", "a.k", "a.o"].map(|site| moved(&toy, &before, site));
            assert!(q == k && q[0] == q[1] && o[0] == o[1], "{q:?} {k:?} {o:?}");
            *counts.entry(q[0]).or_default() += 1;
            apart += usize::from(q != o);
            if step < 59 {
                assert_eq!(report.metrics, [("rank".to_owned(), (2 * q[0] + o[0]) as f64 / 3.0)]);
            }
        }
        assert!(counts.len() == 4 && counts.values().all(|count| *count >= 8), "{counts:?}");
        assert!(apart > 20, "groups are drawn by themselves");
    }

    /// The result, cut, does what the same ranks did within the whole.
    #[test]
    fn what_is_left_is_a_lora_of_its_rank_by_the_scaling_of_the_whole() {
        let lora = elastic(config(4, 1, 1, Left::Middle));
        let mut toy = toy(&lora);
        let mut rule = lora.step_rule(&toy.trained(3)).unwrap();
        (0..2).for_each(|step| drop(rule.step(Step(step), &mut toy).unwrap()));
        let report = rule.step(Step(2), &mut toy).unwrap();
        assert_eq!(report.metrics.len(), 4);
        assert!(report.metrics.iter().all(|(_, rank)| *rank == 3.0));
        let (a, b) = (toy.value("a.o", A), toy.value("a.o", B));
        let size = |x: &Tensor| x.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(size(&a.narrow(0, 3, 1).unwrap()) + size(&b.narrow(1, 3, 1).unwrap()), 0.0);
        let x = Rng::new(1, "x").normal_tensor((5, 3), 1.0, DType::F32).unwrap();
        let (site, layout) = (SiteId::new("a.o"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 2, dropout: None, layout: &layout, rows: None };
        let whole = lora.rows.graph(&x, &Locals::new("a.o", [(A, a.clone()), (B, b.clone())]), &cx).unwrap();
        let cut = Locals::new(
            "a.o",
            [(A, a.narrow(0, 0, 3).unwrap()), (B, b.narrow(1, 0, 3).unwrap().contiguous().unwrap())],
        );
        let cut = lora.rows.graph(&x, &cut, &cx).unwrap();
        assert!(size(&(whole - cut).unwrap()) < 1e-6);
    }

    #[test]
    fn a_single_rank_is_of_usual_steps_and_the_file_is_loras() {
        let plain = elastic(config(4, 1, 4, Left::Middle));
        assert!(plain.step_rule(&Trained { slot: 0, attachments: Vec::new(), steps: Step(3) }).is_none());
        let peft = plain.peft().unwrap();
        assert_eq!(
            (&peft.config["peft_type"], &peft.config["r"], &peft.config["lora_alpha"]),
            (&"LORA".into(), &4.into(), &64.into())
        );
        assert!(own::is_own(&peft.config));
    }
}
