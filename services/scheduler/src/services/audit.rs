//! The audit log, for those who may read it.

use std::sync::Arc;

use attune_proto::convert::time::timestamp;
use attune_proto::v1::audit_service_server::AuditService;
use attune_proto::v1::{self, AuditOrder};
use attune_store::audit::Recorded;
use attune_store::job::Order;
use tonic::{Request, Response, Status};

use super::{known, page_size, page_token};
use crate::context::Context;
use crate::guard::received;
use crate::status;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Audit {
    pub(crate) context: Arc<Context>,
}

fn view(Recorded { seq, record }: Recorded) -> v1::AuditRecord {
    v1::AuditRecord {
        sequence: seq,
        time: Some(timestamp(u64::try_from(record.time.0).unwrap_or_default())),
        caller: record.caller,
        name: record.name,
        peer: record.peer,
        project: record.project.map(|project| project.to_string()).unwrap_or_default(),
        rpc: record.rpc,
        target: record.target,
        outcome: record.outcome,
    }
}

#[tonic::async_trait]
impl AuditService for Audit {
    async fn list_audit_records(
        &self,
        request: Request<v1::ListAuditRecordsRequest>,
    ) -> Result<Response<v1::ListAuditRecordsResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = match (caller.scope(), request.project.as_str()) {
            (None, "") => None,
            (_, asked) => Some(caller.project(asked)?),
        };
        let order = match known(request.order_by, "order_by")? {
            AuditOrder::Unspecified | AuditOrder::SequenceDesc => Order::Newest,
            AuditOrder::SequenceAsc => Order::Oldest,
        };
        let rows = page_size(request.page_size, 100, 1000)?;
        let page = self.context.store.audit(project.as_ref(), order, page_token(&request.page_token), rows).await;
        let page = page.map_err(status::store)?;
        let records = page.items.into_iter().map(view).collect();
        Ok(Response::new(v1::ListAuditRecordsResponse { records, next_page_token: page.next.unwrap_or_default() }))
    }
}
