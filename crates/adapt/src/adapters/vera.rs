//! Random matrices that all linears share and that never train, and two trained vectors at each: the fewest parameters of a
//! low-rank change; for very many adapters over one base.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + b_o ⊙ ((d_r ⊙ (x_ti A_ri^T)) B_or^T)         A_ri = A_rI[:, ..i],  B_or = B_Or[..o, :]
//! ```
//!
//! # Symbols
//! `vera_lambda_d` `d_r` and `vera_lambda_b` `b_o` at each linear, f32, trained; d starts at `d_initial`, b at 0. `vera_A` `A_rI` and
//! `vera_B` `B_Or`, as wide as the widest of the linears, one pair for the whole slot, random once (uniform in ±sqrt(6/I) and
//! ±sqrt(6/r)) and fixed; they are kept with the adapter. Dropout on the component's input.
//!
//! # Cost
//! `o + r` parameters per linear, and the pair; `2 r (i+o)` extra FLOPs per token, as LoRA of that rank.
//! Where that costs less, and nothing is dropped, a pass makes another weight in place of it, forward and in reverse, at `2 r o i` FLOPs
//! each, and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! With b = 0 it is the base, bit for bit. The change is within the rows of A and the columns of B.
//!
//! # Departures
//! none; agrees with PEFT, of which folders without the pair (`save_projection: false`) are not read: the numbers that its key stands
//! for are another library's.
//!
//! # Paper
//! VeRA: Vector-based Random Matrix Adaptation. Kopiczko, Blankevoort, Asano, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, WeightMap,
};
use attune_points::forms::{AsWeight, Cost};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::linears;
use crate::parts::starts::{self, Start};

const A: &str = "vera_A";
const B: &str = "vera_B";
const B_VECTOR: &str = "vera_lambda_b";
const D_VECTOR: &str = "vera_lambda_d";

/// Parameters of VeRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change; larger than LoRA's, since it costs one number a linear.
    #[schemars(range(min = 1, max = 16384))]
    rank: u32,
    /// What the inner vector starts as.
    #[schemars(range(min = -10.0, max = 10.0))]
    d_initial: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 256, d_initial: 0.1, dropout: 0.0 }
    }
}

pub(super) struct Vera {
    config: Config,
}

impl Method for Vera {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "VeRA: Vector-based Random Matrix Adaptation",
            authors: "Dawid J. Kopiczko, Tijmen Blankevoort, Yuki M. Asano",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "o + rank",
        fixed_shared: "rank*(i+o)",
        merges: Merges::Factors,
        peft_type: Some("VERA"),
        ..Card::new(
            "vera",
            Point::Adapter,
            "Random matrices that all linears share and that never train, and two trained vectors at each: the fewest parameters of a \
             low-rank change; for very many adapters over one base.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Vera {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let r = self.config.rank as usize;
        let (widest_o, widest_i) = linears::widest(sites);
        let shared = |local, shape: [usize; 2]| TensorSpec { scope: Scope::Model, ..TensorSpec::fixed(local, shape) };
        linears::attach(sites, |_, o, _| {
            let vector = |local, n: usize| TensorSpec { decay: false, ..TensorSpec::trained(local, [n]) };
            let pair = [shared(A, [r, widest_i]), shared(B, [widest_o, r])];
            Ok([vector(B_VECTOR, o), vector(D_VECTOR, r)].into_iter().chain(pair).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            B_VECTOR => Start::Constant(0.0),
            D_VECTOR => Start::Constant(self.config.d_initial),
            _ => Start::Uniform((6.0 / spec.shape[1] as f64).sqrt()),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (a_ri, b_or) = pair(tensors, weight.shape())?;
        let left = b_or.broadcast_mul(&tensors.get(B_VECTOR)?.unsqueeze(1)?)?;
        let right = a_ri.broadcast_mul(&tensors.get(D_VECTOR)?.unsqueeze(1)?)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, d_initial, dropout } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("d_initial", json!(d_initial)),
                ("vera_dropout", json!(dropout)),
                ("projection_prng_key", json!(0)),
                ("save_projection", json!(true)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        let shared = vec![(A, "base_model.vera_A"), (B, "base_model.vera_B")];
        Some(Peft { config, tensors: PeftTensors::Each(shared) })
    }
}

/// The parts of the shared matrices that are a linear's.
fn pair(tensors: &Locals, (o, i): (usize, usize)) -> attune_points::Result<(Tensor, Tensor)> {
    Ok((tensors.get(A)?.narrow(1, 0, i)?.contiguous()?, tensors.get(B)?.narrow(0, 0, o)?))
}

impl RowMap for Vera {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (b_o, d_r) = (tensors.get(B_VECTOR)?, tensors.get(D_VECTOR)?);
        let (a_ri, b_or) = pair(tensors, (b_o.dim(0)?, x_ti.dim(1)?))?;
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, &a_ri, None)?;
        let h_tr = ops::scale_columns(&h_tr, d_r)?;
        Ok(ops::scale_columns(&ops::linear(&h_tr, &b_or, None)?, b_o)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let r = self.config.rank as usize;
        let (row, weight) = (Cost::new(r * (o + i), r + o), Cost::new(r * o * i, 2 * o * i));
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Vera {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (a_ri, b_or) = pair(tensors, w_oi.dims2()?)?;
        // Nothing of it has a gradient by B.
        let between_oi = ops::matmul(&b_or, &ops::scale_rows(&a_ri, tensors.get(D_VECTOR)?)?)?;
        Ok((w_oi + ops::scale_rows(&between_oi, tensors.get(B_VECTOR)?)?)?)
    }
}

/// What `adapter_config.json` of a PEFT VeRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("save_projection", true, "so the random matrices are not in the folder; save it with them");
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("d_initial", json!(keys.get("d_initial", own.d_initial))),
        ("dropout", json!(keys.get("vera_dropout", own.dropout))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Vera::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use candle_core::DType;

    use super::*;

    #[test]
    fn a_linear_takes_the_first_rows_and_columns_of_the_shared_pair() {
        let tensor = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let (a, b, b_o, d_r) = (tensor("a", &[2, 9]), tensor("b", &[7, 2]), tensor("lb", &[4]), tensor("ld", &[2]));
        let [a_entries, b_entries] = [&a, &b].map(|x| x.to_vec2::<f64>().unwrap());
        let [b_vector, d_vector] = [&b_o, &d_r].map(|x| x.to_vec1::<f64>().unwrap());
        let locals = Locals::new("up", [(A, a), (B, b), (B_VECTOR, b_o), (D_VECTOR, d_r)]);
        let (vera, x) = (Vera { config: Config::default() }, tensor("x", &[3, 5]));
        let (site, layout) = (SiteId::new("up"), Layout::new());
        let cx = RowCx { site: &site, output: 4, dropout: None, layout: &layout, rows: None };
        let added = RowMap::graph(&vera, &x, &locals, &cx).unwrap().to_vec2::<f64>().unwrap();
        for (x, added) in x.to_vec2::<f64>().unwrap().iter().zip(added) {
            for (o, added) in added.iter().enumerate() {
                let h = |r: usize| -> f64 { x.iter().zip(&a_entries[r]).map(|(x, a)| x * a).sum() };
                let by_hand: f64 = (0..2).map(|r| b_vector[o] * b_entries[o][r] * d_vector[r] * h(r)).sum();
                assert!((added - by_hand).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn a_folder_without_the_pair_is_refused() {
        let config = json!({"peft_type": "VERA", "save_projection": false});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().contains("save it with them"), "{}", faults[0]);
    }
}
