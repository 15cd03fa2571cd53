//! Texts that a model makes: how its tokens are chosen, and what came of it.

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
    /// This stop token came.
    Stop(u32),
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
