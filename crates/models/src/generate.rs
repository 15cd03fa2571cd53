//! Generation: token by token, with a cache of keys and values.

use attune_architecture::HeadKind;
use attune_points::{Error, Result, Theta};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

use crate::model::Model;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; larger values flatten the distribution.
    pub temperature: f64,
    /// The smallest set of tokens whose probabilities reach this sum is sampled from; 1 for all.
    pub top_p: f64,
    /// The seed of sampling.
    pub seed: u64,
    /// The most tokens that are made.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not part of it.
    pub stop: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, max_tokens: 128, stop: Vec::new() }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token came.
    Stop,
    /// `max_tokens` were made.
    Length,
    /// The callback asked for it.
    Callback,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues `prompt`. `each` sees every new token as it comes and ends generation by returning `false`.
///
/// # Errors
/// [`Error::Refused`] for an empty prompt or sampling values out of range;
/// whatever the passes raise.
pub fn generate(
    model: &Model,
    theta: &Theta,
    prompt: &[u32],
    sampling: &Sampling,
    mut each: impl FnMut(u32) -> bool,
) -> Result<Generated> {
    check(prompt, sampling)?;
    let architecture = model.base().architecture();
    if architecture.head != HeadKind::Tokens || !architecture.causal {
        let message = "this model does not generate: that needs causal attention and a head over tokens";
        return Err(Error::Refused(message.to_owned()));
    }
    let stream = Rng::new(sampling.seed, "sampling");
    let mut caches = model.caches();
    let mut logits = model.decode(theta, prompt, &mut caches)?;
    let mut tokens = Vec::new();
    loop {
        if tokens.len() >= sampling.max_tokens {
            return Ok(Generated { tokens, finish: Finish::Length });
        }
        let token = choose(&logits, sampling, &mut stream.sub(tokens.len() as u64))?;
        if sampling.stop.contains(&token) {
            return Ok(Generated { tokens, finish: Finish::Stop });
        }
        tokens.push(token);
        if !each(token) {
            return Ok(Generated { tokens, finish: Finish::Callback });
        }
        if tokens.len() < sampling.max_tokens {
            let length = prompt.len() + tokens.len();
            logits = if architecture.positions.changes_at(length) {
                // Every frequency has changed, so nothing that was computed for the shorter text can be kept.
                caches = model.caches();
                model.decode(theta, &[prompt, &tokens].concat(), &mut caches)?
            } else {
                model.decode(theta, &[token], &mut caches)?
            };
        }
    }
}

fn check(prompt: &[u32], sampling: &Sampling) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::Refused("the prompt is empty; expected at least one token".to_owned()));
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return Err(Error::Refused(format!("the temperature is {}; expected 0 or more", sampling.temperature)));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(Error::Refused(format!("top-p is {}; expected more than 0 and at most 1", sampling.top_p)));
    }
    Ok(())
}

/// The next token from logits `[V]`. Ties go to the smaller id.
fn choose(logits: &Tensor, sampling: &Sampling, stream: &mut Rng) -> Result<u32> {
    let logits: Vec<f64> = logits.to_dtype(DType::F64)?.to_vec1()?;
    if let Some(value) = logits.iter().find(|value| value.is_nan()) {
        return Err(Error::Refused(format!("a logit is {value}; the weights are not usable")));
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Descending by value, then ascending by id: sort_by is stable.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let best = order.first().copied().unwrap_or(0);
    if sampling.temperature == 0.0 {
        return Ok(best as u32);
    }
    let weight = |id: usize| ((logits[id] - logits[best]) / sampling.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < order.len() && mass < sampling.top_p * total {
        mass += weight(order[kept]);
        kept += 1;
    }
    let mut left = stream.uniform() * mass;
    for &id in &order[..kept] {
        left -= weight(id);
        if left < 0.0 {
            return Ok(id as u32);
        }
    }
    Ok(order[kept.saturating_sub(1)] as u32)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn pick(sampling: &Sampling, seed: u64) -> u32 {
        let logits = Tensor::new(&[0.0f32, 2.0, 2.0, -1.0], &Device::Cpu).unwrap();
        choose(&logits, sampling, &mut Rng::new(seed, "test")).unwrap()
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(pick(&Sampling::default(), 3), 1);
    }

    #[test]
    fn a_small_top_p_leaves_the_likeliest_only_and_a_large_one_all() {
        let sampling = |top_p| Sampling { temperature: 1.0, top_p, ..Sampling::default() };
        assert!((0..200).all(|seed| pick(&sampling(0.1), seed) == 1));
        let mut seen: Vec<u32> = (0..400).map(|seed| pick(&sampling(1.0), seed)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert!((0..400).all(|seed| [1, 2].contains(&pick(&sampling(0.8), seed))));
    }
}
