//! Sparse rotations and scales in a basis that the same linear of all layers has in common: a change of full rank from few
//! numbers, which starts along what the weights read.
//!
//! # Update
//! ```text
//! W_oi = U_oi diag(μ_i) V_ii^T          V one for all linears of a kind; columns of U of length 1
//! W'   = U (diag(λ) + S_ii) V^T          S sparse, its diagonal 0
//! y_to = x_ti W_oi^T + ((drop(x_ti) V) (diag(λ - μ) + S)^T) U^T
//! ```
//!
//! # Symbols
//! `frod_lambda_l` `λ_i`, f32, trained, `μ` at the start; `frod_lambda_s_values`, the entries of S, f32, trained, 0;
//! `frod_s_indices` their places, `[2, entries]`, one for a kind, drawn once. `frod_U` `U`, `frod_start` `μ` and `frod_V` `V`,
//! one for a kind, never train. `V = R^T E` of the triangle R of all the kind's weights, one below the other, `[W_1; …] = Q R`,
//! and the eigenvectors E of the mean of `(Q_l^T Q_l + π 1)^-1`, π `regularization`; of fewer rows than columns, the eigenvectors
//! of `R^T R`. Then `U diag(μ) = W V^-T`.
//!
//! # Cost
//! `i + entries` parameters per linear, `density i i` entries; `i (o + i)` numbers that never train beside them; `2 i (o + 2 i)`
//! extra FLOPs per token forward. Before the first step a decomposition for each kind of all its weights at once, and of `V` for
//! each weight.
//! Where it costs less, and nothing is dropped, a pass makes another weight in place of it, forward and in reverse, at `4 o i i` FLOPs each,
//! and the gradient by it. A step takes some 3.5 of LoRA's either way: the factors are square and as wide as the linear reads, and each
//! logical shard's gradient goes back through both.
//!
//! # Limits
//! With λ = μ and S = 0 it is the base, bit for bit. With all entries in S it is any change of a weight whose columns are
//! independent.
//!
//! # Departures
//! Adds what U and V make of the change, where PEFT computes the whole product by them: the same where they are the weight. V and
//! U are decomposed in 64 bits. PEFT keeps V and not U, which it computes of the base again, whose weights no reader of an
//! adapter has here: folders are in our own layout, with both.
//!
//! # Paper
//! FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence. Wan, Chen, Feng, Zhou, Xu, 2025.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap, WeightOf};
use attune_points::forms::{AsWeight, Cost};
use attune_points::params::Scope;
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own, sparse};

const SCALES: &str = "frod_lambda_l";
const VALUES: &str = "frod_lambda_s_values";
const PLACES: &str = "frod_s_indices";
const MU: &str = "frod_start";
const U: &str = "frod_U";
const V: &str = "frod_V";

/// Parameters of FRoD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of the entries of a square matrix, as wide as a linear's input, that train.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
    /// What keeps the mean over a kind's weights from those that are nearly alike.
    #[schemars(range(min = 1e-9, max = 1e3))]
    regularization: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { density: 0.01, regularization: 1e-3, dropout: 0.0 }
    }
}

pub(super) struct Frod {
    config: Config,
}

impl Method for Frod {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence",
            authors: "Guoan Wan, Tianyu Chen, Fangzheng Feng, Haoyi Zhou, Runhua Xu",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "i + if(density > 0, max(1, min(floor(i*i*density), i*i - i)), 0)",
        fixed: "o*i + (i*i + if(density > 0, 2*max(1, min(floor(i*i*density), i*i - i)), 0))/model_layers",
        graph_numbers: "17*i*i + 6*o*i",
        start_numbers: "49*i*i",
        merges: Merges::Weight,
        ..Card::new(
            "frod",
            Point::Adapter,
            "Sparse rotations and scales in a basis that the same linear of all layers has in common: a change of full rank from few \
             numbers, which starts along what the weights read.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// The kind of a linear: its path without the numbers in it.
fn kind(site: &str) -> String {
    site.split('.').filter(|part| part.parse::<u32>().is_err()).collect::<Vec<_>>().join(".")
}

/// What weights of a kind have in common, `[i, i]`.
fn basis(weights: &[Tensor], regularization: f64) -> attune_points::Result<Tensor> {
    let all = Tensor::cat(weights, 0)?;
    let (rows, i) = all.dims2()?;
    if rows < i {
        // They leave directions that nobody reads, of which any are as good.
        return Ok(linalg::eigen(&ops::matmul(&all.t()?, &all)?)?.vectors.t()?.contiguous()?);
    }
    let (q, r_ii) = linalg::qr(&all)?;
    let (mut sum, mut start) = (Tensor::zeros((i, i), DType::F64, &Device::Cpu)?, 0);
    let ridge = (Tensor::eye(i, DType::F64, &Device::Cpu)? * regularization)?;
    for weight in weights {
        let own = q.narrow(0, start, weight.dim(0)?)?.contiguous()?;
        start += weight.dim(0)?;
        sum = (sum + linalg::inverse(&(ops::matmul(&own.t()?, &own)? + &ridge)?)?)?;
    }
    let vectors = linalg::eigen(&(sum / weights.len() as f64)?)?.vectors;
    Ok(ops::matmul(&r_ii.t()?, &vectors.t()?)?)
}

/// `U_oi` and `μ_i` of a weight in a basis.
fn within(w_oi: &Tensor, v_ii: &Tensor) -> attune_points::Result<(Tensor, Tensor)> {
    let of = linalg::svd(v_ii)?;
    let values: Vec<f64> = of.s.to_vec1()?;
    let least = 1e-6 * values.first().copied().unwrap_or(0.0);
    let inverse: Vec<f64> = values.iter().map(|s| if *s > least { 1.0 / s } else { 0.0 }).collect();
    // W V^-T, where V = P s Q: V^-T = P s^-1 Q.
    let inverse_k = Tensor::new(inverse, &Device::Cpu)?;
    let b_oi = ops::matmul(w_oi, &ops::matmul(&of.u.broadcast_mul(&inverse_k)?, &of.v)?)?;
    let mu_i = b_oi.sqr()?.sum(0)?.sqrt()?;
    let lengths = mu_i.to_vec1::<f64>()?.into_iter().map(|mu| if mu > 1e-12 { 1.0 / mu } else { 0.0 });
    let lengths = Tensor::new(lengths.collect::<Vec<_>>(), &Device::Cpu)?;
    Ok((b_oi.broadcast_mul(&lengths)?, mu_i))
}

impl Frod {
    /// How many entries beside the diagonal train.
    fn entries(&self, i: usize) -> usize {
        let most = i * i.saturating_sub(1);
        if self.config.density > 0.0 { (((i * i) as f64 * self.config.density) as usize).min(most).max(1) } else { 0 }
    }

    /// What the change is between U and V, `[i, i]`.
    fn middle(tensors: &Locals) -> attune_points::Result<Tensor> {
        let change_i = (tensors.get(SCALES)? - tensors.get(MU)?)?;
        let i = change_i.dim(0)?;
        let diagonal = Tensor::eye(i, change_i.dtype(), change_i.device())?.broadcast_mul(&change_i)?;
        let values = tensors.iter().find(|(local, _)| *local == VALUES).map(|(_, values)| values);
        let Some(values) = values else { return Ok(diagonal) };
        let places = tensors.get(PLACES)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        // They may come from a file.
        let one = |at: f64| (at >= 0.0 && at < i as f64).then_some(at as usize);
        let flat = places[0].iter().zip(&places[1]).map(|(&p, &q)| match (one(p), one(q)) {
            (Some(p), Some(q)) => Ok((p * i + q) as u32),
            _ => Err(Error::Refused(format!("{PLACES} has the place ({p}, {q}) of a matrix {i} wide"))),
        });
        let flat = Tensor::new(flat.collect::<attune_points::Result<Vec<u32>>>()?, values.device())?;
        Ok(diagonal.flatten_all()?.index_add(&flat, values, 0)?.reshape((i, i))?)
    }
}

impl Adapter for Frod {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut widths: BTreeMap<String, (&Site, usize)> = BTreeMap::new();
        for site in sites {
            if let Some((_, input)) = site.out_in() {
                widths.entry(kind(site.id.as_str())).or_insert((site, input));
            }
        }
        linears::attach(sites, |site, o, i| {
            let kind = kind(site.id.as_str());
            if let Some((first, width)) = widths.get(&kind).filter(|(_, width)| *width != i) {
                let message = format!(
                    "names {}, which reads {i} numbers, and {}, which reads {width}: expected one of them alone",
                    site.id, first.id
                );
                return Err(Fault::new("targets", message));
            }
            let shared = |spec: TensorSpec| TensorSpec { scope: Scope::Group(kind.clone()), ..spec };
            let mut tensors = vec![
                TensorSpec { decay: false, ..TensorSpec::trained(SCALES, [i]) },
                TensorSpec::fixed(MU, [i]),
                TensorSpec::fixed(U, [o, i]),
                shared(TensorSpec::fixed(V, [i, i])),
            ];
            let entries = self.entries(i);
            if entries > 0 {
                tensors.push(TensorSpec::trained(VALUES, [entries]));
                tensors.push(shared(TensorSpec::fixed(PLACES, [2, entries])));
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let w_oi = weight.dense(DType::F64)?;
        let v_ii = basis(std::slice::from_ref(&w_oi), self.config.regularization)?;
        self.start(at, &w_oi, &v_ii, rng)
    }

    fn init_together(
        &self,
        attachments: &[Attachment],
        weight: &WeightOf<'_, '_>,
        rng: &Rng,
    ) -> attune_points::Result<Option<Vec<(Locals, BaseEdit)>>> {
        let mut kinds: BTreeMap<String, Vec<&Attachment>> = BTreeMap::new();
        for at in attachments {
            kinds.entry(kind(at.site.as_str())).or_default().push(at);
        }
        let started = |(kind, of): (&String, &Vec<&Attachment>)| -> attune_points::Result<Vec<_>> {
            let weights =
                of.iter().map(|at| weight(at)?.dense(DType::F64)).collect::<attune_points::Result<Vec<_>>>()?;
            let v_ii = basis(&weights, self.config.regularization)?;
            let each = of
                .iter()
                .zip(&weights)
                .map(|(at, w_oi)| Ok((at.site.clone(), self.start(at, w_oi, &v_ii, &mut rng.named(kind))?)));
            each.collect()
        };
        // Kinds know nothing of each other.
        let started: Vec<attune_points::Result<Vec<_>>> =
            kinds.iter().collect::<Vec<_>>().into_par_iter().map(started).collect();
        let mut all = BTreeMap::new();
        for of_kind in started {
            all.extend(of_kind?);
        }
        Ok(attachments.iter().map(|at| all.remove(&at.site)).collect())
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let change = ops::matmul(&ops::matmul(tensors.get(U)?, &Self::middle(tensors)?)?, &tensors.get(V)?.t()?)?;
        Ok(Merged::Weight { weight: (weight.dense(change.dtype())? + change)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let mut peft = own::peft(Self::CARD.name, &self.config);
        // The name is PEFT's, whose folders are others.
        peft.config.insert("peft_type".to_owned(), "ATTUNE_FROD".into());
        Some(peft)
    }
}

impl Frod {
    fn start(
        &self,
        at: &Attachment,
        w_oi: &Tensor,
        v_ii: &Tensor,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (u_oi, mu_i) = within(w_oi, v_ii)?;
        let i = v_ii.dim(0)?;
        // Places beside the diagonal, row by row.
        let places = sparse::some(i * i.saturating_sub(1), self.entries(i), &rng.named(PLACES))?.to_vec1::<i64>()?;
        let rows = places.iter().map(|place| place / (i as i64 - 1));
        let columns = places.iter().map(|place| {
            let (row, column) = (place / (i as i64 - 1), place % (i as i64 - 1));
            column + i64::from(column >= row)
        });
        let both: Vec<f32> = rows.chain(columns).map(|at| at as f32).collect();
        let both = Tensor::from_vec(both, (2, places.len()), &Device::Cpu)?;
        starts::each(at, rng, |spec| match spec.local {
            SCALES | MU => Start::Is(mu_i.clone()),
            U => Start::Is(u_oi.clone()),
            V => Start::Is(v_ii.clone()),
            PLACES => Start::Is(both.clone()),
            _ => Start::Constant(0.0),
        })
    }
}

impl RowMap for Frod {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let x_ti = dropped(x_ti, self.config.dropout, cx)?;
        let z_ti = ops::matmul(&x_ti, tensors.get(V)?)?;
        Ok(ops::linear(&ops::linear(&z_ti, &Self::middle(tensors)?, None)?, tensors.get(U)?, None)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let (row, weight) = (Cost::new((2 * i + o) * i, 0), Cost::new(2 * o * i * i, o * i));
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Frod {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let left_oi = ops::matmul(tensors.get(U)?, &Self::middle(tensors)?)?;
        Ok((w_oi + ops::linear(&left_oi, tensors.get(V)?, None)?)?)
    }
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

    fn whole(u: &Tensor, mu: &Tensor, v: &Tensor) -> Tensor {
        u.broadcast_mul(mu).unwrap().matmul(&v.t().unwrap()).unwrap()
    }

    #[test]
    fn weights_of_a_kind_are_products_in_one_basis() {
        for rows in [2, 5, 9] {
            let weights = ["a", "b", "c"].map(|name| normal(name, &[rows, 5]));
            let v = basis(&weights, 1e-3).unwrap();
            for w in &weights {
                let (u, mu) = within(w, &v).unwrap();
                assert!(largest(&(whole(&u, &mu, &v) - w).unwrap()) < 1e-9);
                assert!(largest(&(u.sqr().unwrap().sum(0).unwrap() - 1.0).unwrap()) < 1e-9);
            }
        }
    }

    /// For a single weight the mean is one of an identity: what is left of V is a turn of R^T, whatever the ridge.
    #[test]
    fn fewer_rows_than_columns_have_an_orthonormal_basis_and_a_dead_column_nothing() {
        let w = normal("w", &[3, 5]);
        let v = basis(std::slice::from_ref(&w), 1e-3).unwrap();
        let unit = v.t().unwrap().matmul(&v).unwrap();
        assert!(largest(&(unit - Tensor::eye(5, DType::F64, &Device::Cpu).unwrap()).unwrap()) < 1e-12);
        let (_, mu) = within(&w, &v).unwrap();
        assert_eq!(mu.to_vec1::<f64>().unwrap().iter().filter(|mu| **mu > 1e-9).count(), 3);
        let dead = Tensor::cat(&[&normal("w", &[7, 4]), &Tensor::zeros((7, 1), DType::F64, &Device::Cpu).unwrap()], 1)
            .unwrap();
        let (u, mu) = within(&dead, &basis(std::slice::from_ref(&dead), 1e-3).unwrap()).unwrap();
        assert!(
            u.to_vec2::<f64>().unwrap().iter().flatten().chain(&mu.to_vec1::<f64>().unwrap()).all(|x| x.is_finite())
        );
    }

    #[test]
    fn the_middle_has_scales_on_its_diagonal_and_entries_beside_it() {
        let tensors = [
            (SCALES, Tensor::new(&[3f64, 5.0, 7.0], &Device::Cpu).unwrap()),
            (MU, Tensor::new(&[1f64, 5.0, 9.0], &Device::Cpu).unwrap()),
            (VALUES, Tensor::new(&[0.5f64, -1.0], &Device::Cpu).unwrap()),
            (PLACES, Tensor::new(&[[0f64, 2.0], [1.0, 0.0]], &Device::Cpu).unwrap()),
        ];
        let made = Frod::middle(&Locals::new("up", tensors.clone())).unwrap();
        assert_eq!(made.to_vec2::<f64>().unwrap(), [[2.0, 0.5, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, -2.0]]);
        let mut outside = tensors;
        outside[3].1 = Tensor::new(&[[0f64, 3.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        assert!(Frod::middle(&Locals::new("up", outside)).unwrap_err().to_string().contains("has the place (3, 0)"));
    }

    #[test]
    fn places_are_beside_the_diagonal_and_the_same_for_a_kind() {
        let frod = Frod { config: Config { density: 0.3, ..Config::default() } };
        let architecture = Architecture::from_json(
            br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "max_position_embeddings": 8,
                "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#,
        );
        let architecture = architecture.unwrap();
        let mut sites = architecture.sites();
        sites.retain(|site| site.id.as_str().ends_with("up_proj"));
        let attachments = frod.attach(&architecture, &sites).unwrap();
        assert_eq!(attachments[0].tensors[3].name("x"), attachments[1].tensors[3].name("y"));
        let weight = |at: &Attachment| -> attune_points::Result<Box<dyn Weight>> {
            Ok(Box::new(normal(at.site.as_str(), &[12, 8])))
        };
        let started = frod.init_together(&attachments, &weight, &Rng::new(1, "init")).unwrap().unwrap();
        let places = |at: usize| started[at].0.get(PLACES).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((places(0), places(0)[0].len()), (places(1), 19));
        let mut distinct: Vec<(u32, u32)> =
            places(0)[0].iter().zip(&places(0)[1]).map(|(p, q)| (*p as u32, *q as u32)).collect();
        assert!(distinct.iter().all(|(p, q)| p != q && *p < 8 && *q < 8));
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 19);
        let basis = |at: usize| started[at].0.get(V).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(basis(0), basis(1));
        assert_eq!(attachments[0].site, SiteId::new("model.layers.0.mlp.up_proj"));
    }
}
