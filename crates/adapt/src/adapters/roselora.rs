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
//! the run. `t_i` and `t_f` are `begins` and `ends` of the job's steps. `drop` is dropout on the input.
//!
//! # Cost
//! `r*(i+o)` parameters per linear, as LoRA's, and as many importances beside them; `2 r (i+o)` extra FLOPs per token forward, and a selection
//! among all of them a step.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With `keep` 1 it is LoRA. A share of at most r · keep² of the weight's entries change in the end.
//!
//! # Departures
//! Bounds on numbers and a stop at a small loss, which the authors have for edits alone, are not here. Factors are stored whole.
//!
//! # Paper
//! RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and Fine-tuning. Wang, Liu,
//! Li, Cheng, Zhao, Gao, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Merged, Peft, Port, RowCx, RowMap, Trained};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Locals, Owner, TensorId, TensorName, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::{factors, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";

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
}

impl Default for Config {
    /// The authors' values for edits, whose 25 steps begin with 3 and end with 5 that let none go.
    fn default() -> Self {
        Self { rank: 8, alpha: 32.0, dropout: 0.0, keep: 0.05, smoothing: 0.8, begins: 0.1, ends: 0.8 }
    }
}

pub(super) struct Roselora {
    config: Config,
}

impl Method for Roselora {
    const CARD: Card = Card {
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
}

impl Adapter for Roselora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        factors::attach(sites, A, B, |_| self.config.rank)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        factors::kaiming(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        (self.config.keep < 1.0).then(|| Box::new(Pruning::new(&self.config, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::Factors { left: tensors.get(B)?.clone(), right: tensors.get(A)?.clone(), scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Roselora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&(h_tr * self.scale())?, tensors.get(B)?, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        Some(FusedRows::LowRank { down: A, up: B, scale: self.scale(), dropout: self.config.dropout })
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
    use candle_core::Device;

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
}
