//! The table of calls: who may make which. A call that has no row is made by nobody; a test compares the rows with the contract.

use attune_store::token::Role;

/// Who may make a call, and what is remembered of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    /// The call, `SERVICE/METHOD`.
    pub(crate) rpc: &'static str,
    /// Whether nobody is asked who they are.
    pub(crate) is_public: bool,
    /// The lowest rung of the ladder that may make it; none if no user may.
    pub(crate) user: Option<Role>,
    /// Whether workers may make it, for what they hold.
    pub(crate) worker: bool,
    /// Whether it changes something, and is written down.
    pub(crate) is_recorded: bool,
    /// Whether only the scheduler that leads answers it: it changes something, or tells what no database holds.
    pub(crate) is_led: bool,
    /// Whether it may last: it ends with the validity of its caller's credential.
    pub(crate) lasts: bool,
}

const fn rule(rpc: &'static str) -> Rule {
    Rule { rpc, is_public: false, user: None, worker: false, is_recorded: false, is_led: false, lasts: false }
}

const fn public(rpc: &'static str) -> Rule {
    Rule { is_public: true, ..rule(rpc) }
}

const fn viewer(rpc: &'static str) -> Rule {
    Rule { user: Some(Role::Viewer), ..rule(rpc) }
}

const fn submitter(rpc: &'static str) -> Rule {
    Rule { user: Some(Role::Submitter), ..rule(rpc) }
}

const fn admin(rpc: &'static str) -> Rule {
    Rule { user: Some(Role::Admin), ..rule(rpc) }
}

impl Rule {
    const fn or_worker(self) -> Self {
        Self { worker: true, ..self }
    }

    const fn recorded(self) -> Self {
        Self { is_recorded: true, ..self.led() }
    }

    const fn led(self) -> Self {
        Self { is_led: true, ..self }
    }

    const fn lasting(self) -> Self {
        Self { lasts: true, ..self }
    }

    /// Whether somebody of a role may make the call.
    pub(crate) fn allows(&self, role: Role) -> bool {
        match role {
            Role::Worker => self.worker,
            user => self.user.is_some_and(|lowest| user >= lowest),
        }
    }
}

/// Every call that this server answers.
pub(crate) const RULES: &[Rule] = &[
    // What has arrived of blobs is kept in memory, by the one that is pushed to.
    submitter("attune.v1.ArtifactService/QueryMissingBlobs").or_worker().led(),
    submitter("attune.v1.ArtifactService/PushArtifact").or_worker().recorded().lasting(),
    viewer("attune.v1.ArtifactService/PullArtifact").or_worker().lasting(),
    viewer("attune.v1.ArtifactService/GetArtifact"),
    viewer("attune.v1.ArtifactService/ListArtifacts"),
    submitter("attune.v1.ArtifactService/TagArtifact").recorded(),
    submitter("attune.v1.ArtifactService/UntagArtifact").recorded(),
    viewer("attune.v1.ArtifactService/GetLineage"),
    admin("attune.v1.ArtifactService/DeleteArtifact").recorded(),
    admin("attune.v1.AuditService/ListAuditRecords"),
    // Who is connected, and what is occupied, the one knows that leads.
    viewer("attune.v1.FleetService/ListWorkers").led(),
    // For admins of all projects; the service asks for that.
    admin("attune.v1.FleetService/CordonWorker").recorded(),
    admin("attune.v1.FleetService/UncordonWorker").recorded(),
    viewer("attune.v1.FleetService/ListProjects").led(),
    viewer("attune.v1.FleetService/GetProject").led(),
    admin("attune.v1.FleetService/SetProjectPolicy").recorded(),
    submitter("attune.v1.JobService/CreateJob").recorded(),
    viewer("attune.v1.JobService/GetJob"),
    viewer("attune.v1.JobService/ListJobs"),
    submitter("attune.v1.JobService/CancelJob").recorded(),
    submitter("attune.v1.JobService/PauseJob").recorded(),
    submitter("attune.v1.JobService/ResumeJob").recorded(),
    submitter("attune.v1.JobService/RetryJob").recorded(),
    viewer("attune.v1.JobService/WatchJob").lasting(),
    viewer("attune.v1.JobService/ListMetrics"),
    viewer("attune.v1.JobService/StreamMetrics").lasting(),
    viewer("attune.v1.MethodService/ListMethods"),
    viewer("attune.v1.MethodService/GetMethod"),
    admin("attune.v1.TokenService/CreateToken").recorded(),
    admin("attune.v1.TokenService/ListTokens"),
    admin("attune.v1.TokenService/RevokeToken").recorded(),
    viewer("attune.v1.TokenService/GetCaller").or_worker(),
    // What a worker says on its stream is checked message by message, and its registration is written down there.
    rule("attune.v1.WorkerService/Connect").or_worker().led().lasting(),
    // Whoever watches over the server asks whether it lives, and learns nothing else.
    public("grpc.health.v1.Health/Check"),
    public("grpc.health.v1.Health/Watch"),
    viewer("grpc.reflection.v1.ServerReflection/ServerReflectionInfo").or_worker(),
    viewer("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo").or_worker(),
];

/// The row of a path such as `/attune.v1.JobService/GetJob`.
pub(crate) fn of_path(path: &str) -> Option<&'static Rule> {
    let rpc = path.strip_prefix('/')?;
    RULES.iter().find(|rule| rule.rpc == rpc)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Every call that the port answers, with whether it streams.
    fn contract() -> BTreeMap<String, bool> {
        let sets = [
            attune_proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let mut calls = BTreeMap::new();
        for file in sets.into_iter().flat_map(|set| FileDescriptorSet::decode(set).unwrap().file) {
            for service in &file.service {
                for method in &service.method {
                    let rpc = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    calls.insert(rpc, method.server_streaming() || method.client_streaming());
                }
            }
        }
        calls
    }

    #[test]
    fn every_call_of_the_contract_has_one_row() {
        let calls = contract();
        let rows: Vec<_> = RULES.iter().map(|rule| rule.rpc).collect();
        let missing: Vec<_> = calls.keys().filter(|rpc| !rows.contains(&rpc.as_str())).collect();
        assert!(missing.is_empty(), "say in RULES who may make these calls: {missing:?}");
        let gone: Vec<_> = rows.iter().filter(|rpc| !calls.contains_key(**rpc)).collect();
        assert!(gone.is_empty(), "rows of calls that are not there: {gone:?}");
        assert_eq!(rows.len(), calls.len(), "a call has two rows");
    }

    #[test]
    fn what_lasts_is_what_streams_and_only_health_is_public() {
        for rule in RULES {
            let lasts = contract()[rule.rpc] && rule.rpc.starts_with("attune.");
            assert_eq!(rule.lasts, lasts, "{}", rule.rpc);
            assert_eq!(rule.is_public, rule.rpc.starts_with("grpc.health."), "{}", rule.rpc);
            assert!(rule.is_public || rule.user.is_some() || rule.worker, "{} is nobody's", rule.rpc);
        }
    }

    #[test]
    fn what_changes_something_is_for_the_one_that_leads() {
        for rule in RULES {
            assert!(rule.is_led || !rule.is_recorded, "{}", rule.rpc);
            assert!(!rule.is_led || rule.rpc.starts_with("attune."), "{}", rule.rpc);
        }
        let led = RULES.iter().filter(|rule| rule.is_led && !rule.is_recorded).map(|rule| rule.rpc.rsplit('/').next());
        let names: Vec<_> = led.flatten().collect();
        assert_eq!(names, ["QueryMissingBlobs", "ListWorkers", "ListProjects", "GetProject", "Connect"]);
    }

    #[test]
    fn the_ladder_goes_up_and_a_worker_stands_beside_it() {
        let [viewer, submitter, admin, worker] = [Role::Viewer, Role::Submitter, Role::Admin, Role::Worker];
        let allowed = |rpc: &str| [viewer, submitter, admin, worker].map(|role| of_path(rpc).unwrap().allows(role));
        assert_eq!(allowed("/attune.v1.JobService/GetJob"), [true, true, true, false]);
        assert_eq!(allowed("/attune.v1.JobService/CreateJob"), [false, true, true, false]);
        assert_eq!(allowed("/attune.v1.TokenService/CreateToken"), [false, false, true, false]);
        assert_eq!(allowed("/attune.v1.WorkerService/Connect"), [false, false, false, true]);
        for path in
            ["", "/", "attune.v1.JobService/GetJob", "/attune.v1.JobService/getjob", "/attune.v1.JobService/GetJob/"]
        {
            assert_eq!(of_path(path), None, "{path}");
        }
    }
}
