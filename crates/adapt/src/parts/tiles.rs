//! Tensors repeated to a width.

use attune_points::Result;
use candle_core::Tensor;

/// The first `n` of a tensor repeated along a dimension.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn tiled(tensor: &Tensor, dim: usize, n: usize) -> Result<Tensor> {
    let copies = vec![tensor; n.div_ceil(tensor.dim(dim)?)];
    Ok(Tensor::cat(&copies, dim)?.narrow(dim, 0, n)?)
}
