//! A reverse pass over one small graph: from the gradients of its outputs to those of its leaves.
//!
//! A walker calls this block by block. candle starts a backward pass from a scalar only, so each output is turned into a
//! scalar by an operation whose backward is the given gradient: nothing is multiplied, no gradient of the gradient is
//! computed.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var, bail};

/// A copy of `value` that operations record their backward link to.
///
/// # Errors
/// Whatever copying raises.
pub fn leaf(value: &Tensor) -> Result<Var> {
    Var::from_tensor(&value.detach())
}

/// For outputs `y` that were computed from `leaves`, and the gradient `dy` of the loss by each, the gradient of the loss by
/// each leaf; `None` for a leaf that no output depends on.
///
/// # Errors
/// A gradient whose shape is not its output's, or an operation without a backward.
pub fn pull(leaves: &[&Var], outputs: &[(&Tensor, &Tensor)]) -> Result<Vec<Option<Tensor>>> {
    let mut total: Option<Tensor> = None;
    for (y, dy) in outputs {
        if y.shape() != dy.shape() || y.dtype() != dy.dtype() {
            bail!("gradient {:?} {:?} for an output {:?} {:?}", dy.shape(), dy.dtype(), y.shape(), y.dtype());
        }
        let seed = y.apply_op1(Seed { dy: dy.detach() })?;
        total = Some(match total {
            None => seed,
            Some(total) => (total + seed)?,
        });
    }
    let Some(total) = total else { return Ok(vec![None; leaves.len()]) };
    let mut gradients = total.backward()?;
    // What a product's backward makes has a link to the product's other factor: it would keep the graph for as long as the gradient.
    Ok(leaves.iter().map(|leaf| Some(gradients.remove(leaf.as_tensor())?.detach())).collect())
}

/// A scalar 0 whose gradient by `y` is `dy`.
struct Seed {
    dy: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let zero = match storage {
            CpuStorage::F32(_) => CpuStorage::F32(vec![0.0]),
            CpuStorage::F64(_) => CpuStorage::F64(vec![0.0]),
            other => bail!(
                "no reverse pass over {:?}; expected f32 or f64",
                candle_core::backend::BackendStorage::dtype(other)
            ),
        };
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        // The gradient of `pull`'s total by itself is 1.
        Ok(Some(self.dy.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_gradient_keeps_nothing_of_the_graph() -> Result<()> {
        let [x, w] =
            [[[1f64, 2.0]], [[3.0, 4.0]]].map(|rows| leaf(&Tensor::new(&rows, &Device::Cpu).unwrap()).unwrap());
        let y = x.matmul(&w.t()?)?;
        let found = pull(&[&x, &w], &[(&y, &y.ones_like()?)])?;
        for gradient in found {
            assert!(!gradient.unwrap().track_op());
        }
        Ok(())
    }

    #[test]
    fn gradients_of_several_outputs_add_up() -> Result<()> {
        let x = leaf(&Tensor::new(&[2f64, 3.0], &Device::Cpu)?)?;
        let unused = leaf(&Tensor::new(&[1f64], &Device::Cpu)?)?;
        let (square, triple) = (x.sqr()?, (x.as_tensor() * 3.0)?);
        let (d_square, d_triple) =
            (Tensor::new(&[1f64, 10.0], &Device::Cpu)?, Tensor::new(&[100f64, 1.0], &Device::Cpu)?);
        let found = pull(&[&x, &unused], &[(&square, &d_square), (&triple, &d_triple)])?;
        assert_eq!(found[0].as_ref().unwrap().to_vec1::<f64>()?, [4.0 + 300.0, 60.0 + 3.0]);
        assert!(found[1].is_none());
        Ok(())
    }

    #[test]
    fn a_gradient_of_another_shape_is_refused() -> Result<()> {
        let x = leaf(&Tensor::new(&[2f32, 3.0], &Device::Cpu)?)?;
        let dy = Tensor::new(&[1f32], &Device::Cpu)?;
        let message = pull(&[&x], &[(&x.sqr()?, &dy)]).unwrap_err().to_string();
        assert!(message.contains("gradient [1] F32 for an output [2] F32"), "{message}");
        Ok(())
    }
}
