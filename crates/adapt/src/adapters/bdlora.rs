//! LoRA one of whose factors is made of blocks on its diagonal, so that a model whose linears are split over devices serves it without a
//! further exchange: each device has a block, and reads what it has already.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s (drop(x_ti) A_ri^T) B_or^T                               s = alpha / r, or alpha / √r
//! A_ri = diag(A_1, …, A_n), each r/n by i/n       at linears out of an attention or an MLP, B_or whole
//! B_or = diag(B_1, …, B_n), each o/n by r/n       at all others, A_ri whole                        n = blocks
//! ```
//! With `side: outer` it is the other way round.
//!
//! # Symbols
//! `lora_A`, `[r, i]` or `[r, i/n]` with the blocks one below the other, and `lora_B`, `[o, r]` or `[o, r/n]` likewise, f32, trained. A starts uniform in ±1/√i, in
//! blocks in ±√(6 n / i), B at 0. `drop` is dropout.
//!
//! # Cost
//! `rank (i/n + o)` parameters at linears out of a block, `rank (i + o/n)` at others, and twice as many extra FLOPs per token.
//!
//! # Limits
//! One block is LoRA. It merges as LoRA does, with zeros beside the blocks.
//!
//! # Departures
//! none; agrees with PEFT's `use_bdlora`. PEFT is told by lists of names which linears have which factor in blocks; here it follows from where a linear leads, and
//! a folder whose lists say otherwise is refused.
//!
//! # Paper
//! Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving. Wang et al., 2025.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Place, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
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
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, keys, linears};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// The key of PEFT's configuration that has what is its own.
const OWN: &str = "use_bdlora";

/// What linears are called that lead out of an attention or an MLP, and the others of a block.
const OUT: [&str; 4] = ["o_proj", "down_proj", "c_proj", "w2"];
const IN: [&str; 9] = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc", "w1", "w3"];

/// On which side of a factor's linear the blocks are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Side {
    /// Within an attention or an MLP, whose heads and neurons are split over devices.
    #[default]
    Inner,
    /// Toward the stream.
    Outer,
}

/// Parameters of BD-LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change, a multiple of `blocks`.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
    rslora: bool,
    /// Blocks of a factor: over how many devices it is to be split.
    #[schemars(range(min = 1, max = 4096))]
    blocks: u32,
    /// On which side of linears the blocks are.
    side: Side,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// PEFT's values, but for the blocks: with its one it is LoRA.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            blocks: 2,
            side: Side::default(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Bdlora {
    scaling: Scaling,
    config: Config,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Rows>,
    /// The map of all others.
    rows: Rows,
}

/// What is added at a linear. Which factor has blocks, shapes say.
#[derive(Debug, Clone, Copy)]
struct Rows {
    factor: f64,
    dropout: f64,
    blocks: usize,
}

impl Method for Bdlora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving",
            authors: "Xinyu Wang, Jonas M. Kübler, Kailash Budhathoki, Yida Wang, Matthäus Kleindessner",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(side == \"inner\" and out == 1 or side != \"inner\" and out == 0, rank*(i/blocks + o), rank*(i + o/blocks))",
        merges: Merges::Factors,
        peft_type: Some("LORA"),
        ..Card::new(
            "bdlora",
            Point::Adapter,
            "LoRA one of whose factors is made of blocks on its diagonal, so that a model whose linears are split over devices serves it \
             without a further exchange: each device has a block, and reads what it has already.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let made = Self::new(config);
        let mut faults = made.scaling.faults();
        let blocks = made.config.blocks;
        let ranks =
            made.config.rank_pattern.iter().map(|(site, rank)| ("rank_pattern", format!(" for {site:?}"), *rank));
        for (field, at, rank) in ranks.chain([("rank", String::new(), made.config.rank)]) {
            if !rank.is_multiple_of(blocks) {
                let message = format!("is {rank}{at}; expected a multiple of `blocks`, {blocks}");
                faults.push(Fault::new(field, message));
            }
        }
        if faults.is_empty() { Ok(Box::new(made)) } else { Err(faults) }
    }
}

impl Bdlora {
    fn new(config: Config) -> Self {
        let (ranks, alphas) = (config.rank_pattern.clone(), config.alpha_pattern.clone());
        let scaling = Scaling { rank: config.rank, alpha: config.alpha, rslora: config.rslora, ranks, alphas };
        let rows = |factor| Rows { factor, dropout: config.dropout, blocks: config.blocks as usize };
        Self { own: scaling.own(rows), rows: rows(scaling.factor()), scaling, config }
    }

    fn rows_at(&self, site: &str) -> &Rows {
        self.own.get(site).unwrap_or(&self.rows)
    }
}

impl Adapter for Bdlora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let n = self.config.blocks as usize;
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.scaling.rank_at(site.id.as_str()), site, (o, i))?;
            let leads_out = matches!(site.place, Place::Output | Place::Down);
            let (shape_a, shape_b, width) = match leads_out == (self.config.side == Side::Inner) {
                true => ([r, i / n], [o, r], i),
                false => ([r, i], [o, r / n], o),
            };
            if !width.is_multiple_of(n) {
                let message = format!("is {n}, into which {} of {}, {o} by {i}, does not divide", width, site.id);
                return Err(Fault::new("blocks", message));
            }
            Ok(vec![TensorSpec::trained(A, shape_a), TensorSpec::trained(B, shape_b)])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (_, i) = weight.shape();
        starts::each(at, rng, |spec| match spec.local {
            A if spec.shape[1] == i => Start::kaiming(spec),
            // PyTorch's own bound, which PEFT has for blocks: the root of 6 over the width that is read.
            A => Start::Uniform((6.0 / spec.shape[1] as f64).sqrt()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Delta(self.rows_at(at.site.as_str()))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let Rows { factor, blocks, .. } = *self.rows_at(at.site.as_str());
        let ((_, i), a, b) = (weight.shape(), tensors.get(A)?, tensors.get(B)?);
        let (left, right) = (whole(b, a.dim(0)?, blocks)?, whole(a, i, blocks)?);
        Ok(Merged::Factors { left, right, scale: factor })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.config.dropout, ..self.scaling.lora_config() };
        let mut peft = scaling::peft(&config, vec![(A, "lora_A.weight"), (B, "lora_B.weight")]);
        let (of_a, of_b): (&[&str], &[&str]) = match self.config.side {
            Side::Inner => (&OUT, &IN),
            Side::Outer => (&IN, &OUT),
        };
        let own = json!({
            "match_strict": true,
            "nblocks": self.config.blocks,
            "target_modules_bd_a": of_a,
            "target_modules_bd_b": of_b,
        });
        peft.config.insert(OWN.to_owned(), own);
        Some(peft)
    }
}

/// Rows by a factor `[o, i]`, or by one of blocks `[o, i/n]` on its diagonal.
fn by_factor(x_ti: &Tensor, w: &Tensor, blocks: usize) -> attune_points::Result<Tensor> {
    let ((t, i), (o, width)) = (x_ti.dims2()?, w.dims2()?);
    if width == i {
        return Ok(ops::linear(x_ti, w, None)?);
    }
    let x_nti = x_ti.reshape((t, blocks, width))?.transpose(0, 1)?.contiguous()?;
    let w_nio = w.reshape((blocks, o / blocks, width))?.transpose(1, 2)?.contiguous()?;
    Ok(ops::matmul(&x_nti, &w_nio)?.transpose(0, 1)?.contiguous()?.reshape((t, o))?)
}

/// A factor as the matrix `[o, i]` that it is.
fn whole(w: &Tensor, i: usize, blocks: usize) -> attune_points::Result<Tensor> {
    let (o, width) = w.dims2()?;
    if width == i {
        return Ok(w.clone());
    }
    let height = o / blocks;
    let row = |at: usize| {
        let block = w.narrow(0, at * height, height)?;
        Ok(block.pad_with_zeros(1, at * width, i - (at + 1) * width)?)
    };
    let rows = (0..blocks).map(row).collect::<attune_points::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = by_factor(&dropped(x_ti, self.dropout, cx)?, tensors.get(A)?, self.blocks)?;
        by_factor(&(h_tr * self.factor)?, tensors.get(B)?, self.blocks)
    }
}

/// Whether a configuration of PEFT's LoRA is BD-LoRA's.
pub(super) fn is_bdlora(config: &Map<String, Value>) -> bool {
    config.get(OWN).is_some_and(|own| !own.is_null())
}

/// What `adapter_config.json` of a PEFT BD-LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let modules = keys::without_inner(modules, "lora_");
    let (lora, mut params) = scaling::from_peft(config, &modules, Some(OWN))?;
    let fault = |key: &str, message: String| vec![Fault::new(OWN, format!("has {key} {message}"))];
    let own = config.get(OWN).and_then(Value::as_object).cloned().unwrap_or_default();
    let list = |key: &str| -> Vec<String> {
        let entries = own.get(key).and_then(Value::as_array).into_iter().flatten();
        entries.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (of_a, of_b) = (list("target_modules_bd_a"), list("target_modules_bd_b"));
    let mut sides = Vec::new();
    for module in &modules {
        // As PEFT has it: an entry that is in the name.
        let named = |list: &[String]| list.iter().any(|entry| module.contains(entry.as_str()));
        let last = module.rsplit('.').next().unwrap_or(module);
        let side = match (named(&of_a), named(&of_b), OUT.contains(&last), IN.contains(&last)) {
            (true, false, true, _) | (false, true, _, true) => Side::Inner,
            (true, false, _, true) | (false, true, true, _) => Side::Outer,
            (false, false, ..) => {
                return Err(fault(
                    "no list",
                    format!("that names {module}; expected one factor in blocks at every linear"),
                ));
            }
            _ => {
                return Err(fault(
                    "lists",
                    format!("for {module}, of which this version does not know where it leads"),
                ));
            }
        };
        sides.push(side);
    }
    let side = sides.first().copied().unwrap_or_default();
    if sides.iter().any(|other| *other != side) {
        let message = "by which blocks lie within attentions and MLPs at some linears and toward the stream at others; expected one of the two";
        return Err(fault("lists", message.to_owned()));
    }
    params.extend([
        ("dropout".to_owned(), json!(lora.lora_dropout)),
        ("blocks".to_owned(), own.get("nblocks").cloned().unwrap_or_else(|| json!(1))),
        ("side".to_owned(), json!(side)),
    ]);
    Ok((MethodRef { method: Bdlora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn blocks_are_those_on_the_diagonal_of_a_matrix() {
        let normal =
            |name: &str, shape: (usize, usize)| Rng::new(2, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let (x_ti, w) = (normal("x", (5, 6)), normal("w", (4, 3)));
        let matrix_oi = whole(&w, 6, 2).unwrap();
        let (rows, blocks) = (matrix_oi.to_vec2::<f64>().unwrap(), w.to_vec2::<f64>().unwrap());
        for (o, row) in rows.iter().enumerate() {
            for (i, value) in row.iter().enumerate() {
                let expected = if o / 2 == i / 3 { blocks[o][i % 3] } else { 0.0 };
                assert_eq!(*value, expected, "{o}, {i}");
            }
        }
        let by_matrix = ops::linear(&x_ti, &matrix_oi, None).unwrap();
        let off = (by_factor(&x_ti, &w, 2).unwrap() - by_matrix).unwrap().abs().unwrap();
        assert!(off.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap() < 1e-12);
    }

    #[test]
    fn a_rank_that_blocks_do_not_divide_is_refused() {
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        let config = Config { rank: 6, blocks: 4, rank_pattern: [("a".to_owned(), 9)].into(), ..Config::default() };
        let faults: Vec<String> = Bdlora::build(config, &cx).err().unwrap().iter().map(ToString::to_string).collect();
        let expected = [
            "`rank_pattern` is 9 for \"a\"; expected a multiple of `blocks`, 4",
            "`rank` is 6; expected a multiple of `blocks`, 4",
        ];
        assert_eq!(faults, expected);
    }

    #[test]
    fn a_folder_s_lists_say_on_which_side_blocks_are() {
        let read = |a: &[&str], b: &[&str]| {
            let own = json!({"target_modules_bd_a": a, "target_modules_bd_b": b, "nblocks": 4, "match_strict": true});
            let config = json!({"peft_type": "LORA", "r": 8, "use_bdlora": own});
            let modules = ["h.0.q_proj", "h.0.o_proj"].map(str::to_owned);
            from_peft(config.as_object().unwrap(), &modules).map(|(method, _)| method.params["side"].clone())
        };
        assert_eq!(read(&["o_proj"], &["q_proj", "v_proj"]).unwrap(), json!("inner"));
        assert_eq!(read(&["q_proj"], &["o_proj"]).unwrap(), json!("outer"));
        for (a, b, message) in [
            (&["q_proj", "o_proj"][..], &[][..], "expected one of the two"),
            (&["q_proj"][..], &[][..], "no list that names h.0.o_proj"),
        ] {
            let faults = read(a, b).unwrap_err();
            assert!(faults[0].to_string().contains(message), "{}", faults[0]);
        }
    }
}
