//! Safetensors: eight bytes of header length (little endian), a JSON header, the tensors' bytes end to end.
//!
//! The header is validated before anything is used. The public `safetensors` crate would need the whole file in memory
//! and lets the last of two equal names win, so the check is our own and is held to that crate in its tests.

mod dtype;
mod header;
mod write;

pub use dtype::Dtype;
pub use header::{HEADER_BYTES_MAX, Header, Info};
pub use write::{Due, Tensor, write, write_as_due};

use attune_spec::Fault;

/// The key of a header that is no tensor.
const METADATA: &str = "__metadata__";

/// A fault at a tensor, whose name comes from the file and may be anything.
fn at(name: &str, message: impl Into<String>) -> Fault {
    let shown: String = name.chars().map(|c| if c.is_control() { '?' } else { c }).take(200).collect();
    Fault::new(shown.as_str(), message)
}
