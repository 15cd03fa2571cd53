//! Elementwise products of two low-rank ones, `(P_or A_ri) ⊙ (Q_os B_si)`.

use attune_points::{Locals, Result};
use attune_tensor::ops;
use candle_core::Tensor;

/// The two pairs of factors.
pub(crate) struct Pairs<'a> {
    /// `P_or` and `Q_os`.
    left: [&'a Tensor; 2],
    /// `A_ri` and `B_si`.
    right: [&'a Tensor; 2],
}

impl<'a> Pairs<'a> {
    /// By local names: `P_or`, `A_ri`, `Q_os`, `B_si`.
    ///
    /// # Errors
    /// A tensor that was not declared.
    pub(crate) fn of(tensors: &'a Locals, [p, a, q, b]: [&str; 4]) -> Result<Self> {
        Ok(Self { left: [tensors.get(p)?, tensors.get(q)?], right: [tensors.get(a)?, tensors.get(b)?] })
    }

    /// The product itself, `[o, i]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        let ([p_or, q_os], [a_ri, b_si]) = (self.left, self.right);
        Ok((ops::matmul(p_or, a_ri)? * ops::matmul(q_os, b_si)?)?)
    }

    /// Factors whose product it is, `[o, r s]` and `[r s, i]`: their numbers are the products of a row's (a column's) numbers of
    /// both pairs, since `Σ_r P A · Σ_s Q B = Σ_rs (P Q) (A B)`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn factors(&self) -> Result<(Tensor, Tensor)> {
        let ([p_or, q_os], [a_ri, b_si]) = (self.left, self.right);
        let ((o, r), (s, i)) = (p_or.dims2()?, b_si.dims2()?);
        let left = p_or.unsqueeze(2)?.broadcast_mul(&q_os.unsqueeze(1)?)?.reshape((o, r * s))?;
        let right = a_ri.unsqueeze(1)?.broadcast_mul(&b_si.unsqueeze(0)?)?.reshape((r * s, i))?;
        Ok((left, right))
    }

    /// `x_ti` through the product, by its factors.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn rows(&self, x_ti: &Tensor, scale: f64) -> Result<Tensor> {
        let (left, right) = self.factors()?;
        // The scaling goes on the thin side.
        Ok(ops::linear(&(ops::linear(x_ti, &right, None)? * scale)?, &left, None)?)
    }
}

/// Whether a row through the factors, of rank `rs`, costs less than one through a weight `[o, i]`.
pub(crate) fn thin(rs: usize, (o, i): (usize, usize)) -> bool {
    rs.saturating_mul(o + i) < o * i
}

#[cfg(test)]
mod tests {
    use attune_tensor::rng::Rng;
    use candle_core::DType;

    use super::*;

    #[test]
    fn factors_and_rows_are_those_of_the_product() {
        let tensor =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap();
        let locals = Locals::new(
            "up",
            [
                ("p", tensor("p", [5, 2])),
                ("a", tensor("a", [2, 7])),
                ("q", tensor("q", [5, 3])),
                ("b", tensor("b", [3, 7])),
            ],
        );
        let pairs = Pairs::of(&locals, ["p", "a", "q", "b"]).unwrap();
        let (dense, (left, right)) = (pairs.dense().unwrap(), pairs.factors().unwrap());
        let largest = |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(largest((left.matmul(&right).unwrap() - &dense).unwrap()) < 1e-12);
        let x = tensor("x", [4, 7]);
        let by_hand = (x.matmul(&dense.t().unwrap()).unwrap() * 0.5).unwrap();
        assert!(largest((pairs.rows(&x, 0.5).unwrap() - by_hand).unwrap()) < 1e-12);
    }

    #[test]
    fn factors_are_for_ranks_below_the_width() {
        assert!(thin(64, (1024, 1024)));
        assert!(!thin(512, (1024, 1024)));
    }
}
