//! Artifacts without their bytes: found, listed, tagged, followed, deleted. Bytes come and go in [`super::push`] and
//! [`super::pull`].

use std::sync::Arc;

use attune_proto::convert::Faults;
use attune_proto::convert::id::{Reference, field, reference};
use attune_proto::error::invalid_argument;
use attune_proto::v1::artifact_service_server::ArtifactService;
use attune_proto::v1::{self, ArtifactKind};
use attune_proto::words::Word as _;
use attune_spec::Fault;
use attune_spec::id::{Digest, JobId, Project, Tag};
use attune_store::artifact::{Direction, Filter};
use attune_store::change::Write;
use attune_store::job::Order;
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, invalid, known, page_size, page_token, pull, push};
use crate::clock::Clock;
use crate::context::Context;
use crate::guard::received;
use crate::{status, sweep, view};

/// Digests that may be asked about at once.
const QUERY_MAX: usize = 10_000;
/// Farthest lineage.
const DEPTH_MAX: u32 = 100;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Artifacts {
    pub(crate) context: Arc<Context>,
}

/// The digest of what a digest or tag names now.
pub(crate) async fn find(context: &Context, project: &Project, reference: &Reference) -> Result<Digest, Status> {
    match reference {
        Reference::Digest(digest) => Ok(*digest),
        Reference::Tag(tag) => context.store.resolve_tag(project, tag).await.map_err(status::store),
    }
}

/// An artifact with its files and causes.
pub(crate) async fn whole(context: &Context, project: &Project, digest: Digest) -> Result<v1::Artifact, Status> {
    let row = context.store.artifact(project, digest).await.map_err(status::store)?;
    let manifest = context.blobs.manifest(project, &digest).await.map_err(|error| status::artifacts(error, ""))?;
    Ok(view::whole_artifact(&row, &manifest))
}

impl Artifacts {
    /// What a tag names; nothing when there is no such tag.
    async fn tagged(&self, project: &Project, tag: &Tag) -> Result<Option<Digest>, Status> {
        match self.context.store.resolve_tag(project, tag).await {
            Ok(digest) => Ok(Some(digest)),
            Err(attune_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(status::store(error)),
        }
    }

    /// An artifact of a lineage; it may have been deleted.
    async fn visible(&self, project: &Project, digest: Digest) -> Result<Option<v1::Artifact>, Status> {
        match self.context.store.artifact(project, digest).await {
            Ok(row) => Ok(Some(view::artifact(&row))),
            Err(attune_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(status::store(error)),
        }
    }
}

#[tonic::async_trait]
impl ArtifactService for Artifacts {
    async fn query_missing_blobs(
        &self,
        request: Request<v1::QueryMissingBlobsRequest>,
    ) -> Result<Response<v1::QueryMissingBlobsResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        caller.may_look(&self.context.store, &project).await?;
        if request.digests.len() > QUERY_MAX {
            let message = format!("has {} entries; at most {QUERY_MAX} are allowed", request.digests.len());
            return Err(invalid(Fault::new("digests", message)));
        }
        let mut faults = Faults::new();
        let mut digests = Vec::with_capacity(request.digests.len());
        for (index, text) in request.digests.iter().enumerate() {
            digests.extend(faults.field(field::<Digest>(&format!("digests[{index}]"), text)));
        }
        let digests = faults.finish(Some(digests)).map_err(|faults| invalid_argument(&faults))?;
        let missing = self.context.blobs.missing_digests(&project, &digests).await;
        let missing = missing.map_err(|error| status::artifacts(error, "digests"))?;
        let kept = self.context.blobs.kept(&project, &missing).await;
        let of = |digest| kept.get(digest).copied().unwrap_or_default();
        let kept_bytes = if kept.is_empty() { Vec::new() } else { missing.iter().map(of).collect() };
        let missing = missing.iter().map(ToString::to_string).collect();
        Ok(Response::new(v1::QueryMissingBlobsResponse { missing, kept_bytes }))
    }

    async fn push_artifact(
        &self,
        request: Request<Streaming<v1::PushArtifactRequest>>,
    ) -> Result<Response<v1::PushArtifactResponse>, Status> {
        let (caller, incoming) = received(request)?;
        push::push(&self.context, &caller, incoming).await.map(Response::new)
    }

    type PullArtifactStream = Answers<v1::PullArtifactResponse>;

    async fn pull_artifact(
        &self,
        request: Request<v1::PullArtifactRequest>,
    ) -> Result<Response<Self::PullArtifactStream>, Status> {
        let (caller, request) = received(request)?;
        pull::pull(&self.context, &caller, request).await.map(Response::new)
    }

    async fn get_artifact(
        &self,
        request: Request<v1::GetArtifactRequest>,
    ) -> Result<Response<v1::GetArtifactResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let named = reference("reference", &request.reference).map_err(invalid)?;
        let digest = find(&self.context, &project, &named).await?;
        let artifact = whole(&self.context, &project, digest).await?;
        Ok(Response::new(v1::GetArtifactResponse { artifact: Some(artifact) }))
    }

    async fn list_artifacts(
        &self,
        request: Request<v1::ListArtifactsRequest>,
    ) -> Result<Response<v1::ListArtifactsResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let mut filter = Filter {
            tag_name: Some(request.tag_name).filter(|name| !name.is_empty()),
            order: match known(request.order_by, "order_by")? {
                v1::ArtifactOrder::Unspecified | v1::ArtifactOrder::CommitTimeDesc => Order::Newest,
                v1::ArtifactOrder::CommitTimeAsc => Order::Oldest,
            },
            ..Filter::default()
        };
        for kind in &request.kinds {
            filter.kinds.push(known::<ArtifactKind>(*kind, "kinds")?.word());
        }
        if filter.kinds.is_empty() {
            filter.without_kinds = vec![ArtifactKind::Checkpoint.word()];
        }
        if !request.job_id.is_empty() {
            filter.job = Some(field::<JobId>("job_id", &request.job_id).map_err(invalid)?);
        }
        let rows = page_size(request.page_size, 100, 1000)?;
        let page = self.context.store.artifacts(&project, &filter, page_token(&request.page_token), rows).await;
        let page = page.map_err(status::store)?;
        Ok(Response::new(v1::ListArtifactsResponse {
            artifacts: page.items.iter().map(view::artifact).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn tag_artifact(
        &self,
        request: Request<v1::TagArtifactRequest>,
    ) -> Result<Response<v1::TagArtifactResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        caller.concerns(&request.tag);
        let mut faults = Faults::new();
        let tag = faults.field(field::<Tag>("tag", &request.tag));
        let named = faults.field(reference("reference", &request.reference));
        let expected = request.expected_digest.as_deref();
        let expected = expected.and_then(|text| faults.field(field::<Digest>("expected_digest", text)));
        let (tag, named) = faults.finish(tag.zip(named)).map_err(|faults| invalid_argument(&faults))?;
        let digest = find(&self.context, &project, &named).await?;
        let previous = self.tagged(&project, &tag).await?;
        let write = Write::Tag { project: project.clone(), tag, digest, expected, job: None, now: Clock::utc() };
        self.context.front.write_for(&caller, vec![write]).await?;
        let artifact = whole(&self.context, &project, digest).await?;
        let previous_digest = previous.map(|digest| digest.to_string()).unwrap_or_default();
        Ok(Response::new(v1::TagArtifactResponse { artifact: Some(artifact), previous_digest }))
    }

    async fn untag_artifact(
        &self,
        request: Request<v1::UntagArtifactRequest>,
    ) -> Result<Response<v1::UntagArtifactResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let tag = field::<Tag>("tag", &request.tag).map_err(invalid)?;
        caller.concerns(&tag);
        let previous = self.tagged(&project, &tag).await?;
        match self.context.store.untag(&project, &tag, Clock::utc(), caller.record().as_deref()).await {
            Ok(_) => caller.is_recorded(),
            Err(attune_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(status::store(error)),
        }
        let previous_digest = previous.map(|digest| digest.to_string()).unwrap_or_default();
        Ok(Response::new(v1::UntagArtifactResponse { previous_digest }))
    }

    async fn get_lineage(
        &self,
        request: Request<v1::GetLineageRequest>,
    ) -> Result<Response<v1::GetLineageResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let named = reference("reference", &request.reference).map_err(invalid)?;
        let depth = match request.depth {
            0 => DEPTH_MAX,
            depth if depth <= DEPTH_MAX => depth,
            depth => return Err(invalid(Fault::new("depth", format!("is {depth}; expected 1 ..= {DEPTH_MAX}")))),
        };
        let directions: &[Direction] = match known(request.direction, "direction")? {
            v1::LineageDirection::Unspecified | v1::LineageDirection::Ancestors => &[Direction::Causes],
            v1::LineageDirection::Descendants => &[Direction::Effects],
            v1::LineageDirection::Both => &[Direction::Causes, Direction::Effects],
        };
        let root = find(&self.context, &project, &named).await?;
        let (mut edges, mut truncated, mut on_the_way) = (Vec::new(), false, vec![root]);
        for direction in directions {
            let lineage = self.context.store.lineage(&project, root, *direction, depth).await;
            let lineage = lineage.map_err(status::store)?;
            truncated |= lineage.is_cut;
            for edge in lineage.edges {
                for digest in [edge.cause, edge.artifact] {
                    if !on_the_way.contains(&digest) {
                        on_the_way.push(digest);
                    }
                }
                edges.push(v1::LineageEdge {
                    input: edge.cause.to_string(),
                    output: edge.artifact.to_string(),
                    role: edge.role,
                });
            }
        }
        let mut artifacts = Vec::with_capacity(on_the_way.len());
        for digest in on_the_way {
            artifacts.extend(self.visible(&project, digest).await?);
        }
        Ok(Response::new(v1::GetLineageResponse { root: root.to_string(), artifacts, edges, truncated }))
    }

    async fn delete_artifact(
        &self,
        request: Request<v1::DeleteArtifactRequest>,
    ) -> Result<Response<v1::DeleteArtifactResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let digest = field::<Digest>("digest", &request.digest).map_err(invalid)?;
        caller.concerns(&digest);
        match self.context.store.artifact(&project, digest).await {
            Ok(_) => {}
            Err(attune_store::Error::NotFound { .. }) => {
                return Ok(Response::new(v1::DeleteArtifactResponse { deleted: false }));
            }
            Err(error) => return Err(status::store(error)),
        }
        let deleted = self.context.front.delete(&caller, project.clone(), digest).await?;
        sweep::bytes(&self.context, &project, &[digest], &deleted.orphans).await;
        Ok(Response::new(v1::DeleteArtifactResponse { deleted: true }))
    }
}
