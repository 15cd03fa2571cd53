//! Norm, MLP, residual.

use attune_architecture::{Activation, MlpKind, Place, Site};
use attune_points::Result;
use attune_tensor::ops;
use candle_core::Tensor;

use super::{Block, residual, site};
use crate::context::GraphCx;

pub(super) struct Mlp {
    /// Norm, gate where there is one, up, down.
    pub(super) sites: Vec<Site>,
}

impl Block for Mlp {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let norm = site(&self.sites, Place::MlpNorm)?;
        Ok(vec![residual(&x[0], norm, cx, |h_td| graph(&self.sites, h_td, cx))?])
    }
}

/// The MLP of these sites, whole or one expert's: `h_td` to `[T, D]`.
pub(super) fn graph(sites: &[Site], h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
    let linear = |place, x: &Tensor| cx.linear(site(sites, place)?, x);
    let inner_ti = match cx.base.architecture().mlp {
        MlpKind::Gated(f) => (activate(f, &linear(Place::Gate, h_td)?)? * linear(Place::Up, h_td)?)?,
        MlpKind::Plain(f) => activate(f, &linear(Place::Up, h_td)?)?,
    };
    linear(Place::Down, &inner_ti)
}

/// The activation `f` of each value.
fn activate(f: Activation, x: &Tensor) -> Result<Tensor> {
    let y = match f {
        Activation::Silu => ops::silu(x),
        Activation::Gelu => ops::gelu(x),
        Activation::GeluTanh => ops::gelu_tanh(x),
        Activation::Relu => ops::relu(x),
    };
    Ok(y?)
}
