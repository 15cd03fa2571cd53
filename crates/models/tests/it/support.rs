//! What the tests share: golden folders, batches, an objective.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use attune_models::Model;
use attune_points::layout::{Axis, Column, NO_LABEL, Source, TOKEN_TYPES, Values};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Level, LogitsLoss, Objective, ScopeLoss, ScopeView};
use attune_points::{Bank, BankKind, Layout, Params, Result, Row, TensorId, TensorName, Theta};
use attune_tensor::ops;
use candle_core::{DType, Device, Tensor};

pub(crate) fn golden(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(case)
}

/// The tensors of a golden file.
pub(crate) struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    pub(crate) fn open(case: &str, file: &str) -> Option<Self> {
        let path = golden(case).join(file);
        let tensors = path.is_file().then(|| candle_core::safetensors::load(path, &Device::Cpu).unwrap())?;
        Some(Self(tensors.into_iter().collect()))
    }

    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no golden tensor {name}"))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub(crate) fn ints(&self, name: &str) -> Vec<i64> {
        self.tensor(name).to_dtype(DType::I64).unwrap().to_vec1().unwrap()
    }

    pub(crate) fn float(&self, name: &str) -> f64 {
        self.tensor(name).to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()[0]
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The batch: documents, tokens, labels, token types where there are any.
    pub(crate) fn layout(&self) -> Layout {
        let (ids, labels) = (self.ints("input_ids"), self.ints("labels"));
        let mut layout = Layout::new();
        let mut start = 0;
        for length in self.ints("doc_lengths") {
            let rows = start..start + length as usize;
            let label = |label: i64| u32::try_from(label).unwrap_or(NO_LABEL);
            let rows: Vec<_> = rows.map(|row| (Row::Token(ids[row] as u32), label(labels[row]))).collect();
            start += rows.len();
            layout.push(Source::default(), rows);
        }
        if self.has(TOKEN_TYPES) {
            let types = self.ints(TOKEN_TYPES).into_iter().map(|id| id as u32).collect();
            layout.set_column(TOKEN_TYPES, Column { axis: Axis::Row, values: Values::U32(types) }).unwrap();
        }
        layout
    }
}

/// Every weight of the base as a trained weight.
pub(crate) fn all_trained(model: &Model) -> (Theta, Vec<TensorId>) {
    let names = model.base().architecture().tensors().into_iter().map(|info| TensorName::from_path(&info.name));
    let params: Params = names.map(|name| (name.clone(), model.base().tensor(&name, DType::F32).unwrap())).collect();
    let bank = Bank { slot: "weights".into(), kind: BankKind::Weights, sets: vec![Arc::new(params)], train: true };
    let theta = Theta::single([bank]);
    let ids = theta.trained().map(|(id, _)| id).collect();
    (theta, ids)
}

/// Plain cross-entropy.
pub(crate) struct CrossEntropy;

impl Objective for CrossEntropy {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

/// Cross-entropy with the label's weight shared out to all tokens: `(1 - ε) nll - ε mean_v logp_v`, by its logits.
#[derive(Debug)]
pub(crate) struct Smoothed;

/// That of one chunk.
#[derive(Debug)]
struct SmoothedChunk(Vec<u32>);

impl LogitsLoss for SmoothedChunk {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let logp_cv = ops::log_softmax(logits_cv)?;
        let labels_c1 = Tensor::new(self.0.as_slice(), &Device::Cpu)?.unsqueeze(1)?;
        let of_label = logp_cv.gather(&labels_c1, 1)?.squeeze(1)?;
        Ok((of_label.affine(-0.9, 0.0)? - logp_cv.mean(1)?.affine(0.1, 0.0)?)?)
    }
}

impl Objective for Smoothed {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::Logits(Arc::new(SmoothedChunk(chunk.rows.iter().map(|row| row.label).collect()))))
    }
}

/// How far the second copy of each row is from the first: the sum of squared differences of their log-probabilities.
#[derive(Debug)]
pub(crate) struct Apart;

impl LogitsLoss for Apart {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let logp_cv = ops::log_softmax(logits_cv)?;
        let rows = logp_cv.dim(0)? / 2;
        Ok((logp_cv.narrow(0, 0, rows)? - logp_cv.narrow(0, rows, rows)?)?.sqr()?.sum(1)?)
    }
}

impl Objective for Apart {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn copies(&self) -> usize {
        2
    }

    fn chunk(&self, _: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::Logits(Arc::new(Self)))
    }
}

/// Cross-entropy by its logits.
pub(crate) struct ByLogits;

/// That of one chunk.
#[derive(Debug)]
struct NllChunk(Vec<u32>);

impl LogitsLoss for NllChunk {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let labels_c1 = Tensor::new(self.0.as_slice(), &Device::Cpu)?.unsqueeze(1)?;
        Ok(ops::log_softmax(logits_cv)?.gather(&labels_c1, 1)?.squeeze(1)?.neg()?)
    }
}

impl Objective for ByLogits {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::Logits(Arc::new(NllChunk(chunk.rows.iter().map(|row| row.label).collect()))))
    }
}

/// A loss that is no sum over rows, of a document, of a group or of a part: `softplus(m)`, where `m` is the mean over the
/// scope's documents, their signs alternating, of the mean log-probability of their rows.
pub(crate) struct Alternating(pub(crate) Level);

impl Objective for Alternating {
    fn level(&self) -> Level {
        self.0
    }

    fn denominator(&self) -> Denominator {
        Denominator::Groups
    }

    fn scope(&self, scope: &ScopeView<'_>) -> Result<ScopeLoss> {
        let docs = scope.docs.clone().map(|doc| scope.rows_of(doc)).filter(|rows| !rows.is_empty());
        let docs: Vec<std::ops::Range<usize>> = docs.collect();
        ScopeLoss::by_graph(scope.logp_t, |logp_t| {
            let mut m = Tensor::new(0.0f64, &Device::Cpu)?;
            for (i, rows) in docs.iter().enumerate() {
                let mean = logp_t.narrow(0, rows.start, rows.len())?.mean_all()?;
                m = (m + (mean * if i % 2 == 0 { -1.0 } else { 1.0 })?)?;
            }
            let m = (m / docs.len() as f64)?;
            Ok((m.exp()? + 1.0)?.log()?)
        })
    }
}

/// The largest absolute difference of two tensors.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let difference = (wide(a) - wide(b)).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

/// The largest absolute value.
pub(crate) fn largest(a: &Tensor) -> f64 {
    a.to_dtype(DType::F64).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}
