//! How often somebody may do something: a bucket of permits for each, which fills at a rate.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Names that are remembered at once; beyond that those go whose buckets are full, who are as if they had never been here.
const NAMES_MAX: usize = 10_000;

/// A bucket for every name.
#[derive(Debug)]
pub(crate) struct Pace {
    per_second: f64,
    at_once: f64,
    buckets: Mutex<BTreeMap<String, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    permits: f64,
    at: Instant,
}

impl Pace {
    /// Buckets that hold `at_once` permits and get `per_second` new ones.
    pub(crate) fn new(per_second: f64, at_once: f64) -> Self {
        Self { per_second, at_once: at_once.max(1.0), buckets: Mutex::default() }
    }

    /// Takes a permit, or says after which time there is one.
    pub(crate) fn take(&self, name: &str) -> Result<(), Duration> {
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= NAMES_MAX && !buckets.contains_key(name) {
            buckets.retain(|_, bucket| self.filled(*bucket, now) < self.at_once);
            // All are in use: whoever is the first of them is forgotten, so that nobody fills the memory.
            if buckets.len() >= NAMES_MAX {
                buckets.pop_first();
            }
        }
        let bucket = buckets.entry(name.to_owned()).or_insert(Bucket { permits: self.at_once, at: now });
        *bucket = Bucket { permits: self.filled(*bucket, now), at: now };
        if bucket.permits < 1.0 {
            let missing = 1.0 - bucket.permits;
            return Err(Duration::try_from_secs_f64(missing / self.per_second).unwrap_or(Duration::MAX));
        }
        bucket.permits -= 1.0;
        Ok(())
    }

    fn filled(&self, bucket: Bucket, now: Instant) -> f64 {
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        (bucket.permits + since * self.per_second).min(self.at_once)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_empties_and_fills_and_is_nobody_elses() {
        let pace = Pace::new(2.0, 3.0);
        assert_eq!([(); 3].map(|()| pace.take("a")), [Ok(()); 3]);
        assert_eq!(pace.take("a"), Err(Duration::from_millis(500)));
        assert_eq!(pace.take("b"), Ok(()));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(pace.take("a"), Ok(()));
        assert!(pace.take("a").is_err());
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!([(); 4].map(|()| pace.take("a").is_ok()), [true, true, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn many_names_do_not_fill_the_memory() {
        let pace = Pace::new(1.0, 2.0);
        for name in 0..3 * NAMES_MAX {
            pace.take(&name.to_string()).unwrap();
        }
        assert!(pace.buckets.lock().unwrap().len() <= NAMES_MAX);
        tokio::time::advance(Duration::from_secs(60)).await;
        pace.take("last").unwrap();
        assert!(pace.buckets.lock().unwrap().len() <= 2, "who is full is forgotten");
    }
}
