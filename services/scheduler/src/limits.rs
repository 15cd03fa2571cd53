//! Limits of time that jobs set themselves. The core knows no clock that people know; here is one.

use std::sync::Arc;
use std::time::Duration;

use attune_scheduler_core::{Input, JobKey, Limit};
use attune_store::job::Overdue;

use crate::clock::Clock;
use crate::context::Context;

/// How often somebody looks.
const LOOK: Duration = Duration::from_secs(1);

/// Ends jobs whose time is over, for as long as the server runs.
pub(crate) async fn keep(context: Arc<Context>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let now = Clock::moment();
        let overdue = match context.store.overdue(now.date, now.steady).await {
            Ok(overdue) => overdue,
            Err(error) => {
                tracing::warn!(%error, "limits of time were not looked at");
                continue;
            }
        };
        for (project, job, limit) in overdue {
            let key = JobKey::new(project, job);
            let limit = match limit {
                Overdue::RunTime => Limit::RunTime,
                Overdue::Deadline => Limit::Deadline,
            };
            // One that ends at this moment is refused, and not there the next time.
            if let Err(error) = context.front.step(Input::Expire { key: key.clone(), limit }).await {
                tracing::warn!(%error, %key, "a job whose time is over was not ended");
            }
        }
    }
}
