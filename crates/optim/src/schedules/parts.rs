//! What the schedules share: a linear warm-up.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How long the rate rises from 0: a share of the run below 1, or a number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct Warmup(#[schemars(range(min = 0.0, max = 1e9))] pub(super) f64);

impl Warmup {
    /// Its length in steps for a run of `total`: a share is rounded up, as `transformers` does.
    pub(super) fn steps(self, total: u64) -> u64 {
        if self.0 < 1.0 { (self.0 * total as f64).ceil() as u64 } else { self.0 as u64 }
    }

    /// The factor during the warm-up, or how far the rest of the run has come: 0 at its start, 1 at its end.
    pub(super) fn split(self, done: u64, total: u64) -> Result<f64, f64> {
        let warmup = self.steps(total);
        if done < warmup {
            return Ok(done as f64 / warmup as f64);
        }
        Err((done - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_and_a_number_of_steps_are_told_apart() {
        assert_eq!(Warmup(0.03).steps(200), 6);
        assert_eq!(Warmup(0.0).steps(200), 0);
        assert_eq!(Warmup(1.0).steps(200), 1);
        assert_eq!(Warmup(10.0).steps(200), 10);
        assert_eq!(Warmup(10.0).split(5, 200), Ok(0.5));
        assert_eq!(Warmup(10.0).split(105, 200), Err(0.5));
    }
}
