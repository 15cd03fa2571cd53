//! A core in a low-rank space: a change of a small matrix that starts at 0 between two outer factors that do not, each side with a
//! rank of its own; where a LoRA's zero factor learns too late or too fast against the other.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + scale · ((drop(x_ti) P_pi^T) G_qp^T) Q_oq^T              p = rank_in, q = rank_out
//! ```
//!
//! # Symbols
//! `flora_in` `P_pi`, `flora_core` `G_qp` and `flora_out` `Q_oq`, f32, trained; P starts normal with variance 1/(2 i), Q with 1/(2 q), G at 0.
//! `drop` is dropout on the component's input.
//!
//! # Cost
//! `p q + p i + q o` parameters per linear; `2 (p i + p q + q o)` extra FLOPs per token forward.
//!
//! # Limits
//! With G = 0 it is the base, bit for bit. With p = q and G = 1 fixed it is LoRA. Its rank is at most min(p, q).
//!
//! # Departures
//! Linears only, the matrix case of Tucker's form: there are no convolutions here. Outer factors start by the width that each of
//! them reads, as linears' weights do.
//!
//! # Paper
//! FLoRA: Low-Rank Core Space for N-dimension. Si, Wang, Yang, Xu, Li, Dai, Qiao, Yang, Shen, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const IN: &str = "flora_in";
const CORE: &str = "flora_core";
const OUT: &str = "flora_out";

/// Parameters of FLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank on the side of the input.
    #[schemars(range(min = 1, max = 4096))]
    rank_in: u32,
    /// Rank on the side of the output.
    #[schemars(range(min = 1, max = 4096))]
    rank_out: u32,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scale: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { rank_in: 8, rank_out: 8, scale: 4.0, dropout: 0.01 }
    }
}

pub(super) struct FloraTucker {
    config: Config,
}

impl Method for FloraTucker {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "FLoRA: Low-Rank Core Space for N-dimension",
            authors: "Chongjie Si, Xuehui Wang, Xue Yang, Zhengqin Xu, Qingyun Li, Jifeng Dai, Yu Qiao, Xiaokang Yang, Wei Shen",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank_in*rank_out + rank_in*i + rank_out*o",
        merges: Merges::Factors,
        ..Card::new(
            "flora-tucker",
            Point::Adapter,
            "A core in a low-rank space: a change of a small matrix that starts at 0 between two outer factors that do not, each \
             side with a rank of its own; where a LoRA's zero factor learns too late or too fast against the other.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for FloraTucker {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (p, q) = (self.config.rank_in as usize, self.config.rank_out as usize);
        linears::attach(sites, |site, output, input| {
            for (field, rank, width) in [("rank_in", p, input), ("rank_out", q, output)] {
                if rank > width {
                    let message = format!("is {rank}; {} is {output} by {input}, so {width} is the most", site.id);
                    return Err(Fault::new(field, message));
                }
            }
            let core = TensorSpec::trained(CORE, [q, p]);
            Ok(vec![core, TensorSpec::trained(IN, [p, input]), TensorSpec::trained(OUT, [output, q])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.shape.as_slice() {
            _ if spec.local == CORE => Start::Constant(0.0),
            // Kaiming's normal with a = √3: a variance of 2 / ((1 + a²) i).
            [.., read] => Start::Normal(1.0 / (2.0 * *read as f64).sqrt()),
            [] => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = ops::matmul(tensors.get(OUT)?, tensors.get(CORE)?)?;
        Ok(Merged::Factors { left, right: tensors.get(IN)?.clone(), scale: self.config.scale })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for FloraTucker {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { scale, dropout, .. } = self.config;
        let h_tp = ops::linear(&dropped(x_ti, dropout, cx)?, tensors.get(IN)?, None)?;
        let h_tq = (ops::linear(&h_tp, tensors.get(CORE)?, None)? * scale)?;
        Ok(ops::linear(&h_tq, tensors.get(OUT)?, None)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_points::adapter::DropoutMask;
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn delta(x: &Tensor, core: &Tensor, outer: [&Tensor; 2], dropout: Option<&dyn DropoutMask>) -> Tensor {
        let locals = Locals::new("q_proj", [(CORE, core.clone()), (IN, outer[0].clone()), (OUT, outer[1].clone())]);
        let (site, layout) = (attune_architecture::SiteId::new("q_proj"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 0, dropout, layout: &layout, rows: None };
        let config = Config { scale: 2.0, dropout: 0.5, ..Config::default() };
        FloraTucker { config }.graph(x, &locals, &cx).unwrap()
    }

    /// `Σ_pq G_qp Q_oq P_pi`, entry by entry.
    #[test]
    fn products_mode_by_mode_are_the_sum_over_the_core() {
        let (core, input, output) = (normal("g", [2, 3]), normal("p", [3, 5]), normal("q", [4, 2]));
        let one = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap();
        let found = delta(&one, &core, [&input, &output], None).t().unwrap().to_vec2::<f64>().unwrap();
        let of = |tensor: &Tensor| tensor.to_vec2::<f64>().unwrap();
        let (core, input, output) = (of(&core), of(&input), of(&output));
        for (o, i) in (0..4).flat_map(|o| (0..5).map(move |i| (o, i))) {
            let terms = (0..2).flat_map(|q| (0..3).map(move |p| (q, p)));
            let sum: f64 = terms.map(|(q, p)| core[q][p] * output[o][q] * input[p][i]).sum();
            assert!((found[o][i] - 2.0 * sum).abs() < 1e-12);
        }
    }

    #[test]
    fn with_a_core_of_one_it_is_lora() {
        let (a, b, x) = (normal("a", [3, 5]), normal("b", [4, 3]), normal("x", [6, 5]));
        let one = Tensor::eye(3, DType::F64, &Device::Cpu).unwrap();
        let lora = (x.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap() * 2.0).unwrap();
        assert!(difference(&delta(&x, &one, [&a, &b], None), &lora) < 1e-12);
    }

    #[test]
    fn dropout_is_on_the_input() {
        struct Keep(Tensor);
        impl DropoutMask for Keep {
            fn mask(
                &self,
                _: &attune_architecture::SiteId,
                _: usize,
                _: f64,
                _: &Tensor,
            ) -> attune_points::Result<Tensor> {
                Ok(self.0.clone())
            }
        }
        let (core, input, output) = (normal("g", [2, 3]), normal("p", [3, 5]), normal("q", [4, 2]));
        let (x, mask) = (normal("x", [6, 5]), normal("mask", [6, 5]));
        let dropped = delta(&x, &core, [&input, &output], Some(&Keep(mask.clone())));
        assert_eq!(difference(&dropped, &delta(&(x * mask).unwrap(), &core, [&input, &output], None)), 0.0);
    }
}
