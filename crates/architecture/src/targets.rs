//! Which sites a slot adapts, as people write it: `all-linear`, module names, paths, patterns.

use std::collections::BTreeSet;

use attune_spec::job::Targets;
use attune_spec::{Fault, FieldPath, suggest};

use crate::decoder::Architecture;
use crate::site::{Place, Site, SiteId, SiteKind};

/// All linears of layers except routers. A head is trained whole or not at all; a router has as many outputs as there are
/// experts, fewer than most ranks, and is trained with care. Naming one names it.
const ALL_LINEAR: &str = "all-linear";

/// Every site.
const ALL: &str = "all";

/// The linears of the head: the one that gives logits, and the pooler before it, where there is one.
const HEAD: &str = "head";

/// The sites of `architecture` that `targets` names and `exclude` does not, in forward order. `applies` says which
/// kinds of site the method can adapt; others that an entry catches along the way are left out, but an entry that
/// catches nothing else is a fault.
///
/// # Errors
/// One fault for each entry that names no site (with the nearest names), and one if nothing is left. Paths are
/// `targets`, `targets[1]`, `exclude[0]`, …: prefix them with where the slot stands.
pub fn resolve(
    targets: &Targets,
    exclude: Option<&Targets>,
    architecture: &Architecture,
    applies: impl Fn(&Site) -> bool,
) -> Result<Vec<Site>, Vec<Fault>> {
    let sites = architecture.sites();
    let mut faults = Vec::new();
    let mut chosen = BTreeSet::new();
    for (entry, path) in located(targets, "targets") {
        let named: Vec<&Site> = sites.iter().filter(|site| names(entry, site)).collect();
        if named.is_empty() {
            faults.push(Fault { path, message: no_site(entry, &sites, architecture) });
        } else if !named.iter().any(|site| applies(site)) {
            let message = format!(
                "{entry:?} names only sites that this method does not adapt: {} is a {}",
                named[0].id,
                named[0].kind.name()
            );
            faults.push(Fault { path, message });
        }
        chosen.extend(named.into_iter().filter(|site| applies(site)).map(|site| site.id.clone()));
    }
    for (entry, path) in exclude.map(|exclude| located(exclude, "exclude")).unwrap_or_default() {
        let named: Vec<&SiteId> = sites.iter().filter(|site| names(entry, site)).map(|site| &site.id).collect();
        if named.is_empty() {
            faults.push(Fault { path, message: no_site(entry, &sites, architecture) });
        }
        for id in named {
            chosen.remove(id);
        }
    }
    if faults.is_empty() && chosen.is_empty() {
        let message = if targets.entries().is_empty() {
            "is an empty list; expected at least one module name, path or pattern, or \"all-linear\""
        } else {
            "names no site that `exclude` leaves; expected at least one"
        };
        faults.push(Fault::new("targets", message));
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    Ok(sites.into_iter().filter(|site| chosen.contains(&site.id)).collect())
}

fn located<'a>(targets: &'a Targets, field: &str) -> Vec<(&'a str, FieldPath)> {
    let field = FieldPath::root().field(field);
    match targets {
        Targets::One(entry) => vec![(entry.as_str(), field)],
        Targets::Many(entries) => {
            entries.iter().enumerate().map(|(i, entry)| (entry.as_str(), field.index(i))).collect()
        }
    }
}

fn names(entry: &str, site: &Site) -> bool {
    let id = site.id.as_str();
    if entry == ALL_LINEAR {
        matches!(site.kind, SiteKind::Linear { .. }) && site.layer.is_some() && site.place != Place::Router
    } else if entry == ALL {
        true
    } else if entry == HEAD {
        matches!(site.place, Place::Head | Place::Pooler | Place::Classifier)
    } else if entry.contains('*') {
        glob(entry, id)
    } else {
        id.strip_suffix(entry).is_some_and(|before| !entry.is_empty() && (before.is_empty() || before.ends_with('.')))
    }
}

/// Whether `text` is `pattern` with each `*` standing for any run of characters, dots included. Each part between stars
/// is taken at its first place, which is enough because a later place leaves less behind it.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or("");
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

fn no_site(entry: &str, sites: &[Site], architecture: &Architecture) -> String {
    let mut roles: Vec<&str> = Vec::new();
    for site in sites {
        if !roles.contains(&site.role) {
            roles.push(site.role);
        }
    }
    let candidates =
        [ALL_LINEAR, HEAD].into_iter().chain(roles.iter().copied()).chain(sites.iter().map(|s| s.id.as_str()));
    let hint = suggest::hint(entry, candidates);
    format!(
        "{entry:?} matches no site of this {} model of {} layers{hint} (modules: {})",
        architecture.family,
        architecture.layers,
        roles.join(", ")
    )
}
