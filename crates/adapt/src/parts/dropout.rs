//! Dropout of a component's input.

use attune_points::Result;
use attune_points::adapter::RowCx;
use candle_core::Tensor;

/// The rows `x_ti`, in training with a share `p` of their values dropped.
///
/// # Errors
/// Whatever making the mask raises.
pub(crate) fn dropped(x_ti: &Tensor, p: f64, cx: &RowCx<'_>) -> Result<Tensor> {
    match cx.dropout {
        Some(masks) if p > 0.0 => Ok((x_ti * masks.mask(cx.site, x_ti.dim(1)?, p, x_ti)?)?),
        _ => Ok(x_ti.clone()),
    }
}
