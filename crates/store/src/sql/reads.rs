//! The logs: events and metrics, read from a position onwards.

use super::jobs::bad_token;
use super::query::Query;
use super::{Store, row};
use crate::error::{Result, db};
use crate::event::Event;
use crate::job::{Order, Page};
use crate::metric::{Filter, Point};
use attune_spec::id::{JobId, Project, Seq};

/// Points of one page at most.
const PAGE_POINTS: u32 = 10_000;

impl Store {
    /// Events of a project (of one job, when given) after number `after`, in order, at most `limit`.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`], [`crate::Error::Corrupt`].
    pub async fn events(&self, project: &Project, job: Option<&JobId>, after: Seq, limit: u32) -> Result<Vec<Event>> {
        let mut query = Query::new("SELECT * FROM events WHERE project = ");
        // A number beyond the largest stored one has no events after it.
        query.push_bind(project.as_str()).push(" AND seq > ").push_bind(row::signed(after.0).unwrap_or(i64::MAX));
        if let Some(job) = job {
            query.push(" AND job = ").push_bind(job.as_str());
        }
        query.push(" ORDER BY seq LIMIT ").push_bind(i64::from(limit));
        query.build()?.fetch_all(&self.readers).await.map_err(db)?.iter().map(row::event).collect()
    }

    /// The number of the last event of a project; 0 when there is none.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`].
    pub async fn last_event(&self, project: &Project) -> Result<Seq> {
        sqlx::query("SELECT seq FROM event_heads WHERE project = $1")
            .bind(project.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(db)?
            .map_or(Ok(Seq(0)), |found| row::unsigned(&found, "seq").map(Seq))
    }

    /// Metrics of a job, by number in the filter's order, at most `rows` of them (and at most 10,000).
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a page token that no earlier page gave out.
    pub async fn metrics(
        &self,
        project: &Project,
        job: &JobId,
        filter: &Filter,
        page: Option<&str>,
        rows: u32,
    ) -> Result<Page<Point>> {
        let (rows, newest) = (rows.clamp(1, PAGE_POINTS), filter.order == Order::Newest);
        let mut query = Query::new("SELECT * FROM metrics WHERE project = ");
        query.push_bind(project.as_str()).push(" AND job = ").push_bind(job.as_str());
        query.push(" AND seq > ").push_bind(row::signed(filter.after.0).unwrap_or(i64::MAX));
        query.push(" AND step >= ").push_bind(row::signed(filter.from_step.0).unwrap_or(i64::MAX));
        if !filter.names.is_empty() {
            query.push(" AND name IN (").push_list(filter.names.iter().map(String::as_str)).push(")");
        }
        if let Some(token) = page {
            let last: u32 = token.parse().map_err(|_| bad_token(token))?;
            query.push(if newest { " AND seq < " } else { " AND seq > " }).push_bind(i64::from(last));
        }
        query.push(if newest { " ORDER BY seq DESC LIMIT " } else { " ORDER BY seq LIMIT " });
        query.push_bind(i64::from(rows) + 1);
        let found = query.build()?.fetch_all(&self.readers).await.map_err(db)?;
        let more = found.len() > rows as usize;
        let items = found.iter().take(rows as usize).map(row::point).collect::<Result<Vec<_>>>()?;
        let next = items.last().filter(|_| more).map(|point| point.seq.to_string());
        Ok(Page { items, next })
    }
}
