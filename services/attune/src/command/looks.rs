//! What commands that look at trained models have in common: what is looked at, rows of JSON lines, and where a report goes.

use std::path::{Path, PathBuf};

use attune_proto::v1::ArtifactKind;
use attune_trainer::audit::measure::Folder;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::print::{Failure, Out};
use crate::remote::{self, Place, Server};

/// The folder of a whole model or of an adapter, if either is named.
pub(super) async fn trained(
    model: Option<&Place>,
    adapter: Option<&Place>,
    server: &Server,
) -> Result<Option<Folder>, Failure> {
    Ok(match (model, adapter) {
        (Some(model), _) => Some(Folder::Model(remote::folder(model, ArtifactKind::Model, server).await?)),
        (None, Some(adapter)) => Some(Folder::Adapter(remote::folder(adapter, ArtifactKind::Adapter, server).await?)),
        (None, None) => None,
    })
}

/// The rows of a file of JSON lines.
pub(super) fn rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let rows: Result<Vec<T>, Failure> = lines
        .map(|(number, line)| {
            let wrong = |error| Failure::usage(format!("{}:{number}: {error}", path.display()));
            serde_json::from_str(line).map_err(wrong)
        })
        .collect();
    match rows {
        Ok(rows) if rows.is_empty() => Err(Failure::usage(format!("{}: has no rows", path.display()))),
        rows => rows,
    }
}

/// Writes files of these names into a folder, which is made if it is not there.
pub(super) fn write(to: &Path, files: &[(&str, &str)]) -> Result<(), Failure> {
    std::fs::create_dir_all(to).map_err(|error| Failure::file(to, &error))?;
    for (name, text) in files {
        let path = to.join(name);
        std::fs::write(&path, text).map_err(|error| Failure::file(&path, &error))?;
    }
    Ok(())
}

/// Keeps a report as `report.json` and `report.md` in a folder, if one is named, and shows it.
pub(super) fn tell<T: Serialize>(report: &T, page: &str, to: Option<&PathBuf>, out: &mut Out) -> Result<(), Failure> {
    if let Some(to) = to {
        let mut json = serde_json::to_string_pretty(report).unwrap_or_default();
        json.push('\n');
        write(to, &[("report.json", &json), ("report.md", page)])?;
    }
    if out.is_json() { out.document(report) } else { out.text(page) }
}
