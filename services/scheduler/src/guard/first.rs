//! The first token: without one nobody could give out others.

use std::io::ErrorKind;
use std::path::Path;

use attune_proto::Secret;
use attune_spec::id::Name;
use attune_store::Store;
use attune_store::token::{Role, Token};
use tokio::io::AsyncWriteExt as _;

use super::token::{self, Minted, mint};
use crate::clock::Clock;
use crate::error::Error;

/// Sees to it that some token can give out others. The token in `file` is taken in if it is not known yet; if there is no such
/// file and no such token, one is made and written there, for its owner's eyes alone.
pub(crate) async fn first_admin(store: &Store, file: Option<&Path>) -> Result<(), Error> {
    let given = match file {
        Some(file) => read(file).await?.map(|given| (file, given)),
        None => None,
    };
    if let Some((file, given)) = given {
        let known = given.parse::<Secret>().ok();
        let parts = known.as_ref().and_then(|secret| token::parts(secret.expose()));
        let Some((id, secret)) = parts else {
            return Err(Error::Auth(format!("{} holds no token; remove it, and one is made", file.display())));
        };
        if store.token(id).await?.is_none() {
            store.create_token(&admin(id.to_owned(), token::hash(secret)), None).await?;
            tracing::info!(token = id, file = %file.display(), "the token of a file is an admin's now");
        }
    }
    if store.has_admin(Clock::utc()).await? {
        return Ok(());
    }
    let Some(file) = file else {
        let message = "there is no valid token that could give out others; name a file for one with --admin-token-file";
        return Err(Error::Auth(message.to_owned()));
    };
    let Minted { id, hash, whole } = mint();
    write(file, &whole).await.map_err(|source| Error::AdminFile { path: file.to_owned(), source })?;
    store.create_token(&admin(id.clone(), hash), None).await?;
    tracing::info!(token = id, file = %file.display(), "the first admin's token was written to a file");
    Ok(())
}

fn admin(id: String, hash: attune_spec::id::Digest) -> Token {
    Token {
        id,
        hash,
        name: Name::new("admin").expect("it is one"),
        project: None,
        role: Role::Admin,
        creator: "the scheduler's start".to_owned(),
        created: Clock::utc(),
        expires: None,
        revoked: None,
        used: None,
    }
}

async fn read(file: &Path) -> Result<Option<String>, Error> {
    match tokio::fs::read_to_string(file).await {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::AdminFile { path: file.to_owned(), source }),
    }
}

/// Writes a new file that nobody else can read; one that is there already is left alone.
async fn write(file: &Path, whole: &Secret) -> std::io::Result<()> {
    let mut made = tokio::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).await?;
    made.write_all(format!("{}\n", whole.expose()).as_bytes()).await?;
    made.sync_all().await
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    async fn store(folder: &Path) -> Store {
        Store::open(&folder.join("attune.db").into()).await.unwrap()
    }

    #[tokio::test]
    async fn the_first_token_is_made_once_for_its_owners_eyes() {
        let folder = tempfile::tempdir().unwrap();
        let (store, file) = (store(folder.path()).await, folder.path().join("admin.token"));
        assert!(first_admin(&store, None).await.unwrap_err().to_string().contains("--admin-token-file"));
        for _ in 0..2 {
            first_admin(&store, Some(&file)).await.unwrap();
        }
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let (id, secret) = token::parts(text.trim()).unwrap();
        let stored = store.token(id).await.unwrap().unwrap();
        assert_eq!((stored.role, stored.project, stored.hash), (Role::Admin, None, token::hash(secret)));
        assert_eq!(store.tokens(None, None, 10).await.unwrap().items.len(), 1);
        // Nothing that is stored holds the secret.
        store.close().await;
        for entry in std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            let bytes = std::fs::read(entry.path()).unwrap();
            let holds = bytes.windows(secret.len()).any(|some| some == secret.as_bytes());
            assert_eq!(holds, entry.path() == file, "{:?}", entry.path());
        }
    }

    #[tokio::test]
    async fn a_token_by_reference_is_taken_in_and_a_revoked_one_stays_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let (store, file) = (store(folder.path()).await, folder.path().join("given"));
        std::fs::write(&file, "not a token").unwrap();
        let refused = first_admin(&store, Some(&file)).await.unwrap_err().to_string();
        assert!(refused.contains("holds no token") && !refused.contains("not a token"), "{refused}");
        let minted = mint();
        std::fs::write(&file, format!("{}\n", minted.whole.expose())).unwrap();
        first_admin(&store, Some(&file)).await.unwrap();
        assert!(store.has_admin(Clock::utc()).await.unwrap());
        store.revoke_token(&minted.id, Clock::utc(), None).await.unwrap();
        // It is not made valid again, and its file is not written over.
        first_admin(&store, Some(&file)).await.unwrap_err();
        assert!(!store.has_admin(Clock::utc()).await.unwrap());
        std::fs::remove_file(&file).unwrap();
        first_admin(&store, Some(&file)).await.unwrap();
        assert!(store.has_admin(Clock::utc()).await.unwrap());
    }
}
