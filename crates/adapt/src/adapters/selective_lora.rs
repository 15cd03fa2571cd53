//! LoRA of those linears alone that a task needs: each pair of factors has a score that opens or closes it, while a price on scores closes all that do
//! not pay; where a model shall learn a task and forget little of what it knew.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + [c >= threshold] · open · s · (drop(x_ti) A_ri^T) B_or^T           s = alpha / r        d[…]/dc := 1
//! L    = L_job + penalty · mean over all linears of |c|                            from the share `before` of the steps on
//! open = 1 for the share `most` of the linears with the largest c, else 0        from then on, and again every `every` steps
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained, A uniform in ±1/sqrt(i) and B 0 at the start; `score` c, f32, trained, starts as `start`, at
//! `score_lr` times the rate of all else; `open`, f32, 1 at the start, never trained. Factors have no gradient where their linear is off, c has one everywhere.
//!
//! # Cost
//! `r*(i+o) + 1` parameters per linear while it trains, those of the linears that are on in the end; the others are absent from its file.
//! `2 r (i+o)` extra FLOPs per token forward.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit, and so is a linear that is off. With `penalty` 0, no `most` and `start` above the threshold it is
//! LoRA.
//!
//! # Departures
//! The paper says its gate and its price in words; they are those of task adaptive parameter sharing here, of which it is the low-rank form.
//! Steps at the end in which the linears that are on train alone are of this run, not of another.
//!
//! # Paper
//! Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation. Bafghi, Bagwell, Ravichandran, Shrivastava, Raissi, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Compacted, Merged, Peft, Port, RowCx, RowMap, Trained};
use attune_points::engine::StepRule;
use attune_points::{Locals, Params, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::gates::{self, Gated, Gates, OPEN, SCORE};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, own};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// Parameters of selective LoRA.
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
    /// The least score with which a linear is on.
    #[schemars(range(min = 0.0, max = 1000.0))]
    threshold: f64,
    /// What scores start as.
    #[schemars(range(min = 0.0, max = 1000.0))]
    start: f64,
    /// Price of the mean size of all scores.
    #[schemars(range(min = 0.0, max = 1e6))]
    penalty: f64,
    /// Share of the steps before it counts: a score has no gradient but its price until its linear has changed.
    #[schemars(range(min = 0.0, max = 1.0))]
    before: f64,
    /// Share of the steps at the end in which no linear goes on or off.
    #[schemars(range(min = 0.0, max = 1.0))]
    after: f64,
    /// Share of all linears that are on at most once the price counts, 0.05 in the paper's smallest; any if left out.
    #[schemars(range(min = 1e-6, max = 1.0))]
    most: Option<f64>,
    /// Steps from one choice of these to the next.
    #[schemars(range(min = 1, max = 1_000_000))]
    every: u64,
    /// Factor on the learning rate of scores.
    #[schemars(range(min = 0.0, max = 1e6))]
    score_lr: f64,
}

impl Default for Config {
    /// LoRA's rank, and the gates of task adaptive parameter sharing.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            threshold: 0.1,
            start: 0.15,
            penalty: 1.0,
            before: 0.07,
            after: 0.1,
            most: None,
            every: 100,
            score_lr: 100.0,
        }
    }
}

pub(super) struct SelectiveLora {
    config: Config,
}

impl Method for SelectiveLora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation",
            authors: "Reza Akbarian Bafghi, Carden Bagwell, Avinash Ravichandran, Ashish Shrivastava, Maziar Raissi",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + 1",
        merges: Merges::Factors,
        rules: &[Rule {
            when: "true",
            require: "before + after < 1",
            message: "leaves no steps in which linears go off; expected less than 1 with `before`",
            path: "after",
        }],
        ..Card::new(
            "selective-lora",
            Point::Adapter,
            "LoRA of those linears alone that a task needs: each pair of factors has a score that opens or closes it, while a price on \
             scores closes all that do not pay; where a model shall learn a task and forget little of what it knew.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl SelectiveLora {
    const fn gates(&self) -> Gates {
        let Config { threshold, penalty, before, after, most, every, .. } = self.config;
        Gates { threshold, penalty, before, after, most, every }
    }

    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }
}

impl Adapter for SelectiveLora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.config.rank, site, (o, i))?;
            let factor =
                |local, shape: [usize; 2]| TensorSpec { quiet: Some(gates::OFF), ..TensorSpec::trained(local, shape) };
            Ok(vec![
                factor(A, [r, i]),
                factor(B, [o, r]),
                gates::score(self.config.score_lr),
                TensorSpec::fixed(OPEN, [1]),
            ])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            SCORE => Start::Constant(self.config.start),
            OPEN => Start::Constant(1.0),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        Some(Box::new(Gated::new(self.gates(), &[A, B], of)))
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = tensors.get(B)?.broadcast_mul(&self.gates().gate(tensors)?)?;
        Ok(Merged::Factors { left, right: tensors.get(A)?.clone(), scale: self.scale() })
    }

    fn compacted(&self, at: &[Attachment], params: &Params) -> attune_points::Result<Option<Compacted>> {
        let opened = self.gates().opened(at, params)?;
        Ok(opened.map(|(attachments, params)| {
            let adapter = Box::new(Self { config: self.config.clone() });
            Compacted { adapter, attachments, params }
        }))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for SelectiveLora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        let h_tr = (h_tr * self.scale())?.broadcast_mul(&self.gates().gate(tensors)?)?;
        Ok(ops::linear(&h_tr, tensors.get(B)?, None)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    #[test]
    fn the_gradient_of_a_score_is_that_of_the_whole_change_and_off_it_is_nothing() {
        let lora = SelectiveLora { config: Config { rank: 2, alpha: 6.0, ..Config::default() } };
        let (a, b, x, dy) = (normal("a", &[2, 4]), normal("b", &[3, 2]), normal("x", &[5, 4]), normal("dy", &[5, 3]));
        let (site, layout) = (SiteId::new("up"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        let change = (b.matmul(&a).unwrap() * 3.0).unwrap();
        let whole = x.matmul(&change.t().unwrap()).unwrap();
        let size = |x: &Tensor| x.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        for (score, open, on) in [(0.15, 1.0, 1.0), (0.05, 1.0, 0.0), (0.15, 0.0, 0.0)] {
            let leaves = [&a, &b, &Tensor::new(&[score], &Device::Cpu).unwrap()].map(|x| autograd::leaf(x).unwrap());
            let [of_a, of_b, of_score] = leaves.each_ref().map(|leaf| leaf.as_tensor().clone());
            let open = Tensor::new(&[open], &Device::Cpu).unwrap();
            let locals = Locals::new("up", [(A, of_a), (B, of_b), (SCORE, of_score), (OPEN, open)]);
            let rows = lora.graph(&x, &locals, &cx).unwrap();
            assert!(size(&(&rows - (&whole * on).unwrap()).unwrap()) < 1e-12);
            let found = autograd::pull(&leaves.each_ref(), &[(&rows, &dy)]).unwrap();
            let by_score = found[2].as_ref().unwrap().to_vec1::<f64>().unwrap()[0];
            let product = (&dy * &whole).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            assert!((by_score - product).abs() < 1e-10);
            assert!(found[..2].iter().all(|found| (size(found.as_ref().unwrap()) > 0.0) == (on > 0.0)));
            let at = Attachment { site: site.clone(), tensors: Vec::new() };
            let Merged::Factors { left, right, scale } = lora.merge(&at, &locals, &a).unwrap() else {
                panic!("no factors")
            };
            let merged = (left.matmul(&right).unwrap() * scale).unwrap();
            assert!(size(&(merged - (&change * on).unwrap()).unwrap()) < 1e-12);
        }
    }
}
