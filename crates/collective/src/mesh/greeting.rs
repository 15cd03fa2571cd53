//! How two processes of a run make sure of each other, before anything else is said on a connection.
//!
//! Each listens under a token of its own, which only those learn that the scheduler gave the run to. Both sides of a
//! connection prove that they know both tokens, over numbers that each side draws anew, so that neither a stranger nor a
//! process of an earlier attempt gets in, and nobody who listens on the network learns how to.

use std::io::{self, Read, Write};

use super::Peer;

/// What a connection begins with.
const MAGIC: [u8; 8] = *b"attune\x00\x02";
/// What the shared key is derived for.
const CONTEXT: &str = "attune 2026-11 a connection between two processes of a run";

/// Bytes of a token, a nonce and a proof.
pub(super) const SECRET: usize = 32;

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn nonce() -> io::Result<[u8; SECRET]> {
    let mut bytes = [0; SECRET];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

/// What two processes share.
struct Pair {
    key: [u8; SECRET],
    ranks: [u32; 2],
}

impl Pair {
    /// Of the process that connects and the one that listens.
    fn new(connects: (u32, &Peer), listens: (u32, &Peer)) -> Self {
        let mut both = blake3::Hasher::new_derive_key(CONTEXT);
        both.update(&connects.1.token).update(&listens.1.token);
        Self { key: *both.finalize().as_bytes(), ranks: [connects.0, listens.0] }
    }

    fn proof(&self, side: &[u8], nonces: [&[u8; SECRET]; 2]) -> blake3::Hash {
        let mut hash = blake3::Hasher::new_keyed(&self.key);
        hash.update(side);
        for rank in self.ranks {
            hash.update(&rank.to_le_bytes());
        }
        for nonce in nonces {
            hash.update(nonce);
        }
        hash.finalize()
    }
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Greets the process that listens.
///
/// # Errors
/// The stream's, or that the other side does not know the run.
pub(super) fn greet(stream: &mut (impl Read + Write), own: (u32, &Peer), to: (u32, &Peer)) -> io::Result<()> {
    let (pair, mine) = (Pair::new(own, to), nonce()?);
    let mut hello = MAGIC.to_vec();
    hello.extend(own.0.to_le_bytes());
    hello.extend(mine);
    stream.write_all(&hello)?;
    let theirs: [u8; SECRET] = read(stream)?;
    // Compared in constant time by its type.
    if blake3::Hash::from_bytes(read(stream)?) != pair.proof(b"listens", [&mine, &theirs]) {
        return Err(broken("what listens there is not of this run"));
    }
    stream.write_all(pair.proof(b"connects", [&mine, &theirs]).as_bytes())
}

/// Answers a process that connects; its rank.
///
/// # Errors
/// The stream's, or that the other side does not know the run.
pub(super) fn answer(stream: &mut (impl Read + Write), own: (u32, &Peer), all: &[Peer]) -> io::Result<u32> {
    if read(stream)? != MAGIC {
        return Err(broken("it does not speak this protocol"));
    }
    let rank = u32::from_le_bytes(read(stream)?);
    let theirs: [u8; SECRET] = read(stream)?;
    let peer = all.get(rank as usize).filter(|_| rank > own.0).ok_or_else(|| broken("no such rank connects here"))?;
    let (pair, mine) = (Pair::new((rank, peer), own), nonce()?);
    let mut said = mine.to_vec();
    said.extend(pair.proof(b"listens", [&theirs, &mine]).as_bytes());
    stream.write_all(&said)?;
    if blake3::Hash::from_bytes(read(stream)?) != pair.proof(b"connects", [&theirs, &mine]) {
        return Err(broken("it does not know the run's tokens"));
    }
    Ok(rank)
}
