//! The core's actions as messages to workers.

use attune_proto::convert::id::AttemptId;
use attune_proto::convert::job::to_message;
use attune_proto::convert::time::duration;
use attune_proto::v1::{self, connect_response::Message};
use attune_scheduler_core::{Action, Attempt, Device, Granted, Offer, Stop};
use attune_spec::id::CohortId;
use attune_spec::job::{JobSpec, Reference};
use attune_store::Store;

use crate::config::Timings;
use crate::error::Error;

/// Writes messages; what an offer says of its jobs is read from the store.
#[derive(Debug)]
pub(crate) struct Writer {
    store: Store,
    timings: Timings,
}

impl Writer {
    pub(crate) fn new(store: Store, timings: Timings) -> Self {
        Self { store, timings }
    }

    /// The message for an action.
    pub(crate) async fn message(&self, action: &Action) -> Result<Message, Error> {
        let ids = |cohorts: &[CohortId]| cohorts.iter().map(|cohort| cohort.0).collect();
        Ok(match action {
            Action::Offer(offer) => Message::LeaseOffer(self.offer(offer).await?),
            Action::Stop { attempt, stop, .. } => Message::StopAttempt(v1::StopAttempt {
                attempt: Some(attempt_ref(attempt)),
                purpose: purpose(*stop) as i32,
                grace: Some(duration(self.timings.stop_grace.min(self.timings.stop_limit * 2 / 3))),
            }),
            Action::Drop { attempt, .. } => {
                Message::DropAttempt(v1::DropAttempt { attempt: Some(attempt_ref(attempt)) })
            }
            Action::Release { cohort, .. } => {
                Message::KillCohort(v1::KillCohort { cohort_id: cohort.0, message: "the cohort is over".to_owned() })
            }
            Action::Welcome { keep, ttl, .. } => Message::Registered(v1::Registered {
                lease_ttl: Some(duration(*ttl)),
                heartbeat_interval: Some(duration(self.timings.heartbeat_interval.min(*ttl / 3))),
                cohort_ids: ids(keep),
            }),
            Action::Renewed { beat, cohorts, .. } => {
                Message::HeartbeatAck(v1::HeartbeatAck { sequence: *beat, cohort_ids: ids(cohorts) })
            }
        })
    }

    async fn offer(&self, offer: &Offer) -> Result<v1::LeaseOffer, Error> {
        let mut attempts = Vec::with_capacity(offer.attempts.len());
        for granted in &offer.attempts {
            attempts.push(self.attempt(granted).await?);
        }
        Ok(v1::LeaseOffer {
            cohort_id: offer.cohort.0,
            attempts,
            device: device(offer.share.device) as i32,
            device_count: offer.share.n_devices,
            rank: offer.share.rank,
            gang: offer.gang.iter().map(ToString::to_string).collect(),
        })
    }

    async fn attempt(&self, granted: &Granted) -> Result<v1::AttemptOffer, Error> {
        let key = &granted.attempt.key;
        let row = self.store.job(&key.project, &key.job).await?;
        let unreadable = |what: String| Error::Restore(format!("the specification of job {key}: {what}"));
        let spec: JobSpec = serde_json::from_value(row.resolved).map_err(|error| unreadable(error.to_string()))?;
        let message = to_message(&spec).map_err(|faults| unreadable(format!("{faults:?}")))?;
        let checkpoint = granted.checkpoint.as_ref();
        Ok(v1::AttemptOffer {
            attempt: Some(attempt_ref(&granted.attempt)),
            spec: Some(message),
            inputs: pinned(&spec),
            checkpoint: checkpoint.map(|checkpoint| checkpoint.digest.to_string()).unwrap_or_default(),
            checkpoint_step: checkpoint.map(|checkpoint| checkpoint.step.0).unwrap_or_default(),
        })
    }
}

/// What each reference of a resolved specification means.
fn pinned(spec: &JobSpec) -> Vec<v1::PinnedInput> {
    let pin = |(path, reference): (attune_spec::FieldPath, Reference)| v1::PinnedInput {
        reference: reference.to_string(),
        digest: match &reference {
            Reference::Digest(digest) => digest.to_string(),
            // Tags were replaced when the job was accepted; paths and URLs are read where they lie.
            // What a stage makes was replaced when the stage after it was made.
            Reference::Tag(_) | Reference::Path(_) | Reference::Url(_) | Reference::Stage { .. } => String::new(),
        },
        role: path.as_str().to_owned(),
    };
    spec.references().into_iter().map(pin).collect()
}

fn attempt_ref(attempt: &Attempt) -> v1::AttemptRef {
    let Attempt { key, epoch } = attempt;
    v1::AttemptRef::from(&AttemptId { project: key.project.clone(), job: key.job.clone(), epoch: *epoch })
}

fn device(device: Device) -> v1::DeviceKind {
    match device {
        Device::Cpu => v1::DeviceKind::Cpu,
        Device::Cuda => v1::DeviceKind::Cuda,
    }
}

fn purpose(stop: Stop) -> v1::StopPurpose {
    match stop {
        Stop::Cancel => v1::StopPurpose::Cancel,
        Stop::Pause => v1::StopPurpose::Pause,
        Stop::Preempt => v1::StopPurpose::Preempt,
    }
}
