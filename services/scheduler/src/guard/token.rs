//! Tokens as text: `attune_`, sixteen characters that may be shown, `_`, and the secret.
//!
//! Scanners of source code find them by how they begin. The secret is 256 bits of the system's randomness, so that its hash needs
//! no salt and no slowness: whoever reads the hash cannot try them all.

use attune_proto::Secret;
use attune_spec::id::Digest;

/// How every token begins.
const PREFIX: &str = "attune_";
/// Digits without those that are mistaken for others; 32 of them, so that each is five bits.
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Characters of the part that may be shown: 80 bits.
const ID_DIGITS: usize = 16;
/// Characters of the secret: at least 256 bits.
const SECRET_DIGITS: usize = 52;
/// An id that no token has.
pub(crate) const NOBODY: &str = "nobody";
/// What the hashes are for, so that they are no other hashes.
const PURPOSE: &str = "attune 2026 api token secret";

/// A new token.
#[derive(Debug)]
pub(crate) struct Minted {
    /// The part that may be shown.
    pub(crate) id: String,
    /// What is stored of the secret.
    pub(crate) hash: Digest,
    /// All of it, to be handed over once.
    pub(crate) whole: Secret,
}

/// Makes a token.
pub(crate) fn mint() -> Minted {
    let mut random = [0_u8; ID_DIGITS + SECRET_DIGITS];
    getrandom::fill(&mut random).expect("the system gives randomness");
    let text: String = random.iter().map(|byte| char::from(DIGITS[usize::from(byte & 31)])).collect();
    let (id, secret) = text.split_at(ID_DIGITS);
    Minted { id: id.to_owned(), hash: hash(secret), whole: Secret::new(format!("{PREFIX}{id}_{secret}")) }
}

/// A new token that no server knows yet, for the file from which a scheduler takes its first admin's.
pub fn new_token() -> Secret {
    mint().whole
}

/// The two parts of a token.
pub(crate) fn parts(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let fits = |part: &str, length| part.len() == length && part.bytes().all(|byte| DIGITS.contains(&byte));
    (fits(id, ID_DIGITS) && fits(secret, SECRET_DIGITS)).then_some((id, secret))
}

/// What is stored of a secret.
pub(crate) fn hash(secret: &str) -> Digest {
    Digest::from_bytes(blake3::derive_key(PURPOSE, secret.as_bytes()))
}

/// The hash of a whole token that is not stored at all.
pub(crate) fn whole_hash(token: &Secret) -> blake3::Hash {
    blake3::Hash::from_bytes(blake3::derive_key(PURPOSE, token.expose().as_bytes()))
}

/// Whether two secrets are the same, in a time that does not say where they differ.
pub(crate) fn is_same_secret(a: &Secret, b: &Secret) -> bool {
    whole_hash(a) == whole_hash(b)
}

/// Whether two hashes are the same, in a time that does not say where they differ.
pub(crate) fn same(a: Digest, b: Digest) -> bool {
    blake3::Hash::from_bytes(*a.as_bytes()) == blake3::Hash::from_bytes(*b.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_its_parts_and_its_hash_alone_is_known() {
        let minted = mint();
        let text = minted.whole.expose();
        let (id, secret) = parts(text).unwrap();
        assert_eq!((id, hash(secret)), (minted.id.as_str(), minted.hash));
        assert_eq!(text.len(), "attune_".len() + 16 + 1 + 52);
        assert!(!format!("{minted:?}").contains(secret));
        assert!(same(minted.hash, hash(secret)) && !same(minted.hash, hash(&secret[1..])));
        assert_ne!(mint().whole, minted.whole);
    }

    #[test]
    fn what_is_no_token_has_no_parts() {
        let minted = mint();
        let text = minted.whole.expose();
        let upper = text.to_ascii_uppercase();
        for bad in ["", "attune_", "attune__", &text[1..], &text[..text.len() - 1], &upper, &format!("{text}0")] {
            assert_eq!(parts(bad), None, "{bad}");
        }
        assert!(parts(&text.replace('_', "-")).is_none() && parts(&format!("attune_{NOBODY}_x")).is_none());
    }
}
