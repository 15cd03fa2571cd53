//! All methods of this build, from the lists of all points.

use attune_spec::method::MethodDocument;

/// Card, schema and defaults of every method, by name.
pub fn documents() -> Vec<MethodDocument> {
    let mut documents: Vec<MethodDocument> = attune_adapt::ADAPTERS
        .documents()
        .chain(attune_adapt::INITS.documents())
        .chain(attune_objective::OBJECTIVES.documents())
        .chain(attune_data::MIXINGS.documents())
        .chain(crate::STEP_RULES.documents())
        .chain(attune_optim::OPTIMIZERS.documents())
        .chain(attune_optim::SCHEDULES.documents())
        .collect();
    documents.sort_by(|a, b| a.name.cmp(&b.name));
    documents
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    /// The committed documents are those of the lists. With `ATTUNE_UPDATE=1` in the environment they are written anew.
    #[test]
    fn committed_documents_are_current() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/methods");
        let wanted: BTreeMap<String, String> = documents()
            .into_iter()
            .map(|document| {
                (format!("{}.json", document.name), format!("{}\n", serde_json::to_string_pretty(&document).unwrap()))
            })
            .collect();
        let read = || -> BTreeMap<String, String> {
            let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            let files = entries.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
            files
                .map(|path| {
                    (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(path).unwrap())
                })
                .collect()
        };
        if std::env::var_os("ATTUNE_UPDATE").is_some() {
            for name in read().keys().filter(|name| !wanted.contains_key(*name)) {
                std::fs::remove_file(folder.join(name)).unwrap();
            }
            for (name, text) in &wanted {
                std::fs::write(folder.join(name), text).unwrap();
            }
        }
        let found = read();
        assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "run with ATTUNE_UPDATE=1");
        for (name, text) in wanted {
            assert_eq!(found[&name], text, "{name} is out of date; run with ATTUNE_UPDATE=1");
        }
    }

    #[test]
    fn names_are_unique_over_all_points_and_well_formed() {
        let mut names: Vec<String> =
            documents().into_iter().flat_map(|document| document.aliases.into_iter().chain([document.name])).collect();
        for name in &names {
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c)), "{name}");
        }
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
