//! LoRA again and again: a pair of factors learns for a while, stays as it is, and the next one learns what is left; where a small rank at a time
//! shall come to a larger one.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · Σ_k (drop(x_ti) A_k^T) B_k^T                   k = 1 … links                  s = alpha / rank, or / ranks[0]
//! ```
//! where in the k-th of as many equal shares of the steps A_k and B_k learn, from a fresh start, and all others stay. The optimiser and the schedule of
//! the learning rate begin anew with each link.
//!
//! # Symbols
//! `lora_A`, the rows of all A_k, and `lora_B`, the columns of all B_k; f32, trained, `rank` a link, or of the k-th `ranks[k]`. A starts uniform in ±1/sqrt(i), B at 0.
//! `drop` is dropout on the input.
//!
//! # Cost
//! `links*rank*(i+o)` parameters per linear, or the sum of `ranks` times `i+o`, with the optimiser's numbers for all of them, of which those of a link learn at a time;
//! `2 links rank (i+o)` extra FLOPs per token forward.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With a single link it is LoRA. The end of a link changes nothing of what the model says.
//!
//! # Departures
//! What links have learned is not added to the base but kept beside it, all in one: its file is LoRA's of all their ranks. Links of
//! several ranks have one scaling.
//!
//! # Paper
//! Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning. Xia, Qin, Hazan, 2024.

use std::ops::Range;

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Merged, Peft, Port, RowCx, RowMap, Trained};
use attune_points::engine::{self, Engine, Job, Renewed, Source, StepReport, StepRule};
use attune_points::{Locals, Owner, TensorId, TensorName, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::{anew, factors, own};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// Parameters of a chain of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of a link.
    #[schemars(range(min = 1, max = 1024))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Links, one after the other.
    #[schemars(range(min = 1, max = 64))]
    links: u32,
    /// The rank of each link, such as `[8, 4, 2]`, in place of `rank` and `links`.
    ranks: Vec<u32>,
}

impl Config {
    /// The rank of each link.
    fn all(&self) -> Vec<usize> {
        match self.ranks.as_slice() {
            [] => vec![self.rank as usize; self.links as usize],
            ranks => ranks.iter().map(|rank| *rank as usize).collect(),
        }
    }

    /// What the scaling divides by.
    fn first(&self) -> u32 {
        self.ranks.first().copied().unwrap_or(self.rank)
    }
}

impl Default for Config {
    /// The paper's rank and its longer chain.
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, links: 3, ranks: Vec::new() }
    }
}

pub(super) struct ChainOfLora {
    config: Config,
}

impl Method for ChainOfLora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        fused: true,
        aliases: &["cola"],
        paper: Some(Paper {
            title: "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
            authors: "Wenhan Xia, Chengwei Qin, Elad Hazan",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(count(ranks) > 0, sum(ranks), links*rank)*(i+o)",
        merges: Merges::Factors,
        ..Card::new(
            "chain-of-lora",
            Point::Adapter,
            "LoRA again and again: a pair of factors learns for a while, stays as it is, and the next one learns what is left; where a small \
             rank at a time shall come to a larger one.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        if config.ranks.len() > 64 || config.ranks.iter().any(|rank| !(1..=1024).contains(rank)) {
            let message = format!("is {:?}; expected 64 links at most, each of a rank of 1 to 1024", config.ranks);
            return Err(vec![Fault::new("ranks", message)]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl ChainOfLora {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.first())
    }
}

impl Adapter for ChainOfLora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let ranks = self.config.all();
        let sum = ranks.iter().sum::<usize>() as u32;
        let mut attachments = factors::attach(sites, A, B, |_| sum)?;
        for spec in attachments.iter_mut().flat_map(|at| &mut at.tensors) {
            spec.comes_and_goes = ranks.len() > 1;
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        factors::kaiming(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        (self.config.all().len() > 1).then(|| Box::new(Chain::new(&self.config, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::Factors { left: tensors.get(B)?.clone(), right: tensors.get(A)?.clone(), scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        let dropout = self.config.dropout;
        let r = self.config.all().iter().sum::<usize>() as u32;
        let lora_alpha = self.scale() * f64::from(r);
        let lora = LoraConfig { r, lora_alpha, lora_dropout: dropout, ..LoraConfig::default() };
        Some(own::as_lora(Self::CARD.name, &self.config, &lora))
    }
}

impl RowMap for ChainOfLora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&(h_tr * self.scale())?, tensors.get(B)?, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        Some(FusedRows::LowRank { down: A, up: B, scale: self.scale(), dropout: self.config.dropout })
    }
}

/// Steps in which one link learns after the other.
struct Chain {
    /// Of each link.
    ranks: Vec<usize>,
    steps: u64,
    /// Each factor, and the dimension along which its links lie.
    factors: Vec<(TensorId, usize)>,
}

impl Chain {
    fn new(config: &Config, of: &Trained<'_>) -> Self {
        let factor = |at: &&Attachment| {
            let id = |local: &str| TensorId {
                owner: Owner::Bank { slot: of.slot, set: 0 },
                name: TensorName::new(at.site.as_str(), local),
            };
            [(id(A), 0), (id(B), 1)]
        };
        Self {
            ranks: config.all(),
            steps: of.steps.0.max(1),
            factors: of.attachments.iter().flat_map(factor).collect(),
        }
    }

    fn links(&self) -> u64 {
        self.ranks.len() as u64
    }

    /// The ranks of a link among those of all.
    fn span(&self, link: usize) -> Range<usize> {
        let start: usize = self.ranks.iter().take(link).sum();
        start..start + self.ranks.get(link).copied().unwrap_or_default()
    }

    /// The first step of a link, or of the next one that has any.
    fn begins(&self, link: u64) -> u64 {
        (link * self.steps).div_ceil(self.links())
    }

    /// The link that learns at a step.
    fn link(&self, step: u64) -> usize {
        (step.min(self.steps - 1) * self.links() / self.steps) as usize
    }

    /// What `of` has in the place of a link, and `others` elsewhere.
    fn with_link(&self, of: &Tensor, others: &Tensor, dim: usize, link: usize) -> attune_points::Result<Tensor> {
        let (Range { start, end }, all) = (self.span(link), of.dim(dim)?);
        let parts =
            [others.narrow(dim, 0, start)?, of.narrow(dim, start, end - start)?, others.narrow(dim, end, all - end)?];
        Ok(Tensor::cat(&parts, dim)?)
    }

    /// The flat places of a link.
    fn places(&self, of: &Tensor, dim: usize, link: usize) -> attune_points::Result<Vec<usize>> {
        let ((_, width), span) = (of.dims2()?, self.span(link));
        let mine = |place: &usize| span.contains(&[place / width, place % width][dim]);
        Ok((0..of.elem_count()).filter(mine).collect())
    }
}

impl StepRule for Chain {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        anew::misfit(job)
    }

    fn scheduled(&self, step: Step, _: Step) -> (Step, Step) {
        let link = self.link(step.0) as u64;
        let (first, end) = (self.begins(link), self.begins(link + 1));
        (Step(step.0.saturating_sub(first)), Step(end - first))
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (mut gradients, loss) = engine::gradients_on(engine, &batch)?;
        let (before, link) = (engine.theta().clone(), self.link(step.0));
        for (id, dim) in &self.factors {
            if let Some(gradient) = gradients.get(id).cloned() {
                gradients.set(id, self.with_link(&gradient, &gradient.zeros_like()?, *dim, link)?);
            }
        }
        let grad_norm = engine.update(gradients)?;
        // Moments of links that are done, and decay, would move them on.
        let mut theta = engine.theta().clone();
        for (id, dim) in &self.factors {
            let kept = self.with_link(&anew::held(&theta, id)?, &anew::held(&before, id)?, *dim, link)?;
            theta.put(id, kept);
        }
        engine.set(theta.clone());
        let next = self.link(step.next().0);
        if next != link {
            for (id, dim) in &self.factors {
                let begun = |entry| Renewed { entry, age: 0, mean: 0.0, square: 0.0 };
                let places = self.places(&anew::held(&theta, id)?, *dim, next)?;
                engine.renew(id, &places.into_iter().map(begun).collect::<Vec<_>>())?;
            }
            // It starts from where it was drawn, not from 0.
            engine.set(theta);
        }
        let metrics = vec![("link".to_owned(), (link + 1) as f64)];
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, metrics })
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::{TensorSpec, Theta};
    use candle_core::{DType, Device};

    use super::*;
    use crate::parts::toy::{self, Toy};

    const SITE: &str = "up";

    /// What is to be reached: three directions, each less than the one before.
    fn target() -> Tensor {
        let side = |name: &str| {
            let drawn = Rng::new(1, name).normal_tensor((6, 3), 1.0, DType::F64).unwrap();
            attune_tensor::linalg::qr(&drawn).unwrap().0.to_dtype(DType::F32).unwrap()
        };
        let values = Tensor::new(&[3f32, 2.0, 1.0], &Device::Cpu).unwrap();
        side("left").broadcast_mul(&values).unwrap().matmul(&side("right").t().unwrap().contiguous().unwrap()).unwrap()
    }

    fn off(toy: &Toy) -> Tensor {
        (toy.value(SITE, B).matmul(&toy.value(SITE, A)).unwrap() - target()).unwrap()
    }

    fn size(x: &Tensor) -> f32 {
        x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
    }

    /// Half the squared distance of `B A` from the target, with `links` of rank 1.
    fn toy(links: u32) -> (ChainOfLora, Toy) {
        let chain = ChainOfLora { config: Config { rank: 1, alpha: 1.0, links, ..Config::default() } };
        let r = links as usize;
        let spec = TensorSpec::trained;
        let at = Attachment { site: SiteId::new(SITE), tensors: vec![spec(A, [r, 6]), spec(B, [6, r])] };
        let start = move |_: &str, local: &str| match local {
            A => Rng::new(1, A).normal_tensor((r, 6), 0.5, DType::F32).unwrap(),
            _ => Tensor::zeros((6, r), DType::F32, &Device::Cpu).unwrap(),
        };
        let gradient = |theta: &Theta, id: &TensorId| {
            let of = |local: &str| theta.get(&toy::id(SITE, local)).unwrap().clone();
            let off = (of(B).matmul(&of(A)).unwrap() - target()).unwrap();
            let turned = |x: Tensor| x.t().unwrap().contiguous().unwrap();
            Some(if id.name.local() == A { turned(of(B)).matmul(&off) } else { off.matmul(&turned(of(A))) }.unwrap())
        };
        (chain, Toy::new(vec![at], start, 0.05, gradient))
    }

    fn run(links: u32, steps: u64, mut look: impl FnMut(u64, &Theta, &Toy)) -> Toy {
        let (chain, mut toy) = toy(links);
        let mut rule = chain.step_rule(&toy.trained(steps));
        for step in 0..steps {
            let before = toy.theta.clone();
            match &mut rule {
                Some(rule) => drop(rule.step(Step(step), &mut toy).unwrap()),
                None => drop(engine::usual_step(&mut toy).unwrap()),
            }
            look(step, &before, &toy);
        }
        toy
    }

    #[test]
    fn three_links_reach_what_one_stays_away_from() {
        let (chain, plain) = (run(3, 1500, |_, _, _| {}), run(1, 1500, |_, _, _| {}));
        assert!(size(&off(&chain)) < 1e-3, "{}", size(&off(&chain)));
        // The two directions that a rank of 1 leaves.
        assert!((size(&off(&plain)) - 5f32.sqrt()).abs() < 1e-3, "{}", size(&off(&plain)));
    }

    #[test]
    fn a_link_learns_alone_and_the_next_begins_afresh_where_nothing_changes() {
        let toy = run(3, 30, |step, before, toy| {
            let link = (step / 10) as usize;
            for (local, dim) in [(A, 1), (B, 0)] {
                let by = (toy.value(SITE, local) - before.get(&toy::id(SITE, local)).unwrap()).unwrap();
                let by = by.abs().unwrap().max(dim).unwrap().to_vec1::<f32>().unwrap();
                // At its first step a link's A has no gradient, for its B is 0.
                let first = local == A && step % 10 == 0;
                for (at, by) in by.iter().enumerate() {
                    assert_eq!(*by > 0.0, at == link && !first, "{local}, link {at} at step {step}");
                }
            }
        });
        let (a, b) = ("up.lora_A".to_owned(), "up.lora_B".to_owned());
        assert_eq!(toy.renewed, [(a.clone(), 6), (b.clone(), 6), (a, 6), (b, 6)]);
    }

    #[test]
    fn links_share_the_steps_and_a_run_shorter_than_its_chain_ends() {
        let links = |steps: u64, links: u32| {
            let config = Config { links, ..Config::default() };
            let chain = Chain::new(&config, &Trained { slot: 0, attachments: Vec::new(), steps: Step(steps) });
            let scheduled = (0..steps).map(|step| {
                let (at, all) = chain.scheduled(Step(step), Step(steps));
                (at.0, all.0)
            });
            ((0..=steps).map(|step| chain.link(step)).collect::<Vec<_>>(), scheduled.collect::<Vec<_>>())
        };
        let (of_seven, of_two) = (links(7, 3), links(2, 4));
        assert_eq!(of_seven.0, [0, 0, 0, 1, 1, 2, 2, 2]);
        // Each link has a schedule of its own, as long as it is.
        assert_eq!(of_seven.1, [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2), (0, 2), (1, 2)]);
        assert_eq!(of_two, (vec![0, 2, 2], vec![(0, 1), (0, 1)]));
    }

    #[test]
    fn ranks_may_step_down_from_link_to_link() {
        let config = Config { rank: 9, alpha: 6.0, links: 9, ranks: vec![4, 2, 1], ..Config::default() };
        let chain = Chain::new(&config, &Trained { slot: 0, attachments: Vec::new(), steps: Step(9) });
        assert_eq!((0..3).map(|link| chain.span(link)).collect::<Vec<_>>(), [0..4, 4..6, 6..7]);
        let b = Tensor::zeros((3, 7), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(chain.places(&b, 1, 1).unwrap(), [4, 5, 11, 12, 18, 19]);
        let only = chain.with_link(&b.ones_like().unwrap(), &b, 1, 2).unwrap().to_vec2::<f32>().unwrap();
        assert!(only.iter().all(|row| *row == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]));
        assert_eq!((chain.links(), chain.link(8)), (3, 2));
        let lora = ChainOfLora { config };
        let peft = lora.peft().unwrap();
        assert_eq!((&peft.config["r"], lora.scale()), (&7.into(), 1.5));
        assert_eq!(peft.config["lora_alpha"].as_f64(), Some(10.5));
    }

    #[test]
    fn the_file_is_that_of_one_lora() {
        let chain = ChainOfLora { config: Config { rank: 4, alpha: 6.0, links: 3, ..Config::default() } };
        let peft = chain.peft().unwrap();
        assert_eq!((&peft.config["r"], &peft.config["lora_alpha"]), (&12.into(), &18.into()));
        assert_eq!(chain.scale(), 18.0 / 12.0);
    }
}
