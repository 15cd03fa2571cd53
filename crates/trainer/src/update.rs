//! From the gradients of micro-batches to new values: what those of all ranks come to, what is looked at before an update, and
//! the update.
//!
//! Processes of a gang share this work: each adds up the gradients of its own tensors, has their optimiser's buffers, makes
//! their new values and gives them to all. No bit depends on who does it.

use std::collections::{BTreeMap, BTreeSet};

use attune_models::pass::Stopwatch;
use attune_models::stack;
use attune_optim::clip;
use attune_points::engine::{Batch, Engine as _, LossReport, Renewed, gradients_on};
use attune_points::optimizer::UpdateCx;
use attune_points::{Entries, Error, GradSink as _, Grads, Locals, Owner, Result, TensorId, TensorSpec};
use attune_tensor::autograd;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::engine::{Message, RankEngine, Wishes};
use crate::guard::{self, Squares};

/// An error of another rank, as a step sees it.
pub(crate) fn of_ranks(error: &attune_collective::Error) -> Error {
    match error {
        attune_collective::Error::Damaged { .. } => Error::Damaged(error.to_string()),
        attune_collective::Error::Link { link, .. } => {
            Error::Io { what: format!("an exchange over {link}"), source: std::io::Error::other(error.to_string()) }
        }
        error if error.is_of_a_lost_rank() => Error::LostRank(error.to_string()),
        error => Error::Refused(error.to_string()),
    }
}

impl RankEngine<'_> {
    /// The learning rate that the next update starts from.
    pub(crate) fn lr(&self) -> f64 {
        let (at, all) = self.scheduled;
        self.shared.optimizer.lr() * self.shared.schedule.factor(at, all)
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

    /// The sum of the parts of all ranks, on each of them.
    pub(crate) fn added_up(&mut self, parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        let wishes = self.wishes;
        let message = |(part, gradients, report)| (part, Message::Part { gradients, report, wishes });
        let mut messages: Vec<(u32, Message)> = parts.into_iter().map(message).collect();
        if messages.is_empty() {
            // A rank without data still tells what it was asked for, under a number that no part has.
            let nothing = Message::Part { gradients: Grads::default(), report: LossReport::default(), wishes };
            messages.push((u32::MAX - self.collective.rank(), nothing));
        }
        let mut gradients = Grads::wanting(self.wanted());
        let mut loss = LossReport::default();
        self.agreed = Wishes::default();
        // The parts of all ranks come in the order of their numbers: the sum is the same for every number of ranks.
        for (_, message) in self.exchange(messages)? {
            let Message::Part { gradients: part, report, wishes } = message else {
                return Err(Error::Refused("a rank sent a validation loss where a gradient was due".to_owned()));
            };
            gradients.widen(&part);
            gradients.add(&part)?;
            loss.add(&report);
            self.agreed |= wishes;
        }
        self.add_penalties(&mut gradients)?;
        Ok((gradients, loss))
    }

    /// The gradient of the job's loss over a batch, for an update alone: a process of a gang gets the sums of its own tensors.
    /// What is found of one micro-batch goes to the others while the next one is computed.
    pub(crate) fn added_up_for_update(&mut self, batch: &Batch) -> Result<(Grads, LossReport)> {
        let wishes = self.wishes;
        let Some(gang) = self.collective.gang() else { return gradients_on(self, batch) };
        gang.begin(wishes);
        let (objective, theta) = (self.objective(), self.theta.clone());
        let scale = 1.0 / objective.denominator().of(batch.counts);
        let n_parts = self.shared.logical_shards * self.shared.accumulation;
        let mut take = |engine: &mut Self, part: u32, gradients: Grads, report: LossReport| {
            let watch = Stopwatch::start();
            let gang = engine.collective.gang().ok_or_else(lost_gang)?;
            gang.give(part, gradients, report).map_err(|error| of_ranks(&error))?;
            engine.spent.collective += watch.elapsed();
            Ok(())
        };
        self.each_gradient(&theta, &batch.parts, &*objective, (scale, &Entries::new()), &mut take)?;
        let watch = Stopwatch::start();
        let gang = self.collective.gang().ok_or_else(lost_gang)?;
        let (sum, loss, agreed) = gang.end(n_parts).map_err(|error| of_ranks(&error))?;
        let own = self.shared.specs.keys().filter(|id| gang.has(id)).cloned().collect::<Vec<_>>();
        self.spent.collective += watch.elapsed();
        self.agreed = agreed;
        let mut gradients = Grads::wanting(own);
        gradients.add(&sum)?;
        self.add_penalties(&mut gradients)?;
        Ok((gradients, loss))
    }

    /// Whether this process updates a tensor.
    fn has(&mut self, id: &TensorId) -> bool {
        self.collective.gang().is_none_or(|gang| gang.has(id))
    }

    /// Clips, and applies the optimiser to all tensors but those that rest; the gradient's norm before.
    pub(crate) fn updated(&mut self, gradients: &Grads, resting: &BTreeSet<TensorId>) -> Result<f64> {
        self.witness()?;
        let watch = Stopwatch::start();
        let number = self.step.next();
        let (mut squares, mut values) = (Squares::new(), BTreeMap::new());
        for (id, gradient) in gradients.iter().filter(|(id, _)| self.has(id)) {
            let gradient = gradient.map(|gradient| gradient.flatten_all()?.to_vec1::<f32>()).transpose()?;
            squares.insert(id.clone(), gradient.as_deref().map(clip::square));
            values.extend(gradient.map(|gradient| (id.clone(), gradient)));
        }
        if let Some(gang) = self.collective.gang() {
            squares = gang.all_squares(&squares).map_err(|error| of_ranks(&error))?;
        }
        // A step whose answers are all worth the same teaches nothing, which says nothing of the tensors.
        let is_silent = self.shared.objective.needs().answers.is_some() && guard::silent(&squares);
        if !is_silent {
            self.guard.check(number.0, &squares, |id| self.shared.specs.get(id).and_then(|spec| spec.quiet))?;
        }
        squares.retain(|id, _| !resting.contains(id));
        let norm = clip::norm(squares.into_values().flatten());
        let factor = clip::factor(norm, self.shared.max_grad_norm);
        let lr = self.lr();
        let shared = self.shared;
        let work = self.buffers.iter_mut().filter(|(id, _)| !resting.contains(*id)).filter_map(|(id, buffers)| {
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
        if let Some(gang) = self.collective.gang() {
            let watch = Stopwatch::start();
            let theta = &self.theta;
            let values = shared.specs.keys().filter_map(|id| Some((id, theta.get(id)?)));
            for (id, tensor) in gang.all_values(values).map_err(|error| of_ranks(&error))? {
                self.theta.put(&id, tensor);
            }
            self.spent.collective += watch.elapsed();
        }
        Ok(norm)
    }

    /// Starts entries of a tensor anew.
    pub(crate) fn renewed(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
        let spec = self.shared.specs.get(tensor).filter(|spec| spec.comes_and_goes);
        let (Some(spec), Some(value)) = (spec, self.theta.get(tensor).cloned()) else {
            return Err(Error::Refused(format!("entries of {tensor} do not come and go")));
        };
        let mut values = value.flatten_all()?.to_vec1::<f32>()?;
        for renewed in entries {
            let begun = self.shared.optimizer.begun(renewed.age, renewed.mean, renewed.square);
            let begun = begun.ok_or_else(|| Error::Refused("the optimiser has no entries of single age".to_owned()))?;
            // After the update at hand, which is not counted yet.
            let born = (self.step.0 + 1) as f32 - renewed.age as f32;
            // Where another process has them, it does this too.
            let buffers = self.buffers.get_mut(tensor);
            for (buffer, begun) in buffers.into_iter().flatten().zip(begun.into_iter().chain([born])) {
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
}

fn lost_gang() -> Error {
    Error::Refused("a process is of no gang any more".to_owned())
}
