//! The words for states in the APIs that Attune speaks: its own, OpenAI's fine-tuning jobs and Tinker's training runs.

use crate::v1::{self, FailureCause, JobReason, JobState, StopPurpose};

/// What one state is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateWords {
    /// In the command line, labels and JSON of Attune.
    pub attune: &'static str,
    /// `status` of OpenAI's `fine_tuning.job`.
    pub openai: &'static str,
    /// `queue_state` of a Tinker future while the job lasts; `None` once it has a result or an error.
    pub tinker: Option<&'static str>,
    /// Whether the state never changes.
    pub is_final: bool,
}

/// The table of states; `None` for the unspecified one.
pub const fn state_words(state: JobState) -> Option<StateWords> {
    let (attune, openai, tinker, is_final) = match state {
        JobState::Unspecified => return None,
        JobState::Waiting => ("waiting", "validating_files", Some("paused_capacity"), false),
        JobState::Queued => ("queued", "queued", Some("paused_capacity"), false),
        JobState::Starting => ("starting", "validating_files", Some("active"), false),
        JobState::Running => ("running", "running", Some("active"), false),
        JobState::Stopping => ("stopping", "running", Some("active"), false),
        JobState::Backoff => ("backoff", "queued", Some("paused_capacity"), false),
        JobState::Paused => ("paused", "paused", Some("paused_capacity"), false),
        JobState::Succeeded => ("succeeded", "succeeded", None, true),
        JobState::Failed => ("failed", "failed", None, true),
        JobState::Cancelled => ("cancelled", "cancelled", None, true),
    };
    Some(StateWords { attune, openai, tinker, is_final })
}

/// Every state that is sent.
pub const STATES: [JobState; 10] = [
    JobState::Waiting,
    JobState::Queued,
    JobState::Starting,
    JobState::Running,
    JobState::Stopping,
    JobState::Backoff,
    JobState::Paused,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelled,
];

/// The state that Attune's word means.
pub fn state(word: &str) -> Option<JobState> {
    STATES.into_iter().find(|state| state_words(*state).is_some_and(|words| words.attune == word))
}

/// Attune's word for an enum value: the value's name without its prefix, in snake_case; `unspecified` for zero. The words
/// are those of the job file, the scheduler's core and the manifests.
pub trait Word: Copy {
    /// The word.
    fn word(self) -> String;
    /// The value that the word means; `None` for unknown words and for `unspecified`.
    fn from_word(word: &str) -> Option<Self>;
}

macro_rules! words {
    ($($type:ty => $prefix:literal),* $(,)?) => {$(
        impl Word for $type {
            fn word(self) -> String {
                self.as_str_name().trim_start_matches($prefix).to_ascii_lowercase()
            }
            fn from_word(word: &str) -> Option<Self> {
                let name = format!("{}{}", $prefix, word.to_ascii_uppercase());
                Self::from_str_name(&name).filter(|value| *value as i32 != 0)
            }
        }
    )*};
}

words! {
    JobState => "JOB_STATE_",
    JobReason => "JOB_REASON_",
    StopPurpose => "STOP_PURPOSE_",
    FailureCause => "FAILURE_CAUSE_",
    v1::ArtifactKind => "ARTIFACT_KIND_",
    v1::DeviceKind => "DEVICE_KIND_",
    v1::ExtensionPoint => "EXTENSION_POINT_",
    v1::JobKind => "JOB_KIND_",
    v1::LeaseRefusal => "LEASE_REFUSAL_",
    v1::MergeForm => "MERGE_FORM_",
    v1::OnBadRow => "ON_BAD_ROW_",
    v1::Activations => "ACTIVATIONS_",
    v1::HeadTask => "HEAD_TASK_",
    v1::HeadPooling => "HEAD_POOLING_",
    v1::Matmul => "MATMUL_",
    v1::MergedInto => "MERGED_INTO_",
    v1::Precision => "PRECISION_",
    v1::RefusalReason => "REFUSAL_REASON_",
    v1::RowForm => "ROW_FORM_",
    v1::ProvenanceClass => "PROVENANCE_CLASS_",
    v1::Severity => "SEVERITY_",
    v1::SiteKind => "SITE_KIND_",
    v1::TokenRole => "TOKEN_ROLE_",
    v1::TooLong => "TOO_LONG_",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_words_and_is_found_by_them() {
        for tag in 0..=10 {
            let known = JobState::try_from(tag).unwrap();
            let Some(words) = state_words(known) else {
                assert_eq!(known, JobState::Unspecified);
                continue;
            };
            assert_eq!(state(words.attune), Some(known));
            assert_eq!(words.attune, known.word());
            assert_eq!(words.is_final, words.tinker.is_none());
        }
        assert!(JobState::try_from(11).is_err(), "a new state needs its row");
    }

    #[test]
    fn words_are_snake_case_and_come_back() {
        assert_eq!(JobReason::DependencyPending.word(), "dependency_pending");
        assert_eq!(JobReason::from_word("dependency_pending"), Some(JobReason::DependencyPending));
        assert_eq!(FailureCause::from_word("out_of_memory"), Some(FailureCause::OutOfMemory));
        assert_eq!(v1::ArtifactKind::TaskVector.word(), "task_vector");
        assert_eq!(JobReason::from_word("unspecified"), None);
        assert_eq!(JobReason::from_word("tired"), None);
    }
}
