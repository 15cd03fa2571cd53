//! What every client may rely on: methods, health, reflection, fields of the future.

use attune_proto::error::Class;
use attune_proto::v1;
use bytes::{Buf, BufMut};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::server::Server;

async fn channel(server: &Server) -> tonic::transport::Channel {
    server.client().await;
    tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn methods_are_listed_page_by_page_and_shown_with_their_schemas() {
    let server = Server::start();
    let mut methods = server.client().await.methods();
    let all = methods.list_methods(v1::ListMethodsRequest::default()).await.unwrap().into_inner().methods;
    assert!(all.len() > 5 && all.iter().all(|method| method.schema.is_none() && !method.summary.is_empty()));
    let mut paged = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListMethodsRequest { page_size: 3, page_token, ..Default::default() };
        let page = methods.list_methods(request).await.unwrap().into_inner();
        paged.extend(page.methods);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(paged, all);
    let point = v1::ExtensionPoint::Optimizer as i32;
    let request = v1::ListMethodsRequest { point, ..Default::default() };
    let optimizers = methods.list_methods(request).await.unwrap().into_inner().methods;
    assert!(optimizers.iter().any(|method| method.name == "adamw") && optimizers.iter().all(|m| m.point == point));

    let names = |listed: v1::ListMethodsResponse| listed.methods.into_iter().map(|m| m.name).collect::<Vec<_>>();
    let request = v1::ListMethodsRequest {
        category: v1::MethodCategory::Prompt as i32,
        text: "PREFIX".to_owned(),
        ..Default::default()
    };
    let found = names(methods.list_methods(request).await.unwrap().into_inner());
    assert!(found.contains(&"prefix-tuning".to_owned()) && found.len() < 5, "{found:?}");
    let request = v1::ListMethodsRequest { site: v1::SiteKind::Mlp as i32, merges: true, ..Default::default() };
    let found = names(methods.list_methods(request).await.unwrap().into_inner());
    assert!(!found.contains(&"bottleneck".to_owned()) && !found.contains(&"lora".to_owned()), "{found:?}");
    let unknown = v1::ListMethodsRequest { category: 99, ..Default::default() };
    assert_eq!(Class::of(&methods.list_methods(unknown).await.unwrap_err()), Class::Invalid);

    let get = |method: &str| v1::GetMethodRequest { project: String::new(), method: method.to_owned() };
    let lora = methods.get_method(get("lora")).await.unwrap().into_inner().method.unwrap();
    assert!(lora.schema.unwrap().fields.contains_key("properties"));
    assert!(lora.defaults.unwrap().fields.contains_key("rank"));
    let unknown = methods.get_method(get("lorra")).await.unwrap_err();
    assert_eq!(Class::of(&unknown), Class::NotFound);
    assert!(unknown.message().contains("did you mean \"lora\""), "{unknown:?}");
}

#[tokio::test]
async fn health_and_reflection_answer_on_the_same_port() {
    let server = Server::start();
    let channel = channel(&server).await;
    for service in ["", "attune.v1.JobService", "attune.v1.WorkerService", "attune.v1.ArtifactService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for service in ["attune.v1.JobService", "attune.v1.MethodService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{names:?}");
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_as_such() {
    let server = Server::start();
    let client = server.client().await;
    let spec = v1::JobSpec { name: "a".repeat(attune_proto::MESSAGE_BYTES_MAX), ..Default::default() };
    let request = v1::CreateJobRequest { request_id: "r1".to_owned(), spec: Some(spec), ..Default::default() };
    let refused = client.jobs().create_job(request).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::TooLarge, "{refused:?}");
    // The connection is none the worse for it.
    client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap();
}

/// Sends and gives back bytes as they are.
#[derive(Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}

#[tokio::test]
async fn fields_of_a_newer_client_are_tolerated() {
    let server = Server::start();
    let mut grpc = tonic::client::Grpc::new(channel(&server).await);
    grpc.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/attune.v1.JobService/ListJobs");
    // Field 5 (`page_size`) is 7; field 1000, which nobody knows, is the text "new".
    let mut request = vec![0x28, 7];
    request.extend([0xc2, 0x3e, 3]);
    request.extend(b"new");
    let answer = grpc.unary(tonic::Request::new(request), path, Raw).await.unwrap();
    assert!(answer.into_inner().is_empty());
}
