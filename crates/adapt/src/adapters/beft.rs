//! A trained bias at what a linear gives, and nothing else: a vector a linear, at values of an attention by default; for very few examples and
//! the smallest of adapters.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + b_o + d_o
//! ```
//!
//! # Symbols
//! `beft_bias` `d_o` as `[1, o]`, f32, trained, starts at 0. It is added whether the linear has a bias of its own or not.
//!
//! # Cost
//! `o` parameters per linear; an addition a number that it gives.
//!
//! # Limits
//! With d = 0 it is the base, bit for bit. What it adds does not depend on what is read. A linear without a bias of its own has no place
//! for it: there it does not merge and stays beside the base.
//!
//! # Departures
//! none; agrees with PEFT. Where a model has queries, keys and values in one linear, targets have to be named: a bias of its queries and keys
//! trains as well then.
//!
//! # Paper
//! BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes. Huang, Balashankar, Aminifar, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears};

const BIAS: &str = "beft_bias";
const PEFT_TYPE: &str = "BEFT";

/// Parameters of BEFT: there are none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Beft;

impl Method for Beft {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes",
            authors: "Baichuan Huang, Ananth Balashankar, Amir Aminifar",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "v_proj",
        parameters: "o",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "beft",
            Point::Adapter,
            "A trained bias at what a linear gives, and nothing else: a vector a linear, at values of an attention by default; for \
             very few examples and the smallest of adapters.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Adapter for Beft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        // Biases do not decay.
        let bias = |o: usize| TensorSpec { decay: false, ..TensorSpec::trained(BIAS, [1, o]) };
        linears::attach(sites, |_, o, _| Ok(vec![bias(o)]))
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let d_1o = tensors.get(BIAS)?;
        match weight.bias(d_1o.dtype())? {
            Some(own) => {
                Ok(Merged::Weight { weight: weight.dense(d_1o.dtype())?, bias: Some((own + d_1o.flatten_all()?)?) })
            }
            None => Ok(Merged::No("the linear has no bias that it could become a part of")),
        }
    }

    fn peft(&self) -> Option<Peft> {
        Some(foreign::peft(PEFT_TYPE, &json!({"init_weights": true}), vec![(BIAS, BIAS)]))
    }
}

impl RowMap for Beft {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let d_1o = tensors.get(BIAS)?;
        Ok(d_1o.broadcast_as((x_ti.dim(0)?, d_1o.dim(1)?))?.contiguous()?)
    }
}

/// What `adapter_config.json` of a PEFT BEFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let _: Map<String, Value> = foreign::parse(config)?;
    Ok((MethodRef { method: Beft::CARD.name.to_owned(), params: Map::new() }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_tensor::autograd;
    use candle_core::{DType, Device};

    use super::*;

    fn added(d_1o: &Tensor, rows: usize) -> Tensor {
        let x = Tensor::zeros((rows, 2), DType::F64, &Device::Cpu).unwrap();
        let (site, layout) = (SiteId::new("v_proj"), Layout::new());
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        Beft.graph(&x, &Locals::new("v_proj", [(BIAS, d_1o.clone())]), &cx).unwrap()
    }

    #[test]
    fn each_row_gets_the_vector_and_its_gradient_is_their_sum() {
        let d = autograd::leaf(&Tensor::new(&[[1f64, -2.0, 3.0]], &Device::Cpu).unwrap()).unwrap();
        let made = added(d.as_tensor(), 2);
        assert_eq!(made.to_vec2::<f64>().unwrap(), [[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]]);
        let dy = Tensor::new(&[[1f64, 2.0, 3.0], [10.0, 20.0, 30.0]], &Device::Cpu).unwrap();
        let gradient = autograd::pull(&[&d], &[(&made, &dy)]).unwrap().remove(0).unwrap();
        assert_eq!(gradient.to_vec2::<f64>().unwrap(), [[11.0, 22.0, 33.0]]);
    }

    #[test]
    fn without_a_bias_of_the_linear_it_stays_beside_it() {
        let at = Attachment { site: SiteId::new("v_proj"), tensors: Vec::new() };
        let d = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
        let w = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let merged = Beft.merge(&at, &Locals::new("v_proj", [(BIAS, d)]), &w).unwrap();
        assert!(matches!(merged, Merged::No(why) if why.contains("no bias")));
    }
}
