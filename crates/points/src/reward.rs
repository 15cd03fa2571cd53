//! The point `Reward`: how good is an answer that the model gave by itself?

/// An answer that a model gave to the prompt of a row.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// What it said, without the token that ended it.
    pub text: &'a str,
    /// What the row's data has in its place.
    pub expected: &'a str,
    /// Number of its tokens, the one that ended it included.
    pub tokens: usize,
    /// The most tokens that it could have.
    pub max_tokens: usize,
    /// Whether the model ended it, rather than the limit.
    pub finished: bool,
}

/// A rule that judges answers.
pub trait Reward: Send + Sync {
    /// How good the answer is; `None` if this rule cannot say.
    fn of(&self, answer: &Answer<'_>) -> Option<f64>;
}
