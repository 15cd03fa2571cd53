//! Why a `config.json` describes no model that can be loaded.

use attune_spec::Fault;

/// A refused `config.json`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not a JSON object.
    #[error("config.json line {line} column {column}: {message}; expected one JSON object")]
    Json {
        /// Line of the fault, from 1; 0 when the document as a whole is at fault.
        line: usize,
        /// Column of the fault, from 1; 0 when the document as a whole is at fault.
        column: usize,
        /// What the parser met.
        message: String,
    },
    /// `model_type` names a kind of model that is not supported.
    #[error("config.json: `model_type` is {given:?}; supported are {supported}")]
    Family {
        /// The value as given; empty when the field is missing.
        given: String,
        /// The supported values, separated by commas.
        supported: String,
    },
    /// Fields that are missing, of a wrong type, out of range or that contradict each other; all of them.
    #[error("config.json: {}", join(.0))]
    Fields(Vec<Fault>),
}

impl Error {
    /// The same as field faults, for a caller that collects faults of several documents.
    pub fn faults(&self) -> Vec<Fault> {
        match self {
            Self::Fields(faults) => faults.clone(),
            Self::Family { .. } => vec![Fault::new("model_type", self.to_string())],
            Self::Json { .. } => vec![Fault::new("", self.to_string())],
        }
    }
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
