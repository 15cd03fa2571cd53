//! `attune tokens`: who may do what.

use std::time::Duration;

use attune_proto::convert::time::timestamp;
use attune_proto::words::Word as _;
use attune_proto::{Client, v1};
use serde_json::{Value, json};

use crate::print::{Column, Failure, Out, Table, note};
use crate::remote::{Server, block_on, caller};
use crate::words;

/// Gives out, lists and revokes API tokens.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune tokens create --name ci --role submitter --project demos --expires-days 90 > ci.token
  attune tokens create --name gpu-1 --role worker --all-projects > worker.token
  attune tokens revoke 8k2m4x0r5s7t9v1w")]
pub(crate) enum Command {
    /// Gives out a token and prints its secret, once.
    Create(Create),
    /// Lists tokens: whose, for what, until when.
    List,
    /// Ends a token's validity at once.
    Revoke(Revoke),
    /// Says who the server takes the caller for.
    Whoami,
    /// Makes a token that no server knows, to be put into the file of a scheduler's --admin-token-file before it starts.
    Generate,
}

/// Which token is given out.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// Whose it is; tokens of one name are one identity.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// What it is for: viewer, submitter, admin or worker.
    #[arg(long, value_name = "ROLE", value_parser = role)]
    role: v1::TokenRole,
    /// It reaches all projects, not only that of --project; the token of a worker must.
    #[arg(long)]
    all_projects: bool,
    /// Days until it is not valid any more; it stays valid if left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    expires_days: Option<u32>,
}

/// Which token is revoked.
#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// Its id, as the list has it.
    #[arg(value_name = "ID")]
    id: String,
}

fn role(text: &str) -> Result<v1::TokenRole, String> {
    v1::TokenRole::from_word(text).ok_or_else(|| {
        let known = ["viewer", "submitter", "admin", "worker"];
        format!("expected one of {}{}", known.join(", "), attune_spec::suggest::hint(text, known))
    })
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    if let Command::Generate = command {
        return out.line(attune_scheduler::new_token().expose());
    }
    block_on(async {
        let client = server.connect().await?;
        match command {
            Command::Generate => Ok(()),
            Command::Create(arguments) => create(&client, arguments, out).await,
            Command::List => list(&client, server, out).await,
            Command::Revoke(arguments) => revoke(&client, arguments, out).await,
            Command::Whoami => whoami(&client, out).await,
        }
    })
}

#[expect(clippy::disallowed_methods, reason = "the shell says until when")]
fn in_days(days: u32) -> prost_types::Timestamp {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let then = now + Duration::from_secs(24 * 60 * 60) * days;
    timestamp(u64::try_from(then.as_millis()).unwrap_or(u64::MAX))
}

fn json(token: &v1::Token) -> Value {
    json!({
        "id": token.token_id,
        "name": token.name,
        "project": Some(&token.project).filter(|project| !project.is_empty()),
        "role": token.role().word(),
        "creator": token.creator,
        "created": words::time(token.create_time.as_ref()),
        "expires": words::time(token.expire_time.as_ref()),
        "revoked": words::time(token.revoke_time.as_ref()),
        "used": words::time(token.use_time.as_ref()),
    })
}

fn reach(project: &str) -> &str {
    if project.is_empty() { "all projects" } else { project }
}

async fn create(client: &Client, arguments: &Create, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::CreateTokenRequest {
        project: client.project().to_string(),
        all_projects: arguments.all_projects,
        name: arguments.name.clone(),
        role: arguments.role as i32,
        expire_time: arguments.expires_days.map(in_days),
    };
    // Made again it would be another one.
    let answer = client.tokens().create_token(client.request(asked)).await?.into_inner();
    let token = answer.token.ok_or_else(|| Failure::failed("the server's answer holds no token"))?;
    if out.is_json() {
        let mut document = json(&token);
        document["secret"] = answer.secret.into();
        return out.document(&document);
    }
    let (id, role, reach) = (&token.token_id, token.role().word(), reach(&token.project));
    note(&format!("token {id} of {}: {role} of {reach}; its secret is shown this once", token.name));
    out.line(&answer.secret)
}

async fn list(client: &Client, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let project = server.project.as_ref().map(ToString::to_string).unwrap_or_default();
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let asked = v1::ListTokensRequest { project: project.clone(), page_size: 1000, page_token, order_by: 0 };
        let ask = || {
            let (mut service, asked) = (client.tokens(), client.request(asked.clone()));
            async move { service.list_tokens(asked).await }
        };
        let page = client.retrying(ask).await?;
        found.extend(page.tokens);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if out.is_json() {
        return out.document(&found.iter().map(json).collect::<Vec<_>>());
    }
    let columns = ["ID", "NAME", "ROLE", "REACHES", "USED", "ENDS"].map(Column::left);
    let mut table = Table::new(columns);
    for token in &found {
        let time = |time: Option<&prost_types::Timestamp>| words::time(time);
        let revoked = time(token.revoke_time.as_ref()).map(|time| format!("revoked {time}"));
        let ends = revoked.or_else(|| time(token.expire_time.as_ref())).unwrap_or_else(|| "never".to_owned());
        let used = time(token.use_time.as_ref()).unwrap_or_else(|| "never".to_owned());
        let reach = reach(&token.project).to_owned();
        table.row([token.token_id.clone(), token.name.clone(), token.role().word(), reach, used, ends]);
    }
    out.table(&table)
}

async fn revoke(client: &Client, arguments: &Revoke, out: &mut Out) -> Result<(), Failure> {
    let asked = v1::RevokeTokenRequest { project: client.project().to_string(), token_id: arguments.id.clone() };
    let ask = || {
        let (mut service, asked) = (client.tokens(), client.request(asked.clone()));
        async move { service.revoke_token(asked).await }
    };
    let answer = client.retrying(ask).await?;
    let token = answer.token.ok_or_else(|| Failure::failed("the server's answer holds no token"))?;
    if out.is_json() {
        return out.document(&json(&token));
    }
    out.line(&format!("token {} of {} is revoked", token.token_id, token.name))
}

async fn whoami(client: &Client, out: &mut Out) -> Result<(), Failure> {
    let caller = caller(client).await?;
    if out.is_json() {
        return out.document(&json!({
            "authenticated": caller.authenticated,
            "name": caller.name,
            "token": Some(&caller.token_id).filter(|id| !id.is_empty()),
            "project": Some(&caller.project).filter(|project| !project.is_empty()),
            "role": words::word::<v1::TokenRole>(caller.role),
            "expires": words::time(caller.expire_time.as_ref()),
        }));
    }
    if !caller.authenticated {
        return out.line("anybody: this server does not ask who calls");
    }
    let ends = words::time(caller.expire_time.as_ref()).map(|time| format!(", until {time}")).unwrap_or_default();
    out.line(&format!("{}: {} of {}{ends}", caller.name, caller.role().word(), reach(&caller.project)))
}
