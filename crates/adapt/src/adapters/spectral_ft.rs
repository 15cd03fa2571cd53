//! Changes a weight's leading singular vectors themselves, by low-rank matrices of their own, and leaves the values between them; where a task
//! needs the base's strongest directions turned to other ones.
//!
//! # Update
//! ```text
//! W_oi = U_op diag(S_p) V_pi + rest                         W'_oi = (U + F)_op diag(S_p) (V + G)_pi + rest
//! F_op = X_oq Y_qp,  G_pi = P_pq Q_qi                        or, with `inner_rank` 0, F and G themselves
//! y_to = x_ti W_oi^T + (x_ti R^T) L^T                       L = [X, U diag(S) P],  R = [Y diag(S) (V + G); Q]
//! with `truncate_residual`                                  W'_oi without `rest`
//! ```
//!
//! # Symbols
//! `spectral_left_outer` `X_oq` and `spectral_right_outer` `P_pq`, uniform in ±1/sqrt(q) at the start, `spectral_left_inner` `Y_qp` and
//! `spectral_right_inner` `Q_qi`, 0 at the start; or `spectral_left` `F_op` and `spectral_right` `G_pi`, 0 at the start; f32, trained. `spectral_U`,
//! `spectral_S`, `spectral_V` of the p largest singular values never train.
//!
//! # Cost
//! `q (i+o) + 2 p q` parameters per linear, or `p (i+o)`, and `p (i+o+1)` numbers that never train beside them. `4 q (i+o)` extra FLOPs per token
//! forward, and some `4 q p (i+o)` a pass; where that is more than a weight's, the pass makes another weight. A decomposition of each weight
//! before the first step.
//!
//! # Limits
//! With F = G = 0 it is the base, bit for bit; with `truncate_residual` the nearest weight of rank p to it. What a weight does between directions that are none of the p changes only where both ends do,
//! by `F diag(S) G`. With all directions and `inner_rank` 0 it is any change of both sides' vectors.
//!
//! # Departures
//! The authors' code leaves the rest of the weight out, so that it starts as an approximation of the base; here the rest stays, as in the
//! paper's equation, unless `truncate_residual` says otherwise. Vectors are kept with the adapter.
//!
//! # Paper
//! Spectral-Aware Low-Rank Adaptation for Speaker Verification. Li, Mak, Pilanci, Lee, Meng, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::hadamard::thin;
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own, spectral};

const U: &str = "spectral_U";
const S: &str = "spectral_S";
const V: &str = "spectral_V";
const LEFT_OUTER: &str = "spectral_left_outer";
const LEFT_INNER: &str = "spectral_left_inner";
const RIGHT_OUTER: &str = "spectral_right_outer";
const RIGHT_INNER: &str = "spectral_right_inner";
const LEFT: &str = "spectral_left";
const RIGHT: &str = "spectral_right";

/// Parameters of SpectralFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many singular directions change, those of the largest values; 0 for all.
    #[schemars(range(min = 0, max = 65536))]
    rank: u32,
    /// Rank of the change of their vectors on either side; 0 for any change of them.
    #[schemars(range(min = 0, max = 4096))]
    inner_rank: u32,
    /// Rounds of a randomised decomposition, which is much faster than the exact one where `rank` is small; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
    /// Leaves out what the weight has beyond these directions, so that it starts as the nearest one of their rank.
    truncate_residual: bool,
}

impl Default for Config {
    /// The paper's values, and all of the weight.
    fn default() -> Self {
        Self { rank: 256, inner_rank: 16, iterations: None, truncate_residual: false }
    }
}

pub(super) struct SpectralFt {
    config: Config,
}

impl Method for SpectralFt {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Spectral-Aware Low-Rank Adaptation for Speaker Verification",
            authors: "Zhe Li, Man-Wai Mak, Mert Pilanci, Hung-yi Lee, Helen Meng",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(inner_rank == 0, (rank + (rank == 0)*min(o, i))*(i + o), inner_rank*(i + o + 2*(rank + (rank == 0)*min(o, \
                     i))))",
        fixed: "(rank + (rank == 0)*min(o, i))*(i + o + 1)",
        start_numbers: "52*o*i",
        merges: Merges::Factors,
        ..Card::new(
            "spectral-ft",
            Point::Adapter,
            "Changes a weight's leading singular vectors themselves, by low-rank matrices of their own, and leaves the values \
             between them; where a task needs the base's strongest directions turned to other ones.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl SpectralFt {
    /// Whether rows go through the factors of the change at a site, instead of through another weight.
    fn is_thin(&self, at: &Attachment) -> bool {
        let shape = |local| at.tensors.iter().find(|spec| spec.local == local).map(|spec| spec.shape.as_slice());
        match (shape(U), shape(V), self.config.inner_rank as usize) {
            (Some(&[o, p]), Some(&[_, i]), 0) => thin(2 * p, (o, i)),
            (Some(&[o, _]), Some(&[_, i]), q) => thin(2 * q, (o, i)),
            _ => false,
        }
    }

    /// What the change is the product of, twice as wide as what trains on either side.
    ///
    /// `(U + F) S (V + G) - U S V = F S (V + G) + U S G`, of which each product has a thin factor where F and G are products.
    fn factors(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let (u_op, s_p, v_pi) = (tensors.get(U)?, tensors.get(S)?, tensors.get(V)?);
        let weighed_op = u_op.broadcast_mul(s_p)?;
        if self.config.inner_rank == 0 {
            let (f_op, g_pi) = (tensors.get(LEFT)?, tensors.get(RIGHT)?);
            let right = (v_pi + g_pi)?.broadcast_mul(&s_p.unsqueeze(1)?)?;
            return Ok((Tensor::cat(&[f_op, &weighed_op], 1)?, Tensor::cat(&[&right, g_pi], 0)?));
        }
        let (x_oq, y_qp) = (tensors.get(LEFT_OUTER)?, tensors.get(LEFT_INNER)?);
        let (p_pq, q_qi) = (tensors.get(RIGHT_OUTER)?, tensors.get(RIGHT_INNER)?);
        let y_qp = y_qp.broadcast_mul(s_p)?;
        let right_qi = (ops::matmul(&y_qp, v_pi)? + ops::matmul(&ops::matmul(&y_qp, p_pq)?, q_qi)?)?;
        Ok((Tensor::cat(&[x_oq, &ops::matmul(&weighed_op, p_pq)?], 1)?, Tensor::cat(&[&right_qi, q_qi], 0)?))
    }
}

impl Adapter for SpectralFt {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let q = self.config.inner_rank as usize;
        linears::attach(sites, |site, o, i| {
            let p = spectral::triples(self.config.rank, site, (o, i))?;
            if q > p {
                let message = format!("is {q}; {} has {p} directions that change, so it is at most that", site.id);
                return Err(Fault::new("inner_rank", message));
            }
            let trained = |local, shape: [usize; 2]| TensorSpec::trained(local, shape);
            let mut tensors = if q == 0 {
                vec![trained(LEFT, [o, p]), trained(RIGHT, [p, i])]
            } else {
                vec![
                    trained(LEFT_OUTER, [o, q]),
                    trained(LEFT_INNER, [q, p]),
                    trained(RIGHT_OUTER, [p, q]),
                    trained(RIGHT_INNER, [q, i]),
                ]
            };
            tensors.extend([TensorSpec::fixed(U, [o, p]), TensorSpec::fixed(S, [p]), TensorSpec::fixed(V, [p, i])]);
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let p = at.tensors.iter().find(|spec| spec.local == S).map_or(0, |spec| spec.shape[0]);
        let triples = spectral::leading(weight, p, self.config.iterations, rng)?;
        starts::each(at, rng, |spec| match spec.local {
            U => Start::Is(triples.u.clone()),
            S => Start::Is(triples.s.clone()),
            V => Start::Is(triples.v.clone()),
            LEFT_OUTER | RIGHT_OUTER => Start::kaiming(spec),
            _ => Start::Constant(0.0),
        })
    }

    fn truncates(&self) -> bool {
        self.config.truncate_residual
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if self.is_thin(at) && !self.config.truncate_residual { Port::Delta(self) } else { Port::Weight(self) }
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        if self.config.truncate_residual {
            let w_oi = weight.dense(tensors.get(S)?.dtype())?;
            return Ok(Merged::Weight { weight: WeightMap::graph(self, &w_oi, tensors)?, bias: None });
        }
        let (left, right) = self.factors(tensors)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for SpectralFt {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (left, right) = self.factors(tensors)?;
        Ok(ops::linear(&ops::linear(x_ti, &right, None)?, &left, None)?)
    }
}

impl WeightMap for SpectralFt {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (left, right) = self.factors(tensors)?;
        let change_oi = ops::matmul(&left, &right)?;
        if self.config.truncate_residual {
            let leading_oi = ops::matmul(&tensors.get(U)?.broadcast_mul(tensors.get(S)?)?, tensors.get(V)?)?;
            return Ok((leading_oi + change_oi)?);
        }
        Ok((w_oi + change_oi)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::linalg;
    use candle_core::DType;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// At a weight of 7 by 5, with its vectors in 64 bits and what trains drawn.
    fn moved(w: &Tensor, rank: u32, inner_rank: u32) -> (SpectralFt, Locals) {
        let (p, q) = (rank as usize, inner_rank as usize);
        let triples = linalg::svd(w).unwrap().truncated(p).unwrap();
        let mut locals = vec![(U, triples.u), (S, triples.s), (V, triples.v)];
        locals.extend(match q {
            0 => vec![(LEFT, normal("f", &[7, p])), (RIGHT, normal("g", &[p, 5]))],
            _ => vec![
                (LEFT_OUTER, normal("x", &[7, q])),
                (LEFT_INNER, normal("y", &[q, p])),
                (RIGHT_OUTER, normal("p", &[p, q])),
                (RIGHT_INNER, normal("q", &[q, 5])),
            ],
        });
        (SpectralFt { config: Config { rank, inner_rank, ..Config::default() } }, Locals::new("up", locals))
    }

    /// `(U + F) diag(S) (V + G)` and what is left of the weight, by hand.
    fn by_hand(w: &Tensor, locals: &Locals, inner_rank: u32) -> Tensor {
        let get = |name| locals.get(name).unwrap();
        let (f, g) = match inner_rank {
            0 => (get(LEFT).clone(), get(RIGHT).clone()),
            _ => (get(LEFT_OUTER).matmul(get(LEFT_INNER)).unwrap(), get(RIGHT_OUTER).matmul(get(RIGHT_INNER)).unwrap()),
        };
        let product = |u: &Tensor, v: &Tensor| u.broadcast_mul(get(S)).unwrap().matmul(v).unwrap();
        let rest = (w - product(get(U), get(V))).unwrap();
        (product(&(get(U) + f).unwrap(), &(get(V) + g).unwrap()) + rest).unwrap()
    }

    #[test]
    fn weight_rows_and_factors_are_those_of_the_changed_vectors() {
        let (w, x) = (normal("w", &[7, 5]), normal("rows", &[3, 5]));
        let (site, layout) = (SiteId::new("up"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 7, dropout: None, layout: &layout, rows: None };
        for (rank, inner_rank) in [(4, 2), (3, 0), (5, 0), (5, 1)] {
            let (spectral, locals) = moved(&w, rank, inner_rank);
            let expected = by_hand(&w, &locals, inner_rank);
            let made = WeightMap::graph(&spectral, &w, &locals).unwrap();
            assert!(largest(&(&made - &expected).unwrap()) < 1e-12, "{rank} {inner_rank}");
            let rows = RowMap::graph(&spectral, &x, &locals, &cx).unwrap();
            let delta = x.matmul(&(&expected - &w).unwrap().t().unwrap()).unwrap();
            assert!(largest(&(rows - delta).unwrap()) < 1e-12, "{rank} {inner_rank}");
        }
    }

    #[test]
    fn without_the_rest_it_is_the_changed_vectors_alone_and_starts_as_the_nearest_of_their_rank() {
        let w = normal("w", &[7, 5]);
        for inner_rank in [2, 0] {
            let (spectral, locals) = moved(&w, 3, inner_rank);
            let whole = WeightMap::graph(&spectral, &w, &locals).unwrap();
            let config = Config { truncate_residual: true, ..spectral.config };
            let alone = WeightMap::graph(&SpectralFt { config: config.clone() }, &w, &locals).unwrap();
            let triples = linalg::svd(&w).unwrap();
            let part = |start: usize, count: usize| {
                let of = triples.triples(start, count).unwrap();
                of.u.broadcast_mul(&of.s).unwrap().matmul(&of.v).unwrap()
            };
            // What is missing is the rest of the weight, whatever was learned.
            assert!(largest(&((whole - alone).unwrap() - part(3, 2)).unwrap()) < 1e-12);
            let still = locals.iter().map(|(name, tensor)| {
                let fixed = [U, S, V].contains(&name);
                (name, if fixed { tensor.clone() } else { tensor.zeros_like().unwrap() })
            });
            let still = Locals::new("up", still.collect::<Vec<_>>());
            let start = WeightMap::graph(&SpectralFt { config }, &w, &still).unwrap();
            assert!(largest(&(start - part(0, 3)).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn columns_stay_among_those_of_the_vectors_and_of_what_is_added_to_them() {
        let w = normal("w", &[7, 5]);
        let (spectral, locals) = moved(&w, 3, 2);
        let change = (WeightMap::graph(&spectral, &w, &locals).unwrap() - &w).unwrap();
        let span = Tensor::cat(&[locals.get(U).unwrap(), locals.get(LEFT_OUTER).unwrap()], 1).unwrap();
        let (q, _) = linalg::qr(&span).unwrap();
        let within = q.matmul(&q.t().unwrap()).unwrap().matmul(&change).unwrap();
        assert!(largest(&(within - &change).unwrap()) < 1e-12);
    }

    #[test]
    fn with_all_directions_and_any_change_every_pair_of_vectors_is_reached() {
        let w = normal("w", &[7, 5]);
        let (spectral, locals) = moved(&w, 5, 0);
        let get = |name| locals.get(name).unwrap();
        let (u, v) = (normal("u", &[7, 5]), normal("v", &[5, 5]));
        let to = [(LEFT, (&u - get(U)).unwrap()), (RIGHT, (&v - get(V)).unwrap())];
        let fixed = [U, S, V].map(|name| (name, get(name).clone()));
        let made = WeightMap::graph(&spectral, &w, &Locals::new("up", to.into_iter().chain(fixed))).unwrap();
        let target = u.broadcast_mul(get(S)).unwrap().matmul(&v).unwrap();
        assert!(largest(&(made - target).unwrap()) < 1e-12);
    }

    #[test]
    fn it_starts_as_the_weight_and_more_inner_rank_than_directions_is_refused() {
        let w = normal("w", &[7, 5]);
        for (rank, inner_rank) in [(4, 2), (0, 0)] {
            let spectral = SpectralFt { config: Config { rank, inner_rank, ..Config::default() } };
            let sites = Site {
                kind: attune_architecture::SiteKind::Linear { output: 7, input: 5, bias: false, transposed: false },
                ..site()
            };
            let at = spectral.attach(&architecture(), &[sites]).unwrap().remove(0);
            let (locals, _) = spectral.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
            let narrow = w.to_dtype(DType::F32).unwrap();
            let made = WeightMap::graph(&spectral, &narrow, &locals).unwrap();
            assert_eq!(made.to_vec2::<f32>().unwrap(), narrow.to_vec2::<f32>().unwrap());
        }
        let spectral = SpectralFt { config: Config { rank: 2, inner_rank: 3, ..Config::default() } };
        let fault = spectral.attach(&architecture(), &[site()]).unwrap_err().remove(0).to_string();
        assert!(fault.starts_with("`inner_rank` is 3; model.layers.0.self_attn.q_proj has 2 directions"), "{fault}");
    }

    fn architecture() -> Architecture {
        let config = br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 8,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#;
        Architecture::from_json(config).unwrap()
    }

    fn site() -> Site {
        architecture().sites().into_iter().find(|site| site.id.as_str().ends_with("q_proj")).unwrap()
    }
}
