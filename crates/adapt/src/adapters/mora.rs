//! A square matrix between frozen maps that shorten a row and lengthen it again: at LoRA's number of parameters the change has a high
//! rank; for what has to be memorised, such as new knowledge.
//!
//! # Update
//! ```text
//! y_to  = x_ti W_oi^T + g(M_nn f(x_ti))                n = round(sqrt(r (i + o))), with rope rounded down to an even number
//! share f(x)_j = Σ_q x̄_(q n + j)                       g(h)_o = h_(o mod n)
//! rope  f(x)_q = R_q x̄_(q n ..), for each q            g(h)_o = h_(o mod q n), chunk after chunk
//! x̄     = x and its first numbers again, to a multiple of n
//! R_q   = the turn of pairs (j, j + n/2) by q · 10000^(-2j/n)
//! ```
//!
//! # Symbols
//! `mora` `M_nn`, f32, trained, started at 0. f and g have no parameters.
//!
//! # Cost
//! `n*n` parameters per linear, about `r*(i+o)`. A row costs `2 n²` FLOPs with share, `2 n i` with rope.
//! Rows are turned around in memory for small products. Where it costs less, and nothing is dropped, a pass makes another weight in place of
//! it, forward and in reverse, and the gradient by it.
//!
//! # Limits
//! With M = 0 it is the base, bit for bit. With share, the change has rank n at most, and where n = i = o it is M: any change of the
//! weight. With rope the rank has no such bound.
//!
//! # Departures
//! Of the paper's ways to shorten rows those that its code uses, by their code: sharing (1) and rotation (6). There is no scaling.
//! A square wider than the weight is refused. Merging and starting again (ReMoRA) is not part of it.
//!
//! # Paper
//! MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang, Huang, Luo, Zhang, Huang, Wei, Deng, Sun, Zhang, Wang, Zhuang,
//! 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::tiles::tiled;
use crate::parts::{linears, own};

const M: &str = "mora";

/// The base of the angles, as of rotary positions.
const THETA: f64 = 10_000.0;

/// How a row becomes as short as the square is wide.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Form {
    /// Chunk by chunk, each turned by its place: for small ranks.
    #[default]
    Rope,
    /// By the sum of its chunks: for large ranks.
    Share,
}

/// Parameters of MoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the LoRA that has as many parameters.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// How a row becomes as short as the square is wide.
    form: Form,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// The paper's values for small ranks.
    fn default() -> Self {
        Self { rank: 8, form: Form::Rope, dropout: 0.0 }
    }
}

pub(super) struct Mora {
    config: Config,
}

impl Method for Mora {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning",
            authors: "Ting Jiang, Shaohan Huang, Shengyue Luo, Zihan Zhang, Haizhen Huang, Furu Wei, Weiwei Deng, Feng Sun, Qi Zhang, \
                      Deqing Wang, Fuzhen Zhuang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(form == \"rope\", \
                     4*floor(floor(sqrt(rank*(i+o)) + 0.5)/2)*floor(floor(sqrt(rank*(i+o)) + 0.5)/2), \
                     floor(sqrt(rank*(i+o)) + 0.5)*floor(sqrt(rank*(i+o)) + 0.5))",
        merges: Merges::Weight,
        ..Card::new(
            "mora",
            Point::Adapter,
            "A square matrix between frozen maps that shorten a row and lengthen it again: at LoRA's number of parameters the \
             change has a high rank; for what has to be memorised, such as new knowledge.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Mora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let n = self.width(o, i);
            if n == 0 || n > o.min(i) {
                let rank = self.config.rank;
                let message = format!(
                    "is {rank}, which makes a square {n} wide; {} is {o} by {i}, so it is 1 (with rope 2) to {} wide",
                    site.id,
                    o.min(i)
                );
                return Err(Fault::new("rank", message));
            }
            Ok(vec![TensorSpec::trained(M, [n, n])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (m_nn, (o, i)) = (tensors.get(M)?, weight.shape());
        // What it adds to the rows of the identity are the columns of its change.
        let change_io = self.rows(&Tensor::eye(i, m_nn.dtype(), m_nn.device())?, m_nn, o)?;
        Ok(Merged::Weight { weight: (weight.dense(m_nn.dtype())? + change_io.t()?)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl Mora {
    /// How wide the square is.
    fn width(&self, o: usize, i: usize) -> usize {
        let n = (f64::from(self.config.rank) * (o + i) as f64).sqrt().round() as usize;
        if self.config.form == Form::Rope { n / 2 * 2 } else { n }
    }

    /// What is added to rows of `output` numbers.
    fn rows(&self, x_ti: &Tensor, m_nn: &Tensor, output: usize) -> attune_points::Result<Tensor> {
        let ((t, i), n) = (x_ti.dims2()?, m_nn.dim(0)?);
        let chunks = i.div_ceil(n);
        let x_tqn = tiled(x_ti, 1, chunks * n)?.reshape((t, chunks, n))?;
        let h = match self.config.form {
            Form::Share => ops::linear(&x_tqn.sum(1)?, m_nn, None)?,
            Form::Rope => {
                let (cos, sin) = turns(chunks, n, x_ti)?;
                let turned = ops::rope(&x_tqn, &cos, &sin)?.contiguous()?.reshape((t * chunks, n))?;
                ops::linear(&turned, m_nn, None)?.reshape((t, chunks * n))?
            }
        };
        tiled(&h, 1, output)
    }
}

/// Cosines and sines of the angles of each chunk, `[q, n/2]`.
fn turns(chunks: usize, n: usize, like: &Tensor) -> attune_points::Result<(Tensor, Tensor)> {
    let angle = |q: usize, j: usize| q as f64 * THETA.powf(-2.0 * j as f64 / n as f64);
    let table = |of: fn(f64) -> f64| -> attune_points::Result<Tensor> {
        let values: Vec<f64> = (0..chunks).flat_map(|q| (0..n / 2).map(move |j| of(angle(q, j)))).collect();
        Ok(Tensor::from_vec(values, (chunks, n / 2), like.device())?.to_dtype(like.dtype())?)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

impl RowMap for Mora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        self.rows(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(M)?, cx.output)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let n = self.width(o, i).max(1);
        let (chunks, turned) = if self.config.form == Form::Rope { (i.div_ceil(n), 4 * i) } else { (1, i) };
        let (row, weight) = (Cost::new(chunks * n * n, i + turned + o), Cost::new(0, 2 * o * i));
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Mora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let ((o, i), m_nn) = (w_oi.dims2()?, tensors.get(M)?);
        let n = m_nn.dim(0)?;
        let chunks = i.div_ceil(n);
        let of_chunks = match self.config.form {
            Form::Share => tiled(m_nn, 1, chunks * n)?,
            Form::Rope => {
                let (cos, sin) = turns(chunks, n, m_nn)?;
                let zeros = |count: usize| Tensor::zeros((n, count * n), m_nn.dtype(), m_nn.device());
                let of_chunk = |q: usize| -> candle_core::Result<Tensor> {
                    // Columns of M are turned the other way round.
                    let turned = ops::rope(m_nn, &cos.narrow(0, q, 1)?, &sin.narrow(0, q, 1)?.neg()?)?;
                    Tensor::cat(&[&zeros(q)?, &turned, &zeros(chunks - 1 - q)?], 1)
                };
                Tensor::cat(&(0..chunks).map(of_chunk).collect::<candle_core::Result<Vec<_>>>()?, 0)?
            }
        };
        // The last chunk of a row is filled up with its first numbers.
        let beyond = chunks * n - i;
        let mut change = of_chunks.narrow(1, 0, i)?.contiguous()?;
        if beyond > 0 {
            let again = of_chunks.narrow(1, i, beyond)?.pad_with_zeros(1, 0, i - beyond)?;
            change = (change + again)?;
        }
        Ok((w_oi + tiled(&change, 0, o)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn of(form: Form, rank: u32) -> Mora {
        Mora { config: Config { form, rank, dropout: 0.0 } }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn change(form: Form, m: &Tensor, (o, i): (usize, usize)) -> Vec<Vec<f64>> {
        let at = Attachment { site: attune_architecture::SiteId::new("up"), tensors: vec![] };
        let none = Tensor::zeros((o, i), DType::F64, m.device()).unwrap();
        match of(form, 1).merge(&at, &Locals::new("up", [(M, m.clone())]), &none).unwrap() {
            Merged::Weight { weight, .. } => weight.to_vec2().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Outputs and inputs that are and are not multiples of the square's width.
    const SHAPES: [(usize, usize); 5] = [(8, 8), (9, 6), (6, 9), (4, 4), (7, 13)];

    #[test]
    fn shared_numbers_of_the_square_are_those_of_inputs_and_outputs_modulo_its_width() {
        let m = tensor("m", &[4, 4]);
        let entries = m.to_vec2::<f64>().unwrap();
        for (o, i) in SHAPES {
            let padded = i.div_ceil(4) * 4;
            for (row, values) in change(Form::Share, &m, (o, i)).iter().enumerate() {
                for (col, value) in values.iter().enumerate() {
                    // The first inputs come again where a chunk is filled up.
                    let places = (0..padded).filter(|place| place % i == col);
                    let by_hand: f64 = places.map(|place| entries[row % 4][place % 4]).sum();
                    assert!((value - by_hand).abs() < 1e-12, "{o} by {i}");
                }
            }
        }
        // As wide as the weight it is the change itself.
        assert_eq!(change(Form::Share, &m, (4, 4)), entries);
    }

    #[test]
    fn a_chunk_is_turned_by_its_place_and_goes_to_its_own_outputs() {
        let m = tensor("m", &[4, 4]);
        let entries = m.to_vec2::<f64>().unwrap();
        for (o, i) in SHAPES {
            let padded = i.div_ceil(4) * 4;
            for (row, values) in change(Form::Rope, &m, (o, i)).iter().enumerate() {
                let (chunk, row) = (row % padded / 4, row % padded % 4);
                for (col, value) in values.iter().enumerate() {
                    let places = (4 * chunk..4 * chunk + 4).filter(|place| place % i == col);
                    let entry = |place: usize| {
                        let (j, pair) = (place % 4 % 2, place % 4 / 2);
                        let (sin, cos) = (chunk as f64 * THETA.powf(-2.0 * j as f64 / 4.0)).sin_cos();
                        let (first, second) = (entries[row][j], entries[row][j + 2]);
                        if pair == 0 { cos * first + sin * second } else { cos * second - sin * first }
                    };
                    let by_hand: f64 = places.map(entry).sum();
                    assert!((value - by_hand).abs() < 1e-12, "{o} by {i}");
                }
            }
        }
    }

    #[test]
    fn it_has_as_many_parameters_as_lora_of_its_rank() {
        for (rank, o, i) in [(8, 4096, 4096), (8, 1024, 4096), (256, 4096, 4096)] {
            let lora = f64::from(rank) * (o + i) as f64;
            for form in [Form::Rope, Form::Share] {
                let n = of(form, rank).width(o, i) as f64;
                assert!((n * n / lora - 1.0).abs() < 0.01, "{n}");
            }
        }
    }
}
