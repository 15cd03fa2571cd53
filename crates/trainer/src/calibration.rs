//! What components want to know of the base before they start, measured once for all slots, at the first attempt of a run.
//!
//! It is measured on the first micro-batches that the job would train on, nothing dropped, on the base with the adapters that the
//! stack reads; what starts only then is not there. A run through the data is its end: no example counts twice unless the mixture
//! says so. All ranks of a run share one process and what is measured here, and a lane measures alone: the bits are those of the
//! job.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use attune_architecture::Site;
use attune_artifacts::canonical;
use attune_data::Packing;
use attune_data::loader::Domain;
use attune_models::pass::Stopwatch;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Stack};
use attune_points::layout::{LabelCounts, REFERENCE};
use attune_points::objective::{Level, Objective};
use attune_points::stats::{Counted, What};
use attune_points::{Bank, GradSink, Layout, Owner, Result, Stats, StatsRequest, Tap, TensorId, Theta};
use attune_probe::file::Origin;
use attune_probe::{Wanted, measure};
use attune_spec::id::{Digest, Step};
use attune_spec::job::Plan;
use attune_spec::job::plan::{Input, Length, ROWS_PER_PASS};
use attune_spec::{Fault, FieldPath};
use serde_json::json;

use crate::component::cannot_start;
use crate::control::Control;
use crate::error::Error;
use crate::pin::{self, Pins};
use crate::protocol::{Event, Phase, Request};
use crate::setup::{self, Slotted};

/// The name of the file in the folder of statistics.
const FILE: &str = "statistics.safetensors";

/// Where statistics that are kept lie in a run's folder.
pub(crate) fn kept(work: &Path) -> PathBuf {
    work.join("statistics")
}

/// What is measured on.
pub(crate) struct Calibration<'a> {
    pub(crate) request: &'a Request,
    pub(crate) pinned: &'a mut Pins,
    pub(crate) plan: &'a Plan,
    pub(crate) control: &'a dyn Control,
    pub(crate) base: &'a Arc<Base>,
    pub(crate) objective: &'a dyn Objective,
    pub(crate) domains: &'a [Domain],
    pub(crate) packing: Packing,
    pub(crate) keep: Keep,
}

impl Calibration<'_> {
    /// What the slots of a stack want: from the statistics that the job names, the rest measured. Of a run that goes on, what trains
    /// wants nothing: it comes from the checkpoint; unless the job keeps what was measured, which is then measured again, to the
    /// same bits.
    ///
    /// # Errors
    /// The fault of a slot that wants what cannot be measured; statistics of something else; whatever the data or a pass raise.
    pub(crate) fn of(mut self, stack: &[Slotted]) -> std::result::Result<Stats, Error> {
        let (mut wanted, mut reader) = (Wanted::default(), None);
        let resumed = self.request.resume.is_some() && !self.plan.keep_statistics;
        for (planned, slot) in self.plan.stack.iter().zip(stack) {
            let Slotted::Begun(begun) = slot else { continue };
            if resumed && planned.train {
                continue;
            }
            for (path, request) in begun.calibrates() {
                if let Some(message) = self.misfit(&request) {
                    return Err(Error::Faults(vec![Fault::new(path, message)]));
                }
                wanted.add(&request, begun.sites()).map_err(|error| cannot_start(error, path))?;
            }
            if let Some(tokens) = begun.reads() {
                let width = self.base.architecture().kv_width();
                let added = wanted.add_text(tokens, begun.sites(), width);
                added.map_err(|error| cannot_start(error, begun.path().clone()))?;
                reader = Some(begun.path());
            }
        }
        if self.plan.keep_statistics && wanted.iter().next().is_none() {
            let message = "is true, but no component of the job measures the base on data before it starts; expected one that does, as \
                           `init: {method: eva}`";
            return Err(Error::Faults(vec![Fault::new("outputs.statistics", message)]));
        }
        if wanted.is_empty() {
            return Ok(Stats::none());
        }
        let mut stats = self.read_elsewhere(&wanted)?;
        let lacking = wanted.beside(&stats);
        if !lacking.is_empty() {
            stats.extend(self.measured(stack, &lacking, reader)?);
        }
        if self.plan.keep_statistics {
            let (folder, origin) = (kept(&self.request.work), self.origin()?);
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            let path = folder.join(FILE);
            attune_probe::file::save(&path, &stats, origin)
                .map_err(|error| Error::Input { input: "outputs.statistics".to_owned(), message: error.to_string() })?;
        }
        Ok(stats)
    }

    /// What of it the statistics hold that the job names.
    fn read_elsewhere(&mut self, wanted: &Wanted) -> std::result::Result<Stats, Error> {
        let Some(input) = &self.plan.statistics else { return Ok(Stats::none()) };
        let place = setup::folder(self.request, input, self.pinned)?;
        let file = if place.is_dir() { place.join(FILE) } else { place };
        let read = attune_probe::file::load(&file, self.origin()?, wanted);
        let stats = read.map_err(|error| {
            let message = match error {
                // Where it was put on this machine means nothing to whoever wrote the job.
                attune_probe::Error::Content { message, .. } => message,
                error => error.to_string(),
            };
            Error::Faults(vec![Fault::new("tune.statistics", message)])
        })?;
        let message = format!("{} statistics were measured by another job", stats.iter().count());
        self.control.emit(Event::Note { topic: "calibration".to_owned(), message });
        Ok(stats)
    }

    /// What the job's statistics are of.
    fn origin(&mut self) -> std::result::Result<Origin, Error> {
        let plan = self.plan;
        let mut content = |input: &Input| content(self.request, input, self.pinned);
        // Components that are there before anything starts change what is measured; those that start only then do not.
        let beside = plan.stack.iter().filter(|slot| slot.domains.is_empty()).filter_map(|slot| slot.from.as_ref());
        let base = json!({
            "base": content(&plan.base)?,
            "seed": plan.from_scratch.then_some(plan.seed),
            "quantization": plan.quantization,
            "surgery": plan.surgery,
            "stack": beside.map(&mut content).collect::<std::result::Result<Vec<_>, _>>()?,
        });
        let mut domains = Vec::new();
        for domain in &plan.domains {
            let mut said =
                vec![json!(domain.name), json!(content(&domain.input)?), json!(domain.weight), json!(domain.form)];
            said.extend(domain.rows.map(|rows| json!(rows)));
            domains.push(serde_json::Value::Array(said));
        }
        let data = json!({
            "domains": domains,
            "max_length": plan.max_length,
            "too_long": plan.too_long,
            "on_bad_row": plan.on_bad_row,
            "template": plan.template,
            "objective": plan.objective,
        });
        Ok(Origin { base: canonical::digest(&base), data: canonical::digest(&data) })
    }

    /// Measures on the first of the data. The slot that wants a text is at `reader`.
    fn measured(
        &self,
        stack: &[Slotted],
        wanted: &Wanted,
        reader: Option<&FieldPath>,
    ) -> std::result::Result<Stats, Error> {
        self.control.emit(Event::Starting { phase: Phase::Calibration });
        let watch = Stopwatch::start();
        let (slots, banks) = self.read(stack);
        let model = Model::new(Arc::clone(self.base), Stack::new(slots));
        let mut theta = Theta::single(banks);
        let places = self.plan.stack.iter().zip(stack).filter(|(_, slot)| matches!(slot, Slotted::Read(_)));
        let beside_all: Vec<bool> = places.map(|(planned, _)| planned.domains.is_empty()).collect();
        theta.bindings.retain(|binding| beside_all[usize::from(binding.slot)]);
        let before = model.rows_before(&theta);
        if let Some(path) = reader.filter(|_| !before.is_empty()) {
            let message = "starts from a text, which would stand after the rows that another adapter puts before documents; its keys and \
                           values stand before these";
            return Err(Error::Faults(vec![Fault::new(path.clone(), message)]));
        }
        let packing = Packing { before: before.into(), ..self.packing.clone() };
        let mut on = On { model, theta, objective: self.objective, keep: self.keep };
        // A run through the data is the end of it.
        let mut loader = setup::loader_of(self.plan, self.domains.to_vec(), packing, Length::Epochs(1.0))?;
        let (mut step, mut waiting) = (Step(0), VecDeque::new());
        let mut next = || {
            if waiting.is_empty() {
                waiting.extend(loader.batch(step)?.parts);
                step = step.next();
            }
            let (_, layout) = waiting.pop_front().unwrap_or_default();
            Ok((layout.n_rows() > 0).then_some(layout))
        };
        let (stats, seen) = measure(&mut on, wanted, ROWS_PER_PASS as usize, &mut next)?;
        let seconds = watch.elapsed().as_secs_f64();
        let mebibytes = wanted.bytes().div_ceil(1 << 20);
        let message = format!(
            "{} statistics on {} documents of {} tokens in {seconds:.1} s; their sums took {mebibytes} MiB",
            stats.iter().count(),
            seen.documents,
            seen.rows
        );
        self.control.emit(Event::Note { topic: "calibration".to_owned(), message });
        Ok(stats)
    }

    /// Why something cannot be measured for the job's objective, if so.
    fn misfit(&self, request: &StatsRequest) -> Option<String> {
        let objective = &self.plan.objective.method;
        let of_labels = match request.what {
            What::Gradient | What::Fisher => true,
            What::InputCovariance { rows, .. } | What::InputNorms { rows } => rows == Counted::Supervised,
        };
        if of_labels && self.objective.needs().answers.is_some() {
            return Some(format!(
                "needs {request}, and `{objective}` learns from answers that are not there yet: expected a start that looks at prompts \
                 (`rows: tokens`) or at no data"
            ));
        }
        // Vectors are compared within a micro-batch as well as within a step.
        let by_step = self.objective.level() == Level::Step && !self.objective.needs().vectors;
        (request.what.is_of_gradients() && by_step)
            .then(|| format!("needs {request}, and `{objective}` looks at whole steps: choose another of either"))
    }

    /// The slots that are there already, those that take turns among them.
    fn read(&self, stack: &[Slotted]) -> (Vec<attune_models::Slot>, Vec<Bank>) {
        let there = self.plan.stack.iter().zip(stack).filter_map(|(planned, slot)| {
            let Slotted::Read(component) = slot else { return None };
            let bank = Bank {
                slot: planned.name.as_str().into(),
                kind: component.kind,
                sets: vec![Arc::new(component.params.clone())],
                train: planned.train,
            };
            Some((component.slot.clone(), bank))
        });
        there.unzip()
    }
}

/// The name of an input's content.
fn content(request: &Request, input: &Input, pinned: &mut Pins) -> std::result::Result<Digest, Error> {
    match input {
        Input::Artifact(digest) => Ok(*digest),
        // What was read of it is known already.
        Input::Path(place) | Input::Url(place) if pinned.contains_key(place) => Ok(pinned[place]),
        Input::Path(_) | Input::Url(_) => pin::content(&setup::folder(request, input, pinned)?),
    }
}

/// The model as the pass uses it.
struct On<'a> {
    model: Model,
    theta: Theta,
    objective: &'a dyn Objective,
    keep: Keep,
}

impl attune_probe::Model for On<'_> {
    fn look(&mut self, on: &[Arc<Layout>], tap: &dyn Tap) -> Result<()> {
        let pass = |layout| Pass { theta: &self.theta, layout, dropout: None };
        let passes: Vec<Pass<'_>> = on.iter().map(|layout| pass(&**layout)).collect();
        self.model.look(&passes, tap).map(drop)
    }

    fn gradients(&mut self, on: &Arc<Layout>, sink: &mut dyn GradSink) -> Result<()> {
        let mut on = Arc::clone(on);
        if self.objective.needs().reference {
            let (with, _) = self.model.with_logp(REFERENCE, &self.theta.untrained(), None, &[on])?;
            on = with.into_iter().next().unwrap_or_default();
        }
        let pass = Pass { theta: &self.theta, layout: &on, dropout: None };
        self.model.grad_parts(&[pass], self.objective, 1.0, self.keep, &mut [sink]).map(drop)
    }

    fn weight(&self, site: &Site) -> TensorId {
        let name = self.model.base().tensor_name(site.id.as_str(), "weight");
        match self.theta.weight(&name) {
            Some((id, _)) => id,
            None => TensorId { owner: Owner::Base, name },
        }
    }

    fn denominator(&self, counts: LabelCounts) -> f64 {
        self.objective.denominator().of(counts)
    }
}
