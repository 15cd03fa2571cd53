//! Turns a weight from both sides by random blocks, again and again: its singular values stay and their vectors go anywhere; for long runs, as
//! continued pre-training is, that shall keep how strong each direction of a weight is.
//!
//! # Update
//! ```text
//! W'_oi = R_oo W_oi P_ii^T             R = Π^T diag(G_1, G_2, …) Π, of the outputs, and P of the inputs, with permutations Π of their own
//! G     = (1 + Q)(1 - Q)⁻¹        or 1 + 2 Q + 2 Q² + … + Q^(terms-1) with terms > 0                  Q = U - U^T, b by b
//! every `every` steps   W <- W',  U <- 0 with nothing of its past,  Π <- new ones
//! y_to  = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `poet_out` and `poet_in`, the entries of each U above its diagonal, row after row, `[blocks, b (b - 1) / 2]`, f32, trained, 0 at the start.
//! `poet_weight` W, f32, the base's weight at the start, and there only with `every` > 0; `poet_order_out` and `poet_order_in` Π, i64, drawn; these change
//! where a round ends and never train.
//!
//! # Cost
//! `(o + i)(b - 1) / 2` parameters per linear, or `b (b - 1)` where blocks are single. A copy of each weight in 32 bits, which is in the adapter's file as well. Each
//! pass makes `W'` twice (forward and reverse), `2 b o i` FLOPs a side, and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! With U = 0 it is the base, bit for bit. Without `terms` W' has the singular values of W, whatever the rounds; with them they drift
//! by the power `terms - 1` of what a round turns. With `every` 0 it is one round.
//!
//! # Departures
//! The base is not written over: what rounds have made of it is kept beside it. Rows of the weight are not scaled to 1 first, which is for training from
//! nothing, and the factor of the authors' on the learning rate is not here.
//!
//! # Paper
//! Reparameterized LLM Training via Orthogonal Equivalence Transformation. Qiu, Buchholz, Xiao, Dax, Schölkopf, Liu, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, Trained, WeightMap};
use attune_points::engine::{self, Engine, Job, StepReport, StepRule};
use attune_points::{Error, Locals, Owner, TensorId, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{anew, linears, orthogonal, own};

const OUT: &str = "poet_out";
const IN: &str = "poet_in";
const WEIGHT: &str = "poet_weight";
const ORDER_OUT: &str = "poet_order_out";
const ORDER_IN: &str = "poet_order_in";

/// What of a side turns in a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Cover {
    /// All of it, in blocks of rows that were drawn together.
    #[default]
    Blocks,
    /// A single block of drawn rows.
    Single,
}

/// Parameters of POET.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of the blocks that turn.
    #[schemars(range(min = 2, max = 4096))]
    block_size: u32,
    /// What of a side turns in a round.
    cover: Cover,
    /// Terms of the series in place of the inverse; 0 for the inverse itself, which is exact.
    #[schemars(range(min = 0, max = 64))]
    terms: u32,
    /// Steps of a round; 0 for a single one.
    #[schemars(range(min = 0, max = 1_000_000))]
    every: u64,
}

impl Default for Config {
    /// The authors' values.
    fn default() -> Self {
        Self { block_size: 256, cover: Cover::Blocks, terms: 5, every: 200 }
    }
}

pub(super) struct Poet {
    config: Config,
}

impl Method for Poet {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Reparameterized LLM Training via Orthogonal Equivalence Transformation",
            authors: "Zeju Qiu, Simon Buchholz, Tim Z. Xiao, Maximilian Dax, Bernhard Schölkopf, Weiyang Liu",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(cover == \"blocks\", (o + i)*(block_size - 1)/2, block_size*(block_size - 1))",
        fixed: "o*i*(every > 0)",
        merges: Merges::Weight,
        rules: &[Rule {
            when: "true",
            require: "terms != 1",
            message: "is 1, with which nothing turns; expected 0, or 2 and more",
            path: "terms",
        }],
        ..Card::new(
            "poet",
            Point::Adapter,
            "Turns a weight from both sides by random blocks, again and again: its singular values stay and their vectors go anywhere; for \
             long runs, as continued pre-training is, that shall keep how strong each direction of a weight is.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// The tensors of a side: what trains, and the order of its rows.
const SIDES: [(&str, &str); 2] = [(OUT, ORDER_OUT), (IN, ORDER_IN)];

/// The permutation back.
fn back(order: &[usize]) -> Vec<usize> {
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(at, &row)| back[row] = at);
    back
}

/// Numbers below `n` in some order.
fn drawn(n: usize, rng: &Rng) -> attune_points::Result<Tensor> {
    let order: Vec<i64> = rng.clone().permutation(n).into_iter().map(|row| row as i64).collect();
    Ok(Tensor::new(order, &Device::Cpu)?)
}

impl Config {
    /// The columns of a matrix, turned by the blocks of a side: `W_oi P_ii^T`.
    fn turned(&self, w_oi: &Tensor, side: (&str, &str), tensors: &Locals) -> attune_points::Result<Tensor> {
        let (g_nbb, order) = self.blocks(side, tensors)?;
        let drawn_oi = ops::permute_columns(w_oi, &order)?;
        let turned_oi = match self.cover {
            Cover::Blocks => orthogonal::turn(&drawn_oi, &g_nbb)?,
            Cover::Single => {
                let b = self.block_size as usize;
                let turned_ob = orthogonal::turn(&drawn_oi.narrow(1, 0, b)?, &g_nbb)?;
                let rest = drawn_oi.narrow(1, b, drawn_oi.dim(1)? - b)?;
                Tensor::cat(&[&turned_ob, &rest], 1)?
            }
        };
        Ok(ops::permute_columns(&turned_oi, &back(&order))?)
    }

    /// The rows of a matrix, turned by the blocks of a side: `R_oo W_oi`.
    fn turned_rows(&self, w_oi: &Tensor, side: (&str, &str), tensors: &Locals) -> attune_points::Result<Tensor> {
        let ((g_nbb, order), (o, i)) = (self.blocks(side, tensors)?, w_oi.dims2()?);
        let drawn_oi = w_oi.index_select(&rows(&order)?, 0)?;
        let (n, b, _) = g_nbb.dims3()?;
        let turned = ops::matmul(&g_nbb, &drawn_oi.narrow(0, 0, n * b)?.contiguous()?.reshape((n, b, i))?)?;
        let turned = turned.reshape((n * b, i))?;
        let all = if n * b < o { Tensor::cat(&[&turned, &drawn_oi.narrow(0, n * b, o - n * b)?], 0)? } else { turned };
        Ok(all.index_select(&rows(&back(&order))?, 0)?)
    }

    /// The blocks of a side, and the order in which they take rows or columns.
    fn blocks(&self, side: (&str, &str), tensors: &Locals) -> attune_points::Result<(Tensor, Vec<usize>)> {
        let q_nbb = orthogonal::skew(tensors.get(side.0)?, self.block_size as usize)?;
        let g_nbb = match self.terms {
            // Cayley's map of -Q.
            0 => orthogonal::cayley(&q_nbb.neg()?)?,
            terms => orthogonal::series(&q_nbb, terms)?,
        };
        let order = tensors.get(side.1)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let order: Vec<usize> = order.into_iter().map(|at| at as usize).collect();
        // They may come from a file.
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if sorted.iter().enumerate().any(|(at, &place)| at != place) {
            return Err(Error::Refused(format!("{} is not an order of {} places", side.1, order.len())));
        }
        Ok((g_nbb, order))
    }
}

/// Numbers of rows as a tensor.
fn rows(order: &[usize]) -> attune_points::Result<Tensor> {
    Ok(Tensor::new(order.iter().map(|&at| at as u32).collect::<Vec<_>>(), &Device::Cpu)?)
}

impl Adapter for Poet {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { block_size, cover, every, .. } = self.config;
        let b = block_size as usize;
        linears::attach(sites, |site, o, i| {
            let fits = |n: usize| if cover == Cover::Blocks { n.is_multiple_of(b) } else { b <= n };
            if !fits(o) || !fits(i) {
                let expected =
                    if cover == Cover::Blocks { "a divisor of both widths" } else { "the smaller width at most" };
                let message = format!("is {b}; {} is {o} by {i}: expected {expected}", site.id);
                return Err(Fault::new("block_size", message));
            }
            let blocks = |n: usize| if cover == Cover::Blocks { n / b } else { 1 };
            // Decay pulls back to what the round began with.
            let trained = |local, n: usize| TensorSpec {
                decay: false,
                comes_and_goes: true,
                ..TensorSpec::trained(local, [blocks(n), b * (b - 1) / 2])
            };
            let mut tensors = vec![
                trained(OUT, o),
                trained(IN, i),
                TensorSpec::fixed(ORDER_OUT, [o]),
                TensorSpec::fixed(ORDER_IN, [i]),
            ];
            tensors.extend((every > 0).then(|| TensorSpec::fixed(WEIGHT, [o, i])));
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (o, i) = weight.shape();
        let (order_out, order_in) = (drawn(o, &rng.named(ORDER_OUT))?, drawn(i, &rng.named(ORDER_IN))?);
        let kept = at.tensors.iter().any(|spec| spec.local == WEIGHT);
        let kept = kept.then(|| weight.dense(DType::F32)).transpose()?;
        starts::each(at, rng, |spec| match (spec.local, &kept) {
            (ORDER_OUT, _) => Start::Is(order_out.clone()),
            (ORDER_IN, _) => Start::Is(order_in.clone()),
            (WEIGHT, Some(kept)) => Start::Is(kept.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let Config { every, .. } = self.config;
        (every > 0 && every < of.steps.0).then(|| Box::new(Rounds::new(&self.config, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(OUT)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Poet {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        self.config.made(if self.config.every > 0 { tensors.get(WEIGHT)? } else { w_oi }, tensors)
    }
}

impl Config {
    /// `R_oo W_oi P_ii^T`.
    fn made(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let [of_rows, of_columns] = SIDES;
        self.turned_rows(&self.turned(w_oi, of_columns, tensors)?, of_rows, tensors)
    }
}

/// Steps in rounds, each of which begins at what the one before has made of the weights.
struct Rounds {
    config: Config,
    steps: u64,
    sites: Vec<Turning>,
}

/// A site whose weight turns.
struct Turning {
    site: String,
    slot: u16,
}

impl Turning {
    fn id(&self, local: &str) -> TensorId {
        let owner = Owner::Bank { slot: self.slot, set: 0 };
        TensorId { owner, name: TensorName::new(self.site.as_str(), local) }
    }

    /// Puts what the round has made of the weight in its place, and draws new orders; by which share of its length that is longer or
    /// shorter.
    fn next_round(&self, config: &Config, theta: &mut Theta, rng: &Rng) -> attune_points::Result<f64> {
        let tensor = |local: &'static str| Ok((local, anew::held(theta, &self.id(local))?));
        let tensors = [OUT, IN, ORDER_OUT, ORDER_IN].map(tensor);
        let tensors = tensors.into_iter().collect::<attune_points::Result<Vec<_>>>()?;
        let weight = anew::held(theta, &self.id(WEIGHT))?;
        let made = config.made(&weight, &Locals::new(self.site.as_str(), tensors))?;
        let length = |w: &Tensor| w.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
        let stretched = (length(&made)? / length(&weight)?.max(f64::MIN_POSITIVE)).sqrt() - 1.0;
        let (o, i) = made.dims2()?;
        theta.put(&self.id(WEIGHT), made);
        for (local, n) in [(ORDER_OUT, o), (ORDER_IN, i)] {
            theta.put(&self.id(local), drawn(n, &rng.named(&self.site).named(local))?);
        }
        Ok(stretched.abs())
    }
}

impl Rounds {
    fn new(config: &Config, of: &Trained<'_>) -> Self {
        let turning = |at: &&Attachment| Turning { site: at.site.as_str().to_owned(), slot: of.slot };
        let sites = of.attachments.iter().map(turning).collect();
        Self { config: config.clone(), steps: of.steps.0, sites }
    }
}

impl StepRule for Rounds {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        anew::misfit(job)
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let mut report = engine::usual_step(engine)?;
        let number = step.next().0;
        if number.is_multiple_of(self.config.every) && number < self.steps {
            let (mut theta, rng) = (engine.theta().clone(), engine.rng("orders"));
            let mut most = 0.0f64;
            for site in &self.sites {
                most = most.max(site.next_round(&self.config, &mut theta, &rng)?);
            }
            engine.set(theta);
            for id in self.sites.iter().flat_map(|site| [site.id(OUT), site.id(IN)]) {
                anew::whole(engine, &id)?;
            }
            report.metrics.push(("stretched".to_owned(), most));
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::{Bank, BankKind, Params};
    use attune_tensor::linalg;

    use super::*;

    fn normal(name: &str, shape: &[usize], std: f64) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, std, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn config(block_size: u32, cover: Cover, terms: u32) -> Config {
        Config { block_size, cover, terms, every: 3 }
    }

    /// At a weight of 8 by 12, turned by some.
    fn moved(config: &Config, std: f64) -> (Tensor, Locals) {
        let b = config.block_size as usize;
        let blocks = |n: usize| if config.cover == Cover::Blocks { n / b } else { 1 };
        let upper = |name: &str, n: usize| normal(name, &[blocks(n), b * (b - 1) / 2], std);
        let order = |name: &str, n: usize| drawn(n, &Rng::new(2, name)).unwrap();
        let w = normal("w", &[8, 12], 1.0);
        let locals = [
            (OUT, upper("out", 8)),
            (IN, upper("in", 12)),
            (ORDER_OUT, order("out", 8)),
            (ORDER_IN, order("in", 12)),
            (WEIGHT, w.clone()),
        ];
        (w, Locals::new("up", locals))
    }

    fn singular(w: &Tensor) -> Tensor {
        linalg::svd(w).unwrap().s
    }

    fn products(w: &Tensor) -> Tensor {
        w.matmul(&w.t().unwrap()).unwrap()
    }

    #[test]
    fn both_sides_turn_and_singular_values_stay() {
        for cover in [Cover::Blocks, Cover::Single] {
            let config = config(4, cover, 0);
            let (w, locals) = moved(&config, 0.5);
            let made = Poet { config }.graph(&w, &locals).unwrap();
            assert!(largest(&(singular(&made) - singular(&w)).unwrap()) < 1e-12);
            for turned in [[&made, &w].map(Clone::clone), [&made, &w].map(|w| w.t().unwrap().contiguous().unwrap())] {
                let [made, w] = turned;
                assert!(largest(&(products(&made) - products(&w)).unwrap()) > 0.1);
            }
        }
    }

    /// `R`, by the columns of what it makes of 1, is orthogonal and block-diagonal in the drawn order.
    #[test]
    fn blocks_are_those_of_the_drawn_order() {
        let config = config(4, Cover::Blocks, 0);
        let (_, locals) = moved(&config, 0.5);
        let one = Tensor::eye(12, DType::F64, &Device::Cpu).unwrap();
        let p = config.turned(&one, SIDES[1], &locals).unwrap();
        let order = locals.get(ORDER_IN).unwrap();
        let sorted = p.index_select(order, 0).unwrap().index_select(order, 1).unwrap();
        let values = sorted.to_vec2::<f64>().unwrap();
        for (row, of_row) in values.iter().enumerate() {
            for (col, value) in of_row.iter().enumerate() {
                assert!(row / 4 == col / 4 || *value == 0.0, "{row} {col}");
            }
        }
        assert!(largest(&(products(&p) - one).unwrap()) < 1e-12);
    }

    /// Twice as little turned is off by a factor of two to the power of the last term.
    #[test]
    fn what_the_series_is_off_by_falls_with_its_terms() {
        for terms in [3, 5] {
            let off = |std: f64| {
                let config = config(4, Cover::Blocks, terms);
                let (_, locals) = moved(&config, std);
                let one = Tensor::eye(12, DType::F64, &Device::Cpu).unwrap();
                let p = config.turned(&one, SIDES[1], &locals).unwrap();
                largest(&(products(&p) - one).unwrap())
            };
            let slope = (off(0.02) / off(0.01)).log2();
            // 1 + 2 Q + … + Q^k is Cayley's map but for Q^k and what follows.
            let expected = f64::from(terms - 1);
            assert!(slope > expected - 0.2, "{terms} terms: {slope}");
        }
    }

    #[test]
    fn a_round_ends_with_the_weight_that_it_made() {
        let config = config(4, Cover::Blocks, 5);
        let (w, locals) = moved(&config, 0.05);
        let mut params = Params::new();
        for (local, tensor) in locals.iter() {
            params.insert(TensorName::new("up", local), tensor.clone());
        }
        let kind = BankKind::Adapter;
        let mut theta = Theta::single([Bank { slot: "x".into(), kind, sets: vec![params.into()], train: true }]);
        let before = config.made(&w, &locals).unwrap();
        let site = Turning { site: "up".to_owned(), slot: 0 };
        let stretched = site.next_round(&config, &mut theta, &Rng::new(3, "orders")).unwrap();
        let value = |local: &'static str| (local, theta.get(&site.id(local)).unwrap().clone());
        let [out, inside] = [OUT, IN].map(|local| (local, value(local).1.zeros_like().unwrap()));
        let after = Locals::new("up", [out, inside, value(ORDER_OUT), value(ORDER_IN), value(WEIGHT)]);
        assert_eq!(largest(&(Poet { config }.graph(&w, &after).unwrap() - &before).unwrap()), 0.0);
        assert!(stretched < 1e-2);
        let orders = |tensors: &Locals| tensors.get(ORDER_IN).unwrap().to_vec1::<i64>().unwrap();
        assert_ne!(orders(&after), orders(&locals));
    }

    #[test]
    fn a_weight_as_wide_as_a_block_goes_to_any_turn_of_it() {
        // The entries of U that turn two columns by 0.3, from Cayley's map.
        let config = config(2, Cover::Blocks, 0);
        let upper = Tensor::new(&[[(0.15f64).tan()]], &Device::Cpu).unwrap();
        let order = Tensor::new(&[0i64, 1], &Device::Cpu).unwrap();
        let locals = Locals::new("up", [(IN, upper), (ORDER_IN, order)]);
        let one = Tensor::eye(2, DType::F64, &Device::Cpu).unwrap();
        let turned = config.turned(&one, SIDES[1], &locals).unwrap().to_vec2::<f64>().unwrap();
        assert!((turned[0][0] - 0.3f64.cos()).abs() < 1e-12 && (turned[0][1].abs() - 0.3f64.sin()).abs() < 1e-12);
    }

    #[test]
    fn a_run_of_a_single_round_is_of_usual_steps() {
        let of = |steps: u64| Trained { slot: 0, attachments: Vec::new(), steps: Step(steps) };
        let poet = Poet { config: config(4, Cover::Blocks, 5) };
        assert!(poet.step_rule(&of(3)).is_none() && poet.step_rule(&of(4)).is_some());
        let once = Poet { config: Config { every: 0, ..config(4, Cover::Blocks, 5) } };
        assert!(once.step_rule(&of(400)).is_none());
        let at = Attachment { site: SiteId::new("up"), tensors: Vec::new() };
        assert!(matches!(once.port(&at), Port::Weight(_)));
    }
}
