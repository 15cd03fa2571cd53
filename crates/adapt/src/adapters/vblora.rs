//! Low-rank factors made of pieces, each a mixture of a few vectors of a bank that the whole model shares: where many adapters are stored, and
//! each shall cost a fraction of a LoRA.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + (drop(x_ti) A_ri^T) B_or^T
//! A_r  = (piece_r1, …, piece_r(i/d))              columns of B alike, of o/d pieces
//! piece = Σ_k softmax(logits_k) v_k                over the k of the `top` largest of a piece's logits
//! ```
//!
//! # Symbols
//! `vblora_vector_bank` the `v_hd`, h vectors of length d, one bank for the whole slot, uniform in ± `bank_bound` at the start; `vblora_logits_A`
//! `[r, i/d, h]` and `vblora_logits_B` `[o/d, r, h]` at each linear, normal with standard deviation `logits_std`; f32, trained. `drop` is dropout
//! on the input. The learning rate of logits is `logits_lr` times that of the bank.
//!
//! # Cost
//! `r h (i+o) / d` parameters per linear, but for `top` 1, and `h d` in all; `2 r (i+o)` extra FLOPs per token forward, as LoRA, and the factors once a pass at
//! `2 top r (i+o)`. Logits beyond the largest matter in training alone.
//!
//! # Limits
//! It starts near the base and not at it: both factors are small. With `top` 1 each piece is a vector of the bank, and the bank alone trains.
//!
//! # Departures
//! none; agrees with PEFT. A folder with the largest logits alone (`save_only_topk_weights`) is not read, and the largest are the first of
//! equal ones.
//!
//! # Paper
//! VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li, Han, Ji, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, sparse};

const BANK: &str = "vblora_vector_bank";
const A: &str = "vblora_logits_A";
const B: &str = "vblora_logits_B";

/// Parameters of VB-LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Vectors in the bank.
    #[schemars(range(min = 1, max = 65536))]
    vectors: u32,
    /// Length of each, which divides the widths of all linears.
    #[schemars(range(min = 1, max = 65536))]
    length: u32,
    /// Vectors that a piece is a mixture of.
    #[schemars(range(min = 1, max = 65536))]
    top: u32,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Bound of the bank's numbers at the start.
    #[schemars(range(min = 0.0, max = 1e3))]
    bank_bound: f64,
    /// Standard deviation of logits at the start.
    #[schemars(range(min = 0.0, max = 1e3))]
    logits_std: f64,
    /// Factor on the learning rate of logits (the paper has 10).
    #[schemars(range(min = 0.0, max = 1e6))]
    logits_lr: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            rank: 4,
            vectors: 256,
            length: 256,
            top: 2,
            dropout: 0.0,
            bank_bound: 0.02,
            logits_std: 0.1,
            logits_lr: 1.0,
        }
    }
}

pub(super) struct Vblora {
    config: Config,
}

impl Method for Vblora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
            authors: "Yang Li, Shaobo Han, Shihao Ji",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*vectors*(i+o)/length*(top > 1)",
        shared: "vectors*length",
        moves: Some("the bank and the logits start at random, and both factors with them"),
        merges: Merges::Factors,
        peft_type: Some("VBLORA"),
        rules: &[Rule {
            when: "true",
            require: "top <= vectors",
            message: "is more than the bank has; expected `vectors` at most",
            path: "top",
        }],
        ..Card::new(
            "vblora",
            Point::Adapter,
            "Low-rank factors made of pieces, each a mixture of a few vectors of a bank that the whole model shares: where many \
             adapters are stored, and each shall cost a fraction of a LoRA.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Vblora {
    /// The pieces `[p, q, d]` that logits `[p, q, h]` mix.
    fn pieces(&self, logits_pqh: &Tensor, bank_hd: &Tensor) -> attune_points::Result<Tensor> {
        let ((p, q, h), top) = (logits_pqh.dims3()?, self.config.top as usize);
        let logits_nh = logits_pqh.reshape((p * q, h))?;
        let mut largest: Vec<u32> = Vec::with_capacity(p * q * top);
        for scores in logits_nh.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            largest.extend(sparse::largest(&scores, top).into_iter().map(|vector| vector as u32));
        }
        let largest_nk = Tensor::from_vec(largest, (p * q, top), logits_nh.device())?;
        let weights_nk1 = ops::softmax(&logits_nh.gather(&largest_nk, 1)?)?.unsqueeze(2)?;
        let vectors = bank_hd.index_select(&largest_nk.flatten_all()?, 0)?;
        let vectors_nkd = vectors.reshape((p * q, top, bank_hd.dim(1)?))?;
        Ok(vectors_nkd.broadcast_mul(&weights_nk1)?.sum(1)?.reshape((p, q, bank_hd.dim(1)?))?)
    }

    /// `A_ri` and `B_or`.
    fn factors(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let bank_hd = tensors.get(BANK)?;
        let a = self.pieces(tensors.get(A)?, bank_hd)?;
        let (r, pieces, d) = a.dims3()?;
        let b = self.pieces(tensors.get(B)?, bank_hd)?.transpose(1, 2)?.contiguous()?;
        let rows = b.dim(0)? * d;
        Ok((a.reshape((r, pieces * d))?, b.reshape((rows, r))?))
    }
}

impl Adapter for Vblora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, vectors, length, top, logits_lr, .. } = self.config;
        let (h, d) = (vectors as usize, length as usize);
        linears::attach(sites, |site, o, i| {
            let r = factors::within(rank, site, (o, i))?;
            if !o.is_multiple_of(d) || !i.is_multiple_of(d) {
                let message = format!("is {d}, which does not divide the widths of {}, {o} by {i}", site.id);
                return Err(Fault::new("length", message));
            }
            // A single vector has the whole weight, whatever its logit is: there is nothing to learn.
            let logits = |local, shape: [usize; 3]| TensorSpec {
                train: top > 1,
                lr_factor: logits_lr,
                ..TensorSpec::trained(local, shape)
            };
            let bank = TensorSpec { scope: Scope::Model, ..TensorSpec::trained(BANK, [h, d]) };
            Ok(vec![logits(A, [r, i / d, h]), logits(B, [o / d, r, h]), bank])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            BANK => Start::Uniform(self.config.bank_bound),
            _ => Start::Normal(self.config.logits_std),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let (right, left) = self.factors(tensors)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, vectors, length, top, dropout, bank_bound, logits_std, .. } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("num_vectors", json!(vectors)),
                ("vector_length", json!(length)),
                ("topk", json!(top)),
                ("vblora_dropout", json!(dropout)),
                ("init_vector_bank_bound", json!(bank_bound)),
                ("init_logits_std", json!(logits_std)),
                ("save_only_topk_weights", json!(false)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(vec![(BANK, "base_model.vblora_vector_bank")]) })
    }
}

impl RowMap for Vblora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (a_ri, b_or) = self.factors(tensors)?;
        Ok(ops::linear(&ops::linear(&dropped(x_ti, self.config.dropout, cx)?, &a_ri, None)?, &b_or, None)?)
    }
}

/// What `adapter_config.json` of a PEFT VB-LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only(
        "save_only_topk_weights",
        false,
        "so most logits are not in the folder; save it with all of them, or merge it with PEFT",
    );
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("vectors", json!(keys.get("num_vectors", own.vectors))),
        ("length", json!(keys.get("vector_length", own.length))),
        ("top", json!(keys.get("topk", own.top))),
        ("dropout", json!(keys.get("vblora_dropout", own.dropout))),
        ("bank_bound", json!(keys.get("init_vector_bank_bound", own.bank_bound))),
        ("logits_std", json!(keys.get("init_logits_std", own.logits_std))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Vblora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;

    use super::*;

    fn of(top: u32) -> Vblora {
        Vblora { config: Config { rank: 2, vectors: 5, length: 3, top, ..Config::default() } }
    }

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    #[test]
    fn factors_are_the_mixtures_by_hand_piece_by_piece() {
        let (bank, a, b) = (normal("bank", &[5, 3]), normal("a", &[2, 4, 5]), normal("b", &[3, 2, 5]));
        let locals = Locals::new("up", [(BANK, bank.clone()), (A, a.clone()), (B, b.clone())]);
        let (a_ri, b_or) = of(2).factors(&locals).unwrap();
        let [a, b] = [a, b].map(|logits| logits.to_vec3::<f64>().unwrap());
        let bank = bank.to_vec2::<f64>().unwrap();
        let piece = |logits: &[f64], at: usize| {
            let mut order: Vec<usize> = (0..5).collect();
            order.sort_by(|p, q| logits[*q].total_cmp(&logits[*p]));
            let [p, q] = [order[0], order[1]];
            let share = 1.0 / (1.0 + (logits[q] - logits[p]).exp());
            share * bank[p][at] + (1.0 - share) * bank[q][at]
        };
        for (row, values) in a_ri.to_vec2::<f64>().unwrap().iter().enumerate() {
            for (col, value) in values.iter().enumerate() {
                assert!((value - piece(&a[row][col / 3], col % 3)).abs() < 1e-12);
            }
        }
        for (row, values) in b_or.to_vec2::<f64>().unwrap().iter().enumerate() {
            for (col, value) in values.iter().enumerate() {
                assert!((value - piece(&b[row / 3][col], row % 3)).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn logits_that_are_not_among_the_largest_have_no_gradient() {
        let logits = normal("a", &[2, 4, 5]);
        let leaf = autograd::leaf(&logits).unwrap();
        let pieces = of(2).pieces(leaf.as_tensor(), &normal("bank", &[5, 3])).unwrap();
        let dpieces = normal("dpieces", &[2, 4, 3]);
        let gradient = autograd::pull(&[&leaf], &[(&pieces, &dpieces)]).unwrap().remove(0).unwrap();
        for (logits, gradient) in
            logits.to_vec3::<f64>().unwrap().iter().flatten().zip(gradient.to_vec3::<f64>().unwrap().iter().flatten())
        {
            let mut sorted = logits.clone();
            sorted.sort_by(f64::total_cmp);
            for (logit, gradient) in logits.iter().zip(gradient) {
                assert_eq!(*gradient == 0.0, *logit < sorted[3]);
            }
        }
    }

    #[test]
    fn a_folder_of_the_largest_logits_alone_is_refused() {
        let config = json!({"peft_type": "VBLORA", "r": 4, "save_only_topk_weights": true});
        let faults = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`save_only_topk_weights` is true, so most logits"), "{}", faults[0]);
    }
}
