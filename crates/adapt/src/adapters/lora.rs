//! Low-rank adaptation: a product of two thin matrices beside each frozen weight; the standard choice, cheap to train, to
//! store and to serve.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T
//! s    = alpha / r        or, with rslora,  alpha / sqrt(r)
//! y_to = … + s · d_o      with `bias`
//! e_d  = W_vd[token] + s · B_dr A_rv[:, token]      at a table of tokens
//! ∂A <- (B^T B + δ 1)^-1 ∂A        ∂B <- ∂B (A A^T + δ 1)^-1        with `preconditioned`
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32; both train, or as `trains` says one of them; A starts uniform in ±1/sqrt(i) (Kaiming with
//! a = sqrt(5)), B at 0. `drop` is dropout on the component's input. The learning rate of B is `b_lr` times that of all else. With `bias`,
//! At a table of tokens `lora_embedding_A` `A_rv` and `lora_embedding_B` `B_dr` are for what is looked up alone, without dropout and bias: A
//! starts at 0 and B normal. `lora_bias` `d_o` belongs to B: it starts at 0, trains where B does, at its rate, and does not decay. `preconditioned` gradients are
//! divided by Gram matrices of the other factor, δ being `damping`, before they are clipped and the optimiser sees them: the product
//! then moves alike however it is split into factors. Beside `trains: b` that is the projected gradient of LoRA-FA.
//!
//! # Cost
//! `r*(i+o)` parameters per linear, `r*o` or `r*i` where one factor trains, and `o` more with `bias`; `2 r (i+o)` extra FLOPs per token
//! forward. With `bias` it is not computed within the product of the linear's own weight. `preconditioned` steps invert two `r` by `r`
//! matrices a linear and multiply by them, `2 r² (i+o)` FLOPs a step, and are steps of the component's own: beside no other rule of steps.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With r = min(i, o) it can be any change of the weight. Where B alone trains, the change
//! stays in the rows that A spans. A `bias` merges where the linear has one; else it stays beside the base, and so does what is added at a
//! table of tokens that is the head's as well.
//!
//! # Departures
//! Agrees with PEFT; its optimisers `riemannian` and, beside `trains: b`, `lorafa` are `preconditioned` here, with clipping after it rather
//! than before, and without LoRA-FA's division by s², from which a step of Adam does not depend. `rank_pattern` and `alpha_pattern` name whole paths, not patterns: reading a PEFT folder resolves
//! its patterns.
//!
//! # Paper
//! LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, 2021. Scaling
//! by the root of the rank: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023. One factor alone:
//! Asymmetry in Low-Rank Adapters of Foundation Models. Zhu, Greenewald, Nadjahi, Sáez de Ocáriz Borde, Gabrielsson, Choshen,
//! Ghassemi, Yurochkin, Solomon, 2024, with `init: {method: orthonormal}` and twice the rank. Two rates: LoRA+: Efficient Low Rank
//! Adaptation of Large Models. Hayou, Ghosh, Yu, 2024. Preconditioned steps: Riemannian Preconditioned LoRA for Fine-Tuning Foundation
//! Models. Zhang, Pilanci, 2024; beside a frozen A: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning.
//! Zhang, Zhang, Shi, Chu, Li, 2023.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Place, Site, SiteKind as Kind};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, FusedRows, LookupMap, Merged, Peft, Port, RowCx, RowMap, Trained,
};
use attune_points::engine::StepRule;
use attune_points::{Error, Locals, TensorSpec, Weight};
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
use crate::parts::preconditioned::Preconditioned;
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, keys};

const A: &str = "lora_A";
const B: &str = "lora_B";
const BIAS: &str = "lora_bias";
const TABLE_A: &str = "lora_embedding_A";
const TABLE_B: &str = "lora_embedding_B";

/// Which factors train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Trains {
    /// Both.
    #[default]
    Both,
    /// B alone: A stays as it starts.
    B,
    /// A alone: B stays as it starts, so it needs a start away from 0.
    A,
}

/// Parameters of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
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
    /// Which factors train.
    trains: Trains,
    /// Factor on the learning rate of B (LoRA+ has some 16).
    #[schemars(range(min = 0.0, max = 1e6))]
    b_lr: f64,
    /// Adds a trained bias to what B gives, scaled as that is.
    bias: bool,
    /// Divides the gradient of each factor by what the other one makes of a change.
    preconditioned: bool,
    /// What is added to the diagonal of what a gradient is divided by.
    #[schemars(range(min = 1e-12, max = 1e3))]
    damping: f64,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            trains: Trains::Both,
            b_lr: 1.0,
            bias: false,
            preconditioned: false,
            damping: 1e-2,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Lora {
    scaling: Scaling,
    dropout: f64,
    trains: Trains,
    b_lr: f64,
    bias: bool,
    /// What is added to the diagonals, if gradients are preconditioned.
    damping: Option<f64>,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Rows>,
    /// The map of all others.
    rows: Rows,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rows {
    scale: f64,
    dropout: f64,
    bias: bool,
}

impl Method for Lora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        fused: true,
        paper: Some(Paper {
            title: "LoRA: Low-Rank Adaptation of Large Language Models",
            authors: "Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen",
            year: 2021,
        }),
        applies: &[SiteKind::Linear, SiteKind::Embedding],
        targets: "all-linear",
        parameters: "rank*(i*(trains != \"b\") + o*(trains != \"a\")) + o*(bias and trains != \"a\")",
        merges: Merges::Factors,
        peft_type: Some("LORA"),
        ..Card::new(
            "lora",
            Point::Adapter,
            "Low-rank adaptation: a product of two thin matrices beside each frozen weight; the standard choice, cheap to \
             train, to store and to serve.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let lora = Self::new(config);
        let faults = lora.scaling.faults();
        if faults.is_empty() { Ok(Box::new(lora)) } else { Err(faults) }
    }
}

impl Lora {
    fn new(config: Config) -> Self {
        let Config { rank, alpha, dropout, rslora, trains, b_lr, bias, rank_pattern, alpha_pattern, .. } = config;
        let scaling = Scaling { rank, alpha, rslora, ranks: rank_pattern, alphas: alpha_pattern };
        let rows = |scale| Rows { scale, dropout, bias };
        let damping = config.preconditioned.then_some(config.damping);
        Self { own: scaling.own(rows), rows: rows(scaling.factor()), scaling, dropout, trains, b_lr, bias, damping }
    }

    /// Of these ranks at these sites, with 1 as the factor on products: the largest stands for all, so that servers which read no patterns make
    /// room for it, and take the same factor everywhere.
    pub(super) fn of_ranks(mut ranks: BTreeMap<String, u32>) -> Self {
        let rank = ranks.values().copied().max().unwrap_or(1);
        ranks.retain(|_, other| *other != rank);
        let alpha_pattern = ranks.iter().map(|(site, rank)| (site.clone(), f64::from(*rank))).collect();
        Self::new(Config { rank, alpha: f64::from(rank), rank_pattern: ranks, alpha_pattern, ..Config::default() })
    }

    fn rows_at(&self, site: &str) -> &Rows {
        self.own.get(site).unwrap_or(&self.rows)
    }

    /// The factors at a table of tokens, the one that is read by tokens last: starts of pairs are not for these.
    fn at_table(&self, site: &Site, (vocab, width): (usize, usize)) -> Result<Attachment, Fault> {
        if site.place != Place::Embedding {
            let message = format!("names {}, which is no table of tokens; expected linears and that table", site.id);
            return Err(Fault::new("targets", message));
        }
        let rank = factors::within(self.scaling.rank_at(site.id.as_str()), site, (vocab, width))?;
        let quiet = Some("its tokens may not occur");
        let by_tokens = TensorSpec { quiet, ..TensorSpec::trained(TABLE_A, [rank, vocab]) };
        let tensors = vec![TensorSpec::trained(TABLE_B, [width, rank]), by_tokens];
        Ok(Attachment { site: site.id.clone(), tensors })
    }
}

/// Whether a tensor is the factor that reads what comes in, rather than that which gives what goes out.
pub(super) fn reads(spec: &TensorSpec) -> bool {
    [A, TABLE_A].contains(&spec.local)
}

/// Whether an attachment is at a table of tokens.
fn is_table(at: &Attachment) -> bool {
    at.tensors.iter().any(|spec| spec.local == TABLE_A)
}

impl Adapter for Lora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let of_linears = |site: &Site| {
            factors::attach(std::slice::from_ref(site), A, B, |site| self.scaling.rank_at(site))
                .map(|mut at| at.remove(0))
        };
        let (mut attachments, mut faults) = (Vec::with_capacity(sites.len()), Vec::new());
        for site in sites {
            let attached = match site.kind {
                Kind::Embedding { vocab, width } => self.at_table(site, (vocab, width)).map_err(|fault| vec![fault]),
                _ => of_linears(site),
            };
            match attached {
                Ok(attachment) => attachments.push(attachment),
                Err(found) => faults.extend(found),
            }
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        if self.bias {
            for tensors in attachments.iter_mut().filter(|at| !is_table(at)).map(|at| &mut at.tensors) {
                let output = tensors.iter().find(|spec| spec.local == B).map_or(0, |spec| spec.shape[0]);
                tensors.push(TensorSpec { decay: false, ..TensorSpec::trained(BIAS, [output]) });
            }
        }
        for spec in attachments.iter_mut().flat_map(|at| &mut at.tensors) {
            let is_a = reads(spec);
            spec.train = self.trains == Trains::Both || (self.trains == Trains::B) != is_a;
            if !is_a {
                spec.lr_factor = self.b_lr;
            }
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.trains == Trains::A {
            let message = "A alone trains, and B starts at 0, with which nothing moves: expected `init: {method: pissa}` or another \
                           start away from 0";
            return Err(Error::Refused(message.to_owned()));
        }
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            TABLE_B => Start::Normal(1.0),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        let rows = self.rows_at(at.site.as_str());
        if is_table(at) { Port::Lookup(rows) } else { Port::Delta(rows) }
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let damping = self.damping?;
        let attachments = of.attachments.iter().copied().filter(|at| !is_table(at)).collect();
        let of_linears = Trained { slot: of.slot, attachments, steps: of.steps };
        Some(Box::new(Preconditioned::new(&of_linears, (A, B), damping)))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let scale = self.rows_at(at.site.as_str()).scale;
        if is_table(at) {
            if weight.is_tied() {
                return Ok(Merged::No(
                    "the table of tokens is the head's as well, which what is looked up does not concern",
                ));
            }
            let turned = |local| tensors.get(local)?.t()?.contiguous().map_err(Error::from);
            return Ok(Merged::Factors { left: turned(TABLE_A)?, right: turned(TABLE_B)?, scale });
        }
        let (left, right) = (tensors.get(B)?.clone(), tensors.get(A)?.clone());
        if !self.bias {
            return Ok(Merged::Factors { left, right, scale });
        }
        let d_o = tensors.get(BIAS)?;
        let Some(own) = weight.bias(d_o.dtype())? else {
            return Ok(Merged::No("the linear has no bias that its own could become a part of"));
        };
        let change_oi = (ops::matmul(&left, &right)? * scale)?;
        Ok(Merged::Weight { weight: (weight.dense(d_o.dtype())? + change_oi)?, bias: Some((own + (d_o * scale)?)?) })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.dropout, lora_bias: self.bias, ..self.scaling.lora_config() };
        Some(scaling::peft(
            &config,
            vec![
                (A, "lora_A.weight"),
                (B, "lora_B.weight"),
                (BIAS, "lora_B.bias"),
                (TABLE_A, TABLE_A),
                (TABLE_B, TABLE_B),
            ],
        ))
    }
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (a_ri, b_or) = (tensors.get(A)?, tensors.get(B)?);
        let h_tr = ops::linear(&dropped(x_ti, self.dropout, cx)?, a_ri, None)?;
        // The scaling goes on the thin side: T r values instead of T o.
        let y_to = ops::linear(&(h_tr * self.scale)?, b_or, None)?;
        Ok(if self.bias { y_to.broadcast_add(&(tensors.get(BIAS)? * self.scale)?)? } else { y_to })
    }

    fn fused(&self) -> Option<FusedRows> {
        (!self.bias).then_some(FusedRows::LowRank { down: A, up: B, scale: self.scale, dropout: self.dropout })
    }
}

impl LookupMap for Rows {
    fn of_tokens(&self, tokens_k: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let a_rk = tensors.get(TABLE_A)?.index_select(tokens_k, 1)?;
        Ok(ops::linear(&(a_rk.t()?.contiguous()? * self.scale)?, tensors.get(TABLE_B)?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let modules = keys::without_inner(modules, "lora_");
    let (config, mut params) = scaling::from_peft(config, &modules, Some("lora_bias"))?;
    params.insert("dropout".to_owned(), json!(config.lora_dropout));
    params.insert("bias".to_owned(), json!(config.lora_bias));
    Ok((MethodRef { method: Lora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn tensors() -> Locals {
        let tensor =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap();
        Locals::new("q_proj", [(A, tensor("a", [2, 4])), (B, tensor("b", [3, 2]))])
    }

    fn delta(config: Config) -> Vec<f64> {
        let lora = Lora::new(config);
        let x = Rng::new(1, "x").normal_tensor(&[5, 4][..], 1.0, DType::F64).unwrap();
        let site = attune_architecture::SiteId::new("q_proj");
        let layout = attune_points::Layout::new();
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        lora.rows_at("q_proj").graph(&x, &tensors(), &cx).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_scaling_is_alpha_over_rank_or_over_its_root() {
        let plain = delta(Config { rank: 2, alpha: 2.0, ..Config::default() });
        for (config, factor) in [
            (Config { rank: 2, alpha: 8.0, ..Config::default() }, 4.0),
            (Config { rank: 2, alpha: 2.0, rslora: true, ..Config::default() }, 2f64.sqrt()),
            (
                Config {
                    rank: 2,
                    alpha: 2.0,
                    alpha_pattern: BTreeMap::from([("q_proj".to_owned(), 6.0)]),
                    ..Config::default()
                },
                3.0,
            ),
            (
                Config {
                    rank: 2,
                    alpha: 2.0,
                    alpha_pattern: BTreeMap::from([("k_proj".to_owned(), 6.0)]),
                    ..Config::default()
                },
                1.0,
            ),
        ] {
            for (scaled, plain) in delta(config.clone()).iter().zip(&plain) {
                assert!((scaled - factor * plain).abs() < 1e-12, "{config:?}");
            }
        }
    }

    #[test]
    fn one_factor_may_train_alone_and_b_may_have_a_rate_of_its_own() {
        let architecture = Architecture::from_json(
            br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 8,
                "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#,
        );
        let architecture = architecture.unwrap();
        let sites = architecture.sites();
        let site = sites.iter().find(|site| site.id.as_str().ends_with("q_proj")).unwrap();
        for (trains, expected) in [(Trains::Both, [true, true]), (Trains::B, [false, true]), (Trains::A, [true, false])]
        {
            let lora = Lora::new(Config { trains, b_lr: 16.0, ..Config::default() });
            let at = lora.attach(&architecture, std::slice::from_ref(site)).unwrap().remove(0);
            assert_eq!([at.tensors[0].train, at.tensors[1].train], expected);
            assert_eq!([at.tensors[0].lr_factor, at.tensors[1].lr_factor], [1.0, 16.0]);
        }
    }

    #[test]
    fn a_bias_is_scaled_as_b_is_and_merges_into_the_linear_s_own() {
        struct Biased(Tensor, Option<Tensor>);
        impl Weight for Biased {
            fn shape(&self) -> (usize, usize) {
                Weight::shape(&self.0)
            }

            fn rows(&self, rows: std::ops::Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
                self.0.rows(rows, dtype)
            }

            fn bias(&self, _: DType) -> attune_points::Result<Option<Tensor>> {
                Ok(self.1.clone())
            }
        }
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let lora = Lora::new(Config { rank: 2, alpha: 6.0, bias: true, ..Config::default() });
        let plain: Vec<_> = tensors().iter().map(|(local, tensor)| (local, tensor.clone())).collect();
        let locals = Locals::new("q_proj", plain.into_iter().chain([(BIAS, normal("d", &[3]))]));
        let (x, w, b) = (normal("x", &[5, 4]), normal("w", &[3, 4]), normal("b", &[3]));
        let (site, layout) = (attune_architecture::SiteId::new("q_proj"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        let at = Attachment { site: site.clone(), tensors: Vec::new() };
        let added = lora.rows.graph(&x, &locals, &cx).unwrap();
        let base = |w: &Tensor, b: &Tensor| ops::linear(&x, w, None).unwrap().broadcast_add(b).unwrap();
        let merged = lora.merge(&at, &locals, &Biased(w.clone(), Some(b.clone()))).unwrap();
        let Merged::Weight { weight, bias: Some(bias) } = merged else { panic!("no weight and bias") };
        let off = (base(&weight, &bias) - (base(&w, &b) + added).unwrap()).unwrap().abs().unwrap();
        assert!(off.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap() < 1e-12);
        let of_nothing = lora.rows.graph(&x.zeros_like().unwrap(), &locals, &cx).unwrap().to_vec2::<f64>().unwrap();
        let scaled = (locals.get(BIAS).unwrap() * 3.0).unwrap().to_vec1::<f64>().unwrap();
        assert!(of_nothing.iter().all(|row| *row == scaled));
        let without = lora.merge(&at, &locals, &Biased(w, None)).unwrap();
        assert!(matches!(without, Merged::No(why) if why.contains("has no bias")));
    }

    #[test]
    fn what_is_looked_up_merges_where_no_head_has_the_same_table() {
        struct Table(Tensor, bool);
        impl Weight for Table {
            fn shape(&self) -> (usize, usize) {
                Weight::shape(&self.0)
            }

            fn rows(&self, rows: std::ops::Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
                self.0.rows(rows, dtype)
            }

            fn is_tied(&self) -> bool {
                self.1
            }
        }
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let lora = Lora::new(Config { rank: 2, alpha: 6.0, ..Config::default() });
        let locals = Locals::new("wte", [(TABLE_A, normal("a", &[2, 7])), (TABLE_B, normal("b", &[4, 2]))]);
        let spec = TensorSpec::trained;
        let site = attune_architecture::SiteId::new("wte");
        let at = Attachment { site, tensors: vec![spec(TABLE_B, [4, 2]), spec(TABLE_A, [2, 7])] };
        let Merged::Factors { left, right, scale } =
            lora.merge(&at, &locals, &Table(normal("w", &[7, 4]), false)).unwrap()
        else {
            panic!("no factors")
        };
        let all = Tensor::arange(0u32, 7, &Device::Cpu).unwrap();
        let added = lora.rows.of_tokens(&all, &locals).unwrap();
        let off = ((left.matmul(&right).unwrap() * scale).unwrap() - added).unwrap().abs().unwrap();
        assert!(off.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-12);
        let tied = lora.merge(&at, &locals, &Table(normal("w", &[7, 4]), true)).unwrap();
        assert!(matches!(tied, Merged::No(why) if why.contains("is the head's as well")));
    }

    #[test]
    fn dropout_of_a_mask_is_applied_to_the_input_only() {
        struct Keep(Tensor);
        impl attune_points::adapter::DropoutMask for Keep {
            fn mask(
                &self,
                _: &attune_architecture::SiteId,
                _: usize,
                p: f64,
                _: &Tensor,
            ) -> attune_points::Result<Tensor> {
                assert_eq!(p, 0.5);
                Ok(self.0.clone())
            }
        }
        let site = attune_architecture::SiteId::new("q_proj");
        let x = Tensor::ones((1, 4), DType::F64, &Device::Cpu).unwrap();
        let mask = Tensor::new(&[[2.0f64, 0.0, 2.0, 0.0]], &Device::Cpu).unwrap();
        let rows = Rows { scale: 1.0, dropout: 0.5, bias: false };
        let masks = Keep(mask.clone());
        let layout = attune_points::Layout::new();
        let cx = |dropout| RowCx { site: &site, output: 3, dropout, layout: &layout, rows: None };
        let dropped = rows.graph(&x, &tensors(), &cx(Some(&masks))).unwrap();
        let by_hand = rows.graph(&(x * mask).unwrap(), &tensors(), &cx(None)).unwrap();
        assert_eq!(dropped.to_vec2::<f64>().unwrap(), by_hand.to_vec2::<f64>().unwrap());
    }
}
