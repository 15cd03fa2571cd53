//! What several recipes do alike.

pub(crate) mod preset;
pub(crate) mod set;

use serde_json::Value;

use crate::fault::Fault;
use crate::job::{JobSpec, ReadError, read_stage};
use crate::method::Catalogue;

/// The fields of the file that a stage may have different.
pub(crate) const FIELDS: [&str; 8] = ["base", "data", "tune", "resources", "limits", "outputs", "labels", "priority"];

/// A stage's job of its fields.
///
/// # Errors
/// Everything that is wrong with them, with paths of the stage.
pub(crate) fn read(value: &Value) -> Result<JobSpec, Vec<Fault>> {
    read_stage(value, Catalogue::embedded()).map_err(|error| match error {
        ReadError::Faults(faults) => faults,
        other @ ReadError::Syntax { .. } => vec![Fault::new("", other.to_string())],
    })
}
