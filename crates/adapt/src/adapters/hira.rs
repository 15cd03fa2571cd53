//! A low-rank factor on every number of each frozen weight: the change has the weight's own rank and zeros; for knowledge that no
//! small rank holds, and for pruned bases.
//!
//! # Update
//! ```text
//! W'_oi = W_oi ⊙ (1 + B_or A_ri)           or, where `whole`,  W_oi ⊙ (B_or A_ri)           y_to = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `hira_A` `A_ri` and `hira_B` `B_or`, f32, trained. A starts uniform in ±1/sqrt(i), B at 0; where `whole`, the first row of A and the
//! first column of B start at 1, so that their product does.
//!
//! # Cost
//! `r*(i+o)` parameters per linear. Each pass makes `W'` twice (forward and reverse), `4 r i o` FLOPs, and the gradient by it,
//! `2 i o` FLOPs per token beyond LoRA's; nothing of the rest depends on the number of tokens.
//!
//! # Limits
//! With B = 0 (a product of 1, where `whole`) it is the base. A zero of the weight stays one. A weight twice as large changes
//! twice as much.
//!
//! # Departures
//! none; agrees with PEFT, whose dropout of the changed path it does not have: its input goes through one weight. HUT's
//! shifted form is the same with `rank: 8`, its other one `whole`, which PEFT does not
//! have; a factor on the product is left to the learning rate.
//!
//! # Paper
//! HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models. Huang, Ko, Zhuang, Tang, Zhang, 2025; HUT: A
//! More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation. Zhang, Zhou, Chen, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, WeightMap};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, own};

const A: &str = "hira_A";
const B: &str = "hira_B";

/// Parameters of HiRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the product.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// The product is the factor itself, not its distance from 1.
    whole: bool,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 32, whole: false }
    }
}

pub(super) struct Hira {
    config: Config,
}

impl Method for Hira {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        aliases: &["hut"],
        paper: Some(Paper {
            title: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
            authors: "Qiushi Huang, Tom Ko, Zhan Zhuang, Lilian Tang, Yu Zhang",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        graph_numbers: "rows*(i+o) + 17*o*i",
        merges: Merges::Weight,
        peft_type: Some("HIRA"),
        ..Card::new(
            "hira",
            Point::Adapter,
            "A low-rank factor on every number of each frozen weight: the change has the weight's own rank and zeros; for \
             knowledge that no small rank holds, and for pruned bases.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Hira {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        factors::attach(sites, A, B, |_| self.config.rank)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (locals, edit) = factors::kaiming(at, rng)?;
        if !self.config.whole {
            return Ok((locals, edit));
        }
        // Ones in A's first row and in B's first column, in place of what would be there.
        let first = |local: &str, dim: usize| -> attune_points::Result<Tensor> {
            let tensor = locals.get(local)?;
            let (n, mut shape) = (tensor.dim(dim)?, tensor.dims().to_vec());
            shape[dim] = 1;
            let ones = Tensor::ones(shape, DType::F32, &Device::Cpu)?;
            Ok(Tensor::cat(&[ones, tensor.narrow(dim, 1, n - 1)?], dim)?)
        };
        let (a_ri, b_or) = (first(A, 0)?, first(B, 1)?);
        starts::each(at, rng, |spec| Start::Is(if spec.local == A { a_ri.clone() } else { b_or.clone() }))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(A)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        if self.config.whole {
            return Some(own::peft(Self::CARD.name, &self.config));
        }
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(self.config.rank)),
                ("hira_dropout", json!(0.0)),
                ("fan_in_fan_out", json!(false)),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(Vec::new()) })
    }
}

impl WeightMap for Hira {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let product_oi = ops::matmul(tensors.get(B)?, tensors.get(A)?)?;
        let changed_oi = ops::scale_entries(w_oi, &product_oi)?;
        // So that a product of 0 leaves the weight's bits.
        Ok(if self.config.whole { changed_oi } else { (w_oi + changed_oi)? })
    }
}

/// What `adapter_config.json` of a PEFT HiRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    keys.no_dropout("hira_dropout");
    // `rank_pattern` is not looked at: PEFT writes it down, and makes tensors of rank `r` everywhere.
    let params = Map::from_iter([("rank".to_owned(), json!(keys.get("r", Config::default().rank)))]);
    keys.finish()?;
    Ok((MethodRef { method: Hira::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorSpec;

    use super::*;

    fn of(whole: bool) -> Hira {
        Hira { config: Config { rank: 2, whole } }
    }

    fn tensor(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn zeros_stay_and_a_larger_weight_changes_by_more() {
        let locals = Locals::new("q_proj", [(A, tensor("a", [2, 4])), (B, tensor("b", [3, 2]))]);
        let kept = Tensor::new(&[[1.0f64, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], [1.0; 4]], &Device::Cpu).unwrap();
        let w = (tensor("w", [3, 4]) * &kept).unwrap();
        for whole in [false, true] {
            let made = of(whole).graph(&w, &locals).unwrap();
            assert_eq!(largest(&(&made * (1.0 - &kept).unwrap()).unwrap()), 0.0);
            let twice = of(whole).graph(&(&w * 2.0).unwrap(), &locals).unwrap();
            assert!(largest(&(twice - (made * 2.0).unwrap()).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn both_forms_start_as_the_weight() {
        let tensors = vec![TensorSpec::trained(A, [2, 4]), TensorSpec::trained(B, [3, 2])];
        let at = Attachment { site: SiteId::new("q_proj"), tensors };
        let w = tensor("w", [3, 4]).to_dtype(DType::F32).unwrap();
        for whole in [false, true] {
            let (locals, _) = of(whole).init(&at, &w, &mut Rng::new(1, "init")).unwrap();
            let made = of(whole).graph(&w, &locals).unwrap();
            assert_eq!(made.to_vec2::<f32>().unwrap(), w.to_vec2::<f32>().unwrap());
            // Both factors have what the other's gradient needs.
            assert!(largest(&locals.get(A).unwrap().to_dtype(DType::F64).unwrap()) > 0.0);
        }
    }

    #[test]
    fn the_form_that_peft_does_not_have_is_written_in_our_own_words() {
        assert_eq!(of(false).peft().unwrap().config["peft_type"], "HIRA");
        assert!(own::is_own(&of(true).peft().unwrap().config));
    }
}
