//! Tokens: given out, listed, revoked; and who the caller is.

use std::sync::Arc;

use attune_proto::Class;
use attune_proto::convert::Faults;
use attune_proto::convert::id::field;
use attune_proto::convert::time::{timestamp, unix_ms};
use attune_proto::error::invalid_argument;
use attune_proto::v1::token_service_server::TokenService;
use attune_proto::v1::{self, TokenOrder, TokenRole};
use attune_proto::words::Word as _;
use attune_spec::Fault;
use attune_spec::id::{Name, Project};
use attune_store::UtcMs;
use attune_store::token::{Role, Token};
use tonic::{Request, Response, Status};

use super::{known, page_size, page_token};
use crate::clock::Clock;
use crate::context::Context;
use crate::guard::{Caller, Minted, mint, received, role_to_message};
use crate::status;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    pub(crate) context: Arc<Context>,
}

fn time(time: UtcMs) -> prost_types::Timestamp {
    timestamp(u64::try_from(time.0).unwrap_or_default())
}

fn view(token: &Token) -> v1::Token {
    v1::Token {
        token_id: token.id.clone(),
        name: token.name.to_string(),
        project: token.project.as_ref().map(ToString::to_string).unwrap_or_default(),
        role: role_to_message(token.role) as i32,
        creator: token.creator.clone(),
        create_time: Some(time(token.created)),
        expire_time: token.expires.map(time),
        revoke_time: token.revoked.map(time),
        use_time: token.used.map(time),
    }
}

/// A checked wish for a token.
struct Wish {
    name: Name,
    role: Role,
    expires: Option<UtcMs>,
}

fn read(request: &v1::CreateTokenRequest, now: UtcMs) -> Result<Wish, Status> {
    let mut faults = Faults::new();
    let name = faults.field(field::<Name>("name", &request.name));
    let role = TokenRole::try_from(request.role).ok().and_then(|role| role.word().parse::<Role>().ok());
    if role.is_none() {
        let words = Role::ALL.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
        faults.push(Fault::new("role", format!("is missing or not known here; expected one of {words}")));
    }
    if role == Some(Role::Worker) && !request.all_projects {
        faults
            .push(Fault::new("all_projects", "is false; a worker runs jobs of all projects, so its token reaches all"));
    }
    let expires = request.expire_time.as_ref().map(|time| UtcMs(i64::try_from(unix_ms(time)).unwrap_or(i64::MAX)));
    if expires.is_some_and(|expires| expires <= now) {
        faults.push(Fault::new("expire_time", "has passed"));
    }
    let wish = name.zip(role).map(|(name, role)| Wish { name, role, expires });
    faults.finish(wish).map_err(|faults| invalid_argument(&faults))
}

/// Whether an admin's word counts for a token of a project, or of all.
fn reaches(caller: &Caller, project: Option<&Project>) -> bool {
    caller.scope().is_none() || caller.scope() == project
}

#[tonic::async_trait]
impl TokenService for Tokens {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let (caller, request) = received(request)?;
        if self.context.guard.is_open() {
            let message = "this server asks nobody for a token; start it with --auth tokens";
            return Err(Class::IllegalState.status(message));
        }
        let project = match request.all_projects {
            true if caller.scope().is_some() => {
                let message = "an admin of one project gives out tokens of that project alone";
                return Err(Class::PermissionDenied.status(message));
            }
            true => None,
            false => Some(caller.project(&request.project)?),
        };
        let now = Clock::utc();
        let Wish { name, role, expires } = read(&request, now)?;
        let Minted { id, hash, whole } = mint();
        caller.concerns(&id);
        let creator = caller.id().unwrap_or_default().to_owned();
        let token = Token { id, hash, name, project, role, creator, created: now, expires, revoked: None, used: None };
        self.context.store.create_token(&token, caller.record().as_deref()).await.map_err(status::store)?;
        caller.is_recorded();
        let secret = whole.expose().to_owned();
        Ok(Response::new(v1::CreateTokenResponse { token: Some(view(&token)), secret }))
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = match (caller.scope(), request.project.as_str()) {
            (None, "") => None,
            (_, asked) => Some(caller.project(asked)?),
        };
        let (TokenOrder::Unspecified | TokenOrder::Id) = known(request.order_by, "order_by")?;
        let rows = page_size(request.page_size, 100, 1000)?;
        let page = self.context.store.tokens(project.as_ref(), page_token(&request.page_token), rows).await;
        let page = page.map_err(status::store)?;
        let tokens = page.items.iter().map(view).collect();
        Ok(Response::new(v1::ListTokensResponse { tokens, next_page_token: page.next.unwrap_or_default() }))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        let (caller, request) = received(request)?;
        caller.project(&request.project)?;
        caller.concerns(&request.token_id);
        let find = async || {
            let found = self.context.store.token(&request.token_id).await.map_err(status::store)?;
            found
                .filter(|found| reaches(&caller, found.project.as_ref()))
                .ok_or_else(|| Class::NotFound.status(format!("token {:?} does not exist", request.token_id)))
        };
        caller.concerns_project(find().await?.project.as_ref());
        let (store, record) = (&self.context.store, caller.record());
        store.revoke_token(&request.token_id, Clock::utc(), record.as_deref()).await.map_err(status::store)?;
        caller.is_recorded();
        self.context.guard.has_revoked();
        Ok(Response::new(v1::RevokeTokenResponse { token: Some(view(&find().await?)) }))
    }

    async fn get_caller(
        &self,
        request: Request<v1::GetCallerRequest>,
    ) -> Result<Response<v1::GetCallerResponse>, Status> {
        let (caller, request) = received(request)?;
        caller.project(&request.project)?;
        Ok(Response::new(v1::GetCallerResponse {
            authenticated: caller.id().is_some(),
            name: caller.name().to_owned(),
            token_id: caller.token().unwrap_or_default().to_owned(),
            project: caller.scope().map(ToString::to_string).unwrap_or_default(),
            role: caller.role().map_or(TokenRole::Unspecified, role_to_message) as i32,
            expire_time: caller.expires().map(time),
        }))
    }
}
