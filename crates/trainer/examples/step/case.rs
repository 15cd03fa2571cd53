//! What is measured: files that both sides read, and how many steps.

use std::path::{Path, PathBuf};

use attune_models::pass::walk::Keep;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Layout, Row};
use attune_spec::job::Precision;
use serde::Deserialize;

use crate::Failure;

/// A case file, as `benches/peers/compare.py` writes it.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    /// A Hugging Face folder.
    pub(crate) base: PathBuf,
    /// A PEFT folder to begin with; without it all weights train.
    pub(crate) adapter: Option<PathBuf>,
    /// `{"documents": [[id, ...], ...]}`; every token after a document's first is a target.
    batch: PathBuf,
    /// `f32` or `bf16`.
    precision: String,
    pub(crate) lr: f64,
    /// Steps that are not measured.
    pub(crate) warmup: usize,
    /// Steps that are.
    pub(crate) steps: usize,
    /// Parts that the documents are dealt to, which go through the model together.
    #[serde(default = "one")]
    shards: usize,
    /// Whether the reverse pass runs each block again instead of keeping what it needs.
    #[serde(default)]
    recompute: bool,
}

const fn one() -> usize {
    1
}

#[derive(Deserialize)]
struct Batch {
    documents: Vec<Vec<u32>>,
}

impl Case {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    pub(crate) fn precision(&self) -> Result<Precision, Failure> {
        match self.precision.as_str() {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            other => Err(format!("precision is {other:?}; expected f32 or bf16").into()),
        }
    }

    pub(crate) const fn keep(&self) -> Keep {
        if self.recompute { Keep::Inputs } else { Keep::All }
    }

    /// The batch, in as many parts as were asked for.
    pub(crate) fn layouts(&self) -> Result<Vec<Layout>, Failure> {
        let batch: Batch = serde_json::from_slice(&std::fs::read(&self.batch)?)?;
        let mut layouts = vec![Layout::new(); self.shards.clamp(1, batch.documents.len().max(1))];
        let parts = layouts.len();
        for (index, ids) in batch.documents.iter().enumerate() {
            let labels = ids.iter().skip(1).copied().chain([NO_LABEL]);
            let rows = ids.iter().zip(labels).map(|(&id, label)| (Row::Token(id), label));
            layouts[index % parts].push(Source::default(), rows);
        }
        Ok(layouts)
    }
}
