//! What the scheduler must be allowed in the namespace of its workers.

use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;

use super::super::Account;

const NAME: &str = "attune-scheduler";

/// An object as YAML.
pub(super) fn yaml(object: &impl Serialize) -> String {
    // Objects that were made here have texts for keys, which is all that YAML asks for.
    serde_saphyr::to_string(object).unwrap_or_default()
}

fn role(namespace: &str) -> Role {
    let rule = |group: &str, resource: &str, verbs: &[&str]| PolicyRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(vec![resource.to_owned()]),
        verbs: verbs.iter().copied().map(str::to_owned).collect(),
        ..PolicyRule::default()
    };
    let rules = vec![
        rule("batch", "jobs", &["create", "delete", "list"]),
        rule("", "pods", &["delete", "list"]),
        // Why a Job has no Pod; without it nobody says.
        rule("", "events", &["list"]),
    ];
    Role { metadata: metadata(namespace), rules: Some(rules) }
}

fn metadata(namespace: &str) -> ObjectMeta {
    ObjectMeta { name: Some(NAME.to_owned()), namespace: Some(namespace.to_owned()), ..ObjectMeta::default() }
}

fn binding(namespace: &str, account: &Account) -> RoleBinding {
    let subject = Subject {
        kind: "ServiceAccount".to_owned(),
        name: account.name.clone(),
        namespace: Some(account.namespace.clone().unwrap_or_else(|| namespace.to_owned())),
        api_group: None,
    };
    RoleBinding {
        metadata: metadata(namespace),
        role_ref: RoleRef {
            api_group: "rbac.authorization.k8s.io".to_owned(),
            kind: "Role".to_owned(),
            name: NAME.to_owned(),
        },
        subjects: Some(vec![subject]),
    }
}

/// The role, and its binding to the account as which the scheduler runs, as YAML.
pub(super) fn rendered(namespace: &str, account: &Account) -> String {
    format!("{}---\n{}", yaml(&role(namespace)), yaml(&binding(namespace, account)))
}
