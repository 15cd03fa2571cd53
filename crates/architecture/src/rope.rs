//! Rotary position embedding: the frequencies of a head, with the scaling variants for longer contexts.
//!
//! # Update
//! ```text
//! angle(p, j) = p f_j                    j = 0 .. head_dim/2,  f_j = theta^(-2j/head_dim) before scaling
//! cos, sin    = a cos(angle), a sin(angle)
//! ```
//! `linear` divides all `f_j` by the factor; `dynamic` raises theta with the length of the document; `llama3` and `yarn`
//! divide low frequencies, keep high ones and blend between; `yarn` also scales cos and sin by `a` (1 elsewhere).

use std::f64::consts::TAU;

/// Rotary embedding of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// The variant.
    pub scaling: RopeScaling,
}

/// How frequencies are changed for contexts longer than the original one.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Unscaled.
    Default,
    /// Position interpolation: every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// NTK scaling by the document's length beyond `max_position`.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// Length up to which nothing changes.
        max_position: u64,
    },
    /// Llama 3.1's: by wavelength against the original context.
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original: u64,
    },
    /// YaRN: by the number of rotations within the original context.
    Yarn {
        /// Divides the low frequencies.
        factor: f64,
        /// Scales cos and sin.
        attention_factor: f64,
        /// Frequencies with more rotations are kept.
        beta_fast: f64,
        /// Frequencies with fewer rotations are divided.
        beta_slow: f64,
        /// Context length of pretraining.
        original: u64,
        /// Whether the ends of the blend are rounded to whole frequencies.
        truncate: bool,
    },
}

impl Rope {
    /// Whether the frequencies for `length` positions differ from those for one position fewer.
    pub const fn changes_at(&self, length: usize) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { max_position, .. } if length as u64 > max_position)
    }

    /// The factor on cos and sin.
    pub const fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            RopeScaling::Default
            | RopeScaling::Linear { .. }
            | RopeScaling::Dynamic { .. }
            | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// The `head_dim / 2` frequencies for a document of `length` positions.
    pub fn frequencies(&self, head_dim: usize, length: usize) -> Vec<f64> {
        let dim = head_dim as f64;
        let power = |theta: f64, j: usize| theta.powf(-((2 * j) as f64) / dim);
        let plain = (0..head_dim / 2).map(|j| power(self.theta, j));
        match self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, max_position } => {
                let max = max_position as f64;
                let length = (length as f64).max(max);
                // head_dim 2 has the single frequency 1, whatever theta is; the exponent would be infinite.
                let exponent = if head_dim > 2 { dim / (dim - 2.0) } else { 0.0 };
                let theta = self.theta * (factor * length / max - (factor - 1.0)).powf(exponent);
                (0..head_dim / 2).map(|j| power(theta, j)).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => plain
                .map(|f| {
                    let rotations = original as f64 * f / TAU;
                    if rotations < low_freq_factor {
                        f / factor
                    } else if rotations > high_freq_factor {
                        f
                    } else {
                        let smooth = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
                // The (fractional) index of the frequency that turns `rotations` times within the original context.
                let index = |rotations: f64| dim * (original as f64 / (rotations * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (index(beta_fast), index(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min(dim - 1.0);
                if low == high {
                    // As in the reference: a step instead of a division by zero.
                    high += 0.001;
                }
                plain
                    .enumerate()
                    .map(|(j, f)| {
                        let divided = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * divided + f * (1.0 - divided)
                    })
                    .collect()
            }
        }
    }
}

/// YaRN's factor on cos and sin for a context extended `scale` times.
pub(crate) fn yarn_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-6 * e.abs(), "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn plain_frequencies_are_a_geometric_series() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
        assert_close(&rope.frequencies(8, 5), &[1.0, 0.1, 0.01, 0.001]);
        let linear = Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        assert_close(&linear.frequencies(8, 5), &[0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn dynamic_changes_only_documents_beyond_the_original_context() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Dynamic { factor: 2.0, max_position: 100 } };
        assert_close(&rope.frequencies(8, 100), &[1.0, 0.1, 0.01, 0.001]);
        let theta: f64 = 10_000.0 * 3.0_f64.powf(8.0 / 6.0);
        assert_close(&rope.frequencies(8, 200), &[1.0, theta.powf(-0.25), theta.powf(-0.5), theta.powf(-0.75)]);
        assert_close(&rope.frequencies(2, 200), &[1.0]);
    }

    // transformers 5: ROPE_INIT_FUNCTIONS["llama3"] of theta 500000, factor 8, low 1, high 4, original 8192, head_dim 16.
    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
        let scaled = Rope { theta: 500_000.0, scaling }.frequencies(16, 0);
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.frequencies(16, 0);
        assert_close(&scaled[..4], &plain[..4]);
        assert_close(&scaled[5..], &plain[5..].iter().map(|f| f / 8.0).collect::<Vec<_>>());
        assert!(scaled[4] < plain[4] && scaled[4] > plain[4] / 8.0);
    }

    #[test]
    fn yarn_keeps_the_first_and_divides_the_last_frequency() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: yarn_mscale(4.0, 1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 4096,
            truncate: true,
        };
        let rope = Rope { theta: 10_000.0, scaling };
        let found = rope.frequencies(64, 0);
        assert_close(&found[..1], &[1.0]);
        assert_close(&found[31..], &[10_000.0_f64.powf(-62.0 / 64.0) / 4.0]);
        assert!((rope.attention_factor() - 1.138_629_436_111_989).abs() < 1e-12);
    }
}
