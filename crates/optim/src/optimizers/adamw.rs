//! Adam with weight decay that is decoupled from the gradient: the usual choice for transformers.
//!
//! # Update
//! ```text
//! w <- w (1 - lr λ)                                 where the tensor decays
//! m <- β1 m + (1 - β1) g        v <- β2 v + (1 - β2) g²
//! w <- w - lr / (1 - β1^t) · m / (sqrt(v / (1 - β2^t)) + ε)
//! ```
//!
//! # Symbols
//! `w` the values, `g` the gradient, `m` and `v` buffers of the same length that start at 0 (`exp_avg`, `exp_avg_sq`), `t`
//! the number of the update from 1, `λ` the weight decay; all in f32, factors in f64.
//!
//! # Cost
//! Two buffers: 8 bytes a parameter; about 12 operations a parameter and step.
//!
//! # Limits
//! With β1 = β2 = 0 and ε = 0 it is the sign of the gradient. Without gradient only the decay is left.
//!
//! # Departures
//! none; agrees with `torch.optim.AdamW` (no `amsgrad`) to rounding.
//!
//! # Paper
//! Decoupled Weight Decay Regularization. Loshchilov, Hutter, 2019.

use attune_points::optimizer::{Optimizer, UpdateCx};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The learning rate.
    #[schemars(range(min = 0.0, max = 10.0))]
    lr: f64,
    /// Weight decay.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// How much of the last mean of the gradient is kept.
    #[schemars(range(min = 0.0, max = 0.999_999))]
    beta1: f64,
    /// How much of the last mean of the squared gradient is kept.
    #[schemars(range(min = 0.0, max = 0.999_999_9))]
    beta2: f64,
    /// Added to the root of the mean square.
    #[schemars(range(min = 0.0, max = 1.0))]
    eps: f64,
}

impl Default for Config {
    /// β and ε as in the paper; the rate is the usual one for LoRA, and adapters are trained without decay.
    fn default() -> Self {
        Self { lr: 2e-4, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

pub(super) struct AdamW {
    config: Config,
}

impl Method for AdamW {
    const CARD: Card = Card {
        aliases: &["adam_w"],
        paper: Some(Paper {
            title: "Decoupled Weight Decay Regularization",
            authors: "Ilya Loshchilov, Frank Hutter",
            year: 2019,
        }),
        ..Card::new(
            "adamw",
            Point::Optimizer,
            "Adam with weight decay that is decoupled from the gradient: the usual choice for transformers.",
        )
    };
    type Config = Config;
    type Object = dyn Optimizer;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Optimizer>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Optimizer for AdamW {
    fn buffers(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        let length = shape.iter().product();
        vec![("exp_avg", length), ("exp_avg_sq", length)]
    }

    fn update(
        &self,
        cx: &UpdateCx<'_>,
        value: &mut [f32],
        gradient: &[f32],
        buffers: &mut [Vec<f32>],
    ) -> attune_points::Result<()> {
        let Config { weight_decay, beta1, beta2, eps, .. } = self.config;
        let [m, v] = buffers else {
            return Err(attune_points::Error::Refused(format!(
                "AdamW was given {} buffers; expected 2",
                buffers.len()
            )));
        };
        let decay = if cx.decay { (1.0 - cx.lr * weight_decay) as f32 } else { 1.0 };
        let (b1, b2) = (beta1 as f32, beta2 as f32);
        let (c1, c2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let eps = eps as f32;
        let corrections = |t: i32| ((cx.lr / (1.0 - beta1.powi(t))) as f32, (1.0 - beta2.powi(t)).sqrt() as f32);
        let entry = |w: &mut f32, g: f32, m: &mut f32, v: &mut f32, (size, root): (f32, f32)| {
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *w = *w * decay - size * *m / (v.sqrt() / root + eps);
        };
        let t = cx.step.0 as i32;
        let entries = value.iter_mut().zip(gradient).zip(m).zip(v);
        match cx.born {
            None => {
                let all = corrections(t);
                entries.for_each(|(((w, &g), m), v)| entry(w, g, m, v, all));
            }
            Some(born) => {
                let each = entries.zip(born);
                each.for_each(|((((w, &g), m), v), &born)| entry(w, g, m, v, corrections(t - born as i32)));
            }
        }
        Ok(())
    }

    fn begun(&self, age: u64, mean: f32, square: f32) -> Option<Vec<f32>> {
        let so_far = |beta: f64| (1.0 - beta.powi(age as i32)) as f32;
        Some(vec![mean * so_far(self.config.beta1), square * so_far(self.config.beta2)])
    }

    fn lr(&self) -> f64 {
        self.config.lr
    }
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Step;

    use super::*;

    fn update(config: Config, step: u64, decay: bool, value: &mut [f32], gradient: &[f32], buffers: &mut [Vec<f32>]) {
        let cx = UpdateCx { step: Step(step), lr: config.lr, decay, shape: &[value.len()], born: None };
        AdamW { config }.update(&cx, value, gradient, buffers).unwrap();
    }

    #[test]
    fn without_memory_it_is_the_sign_of_the_gradient() {
        let config = Config { lr: 0.5, beta1: 0.0, beta2: 0.0, eps: 0.0, ..Config::default() };
        let mut value = [1.0, 1.0];
        update(config, 1, true, &mut value, &[3.0, -0.01], &mut [vec![0.0; 2], vec![0.0; 2]]);
        assert_eq!(value, [0.5, 1.5]);
    }

    #[test]
    fn decay_acts_without_a_gradient_and_only_where_it_applies() {
        let config = || Config { lr: 0.1, weight_decay: 0.5, ..Config::default() };
        let mut value = [2.0];
        update(config(), 1, true, &mut value, &[0.0], &mut [vec![0.0], vec![0.0]]);
        assert_eq!(value, [1.9]);
        update(config(), 1, false, &mut value, &[0.0], &mut [vec![0.0], vec![0.0]]);
        assert_eq!(value, [1.9]);
    }

    /// An entry with a history goes on as one that had those gradients, and one that is new as at the first step.
    #[test]
    fn entries_have_ages_of_their_own() {
        let (config, lr) = (Config::default(), 2e-4);
        let (rule, gradients) = (AdamW { config }, [0.5f32, -0.25, 0.5]);
        let cx = |step, born| UpdateCx { step: Step(step), lr, decay: true, shape: &[1], born };
        let (mut alone, mut buffers) = (vec![1.0f32], [vec![0.0f32], vec![0.0]]);
        for (step, gradient) in (1..).zip(gradients) {
            rule.update(&cx(step, None), &mut alone, &[gradient], &mut buffers).unwrap();
        }
        let (mut late, mut late_buffers) = (vec![1.0f32, 1.0], [vec![0.0f32; 2], vec![0.0; 2]]);
        for (step, gradient) in (101..).zip(gradients) {
            rule.update(&cx(step, Some(&[100.0, 102.0])), &mut late, &[gradient, gradient], &mut late_buffers).unwrap();
            if step == 102 {
                (late[1], late_buffers[0][1], late_buffers[1][1]) = (1.0, 0.0, 0.0);
            }
        }
        assert!((alone[0] - late[0]).abs() < 1e-7);
        assert!((late[1] - (1.0 - lr as f32)).abs() < 1e-7, "{}", late[1]);
        // The means of a window, once bias is corrected.
        let (age, mean, square) = (5, 0.3, 0.2);
        let begun = rule.begun(age, mean, square).unwrap();
        assert!((f64::from(begun[0]) / (1.0 - 0.9f64.powi(5)) - f64::from(mean)).abs() < 1e-6);
        assert!((f64::from(begun[1]) / (1.0 - 0.999f64.powi(5)) - f64::from(square)).abs() < 1e-6);
    }

    /// What AdamW has and plain gradient descent lacks: the first step's size does not depend on the gradient's.
    #[test]
    fn the_first_step_does_not_depend_on_the_scale_of_the_gradient() {
        let first = |scale: f32| {
            let mut value = [0.0, 0.0];
            let gradient = [scale, -2.0 * scale];
            update(Config::default(), 1, true, &mut value, &gradient, &mut [vec![0.0; 2], vec![0.0; 2]]);
            value
        };
        for (a, b) in first(1.0).iter().zip(first(1000.0)) {
            assert!((a - b).abs() < 1e-9, "{a} against {b}");
        }
    }
}
