//! A few numbers, down to one, in place of the matrix between a weight's leading singular vectors: they weigh random matrices that never train, and
//! many linears may share them; where an adapter is learned from rewards and has to be of almost no size.
//!
//! # Update
//! ```text
//! W_oi ≈ B_or A_ri                       A = diag(√S_r) V_ri, B = U_or diag(√S_r)
//! y_to = x_ti W_oi^T + ((drop(x_ti) A_ri^T) (Σ_n v_n P_nrr)^T) B_or^T                          n = 1 … numbers
//! ```
//!
//! # Symbols
//! `tinylora_v` `v_n`, f32, trained, 0 at the start, of each group of linears. `tinylora_P` `P_nrr`, normal with standard deviation 1/√r, and `tinylora_A`
//! and `tinylora_B`, of the r largest singular values S, at each linear, never trained. Groups follow each other through the model: as many as
//! there are linears with `tying` 0, one with 1. `drop` is dropout on the input.
//!
//! # Cost
//! `numbers` parameters per group, and `r (i+o) + numbers r²` numbers that never train beside them at each linear; `2 r (i+o+r)` extra FLOPs
//! per token forward. A decomposition of each weight before the first step.
//!
//! # Limits
//! With v = 0 it is the base, bit for bit. With numbers = r² and `tying` 0 it is LoRA-XS in other coordinates.
//!
//! # Departures
//! none; agrees with PEFT. A rank beyond a linear's width is refused, where PEFT takes the width.
//!
//! # Paper
//! Learning to Reason in 13 Parameters. Morris, Mireshghallah, Ibrahim, Mahloujifar, 2026.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site, SiteId};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
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
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, spectral};

const V: &str = "tinylora_v";
const A: &str = "tinylora_A";
const B: &str = "tinylora_B";
const P: &str = "tinylora_P";

/// Parameters of TinyLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change: how many singular directions take part.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numbers that train in each group of linears.
    #[schemars(range(min = 1, max = 65536))]
    numbers: u32,
    /// How far linears share their numbers: with 0 each has its own, with 1 all have the same.
    #[schemars(range(min = 0.0, max = 1.0))]
    tying: f64,
    /// Rounds of a randomised decomposition, which is much faster than the exact one; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 2, numbers: 64, tying: 0.0, iterations: None, dropout: 0.0 }
    }
}

pub(super) struct Tinylora {
    config: Config,
}

impl Method for Tinylora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Learning to Reason in 13 Parameters",
            authors: "John X. Morris, Niloofar Mireshghallah, Mark Ibrahim, Saeed Mahloujifar",
            year: 2026,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "0",
        shared: "numbers",
        fixed: "rank*(i+o) + numbers*rank*rank",
        start_numbers: "44*o*i",
        merges: Merges::Factors,
        peft_type: Some("TINYLORA"),
        ..Card::new(
            "tinylora",
            Point::Adapter,
            "A few numbers, down to one, in place of the matrix between a weight's leading singular vectors: they weigh random \
             matrices that never train, and many linears may share them; where an adapter is learned from rewards and has to be of \
             almost no size.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// The group of the linear at `index` of `all`: all groups but the last are of one size.
fn group(index: usize, all: usize, tying: f64) -> usize {
    let groups = ((all as f64 * (1.0 - tying)).round_ties_even() as usize).max(1);
    (index / (all / groups).max(1)).min(groups - 1)
}

/// The matrix between the factors.
fn between(tensors: &Locals) -> attune_points::Result<Tensor> {
    let (v_n, p_nrr) = (tensors.get(V)?, tensors.get(P)?);
    let (n, r, _) = p_nrr.dims3()?;
    Ok(ops::matmul(&v_n.unsqueeze(0)?, &p_nrr.reshape((n, r * r))?)?.reshape((r, r))?)
}

impl Adapter for Tinylora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, numbers, tying, .. } = self.config;
        let groups: BTreeMap<&SiteId, usize> =
            sites.iter().enumerate().map(|(index, site)| (&site.id, group(index, sites.len(), tying))).collect();
        linears::attach(sites, |site, o, i| {
            let (r, n) = (factors::within(rank, site, (o, i))?, numbers as usize);
            let scope = Scope::Group(groups.get(&site.id).copied().unwrap_or_default().to_string());
            Ok(vec![
                TensorSpec { scope, ..TensorSpec::trained(V, [n]) },
                TensorSpec::fixed(A, [r, i]),
                TensorSpec::fixed(B, [o, r]),
                TensorSpec::fixed(P, [n, r, r]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let r = self.config.rank as usize;
        let (a_ri, b_or) = factors::balanced(&spectral::leading(weight, r, self.config.iterations, rng)?)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Is(a_ri.clone()),
            B => Start::Is(b_or.clone()),
            P => Start::Normal(1.0 / (r as f64).sqrt()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = ops::matmul(tensors.get(B)?, &between(tensors)?)?;
        Ok(Merged::Factors { left, right: tensors.get(A)?.clone(), scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, numbers, tying, dropout, .. } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("u", json!(numbers)),
                ("weight_tying", json!(tying)),
                ("tinylora_dropout", json!(dropout)),
                ("projection_seed", json!(42)),
                ("save_projection", json!(true)),
                ("init_v_bound", json!(0.02)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(vec![(V, "base_model.tinylora_v.")]) })
    }
}

impl RowMap for Tinylora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&ops::linear(&h_tr, &between(tensors)?, None)?, tensors.get(B)?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT TinyLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("save_projection", true, "so the random matrices are not in the folder; save it with them");
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("numbers", json!(keys.get("u", own.numbers))),
        ("tying", json!(keys.get("weight_tying", own.tying))),
        ("dropout", json!(keys.get("tinylora_dropout", own.dropout))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Tinylora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn groups_follow_each_other_and_the_last_takes_what_is_left() {
        let of = |all: usize, tying: f64| (0..all).map(|index| group(index, all, tying)).collect::<Vec<_>>();
        assert_eq!(of(5, 0.0), [0, 1, 2, 3, 4]);
        assert_eq!(of(5, 1.0), [0; 5]);
        assert_eq!(of(4, 0.5), [0, 0, 1, 1]);
        // 2.5 groups are 2, and 3.5 are 4.
        assert_eq!(of(5, 0.5), [0, 0, 1, 1, 1]);
        assert_eq!(of(7, 0.5), [0, 1, 2, 3, 3, 3, 3]);
    }

    #[test]
    fn the_matrix_between_is_the_sum_by_hand() {
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let (v, p) = (normal("v", &[4]), normal("p", &[4, 3, 3]));
        let found = between(&Locals::new("up", [(V, v.clone()), (P, p.clone())])).unwrap().to_vec2::<f64>().unwrap();
        let (v, p) = (v.to_vec1::<f64>().unwrap(), p.to_vec3::<f64>().unwrap());
        for (row, col) in (0..3).flat_map(|row| (0..3).map(move |col| (row, col))) {
            let by_hand: f64 = (0..4).map(|n| v[n] * p[n][row][col]).sum();
            assert!((found[row][col] - by_hand).abs() < 1e-12);
        }
    }

    #[test]
    fn a_folder_without_its_random_matrices_is_refused() {
        let config = json!({"peft_type": "TINYLORA", "save_projection": false});
        let faults = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`save_projection` is false, so the random"), "{}", faults[0]);
    }
}
