//! A weight's own singular vectors, mixed by a sparse trained matrix: the fewest numbers that change a weight in all of its directions; where
//! a task needs the base's directions in other strengths.
//!
//! # Update
//! ```text
//! W_oi = U_ok diag(S_k) V_ki             y_to = x_ti W_oi^T + ((x_ti V_ki^T) M_kk^T) U_ok^T
//! M_kk = Σ_n m_n e_p(n) e_q(n)^T         |p - q| ≤ bands, or as many places as that, at random or of the best aligned pairs
//! M_kk = sigmoid(g) Σ_n …                with `start` `kaiming`
//! ```
//!
//! # Symbols
//! `svft_values` `m_n`, f32, trained, 0 at the start, row after row; `svft_U` `U_ok` and `svft_V` `V_ki`, never trained: the vectors of the k
//! largest singular values, all of them with `rank` 0; with `refill`, others that are drawn at right angles to these make up all that there can be.
//! `svft_indices` the places k p(n) + q(n), ascending, i64, where they are no band. The alignment of a pair is |u_p · v_q|, with `signed` u_p · v_q; where o
//! and i differ, that of axis p and vector q on the shorter side, |U_pq| or |V_pq|.
//! With `start` `kaiming` m_n starts normal with standard deviation sqrt(2/n) of n numbers, behind `svft_gate` g, trained, 0 at the start.
//!
//! # Cost
//! `k (2 bands + 1) - bands (bands + 1)` parameters per linear, one more behind a gate, and `k (i + o)` numbers that never train beside them, which for all k of a square
//! weight is twice its size. Rows go through the vectors, `2 k (i+o)` FLOPs a token, where that is cheaper than the weight, `k (i+o) < i*o`; else
//! each pass makes the new weight of the site, twice at `2 k o i` FLOPs (and `2 k² o` where `M` is no diagonal), and the gradient by it. A decomposition of each weight before the
//! first step.
//!
//! # Limits
//! With m = 0 it is the base, bit for bit; with `start` `kaiming` it starts away from it. With `bands` 0 the weight keeps its singular vectors, and their values train. The change stays in
//! the span of the vectors on both sides.
//!
//! # Departures
//! Alignment counts by its size where nothing else is said, and a place comes once. Vectors of two lengths have no angle: as in the authors' code
//! the square one of the two matrices of vectors stands in, so that all of them have to be there. A cut of the rank leaves the weight whole. Vectors are kept
//! with the adapter.
//!
//! # Paper
//! SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors. Lingam, Tejaswi, Vavre, Shetty, Gudur, Ghosh, Dimakis, Choi, Bojchevski,
//! Sanghavi, 2024.

use std::cmp::Ordering;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::hadamard::thin;
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own, sparse, spectral};

const VALUES: &str = "svft_values";
const GATE: &str = "svft_gate";
const INDICES: &str = "svft_indices";
const U: &str = "svft_U";
const V: &str = "svft_V";

/// Where the entries of the matrix between the singular vectors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Pattern {
    /// On the diagonal and beside it.
    #[default]
    Banded,
    /// At places that are drawn once.
    Random,
    /// Where a left and a right vector are nearest to one direction; of a weight that is not square, where the vectors of its shorter side are
    /// nearest to single axes.
    TopK,
}

/// What entries start as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Values {
    /// 0.
    #[default]
    Zero,
    /// Random, behind a gate that is trained and half open at first: not the base.
    Kaiming,
}

/// Parameters of SVFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Where the entries that train are.
    pattern: Pattern,
    /// Diagonals on each side of the main one; other patterns have as many entries as these would be.
    #[schemars(range(min = 0, max = 4096))]
    bands: u32,
    /// How many singular vectors, those of the largest values; 0 for all.
    #[schemars(range(min = 0, max = 65536))]
    rank: u32,
    /// Rounds of a randomised decomposition, which is much faster than the exact one where `rank` is small; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
    /// Fills up vectors that `rank` leaves out with random ones at right angles to all others.
    refill: bool,
    /// Prefers pairs in one direction to those in opposite ones, with `top_k`.
    signed: bool,
    /// What entries start as.
    start: Values,
}

impl Default for Config {
    /// The paper's plain form.
    fn default() -> Self {
        Self {
            pattern: Pattern::Banded,
            bands: 0,
            rank: 0,
            iterations: None,
            refill: false,
            signed: false,
            start: Values::Zero,
        }
    }
}

pub(super) struct Svft {
    config: Config,
}

impl Method for Svft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors",
            authors: "Vijay Lingam, Atula Tejaswi, Aditya Vavre, Aneesh Shetty, Gautham Krishna Gudur, Joydeep Ghosh, et al.",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: r#"if(rank == 0 or refill, min(o, i), rank)*(2*bands + 1) - bands*(bands + 1) + (start == "kaiming")"#,
        fixed: "if(rank == 0 or refill, min(o, i), rank)*(i+o)",
        merges: Merges::Factors,
        ..Card::new(
            "svft",
            Point::Adapter,
            "A weight's own singular vectors, mixed by a sparse trained matrix: the fewest numbers that change a weight in all of its \
             directions; where a task needs the base's directions in other strengths.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Svft {
    /// Whether rows go through the vectors at a site, instead of through another weight.
    fn is_thin(at: &Attachment) -> bool {
        let shape = |local| at.tensors.iter().find(|spec| spec.local == local).map(|spec| spec.shape.as_slice());
        match (shape(U), shape(V)) {
            (Some(&[o, k]), Some(&[_, i])) => thin(k, (o, i)),
            _ => false,
        }
    }

    fn is_diagonal(&self) -> bool {
        self.config.pattern == Pattern::Banded && self.config.bands == 0
    }

    /// Flat places in a matrix k wide and high.
    fn places(&self, k: usize, tensors: &Locals) -> attune_points::Result<Tensor> {
        match self.config.pattern {
            Pattern::Banded => Ok(Tensor::new(band(k, self.config.bands as usize), &Device::Cpu)?),
            Pattern::Random | Pattern::TopK => Ok(tensors.get(INDICES)?.clone()),
        }
    }

    /// The entries, behind their gate.
    fn values(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let values_n = tensors.get(VALUES)?;
        match self.config.start {
            Values::Zero => Ok(values_n.clone()),
            Values::Kaiming => Ok(values_n.broadcast_mul(&(tensors.get(GATE)?.neg()?.exp()? + 1.0)?.recip()?)?),
        }
    }

    /// `M_kk`, where it is not a diagonal.
    fn between(&self, k: usize, tensors: &Locals) -> attune_points::Result<Tensor> {
        let values_n = self.values(tensors)?;
        let zero_kk = Tensor::zeros((k, k), values_n.dtype(), values_n.device())?;
        sparse::added(&zero_kk, &self.places(k, tensors)?, &values_n)
    }

    /// What the change is the product of: `U_ok M_kk` and `V_ki`.
    fn factors(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let (u_ok, v_ki) = (tensors.get(U)?, tensors.get(V)?);
        let left = if self.is_diagonal() {
            ops::scale_columns(u_ok, &self.values(tensors)?)?
        } else {
            ops::matmul(u_ok, &self.between(u_ok.dim(1)?, tensors)?)?
        };
        Ok((left, v_ki.clone()))
    }

    /// The places of the pattern, where they are kept.
    fn chosen(&self, triples: &Svd, count: usize, rng: &Rng) -> attune_points::Result<Option<Tensor>> {
        let k = triples.s.dim(0)?;
        match self.config.pattern {
            Pattern::Banded => Ok(None),
            Pattern::Random => sparse::some(k * k, count, &rng.named(INDICES)).map(Some),
            Pattern::TopK => {
                let (o, i) = (triples.u.dim(0)?, triples.v.dim(1)?);
                let alignment_kk = match o.cmp(&i) {
                    // Of u_p and v_q.
                    Ordering::Equal => ops::matmul(&triples.u.t()?, &triples.v.t()?)?,
                    Ordering::Less => triples.u.clone(),
                    Ordering::Greater => triples.v.clone(),
                };
                let alignment_kk = if self.config.signed { alignment_kk } else { alignment_kk.abs()? };
                let scores: Vec<f32> = alignment_kk.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let mut places: Vec<i64> =
                    sparse::largest(&scores, count).into_iter().map(|place| place as i64).collect();
                places.sort_unstable();
                Ok(Some(Tensor::new(places, &Device::Cpu)?))
            }
        }
    }
}

/// Singular triples, and random vectors at right angles to theirs, of no value, up to `k`.
fn filled(own: Svd, k: usize, rng: &Rng) -> attune_points::Result<Svd> {
    let known = own.s.dim(0)?;
    if known >= k {
        return Ok(own);
    }
    let beside = |name: &str, vectors_wn: &Tensor| {
        let drawn = rng.named(name).normal_tensor((vectors_wn.dim(0)?, k - known), 1.0, DType::F64)?;
        let (all_wk, _) = linalg::qr(&Tensor::cat(&[vectors_wn, &drawn], 1)?)?;
        Ok::<_, attune_points::Error>(Tensor::cat(&[vectors_wn, &all_wk.narrow(1, known, k - known)?], 1)?)
    };
    let (u, v) = (beside("left", &own.u)?, beside("right", &own.v.t()?.contiguous()?)?.t()?.contiguous()?);
    Ok(Svd { u, s: own.s.pad_with_zeros(0, 0, k - known)?, v })
}

/// The flat places of the diagonal and of `bands` beside it on each side, row after row.
fn band(k: usize, bands: usize) -> Vec<i64> {
    let row = |p: usize| (p.saturating_sub(bands)..(p + bands + 1).min(k)).map(move |q| (p * k + q) as i64);
    (0..k).flat_map(row).collect()
}

impl Adapter for Svft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { pattern, bands, rank, refill, start, .. } = self.config;
        let bands = bands as usize;
        linears::attach(sites, |site, o, i| {
            let k = spectral::triples(rank, site, (o, i))?;
            let k = if refill { o.min(i) } else { k };
            if bands >= k {
                let message = format!(
                    "is {bands}, beside the diagonal of a matrix {k} wide at {}; expected less than {k}",
                    site.id
                );
                return Err(Fault::new("bands", message));
            }
            if pattern == Pattern::TopK && o != i && k < o.min(i) {
                let message = format!(
                    "is `top_k`, but {} is {o} by {i}, with {k} vectors: where lengths differ all {} have to be there; expected `rank: 0`, \
                     `refill`, or `banded` or `random`",
                    site.id,
                    o.min(i)
                );
                return Err(Fault::new("pattern", message));
            }
            let count = k * (2 * bands + 1) - bands * (bands + 1);
            let mut tensors =
                vec![TensorSpec::trained(VALUES, [count]), TensorSpec::fixed(U, [o, k]), TensorSpec::fixed(V, [k, i])];
            if pattern != Pattern::Banded {
                tensors.push(TensorSpec::fixed(INDICES, [count]));
            }
            if start == Values::Kaiming {
                tensors.push(TensorSpec { decay: false, ..TensorSpec::trained(GATE, [1]) });
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let shape = |local| at.tensors.iter().find(|spec| spec.local == local).map_or(0, |spec| spec.shape[0]);
        let own = if self.config.rank == 0 { shape(V) } else { self.config.rank as usize };
        let triples = filled(spectral::leading(weight, own, self.config.iterations, rng)?, shape(V), rng)?;
        let places = self.chosen(&triples, shape(VALUES), rng)?;
        starts::each(at, rng, |spec| match (spec.local, &places) {
            (U, _) => Start::Is(triples.u.clone()),
            (V, _) => Start::Is(triples.v.clone()),
            (INDICES, Some(places)) => Start::Is(places.clone()),
            (VALUES, _) if self.config.start == Values::Kaiming => Start::Normal((2.0 / spec.shape[0] as f64).sqrt()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if Self::is_thin(at) { Port::Delta(self) } else { Port::Weight(self) }
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        if Self::is_thin(at) {
            let (left, right) = self.factors(tensors)?;
            return Ok(Merged::Factors { left, right, scale: 1.0 });
        }
        let w_oi = weight.dense(tensors.get(VALUES)?.dtype())?;
        Ok(Merged::Weight { weight: WeightMap::graph(self, &w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Svft {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tk = ops::linear(x_ti, tensors.get(V)?, None)?;
        let mixed_tk = if self.is_diagonal() {
            ops::scale_columns(&h_tk, &self.values(tensors)?)?
        } else {
            ops::linear(&h_tk, &self.between(h_tk.dim(1)?, tensors)?, None)?
        };
        Ok(ops::linear(&mixed_tk, tensors.get(U)?, None)?)
    }
}

impl WeightMap for Svft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (left_ok, v_ki) = self.factors(tensors)?;
        Ok((w_oi + ops::matmul(&left_ok, &v_ki)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;

    use super::*;

    fn normal(name: &str, shape: &[usize], dtype: DType) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, dtype).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        let x = x.to_dtype(DType::F64).unwrap().abs().unwrap();
        x.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn attachment(shape: (usize, usize), k: usize, count: usize, pattern: Pattern) -> Attachment {
        let mut tensors = vec![
            TensorSpec::trained(VALUES, [count]),
            TensorSpec::fixed(U, [shape.0, k]),
            TensorSpec::fixed(V, [k, shape.1]),
        ];
        if pattern != Pattern::Banded {
            tensors.push(TensorSpec::fixed(INDICES, [count]));
        }
        Attachment { site: SiteId::new("up"), tensors }
    }

    /// The component as it starts at a weight, in 64 bits.
    fn started(config: &Config, w: &Tensor, k: usize, count: usize) -> (Svft, Locals) {
        let svft = Svft { config: config.clone() };
        let at = attachment(w.dims2().unwrap(), k, count, config.pattern);
        let (locals, _) = svft.init(&at, w, &mut Rng::new(1, "init")).unwrap();
        let wide =
            |tensor: &Tensor| if tensor.dtype().is_float() { tensor.to_dtype(DType::F64) } else { Ok(tensor.clone()) };
        let wide = locals.iter().map(|(name, tensor)| (name, wide(tensor).unwrap()));
        (svft, Locals::new("up", wide.collect::<Vec<_>>()))
    }

    fn with(locals: &Locals, values: &Tensor) -> Locals {
        let own =
            locals.iter().map(|(name, tensor)| (name, if name == VALUES { values.clone() } else { tensor.clone() }));
        Locals::new("up", own.collect::<Vec<_>>())
    }

    #[test]
    fn a_band_has_the_entries_that_its_formula_counts() {
        assert_eq!(band(3, 0), [0, 4, 8]);
        assert_eq!(band(3, 1), [0, 1, 3, 4, 5, 7, 8]);
        for (k, bands) in [(7, 0), (7, 2), (7, 6)] {
            assert_eq!(band(k, bands).len(), k * (2 * bands + 1) - bands * (bands + 1));
        }
    }

    #[test]
    fn on_the_diagonal_alone_the_weight_keeps_its_singular_vectors() {
        let w = normal("w", &[7, 5], DType::F64);
        let (svft, locals) = started(&Config::default(), &w, 5, 5);
        let values = normal("m", &[5], DType::F64);
        let made = WeightMap::graph(&svft, &w, &with(&locals, &values)).unwrap();
        let between = locals.get(U).unwrap().t().unwrap().matmul(&made).unwrap();
        let between = between.matmul(&locals.get(V).unwrap().t().unwrap()).unwrap();
        let singular = attune_tensor::linalg::svd(&w).unwrap().s;
        let expected = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap().broadcast_mul(&(singular + values).unwrap());
        // The vectors are kept in 32 bits.
        assert!(largest(&(between - expected.unwrap()).unwrap()) < 1e-5);
    }

    #[test]
    fn rows_and_weights_and_factors_are_one_change_in_every_pattern() {
        for (pattern, shape, bands, k) in [
            (Pattern::Banded, (7, 5), 0, 5),
            (Pattern::Banded, (5, 7), 2, 4),
            (Pattern::Random, (7, 5), 1, 3),
            (Pattern::TopK, (6, 6), 1, 6),
            (Pattern::TopK, (7, 5), 1, 5),
            (Pattern::TopK, (5, 7), 0, 5),
        ] {
            let w = normal("w", &[shape.0, shape.1], DType::F64);
            let count = band(k, bands).len();
            let config = Config { pattern, bands: bands as u32, ..Config::default() };
            let (svft, locals) = started(&config, &w, k, count);
            let locals = with(&locals, &normal("m", &[count], DType::F64));
            // By hand, entry by entry.
            let places = svft.places(k, &locals).unwrap().to_vec1::<i64>().unwrap();
            let values = locals.get(VALUES).unwrap().to_vec1::<f64>().unwrap();
            let mut m = vec![0.0; k * k];
            places.iter().zip(&values).for_each(|(place, value)| m[*place as usize] += value);
            let m = Tensor::from_vec(m, (k, k), &Device::Cpu).unwrap();
            let by_hand = locals.get(U).unwrap().matmul(&m).unwrap().matmul(locals.get(V).unwrap()).unwrap();
            let change = (WeightMap::graph(&svft, &w, &locals).unwrap() - &w).unwrap();
            assert!(largest(&(&change - &by_hand).unwrap()) < 1e-12, "{pattern:?}");
            let x = normal("x", &[3, shape.1], DType::F64);
            let (site, layout) = (SiteId::new("up"), attune_points::Layout::new());
            let cx = RowCx { site: &site, output: shape.0, dropout: None, layout: &layout, rows: None };
            let rows = RowMap::graph(&svft, &x, &locals, &cx).unwrap();
            assert!(largest(&(rows - x.matmul(&by_hand.t().unwrap()).unwrap()).unwrap()) < 1e-12, "{pattern:?}");
            // It stays in the span of the vectors.
            let u = locals.get(U).unwrap();
            let within = u.matmul(&u.t().unwrap()).unwrap().matmul(&change).unwrap();
            assert!(largest(&(within - &change).unwrap()) < 1e-5, "{pattern:?}");
        }
    }

    #[test]
    fn places_come_once_each_and_the_best_aligned_pairs_first() {
        let w = normal("w", &[6, 6], DType::F64);
        let of = |pattern, count| {
            let (_, locals) = started(&Config { pattern, ..Config::default() }, &w, 6, count);
            (locals.get(INDICES).unwrap().to_vec1::<i64>().unwrap(), locals)
        };
        let (random, _) = of(Pattern::Random, 16);
        assert!(random.is_sorted_by(|a, b| a < b) && random.len() == 16);
        let (best, locals) = of(Pattern::TopK, 16);
        let scores = locals.get(U).unwrap().t().unwrap().matmul(&locals.get(V).unwrap().t().unwrap()).unwrap();
        let scores = scores.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (kept, left): (Vec<usize>, Vec<usize>) = (0..36).partition(|place| best.contains(&(*place as i64)));
        let least = kept.iter().map(|&place| scores[place]).fold(f64::MAX, f64::min);
        assert!(left.iter().all(|&place| scores[place] <= least));
    }

    /// A weight whose singular values are others, and some of whose vectors are mixed, is reached: the values are read off.
    #[test]
    fn a_planted_band_is_found_by_what_it_is_the_coefficients_of() {
        let w = normal("w", &[8, 6], DType::F64);
        let config = Config { bands: 1, ..Config::default() };
        let count = band(6, 1).len();
        let (svft, locals) = started(&config, &w, 6, count);
        let planted = with(&locals, &normal("planted", &[count], DType::F64));
        let target = WeightMap::graph(&svft, &w, &planted).unwrap();
        let between = locals.get(U).unwrap().t().unwrap().matmul(&(target - &w).unwrap()).unwrap();
        let between = between.matmul(&locals.get(V).unwrap().t().unwrap()).unwrap().flatten_all().unwrap();
        let found = between.index_select(&Tensor::new(band(6, 1), &Device::Cpu).unwrap(), 0).unwrap();
        assert!(largest(&(found - planted.get(VALUES).unwrap()).unwrap()) < 1e-5);
    }

    #[test]
    fn vectors_that_are_left_out_are_filled_up_at_right_angles() {
        let w = normal("w", &[7, 5], DType::F64);
        let config = Config { rank: 2, refill: true, ..Config::default() };
        let (_, locals) = started(&config, &w, 5, 5);
        let (u, v) = (locals.get(U).unwrap(), locals.get(V).unwrap());
        let one = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap();
        for square in [u.t().unwrap().matmul(u).unwrap(), v.matmul(&v.t().unwrap()).unwrap()] {
            assert!(largest(&(square - &one).unwrap()) < 1e-5);
        }
        let all = linalg::svd(&w).unwrap();
        let two = |x: &Tensor| x.narrow(1, 0, 2).unwrap();
        assert!(largest(&(two(u) - two(&all.u)).unwrap()) < 1e-5);
        // The others are none of the weight's own.
        let third = all.u.narrow(1, 2, 1).unwrap().t().unwrap().matmul(&u.narrow(1, 2, 3).unwrap()).unwrap();
        assert!(third.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap().iter().all(|by| *by < 0.999));
    }

    #[test]
    fn entries_behind_a_gate_start_away_from_the_base_by_half_of_them() {
        let w = normal("w", &[40, 40], DType::F64);
        let config = Config { start: Values::Kaiming, bands: 1, ..Config::default() };
        let count = band(40, 1).len();
        let mut at = attachment((40, 40), 40, count, Pattern::Banded);
        at.tensors.push(TensorSpec::trained(GATE, [1]));
        let svft = Svft { config };
        let (locals, _) = svft.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        let values = locals.get(VALUES).unwrap().to_vec1::<f32>().unwrap();
        let spread = (values.iter().map(|m| f64::from(m * m)).sum::<f64>() / count as f64).sqrt();
        assert!((spread / (2.0 / count as f64).sqrt() - 1.0).abs() < 0.2, "{spread}");
        let halved = svft.values(&locals).unwrap().to_vec1::<f32>().unwrap();
        assert!(halved.iter().zip(&values).all(|(half, whole)| (half - whole / 2.0).abs() < 1e-6));
    }

    #[test]
    fn pairs_in_opposite_directions_come_last_where_signs_count() {
        let w = normal("w", &[6, 6], DType::F64);
        let least = |signed| {
            let (_, locals) = started(&Config { pattern: Pattern::TopK, signed, ..Config::default() }, &w, 6, 12);
            let scores = locals.get(U).unwrap().t().unwrap().matmul(&locals.get(V).unwrap().t().unwrap()).unwrap();
            let scores = scores.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let chosen = locals.get(INDICES).unwrap().to_vec1::<i64>().unwrap();
            chosen.into_iter().map(|place| scores[place as usize]).fold(f64::MAX, f64::min)
        };
        assert!(least(true) > 0.0 && least(false) < 0.0);
    }

    /// Of a weight that is not square the vectors of the shorter side say which places are best, by the axes that they are nearest to.
    #[test]
    fn vectors_of_the_shorter_side_are_aligned_with_axes() {
        for shape in [(5, 9), (9, 5)] {
            let w = normal("w", &[shape.0, shape.1], DType::F64);
            let config = Config { pattern: Pattern::TopK, ..Config::default() };
            let (_, locals) = started(&config, &w, 5, 5);
            let square = if shape.0 < shape.1 { locals.get(U).unwrap() } else { locals.get(V).unwrap() };
            let sizes =
                square.abs().unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            let places = locals.get(INDICES).unwrap().to_vec1::<i64>().unwrap();
            let least = places.iter().map(|place| sizes[*place as usize]).fold(f64::INFINITY, f64::min);
            let beside = sizes.iter().enumerate().filter(|(at, _)| !places.contains(&(*at as i64)));
            assert!(places.len() == 5 && beside.map(|(_, size)| *size).fold(0.0, f64::max) <= least + 1e-6);
        }
    }
}
