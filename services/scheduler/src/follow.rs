//! What a scheduler does while another one leads: it looks who that is, wakes those that watch what the other one stores, and leads as
//! soon as nobody else does.

use std::collections::BTreeMap;
use std::time::Duration;

use attune_scheduler_core::JobKey;
use attune_spec::id::{JobId, Project};

use crate::context::Context;
use crate::error::Error;

/// How often it looks. A watch is so much later than what it tells, and so much later another one leads.
pub(crate) const LOOK: Duration = Duration::from_millis(250);

/// Follows until this scheduler leads.
pub(crate) async fn until_leading(context: &Context) -> Result<(), Error> {
    let mut follower = Follower::default();
    loop {
        match follower.look(context).await {
            Ok(true) => return Ok(()),
            Ok(false) => follower.said = None,
            Err(error) if error.is_retryable() => {
                let why = error.to_string();
                if follower.said.as_ref() != Some(&why) {
                    tracing::warn!(why, "the database cannot be followed now");
                    follower.said = Some(why);
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What was seen last.
#[derive(Debug, Default)]
struct Follower {
    /// How far the logs of watched jobs were written.
    seen: BTreeMap<JobKey, (u64, u64)>,
    /// How many tokens were revoked.
    revoked: Option<u64>,
    /// The last complaint.
    said: Option<String>,
}

impl Follower {
    /// Looks once; whether this scheduler leads.
    async fn look(&mut self, context: &Context) -> attune_store::Result<bool> {
        let store = &context.store;
        if store.lead().await? {
            return Ok(true);
        }
        context.replica.follow(store.announced().await?);
        let mut watched: BTreeMap<Project, Vec<JobId>> = BTreeMap::new();
        for JobKey { project, job } in context.hub.watched() {
            watched.entry(project).or_default().push(job);
        }
        let mut seen = BTreeMap::new();
        for (project, jobs) in watched {
            for moved in store.moved(&project, &jobs).await? {
                let (key, now) = (JobKey::new(project.clone(), moved.job), (moved.events, moved.metrics));
                // One that is new here is woken as well: it may have read before what it waits for was stored.
                if self.seen.get(&key) != Some(&now) {
                    context.hub.wake(&key);
                }
                seen.insert(key, now);
            }
        }
        self.seen = seen;
        let revoked = Some(store.n_revoked().await?);
        if std::mem::replace(&mut self.revoked, revoked) != revoked {
            context.guard.has_revoked();
        }
        Ok(false)
    }
}
