//! Every call of the contract, made by everybody: who is answered, who is refused, and in which words (A1, A2, A3, A6; T23).

use std::collections::BTreeSet;

use attune_artifacts::{Causes, Kind};
use attune_proto::v1::{self, TokenRole};
use attune_proto::{Client, Secret};
use attune_spec::id::Project;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::contract::Raw;
use crate::fixtures::{bundle, create, inputs, job, push};
use crate::server::Server;
use crate::worker::register;

/// A project, or all of them, and a role.
type Identity = (Option<&'static str>, TokenRole);

/// Everybody: nobody, three roles of a project, three of another one, a worker.
const IDENTITIES: [(&str, Option<Identity>); 8] = [
    ("nobody", None),
    ("viewer", Some((Some("a"), TokenRole::Viewer))),
    ("submitter", Some((Some("a"), TokenRole::Submitter))),
    ("admin", Some((Some("a"), TokenRole::Admin))),
    ("foreign viewer", Some((Some("b"), TokenRole::Viewer))),
    ("foreign submitter", Some((Some("b"), TokenRole::Submitter))),
    ("foreign admin", Some((Some("b"), TokenRole::Admin))),
    ("worker", Some((None, TokenRole::Worker))),
];

/// Things that calls can be about.
#[derive(Debug, Clone)]
pub(crate) struct Things {
    pub(crate) job: String,
    digest: String,
    tag: String,
    token: String,
    manifest: Vec<u8>,
}

/// A call, and what is expected of it.
pub(crate) struct Row {
    pub(crate) rpc: &'static str,
    /// The lowest role that is answered.
    lowest: TokenRole,
    /// What is answered about things that are there.
    there: Code,
    /// What is answered about things that are not.
    absent: Code,
    /// What a worker that holds nothing is answered.
    worker: Code,
    /// The message.
    pub(crate) make: fn(&str, &Things) -> Vec<u8>,
}

fn bytes(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

macro_rules! about_job {
    ($request:ident) => {
        |project, things| {
            let (project, job_id) = (project.to_owned(), things.job.clone());
            bytes(&v1::$request { project, job_id, ..Default::default() })
        }
    };
}

macro_rules! about_project {
    ($request:ident) => {
        |project, _| bytes(&v1::$request { project: project.to_owned(), ..Default::default() })
    };
}

macro_rules! about_artifact {
    ($request:ident) => {
        |project, things| {
            let (project, reference) = (project.to_owned(), things.digest.clone());
            bytes(&v1::$request { project, reference, ..Default::default() })
        }
    };
}

const DENIED: Code = Code::PermissionDenied;

fn row(rpc: &'static str, lowest: TokenRole, there: Code, absent: Code, make: fn(&str, &Things) -> Vec<u8>) -> Row {
    Row { rpc, lowest, there, absent, worker: DENIED, make }
}

#[allow(clippy::needless_update, reason = "some of the messages that are made alike have more fields")]
pub(crate) fn table() -> Vec<Row> {
    use Code::{FailedPrecondition, InvalidArgument, NotFound, Ok};
    use TokenRole::{Admin, Submitter, Viewer};
    let validate = |project: &str, _: &Things| {
        let spec = Some(crate::fixtures::message(&job()));
        let request_id = "r".to_owned();
        bytes(&v1::CreateJobRequest { project: project.to_owned(), request_id, spec, validate_only: true })
    };
    let retry = |project: &str, things: &Things| {
        let (project, job_id, request_id) = (project.to_owned(), things.job.clone(), things.job.clone());
        bytes(&v1::RetryJobRequest { project, job_id, request_id })
    };
    let missing = |project: &str, things: &Things| {
        bytes(&v1::QueryMissingBlobsRequest { project: project.to_owned(), digests: vec![things.digest.clone()] })
    };
    let header = |project: &str, things: &Things| {
        let manifest = things.manifest.clone().into();
        let header = v1::PushHeader { project: project.to_owned(), manifest, ..Default::default() };
        bytes(&v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Header(header)) })
    };
    let tag = |project: &str, things: &Things| {
        let (project, tag, reference) = (project.to_owned(), "moved".to_owned(), things.digest.clone());
        bytes(&v1::TagArtifactRequest { project, tag, reference, expected_digest: None })
    };
    let untag = |project: &str, things: &Things| {
        bytes(&v1::UntagArtifactRequest { project: project.to_owned(), tag: things.tag.clone() })
    };
    let delete = |project: &str, things: &Things| {
        bytes(&v1::DeleteArtifactRequest { project: project.to_owned(), digest: things.digest.clone() })
    };
    let method = |project: &str, _: &Things| {
        bytes(&v1::GetMethodRequest { project: project.to_owned(), method: "lora".to_owned() })
    };
    let give_out = |project: &str, _: &Things| {
        let (project, name, role) = (project.to_owned(), "new".to_owned(), Viewer as i32);
        bytes(&v1::CreateTokenRequest { project, name, role, ..Default::default() })
    };
    let revoke = |project: &str, things: &Things| {
        bytes(&v1::RevokeTokenRequest { project: project.to_owned(), token_id: things.token.clone() })
    };
    let connect = |_: &str, _: &Things| {
        let said = v1::connect_request::Message::Register(register("w-matrix"));
        bytes(&v1::ConnectRequest { message: Some(said) })
    };
    let worker = |worker, row| Row { worker, ..row };
    vec![
        worker(NotFound, row("ArtifactService/QueryMissingBlobs", Submitter, Ok, Ok, missing)),
        // The bytes of another project's artifact are not this one's (A29).
        row("ArtifactService/PushArtifact", Submitter, Ok, InvalidArgument, header),
        worker(
            NotFound,
            row("ArtifactService/PullArtifact", Viewer, Ok, NotFound, about_artifact!(PullArtifactRequest)),
        ),
        row("ArtifactService/GetArtifact", Viewer, Ok, NotFound, about_artifact!(GetArtifactRequest)),
        row("ArtifactService/ListArtifacts", Viewer, Ok, Ok, about_project!(ListArtifactsRequest)),
        row("ArtifactService/TagArtifact", Submitter, Ok, NotFound, tag),
        row("ArtifactService/UntagArtifact", Submitter, Ok, Ok, untag),
        row("ArtifactService/GetLineage", Viewer, Ok, NotFound, about_artifact!(GetLineageRequest)),
        row("ArtifactService/DeleteArtifact", Admin, Ok, Ok, delete),
        row("AuditService/ListAuditRecords", Admin, Ok, Ok, about_project!(ListAuditRecordsRequest)),
        row("FleetService/ListWorkers", Viewer, Ok, Ok, about_project!(ListWorkersRequest)),
        // Workers and limits are for admins of all projects.
        row("FleetService/CordonWorker", TokenRole::Unspecified, Ok, Ok, |_, _| {
            bytes(&v1::CordonWorkerRequest { worker_id: "w-matrix".to_owned(), drain: true })
        }),
        row("FleetService/UncordonWorker", TokenRole::Unspecified, Ok, Ok, |_, _| {
            bytes(&v1::UncordonWorkerRequest { worker_id: "w-matrix".to_owned() })
        }),
        row("FleetService/ListProjects", Viewer, Ok, Ok, about_project!(ListProjectsRequest)),
        row("FleetService/GetProject", Viewer, Ok, Ok, about_project!(GetProjectRequest)),
        row("FleetService/SetProjectPolicy", TokenRole::Unspecified, Ok, Ok, |project, _| {
            bytes(&v1::SetProjectPolicyRequest {
                project: project.to_owned(),
                policy: Some(v1::ProjectPolicy::default()),
            })
        }),
        row("JobService/CreateJob", Submitter, Ok, Ok, validate),
        row("JobService/GetJob", Viewer, Ok, NotFound, about_job!(GetJobRequest)),
        row("JobService/ListJobs", Viewer, Ok, Ok, about_project!(ListJobsRequest)),
        row("JobService/CancelJob", Submitter, Ok, NotFound, about_job!(CancelJobRequest)),
        row("JobService/PauseJob", Submitter, FailedPrecondition, NotFound, about_job!(PauseJobRequest)),
        row("JobService/ResumeJob", Submitter, FailedPrecondition, NotFound, about_job!(ResumeJobRequest)),
        row("JobService/RetryJob", Submitter, FailedPrecondition, NotFound, retry),
        row("JobService/WatchJob", Viewer, Ok, NotFound, about_job!(WatchJobRequest)),
        row("JobService/ListMetrics", Viewer, Ok, NotFound, about_job!(ListMetricsRequest)),
        row("JobService/StreamMetrics", Viewer, Ok, NotFound, about_job!(StreamMetricsRequest)),
        row("MethodService/ListMethods", Viewer, Ok, Ok, about_project!(ListMethodsRequest)),
        row("MethodService/GetMethod", Viewer, Ok, Ok, method),
        row("TokenService/CreateToken", Admin, Ok, Ok, give_out),
        row("TokenService/ListTokens", Admin, Ok, Ok, about_project!(ListTokensRequest)),
        row("TokenService/RevokeToken", Admin, Ok, NotFound, revoke),
        worker(Ok, row("TokenService/GetCaller", Viewer, Ok, Ok, about_project!(GetCallerRequest))),
        // No user connects as a worker (A3).
        worker(Ok, row("WorkerService/Connect", TokenRole::Unspecified, Ok, Ok, connect)),
    ]
}

impl Row {
    fn allows(&self, role: TokenRole) -> bool {
        self.lowest != TokenRole::Unspecified && role as i32 >= self.lowest as i32
    }
}

/// Makes a call with bytes; what comes first of its answer.
pub(crate) async fn call(
    channel: &Channel,
    secret: Option<&Secret>,
    rpc: &str,
    message: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let mut request = Request::new(futures::stream::iter([message]));
    if let Some(secret) = secret {
        request.metadata_mut().insert("authorization", format!("Bearer {}", secret.expose()).parse().unwrap());
    }
    let path = format!("/attune.v1.{rpc}").parse().unwrap();
    let mut answer = grpc.streaming(request, path, Raw).await?.into_inner();
    // A stream that has nothing to say yet was answered all the same.
    let first = tokio::time::timeout(std::time::Duration::from_millis(150), answer.message()).await;
    first.map_or(Ok(Vec::new()), |first| first.map(Option::unwrap_or_default))
}

fn code(answer: &Result<Vec<u8>, Status>) -> Code {
    answer.as_ref().map_or_else(Status::code, |_| Code::Ok)
}

/// An answer with the ids that were asked for made one: what is left must not tell one id from another.
fn blurred(answer: &Result<Vec<u8>, Status>, things: &Things) -> (Code, String) {
    let said = match answer {
        Ok(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Err(status) => status.message().to_owned(),
    };
    let ids = [&things.job, &things.tag, &things.token];
    let said = ids.into_iter().fold(said, |text, id| text.replace(id.as_str(), "ID"));
    // A digest is always as long as another.
    let mut pieces = said.split("blake3:");
    let first = pieces.next().unwrap_or_default().to_owned();
    (code(answer), pieces.fold(first, |text, piece| text + "DIGEST" + piece.get(64..).unwrap_or_default()))
}

/// New things in the project of a client.
pub(crate) async fn things(server: &Server, admin: &Client, client: &Client, number: usize) -> Things {
    let made = create(client, &format!("r{number}"), &job()).await.unwrap();
    let (content, tag) = (format!("content {number}"), format!("t{number}"));
    let artifact = bundle(Kind::Report, &[("a", content.as_bytes())], Causes::default());
    push(client, &artifact, None, &[&tag]).await.unwrap();
    let untag = v1::UntagArtifactRequest { project: client.project().to_string(), tag: tag.clone() };
    client.artifacts().untag_artifact(untag).await.unwrap();
    let (token, _) = server.token(admin, Some(client.project().as_str()), TokenRole::Viewer, "victim").await;
    Things {
        job: made.job_id,
        digest: artifact.0.digest().to_string(),
        tag,
        token,
        manifest: artifact.0.bytes().to_vec(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_by_everybody_about_ones_own_and_others_things() {
    let server = Server::guarded(boundless);
    everybody(&server, &server.url()).await;
}

/// Lets everybody call as often as they like.
pub(crate) fn boundless(config: &mut attune_scheduler::Config) {
    config.limits.calls.calls_per_second = 100_000;
    config.limits.calls.calls_at_once = 100_000;
    config.limits.calls.failures_at_once = 100_000;
}

/// Makes every call by everybody at `url`, about things that are made at `server`.
pub(crate) async fn everybody(server: &Server, url: &str) {
    let admin = server.admin().await;
    let of_a = admin.for_project(Project::new("a").unwrap());
    for project in ["a", "b"] {
        inputs(&admin.for_project(Project::new(project).unwrap())).await;
    }
    let mut secrets = Vec::new();
    for (_, identity) in IDENTITIES {
        secrets.push(match identity {
            Some((project, role)) => Some(server.token(&admin, project, role, "somebody").await.1),
            None => None,
        });
    }
    let channel = tonic::transport::Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
    let absent = Things {
        job: "j-0000000000000000zz".to_owned(),
        digest: format!("blake3:{}", "0".repeat(64)),
        tag: "nothing".to_owned(),
        token: "zzzzzzzzzzzzzzzz".to_owned(),
        manifest: bundle(Kind::Report, &[("a", b"nowhere")], Causes::default()).0.bytes().to_vec(),
    };
    let (rows, wrong, mut made) = (table(), std::cell::RefCell::new(Vec::new()), 0);
    let mut there = absent.clone();
    for row in &rows {
        for ((name, identity), secret) in IDENTITIES.iter().zip(&secrets) {
            // What a call may have changed is made anew for the next one.
            if matches!(identity, Some((Some("a"), role)) if row.allows(*role)) || made == 0 {
                made += 1;
                there = things(server, &admin, &of_a, made).await;
            }
            let expect = |asked: &str, answer: &Result<Vec<u8>, Status>, expected: Code| {
                if code(answer) != expected {
                    wrong
                        .borrow_mut()
                        .push(format!("{} by {name}, {asked}: expected {expected:?}, got {answer:?}", row.rpc));
                }
            };
            let own = (row.make)("", &there);
            let named = (row.make)("a", &there);
            let nowhere = (row.make)("", &absent);
            let elsewhere = (row.make)("nowhere", &absent);
            let ask = async |message: Vec<u8>| call(&channel, secret.as_ref(), row.rpc, message).await;
            match identity {
                None => {
                    for message in [own, named, nowhere] {
                        expect("anything", &ask(message).await, Code::Unauthenticated);
                    }
                }
                Some((None, _)) => expect("things of a", &ask(named).await, row.worker),
                Some((Some(project), role)) if !row.allows(*role) => {
                    for message in [own, named, nowhere] {
                        expect(&format!("of {project}"), &ask(message).await, DENIED);
                    }
                }
                // Absent first: what is there may be gone after the call.
                Some((Some("a"), _)) => {
                    expect("what is not there", &ask(nowhere).await, row.absent);
                    expect("the project by its name", &ask(named).await, row.there);
                    expect("another project", &ask(elsewhere).await, Code::NotFound);
                }
                // Ids of others are like none, and so are their projects (A2, A6).
                Some((Some(_), _)) => {
                    let is_about_ids = own != nowhere;
                    let (foreign, none) = (ask(own).await, ask(nowhere).await);
                    expect("ids of another project", &foreign, row.absent);
                    let (foreign, none) = (blurred(&foreign, &there), blurred(&none, &absent));
                    if is_about_ids && foreign != none {
                        wrong.borrow_mut().push(format!("{} tells {foreign:?} from {none:?}", row.rpc));
                    }
                    let (named, elsewhere) = (ask(named).await, ask(elsewhere).await);
                    expect("another project by its name", &named, Code::NotFound);
                    let words =
                        |answer: Result<Vec<u8>, Status>| answer.unwrap_err().message().replace("\"a\"", "\"nowhere\"");
                    assert_eq!(words(named), words(elsewhere), "{}", row.rpc);
                }
            }
        }
    }
    let wrong = wrong.into_inner();
    assert!(wrong.is_empty(), "{} wrong answers:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_matrix_has_every_call_of_the_contract() {
    let set = FileDescriptorSet::decode(attune_proto::FILE_DESCRIPTOR_SET).unwrap();
    let services = set.file.iter().filter(|file| file.package() == "attune.v1").flat_map(|file| &file.service);
    let calls: BTreeSet<String> = services
        .flat_map(|service| service.method.iter().map(|method| format!("{}/{}", service.name(), method.name())))
        .collect();
    let rows: BTreeSet<String> = table().iter().map(|row| row.rpc.to_owned()).collect();
    assert_eq!(rows, calls);
    assert_eq!(table().len(), calls.len());
}
