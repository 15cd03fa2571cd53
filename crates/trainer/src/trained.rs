//! Which slots of a plan train, and by which steps.

use attune_models::Model;
use attune_points::adapter::Trained;
use attune_points::engine::StepRule;
use attune_spec::id::Step;
use attune_spec::job::{Plan, TuneSpec};
use attune_spec::method::{BuildCx, Catalogue};
use attune_spec::{Fault, FieldPath};

use crate::error::Error;
use crate::setup::weights;
use crate::steps::STEP_RULES;

/// The slots that train. Several do side by side where each is an adapter and leaves the steps to the job.
pub(crate) fn slots(plan: &Plan, model: &Model) -> Result<Vec<usize>, Error> {
    let trained: Vec<usize> = plan.stack.iter().enumerate().filter(|(_, slot)| slot.train).map(|(i, _)| i).collect();
    let path = |index: usize| FieldPath::from("tune").field("stack").index(index).field("train");
    let mut faults = Vec::new();
    for &index in trained.iter().filter(|_| trained.len() > 1) {
        let slot = &model.stack().slots()[index];
        if slot.adapter().peft().is_none() {
            let message = "is true for the base's own weights, which train alone; expected one slot that trains";
            faults.push(Fault::new(path(index), message));
        } else if own_rule(index as u16, Step(1), model).is_some() {
            let message =
                "is true for a component with steps of its own, which trains alone; expected one slot that trains";
            faults.push(Fault::new(path(index), message));
        }
    }
    if trained.is_empty() {
        faults.push(Fault::new("tune.stack", "trains nothing; expected one slot with `train: true`"));
    }
    if faults.is_empty() { Ok(trained) } else { Err(Error::Faults(faults)) }
}

/// The step rule that the component of a slot brings, if it does.
fn own_rule(index: u16, total_steps: Step, model: &Model) -> Option<Box<dyn StepRule>> {
    let slot = &model.stack().slots()[usize::from(index)];
    let sites = model.base().architecture().sites();
    let attachments = sites.iter().filter_map(|site| slot.at(&site.id)).collect();
    slot.adapter().step_rule(&Trained { slot: index, attachments, steps: total_steps })
}

/// The step rule of a run: the one that it names, or that of the component that trains.
pub(crate) fn step_rule(plan: &Plan, total_steps: Step, model: &Model) -> Result<Box<dyn StepRule>, Error> {
    let trained = (0u16..).zip(&plan.stack).find(|(_, planned)| planned.train);
    let own = trained.and_then(|(index, _)| own_rule(index, total_steps, model));
    let path = FieldPath::from("tune.step");
    match own {
        Some(own) if plan.step.method == TuneSpec::default().step.method => Ok(own),
        Some(_) => {
            let message = format!("is `{}`; what trains has steps of its own: leave it out", plan.step.method);
            Err(Error::Faults(vec![Fault::new(path, message)]))
        }
        None => {
            let weights = weights(plan);
            let cx = BuildCx { steps: total_steps, domains: &weights, words: None };
            STEP_RULES.build(&plan.step, &path, &cx).map_err(Error::Faults)
        }
    }
}

/// Whether a plan says nothing of how gradients change parameters, where none are taken.
pub(crate) fn without_gradients(plan: &Plan) -> Result<(), Error> {
    let (own, catalogue) = (TuneSpec::default(), Catalogue::embedded());
    let said = [
        ("optimizer", plan.optimizer != catalogue.resolve(&own.optimizer)),
        ("schedule", plan.schedule != catalogue.resolve(&own.schedule)),
        ("max_grad_norm", plan.max_grad_norm != own.max_grad_norm),
    ];
    let fault = |(field, _): (&str, bool)| {
        let message = "is for steps along gradients, and what trains takes none: leave it out";
        Fault::new(FieldPath::from("tune").field(field), message)
    };
    let faults: Vec<Fault> = said.into_iter().filter(|(_, is_said)| *is_said).map(fault).collect();
    if faults.is_empty() { Ok(()) } else { Err(Error::Faults(faults)) }
}
