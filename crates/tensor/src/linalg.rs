//! Decompositions of matrices, in 64 bits: the same numbers in every run on one machine, whatever the number of threads, with signs
//! and order that depend on the matrix alone.

use candle_core::{DType, Device, Result, Tensor, bail};
use faer::linalg::solvers::DenseSolveCore as _;
use faer::{Mat, MatRef, Par, Side};

use crate::rng::Rng;

/// `w_oi = u_ok diag(s_k) v_ki`, with `k = min(o, i)` or fewer: singular values descend, and the entry of largest magnitude of each
/// left vector is positive (the first of them, where several are equal).
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left vectors, `[o, k]`, f64.
    pub u: Tensor,
    /// Singular values, `[k]`, f64.
    pub s: Tensor,
    /// Right vectors as rows, `[k, i]`, f64.
    pub v: Tensor,
}

/// The thin singular value decomposition.
///
/// # Errors
/// Something else than a matrix of finite numbers.
pub fn svd(w_oi: &Tensor) -> Result<Svd> {
    decomposed(matrix(w_oi)?.as_ref())
}

/// The `rank` largest singular values with their vectors, by the range of `w (wᵀ w)^iterations` on random directions: close to those
/// of [`svd`] where values fall, at the price of some products.
///
/// # Errors
/// As for [`svd`].
pub fn randomised_svd(w_oi: &Tensor, rank: usize, iterations: usize, rng: &mut Rng) -> Result<Svd> {
    let w = matrix(w_oi)?;
    let least = w.nrows().min(w.ncols());
    // A few directions more than asked for, as is usual, make the last of those that are kept as good as the first.
    let width = (rank + 10).min(least);
    let directions = rng.normal_tensor((w.ncols(), width), 1.0, DType::F64)?;
    let mut range = orthonormal(product(w.as_ref(), matrix(&directions)?.as_ref()).as_ref());
    for _ in 0..iterations {
        let back = orthonormal(product(w.transpose(), range.as_ref()).as_ref());
        range = orthonormal(product(w.as_ref(), back.as_ref()).as_ref());
    }
    let small = decomposed(product(range.transpose(), w.as_ref()).as_ref())?;
    let u = product(range.as_ref(), matrix(&small.u)?.as_ref());
    let kept = rank.min(width);
    signed(&tensor(u.as_ref())?, &small.s, &small.v)?.truncated(kept)
}

/// `w_oi = q_ok r_ki` with orthonormal columns of `q` and the diagonal of `r` not negative, `k = min(o, i)`; f64.
///
/// # Errors
/// As for [`svd`].
pub fn qr(w_oi: &Tensor) -> Result<(Tensor, Tensor)> {
    let w = matrix(w_oi)?;
    let of = w.qr();
    let (q, r) = (of.compute_thin_Q(), of.thin_R().to_owned());
    let (q, r) = (tensor(q.as_ref())?, tensor(r.as_ref())?);
    let diagonal: Vec<f64> = (0..r.dim(0)?).map(|k| r.get(k)?.get(k)?.to_scalar()).collect::<Result<_>>()?;
    let signs: Vec<f64> = diagonal.iter().map(|d| if *d < 0.0 { -1.0 } else { 1.0 }).collect();
    let signs = Tensor::new(signs, &Device::Cpu)?;
    Ok((q.broadcast_mul(&signs)?, r.broadcast_mul(&signs.unsqueeze(1)?)?))
}

/// `w_oi = l_ok u_ki` by elimination with the largest pivots, `k = min(o, i)`: the rows of `l` are those of a lower triangular matrix with 1 on its
/// diagonal and nothing above 1 in size, in the order of the rows of `w`; `u` is upper triangular with the pivots on its diagonal; f64.
///
/// # Errors
/// As for [`svd`].
pub fn lu(w_oi: &Tensor) -> Result<(Tensor, Tensor)> {
    let of = matrix(w_oi)?.partial_piv_lu();
    let (l, u) = (tensor(of.L())?, tensor(of.U())?);
    let (_, back) = of.P().arrays();
    let back: Vec<u32> = back.iter().map(|row| *row as u32).collect();
    let rows = back.len();
    Ok((l.index_select(&Tensor::from_vec(back, rows, &Device::Cpu)?, 0)?, u))
}

/// `c_nn = vᵀ diag(values) v` of a symmetric matrix, of which the lower half is read: values descend, and the entry of largest
/// magnitude of each vector is positive (the first of them, where several are equal).
#[derive(Debug, Clone)]
pub struct Eigen {
    /// Values, `[n]`, f64.
    pub values: Tensor,
    /// Vectors as rows, `[n, n]`, f64.
    pub vectors: Tensor,
}

/// The eigenvalues and eigenvectors of a symmetric matrix.
///
/// # Errors
/// Something else than a square matrix of finite numbers.
pub fn eigen(c_nn: &Tensor) -> Result<Eigen> {
    let c = matrix(c_nn)?;
    if c.nrows() != c.ncols() {
        bail!("a matrix of {} by {} has no eigenvectors of its own", c.nrows(), c.ncols());
    }
    let Ok(found) = c.self_adjoint_eigen(Side::Lower) else { bail!("an eigendecomposition did not end") };
    // They come in ascending order.
    let values: Vec<f64> = found.S().column_vector().iter().rev().copied().collect();
    let columns = tensor(found.U().reverse_cols())?;
    let values = Tensor::new(values, &Device::Cpu)?;
    let signed = signed(&columns, &values, &columns.t()?.contiguous()?)?;
    Ok(Eigen { values: signed.s, vectors: signed.v })
}

/// The inverse of a square matrix.
///
/// # Errors
/// As for [`eigen`]; a matrix that has none gives numbers that are not finite, or large.
pub fn inverse(c_nn: &Tensor) -> Result<Tensor> {
    let c = matrix(c_nn)?;
    if c.nrows() != c.ncols() {
        bail!("a matrix of {} by {} has no inverse", c.nrows(), c.ncols());
    }
    tensor(c.partial_piv_lu().inverse().as_ref())
}

impl Svd {
    /// The first `k` triples.
    ///
    /// # Errors
    /// More than there are.
    pub fn truncated(&self, k: usize) -> Result<Self> {
        self.triples(0, k)
    }

    /// `k` triples from the one at `start` on.
    ///
    /// # Errors
    /// More than there are.
    pub fn triples(&self, start: usize, k: usize) -> Result<Self> {
        Ok(Self {
            u: self.u.narrow(1, start, k)?.contiguous()?,
            s: self.s.narrow(0, start, k)?.contiguous()?,
            v: self.v.narrow(0, start, k)?.contiguous()?,
        })
    }
}

fn decomposed(w: MatRef<'_, f64>) -> Result<Svd> {
    let Ok(svd) = w.thin_svd() else { bail!("a singular value decomposition did not end") };
    let s: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let s = Tensor::new(s, &Device::Cpu)?;
    signed(&tensor(svd.U())?, &s, &tensor(svd.V().transpose())?)
}

/// Turns pairs of vectors so that the largest entry of each left one is positive.
fn signed(u_ok: &Tensor, s_k: &Tensor, v_ki: &Tensor) -> Result<Svd> {
    let columns = u_ok.t()?.to_vec2::<f64>()?;
    let sign = |column: &Vec<f64>| {
        let largest = column.iter().fold(0.0f64, |largest, x| if x.abs() > largest.abs() { *x } else { largest });
        if largest < 0.0 { -1.0 } else { 1.0 }
    };
    let signs = Tensor::new(columns.iter().map(sign).collect::<Vec<f64>>(), &Device::Cpu)?;
    Ok(Svd { u: u_ok.broadcast_mul(&signs)?, s: s_k.clone(), v: v_ki.broadcast_mul(&signs.unsqueeze(1)?)? })
}

fn orthonormal(w: MatRef<'_, f64>) -> Mat<f64> {
    w.qr().compute_thin_Q()
}

fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(c.as_mut(), faer::Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

fn matrix(w: &Tensor) -> Result<Mat<f64>> {
    let (rows, cols) = w.dims2()?;
    let values: Vec<f64> = w.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        bail!("a matrix holds {value}, which has no decomposition");
    }
    Ok(Mat::from_fn(rows, cols, |row, col| values[row * cols + col]))
}

fn tensor(w: MatRef<'_, f64>) -> Result<Tensor> {
    let values: Vec<f64> = (0..w.nrows()).flat_map(|row| (0..w.ncols()).map(move |col| w[(row, col)])).collect();
    Tensor::from_vec(values, (w.nrows(), w.ncols()), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize) -> Tensor {
        Rng::new(3, "matrix").normal_tensor((rows, cols), 1.0, DType::F64).unwrap()
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn unit(columns: &Tensor) -> f64 {
        let gram = columns.t().unwrap().matmul(columns).unwrap();
        off(&gram, &Tensor::eye(gram.dim(0).unwrap(), DType::F64, &Device::Cpu).unwrap())
    }

    #[test]
    fn the_parts_of_a_matrix_are_orthonormal_descend_and_make_it_again() {
        for (rows, cols) in [(7, 4), (4, 7), (5, 5), (1, 6)] {
            let w = random(rows, cols);
            let Svd { u, s, v } = svd(&w).unwrap();
            assert!(unit(&u) < 1e-12 && unit(&v.t().unwrap()) < 1e-12);
            let values = s.to_vec1::<f64>().unwrap();
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]) && values[values.len() - 1] >= 0.0);
            let again = u.broadcast_mul(&s).unwrap().matmul(&v).unwrap();
            assert!(off(&again, &w) < 1e-12, "{rows} by {cols}");
            for column in u.t().unwrap().to_vec2::<f64>().unwrap() {
                let largest = column.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
                assert!(largest > 0.0);
            }
        }
    }

    #[test]
    fn the_sign_does_not_depend_on_the_matrix_being_turned_around() {
        let w = random(6, 4);
        let (one, other) = (svd(&w).unwrap(), svd(&w.neg().unwrap()).unwrap());
        assert!(off(&one.u, &other.u) < 1e-12 && off(&one.v, &other.v.neg().unwrap()) < 1e-12);
    }

    #[test]
    fn random_directions_find_the_largest_values_where_they_fall() {
        let (rows, cols, rank) = (40, 30, 4);
        let Svd { u, v, .. } = svd(&random(rows, cols)).unwrap();
        let falling: Vec<f64> = (0..30).map(|k| 2f64.powi(-k)).collect();
        let w = u.broadcast_mul(&Tensor::new(falling, &Device::Cpu).unwrap()).unwrap().matmul(&v).unwrap();
        let exact = svd(&w).unwrap().truncated(rank).unwrap();
        let found = randomised_svd(&w, rank, 4, &mut Rng::new(1, "directions")).unwrap();
        assert!(off(&found.s, &exact.s) < 1e-10);
        assert!(off(&found.u, &exact.u) < 1e-8 && off(&found.v, &exact.v) < 1e-8);
    }

    #[test]
    fn an_orthonormal_and_a_triangular_matrix_make_a_matrix_again() {
        for (rows, cols) in [(7, 4), (4, 7)] {
            let w = random(rows, cols);
            let (q, r) = qr(&w).unwrap();
            assert!(unit(&q) < 1e-12 && off(&q.matmul(&r).unwrap(), &w) < 1e-12);
            for (row, values) in r.to_vec2::<f64>().unwrap().iter().enumerate() {
                assert!(values[row] >= 0.0 && values[..row].iter().all(|value| value.abs() < 1e-12));
            }
        }
    }

    #[test]
    fn triangles_by_elimination_make_a_matrix_again() {
        for (rows, cols) in [(7, 4), (4, 7), (5, 5)] {
            let w = random(rows, cols);
            let (l, u) = lu(&w).unwrap();
            assert!(off(&l.matmul(&u).unwrap(), &w) < 1e-12, "{rows} by {cols}");
            for (row, values) in u.to_vec2::<f64>().unwrap().iter().enumerate() {
                assert!(values[..row].iter().all(|value| *value == 0.0) && values[row] != 0.0);
            }
            // Each column has its 1 where the next ones have nothing.
            let mut left: Vec<Vec<f64>> = l.to_vec2().unwrap();
            for col in 0..rows.min(cols) {
                let at =
                    left.iter().position(|row| row[col] == 1.0 && row[col + 1..].iter().all(|value| *value == 0.0));
                left.remove(at.unwrap());
                assert!(left.iter().all(|row| row[col].abs() <= 1.0));
            }
        }
    }

    #[test]
    fn a_symmetric_matrix_is_what_its_vectors_make_and_its_inverse_undoes_it() {
        let w = random(9, 6);
        let c = w.t().unwrap().contiguous().unwrap().matmul(&w).unwrap();
        let Eigen { values, vectors } = eigen(&c).unwrap();
        assert!(unit(&vectors.t().unwrap().contiguous().unwrap()) < 1e-12);
        let descending = values.to_vec1::<f64>().unwrap();
        assert!(descending.windows(2).all(|pair| pair[0] >= pair[1]) && descending[5] > 0.0);
        let again = vectors.t().unwrap().contiguous().unwrap().broadcast_mul(&values).unwrap();
        assert!(off(&again.matmul(&vectors).unwrap(), &c) < 1e-12);
        // The squares of the singular values, with the right vectors.
        let Svd { s, .. } = svd(&w).unwrap();
        assert!(off(&values, &s.sqr().unwrap()) < 1e-12);
        for row in vectors.to_vec2::<f64>().unwrap() {
            let largest = row.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
            assert!(largest > 0.0);
        }
        let unit = Tensor::eye(6, DType::F64, &Device::Cpu).unwrap();
        assert!(off(&inverse(&c).unwrap().matmul(&c).unwrap(), &unit) < 1e-10);
        assert!(eigen(&w).unwrap_err().to_string().contains("9 by 6") && inverse(&w).is_err());
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let w = Tensor::new(&[[1.0, f64::NAN]], &Device::Cpu).unwrap();
        assert!(svd(&w).unwrap_err().to_string().contains("holds NaN"));
    }
}
