//! Guards over gradients: every trained tensor is connected to the loss, learns within the first steps, and stays finite.

use std::collections::BTreeMap;

use attune_models::Base;
use attune_points::{Error, Result, TensorId, TensorName};
use candle_core::DType;
use serde::{Deserialize, Serialize};

/// The sum of the squares of each tensor's gradient; none where no pass wrote one. What guards and clipping look at.
pub(crate) type Squares = BTreeMap<TensorId, Option<f64>>;

/// How many steps a gradient may be zero before the tensor counts as dead.
pub(crate) const SIGNAL_STEPS: u64 = 8;

/// What was seen of each tensor's gradient in the first steps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guard {
    /// Tensors, by name, whose gradient was not zero at some step.
    seen: BTreeMap<String, bool>,
}

impl Guard {
    /// Checks the gradient of step `step` (from 1). `quiet` says why a tensor's gradient may be zero, if it may.
    ///
    /// # Errors
    /// The tensor at fault: [`Error::Disconnected`] at the first step, [`Error::NoSignal`] at the eighth,
    /// [`Error::NotFinite`] at any.
    pub(crate) fn check(
        &mut self,
        step: u64,
        gradients: &Squares,
        quiet: impl Fn(&TensorId) -> Option<&'static str>,
    ) -> Result<()> {
        for (id, square) in gradients {
            let Some(square) = square else {
                // A later step may rightly show a component nothing; the first must reach all of them.
                if step == 1 {
                    return Err(Error::Disconnected { tensor: id.clone() });
                }
                continue;
            };
            // No square of a finite f32 is too large, or vanishes, in f64.
            if !square.is_finite() {
                return Err(Error::NotFinite { what: "gradient", tensor: id.clone(), step });
            }
            if step <= SIGNAL_STEPS {
                let seen = self.seen.entry(key(id)).or_default();
                *seen |= *square > 0.0;
                if step == SIGNAL_STEPS && !*seen && quiet(id).is_none() {
                    return Err(Error::NoSignal { tensor: id.clone(), steps: SIGNAL_STEPS });
                }
            }
        }
        Ok(())
    }
}

/// Whether nothing has a gradient but zero.
pub(crate) fn silent(gradients: &Squares) -> bool {
    gradients.values().flatten().all(|square| *square == 0.0)
}

/// The first tensor of a base that holds a value which is not finite.
///
/// # Errors
/// Whatever reading the base raises.
pub(crate) fn not_finite(base: &Base) -> Result<Option<TensorName>> {
    for info in base.architecture().tensors() {
        let name = TensorName::from_path(&info.name);
        let sum: f32 = base.tensor(&name, DType::F32)?.abs()?.sum_all()?.to_scalar()?;
        if !sum.is_finite() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn key(id: &TensorId) -> String {
    format!("{:?}/{}", id.owner, id.name)
}

#[cfg(test)]
mod tests {
    use attune_optim::clip::square;
    use attune_points::Owner;

    use super::*;

    fn id(name: &str) -> TensorId {
        TensorId { owner: Owner::Bank { slot: 0, set: 0 }, name: TensorName::from_path(name) }
    }

    fn gradients(of: &[(&str, Option<[f32; 2]>)]) -> Squares {
        of.iter().map(|(name, values)| (id(name), values.map(|values| square(&values)))).collect()
    }

    #[test]
    fn a_tensor_that_no_pass_wrote_fails_the_first_step_and_is_named() {
        let grads = gradients(&[("q.lora_A", Some([0.0, 0.0])), ("q.lora_B", None)]);
        let error = Guard::default().check(1, &grads, |_| None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no backward pass wrote a gradient for q.lora_B; it is not connected to the loss"
        );
        assert!(Guard::default().check(2, &grads, |_| None).is_ok());
    }

    #[test]
    fn a_gradient_that_stays_zero_fails_the_eighth_step_unless_it_may_be_quiet() {
        let zero = gradients(&[("q.lora_A", Some([0.0, 0.0]))]);
        let some = gradients(&[("q.lora_A", Some([0.0, 1e-30]))]);
        let run = |nonzero_at: Option<u64>, quiet: Option<&'static str>| {
            let mut guard = Guard::default();
            (1..=9)
                .try_for_each(|step| guard.check(step, if nonzero_at == Some(step) { &some } else { &zero }, |_| quiet))
        };
        let error = run(None, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the gradient of q.lora_A was zero in each of the first 8 steps; it does not learn"
        );
        assert!(run(Some(2), None).is_ok());
        assert!(run(None, Some("its expert is not routed to")).is_ok());
    }

    #[test]
    fn a_value_that_is_not_finite_fails_at_once() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error =
                Guard::default().check(40, &gradients(&[("q.lora_A", Some([1.0, bad]))]), |_| None).unwrap_err();
            assert!(error.to_string().starts_with("gradient of q.lora_A is not finite at step 40"), "{error}");
        }
    }
}
