//! LoRA whose factors lose their least important numbers on the way, row by row and column by column, so that the change of the weight itself is
//! sparse: where facts are edited or a task learned, and all else shall stay as it was.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T                                             s = alpha / r
//! I    ← smoothing · I + (1 - smoothing) · |θ ∘ dL/dθ|              after each reverse pass; the first as it is
//! then, behind each update, the ⌈kept(t) i⌉ largest I in each row of A and the ⌈kept(t) o⌉ in each column of B stay, the others are 0
//! kept(t) = 1, t < t_i;  keep + (1 - keep) (1 - (t - t_i) / (t_f - t_i))³, t < t_f;  keep
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained; A starts uniform in ±1/sqrt(i), B at 0. I the importance of each of their numbers, kept with
//! the run. `t_i` and `t_f` are `begins` and `ends` of the job's steps. `drop` is dropout on the input. In the file of a run that has ended,
//! `lora_A_values`, f32, and `lora_A_indices`, i64, ascending flat places, of `⌈keep i⌉` numbers a row stand for A, and those of `⌈keep o⌉` a column for B,
//! where that is shorter, with the share of entries of the weights that do not change, `sparsity`; they train as they are.
//!
//! # Cost
//! `r*(i+o)` parameters per linear, as LoRA's, and as many importances beside them; `2 r (i+o)` extra FLOPs per token forward, and a selection
//! among all of them a step.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With `keep` 1 it is LoRA. A share of at most r · keep² of the weight's entries change in the end.
//!
//! # Departures
//! Bounds on numbers and a stop at a small loss, which the authors have for edits alone, are not here.
//!
//! # Paper
//! RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and Fine-tuning. Wang, Liu,
//! Li, Cheng, Zhao, Gao, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Compacted, FusedRows, Merged, Peft, Port, RowCx, RowMap, Trained,
};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Locals, Owner, Params, TensorId, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::{factors, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";
const A_VALUES: &str = "lora_A_values";
const A_INDICES: &str = "lora_A_indices";
const B_VALUES: &str = "lora_B_values";
const B_INDICES: &str = "lora_B_indices";

/// Parameters of RoseLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Share of the numbers in a row of A, or a column of B, that stay in the end.
    #[schemars(range(min = 1e-4, max = 1.0))]
    keep: f64,
    /// How much of an importance is what it was before the step.
    #[schemars(range(min = 0.0, max = 0.9999))]
    smoothing: f64,
    /// Share of the job's steps before the first numbers go.
    #[schemars(range(min = 0.0, max = 1.0))]
    begins: f64,
    /// Share of the job's steps after which no more go.
    #[schemars(range(min = 0.0, max = 1.0))]
    ends: f64,
    /// Share of the entries of all its weights that do not change, where factors are their numbers and the places of these: what folders of a run that
    /// has ended say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    sparsity: Option<f64>,
}

impl Default for Config {
    /// The authors' values for edits, whose 25 steps begin with 3 and end with 5 that let none go.
    fn default() -> Self {
        Self { rank: 8, alpha: 32.0, dropout: 0.0, keep: 0.05, smoothing: 0.8, begins: 0.1, ends: 0.8, sparsity: None }
    }
}

pub(super) struct Roselora {
    config: Config,
}

impl Method for Roselora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        fused: true,
        paper: Some(Paper {
            title: "RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and \
                    Fine-tuning",
            authors: "Haoyu Wang, Tianci Liu, Ruirui Li, Monica Cheng, Tuo Zhao, Jing Gao",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        merges: Merges::Factors,
        rules: &[Rule {
            when: "true",
            require: "begins <= ends",
            message: "is after `ends`; expected that share of the steps at most",
            path: "begins",
        }],
        ..Card::new(
            "roselora",
            Point::Adapter,
            "LoRA whose factors lose their least important numbers on the way, row by row and column by column, so that the change of \
             the weight itself is sparse: where facts are edited or a task learned, and all else shall stay as it was.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Roselora {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }

    /// `A_ri` and `B_or`, however they are held.
    fn factors(&self, tensors: &Locals, (o, i): (usize, usize)) -> attune_points::Result<(Tensor, Tensor)> {
        if self.config.sparsity.is_none() {
            return Ok((tensors.get(A)?.clone(), tensors.get(B)?.clone()));
        }
        let whole = |shape: (usize, usize), [values, places]: [&str; 2]| {
            let values_n = tensors.get(values)?;
            let zero = Tensor::zeros(shape, values_n.dtype(), values_n.device())?;
            sparse::added(&zero, tensors.get(places)?, values_n)
        };
        let r = self.config.rank as usize;
        Ok((whole((r, i), [A_VALUES, A_INDICES])?, whole((o, r), [B_VALUES, B_INDICES])?))
    }
}

impl Adapter for Roselora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut attachments = factors::attach(sites, A, B, |_| self.config.rank)?;
        if self.config.sparsity.is_some() {
            attachments.iter_mut().for_each(|at| at.tensors = self.config.sparse(at));
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.config.sparsity.is_some() {
            let message = "`sparsity` is what folders of a run that has ended say: leave it out";
            return Err(Error::Refused(message.to_owned()));
        }
        factors::kaiming(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let prunes = self.config.keep < 1.0 && self.config.sparsity.is_none();
        prunes.then(|| Box::new(Pruning::new(&self.config, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (right, left) = self.factors(tensors, weight.shape())?;
        Ok(Merged::Factors { left, right, scale: self.scale() })
    }

    fn compacted(&self, at: &[Attachment], params: &Params) -> attune_points::Result<Option<Compacted>> {
        if self.config.sparsity.is_some() || !self.config.is_shorter(at) {
            return Ok(None);
        }
        let (mut attachments, mut own) = (at.to_vec(), Params::new());
        let (mut still, mut all) = (0, 0);
        for at in &mut attachments {
            let (site, tensors) = (at.site.clone(), self.config.sparse(at));
            let held = |local: &str| {
                let name = TensorName::new(site.as_str(), local);
                params.get(&name).cloned().ok_or_else(|| Error::Refused(format!("{name} has no value")))
            };
            let (a_ri, b_or) = (held(A)?, held(B)?);
            // A run that was ended before its last choice has more of them.
            let (Some(of_a), Some(of_b)) = (self.config.kept(&a_ri, false)?, self.config.kept(&b_or, true)?) else {
                return Ok(None);
            };
            for (spec, tensor) in tensors.iter().zip([of_a.0, of_a.1, of_b.0, of_b.1]) {
                own.insert_declared(spec, site.as_str(), tensor);
            }
            let change = ops::matmul(&b_or, &a_ri)?.flatten_all()?.to_vec1::<f32>()?;
            still += change.iter().filter(|by| **by == 0.0).count();
            all += change.len();
            at.tensors = tensors;
        }
        let sparsity = Some(still as f64 / all.max(1) as f64);
        let adapter = Box::new(Self { config: Config { sparsity, ..self.config.clone() } });
        Ok(Some(Compacted { adapter, attachments, params: own }))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Roselora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (a_ri, b_or) = self.factors(tensors, (cx.output, x_ti.dim(1)?))?;
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, &a_ri, None)?;
        Ok(ops::linear(&(h_tr * self.scale())?, &b_or, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        let whole = FusedRows::LowRank { down: A, up: B, scale: self.scale(), dropout: self.config.dropout };
        self.config.sparsity.is_none().then_some(whole)
    }
}

impl Config {
    /// The tensors of the kept numbers of a pair of factors, in place of those of the pair.
    fn sparse(&self, at: &Attachment) -> Vec<TensorSpec> {
        let of = |local: &str| {
            at.tensors.iter().find(|spec| spec.local == local).map_or([0, 0], |spec| [spec.shape[0], spec.shape[1]])
        };
        let ([r, i], [o, _]) = (of(A), of(B));
        let (a, b) = (r * count(self.keep, i), r * count(self.keep, o));
        let quiet = at.tensors.iter().find_map(|spec| spec.quiet);
        let values = |local, n: usize| TensorSpec { quiet, ..TensorSpec::trained(local, [n]) };
        let places = |local, n: usize| TensorSpec::fixed(local, [n]);
        vec![values(A_VALUES, a), places(A_INDICES, a), values(B_VALUES, b), places(B_INDICES, b)]
    }

    /// Whether the kept numbers of all factors, of 32 bits, and their places, of 64, take less than the factors.
    fn is_shorter(&self, at: &[Attachment]) -> bool {
        let numbers =
            |specs: &[TensorSpec]| specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum::<usize>();
        let whole: usize = at.iter().map(|at| numbers(&at.tensors)).sum();
        let kept: usize = at.iter().map(|at| numbers(&self.sparse(at)) / 2).sum();
        3 * kept < whole
    }

    /// The numbers of a factor that are not 0, and as many others as make up each row's, or column's, share, with their places in order. None if one has
    /// more than its share.
    fn kept(&self, factor: &Tensor, columns: bool) -> attune_points::Result<Option<(Tensor, Tensor)>> {
        let (rows, width) = factor.dims2()?;
        let numbers = factor.flatten_all()?.to_vec1::<f32>()?;
        let (lines, long) = if columns { (width, rows) } else { (rows, width) };
        let share = count(self.keep, long);
        let mut places = Vec::with_capacity(lines * share);
        for line in 0..lines {
            let at = |n: usize| if columns { n * width + line } else { line * width + n };
            let sizes: Vec<f32> = (0..long).map(|n| numbers[at(n)].abs()).collect();
            if sizes.iter().filter(|size| **size != 0.0).count() > share {
                return Ok(None);
            }
            places.extend(sparse::largest(&sizes, share).into_iter().map(at));
        }
        places.sort_unstable();
        let values: Vec<f32> = places.iter().map(|place| numbers[*place]).collect();
        let places: Vec<i64> = places.into_iter().map(|place| place as i64).collect();
        Ok(Some((Tensor::new(values, &Device::Cpu)?, Tensor::new(places, &Device::Cpu)?)))
    }
}

/// Steps after which the least important numbers of the factors are 0.
struct Pruning {
    keep: f64,
    smoothing: f64,
    /// The first step that lets numbers go, and the first that lets no more go.
    window: (u64, u64),
    factors: Vec<Factor>,
}

/// A factor of which some numbers stay.
struct Factor {
    id: TensorId,
    /// Whether they stay column by column.
    columns: bool,
    /// How important each is; none before the first step.
    importance: Option<Tensor>,
}

impl Pruning {
    fn new(config: &Config, of: &Trained<'_>) -> Self {
        let at = |share: f64| (share * of.steps.0 as f64).floor() as u64;
        let factor = |site: &str, local: &str| Factor {
            id: TensorId { owner: Owner::Bank { slot: of.slot, set: 0 }, name: TensorName::new(site, local) },
            columns: local == B,
            importance: None,
        };
        let factors = of.attachments.iter().flat_map(|at| [A, B].map(|local| factor(at.site.as_str(), local)));
        Self {
            keep: config.keep,
            smoothing: config.smoothing,
            window: (at(config.begins), at(config.ends)),
            factors: factors.collect(),
        }
    }

    /// The share of numbers that are there after step `t`.
    fn kept(&self, t: u64) -> f64 {
        let (begins, ends) = self.window;
        match t {
            _ if t < begins => 1.0,
            _ if t < ends => {
                let left = 1.0 - (t - begins) as f64 / (ends - begins) as f64;
                self.keep + (1.0 - self.keep) * left.powi(3)
            }
            _ => self.keep,
        }
    }
}

impl Factor {
    fn held(&self, theta: &Theta) -> attune_points::Result<Tensor> {
        let held = theta.get(&self.id).cloned();
        held.ok_or_else(|| Error::Refused(format!("{} is not among the parameters", self.id)))
    }

    /// Takes a step's gradient into account.
    fn weigh(&mut self, value: &Tensor, gradient: &Tensor, smoothing: f64) -> attune_points::Result<()> {
        let now = (value * gradient)?.abs()?;
        self.importance = Some(match self.importance.take() {
            None => now,
            Some(before) => ((before * smoothing)? + (now * (1.0 - smoothing))?)?,
        });
        Ok(())
    }

    /// The value with this share of each row, or column, left.
    fn thinned(&self, value: &Tensor, share: f64) -> attune_points::Result<Tensor> {
        let Some(importance) = &self.importance else { return Ok(value.clone()) };
        let turned = |tensor: &Tensor| if self.columns { tensor.t()?.contiguous() } else { Ok(tensor.clone()) };
        let rows = turned(importance)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let width = rows.first().map_or(0, Vec::len);
        let mut mask = vec![0.0f32; rows.len() * width];
        for (row, scores) in rows.iter().enumerate() {
            sparse::largest(scores, count(share, width)).into_iter().for_each(|at| mask[row * width + at] = 1.0);
        }
        let mask = Tensor::from_vec(mask, (rows.len(), width), value.device())?.to_dtype(value.dtype())?;
        Ok((value * turned(&mask)?)?)
    }
}

/// How many of `n` a share is, the next whole number: 0.05 of 20 are 1, though in binary it is a little more.
fn count(share: f64, n: usize) -> usize {
    ((share * n as f64 - 1e-9).ceil() as usize).clamp(1, n.max(1))
}

impl StepRule for Pruning {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let theta = engine.theta().clone();
        let (gradients, loss) = engine::gradients_on(engine, &batch)?;
        for factor in &mut self.factors {
            let value = factor.held(&theta)?;
            if let Some(gradient) = gradients.get(&factor.id) {
                factor.weigh(&value, gradient, self.smoothing)?;
            }
        }
        let grad_norm = engine.update(gradients)?;
        let share = self.kept(step.0);
        if share < 1.0 {
            let mut theta = engine.theta().clone();
            for factor in &self.factors {
                let thinned = factor.thinned(&factor.held(&theta)?, share)?;
                theta.put(&factor.id, thinned);
            }
            engine.set(theta);
        }
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
    }

    fn state(&self) -> Tensors {
        let held = self.factors.iter().filter_map(|factor| Some((factor.id.to_string(), factor.importance.clone()?)));
        held.collect::<BTreeMap<_, _>>()
    }

    fn restore(&mut self, mut state: Tensors, theta: &Theta) -> attune_points::Result<()> {
        if state.is_empty() {
            self.factors.iter_mut().for_each(|factor| factor.importance = None);
            return Ok(());
        }
        for factor in &mut self.factors {
            let name = factor.id.to_string();
            let importance = state.remove(&name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))?;
            let shape = factor.held(theta)?.dims().to_vec();
            if importance.dims() != shape {
                let found = importance.dims();
                return Err(Error::Refused(format!("has {name:?} of shape {found:?}; expected {shape:?}")));
            }
            factor.importance = Some(importance);
        }
        state.keys().next().map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which is no factor"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> Attachment {
        let spec = attune_points::TensorSpec::trained;
        Attachment { site: attune_architecture::SiteId::new("up"), tensors: vec![spec(A, [2, 20]), spec(B, [12, 2])] }
    }

    fn pruning(config: &Config, steps: u64) -> Pruning {
        let at = at();
        Pruning::new(config, &Trained { slot: 0, attachments: vec![&at], steps: Step(steps) })
    }

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F32).unwrap()
    }

    fn nonzero(tensor: &Tensor) -> Vec<usize> {
        let rows = tensor.to_vec2::<f32>().unwrap();
        rows.iter().map(|row| row.iter().filter(|value| **value != 0.0).count()).collect()
    }

    #[test]
    fn numbers_go_from_begin_to_end_along_a_cube() {
        let config = Config { keep: 0.2, begins: 0.1, ends: 0.6, ..Config::default() };
        let rule = pruning(&config, 100);
        assert_eq!((rule.kept(9), rule.kept(10), rule.kept(60), rule.kept(99)), (1.0, 1.0, 0.2, 0.2));
        assert!((rule.kept(35) - (0.2 + 0.8 * 0.125)).abs() < 1e-12);
        assert!((10..60).all(|t| rule.kept(t) >= rule.kept(t + 1)));
        assert!(
            Roselora { config: Config { keep: 1.0, ..config } }
                .step_rule(&Trained { slot: 0, attachments: Vec::new(), steps: Step(1) })
                .is_none()
        );
    }

    #[test]
    fn each_row_and_each_column_keeps_its_own_quota() {
        let mut rule = pruning(&Config::default(), 10);
        for (factor, shape, share, expected) in [(0, [2, 20], 0.05, 1), (0, [2, 20], 0.3, 6), (1, [12, 2], 0.3, 4)] {
            let value = normal("value", &shape);
            // One row, or column, is far less important than the other, and keeps as many.
            let small = Tensor::new(&[1e-6f32, 1.0], &Device::Cpu).unwrap();
            let small = if shape[0] == 2 { small.unsqueeze(1).unwrap() } else { small.unsqueeze(0).unwrap() };
            let gradient = normal("gradient", &shape).broadcast_mul(&small).unwrap();
            rule.factors[factor].importance = None;
            rule.factors[factor].weigh(&value, &gradient, 0.8).unwrap();
            let left = rule.factors[factor].thinned(&value, share).unwrap();
            let left = if shape[0] == 2 { left } else { left.t().unwrap().contiguous().unwrap() };
            assert_eq!(nonzero(&left), [expected; 2]);
        }
    }

    #[test]
    fn importance_is_that_of_the_size_and_the_slope_and_goes_slowly() {
        let mut rule = pruning(&Config::default(), 10);
        let factor = &mut rule.factors[0];
        let of = |value: f32| Tensor::new(&[[value]], &Device::Cpu).unwrap();
        factor.weigh(&of(2.0), &of(-3.0), 0.8).unwrap();
        assert_eq!(factor.importance.as_ref().unwrap().to_vec2::<f32>().unwrap(), [[6.0]]);
        factor.weigh(&of(1.0), &of(1.0), 0.8).unwrap();
        let now = factor.importance.as_ref().unwrap().to_vec2::<f32>().unwrap()[0][0];
        assert!((now - (0.8 * 6.0 + 0.2)).abs() < 1e-6);
    }

    #[test]
    fn a_state_is_restored_and_another_runs_is_refused() {
        let mut rule = pruning(&Config::default(), 10);
        assert!(rule.state().is_empty());
        let (a, b) = (normal("a", &[2, 20]), normal("b", &[12, 2]));
        rule.factors[0].weigh(&a, &a, 0.8).unwrap();
        rule.factors[1].weigh(&b, &b, 0.8).unwrap();
        let mut params = attune_points::Params::new();
        params.insert(TensorName::new("up", A), a);
        params.insert(TensorName::new("up", B), b);
        let kind = attune_points::BankKind::Adapter;
        let bank = attune_points::Bank { slot: "x".into(), kind, sets: vec![params.into()], train: true };
        let theta = Theta::single([bank]);
        let mut other = pruning(&Config::default(), 10);
        other.restore(rule.state(), &theta).unwrap();
        assert_eq!(other.state().len(), 2);
        let refused = |change: fn(&mut Tensors)| {
            let mut state = rule.state();
            change(&mut state);
            pruning(&Config::default(), 10).restore(state, &theta).unwrap_err().to_string()
        };
        assert!(refused(|state| drop(state.remove("up.lora_A"))).contains("lacks \"up.lora_A\""));
        let of_shape = |state: &mut Tensors| {
            let wrong = state["up.lora_B"].clone();
            state.insert("up.lora_A".to_owned(), wrong);
        };
        assert!(refused(of_shape).contains("expected [2, 20]"));
    }

    /// Kept numbers and their places are the same factors, and no more of them than there may be.
    #[test]
    fn a_run_that_has_ended_leaves_the_numbers_that_were_kept() {
        let rose = Roselora { config: Config { rank: 2, keep: 0.1, ..Config::default() } };
        let (whole, mut rule) = (at(), pruning(&rose.config, 10));
        let mut params = Params::new();
        let (a, b) = (normal("a", &[2, 20]), normal("b", &[12, 2]));
        for (spec, tensor) in whole.tensors.iter().zip([&a, &b]) {
            params.insert_declared(spec, "up", tensor.clone());
        }
        let one = std::slice::from_ref(&whole);
        assert!(rose.compacted(one, &params).unwrap().is_none(), "before its last choice");
        for (factor, value) in [(0, &a), (1, &b)] {
            rule.factors[factor].weigh(value, &value.ones_like().unwrap(), 0.8).unwrap();
            let thinned = rule.factors[factor].thinned(value, rose.config.keep).unwrap();
            params.insert(rule.factors[factor].id.name.clone(), thinned);
        }
        let Compacted { adapter, attachments, params: kept } = rose.compacted(one, &params).unwrap().unwrap();
        let shapes: Vec<&[usize]> = attachments[0].tensors.iter().map(|spec| spec.shape.as_slice()).collect();
        // Two of 20 in each of two rows, two of 12 in each of two columns.
        assert_eq!(shapes, [[4]; 4]);
        assert!(kept.is_fixed(&TensorName::new("up", A_INDICES)) && !kept.is_fixed(&TensorName::new("up", A_VALUES)));
        let locals = |params: &Params, at: &Attachment| {
            let of = |spec: &TensorSpec| (spec.local, params.get(&spec.name("up")).unwrap().clone());
            Locals::new("up", at.tensors.iter().map(of))
        };
        let product = |adapter: &dyn Adapter, params: &Params, at: &Attachment| {
            let base = Tensor::zeros((12, 20), DType::F32, &Device::Cpu).unwrap();
            match adapter.merge(at, &locals(params, at), &base).unwrap() {
                Merged::Factors { left, right, scale } => (left.matmul(&right).unwrap() * scale).unwrap(),
                other => panic!("{other:?}"),
            }
        };
        let (before, after) = (product(&rose, &params, &whole), product(&*adapter, &kept, &attachments[0]));
        assert_eq!(before.to_vec2::<f32>().unwrap(), after.to_vec2::<f32>().unwrap());
        let said = adapter.peft().unwrap().config["attune"].clone();
        let still = before.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().filter(|by| **by == 0.0).count();
        assert_eq!((&said["keep"], said["sparsity"].as_f64()), (&0.1.into(), Some(still as f64 / 240.0)));
        // At least what two thin rows and columns a rank leave.
        assert!(still >= 240 - 2 * 2 * 2);
        let x = normal("x", &[3, 20]);
        let layout = attune_points::Layout::new();
        let cx = RowCx { site: &whole.site, output: 12, dropout: None, layout: &layout, rows: None };
        let Port::Delta(map) = adapter.port(&attachments[0]) else { panic!("no rows") };
        let (rows, by_hand) =
            (map.graph(&x, &locals(&kept, &attachments[0]), &cx).unwrap(), x.matmul(&after.t().unwrap()).unwrap());
        assert!(map.fused().is_none() && adapter.compacted(&attachments, &kept).unwrap().is_none());
        let off = (rows - by_hand).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(off.to_scalar::<f32>().unwrap() < 1e-5);
    }

    #[test]
    fn factors_are_whole_where_places_would_take_more() {
        let whole = at();
        let of = |keep: f64| Config { rank: 2, keep, ..Config::default() }.is_shorter(std::slice::from_ref(&whole));
        assert_eq!([0.05, 0.3, 0.4, 1.0].map(of), [true, true, false, false]);
    }
}
