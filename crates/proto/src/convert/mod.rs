//! Conversions between messages and domain types, written by hand.
//!
//! Towards messages they cannot fail; from messages they collect [`Fault`]s, with paths as the caller sees the field.

use attune_spec::Fault;

pub mod id;
pub mod job;
pub mod structure;
pub mod time;

/// Collects faults while a message is read, so that all of them come at once.
#[derive(Debug, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// No faults yet.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Notes a fault.
    pub fn push(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// Notes the faults of a part, and gives the part if it has none.
    pub fn take<T>(&mut self, part: Result<T, Vec<Fault>>) -> Option<T> {
        part.map_err(|faults| self.0.extend(faults)).ok()
    }

    /// Notes the fault of a field, and gives its value if it has none.
    pub fn field<T>(&mut self, value: Result<T, Fault>) -> Option<T> {
        value.map_err(|fault| self.0.push(fault)).ok()
    }

    /// `value`, unless faults were noted.
    ///
    /// # Errors
    /// All faults noted.
    ///
    /// # Panics
    /// When a part is missing although no fault says so, which would be a conversion that swallows a fault.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Vec<Fault>> {
        if self.0.is_empty() { Ok(value.expect("a missing part has a fault")) } else { Err(self.0) }
    }
}
