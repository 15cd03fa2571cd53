//! Products of matrices by cuBLAS. It thinks in columns: a row-major matrix is a transposed one to it, so that it is asked for
//! `cᵀ = bᵀ aᵀ`.

use std::ffi::c_void;

use cudarc::cublas::result::gemm_ex;
use cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType};
use half::bf16;

use super::device::Fault;
use super::work::{Grid, Rows, Work, args};
use crate::kernels::{Gemm, Matmul, Operand, Right};
use crate::view::{View, ViewMut};

/// A factor on the device.
struct Factor {
    rows: Rows,
    transposed: bool,
    /// Of the matrix as it is stored.
    shape: (usize, usize),
}

impl Factor {
    fn new(of: &Operand<'_>, work: &mut Work<'_>) -> Result<Self, Fault> {
        let shape = (of.mat.rows(), of.mat.cols());
        Ok(Self { rows: work.mat(of.mat)?, transposed: of.transposed, shape })
    }

    /// A copy in 32 bits: cuBLAS multiplies no mixed types.
    fn widened(self, work: &mut Work<'_>) -> Result<Self, Fault> {
        if self.rows.narrow == 0 {
            return Ok(self);
        }
        let (rows, cols) = self.shape;
        let wide = Rows { data: work.scratch::<f32>(rows * cols)?.0, stride: cols as i64, narrow: 0 };
        let of = args![self.rows, wide, rows as i64, cols as i64];
        work.launch("convert", Grid::of_numbers(rows * cols), of)?;
        Ok(Self { rows: wide, ..self })
    }

    const fn operation(&self) -> cublasOperation_t {
        if self.transposed { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N }
    }

    const fn kind(&self) -> cudaDataType {
        if self.rows.narrow != 0 { cudaDataType::CUDA_R_16BF } else { cudaDataType::CUDA_R_32F }
    }
}

/// See [`crate::kernels::Kernels::gemm`].
pub(super) fn gemm(work: &mut Work<'_>, matmul: Matmul, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>) -> Result<(), Fault> {
    let ((m, k), (k_b, n)) = (of.a.shape(), of.b.shape());
    assert_eq!((m, k, n), (c_mn.rows(), k_b, c_mn.cols()), "gemm: shapes do not fit");
    if m * n == 0 {
        return Ok(());
    }
    let c = work.view_mut(c_mn, of.accumulate)?;
    match of.b {
        Right::Dense(b) => multiply(work, matmul, c, (m, n, k), [&of.a, &b], of.accumulate)?,
        Right::Quantized { mat, transposed } => {
            // Widened here and brought over; the driver has read it when the product has been asked for.
            let (rows, cols) = (mat.rows(), mat.cols());
            if mat.is_narrow() {
                let mut wide = vec![bf16::ZERO; rows * cols];
                mat.widen_narrow(0..rows, 0..cols, &mut wide);
                let b = Operand { mat: View::new(&wide, rows, cols).into(), transposed };
                multiply(work, matmul, c, (m, n, k), [&of.a, &b], of.accumulate)?;
            } else {
                let mut wide = vec![0.0f32; rows * cols];
                mat.widen(0..rows, 0..cols, &mut wide);
                let b = Operand { mat: View::new(&wide, rows, cols).into(), transposed };
                multiply(work, matmul, c, (m, n, k), [&of.a, &b], of.accumulate)?;
            }
        }
    }
    for term in of.low_rank {
        let (rows, r) = (term.rows.len(), term.left.cols());
        assert_eq!(
            (rows, r, n),
            (term.left.rows(), term.right.shape().0, term.right.shape().1),
            "gemm: a term's shape"
        );
        assert!(term.rows.end <= m, "gemm: a term's rows");
        let (a, b) = (Operand::plain(term.left), &term.right);
        multiply(work, matmul, c.below(term.rows.start), (rows, n, r), [&a, b], true)?;
    }
    if let Some(bias) = of.bias {
        assert_eq!(bias.len(), n, "gemm: the bias");
        let of = args![work.slice(bias)?, c, m as i64, n as i64];
        work.launch("add_to_rows", Grid::of_numbers(m * n), of)?;
    }
    Ok(())
}

/// `c_mn (+)= a_mk b_kn`.
fn multiply(
    work: &mut Work<'_>,
    matmul: Matmul,
    c: Rows,
    (m, n, k): (usize, usize, usize),
    [a, b]: [&Operand<'_>; 2],
    accumulate: bool,
) -> Result<(), Fault> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        if !accumulate {
            let of = args![c, 0.0f32, m as i64, n as i64];
            work.launch("fill", Grid::of_numbers(m * n), of)?;
        }
        return Ok(());
    }
    let (mut a, mut b) = (Factor::new(a, work)?, Factor::new(b, work)?);
    if a.rows.narrow != b.rows.narrow {
        (a, b) = (a.widened(work)?, b.widened(work)?);
    }
    let compute = match matmul {
        Matmul::High if a.rows.narrow == 0 => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        Matmul::High | Matmul::Highest => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let too_large = || Fault::Blas(format!("a product of {m} × {k} by {k} × {n} is larger than it takes"));
    let int = |value: usize| i32::try_from(value).map_err(|_| too_large());
    let stride = |rows: &Rows| i32::try_from(rows.stride.max(1)).map_err(|_| too_large());
    let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
    // SAFETY: the operands lie on the device, within what their views span; shapes were checked.
    unsafe {
        gemm_ex(
            work.device.blas,
            b.operation(),
            a.operation(),
            int(n)?,
            int(m)?,
            int(k)?,
            std::ptr::from_ref(&alpha).cast::<c_void>(),
            b.rows.data as *const c_void,
            b.kind(),
            stride(&b.rows)?,
            a.rows.data as *const c_void,
            a.kind(),
            stride(&a.rows)?,
            std::ptr::from_ref(&beta).cast::<c_void>(),
            c.data as *mut c_void,
            cudaDataType::CUDA_R_32F,
            stride(&c)?,
            compute,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )?;
    }
    Ok(())
}
