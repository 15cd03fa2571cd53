//! Orthogonal butterflies: turns the inputs of a weight by a few factors whose blocks interleave, and scales its rows; the reach of
//! wide blocks at the price of narrow ones.
//!
//! # Update
//! ```text
//! W'_oi = s_o · W_oi (B_m … B_1)^T                                   y_to = s_o · (x_ti B_m … B_1 W_oi^T)
//! B_k   = P_k diag(R_k1 … R_kn) P_k^T                                R = (1 - Q)(1 + Q)⁻¹         Q = (U - U^T) / 2
//! ```
//! P_k^T orders the inputs of 2^(k-1) neighbouring blocks by halves of a block, the even ones before the odd ones; P_1 = 1.
//!
//! # Symbols
//! `boft_R` `U`, `[m, n, b, b]`, b · n = i, 0 at the start, and `boft_s` `s_o`, `[o, 1]`, 1 at the start; f32, trained.
//!
//! # Cost
//! `m i b + o` parameters per linear, half of which matter: U's other half is the same with the other sign. Each pass makes `W'` twice,
//! forward and reverse, at `2 m o i b` FLOPs each, and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! With U = 0 and s = 1 it is the base, bit for bit. With one factor and s = 1 it is OFT with the exact inverse, U twice as large.
//! Whatever U is, `W'/s` has the lengths and angles of rows of W.
//!
//! # Departures
//! none; agrees with PEFT, which has one factor where its CUDA kernel is not built. No dropout of blocks.
//!
//! # Paper
//! Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu, Qiu, Feng, Xiu, Xue, Yu, Feng, Liu, Heo, Peng,
//! Wen, Black, Weller, Schölkopf, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears, orthogonal};

const R: &str = "boft_R";
const S: &str = "boft_s";
const PEFT_TYPE: &str = "BOFT";

/// Parameters of BOFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of a block, which divides the input width; 0 where `blocks` says how many there are.
    #[schemars(range(min = 0, max = 4096))]
    block_size: u32,
    /// Number of blocks, which divides the input width; 0 where `block_size` says how wide they are.
    #[schemars(range(min = 0, max = 65536))]
    blocks: u32,
    /// Butterfly factors; each doubles how many inputs an input is mixed with. With more than one, blocks have an even width and
    /// their number is a multiple of 2^(factors - 1).
    #[schemars(range(min = 1, max = 16))]
    factors: u32,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { block_size: 4, blocks: 0, factors: 1 }
    }
}

pub(super) struct Boft {
    config: Config,
}

impl Method for Boft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
            authors: "Weiyang Liu, Zeju Qiu, Yao Feng, Yuliang Xiu, Yuxuan Xue, Longhui Yu, et al.",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "factors*i*(block_size + min(blocks, 1)*i/max(blocks, 1)) + o",
        graph_numbers: "rows*(i+o) + 15*o*i",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        rules: &[Rule {
            when: "true",
            require: "(block_size == 0) != (blocks == 0)",
            message: "and `blocks` say the same in two ways; expected one of them, and 0 for the other",
            path: "block_size",
        }],
        ..Card::new(
            "boft",
            Point::Adapter,
            "Orthogonal butterflies: turns the inputs of a weight by a few factors whose blocks interleave, and scales its rows; \
             the reach of wide blocks at the price of narrow ones.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Boft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { block_size, blocks, factors } = self.config;
        linears::attach(sites, |site, output, input| {
            let (n, b) = orthogonal::blocks(site, input, block_size, blocks)?;
            let field = if blocks > 0 { "blocks" } else { "block_size" };
            if b == 1 || (factors > 1 && b % 2 == 1) {
                let message = format!("makes blocks of width {b} at {}; expected an even width", site.id);
                return Err(Fault::new(field, message));
            }
            let group = 1usize << (factors - 1);
            if !n.is_multiple_of(group) {
                let message = format!("is {factors}, for which {n} blocks at {} are no multiple of {group}", site.id);
                return Err(Fault::new("factors", message));
            }
            // Decay would pull a row towards no length at all.
            let scale = TensorSpec { decay: false, ..TensorSpec::trained(S, [output, 1]) };
            Ok(vec![TensorSpec::trained(R, [factors as usize, n, b, b]), scale])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| Start::Constant(if spec.local == S { 1.0 } else { 0.0 }))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(R)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { block_size, blocks, factors } = self.config;
        let layout = Layout {
            boft_block_size: block_size,
            boft_block_num: blocks,
            boft_n_butterfly_factor: factors,
            ..Layout::default()
        };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(R, R), (S, S)]))
    }
}

impl WeightMap for Boft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let u = tensors.get(R)?;
        let (factors, n, b, _) = u.dims4()?;
        let (o, i) = w_oi.dims2()?;
        let u = u.reshape((factors * n, b, b))?;
        let r_nbb = orthogonal::cayley(&((&u - u.transpose(1, 2)?)? * 0.5)?)?;
        let mut w_oi = w_oi.clone();
        for factor in 0..factors {
            let of_factor = r_nbb.narrow(0, factor * n, n)?;
            if factor == 0 {
                w_oi = orthogonal::turn(&w_oi, &of_factor)?;
                continue;
            }
            // W P: in each group the halves of blocks of its first part come to even places, those of its second to odd ones.
            let (half, pairs) = (b / 2, 1 << factor);
            let groups = i / (2 * pairs * half);
            let mixed = w_oi.reshape(&[o, groups, 2, pairs, half][..])?.transpose(2, 3)?.contiguous()?;
            let turned = orthogonal::turn(&mixed.reshape((o, i))?, &of_factor)?;
            let back = turned.reshape(&[o, groups, pairs, 2, half][..])?.transpose(2, 3)?.contiguous()?;
            w_oi = back.reshape((o, i))?;
        }
        Ok(ops::scale_rows(&w_oi, tensors.get(S)?)?)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    boft_block_size: u32,
    boft_block_num: u32,
    boft_n_butterfly_factor: u32,
    boft_dropout: f64,
    fan_in_fan_out: bool,
    bias: String,
    init_weights: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            boft_block_size: 4,
            boft_block_num: 0,
            boft_n_butterfly_factor: 1,
            boft_dropout: 0.0,
            fan_in_fan_out: false,
            bias: "none".to_owned(),
            init_weights: true,
        }
    }
}

/// What `adapter_config.json` of a PEFT BOFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    if layout.boft_dropout != 0.0 {
        let message = format!(
            "is {}; BOFT has no dropout here. Set it to 0 in the file: it changes nothing about what the adapter computes",
            layout.boft_dropout
        );
        return Err(vec![Fault::new("boft_dropout", message)]);
    }
    let params = json!({
        "block_size": layout.boft_block_size,
        "blocks": layout.boft_block_num,
        "factors": layout.boft_n_butterfly_factor,
    });
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Boft::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn made(w: &Tensor, u: &Tensor, s: &Tensor) -> Tensor {
        let boft = Boft { config: Config::default() };
        boft.graph(w, &Locals::new("q_proj", [(R, u.clone()), (S, s.clone())])).unwrap()
    }

    #[test]
    fn rows_keep_their_angles_and_get_the_lengths_of_the_scale() {
        let (w, u, s) = (normal("w", &[5, 16]), normal("u", &[3, 4, 4, 4]), normal("s", &[5, 1]));
        let scaled = w.broadcast_mul(&s).unwrap();
        let gram = |w: &Tensor| w.matmul(&w.t().unwrap()).unwrap();
        assert!(difference(&gram(&made(&w, &u, &s)), &gram(&scaled)) < 1e-12);
    }

    /// A factor by its definition: the matrix of the permutation, a block-diagonal one, and the permutation back.
    #[test]
    fn factors_are_those_of_matrices_of_permutations() {
        let (i, b, factors) = (16, 4, 3);
        let (w, u) = (normal("w", &[5, i]), normal("u", &[factors, i / b, b, b]));
        let ones = Tensor::ones((5, 1), DType::F64, &Device::Cpu).unwrap();
        let mut by_hand = w.clone();
        for factor in 0..factors {
            let group = b << factor;
            // Place by place the input that comes there.
            let from = |place: usize| {
                let (chunk, within) = (place % group / (b / 2), place % (b / 2));
                let pairs = group / b;
                let source = if chunk < pairs { 2 * chunk } else { 2 * (chunk - pairs) + 1 };
                place / group * group + source * (b / 2) + within
            };
            let mut p = vec![0.0; i * i];
            (0..i).for_each(|place| p[place * i + from(place)] = 1.0);
            let p = Tensor::from_vec(p, (i, i), &Device::Cpu).unwrap();
            let of_factor = u.get(factor).unwrap();
            let q = ((&of_factor - of_factor.transpose(1, 2).unwrap()).unwrap() * 0.5).unwrap();
            let r = orthogonal::cayley(&q).unwrap();
            let one = Tensor::eye(i, DType::F64, &Device::Cpu).unwrap();
            let diagonal = orthogonal::turn(&one, &r).unwrap().t().unwrap();
            let whole = p.matmul(&diagonal.matmul(&p.t().unwrap()).unwrap()).unwrap();
            by_hand = by_hand.matmul(&whole.t().unwrap()).unwrap();
        }
        assert!(difference(&made(&w, &u, &ones), &by_hand) < 1e-12);
    }

    /// With m factors an input reaches b 2^(m - 1) outputs of the turn.
    #[test]
    fn each_factor_doubles_the_reach() {
        let one = Tensor::eye(16, DType::F64, &Device::Cpu).unwrap();
        let ones = Tensor::ones((16, 1), DType::F64, &Device::Cpu).unwrap();
        for (factors, reach) in [(1, 4), (2, 8), (3, 16)] {
            let turned = made(&one, &normal("u", &[factors, 4, 4, 4]), &ones).to_vec2::<f64>().unwrap();
            let counts: Vec<usize> =
                turned.iter().map(|row| row.iter().filter(|value| value.abs() > 1e-9).count()).collect();
            assert_eq!(counts, [reach; 16], "{factors} factors");
        }
    }

    #[test]
    fn dropout_of_blocks_is_refused() {
        let config = json!({"peft_type": "BOFT", "boft_dropout": 0.1});
        let faults = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`boft_dropout` is 0.1; BOFT has no dropout here"), "{}", faults[0]);
    }
}
