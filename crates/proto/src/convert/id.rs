//! Identifiers in requests, and resource names.

use std::str::FromStr;

use attune_spec::Fault;
use attune_spec::id::{Digest, Epoch, IdError, JobId, Project, Tag};

use crate::v1;

/// The project of a request; empty means `default`.
///
/// # Errors
/// The fault at `project`.
pub fn project(text: &str) -> Result<Project, Fault> {
    if text.is_empty() { Ok(Project::default()) } else { field("project", text) }
}

/// The identifier in field `path` of a request.
///
/// # Errors
/// The fault at `path`, with the accepted form.
pub fn field<T: FromStr<Err = IdError>>(path: &str, text: &str) -> Result<T, Fault> {
    if text.is_empty() {
        return Err(Fault::new(path, "is missing"));
    }
    text.parse()
        .map_err(|error: IdError| Fault::new(path, format!("is {:?}; expected {}", error.value, error.expected)))
}

/// What names an artifact: a digest, or a tag that moves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reference {
    /// The artifact itself.
    Digest(Digest),
    /// Whatever the tag points at when it is asked.
    Tag(Tag),
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::Tag(tag) => tag.fmt(f),
        }
    }
}

/// The digest or tag in field `path` of a request.
///
/// # Errors
/// The fault at `path`.
pub fn reference(path: &str, text: &str) -> Result<Reference, Fault> {
    if text.starts_with("blake3:") {
        field(path, text).map(Reference::Digest)
    } else {
        field(path, text).map(Reference::Tag)
    }
}

/// `projects/{project}/jobs/{job}`.
pub fn job_name(project: &Project, job: &JobId) -> String {
    format!("projects/{project}/jobs/{job}")
}

/// `projects/{project}/artifacts/{digest}`.
pub fn artifact_name(project: &Project, digest: &Digest) -> String {
    format!("projects/{project}/artifacts/{digest}")
}

/// Project and job of a resource name.
///
/// # Errors
/// The fault at `path`, with the accepted form.
pub fn parse_job_name(path: &str, text: &str) -> Result<(Project, JobId), Fault> {
    let parts: Vec<_> = text.split('/').collect();
    match parts.as_slice() {
        ["projects", project, "jobs", job] => Ok((field(path, project)?, field(path, job)?)),
        _ => Err(Fault::new(path, format!("is {text:?}; expected projects/PROJECT/jobs/JOB"))),
    }
}

/// One attempt of one job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId {
    /// Tenant.
    pub project: Project,
    /// The job.
    pub job: JobId,
    /// Fencing token.
    pub epoch: Epoch,
}

impl std::fmt::Display for AttemptId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} epoch {}", self.project, self.job, self.epoch)
    }
}

impl From<&AttemptId> for v1::AttemptRef {
    fn from(id: &AttemptId) -> Self {
        Self { project: id.project.to_string(), job_id: id.job.to_string(), epoch: id.epoch.0 }
    }
}

/// The attempt in field `path` of a message.
///
/// # Errors
/// Every fault below `path`.
pub fn attempt(path: &str, message: Option<&v1::AttemptRef>) -> Result<AttemptId, Vec<Fault>> {
    let Some(message) = message else { return Err(vec![Fault::new(path, "is missing")]) };
    let mut faults = super::Faults::new();
    let project = faults.field(field(&format!("{path}.project"), &message.project));
    let job = faults.field(field(&format!("{path}.job_id"), &message.job_id));
    if message.epoch == 0 {
        faults.push(Fault::new(format!("{path}.epoch").as_str(), "is 0; expected the epoch of a granted attempt"));
    }
    let id = project.zip(job).map(|(project, job)| AttemptId { project, job, epoch: Epoch(message.epoch) });
    faults.finish(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_project_is_the_default_one() {
        assert_eq!(project("").unwrap(), Project::default());
        assert_eq!(project("../x").unwrap_err().path.as_str(), "project");
    }

    #[test]
    fn resource_names_round_trip() {
        let (project, job) = (Project::default(), JobId::new("j1").unwrap());
        let name = job_name(&project, &job);
        assert_eq!(name, "projects/default/jobs/j1");
        assert_eq!(parse_job_name("name", &name).unwrap(), (project, job));
        for bad in ["", "projects/a/jobs", "projects/a/jobs/b/c", "projects/../jobs/b", "jobs/b"] {
            assert!(parse_job_name("name", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_reference_is_a_digest_or_a_tag() {
        let digest = Digest::from_bytes([7; 32]);
        assert_eq!(reference("base", &digest.to_string()).unwrap(), Reference::Digest(digest));
        assert_eq!(reference("base", "a:b").unwrap().to_string(), "a:b");
        assert!(reference("base", "blake3:12").unwrap_err().message.contains("64 hexadecimal digits"));
        assert_eq!(reference("base", "").unwrap_err().message, "is missing");
    }

    #[test]
    fn an_attempt_round_trips_and_reports_all_its_faults() {
        let id = AttemptId { project: Project::default(), job: JobId::new("j1").unwrap(), epoch: Epoch(3) };
        assert_eq!(attempt("attempt", Some(&(&id).into())).unwrap(), id);
        let bad = v1::AttemptRef { project: "A".to_owned(), job_id: String::new(), epoch: 0 };
        let paths: Vec<_> = attempt("attempt", Some(&bad)).unwrap_err().into_iter().map(|f| f.path).collect();
        assert_eq!(paths, ["attempt.project".into(), "attempt.job_id".into(), "attempt.epoch".into()]);
        assert!(attempt("attempt", None).is_err());
    }
}
