//! Orthogonal matrices made of skew-symmetric ones, many of a size at once.

use attune_architecture::Site;
use attune_points::Result;
use attune_spec::Fault;
use attune_tensor::ops;
use candle_core::{DType, Device, Tensor};

/// How many blocks an input width is cut into, and how wide they are, by one of the two; the other is 0.
///
/// # Errors
/// One that does not divide the width.
pub(crate) fn blocks(
    site: &Site,
    input: usize,
    block_size: u32,
    blocks: u32,
) -> std::result::Result<(usize, usize), Fault> {
    let (field, by) = if blocks > 0 { ("blocks", blocks as usize) } else { ("block_size", block_size as usize) };
    if by == 0 || !input.is_multiple_of(by) {
        let message = format!("is {by}, which does not divide {input}, the input width of {}", site.id);
        return Err(Fault::new(field, message));
    }
    Ok(if blocks > 0 { (by, input / by) } else { (input / by, by) })
}

/// The skew-symmetric matrices `[n, b, b]` whose entries above the diagonal, row after row, are `upper [n, b (b - 1) / 2]`.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn skew(upper: &Tensor, b: usize) -> Result<Tensor> {
    let (n, count) = upper.dims2()?;
    // The place of an entry among those above the diagonal, and its sign; the diagonal takes a 0 from behind them.
    let place = |row: usize, col: usize| row * b - row * (row + 1) / 2 + col - row - 1;
    let entries = (0..b).flat_map(|row| (0..b).map(move |col| (row, col)));
    let (places, signs): (Vec<u32>, Vec<f64>) = entries
        .map(|(row, col)| match row.cmp(&col) {
            std::cmp::Ordering::Less => (place(row, col) as u32, 1.0),
            std::cmp::Ordering::Equal => (count as u32, 0.0),
            std::cmp::Ordering::Greater => (place(col, row) as u32, -1.0),
        })
        .unzip();
    let places = Tensor::from_vec(places, b * b, &Device::Cpu)?;
    let signs = Tensor::from_vec(signs, (1, b * b), &Device::Cpu)?.to_dtype(upper.dtype())?;
    let padded = Tensor::cat(&[upper, &Tensor::zeros((n, 1), upper.dtype(), upper.device())?], 1)?;
    Ok(padded.index_select(&places, 1)?.broadcast_mul(&signs)?.reshape((n, b, b))?)
}

/// Cayley's `(1 - Q)(1 + Q)⁻¹` of skew-symmetric matrices `[n, b, b]`: orthogonal, and 1 at Q = 0.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn cayley(q_nbb: &Tensor) -> Result<Tensor> {
    let one_bb = Tensor::eye(q_nbb.dim(2)?, q_nbb.dtype(), q_nbb.device())?;
    // 1 - Q = 2 - (1 + Q).
    let inverse = inverse(&q_nbb.broadcast_add(&one_bb)?)?;
    Ok((inverse * 2.0)?.broadcast_sub(&one_bb)?)
}

/// `1 + 2 Q + 2 Q² + … + Q^(terms - 1)`, as long as there are that many terms, of matrices `[n, b, b]`: close to Cayley's map
/// of -Q, and without an inverse.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn series(q_nbb: &Tensor, terms: u32) -> Result<Tensor> {
    let one_bb = Tensor::eye(q_nbb.dim(2)?, q_nbb.dtype(), q_nbb.device())?;
    let mut sum = (q_nbb * 2.0)?.broadcast_add(&one_bb)?;
    if terms > 2 {
        let mut power = ops::matmul(q_nbb, q_nbb)?;
        sum = (sum + (&power * 2.0)?)?;
        for _ in 3..terms - 1 {
            power = ops::matmul(&power, q_nbb)?;
            sum = (sum + (&power * 2.0)?)?;
        }
        sum = (sum + ops::matmul(&power, q_nbb)?)?;
    }
    Ok(sum)
}

/// The orthonormal columns `q_or` of `p_or = q_or t_rr`, `t` upper triangular, with the signs that LAPACK's elimination by reflections
/// gives them; by Gram and Schmidt, each column twice, so that they are orthogonal in 32 bits as well.
///
/// # Errors
/// More columns than rows.
pub(crate) fn columns(p_or: &Tensor) -> Result<Tensor> {
    let (_, r) = p_or.dims2()?;
    let mut columns: Vec<Tensor> = Vec::with_capacity(r);
    for column in 0..r {
        let mut v_o1 = p_or.narrow(1, column, 1)?.contiguous()?;
        if column > 0 {
            let before = Tensor::cat(&columns, 1)?;
            for _ in 0..2 {
                v_o1 = (&v_o1 - ops::matmul(&before, &ops::matmul(&before.t()?, &v_o1)?)?)?;
            }
        }
        let length_1 = v_o1.sqr()?.sum_keepdim(0)?.sqrt()?;
        columns.push(v_o1.broadcast_div(&length_1)?);
    }
    let signs = Tensor::new(signs(&p_or.detach().to_dtype(DType::F64)?.to_vec2()?), p_or.device())?;
    Ok(Tensor::cat(&columns, 1)?.broadcast_mul(&signs.to_dtype(p_or.dtype())?)?)
}

/// The signs of the diagonal of the triangle that is left of a matrix by reflections, each of which turns a column onto an axis, away from
/// where it points; one that lies on it already stays.
fn signs(rows: &[Vec<f64>]) -> Vec<f64> {
    let (o, r) = (rows.len(), rows.first().map_or(0, Vec::len));
    let mut rows = rows.to_vec();
    let reflect = |column: usize| {
        let below: f64 = rows[column + 1..].iter().map(|row| row[column].powi(2)).sum();
        let first = rows[column][column];
        if below == 0.0 {
            return first.signum();
        }
        let diagonal = -first.signum() * first.hypot(below.sqrt());
        // 1 - v v^T · 2 / v^T v with v = x - diagonal e.
        let mut v: Vec<f64> = rows[column..].iter().map(|row| row[column]).collect();
        v[0] -= diagonal;
        let factor = 2.0 / v.iter().map(|v| v * v).sum::<f64>();
        for other in column..r {
            let along: f64 = v.iter().zip(&rows[column..]).map(|(v, row)| v * row[other]).sum();
            v.iter().zip(&mut rows[column..]).for_each(|(v, row)| row[other] -= factor * along * v);
        }
        diagonal.signum()
    };
    (0..r.min(o)).map(reflect).collect()
}

/// The inverses of matrices `[n, b, b]`.
///
/// X = M⁻¹ is found by elimination, outside of the graph; in it stands `2 X - X M X`, which is X as well, and whose differential by M is
/// that of the inverse, `-X dM X`: three operations in place of some thousand.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn inverse(m_nbb: &Tensor) -> Result<Tensor> {
    let (n, b, _) = m_nbb.dims3()?;
    let mut values: Vec<f64> = m_nbb.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    values.chunks_mut((b * b).max(1)).for_each(|matrix| invert(matrix, b));
    let x_nbb = Tensor::from_vec(values, (n, b, b), m_nbb.device())?.to_dtype(m_nbb.dtype())?;
    Ok(((&x_nbb * 2.0)? - ops::matmul(&ops::matmul(&x_nbb, m_nbb)?, &x_nbb)?)?)
}

/// Gauss and Jordan's elimination in place, by the largest pivot of each column. A matrix without an inverse becomes one of numbers that are
/// not finite, which guards find.
fn invert(matrix: &mut [f64], b: usize) {
    let mut order: Vec<usize> = Vec::with_capacity(b);
    for col in 0..b {
        let at = (col..b).max_by(|p, q| matrix[p * b + col].abs().total_cmp(&matrix[q * b + col].abs()));
        let pivot = at.unwrap_or(col);
        order.push(pivot);
        if pivot != col {
            (0..b).for_each(|k| matrix.swap(pivot * b + k, col * b + k));
        }
        let by = 1.0 / matrix[col * b + col];
        matrix[col * b + col] = 1.0;
        matrix[col * b..(col + 1) * b].iter_mut().for_each(|value| *value *= by);
        let row = matrix[col * b..(col + 1) * b].to_vec();
        for other in (0..b).filter(|other| *other != col) {
            let factor = std::mem::take(&mut matrix[other * b + col]);
            if factor != 0.0 {
                let values = &mut matrix[other * b..(other + 1) * b];
                values.iter_mut().zip(&row).for_each(|(value, own)| *value -= factor * own);
            }
        }
    }
    // Rows that changed places are columns of the inverse that do, the last first.
    for (col, pivot) in order.into_iter().enumerate().rev().filter(|(col, pivot)| col != pivot) {
        (0..b).for_each(|row| matrix.swap(row * b + col, row * b + pivot));
    }
}

/// `W_oi Rᵀ` for the block-diagonal R of blocks `r_nbb`, or of one block `[1, b, b]` again and again.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn turn(w_oi: &Tensor, r_nbb: &Tensor) -> Result<Tensor> {
    Ok(ops::turn_columns(w_oi, r_nbb)?)
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;
    use attune_tensor::rng::Rng;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// The largest difference of `R Rᵀ` from 1.
    fn off(r_nbb: &Tensor) -> f64 {
        let square = r_nbb.matmul(&r_nbb.transpose(1, 2).unwrap().contiguous().unwrap()).unwrap();
        let one = Tensor::eye(r_nbb.dim(2).unwrap(), DType::F64, &Device::Cpu).unwrap();
        let off = square.broadcast_sub(&one).unwrap().abs().unwrap();
        off.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn entries_above_the_diagonal_go_row_after_row_and_below_it_with_the_other_sign() {
        let upper = Tensor::new(&[[1.0f64, 2.0, 3.0]], &Device::Cpu).unwrap();
        let found = skew(&upper, 3).unwrap().squeeze(0).unwrap().to_vec2::<f64>().unwrap();
        assert_eq!(found, [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]);
    }

    #[test]
    fn a_matrix_times_its_inverse_is_one() {
        for size in [1, 2, 5, 8] {
            let q = skew(&normal("q", &[3, size * (size - 1) / 2]), size).unwrap();
            let one = Tensor::eye(size, DType::F64, &Device::Cpu).unwrap();
            let m = q.broadcast_add(&one).unwrap();
            let product = inverse(&m).unwrap().matmul(&m).unwrap();
            assert!(difference(&product, &one.broadcast_as((3, size, size)).unwrap()) < 1e-13, "{size}");
        }
    }

    #[test]
    fn rows_may_have_to_change_places_and_a_matrix_without_an_inverse_has_no_numbers() {
        let m = Tensor::new(&[[[0.0f64, 2.0, 0.0], [0.0, 0.0, 4.0], [1.0, 1.0, 0.0]]], &Device::Cpu).unwrap();
        let one = Tensor::eye(3, DType::F64, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        assert!(difference(&inverse(&m).unwrap().matmul(&m).unwrap(), &one) < 1e-15);
        let none = inverse(&Tensor::zeros((1, 2, 2), DType::F64, &Device::Cpu).unwrap()).unwrap();
        assert!(none.flatten_all().unwrap().to_vec1::<f64>().unwrap().iter().any(|value| !value.is_finite()));
    }

    /// `-Xᵀ dX Xᵀ`, by hand.
    #[test]
    fn the_gradient_is_that_of_the_inverse() {
        let m = (normal("m", &[2, 5, 5]) + 3.0).unwrap();
        let leaf = autograd::leaf(&m).unwrap();
        let (x, dx) = (inverse(leaf.as_tensor()).unwrap(), normal("dx", &[2, 5, 5]));
        let found = autograd::pull(&[&leaf], &[(&x, &dx)]).unwrap().remove(0).unwrap();
        let back = x.transpose(1, 2).unwrap().contiguous().unwrap();
        let by_hand = back.matmul(&dx).unwrap().matmul(&back).unwrap().neg().unwrap();
        let size = by_hand.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(difference(&found, &by_hand) < 1e-9 * size);
    }

    #[test]
    fn cayleys_map_is_orthogonal_and_that_of_its_definition() {
        let q = skew(&normal("q", &[3, 10]), 5).unwrap();
        let r = cayley(&q).unwrap();
        assert!(off(&r) < 1e-13);
        let one = Tensor::eye(5, DType::F64, &Device::Cpu).unwrap();
        let back = r.matmul(&q.broadcast_add(&one).unwrap()).unwrap();
        assert!(difference(&back, &q.neg().unwrap().broadcast_add(&one).unwrap()) < 1e-13);
    }

    #[test]
    fn blocks_turn_their_own_columns() {
        let (w, r) = (normal("w", &[4, 6]), normal("r", &[3, 2, 2]));
        let by_hand: Vec<Tensor> =
            (0..3).map(|n| w.narrow(1, 2 * n, 2).unwrap().matmul(&r.get(n).unwrap().t().unwrap()).unwrap()).collect();
        assert!(difference(&turn(&w, &r).unwrap(), &Tensor::cat(&by_hand, 1).unwrap()) < 1e-14);
        let shared = r.narrow(0, 1, 1).unwrap();
        let again = Tensor::cat(&[&shared, &shared, &shared], 0).unwrap();
        assert!(difference(&turn(&w, &shared).unwrap(), &turn(&w, &again).unwrap()) < 1e-14);
    }

    /// `torch.linalg.qr` of these two.
    #[test]
    fn columns_are_orthonormal_span_the_same_and_have_lapacks_signs() {
        let p = Tensor::new(&[[1.0f64, 2.0], [-2.0, 0.5], [2.0, -1.0]], &Device::Cpu).unwrap();
        let q = columns(&p).unwrap().to_vec2::<f64>().unwrap();
        let expected = [
            [-0.333333333333333, -0.931271854652156],
            [0.666666666666667, -0.122535770348968],
            [-0.666666666666667, 0.34310015697711],
        ];
        for (row, expected) in q.iter().zip(expected) {
            row.iter().zip(expected).for_each(|(q, expected)| assert!((q - expected).abs() < 1e-12, "{q} {expected}"));
        }
        let p = Tensor::new(&[[3.0f64, 1.0], [4.0, -2.0]], &Device::Cpu).unwrap();
        let q = columns(&p).unwrap().to_vec2::<f64>().unwrap();
        for (row, expected) in q.iter().zip([[-0.6, -0.8], [-0.8, 0.6]]) {
            row.iter().zip(expected).for_each(|(q, expected)| assert!((q - expected).abs() < 1e-12, "{q} {expected}"));
        }
    }

    #[test]
    fn columns_have_the_gradient_of_central_differences() {
        let (p, d, dq) = (normal("p", &[6, 3]), normal("d", &[6, 3]), normal("dq", &[6, 3]));
        let leaf = attune_tensor::autograd::leaf(&p).unwrap();
        let made = columns(leaf.as_tensor()).unwrap();
        let gradient = attune_tensor::autograd::pull(&[&leaf], &[(&made, &dq)]).unwrap().remove(0).unwrap();
        let along = |x: &Tensor, y: &Tensor| (x * y).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        let at = |step: f64| along(&columns(&(&p + (&d * step).unwrap()).unwrap()).unwrap(), &dq);
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((numeric - along(&gradient, &d)).abs() < 1e-7 * numeric.abs(), "{numeric} {}", along(&gradient, &d));
    }
}
