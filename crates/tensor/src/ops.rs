//! Differentiable operations that keep their backward link in any dtype: candle's own fast paths (`rms_norm`,
//! `softmax_last_dim`, `rope`, …) drop it without an error.
//!
//! Axes: T rows, D width, H heads, O output, I input, V vocabulary.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{D, Result, Tensor};

use crate::products;

/// `y_td = x_td / sqrt(mean_d(x²) + eps) · w_d`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x_td: &Tensor, w_d: &Tensor, eps: f64) -> Result<Tensor> {
    let scale_t1 = (x_td.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x_td.broadcast_mul(&scale_t1)?.broadcast_mul(w_d)
}

/// `y_td = (x_td - mean_d(x)) / sqrt(mean_d((x - mean)²) + eps) · w_d + b_d`.
///
/// # Errors
/// Shapes that do not fit.
pub fn layer_norm(x_td: &Tensor, w_d: &Tensor, b_d: &Tensor, eps: f64) -> Result<Tensor> {
    let centred_td = x_td.broadcast_sub(&x_td.mean_keepdim(D::Minus1)?)?;
    let scale_t1 = (centred_td.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    centred_td.broadcast_mul(&scale_t1)?.broadcast_mul(w_d)?.broadcast_add(b_d)
}

/// `exp(x - max) / sum(exp(x - max))` along the last axis. Entries of minus infinity get 0; a row of nothing else is not a
/// number.
///
/// # Errors
/// Whatever the operations raise.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    // The result does not depend on what is subtracted, so no gradient is due through the maximum.
    let exp = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// `x - max - log(sum(exp(x - max)))` along the last axis.
///
/// # Errors
/// Whatever the operations raise.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// Whatever the operation raises.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    // candle's gradient at x → -∞ is sigmoid·(1 - y) + y with y = -0 and sigmoid = 0: finite.
    x.silu()
}

/// `x (1 + erf(x / sqrt(2))) / 2`. candle's own `gelu_erf` has a backward with constants of six digits.
///
/// # Errors
/// Whatever the operations raise.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let twice_phi = ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * 0.5)? * twice_phi
}

/// `x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2`. candle's own `gelu` has a backward with constants of six digits.
///
/// # Errors
/// Whatever the operations raise.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    let cubic = ((x.sqr()? * 0.044_715)? + 1.0)?;
    let inner = ((x * cubic)? * (2.0 / PI).sqrt())?;
    let twice = (inner.tanh()? + 1.0)?;
    (x * 0.5)? * twice
}

/// `max(x, 0)`, with a gradient of 0 at 0.
///
/// # Errors
/// Whatever the operations raise.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let above = x.detach().gt(0.0)?.to_dtype(x.dtype())?;
    x * above
}

/// Rotary embedding of heads `x [.., T, D]` by tables `cos, sin [T, D/2]`; the first half of a head is paired with the
/// second, as in Hugging Face's models.
///
/// # Errors
/// Shapes that do not fit.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

/// `y_to = x_ti W_oiᵀ (+ b_o)` with gradients for all three: for trained weights. Frozen ones go through
/// [`crate::frozen::linear`].
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x_ti: &Tensor, w_oi: &Tensor, b_o: Option<&Tensor>) -> Result<Tensor> {
    let y_to = if products::takes(x_ti, w_oi) { products::linear(x_ti, w_oi)? } else { x_ti.matmul(&w_oi.t()?)? };
    match b_o {
        None => Ok(y_to),
        Some(b_o) => y_to.broadcast_add(b_o),
    }
}

/// The rows `ids` of a table `w_vd`, as `[T, D]`; the gradient adds up rows that were taken more than once.
///
/// # Errors
/// An id that is not below the number of rows.
pub fn embedding(ids_t: &Tensor, w_vd: &Tensor) -> Result<Tensor> {
    w_vd.index_select(ids_t, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::rng::Rng;
    use crate::testing::{assert_close, check_gradients};

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    #[test]
    fn rms_norm_has_its_gradient() {
        check_gradients(&[normal("x", &[5, 8]), normal("w", &[8])], |v| rms_norm(&v[0], &v[1], 1e-5));
    }

    #[test]
    fn layer_norm_has_its_gradient_and_its_moments() {
        let inputs = [normal("x", &[5, 8]), normal("w", &[8]), normal("b", &[8])];
        check_gradients(&inputs, |v| layer_norm(&v[0], &v[1], &v[2], 1e-5));
        let (ones, zeros) =
            (Tensor::ones(8, DType::F64, &Device::Cpu).unwrap(), Tensor::zeros(8, DType::F64, &Device::Cpu).unwrap());
        let y = layer_norm(&(&inputs[0] + 3.0).unwrap(), &ones, &zeros, 0.0).unwrap();
        let one = Tensor::ones(5, DType::F64, &Device::Cpu).unwrap();
        assert_close("mean", &(y.mean(D::Minus1).unwrap() + 1.0).unwrap(), &one, 8);
        assert_close("variance", &y.sqr().unwrap().mean(D::Minus1).unwrap(), &one, 8);
    }

    /// torch.nn.functional.gelu of these points in f64, exact and with approximate="tanh".
    #[test]
    fn activations_have_their_values_and_gradients() {
        let points = [-3.0f64, -0.5, 0.0, 0.7, 2.5];
        let x = Tensor::new(&points, &Device::Cpu).unwrap();
        let of = |f: fn(&Tensor) -> Result<Tensor>| f(&x).unwrap();
        let exact = [
            -0.004_049_694_094_890_31,
            -0.154_268_769_362_993_44,
            0.0,
            0.530_625_443_443_848_9,
            2.484_475_836_685_559_7,
        ];
        let tanh = [
            -0.003_637_392_081_772_994_3,
            -0.154_285_990_174_856_06,
            0.0,
            0.530_570_134_705_116_7,
            2.484_915_733_910_001,
        ];
        assert_close("gelu", &of(gelu), &Tensor::new(&exact, &Device::Cpu).unwrap(), 1);
        assert_close("gelu_tanh", &of(gelu_tanh), &Tensor::new(&tanh, &Device::Cpu).unwrap(), 1);
        assert_eq!(of(relu).to_vec1::<f64>().unwrap(), [0.0, 0.0, 0.0, 0.7, 2.5]);
        for f in [gelu, gelu_tanh, relu] {
            check_gradients(&[normal("x", &[4, 6])], |v| f(&v[0]));
        }
        let zero = crate::autograd::leaf(&Tensor::new(&[0f32], &Device::Cpu).unwrap()).unwrap();
        let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
        let found = crate::autograd::pull(&[&zero], &[(&relu(&zero).unwrap(), &one)]).unwrap();
        assert_eq!(found[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [0.0]);
    }

    #[test]
    fn softmax_and_its_logarithm_have_their_gradients() {
        check_gradients(&[normal("x", &[2, 3, 7])], |v| softmax(&v[0]));
        check_gradients(&[normal("x", &[2, 3, 7])], |v| log_softmax(&v[0]));
    }

    #[test]
    fn softmax_holds_at_extremes_and_under_masks() {
        let x =
            Tensor::new(&[[1000f32, 1000.0, f32::NEG_INFINITY], [-1000.0, -2000.0, -3000.0]], &Device::Cpu).unwrap();
        assert_eq!(softmax(&x).unwrap().to_vec2::<f32>().unwrap(), [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]);
        let log = log_softmax(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(log[1], [0.0, -1000.0, -2000.0]);
    }

    #[test]
    fn silu_has_its_gradient_also_at_extremes() {
        check_gradients(&[normal("x", &[4, 6])], |v| silu(&v[0]));
        let x = crate::autograd::leaf(&Tensor::new(&[-1000f32, 0.0, 1000.0], &Device::Cpu).unwrap()).unwrap();
        let ones = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
        let found = crate::autograd::pull(&[&x], &[(&silu(&x).unwrap(), &ones)]).unwrap();
        assert_eq!(found[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn rope_turns_pairs_and_has_its_gradient() {
        let angles = normal("angles", &[5, 4]);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        check_gradients(&[normal("x", &[2, 5, 8])], |v| rope(&v[0], &cos, &sin));
        let x = normal("x", &[2, 5, 8]);
        let turned = rope(&x, &cos, &sin).unwrap();
        let norm = |x: &Tensor| x.sqr().unwrap().sum_keepdim(D::Minus1).unwrap();
        assert_close("length of a head", &norm(&turned), &norm(&x), 8);
    }

    #[test]
    fn linear_and_embedding_have_their_gradients() {
        let inputs = [normal("x", &[5, 4]), normal("w", &[3, 4]), normal("b", &[3])];
        check_gradients(&inputs, |v| linear(&v[0], &v[1], Some(&v[2])));
        let ids = Tensor::new(&[2u32, 0, 2, 1], &Device::Cpu).unwrap();
        check_gradients(&[normal("w", &[3, 4])], |v| embedding(&ids, &v[0]));
        let outside = Tensor::new(&[3u32], &Device::Cpu).unwrap();
        assert!(embedding(&outside, &normal("w", &[3, 4])).is_err());
    }
}
