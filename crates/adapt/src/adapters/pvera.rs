//! Random matrices that all linears share, and two trained vectors at each, of which one makes a mean and a spread of what lies between the
//! matrices: noise of trained size in training, the mean afterwards; where few parameters learn from little data.
//!
//! # Update
//! ```text
//! μ_tr, ℓ_tr = (x_ti A_ni^T) ∘ d_n                     the first and the second r of n = 2 r
//! z_tr = μ_tr + exp(ℓ_tr / 2) ∘ ε_tr                   ε normal in training, 0 else
//! y_to = x_ti W_oi^T + b_o ∘ (z_tr B_or^T)
//! ```
//!
//! # Symbols
//! `pvera_lambda_b` `b_o` and `pvera_lambda_d` `d_n` at each linear, f32, trained; b starts at 0, d at `d_initial`. `pvera_A` `A_ni` and `pvera_B` `B_or`, as wide as the widest of the
//! linears, one pair for the whole slot, random once, uniform in ±sqrt(6 / width), and fixed; they are kept with the adapter. `ε` is keyed by the job's seed, the step, the
//! site, and which example's which position a row is.
//!
//! # Cost
//! `o + 2 rank` parameters per linear, and the pair. `2 rank (2 i + o)` extra FLOPs per token in training, and `rank` normal numbers.
//! A step takes some 2.7 of LoRA's: each row's own noise lies between the random matrices, so that they make no weight, and rows go
//! through rank 256, sixteen times LoRA's, the first matrix twice as tall as VeRA's.
//!
//! # Limits
//! With b = 0 it is the base, noise or none. Without noise it is two vectors around random matrices, and merges as such; the second half of d has no effect then.
//!
//! # Departures
//! none; agrees with PEFT, whose noise in evaluation, where it is asked for, is not here. The pair is written once.
//!
//! # Paper
//! PVeRA: Probabilistic Vector-Based Random Matrix Adaptation. Fillioux, Ferrante, Cournède, Vakalopoulou, Christodoulidis, 2025.

use attune_architecture::{Architecture, Site};
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
use crate::parts::linears;
use crate::parts::starts::{self, Start};

const A: &str = "pvera_A";
const B: &str = "pvera_B";
const B_VECTOR: &str = "pvera_lambda_b";
const D_VECTOR: &str = "pvera_lambda_d";

/// Parameters of PVeRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of what lies between the shared matrices: much larger than a LoRA's rank.
    #[schemars(range(min = 1, max = 65536))]
    rank: u32,
    /// What the vector between them starts at.
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

pub(super) struct Pvera {
    config: Config,
}

impl Method for Pvera {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation",
            authors: "Leo Fillioux, Enzo Ferrante, Paul-Henry Cournède, Maria Vakalopoulou, Stergios Christodoulidis",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "o + 2*rank",
        fixed_shared: "rank*(2*i+o)",
        merges: Merges::Factors,
        peft_type: Some("PVERA"),
        ..Card::new(
            "pvera",
            Point::Adapter,
            "Random matrices that all linears share, and two trained vectors at each, of which one makes a mean and a spread of what \
             lies between the matrices: noise of trained size in training, the mean afterwards; where few parameters learn from little \
             data.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Pvera {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let r = self.config.rank as usize;
        let (widest_o, widest_i) = linears::widest(sites);
        let shared = |local, shape: [usize; 2]| TensorSpec { scope: Scope::Model, ..TensorSpec::fixed(local, shape) };
        linears::attach(sites, |_, o, _| {
            let vector = |local, n: usize| TensorSpec { decay: false, ..TensorSpec::trained(local, [n]) };
            let pair = [shared(A, [2 * r, widest_i]), shared(B, [widest_o, r])];
            Ok([vector(B_VECTOR, o), vector(D_VECTOR, 2 * r)].into_iter().chain(pair).collect())
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
        let (r, (o, i)) = (self.config.rank as usize, weight.shape());
        let left = tensors.get(B)?.narrow(0, 0, o)?.broadcast_mul(&tensors.get(B_VECTOR)?.unsqueeze(1)?)?;
        let a_ri = tensors.get(A)?.narrow(0, 0, r)?.narrow(1, 0, i)?;
        let right = a_ri.broadcast_mul(&tensors.get(D_VECTOR)?.narrow(0, 0, r)?.unsqueeze(1)?)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, d_initial, dropout } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("d_initial", json!(d_initial)),
                ("pvera_dropout", json!(dropout)),
                ("projection_prng_key", json!(0)),
                ("save_projection", json!(true)),
                ("sample_at_inference", json!(false)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        let shared = vec![(A, "base_model.pvera_A"), (B, "base_model.pvera_B")];
        Some(Peft { config, tensors: PeftTensors::Each(shared) })
    }
}

impl RowMap for Pvera {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (r, i) = (self.config.rank as usize, x_ti.dim(1)?);
        let (b_o, d_n) = (tensors.get(B_VECTOR)?, tensors.get(D_VECTOR)?);
        // Only the mean without noise.
        let n = if cx.dropout.is_some() { 2 * r } else { r };
        let a_ni = tensors.get(A)?.narrow(0, 0, n)?.narrow(1, 0, i)?.contiguous()?;
        let x_ti = dropped(x_ti, self.config.dropout, cx)?;
        let h_tn = ops::scale_columns(&ops::linear(&x_ti, &a_ni, None)?, &d_n.narrow(0, 0, n)?)?;
        let z_tr = match cx.dropout {
            None => h_tn,
            Some(masks) => {
                let (mean_tr, log_tr) = (h_tn.narrow(1, 0, r)?, h_tn.narrow(1, r, r)?);
                let noise_tr = masks.noise(cx.site, r, &x_ti)?;
                (mean_tr + ((log_tr * 0.5)?.exp()? * noise_tr)?)?
            }
        };
        let b_or = tensors.get(B)?.narrow(0, 0, b_o.dim(0)?)?;
        Ok(ops::scale_columns(&ops::linear(&z_tr.contiguous()?, &b_or.contiguous()?, None)?, b_o)?)
    }
}

/// What `adapter_config.json` of a PEFT PVeRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("save_projection", true, "so the random matrices are not in the folder; save it with them");
    keys.only("sample_at_inference", false, "so it answers at random; this version answers by the mean");
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("d_initial", json!(keys.get("d_initial", own.d_initial))),
        ("dropout", json!(keys.get("pvera_dropout", own.dropout))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Pvera::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_points::adapter::DropoutMask;
    use attune_tensor::autograd;
    use candle_core::DType;

    use super::*;

    struct Noise(Tensor);

    impl DropoutMask for Noise {
        fn mask(&self, _: &SiteId, _: usize, _: f64, like: &Tensor) -> attune_points::Result<Tensor> {
            Ok(like.ones_like()?)
        }

        fn noise(&self, _: &SiteId, width: usize, _: &Tensor) -> attune_points::Result<Tensor> {
            assert_eq!(width, 2);
            Ok(self.0.clone())
        }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn added(d_n: &Tensor, noise: Option<&Noise>) -> Tensor {
        let pvera = Pvera { config: Config { rank: 2, ..Config::default() } };
        let locals = Locals::new(
            "up",
            [
                (A, tensor("a", &[4, 6])),
                (B, tensor("b", &[7, 2])),
                (B_VECTOR, tensor("bo", &[3])),
                (D_VECTOR, d_n.clone()),
            ],
        );
        let (site, layout) = (SiteId::new("up"), Layout::new());
        let dropout = noise.map(|noise| noise as &dyn DropoutMask);
        let cx = RowCx { site: &site, output: 3, dropout, layout: &layout, rows: None };
        pvera.graph(&tensor("x", &[5, 4]), &locals, &cx).unwrap()
    }

    #[test]
    fn it_is_mean_and_spread_by_hand() {
        let (d, noise) = (tensor("d", &[4]), Noise(tensor("noise", &[5, 2])));
        let (with, without) = (added(&d, Some(&noise)), added(&d, None));
        let [x, a, b, e] = [tensor("x", &[5, 4]), tensor("a", &[4, 6]), tensor("b", &[7, 2]), noise.0]
            .map(|x| x.to_vec2::<f64>().unwrap());
        let [d, bo] = [d, tensor("bo", &[3])].map(|x| x.to_vec1::<f64>().unwrap());
        let (with, without) = (with.to_vec2::<f64>().unwrap(), without.to_vec2::<f64>().unwrap());
        for (t, o) in (0..5).flat_map(|t| (0..3).map(move |o| (t, o))) {
            let h = |n: usize| d[n] * (0..4).map(|i| x[t][i] * a[n][i]).sum::<f64>();
            let mean: f64 = (0..2).map(|r| bo[o] * b[o][r] * h(r)).sum();
            let spread: f64 = (0..2).map(|r| bo[o] * b[o][r] * (h(2 + r) / 2.0).exp() * e[t][r]).sum();
            assert!((without[t][o] - mean).abs() < 1e-12 && (with[t][o] - mean - spread).abs() < 1e-12);
        }
    }

    /// With given noise the gradient by the vector of mean and spread is that of central differences.
    #[test]
    fn the_spread_is_learned_through_the_noise() {
        let (d, noise, along) = (tensor("d", &[4]), Noise(tensor("noise", &[5, 2])), tensor("along", &[4]));
        let (dy, leaf) = (tensor("dy", &[5, 3]), autograd::leaf(&d).unwrap());
        let made = added(leaf.as_tensor(), Some(&noise));
        let gradient = autograd::pull(&[&leaf], &[(&made, &dy)]).unwrap().remove(0).unwrap();
        let sum = |x: Tensor| x.sum_all().unwrap().to_scalar::<f64>().unwrap();
        let at = |step: f64| sum((added(&(&d + (&along * step).unwrap()).unwrap(), Some(&noise)) * &dy).unwrap());
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((numeric - sum((&gradient * &along).unwrap())).abs() < 1e-7 * (1.0 + numeric.abs()));
        assert!(gradient.to_vec1::<f64>().unwrap()[2..].iter().all(|spread| spread.abs() > 1e-3));
    }

    #[test]
    fn a_folder_that_answers_at_random_is_refused() {
        let config = json!({"peft_type": "PVERA", "sample_at_inference": true, "save_projection": false});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        let paths: Vec<String> = faults.iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(paths, ["save_projection", "sample_at_inference"]);
    }
}
