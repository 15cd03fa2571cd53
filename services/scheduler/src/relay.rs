//! Calls that only the scheduler that leads answers are passed on to it as they are: bytes, credential and deadline. One hop, and no
//! more: what was passed on to one that does not lead is refused.

use std::sync::Arc;

use attune_proto::v1::job_service_client::JobServiceClient;
use attune_proto::{Class, MESSAGE_BYTES_MAX, v1};
use futures::FutureExt as _;
use tonic::body::Body;
use tonic::codegen::http::{Extensions, HeaderValue, Request, Response};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Status, transport};
use tower::{Service as _, ServiceExt as _};

use crate::guard::Cut;
use crate::replica::{Lead, PEER, Replica, WORD};

/// Passes a call from `peer` on.
pub(crate) async fn pass_on(
    replica: &Arc<Replica>,
    lead: Arc<Lead>,
    request: Request<Body>,
    peer: &str,
) -> Result<Response<Body>, Status> {
    let (mut parts, body) = request.into_parts();
    // What was noted of the connection that the call came by is not about the next one.
    parts.extensions = Extensions::new();
    for (name, value) in [(WORD, lead.word()), (PEER, peer)] {
        parts.headers.insert(name, HeaderValue::from_str(value).unwrap_or(HeaderValue::from_static("")));
    }
    let away = gone(&lead);
    let mut channel: Channel = lead.client.channel();
    let changed = Arc::clone(replica).has_changed_from(Arc::clone(&lead));
    let asked = async {
        let channel = channel.ready().await?;
        channel.call(Request::from_parts(parts, body)).await
    };
    let answer: Result<Response<Body>, transport::Error> = tokio::select! {
        answer = asked => answer,
        // It may be stopped, and its connection stand.
        () = changed => return Err(away),
    };
    let answer = answer.map_err(|error| {
        let deepest = std::iter::successors(Some(&error as &dyn std::error::Error), |at| at.source()).last();
        let why = deepest.map(ToString::to_string).unwrap_or_default();
        Class::Unavailable.status(format!("{}: {why}", away.message()))
    })?;
    let changed = Arc::clone(replica).has_changed_from(lead).map({
        let away = away.clone();
        |()| away
    });
    Ok(answer.map(|body| Body::new(Cut::new(body, changed.boxed()).or_broken(away))))
}

/// What the one that leads says of a job; nothing if it cannot be asked. The caller is who asks: `metadata` is that of its call.
pub(crate) async fn job(
    lead: &Lead,
    metadata: &MetadataMap,
    peer: &str,
    asked: v1::GetJobRequest,
) -> Option<v1::GetJobResponse> {
    let mut request = tonic::Request::new(asked);
    *request.metadata_mut() = metadata.clone();
    for (name, value) in [(WORD, lead.word()), (PEER, peer)] {
        request.metadata_mut().insert(name, MetadataValue::try_from(value).ok()?);
    }
    let mut jobs = JobServiceClient::new(lead.client.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    match jobs.get_job(request).await {
        Ok(answer) => Some(answer.into_inner()),
        Err(error) => {
            tracing::debug!(%error, url = lead.url(), "the scheduler that leads does not say what a job waits for");
            None
        }
    }
}

fn gone(lead: &Lead) -> Status {
    let message = format!("the scheduler that led last, at {}, does not answer; try again in a moment", lead.url());
    Class::Unavailable.status(message)
}
