//! `attune projects`: what projects have of the fleet and of the store, and what they may have.

use attune_proto::{Client, v1};
use serde_json::{Value, json};

use crate::print::{Column, Failure, Out, Table};
use crate::remote::{Server, block_on};
use crate::words;

/// Shows what projects have and may have, and says what they may.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune projects list
  attune projects set research --weight 2 --max-cuda 16 --max-queued 500 --max-bytes 2000000000000
  attune projects set research              research may have whatever there is")]
pub(crate) enum Command {
    /// Lists the projects that have something or may not have all.
    List,
    /// Shows one project.
    Get(One),
    /// Says all that a project may have from now on: what is not given is not limited. What it has beyond that it keeps.
    Set(Set),
}

/// Which project.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Its name.
    #[arg(id = "named", value_name = "PROJECT")]
    project: String,
}

/// What a project may have.
#[derive(Debug, clap::Args)]
pub(crate) struct Set {
    /// Its name.
    #[arg(id = "named", value_name = "PROJECT")]
    project: String,
    /// Its weight in the fair share: of two projects with work, one of weight 2 gets twice as much as one of weight 1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    weight: u32,
    /// CPU devices that its jobs may occupy together.
    #[arg(long, value_name = "N")]
    max_cpu: Option<u32>,
    /// Cards that its jobs may occupy together.
    #[arg(long, value_name = "N")]
    max_cuda: Option<u32>,
    /// Jobs that it may have which have neither ended nor run.
    #[arg(long, value_name = "N")]
    max_queued: Option<u32>,
    /// Bytes of artifacts that it may keep.
    #[arg(long, value_name = "BYTES")]
    max_bytes: Option<u64>,
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let client = server.connect().await?;
        match command {
            Command::List => list(&client, out).await,
            Command::Get(one) => get(&client, &one.project, out).await,
            Command::Set(arguments) => set(&client, arguments, out).await,
        }
    })
}

async fn list(client: &Client, out: &mut Out) -> Result<(), Failure> {
    let (mut projects, mut asked) = (Vec::new(), v1::ListProjectsRequest::default());
    loop {
        let ask = || {
            let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
            async move { service.list_projects(asked).await }
        };
        let page = client.retrying(ask).await?;
        projects.extend(page.projects);
        if page.next_page_token.is_empty() {
            break;
        }
        asked.page_token = page.next_page_token;
    }
    show(&projects, out)
}

async fn get(client: &Client, project: &str, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::GetProjectRequest { project: project.to_owned() };
    let ask = || {
        let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
        async move { service.get_project(asked).await }
    };
    one(client.retrying(ask).await?.project, out)
}

async fn set(client: &Client, arguments: &Set, out: &mut Out) -> Result<(), Failure> {
    let Set { project, weight, max_cpu, max_cuda, max_queued, max_bytes } = arguments;
    let policy = v1::ProjectPolicy {
        weight: Some(*weight),
        max_cpu: *max_cpu,
        max_cuda: *max_cuda,
        max_queued: *max_queued,
        max_bytes: *max_bytes,
    };
    let asked = v1::SetProjectPolicyRequest { project: project.clone(), policy: Some(policy) };
    let ask = || {
        let (mut service, asked) = (client.fleet(), client.request(asked.clone()));
        async move { service.set_project_policy(asked).await }
    };
    one(client.retrying(ask).await?.project, out)
}

fn one(project: Option<v1::ProjectUsage>, out: &mut Out) -> Result<(), Failure> {
    let project = project.ok_or_else(|| Failure::failed("the server's answer holds no project"))?;
    if out.is_json() { out.document(&json(&project)) } else { show(&[project], out) }
}

fn json(project: &v1::ProjectUsage) -> Value {
    let policy = project.policy.unwrap_or_default();
    json!({
        "project": project.project,
        "weight": policy.weight.unwrap_or(1),
        "cpu": {"used": project.cpu, "max": policy.max_cpu},
        "cuda": {"used": project.cuda, "max": policy.max_cuda},
        "queued": {"used": project.queued, "max": policy.max_queued},
        "bytes": {"used": project.bytes, "max": policy.max_bytes},
    })
}

fn show(projects: &[v1::ProjectUsage], out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        return out.document(&projects.iter().map(json).collect::<Vec<_>>());
    }
    let mut table = Table::new([
        Column::left("PROJECT"),
        Column::right("WEIGHT"),
        Column::right("CPU"),
        Column::right("CARDS"),
        Column::right("QUEUED"),
        Column::right("BYTES"),
    ]);
    let of = |used: String, max: Option<String>| max.map_or_else(|| used.clone(), |max| format!("{used} of {max}"));
    for project in projects {
        let policy = project.policy.unwrap_or_default();
        let count = |used: u32, max: Option<u32>| of(used.to_string(), max.map(|max| max.to_string()));
        table.row([
            project.project.clone(),
            policy.weight.unwrap_or(1).to_string(),
            count(project.cpu, policy.max_cpu),
            count(project.cuda, policy.max_cuda),
            count(project.queued, policy.max_queued),
            of(words::bytes(project.bytes), policy.max_bytes.map(words::bytes)),
        ]);
    }
    out.table(&table)
}
