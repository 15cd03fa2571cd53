//! Tokens: given out, found, revoked.

use attune_spec::id::Project;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use super::jobs::{PAGE_ROWS, bad_token};
use super::query::Query;
use super::{Store, audit, row};
use crate::audit::Record;
use crate::error::{Error, Result, db};
use crate::job::Page;
use crate::time::UtcMs;
use crate::token::{Role, Token};

fn token(found: &AnyRow) -> Result<Token> {
    Ok(Token {
        id: found.try_get("token").map_err(db)?,
        hash: row::parsed(found, "hash")?,
        name: row::parsed(found, "name")?,
        project: row::parsed_optional(found, "project")?,
        role: row::parsed(found, "role")?,
        creator: found.try_get("creator").map_err(db)?,
        created: row::time(found, "created_ms")?,
        expires: row::time_optional(found, "expires_ms")?,
        revoked: row::time_optional(found, "revoked_ms")?,
        used: row::time_optional(found, "used_ms")?,
    })
}

impl Store {
    /// Stores a new token, with the record of the call that asked for it, if a call did.
    ///
    /// # Errors
    /// [`Error::Conflict`] when its id is taken.
    pub async fn create_token(&self, new: &Token, record: Option<&Record>) -> Result<()> {
        let mut transaction = self.begin().await?;
        let done = create(&mut transaction, new, record).await;
        transaction.end(done).await
    }

    /// The token with an id, valid or not.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn token(&self, id: &str) -> Result<Option<Token>> {
        let found = sqlx::query("SELECT * FROM tokens WHERE token = $1").bind(id).fetch_optional(&self.readers).await;
        found.map_err(db)?.as_ref().map(token).transpose()
    }

    /// Tokens by id, at most `rows` of them: those of one project where one is given, else all.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn tokens(&self, project: Option<&Project>, page: Option<&str>, rows: u32) -> Result<Page<Token>> {
        let rows = rows.clamp(1, PAGE_ROWS);
        let mut query = Query::new("SELECT * FROM tokens WHERE token > ");
        query.push_bind(page.unwrap_or_default());
        if let Some(project) = project {
            query.push(" AND project = ").push_bind(project.as_str());
        }
        query.push(" ORDER BY token LIMIT ").push_bind(i64::from(rows) + 1);
        if page.is_some_and(|token| token.is_empty() || token.len() > 80) {
            return Err(bad_token(page.unwrap_or_default()));
        }
        let found = query.build()?.fetch_all(&self.readers).await.map_err(db)?;
        let more = found.len() > rows as usize;
        let items = found.iter().take(rows as usize).map(token).collect::<Result<Vec<_>>>()?;
        let next = items.last().filter(|_| more).map(|last| last.id.clone());
        Ok(Page { items, next })
    }

    /// Ends a token's validity now, if it has not ended before, with the record of the call that asked for it.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn revoke_token(&self, id: &str, now: UtcMs, record: Option<&Record>) -> Result<()> {
        let mut transaction = self.begin().await?;
        let update = sqlx::query("UPDATE tokens SET revoked_ms = $2 WHERE token = $1 AND revoked_ms IS NULL");
        let mut done = update.bind(id).bind(now.0).execute(&mut *transaction).await.map_err(db).map(drop);
        if done.is_ok() {
            done = audit::append_some(&mut transaction, record).await;
        }
        transaction.end(done).await
    }

    /// How many tokens were ever revoked: whoever holds streams open under them looks when it grows.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn n_revoked(&self) -> Result<u64> {
        let found = sqlx::query("SELECT COUNT(*) AS n FROM tokens WHERE revoked_ms IS NOT NULL");
        row::unsigned(&found.fetch_one(&self.readers).await.map_err(db)?, "n")
    }

    /// Notes that a token was used; an earlier time changes nothing. A store that follows may do so.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn token_used(&self, id: &str, now: UtcMs) -> Result<()> {
        let mut transaction = self.begin_beside().await?;
        let update =
            sqlx::query("UPDATE tokens SET used_ms = $2 WHERE token = $1 AND (used_ms IS NULL OR used_ms < $2)");
        let done = update.bind(id).bind(now.0).execute(&mut *transaction).await.map_err(db);
        transaction.end(done).await.map(drop)
    }

    /// Whether some token is valid now that may give out all others.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn has_admin(&self, now: UtcMs) -> Result<bool> {
        let found = sqlx::query(
            "SELECT 1 FROM tokens WHERE project IS NULL AND role = $1 AND revoked_ms IS NULL \
             AND (expires_ms IS NULL OR expires_ms > $2) LIMIT 1",
        )
        .bind(Role::Admin.as_str())
        .bind(now.0)
        .fetch_optional(&self.readers)
        .await;
        found.map(|found| found.is_some()).map_err(db)
    }
}

async fn create(connection: &mut AnyConnection, new: &Token, record: Option<&Record>) -> Result<()> {
    let done = sqlx::query(
        "INSERT INTO tokens (token, hash, name, project, role, creator, created_ms, expires_ms, revoked_ms, used_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING",
    )
    .bind(&new.id)
    .bind(new.hash.to_string())
    .bind(new.name.as_str())
    .bind(new.project.as_ref().map(Project::as_str))
    .bind(new.role.as_str())
    .bind(&new.creator)
    .bind(new.created.0)
    .bind(new.expires.map(|time| time.0))
    .bind(new.revoked.map(|time| time.0))
    .bind(new.used.map(|time| time.0))
    .execute(&mut *connection)
    .await
    .map_err(db)?;
    if done.rows_affected() == 0 {
        return Err(Error::Conflict(format!("token {:?} exists already", new.id)));
    }
    audit::append_some(connection, record).await
}
