//! A job on several workers: who may speak for its gang, and whose reports count.

use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, FailureCause, JobState};
use serde_json::json;

use crate::fixtures::{create, inputs, job, until};
use crate::server::Server;
use crate::worker::{Worker, attempt};

/// A gang of two with its job, the leader first, and what each was offered.
struct Gang {
    job_id: String,
    members: [Worker; 2],
    offers: [v1::LeaseOffer; 2],
}

async fn gang(client: &attune_proto::Client) -> Gang {
    let (one, two) = (Worker::connect(client, "w-1").await, Worker::connect(client, "w-2").await);
    let mut spec = job();
    spec["resources"] = json!({"workers": 2});
    let job_id = create(client, "r1", &spec).await.unwrap().job_id;
    let mut members = [one, two];
    let mut offers = [members[0].offer().await, members[1].offer().await];
    if offers[0].rank != 0 {
        members.reverse();
        offers.reverse();
    }
    Gang { job_id, members, offers }
}

fn peer(cohort_id: u64, rank: u32, address: &str) -> v1::GangPeer {
    v1::GangPeer { cohort_id, rank, address: address.to_owned(), token: "secret".to_owned(), wants_answer: true }
}

fn heard(message: &Message) -> Option<v1::GangPeer> {
    match message {
        Message::GangPeer(peer) => Some(peer.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn a_word_of_a_gang_reaches_its_other_members_and_only_from_who_has_the_rank() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let Gang { members: [mut leader, mut follower], offers: [first, second], .. } = gang(&client).await;
    assert_eq!((first.rank, second.rank), (0, 1));
    assert_eq!(first.cohort_id, second.cohort_id);
    assert_eq!(first.gang, [leader.id.as_str(), follower.id.as_str()]);
    assert_eq!(second.gang, first.gang);
    let cohort = first.cohort_id;

    let mut stranger = Worker::connect(&client, "w-3").await;
    for rank in [0, 1] {
        stranger.say(Said::GangPeer(peer(cohort, rank, "10.0.0.3:1"))).await;
    }
    leader.say(Said::GangPeer(peer(cohort, 1, "10.0.0.1:1"))).await;
    leader.say(Said::GangPeer(peer(cohort + 1, 0, "10.0.0.1:2"))).await;
    // What a connection says is handled in its order: with the answer, all of the above has been.
    stranger.beat(&[]).await;
    let truth = peer(cohort, 0, "10.0.0.1:3");
    leader.say(Said::GangPeer(truth.clone())).await;
    assert_eq!(follower.expect(heard).await, truth, "the first word that the follower hears is the right one");

    let answer = peer(cohort, 1, "10.0.0.2:1");
    follower.say(Said::GangPeer(answer.clone())).await;
    assert_eq!(leader.expect(heard).await, answer, "and the leader hears nothing of its own or of a stranger");
    for worker in [&mut leader, &mut follower, &mut stranger] {
        assert!(!worker.has(|message| heard(message).is_some()).await, "{} hears too much", worker.id);
    }
}

#[tokio::test]
async fn a_followers_first_report_counts_although_the_leader_has_reported_more() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let Gang { job_id, members: [mut leader, mut follower], offers: [first, second] } = gang(&client).await;
    let at = attempt(&second);
    assert_eq!(attempt(&first), at);
    leader.begin(&at).await;
    until(&client, &job_id, JobState::Running).await;

    follower.fail(&at, FailureCause::DataFault, "2 rows cannot be used").await;
    leader.release(first.cohort_id).await;
    follower.release(second.cohort_id).await;
    let job = until(&client, &job_id, JobState::Failed).await;
    assert!(format!("{job:?}").contains("2 rows cannot be used"), "{job:?}");
}
