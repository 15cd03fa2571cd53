//! Rows before documents and rows added to them at each layer, all of a few numbers that are searched for instead of trained: learns from
//! losses alone, without one backward pass, where examples are few and memory is for a forward pass only.
//!
//! # Update
//! ```text
//! x_pd ← x_pd + P_pd,  P_pd = reshape(G z) ∘ scale_d     the rows before documents: at the table of tokens, and where each further layer begins
//! step t: layer t mod L searches: z_k ~ m + σ N(0, C), k = 1 … population; each is one pass over the step's data, the others fixed
//! m, σ, C ← CMA-ES(z_k by their losses);  z ← the least of all, if it is less than what is there
//! ```
//!
//! # Symbols
//! `z` `[dimensions]` at each layer, f32, searched, 0 at the start; `scale` `[d]`, kept, all `alpha · s / (sqrt(dimensions) · sigma)`; `G`
//! `[length d, dimensions]` of standard normal numbers, made again of `seed` `[1]`, a whole number, and never stored; `start`
//! `[length, d]`, kept, rows drawn from the table of tokens: the x of the first layer. `s` is the standard deviation of the numbers of the
//! table, and at further layers that of the stream on the first step's data, numbers beyond three of it pulled in five times. `sigma`
//! is the first σ.
//!
//! # Cost
//! `dimensions` numbers per layer; `length` rows more in each document. A step is `population + 1` forward passes over its data, and
//! the first one more; there is no backward. A search holds `16 dimensions²` bytes, and G of two layers is in memory. It does not merge.
//!
//! # Limits
//! With z = 0 it is the base behind the drawn tokens. With layers beyond the first left at 0 it is a prompt of few numbers.
//!
//! # Departures
//! The loss is the job's, not one over the words of labels, and a step's data is a batch of the job's: a layer's best has to be less than
//! what is there on that batch, where the authors compare losses over all steps of one set. The best on other examples is not looked for:
//! a validation set is measured and chooses nothing. Rows come before a document's first token, whichever that is. Variances of several
//! micro-batches are averaged.
//!
//! # Paper
//! BBTv2: Towards a Gradient-Free Future with Large Language Models. Sun, He, Qian, Zhou, Huang, Qiu, 2022.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Place, Site, SiteId};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PlacesMap, Port, SequenceMap, Trained};
use attune_points::engine::{Engine, Job, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Locals, Owner, TensorId, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::anew::held;
use crate::parts::search::Turns;
use crate::parts::starts::{self, Start};
use crate::parts::{own, prompt, spread};

const Z: &str = "z";
const SCALE: &str = "scale";
const SEED: &str = "seed";
const START: &str = "start";

/// How many of a layer's blocks are kept that were made last: those that ranks of one process are at.
const KEPT: usize = 4;

/// Numbers of a table that are looked at at once.
const ROOM: usize = 1 << 22;

/// Parameters of black-box tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows before each document.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// Numbers that are searched for at each layer.
    #[schemars(range(min = 1, max = 4096))]
    dimensions: u32,
    /// Candidates of a step.
    #[schemars(range(min = 4, max = 1000))]
    population: u32,
    /// How far the first candidates are from the start.
    #[schemars(range(min = 1e-6, max = 1e6))]
    sigma: f64,
    /// Factor on the size of the rows that the first candidates make, against that of the stream.
    #[schemars(range(min = 1e-6, max = 1e6))]
    alpha: f64,
    /// The most passes over a step's data that the job may come to.
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    budget: u64,
}

impl Default for Config {
    /// The authors' values.
    fn default() -> Self {
        Self { length: 50, dimensions: 500, population: 20, sigma: 1.0, alpha: 1.0, budget: 8000 }
    }
}

pub(super) struct Bbtv2 {
    config: Config,
    made: Mutex<Made>,
}

/// What was made last: a pass asks for the same block again for each of its parts, and a step for the same projection for each candidate.
#[derive(Default)]
struct Made {
    /// `G` by what it was drawn from, of the layer that searches and the one before it, whose best is made once more.
    projections: VecDeque<((i64, usize), Tensor)>,
    /// Blocks by what their `G` was drawn from, each with the numbers that it was made of.
    blocks: BTreeMap<i64, VecDeque<(Vec<f32>, Tensor)>>,
}

impl Method for Bbtv2 {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "BBTv2: Towards a Gradient-Free Future with Large Language Models",
            authors: "Tianxiang Sun, Zhengfu He, Hong Qian, Yunhua Zhou, Xuanjing Huang, Xipeng Qiu",
            year: 2022,
        }),
        applies: &[SiteKind::Embedding, SiteKind::Attention],
        targets: prompt::TARGETS,
        parameters: "dimensions",
        rows_before: "length",
        moves: Some("documents come after rows that are no part of them"),
        merges: Merges::No,
        ..Card::new(
            "bbtv2",
            Point::Adapter,
            "Rows before documents and rows added to them at each layer, all of a few numbers that are searched for instead of trained: \
             learns from losses alone, without one backward pass, where examples are few and memory is for a forward pass only.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        // Each step at what is there and at the candidates, and the first one to look at the stream.
        let each = u64::from(config.population) + 1;
        let calls = if cx.steps.0 == 0 { 0 } else { cx.steps.0.saturating_mul(each).saturating_add(1) };
        if calls > config.budget {
            let message = format!(
                "is {}; {} steps of {each} passes, and one before them, make {calls}: expected that, or fewer steps",
                config.budget, cx.steps
            );
            return Err(vec![Fault::new("budget", message)]);
        }
        Ok(Box::new(Self { config, made: Mutex::default() }))
    }
}

/// The standard normal numbers `[rows, columns]` of a seed, each row a stream of its own.
fn projection(seed: i64, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
    let stream = Rng::new(seed.cast_unsigned(), "projection");
    let mut numbers = vec![0.0f32; rows * columns];
    numbers.par_chunks_mut(columns).enumerate().for_each(|(row, numbers)| {
        let mut stream = stream.sub(row as u64);
        numbers.iter_mut().for_each(|x| *x = stream.normal() as f32);
    });
    Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)
}

impl Bbtv2 {
    /// What a standard deviation of the stream makes of `G`.
    fn scale(&self, deviation: f64) -> f64 {
        self.config.alpha * deviation / (f64::from(self.config.dimensions).sqrt() * self.config.sigma)
    }

    /// `G` of a seed, for rows of this width.
    fn drawn(&self, seed: i64, width: usize) -> attune_points::Result<Tensor> {
        let made = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kept)) = made().projections.iter().find(|(of, _)| *of == (seed, width)) {
            return Ok(kept.clone());
        }
        let Config { length, dimensions, .. } = self.config;
        // Nobody waits while it is drawn: whoever waits could be the one that draws.
        let drawn = projection(seed, length as usize * width, dimensions as usize)?;
        let mut made = made();
        made.projections.truncate(1);
        made.projections.push_front(((seed, width), drawn.clone()));
        Ok(drawn)
    }

    /// `P_pd` of what is kept at a site.
    fn block(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (z, scale_d) = (tensors.get(Z)?, tensors.get(SCALE)?);
        let seed = tensors.get(SEED)?.to_vec1::<i64>()?;
        let &[seed] = seed.as_slice() else {
            return Err(Error::Refused(format!("a seed of {} numbers; expected one", seed.len())));
        };
        let (rows, width) = (self.config.length as usize, scale_d.elem_count());
        let make = || -> attune_points::Result<Tensor> {
            let g = self.drawn(seed, width)?.to_dtype(z.dtype())?;
            let flat = ops::linear(&z.unsqueeze(0)?, &g, None)?;
            Ok(flat.reshape((rows, width))?.broadcast_mul(scale_d)?)
        };
        // What a gradient goes through is made for it.
        if z.dtype() != DType::F32 || z.track_op() || scale_d.track_op() {
            return make();
        }
        let numbers = [z.to_vec1::<f32>()?, scale_d.to_vec1::<f32>()?].concat();
        let of_seed = |made: &Made| {
            let kept = made.blocks.get(&seed)?.iter().find(|(of, _)| *of == numbers)?;
            Some(kept.1.clone())
        };
        if let Some(kept) = of_seed(&self.made.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(kept);
        }
        let block = make()?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let blocks = made.blocks.entry(seed).or_default();
        blocks.truncate(KEPT - 1);
        blocks.push_front((numbers, block.clone()));
        Ok(block)
    }
}

impl Adapter for Bbtv2 {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { length, dimensions, .. } = self.config;
        let own = || {
            vec![
                TensorSpec::trained(Z, [dimensions as usize]),
                TensorSpec::fixed(SCALE, [arch.hidden]),
                TensorSpec::fixed(SEED, [1]),
            ]
        };
        let table = [own(), vec![TensorSpec::fixed(START, [length as usize, arch.hidden])]].concat();
        let mut attachments = prompt::attach(arch, sites, length, table)?;
        // The first layer's is at the table.
        let further = sites.iter().filter(|site| site.place == Place::Attention && site.layer != Some(0));
        attachments.extend(further.map(|site| Attachment { site: site.id.clone(), tensors: own() }));
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let seed = Tensor::new(&[rng.named(SEED).next_u64().cast_signed()], &Device::Cpu)?;
        let (deviation, start) = if is_table(at) {
            let tokens = prompt::drawn(weight, self.config.length, &mut rng.named(START));
            (deviation(weight)?, Some(prompt::rows_at(weight, tokens)?))
        } else {
            // Of the stream nothing is known before the first step.
            (1.0, None)
        };
        starts::each(at, rng, |spec| match (spec.local, &start) {
            (SCALE, _) => Start::Constant(self.scale(deviation)),
            (SEED, _) => Start::Is(seed.clone()),
            (START, Some(rows_pd)) => Start::Is(rows_pd.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if is_table(at) { Port::Sequence(self) } else { Port::Places(self) }
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        Some(Box::new(Search::new(self, of)))
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No(prompt::UNMERGED))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

/// Whether rows of its own begin at an attachment.
fn is_table(at: &Attachment) -> bool {
    at.tensors.iter().any(|spec| spec.local == START)
}

/// The standard deviation of the numbers of a table, some rows of which are in memory at a time.
fn deviation(table: &dyn Weight) -> attune_points::Result<f64> {
    let (rows, columns) = table.shape();
    let each = (ROOM / columns.max(1)).max(1);
    let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for first in (0..rows).step_by(each) {
        let numbers = table.rows(first..(first + each).min(rows), DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let (mean, variance) = spread::moments(&numbers);
        let count = numbers.len() as f64;
        n += count;
        sum += count * mean;
        squares += count * (variance + mean * mean);
    }
    Ok((squares / n - (sum / n).powi(2)).max(0.0).sqrt())
}

impl SequenceMap for Bbtv2 {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((tensors.get(START)? + self.block(tensors)?)?)
    }
}

impl PlacesMap for Bbtv2 {
    fn places(&self) -> (usize, usize) {
        (0, self.config.length as usize)
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        self.block(tensors)
    }
}

/// Steps that search, layer by layer. Before the first one the stream is looked at.
struct Search {
    turns: Result<Turns, String>,
    /// Where rows are added to the stream, with the numbers and the scale of what is added.
    further: Vec<(SiteId, TensorId, TensorId)>,
    /// What a standard deviation of 1 makes of `G`.
    unit: f64,
}

impl Search {
    fn new(of: &Bbtv2, trained: &Trained<'_>) -> Self {
        let id = |at: &Attachment, local: &str| {
            let owner = Owner::Bank { slot: trained.slot, set: 0 };
            TensorId { owner, name: TensorName::new(at.site.as_str(), local) }
        };
        let Config { dimensions, population, sigma, .. } = of.config;
        let sought = trained.attachments.iter().map(|at| id(at, Z));
        let turns = Turns::new(sought, dimensions as usize, sigma, population as usize);
        let further = trained.attachments.iter().filter(|at| !is_table(at));
        Self {
            turns: turns.map_err(|error| error.to_string()),
            further: further.map(|at| (at.site.clone(), id(at, Z), id(at, SCALE))).collect(),
            unit: of.scale(1.0),
        }
    }
}

impl StepRule for Search {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        if let Err(message) = &self.turns {
            return Some(message.clone());
        }
        job.objective.needs().answers.map(|_| {
            "is that of a component whose candidates are compared on the same texts, and the objective learns from answers that each of \
             them would give otherwise: expected one that learns what is in the data"
                .to_owned()
        })
    }

    fn takes_gradients(&self) -> bool {
        false
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let turns = self.turns.as_mut().map_err(|message| Error::Refused(message.clone()))?;
        let batch = engine.batch(Source::Train)?;
        if turns.calls() == 0 && !self.further.is_empty() {
            let sites: Vec<SiteId> = self.further.iter().map(|(site, ..)| site.clone()).collect();
            let found = spread::of_stream(engine, &batch, &sites)?;
            turns.count();
            let mut theta = engine.theta().clone();
            for (site, z, scale) in &self.further {
                // What was found before is of the scale that it has.
                if held(&theta, z)?.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0 {
                    continue;
                }
                let size = self.unit * found.get(site).copied().unwrap_or_default();
                let scale_d = Tensor::full(size as f32, held(&theta, scale)?.shape(), &Device::Cpu)?;
                theta.put(scale, scale_d);
            }
            engine.set(theta);
        }
        turns.turn(step, engine, &batch)
    }

    fn state(&self) -> Tensors {
        self.turns.as_ref().map(Turns::state).unwrap_or_default()
    }

    fn restore(&mut self, state: Tensors, theta: &Theta) -> attune_points::Result<()> {
        match &mut self.turns {
            Ok(turns) => turns.restore(state, theta),
            Err(message) => Err(Error::Refused(message.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn built(params: serde_json::Value, steps: u64) -> Result<Bbtv2, String> {
        let config: Config = serde_json::from_value(params).unwrap();
        let cx = BuildCx { steps: Step(steps), domains: &[], words: None };
        Bbtv2::build(config.clone(), &cx).map_err(|faults| faults[0].to_string())?;
        Ok(Bbtv2 { config, made: Mutex::default() })
    }

    /// The tensors of a layer beyond the first.
    fn layer(z: &[f32], deviation: f32, seed: i64, width: usize) -> Locals {
        let cpu = &Device::Cpu;
        let scale = Tensor::full(deviation, width, cpu).unwrap();
        Locals::new(
            "h.1.attn",
            [(Z, Tensor::new(z, cpu).unwrap()), (SCALE, scale), (SEED, Tensor::new(&[seed], cpu).unwrap())],
        )
    }

    /// By loops over the numbers of each row's stream, in 64 bits.
    #[test]
    fn a_block_is_made_of_its_seed_its_scale_and_its_numbers_alone() {
        let (z, seed, width) = ([0.5f32, -1.0, 2.0], -7_000_000_000_123, 5);
        let of = || built(json!({"length": 4, "dimensions": 3}), 0).unwrap();
        let first = of();
        let block = first.block(&layer(&z, 0.25, seed, width)).unwrap().to_vec2::<f32>().unwrap();
        for (row, numbers) in block.iter().enumerate() {
            for (col, found) in numbers.iter().enumerate() {
                let mut stream = Rng::new(seed.cast_unsigned(), "projection").sub((row * width + col) as u64);
                let expected: f64 = z.iter().map(|z| f64::from(*z) * stream.normal()).sum::<f64>() * 0.25;
                assert!((f64::from(*found) - expected).abs() < 1e-6, "row {row}, number {col}");
            }
        }
        // Asked again, asked of another that knows nothing yet, and after others in between: the same bits.
        for other in 0..9 {
            first.block(&layer(&[1.0, 2.0, other as f32], 0.25, seed, width)).unwrap();
            first.block(&layer(&z, 0.25, other, width)).unwrap();
        }
        for again in [&first, &of()] {
            assert_eq!(again.block(&layer(&z, 0.25, seed, width)).unwrap().to_vec2::<f32>().unwrap(), block);
        }
        let other = first.block(&layer(&z, 0.5, seed, width)).unwrap().to_vec2::<f32>().unwrap();
        assert!(other[0][0] == 2.0 * block[0][0], "of another scale");
    }

    /// Columns of A: four standard errors of 20 480 numbers are 2 %.
    #[test]
    fn columns_of_the_projection_spread_as_they_are_scaled() {
        let of = built(json!({"length": 20, "dimensions": 7, "sigma": 0.5, "alpha": 3}), 0).unwrap();
        let width = 1024;
        let scale = of.scale(0.8);
        assert!((scale - 3.0 * 0.8 / (7f64.sqrt() * 0.5)).abs() < 1e-12);
        for column in 0..7 {
            let mut z = [0.0f32; 7];
            z[column] = 1.0;
            let block = of.block(&layer(&z, scale as f32, 3, width)).unwrap();
            let (mean, variance) = spread::moments(&block.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            assert!((variance.sqrt() / scale - 1.0).abs() < 0.02, "column {column}: {} of {scale}", variance.sqrt());
            assert!(mean.abs() < 0.03 * scale);
        }
    }

    #[test]
    fn the_spread_of_a_table_is_that_of_all_its_numbers() {
        let table = Rng::new(2, "table").uniform_tensor((37, 11), 3.0, DType::F32).unwrap();
        let numbers = table.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected = spread::moments(&numbers).1.sqrt();
        assert!((deviation(&table).unwrap() - expected).abs() < 1e-9);
    }

    #[test]
    fn more_passes_than_the_budget_are_refused_before_the_first() {
        assert!(built(json!({"population": 10, "budget": 111}), 10).is_ok());
        let refused = built(json!({"population": 10, "budget": 110}), 10).err().unwrap();
        assert_eq!(
            refused,
            "`budget` is 110; 10 steps of 11 passes, and one before them, make 111: expected that, or fewer steps"
        );
    }
}
