//! Several low-rank adapters beside each linear of an MLP, mixed row by row by a router; a balance keeps one half of them for data
//! of knowledge and the other for tasks, so that much of the one does not wash out the other.
//!
//! # Update
//! ```text
//! y_to   = x_ti W_oi^T + s · Σ_e ω_te B_eor A_eri drop(x_ti)           ω_te = softmax_e(x_ti G_ei^T)           s = alpha / r
//! Q_me   = Σ_t∈m ω_te                   for each document m of the micro-batch
//! Z_me   = I_me Q_me                    I_me = 1 + δ if m is of the kind that e is for, else 1 - δ
//! L      = L_objective + balance · Σ_sites Var(Z) / mean(Z)²
//! ```
//!
//! # Symbols
//! `lora_A` `A_eri` as `[experts r, i]`, `lora_B` `B_eor` as `[o, experts r]` and `lora_route` `G_ei`, f32, trained; A and G start
//! uniform in ±1/sqrt(i), B at 0. The first half of the experts is for documents of the domains that `knowledge` names. `delta` δ.
//!
//! # Cost
//! `experts*(rank*(i+o) + i)` parameters per linear, and as many multiply-adds a row. Every expert sees every row.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With one expert ω = 1 and it is LoRA.
//!
//! # Departures
//! The balance is that of a micro-batch, a logical shard's documents, as gradients are summed by them; documents have no padding
//! to count. The variance is over all numbers of Z, over their count.
//!
//! # Paper
//! LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin. Dou et al., 2024.

use attune_architecture::{Architecture, Site, SiteKind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Paper, Point};
use attune_spec::{Fault, suggest};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, own};

const A: &str = "lora_A";
const B: &str = "lora_B";
const ROUTE: &str = "lora_route";

/// Parameters of LoRAMoE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Experts of each linear.
    #[schemars(range(min = 1, max = 64))]
    experts: u32,
    /// Rank of each expert.
    #[schemars(range(min = 1, max = 1024))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the experts' input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Weight of the balance.
    #[schemars(range(min = 0.0, max = 1000.0))]
    balance: f64,
    /// How much more a document counts for experts of its kind, and less for the others.
    #[schemars(range(min = 0.0, max = 1.0))]
    delta: f64,
    /// The domains whose documents are for the first half of the experts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    knowledge: Vec<String>,
}

impl Default for Config {
    /// The paper's values, as far as they are known.
    fn default() -> Self {
        Self { experts: 6, rank: 4, alpha: 32.0, dropout: 0.05, balance: 0.1, delta: 0.1, knowledge: Vec::new() }
    }
}

pub(super) struct Loramoe {
    config: Config,
    /// Whether each domain of the mixture is of knowledge.
    knows: Vec<bool>,
}

impl Method for Loramoe {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
            authors: "Shihan Dou, Enyu Zhou, Yan Liu, Songyang Gao, et al.",
            year: 2024,
        }),
        applies: &[method::SiteKind::Linear],
        targets: "*.mlp.*",
        parameters: "experts*(rank*(i+o) + i)",
        merges: Merges::No,
        ..Card::new(
            "loramoe",
            Point::Adapter,
            "Several low-rank adapters beside each linear of an MLP, mixed row by row by a router; a balance keeps one half of \
             them for data of knowledge and the other for tasks, so that much of the one does not wash out the other.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let names: Vec<&str> = cx.domains.iter().map(|(name, _)| name.as_str()).collect();
        // Whoever only reads the adapter has no domains.
        let unknown = config.knowledge.iter().filter(|name| !names.is_empty() && !names.contains(&name.as_str()));
        let fault = |name: &String| {
            let hint = suggest::hint(name, names.iter().copied());
            Fault::new(
                "knowledge",
                format!("names {name:?}, which is no domain of the job ({}){hint}", names.join(", ")),
            )
        };
        let faults: Vec<Fault> = unknown.map(fault).collect();
        if !faults.is_empty() {
            return Err(faults);
        }
        let knows = names.iter().map(|name| config.knowledge.iter().any(|known| known == name)).collect();
        Ok(Box::new(Self { config, knows }))
    }
}

impl Adapter for Loramoe {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let experts = self.config.experts as usize;
        let mut attachments = factors::attach(sites, A, B, |_| self.config.rank)?;
        for (at, site) in attachments.iter_mut().zip(sites) {
            let SiteKind::Linear { input, .. } = site.kind else { continue };
            // The factors of all experts, one after the other.
            for spec in &mut at.tensors {
                spec.shape[usize::from(spec.local == B)] *= experts;
            }
            let quiet = at
                .tensors
                .first()
                .and_then(|spec| spec.quiet)
                .or_else(|| (experts == 1).then_some("there is one expert"));
            at.tensors.push(TensorSpec { quiet, ..TensorSpec::trained(ROUTE, [experts, input]) });
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == B { Start::Constant(0.0) } else { Start::kaiming(spec) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("each row is mixed by itself"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

/// The weights of experts, `[T, E]`.
fn routes(x_ti: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
    Ok(ops::softmax(&ops::linear(x_ti, tensors.get(ROUTE)?, None)?)?)
}

/// `Var(Z) / mean(Z)²` of all numbers.
fn imbalance(z_me: &Tensor) -> attune_points::Result<Tensor> {
    let mean = z_me.mean_all()?;
    let variance = z_me.broadcast_sub(&mean)?.sqr()?.mean_all()?;
    Ok((variance / mean.sqr()?)?)
}

impl RowMap for Loramoe {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { experts, rank, alpha, dropout, .. } = self.config;
        let omega_te = routes(x_ti, tensors)?;
        let h = ops::linear(&dropped(x_ti, dropout, cx)?, tensors.get(A)?, None)?;
        let (t, e, r) = (x_ti.dim(0)?, experts as usize, rank as usize);
        let h = (h.reshape((t, e, r))?.broadcast_mul(&omega_te.unsqueeze(2)?)? * (alpha / r as f64))?;
        Ok(ops::linear(&h.reshape((t, e * r))?, tensors.get(B)?, None)?)
    }

    fn loss(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Option<Tensor>> {
        let Config { experts, balance, delta, .. } = self.config;
        let docs = cx.docs();
        if balance == 0.0 || docs.is_empty() {
            return Ok(None);
        }
        let omega_te = routes(x_ti, tensors)?;
        let mut rows = Vec::with_capacity(docs.len());
        for (doc, places) in docs {
            let knows = self.knows.get(usize::from(doc.domain)).copied().unwrap_or_default();
            let suits = |expert: u32| (expert < experts.div_ceil(2)) == knows;
            let weights = (0..experts).map(|expert| if suits(expert) { 1.0 + delta } else { 1.0 - delta });
            let weights_e = Tensor::from_iter(weights, &Device::Cpu)?.to_dtype(x_ti.dtype())?;
            let sum_e = omega_te.narrow(0, places.start, places.len())?.sum(0)?;
            rows.push((sum_e * weights_e)?);
        }
        Ok(Some((imbalance(&Tensor::stack(&rows, 0)?)? * balance)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_points::layout::{NO_LABEL, Row, Source};
    use attune_spec::id::Step;

    use super::*;

    fn of(experts: u32, knows: Vec<bool>) -> Loramoe {
        let config = Config { experts, rank: 2, alpha: 4.0, balance: 1.0, delta: 0.25, ..Config::default() };
        Loramoe { config, knows }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn locals(experts: usize) -> Locals {
        let tensors = [
            (A, tensor("a", &[2 * experts, 4])),
            (B, tensor("b", &[3, 2 * experts])),
            (ROUTE, tensor("g", &[experts, 4])),
        ];
        Locals::new("up_proj", tensors)
    }

    /// Documents of two rows and three, of the first domain and the second.
    fn layout() -> Layout {
        let mut layout = Layout::new();
        for (domain, rows) in [(0, 2), (1, 3)] {
            layout.push(Source { domain, ..Source::default() }, (0..rows).map(|row| (Row::Token(row), NO_LABEL)));
        }
        layout
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn with_one_expert_it_is_lora_and_weights_of_several_sum_to_one() {
        let (layout, site, x) = (layout(), SiteId::new("up_proj"), tensor("x", &[5, 4]));
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        let tensors = locals(1);
        let delta = of(1, vec![]).graph(&x, &tensors, &cx).unwrap();
        let h = x.matmul(&tensors.get(A).unwrap().t().unwrap()).unwrap();
        let lora = (h.matmul(&tensors.get(B).unwrap().t().unwrap()).unwrap() * 2.0).unwrap();
        assert!(difference(&delta, &lora) < 1e-12);
        let sums = routes(&x, &locals(3)).unwrap().sum(1).unwrap();
        assert!(difference(&sums, &Tensor::ones(5, DType::F64, &Device::Cpu).unwrap()) < 1e-12);
    }

    /// By hand: numbers 1, 2, 3, 4 and 5, 6, 7, 8 have mean 4.5 and variance 5.25.
    #[test]
    fn the_imbalance_is_the_one_computed_by_hand() {
        let z = Tensor::new(&[[1.0f64, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], &Device::Cpu).unwrap();
        let found = imbalance(&z).unwrap().to_scalar::<f64>().unwrap();
        assert!((found - 5.25 / (4.5 * 4.5)).abs() < 1e-12);
    }

    #[test]
    fn the_balance_weighs_documents_by_their_kind_and_can_be_left_out() {
        let (layout, site, x, tensors) = (layout(), SiteId::new("up_proj"), tensor("x", &[5, 4]), locals(2));
        let cx = RowCx { site: &site, output: 3, dropout: None, layout: &layout, rows: None };
        let found = of(2, vec![true, false]).loss(&x, &tensors, &cx).unwrap().unwrap().to_scalar::<f64>().unwrap();
        let omega = routes(&x, &tensors).unwrap().to_vec2::<f64>().unwrap();
        let q = |rows: std::ops::Range<usize>, expert: usize| rows.map(|row| omega[row][expert]).sum::<f64>();
        let z = [1.25 * q(0..2, 0), 0.75 * q(0..2, 1), 0.75 * q(2..5, 0), 1.25 * q(2..5, 1)];
        let mean = z.iter().sum::<f64>() / 4.0;
        let variance = z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / 4.0;
        assert!((found - variance / (mean * mean)).abs() < 1e-12);
        let mut without = of(2, vec![true, false]);
        without.config.balance = 0.0;
        assert!(without.loss(&x, &tensors, &cx).unwrap().is_none());
    }

    #[test]
    fn a_domain_that_the_job_does_not_have_is_named() {
        let domains = [("facts".parse().unwrap(), 1.0), ("tasks".parse().unwrap(), 1.0)];
        let config = Config { knowledge: vec!["fact".to_owned()], ..Config::default() };
        let faults = Loramoe::build(config, &BuildCx { steps: Step(1), domains: &domains, words: None })
            .map(|_| ())
            .unwrap_err();
        let message = faults[0].to_string();
        assert!(
            message.contains("names \"fact\", which is no domain of the job (facts, tasks); did you mean \"facts\"?"),
            "{message}"
        );
    }
}
