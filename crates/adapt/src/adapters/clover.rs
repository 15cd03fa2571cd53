//! A matrix for each head of a projection, in the basis in which the head's rows are orthonormal: every direction that a head has is learned
//! in any mixture with its others, and none beyond; where heads shall be put to other uses, and what they read stays theirs.
//!
//! # Update
//! ```text
//! W_hi = R_h^T Q_hi                  Q Q^T = 1, of each block h of `block` rows               W'_hi = (R_h^T + D_h) Q_hi
//! W'_hi = (1 + D_h K_h) W_hi         K_h = (R_h^T)⁻¹                                          y_to  = x_ti W'_oi^T
//! pairs        P_h W_hi = U_h S_h V_hi             of values, W, and what the heads that read them make of them, P: columns of the output linear, those of
//!              all heads that share one below each other; of keys, W, and queries, P, where no position turns them
//! P_h W'_hi = U_h (S_h + D_h) V_hi                 W'_hi = (1 + L_h D_h K_h) W_hi,  L_h = C_h S_h⁻¹,  K_h = C_h⁻¹,  W_hi = C_h V_hi
//! ```
//! A bias is one more column of W, of an input of 1.
//!
//! # Symbols
//! `clover_D` the `D_h` as `[heads, block, block]`, or with `core` `diagonal` their diagonals as `[heads, block]`, f32, trained, 0 at the start. `clover_K` the
//! `K_h`, and in pairs `clover_L` the `L_h`, `[heads, block, block]`, never trained: with them orthonormal rows need not be kept.
//!
//! # Cost
//! `o*block` parameters per linear, o with diagonals, none at the second linear of a pair; `o*block` numbers that never train beside them, twice as many in pairs.
//! Each pass makes `W'` twice, forward and reverse, at `2 block o i` FLOPs each, and the gradient by it, `2 i o` FLOPs per token. A QR decomposition of each
//! block before the first step, in pairs two and a small one of singular values.
//!
//! # Limits
//! With D = 0 it is the base, bit for bit. A block's rows stay in the span of its own; with a block as wide as the input it is any change. In pairs a
//! direction that nothing reads has no effect, whatever D is.
//!
//! # Departures
//! Both linears of a pair change in the authors' code, into bases of the pair with a matrix between them; here the first one changes by what comes to the same, so
//! that no basis has to be exchanged with the other. Linears that are no pair, those of MLPs and queries and keys that are turned by position, are decomposed
//! alone, as there. Heads are not cut short: no format holds heads of different widths.
//!
//! # Paper
//! CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy. Meng, Tang, Jiang, Zhang, 2024.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Place, QkNorm, Site, SiteId};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap, WeightOf};
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, orthogonal, own};

const D: &str = "clover_D";
const K: &str = "clover_K";
const L: &str = "clover_L";

/// Rows of which one is this much shorter, beyond those before it, than another are no basis in 32 bits.
const LEAST: f64 = 1e-5;

/// What trains between a head's orthonormal rows and what it gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Core {
    /// A matrix, as in the authors' code.
    #[default]
    Full,
    /// Its diagonal, as in the paper's words: of a pair, the singular values.
    Diagonal,
}

/// Parameters of CLOVER.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows of a block, which divide the output width: the width of a head.
    #[schemars(range(min = 1, max = 4096))]
    block: u32,
    /// What trains in each block.
    core: Core,
    /// Decomposes values with the output linear, and keys with queries where no position turns them, as one product. Both have to be targets.
    pairs: bool,
}

impl Default for Config {
    /// The width of a head in most models, and each linear by itself.
    fn default() -> Self {
        Self { block: 64, core: Core::Full, pairs: false }
    }
}

/// The linear that reads what another one's heads give.
#[derive(Debug, Clone, PartialEq)]
struct Partner {
    site: SiteId,
    /// It leads from heads to the stream, and not, as queries do, from the stream to heads.
    is_output: bool,
    /// How many of its heads share one of the other's.
    shared: usize,
}

pub(super) struct Clover {
    config: Config,
    /// Of the sites that it was put on last, by their paths, those that are the first of a pair.
    pairs: Mutex<BTreeMap<String, Partner>>,
}

impl Method for Clover {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy",
            authors: "Fanxu Meng, Pingzhi Tang, Fan Jiang, Muhan Zhang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: r#"o*if(core == "full", block, 1)*(1 - pairs*(out - down))"#,
        fixed: "o*block*(1 - pairs*(out - down))",
        merges: Merges::Weight,
        ..Card::new(
            "clover",
            Point::Adapter,
            "A matrix for each head of a projection, in the basis in which the head's rows are orthonormal: every direction that \
             a head has is learned in any mixture with its others, and none beyond; where heads shall be put to other uses, and what \
             they read stays theirs.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config, pairs: Mutex::default() }))
    }
}

impl Clover {
    /// Which places are the first and the second of pairs in a model.
    fn places(&self, arch: &Architecture) -> Vec<(Place, Place)> {
        // What a norm stands between is no product.
        let plain = arch.positions.rope().is_none() && arch.qk_norm == QkNorm::None;
        let keys = plain.then_some((Place::Key, Place::Query));
        std::iter::once((Place::Value, Place::Output)).chain(keys).filter(|_| self.config.pairs).collect()
    }

    /// The linear that a site is the first of a pair with.
    fn partner(&self, site: &Site, arch: &Architecture) -> Option<Partner> {
        let (_, second) = self.places(arch).into_iter().find(|(first, _)| *first == site.place)?;
        let found = arch.sites().into_iter().find(|other| other.place == second && other.layer == site.layer)?;
        let shared = arch.heads / arch.kv_heads.max(1);
        Some(Partner { site: found.id, is_output: second == Place::Output, shared })
    }

    /// What a head's rows are made of.
    fn lower(&self, rows: &Tensor, at: &SiteId, head: usize) -> attune_points::Result<Tensor> {
        let (_, r_dd) = linalg::qr(&rows.t()?.contiguous()?)?;
        let d = r_dd.dim(0)?;
        let lengths = (0..d).map(|row| r_dd.get(row)?.get(row)?.to_scalar::<f64>());
        let lengths = lengths.collect::<candle_core::Result<Vec<f64>>>()?;
        let (least, most) = lengths.iter().fold((f64::MAX, 0.0f64), |(a, b), x| (a.min(*x), b.max(*x)));
        if least <= LEAST * most {
            let message = format!(
                "rows {} to {} of {at} depend on each other, so they are no basis: expected a smaller `block`, or other targets",
                head * d,
                (head + 1) * d - 1
            );
            return Err(Error::Refused(message));
        }
        Ok(r_dd.t()?.contiguous()?)
    }

    fn start(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        partner: Option<(&Partner, &dyn Weight)>,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (d, w_oi) = (self.config.block as usize, widened(weight)?);
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        let second = partner.map(|(partner, weight)| partner.readers(weight, d)).transpose()?;
        for head in 0..w_oi.dim(0)? / d {
            let r_dd = self.lower(&w_oi.narrow(0, head * d, d)?, &at.site, head)?;
            let Some(second) = &second else {
                inner.push(r_dd);
                continue;
            };
            // P W = (Q₂ R₂) (R^T Q^T), whose singular values are those of the small matrix between the orthonormal ones.
            let (_, r2_dd) = linalg::qr(&second[head])?;
            let Svd { s, v, .. } = linalg::svd(&ops::matmul(&r2_dd, &r_dd)?)?;
            let c_dd = ops::matmul(&r_dd, &v.t()?.contiguous()?)?;
            let values = s.to_vec1::<f64>()?;
            let most = values.iter().copied().fold(0.0, f64::max);
            let by = values.iter().map(|value| if *value > LEAST * most { 1.0 / value } else { 0.0 });
            outer.push(c_dd.broadcast_mul(&Tensor::new(by.collect::<Vec<f64>>(), &Device::Cpu)?)?);
            inner.push(c_dd);
        }
        let k_hdd = orthogonal::inverse(&Tensor::stack(&inner, 0)?)?;
        let l_hdd = if outer.is_empty() { None } else { Some(Tensor::stack(&outer, 0)?) };
        starts::each(at, &mut Rng::new(0, D), |spec| match (spec.local, &l_hdd) {
            (K, _) => Start::Is(k_hdd.clone()),
            (L, Some(l_hdd)) => Start::Is(l_hdd.clone()),
            _ => Start::Constant(0.0),
        })
    }

    /// What is between a head's rows as they are and what they become, less 1: `[heads, d, d]`.
    fn between(tensors: &Locals) -> attune_points::Result<Tensor> {
        let (d, k_hdd) = (tensors.get(D)?, tensors.get(K)?);
        let inner = match d.rank() {
            2 => k_hdd.broadcast_mul(&d.unsqueeze(2)?)?,
            _ => ops::matmul(d, k_hdd)?,
        };
        match tensors.iter().find(|(local, _)| *local == L) {
            Some((_, l_hdd)) => Ok(ops::matmul(l_hdd, &inner)?),
            None => Ok(inner),
        }
    }
}

/// A weight with its bias, if it has one, as the last column, in 64 bits.
fn widened(weight: &dyn Weight) -> attune_points::Result<Tensor> {
    let w_oi = weight.dense(DType::F64)?;
    Ok(match weight.bias(DType::F64)? {
        Some(b_o) => Tensor::cat(&[&w_oi, &b_o.unsqueeze(1)?], 1)?,
        None => w_oi,
    })
}

impl Partner {
    /// What the heads that share one of the other linear's make of it, below each other: a matrix d wide for each of these.
    fn readers(&self, weight: &dyn Weight, d: usize) -> attune_points::Result<Vec<Tensor>> {
        // From the output's bias nothing is read.
        let heads_wx = if self.is_output { weight.dense(DType::F64)? } else { widened(weight)?.t()?.contiguous()? };
        let n = heads_wx.dim(1)? / (d * self.shared).max(1);
        let head = |at: usize| heads_wx.narrow(1, at * d, d);
        let of_one = |one: usize| {
            let all = (0..self.shared).map(|other| head(one * self.shared + other));
            Ok(Tensor::cat(&all.collect::<candle_core::Result<Vec<_>>>()?, 0)?.contiguous()?)
        };
        (0..n).map(of_one).collect()
    }
}

impl Adapter for Clover {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (d, places) = (self.config.block as usize, self.places(arch));
        let mut pairs = BTreeMap::new();
        // The second of a pair has no tensors of its own.
        let is_second = |site: &&Site| places.iter().any(|(_, second)| *second == site.place);
        let (seconds, own): (Vec<&Site>, Vec<&Site>) = sites.iter().partition(is_second);
        let own: Vec<Site> = own.into_iter().cloned().collect();
        for site in &own {
            pairs.extend(self.partner(site, arch).map(|partner| (site.id.to_string(), partner)));
        }
        let alone = seconds.into_iter().find(|site| !pairs.values().any(|partner| partner.site == site.id));
        if let Some(site) = alone {
            let message = format!("names {} without the linear that it is a pair with; expected both of them", site.id);
            return Err(vec![Fault::new("targets", message)]);
        }
        let attachments = linears::attach(&own, |site, o, i| {
            let is_pair = pairs.contains_key(site.id.as_str());
            if is_pair && d != arch.head_dim {
                let message =
                    format!("is {d}; heads of {} are {} wide: expected that with `pairs`", site.id, arch.head_dim);
                return Err(Fault::new("block", message));
            }
            if !o.is_multiple_of(d) {
                let message = format!("is {d}, which does not divide {o}, the output width of {}", site.id);
                return Err(Fault::new("block", message));
            }
            if d > i {
                let message = format!(
                    "is {d}, more rows than {} has inputs, {i}: they are no basis; expected {i} at most",
                    site.id
                );
                return Err(Fault::new("block", message));
            }
            let shape = [o / d, d, d];
            let core = if self.config.core == Core::Full { shape.to_vec() } else { vec![o / d, d] };
            let tensors = [TensorSpec::trained(D, core), TensorSpec::fixed(K, shape)];
            Ok(tensors.into_iter().chain(is_pair.then(|| TensorSpec::fixed(L, shape))).collect())
        });
        *self.pairs.lock().unwrap_or_else(PoisonError::into_inner) = pairs;
        attachments
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, _: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        self.start(at, weight, None)
    }

    fn init_together(
        &self,
        at: &[Attachment],
        weight: &WeightOf<'_, '_>,
        _: &Rng,
    ) -> attune_points::Result<Option<Vec<(Locals, BaseEdit)>>> {
        let pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if pairs.is_empty() {
            return Ok(None);
        }
        let start = |at: &Attachment| {
            let Some(partner) = pairs.get(at.site.as_str()) else { return self.start(at, &*weight(at)?, None) };
            let second = Attachment { site: partner.site.clone(), tensors: Vec::new() };
            self.start(at, &*weight(at)?, Some((partner, &*weight(&second)?)))
        };
        at.par_iter().map(start).collect::<attune_points::Result<_>>().map(Some)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(D)?.dtype())?;
        let bias = weight.bias(w_oi.dtype())?.map(|b_o| self.bias(&b_o, &w_oi, tensors)).transpose()?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Clover {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (o, i) = w_oi.dims2()?;
        let between_hdd = Self::between(tensors)?;
        let (h, d, _) = between_hdd.dims3()?;
        let w_hdi = w_oi.contiguous()?.reshape((h, d, i))?;
        Ok((w_oi + ops::matmul(&between_hdd, &w_hdi)?.reshape((o, i))?)?)
    }

    fn bias(&self, b_o: &Tensor, _: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let between_hdd = Self::between(tensors)?;
        let (h, d, _) = between_hdd.dims3()?;
        let moved_hd1 = ops::matmul(&between_hdd, &b_o.contiguous()?.reshape((h, d, 1))?)?;
        Ok((b_o + moved_hd1.reshape(h * d)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn at(heads: usize, d: usize) -> Attachment {
        let shape = [heads, d, d];
        Attachment { site: SiteId::new("q"), tensors: vec![TensorSpec::trained(D, shape), TensorSpec::fixed(K, shape)] }
    }

    fn of(d: usize) -> Clover {
        Clover { config: Config { block: d as u32, ..Config::default() }, pairs: Mutex::default() }
    }

    fn started(w: &Tensor, heads: usize, d: usize) -> attune_points::Result<Locals> {
        Ok(of(d).init(&at(heads, d), w, &mut Rng::new(1, "init"))?.0)
    }

    /// `(Rᵀ + D) Q` head by head, by a decomposition of each.
    #[test]
    fn a_heads_matrix_is_between_it_and_its_orthonormal_rows() {
        let (w, d) = (normal("w", &[9, 7]), normal("d", &[3, 3, 3]));
        let k = started(&w, 3, 3).unwrap().get(K).unwrap().to_dtype(DType::F64).unwrap();
        let made = of(3).graph(&w, &Locals::new("q", [(D, d.clone()), (K, k)])).unwrap();
        for head in 0..3 {
            let rows = w.narrow(0, 3 * head, 3).unwrap();
            let (q, r) = linalg::qr(&rows.t().unwrap().contiguous().unwrap()).unwrap();
            let core = (r.t().unwrap() + d.get(head).unwrap()).unwrap();
            let by_hand = core.matmul(&q.t().unwrap()).unwrap();
            // K is kept in 32 bits.
            assert!(largest(&(made.narrow(0, 3 * head, 3).unwrap() - by_hand).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn rows_that_depend_on_each_other_are_refused_with_their_place() {
        let w = normal("w", &[4, 6]);
        let twice = Tensor::cat(&[&w, &w.narrow(0, 0, 2).unwrap(), &w.narrow(0, 0, 2).unwrap()], 0).unwrap();
        assert!(started(&twice, 4, 2).is_ok());
        let error = started(&twice, 2, 4).unwrap_err().to_string();
        assert!(error.starts_with("rows 4 to 7 of q depend on each other"), "{error}");
        let nothing = Tensor::zeros((2, 6), DType::F64, &Device::Cpu).unwrap();
        assert!(started(&nothing, 1, 2).is_err());
    }

    struct Biased(Tensor, Tensor);

    impl Weight for Biased {
        fn shape(&self) -> (usize, usize) {
            Weight::shape(&self.0)
        }

        fn rows(&self, rows: std::ops::Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
            self.0.rows(rows, dtype)
        }

        fn bias(&self, dtype: DType) -> attune_points::Result<Option<Tensor>> {
            Ok(Some(self.1.to_dtype(dtype)?))
        }
    }

    /// Two heads of values, each read by two heads: `P W' = P W + U D V`, where U and V are orthonormal and P W = U S V, bias and all.
    #[test]
    fn a_pair_changes_between_the_singular_vectors_of_its_product() {
        for is_output in [true, false] {
            let (d, heads) = (3, 2);
            let weight = Biased(normal("w", &[6, 7]), normal("b", &[6]));
            let second = match is_output {
                true => Biased(normal("o", &[8, 12]), normal("ob", &[8])),
                false => Biased(normal("q", &[12, 7]), normal("qb", &[12])),
            };
            let partner = Partner { site: SiteId::new("p"), is_output, shared: 2 };
            let mut at = at(heads, d);
            at.tensors.push(TensorSpec::fixed(L, [heads, d, d]));
            let (found, _) = of(d).start(&at, &weight, Some((&partner, &second))).unwrap();
            let wide = |local: &str| found.get(local).unwrap().to_dtype(DType::F64).unwrap();
            let core = normal("core", &[heads, d, d]);
            let locals = Locals::new("v", [(D, core.clone()), (K, wide(K)), (L, wide(L))]);
            let (made, bias) =
                (of(d).graph(&weight.0, &locals).unwrap(), of(d).bias(&weight.1, &weight.0, &locals).unwrap());
            let made = Tensor::cat(&[&made, &bias.unsqueeze(1).unwrap()], 1).unwrap();
            let whole = widened(&weight).unwrap();
            let readers = partner.readers(&second, d).unwrap();
            assert_eq!(readers[0].dims(), [16, d]);
            let one = Tensor::eye(d, DType::F64, &Device::Cpu).unwrap();
            for (head, reader) in readers.iter().enumerate() {
                let own = |x: &Tensor| x.narrow(0, head * d, d).unwrap();
                let (u, v) = (
                    reader.matmul(&wide(L).get(head).unwrap()).unwrap(),
                    wide(K).get(head).unwrap().matmul(&own(&whole)).unwrap(),
                );
                assert!(largest(&(u.t().unwrap().matmul(&u).unwrap() - &one).unwrap()) < 1e-4);
                assert!(largest(&(v.matmul(&v.t().unwrap()).unwrap() - &one).unwrap()) < 1e-4);
                let before = reader.matmul(&own(&whole)).unwrap();
                let values = u.t().unwrap().matmul(&before).unwrap().matmul(&v.t().unwrap()).unwrap();
                let all = linalg::svd(&before).unwrap().s.narrow(0, 0, d).unwrap();
                assert!(largest(&(values - one.broadcast_mul(&all).unwrap()).unwrap()) < 1e-4 * largest(&all));
                let change = (reader.matmul(&own(&made)).unwrap() - before).unwrap();
                let by_hand = u.matmul(&core.get(head).unwrap()).unwrap().matmul(&v).unwrap();
                assert!(largest(&(change - &by_hand).unwrap()) < 1e-4 * largest(&by_hand));
            }
            // A diagonal alone is the same with nothing beside it.
            let diagonal = normal("diagonal", &[heads, d]);
            let full = one.unsqueeze(0).unwrap().broadcast_mul(&diagonal.unsqueeze(2).unwrap()).unwrap();
            let with = |core: Tensor| Locals::new("v", [(D, core), (K, wide(K)), (L, wide(L))]);
            let [a, b] = [diagonal, full].map(|core| of(d).graph(&weight.0, &with(core)).unwrap());
            assert!(largest(&(a - b).unwrap()) < 1e-12);
        }
    }

    /// A direction of values that nobody reads stays without effect, and is no obstacle.
    #[test]
    fn what_nothing_reads_changes_nothing() {
        let weight = normal("w", &[3, 7]);
        let second =
            Tensor::cat(&[&normal("o", &[5, 2]), &Tensor::zeros((5, 1), DType::F64, &Device::Cpu).unwrap()], 1)
                .unwrap();
        let partner = Partner { site: SiteId::new("p"), is_output: true, shared: 1 };
        let mut at = at(1, 3);
        at.tensors.push(TensorSpec::fixed(L, [1, 3, 3]));
        let (found, _) = of(3).start(&at, &weight, Some((&partner, &second))).unwrap();
        let (k, l) = (found.get(K).unwrap(), found.get(L).unwrap().get(0).unwrap().to_dtype(DType::F64).unwrap());
        assert!(largest(&k.to_dtype(DType::F64).unwrap()).is_finite());
        assert!(largest(&l.narrow(1, 2, 1).unwrap()) == 0.0 && largest(&second.matmul(&l).unwrap()) > 0.1);
    }
}
