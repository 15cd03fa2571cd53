//! Streams that stay open: a job's events and its metrics, from any position on, until the job is final.

use std::sync::Arc;

use attune_proto::v1;
use attune_scheduler_core::JobKey;
use attune_spec::id::Seq;
use attune_store::job::Order;
use attune_store::metric;
use attune_telemetry::Task;
use tokio::sync::mpsc;
use tonic::Status;

use super::{Answers, WAITING_ANSWERS};
use crate::context::Context;
use crate::{log, status, view};

/// How long a reader may take for the error that ends its stream.
const LAST_WORD: std::time::Duration = std::time::Duration::from_secs(1);

/// Rows that are read at once.
const ROWS: u32 = 500;

/// Streams the events of a job after number `after`.
pub(crate) fn job(context: &Arc<Context>, key: JobKey, after: u64) -> Answers<v1::WatchJobResponse> {
    let (answers, stream) = mpsc::channel(WAITING_ANSWERS);
    let shared = Arc::clone(context);
    context.tasks.spawn(Task::new("watch a job"), async move {
        let watching = events(&shared, &key, Seq(after), &answers);
        guard(&shared, &answers, watching).await;
        Ok::<_, std::convert::Infallible>(())
    });
    Answers::new(stream)
}

/// Streams the metrics of a job after number `after`.
pub(crate) fn metrics(
    context: &Arc<Context>,
    key: JobKey,
    names: Vec<String>,
    after: u64,
) -> Answers<v1::StreamMetricsResponse> {
    let (answers, stream) = mpsc::channel(WAITING_ANSWERS);
    let shared = Arc::clone(context);
    context.tasks.spawn(Task::new("watch metrics"), async move {
        let watching = points(&shared, &key, names, Seq(after), &answers);
        guard(&shared, &answers, watching).await;
        Ok::<_, std::convert::Infallible>(())
    });
    Answers::new(stream)
}

/// Runs a watch until it ends, its reader goes, or the server is asked to end; the reader is told unless it went.
async fn guard<T>(
    context: &Context,
    answers: &mpsc::Sender<Result<T, Status>>,
    watching: impl Future<Output = Result<(), Status>>,
) {
    let stop = context.stop();
    // Every arm may be dropped: a watch holds nothing but its position, which its reader knows.
    let ended = tokio::select! {
        ended = watching => ended,
        () = answers.closed() => return,
        () = stop.requested() => Err(status::shuts_down()),
    };
    if let Err(status) = ended {
        // A stream that is cut must not look like one that has ended; a reader that takes nothing is not waited for.
        let _ = tokio::time::timeout(LAST_WORD, answers.send(Err(status))).await;
    }
}

async fn events(
    context: &Context,
    key: &JobKey,
    mut after: Seq,
    answers: &mpsc::Sender<Result<v1::WatchJobResponse, Status>>,
) -> Result<(), Status> {
    let mut woken = context.hub.watch(key);
    loop {
        woken.mark_unchanged();
        // Looked at before the events: if it is final now, all its events are there already.
        let is_final = context.store.job(&key.project, &key.job).await.map_err(status::store)?.state.is_final();
        loop {
            let found = context.store.events(&key.project, Some(&key.job), after, ROWS).await.map_err(status::store)?;
            let is_last = found.len() < ROWS as usize;
            for event in found {
                after = event.seq;
                let Some(message) = log::to_message(&event) else { continue };
                let ends = log::is_final(&message);
                if answers.send(Ok(v1::WatchJobResponse { event: Some(message) })).await.is_err() || ends {
                    return Ok(());
                }
            }
            if is_last {
                break;
            }
        }
        if is_final {
            return Ok(());
        }
        // The sender lives in the hub as long as this receiver does.
        let _ = woken.changed().await;
    }
}

async fn points(
    context: &Context,
    key: &JobKey,
    names: Vec<String>,
    after: Seq,
    answers: &mpsc::Sender<Result<v1::StreamMetricsResponse, Status>>,
) -> Result<(), Status> {
    let mut woken = context.hub.watch(key);
    let mut filter = metric::Filter { names, after, order: Order::Oldest, ..metric::Filter::default() };
    loop {
        woken.mark_unchanged();
        let is_final = context.store.job(&key.project, &key.job).await.map_err(status::store)?.state.is_final();
        loop {
            let page = context.store.metrics(&key.project, &key.job, &filter, None, ROWS).await;
            let page = page.map_err(status::store)?;
            let Some(last) = page.items.last() else { break };
            filter.after = last.seq;
            let points = page.items.into_iter().map(view::point).collect();
            if answers.send(Ok(v1::StreamMetricsResponse { points })).await.is_err() {
                return Ok(());
            }
        }
        if is_final {
            return Ok(());
        }
        let _ = woken.changed().await;
    }
}
