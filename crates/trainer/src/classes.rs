//! Heads over classes, and those that give vectors: which rows have labels, whether the base means the same classes or vectors, and
//! whether what is new of a head trains.

use std::collections::BTreeMap;
use std::path::Path;

use attune_architecture::{Architecture, HeadKind, PooledRow, SiteId};
use attune_artifacts::formats::sentence_transformers;
use attune_data::{Classes, Labelled};
use attune_models::{Base, export};
use attune_points::{TensorId, TensorSpec};
use attune_spec::Fault;
use attune_spec::job::{HeadPooling, HeadSpec, Plan};

use crate::error::Error;

/// The classes of a head and the rows that have them in a model of this structure, or the marks where it gives vectors; nothing where it
/// has another head.
pub fn of(head: &HeadSpec, architecture: &Architecture) -> Option<Classes> {
    let of = match architecture.head {
        HeadKind::Sequence { row: PooledRow::First, .. } => Labelled::First,
        HeadKind::Sequence { row: PooledRow::Last, .. } => Labelled::Last,
        HeadKind::Rows { .. } => Labelled::Words,
        HeadKind::Embedding(_) => Labelled::Queries,
        HeadKind::Tokens => return None,
    };
    Some(Classes { names: head.labels.clone(), of })
}

/// Whether a base that has names for as many classes has the same ones: its head would take one class for another otherwise. And
/// whether one whose folder says how its rows become vectors is asked for the same, or for another in so many words.
///
/// # Errors
/// A fault at `tune.head.labels` or `tune.head.pooling`.
pub(crate) fn agree(plan: &Plan, folder: &Path) -> Result<(), Error> {
    let Some(head) = &plan.head else { return Ok(()) };
    if head.gives_vectors() {
        return match (head.pooling, sentence_transformers::pooling(folder).map_err(attune_adapt::Error::from)?) {
            (None, Some(known)) if known != HeadPooling::default() => {
                let word = serde_json::to_value(known).unwrap_or_default();
                let message = format!(
                    "is left out, which is mean, and the base's folder says {word}: expected `pooling: {}`, or another one in so many words",
                    word.as_str().unwrap_or_default()
                );
                Err(Error::Faults(vec![Fault::new("tune.head.pooling", message)]))
            }
            _ => Ok(()),
        };
    }
    let known = export::named_classes(folder)?;
    if known.len() != head.labels.len() || known == head.labels {
        return Ok(());
    }
    let message = format!("is [{}]; the base's head has [{}] in this order", head.labels.join(", "), known.join(", "));
    Err(Error::Faults(vec![Fault::new("tune.head.labels", message)]))
}

/// Whether what starts at random trains.
///
/// # Errors
/// A fault at `tune.head`.
pub(crate) fn trains(base: &Base, specs: &BTreeMap<TensorId, TensorSpec>) -> Result<(), Error> {
    let trains = |site: &SiteId| specs.keys().any(|id| id.name.owner() == site.as_str());
    match base.fresh().iter().find(|site| !trains(site)) {
        None => Ok(()),
        Some(site) => {
            let message = format!(
                "starts at random at {site}, and no slot that trains names it: expected `head` among the targets of one"
            );
            Err(Error::Faults(vec![Fault::new("tune.head", message)]))
        }
    }
}
