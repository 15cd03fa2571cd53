//! Singular values and biases alone: a weight keeps its singular vectors, and those vectors of numbers that moved most rest for a while so that
//! the others catch up; where few numbers shall change a weight in all of its directions.
//!
//! # Update
//! ```text
//! W_oi = U_ok diag(S_k) V_ki                     y_to = x_ti W_oi^T + b_o + ((x_ti V_ki^T) ∘ d_k) U_ok^T + e_o
//! s    ← smoothing · s + (1 - smoothing) · mean |d|, of each d and e by itself                at every check
//! then the largest s of all linears, a share `freeze` of them, rest until the next check: values and what the optimiser keeps of them stay
//! ```
//!
//! # Symbols
//! `vectorfit_sigma` `d_k`, what the singular values change by, and, where the linear has a bias, `vectorfit_bias` `e_o`, what that changes by; f32, trained, 0
//! at the start. With `add_biases` e_o is there where the linear has none, too. `vectorfit_U` and `vectorfit_V`, the singular vectors, never train. Checks come from `begins` of the job's steps on, `every` so many of
//! them, `checks` times in all; then nothing rests.
//!
//! # Cost
//! `min(o, i)` parameters per linear, and o where it has a bias or gets one; `min(o, i) (i+o)` numbers that never train beside them, for a square weight twice its
//! size; `2 min(o, i) (i+o)` extra FLOPs per token forward. A decomposition of each weight before the first step.
//! Where that costs less, a pass makes another weight in place of it, forward and in reverse, at `2 min(o, i) o i` FLOPs each, and the gradient
//! by it.
//!
//! # Limits
//! With d = e = 0 it is the base, bit for bit. The weight's singular vectors stay. With `freeze` 0 nothing ever rests. A bias
//! that is added to a linear without one does not merge.
//!
//! # Departures
//! Trains what the vectors change by, which is the same but for weight decay, which pulls to the base here. An optimiser that corrects young moments
//! counts the steps in which a vector rests. When checks begin, how often and how many they are is said by shares of the job, by numbers of our own.
//!
//! # Paper
//! VectorFit: Adaptive Singular & Bias Vector Fine-Tuning of Pre-trained Foundation Models. Hegde, Kaur, Tiwari, 2025.

use std::collections::BTreeSet;

use attune_architecture::{Architecture, Site, SiteKind as Kind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, Trained, WeightMap};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule, Tensors};
use attune_points::forms::{AsWeight, Cost};
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
use crate::parts::{linears, own, sparse, spectral};

const SIGMA: &str = "vectorfit_sigma";
const BIAS: &str = "vectorfit_bias";
const U: &str = "vectorfit_U";
const V: &str = "vectorfit_V";

/// Parameters of VectorFit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Trains biases, too, where linears have them.
    biases: bool,
    /// Gives a bias, 0 at the start, to linears that have none.
    add_biases: bool,
    /// Share of all vectors that rest at a time; 0 for none.
    #[schemars(range(min = 0.0, max = 0.9))]
    freeze: f64,
    /// How much of how far a vector has moved is what it was at the check before.
    #[schemars(range(min = 0.0, max = 0.9999))]
    smoothing: f64,
    /// Share of the job's steps before the first check.
    #[schemars(range(min = 0.0, max = 1.0))]
    begins: f64,
    /// Share of the job's steps from one check to the next; a step at least.
    #[schemars(range(min = 0.0, max = 1.0))]
    every: f64,
    /// Checks in all.
    #[schemars(range(min = 1, max = 1_000_000))]
    checks: u64,
}

impl Default for Config {
    /// The paper's smoothing; the others are ours.
    fn default() -> Self {
        Self { biases: true, add_biases: false, freeze: 0.05, smoothing: 0.99, begins: 0.1, every: 0.02, checks: 20 }
    }
}

pub(super) struct Vectorfit {
    config: Config,
}

impl Method for Vectorfit {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "VectorFit: Adaptive Singular & Bias Vector Fine-Tuning of Pre-trained Foundation Models",
            authors: "Suhas G Hegde, Shilpy Kaur, Aruna Tiwari",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "min(o, i) + o*if(add_biases, 1, b*biases)",
        fixed: "min(o, i)*(i+o)",
        merges: Merges::Weight,
        rules: &[Rule {
            when: "add_biases",
            require: "biases",
            message: "is true, and those that are there do not train: expected `biases: true` as well",
            path: "add_biases",
        }],
        ..Card::new(
            "vectorfit",
            Point::Adapter,
            "Singular values and biases alone: a weight keeps its singular vectors, and those vectors of numbers that moved most rest \
             for a while so that the others catch up; where few numbers shall change a weight in all of its directions.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Vectorfit {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let k = o.min(i);
            let mut tensors =
                vec![TensorSpec::trained(SIGMA, [k]), TensorSpec::fixed(U, [o, k]), TensorSpec::fixed(V, [k, i])];
            let has_bias = matches!(site.kind, Kind::Linear { bias: true, .. });
            if self.config.biases && (has_bias || self.config.add_biases) {
                tensors.push(TensorSpec::trained(BIAS, [o]));
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (o, i) = weight.shape();
        let triples = spectral::leading(weight, o.min(i), None, rng)?;
        starts::each(at, rng, |spec| match spec.local {
            U => Start::Is(triples.u.clone()),
            V => Start::Is(triples.v.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        (self.config.freeze > 0.0).then(|| Box::new(Resting::new(&self.config, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let sigma_k = tensors.get(SIGMA)?;
        let change = ops::matmul(&tensors.get(U)?.broadcast_mul(sigma_k)?, tensors.get(V)?)?;
        let trains = at.tensors.iter().any(|spec| spec.local == BIAS);
        let bias = match weight.bias(sigma_k.dtype())? {
            Some(bias) if trains => Some((bias + tensors.get(BIAS)?)?),
            None if trains => {
                return Ok(Merged::No("the linear has no bias that its own could become a part of"));
            }
            _ => None,
        };
        Ok(Merged::Weight { weight: (weight.dense(sigma_k.dtype())? + change)?, bias })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Vectorfit {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tk = ops::scale_columns(&ops::linear(x_ti, tensors.get(V)?, None)?, tensors.get(SIGMA)?)?;
        let bias = tensors.iter().find(|(local, _)| *local == BIAS).map(|(_, bias)| bias);
        Ok(ops::linear(&h_tk, tensors.get(U)?, bias)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        // A linear without a bias has no other one either.
        if self.config.add_biases {
            return None;
        }
        let k = o.min(i);
        let (row, weight) = (Cost::new(k * (o + i), k), Cost::new(k * o * i, k * o + o * i));
        Some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Vectorfit {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let left_ok = ops::scale_columns(tensors.get(U)?, tensors.get(SIGMA)?)?;
        Ok((w_oi + ops::matmul(&left_ok, tensors.get(V)?)?)?)
    }

    fn bias(&self, b_o: &Tensor, _: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let own = tensors.iter().find(|(local, _)| *local == BIAS).map(|(_, bias)| bias);
        Ok(match own {
            Some(own) => (b_o + own)?,
            None => b_o.clone(),
        })
    }
}

/// Steps in which those vectors that moved most rest.
struct Resting {
    smoothing: f64,
    /// How many rest at a time.
    count: usize,
    /// The first step with a check, and steps from one to the next.
    begins: u64,
    every: u64,
    checks: u64,
    vectors: Vec<Vector>,
}

struct Vector {
    id: TensorId,
    /// How far it has moved, smoothed over checks.
    moved: f32,
    rests: bool,
}

impl Resting {
    fn new(config: &Config, of: &Trained<'_>) -> Self {
        let at = |share: f64| (share * of.steps.0 as f64).floor() as u64;
        let trained = of.attachments.iter().flat_map(|at| {
            at.tensors.iter().filter(|spec| spec.train).map(|spec| TensorName::new(at.site.as_str(), spec.local))
        });
        let id = |name: TensorName| TensorId { owner: Owner::Bank { slot: of.slot, set: 0 }, name };
        let vectors: Vec<Vector> = trained.map(|name| Vector { id: id(name), moved: 0.0, rests: false }).collect();
        let count = ((config.freeze * vectors.len() as f64).round() as usize).clamp(1, vectors.len().max(1));
        Self {
            smoothing: config.smoothing,
            // One at least learns.
            count: count.min(vectors.len().saturating_sub(1)),
            begins: at(config.begins),
            every: at(config.every).max(1),
            checks: config.checks,
            vectors,
        }
    }

    /// Whether there is a check before this step, and whether it is the one after which nothing rests.
    fn check_before(&self, step: u64) -> Option<bool> {
        let since = step.checked_sub(self.begins)?;
        let number = since / self.every;
        (since.is_multiple_of(self.every) && number <= self.checks).then_some(number == self.checks)
    }

    /// Those that rest.
    fn resting(&self) -> BTreeSet<TensorId> {
        self.vectors.iter().filter(|vector| vector.rests).map(|vector| vector.id.clone()).collect()
    }

    /// Chooses which rest, by how far each has moved.
    fn check(&mut self, theta: &Theta) -> attune_points::Result<()> {
        for vector in &mut self.vectors {
            let moved = vector.held(theta)?.abs()?.mean_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
            vector.moved =
                (self.smoothing * f64::from(vector.moved) + (1.0 - self.smoothing) * f64::from(moved)) as f32;
        }
        let moved: Vec<f32> = self.vectors.iter().map(|vector| vector.moved).collect();
        self.vectors.iter_mut().for_each(|vector| vector.rests = false);
        sparse::largest(&moved, self.count).into_iter().for_each(|at| self.vectors[at].rests = true);
        Ok(())
    }
}

impl Vector {
    fn held(&self, theta: &Theta) -> attune_points::Result<Tensor> {
        let held = theta.get(&self.id).cloned();
        held.ok_or_else(|| Error::Refused(format!("{} is not among the parameters", self.id)))
    }
}

impl StepRule for Resting {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let were = self.resting();
        match self.check_before(step.0) {
            Some(false) => self.check(engine.theta())?,
            Some(true) => self.vectors.iter_mut().for_each(|vector| vector.rests = false),
            None => {}
        }
        let resting = self.resting();
        let mut report = if resting.is_empty() {
            engine::usual_step(engine)?
        } else {
            let batch = engine.batch(Source::Train)?;
            let (gradients, loss) = engine::gradients_on(engine, &batch)?;
            let grad_norm = engine.update_but(gradients, &resting)?;
            StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() }
        };
        let told = were.symmetric_difference(&resting);
        report.metrics.extend(told.map(|id| (format!("rests/{id}"), f64::from(u8::from(resting.contains(id))))));
        Ok(report)
    }

    fn state(&self) -> Tensors {
        let moved: Vec<f32> = self.vectors.iter().map(|vector| vector.moved).collect();
        let rests: Vec<i64> = self.vectors.iter().map(|vector| i64::from(vector.rests)).collect();
        let tensors = [("moved", Tensor::new(moved, &Device::Cpu)), ("rests", Tensor::new(rests, &Device::Cpu))];
        tensors.into_iter().filter_map(|(name, tensor)| Some((name.to_owned(), tensor.ok()?))).collect()
    }

    fn restore(&mut self, mut state: Tensors, _: &Theta) -> attune_points::Result<()> {
        let mut take = |name: &str| state.remove(name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")));
        let (moved, rests) = (take("moved")?.to_vec1::<f32>()?, take("rests")?.to_vec1::<i64>()?);
        let expected = self.vectors.len();
        if moved.len() != expected || rests.len() != expected {
            return Err(Error::Refused(format!("is of {} vectors; expected {expected}", moved.len().max(rests.len()))));
        }
        for ((vector, moved), rests) in self.vectors.iter_mut().zip(moved).zip(rests) {
            (vector.moved, vector.rests) = (moved, rests != 0);
        }
        state.keys().next().map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which is not known"))))
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::{Bank, BankKind, Params};
    use attune_tensor::linalg;

    use super::*;
    use crate::parts::toy::Toy;

    fn at(site: &str, (o, i): (usize, usize)) -> Attachment {
        let k = o.min(i);
        let tensors = vec![
            TensorSpec::trained(SIGMA, [k]),
            TensorSpec::fixed(U, [o, k]),
            TensorSpec::fixed(V, [k, i]),
            TensorSpec::trained(BIAS, [o]),
        ];
        Attachment { site: SiteId::new(site), tensors }
    }

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn values_move_vectors_stay_and_rows_get_the_bias() {
        let (w, vectorfit) = (normal("w", &[7, 5]), Vectorfit { config: Config::default() });
        let at = at("up", (7, 5));
        let (locals, _) = vectorfit.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        let wide = |name: &str| locals.get(name).unwrap().to_dtype(DType::F64).unwrap();
        let (d, e) = (normal("d", &[5]), normal("e", &[7]));
        let locals = Locals::new("up", [(U, wide(U)), (V, wide(V)), (SIGMA, d.clone()), (BIAS, e.clone())]);
        // A bias that the linear does not have stays beside it.
        assert!(matches!(vectorfit.merge(&at, &locals, &w).unwrap(), Merged::No(why) if why.contains("no bias")));
        let unbiased = Attachment { tensors: at.tensors[..3].to_vec(), ..at.clone() };
        let merged = vectorfit.merge(&unbiased, &locals, &w).unwrap();
        let Merged::Weight { weight, .. } = merged else { panic!("no weight") };
        let all = linalg::svd(&w).unwrap();
        let between = all.u.t().unwrap().matmul(&weight).unwrap().matmul(&all.v.t().unwrap()).unwrap();
        let one = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap();
        let expected = one.broadcast_mul(&(&all.s + &d).unwrap()).unwrap();
        // The vectors are kept in 32 bits.
        assert!(largest(&(between - expected).unwrap()) < 1e-5);
        let (x, layout) = (normal("x", &[3, 5]), attune_points::Layout::new());
        let cx = RowCx { site: &at.site, output: 7, dropout: None, layout: &layout, rows: None };
        let rows = RowMap::graph(&vectorfit, &x, &locals, &cx).unwrap();
        let by_hand = x.matmul(&(weight - &w).unwrap().t().unwrap()).unwrap().broadcast_add(&e).unwrap();
        assert!(largest(&(rows - by_hand).unwrap()) < 1e-12);
    }

    fn rule(config: &Config, steps: u64) -> Resting {
        let attachments = [at("a", (2, 2)), at("b", (2, 2))];
        Resting::new(config, &Trained { slot: 0, attachments: attachments.iter().collect(), steps: Step(steps) })
    }

    /// With these means of what is at `a.bias`, `a.sigma`, `b.bias`, `b.sigma`; the rule has sigma before bias.
    fn theta(means: [f32; 4]) -> Theta {
        let names = [("a", SIGMA), ("a", BIAS), ("b", SIGMA), ("b", BIAS)];
        let mut params = Params::new();
        for ((site, local), mean) in names.into_iter().zip(means) {
            params.insert(TensorName::new(site, local), Tensor::new(&[mean, -mean], &Device::Cpu).unwrap());
        }
        let sets = vec![params.into()];
        Theta::single([Bank { slot: "x".into(), kind: BankKind::Adapter, sets, train: true }])
    }

    #[test]
    fn those_that_moved_most_rest_and_as_many_as_asked_for() {
        let mut rule = rule(&Config { freeze: 0.5, smoothing: 0.5, ..Config::default() }, 100);
        let resting = |rule: &Resting| rule.vectors.iter().map(|vector| vector.rests).collect::<Vec<_>>();
        rule.check(&theta([4.0, 1.0, 3.0, 2.0])).unwrap();
        assert_eq!(resting(&rule), [true, false, true, false]);
        // What was far away counts for a while: 1.5, 3.25, 2.25 and 1 by now.
        rule.check(&theta([1.0, 6.0, 3.0, 1.0])).unwrap();
        assert_eq!(rule.vectors.iter().map(|vector| vector.moved).collect::<Vec<_>>(), [1.5, 3.25, 2.25, 1.0]);
        assert_eq!(resting(&rule), [false, true, true, false]);
        let mut other = self::rule(&Config { freeze: 0.5, ..Config::default() }, 100);
        other.restore(rule.state(), &theta([0.0; 4])).unwrap();
        assert_eq!(resting(&other), [false, true, true, false]);
        let error = other.restore(Tensors::new(), &theta([0.0; 4])).unwrap_err().to_string();
        assert!(error.contains("lacks \"moved\""), "{error}");
    }

    #[test]
    fn checks_come_at_their_steps_and_end() {
        let config = Config { begins: 0.1, every: 0.05, checks: 3, ..Config::default() };
        let rule = rule(&config, 100);
        let found: Vec<(u64, bool)> =
            (0..100).filter_map(|step| rule.check_before(step).map(|last| (step, last))).collect();
        assert_eq!(found, [(10, false), (15, false), (20, false), (25, true)]);
        assert_eq!(rule.count, 1);
    }

    #[test]
    fn a_vector_that_rests_is_told_of_and_takes_no_part_in_the_update() {
        let attachments = vec![at("a", (2, 2)), at("b", (2, 2))];
        let start = |_: &str, _: &str| Tensor::new(&[0f32, 0.0], &Device::Cpu).unwrap();
        // One vector is pulled far more than all others.
        let gradient = |_: &Theta, id: &TensorId| {
            let pull = if id.name == TensorName::new("b", SIGMA) { 100f32 } else { 1.0 };
            Some(Tensor::new(&[pull, pull], &Device::Cpu).unwrap())
        };
        let mut toy = Toy::new(attachments, start, 0.01, gradient);
        let config = Config { freeze: 0.25, begins: 0.2, every: 0.2, checks: 2, ..Config::default() };
        let vectorfit = Vectorfit { config };
        let mut rule = vectorfit.step_rule(&toy.trained(10)).unwrap();
        let mut told = Vec::new();
        for step in 0..10 {
            let before = [toy.value("b", SIGMA), toy.value("a", SIGMA)];
            told.push(rule.step(Step(step), &mut toy).unwrap().metrics);
            let moved = [toy.value("b", SIGMA), toy.value("a", SIGMA)].map(|x| x.to_vec1::<f32>().unwrap());
            let before = before.map(|x| x.to_vec1::<f32>().unwrap());
            assert_eq!((moved[0] == before[0], moved[1] == before[1]), ((2..6).contains(&step), false), "at {step}");
        }
        let name = format!("rests/b.{SIGMA}");
        let expected = |step: usize| match step {
            2 => vec![(name.clone(), 1.0)],
            6 => vec![(name.clone(), 0.0)],
            _ => Vec::new(),
        };
        assert!((0..10).all(|step| told[step] == expected(step)), "{told:?}");
    }
}
