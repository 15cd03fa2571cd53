//! What a lease offer asks for.

use std::time::Duration;

use attune_proto::convert::id::{self, AttemptId};
use attune_proto::convert::job;
use attune_proto::v1;
use attune_spec::id::{Digest, Step};
use attune_spec::job::plan::Input;
use attune_spec::job::{JobSpec, Plan, Reference};
use attune_spec::method::Catalogue;

use crate::attempt::Task;

/// What an offer asks for.
pub(crate) fn task(
    attempt: AttemptId,
    offer: &v1::AttemptOffer,
    (ranks, card): (u32, Option<u32>),
    seat: Option<(u32, u32)>,
) -> Result<Task, Vec<attune_spec::Fault>> {
    let missing = || vec![attune_spec::Fault::new("", "is missing in the offer")];
    let spec = job::from_message(offer.spec.as_ref().ok_or_else(missing)?)?;
    let checkpoint = match offer.checkpoint.as_str() {
        "" => None,
        text => Some(id::field("checkpoint", text).map_err(|fault| vec![fault])?),
    };
    Ok(Task {
        attempt,
        name: spec.name.to_string(),
        plan: plan(&spec, &offer.inputs)?,
        checkpoint,
        checkpoint_step: Step(offer.checkpoint_step),
        ranks,
        card,
        stall: Duration::from_secs(spec.limits.stall_seconds),
        seat,
    })
}

/// A defect of this process that a job sets off by its name, before anybody has heard that its offer arrived.
#[cfg(feature = "failpoints")]
pub(crate) fn poison(offer: &v1::LeaseOffer) {
    if let Some(Some(name)) = fail::eval("worker::poisoned_offer", |name| name)
        && offer.attempts.iter().any(|attempt| attempt.spec.as_ref().is_some_and(|spec| spec.name == name))
    {
        crate::attempt::kill_this_process();
    }
}

/// The plan of a job, with every reference meaning what it meant when the job was accepted.
fn plan(spec: &JobSpec, pins: &[v1::PinnedInput]) -> Result<Plan, Vec<attune_spec::Fault>> {
    Plan::resolve(spec, Catalogue::embedded(), |reference| {
        let text = reference.to_string();
        let pinned = pins.iter().find(|pin| pin.reference == text && !pin.digest.is_empty());
        if let Some(pin) = pinned {
            return pin.digest.parse::<Digest>().map(Input::Artifact).map_err(|error| error.to_string());
        }
        match reference {
            Reference::Digest(digest) => Ok(Input::Artifact(*digest)),
            Reference::Url(url) => Ok(Input::Url(url.to_string())),
            Reference::Path(path) => Ok(Input::Path(path.to_string())),
            Reference::Tag(_) | Reference::Stage { .. } => {
                Err(format!("is {reference}, which the scheduler did not pin"))
            }
        }
    })
}

/// The failure of a job that is at fault itself.
pub(crate) fn spec_fault(faults: &[attune_spec::Fault]) -> v1::Failure {
    let fault = |fault: &attune_spec::Fault| v1::FieldFault {
        path: fault.path.as_str().to_owned(),
        message: fault.message.clone(),
    };
    v1::Failure {
        cause: v1::FailureCause::SpecFault as i32,
        message: faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        faults: faults.iter().map(fault).collect(),
        ..Default::default()
    }
}
