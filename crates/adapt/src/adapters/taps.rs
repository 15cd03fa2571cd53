//! Full changes of those weights alone that a task needs: each linear has one, and a score that opens or closes it while a price on scores closes
//! all that do not pay; where many tasks share a base and each shall keep as much of it as it can.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + [c >= threshold] · D_oi                 y_to = x_ti W'_oi^T               d[…]/dc := 1
//! L     = L_job + penalty · mean over all linears of |c|                            from the share `before` of the steps on
//! ```
//!
//! # Symbols
//! `delta` `D_oi`, f32, trained, 0 at the start; `score` c, f32, trained, starts as `start`, at `score_lr` times the rate of all else. D has
//! no gradient where its linear is off, c has one everywhere.
//!
//! # Cost
//! `i*o + 1` parameters per linear while it trains, those of the linears that are on in the end; the others are absent from its file. Each pass makes
//! `W'` twice (forward and reverse), and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! With D = 0 it is the base, bit for bit, and so is a linear that is off. With `penalty` 0 and `start` above the threshold it is
//! full fine-tuning of the linears.
//!
//! # Departures
//! Norms stay as they are, where the authors let them follow their layer. One task at a time: the variant in which the base trains along with several
//! is not here. Scores learn faster than weights, as their step is one of Adam's here and not of the gradient's size.
//!
//! # Paper
//! Task Adaptive Parameter Sharing for Multi-Task Learning. Wallingford, Li, Achille, Ravichandran, Fowlkes, Bhotika, Soatto, 2022.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Compacted, Merged, Peft, Port, Trained, WeightMap};
use attune_points::engine::StepRule;
use attune_points::{Locals, Params, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::gates::{self, Gated, Gates, SCORE};
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const DELTA: &str = "delta";

/// Parameters of TAPS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
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
    /// Factor on the learning rate of scores.
    #[schemars(range(min = 0.0, max = 1e6))]
    score_lr: f64,
}

impl Default for Config {
    /// The authors' values, two of whose thirty rounds are before the price; the rate is for one of 1e-4, and the steps after are ours.
    fn default() -> Self {
        Self { threshold: 0.1, start: 0.15, penalty: 1.0, before: 0.07, after: 0.1, score_lr: 100.0 }
    }
}

pub(super) struct Taps {
    config: Config,
}

impl Method for Taps {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Task Adaptive Parameter Sharing for Multi-Task Learning",
            authors: "Matthew Wallingford, Hao Li, Alessandro Achille, Avinash Ravichandran, Charless Fowlkes, Rahul Bhotika, Stefano \
                      Soatto",
            year: 2022,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "i*o + 1",
        merges: Merges::Weight,
        rules: &[Rule {
            when: "true",
            require: "before + after < 1",
            message: "leaves no steps in which linears go off; expected less than 1 with `before`",
            path: "after",
        }],
        ..Card::new(
            "taps",
            Point::Adapter,
            "Full changes of those weights alone that a task needs: each linear has one, and a score that opens or closes it while a price \
             on scores closes all that do not pay; where many tasks share a base and each shall keep as much of it as it can.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Taps {
    const fn gates(&self) -> Gates {
        let Config { threshold, penalty, before, after, .. } = self.config;
        Gates { threshold, penalty, before, after, most: None, every: 1 }
    }
}

impl Adapter for Taps {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |_, o, i| {
            let delta = TensorSpec { quiet: Some(gates::OFF), ..TensorSpec::trained(DELTA, [o, i]) };
            Ok(vec![delta, gates::score(self.config.score_lr)])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| Start::Constant(if spec.local == SCORE { self.config.start } else { 0.0 }))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        Some(Box::new(Gated::new(self.gates(), &[DELTA], of)))
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(DELTA)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
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

impl WeightMap for Taps {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((w_oi + tensors.get(DELTA)?.broadcast_mul(&self.gates().gate(tensors)?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    #[test]
    fn a_linear_that_is_on_has_all_of_its_change_and_one_that_is_off_nothing() {
        let taps = Taps { config: Config::default() };
        let (w, delta, dw) = (normal("w", &[3, 4]), normal("d", &[3, 4]), normal("dw", &[3, 4]));
        for (score, on) in [(0.1, 1.0), (0.09, 0.0)] {
            let leaves = [
                autograd::leaf(&delta).unwrap(),
                autograd::leaf(&Tensor::new(&[score], &Device::Cpu).unwrap()).unwrap(),
            ];
            let [of_delta, of_score] = leaves.each_ref().map(|leaf| leaf.as_tensor().clone());
            let made = taps.graph(&w, &Locals::new("up", [(DELTA, of_delta), (SCORE, of_score)])).unwrap();
            let expected = (&w + (&delta * on).unwrap()).unwrap();
            assert_eq!(made.to_vec2::<f64>().unwrap(), expected.to_vec2::<f64>().unwrap());
            let found = autograd::pull(&leaves.each_ref(), &[(&made, &dw)]).unwrap();
            let by_delta = found[0].as_ref().unwrap().to_vec2::<f64>().unwrap();
            assert_eq!(by_delta, (&dw * on).unwrap().to_vec2::<f64>().unwrap());
            let by_score = found[1].as_ref().unwrap().to_vec1::<f64>().unwrap()[0];
            let product = (&dw * &delta).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            assert!((by_score - product).abs() < 1e-12);
        }
    }
}
