//! `attune artifacts`: what jobs read and make.

use std::path::PathBuf;

use attune_artifacts::{Causes, Kind, Source as _, Unpack};
use attune_proto::words::Word as _;
use attune_proto::{Client, v1};
use attune_worker::transfer::{self, Remote};
use serde_json::json;

use super::submit::cannot_push;
use crate::print::{Column, Failure, Out, Table, note};
use crate::remote::{Server, artifact, block_on, digest};
use crate::words;

/// Lists, moves, names and traces artifacts.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "An artifact is named by its digest, or by a tag such as support-bot:latest.
Examples:
  attune artifacts push ./base --tag base:latest
  attune artifacts pull demo-guide:latest ./adapter
  attune artifacts lineage demo-guide:latest")]
pub(crate) enum Command {
    /// Lists artifacts, newest first.
    List(List),
    /// Shows one artifact: files, causes, the run that made it.
    Get(One),
    /// Stores a model folder, an adapter folder or data.
    Push(Push),
    /// Writes an artifact's files into a new folder, byte for byte.
    Pull(Pull),
    /// Makes or moves a tag.
    Tag(Tag),
    /// Removes a tag; the artifact stays.
    Untag(Untag),
    /// Shows what an artifact was made from, or what was made from it.
    Lineage(Lineage),
    /// Deletes an artifact that nothing else was made from.
    Delete(Delete),
}

/// Which artifacts are listed.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only artifacts of this kind; may be given several times. Checkpoints are listed only when they are asked for.
    #[arg(long = "kind", value_name = "KIND", value_parser = parse_kind)]
    kinds: Vec<v1::ArtifactKind>,
    /// Only artifacts that this job made.
    #[arg(long, value_name = "JOB")]
    job: Option<String>,
    /// Only artifacts with a tag of this name.
    #[arg(long, value_name = "NAME")]
    tag: Option<String>,
    /// The most artifacts that are listed.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

/// Which artifact.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Digest or tag.
    #[arg(value_name = "REF")]
    reference: String,
}

/// What is stored.
#[derive(Debug, clap::Args)]
pub(crate) struct Push {
    /// A model folder, an adapter folder, a data file or a folder of data files.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// What it is; recognised by its files if it is left out.
    #[arg(long, value_name = "KIND", value_parser = parse_kind)]
    kind: Option<v1::ArtifactKind>,
    /// A tag that moves to it; may be given several times.
    #[arg(long = "tag", value_name = "NAME:LABEL")]
    tags: Vec<String>,
}

/// What is written where.
#[derive(Debug, clap::Args)]
pub(crate) struct Pull {
    /// Digest or tag.
    #[arg(value_name = "REF")]
    reference: String,
    /// The new folder.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Which tag moves where.
#[derive(Debug, clap::Args)]
pub(crate) struct Tag {
    /// Digest or tag of the artifact.
    #[arg(value_name = "REF")]
    reference: String,
    /// The tag; its label is `latest` if it is left out.
    #[arg(value_name = "NAME:LABEL")]
    tag: String,
}

/// Which tag is removed.
#[derive(Debug, clap::Args)]
pub(crate) struct Untag {
    /// The tag.
    #[arg(value_name = "NAME:LABEL")]
    tag: String,
}

/// Which way lineage is walked.
#[derive(Debug, clap::Args)]
pub(crate) struct Lineage {
    /// Digest or tag.
    #[arg(value_name = "REF")]
    reference: String,
    /// Shows what was made from it instead of what it was made from.
    #[arg(long)]
    descendants: bool,
}

/// What is deleted.
#[derive(Debug, clap::Args)]
pub(crate) struct Delete {
    /// The digest; tags are not taken here, because they move.
    #[arg(value_name = "DIGEST")]
    digest: String,
}

fn parse_kind(text: &str) -> Result<v1::ArtifactKind, String> {
    v1::ArtifactKind::from_word(text).ok_or_else(|| {
        let known = (1..=8).filter_map(|kind| v1::ArtifactKind::try_from(kind).ok()).map(|kind| kind.word());
        format!("expected one of {}", known.collect::<Vec<_>>().join(", "))
    })
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let client = server.connect().await?;
        match command {
            Command::List(arguments) => list(&client, arguments, out).await,
            Command::Get(one) => show(&artifact(&client, &one.reference).await?, out),
            Command::Push(arguments) => push(&client, arguments, out).await,
            Command::Pull(arguments) => pull(&client, arguments, out).await,
            Command::Tag(arguments) => tag(&client, arguments, out).await,
            Command::Untag(arguments) => untag(&client, arguments, out).await,
            Command::Lineage(arguments) => lineage(&client, arguments, out).await,
            Command::Delete(arguments) => delete(&client, arguments, out).await,
        }
    })
}

async fn list(client: &Client, arguments: &List, out: &mut Out) -> Result<(), Failure> {
    let (mut found, mut page_token) = (Vec::new(), String::new());
    let wanted = arguments.limit as usize;
    while found.len() < wanted {
        let asked = v1::ListArtifactsRequest {
            project: client.project().to_string(),
            kinds: arguments.kinds.iter().map(|kind| *kind as i32).collect(),
            tag_name: arguments.tag.clone().unwrap_or_default(),
            job_id: arguments.job.clone().unwrap_or_default(),
            page_size: u32::try_from(wanted - found.len()).unwrap_or(u32::MAX).min(1000),
            page_token: page_token.clone(),
            order_by: 0,
        };
        let ask = || {
            let (mut service, asked) = (client.artifacts(), client.request(asked.clone()));
            async move { service.list_artifacts(asked).await }
        };
        let page = client.retrying(ask).await?;
        found.extend(page.artifacts);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if out.is_json() {
        return out.document(&found.iter().map(words::artifact).collect::<Vec<_>>());
    }
    let mut table = Table::new([
        Column::left("DIGEST"),
        Column::left("KIND"),
        Column::right("SIZE"),
        Column::right("FILES"),
        Column::left("TAGS"),
        Column::left("JOB"),
    ]);
    for artifact in &found {
        table.row([
            artifact.digest.clone(),
            words::word::<v1::ArtifactKind>(artifact.kind),
            words::bytes(artifact.size_bytes),
            artifact.file_count.to_string(),
            artifact.tags.join(", "),
            artifact.commit.as_ref().map(|commit| commit.job_id.clone()).unwrap_or_default(),
        ]);
    }
    out.table(&table)
}

fn show(artifact: &v1::Artifact, out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        return out.document(&words::artifact(artifact));
    }
    out.line(&format!("digest    {}", artifact.digest))?;
    out.line(&format!("kind      {}", words::word::<v1::ArtifactKind>(artifact.kind)))?;
    out.line(&format!("size      {}", words::bytes(artifact.size_bytes)))?;
    if !artifact.tags.is_empty() {
        out.line(&format!("tags      {}", artifact.tags.join(", ")))?;
    }
    for file in &artifact.files {
        out.line(&format!("file      {} ({})", file.path, words::bytes(file.size_bytes)))?;
    }
    if let Some(causes) = artifact.causes.as_ref().filter(|causes| !causes.plan.is_empty()) {
        let mut inputs: Vec<_> = causes.inputs.iter().collect();
        inputs.sort();
        for (role, digest) in inputs {
            out.line(&format!("from      {role} {digest}"))?;
        }
        out.line(&format!("plan      {}", causes.plan))?;
        out.line(&format!("code      {}, kernels {}", causes.code_version, causes.kernel_profile))?;
    }
    if let Some(commit) = artifact.commit.as_ref().filter(|commit| !commit.job_id.is_empty()) {
        out.line(&format!("job       {}, epoch {}, worker {}", commit.job_id, commit.epoch, commit.worker_id))?;
        if let Some(facts) = &commit.facts {
            let speed = format!("{:.0} tokens/s", facts.tokens_per_second);
            let memory = words::bytes(facts.peak_memory_bytes);
            out.line(&format!("run       {} steps, {} tokens, {speed}, {memory} at most", facts.step, facts.tokens))?;
        }
    }
    Ok(())
}

async fn push(client: &Client, arguments: &Push, out: &mut Out) -> Result<(), Failure> {
    let kind = arguments.kind.and_then(|kind| serde_json::from_value::<Kind>(json!(kind.word())).ok());
    let pushed = transfer::push(client, &arguments.path, kind, Causes::default(), None, arguments.tags.clone());
    let pushed = pushed.await.map_err(|error| cannot_push(&arguments.path, error))?;
    for hidden in &pushed.skipped {
        note(&format!("left out {hidden}: hidden"));
    }
    if out.is_json() {
        return out.document(&json!({
            "digest": pushed.digest.to_string(), "created": pushed.created, "skipped": pushed.skipped,
            "tags": pushed.artifact.tags, "size_bytes": pushed.artifact.size_bytes,
        }));
    }
    out.line(&pushed.digest.to_string())
}

async fn pull(client: &Client, arguments: &Pull, out: &mut Out) -> Result<(), Failure> {
    let digest = digest(&artifact(client, &arguments.reference).await?.digest)?;
    let mut unpack = Unpack::to(&arguments.folder, digest).await?;
    Remote::new(client.clone()).pull(client.project(), &digest, &mut unpack).await?;
    let folder = unpack.finish().await?;
    if out.is_json() {
        return out.document(&json!({"digest": digest.to_string(), "folder": folder}));
    }
    out.line(&folder.display().to_string())
}

async fn tag(client: &Client, arguments: &Tag, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::TagArtifactRequest {
        project: client.project().to_string(),
        tag: arguments.tag.clone(),
        reference: arguments.reference.clone(),
        expected_digest: None,
    };
    let ask = || {
        let (mut service, asked) = (client.artifacts(), client.request(asked.clone()));
        async move { service.tag_artifact(asked).await }
    };
    let answer = client.retrying(ask).await?;
    let digest = answer.artifact.map(|artifact| artifact.digest).unwrap_or_default();
    if out.is_json() {
        return out.document(&json!({"tag": arguments.tag, "digest": digest, "previous": answer.previous_digest}));
    }
    out.line(&format!("{} {digest}", arguments.tag))
}

async fn untag(client: &Client, arguments: &Untag, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::UntagArtifactRequest { project: client.project().to_string(), tag: arguments.tag.clone() };
    let ask = || {
        let (mut service, asked) = (client.artifacts(), client.request(asked.clone()));
        async move { service.untag_artifact(asked).await }
    };
    let answer = client.retrying(ask).await?;
    if out.is_json() {
        return out.document(&json!({"tag": arguments.tag, "previous": answer.previous_digest}));
    }
    match answer.previous_digest.as_str() {
        "" => out.line(&format!("there was no tag {}", arguments.tag)),
        digest => out.line(&format!("{} pointed at {digest}", arguments.tag)),
    }
}

async fn lineage(client: &Client, arguments: &Lineage, out: &mut Out) -> Result<(), Failure> {
    use v1::LineageDirection::{Ancestors, Descendants};
    let direction = if arguments.descendants { Descendants } else { Ancestors };
    let found = walk(client, &arguments.reference, direction).await?;
    if out.is_json() {
        let edge = |edge: &v1::LineageEdge| json!({"input": edge.input, "output": edge.output, "role": edge.role});
        return out.document(&json!({
            "root": found.root,
            "artifacts": found.artifacts.iter().map(words::artifact).collect::<Vec<_>>(),
            "edges": found.edges.iter().map(edge).collect::<Vec<_>>(),
            "truncated": found.truncated,
        }));
    }
    out.text(&tree(&found, arguments.descendants))
}

/// Walks lineage from an artifact.
pub(super) async fn walk(
    client: &Client,
    reference: &str,
    direction: v1::LineageDirection,
) -> Result<v1::GetLineageResponse, Failure> {
    let asked = v1::GetLineageRequest {
        project: client.project().to_string(),
        reference: reference.to_owned(),
        direction: direction as i32,
        depth: 0,
    };
    let ask = || {
        let (mut service, asked) = (client.artifacts(), client.request(asked.clone()));
        async move { service.get_lineage(asked).await }
    };
    Ok(client.retrying(ask).await?)
}

/// Lineage as an indented tree, the root first.
pub(super) fn tree(found: &v1::GetLineageResponse, down: bool) -> String {
    let mut text = String::new();
    branch(found, &found.root, None, down, 0, &mut text);
    if found.truncated {
        text.push_str("… and more\n");
    }
    text
}

fn branch(found: &v1::GetLineageResponse, at: &str, role: Option<&str>, down: bool, depth: usize, text: &mut String) {
    let artifact = found.artifacts.iter().find(|artifact| artifact.digest == at);
    let kind = artifact.map(|artifact| words::word::<v1::ArtifactKind>(artifact.kind));
    // An input that was read by its URL or path is known by its bytes alone.
    let kind = kind.filter(|kind| !kind.is_empty()).unwrap_or_else(|| "not stored here,".to_owned());
    let tags = artifact.map(|artifact| artifact.tags.join(", ")).unwrap_or_default();
    let job = artifact.and_then(|artifact| artifact.commit.as_ref()).map(|commit| commit.job_id.as_str());
    let mut line = "  ".repeat(depth);
    line.push_str(&role.map(|role| format!("{role}: ")).unwrap_or_default());
    line.push_str(&format!("{kind} {}", words::short(at)));
    if !tags.is_empty() {
        line.push_str(&format!(" [{tags}]"));
    }
    if let Some(job) = job.filter(|job| !job.is_empty()) {
        line.push_str(&format!(" by {job}"));
    }
    text.push_str(&line);
    text.push('\n');
    // The walk has no cycles: an artifact's name is made from the names of its inputs.
    for edge in &found.edges {
        let next = match (edge.output == at && !down, edge.input == at && down) {
            (true, _) => &edge.input,
            (_, true) => &edge.output,
            _ => continue,
        };
        branch(found, next, Some(&edge.role), down, depth + 1, text);
    }
}

async fn delete(client: &Client, arguments: &Delete, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::DeleteArtifactRequest { project: client.project().to_string(), digest: arguments.digest.clone() };
    let ask = || {
        let (mut service, asked) = (client.artifacts(), client.request(asked.clone()));
        async move { service.delete_artifact(asked).await }
    };
    let deleted = client.retrying(ask).await?.deleted;
    if out.is_json() {
        return out.document(&json!({"digest": arguments.digest, "deleted": deleted}));
    }
    out.line(if deleted { "deleted" } else { "there was no such artifact" })
}
