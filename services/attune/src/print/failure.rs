//! Why a command did not do what it was asked: message, hint, faults and exit status.

use std::io::{IsTerminal as _, Write};

use attune_proto::Class;
use attune_spec::Fault;
use serde_json::json;

use super::plain;

/// The exit status of a job or call that failed.
pub(crate) const FAILED: u8 = 1;
/// The exit status of wrong usage or an invalid file.
pub(crate) const USAGE: u8 = 2;

/// Why a command did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The exit status.
    pub(crate) status: u8,
    /// What is wrong, where, and what would do; nothing is printed when it is empty.
    pub(crate) message: String,
    /// What to do next, with the command to run.
    pub(crate) hint: Option<String>,
    /// Fields at fault.
    pub(crate) faults: Vec<Fault>,
}

impl Failure {
    /// A job or call failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: FAILED, message: message.into(), hint: None, faults: Vec::new() }
    }

    /// A call failed for this reason, and what is behind it.
    pub(crate) fn caused(error: &(dyn std::error::Error + 'static)) -> Self {
        let sources = std::iter::successors(Some(error), |error| error.source());
        let mut texts: Vec<_> = sources.map(ToString::to_string).collect();
        // A wrapper such as `io::Error` shows its source as its own text.
        texts.dedup();
        Self::failed(texts.join(": "))
    }

    /// The command was used wrongly, or a file is not valid.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { status: USAGE, ..Self::failed(message) }
    }

    /// What `subject` says is wrong in these fields.
    pub(crate) fn invalid(subject: &str, faults: Vec<Fault>) -> Self {
        let count = faults.len();
        let noun = if count == 1 { "fault" } else { "faults" };
        Self { faults, ..Self::usage(format!("{subject} has {count} {noun}")) }
    }

    /// An end with `status` of which everything has been said already.
    pub(crate) fn silent(status: u8) -> Self {
        Self { status, ..Self::failed("") }
    }

    /// The same with advice.
    #[must_use]
    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Standard output cannot be written to. A reader that went away is success.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::silent(0),
            _ => Self::failed(format!("standard output cannot be written to: {error}")),
        }
    }

    /// A file or folder cannot be read or written.
    pub(crate) fn file(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::usage(format!("{}: {error}", path.display()))
    }

    /// Says it on standard error: for people, or as one line of JSON.
    pub(crate) fn report(&self, json: bool) {
        if self.message.is_empty() {
            return;
        }
        let stderr = std::io::stderr();
        let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let text = if json { self.json() } else { self.text(colour) };
        // There is nobody left to tell when standard error is gone too.
        drop(stderr.lock().write_all(text.as_bytes()));
    }

    fn text(&self, colour: bool) -> String {
        let (red, cyan, end) = if colour { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("{red}error:{end} {}\n", plain(&self.message));
        for fault in &self.faults {
            text.push_str(&format!("  {}\n", plain(&fault.to_string())));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("\n{cyan}hint:{end} {hint}\n"));
        }
        text
    }

    fn json(&self) -> String {
        let error = json!({"message": self.message, "hint": self.hint, "faults": self.faults});
        format!("{}\n", json!({"error": error}))
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let faults = attune_proto::error::faults(&status);
        let message = match faults.len() {
            0 => status.message().to_owned(),
            1 => "the request has 1 fault".to_owned(),
            count => format!("the request has {count} faults"),
        };
        let class = Class::of(&status);
        // What no server has answered was made here, of what became of the connection.
        if let Some(cause) = std::error::Error::source(&status) {
            let deepest = std::iter::successors(Some(cause), |at| at.source()).last().map(ToString::to_string);
            let message = format!("the connection to the server broke: {}", deepest.unwrap_or(message));
            return Self::failed(message).with_hint(
                "a server that encrypts its connections is named by https://…; it may ask for a certificate: --cert and --key",
            );
        }
        let hint = (class == Class::Unauthenticated).then(|| {
            "give a token that is valid, by the variable ATTUNE_TOKEN or by --token-file FILE; an admin makes one with `attune tokens create`"
                .to_owned()
        });
        Self { status: class.row().exit_status, message, hint, faults }
    }
}

impl From<attune_data::Error> for Failure {
    fn from(error: attune_data::Error) -> Self {
        match error {
            attune_data::Error::Fault(fault) => Self::invalid("the data section", vec![fault]),
            error @ attune_data::Error::Remote { .. } => Self::failed(error.to_string()),
            error => Self::usage(error.to_string()),
        }
    }
}

impl From<attune_trainer::Error> for Failure {
    fn from(error: attune_trainer::Error) -> Self {
        match error.faults() {
            faults if faults.is_empty() => Self::failed(error.to_string()),
            faults => Self::invalid("the job", faults),
        }
    }
}

impl From<attune_artifacts::Error> for Failure {
    fn from(error: attune_artifacts::Error) -> Self {
        match error {
            attune_artifacts::Error::Refused { what, faults } => Self::invalid(&what, faults),
            error => Self::caused(&error),
        }
    }
}

impl From<attune_models::Error> for Failure {
    fn from(error: attune_models::Error) -> Self {
        Self::failed(error.to_string())
    }
}

impl From<attune_points::Error> for Failure {
    fn from(error: attune_points::Error) -> Self {
        Self::failed(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_to_its_root_and_nothing_twice() {
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "connection refused");
        let error = attune_artifacts::Error::Unavailable {
            place: "s3://bucket".to_owned(),
            doing: "creating a probe object".to_owned(),
            source: Box::new(std::io::Error::other(refused)),
        };
        let said = "s3://bucket is not available (creating a probe object): connection refused";
        assert_eq!(Failure::caused(&error).message, said);
    }

    #[test]
    fn an_error_is_said_with_its_faults_and_its_hint() {
        let faults = vec![Fault::new("tune.adapter.rank", "is 0; expected 1 or more")];
        let failure = Failure::invalid("job.yaml", faults).with_hint("see `attune methods show lora`");
        insta::assert_snapshot!(failure.text(false), @r"
        error: job.yaml has 1 fault
          `tune.adapter.rank` is 0; expected 1 or more

        hint: see `attune methods show lora`
        ");
        insta::assert_snapshot!(failure.json(), @r#"{"error":{"message":"job.yaml has 1 fault","hint":"see `attune methods show lora`","faults":[{"path":"tune.adapter.rank","message":"is 0; expected 1 or more"}]}}"#);
        assert!(failure.text(true).starts_with("\x1b[1;31merror:\x1b[0m job.yaml"));
    }

    #[test]
    fn a_status_keeps_its_exit_status_and_its_faults() {
        let faults = vec![Fault::new("base", "is missing"), Fault::new("data", "is missing")];
        let failure = Failure::from(attune_proto::error::invalid_argument(&faults));
        assert_eq!((failure.status, failure.message.as_str()), (USAGE, "the request has 2 faults"));
        assert_eq!(failure.faults, faults);
        let failure = Failure::from(Class::NotFound.status("there is no job \"a\""));
        assert_eq!(failure, Failure::failed("there is no job \"a\""));
    }

    #[test]
    fn a_reader_that_went_away_is_success_and_a_full_disk_is_not() {
        assert_eq!(Failure::output(&std::io::ErrorKind::BrokenPipe.into()), Failure::silent(0));
        assert_eq!(Failure::output(&std::io::ErrorKind::StorageFull.into()).status, FAILED);
    }
}
