//! The elementwise product of two trained low-rank matrices, one of which starts as the weight's own leading part: LoRA's number of
//! parameters for the product of two ranks; for tasks that are close to what the base can do.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · x_ti ((P_or A_ri) ⊙ (Q_ok B_ki))^T
//!      = x_ti W_oi^T + s · (x_ti (A ∘ B)_ni^T) (P ∘ Q)_on^T          n < r k: products of a number of each pair
//! P_or A_ri = Σ_r u_r σ_r v_r^T  at the start                        the r largest singular values σ of W_oi
//! ```
//!
//! # Symbols
//! `abba_B1` `P_or` and `abba_A1` `A_ri`, of rank `rank_1`, start as u √σ and √σ v; `abba_B2` `Q_ok` and `abba_A2` `B_ki`, of rank
//! `rank_2`, at 0 and uniform in ±1/sqrt(i); f32, trained. `scale` s.
//!
//! # Cost
//! `(rank_1 + rank_2)*(i+o)` parameters per linear. Rows go through the factors of rank r k, `2 r k (i+o)` FLOPs a token, where these are
//! cheaper than the weight, `r k (i+o) < i*o`; else, or where that costs less, each pass makes the new weight of the site and the gradient by it. The start
//! takes some `36 i o (r + 10)` FLOPs.
//!
//! # Limits
//! With Q = 0 it is the base, bit for bit. The change has rank r k at most, and reaches it. A weight of 0 does not train.
//!
//! # Departures
//! The scale is given itself; the authors' code has the root of the product of two numerators, 32 there. Singular values are found by
//! a randomised decomposition, not exactly.
//!
//! # Paper
//! ABBA: Highly Expressive Hadamard Product Adaptation for Large Language Models. Singhal, Ponkshe, Vartak, Vepakomma, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::linalg;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::hadamard::{Pairs, thin};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, own};

const P: &str = "abba_B1";
const A: &str = "abba_A1";
const Q: &str = "abba_B2";
const B: &str = "abba_A2";

/// Rounds of the randomised decomposition.
const ROUNDS: usize = 8;

/// Parameters of ABBA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the product that starts as the leading part of the weight.
    #[schemars(range(min = 1, max = 256))]
    rank_1: u32,
    /// Rank of the product that starts at 0.
    #[schemars(range(min = 1, max = 256))]
    rank_2: u32,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scale: f64,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { rank_1: 16, rank_2: 16, scale: 32.0 }
    }
}

pub(super) struct Abba {
    config: Config,
}

impl Method for Abba {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "ABBA: Highly Expressive Hadamard Product Adaptation for Large Language Models",
            authors: "Raghav Singhal, Kaustubh Ponkshe, Rohit Vartak, Praneeth Vepakomma",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "(rank_1 + rank_2)*(i+o)",
        graph_numbers: "2*rows*(i+o) + 22*o*i",
        start_numbers: "56*o*i",
        merges: Merges::Factors,
        ..Card::new(
            "abba",
            Point::Adapter,
            "The elementwise product of two trained low-rank matrices, one of which starts as the weight's own leading part: LoRA's \
             number of parameters for the product of two ranks; for tasks that are close to what the base can do.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Abba {
    /// Whether rows go through factors at a site, instead of through another weight.
    fn is_thin(at: &Attachment) -> bool {
        match at.tensors.as_slice() {
            [p, a, q, _] => thin(p.shape[1] * q.shape[1], (p.shape[0], a.shape[1])),
            _ => false,
        }
    }
}

impl Adapter for Abba {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let within = |field, rank: u32| {
                let most = o.min(i);
                let message = format!("is {rank}; {} is {o} by {i}, so its rank is at most {most}", site.id);
                if rank as usize > most { Err(Fault::new(field, message)) } else { Ok(rank as usize) }
            };
            let (r, k) = (within("rank_1", self.config.rank_1)?, within("rank_2", self.config.rank_2)?);
            let product = |left, right, r| [TensorSpec::trained(left, [o, r]), TensorSpec::trained(right, [r, i])];
            Ok(product(P, A, r).into_iter().chain(product(Q, B, k)).collect())
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (w_oi, mut directions) = (weight.dense(DType::F64)?, rng.named("directions"));
        let first = linalg::randomised_svd(&w_oi, self.config.rank_1 as usize, ROUNDS, &mut directions)?;
        let (a_ri, p_or) = factors::balanced(&first)?;
        starts::each(at, rng, |spec| match spec.local {
            P => Start::Is(p_or.clone()),
            A => Start::Is(a_ri.clone()),
            B => Start::kaiming(spec),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if Self::is_thin(at) { Port::Delta(self) } else { Port::Weight(self) }
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        if Self::is_thin(at) {
            let (left, right) = Pairs::of(tensors, [P, A, Q, B])?.factors()?;
            return Ok(Merged::Factors { left, right, scale: self.config.scale });
        }
        let w_oi = weight.dense(tensors.get(P)?.dtype())?;
        Ok(Merged::Weight { weight: WeightMap::graph(self, &w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Abba {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        Pairs::of(tensors, [P, A, Q, B])?.rows(x_ti, self.config.scale)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let (r, s) = (self.config.rank_1 as usize, self.config.rank_2 as usize);
        let (row, weight) = (Cost::new(r * s * (o + i), 0), Cost::new((r + s) * o * i, o * i));
        Some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Abba {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((w_oi + (Pairs::of(tensors, [P, A, Q, B])?.dense()? * self.config.scale)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;
    use candle_core::DType;

    use super::*;

    fn attachment() -> Attachment {
        let tensors = [(P, [7, 2]), (A, [2, 6]), (Q, [7, 3]), (B, [3, 6])];
        let tensors = tensors.map(|(local, shape)| TensorSpec::trained(local, shape)).to_vec();
        Attachment { site: SiteId::new("up"), tensors }
    }

    fn largest(x: &Tensor) -> f64 {
        let x = x.to_dtype(DType::F64).unwrap().abs().unwrap();
        x.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn started() -> (Abba, Tensor, Locals) {
        let abba = Abba { config: Config { rank_1: 2, rank_2: 3, scale: 4.0 } };
        let w = Rng::new(1, "w").normal_tensor(&[7, 6][..], 1.0, DType::F32).unwrap();
        let (locals, _) = abba.init(&attachment(), &w, &mut Rng::new(1, "init")).unwrap();
        (abba, w, locals)
    }

    #[test]
    fn the_first_product_starts_as_the_part_of_the_weight_nearest_to_it() {
        let (_, w, locals) = started();
        let of = |locals: &Locals| locals.get(P).unwrap().matmul(locals.get(A).unwrap()).unwrap();
        let length = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let off = length((&w - of(&locals)).unwrap());
        // No small change of its factors comes nearer.
        for seed in 0..20 {
            let near = |name: &str| {
                let tensor = locals.get(name).unwrap();
                let moved = Rng::new(seed, name).normal_tensor(tensor.shape(), 0.02, DType::F32).unwrap();
                (tensor + moved).unwrap()
            };
            let moved = near(P).matmul(&near(A)).unwrap();
            assert!(length((&w - moved).unwrap()) > off, "{seed}");
        }
    }

    #[test]
    fn at_the_start_the_factor_at_zero_has_a_gradient_and_its_partner_none() {
        let (abba, w, locals) = started();
        let leaves: Vec<_> = [Q, B].map(|name| autograd::leaf(locals.get(name).unwrap()).unwrap()).into();
        let tensors = locals.iter().map(|(name, tensor)| {
            let leaf = [Q, B].iter().position(|leaf| *leaf == name).map(|at| leaves[at].as_tensor());
            (name, leaf.unwrap_or(tensor).clone())
        });
        let made = WeightMap::graph(&abba, &w, &Locals::new("up", tensors)).unwrap();
        assert_eq!(largest(&(&made - &w).unwrap()), 0.0);
        let dw = w.ones_like().unwrap();
        let gradients = autograd::pull(&leaves.iter().collect::<Vec<_>>(), &[(&made, &dw)]).unwrap();
        assert!(largest(gradients[0].as_ref().unwrap()) > 0.0);
        assert_eq!(largest(gradients[1].as_ref().unwrap()), 0.0);
    }
}
