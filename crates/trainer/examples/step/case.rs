//! What is measured: files that both sides read, and how many steps.

use std::path::{Path, PathBuf};

use attune_architecture::{HeadKind, PooledRow};
use attune_models::Base;
use attune_models::pass::walk::Keep;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Layout, Row};
use attune_spec::job::{Matmul, Precision};
use attune_spec::method::MethodRef;
use attune_trainer::card;
use serde::Deserialize;

use crate::Failure;

/// A case file, as `benches/peers/compare.py` writes it.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    /// A Hugging Face folder.
    base: PathBuf,
    /// A PEFT folder to begin with; without it all weights train.
    pub(crate) adapter: Option<PathBuf>,
    /// `{"documents": [[id, ...], ...]}`; every token after a document's first is a target, unless there are `classes`, one a
    /// document.
    batch: PathBuf,
    /// `f32` or `bf16`.
    precision: String,
    /// In how few bits linears of the base are held, as in a job file; whole numbers without.
    #[serde(default)]
    quantization: Option<MethodRef>,
    /// `highest` or `high`.
    #[serde(default)]
    matmul: Matmul,
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
    /// The number of an NVIDIA device; the processor without.
    #[serde(default)]
    device: Option<u32>,
}

const fn one() -> usize {
    1
}

#[derive(Deserialize)]
struct Batch {
    documents: Vec<Vec<u32>>,
    classes: Option<Vec<u32>>,
}

impl Case {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    fn precision(&self) -> Result<Precision, Failure> {
        match self.precision.as_str() {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            other => Err(format!("precision is {other:?}; expected f32 or bf16").into()),
        }
    }

    pub(crate) const fn keep(&self) -> Keep {
        if self.recompute { Keep::Inputs } else { Keep::All }
    }

    /// The base where it was asked for.
    pub(crate) fn open(&self) -> Result<Base, Failure> {
        let precision = self.precision()?;
        let base = match &self.quantization {
            Some(format) => Base::open_quantized(&self.base, precision, format)?,
            None => Base::open(&self.base, precision)?,
        };
        Ok(base.on(card::kernels(self.device, self.matmul)?)?)
    }

    /// Bytes of the device's memory that are in use, by whomever; none on the processor.
    pub(crate) fn device_bytes(&self) -> Result<Option<u64>, Failure> {
        let all = self.device.and_then(|number| Some(card::cards().get(number as usize)?.memory_bytes));
        Ok(all.zip(card::kernels(self.device, self.matmul)?.free_bytes()).map(|(all, free)| all - free))
    }

    /// The batch, in as many parts as were asked for. A class is the label of the document's row that `head` reads.
    pub(crate) fn layouts(&self, head: HeadKind) -> Result<Vec<Layout>, Failure> {
        let batch: Batch = serde_json::from_slice(&std::fs::read(&self.batch)?)?;
        let mut layouts = vec![Layout::new(); self.shards.clamp(1, batch.documents.len().max(1))];
        let parts = layouts.len();
        for (index, ids) in batch.documents.iter().enumerate() {
            let labels: Vec<u32> = match (&batch.classes, head) {
                (Some(classes), HeadKind::Sequence { row, .. }) => {
                    let mut labels = vec![NO_LABEL; ids.len()];
                    let row = if row == PooledRow::First { 0 } else { ids.len().saturating_sub(1) };
                    labels[row] = *classes.get(index).ok_or("fewer classes than documents")?;
                    labels
                }
                (Some(_), _) => return Err("this model does not classify documents".into()),
                (None, _) => ids.iter().skip(1).copied().chain([NO_LABEL]).collect(),
            };
            let rows = ids.iter().zip(labels).map(|(&id, label)| (Row::Token(id), label));
            layouts[index % parts].push(Source::default(), rows);
        }
        Ok(layouts)
    }
}
