//! Differentiable operations that keep their backward link in any dtype: candle's own fast paths (`rms_norm`,
//! `softmax_last_dim`, `rope`, …) drop it without an error.
//!
//! Axes: T rows, D width, H heads, O output, I input, V vocabulary.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{D, Result, Tensor};

use crate::{blocks, circulant, fourier, kronecker, ordered, products, scaled};

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

/// `a b` of two matrices, or of as many of each as there are, `[p, m, k]` and `[p, k, n]`; gradients for those factors that have one.
///
/// # Errors
/// Shapes that do not fit.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if products::takes_matmul(a, b) { products::matmul(a, b) } else { a.matmul(b) }
}

/// `a_kmᵀ b_kn`; gradients for those factors that have one.
///
/// # Errors
/// Shapes that do not fit.
pub fn matmul_turned(a_km: &Tensor, b_kn: &Tensor) -> Result<Tensor> {
    if products::takes(a_km, b_kn) { products::turned(a_km, b_kn) } else { a_km.t()?.matmul(b_kn) }
}

/// `W_oi Rᵀ` for the block-diagonal R of square blocks `r_nbb`, or of one block `[1, b, b]` again and again.
///
/// # Errors
/// Shapes that do not fit.
pub fn turn_columns(w_oi: &Tensor, r_nbb: &Tensor) -> Result<Tensor> {
    blocks::turn(w_oi, r_nbb)
}

/// The Kronecker product `C_ab ⊗ D_cd`, `[a c, b d]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn kronecker(c_ab: &Tensor, d_cd: &Tensor) -> Result<Tensor> {
    kronecker::product(c_ab, d_cd)
}

/// The matrix `[m b, n b]` of circulant blocks: `[m b + k, n b + l] = K[m, n, (l - k) mod b]` of kernels `K [m, n, b]`.
///
/// # Errors
/// Another shape.
pub fn circulant(kernel_mnb: &Tensor) -> Result<Tensor> {
    circulant::blocks(kernel_mnb)
}

/// `y_pq = Σ_k c_k cos(2π (p u_k / o + q v_k / i))` on a grid `[o, i]`, of waves `places` (u, v): a fast transform, forward and back.
///
/// # Errors
/// A frequency that the grid does not have, or more or fewer waves than amplitudes.
pub fn waves(c_k: &Tensor, places: Vec<(usize, usize)>, o_i: (usize, usize)) -> Result<Tensor> {
    fourier::waves(c_k, places, o_i)
}

/// The columns of a matrix `x_tw` in another order: column k of the result is column `order[k]`.
///
/// # Errors
/// An order that does not have each column once.
pub fn permute_columns(x_tw: &Tensor, order: &[usize]) -> Result<Tensor> {
    ordered::permute(x_tw, order)
}

/// Columns of a matrix `x_tw` times a number each, `v_w`: `y_tw = x_tw v_w`.
///
/// # Errors
/// Shapes that do not fit.
pub fn scale_columns(x_tw: &Tensor, v_w: &Tensor) -> Result<Tensor> {
    scaled::scale(x_tw, &v_w.flatten_all()?, scaled::Axis::Columns)
}

/// Entries of a matrix `x_tw` times those of another of its shape, `y_tw = x_tw v_tw`; gradients for those factors that have one.
///
/// # Errors
/// Shapes that do not fit.
pub fn scale_entries(x_tw: &Tensor, v_tw: &Tensor) -> Result<Tensor> {
    if x_tw.shape() != v_tw.shape() {
        candle_core::bail!("entries of {:?} times those of {:?}; expected one shape", x_tw.shape(), v_tw.shape());
    }
    scaled::scale(x_tw, v_tw, scaled::Axis::Entries)
}

/// Rows of a matrix `x_tw` times a number each, `v_t`: `y_tw = v_t x_tw`.
///
/// # Errors
/// Shapes that do not fit.
pub fn scale_rows(x_tw: &Tensor, v_t: &Tensor) -> Result<Tensor> {
    scaled::scale(x_tw, &v_t.flatten_all()?, scaled::Axis::Rows)
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
    fn blocks_turn_their_own_columns_and_have_their_gradients() {
        for (o, n, b, shared) in [(5, 3, 4, false), (3, 2, 16, false), (2, 2, 3, true), (19, 1, 5, false)] {
            let (w, r) = (normal("w", &[o, n * b]), normal("r", &[if shared { 1 } else { n }, b, b]));
            let block = |at: usize| r.get(if shared { 0 } else { at }).unwrap().t().unwrap();
            let by_hand: Vec<Tensor> =
                (0..n).map(|at| w.narrow(1, at * b, b).unwrap().matmul(&block(at)).unwrap()).collect();
            assert_close("turned", &turn_columns(&w, &r).unwrap(), &Tensor::cat(&by_hand, 1).unwrap(), b);
            check_gradients(&[w, r], |v| turn_columns(&v[0], &v[1]));
        }
        assert!(turn_columns(&normal("w", &[2, 6]), &normal("r", &[2, 2, 2])).is_err());
    }

    #[test]
    fn kronecker_products_are_those_of_broadcasts_and_have_their_gradients() {
        for ((a, b), (c, d)) in [((2, 3), (4, 5)), ((1, 4), (3, 1)), ((3, 1), (1, 2))] {
            let (left, right) = (normal("left", &[a, b]), normal("right", &[c, d]));
            let by_hand = left.reshape((a, 1, b, 1)).unwrap().broadcast_mul(&right.reshape((1, c, 1, d)).unwrap());
            let by_hand = by_hand.unwrap().reshape((a * c, b * d)).unwrap();
            assert_close("product", &kronecker(&left, &right).unwrap(), &by_hand, 1);
            check_gradients(&[left, right], |v| kronecker(&v[0], &v[1]));
        }
    }

    #[test]
    fn circulant_blocks_are_rows_that_are_rotated_and_have_their_gradients() {
        let kernel = normal("kernel", &[2, 3, 4]);
        let (values, found) = (kernel.to_vec3::<f64>().unwrap(), circulant(&kernel).unwrap().to_vec2::<f64>().unwrap());
        for (row, found) in found.iter().enumerate() {
            for (column, found) in found.iter().enumerate() {
                assert_eq!(*found, values[row / 4][column / 4][(column % 4 + 4 - row % 4) % 4]);
            }
        }
        check_gradients(&[kernel], |v| circulant(&v[0]));
    }

    /// Sum by sum, on even and odd grids, with waves that are their own mirror images.
    #[test]
    fn waves_add_up_and_have_their_gradients() {
        for (o, i, places) in [
            (4, 6, vec![(0, 0), (1, 2), (3, 4), (2, 3), (0, 3), (3, 5)]),
            (5, 7, vec![(4, 6), (0, 4), (2, 0)]),
            (1, 1, vec![(0, 0)]),
            (1, 4, vec![(0, 2), (0, 3)]),
            (3, 1, vec![(2, 0)]),
        ] {
            let c = normal("c", &[places.len()]);
            let found = waves(&c, places.clone(), (o, i)).unwrap().to_vec2::<f64>().unwrap();
            for (p, q) in (0..o).flat_map(|p| (0..i).map(move |q| (p, q))) {
                let wave = |(u, v): &(usize, usize)| {
                    (2.0 * PI * ((p * u) as f64 / o as f64 + (q * v) as f64 / i as f64)).cos()
                };
                let by_hand: f64 = places.iter().zip(c.to_vec1::<f64>().unwrap()).map(|(at, c)| c * wave(at)).sum();
                assert!((found[p][q] - by_hand).abs() < 1e-13);
            }
            check_gradients(&[c], |v| waves(&v[0], places.clone(), (o, i)));
        }
        assert!(waves(&normal("c", &[1]), vec![(4, 0)], (4, 6)).is_err());
    }

    #[test]
    fn columns_change_places_and_their_gradients_go_back() {
        let x = normal("x", &[3, 4]);
        let order = Tensor::new(&[2u32, 0, 3, 1], &Device::Cpu).unwrap();
        let by_hand = x.index_select(&order, 1).unwrap();
        assert_eq!(
            permute_columns(&x, &[2, 0, 3, 1]).unwrap().to_vec2::<f64>().unwrap(),
            by_hand.to_vec2::<f64>().unwrap()
        );
        check_gradients(std::slice::from_ref(&x), |v| permute_columns(&v[0], &[2, 0, 3, 1]));
        for wrong in [&[0, 1, 2][..], &[0, 1, 2, 2], &[0, 1, 2, 4]] {
            assert!(permute_columns(&x, wrong).is_err());
        }
    }

    #[test]
    fn rows_and_columns_are_scaled_and_have_their_gradients() {
        let (x, rows, columns) = (normal("x", &[5, 4]), normal("rows", &[5, 1]), normal("columns", &[4]));
        let by_hand = x.broadcast_mul(&rows).unwrap();
        assert_eq!(scale_rows(&x, &rows).unwrap().to_vec2::<f64>().unwrap(), by_hand.to_vec2::<f64>().unwrap());
        let by_hand = x.broadcast_mul(&columns).unwrap();
        assert_eq!(scale_columns(&x, &columns).unwrap().to_vec2::<f64>().unwrap(), by_hand.to_vec2::<f64>().unwrap());
        check_gradients(&[x.clone(), rows], |v| scale_rows(&v[0], &v[1]));
        check_gradients(&[x.clone(), columns.clone()], |v| scale_columns(&v[0], &v[1]));
        assert!(scale_rows(&x, &columns).is_err());
        let entries = normal("entries", &[5, 4]);
        let by_hand = (&x * &entries).unwrap().to_vec2::<f64>().unwrap();
        assert_eq!(scale_entries(&x, &entries).unwrap().to_vec2::<f64>().unwrap(), by_hand);
        check_gradients(&[x.clone(), entries], |v| scale_entries(&v[0], &v[1]));
        assert!(scale_entries(&x, &x.t().unwrap()).is_err());
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
