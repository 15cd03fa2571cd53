//! Bytes go out: a header with the manifest, then the files in order, each verified before its last piece leaves.

use std::sync::Arc;

use attune_artifacts::manifest;
use attune_proto::CHUNK_BYTES_MAX;
use attune_proto::convert::Faults;
use attune_proto::convert::id::reference;
use attune_proto::error::invalid_argument;
use attune_proto::v1::{self, pull_artifact_response::Part};
use attune_spec::Fault;
use attune_spec::id::Project;
use attune_telemetry::Task;
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tonic::Status;

use super::artifacts::find;
use super::{Answers, WAITING_ANSWERS, invalid};
use crate::context::Context;
use crate::guard::Caller;
use crate::{status, view};

type Outgoing = mpsc::Sender<Result<v1::PullArtifactResponse, Status>>;

/// Starts a pull.
pub(crate) async fn pull(
    context: &Arc<Context>,
    caller: &Caller,
    request: v1::PullArtifactRequest,
) -> Result<Answers<v1::PullArtifactResponse>, Status> {
    let project = caller.project(&request.project)?;
    let named = reference("reference", &request.reference).map_err(invalid)?;
    caller.may_read(&context.store, &project, &named).await?;
    let digest = find(context, &project, &named).await?;
    let row = context.store.artifact(&project, digest).await.map_err(status::store)?;
    let manifest = context.blobs.manifest(&project, &digest).await.map_err(|error| status::artifacts(error, ""))?;
    let mut faults = Faults::new();
    for (index, path) in request.paths.iter().enumerate().filter(|(_, path)| manifest.file(path).is_none()) {
        let path_of = format!("paths[{index}]");
        faults.push(Fault::new(path_of.as_str(), format!("is {path:?}, which is no file of artifact {digest}")));
    }
    let wanted = |file: &&manifest::File| request.paths.is_empty() || request.paths.contains(&file.path);
    let mut files: Vec<manifest::File> = manifest.files().iter().filter(wanted).cloned().collect();
    let start = request.from_offset_bytes;
    match files.iter().position(|file| file.path == request.from_path) {
        Some(at) if start <= files[at].size_bytes => drop(files.drain(..at)),
        Some(at) => {
            let message = format!("is {start}; {:?} has {} bytes", request.from_path, files[at].size_bytes);
            faults.push(Fault::new("from_offset_bytes", message));
        }
        None if request.from_path.is_empty() && start == 0 => {}
        None => {
            let message = format!("is {:?}, which is none of the files that are asked for", request.from_path);
            faults.push(Fault::new("from_path", message));
        }
    }
    faults.finish(Some(())).map_err(|faults| invalid_argument(&faults))?;
    let header =
        v1::PullHeader { artifact: Some(view::whole_artifact(&row, &manifest)), manifest: manifest.bytes().clone() };
    let (outgoing, answers) = mpsc::channel(WAITING_ANSWERS);
    let shared = Arc::clone(context);
    context.tasks.spawn(Task::new("pull an artifact"), async move {
        let sent = send(&shared, &project, header, (files, start), &outgoing);
        // What was read may be dropped when its reader has gone.
        let ended = tokio::select! {
            ended = sent => ended,
            () = outgoing.closed() => return Ok::<_, std::convert::Infallible>(()),
        };
        if let Err(status) = ended {
            let _ = outgoing.send(Err(status)).await;
        }
        Ok(())
    });
    Ok(Answers::new(answers))
}

async fn send(
    context: &Context,
    project: &Project,
    header: v1::PullHeader,
    (files, mut start): (Vec<manifest::File>, u64),
    outgoing: &Outgoing,
) -> Result<(), Status> {
    if !answer(outgoing, Part::Header(header)).await {
        return Ok(());
    }
    for file in files {
        let failed = |error| status::artifacts(error, "");
        let mut at = std::mem::take(&mut start);
        let mut body = context.blobs.blob_from(project, file.blob(), at).await.map_err(failed)?;
        while let Some(mut piece) = body.next().await.transpose().map_err(failed)? {
            while !piece.is_empty() {
                let data = piece.split_to(piece.len().min(CHUNK_BYTES_MAX));
                let offset_bytes = at;
                at += data.len() as u64;
                if !answer(outgoing, chunk(&file.path, offset_bytes, data)).await {
                    return Ok(());
                }
            }
        }
        if file.size_bytes == 0 && !answer(outgoing, chunk(&file.path, 0, Bytes::new())).await {
            return Ok(());
        }
    }
    Ok(())
}

fn chunk(path: &str, offset_bytes: u64, data: Bytes) -> Part {
    Part::Chunk(v1::FileChunk { path: path.to_owned(), offset_bytes, data })
}

/// Sends a message; whether somebody still reads.
async fn answer(outgoing: &Outgoing, part: Part) -> bool {
    outgoing.send(Ok(v1::PullArtifactResponse { part: Some(part) })).await.is_ok()
}
