//! Norm, router, the experts that each row is sent to, residual.
//!
//! Rows are grouped by expert: each expert sees its rows in row order, and the experts are added up in their order, so
//! that nothing depends on the number of threads. Axes: T rows, E experts, K experts of a row, N rows of one expert.

use attune_architecture::{Experts as Mixture, Place, Site};
use attune_points::{Error, Result};
use attune_tensor::ops;
use candle_core::{D, DType, Device, Tensor};

use super::{Block, mlp, residual, site};
use crate::context::GraphCx;
use crate::routing::likeliest;

pub(super) struct Experts {
    /// Norm and router, then the linears of each expert.
    pub(super) sites: Vec<Site>,
    pub(super) mixture: Mixture,
    pub(super) layer: u32,
}

impl Experts {
    /// Each row's experts, mixed by their weights: `h_td` and `probs_te` to `[T, D]`.
    fn mix(&self, h_td: &Tensor, probs_te: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        let (t, k) = (h_td.dim(0)?, self.mixture.per_token);
        let chosen_tk = likeliest(probs_te, k)?;
        let ids_tk = Tensor::from_vec(chosen_tk.clone(), (t, k), &Device::Cpu)?;
        let weights_tk = probs_te.gather(&ids_tk, D::Minus1)?;
        let weights_tk = match self.mixture.normalised {
            true => weights_tk.broadcast_div(&weights_tk.sum_keepdim(D::Minus1)?)?,
            false => weights_tk,
        };
        let weights = weights_tk.flatten_all()?;
        let mut y_td = h_td.zeros_like()?;
        for (expert, sites) in (0u32..).zip(self.experts()) {
            let places: Vec<u32> = (0u32..).zip(&chosen_tk).filter(|(_, e)| **e == expert).map(|(at, _)| at).collect();
            if places.is_empty() {
                continue;
            }
            let rows: Vec<u32> = places.iter().map(|place| place / k as u32).collect();
            let (places_n, rows_n) = (Tensor::new(places, &Device::Cpu)?, Tensor::new(rows.as_slice(), &Device::Cpu)?);
            // Dropout and lanes go by the row of the batch, not by its place among the expert's.
            let y_nd = mlp::graph(sites, &h_td.index_select(&rows_n, 0)?, &cx.with(cx.tracked, Some(&rows)))?;
            let weights_n1 = weights.index_select(&places_n, 0)?.unsqueeze(1)?;
            y_td = y_td.index_add(&rows_n, &y_nd.broadcast_mul(&weights_n1)?, 0)?;
        }
        Ok(y_td)
    }

    /// The sites of each expert, in order.
    fn experts(&self) -> impl Iterator<Item = &[Site]> {
        self.sites.chunk_by(|a, b| a.expert == b.expert).filter(|sites| sites[0].expert.is_some())
    }
}

impl Block for Experts {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn routes(&self) -> Option<u32> {
        Some(self.layer)
    }

    /// The stream, then `probs_te`.
    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let mut routing = None;
        let y_td = residual(&x[0], site(&self.sites, Place::MlpNorm)?, cx, |h_td| {
            let probs_te = ops::softmax(&cx.linear(site(&self.sites, Place::Router)?, h_td)?)?;
            let y_td = self.mix(h_td, &probs_te, cx)?;
            routing = Some(probs_te);
            Ok(y_td)
        })?;
        let probs_te = routing.ok_or_else(|| Error::Refused(format!("layer {} routed nothing", self.layer)))?;
        debug_assert!(matches!(probs_te.dtype(), DType::F32 | DType::F64));
        Ok(vec![y_td, probs_te])
    }
}
