//! `attune audit`: who asked for what.

use attune_proto::v1;
use serde_json::json;

use crate::print::{Column, Failure, Out, Table};
use crate::remote::{Server, block_on};
use crate::words;

/// Lists the audit log: what was changed, by whom, and what was refused. Admins only.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune audit --limit 20")]
pub(crate) struct Arguments {
    /// Number of records, the newest first.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let client = server.connect().await?;
        let project = server.project.as_ref().map(ToString::to_string).unwrap_or_default();
        let (mut found, mut page_token) = (Vec::new(), String::new());
        let wanted = arguments.limit as usize;
        while found.len() < wanted {
            let page_size = u32::try_from(wanted - found.len()).unwrap_or(u32::MAX).min(1000);
            let asked = v1::ListAuditRecordsRequest { project: project.clone(), page_size, page_token, order_by: 0 };
            let ask = || {
                let (mut service, asked) = (client.audit(), client.request(asked.clone()));
                async move { service.list_audit_records(asked).await }
            };
            let page = client.retrying(ask).await?;
            found.extend(page.records);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        show(&found, out)
    })
}

fn show(records: &[v1::AuditRecord], out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        let json = |record: &v1::AuditRecord| {
            json!({
                "sequence": record.sequence,
                "time": words::time(record.time.as_ref()),
                "caller": record.caller,
                "name": record.name,
                "peer": record.peer,
                "project": record.project,
                "rpc": record.rpc,
                "target": record.target,
                "outcome": record.outcome,
            })
        };
        return out.document(&records.iter().map(json).collect::<Vec<_>>());
    }
    let mut table = Table::new(["TIME", "WHO", "TOKEN", "PROJECT", "CALL", "ABOUT", "ANSWER"].map(Column::left));
    for record in records {
        table.row([
            words::time(record.time.as_ref()).unwrap_or_default(),
            record.name.clone(),
            record.caller.clone(),
            record.project.clone(),
            record.rpc.clone(),
            record.target.clone(),
            record.outcome.clone(),
        ]);
    }
    out.table(&table)
}
