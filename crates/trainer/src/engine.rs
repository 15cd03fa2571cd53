//! The engine of one rank: batches, passes, sums over shards, updates.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_collective::{Collective, owned};
use attune_data::Loader;
use attune_models::dropout::Dropout;
use attune_models::pass::walk::Keep;
use attune_models::pass::{Stopwatch, Times};
use attune_models::{Model, Pass, stack};
use attune_optim::clip;
use attune_points::engine::{Batch, Engine, LossReport, Renewed, Source, Tensors};
use attune_points::layout::REFERENCE;
use attune_points::objective::{Level, Objective};
use attune_points::optimizer::{Optimizer, UpdateCx};
use attune_points::schedule::Schedule;
use attune_points::{
    Entries, Error, GradSink, Grads, Layout, Locals, Owner, Params, Result, Tap, TensorId, TensorSpec, Theta,
};
use attune_spec::id::Step;
use attune_tensor::{Rng, autograd};
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::answers::{Judge, Judged};
use crate::checkpoint::Buffers;
use crate::guard::{self, Guard};
use crate::scope::ByColumn;
use crate::spent::Spent;
use crate::together::{self, Asked, Company, Piece, Wanted};
use crate::turns::Turns;

/// What ranks send one another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Message {
    /// A micro-batch's gradient and loss, and whether the rank was asked to stop. Between processes it goes in pieces.
    #[serde(skip)]
    Part { gradients: Grads, report: LossReport, stop: bool },
    /// The loss of a part of a validation set.
    Report(LossReport),
    /// The losses of a micro-batch at several parameters, and whether the rank was asked to stop.
    Reports { reports: Vec<LossReport>, stop: bool },
    /// A micro-batch with the log-probabilities of its labels.
    Scored(Arc<Layout>),
    /// What a step rule has to say.
    Said(#[serde(with = "crate::gang::said")] Tensors),
    /// What the answers to a micro-batch are worth.
    Judged(Judged),
    /// What a rank's parameters hash to.
    Values([u8; 32]),
}

/// What all ranks of a run share.
pub(crate) struct Shared {
    pub(crate) model: Arc<Model>,
    pub(crate) objective: Arc<dyn Objective>,
    pub(crate) optimizer: Box<dyn Optimizer>,
    pub(crate) schedule: Box<dyn Schedule>,
    /// How each trained tensor was declared.
    pub(crate) specs: BTreeMap<TensorId, TensorSpec>,
    /// Validation sets: name, and batches in file order.
    pub(crate) validation: Vec<(String, Vec<Arc<Layout>>)>,
    pub(crate) total_steps: Step,
    pub(crate) max_grad_norm: Option<f64>,
    pub(crate) logical_shards: u32,
    pub(crate) seed: u64,
    /// What a forward pass keeps for the reverse one.
    pub(crate) keep: Keep,
    /// What judges the answers that the objective needs, if it needs any.
    pub(crate) judge: Option<Judge>,
    /// What stands beside documents of some domains.
    pub(crate) turns: Turns,
}

impl Shared {
    /// How many numbers train; what a component holds beside them does not count.
    pub(crate) fn trained_parameters(&self) -> u64 {
        self.specs.values().map(|spec| spec.shape.iter().product::<usize>() as u64).sum()
    }
}

/// The objective of a pass.
pub(crate) enum Asking<'o> {
    /// One that may outlive the pass: lanes wait for each other with it.
    Shared(Arc<dyn Objective>),
    /// One that may not.
    Lent(&'o dyn Objective),
}

impl Asking<'_> {
    fn objective(&self) -> &dyn Objective {
        match self {
            Self::Shared(objective) => &**objective,
            Self::Lent(objective) => *objective,
        }
    }
}

/// One rank's engine.
pub(crate) struct RankEngine<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) loader: Loader,
    pub(crate) collective: Box<dyn Collective<Message> + 'a>,
    pub(crate) theta: Theta,
    pub(crate) buffers: Buffers,
    pub(crate) guard: Guard,
    /// How many rows a pass takes at most, unless a single micro-batch has more. It changes speed and memory, and no bit.
    pub(crate) rows_per_pass: usize,
    /// Where time went since it was last looked at.
    pub(crate) spent: Spent,
    /// What the answers of the last batch are worth.
    pub(crate) judged: Judged,
    /// The lanes beside which it runs.
    pub(crate) company: Option<Company<'a>>,
    /// Steps done.
    pub(crate) step: Step,
    /// Whether this rank was asked to stop; told to the others with the next gradients.
    pub(crate) stop_wanted: bool,
    /// Whether any rank was, by the last sum: all ranks agree on it.
    pub(crate) stop_agreed: bool,
}

impl RankEngine<'_> {
    /// Names of the optimiser's buffers for a tensor.
    pub(crate) fn buffer_names(&self, id: &TensorId) -> Vec<&'static str> {
        let shape = self.shared.specs.get(id).map(|spec| spec.shape.as_slice()).unwrap_or_default();
        let names = self.shared.optimizer.buffers(shape).into_iter().map(|(name, _)| name);
        let born = self.shared.specs.get(id).filter(|spec| spec.comes_and_goes).map(|_| "born");
        names.chain(born).collect()
    }

    /// The learning rate that the next update starts from.
    pub(crate) fn lr(&self) -> f64 {
        self.shared.optimizer.lr() * self.shared.schedule.factor(self.step, self.shared.total_steps)
    }

    /// Adds the gradients of losses that components have on their own tensors.
    fn add_penalties(&self, gradients: &mut Grads) -> Result<()> {
        let slots = self.shared.model.stack().slots().iter();
        for (slot, (of_slot, bank)) in slots.zip(&self.theta.banks).enumerate().filter(|(_, (_, bank))| bank.train) {
            for (at, set) in of_slot.attachments().flat_map(|at| bank.sets.iter().enumerate().map(move |set| (at, set)))
            {
                let (set, params) = set;
                let plain = stack::locals(at, params)?;
                if of_slot.adapter().penalty(at, &plain)?.is_none() {
                    continue;
                }
                let (mut leaves, mut tensors) = (Vec::new(), Vec::new());
                for spec in &at.tensors {
                    let mut tensor = plain.get(spec.local)?.clone();
                    if spec.train {
                        let leaf = autograd::leaf(&tensor)?;
                        tensor = leaf.as_tensor().clone();
                        leaves.push((spec.name(at.site.as_str()), leaf));
                    }
                    tensors.push((spec.local, tensor));
                }
                let tensors = Locals::new(at.site.as_str(), tensors);
                let Some(penalty) = of_slot.adapter().penalty(at, &tensors)? else { continue };
                let all: Vec<&Var> = leaves.iter().map(|(_, leaf)| leaf).collect();
                let found = autograd::pull(&all, &[(&penalty, &penalty.ones_like()?)])?;
                for ((name, _), gradient) in leaves.into_iter().zip(found) {
                    let id = TensorId { owner: Owner::Bank { slot: slot as u16, set: set as u32 }, name };
                    gradient.map(|gradient| gradients.put(&id, &gradient)).transpose()?;
                }
            }
        }
        Ok(())
    }

    /// Exchanges parts with the other ranks.
    pub(crate) fn exchange(&mut self, parts: Vec<(u32, Message)>) -> Result<Vec<(u32, Message)>> {
        let watch = Stopwatch::start();
        let all = self.collective.exchange(parts).map_err(|error| match error {
            lost if lost.is_of_a_lost_rank() => Error::LostRank(lost.to_string()),
            other => Error::Refused(other.to_string()),
        });
        self.spent.collective += watch.elapsed();
        all
    }

    /// One pass over some micro-batches: for each its gradients, if they are wanted, and its loss. Beside other lanes it is
    /// made with theirs.
    pub(crate) fn pass(
        &mut self,
        at: &Theta,
        group: &[(u32, Arc<Layout>)],
        dropout: Option<Dropout>,
        of: &Asking<'_>,
        wanted: Option<Wanted>,
    ) -> Result<Vec<(Grads, LossReport)>> {
        let shared = self.shared;
        let with;
        let group = if of.objective().needs().reference {
            let layouts: Vec<Arc<Layout>> = group.iter().map(|(_, layout)| Arc::clone(layout)).collect();
            let (layouts, times) = shared.model.with_logp(REFERENCE, &at.untrained(), None, &layouts)?;
            self.spent.passes += times;
            with = group.iter().map(|(part, _)| *part).zip(layouts).collect::<Vec<_>>();
            with.as_slice()
        } else {
            group
        };
        let (found, times) = if let (Some(company), Asking::Shared(objective)) = (self.company, of) {
            company.pass(Piece {
                model: Arc::clone(&shared.model),
                objective: Arc::clone(objective),
                theta: at.clone(),
                layouts: group.iter().map(|(_, layout)| Arc::clone(layout)).collect(),
                dropout,
                wanted,
            })?
        } else {
            let layouts = group.iter().map(|(_, layout)| &**layout).collect();
            let asked = Asked {
                model: &shared.model,
                objective: of.objective(),
                theta: at,
                layouts,
                dropout,
                wanted: wanted.as_ref(),
            };
            together::pass(&[asked])?.pop().unwrap_or_default()
        };
        self.spent.passes += times;
        Ok(found)
    }

    /// The gradients of some micro-batches and their losses, by their numbers.
    fn summed<'o>(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: impl Fn() -> Asking<'o>,
        (scale, beside): (f64, &Entries),
        dropout: Option<Dropout>,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        let sink = Grads::wanting(self.wanted()).and_entries(beside);
        // A rank that is alone adds up as it goes, in the order in which all are added. What several ranks have is added in
        // turns, so each keeps its own apart until then.
        let alone = self.collective.size() == 1;
        let mut made: Vec<(u32, Grads, LossReport)> = Vec::new();
        for group in groups(parts, self.rows_per_pass) {
            let passes = group.iter().map(|(_, layout)| Pass { theta: at, layout, dropout });
            self.spent.flops += passes.map(|pass| self.shared.model.flops(&pass)).sum::<f64>();
            let wanted = Wanted { scale, sink: sink.clone(), keep: self.shared.keep };
            let found = self.pass(at, group, dropout, &of(), Some(wanted))?;
            for ((part, _), (gradients, report)) in group.iter().zip(found) {
                match made.last_mut().filter(|_| alone) {
                    Some((_, sum, total)) => {
                        sum.add(&gradients)?;
                        total.add(&report);
                    }
                    None => made.push((*part, gradients, report)),
                }
            }
        }
        Ok(made)
    }

    /// The same for an objective that sees the whole step. Its loss is reported with the step's first micro-batch.
    fn step_grads(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        scale: (f64, &Entries),
        dropout: Option<Dropout>,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        let (parts, loss) = self.scope(at, parts, dropout, of)?;
        let by_column: Arc<dyn Objective> = Arc::new(ByColumn);
        let mut made = self.summed(at, &parts, || Asking::Shared(Arc::clone(&by_column)), scale, dropout)?;
        for (number, _, report) in &mut made {
            report.loss_sum = 0.0;
            report.by_domain.iter_mut().for_each(|(loss, _)| *loss = 0.0);
            if *number == 0 {
                report.add(&loss);
            }
        }
        Ok(made)
    }

    /// A pass over one micro-batch that nobody else takes part in.
    fn grad_alone(
        &self,
        pass: Pass<'_>,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<(Vec<LossReport>, Times)> {
        let model = &self.shared.model;
        if !of.needs().reference {
            return model.grad_parts(&[pass], of, scale, self.shared.keep, &mut [sink]);
        }
        let layout = Arc::new(pass.layout.clone());
        let (with, took) = model.with_logp(REFERENCE, &pass.theta.untrained(), None, &[layout])?;
        let parts: Vec<Pass<'_>> = with.iter().map(|layout| Pass { layout, ..pass }).collect();
        let (reports, mut times) = model.grad_parts(&parts, of, scale, self.shared.keep, &mut [sink])?;
        times += took;
        Ok((reports, times))
    }

    /// Makes sure that all ranks are where this one is.
    ///
    /// # Errors
    /// [`crate::Error::Diverged`] if the parameters of one differ from this one's.
    pub(crate) fn agree(&mut self) -> std::result::Result<(), crate::Error> {
        if self.collective.size() == 1 {
            return Ok(());
        }
        let mut hash = blake3::Hasher::new();
        for (id, value) in self.theta.trained() {
            hash.update(id.to_string().as_bytes());
            for value in value.flatten_all().and_then(|value| value.to_vec1::<f32>())? {
                hash.update(&value.to_le_bytes());
            }
        }
        let (rank, own) = (self.collective.rank(), *hash.finalize().as_bytes());
        for (rank, message) in self.exchange(vec![(rank, Message::Values(own))])? {
            if !matches!(message, Message::Values(theirs) if theirs == own) {
                return Err(crate::Error::Diverged { rank, step: self.step });
            }
        }
        Ok(())
    }

    fn shards(&self) -> std::ops::Range<u32> {
        owned(self.collective.rank(), self.collective.size(), self.shared.logical_shards)
    }
}

/// Micro-batches that go through the model together: as many as have no more than `rows` rows, at least one.
pub(crate) fn groups(parts: &[(u32, Arc<Layout>)], rows: usize) -> impl Iterator<Item = &[(u32, Arc<Layout>)]> {
    let mut rest = parts;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |(_, layout): &&(u32, Arc<Layout>)| {
            sum += layout.n_rows();
            sum <= rows
        };
        let n = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (group, others) = rest.split_at(n);
        rest = others;
        (!group.is_empty()).then_some(group)
    })
}

/// The optimiser's buffers of every trained tensor, at zero.
pub(crate) fn empty_buffers(optimizer: &dyn Optimizer, specs: &BTreeMap<TensorId, TensorSpec>) -> Buffers {
    let zeros = |spec: &TensorSpec| {
        let own = optimizer.buffers(&spec.shape).into_iter().map(|(_, length)| vec![0.0; length]);
        // When each entry came.
        let born = spec.comes_and_goes.then(|| vec![0.0; spec.shape.iter().product()]);
        own.chain(born).collect()
    };
    specs.iter().map(|(id, spec)| (id.clone(), zeros(spec))).collect()
}

impl Engine for RankEngine<'_> {
    fn theta(&self) -> &Theta {
        &self.theta
    }

    fn set(&mut self, theta: Theta) {
        self.theta = theta;
    }

    fn batch(&mut self, source: Source) -> Result<Batch> {
        // What is measured is what is made: nothing takes turns there.
        self.shared.turns.bind(&mut self.theta, (source == Source::Train).then_some(self.step));
        match source {
            Source::Train => {
                let watch = Stopwatch::start();
                let mut batch = self.loader.batch(self.step)?;
                self.spent.data += watch.elapsed();
                batch.parts.retain(|(part, layout)| self.owns(*part) && layout.n_rows() > 0);
                let Some(how) = self.shared.objective.needs().answers else { return Ok(batch) };
                let (batch, judged) = self.answered(&self.theta.clone(), &batch, &how)?;
                self.judged = judged;
                Ok(batch)
            }
            Source::Validation(index) => {
                let layouts = self.shared.validation.get(usize::from(index)).map(|(_, layouts)| layouts.as_slice());
                let layouts = layouts.ok_or_else(|| Error::Refused(format!("there is no validation set {index}")))?;
                let parts = (0u32..).zip(layouts.iter().cloned()).collect();
                let counts = layouts.iter().map(|layout| layout.counts()).sum();
                let n_rows = layouts.iter().map(|layout| layout.n_rows() as u64).sum();
                Ok(Batch { parts, counts, n_rows })
            }
            _ => Err(Error::Refused("this engine has training and validation batches only".to_owned())),
        }
    }

    fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport> {
        self.shared.model.score(&Pass { theta: at, layout: on, dropout: None }, of)
    }

    fn scores(&mut self, at: &[Theta], parts: &[(u32, Arc<Layout>)], of: &dyn Objective) -> Result<Vec<LossReport>> {
        self.scored(at, parts, of)
    }

    fn look(&mut self, at: &Theta, on: &Layout, tap: &dyn Tap) -> Result<()> {
        self.shown(at, on, tap)
    }

    fn grad(
        &mut self,
        at: &Theta,
        on: &Layout,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport> {
        let dropout = Some(Dropout { seed: self.shared.seed, step: self.step.0 });
        let pass = Pass { theta: at, layout: on, dropout };
        self.spent.flops += self.shared.model.flops(&pass);
        // A pass of its own: lanes beside it need not wait.
        self.company.inspect(Company::leave);
        let found = self.grad_alone(pass, of, scale, sink);
        self.company.inspect(Company::enter);
        let (mut reports, times) = found?;
        self.spent.passes += times;
        Ok(reports.pop().unwrap_or_default())
    }

    fn grads_beside(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        scale: f64,
        beside: &Entries,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        let scale = (scale, beside);
        let dropout = Some(Dropout { seed: self.shared.seed, step: self.step.0 });
        if of.level() == Level::Step {
            return self.step_grads(at, parts, of, scale, dropout);
        }
        // The run's own objective is known by its place.
        let is_own = std::ptr::addr_eq(of, Arc::as_ptr(&self.shared.objective));
        let own = is_own.then(|| Arc::clone(&self.shared.objective));
        self.summed(at, parts, || own.clone().map_or(Asking::Lent(of), Asking::Shared), scale, dropout)
    }

    fn with_logp(&mut self, column: &str, at: &Theta, parts: &[(u32, Arc<Layout>)]) -> Result<Vec<(u32, Arc<Layout>)>> {
        // A pass of its own: lanes beside it need not wait.
        self.company.inspect(Company::leave);
        let found = groups(parts, self.rows_per_pass).map(|group| {
            let layouts: Vec<Arc<Layout>> = group.iter().map(|(_, layout)| Arc::clone(layout)).collect();
            let (with, times) = self.shared.model.with_logp(column, at, None, &layouts)?;
            self.spent.passes += times;
            Ok(group.iter().map(|(part, _)| *part).zip(with).collect::<Vec<_>>())
        });
        let found: Result<Vec<_>> = found.collect();
        self.company.inspect(Company::enter);
        Ok(found?.into_iter().flatten().collect())
    }

    fn owns(&self, part: u32) -> bool {
        self.shards().contains(&(part % self.shared.logical_shards))
    }

    fn objective(&self) -> Arc<dyn Objective> {
        Arc::clone(&self.shared.objective)
    }

    fn wanted(&self) -> Vec<TensorId> {
        self.shared.specs.keys().cloned().collect()
    }

    fn reduce(&mut self, parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        let stop = self.stop_wanted;
        let message = |(part, gradients, report)| (part, Message::Part { gradients, report, stop });
        let mut messages: Vec<(u32, Message)> = parts.into_iter().map(message).collect();
        if messages.is_empty() {
            // A rank without data still tells whether it was asked to stop, under a number that no part has.
            let nothing = Message::Part { gradients: Grads::default(), report: LossReport::default(), stop };
            messages.push((u32::MAX - self.collective.rank(), nothing));
        }
        let mut gradients = Grads::wanting(self.wanted());
        let mut loss = LossReport::default();
        self.stop_agreed = false;
        // The parts of all ranks come in the order of their numbers: the sum is the same for every number of ranks.
        for (_, message) in self.exchange(messages)? {
            let Message::Part { gradients: part, report, stop } = message else {
                return Err(Error::Refused("a rank sent a validation loss where a gradient was due".to_owned()));
            };
            gradients.widen(&part);
            gradients.add(&part)?;
            loss.add(&report);
            self.stop_agreed |= stop;
        }
        self.add_penalties(&mut gradients)?;
        Ok((gradients, loss))
    }

    fn update(&mut self, gradients: Grads) -> Result<f64> {
        let watch = Stopwatch::start();
        let number = self.step.next();
        // A step whose answers are all worth the same teaches nothing, which says nothing of the tensors.
        let is_silent = self.shared.objective.needs().answers.is_some() && guard::silent(&gradients)?;
        if !is_silent {
            self.guard.check(number.0, &gradients, |id| self.shared.specs.get(id).and_then(|spec| spec.quiet))?;
        }
        let mut values = Vec::new();
        for (id, gradient) in gradients.iter() {
            if let Some(gradient) = gradient {
                values.push((id.clone(), gradient.flatten_all()?.to_vec1::<f32>()?));
            }
        }
        let norm = clip::norm(values.iter().map(|(_, gradient)| gradient.as_slice()));
        let factor = clip::factor(norm, self.shared.max_grad_norm);
        let lr = self.lr();
        let mut values: BTreeMap<TensorId, Vec<f32>> = values.into_iter().collect();
        let shared = self.shared;
        let work = self.buffers.iter_mut().filter_map(|(id, buffers)| {
            let (gradient, spec) = (values.remove(id)?, shared.specs.get(id)?);
            Some((id, gradient, buffers, spec))
        });
        let mut work: Vec<_> = work.collect();
        // Tensors know nothing of each other here: a few go side by side, so that few have two values at a time.
        let at_once = 2 * rayon::current_num_threads();
        while !work.is_empty() {
            let theta = &self.theta;
            let update = |(id, mut gradient, buffers, spec): (&TensorId, Vec<f32>, &mut Vec<Vec<f32>>, &TensorSpec)| {
                gradient.iter_mut().for_each(|g| *g *= factor);
                let tensor = theta.get(id).ok_or_else(|| Error::Refused(format!("{id} has no value to update")))?;
                let mut value = tensor.flatten_all()?.to_vec1::<f32>()?;
                let (buffers, born) = match buffers.split_last_mut().filter(|_| spec.comes_and_goes) {
                    Some((born, buffers)) => (buffers, Some(born.as_slice())),
                    None => (buffers.as_mut_slice(), None),
                };
                let (lr, decay) = (lr * spec.lr_factor, spec.decay);
                let cx = UpdateCx { step: number, lr, decay, shape: &spec.shape, born };
                shared.optimizer.update(&cx, &mut value, &gradient, buffers)?;
                // The last update has no later step whose loss would show it.
                if !value.iter().all(|value| value.is_finite()) {
                    return Err(Error::NotFinite { what: "value", tensor: id.clone(), step: number.0 });
                }
                Ok((id.clone(), Tensor::from_vec(value, spec.shape.as_slice(), &Device::Cpu)?))
            };
            let some = work.drain(..at_once.min(work.len())).collect::<Vec<_>>();
            let updated: Vec<Result<(TensorId, Tensor)>> = some.into_par_iter().map(update).collect();
            // The first fault is that of the first tensor that has one.
            for (id, tensor) in updated.into_iter().collect::<Result<Vec<_>>>()? {
                self.theta.put(&id, tensor);
            }
        }
        self.spent.optimizer += watch.elapsed();
        Ok(norm)
    }

    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
        let messages = mine.into_iter().map(|(number, said)| (number, Message::Said(said))).collect();
        let said = |(number, message)| match message {
            Message::Said(said) => Ok((number, said)),
            _ => Err(Error::Refused("a rank sent something else where a word of its step rule was due".to_owned())),
        };
        self.exchange(messages)?.into_iter().map(said).collect()
    }

    fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
        let spec = self.shared.specs.get(tensor).filter(|spec| spec.comes_and_goes);
        let (Some(spec), Some(buffers), Some(value)) =
            (spec, self.buffers.get_mut(tensor), self.theta.get(tensor).cloned())
        else {
            return Err(Error::Refused(format!("entries of {tensor} do not come and go")));
        };
        let mut values = value.flatten_all()?.to_vec1::<f32>()?;
        for renewed in entries {
            let begun = self.shared.optimizer.begun(renewed.age, renewed.mean, renewed.square);
            let begun = begun.ok_or_else(|| Error::Refused("the optimiser has no entries of single age".to_owned()))?;
            // After the update at hand, which is not counted yet.
            let born = (self.step.0 + 1) as f32 - renewed.age as f32;
            for (buffer, begun) in buffers.iter_mut().zip(begun.into_iter().chain([born])) {
                let of_entry = buffer.get_mut(renewed.entry);
                *of_entry.ok_or_else(|| Error::Refused(format!("{tensor} has no entry {}", renewed.entry)))? = begun;
            }
            if let Some(value) = values.get_mut(renewed.entry) {
                *value = 0.0;
            }
        }
        let value = Tensor::from_vec(values, spec.shape.as_slice(), &Device::Cpu)?;
        self.theta.put(tensor, value);
        Ok(())
    }

    fn hidden(&self) -> usize {
        self.shared.model.base().architecture().hidden
    }

    fn rng(&self, purpose: &'static str) -> Rng {
        Rng::new(self.shared.seed, purpose).sub(self.step.0)
    }
}

/// The parameters of a slot that trains or not, for export.
pub(crate) fn params(theta: &Theta, slot: usize) -> Option<&Params> {
    theta.banks.get(slot)?.sets.first().map(|set| &**set)
}
