//! The last norm and the head, on chosen rows; and the pooling of rows into a vector per document.

use attune_architecture::{Architecture, BlockKind, HeadKind, Place, PooledRow, Pooling, Site};
use attune_points::{Doc, Error, Layout, Result};
use candle_core::{Device, Tensor};

use crate::block::site;
use crate::context::GraphCx;

pub(crate) struct Head {
    /// The last norm where there is one, and the linears of the head.
    pub(crate) sites: Vec<Site>,
}

impl Head {
    pub(crate) fn new(architecture: &Architecture) -> Self {
        let head = architecture.blocks().into_iter().find(|block| block.kind == BlockKind::Head);
        Self { sites: head.map(|head| head.sites).unwrap_or_default() }
    }

    /// The site at `place`, if this head has one.
    pub(crate) fn at(&self, place: Place) -> Option<&Site> {
        self.sites.iter().find(|site| site.place == place)
    }

    /// The linear that gives the logits.
    ///
    /// # Errors
    /// A head without logits.
    pub(crate) fn last(&self, architecture: &Architecture) -> Result<&Site> {
        match architecture.head {
            HeadKind::Tokens => site(&self.sites, Place::Head),
            HeadKind::Sequence { .. } | HeadKind::Rows { .. } => site(&self.sites, Place::Classifier),
            HeadKind::Embedding(_) => {
                Err(Error::Refused("this model gives a vector per document; it has no logits".to_owned()))
            }
        }
    }

    /// How rows become the vector of their document.
    ///
    /// # Errors
    /// A head that gives logits.
    pub(crate) fn pooling(architecture: &Architecture) -> Result<Pooling> {
        match architecture.head {
            HeadKind::Embedding(pooling) => Ok(pooling),
            other => Err(Error::Refused(format!("this model's head is {other:?}; it gives no vector per document"))),
        }
    }

    /// Logits of hidden rows: `h_td` to `[T, V]`, or to `[T, classes]`.
    pub(crate) fn graph(&self, h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        let h_td = self.norm(h_td, cx)?;
        let last = self.last(cx.base.architecture())?;
        match self.at(Place::Pooler) {
            Some(pooler) => cx.linear(last, &cx.linear(pooler, &h_td)?.tanh()?),
            None => cx.linear(last, &h_td),
        }
    }

    /// A vector per document of the layout, `[N, D]`.
    pub(crate) fn pooled(&self, h_td: &Tensor, pooling: Pooling, cx: &GraphCx<'_>) -> Result<Tensor> {
        pool(&self.norm(h_td, cx)?, cx.layout, pooling)
    }

    /// Hidden rows behind the last norm.
    pub(crate) fn norm(&self, h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        match self.at(Place::FinalNorm) {
            Some(norm) => cx.norm(norm, h_td),
            None => Ok(h_td.clone()),
        }
    }
}

/// The row of each document that stands for it.
///
/// # Errors
/// A document without rows.
pub(crate) fn rows(layout: &Layout, row: PooledRow) -> Result<Vec<u32>> {
    let of = |doc: &Doc| match row {
        _ if doc.rows.is_empty() => Err(Error::Refused("a document has no rows; expected at least one".to_owned())),
        PooledRow::First => Ok(doc.rows.start),
        PooledRow::Last => Ok(doc.rows.end - 1),
    };
    layout.docs().iter().map(of).collect()
}

/// Rows `h_td` to a vector per document, `[N, D]`.
pub(crate) fn pool(h_td: &Tensor, layout: &Layout, pooling: Pooling) -> Result<Tensor> {
    match pooling {
        Pooling::Row(row) => Ok(h_td.index_select(&Tensor::new(rows(layout, row)?, &Device::Cpu)?, 0)?),
        Pooling::Mean => {
            let docs = layout.docs();
            // A document without rows has no mean.
            rows(layout, PooledRow::First)?;
            let doc_t: Vec<u32> =
                (0u32..).zip(docs).flat_map(|(index, doc)| std::iter::repeat_n(index, doc.n_rows())).collect();
            let share_n1: Vec<f64> = docs.iter().map(|doc| 1.0 / doc.n_rows() as f64).collect();
            let share_n1 = Tensor::from_vec(share_n1, (docs.len(), 1), &Device::Cpu)?.to_dtype(h_td.dtype())?;
            let sum_nd = Tensor::zeros((docs.len(), h_td.dim(1)?), h_td.dtype(), &Device::Cpu)?;
            let sum_nd = sum_nd.index_add(&Tensor::new(doc_t, &Device::Cpu)?, h_td, 0)?;
            Ok(sum_nd.broadcast_mul(&share_n1)?)
        }
    }
}
