//! Which database holds the state.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A file of this machine, or a server.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// A file of SQLite.
    Sqlite(PathBuf),
    /// A server of PostgreSQL by its URL, `postgres://user:password@host:port/database?sslmode=require`.
    Postgres(String),
}

impl Database {
    /// The schemes of a URL of PostgreSQL.
    const SCHEMES: [&str; 2] = ["postgres://", "postgresql://"];
}

impl FromStr for Database {
    type Err = String;

    /// A URL with a scheme of PostgreSQL is a server; everything else without a scheme is a path.
    fn from_str(text: &str) -> Result<Self, String> {
        if Self::SCHEMES.iter().any(|scheme| text.starts_with(scheme)) {
            return Ok(Self::Postgres(text.to_owned()));
        }
        match text.split_once("://") {
            Some((scheme, _)) => Err(format!("is a {scheme} URL; expected a file of SQLite or a postgres:// URL")),
            None => Ok(Self::Sqlite(PathBuf::from(text))),
        }
    }
}

impl From<&Path> for Database {
    fn from(path: &Path) -> Self {
        Self::Sqlite(path.to_owned())
    }
}

impl From<PathBuf> for Database {
    fn from(path: PathBuf) -> Self {
        Self::Sqlite(path)
    }
}

/// Without the password: it is shown in logs and messages.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "{}", path.display()),
            Self::Postgres(url) => {
                let (scheme, rest) = url.split_once("://").unwrap_or(("postgres", url));
                let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
                let (who, place) = rest.rsplit_once('@').map_or(("", rest), |(who, place)| (who, place));
                let user = who.split(':').next().unwrap_or_default();
                let at = if user.is_empty() { "" } else { "@" };
                write!(f, "{scheme}://{user}{at}{place}")?;
                let host = query.split('&').find(|pair| pair.starts_with("host="));
                host.map_or(Ok(()), |host| write!(f, "?{host}"))
            }
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_server_and_a_path_a_file() {
        let read = |text: &str| text.parse::<Database>();
        assert_eq!(read("./attune.db"), Ok(Database::Sqlite("./attune.db".into())));
        for url in ["postgres://u@h/attune", "postgresql:///attune?host=/run/postgresql"] {
            assert_eq!(read(url), Ok(Database::Postgres(url.to_owned())));
        }
        assert!(read("mysql://h/attune").unwrap_err().contains("is a mysql URL; expected a file of SQLite"));
    }

    #[test]
    fn a_password_is_never_shown() {
        let shown =
            |url: &str| format!("{} {:?}", Database::Postgres(url.to_owned()), Database::Postgres(url.to_owned()));
        let of = shown("postgres://anna:s3cr@t@db:5432/attune?sslmode=require&password=s3cr@t&host=/run");
        assert_eq!(of, "postgres://anna@db:5432/attune?host=/run postgres://anna@db:5432/attune?host=/run");
        assert_eq!(shown("postgres:///attune"), "postgres:///attune postgres:///attune");
    }
}
