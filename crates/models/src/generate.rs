//! Generation: token by token, with a cache of keys and values, of one text or of many at once.

use std::cmp::Ordering;

use attune_architecture::HeadKind;
use attune_points::generate::{Finish, Generated, Sampling};
use attune_points::{Error, Result, Theta};
use attune_tensor::Rng;

use crate::cache::Cache;
use crate::model::Model;

/// Rows that go through a model at a time: beyond this, activations of long prompts would need more memory than it saves time.
const ROWS: usize = 2048;

/// A text to be continued, and how.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The text.
    pub prompt: &'a [u32],
    /// How its next tokens are chosen.
    pub sampling: &'a Sampling,
}

/// Continues `prompt`. `each` sees every new token as it comes and ends generation by returning `false`.
///
/// # Errors
/// [`Error::Refused`] for an empty prompt, sampling values out of range, or a model without causal attention or a head over
/// tokens; whatever the passes raise.
pub fn generate(
    model: &Model,
    theta: &Theta,
    prompt: &[u32],
    sampling: &Sampling,
    mut each: impl FnMut(u32) -> bool,
) -> Result<Generated> {
    let made = generate_all(model, theta, &[Request { prompt, sampling }], |_, token| each(token))?;
    made.into_iter().next().ok_or_else(|| Error::Refused("nothing was generated".to_owned()))
}

/// Continues several texts at once: every one as [`generate`] would alone, bit for bit. `each` sees every new token with the
/// number of its request, in the order of requests within a turn, and ends that text by returning `false`.
///
/// # Errors
/// As for [`generate`]; if one text fails, all do.
pub fn generate_all(
    model: &Model,
    theta: &Theta,
    requests: &[Request<'_>],
    mut each: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Generated>> {
    let architecture = model.base().architecture();
    requests.iter().try_for_each(|request| check(request.prompt, request.sampling))?;
    if architecture.head != HeadKind::Tokens || !architecture.causal {
        let message = "this model does not generate: that needs causal attention and a head over tokens";
        return Err(Error::Refused(message.to_owned()));
    }
    let before = model.rows_before(theta);
    let mut cache = model.cache(theta, requests.len());
    let mut texts: Vec<Text<'_>> = requests.iter().map(Text::new).collect();
    loop {
        let open: Vec<(usize, &[u32])> = texts
            .iter()
            .enumerate()
            .filter(|(_, text)| text.finish.is_none())
            .map(|(at, text)| (at, &text.tokens[..]))
            .collect();
        if open.is_empty() {
            return Ok(texts.into_iter().map(Text::end).collect());
        }
        model.reserve(&open, &before, &mut cache);
        let mut chosen = Vec::with_capacity(open.len());
        for run in runs(&open, before.len(), &cache) {
            let logits = model.next(theta, run, &before, &mut cache)?;
            for (&(at, _), logits) in run.iter().zip(&logits) {
                chosen.push((at, texts[at].choose(logits)?));
            }
        }
        for (at, token) in chosen {
            texts[at].take(token, |token| each(at, token));
            // Where every frequency has changed, nothing that was computed for the shorter text can be kept.
            if texts[at].finish.is_some() || architecture.positions.changes_at(before.len() + texts[at].tokens.len()) {
                cache.clear(at);
            }
        }
    }
}

/// The texts, each after `before` rows, cut into runs of at most [`ROWS`] new rows, or of one text.
fn runs<'t, 'r>(open: &'r [(usize, &'t [u32])], before: usize, cache: &Cache) -> Vec<&'r [(usize, &'t [u32])]> {
    let (mut runs, mut start, mut rows) = (Vec::new(), 0, 0);
    for (end, (at, text)) in open.iter().enumerate() {
        let new = before + text.len() - cache.rows(*at);
        if start < end && rows + new > ROWS {
            runs.push(&open[start..end]);
            (start, rows) = (end, 0);
        }
        rows += new;
    }
    runs.push(&open[start..]);
    runs
}

/// A text that is being made.
struct Text<'a> {
    request: &'a Request<'a>,
    stream: Rng,
    /// The prompt and what follows.
    tokens: Vec<u32>,
    finish: Option<Finish>,
}

impl<'a> Text<'a> {
    fn new(request: &'a Request<'a>) -> Self {
        let Request { prompt, sampling } = request;
        let finish = (sampling.max_tokens == 0).then_some(Finish::Length);
        Self { request, stream: Rng::new(sampling.seed, "sampling"), tokens: prompt.to_vec(), finish }
    }

    /// Number of new tokens.
    fn made(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// The next token from logits `[V]`.
    fn choose(&self, logits: &[f64]) -> Result<u32> {
        choose(logits, self.request.sampling, &mut self.stream.sub(self.made() as u64))
    }

    fn take(&mut self, token: u32, each: impl FnOnce(u32) -> bool) {
        let Sampling { max_tokens, stop, .. } = self.request.sampling;
        if stop.contains(&token) {
            self.finish = Some(Finish::Stop(token));
            return;
        }
        self.tokens.push(token);
        if !each(token) {
            self.finish = Some(Finish::Callback);
        } else if self.made() >= *max_tokens {
            self.finish = Some(Finish::Length);
        }
    }

    fn end(mut self) -> Generated {
        let tokens = self.tokens.split_off(self.request.prompt.len());
        Generated { tokens, finish: self.finish.unwrap_or(Finish::Length) }
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
fn choose(logits: &[f64], sampling: &Sampling, stream: &mut Rng) -> Result<u32> {
    if let Some(value) = logits.iter().find(|value| value.is_nan()) {
        return Err(Error::Refused(format!("a logit is {value}; the weights are not usable")));
    }
    let descending = |a: &usize, b: &usize| -> Ordering { logits[*b].total_cmp(&logits[*a]) };
    if sampling.temperature == 0.0 {
        return Ok((0..logits.len()).min_by(descending).unwrap_or(0) as u32);
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Descending by value, then ascending by id: the sort is stable.
    order.sort_by(descending);
    let best = order.first().copied().unwrap_or(0);
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
    use super::*;

    fn pick(sampling: &Sampling, seed: u64) -> u32 {
        choose(&[0.0, 2.0, 2.0, -1.0], sampling, &mut Rng::new(seed, "test")).unwrap()
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
