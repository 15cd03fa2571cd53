//! What one optimiser step may ask of the machinery, and the point `StepRule` that asks.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_spec::id::Step;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::layout::{LabelCounts, Layout};
use crate::objective::Objective;
use crate::optimizer::Optimizer;
use crate::params::TensorId;
use crate::sink::{Entries, GradSink, Grads};
use crate::tap::Tap;
use crate::theta::Theta;

/// Where a batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The next batch of the training mixture.
    Train,
    /// The validation data of a domain, from the start.
    Validation(u16),
}

/// The micro-batches of one optimiser step that this rank owns, in the order of their logical shards, and the counts over
/// all ranks.
#[derive(Debug, Clone)]
pub struct Batch {
    /// One layout a micro-batch, with the index of its logical shard.
    pub parts: Vec<(u32, Arc<Layout>)>,
    /// What is supervised in the whole step, on all ranks.
    pub counts: LabelCounts,
    /// Rows of the whole step, on all ranks.
    pub n_rows: u64,
}

/// Sums that a pass made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LossReport {
    /// Sum of the weighted token losses, not divided.
    pub loss_sum: f64,
    /// What was supervised.
    pub counts: LabelCounts,
    /// The same, by domain.
    pub by_domain: Vec<(f64, LabelCounts)>,
    /// Sums of further numbers that the objective made, by name.
    pub beside: BTreeMap<Cow<'static, str>, f64>,
}

impl LossReport {
    /// Adds another report.
    pub fn add(&mut self, other: &Self) {
        self.loss_sum += other.loss_sum;
        self.counts = self.counts + other.counts;
        if self.by_domain.len() < other.by_domain.len() {
            self.by_domain.resize(other.by_domain.len(), Default::default());
        }
        for (sum, part) in self.by_domain.iter_mut().zip(&other.by_domain) {
            *sum = (sum.0 + part.0, sum.1 + part.1);
        }
        for (name, number) in &other.beside {
            *self.beside.entry(name.clone()).or_default() += number;
        }
    }

    /// Mean loss a supervised token.
    pub fn mean(&self) -> f64 {
        self.loss_sum / self.counts.tokens.max(1) as f64
    }
}

/// What one optimiser step did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReport {
    /// The loss over the whole step.
    pub loss: LossReport,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Rows that went through the model, on all ranks.
    pub n_rows: u64,
    /// Further numbers of the step rule by name, as they are.
    pub metrics: Vec<(String, f64)>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// An entry of a trained tensor that starts anew.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Renewed {
    /// Its flat index.
    pub entry: usize,
    /// How many updates its gradient was watched for.
    pub age: u64,
    /// The mean of its gradient in these.
    pub mean: f32,
    /// The mean of its square.
    pub square: f32,
}

/// The usual step: the gradient of the loss over the next batch, then one update.
///
/// # Errors
/// Whatever the engine raises.
pub fn usual_step(engine: &mut dyn Engine) -> Result<StepReport> {
    let batch = engine.batch(Source::Train)?;
    update_on(engine, &batch)
}

/// The gradient of the loss over a batch of the job's data, then one update.
///
/// # Errors
/// Whatever the engine raises.
pub fn update_on(engine: &mut dyn Engine, batch: &Batch) -> Result<StepReport> {
    let (grad_norm, loss) = engine.update_by(batch)?;
    Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
}

/// The gradient of the job's loss over a batch at the parameters that are being trained, of all ranks.
///
/// # Errors
/// Whatever the engine raises.
pub fn gradients_on<E: Engine + ?Sized>(engine: &mut E, batch: &Batch) -> Result<(Grads, LossReport)> {
    let objective = engine.objective();
    let theta = engine.theta().clone();
    let scale = 1.0 / objective.denominator().of(batch.counts);
    let parts = engine.grads(&theta, &batch.parts, &*objective, scale)?;
    engine.reduce(parts)
}

/// The machinery of a run, as a step rule sees it. Every pass takes the parameters that it runs at.
pub trait Engine {
    /// The parameters that are being trained.
    fn theta(&self) -> &Theta;

    /// Replaces them (an average, a merge).
    fn set(&mut self, theta: Theta);

    /// The next batch from `source`. Where the objective learns from answers of the model, a training batch has those that it
    /// gives now.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn batch(&mut self, source: Source) -> Result<Batch>;

    /// The loss at `at`, without gradients.
    ///
    /// # Errors
    /// Whatever the pass raises.
    fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport>;

    /// The losses of a step's micro-batches at each of `at`, of all shards and ranks and added in the order of the shards: the same on
    /// every rank. Nothing is dropped and no gradient is made; each is one pass over the micro-batches, and an engine may make
    /// several side by side. One that is alone has them all.
    ///
    /// # Errors
    /// Whatever a pass raises; a rank that is gone.
    fn scores(&mut self, at: &[Theta], parts: &[(u32, Arc<Layout>)], of: &dyn Objective) -> Result<Vec<LossReport>> {
        let mut scores = vec![LossReport::default(); at.len()];
        for (theta, score) in at.iter().zip(&mut scores) {
            for (_, layout) in parts {
                score.add(&self.score(theta, layout, of)?);
            }
        }
        Ok(scores)
    }

    /// Shows a tap what a model at `at` makes of a micro-batch, below its head and without gradients.
    ///
    /// # Errors
    /// Whatever the pass or the tap raises; [`Error::Refused`] by an engine that shows nothing.
    fn look(&mut self, _at: &Theta, _on: &Layout, _tap: &dyn Tap) -> Result<()> {
        Err(Error::Refused("this engine shows nothing of its passes".to_owned()))
    }

    /// The gradient of `scale × (sum of losses)` at `at`, into `sink`.
    ///
    /// # Errors
    /// Whatever the pass raises.
    fn grad(
        &mut self,
        at: &Theta,
        on: &Layout,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport>;

    /// The gradients of a step's micro-batches at `at`, by their numbers, to be given to [`Engine::reduce`]. An engine may
    /// compute them side by side, and may add those that follow each other, under the first number.
    ///
    /// # Errors
    /// Whatever a pass raises.
    fn grads(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        scale: f64,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        self.grads_beside(at, parts, of, scale, &Entries::new())
    }

    /// The same, and with each those by single entries of tensors that do not train.
    ///
    /// # Errors
    /// As for [`Engine::grads`]; an entry that a tensor does not have.
    fn grads_beside(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        scale: f64,
        beside: &Entries,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        let mut made = Vec::with_capacity(parts.len());
        for (part, layout) in parts {
            let mut sink = Grads::wanting(self.wanted()).and_entries(beside);
            let report = self.grad(at, layout, of, scale, &mut sink)?;
            made.push((*part, sink, report));
        }
        Ok(made)
    }

    /// Some micro-batches with the log-probabilities of their labels at `at`, without dropout, in this column.
    ///
    /// # Errors
    /// Whatever the pass raises.
    fn with_logp(
        &mut self,
        column: &str,
        _at: &Theta,
        _parts: &[(u32, Arc<Layout>)],
    ) -> Result<Vec<(u32, Arc<Layout>)>> {
        Err(Error::Refused(format!("this engine does not find the column {column:?}")))
    }

    /// Whether the micro-batch of this number is one of this rank's; of one that is alone all are.
    fn owns(&self, _part: u32) -> bool {
        true
    }

    /// The objective of the job.
    fn objective(&self) -> Arc<dyn Objective>;

    /// The tensors that train, in order: what an update needs the gradient of.
    fn wanted(&self) -> Vec<TensorId>;

    /// Sums per-shard gradients and reports over all shards and ranks, in the order of the shards, and adds the gradients of
    /// losses that components have on their own tensors. Once a step.
    ///
    /// # Errors
    /// A rank that is gone.
    fn reduce(&mut self, parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)>;

    /// Clips, then applies the optimiser to the trained parameters; returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// A gradient that is not finite, missing (connection guard) or always zero (signal guard).
    fn update(&mut self, gradients: Grads) -> Result<f64>;

    /// The same for all tensors but those that rest: their values, and what the optimiser keeps of them, stay as they are, and their gradients
    /// do not count in the norm.
    ///
    /// # Errors
    /// As for [`Engine::update`]; [`Error::Refused`] by an engine that lets nothing rest.
    fn update_but(&mut self, gradients: Grads, resting: &BTreeSet<TensorId>) -> Result<f64> {
        match resting.first() {
            None => self.update(gradients),
            Some(id) => Err(Error::Refused(format!("{id} cannot rest here"))),
        }
    }

    /// The base's own weight at a site, `[o, i]` in 32 bits.
    ///
    /// # Errors
    /// [`Error::Refused`] by an engine that has none at hand; a weight that cannot be read.
    fn weight(&self, site: &str) -> Result<Tensor> {
        Err(Error::Refused(format!("the weight of {site} is not at hand here")))
    }

    /// The gradient of the job's loss over a batch, then one update by it: its norm before clipping, and the loss. Nobody sees the
    /// gradient, so an engine of several ranks need not give it to all of them.
    ///
    /// # Errors
    /// As for [`Engine::grads`] and [`Engine::update`].
    fn update_by(&mut self, batch: &Batch) -> Result<(f64, LossReport)> {
        let (gradients, loss) = gradients_on(self, batch)?;
        Ok((self.update(gradients)?, loss))
    }

    /// What every rank has to say, under numbers that no other uses, in the order of the numbers: the same on all of them.
    ///
    /// # Errors
    /// A rank that is gone.
    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>>;

    /// Starts entries of a trained tensor anew, at 0. The tensor was declared as one whose entries come and go.
    ///
    /// # Errors
    /// [`Error::Refused`] for a tensor or an optimiser that has no such entries.
    fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()>;

    /// The width of the model's rows.
    fn hidden(&self) -> usize;

    /// The random stream for `purpose` at the current step.
    fn rng(&self, purpose: &'static str) -> Rng;
}

/// What a step rule has to fit.
pub struct Job<'a> {
    /// The loss of the job.
    pub objective: &'a dyn Objective,
    /// The parameters, before the first step.
    pub theta: &'a Theta,
    /// How they are updated.
    pub optimizer: &'a dyn Optimizer,
    /// Whether activations have 16 bits.
    pub narrow: bool,
}

/// How one optimiser step uses the engine. At most one in a job.
pub trait StepRule: Send {
    /// Why it cannot train this job, if so.
    fn misfit(&self, _job: &Job<'_>) -> Option<String> {
        None
    }

    /// How many times its largest pass holds a micro-batch.
    fn copies(&self) -> usize {
        1
    }

    /// Whether its steps take gradients and update by them. One that takes none has no use for an optimiser, and whoever runs it
    /// makes no backward pass either.
    fn takes_gradients(&self) -> bool {
        true
    }

    /// Where a step stands in the schedule of the learning rate, and how many steps that has: the job's own for most, less for one that begins
    /// it anew on the way.
    fn scheduled(&self, step: Step, all: Step) -> (Step, Step) {
        (step, all)
    }

    /// Does one step.
    ///
    /// # Errors
    /// Whatever the engine raises.
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport>;

    /// Everything that a resumed run needs beside the step's number, by name: f32, or whole numbers of 64 bits.
    fn state(&self) -> Tensors {
        Tensors::new()
    }

    /// What its steps have found out beside what they trained, for the report of the run; the same after [`StepRule::restore`]. None for
    /// most.
    fn found(&self) -> Option<serde_json::Value> {
        None
    }

    /// Goes on from a state, in a run whose parameters are `theta`.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is not one of this rule in this run.
    fn restore(&mut self, state: Tensors, _theta: &Theta) -> Result<()> {
        match state.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::Refused(format!("has {name:?}, which the step rule does not know"))),
        }
    }
}
