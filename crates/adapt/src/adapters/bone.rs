//! One matrix for all blocks of a frozen weight: cut along its inputs, each block gets the same change; one trained factor in place of
//! LoRA's two, for twice the rank at the same number of parameters.
//!
//! # Update
//! ```text
//! plain   y_to = x_ti W_oi^T + (Σ_q x_t(q r ..)) K_ro               W'_oi = W_oi + K_(i mod r)o
//! mini    the same with K_ro = L_r(o mod m)                         m = mini
//! bat     W'_pq = W_pq + W_pq K_q + K_q                             W in blocks of r by r, p over inputs, q over outputs
//! ```
//!
//! # Symbols
//! `miss_block` `K_ro`, or `L_rm`, or `K_qrr` as `[o / r, r, r]`; f32, trained, started at 0. Inputs beyond the last whole block are one
//! of their own, filled up with zeros.
//!
//! # Cost
//! `r*o` parameters per linear, `r*mini` where mini. A row costs `i + 2 r o` FLOPs. `bat` makes the weight in each pass, `2 r i o` FLOPs, and
//! takes the gradient by it; it merges as a new weight, the others as a change of rank r.
//!
//! # Limits
//! With K = 0 it is the base, bit for bit. With r = i, `plain` is any change of the weight. `bat` depends on the weight: with W = 0 its
//! change is that of `plain`.
//!
//! # Departures
//! none; agrees with PEFT, which calls it MiSS and does not have it for transposed linears, as GPT-2's are. `bat` has no dropout,
//! there neither.
//!
//! # Paper
//! Bone: Block-Affine Adaptation of Large Language Models. Kang, Yin, 2024; MiSS: Revisiting the Trade-off in LoRA with an Efficient
//! Shard-Sharing Structure. Kang, Yin, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, WeightMap,
};
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

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::linears;
use crate::parts::starts::{self, Start};
use crate::parts::tiles::tiled;

const K: &str = "miss_block";

/// How the blocks of a weight change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Form {
    /// All of an output's by the same numbers.
    #[default]
    Plain,
    /// By the same numbers, and outputs a certain number apart alike.
    Mini,
    /// By themselves, through a matrix that all blocks of the same outputs share.
    Bat,
}

/// Parameters of Bone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Inputs of a block; where `bat`, outputs as well.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// How the blocks change.
    form: Form,
    /// Columns of the matrix that `mini` repeats; divides the outputs.
    #[schemars(range(min = 1, max = 65536))]
    mini: u32,
    /// Share of the component's input that is dropped in training; not with `bat`.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 64, form: Form::Plain, mini: 1, dropout: 0.0 }
    }
}

pub(super) struct Bone {
    config: Config,
}

impl Method for Bone {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        aliases: &["miss"],
        paper: Some(Paper {
            title: "Bone: Block-Affine Adaptation of Large Language Models",
            authors: "Jiale Kang, Qingyu Yin",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(form == \"mini\", rank*mini, rank*o)",
        graph_numbers: "4*o*i",
        merges: Merges::Factors,
        peft_type: Some("MISS"),
        rules: &[Rule {
            when: "form == \"bat\"",
            require: "dropout == 0",
            message: "is for rows that a component adds to; with form bat there is one weight, so it has to be 0",
            path: "dropout",
        }],
        ..Card::new(
            "bone",
            Point::Adapter,
            "One matrix for all blocks of a frozen weight: cut along its inputs, each block gets the same change; one trained factor \
             in place of LoRA's two, for twice the rank at the same number of parameters.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Bone {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, form, mini, .. } = self.config;
        let (r, mini) = (rank as usize, mini as usize);
        linears::attach(sites, |site, o, i| {
            let divides = |field, n: usize, width: usize, what| {
                let message = format!("is {n}, which does not divide the {width} {what} of {}", site.id);
                if width.is_multiple_of(n) { Ok(()) } else { Err(Fault::new(field, message)) }
            };
            if r > i {
                let message = format!("is {r}; {} has {i} inputs, so a block has that many at most", site.id);
                return Err(Fault::new("rank", message));
            }
            let shape = match form {
                Form::Plain => vec![r, o],
                Form::Mini => {
                    divides("mini", mini, o, "outputs")?;
                    vec![r, mini]
                }
                Form::Bat => {
                    divides("rank", r, o, "outputs")?;
                    divides("rank", r, i, "inputs")?;
                    vec![o / r, r, r]
                }
            };
            Ok(vec![TensorSpec::trained(K, shape)])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        if self.config.form == Form::Bat { Port::Weight(self) } else { Port::Delta(self) }
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let k = tensors.get(K)?;
        if self.config.form == Form::Bat {
            let w_oi = weight.dense(k.dtype())?;
            return Ok(Merged::Weight { weight: WeightMap::graph(self, &w_oi, tensors)?, bias: None });
        }
        let (o, i) = weight.shape();
        let one_rr = Tensor::eye(k.dim(0)?, k.dtype(), k.device())?;
        Ok(Merged::Factors { left: tiled(&k.t()?, 0, o)?, right: tiled(&one_rr, 1, i)?, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, form, mini, dropout } = self.config;
        let init = match form {
            Form::Plain => json!(true),
            Form::Mini => json!("mini"),
            Form::Bat => json!("bat"),
        };
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("mini_r", json!(mini)),
                ("miss_dropout", json!(dropout)),
                ("init_weights", init),
                ("bias", json!("none")),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(Vec::new()) })
    }
}

impl RowMap for Bone {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let k = tensors.get(K)?;
        let ((t, i), r) = (x_ti.dims2()?, k.dim(0)?);
        let blocks = i.div_ceil(r);
        let x_ti = dropped(x_ti, self.config.dropout, cx)?.pad_with_zeros(1, 0, blocks * r - i)?;
        let h_tr = x_ti.reshape((t, blocks, r))?.sum(1)?;
        tiled(&ops::linear(&h_tr, &k.t()?, None)?, 1, cx.output)
    }
}

impl WeightMap for Bone {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let ((o, i), k_qrr) = (w_oi.dims2()?, tensors.get(K)?);
        let (q, r, _) = k_qrr.dims3()?;
        // Rows (q, a), columns (p, b): for each q, its r rows of all blocks as rows [a p, b], times K_q.
        let blocks = ops::matmul(&w_oi.reshape((q, o / q * (i / r), r))?, k_qrr)?;
        let change = blocks.reshape((q, r, i / r, r))?.broadcast_add(&k_qrr.unsqueeze(2)?)?;
        Ok((w_oi + change.reshape((o, i))?)?)
    }
}

/// What `adapter_config.json` of a PEFT MiSS says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let form = match keys.get("init_weights", json!(true)) {
        Value::Bool(_) => Form::Plain,
        Value::String(name) if name == "mini" => Form::Mini,
        Value::String(name) if name == "bat" => Form::Bat,
        other => {
            keys.fault("init_weights", format!("is {other}; expected true, false, \"mini\" or \"bat\""));
            Form::Plain
        }
    };
    let dropout: f64 = keys.get("miss_dropout", 0.0);
    let params = [
        ("rank", json!(keys.get("r", 64u32))),
        ("form", json!(form)),
        ("mini", json!(keys.get("mini_r", 1u32))),
        // It has no effect there.
        ("dropout", json!(if form == Form::Bat { 0.0 } else { dropout })),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Bone::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use candle_core::DType;

    use super::*;

    fn of(form: Form) -> Bone {
        Bone { config: Config { form, ..Config::default() } }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn the_change_is_the_matrix_by_inputs_modulo_the_rank_and_outputs_modulo_mini() {
        // 7 inputs are two blocks of 3 and one of 1.
        for (form, columns) in [(Form::Plain, 6), (Form::Mini, 2)] {
            let (k, w, x) = (tensor("k", &[3, columns]), tensor("w", &[6, 7]), tensor("x", &[5, 7]));
            let locals = Locals::new("up", [(K, k.clone())]);
            let at = Attachment { site: SiteId::new("up"), tensors: vec![] };
            let Merged::Factors { left, right, scale } = of(form).merge(&at, &locals, &w).unwrap() else { panic!() };
            let change = (left.matmul(&right).unwrap() * scale).unwrap();
            let k = k.to_vec2::<f64>().unwrap();
            for (o, row) in change.to_vec2::<f64>().unwrap().iter().enumerate() {
                for (i, value) in row.iter().enumerate() {
                    assert_eq!(*value, k[i % 3][o % columns]);
                }
            }
            let layout = Layout::new();
            let cx = RowCx { site: &at.site, output: 6, dropout: None, layout: &layout, rows: None };
            let added = RowMap::graph(&of(form), &x, &locals, &cx).unwrap();
            assert!(largest(&(added - x.matmul(&change.t().unwrap()).unwrap()).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn bat_moves_each_block_through_its_matrix_and_can_be_undone() {
        let (k, w) = (tensor("k", &[2, 2, 2]), tensor("w", &[4, 6]));
        let made = WeightMap::graph(&of(Form::Bat), &w, &Locals::new("up", [(K, k.clone())])).unwrap();
        let one = Tensor::eye(2, DType::F64, w.device()).unwrap();
        for (p, q) in (0..3).flat_map(|p| (0..2).map(move |q| (p, q))) {
            let block = |w: &Tensor| w.narrow(0, 2 * q, 2).unwrap().narrow(1, 2 * p, 2).unwrap().contiguous().unwrap();
            let k = k.get(q).unwrap();
            let by_hand = (block(&w).matmul(&(&k + &one).unwrap()).unwrap() + &k).unwrap();
            assert!(largest(&(block(&made) - by_hand).unwrap()) < 1e-12);
            // (W' - K) (1 + K)^-1 is W.
            let m = (&k + &one).unwrap().to_vec2::<f64>().unwrap();
            let by = 1.0 / (m[0][0] * m[1][1] - m[0][1] * m[1][0]);
            let inverse = [[m[1][1] * by, -m[0][1] * by], [-m[1][0] * by, m[0][0] * by]];
            let inverse = Tensor::new(&inverse, w.device()).unwrap();
            let undone = (block(&made) - &k).unwrap().matmul(&inverse).unwrap();
            assert!(largest(&(undone - block(&w)).unwrap()) < 1e-10);
        }
    }

    #[test]
    fn bat_depends_on_the_weight_and_is_plain_without_one() {
        let (k, w) = (tensor("k", &[2, 2, 2]), tensor("w", &[4, 6]));
        let locals = Locals::new("up", [(K, k.clone())]);
        let change = |w: &Tensor| (WeightMap::graph(&of(Form::Bat), w, &locals).unwrap() - w).unwrap();
        let none = change(&w.zeros_like().unwrap());
        // Twice the weight changes by W K more.
        let by_weight = (change(&w) - &none).unwrap();
        let twice = (change(&(&w * 2.0).unwrap()) - &none).unwrap();
        assert!(largest(&(twice - (by_weight * 2.0).unwrap()).unwrap()) < 1e-12);
        let plain = tiled(&k.reshape((4, 2)).unwrap(), 1, 6).unwrap();
        assert!(largest(&(none - plain).unwrap()) < 1e-12);
    }

    #[test]
    fn a_form_of_peft_that_is_not_known_is_named() {
        let config = json!({"peft_type": "MISS", "init_weights": "other"});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`init_weights` is \"other\""), "{}", faults[0]);
    }
}
