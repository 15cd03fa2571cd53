//! Tokens that an identity provider issues: JSON web tokens, signed with a key that it publishes.

use attune_store::UtcMs;
use jsonwebtoken::{Validation, decode, decode_header};
use serde_json::{Map, Value};

use super::Caller;
use super::keys::{self, Keys, Place};
use super::roles::{self, RoleRule, decide};
use super::signature::{self, ALGORITHMS};

/// Seconds by which the clocks of the provider and of this machine may differ.
const LEEWAY_S: u64 = 30;
/// Longest token that is looked at.
const BYTES_MAX: usize = 8 << 10;
/// Longest name of somebody.
const SUBJECT_BYTES_MAX: usize = 200;

/// An identity provider whose tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oidc {
    issuer: String,
    audience: String,
    place: Place,
    rules: Vec<RoleRule>,
}

impl Oidc {
    /// The provider with this issuer's name, whose tokens are for `audience`. Its keys are at `keys`, a file or a URL, or where
    /// its own description says (`ISSUER/.well-known/openid-configuration`). What its claims mean here is written in `roles`.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn new(issuer: &str, audience: &str, keys: Option<&str>, roles: &str) -> Result<Self, String> {
        let place = match keys {
            Some(url) if url.contains("://") => {
                keys::check_url(url)?;
                Place::Url(url.to_owned())
            }
            Some(path) => Place::File(path.into()),
            None => {
                keys::check_url(issuer)?;
                Place::Described(issuer.to_owned())
            }
        };
        if audience.is_empty() {
            return Err("the audience is empty: any token of the issuer would do, whomever it is for".to_owned());
        }
        let rules = roles::read(roles)?;
        Ok(Self { issuer: issuer.to_owned(), audience: audience.to_owned(), place, rules })
    }
}

/// A provider and its keys.
#[derive(Debug)]
pub(super) struct Provider {
    oidc: Oidc,
    keys: Keys,
    validation: Validation,
}

impl Provider {
    pub(super) fn new(oidc: Oidc) -> Self {
        signature::install();
        let mut validation = Validation::new(ALGORITHMS[0]);
        validation.algorithms = ALGORITHMS.to_vec();
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        validation.set_issuer(&[&oidc.issuer]);
        validation.set_audience(&[&oidc.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let keys = Keys::new(oidc.place.clone());
        Self { oidc, keys, validation }
    }

    /// Gets the keys.
    pub(super) async fn open(&self) -> Result<(), String> {
        self.keys.open().await
    }

    /// Who a token says that its bearer is, if it can be believed and a rule fits.
    pub(super) async fn believe(&self, token: &str, peer: &str) -> Option<Caller> {
        if token.len() > BYTES_MAX {
            return None;
        }
        let header = decode_header(token).ok().filter(|header| ALGORITHMS.contains(&header.alg))?;
        for key in self.keys.of(&header).await {
            let validation = Validation { algorithms: vec![header.alg], ..self.validation.clone() };
            if let Ok(found) = decode::<Map<String, Value>>(token, &key.key, &validation) {
                return self.caller(&found.claims, peer);
            }
        }
        None
    }

    fn caller(&self, claims: &Map<String, Value>, peer: &str) -> Option<Caller> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let is_name = |text: &&str| (1..=SUBJECT_BYTES_MAX).contains(&text.len()) && !text.contains(char::is_control);
        let subject = text("sub").filter(is_name)?;
        let name = text("preferred_username").or_else(|| text("email")).filter(is_name).unwrap_or(subject);
        let expires = claims.get("exp").and_then(Value::as_f64)? * 1000.0;
        let rule = decide(&self.oidc.rules, claims)?;
        Some(Caller::vouched(subject, name, rule.role, rule.project.clone(), UtcMs(expires as i64), peer))
    }
}

#[cfg(test)]
mod tests {
    use attune_store::token::Role;
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
    use serde_json::json;

    use super::*;
    use crate::clock::Clock;

    const ROLES: &str = "rules: [{claim: groups, value: tuners, role: submitter, project: a}]";

    enum Signer {
        P256(EcdsaKeyPair),
        Ed(Ed25519KeyPair),
    }

    impl Signer {
        fn p256() -> Self {
            let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
            let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
            Self::P256(EcdsaKeyPair::from_pkcs8(algorithm, made.as_ref(), &SystemRandom::new()).unwrap())
        }

        fn ed() -> Self {
            let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
            Self::Ed(Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap())
        }

        fn jwk(&self, id: &str) -> Value {
            match self {
                Self::P256(pair) => {
                    let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                    json!({"kty": "EC", "crv": "P-256", "x": BASE64.encode(x), "y": BASE64.encode(y), "kid": id})
                }
                Self::Ed(pair) => {
                    json!({"kty": "OKP", "crv": "Ed25519", "x": BASE64.encode(pair.public_key()), "kid": id})
                }
            }
        }

        fn sign(&self, header: &Value, claims: &Value) -> String {
            let part = |value: &Value| BASE64.encode(value.to_string());
            let message = format!("{}.{}", part(header), part(claims));
            let signature = match self {
                Self::P256(pair) => pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap().as_ref().to_vec(),
                Self::Ed(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
            };
            format!("{message}.{}", BASE64.encode(signature))
        }
    }

    fn claims() -> Value {
        let now = Clock::utc().0 / 1000;
        json!({"iss": "https://id.example", "aud": "attune", "sub": "u-1", "exp": now + 600, "groups": ["tuners"]})
    }

    fn with(changes: &Value) -> Value {
        let mut claims = claims();
        for (name, value) in changes.as_object().unwrap() {
            match value {
                Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
                value => claims[name] = value.clone(),
            }
        }
        claims
    }

    async fn provider(folder: &tempfile::TempDir, keys: &[Value]) -> Provider {
        let path = folder.path().join("keys.json");
        std::fs::write(&path, json!({"keys": keys}).to_string()).unwrap();
        let oidc = Oidc::new("https://id.example", "attune", Some(path.to_str().unwrap()), ROLES).unwrap();
        let provider = Provider::new(oidc);
        provider.open().await.unwrap();
        provider
    }

    #[tokio::test]
    async fn a_token_of_the_provider_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let (p256, ed) = (Signer::p256(), Signer::ed());
        let provider = provider(&folder, &[p256.jwk("one"), ed.jwk("two")]).await;
        for (signer, header) in [
            (&p256, json!({"alg": "ES256", "kid": "one"})),
            (&p256, json!({"alg": "ES256", "typ": "JWT"})),
            (&ed, json!({"alg": "EdDSA", "kid": "two"})),
        ] {
            let caller = provider.believe(&signer.sign(&header, &claims()), "1.2.3.4").await.unwrap();
            assert_eq!((caller.role(), caller.scope().unwrap().as_str()), (Some(Role::Submitter), "a"));
            assert_eq!((caller.id(), caller.name(), caller.token()), (Some("oidc/u-1"), "u-1", None));
            assert!(caller.expires().unwrap() > Clock::utc());
        }
        let named = with(&json!({"preferred_username": "anna", "aud": ["x", "attune"]}));
        let caller = provider.believe(&p256.sign(&json!({"alg": "ES256"}), &named), "").await.unwrap();
        assert_eq!(caller.name(), "anna");
    }

    #[tokio::test]
    async fn a_token_that_is_wrong_in_any_way_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (p256, other, ed) = (Signer::p256(), Signer::p256(), Signer::ed());
        let provider = provider(&folder, &[p256.jwk("one"), ed.jwk("two")]).await;
        let header = json!({"alg": "ES256", "kid": "one"});
        let now = Clock::utc().0 / 1000;
        for changes in [
            json!({"exp": now - 60}),
            json!({"exp": null}),
            json!({"exp": (now + 600).to_string()}),
            json!({"nbf": now + 300}),
            json!({"nbf": "never"}),
            json!({"aud": "somebody-else"}),
            json!({"aud": []}),
            json!({"aud": null}),
            json!({"iss": "https://id.example.evil"}),
            json!({"iss": null}),
            json!({"sub": null}),
            json!({"sub": ""}),
            json!({"sub": "u\n1"}),
            json!({"sub": "u".repeat(1000)}),
            json!({"groups": ["others"]}),
            json!({"groups": null}),
        ] {
            let token = p256.sign(&header, &with(&changes));
            assert!(provider.believe(&token, "").await.is_none(), "{changes}");
        }
        let good = p256.sign(&header, &claims());
        assert!(provider.believe(&good, "").await.is_some());
        let parts: Vec<&str> = good.split('.').collect();
        let public = p256.jwk("one")["x"].as_str().unwrap().to_owned();
        let hmac = |secret: &[u8]| {
            let message = format!("{}.{}", BASE64.encode(json!({"alg": "HS256", "kid": "one"}).to_string()), parts[1]);
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
            format!("{message}.{}", BASE64.encode(ring::hmac::sign(&key, message.as_bytes())))
        };
        let admin = BASE64.encode(with(&json!({"groups": ["tuners", "admins"]})).to_string());
        for (what, token) in [
            ("no algorithm", format!("{}.{}.", BASE64.encode(json!({"alg": "none"}).to_string()), parts[1])),
            (
                "no algorithm, old signature",
                format!("{}.{}.{}", BASE64.encode("{\"alg\":\"none\"}"), parts[1], parts[2]),
            ),
            ("the public key as a secret", hmac(public.as_bytes())),
            ("the public point as a secret", hmac(&BASE64.decode(&public).unwrap())),
            ("an empty secret", hmac(b"")),
            ("another key", other.sign(&header, &claims())),
            ("another key with its own name", other.sign(&json!({"alg": "ES256", "kid": "mine"}), &claims())),
            ("a key that comes with it", other.sign(&json!({"alg": "ES256", "jwk": other.jwk("one")}), &claims())),
            ("the algorithm of another key", p256.sign(&json!({"alg": "EdDSA", "kid": "two"}), &claims())),
            ("another key's name", p256.sign(&json!({"alg": "ES256", "kid": "two"}), &claims())),
            ("other claims", format!("{}.{admin}.{}", parts[0], parts[2])),
            ("no signature", format!("{}.{}.", parts[0], parts[1])),
            ("two parts", format!("{}.{}", parts[0], parts[1])),
            ("four parts", format!("{good}.x")),
            ("no token", "x.y.z".to_owned()),
            ("dots", "..".to_owned()),
            ("a long one", "a".repeat(100_000)),
        ] {
            assert!(provider.believe(&token, "").await.is_none(), "{what}: {token}");
        }
    }

    #[test]
    fn a_provider_that_cannot_be_believed_is_refused() {
        let of = |issuer: &str, audience: &str, keys, roles| Oidc::new(issuer, audience, keys, roles).unwrap_err();
        assert!(of("https://id.example", "", None, ROLES).contains("audience is empty"));
        assert!(of("http://id.example", "attune", None, ROLES).contains("begins with https://"));
        assert!(of("https://id.example", "attune", Some("http://keys.example"), ROLES).contains("https://"));
        assert!(of("https://id.example", "attune", None, "rules: []").contains("nobody"));
    }

    #[tokio::test]
    async fn keys_of_a_file_must_be_there() {
        let oidc = Oidc::new("https://id.example", "attune", Some("nowhere/keys.json"), ROLES).unwrap();
        assert!(Provider::new(oidc).open().await.unwrap_err().contains("nowhere/keys.json"));
    }
}
