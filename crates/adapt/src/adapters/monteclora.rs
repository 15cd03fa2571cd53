//! LoRA whose first factor is drawn anew at every step of training, as a mean of several draws about what is learned, with learned
//! spreads and shares that a loss holds to those of a prior; where few examples would be learned by heart.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s (drop(x_ti) (A_ri + N_ri)^T) B_or^T                     s = alpha / r, or alpha / √r
//! N_ri = scale √v_r Σ_n w_n ε_nri                      in training, 0 else; ε normal, one draw a step and linear
//! v_r  = max(exp(2 σ_r) χ_r, 1e-3)                      χ of a chi-squared distribution with r degrees of freedom
//! w_n  = softmax(√c_n η_n + ln a_n - mean ln a)         a = exp(π_n),  c_n = (1 - 2/n) / a_n + 1/n² Σ 1/a,  η normal
//! loss + kl_weight (D(a) + D(exp 2σ) + D(v)) + Σ w²     at each linear, the last if `entropy`
//! D(exp 2σ) = r/2 Σ (exp(2 σ_r) - 2 σ_r - 1)            D(v) = n/2 Σ (v_r - ln v_r - 1)
//! ```
//! D(a) is the divergence of Dirichlet's distribution with a from that with `prior` everywhere.
//!
//! # Symbols
//! `lora_A` `A_ri`, uniform in ±1/√i at the start, `lora_B` `B_or`, 0, `std_prior` `σ_r` and `expert_weights_prior` `π_n`, both uniform
//! from 0 to 1, all f32 and trained, n the `samples`. `gaussian_var_prior` `[r, r]` and `expert_weights` `[n]` are what PEFT keeps of its last draw: nothing
//! reads them, and here they stay as they start, 1 on the diagonal and 1/n.
//!
//! # Cost
//! `rank*(i+o) + rank + samples` parameters per linear. In training `samples*rank*i` normal numbers and twice as many FLOPs a linear, for each
//! micro-batch forward and again in reverse: with short micro-batches most of the step. Nothing in answers.
//!
//! # Limits
//! With `scale` 0 and no losses of its own it is LoRA. Answers, and what it merges to, are LoRA's of A and B.
//!
//! # Departures
//! Agrees with PEFT on what a draw gives. PEFT draws at every forward pass and has one loss for the mean of the linears; here all micro-batches of a
//! step have one draw, so that neither packing nor ranks change it, and each linear has its loss: PEFT's `kl_loss_weight` over their
//! number is the same. PEFT adds Σ ln Γ(a) in D(a) where the divergence has it subtracted: `dirichlet: exact` has it so. PEFT, and so
//! this, uses no more of Wishart's matrix than its diagonal, whose entries are chi-squared and independent.
//!
//! # Paper
//! Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation. Seth, Pathak, Sengupta, Verma, Raman,
//! Gopalakrishnan, Chatterjee, Chakraborty, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::gamma::{digamma, log_gamma};
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, keys};

const A: &str = "lora_A";
const B: &str = "lora_B";
const SPREADS: &str = "std_prior";
const SHARES: &str = "expert_weights_prior";
const LAST_SPREADS: &str = "gaussian_var_prior";
const LAST_SHARES: &str = "expert_weights";

/// The key of PEFT's configuration that has what is its own.
const OWN: &str = "monteclora_config";

/// Which divergence holds the shares of draws to their prior.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Dirichlet {
    /// As PEFT has it, where one of its terms has the other sign.
    #[default]
    Reference,
    /// The divergence of the two distributions.
    Exact,
}

/// Parameters of MonteCLoRA.
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
    /// How many draws a step takes the mean of.
    #[schemars(range(min = 1, max = 1024))]
    samples: u32,
    /// Factor on what is drawn.
    #[schemars(range(min = 0.0, max = 1e3))]
    scale: f64,
    /// Factor on the divergences from the priors.
    #[schemars(range(min = 0.0, max = 1e3))]
    kl_weight: f64,
    /// The concentration of Dirichlet's prior of the shares of draws.
    #[schemars(range(min = 1e-3, max = 1e3))]
    prior: f64,
    /// Which divergence holds these shares to it.
    dirichlet: Dirichlet,
    /// Adds the sum of squared shares to the loss, so that no draw has all.
    entropy: bool,
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
            samples: 8,
            scale: 1e-4,
            kl_weight: 1e-5,
            prior: 0.1,
            dirichlet: Dirichlet::default(),
            entropy: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Monteclora {
    scaling: Scaling,
    config: Config,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Rows>,
    /// The map of all others.
    rows: Rows,
}

/// What is added at a linear.
#[derive(Debug, Clone, Copy)]
struct Rows {
    factor: f64,
    dropout: f64,
    samples: usize,
    scale: f64,
    kl_weight: f64,
    prior: f64,
    dirichlet: Dirichlet,
    entropy: bool,
}

impl Method for Monteclora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation",
            authors: "Vaibhav Seth, Arinjay Pathak, Ayan Sengupta, Aastha Verma, Natraj Raman, Sriram Gopalakrishnan, Niladri Chatterjee, Tanmoy \
                      Chakraborty",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + rank + samples",
        merges: Merges::Factors,
        peft_type: Some("LORA"),
        ..Card::new(
            "monteclora",
            Point::Adapter,
            "LoRA whose first factor is drawn anew at every step of training, as a mean of several draws about what is learned, with learned \
             spreads and shares that a loss holds to those of a prior; where few examples would be learned by heart.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let made = Self::new(config);
        let faults = made.scaling.faults();
        if faults.is_empty() { Ok(Box::new(made)) } else { Err(faults) }
    }
}

impl Monteclora {
    fn new(config: Config) -> Self {
        let (ranks, alphas) = (config.rank_pattern.clone(), config.alpha_pattern.clone());
        let scaling = Scaling { rank: config.rank, alpha: config.alpha, rslora: config.rslora, ranks, alphas };
        let rows = |factor| Rows {
            factor,
            dropout: config.dropout,
            samples: config.samples as usize,
            scale: config.scale,
            kl_weight: config.kl_weight,
            prior: config.prior,
            dirichlet: config.dirichlet,
            entropy: config.entropy,
        };
        Self { own: scaling.own(rows), rows: rows(scaling.factor()), scaling, config }
    }

    fn rows_at(&self, site: &str) -> &Rows {
        self.own.get(site).unwrap_or(&self.rows)
    }
}

impl Adapter for Monteclora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut attachments = factors::attach(sites, A, B, |site| self.scaling.rank_at(site))?;
        for at in &mut attachments {
            let (r, n) = (self.scaling.rank_at(at.site.as_str()) as usize, self.config.samples as usize);
            let of_draws = |local, shape: usize| TensorSpec { decay: false, ..TensorSpec::trained(local, [shape]) };
            at.tensors.extend([of_draws(SPREADS, r), of_draws(SHARES, n)]);
            at.tensors.extend([TensorSpec::fixed(LAST_SPREADS, [r, r]), TensorSpec::fixed(LAST_SHARES, [n])]);
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let mut of_draws = BTreeMap::new();
        for spec in at.tensors.iter().filter(|spec| [SPREADS, SHARES].contains(&spec.local)) {
            let about_0 = rng.named(spec.local).uniform_tensor(spec.shape.as_slice(), 0.5, DType::F32)?;
            of_draws.insert(spec.local, (about_0 + 0.5)?);
        }
        let spreads = at.tensors.iter().find(|spec| spec.local == LAST_SPREADS).map_or(0, |spec| spec.shape[0]);
        let one = Tensor::eye(spreads, DType::F32, &Device::Cpu)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            B => Start::Constant(0.0),
            LAST_SPREADS => Start::Is(one.clone()),
            LAST_SHARES => Start::Constant(1.0 / spec.shape[0] as f64),
            local => of_draws.get(local).map_or(Start::Constant(0.0), |tensor| Start::Is(tensor.clone())),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Delta(self.rows_at(at.site.as_str()))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let scale = self.rows_at(at.site.as_str()).factor;
        Ok(Merged::Factors { left: tensors.get(B)?.clone(), right: tensors.get(A)?.clone(), scale })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.config.dropout, ..self.scaling.lora_config() };
        let tensors = vec![
            (A, "lora_A.weight"),
            (B, "lora_B.weight"),
            (SPREADS, "lora_monteclora_sampler.std_prior"),
            (SHARES, "lora_monteclora_sampler.expert_weights_prior"),
            (LAST_SPREADS, "lora_monteclora_sampler.gaussian_var_prior"),
            (LAST_SHARES, "lora_monteclora_sampler.expert_weights"),
        ];
        let mut peft = scaling::peft(&config, tensors);
        let Config { samples, scale, kl_weight, prior, entropy, .. } = self.config;
        let own = json!({
            // How many draws PEFT makes ahead.
            "buffer_size": 150,
            "dirichlet_prior": prior,
            "kl_loss_weight": kl_weight,
            "num_samples": samples,
            "sample_scaler": scale,
            "use_entropy": entropy,
        });
        peft.config.insert(OWN.to_owned(), own);
        Some(peft)
    }
}

impl Rows {
    /// The variances `v_r` of this step's draws.
    fn variances(&self, tensors: &Locals, cx: &Drawing<'_, '_>) -> attune_points::Result<Tensor> {
        let s_r = tensors.get(SPREADS)?;
        let r = s_r.dim(0)?;
        // A sum of r squares.
        let chi_r = cx.normal("spreads", &[r, r], s_r)?.sqr()?.sum(1)?;
        Ok(((s_r * 2.0)?.exp()? * chi_r)?.maximum(1e-3)?)
    }

    /// The shares `w_n` of this step's draws.
    fn shares(&self, tensors: &Locals, cx: &Drawing<'_, '_>) -> attune_points::Result<Tensor> {
        let p_n = tensors.get(SHARES)?;
        let n = self.samples as f64;
        let a_n = p_n.exp()?.maximum(1e-6)?;
        let log_n = a_n.log()?;
        let mean_n = log_n.broadcast_sub(&log_n.mean_keepdim(0)?)?;
        let inverse_n = a_n.recip()?;
        let all = (inverse_n.sum_keepdim(0)? / (n * n))?;
        let variance_n = ((&inverse_n * (1.0 - 2.0 / n))?.broadcast_add(&all)?.maximum(1e-6)? + 1e-6)?;
        let logits_n = ((variance_n.sqrt()? * cx.normal("shares", &[self.samples], p_n)?)? + mean_n)?;
        Ok(ops::softmax(&logits_n.unsqueeze(0)?)?.squeeze(0)?)
    }

    /// What this step's draws add to A.
    fn drawn(&self, tensors: &Locals, cx: &Drawing<'_, '_>) -> attune_points::Result<Tensor> {
        let a_ri = tensors.get(A)?;
        let ((r, i), n) = (a_ri.dims2()?, self.samples);
        let e_nd = cx.normal("draws", &[n, r * i], a_ri)?;
        let mean_ri = ops::matmul(&self.shares(tensors, cx)?.unsqueeze(0)?, &e_nd)?.reshape((r, i))?;
        let spread_r1 = (self.variances(tensors, cx)?.sqrt()? * self.scale)?.unsqueeze(1)?;
        Ok(mean_ri.broadcast_mul(&spread_r1)?)
    }

    /// The divergence of the shares' distribution from its prior.
    fn of_shares(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let a_n = tensors.get(SHARES)?.exp()?;
        let prior_n = (a_n.ones_like()?.detach() * self.prior)?;
        let (all, of_prior) = (a_n.sum_keepdim(0)?, prior_n.sum_keepdim(0)?);
        let whole = (log_gamma(&all)? - log_gamma(&of_prior)?)?.sum_all()?;
        let each = (log_gamma(&a_n)? - log_gamma(&prior_n)?)?.sum_all()?;
        let sign = match self.dirichlet {
            Dirichlet::Reference => 1.0,
            Dirichlet::Exact => -1.0,
        };
        let slopes_n = digamma(&a_n)?.broadcast_sub(&digamma(&all)?)?;
        let moved = ((a_n - prior_n)? * slopes_n)?.sum_all()?;
        Ok(((whole + (each * sign)?)? + moved)?)
    }

    /// `Σ (v - ln v - 1)` of variances, for those of normal numbers from 1.
    fn from_one(v_r: &Tensor) -> attune_points::Result<Tensor> {
        Ok(((v_r - v_r.log()?)? - 1.0)?.sum_all()?)
    }
}

/// What is drawn for a step at a site.
struct Drawing<'c, 'a> {
    masks: &'a dyn attune_points::adapter::DropoutMask,
    cx: &'c RowCx<'a>,
}

impl Drawing<'_, '_> {
    fn normal(&self, what: &str, shape: &[usize], like: &Tensor) -> attune_points::Result<Tensor> {
        self.masks.shared_noise(self.cx.site, what, shape, like)
    }
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (a_ri, b_or) = (tensors.get(A)?, tensors.get(B)?);
        let a_ri = match cx.dropout {
            Some(masks) => (a_ri + self.drawn(tensors, &Drawing { masks, cx })?)?,
            None => a_ri.clone(),
        };
        let h_tr = ops::linear(&dropped(x_ti, self.dropout, cx)?, &a_ri, None)?;
        Ok(ops::linear(&(h_tr * self.factor)?, b_or, None)?)
    }

    fn loss(&self, _: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Option<Tensor>> {
        let Some(masks) = cx.dropout else { return Ok(None) };
        let drawing = Drawing { masks, cx };
        let mut terms = Vec::new();
        if self.kl_weight > 0.0 {
            let s_r = tensors.get(SPREADS)?;
            let r = s_r.dim(0)? as f64;
            let of_spreads = (Self::from_one(&(s_r * 2.0)?.exp()?)? * (0.5 * r))?;
            let of_draws = (Self::from_one(&self.variances(tensors, &drawing)?)? * (0.5 * self.samples as f64))?;
            terms.push((((self.of_shares(tensors)? + of_spreads)? + of_draws)? * self.kl_weight)?);
        }
        if self.entropy {
            terms.push(self.shares(tensors, &drawing)?.sqr()?.sum_all()?);
        }
        let sum = terms.into_iter().map(Ok).reduce(|sum: attune_points::Result<Tensor>, term| Ok((sum? + term?)?));
        sum.transpose()
    }
}

/// Whether a configuration of PEFT's LoRA is MonteCLoRA's.
pub(super) fn is_monteclora(config: &Map<String, Value>) -> bool {
    config.get(OWN).is_some_and(|own| !own.is_null())
}

/// What `adapter_config.json` of a PEFT MonteCLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let modules = keys::without_inner(modules, "lora_");
    let (lora, mut params) = scaling::from_peft(config, &modules, Some(OWN))?;
    params.insert("dropout".to_owned(), json!(lora.lora_dropout));
    let own = config.get(OWN).and_then(Value::as_object).cloned().unwrap_or_default();
    for (name, theirs) in [
        ("samples", "num_samples"),
        ("scale", "sample_scaler"),
        ("kl_weight", "kl_loss_weight"),
        ("prior", "dirichlet_prior"),
        ("entropy", "use_entropy"),
    ] {
        // What is not there is PEFT's default, which is ours.
        params.extend(own.get(theirs).map(|value| (name.to_owned(), value.clone())));
    }
    Ok((MethodRef { method: Monteclora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divergence(dirichlet: Dirichlet, a_n: &[f64]) -> f64 {
        let p_n = Tensor::new(a_n, &Device::Cpu).unwrap().log().unwrap();
        let made = Monteclora::new(Config { samples: a_n.len() as u32, prior: 0.4, dirichlet, ..Config::default() });
        let locals = Locals::new("q_proj", [(SHARES, p_n)]);
        made.rows.of_shares(&locals).unwrap().to_scalar().unwrap()
    }

    /// Two shares have a Beta distribution, whose divergence is an integral over an interval.
    #[test]
    fn the_exact_divergence_of_shares_is_that_of_two_distributions() {
        assert!(divergence(Dirichlet::Exact, &[0.4; 5]).abs() < 1e-9, "from itself");
        let (a, b) = (2.5, 1.75);
        let n = 200_000;
        // ln of the two densities without their factors; these are integrals themselves, and the prior's is known: π over sin of 0.4 π is that
        // of (0.4, 0.6), and that of (0.4, 0.4) follows from it by one of 0.8.
        let at = |k: usize| (k as f64 + 0.5) / f64::from(n);
        let own = |x: f64| x.powf(a - 1.0) * (1.0 - x).powf(b - 1.0);
        let whole: f64 = (0..n as usize).map(|k| own(at(k))).sum::<f64>() / f64::from(n);
        let ln_prior = 2.0 * LN_GAMMA_0_4 - LN_GAMMA_0_8;
        let term = |x: f64| {
            let ratio = (a - 0.4) * x.ln() + (b - 0.4) * (1.0 - x).ln() - whole.ln() + ln_prior;
            own(x) / whole * ratio
        };
        let expected: f64 = (0..n as usize).map(|k| term(at(k))).sum::<f64>() / f64::from(n);
        let found = divergence(Dirichlet::Exact, &[a, b]);
        assert!((found - expected).abs() < 1e-4, "{found} and {expected}");
        assert!((divergence(Dirichlet::Reference, &[a, b]) - found).abs() > 0.1, "PEFT's is another");
    }

    const LN_GAMMA_0_4: f64 = 0.796_677_817_701_784;
    const LN_GAMMA_0_8: f64 = 0.152_059_678_399_837_56;

    #[test]
    fn a_folder_says_what_its_draws_are_like() {
        let config = json!({
            "peft_type": "LORA", "r": 3, "lora_alpha": 6, "monteclora_config": {"num_samples": 5, "use_entropy": true, "buffer_size": 9},
        });
        let config = config.as_object().unwrap();
        assert!(is_monteclora(config) && !is_monteclora(&Map::new()));
        let modules = ["q_proj".to_owned(), "q_proj.lora_monteclora_sampler".to_owned()];
        let (method, targets) = from_peft(config, &modules).unwrap();
        assert_eq!(targets, Targets::Many(vec!["q_proj".to_owned()]));
        assert_eq!((&method.params["samples"], &method.params["entropy"]), (&json!(5), &json!(true)));
        assert!(method.params.get("scale").is_none());
        let wrong = json!({"rank_pattern": {"q_proj": 0}});
        let wrong = Config {
            rank_pattern: serde_json::from_value(wrong["rank_pattern"].clone()).unwrap(),
            ..Config::default()
        };
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        assert!(Monteclora::build(wrong, &cx).err().unwrap()[0].to_string().contains("`rank_pattern` has 0"));
    }
}
