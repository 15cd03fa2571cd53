//! Orthogonal fine-tuning: turns the inputs of a weight, block by block, which keeps the lengths of its rows and the angles
//! between them; where a model shall learn a task and keep what it knows.
//!
//! # Update
//! ```text
//! W'_oi = W_oi R^T              R = diag(R_1 … R_n), R_k of b by b, n b = i           y_to = x_ti R W_oi^T
//! R_k   = 1 + 2 Q_k + 2 Q_k² + … + 2 Q_k^(terms-2) + Q_k^(terms-1)                    Q_k = U_k - U_k^T
//! R_k   = (1 - Q_k)(1 + Q_k)⁻¹                                                        with terms = 0
//! ```
//!
//! # Symbols
//! `oft_R`, the entries of U_k above its diagonal, row after row, `[n, b (b - 1) / 2]`, or `[1, …]` with `block_share`; f32, trained,
//! 0 at the start.
//!
//! # Cost
//! `i (b - 1) / 2` parameters per linear, or `b (b - 1) / 2` with `block_share`. Each pass makes `W'` twice, forward and reverse, at
//! `2 o i b` FLOPs each, and the gradient by it, `2 i o` FLOPs per token. The blocks themselves take some `2 terms b²` FLOPs per input, or
//! `6 b²` for the inverse.
//!
//! # Limits
//! With U = 0 it is the base, bit for bit. With terms = 0 `W' W'^T = W W^T`; a series is off by a power of Q.
//!
//! # Departures
//! none; agrees with PEFT, in which the series turns the other way than the inverse, and 4 terms are the same as 3. A size that
//! does not divide a width is refused, where PEFT takes the nearest that does. No dropout of blocks, and no bound on how far they
//! turn (COFT).
//!
//! # Paper
//! Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf, 2023.
//! The series: Orthogonal Finetuning Made Scalable. Qiu, Liu, Weller, Schölkopf, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears, orthogonal};

const R: &str = "oft_R";
const PEFT_TYPE: &str = "OFT";

/// Parameters of OFT.
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
    /// Turns all blocks of a weight alike.
    block_share: bool,
    /// Terms of the series in place of the inverse; 0 for the inverse itself, which is exact and dearer.
    #[schemars(range(min = 0, max = 64))]
    terms: u32,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { block_size: 32, blocks: 0, block_share: false, terms: 5 }
    }
}

pub(super) struct Oft {
    config: Config,
}

impl Method for Oft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
            authors: "Zeju Qiu, Weiyang Liu, Haiwen Feng, Yuxuan Xue, Yao Feng, Zhen Liu, Dan Zhang, Adrian Weller, Bernhard Schölkopf",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "(i*(not block_share) + (block_size + min(blocks, 1)*i/max(blocks, 1))*block_share)*(block_size + \
                     min(blocks, 1)*i/max(blocks, 1) - 1)/2",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        rules: &[
            Rule {
                when: "true",
                require: "(block_size == 0) != (blocks == 0)",
                message: "and `blocks` say the same in two ways; expected one of them, and 0 for the other",
                path: "block_size",
            },
            Rule {
                when: "true",
                require: "terms != 1",
                message: "is 1, with which nothing turns; expected 0, or 2 and more",
                path: "terms",
            },
        ],
        ..Card::new(
            "oft",
            Point::Adapter,
            "Orthogonal fine-tuning: turns the inputs of a weight, block by block, which keeps the lengths of its rows and the \
             angles between them; where a model shall learn a task and keep what it knows.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Oft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { block_size, blocks, block_share, .. } = self.config;
        linears::attach(sites, |site, _, input| {
            let (n, b) = orthogonal::blocks(site, input, block_size, blocks)?;
            if b == 1 {
                let field = if blocks > 0 { "blocks" } else { "block_size" };
                let message = format!("makes blocks of width 1 at {}, which cannot turn; expected wider ones", site.id);
                return Err(Fault::new(field, message));
            }
            Ok(vec![TensorSpec::trained(R, [if block_share { 1 } else { n }, b * (b - 1) / 2])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(R)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { block_size, blocks, block_share, terms } = self.config;
        let layout = Layout {
            r: blocks,
            oft_block_size: block_size,
            block_share,
            use_cayley_neumann: terms > 0,
            num_cayley_neumann_terms: if terms > 0 { terms } else { Layout::default().num_cayley_neumann_terms },
            ..Layout::default()
        };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(R, "oft_R.weight")]))
    }
}

impl WeightMap for Oft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let upper = tensors.get(R)?;
        // The width b by the number of entries, b (b - 1) / 2.
        let b = ((1.0 + (1.0 + 8.0 * upper.dim(1)? as f64).sqrt()) / 2.0).round() as usize;
        let q_nbb = orthogonal::skew(upper, b)?;
        let r_nbb = match self.config.terms {
            0 => orthogonal::cayley(&q_nbb)?,
            terms => orthogonal::series(&q_nbb, terms)?,
        };
        orthogonal::turn(w_oi, &r_nbb)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    r: u32,
    oft_block_size: u32,
    module_dropout: f64,
    coft: bool,
    eps: f64,
    block_share: bool,
    use_cayley_neumann: bool,
    num_cayley_neumann_terms: u32,
    fan_in_fan_out: bool,
    bias: String,
    init_weights: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            r: 0,
            oft_block_size: 32,
            module_dropout: 0.0,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            fan_in_fan_out: false,
            bias: "none".to_owned(),
            init_weights: true,
        }
    }
}

/// What `adapter_config.json` of a PEFT OFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let mut faults = Vec::new();
    if layout.module_dropout != 0.0 {
        let message = format!(
            "is {}; OFT has no dropout here. Set it to 0 in the file: it changes nothing about what the adapter computes",
            layout.module_dropout
        );
        faults.push(Fault::new("module_dropout", message));
    }
    if layout.coft {
        faults.push(Fault::new("coft", "is true; a bound on how far blocks turn is not known here"));
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let params = json!({
        "block_size": layout.oft_block_size,
        "blocks": layout.r,
        "block_share": layout.block_share,
        "terms": if layout.use_cayley_neumann { layout.num_cayley_neumann_terms } else { 0 },
    });
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Oft::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn normal(name: &str, shape: &[usize], std: f64) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, std, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn made(terms: u32, w: &Tensor, upper: &Tensor) -> Tensor {
        let oft = Oft { config: Config { terms, ..Config::default() } };
        oft.graph(w, &Locals::new("q_proj", [(R, upper.clone())])).unwrap()
    }

    #[test]
    fn with_the_inverse_rows_keep_their_lengths_and_angles() {
        let (w, upper) = (normal("w", &[5, 12], 1.0), normal("u", &[3, 6], 1.0));
        let gram = |w: &Tensor| w.matmul(&w.t().unwrap()).unwrap();
        let made = made(0, &w, &upper);
        assert!(difference(&made, &w) > 0.1);
        assert!(difference(&gram(&made), &gram(&w)) < 1e-12);
    }

    /// Of the inverse's expansion 1 + 2 Q + 2 Q² + … a series of n terms leaves out from 2 Q^(n-1) - Q^(n-1) on: its error falls by
    /// the size of Q with each term, and its last term has half the weight.
    #[test]
    fn a_series_is_off_by_the_power_of_its_last_term() {
        let off = |terms: u32, size: f64| {
            let q = orthogonal::skew(&normal("u", &[2, 6], size), 4).unwrap();
            let exact = orthogonal::cayley(&q.neg().unwrap()).unwrap();
            difference(&orthogonal::series(&q, terms).unwrap(), &exact)
        };
        for (terms, order) in [(2, 2), (3, 3), (5, 4), (6, 5), (8, 7)] {
            let ratio = off(terms, 0.02) / off(terms, 0.01);
            assert!((ratio.log2() - f64::from(order)).abs() < 0.2, "{terms} terms: {}", ratio.log2());
        }
        assert_eq!(off(3, 0.1), off(4, 0.1));
    }

    #[test]
    fn a_shared_block_turns_all() {
        let (w, upper) = (normal("w", &[5, 12], 1.0), normal("u", &[1, 6], 0.1));
        let each = Tensor::cat(&[&upper, &upper, &upper], 0).unwrap();
        assert!(difference(&made(5, &w, &upper), &made(5, &w, &each)) < 1e-14);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        let config = json!({"peft_type": "OFT", "oft_block_size": 4, "module_dropout": 0.1, "coft": true});
        let faults = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`module_dropout` is 0.1; OFT has no dropout here"), "{}", faults[0]);
        assert!(faults[1].to_string().starts_with("`coft` is true"), "{}", faults[1]);
    }
}
