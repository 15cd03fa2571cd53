//! How long to wait after a failed attempt.

use std::time::Duration;

use crate::{Attempt, JobKey};

/// Exponential waits: `base`, `base * factor`, …, at most `cap`, each cut by a jitter of up to half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Backoff {
    /// The longest wait after the first failure.
    pub base: Duration,
    /// How much longer each further wait is.
    pub factor: u32,
    /// The longest wait of all.
    pub cap: Duration,
}

impl Default for Backoff {
    /// Two seconds, doubled, up to five minutes.
    fn default() -> Self {
        Self { base: Duration::from_secs(2), factor: 2, cap: Duration::from_secs(300) }
    }
}

impl Backoff {
    /// The wait after failure number `n_failed` (from 1) of a job, whose attempt had this epoch.
    ///
    /// The jitter spreads jobs that failed together. It is drawn from the attempt's name and not from a generator, so
    /// that a scheduler that restarts waits as long as the one before.
    pub fn wait(&self, attempt: &Attempt, n_failed: u32) -> Duration {
        // From a half to the whole, in 1024 parts.
        self.longest(n_failed).mul_f64((512 + (hash(&attempt.key, attempt.epoch.0) & 511)) as f64 / 1024.0)
    }

    /// The longest wait after failure number `n_failed` (from 1).
    pub(crate) fn longest(&self, n_failed: u32) -> Duration {
        let doublings = n_failed.saturating_sub(1);
        let longest = self.factor.checked_pow(doublings).and_then(|factor| self.base.checked_mul(factor));
        longest.unwrap_or(self.cap).min(self.cap)
    }
}

/// FNV-1a over the names, finished by splitmix64 so that the low bits depend on all.
fn hash(key: &JobKey, epoch: u64) -> u64 {
    let text = [key.project.as_str().as_bytes(), b"/", key.job.as_str().as_bytes(), &epoch.to_le_bytes()];
    let fnv = text
        .into_iter()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attune_spec::id::{Epoch, JobId, Project};

    fn attempt(job: usize, epoch: u64) -> Attempt {
        let key = JobKey::new(Project::default(), JobId::new(format!("j{job}")).unwrap());
        Attempt { key, epoch: Epoch(epoch) }
    }

    #[test]
    fn waits_double_up_to_the_cap_and_never_leave_half_to_whole() {
        let backoff = Backoff::default();
        for (n_failed, longest) in [(1, 2), (2, 4), (3, 8), (8, 256), (9, 300), (1000, 300), (u32::MAX, 300)] {
            let longest = Duration::from_secs(longest);
            for job in 0..50 {
                let wait = backoff.wait(&attempt(job, 7), n_failed);
                assert!(wait >= longest / 2 && wait <= longest, "{n_failed}: {wait:?}");
            }
        }
    }

    #[test]
    fn jobs_that_fail_together_spread_and_each_repeats_itself() {
        let waits: std::collections::BTreeSet<_> =
            (0..100).map(|job| Backoff::default().wait(&attempt(job, 1), 1)).collect();
        assert!(waits.len() > 80, "{} different waits", waits.len());
        assert_eq!(Backoff::default().wait(&attempt(3, 1), 2), Backoff::default().wait(&attempt(3, 1), 2));
    }
}
