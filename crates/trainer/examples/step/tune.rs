//! A tune as a trainer does it: passes, gradients, AdamW.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use attune_adapt::{ADAPTERS, slot};
use attune_architecture::{Architecture, targets};
use attune_models::pass::walk::Keep;
use attune_models::pass::{Stopwatch, Times};
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_objective::OBJECTIVES;
use attune_optim::OPTIMIZERS;
use attune_points::adapter::{Adapter, Attachment};
use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::optimizer::{Optimizer, UpdateCx};
use attune_points::{Bank, BankKind, GradSink, Grads, Layout, Owner, Stats, TensorId, Theta, Weight};
use attune_spec::id::Step;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, MethodRef};
use attune_tensor::Rng;
use attune_trainer::component;
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde_json::json;

use crate::Failure;
use crate::case::Case;

/// The state of a tune.
pub(crate) struct Tune {
    model: Model,
    theta: Theta,
    layouts: Vec<Layout>,
    objective: Box<dyn Objective>,
    optimizer: Box<dyn Optimizer>,
    buffers: BTreeMap<TensorId, Vec<Vec<f32>>>,
    keep: Keep,
    steps_done: Step,
}

/// What a step found.
pub(crate) struct Done {
    /// Mean loss a supervised token, before the update.
    pub(crate) loss: f64,
    /// Where the time of the passes went.
    pub(crate) times: Times,
    /// Time of the update.
    pub(crate) optimiser: Duration,
}

impl Tune {
    pub(crate) fn open(case: &Case) -> Result<Self, Failure> {
        let cx = BuildCx { steps: Step((case.warmup + case.steps) as u64), domains: &[], words: None };
        let base = case.open()?;
        let (base, stack, mut theta) = match &case.adapter {
            Some(folder) => component::frozen(base, [folder.as_path()])?,
            None => {
                let (stack, theta) = all_weights(&base, &cx)?;
                (base, stack, theta)
            }
        };
        for bank in &mut theta.banks {
            bank.train = true;
        }
        let objective =
            OBJECTIVES.build(&MethodRef::named("sft"), &"objective".into(), &cx).map_err(|f| format!("{f:?}"))?;
        let method: MethodRef = serde_json::from_value(json!({"method": "adamw", "lr": case.lr}))?;
        let optimizer = OPTIMIZERS.build(&method, &"optimizer".into(), &cx).map_err(|f| format!("{f:?}"))?;
        let zeros = |tensor: &Tensor| optimizer.buffers(tensor.dims()).into_iter().map(|(_, n)| vec![0.0; n]).collect();
        let buffers = theta.trained().map(|(id, tensor)| (id, zeros(tensor))).collect();
        let layouts = case.layouts(base.architecture().head)?;
        Ok(Self {
            model: Model::new(base, stack),
            theta,
            layouts,
            objective,
            optimizer,
            buffers,
            keep: case.keep(),
            steps_done: Step(0),
        })
    }

    /// Gradients of the whole batch, and an update.
    pub(crate) fn step(&mut self) -> Result<Done, Failure> {
        let wanted: Vec<TensorId> = self.theta.trained().map(|(id, _)| id).collect();
        let counts = self.layouts.iter().map(Layout::counts).sum();
        let scale = 1.0 / self.objective.denominator().of(counts);
        let pass = |layout| Pass { theta: &self.theta, layout, dropout: None };
        let passes: Vec<Pass<'_>> = self.layouts.iter().map(pass).collect();
        let mut parts: Vec<Grads> = passes.iter().map(|_| Grads::wanting(wanted.iter().cloned())).collect();
        let mut sinks: Vec<&mut dyn GradSink> = parts.iter_mut().map(|part| part as &mut dyn GradSink).collect();
        let (reports, times) = self.model.grad_parts(&passes, &*self.objective, scale, self.keep, &mut sinks)?;

        let watch = Stopwatch::start();
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_default();
        for part in parts {
            sum.add(&part)?;
        }
        self.update(&sum)?;
        let optimiser = watch.elapsed();
        let mut loss = LossReport::default();
        reports.iter().for_each(|report| loss.add(report));
        Ok(Done { loss: loss.mean(), times, optimiser })
    }

    fn update(&mut self, gradients: &Grads) -> Result<(), Failure> {
        self.steps_done = self.steps_done.next();
        let (optimizer, step) = (&self.optimizer, self.steps_done);
        let work = self.buffers.iter_mut().filter_map(|(id, buffers)| Some((id, gradients.get(id)?, buffers)));
        let mut work: Vec<_> = work.collect();
        // As the trainer does it: a few tensors side by side.
        let at_once = 2 * rayon::current_num_threads();
        while !work.is_empty() {
            let theta = &self.theta;
            let update = |(id, gradient, buffers): (&TensorId, &Tensor, &mut Vec<Vec<f32>>)| {
                let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
                let tensor =
                    theta.get(id).ok_or_else(|| attune_points::Error::Refused(format!("{id} has no value")))?;
                let mut value = tensor.flatten_all()?.to_vec1::<f32>()?;
                let cx = UpdateCx { step, lr: optimizer.lr(), decay: false, shape: tensor.dims(), born: None };
                optimizer.update(&cx, &mut value, &gradient, buffers)?;
                Ok((id.clone(), Tensor::from_vec(value, tensor.dims(), &Device::Cpu)?))
            };
            let some = work.drain(..at_once.min(work.len())).collect::<Vec<_>>();
            let updated = some.into_par_iter().map(update).collect::<Result<Vec<_>, attune_points::Error>>()?;
            for (id, tensor) in updated {
                let Owner::Bank { slot, set } = id.owner else { continue };
                let set = &mut self.theta.banks[slot as usize].sets[set as usize];
                Arc::make_mut(set).insert(id.name, tensor);
            }
        }
        Ok(())
    }

    /// Rows of the batch.
    pub(crate) fn n_rows(&self) -> usize {
        self.layouts.iter().map(Layout::n_rows).sum()
    }

    /// Numbers that train.
    pub(crate) fn trained(&self) -> usize {
        self.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum()
    }

    /// Floating-point operations that the model needs a step.
    pub(crate) fn step_flops(&self) -> f64 {
        let pass = |layout| Pass { theta: &self.theta, layout, dropout: None };
        self.layouts.iter().map(|layout| self.model.flops(&pass(layout))).sum()
    }
}

/// Full fine-tuning: every weight trains, starting from the base's.
fn all_weights(base: &Base, cx: &BuildCx<'_>) -> Result<(Stack, Theta), Failure> {
    let adapter = ADAPTERS.build(&MethodRef::named("full"), &"adapter".into(), cx).map_err(|f| format!("{f:?}"))?;
    let adapter: Arc<dyn Adapter> = adapter.into();
    let arch: &Architecture = base.architecture();
    let all: Targets = serde_json::from_value(json!("all"))?;
    let sites = targets::resolve(&all, None, arch, |_| true).map_err(|f| format!("{f:?}"))?;
    let attachments = adapter.attach(arch, &sites).map_err(|f| format!("{f:?}"))?;
    let weight = |at: &Attachment| {
        let site = sites.iter().find(|site| site.id == at.site);
        let site = site.ok_or_else(|| attune_points::Error::Refused(format!("{} is no target", at.site)))?;
        Ok(Box::new(base.weight(site)) as Box<dyn Weight + '_>)
    };
    let params = slot::fresh(&*adapter, None, &attachments, weight, &Stats::none(), &Rng::new(0, "init"))?.own;
    let bank = Bank { slot: "all".into(), kind: BankKind::Weights, sets: vec![Arc::new(params)], train: true };
    Ok((Stack::new(vec![Slot::new(adapter, attachments)]), Theta::single([bank])))
}
