//! `attune workers`: the fleet.

use std::path::PathBuf;

use attune_proto::{Client, v1};
use attune_scheduler::providers::{self, Account, Defaults};
use serde_json::json;

use crate::print::{Column, Failure, Out, Table, note};
use crate::remote::{DEFAULT_ADDRESS, Server, block_on, read};
use crate::{stack, words};

/// Lists workers, keeps new work from them and lets it to them again.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune workers list
  attune workers drain gpu-17         for maintenance: its jobs write a checkpoint and go on elsewhere
  attune workers uncordon gpu-17      afterwards
  attune workers render gpu.yaml      what the engine is asked for a worker of this file")]
pub(crate) enum Command {
    /// Lists the workers that are known.
    List,
    /// Keeps new work from a worker; what runs there goes on.
    Cordon(One),
    /// Keeps new work from a worker, and has its jobs go on elsewhere after a last checkpoint.
    Drain(One),
    /// Lets new work to a worker again.
    Uncordon(One),
    /// Shows what an engine (Kubernetes, Slurm, this machine) would be asked for one worker: the Job's manifest, or the command line.
    Render(Render),
}

/// Of which pool, and what.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  attune workers render gpu.yaml
  attune workers render gpu.yaml | kubectl create --dry-run=server -f -
  attune workers render gpu.yaml --rights ops:attune | kubectl apply -f -")]
pub(crate) struct Render {
    /// The file that `attune scheduler --provider` is given.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Shows what Kubernetes must allow the scheduler instead: a role, and its binding to the service account as which it runs.
    #[arg(long, value_name = "[NAMESPACE:]ACCOUNT", value_parser = account)]
    rights: Option<Account>,
}

fn account(text: &str) -> Result<Account, String> {
    let (namespace, name) = text.split_once(':').map_or((None, text), |(namespace, name)| (Some(namespace), name));
    if name.is_empty() || namespace.is_some_and(str::is_empty) {
        return Err("expected the name of a service account, such as attune or ops:attune".to_owned());
    }
    Ok(Account { namespace: namespace.map(str::to_owned), name: name.to_owned() })
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
        match command {
            Command::List => list(&server.connect().await?, out).await,
            Command::Cordon(one) => cordon(&server.connect().await?, &one.worker, false, out).await,
            Command::Drain(one) => cordon(&server.connect().await?, &one.worker, true, out).await,
            Command::Uncordon(one) => uncordon(&server.connect().await?, &one.worker, out).await,
            Command::Render(asked) => render(asked, out),
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

fn render(asked: &Render, out: &mut Out) -> Result<(), Failure> {
    let file = asked.file.display().to_string();
    let defaults = Defaults {
        program: stack::program()?.path,
        server: Some(format!("http://{DEFAULT_ADDRESS}")),
        needs_token: false,
    };
    let pool = providers::read(&read(&asked.file)?, &defaults).map_err(|faults| Failure::invalid(&file, faults))?;
    let text = match &asked.rights {
        Some(account) => pool
            .provider
            .rights(account)
            .ok_or_else(|| Failure::usage(format!("{file}: its engine has no accounts; --rights is for Kubernetes")))?,
        None => pool.rendered(),
    };
    if out.is_json() {
        out.document(&json!({"pool": pool.pool.name.as_str(), "rendered": text}))
    } else {
        out.text(&text)
    }
}
