//! Low-rank adaptation that shares its ranks among sites on the way: each change is a decomposition whose least important parts go,
//! until as many are left as there may be; for a budget of parameters that some weights need more of than others.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (drop(x_ti) (E_r ⊙ A_ri)^T) B_or^T          s = alpha / (r + 1e-5)
//! L    = L_job + γ · mean over all A and B of ‖A A^T - I‖_F and ‖B^T B - I‖_F
//! I = |θ ⊙ ∂L/∂θ|     I' <- β1 I' + (1 - β1) I     U' <- β2 U' + (1 - β2) |I - I'|              entry by entry
//! S_k  = I' U'(E_k) + mean_i I' U'(A_ki) + mean_o I' U'(B_ok)
//! every `every` steps between the first and the last, and at each of the last:  E_k <- 0 for all but the b(t) largest S_k
//! b(t) = b1 + (b0 - b1) (1 - (t - t0) / (t1 - t0))^3                    b0 = r · sites, b1 = target_rank · sites
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained, start normal with deviation 0.02; `lora_E` `E_r`, f32, trained, starts at 0.
//! `t0` is the share `before` of the steps, `t1` all but the share `after`; `sensitivity` is β1, `uncertainty` β2, `orthogonal` γ.
//! The values are those after the update, the gradients those before clipping, with that of the orthogonality.
//!
//! # Cost
//! `r*(i+o+1)` parameters per linear, of which as many parts have an effect at the end as `target_rank` says; `2 r (i+o)` extra FLOPs
//! per token forward; two more numbers a parameter in a checkpoint.
//!
//! # Limits
//! With E = 0 it is the base. With `target_rank` the same as `rank` and γ = 0 it is a decomposition of fixed rank. What went has
//! a gradient and may come back until the number stays.
//!
//! # Departures
//! Exactly b(t) parts stay: where several are worth the same, those of the first sites, not none of them. Parts that went are in the
//! result as zeros; PEFT's `rank_pattern` is read and not written. `before` and `after` are shares of the run, PEFT's `tinit` and
//! `tfinal` numbers of steps.
//!
//! # Paper
//! Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang, Chen, Bukharin, He, Cheng, Chen, Zhao, 2023.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, Trained};
use attune_points::engine::StepRule;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::budget::{Budget, Falling, Names};
use crate::parts::dropout::dropped;
use crate::parts::keys::Keys;
use crate::parts::scaling::Scaling;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears};

const A: &str = "lora_A";
const B: &str = "lora_B";
const E: &str = "lora_E";
const PEFT_TYPE: &str = "ADALORA";

/// Keeps PEFT's division from being one by 0.
const RANK_ROOM: f64 = 1e-5;

/// Parameters of AdaLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Parts that each site starts with.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Parts that a site has at the end, on average.
    #[schemars(range(min = 1, max = 4096))]
    target_rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Share of the steps before parts go.
    #[schemars(range(min = 0.0, max = 0.99))]
    before: f64,
    /// Share of the steps after as many have gone as have to.
    #[schemars(range(min = 0.0, max = 0.99))]
    after: f64,
    /// Steps from one choice to the next.
    #[schemars(range(min = 1, max = 1_000_000))]
    every: u64,
    /// What stays of the mean of sensitivities at each step.
    #[schemars(range(min = 0.0, max = 0.9999))]
    sensitivity: f64,
    /// What stays of the mean of their uncertainty at each step.
    #[schemars(range(min = 0.0, max = 0.9999))]
    uncertainty: f64,
    /// Weight of the loss on vectors that are not orthogonal.
    #[schemars(range(min = 0.0, max = 1000.0))]
    orthogonal: f64,
    /// Parts at single sites, by whole path, `rank` at most; the scaling is of `rank` there too.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
}

impl Default for Config {
    /// PEFT's ranks and means; the authors' scaling, and their shares of the run on most tasks.
    fn default() -> Self {
        Self {
            rank: 12,
            target_rank: 8,
            alpha: 32.0,
            dropout: 0.0,
            before: 0.1,
            after: 0.3,
            every: 10,
            sensitivity: 0.85,
            uncertainty: 0.85,
            orthogonal: 0.5,
            rank_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Adalora {
    config: Config,
    rows: Rows,
    /// Steps of the run, for PEFT's configuration.
    steps: u64,
    /// How many sites it was put on last: the orthogonality is a mean over all of them.
    sites: AtomicUsize,
}

struct Rows {
    scale: f64,
    dropout: f64,
}

impl Method for Adalora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
            authors: "Qingru Zhang, Minshuo Chen, Alexander Bukharin, Pengcheng He, Yu Cheng, Weizhu Chen, Tuo Zhao",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o+1)",
        merges: Merges::Factors,
        peft_type: Some(PEFT_TYPE),
        rules: &[
            Rule {
                when: "true",
                require: "target_rank <= rank",
                message: "is more than the rank at the start; expected `rank` at most",
                path: "target_rank",
            },
            Rule {
                when: "true",
                require: "before + after < 1",
                message: "leaves no steps in which ranks fall; expected less than 1 with `before`",
                path: "after",
            },
        ],
        ..Card::new(
            "adalora",
            Point::Adapter,
            "Low-rank adaptation that shares its ranks among sites on the way: each change is a decomposition whose least \
             important parts go, until as many are left as there may be; for a budget of parameters that some weights need more \
             of than others.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let faults = Scaling::faults_of("rank_pattern", &config.rank_pattern, 1..=config.rank);
        if !faults.is_empty() {
            return Err(faults);
        }
        let scale = config.alpha / (f64::from(config.rank) + RANK_ROOM);
        let rows = Rows { scale, dropout: config.dropout };
        Ok(Box::new(Self { config, rows, steps: cx.steps.0, sites: AtomicUsize::new(1) }))
    }
}

impl Adapter for Adalora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        self.sites.store(sites.len().max(1), Ordering::Relaxed);
        linears::attach(sites, |site, output, input| {
            let rank = self.config.rank_pattern.get(site.id.as_str()).copied().unwrap_or(self.config.rank);
            let r = factors::within(rank, site, (output, input))?;
            let quiet = Some("all its parts may have gone");
            let spec = |local, shape: [usize; 2]| TensorSpec { quiet, ..TensorSpec::trained(local, shape) };
            Ok(vec![spec(A, [r, input]), spec(E, [r, 1]), spec(B, [output, r])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == E { Start::Constant(0.0) } else { Start::Normal(0.02) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(&self.rows)
    }

    fn penalty(&self, _: &Attachment, tensors: &Locals) -> attune_points::Result<Option<Tensor>> {
        if self.config.orthogonal == 0.0 {
            return Ok(None);
        }
        let off = |tensor: &Tensor| -> attune_points::Result<Tensor> {
            let product = ops::matmul(tensor, &tensor.t()?)?;
            let unit = Tensor::eye(product.dim(0)?, product.dtype(), &Device::Cpu)?;
            // Where there is nothing off, the root has no derivative.
            Ok(((product - unit)?.sqr()?.sum_all()? + f64::from(f32::MIN_POSITIVE))?.sqrt()?)
        };
        let both = (off(tensors.get(A)?)? + off(&tensors.get(B)?.t()?.contiguous()?)?)?;
        let share = self.config.orthogonal / (2.0 * self.sites.load(Ordering::Relaxed) as f64);
        Ok(Some((both * share)?))
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let Config { target_rank, before, after, every, sensitivity, uncertainty, .. } = self.config;
        let falling = Falling { target: target_rank, before, after, every, keeps: (sensitivity, uncertainty) };
        Some(Box::new(Budget::new(falling, &Names { right: A, values: E, left: B }, of)))
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let right = tensors.get(A)?.broadcast_mul(tensors.get(E)?)?;
        Ok(Merged::Factors { left: tensors.get(B)?.clone(), right, scale: self.rows.scale })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, target_rank, alpha, dropout, every, sensitivity, uncertainty, orthogonal, .. } = self.config;
        // PEFT's configuration is LoRA's, whose rank it does not read, with keys of its own.
        let lora = LoraConfig { lora_alpha: alpha, lora_dropout: dropout, ..LoraConfig::default() };
        let lora = serde_json::to_value(lora).ok().and_then(|value| value.as_object().cloned());
        let mut config = lora.unwrap_or_default();
        let own = [
            ("peft_type", json!(PEFT_TYPE)),
            ("init_r", json!(rank)),
            ("target_r", json!(target_rank)),
            ("deltaT", json!(every)),
            ("beta1", json!(sensitivity)),
            ("beta2", json!(uncertainty)),
            ("orth_reg_weight", json!(orthogonal)),
            ("tinit", json!(0)),
            ("tfinal", json!(0)),
            ("total_step", json!(self.steps.max(1))),
        ];
        config.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
        // Of the parts that each site started with, PEFT marks those that it kept.
        let kept = |own: u32| (0..rank).map(|part| part < own).collect::<Vec<bool>>();
        let pattern = self.config.rank_pattern.iter().map(|(site, rank)| (format!("{site}.{E}"), json!(kept(*rank))));
        let pattern: Map<String, Value> = pattern.collect();
        config.insert("rank_pattern".to_owned(), if pattern.is_empty() { Value::Null } else { Value::Object(pattern) });
        let tensors = attune_points::adapter::PeftTensors::Each(vec![(A, A), (E, E), (B, B)]);
        Some(Peft { config, tensors })
    }
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.dropout, cx)?, tensors.get(A)?, None)?;
        let weighed_tr = h_tr.broadcast_mul(&(tensors.get(E)?.t()? * self.scale)?)?;
        Ok(ops::linear(&weighed_tr, tensors.get(B)?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT AdaLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let defaults = Config::default();
    let mut keys = Keys::of(config);
    keys.only("use_dora", false, "which AdaLoRA does not have");
    let rank = keys.get("init_r", defaults.rank);
    let alpha: f64 = keys.get("lora_alpha", 8.0);
    let mut params = Map::from_iter([
        ("rank".to_owned(), json!(rank)),
        ("target_rank".to_owned(), json!(keys.get("target_r", defaults.target_rank).min(rank))),
        // Without a numerator PEFT takes the rank.
        ("alpha".to_owned(), json!(if alpha > 0.0 { alpha } else { f64::from(rank) })),
        ("dropout".to_owned(), json!(keys.get("lora_dropout", 0.0))),
        ("every".to_owned(), json!(keys.get("deltaT", 1u64).max(1))),
        ("sensitivity".to_owned(), json!(keys.get("beta1", defaults.sensitivity))),
        ("uncertainty".to_owned(), json!(keys.get("beta2", defaults.uncertainty))),
        ("orthogonal".to_owned(), json!(keys.get("orth_reg_weight", defaults.orthogonal))),
    ]);
    let kept: BTreeMap<String, Vec<bool>> = keys.get("rank_pattern", BTreeMap::new());
    let ranks = modules.iter().filter_map(|module| {
        let kept = kept.get(&format!("{module}.{E}"))?;
        Some((module.clone(), kept.iter().filter(|kept| **kept).count() as u32))
    });
    let ranks: BTreeMap<String, u32> = ranks.filter(|(_, own)| *own != rank).collect();
    if !ranks.is_empty() && alpha <= 0.0 {
        keys.fault(
            "lora_alpha",
            "is 0, for which PEFT takes the rank that each site has left; expected the number that it trained with",
        );
    }
    if !ranks.is_empty() {
        params.insert("rank_pattern".to_owned(), json!(ranks));
    }
    keys.finish()?;
    Ok((MethodRef { method: Adalora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}
