//! A small network reads a weight, column by column, and writes what is added to it: the change is a function of the weight that bends; where a
//! change shall follow what is there already, at a price that does not grow with the input width.
//!
//! # Update
//! ```text
//! h_ir = φ(W_oi^T A_ro^T)
//! h_ir ← φ(h_ir E_rr^T)                     each encoder E, in turn; what it read is kept
//! h_ir ← φ(h_ir D_rr^T) + kept_ir           each decoder D, with the last kept first
//! W'_oi = W_oi + scaling · B_or h_ir^T      y_to = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `peanut_A` `A_ro`, `peanut_encoder_n` and `peanut_decoder_n` `[r, r]`, `depth` of each, and `peanut_B` `B_or`; f32, trained; A uniform in ±1/sqrt(o), encoders and decoders in
//! ±1/sqrt(r), B at 0. `φ` is `activation`.
//!
//! # Cost
//! `2 rank o + 2 depth rank²` parameters per linear. Each pass makes `W'` twice, forward and reverse, `4 rank o i + 4 depth rank² i` FLOPs each, and the gradient by it, `2 i o`
//! FLOPs per token.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. The change has rank `rank` at most, and its columns are functions of the weight's own: equal columns stay
//! equal, and with an activation that is 0 at 0 a column of zeros stays one.
//!
//! # Departures
//! none; agrees with PEFT, of whose activations five are here.
//!
//! # Paper
//! PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers. Zhong, Jiang, Li, Nakada, Liu, Zhang, Yao, Wang, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
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

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears};

const A: &str = "peanut_A";
const B: &str = "peanut_B";
const PEFT_TYPE: &str = "PEANUT";

/// Encoders and decoders, each with its spelling in a PEFT folder.
const ENCODERS: [(&str, &str); 8] = [
    ("peanut_encoder_0", "peanut_encoders.0.weight"),
    ("peanut_encoder_1", "peanut_encoders.1.weight"),
    ("peanut_encoder_2", "peanut_encoders.2.weight"),
    ("peanut_encoder_3", "peanut_encoders.3.weight"),
    ("peanut_encoder_4", "peanut_encoders.4.weight"),
    ("peanut_encoder_5", "peanut_encoders.5.weight"),
    ("peanut_encoder_6", "peanut_encoders.6.weight"),
    ("peanut_encoder_7", "peanut_encoders.7.weight"),
];
const DECODERS: [(&str, &str); 8] = [
    ("peanut_decoder_0", "peanut_decoders.0.weight"),
    ("peanut_decoder_1", "peanut_decoders.1.weight"),
    ("peanut_decoder_2", "peanut_decoders.2.weight"),
    ("peanut_decoder_3", "peanut_decoders.3.weight"),
    ("peanut_decoder_4", "peanut_decoders.4.weight"),
    ("peanut_decoder_5", "peanut_decoders.5.weight"),
    ("peanut_decoder_6", "peanut_decoders.6.weight"),
    ("peanut_decoder_7", "peanut_decoders.7.weight"),
];

/// What bends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Activation {
    /// The larger of a number and 0.
    #[default]
    Relu,
    /// A number times its logistic function.
    Silu,
    /// A number times the normal distribution's share below it.
    Gelu,
    /// The same with that share by a hyperbolic tangent.
    GeluNew,
    /// The hyperbolic tangent.
    Tanh,
}

impl Activation {
    fn of(self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::GeluNew => x.gelu(),
            Self::Tanh => x.tanh(),
        }
    }
}

/// Parameters of PEANuT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of the network within.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Encoders, and as many decoders.
    #[schemars(range(min = 0, max = 8))]
    depth: u32,
    /// What bends.
    activation: Activation,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scaling: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 32, depth: 0, activation: Activation::Relu, scaling: 1.0 }
    }
}

pub(super) struct Peanut {
    config: Config,
}

impl Method for Peanut {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers",
            authors: "Yibo Zhong, Haoxiang Jiang, Lincan Li, Ryumei Nakada, Tianci Liu, Linjun Zhang, Huaxiu Yao, Haoyu Wang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "2*rank*o + 2*depth*rank*rank",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "peanut",
            Point::Adapter,
            "A small network reads a weight, column by column, and writes what is added to it: the change is a function of the weight \
             that bends; where a change shall follow what is there already, at a price that does not grow with the input width.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Peanut {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (r, depth) = (self.config.rank as usize, self.config.depth as usize);
        linears::attach(sites, |_, o, _| {
            let inner = ENCODERS.iter().take(depth).chain(DECODERS.iter().take(depth));
            let inner = inner.map(|(local, _)| TensorSpec::trained(local, [r, r]));
            Ok([TensorSpec::trained(A, [r, o]), TensorSpec::trained(B, [o, r])].into_iter().chain(inner).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == B { Start::Constant(0.0) } else { Start::kaiming(spec) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(A)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, depth, activation, scaling } = self.config;
        let own = json!({
            "r": rank,
            "depth": depth,
            "act_fn": activation,
            "scaling": scaling,
            "init_weights": true,
        });
        let ends = [(A, "peanut_A.weight"), (B, "peanut_B.weight")];
        Some(foreign::peft(PEFT_TYPE, &own, ends.into_iter().chain(ENCODERS).chain(DECODERS).collect()))
    }
}

impl WeightMap for Peanut {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let Config { depth, activation, scaling, .. } = self.config;
        // Columns of the weight are columns all the way: h_ri is the transposed of the equations above.
        let mut h_ri = activation.of(&ops::matmul(tensors.get(A)?, &w_oi.contiguous()?)?)?;
        let mut kept = Vec::with_capacity(depth as usize);
        for (local, _) in ENCODERS.iter().take(depth as usize) {
            let next_ri = activation.of(&ops::matmul(tensors.get(local)?, &h_ri)?)?;
            kept.push(std::mem::replace(&mut h_ri, next_ri));
        }
        for ((local, _), kept_ri) in DECODERS.iter().zip(kept.into_iter().rev()) {
            h_ri = (activation.of(&ops::matmul(tensors.get(local)?, &h_ri)?)? + kept_ri)?;
        }
        // The scaling goes on the thin side.
        Ok((w_oi + ops::matmul(&(tensors.get(B)? * scaling)?, &h_ri)?)?)
    }
}

/// What `adapter_config.json` of a PEFT PEANuT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("depth", json!(keys.get("depth", own.depth))),
        ("activation", json!(keys.get("act_fn", own.activation))),
        ("scaling", json!(keys.get("scaling", own.scaling))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((
        MethodRef { method: Peanut::CARD.name.to_owned(), params },
        Targets::Many(keys::without_inner(modules, "peanut_")),
    ))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn of(depth: u32) -> Peanut {
        Peanut { config: Config { rank: 2, depth, activation: Activation::Tanh, scaling: 3.0 } }
    }

    fn locals(o: usize) -> Locals {
        let inner = |local: &'static str| (local, normal(local, &[2, 2]));
        let inner = ENCODERS.iter().chain(&DECODERS).map(|(local, _)| inner(local));
        Locals::new("up", [(A, normal("a", &[2, o])), (B, normal("b", &[o, 2]))].into_iter().chain(inner))
    }

    #[test]
    fn it_is_the_network_by_hand_on_each_column() {
        let (w, locals) = (normal("w", &[3, 4]), locals(3));
        let product = |matrix: &[Vec<f64>], x: &[f64]| -> Vec<f64> {
            matrix.iter().map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let tanh = |x: Vec<f64>| -> Vec<f64> { x.into_iter().map(f64::tanh).collect() };
        let named = |local: &str| locals.get(local).unwrap().to_vec2::<f64>().unwrap();
        for depth in [0usize, 2] {
            let change = (of(depth as u32).graph(&w, &locals).unwrap() - &w).unwrap().t().unwrap();
            for (column, change) in
                w.t().unwrap().to_vec2::<f64>().unwrap().iter().zip(change.to_vec2::<f64>().unwrap())
            {
                let mut h = tanh(product(&named(A), column));
                let mut kept = Vec::new();
                for (encoder, _) in ENCODERS.iter().take(depth) {
                    kept.push(h.clone());
                    h = tanh(product(&named(encoder), &h));
                }
                for (decoder, _) in DECODERS.iter().take(depth) {
                    h = tanh(product(&named(decoder), &h));
                    h.iter_mut().zip(kept.pop().unwrap()).for_each(|(h, kept)| *h += kept);
                }
                let by_hand = product(&named(B), &h);
                assert!(change.iter().zip(by_hand).all(|(change, by_hand)| (change - 3.0 * by_hand).abs() < 1e-12));
            }
        }
    }

    #[test]
    fn a_column_of_zeros_stays_one() {
        let (mut rows, locals) = (normal("w", &[3, 4]).to_vec2::<f64>().unwrap(), locals(3));
        rows.iter_mut().for_each(|row| row[1] = 0.0);
        let w = Tensor::new(rows, &candle_core::Device::Cpu).unwrap();
        let made = of(2).graph(&w, &locals).unwrap().to_vec2::<f64>().unwrap();
        assert!(made.iter().all(|row| row[1] == 0.0 && row[0] != 0.0));
    }

    #[test]
    fn what_bends_otherwise_is_refused_by_its_key() {
        let config = json!({"peft_type": "PEANUT", "act_fn": "mish"});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert_eq!(faults[0].path.to_string(), "act_fn");
    }
}
