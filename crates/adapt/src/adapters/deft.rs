//! Takes a few directions out of what a linear gives and puts a trained map in their place; where something new shall replace what a model
//! knows in a small subspace, and the rest stay.
//!
//! # Update
//! ```text
//! W'_oi = W_oi - Q_or N_or^T W_oi + s · Q_or R_ri              y_to = x_ti W'_oi^T            s = alpha / rank, 1 without alpha
//! Q = P, N = max(P, 0)                                         projector: relu
//! Q = N = the orthonormal columns of P = Q T, T triangular     projector: qr
//! ```
//! With `remove_only` there is no R.
//!
//! # Symbols
//! `deft_P` `P_or`, f32, trained, normal with standard deviation 0.02 at the start; `deft_R` `R_ri`, f32, trained, starts as `N^T W / s`, so that what is taken out is put
//! back. The signs of Q are those of LAPACK's elimination by reflections, on which the meaning of R depends.
//!
//! # Cost
//! `rank (i+o)` parameters per linear, `rank o` with `remove_only`. Each pass makes `W'` twice, forward and reverse, `4 rank o i` FLOPs each, and the gradient by it, `2 i o` FLOPs
//! per token. With `qr` some `rank²/2` small operations on columns besides.
//!
//! # Limits
//! It starts as the base, bit for bit where `s` is 1; with `remove_only` it does not. With `qr` and `remove_only` the weight's rows have no part in the span of P: what the
//! linear gives is orthogonal to it.
//!
//! # Departures
//! none; agrees with PEFT, but for its dropout before R: input goes through one weight here. A rank beyond the output width is refused, where PEFT lowers it.
//!
//! # Paper
//! DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models. Kumar, Anwer, Shahbaz Khan, Khan, Laptev, Cholakkal, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears, orthogonal};

const P: &str = "deft_P";
const R: &str = "deft_R";
const PEFT_TYPE: &str = "DEFT";

/// What is taken out by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Projector {
    /// `P max(P, 0)^T`.
    #[default]
    Relu,
    /// The projection onto the span of P.
    Qr,
}

/// Parameters of DEFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many directions.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// What is taken out by.
    projector: Projector,
    /// Numerator of the scaling of what is put in; the scaling is 1 if it is left out.
    #[schemars(range(min = 1e-6, max = 1e6))]
    alpha: Option<f64>,
    /// Puts nothing in the place of what is taken out.
    remove_only: bool,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 8, projector: Projector::Relu, alpha: None, remove_only: false }
    }
}

pub(super) struct Deft {
    config: Config,
}

impl Method for Deft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models",
            authors: "Komal Kumar, Rao Muhammad Anwer, Fahad Shahbaz Khan, Salman Khan, Ivan Laptev, Hisham Cholakkal",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(o + if(remove_only, 0, i))",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "deft",
            Point::Adapter,
            "Takes a few directions out of what a linear gives and puts a trained map in their place; where something new shall \
             replace what a model knows in a small subspace, and the rest stay.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Deft {
    fn scale(&self) -> f64 {
        self.config.alpha.map_or(1.0, |alpha| alpha / f64::from(self.config.rank))
    }

    /// `Q_or` and `N_or^T W_oi`.
    fn taken(&self, p_or: &Tensor, w_oi: &Tensor) -> attune_points::Result<(Tensor, Tensor)> {
        let (q_or, n_or) = match self.config.projector {
            Projector::Relu => (p_or.clone(), p_or.relu()?),
            Projector::Qr => {
                let q_or = orthogonal::columns(p_or)?;
                (q_or.clone(), q_or)
            }
        };
        let out_ri = ops::matmul(&n_or.t()?.contiguous()?, &w_oi.contiguous()?)?;
        Ok((q_or, out_ri))
    }
}

impl Adapter for Deft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let r = self.config.rank as usize;
        linears::attach(sites, |site, o, i| {
            if r > o {
                let message = format!("is {r}; {} gives {o} numbers, so {o} is the most", site.id);
                return Err(Fault::new("rank", message));
            }
            let put = (!self.config.remove_only).then(|| TensorSpec::trained(R, [r, i]));
            Ok([TensorSpec::trained(P, [o, r])].into_iter().chain(put).collect())
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (started, _) = starts::each(at, rng, |_| Start::Normal(0.02))?;
        let p_or = started.get(P)?.clone();
        let (_, out_ri) = self.taken(&p_or, &weight.dense(DType::F32)?)?;
        let put_ri = (out_ri / self.scale())?;
        starts::each(at, rng, |spec| Start::Is(if spec.local == P { p_or.clone() } else { put_ri.clone() }))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(P)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, projector, alpha, remove_only } = self.config;
        let own = json!({
            "r": rank,
            "decomposition_method": projector,
            "alpha": alpha.map(keys::number),
            "para": remove_only,
            "init_scale": 1.0,
            "deft_dropout": 0.0,
            "fan_in_fan_out": false,
            "bias": "none",
            "init_weights": true,
        });
        Some(foreign::peft(PEFT_TYPE, &own, vec![(P, P), (R, R)]))
    }
}

impl WeightMap for Deft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (q_or, out_ri) = self.taken(tensors.get(P)?, w_oi)?;
        let change_ri = if self.config.remove_only {
            out_ri.neg()?
        } else {
            match self.scale() {
                // What was put back at the start is what is taken out, to the bit.
                1.0 => (tensors.get(R)? - out_ri)?,
                scale => ((tensors.get(R)? * scale)? - out_ri)?,
            }
        };
        Ok((w_oi + ops::matmul(&q_or, &change_ri)?)?)
    }
}

/// What `adapter_config.json` of a PEFT DEFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.no_dropout("deft_dropout");
    let alpha: Option<f64> = keys.get("alpha", None);
    let mut params = Map::from_iter([
        ("rank".to_owned(), json!(keys.get("r", own.rank))),
        ("projector".to_owned(), json!(keys.get("decomposition_method", own.projector))),
        ("remove_only".to_owned(), json!(keys.get("para", own.remove_only))),
    ]);
    // 0 is as good as none there.
    params.extend(alpha.filter(|alpha| *alpha != 0.0).map(|alpha| ("alpha".to_owned(), json!(alpha))));
    keys.finish()?;
    Ok((MethodRef { method: Deft::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn of(projector: Projector, alpha: Option<f64>, remove_only: bool) -> Deft {
        Deft { config: Config { rank: 2, projector, alpha, remove_only } }
    }

    #[test]
    fn it_is_one_minus_the_projector_and_what_is_put_in() {
        let (w, p, r) = (normal("w", &[5, 4]), normal("p", &[5, 2]), normal("r", &[2, 4]));
        let locals = Locals::new("up", [(P, p.clone()), (R, r.clone())]);
        let made = of(Projector::Relu, Some(6.0), false).graph(&w, &locals).unwrap().to_vec2::<f64>().unwrap();
        let [w, p, r] = [w, p, r].map(|x| x.to_vec2::<f64>().unwrap());
        for (o, i) in (0..5).flat_map(|o| (0..4).map(move |i| (o, i))) {
            let projector = |from: usize| -> f64 { (0..2).map(|k| p[o][k] * p[from][k].max(0.0)).sum() };
            let kept: f64 = w[o][i] - (0..5).map(|from| projector(from) * w[from][i]).sum::<f64>();
            let put: f64 = (0..2).map(|k| 3.0 * p[o][k] * r[k][i]).sum();
            assert!((made[o][i] - kept - put).abs() < 1e-12);
        }
    }

    #[test]
    fn what_is_only_taken_out_by_the_span_is_gone() {
        let (w, p) = (normal("w", &[5, 4]), normal("p", &[5, 2]));
        let made = of(Projector::Qr, None, true).graph(&w, &Locals::new("up", [(P, p.clone())])).unwrap();
        assert!(largest(&p.t().unwrap().matmul(&made).unwrap()) < 1e-12);
        assert!(largest(&(made - w).unwrap()) > 0.1);
    }

    #[test]
    fn it_starts_by_putting_back_what_it_takes_out() {
        let w = normal("w", &[5, 4]).to_dtype(DType::F32).unwrap();
        let at = |deft: &Deft| {
            let tensors = vec![TensorSpec::trained(P, [5, 2]), TensorSpec::trained(R, [2, 4])];
            let at = Attachment { site: SiteId::new("up"), tensors };
            let (locals, _) = deft.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
            let off = (deft.graph(&w, &locals).unwrap() - &w).unwrap();
            largest(&off.to_dtype(DType::F64).unwrap())
        };
        for projector in [Projector::Relu, Projector::Qr] {
            assert_eq!(at(&of(projector, None, false)), 0.0);
            assert!(at(&of(projector, Some(3.0), false)) < 1e-6);
        }
    }

    #[test]
    fn a_folder_with_dropout_is_refused() {
        let config = json!({"peft_type": "DEFT", "deft_dropout": 0.5});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert_eq!(faults[0].path.to_string(), "deft_dropout");
    }
}
