//! Turns and stretches pairs of the numbers that a linear gives: more than a scaling at nearly its price, and cheap to serve with
//! many adapters in one batch.
//!
//! # Update
//! ```text
//! y = x_ti W_oi^T + b_o
//! y'_p = c_p y_p - s_p y_q        y'_q = c_q y_q + s_q y_p           p, q: a pair within a group, half a group apart
//! c = α cos θ                     s = α sin θ
//! ```
//!
//! # Symbols
//! `road_theta` `θ` and `road_alpha` `α`, f32, trained, start at 0 and 1: one of each for a pair (`road_1`), for each number
//! (`road_2`), or for each number and both of `c` and `s` (`road_4`).
//!
//! # Cost
//! `o`, `2*o` or `4*o` parameters per linear; some multiplications a row, and the product again in reverse. Where it costs less, a pass
//! makes another weight in place of it, forward and in reverse, and the gradient by it.
//!
//! # Limits
//! With θ at 0 and α at 1 it is the base, bit for bit. With `road_1` and α at 1 the rows that a linear gives keep their lengths.
//!
//! # Departures
//! none; agrees with PEFT.
//!
//! # Paper
//! 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability. Liao, Monz, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, EndMap, Merged, Peft, PeftTensors, Port, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::linears;
use crate::parts::starts::{self, Start};

const THETA: &str = "road_theta";
const ALPHA: &str = "road_alpha";

/// Who has an angle and a stretch of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Variant {
    /// Each pair.
    #[default]
    #[serde(rename = "road_1")]
    Pairs,
    /// Each number.
    #[serde(rename = "road_2")]
    Numbers,
    /// Each number, twice: for itself and for the other of its pair.
    #[serde(rename = "road_4")]
    Twice,
}

/// Parameters of RoAd.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Who has an angle and a stretch of its own: each pair, each number, or each number twice.
    variant: Variant,
    /// Numbers of a group, within which the first half is paired with the second; an even divisor of the output width.
    #[schemars(range(min = 2, max = 65536))]
    group_size: u32,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { variant: Variant::Pairs, group_size: 64 }
    }
}

pub(super) struct Road {
    config: Config,
}

impl Method for Road {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
            authors: "Baohao Liao, Christof Monz",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "o*if(variant == \"road_1\", 1, if(variant == \"road_2\", 2, 4))",
        graph_numbers: "7*rows*(i+o) + 10*o*i",
        merges: Merges::Weight,
        peft_type: Some("ROAD"),
        rules: &[Rule {
            when: "true",
            require: "floor(group_size/2)*2 == group_size",
            message: "is odd; expected an even number, for its halves are paired",
            path: "group_size",
        }],
        ..Card::new(
            "road",
            Point::Adapter,
            "Turns and stretches pairs of the numbers that a linear gives: more than a scaling at nearly its price, and cheap to \
             serve with many adapters in one batch.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Road {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { variant, group_size } = self.config;
        linears::attach(sites, |site, output, _| {
            if !output.is_multiple_of(group_size as usize) {
                let message =
                    format!("is {group_size}, which does not divide {output}, the output width of {}", site.id);
                return Err(Fault::new("group_size", message));
            }
            let length = match variant {
                Variant::Pairs => output / 2,
                Variant::Numbers => output,
                Variant::Twice => 2 * output,
            };
            // Decay would pull stretches to 0, not to the base.
            let spec = |local| TensorSpec { decay: false, ..TensorSpec::trained(local, [length]) };
            Ok(vec![spec(THETA), spec(ALPHA)])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| Start::Constant(if spec.local == ALPHA { 1.0 } else { 0.0 }))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Output(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let dtype = tensors.get(THETA)?.dtype();
        let w_oi = WeightMap::graph(self, &weight.dense(dtype)?, tensors)?;
        let turned = |bias: Tensor| -> attune_points::Result<Tensor> {
            Ok(EndMap::graph(self, &bias.unsqueeze(0)?, tensors)?.squeeze(0)?)
        };
        let bias = weight.bias(dtype)?.map(turned).transpose()?;
        Ok(Merged::Weight { weight: w_oi, bias })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { variant, group_size } = &self.config;
        let config = json!({
            "peft_type": "ROAD", "task_type": "CAUSAL_LM", "inference_mode": true, "init_weights": true, "variant": variant, "group_size": group_size,
        });
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::Each(vec![(THETA, THETA), (ALPHA, ALPHA)]) })
    }
}

impl Road {
    /// What each number is multiplied with, and what the other of its pair is, in the order of the output.
    fn factors(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let (theta, alpha) = (tensors.get(THETA)?, tensors.get(ALPHA)?);
        let group = self.config.group_size as usize;
        let (cos, sin) = ((alpha * theta.cos()?)?, (alpha * theta.sin()?)?);
        Ok(match self.config.variant {
            Variant::Pairs => {
                // One for both halves of its group.
                let both = |x: Tensor| {
                    let halves = x.reshape(((), 1, group / 2))?;
                    Tensor::cat(&[&halves, &halves], 1)?.flatten_all()
                };
                (both(cos)?, both(sin)?)
            }
            Variant::Numbers => (cos, sin),
            Variant::Twice => {
                let half = |x: Tensor, at: usize| x.reshape(((), 2, group))?.narrow(1, at, 1)?.flatten_all();
                (half(cos, 0)?, half(sin, 1)?)
            }
        })
    }
}

impl EndMap for Road {
    fn graph(&self, x_tw: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (own, others) = self.factors(tensors)?;
        let (rows, width) = x_tw.dims2()?;
        let group = self.config.group_size as usize;
        let halves = x_tw.reshape((rows, width / group, 2, group / 2))?;
        let (first, second) = (halves.narrow(2, 0, 1)?, halves.narrow(2, 1, 1)?);
        let turned = Tensor::cat(&[&second.neg()?, &first], 2)?.reshape((rows, width))?;
        Ok((ops::scale_columns(x_tw, &own)? + ops::scale_columns(&turned, &others)?)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let (row, weight) = (Cost::new(0, 4 * o), Cost::new(0, 4 * o * i));
        Some(AsWeight { map: self, row, weight, product_again: true })
    }
}

impl WeightMap for Road {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let ((own, others), (o, i)) = (self.factors(tensors)?, w_oi.dims2()?);
        let group = self.config.group_size as usize;
        let halves = w_oi.reshape((o / group, 2, group / 2, i))?;
        let (first, second) = (halves.narrow(1, 0, 1)?, halves.narrow(1, 1, 1)?);
        let turned_oi = Tensor::cat(&[&second.neg()?, &first], 1)?.reshape((o, i))?;
        Ok((ops::scale_rows(w_oi, &own)? + ops::scale_rows(&turned_oi, &others)?)?)
    }

    fn bias(&self, b_o: &Tensor, _: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok(EndMap::graph(self, &b_o.unsqueeze(0)?, tensors)?.squeeze(0)?)
    }
}

/// What `adapter_config.json` of a PEFT RoAd says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let said = ["variant", "group_size"].into_iter();
    let params = said.filter_map(|key| Some((key.to_owned(), config.get(key)?.clone()))).collect();
    Ok((MethodRef { method: Road::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn road(variant: Variant) -> Road {
        Road { config: Config { variant, group_size: 4 } }
    }

    fn tensors(theta: &[f64], alpha: &[f64]) -> Locals {
        let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
        Locals::new("q_proj", [(THETA, tensor(theta)), (ALPHA, tensor(alpha))])
    }

    fn turned(road: &Road, tensors: &Locals, row: [f64; 4]) -> Vec<f64> {
        EndMap::graph(road, &Tensor::new(&[row], &Device::Cpu).unwrap(), tensors)
            .unwrap()
            .squeeze(0)
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn a_pair_turns_by_its_angle_and_is_stretched() {
        let quarter = std::f64::consts::FRAC_PI_2;
        // The first and third number turn by a quarter, the second and fourth are doubled.
        let made = turned(&road(Variant::Pairs), &tensors(&[quarter, 0.0], &[1.0, 2.0]), [1.0, 2.0, 3.0, 4.0]);
        for (made, expected) in made.iter().zip([-3.0, 4.0, 1.0, 8.0]) {
            assert!((made - expected).abs() < 1e-12, "{made} against {expected}");
        }
    }

    #[test]
    fn more_angles_that_agree_are_the_same_as_fewer() {
        let (theta, alpha) = ([0.3, -0.7], [1.2, 0.9]);
        let few = turned(&road(Variant::Pairs), &tensors(&theta, &alpha), [1.0, 2.0, 3.0, 4.0]);
        let each = |x: [f64; 2]| [x, x].concat();
        let numbers = turned(&road(Variant::Numbers), &tensors(&each(theta), &each(alpha)), [1.0, 2.0, 3.0, 4.0]);
        let twice = |x: [f64; 2]| [each(x), each(x)].concat();
        let twice = turned(&road(Variant::Twice), &tensors(&twice(theta), &twice(alpha)), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!((&few, &few), (&numbers, &twice));
    }
}
