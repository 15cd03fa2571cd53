//! Who calls: what follows from the credential, and nothing that the call itself says.

use std::sync::{Arc, Mutex, PoisonError};

use attune_proto::Class;
use attune_proto::convert::id::field;
use attune_spec::id::Project;
use attune_store::UtcMs;
use attune_store::audit::Record;
use attune_store::token::{Role, Token};
use tonic::{Request, Status};

use super::rules::Rule;
use crate::clock::Clock;

/// Characters of what a call is about that are written down: a digest, a tag, or the beginning of what is neither.
const TARGET_CHARS: usize = 128;

/// A caller, for the time of one call. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Caller(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    who: Who,
    /// The only project that it reaches.
    scope: Option<Project>,
    expires: Option<UtcMs>,
    /// The address that it calls from.
    peer: String,
    about: Mutex<About>,
}

#[derive(Debug)]
enum Who {
    /// Nobody was asked.
    Anybody,
    /// Somebody who proved it.
    Known {
        /// Id of the token, or the subject of an identity provider.
        id: String,
        name: String,
        role: Role,
        /// Whose the workers are that speak with this credential.
        owner: String,
        is_token: bool,
    },
}

/// What a call turned out to be about.
#[derive(Debug, Clone, Default)]
pub(crate) struct About {
    pub(crate) project: Option<Project>,
    pub(crate) target: String,
    /// Whether it asked for a project that is not the caller's.
    pub(crate) is_foreign: bool,
    /// What was called, `JobService/CreateJob`.
    rpc: &'static str,
    /// Whether its record is stored, with the change that it asked for.
    pub(crate) is_recorded: bool,
}

impl Caller {
    fn new(who: Who, scope: Option<Project>, expires: Option<UtcMs>, peer: &str) -> Self {
        Self(Arc::new(Inner { who, scope, expires, peer: peer.to_owned(), about: Mutex::default() }))
    }

    /// Whoever it is, where nobody is asked.
    pub(super) fn anybody(peer: &str) -> Self {
        Self::new(Who::Anybody, None, None, peer)
    }

    /// A worker of this process.
    pub(super) fn local(peer: &str) -> Self {
        let [id, name, owner] = ["local"; 3].map(str::to_owned);
        Self::new(Who::Known { id, name, role: Role::Worker, owner, is_token: false }, None, None, peer)
    }

    /// Whoever has a token.
    pub(super) fn of(token: Token, peer: &str) -> Self {
        let owner = format!("token/{}", token.name);
        let (name, role) = (token.name.to_string(), token.role);
        let who = Who::Known { id: token.id, name, role, owner, is_token: true };
        Self::new(who, token.project, token.expires, peer)
    }

    /// Whoever an identity provider vouches for.
    pub(super) fn vouched(
        subject: &str,
        name: &str,
        role: Role,
        scope: Option<Project>,
        expires: UtcMs,
        peer: &str,
    ) -> Self {
        let id = format!("oidc/{subject}");
        let who = Who::Known { owner: id.clone(), id, name: name.to_owned(), role, is_token: false };
        Self::new(who, scope, Some(expires), peer)
    }

    /// Whether it may make a call.
    pub(super) fn may(&self, rule: &Rule) -> bool {
        match &self.0.who {
            Who::Anybody => true,
            Who::Known { role, .. } => rule.allows(*role),
        }
    }

    /// What it is known by; nothing where nobody is asked.
    pub(crate) fn id(&self) -> Option<&str> {
        match &self.0.who {
            Who::Anybody => None,
            Who::Known { id, .. } => Some(id),
        }
    }

    /// The id of its token, if the credential is one.
    pub(crate) fn token(&self) -> Option<&str> {
        match &self.0.who {
            Who::Known { id, is_token: true, .. } => Some(id),
            Who::Known { .. } | Who::Anybody => None,
        }
    }

    /// Its name; empty where nobody is asked.
    pub(crate) fn name(&self) -> &str {
        match &self.0.who {
            Who::Anybody => "",
            Who::Known { name, .. } => name,
        }
    }

    /// What it may do; nothing where nobody is asked.
    pub(crate) fn role(&self) -> Option<Role> {
        match &self.0.who {
            Who::Anybody => None,
            Who::Known { role, .. } => Some(*role),
        }
    }

    /// Whose workers it may speak for; nothing where nobody is asked, or if it is no worker.
    pub(crate) fn owner(&self) -> Option<&str> {
        match &self.0.who {
            Who::Known { owner, role: Role::Worker, .. } => Some(owner),
            Who::Known { .. } | Who::Anybody => None,
        }
    }

    /// The address that it calls from.
    pub(crate) fn peer(&self) -> &str {
        &self.0.peer
    }

    /// From when on its credential is not valid.
    pub(crate) fn expires(&self) -> Option<UtcMs> {
        self.0.expires
    }

    /// The only project that it reaches; all without.
    pub(crate) fn scope(&self) -> Option<&Project> {
        self.0.scope.as_ref()
    }

    /// The project that a request is about: that of the credential. A request that names another is refused in the words for a
    /// project that is not there.
    pub(crate) fn project(&self, asked: &str) -> Result<Project, Status> {
        let asked = match asked {
            "" => None,
            text => Some(field::<Project>("project", text).map_err(crate::services::invalid)?),
        };
        let project = match (&self.0.scope, asked) {
            (None, None) => Project::default(),
            (Some(own), None) => own.clone(),
            (None, Some(asked)) => asked,
            (Some(own), Some(asked)) if asked == *own => asked,
            (Some(_), Some(asked)) => return Err(self.foreign(&asked)),
        };
        self.noted().project = Some(project.clone());
        Ok(project)
    }

    /// The answer about a project that is not the caller's, whether it is there or not.
    pub(crate) fn foreign(&self, project: &Project) -> Status {
        {
            let mut noted = self.noted();
            noted.is_foreign = true;
            // It is told to those who gave the credential out, and not to those whose project it was about.
            noted.project.clone_from(&self.0.scope);
        }
        let message = format!("project \"{project}\" does not exist, or this credential does not reach it");
        Class::NotFound.status(message)
    }

    /// Notes which thing the call is about, of a text that anybody may have written as much as an id can be.
    pub(crate) fn concerns(&self, target: &impl ToString) {
        self.noted().target = target.to_string().chars().take(TARGET_CHARS).collect();
    }

    /// Notes the project that the call is about where that is not the request's.
    pub(crate) fn concerns_project(&self, project: Option<&Project>) {
        self.noted().project = project.cloned();
    }

    /// Notes what is called.
    pub(super) fn calls(&self, rpc: &'static str) {
        self.noted().rpc = rpc;
    }

    /// The record of the call with its answer; nothing where nobody is asked who they are.
    pub(super) fn record_of(&self, rpc: &str, outcome: tonic::Code) -> Option<Record> {
        let (caller, about) = (self.id()?.to_owned(), self.about());
        Some(Record {
            time: Clock::utc(),
            caller,
            name: self.name().to_owned(),
            peer: self.peer().to_owned(),
            project: about.project,
            rpc: rpc.to_owned(),
            target: about.target,
            outcome: super::code_name(outcome),
        })
    }

    /// The record of the change that the call asks for, which is stored with it: that it was made.
    pub(crate) fn record(&self) -> Option<Box<Record>> {
        let rpc = self.about().rpc;
        self.record_of(rpc, tonic::Code::Ok).map(Box::new)
    }

    /// Notes that the record is stored, with the change.
    pub(crate) fn is_recorded(&self) {
        self.noted().is_recorded = true;
    }

    /// What the call turned out to be about.
    pub(crate) fn about(&self) -> About {
        self.noted().clone()
    }

    fn noted(&self) -> std::sync::MutexGuard<'_, About> {
        self.0.about.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The caller and the message of a request.
pub(crate) fn received<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let (_, extensions, message) = request.into_parts();
    match extensions.get::<Caller>() {
        Some(caller) => Ok((caller.clone(), message)),
        None => {
            tracing::error!("a call came to its service past the guard");
            Err(Class::Internal.status("nobody looked at who calls"))
        }
    }
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Name;

    use super::*;

    fn caller(project: Option<&str>, role: Role) -> Caller {
        let token = Token {
            id: "aa".to_owned(),
            hash: super::super::token::hash("x"),
            name: Name::new("anna").unwrap(),
            project: project.map(|project| Project::new(project).unwrap()),
            role,
            creator: String::new(),
            created: UtcMs(0),
            expires: None,
            revoked: None,
            used: None,
        };
        Caller::of(token, "")
    }

    #[test]
    fn the_project_is_the_credentials() {
        let own = caller(Some("a"), Role::Viewer);
        assert_eq!((own.project("").unwrap().as_str(), own.project("a").unwrap().as_str()), ("a", "a"));
        let refused = own.project("b").unwrap_err();
        assert_eq!(refused.code(), tonic::Code::NotFound);
        assert_eq!(refused.message(), "project \"b\" does not exist, or this credential does not reach it");
        assert!(own.about().is_foreign);
        // What is no project is nobody's either (A21).
        for bad in ["../a", "a/b", "A", "a\0", "a\u{202e}", &"a".repeat(1 << 20)] {
            assert_eq!(own.project(bad).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
        for all in [caller(None, Role::Admin), Caller::anybody("")] {
            assert_eq!((all.project("").unwrap().as_str(), all.project("b").unwrap().as_str()), ("default", "b"));
        }
    }

    #[test]
    fn a_request_without_a_caller_goes_nowhere() {
        assert_eq!(received(Request::new(())).unwrap_err().code(), tonic::Code::Internal);
        let mut request = Request::new(7);
        request.extensions_mut().insert(caller(None, Role::Worker));
        let (caller, message) = received(request).unwrap();
        assert_eq!((caller.owner(), caller.name(), message), (Some("token/anna"), "anna", 7));
    }
}
