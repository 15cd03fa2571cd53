//! Signatures of tokens that others issue, checked by the one library of cryptography that this program has.
//!
//! Keys are public ones: a signature that a shared secret could have made is none here, whatever a token says of itself.

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey};
use ring::signature::{self as sign, RsaPublicKeyComponents, UnparsedPublicKey};
use signature::{Error, Verifier};

/// The algorithms that are believed.
pub(super) const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _: &EncodingKey| Err(ErrorKind::InvalidAlgorithm.into()),
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// Makes this the way in which this process checks signatures.
pub(super) fn install() {
    // A second time changes nothing.
    let _ = PROVIDER.install_default();
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>> {
    let (algorithm, key) = (*algorithm, key.clone());
    let fits = match key.kind() {
        DecodingKeyKind::RsaModulusExponent { .. } => rsa(algorithm).is_some(),
        DecodingKeyKind::SecretOrDer(_) => point(algorithm).is_some() && key.family() == family(algorithm),
    };
    if fits { Ok(Box::new(Checker { algorithm, key })) } else { Err(ErrorKind::InvalidAlgorithm.into()) }
}

fn family(algorithm: Algorithm) -> jsonwebtoken::AlgorithmFamily {
    match algorithm {
        Algorithm::EdDSA => jsonwebtoken::AlgorithmFamily::Ed,
        _ => jsonwebtoken::AlgorithmFamily::Ec,
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static sign::RsaParameters> {
    match algorithm {
        Algorithm::RS256 => Some(&sign::RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => Some(&sign::RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => Some(&sign::RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => Some(&sign::RSA_PSS_2048_8192_SHA256),
        Algorithm::PS384 => Some(&sign::RSA_PSS_2048_8192_SHA384),
        Algorithm::PS512 => Some(&sign::RSA_PSS_2048_8192_SHA512),
        _ => None,
    }
}

fn point(algorithm: Algorithm) -> Option<&'static dyn sign::VerificationAlgorithm> {
    match algorithm {
        Algorithm::ES256 => Some(&sign::ECDSA_P256_SHA256_FIXED),
        Algorithm::ES384 => Some(&sign::ECDSA_P384_SHA384_FIXED),
        Algorithm::EdDSA => Some(&sign::ED25519),
        _ => None,
    }
}

struct Checker {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for Checker {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), Error> {
        let checked = match (self.key.kind(), rsa(self.algorithm), point(self.algorithm)) {
            (DecodingKeyKind::RsaModulusExponent { n, e }, Some(rsa), _) => {
                RsaPublicKeyComponents { n, e }.verify(rsa, message, signature)
            }
            (DecodingKeyKind::SecretOrDer(key), _, Some(point)) => {
                UnparsedPublicKey::new(point, key).verify(message, signature)
            }
            _ => return Err(Error::new()),
        };
        checked.map_err(|_| Error::new())
    }
}

impl JwtVerifier for Checker {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7515, A.2: a key of RSA, and what it signed.
    #[test]
    fn the_example_of_the_standard_is_believed_and_nothing_near_it() {
        install();
        let n = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yR\
                 T-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-\
                 UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFk\
                 MLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
        let message = b"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
        let signature = "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJd\
                         bF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383Lc\
                         OLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmt\
                         VrBp0igcN_IoypGlUPQGe77Rw";
        let key = DecodingKey::from_rsa_components(n, "AQAB").unwrap();
        let check = |message: &[u8], signature: &str, algorithm| {
            jsonwebtoken::crypto::verify(signature, message, &key, algorithm).unwrap_or(false)
        };
        assert!(check(message, signature, Algorithm::RS256));
        assert!(!check(&message[1..], signature, Algorithm::RS256));
        assert!(!check(message, &signature.replacen('c', "d", 1), Algorithm::RS256));
        for other in [Algorithm::RS512, Algorithm::PS256, Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256] {
            assert!(!check(message, signature, other), "{other:?}");
        }
        // The public key as the secret of another algorithm.
        let confused = DecodingKey::from_secret(n.as_bytes());
        assert!(jsonwebtoken::crypto::verify(signature, message, &confused, Algorithm::HS256).is_err());
    }
}
