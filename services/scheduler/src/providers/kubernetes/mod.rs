//! Workers that are Pods of Kubernetes: one Job of one Pod each.
//!
//! A Job rather than a bare Pod, for what else acts in a cluster treats it as work that somebody owns: nodes can be drained and scaled away
//! (`kubectl drain` and autoscalers refuse where Pods have no owner), queues such as Kueue's hold it back and let it go, a quota is waited
//! for, and it is removed some time after its end without Attune. It starts its Pod once and never again (`backoffLimit: 0`).
//!
//! Labels name the pool and the request, the Job's name follows from the request: what the API server lists under the label is all that there
//! is to know, and to ask for a request twice makes one Job. Manifests are typed objects and hold no secret: a worker's token is a file
//! that the cluster puts before it.
//!
//! A Pod that Kubernetes ends (evicted, preempted, out of memory, its node gone) is a worker that went: its attempts go on elsewhere from their
//! last checkpoints, and a worker is asked for anew if something waits for it. Whatever has Kubernetes end one in order sends SIGTERM first, and
//! leaves time to write a checkpoint.
//!
//! Reading order: `settings` (what the file says), `manifest` (what follows from it), `standing` (what the cluster's answer means), `api`
//! (how it is asked, and how it refuses), `provider` (the engine), `rights` (what it must be allowed).

mod api;
mod manifest;
mod provider;
mod rights;
mod settings;
mod standing;

pub(super) use provider::Kubernetes;
pub(super) use settings::{Meant, Settings};

/// The label with a pool's name.
const POOL_LABEL: &str = "attune.pool";
