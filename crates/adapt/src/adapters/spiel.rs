//! Trains single entries of each weight, and looks for better ones on the way: those that moved least go, those that the loss
//! pulls at most come; for much change at few parameters, where it is not known beforehand which matter.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + scatter(indices_k, values_k)                         k = max(1, floor(density i o))
//! every `every` steps, for `watch` of them:
//!   C = the k entries of largest |∂L/∂W'_oi| on the first micro-batch      g_n = ∂L/∂W'_oi at C in step n
//! then, with r = floor(p k):
//!   the r entries of smallest |values_k| go, the r of largest |Σ_n g_n| of C that are not among the others come, at 0
//!   p = 1 the first time, then  rate (1 - t/T)  or  rate (1 + cos(π t/T))/2
//! ```
//!
//! # Symbols
//! `values` `[k]`, f32, trained, starts at 0; `indices` `[k]` flat places in `W_oi`, whole numbers, chosen at random at first; `t`
//! the step, `T` the number of steps. An entry that goes and comes at once stays. For an entry that comes, the optimiser goes on
//! as if it had seen the mean of `g_n` and of `g_n²` in its first `watch` updates; each entry counts its own updates.
//!
//! # Cost
//! `max(1, floor(density*i*o))` parameters per linear, and as many places. Each pass makes `W'` twice (forward and reverse) and the
//! gradient by all of it; a choice begins with one more micro-batch.
//!
//! # Limits
//! With `rate: 0` the entries stay: sparse tuning with a random mask. With `density: 1` it is full tuning of these weights.
//!
//! # Departures
//! Candidates are watched by the gradient of a whole step, not of each backward pass, so that neither micro-batches nor ranks
//! change them. Their gradients are those before clipping, as the authors' are. The variant that chooses by the accumulators of
//! SM3 is left out.
//!
//! # Paper
//! Scaling Sparse Fine-Tuning to Large Language Models. Ansell, Vulić, Sterz, Korhonen, Ponti, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, Trained, WeightMap};
use attune_points::engine::StepRule;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::choice::{Choice, Choices, Falls};
use crate::parts::sparse::{self, INDICES, VALUES};
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

/// Parameters of SpIEL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of a weight's entries that train.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
    /// Steps from one choice to the next.
    #[schemars(range(min = 2, max = 1_000_000))]
    every: u64,
    /// For how many of them candidates are watched.
    #[schemars(range(min = 1, max = 1_000_000))]
    watch: u64,
    /// Share of the entries that are chosen anew at the start; the first choice is of all. With 0 none ever is.
    #[schemars(range(min = 0.0, max = 1.0))]
    rate: f64,
    /// How that share falls.
    falls: Falls,
}

impl Default for Config {
    /// The authors' values, and as many parameters as LoRA of rank 64 has in a weight of 4096 by 4096.
    fn default() -> Self {
        Self { density: 0.03, every: 20, watch: 5, rate: 0.2, falls: Falls::Linear }
    }
}

pub(super) struct Spiel {
    config: Config,
}

impl Method for Spiel {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Scaling Sparse Fine-Tuning to Large Language Models",
            authors: "Alan Ansell, Ivan Vulić, Hannah Sterz, Anna Korhonen, Edoardo M. Ponti",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "max(1, floor(density*i*o))",
        fixed: "max(1, floor(density*i*o))",
        merges: Merges::Weight,
        rules: &[Rule {
            when: "rate > 0",
            require: "watch <= every",
            message: "is more than the steps from one choice to the next; expected `every` at most",
            path: "watch",
        }],
        ..Card::new(
            "spiel",
            Point::Adapter,
            "Trains single entries of each weight, and looks for better ones on the way: those that moved least go, those that \
             the loss pulls at most come; for much change at few parameters, where it is not known beforehand which matter.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Spiel {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let infos = arch.tensors();
        linears::attach(sites, |site, output, input| {
            if !infos.iter().any(|info| info.site == site.id) {
                let message = format!("names {}, whose weight is another site's: entries of it cannot train", site.id);
                return Err(Fault::new("targets", message));
            }
            let k = ((self.config.density * input as f64 * output as f64).floor() as usize).max(1);
            let quiet = Some("its entries come and go");
            let values = TensorSpec { comes_and_goes: true, quiet, ..TensorSpec::trained(VALUES, [k]) };
            Ok(vec![values, TensorSpec::fixed(INDICES, [k])])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (output, input) = weight.shape();
        let k = at.tensors.first().map_or(0, |spec| spec.shape.iter().product());
        let indices_k = sparse::some(output * input, k, &rng.named(INDICES))?;
        starts::each(at, rng, |spec| match spec.local {
            INDICES => Start::Is(indices_k.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let Config { every, watch, rate, falls, .. } = self.config;
        let choices = Choices { every, watch, rate, falls };
        (rate > 0.0).then(|| Box::new(Choice::new(choices, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(VALUES)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Spiel {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        sparse::added(w_oi, tensors.get(INDICES)?, tensors.get(VALUES)?)
    }
}
