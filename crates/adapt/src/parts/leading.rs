//! The leading part of a weight by its singular values, found by iterating on a random subspace.

use attune_points::{Result, Weight};
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};

/// Columns of the subspace beyond those that are asked for: the last ones of a subspace are the last to be found.
const MORE: usize = 8;
/// Rounds. The part of a direction beyond the subspace shrinks by the square of the ratio of their values in each.
const ROUNDS: usize = 12;
/// Sweeps over all pairs that Jacobi's method needs at most; it ends when nothing turns.
const SWEEPS_MAX: usize = 60;

/// `U √S` `[o, r]` and `√S Vᵀ` `[r, i]` of the `rank` largest singular values of a weight, the largest first, in 32 bits. The
/// largest number of each column of U is positive, so that the weight alone decides the signs.
///
/// # Errors
/// A weight that cannot be read.
pub(crate) fn leading(weight: &dyn Weight, rank: usize, rng: &mut Rng) -> Result<(Tensor, Tensor)> {
    let w_oi = weight.dense(DType::F32)?;
    let (o, i) = w_oi.dims2()?;
    let k = (rank + MORE).min(o).min(i);
    let mut v_ik = orthonormal(&rng.named("subspace").normal_tensor(&[i, k][..], 1.0, DType::F32)?)?;
    let mut u_ok = orthonormal(&w_oi.matmul(&v_ik)?)?;
    for _ in 0..ROUNDS {
        v_ik = orthonormal(&w_oi.t()?.matmul(&u_ok)?)?;
        u_ok = orthonormal(&w_oi.matmul(&v_ik)?)?;
    }
    // Within the subspace: Uᵀ W = E S Vᵀ, where E are the eigenvectors of its Gram matrix and S² the values.
    let inner_ki = u_ok.t()?.matmul(&w_oi)?.to_dtype(DType::F64)?;
    let gram = inner_ki.matmul(&inner_ki.t()?)?.to_vec2()?;
    let (left, right) = factors(&u_ok.to_dtype(DType::F64)?, &inner_ki, gram, rank.min(k))?;
    Ok((left.to_dtype(DType::F32)?, right.to_dtype(DType::F32)?))
}

fn factors(u_ok: &Tensor, inner_ki: &Tensor, gram: Vec<Vec<f64>>, rank: usize) -> Result<(Tensor, Tensor)> {
    let (values, vectors) = eigen(gram);
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let (mut left, mut right) = (Vec::with_capacity(rank), Vec::with_capacity(rank));
    for &at in &order[..rank] {
        let e_k = Tensor::from_iter(vectors.iter().map(|row| row[at]), &Device::Cpu)?.unsqueeze(1)?;
        let (u_o1, sv_i1) = (u_ok.matmul(&e_k)?, inner_ki.t()?.matmul(&e_k)?);
        let numbers = u_o1.flatten_all()?.to_vec1::<f64>()?;
        let largest =
            numbers.into_iter().fold(0.0f64, |most, value| if value.abs() > most.abs() { value } else { most });
        let (s, sign) = (values[at].max(0.0).sqrt(), if largest < 0.0 { -1.0 } else { 1.0 });
        left.push((u_o1 * (sign * s.sqrt()))?);
        // √S V is S V by the root; nothing of a value of 0.
        right.push((sv_i1 * if s > 0.0 { sign / s.sqrt() } else { 0.0 })?.t()?);
    }
    Ok((Tensor::cat(&left, 1)?, Tensor::cat(&right, 0)?))
}

/// An orthonormal basis of the columns' span; columns that add nothing to it are 0.
fn orthonormal(y_nk: &Tensor) -> Result<Tensor> {
    let (n, k) = y_nk.dims2()?;
    let mut columns: Vec<Vec<f64>> = y_nk.t()?.to_dtype(DType::F64)?.to_vec2()?;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for at in 0..k {
        let (before, rest) = columns.split_at_mut(at);
        let column = &mut rest[0];
        let whole = dot(column, column).sqrt();
        // Twice, since what cancels the first time leaves parts of the others behind.
        for _ in 0..2 {
            for other in before.iter() {
                let part = dot(other, column);
                column.iter_mut().zip(other).for_each(|(value, other)| *value -= part * other);
            }
        }
        let length = dot(column, column).sqrt();
        // The input is of 32 bits: less than this of it is rounding.
        let by = if length > 1e-6 * whole { 1.0 / length } else { 0.0 };
        column.iter_mut().for_each(|value| *value *= by);
    }
    Ok(Tensor::from_vec(columns.concat(), (k, n), &Device::Cpu)?.t()?.to_dtype(DType::F32)?.contiguous()?)
}

/// Eigenvalues of a symmetric matrix, and its eigenvectors as columns, by Jacobi's turns of pairs.
fn eigen(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let mut vectors: Vec<Vec<f64>> =
        (0..n).map(|row| (0..n).map(|col| f64::from(u8::from(row == col))).collect()).collect();
    for _ in 0..SWEEPS_MAX {
        let mut turned = false;
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            let off = a[p][q];
            if off.abs() <= 1e-15 * (a[p][p] * a[q][q]).abs().sqrt() {
                continue;
            }
            turned = true;
            let theta = (a[q][q] - a[p][p]) / (2.0 * off);
            let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
            let cos = 1.0 / (t * t + 1.0).sqrt();
            let sin = t * cos;
            for row in a.iter_mut().chain(&mut vectors) {
                (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
            }
            let (above, below) = a.split_at_mut(q);
            for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
            }
        }
        if !turned {
            break;
        }
    }
    ((0..n).map(|at| a[at][at]).collect(), vectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest(x: &Tensor) -> f64 {
        x.to_dtype(DType::F64).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// An orthonormal matrix of random columns.
    fn turned(name: &str, n: usize, k: usize) -> Tensor {
        orthonormal(&Rng::new(1, name).normal_tensor(&[n, k][..], 1.0, DType::F32).unwrap()).unwrap()
    }

    fn weight(values: &[f32], (o, i): (usize, usize)) -> (Tensor, Tensor, Tensor) {
        let (u, v) = (turned("u", o, values.len()), turned("v", i, values.len()));
        let s = Tensor::new(values, &Device::Cpu).unwrap();
        (u.broadcast_mul(&s).unwrap().matmul(&v.t().unwrap()).unwrap(), u, v)
    }

    #[test]
    fn a_planted_decomposition_is_found_with_its_values() {
        let values = [9.0f32, 5.0, 4.0, 2.0, 1.0, 0.5];
        for shape in [(30, 20), (20, 30), (6, 9)] {
            let (w, u, v) = weight(&values, shape);
            let (left, right) = leading(&w, 3, &mut Rng::new(1, "svd")).unwrap();
            assert_eq!((left.dims(), right.dims()), (&[shape.0, 3][..], &[3, shape.1][..]));
            let three = |x: &Tensor| x.narrow(1, 0, 3).unwrap();
            let s = Tensor::new(&values[..3], &Device::Cpu).unwrap();
            let best = three(&u).broadcast_mul(&s).unwrap().matmul(&three(&v).t().unwrap()).unwrap();
            assert!(largest(&(left.matmul(&right).unwrap() - best).unwrap()) < 1e-4);
            // Both sides have the roots of the values as lengths.
            for lengths in [left.sqr().unwrap().sum(0).unwrap(), right.sqr().unwrap().sum(1).unwrap()] {
                assert!(largest(&(lengths - &s).unwrap()) < 1e-4);
            }
        }
    }

    #[test]
    fn another_subspace_gives_the_same_factors_with_the_same_signs() {
        let (w, ..) = weight(&[9.0, 5.0, 4.0, 2.0, 1.0, 0.5], (30, 20));
        let of = |seed| leading(&w, 3, &mut Rng::new(seed, "svd")).unwrap();
        let ((a, b), (c, d)) = (of(1), of(2));
        assert!(largest(&(a - c).unwrap()) < 1e-4 && largest(&(b - d).unwrap()) < 1e-4);
    }

    #[test]
    fn a_weight_of_a_smaller_rank_or_of_zeros_has_zeros_beyond_it() {
        let (w, ..) = weight(&[3.0], (12, 10));
        let (left, right) = leading(&w, 3, &mut Rng::new(1, "svd")).unwrap();
        assert!(largest(&(left.matmul(&right).unwrap() - &w).unwrap()) < 1e-5);
        let (left, right) = leading(&w.zeros_like().unwrap(), 3, &mut Rng::new(1, "svd")).unwrap();
        assert_eq!((largest(&left), largest(&right)), (0.0, 0.0));
    }
}
