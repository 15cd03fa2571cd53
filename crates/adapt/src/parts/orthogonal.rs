//! Orthogonal matrices made of skew-symmetric ones, many of a size at once.

use attune_architecture::Site;
use attune_points::Result;
use attune_spec::Fault;
use candle_core::{Device, Tensor};

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
        let mut power = q_nbb.matmul(q_nbb)?;
        sum = (sum + (&power * 2.0)?)?;
        for _ in 3..terms - 1 {
            power = power.matmul(q_nbb)?;
            sum = (sum + (&power * 2.0)?)?;
        }
        sum = (sum + power.matmul(q_nbb)?)?;
    }
    Ok(sum)
}

/// The inverses of matrices `[n, b, b]` whose leading minors are not 0: 1 + Q for a skew-symmetric Q, a positive definite or a
/// triangular matrix. By halves, so that most of it are products.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn inverse(m_nbb: &Tensor) -> Result<Tensor> {
    let size = m_nbb.dim(2)?;
    if size == 1 {
        return Ok(m_nbb.recip()?);
    }
    let half = size / 2;
    let part = |(row, rows): (usize, usize), (col, cols): (usize, usize)| {
        m_nbb.narrow(1, row, rows)?.narrow(2, col, cols)?.contiguous()
    };
    let (first, last) = ((0, half), (half, size - half));
    let (b, c) = (part(first, last)?, part(last, first)?);
    let a = inverse(&part(first, first)?)?;
    let (a_b, c_a) = (a.matmul(&b)?, c.matmul(&a)?);
    // Of D - C A⁻¹ B, whose leading minors are not 0 either.
    let rest = inverse(&(part(last, last)? - c.matmul(&a_b)?)?)?;
    let a_b_rest = a_b.matmul(&rest)?;
    let top = Tensor::cat(&[(a + a_b_rest.matmul(&c_a)?)?, a_b_rest.neg()?], 2)?;
    let bottom = Tensor::cat(&[rest.matmul(&c_a)?.neg()?, rest], 2)?;
    Ok(Tensor::cat(&[top, bottom], 1)?)
}

/// `W_oi Rᵀ` for the block-diagonal R of blocks `r_nbb`, or of one block `[1, b, b]` again and again.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn turn(w_oi: &Tensor, r_nbb: &Tensor) -> Result<Tensor> {
    let (o, i) = w_oi.dims2()?;
    let (n, b, _) = r_nbb.dims3()?;
    let back_nbb = r_nbb.transpose(1, 2)?.contiguous()?;
    if n == 1 {
        return Ok(w_oi.contiguous()?.reshape((o * i / b, b))?.matmul(&back_nbb.squeeze(0)?)?.reshape((o, i))?);
    }
    let w_nob = w_oi.reshape((o, n, b))?.transpose(0, 1)?.contiguous()?;
    Ok(w_nob.matmul(&back_nbb)?.transpose(0, 1)?.contiguous()?.reshape((o, i))?)
}

#[cfg(test)]
mod tests {
    use attune_tensor::rng::Rng;
    use candle_core::DType;

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
}
