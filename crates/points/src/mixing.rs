//! The point `Mixing`: which domain does the next batch come from, given feedback?

use attune_spec::id::Step;

use crate::engine::LossReport;
use crate::error::Result;
use crate::layout::LabelCounts;

/// Weights over the domains that sum to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Simplex(Vec<f64>);

impl Simplex {
    /// Normalises non-negative weights, not all of them 0.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] naming the weight at fault.
    pub fn new(weights: Vec<f64>) -> Result<Self> {
        if let Some((index, weight)) = weights.iter().enumerate().find(|(_, w)| !w.is_finite() || **w < 0.0) {
            return Err(crate::Error::Refused(format!(
                "weight {index} of the mixture is {weight}; expected 0 or more"
            )));
        }
        let sum: f64 = weights.iter().sum();
        if sum <= 0.0 {
            return Err(crate::Error::Refused("all weights of the mixture are 0; expected one above".to_owned()));
        }
        Ok(Self(weights.into_iter().map(|weight| weight / sum).collect()))
    }

    /// The share of each domain.
    pub fn shares(&self) -> &[f64] {
        &self.0
    }

    /// The domain in which the point `u` of [0, 1) falls.
    pub fn pick(&self, u: f64) -> usize {
        let mut end = 0.0;
        let found = self.0.iter().position(|share| {
            end += share;
            u < end
        });
        // Rounding may leave the last end a hair below 1; the last domain with a share takes that hair.
        found.or_else(|| self.0.iter().rposition(|share| *share > 0.0)).unwrap_or(0)
    }
}

/// What a mixing method wants to hear about. Nothing is computed that nobody asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FeedbackNeeds {
    /// Mean training loss of each domain in the last step.
    pub loss: bool,
}

/// What a step told about each domain; the same on every rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Feedback {
    /// Mean training loss a supervised token; `None` for a domain that was not drawn.
    pub loss: Vec<Option<f64>>,
}

impl Feedback {
    /// What the sums of a step's passes tell.
    pub fn of(step: &LossReport) -> Self {
        let mean = |(loss, counts): &(f64, LabelCounts)| (counts.tokens > 0).then(|| loss / counts.tokens as f64);
        Self { loss: step.by_domain.iter().map(mean).collect() }
    }
}

/// Decides the shares of the domains, step by step. A state machine: its state is in every checkpoint.
pub trait Mixing: Send {
    /// What it wants to hear about.
    fn needs(&self) -> FeedbackNeeds {
        FeedbackNeeds::default()
    }

    /// The shares for step `step`, given what the step before told.
    ///
    /// # Errors
    /// Shares that are no simplex.
    fn decide(&mut self, step: Step, feedback: &Feedback) -> Result<Simplex>;

    /// Everything that a resumed run needs.
    fn state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// A state that was not written by this method.
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            Ok(())
        } else {
            Err(crate::Error::Refused("this mixing method keeps no state".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_of_the_unit_interval_falls_in_a_domain_with_a_share() {
        let mix = Simplex::new(vec![1.0, 0.0, 2.0, 0.0]).unwrap();
        for (u, domain) in [(0.0, 0), (0.33, 0), (0.34, 2), (0.999_999_999, 2), (1.0, 2)] {
            assert_eq!(mix.pick(u), domain, "{u}");
        }
        assert!(Simplex::new(vec![0.0]).is_err());
        assert!(Simplex::new(vec![f64::NAN]).is_err());
    }
}
