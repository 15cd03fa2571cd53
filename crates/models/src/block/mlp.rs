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
        let linear = |place, x: &Tensor| cx.linear(site(&self.sites, place)?, x);
        let y_td = residual(&x[0], site(&self.sites, Place::MlpNorm)?, cx, |h_td| {
            let inner_ti = match cx.base.architecture().mlp {
                MlpKind::Gated(f) => (activate(f, &linear(Place::Gate, h_td)?)? * linear(Place::Up, h_td)?)?,
                MlpKind::Plain(f) => activate(f, &linear(Place::Up, h_td)?)?,
            };
            linear(Place::Down, &inner_ti)
        })?;
        Ok(vec![y_td])
    }
}

/// The activation `f` of each value.
pub(super) fn activate(f: Activation, x: &Tensor) -> Result<Tensor> {
    let y = match f {
        Activation::Silu => ops::silu(x),
        Activation::Gelu => ops::gelu(x),
        Activation::GeluTanh => ops::gelu_tanh(x),
        Activation::Relu => ops::relu(x),
    };
    Ok(y?)
}
