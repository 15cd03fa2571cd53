//! The demonstration's two jobs, as files that a person could have written.

/// A job of the demonstration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    /// The name of its file.
    pub(crate) file: &'static str,
    /// The file.
    pub(crate) yaml: &'static str,
}

/// Trains all weights of the base on the world's texts, from random ones.
pub(crate) const TEXT_JOB: Job = Job { file: "text.yaml", yaml: include_str!("text.yaml") };

/// Trains an adapter on that base to answer questions.
pub(crate) const CHAT_JOB: Job = Job { file: "chat.yaml", yaml: include_str!("chat.yaml") };
