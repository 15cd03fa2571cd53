//! Jobs that make way, workers that are drained, statistics that one job keeps for another.

use attune_proto::v1::JobState;

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};

/// Long enough to be stopped in the middle, with checkpoints on the way.
fn job(base: &str) -> Vec<String> {
    let fixed = ["tune.steps=160", "tune.checkpoint.every_steps=40"];
    SMALL.into_iter().chain(fixed).map(str::to_owned).chain([format!("base={base}")]).collect()
}

fn set<'a>(job: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    job.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

/// A job that makes way twice, for one that is more urgent and for the maintenance of its worker, ends with the bits of one that was left
/// alone.
#[tokio::test]
async fn who_makes_way_ends_with_the_bits_of_an_undisturbed_run() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let (file, job) = (cluster.path("world/chat.yaml"), job(&base));
    let undisturbed = cluster.submit(&file, &set(&job, &[]));
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set(&job, &[]));
    cluster.wait(&id, "run", |job| job.state() == JobState::Running && job.progress.is_some()).await;
    let urgent = cluster.submit(&file, &set(&job, &["priority=5", "tune.steps=3", "name=urgent"]));
    let waits = cluster.ends(&urgent, JobState::Succeeded).await;
    assert_eq!(waits.epoch, 1);
    let again = cluster.wait(&id, "second attempt", |job| job.epoch == 2 && job.progress.is_some()).await;
    assert!(!again.checkpoint.is_empty() && again.failed_attempts == 0, "{again:?}");

    let said = cluster.json(["projects", "set", "default", "--weight", "2", "--max-cpu", "3"]);
    assert_eq!((&said["weight"], &said["cpu"]["max"], &said["cpu"]["used"]), (&2.into(), &3.into(), &1.into()));
    assert_eq!(cluster.json(["projects", "list"])[0], cluster.json(["projects", "get", "default"]));
    for wrong in [vec!["projects", "set", "Bad Name"], vec!["workers", "drain", "nobody"]] {
        let refused = cluster.run(&wrong);
        assert!(!refused.status.success() && !refused.stderr.is_empty(), "{wrong:?}: {refused:?}");
        assert!(!String::from_utf8_lossy(&refused.stderr).contains("panicked"), "{refused:?}");
    }
    let workers = cluster.json(["workers", "list"]);
    let worker = workers[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(workers[0]["jobs"][0], format!("projects/default/jobs/{id}"));
    let drained = cluster.run(["workers", "drain", &worker]);
    assert!(drained.status.success(), "{drained:?}");
    let queued = cluster.wait(&id, "free worker", |job| job.state() == JobState::Queued).await;
    assert!(queued.message.contains("no worker is connected that takes new work"), "{}", queued.message);
    assert_eq!(cluster.json(["workers", "list"])[0]["state"], "cordoned");
    let back = cluster.run(["workers", "uncordon", &worker]);
    assert!(back.status.success(), "{back:?}");
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, outputs(&ended)), (3, expected));
}

/// What one job measured of the base serves the next.
#[tokio::test]
async fn statistics_are_an_artifact_that_other_jobs_name() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let (file, job) = (cluster.path("world/chat.yaml"), job(&base));
    let start = "tune.adapter={method: lora, rank: 2, init: {method: eva, examples: 8}}";
    let first = cluster.submit(&file, &set(&job, &[start, "tune.steps=2", "outputs.statistics=true"]));
    let made = outputs(&cluster.ends(&first, JobState::Succeeded).await);
    let statistics = &made["statistics"];
    let listed = cluster.json(["artifacts", "list", "--kind", "statistics"]);
    assert_eq!((listed.as_array().map(Vec::len), &listed[0]["digest"]), (Some(1), &statistics.as_str().into()));

    let reading = format!("tune.statistics={statistics}");
    let budget = "tune.budget={method: explained-variance, examples: 8}";
    let second = cluster.submit(&file, &set(&job, &[start, budget, "tune.steps=2", &reading]));
    let second = outputs(&cluster.ends(&second, JobState::Succeeded).await);
    assert!(!second.contains_key("statistics"));
    let lineage = cluster.json(["artifacts", "lineage", &second["adapter"]]);
    assert!(lineage.to_string().contains(statistics.as_str()), "{lineage}");

    let wrong = cluster.submit(&file, &set(&job, &[start, "data.max_length=60", &reading]));
    let failed = cluster.ends(&wrong, JobState::Failed).await;
    assert!(failed.message.contains("`tune.statistics` is of data"), "{}", failed.message);
}

/// F43: whatever comes in between, each time the job gets ahead by a checkpoint before it makes way again.
#[tokio::test]
async fn a_storm_of_urgent_jobs_lets_the_others_get_ahead() {
    const URGENT: usize = 8;
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let file = cluster.path("world/chat.yaml");
    let mut job = job(&base);
    job.extend(["tune.steps=400", "tune.checkpoint.every_steps=10"].map(str::to_owned));
    let undisturbed = cluster.submit(&file, &set(&job, &[]));
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set(&job, &[]));
    cluster.wait(&id, "run", |job| job.state() == JobState::Running).await;
    let mut urgent: Vec<String> = Vec::new();
    let (mut checkpoints, mut epoch) = (Vec::new(), 1);
    let ended = loop {
        let now = cluster.wait(&id, "answer", |_| true).await;
        if now.epoch > epoch {
            epoch = now.epoch;
            checkpoints.push(now.checkpoint.clone());
        }
        if now.end_time.is_some() {
            break now;
        }
        // There is always one that wants the device.
        let is_over = match urgent.last() {
            Some(last) => cluster.wait(last, "answer", |_| true).await.end_time.is_some(),
            None => true,
        };
        if is_over && urgent.len() < URGENT {
            let name = format!("name=urgent-{}", urgent.len());
            urgent.push(cluster.submit(&file, &set(&job, &["priority=5", "tune.steps=2", &name])));
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert_eq!((ended.state(), ended.failed_attempts), (JobState::Succeeded, 0), "{ended:#?}");
    assert_eq!(outputs(&ended), expected);
    assert_eq!(urgent.len(), URGENT);
    assert!(!checkpoints.is_empty(), "it made way");
    assert!(checkpoints.iter().all(|checkpoint| !checkpoint.is_empty()), "{checkpoints:?}");
    let distinct: std::collections::BTreeSet<&String> = checkpoints.iter().collect();
    assert_eq!(distinct.len(), checkpoints.len(), "each attempt but the first goes on from a checkpoint of its own");
    for id in urgent {
        cluster.ends(&id, JobState::Succeeded).await;
    }
}
