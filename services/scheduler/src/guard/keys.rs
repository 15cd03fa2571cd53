//! The keys of an identity provider: read from a file, or asked for where it says that they are.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use jsonwebtoken::jwk::{Jwk, JwkSet, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::signature::ALGORITHMS;

/// Where keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file.
    File(PathBuf),
    /// The address of the keys.
    Url(String),
    /// Where the document says that describes an issuer.
    Described(String),
}

/// The shortest time between two questions for keys.
const AGAIN: Duration = Duration::from_secs(60);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest document that is read.
const BYTES_MAX: usize = 1 << 20;

/// A key that may have signed a token.
#[derive(Debug, Clone)]
pub(super) struct Key {
    id: Option<String>,
    algorithm: Option<Algorithm>,
    pub(super) key: DecodingKey,
}

/// The keys, as they were last seen.
#[derive(Debug)]
pub(super) struct Keys {
    place: Place,
    known: RwLock<Vec<Key>>,
    asked: Mutex<Option<Instant>>,
}

/// What describes an issuer, as far as it matters here.
#[derive(Deserialize)]
struct Description {
    issuer: String,
    jwks_uri: String,
}

impl Keys {
    pub(super) fn new(place: Place) -> Self {
        Self { place, known: RwLock::default(), asked: Mutex::default() }
    }

    /// Reads the keys of a file, of which one at least must be of use; asks for those of an address, which may be away now.
    pub(super) async fn open(&self) -> Result<(), String> {
        match (&self.place, self.ask().await) {
            (Place::File(_), asked) => asked,
            (_, Err(why)) => {
                tracing::warn!(
                    why,
                    "the keys of the identity provider are not known yet; its tokens are refused until they are"
                );
                Ok(())
            }
            (_, Ok(())) => Ok(()),
        }
    }

    /// The keys that may have signed a token with this header; asks for new ones, now and then, if there is none.
    pub(super) async fn of(&self, header: &jsonwebtoken::Header) -> Vec<Key> {
        let found = self.known_of(header);
        if !found.is_empty() || matches!(self.place, Place::File(_)) {
            return found;
        }
        let mut asked = self.asked.lock().await;
        // Whoever waited here for another's question finds its answer.
        let found = self.known_of(header);
        if !found.is_empty() || asked.is_some_and(|time| time.elapsed() < AGAIN) {
            return found;
        }
        *asked = Some(Instant::now());
        if let Err(why) = self.ask().await {
            tracing::warn!(why, "the keys of the identity provider could not be asked for");
        }
        self.known_of(header)
    }

    fn known_of(&self, header: &jsonwebtoken::Header) -> Vec<Key> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let fits = |key: &&Key| {
            (header.kid.is_none() || key.id.is_none() || header.kid == key.id)
                && key.algorithm.is_none_or(|algorithm| algorithm == header.alg)
                && key.key.family() == header.alg.family()
        };
        known.iter().filter(fits).cloned().collect()
    }

    async fn ask(&self) -> Result<(), String> {
        let bytes = match &self.place {
            Place::File(path) => read(path).await?,
            Place::Url(url) => get(url).await?,
            Place::Described(issuer) => {
                let at = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
                let found: Description =
                    serde_json::from_slice(&get(&at).await?).map_err(|error| format!("{at}: {error}"))?;
                if found.issuer != *issuer {
                    return Err(format!("{at} describes the issuer {:?}; expected {issuer:?}", found.issuer));
                }
                check_url(&found.jwks_uri)?;
                get(&found.jwks_uri).await?
            }
        };
        let keys = usable(&bytes)?;
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }
}

/// Keys that signatures can be checked with. Others are left out, as a set may hold some that are for something else.
fn usable(bytes: &[u8]) -> Result<Vec<Key>, String> {
    let set: JwkSet = serde_json::from_slice(bytes).map_err(|error| format!("is no set of JSON web keys: {error}"))?;
    let keys: Vec<Key> = set.keys.iter().filter_map(key).collect();
    match keys.is_empty() {
        true => Err("holds no key that a signature can be checked with: expected RSA, EC or OKP keys".to_owned()),
        false => Ok(keys),
    }
}

fn key(jwk: &Jwk) -> Option<Key> {
    let algorithm = match jwk.common.key_algorithm {
        None => None,
        Some(named) => Some(algorithm(named)?),
    };
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    let is_public = ALGORITHMS.iter().any(|algorithm| algorithm.family() == key.family());
    is_public.then(|| Key { id: jwk.common.key_id.clone(), algorithm, key })
}

fn algorithm(named: KeyAlgorithm) -> Option<Algorithm> {
    let of = |algorithm: &&Algorithm| format!("{algorithm:?}") == named.to_string();
    ALGORITHMS.iter().find(of).copied()
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    tokio::fs::read(path).await.map_err(|error| format!("{}: {error}", path.display()))
}

/// Whether keys may be asked for at an address: nobody on the way may change them.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    let is_local = |rest: &str| {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        matches!(host, "127.0.0.1" | "localhost" | "[::1]")
    };
    match url.split_once("://") {
        Some(("https", rest)) if !rest.is_empty() => Ok(()),
        Some(("http", rest)) if is_local(rest) => Ok(()),
        _ => Err(format!("{url:?} is no place that keys may be asked for; expected a URL that begins with https://")),
    }
}

async fn get(url: &str) -> Result<Vec<u8>, String> {
    // Once a process; more often changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let failed = |error: reqwest::Error| format!("{url}: {}", error.without_url());
    let client = reqwest::Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none());
    let client = client.build().map_err(failed)?;
    let mut answer = client.get(url).send().await.map_err(failed)?.error_for_status().map_err(failed)?;
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(failed)? {
        if bytes.len() + piece.len() > BYTES_MAX {
            return Err(format!("{url}: the answer is longer than {BYTES_MAX} bytes"));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_asked_for_where_nobody_can_change_them() {
        for good in
            ["https://id.example/keys", "http://127.0.0.1:8080/keys", "http://localhost/keys", "http://[::1]:9/k"]
        {
            check_url(good).unwrap();
        }
        for bad in ["http://id.example/keys", "http://127.0.0.1.example/", "file:///keys", "keys.json", "https://"] {
            assert!(check_url(bad).unwrap_err().contains("begins with https://"), "{bad}");
        }
    }

    #[test]
    fn keys_that_check_no_signature_are_left_out() {
        let ed = r#"{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "a"}"#;
        let secret = r#"{"kty": "oct", "k": "c2VjcmV0", "kid": "b", "alg": "HS256"}"#;
        let encrypts = ed.replace("\"kid\": \"a\"", "\"kid\": \"c\", \"use\": \"enc\"");
        let set = format!("{{\"keys\": [{ed}, {secret}, {encrypts}]}}");
        let found = usable(set.as_bytes()).unwrap();
        assert_eq!(found.iter().map(|key| key.id.as_deref()).collect::<Vec<_>>(), [Some("a")]);
        let none = usable(format!("{{\"keys\": [{secret}]}}").as_bytes()).unwrap_err();
        assert!(none.contains("holds no key"), "{none}");
        assert!(usable(b"{}").unwrap_err().contains("no set of JSON web keys"));
        assert_eq!(algorithm(KeyAlgorithm::ES256), Some(Algorithm::ES256));
        assert_eq!(algorithm(KeyAlgorithm::HS256), None);
    }
}
