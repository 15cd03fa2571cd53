//! A query in parts, with values at numbered places.
//!
//! Not the library's own builder: that writes `?` where it does not know the database, which PostgreSQL does not read.

use std::fmt::Write as _;

use sqlx::any::AnyArguments;
use sqlx::{Any, Arguments as _, AssertSqlSafe, Encode, Type};

use crate::error::{Result, db};

/// A query as it grows. What is pushed is this program's own text; what comes from elsewhere is bound.
pub(super) struct Query {
    sql: String,
    arguments: AnyArguments,
    failed: Option<sqlx::Error>,
}

impl Query {
    pub(super) fn new(sql: &'static str) -> Self {
        Self { sql: sql.to_owned(), arguments: AnyArguments::default(), failed: None }
    }

    pub(super) fn push(&mut self, sql: &'static str) -> &mut Self {
        self.sql.push_str(sql);
        self
    }

    /// A place, and the value that stands there.
    pub(super) fn push_bind<'t, T: Encode<'t, Any> + Type<Any>>(&mut self, value: T) -> &mut Self {
        if let Err(error) = self.arguments.add(value) {
            self.failed.get_or_insert(sqlx::Error::Encode(error));
        }
        let _ = write!(self.sql, "${}", self.arguments.len());
        self
    }

    /// Places for all of a list, with commas between.
    pub(super) fn push_list<'t, T: Encode<'t, Any> + Type<Any>>(
        &mut self,
        values: impl IntoIterator<Item = T>,
    ) -> &mut Self {
        for (index, value) in values.into_iter().enumerate() {
            if index > 0 {
                self.push(", ");
            }
            self.push_bind(value);
        }
        self
    }

    pub(super) fn build(self) -> Result<sqlx::query::Query<'static, Any, AnyArguments>> {
        match self.failed {
            Some(error) => Err(db(error)),
            None => Ok(sqlx::query_with(AssertSqlSafe(self.sql), self.arguments)),
        }
    }
}
