//! `attune workers`: the fleet.

use attune_proto::{Client, v1};
use serde_json::json;

use crate::print::{Column, Failure, Out, Table, note};
use crate::remote::{Server, block_on};
use crate::words;

/// Lists workers, keeps new work from them and lets it to them again.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune workers list
  attune workers drain gpu-17         for maintenance: its jobs write a checkpoint and go on elsewhere
  attune workers uncordon gpu-17      afterwards")]
pub(crate) enum Command {
    /// Lists the workers that are known.
    List,
    /// Keeps new work from a worker; what runs there goes on.
    Cordon(One),
    /// Keeps new work from a worker, and has its jobs go on elsewhere after a last checkpoint.
    Drain(One),
    /// Lets new work to a worker again.
    Uncordon(One),
}

/// Which worker.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Its id, as `attune workers list` has it.
    #[arg(value_name = "WORKER")]
    worker: String,
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let client = server.connect().await?;
        match command {
            Command::List => list(&client, out).await,
            Command::Cordon(one) => cordon(&client, &one.worker, false, out).await,
            Command::Drain(one) => cordon(&client, &one.worker, true, out).await,
            Command::Uncordon(one) => uncordon(&client, &one.worker, out).await,
        }
    })
}

/// What becomes of new work there.
fn state(worker: &v1::Worker) -> &'static str {
    match (worker.connected, worker.cordoned, worker.draining) {
        (false, ..) => "away",
        (true, true, _) => "cordoned",
        (true, false, true) => "leaving",
        (true, false, false) => "ready",
    }
}

fn devices(worker: &v1::Worker, kind: v1::DeviceKind) -> String {
    let device = worker.devices.iter().find(|device| device.kind() == kind);
    device.map_or_else(String::new, |device| format!("{}/{}", device.free, device.total))
}

async fn list(client: &Client, out: &mut Out) -> Result<(), Failure> {
    let (mut workers, mut asked) = (Vec::new(), v1::ListWorkersRequest::default());
    loop {
        let ask = || {
            let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
            async move { service.list_workers(asked).await }
        };
        let page = client.retrying(ask).await?;
        workers.extend(page.workers);
        if page.next_page_token.is_empty() {
            break;
        }
        asked.page_token = page.next_page_token;
    }
    if out.is_json() {
        let device = |device: &v1::DeviceCount| json!({"kind": words::word::<v1::DeviceKind>(device.kind), "total": device.total, "free": device.free});
        let shown = |worker: &v1::Worker| {
            json!({
                "id": worker.worker_id,
                "state": state(worker),
                "connected": worker.connected,
                "cordoned": worker.cordoned,
                "draining": worker.draining,
                "devices": worker.devices.iter().map(device).collect::<Vec<_>>(),
                "labels": worker.labels,
                "jobs": worker.jobs,
            })
        };
        return out.document(&workers.iter().map(shown).collect::<Vec<_>>());
    }
    let mut table = Table::new([
        Column::left("WORKER"),
        Column::left("STATE"),
        Column::right("CPU FREE"),
        Column::right("CARDS FREE"),
        Column::left("LABELS"),
        Column::left("JOBS"),
    ]);
    for worker in &workers {
        let labels: Vec<String> = worker.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        table.row([
            worker.worker_id.clone(),
            state(worker).to_owned(),
            devices(worker, v1::DeviceKind::Cpu),
            devices(worker, v1::DeviceKind::Cuda),
            labels.join(", "),
            worker.jobs.iter().map(|job| job.trim_start_matches("projects/")).collect::<Vec<_>>().join(", "),
        ]);
    }
    out.table(&table)
}

async fn cordon(client: &Client, worker: &str, drain: bool, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::CordonWorkerRequest { worker_id: worker.to_owned(), drain };
    let ask = || {
        let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
        async move { service.cordon_worker(asked).await }
    };
    client.retrying(ask).await?;
    if drain {
        note(&format!("{worker} gets nothing new; its jobs go on elsewhere after a last checkpoint"));
    } else {
        note(&format!("{worker} gets nothing new; what runs there goes on"));
    }
    if out.is_json() { out.document(&json!({"id": worker, "cordoned": true, "drained": drain})) } else { Ok(()) }
}

async fn uncordon(client: &Client, worker: &str, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::UncordonWorkerRequest { worker_id: worker.to_owned() };
    let ask = || {
        let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
        async move { service.uncordon_worker(asked).await }
    };
    client.retrying(ask).await?;
    note(&format!("{worker} gets new work again"));
    if out.is_json() { out.document(&json!({"id": worker, "cordoned": false})) } else { Ok(()) }
}
