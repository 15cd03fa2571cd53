//! Processes of a mesh whose long letters go another way: over a link between their devices.
//!
//! The mesh carries the short letters, says which are long, how long they are and what they hash to, and knows who lives. The link
//! carries bytes and nothing else: sums are made as they are everywhere, so that no bit depends on the way.

#![expect(clippy::disallowed_methods, reason = "a wire has deadlines, and nothing wakes who waits for a device")]

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crate::error::{Checksum, Error};
use crate::mesh::{Mesh, checksum};
use crate::{Heard, Letters, Wire};

/// Letters of up to so many bytes stay with the mesh: what is said about a long one takes as long.
const SHORT: usize = 64 << 10;
/// How long the mesh may take to tell that a process has died, after a link has failed because of that.
const WORD_OF_DEATH: Duration = Duration::from_secs(2);

/// A letter with the number of the process that it is for.
pub type Letter<'a> = (u32, Cow<'a, [u8]>);

/// Says whether who waits should go on, and why not.
pub type Watch<'a> = dyn FnMut() -> Result<(), Error> + 'a;

/// One end of what carries long letters between the processes of a run.
pub trait Link: Send {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// Sends `out`, and fills `into`, which have the lengths of what comes; each with the number of the process at the other
    /// end. What one process sends another one has a place for. `watch` is asked again and again, and ends the call by what it
    /// finds.
    ///
    /// # Errors
    /// [`Stopped`]. The link is of no further use then.
    fn carry(&mut self, out: &[Letter<'_>], into: &mut [(u32, Vec<u8>)], watch: &mut Watch<'_>) -> Result<(), Stopped>;
}

/// Why letters were not carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Whoever watched has ended it.
    By(Error),
    /// The link itself failed, in its own words: often enough because a process has died, which the mesh knows better.
    Failed(String),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::By(error)
    }
}

/// A process of a mesh with one end of a link.
pub struct Carried<L> {
    mesh: Mesh,
    link: L,
}

impl<L: Link> Carried<L> {
    /// Over a mesh whose processes all have an end of the same link.
    pub const fn new(mesh: Mesh, link: L) -> Self {
        Self { mesh, link }
    }

    /// Carries the long letters of exchange `number`.
    fn carry(&mut self, number: u64, out: &[Letter<'_>], into: &mut [(u32, Vec<u8>)]) -> Result<(), Error> {
        let (mesh, within) = (&self.mesh, self.mesh.patience().exchange);
        let give_up = Instant::now() + within;
        let first = into.first().map(|(rank, _)| *rank).or_else(|| out.first().map(|(rank, _)| *rank));
        let mut watch = || match mesh.lost() {
            Some(error) => Err(error),
            None if Instant::now() < give_up => Ok(()),
            None => Err(Error::Late { rank: first.unwrap_or_default(), exchange: number, within }),
        };
        match self.link.carry(out, into, &mut watch) {
            Ok(()) => Ok(()),
            Err(Stopped::By(error)) => Err(error),
            Err(Stopped::Failed(what)) => {
                let link = self.link.name();
                Err(death(&self.mesh).unwrap_or(Error::Link { link, exchange: number, what }))
            }
        }
    }
}

/// What the mesh says of a process that has died just now.
fn death(mesh: &Mesh) -> Option<Error> {
    let give_up = Instant::now() + WORD_OF_DEATH;
    loop {
        match mesh.lost() {
            None if Instant::now() < give_up => pause(),
            found => return found,
        }
    }
}

/// A moment between two looks at what others do.
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_micros(50));
}

/// The letter is long.
const LONG: u8 = 1;
/// Its sender has a long letter for somebody.
const SENDS_LONG: u8 = 2;

/// What the mesh carries of letters to `size` processes: something to each, also where the last of them get none.
fn heads(letters: &Letters, size: usize) -> Letters {
    let sends_long = letters.longest() > SHORT;
    match letters {
        Letters::All(letter) => Letters::All(head(letter, sends_long)),
        Letters::Each(each) => {
            let none = std::iter::repeat_n(&[][..], size.saturating_sub(each.len()));
            let all = each.iter().map(Vec::as_slice).chain(none);
            Letters::Each(all.map(|letter| head(letter, sends_long)).collect())
        }
    }
}

fn head(letter: &[u8], sends_long: bool) -> Vec<u8> {
    let flags = if sends_long { SENDS_LONG } else { 0 };
    if letter.len() <= SHORT {
        let mut head = Vec::with_capacity(1 + letter.len());
        head.push(flags);
        head.extend_from_slice(letter);
        return head;
    }
    let length = (letter.len() as u64).to_le_bytes();
    [&[flags | LONG][..], &length, &checksum(&[], letter).0].concat()
}

/// How long a long letter is and what it hashes to, by its head, which a short one follows; and whether the sender has a long letter for
/// somebody.
fn read(head: &[u8]) -> Option<(Option<(u64, Checksum)>, bool)> {
    let (flags, rest) = head.split_first()?;
    let sends_long = flags & SENDS_LONG != 0;
    if flags & LONG == 0 {
        return Some((None, sends_long));
    }
    let (length, sum) = rest.split_first_chunk::<8>()?;
    Some((Some((u64::from_le_bytes(*length), Checksum(sum.try_into().ok()?))), sends_long))
}

impl<L: Link> Wire for Carried<L> {
    fn rank(&self) -> u32 {
        self.mesh.rank()
    }

    fn size(&self) -> u32 {
        self.mesh.size()
    }

    fn exchange(&mut self, mut letters: Letters) -> Result<Heard, Error> {
        let (own, size, number) = (self.rank() as usize, self.size() as usize, self.mesh.next_exchange());
        let mine = letters.take(own).into_owned();
        let heads = heads(&letters, size);
        let sends_long = letters.longest() > SHORT;
        let mut heard = self.mesh.exchange(heads)?;
        let (mut into, mut sums, mut any_long) = (Vec::new(), Vec::new(), sends_long);
        for (rank, letter) in (0..).zip(&mut heard.letters).filter(|(rank, _)| *rank as usize != own) {
            let unclear = || Error::Unexpected { rank, what: "the head of a letter is cut off".to_owned() };
            let (long, sends_long) = read(letter).ok_or_else(unclear)?;
            any_long |= sends_long;
            match long {
                None => drop(letter.drain(..1)),
                Some((length, sum)) => {
                    into.push((rank, vec![0; usize::try_from(length).map_err(|_| unclear())?]));
                    sums.push(sum);
                }
            }
        }
        heard.letters[own] = mine;
        if any_long {
            let others = (0..).zip(letters.take_all(size)).filter(|(rank, _)| *rank as usize != own);
            let out: Vec<_> = others.filter(|(_, letter)| letter.len() > SHORT).collect();
            self.carry(number, &out, &mut into)?;
            for ((rank, letter), sent) in into.into_iter().zip(sums) {
                let came = checksum(&[], &letter);
                if came != sent {
                    return Err(Error::Damaged { rank, exchange: number, sent, came });
                }
                heard.letters[rank as usize] = letter;
            }
            // Nobody leaves, and takes its end of the link away, before all have what was for them.
            let done = self.mesh.exchange(Letters::All(Vec::new()))?;
            heard.waits.iter_mut().zip(done.waits).for_each(|(sum, wait)| *sum += wait);
        }
        Ok(heard)
    }
}

#[cfg(test)]
pub(crate) mod tests;
