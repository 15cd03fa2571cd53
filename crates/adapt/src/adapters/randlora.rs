//! A sum of random low-rank matrices, each scaled by trained diagonals: a change of full rank from few numbers; where LoRA's rank is what
//! holds a task back.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + s · Q_(max)k P_k(min)                          the wider side of W by rows of Q; s = alpha / r
//! P_(r n)j = Λ_rn A_rj Γ_nj                                     j < min(o, i),  n < ceil(min(o, i) / r)
//! Q_m(n r) = B_mnr                                              m < max(o, i)
//! y_to  = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `randlora_lambda` `Λ_rn` and `randlora_gamma` `Γ_nj` at each linear, f32, trained; Λ starts at 0, Γ at 1/j's number. `randlora_A`
//! `A_rj` as `[r, 1, min]` and `randlora_B` `B_mnr` as `[max, n, r]`, as wide as the widest of the linears, one pair for the whole
//! slot, random once with standard deviation 1 and fixed; they are kept with the adapter.
//!
//! # Cost
//! `n*(r + min(o, i))` parameters per linear, and the pair. Each pass makes `W'` twice (forward and reverse), `4 o i min(o, i)` FLOPs,
//! and the gradient by it, which is less than rows through both matrices cost where these are more than the widths.
//!
//! # Limits
//! With Λ = 0 it is the base. The change has full rank for almost all Λ and Γ.
//!
//! # Departures
//! none; agrees with PEFT, by which rows of P are counted along n first and columns of Q along r first, so that a matrix of the sum is of
//! numbers of several random ones. PEFT's dropout it does not have: its input goes through one weight. The pair is written once,
//! where PEFT repeats it at each linear; reading it, PEFT warns of that and computes the same.
//!
//! # Paper
//! RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models. Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel,
//! Abbasnejad, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, WeightMap};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::linears;
use crate::parts::starts::{self, Start};

const A: &str = "randlora_A";
const B: &str = "randlora_B";
const LAMBDA: &str = "randlora_lambda";
const GAMMA: &str = "randlora_gamma";

/// What the random matrices are made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Bases {
    /// Numbers of all sizes.
    #[default]
    Dense,
    /// A sixth of -1 and of 1 each, and 0.
    Sparse,
    /// One of 2 √d of -1 and of 1 each, d the narrowest width, and 0.
    VerySparse,
}

/// Parameters of RandLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of each random matrix: the smaller it is, the more parameters train.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// What the random matrices are made of.
    bases: Bases,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 32, alpha: 640.0, bases: Bases::Dense }
    }
}

pub(super) struct Randlora {
    config: Config,
}

impl Method for Randlora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models",
            authors: "Paul Albert, Frederic Z. Zhang, Hemanth Saratchandran, Cristian Rodriguez-Opazo, Anton van den Hengel, Ehsan \
                      Abbasnejad",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "ceil(min(o, i)/rank)*(rank + min(o, i))",
        fixed_shared: "rank*min(o, i) + max(o, i)*rank*ceil(min(o, i)/rank)",
        merges: Merges::Weight,
        peft_type: Some("RANDLORA"),
        ..Card::new(
            "randlora",
            Point::Adapter,
            "A sum of random low-rank matrices, each scaled by trained diagonals: a change of full rank from few numbers; where \
             LoRA's rank is what holds a task back.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Randlora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let r = self.config.rank as usize;
        let (o, i) = linears::widest(sites);
        let (least, most) = (o.min(i), o.max(i));
        let shared = |local, shape: [usize; 3]| TensorSpec { scope: Scope::Model, ..TensorSpec::fixed(local, shape) };
        linears::attach(sites, |_, o, i| {
            let (n, min) = (o.min(i).div_ceil(r), o.min(i));
            Ok(vec![
                TensorSpec::trained(LAMBDA, [r, n]),
                TensorSpec::trained(GAMMA, [n, min]),
                shared(A, [r, 1, least]),
                shared(B, [most, least.div_ceil(r), r]),
            ])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let least = at.tensors.iter().find(|spec| spec.local == A).map_or(1, |spec| spec.shape[2]);
        let random = |local: &str| -> attune_points::Result<Tensor> {
            let spec = at.tensors.iter().find(|spec| spec.local == local);
            let shape = spec.map_or(Vec::new(), |spec| spec.shape.clone());
            self.random(&shape, least, &mut rng.named(local))
        };
        let (a, b) = (random(A)?, random(B)?);
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Is(a.clone()),
            B => Start::Is(b.clone()),
            LAMBDA => Start::Constant(0.0),
            _ => Start::Constant(1.0 / spec.shape[0].max(spec.shape[1]) as f64),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(LAMBDA)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, alpha, bases } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("randlora_alpha", keys::number(alpha)),
                ("sparse", json!(bases == Bases::Sparse)),
                ("very_sparse", json!(bases == Bases::VerySparse)),
                ("randlora_dropout", json!(0.0)),
                ("projection_prng_key", json!(0)),
                ("save_projection", json!(true)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        let shared = vec![(A, "base_model.randlora_A"), (B, "base_model.randlora_B")];
        Some(Peft { config, tensors: PeftTensors::Each(shared) })
    }
}

impl Randlora {
    /// Random numbers with standard deviation 1; `least` is the narrowest width.
    fn random(&self, shape: &[usize], least: usize, rng: &mut Rng) -> attune_points::Result<Tensor> {
        // Where a number between 0 and 1 is below this, or above 1 less this, it is -1, or 1.
        let share = match self.config.bases {
            Bases::Dense => None,
            Bases::Sparse => Some(1.0 / 6.0),
            Bases::VerySparse => Some(0.5 / (least as f64).sqrt()),
        };
        let value = |u: f64| match share {
            None => 2.0 * u - 1.0,
            Some(share) => f64::from(i8::from(u > 1.0 - share) - i8::from(u < share)),
        };
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| value(rng.uniform())).collect();
        let n = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / n;
        let std = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt();
        // A tiny matrix may be 0 throughout.
        let by = if std > 0.0 { 1.0 / std } else { 1.0 };
        let values: Vec<f32> = values.into_iter().map(|value| (value * by) as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

impl WeightMap for Randlora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let ((o, i), scale) = (w_oi.dims2()?, self.config.alpha / f64::from(self.config.rank));
        let (lambda_rn, gamma_nj) = (tensors.get(LAMBDA)?, tensors.get(GAMMA)?);
        let ((r, n), min) = (lambda_rn.dims2()?, o.min(i));
        let a_r1j = tensors.get(A)?.narrow(2, 0, min)?;
        // A, once for each basis: its rows times lambda, and all bases' columns side by side times gamma.
        let a_kj = a_r1j.broadcast_as((r, n, min))?.contiguous()?.reshape((r * n, min))?;
        let by_lambda = ops::scale_rows(&a_kj, &(lambda_rn.contiguous()? * scale)?)?.reshape((r, n * min))?;
        let p_kj = ops::scale_columns(&by_lambda, gamma_nj)?.reshape((r * n, min))?;
        let q = tensors.get(B)?.narrow(0, 0, o.max(i))?.narrow(1, 0, n)?.contiguous()?;
        let change_mj = ops::matmul(&q.reshape((o.max(i), n * r))?, &p_kj)?;
        Ok(if i <= o { (w_oi + change_mj)? } else { (w_oi + change_mj.t()?)? })
    }
}

/// What `adapter_config.json` of a PEFT RandLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("save_projection", true, "so the random matrices are not in the folder; save it with them");
    keys.no_dropout("randlora_dropout");
    let bases = match (keys.get("very_sparse", false), keys.get("sparse", false)) {
        (true, _) => Bases::VerySparse,
        (false, true) => Bases::Sparse,
        (false, false) => Bases::Dense,
    };
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("alpha", json!(keys.get("randlora_alpha", own.alpha))),
        ("bases", json!(bases)),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Randlora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn of(bases: Bases) -> Randlora {
        Randlora { config: Config { rank: 2, alpha: 3.0, bases } }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    #[test]
    fn the_change_is_the_sum_by_hand_whichever_side_is_wider() {
        // Bases for 7 by 6, of which a linear takes what it needs: 3 of rank 2 for 5.
        let (lambda, gamma) = (tensor("l", &[2, 3]), tensor("g", &[3, 5]));
        let (a, b) = (tensor("a", &[2, 1, 6]), tensor("b", &[7, 3, 2]));
        let locals =
            Locals::new("up", [(LAMBDA, lambda.clone()), (GAMMA, gamma.clone()), (A, a.clone()), (B, b.clone())]);
        let [lambda, gamma] = [lambda, gamma].map(|x| x.to_vec2::<f64>().unwrap());
        let [a, b] = [a, b].map(|x| x.to_vec3::<f64>().unwrap());
        for shape in [(7, 5), (5, 7), (5, 5)] {
            let w = tensor("w", &[shape.0, shape.1]);
            let change = (of(Bases::Dense).graph(&w, &locals).unwrap() - &w).unwrap();
            let wide = if shape.1 <= shape.0 { change } else { change.t().unwrap() };
            for (m, row) in wide.to_vec2::<f64>().unwrap().iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    // Rows of P count along n first, columns of Q along r first.
                    let part = |k: usize| b[m][k / 2][k % 2] * lambda[k / 3][k % 3] * a[k / 3][0][j] * gamma[k % 3][j];
                    let by_hand = 1.5 * (0..6).map(part).sum::<f64>();
                    assert!((value - by_hand).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn random_matrices_are_as_sparse_as_asked_and_have_one_spread() {
        for (bases, zeros) in [(Bases::Dense, 0.0), (Bases::Sparse, 2.0 / 3.0), (Bases::VerySparse, 0.9)] {
            let made = of(bases).random(&[100, 100], 100, &mut Rng::new(1, "random")).unwrap();
            let values: Vec<f32> = made.flatten_all().unwrap().to_vec1().unwrap();
            let share = values.iter().filter(|value| **value == 0.0).count() as f64 / 1e4;
            assert!((share - zeros).abs() < 0.02, "{bases:?}: {share}");
            let square = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / 1e4;
            assert!((square - 1.0).abs() < 0.01, "{bases:?}: {square}");
        }
    }
}
