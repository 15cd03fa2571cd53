//! Looks now and then at what waits and what engines have, and does what follows from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_scheduler_core::supply::{Order, Supply};
use attune_spec::id::Name;
use attune_telemetry::Stop;
use futures::future::join_all;
use tokio::time::Instant;

use super::{ProviderError, WorkerPool};
use crate::clock;
use crate::context::Context;
use crate::front::Stock;

/// A pool, and when its engine is to be asked next.
struct Watched {
    pool: WorkerPool,
    at: Instant,
    /// What its engine said last when it did not do what it was asked: repetitions are not told.
    complaint: Option<String>,
}

impl Watched {
    fn complain(&mut self, error: &ProviderError) {
        let text = error.to_string();
        if self.complaint.as_ref() != Some(&text) {
            tracing::warn!(pool = %self.pool.pool.name, "{text}");
            self.complaint = Some(text);
        }
    }
}

/// Asks for workers and gives them back until `closing`, then ends those that do not outlive the scheduler.
pub(crate) async fn follow(context: Arc<Context>, pools: Vec<WorkerPool>, closing: Stop) {
    let mut supply = Supply::new(pools.iter().map(|pool| pool.pool.clone()).collect());
    let mut refused: Vec<Name> = Vec::new();
    let mut watched: Vec<Watched> =
        pools.into_iter().map(|pool| Watched { pool, at: Instant::now(), complaint: None }).collect();
    while let Some(next) = watched.iter().map(|watched| watched.at).min() {
        tokio::select! {
            biased;
            () = closing.requested() => break,
            () = tokio::time::sleep_until(next) => {}
        }
        let listed = look(&mut watched).await;
        let stock = Stock { supply, listed, refused: std::mem::take(&mut refused) };
        // The desk answers for as long as there is one.
        let Ok((after, orders)) = context.front.supply(stock).await else { break };
        supply = after;
        for order in orders {
            let (Order::Ask { pool, .. } | Order::GiveBack { pool, .. } | Order::Withdraw { pool, .. }) = &order;
            let Some(watched) = watched.iter_mut().find(|watched| watched.pool.pool.name == *pool) else { continue };
            if let Err(error) = perform(&watched.pool, &order).await {
                watched.complain(&error);
                if matches!(order, Order::Ask { .. }) {
                    refused.push(watched.pool.pool.name.clone());
                }
            }
        }
    }
    join_all(watched.iter().map(|watched| watched.pool.provider.close())).await;
}

/// Asks the engines whose turn it is what they have.
async fn look(watched: &mut [Watched]) -> BTreeMap<Name, attune_scheduler_core::supply::Listed> {
    let now = Instant::now();
    let due = watched.iter_mut().filter(|watched| watched.at <= now);
    let asked = due.map(|watched| async move {
        let found = watched.pool.provider.list().await;
        watched.at = Instant::now() + watched.pool.look;
        let found = match found {
            Ok(found) => {
                watched.complaint = None;
                Some(found)
            }
            Err(error) => {
                watched.complain(&error);
                None
            }
        };
        (watched.pool.pool.name.clone(), found)
    });
    join_all(asked).await.into_iter().collect()
}

async fn perform(pool: &WorkerPool, order: &Order) -> Result<(), ProviderError> {
    let provider = &pool.provider;
    match order {
        Order::Ask { pool, n } => {
            for _ in 0..*n {
                let request = clock::request_id();
                provider.ask(&request).await?;
                tracing::info!(%pool, %request, "a worker is asked for");
            }
            Ok(())
        }
        Order::GiveBack { pool, request, worker } => {
            tracing::info!(%pool, %request, %worker, "a worker that nothing needs is given back");
            provider.give_back(request).await
        }
        Order::Withdraw { pool, request, why } => {
            tracing::info!(%pool, %request, why = %why, "a request is withdrawn");
            provider.withdraw(request).await
        }
    }
}
