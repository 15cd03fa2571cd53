//! Whether all ranks of a run train the same parameters, and who of them holds the others up.
//!
//! A bit that is lost in a memory changes a number and nothing else: the run goes on, to a result that nobody can make
//! again. Ranks of a run have copies of the same parameters, so they can look at each other: each takes what it has computed
//! a step with into one digest, step after step, and every [`EVERY`] steps, and before anything is kept, all show theirs. A
//! copy that was another one for a single step shows even if the update made it right again. What is on its way between
//! processes has a digest of its own (`attune_collective::mesh`). What cannot be seen is a number that goes wrong where it
//! is made, for all get the same wrong one.
//!
//! With the digests goes how long each process has waited for each other one.

use std::time::Duration;

use attune_points::Result;
use attune_tensor::bytes;
use candle_core::Tensor;
use rayon::prelude::*;

use crate::engine::{Message, RankEngine};

/// Steps between two looks at each other: a message of a few bytes against the time of so many steps.
pub(crate) const EVERY: u64 = 16;

/// Each process's waits for each, from its number to theirs.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Waits {
    /// Steps that they are of.
    pub(crate) steps: u64,
    /// How long these took.
    pub(crate) took: Duration,
    /// By who waits; of each, by whom for.
    pub(crate) of: Vec<Vec<Duration>>,
}

/// Who holds the others up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Straggler {
    /// The process.
    pub(crate) rank: u32,
    /// How long a process waits for it that waits neither longest nor shortest.
    pub(crate) waited: Duration,
}

impl Waits {
    /// How long the others wait for each process: the median of theirs, the longer one where two are in the middle. A process
    /// waits for none that is as late as itself.
    pub(crate) fn for_each(&self) -> Vec<Duration> {
        let median = |rank: usize| {
            let others = (0..).zip(&self.of).filter(|(other, _)| *other != rank);
            let mut all: Vec<Duration> = others.filter_map(|(_, of)| of.get(rank).copied()).collect();
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        (0..self.of.len()).map(median).collect()
    }

    /// The process that the others spend more than half of their time waiting for, the worst if there are several.
    pub(crate) fn straggler(&self) -> Option<Straggler> {
        let all = (0..).zip(self.for_each()).map(|(rank, waited)| Straggler { rank, waited });
        all.filter(|of| of.waited * 2 > self.took).max_by_key(|of| of.waited)
    }

    /// Who waits for a process how long, in words.
    pub(crate) fn words(&self, rank: u32) -> String {
        let others = (0..).zip(&self.of).filter(|(other, _)| *other != rank);
        let wait = |(other, of): (u32, &Vec<Duration>)| {
            let waited = of.get(rank as usize).copied().unwrap_or_default();
            format!("rank {other} waits for rank {rank} for {:.1} s", waited.as_secs_f64())
        };
        others.map(wait).collect::<Vec<_>>().join(", ")
    }
}

impl RankEngine<'_> {
    /// Takes the parameters that a step was computed with into this rank's digest, before an update puts others in their
    /// place.
    pub(crate) fn witness(&mut self) -> Result<()> {
        if self.collective.size() == 1 {
            return Ok(());
        }
        #[cfg(feature = "failpoints")]
        self.lose_a_bit()?;
        let values: Vec<_> = self.theta.trained().collect();
        let digest = |(id, value): &(attune_points::TensorId, &Tensor)| {
            let mut hash = blake3::Hasher::new();
            hash.update(id.to_string().as_bytes());
            hash.update(&bytes::of_f32(&value.flatten_all()?.to_vec1::<f32>()?));
            Ok(hash.finalize())
        };
        let digests: Vec<Result<blake3::Hash>> = values.par_iter().map(digest).collect();
        let mut hash = blake3::Hasher::new();
        hash.update(&self.witnessed);
        for digest in digests {
            hash.update(digest?.as_bytes());
        }
        self.witnessed = *hash.finalize().as_bytes();
        Ok(())
    }

    /// Turns one bit of this rank's parameters over, as a memory does: what a test plants, with the rank.
    #[cfg(feature = "failpoints")]
    fn lose_a_bit(&mut self) -> Result<()> {
        let own = self.collective.rank().to_string();
        let planted = fail::eval("trainer::bit_lost", |rank| rank.is_none_or(|rank| rank == own));
        if planted != Some(true) {
            return Ok(());
        }
        let Some((id, value)) = self.theta.trained().next().map(|(id, value)| (id, value.clone())) else {
            return Ok(());
        };
        let mut numbers = value.flatten_all()?.to_vec1::<f32>()?;
        if let Some(number) = numbers.first_mut() {
            *number = f32::from_bits(number.to_bits() ^ 1);
        }
        self.theta.put(&id, Tensor::from_vec(numbers, value.shape(), value.device())?);
        Ok(())
    }

    /// Makes sure that all ranks have been where this one was. How long each process has waited for each, if anybody has.
    ///
    /// # Errors
    /// [`crate::Error::Diverged`] if the digest of one is another one.
    pub(crate) fn agree(&mut self) -> std::result::Result<Waits, crate::Error> {
        if self.collective.size() == 1 {
            return Ok(Waits::default());
        }
        self.witness()?;
        let (own, digest) = (self.collective.rank(), self.witnessed);
        let waits = std::mem::take(&mut self.waits);
        let Waits { steps, took, of } = waits;
        let said = Message::Values { digest, waits: of.into_iter().flatten().collect() };
        let mut found = Waits { steps, took, of: Vec::new() };
        for (rank, message) in self.exchange(vec![(own, said)])? {
            match message {
                Message::Values { digest: theirs, .. } if theirs != digest => {
                    let [own_digest, digest] = [digest, theirs].map(blake3::Hash::from_bytes);
                    return Err(crate::Error::Diverged { own, own_digest, rank, digest, step: self.step });
                }
                // Of a process's ranks one alone has them.
                Message::Values { waits, .. } => found.of.extend(Some(waits).filter(|waits| !waits.is_empty())),
                _ => {
                    let what = "something else where a digest was due".to_owned();
                    return Err(attune_collective::Error::Unexpected { rank, what }.into());
                }
            }
        }
        Ok(found)
    }

    /// Ends a step: what was waited for meanwhile counts, unless `is_settled` says that the step began while another process
    /// still wrote or measured.
    pub(crate) fn count_waits(&mut self, took: Duration, is_settled: bool) {
        let new = self.collective.take_waits();
        if new.is_empty() || !is_settled {
            return;
        }
        self.waits.steps += 1;
        self.waits.took += took;
        match self.waits.of.first_mut() {
            Some(own) => own.iter_mut().zip(new).for_each(|(sum, wait)| *sum += wait),
            None => self.waits.of.push(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(took_ms: u64, of: &[&[u64]]) -> Waits {
        let row = |row: &&[u64]| row.iter().copied().map(Duration::from_millis).collect();
        Waits { steps: 16, took: Duration::from_millis(took_ms), of: of.iter().map(row).collect() }
    }

    #[test]
    fn who_is_waited_for_most_of_the_time_is_named() {
        let two = waits(1000, &[&[0, 900], &[1, 0]]);
        assert_eq!(two.straggler(), Some(Straggler { rank: 1, waited: Duration::from_millis(900) }));
        assert_eq!(two.words(1), "rank 0 waits for rank 1 for 0.9 s");
        // The first one may be the slow one.
        assert_eq!(waits(1000, &[&[0, 2], &[800, 0]]).straggler().map(|of| of.rank), Some(0));
        // One of four; and two of four, which do not wait for each other.
        let one = waits(1000, &[&[0, 9, 900, 5], &[8, 0, 910, 7], &[0, 0, 0, 0], &[3, 4, 890, 0]]);
        assert_eq!(one.straggler().map(|of| of.rank), Some(2));
        assert!(one.words(2).starts_with("rank 0 waits for rank 2 for 0.9 s, rank 1 waits"), "{}", one.words(2));
        let both = waits(1000, &[&[0, 0, 900, 950], &[0, 0, 900, 950], &[0, 0, 0, 50], &[0, 0, 0, 0]]);
        assert_eq!(both.straggler().map(|of| of.rank), Some(3));
    }

    #[test]
    fn who_waits_a_little_names_nobody() {
        assert_eq!(waits(1000, &[&[0, 400], &[300, 0]]).straggler(), None);
        assert_eq!(Waits::default().straggler(), None);
        // One process alone that waits for another says nothing of it: the network between the two may be at fault.
        assert_eq!(waits(1000, &[&[0, 0, 900], &[0, 0, 10], &[0, 0, 0], &[0, 0, 10]]).straggler(), None);
    }
}
