//! What the claims of an identity provider mean here: rules, of which the first that fits decides.

use attune_spec::id::Project;
use attune_store::token::Role;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What is written in a file of rules.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    rules: Vec<WrittenRule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    claim: String,
    value: String,
    role: String,
    project: Option<Project>,
    #[serde(default)]
    all_projects: bool,
}

/// Whoever has this claim with this value has this role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoleRule {
    claim: String,
    value: String,
    pub(super) role: Role,
    /// All projects if absent.
    pub(super) project: Option<Project>,
}

/// Reads a file of rules.
pub(crate) fn read(text: &str) -> Result<Vec<RoleRule>, String> {
    let written: Written = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let rule = |(index, rule): (usize, WrittenRule)| {
        let WrittenRule { claim, value, role, project, all_projects } = rule;
        let role: Role = role.parse().map_err(|error| format!("`rules[{index}].role` is {error}"))?;
        match (&project, all_projects, role) {
            (Some(_), true, _) | (None, false, _) => {
                Err(format!("`rules[{index}]` needs either `project: NAME` or `all_projects: true`"))
            }
            (Some(_), false, Role::Worker) => {
                Err(format!("`rules[{index}]` makes workers, which run jobs of all projects: `all_projects: true`"))
            }
            _ => Ok(RoleRule { claim, value, role, project }),
        }
    };
    let rules: Vec<RoleRule> = written.rules.into_iter().enumerate().map(rule).collect::<Result<_, _>>()?;
    if rules.is_empty() {
        return Err("`rules` is empty: nobody could do anything".to_owned());
    }
    Ok(rules)
}

/// The first rule that fits.
pub(super) fn decide<'r>(rules: &'r [RoleRule], claims: &Map<String, Value>) -> Option<&'r RoleRule> {
    rules.iter().find(|rule| match claim(claims, &rule.claim) {
        Some(Value::String(text)) => *text == rule.value,
        Some(Value::Array(texts)) => texts.iter().any(|text| text.as_str() == Some(&rule.value)),
        _ => false,
    })
}

/// A claim by its name, or by names with dots between where one lies in another.
fn claim<'c>(claims: &'c Map<String, Value>, name: &str) -> Option<&'c Value> {
    if let Some(found) = claims.get(name) {
        return Some(found);
    }
    let (first, rest) = name.split_once('.')?;
    claim(claims.get(first)?.as_object()?, rest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RULES: &str = "
rules:
  - {claim: groups, value: ml-admins, role: admin, all_projects: true}
  - {claim: realm.roles, value: tuner, role: submitter, project: a}
  - {claim: 'https://example/kind', value: robot, role: viewer, project: b}
";

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = read(RULES).unwrap();
        let decided = |claims: Value| {
            let found = decide(&rules, claims.as_object().unwrap());
            found.map(|rule| (rule.role, rule.project.as_ref().map(Project::as_str)))
        };
        assert_eq!(decided(json!({"groups": ["x", "ml-admins"]})), Some((Role::Admin, None)));
        assert_eq!(decided(json!({"groups": "ml-admins"})), Some((Role::Admin, None)));
        assert_eq!(decided(json!({"realm": {"roles": ["tuner"]}})), Some((Role::Submitter, Some("a"))));
        assert_eq!(decided(json!({"realm.roles": "tuner", "groups": []})), Some((Role::Submitter, Some("a"))));
        assert_eq!(decided(json!({"https://example/kind": "robot"})), Some((Role::Viewer, Some("b"))));
        for nobody in
            [json!({}), json!({"groups": 7}), json!({"groups": ["ml-admin"]}), json!({"groups": {"ml-admins": 1}})]
        {
            assert_eq!(decided(nobody), None);
        }
    }

    #[test]
    fn what_no_rule_can_be_is_said_with_its_place() {
        let of = |rule: &str| read(&format!("rules: [{{{rule}}}]")).unwrap_err();
        assert!(of("claim: g, value: x, role: boss, project: a").contains("`rules[0].role` is \"boss\" is not one of"));
        assert!(of("claim: g, value: x, role: admin").contains("`project: NAME` or `all_projects: true`"));
        assert!(of("claim: g, value: x, role: admin, project: a, all_projects: true").contains("either"));
        assert!(of("claim: g, value: x, role: worker, project: a").contains("workers"));
        assert!(of("claim: g, value: x, role: admin, all_project: true").contains("all_project"));
        assert!(of("claim: g, value: x, role: admin, project: ../a").contains("../a"));
        assert!(read("rules: []").unwrap_err().contains("nobody"));
    }
}
