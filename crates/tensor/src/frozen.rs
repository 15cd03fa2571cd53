//! Frozen weights: matrices that no gradient is ever computed for, kept as they are stored: in memory, in a mapped file, or in few
//! bits. Products in f32 read them there; those in f64, which tests make, widen them block by block.
//!
//! # Update
//! ```text
//! y_to  = x_ti W_oiᵀ
//! dx_ti = dy_to W_oi                (no dW: candle's own matmul would compute and keep it)
//! ```
//! The product is computed in the dtype of `x`. Neither the number of rows nor of threads changes the order of a sum.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use crate::kernels::{Operand, Right};
use crate::mapped::MappedTensor;
use crate::products::product;
use crate::quantized::{Quantized, QuantizedRef};
use crate::reading::{self, TensorReading};
use crate::view::{MatRef, View};

/// Bytes of a widened block: it stays in the last-level cache while the block's rows are multiplied.
const BLOCK_BYTES: usize = 8 << 20;

/// A frozen matrix `w_oi`. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FrozenWeight(Arc<Stored>);

#[derive(Debug)]
enum Stored {
    Dense(Tensor),
    Mapped(MappedTensor),
    Quantized {
        of: Arc<dyn Quantized>,
        /// Whether its numbers are rounded to bf16.
        narrow: bool,
    },
}

impl FrozenWeight {
    /// A matrix in memory, in any float type.
    ///
    /// # Errors
    /// A tensor that is not a matrix.
    pub fn dense(w_oi: &Tensor) -> Result<Self> {
        w_oi.dims2()?;
        Ok(Self(Arc::new(Stored::Dense(w_oi.detach().contiguous()?))))
    }

    /// A matrix in a memory-mapped file.
    ///
    /// # Errors
    /// A tensor that is not a matrix.
    pub fn mapped(w_oi: MappedTensor) -> Result<Self> {
        if w_oi.shape().len() != 2 {
            bail!("a weight of shape {:?}; expected a matrix", w_oi.shape());
        }
        Ok(Self(Arc::new(Stored::Mapped(w_oi))))
    }

    /// A matrix in few bits whose numbers are of `dtype`: f32, or bf16 if products are to be in it.
    ///
    /// # Errors
    /// Another type.
    pub fn quantized(of: Arc<dyn Quantized>, dtype: DType) -> Result<Self> {
        let narrow = match dtype {
            DType::F32 => false,
            DType::BF16 => true,
            other => bail!("a quantised weight of {other:?}; expected numbers of f32 or bf16"),
        };
        Ok(Self(Arc::new(Stored::Quantized { of, narrow })))
    }

    /// Output and input width, `(o, i)`.
    pub fn shape(&self) -> (usize, usize) {
        let dims = match &*self.0 {
            Stored::Dense(tensor) => tensor.dims(),
            Stored::Mapped(tensor) => tensor.shape(),
            Stored::Quantized { of, .. } => return of.shape(),
        };
        (dims[0], dims[1])
    }

    /// The type of its numbers: that which they are stored in, or which they are widened to.
    pub fn dtype(&self) -> DType {
        match &*self.0 {
            Stored::Dense(tensor) => tensor.dtype(),
            Stored::Mapped(tensor) => tensor.dtype(),
            Stored::Quantized { narrow: true, .. } => DType::BF16,
            Stored::Quantized { narrow: false, .. } => DType::F32,
        }
    }

    /// The matrix in few bits, if it is held so.
    pub fn as_quantized(&self) -> Option<QuantizedRef<'_>> {
        match &*self.0 {
            Stored::Quantized { of, narrow } => Some(QuantizedRef::new(&**of, *narrow)),
            Stored::Dense(_) | Stored::Mapped(_) => None,
        }
    }

    /// Where it lies: the same for what was cloned of one another, and no others.
    pub fn place(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }

    /// Bytes that it takes of memory, or of a mapped file.
    pub fn bytes(&self) -> usize {
        match &*self.0 {
            Stored::Quantized { of, .. } => of.bytes(),
            Stored::Dense(_) | Stored::Mapped(_) => {
                let (o, i) = self.shape();
                o * i * self.dtype().size_in_bytes()
            }
        }
    }

    /// Some rows as a tensor of `dtype`, `[rows, i]`.
    ///
    /// # Errors
    /// A range outside of the matrix.
    pub fn rows(&self, rows: Range<usize>, dtype: DType) -> Result<Tensor> {
        match &*self.0 {
            Stored::Dense(tensor) => tensor.narrow(0, rows.start, rows.len())?.to_dtype(dtype),
            Stored::Mapped(tensor) => tensor.rows(rows, dtype),
            Stored::Quantized { of, narrow } => widened(QuantizedRef::new(&**of, *narrow), rows)?.to_dtype(dtype),
        }
    }

    /// The rows of the given numbers as a tensor of `dtype`, `[ids, i]`.
    ///
    /// # Errors
    /// A number that is not below the number of rows.
    pub fn select(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        match &*self.0 {
            Stored::Dense(tensor) => tensor.index_select(&Tensor::new(ids, tensor.device())?, 0)?.to_dtype(dtype),
            Stored::Mapped(tensor) => tensor.select(ids, dtype),
            Stored::Quantized { of, narrow } => {
                let of = QuantizedRef::new(&**of, *narrow);
                let rows = ids.iter().map(|id| widened(of, *id as usize..*id as usize + 1));
                let rows = rows.collect::<Result<Vec<_>>>()?;
                if rows.is_empty() {
                    return Tensor::zeros((0, of.cols()), dtype, &Device::Cpu);
                }
                Tensor::cat(&rows, 0)?.to_dtype(dtype)
            }
        }
    }

    /// The matrix as a product reads it: in place, or as it is held in few bits. What is neither f32 nor bf16, or lies unaligned in
    /// its file, is converted to f32 first, at each call.
    ///
    /// # Errors
    /// Whatever converting raises.
    pub fn read(&self) -> Result<FrozenReading<'_>> {
        let (rows, cols) = self.shape();
        let read = match &*self.0 {
            Stored::Dense(tensor) if matches!(tensor.dtype(), DType::F32 | DType::BF16) => {
                Reading::Tensor(reading::read(tensor)?)
            }
            Stored::Mapped(tensor) => match tensor.view() {
                Some(view) => Reading::Mapped(view),
                None => Reading::Copied(self.rows(0..rows, DType::F32)?.flatten_all()?.to_vec1()?),
            },
            Stored::Dense(_) => Reading::Copied(self.rows(0..rows, DType::F32)?.flatten_all()?.to_vec1()?),
            Stored::Quantized { of, narrow } => Reading::Quantized(QuantizedRef::new(&**of, *narrow)),
        };
        Ok(FrozenReading { read, rows, cols })
    }

    /// The matrix as it can enter a product of `dtype` without widening, if it is stored so.
    fn in_place(&self, dtype: DType) -> Option<&Tensor> {
        match &*self.0 {
            Stored::Dense(tensor) if tensor.dtype() == dtype => Some(tensor),
            Stored::Dense(_) | Stored::Mapped(_) | Stored::Quantized { .. } => None,
        }
    }

    /// The row ranges of its blocks when it is widened to `dtype`.
    fn blocks(&self, dtype: DType) -> impl Iterator<Item = Range<usize>> + use<> {
        let (o, i) = self.shape();
        let rows = (BLOCK_BYTES / (i * dtype.size_in_bytes()).max(1)).max(1);
        (0..o).step_by(rows).map(move |start| start..(start + rows).min(o))
    }
}

/// A frozen matrix that is being read.
pub struct FrozenReading<'a> {
    read: Reading<'a>,
    rows: usize,
    cols: usize,
}

enum Reading<'a> {
    Tensor(TensorReading<'a>),
    Mapped(MatRef<'a>),
    Copied(Vec<f32>),
    Quantized(QuantizedRef<'a>),
}

impl FrozenReading<'_> {
    /// The matrix `w_oi` as it lies; none if it is held in few bits.
    pub fn mat(&self) -> Option<MatRef<'_>> {
        match &self.read {
            Reading::Tensor(reading) => Some(reading.mat()),
            Reading::Mapped(view) => Some(*view),
            Reading::Copied(values) => Some(MatRef::F32(View::new(values, self.rows, self.cols))),
            Reading::Quantized(_) => None,
        }
    }

    /// The matrix `w_oi` as the right factor of a product.
    pub fn right(&self) -> Right<'_> {
        match (&self.read, self.mat()) {
            (Reading::Quantized(mat), _) => Right::Quantized { mat: *mat, transposed: false },
            (_, Some(mat)) => Operand::plain(mat).into(),
            (_, None) => unreachable!("what is not held in few bits lies somewhere"),
        }
    }
}

/// Some rows of a matrix in few bits.
fn widened(of: QuantizedRef<'_>, rows: Range<usize>) -> Result<Tensor> {
    if rows.start > rows.end || rows.end > of.rows() {
        bail!("rows {rows:?} of a weight of {}", of.rows());
    }
    let mut values = vec![0.0f32; rows.len() * of.cols()];
    let by_row = values.par_chunks_mut(of.cols().max(1)).zip(rows.clone());
    by_row.for_each(|(to, row)| of.widen(row..row + 1, 0..of.cols(), to));
    Tensor::from_vec(values, (rows.len(), of.cols()), &Device::Cpu)
}

/// `y [.., O] = x [.., I] Wᵀ` with a backward link to `x` alone. `x` is f32 or f64; `W` may be stored in another float type.
///
/// # Errors
/// A width that does not fit.
pub fn linear(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    let (o, i) = weight.shape();
    let dims = x.dims();
    let (Some((&width, before)), true) = (dims.split_last(), matches!(x.dtype(), DType::F32 | DType::F64)) else {
        bail!("a frozen linear on {:?} {:?}; expected rows of f32 or f64", x.shape(), x.dtype());
    };
    if width != i {
        bail!("a frozen linear [{o}, {i}] on {:?}; expected a last axis of {i}", x.shape());
    }
    let rows: usize = before.iter().product();
    let y = x.contiguous()?.reshape((rows, i))?.apply_op1(FrozenLinear { weight: weight.clone() })?;
    y.reshape([before, &[o]].concat())
}

struct FrozenLinear {
    weight: FrozenWeight,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (t, _) = layout.shape().dims2()?;
        let (o, _) = self.weight.shape();
        let shape = Shape::from((t, o));
        let y = match x {
            CpuStorage::F32(values) => {
                let Some((start, end)) = layout.contiguous_offsets() else { bail!("rows that are not in order") };
                let reading = self.weight.read()?;
                let x_ti = View::new(&values[start..end], t, self.weight.shape().1);
                CpuStorage::F32(product(t, o, Operand::plain(x_ti), reading.right().turned()))
            }
            _ => match self.weight.in_place(x.dtype()) {
                Some(w_oi) => times_transposed(x, layout, w_oi)?,
                None => CpuStorage::F64(self.widened(x, layout)?),
            },
        };
        Ok((y, shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy_to: &Tensor) -> Result<Option<Tensor>> {
        if x.dtype() == DType::F32 {
            let ((t, _), (_, i)) = (dy_to.dims2()?, self.weight.shape());
            let (dy_to, w_oi) = (dy_to.contiguous()?, self.weight.read()?);
            let dy = reading::read(&dy_to)?;
            let dx = product(t, i, Operand::plain(dy.mat()), w_oi.right());
            return Tensor::from_vec(dx, (t, i), x.device()).map(Some);
        }
        if let Some(w_oi) = self.weight.in_place(x.dtype()) {
            return dy_to.matmul(w_oi).map(Some);
        }
        let mut dx_ti: Option<Tensor> = None;
        for rows in self.weight.blocks(x.dtype()) {
            let dy = dy_to.narrow(1, rows.start, rows.len())?.contiguous()?;
            let part = dy.matmul(&self.weight.rows(rows, x.dtype())?)?;
            dx_ti = Some(match dx_ti {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        Ok(dx_ti)
    }
}

impl FrozenLinear {
    /// The product in f64 with a weight of another type: block by block, each written to its columns of the result.
    fn widened(&self, x: &CpuStorage, layout: &Layout) -> Result<Vec<f64>> {
        let (t, _) = layout.shape().dims2()?;
        let (o, _) = self.weight.shape();
        let mut y = vec![0.0; t * o];
        for rows in self.weight.blocks(x.dtype()) {
            let CpuStorage::F64(block) = times_transposed(x, layout, &self.weight.rows(rows.clone(), x.dtype())?)?
            else {
                bail!("a product in another type than its factors")
            };
            for (y_o, block) in y.chunks_exact_mut(o).zip(block.chunks_exact(rows.len())) {
                y_o[rows.clone()].copy_from_slice(block);
            }
        }
        Ok(y)
    }
}

/// `x_ti w_oiᵀ` on the CPU.
fn times_transposed(x: &CpuStorage, layout: &Layout, w_oi: &Tensor) -> Result<CpuStorage> {
    let (t, i) = layout.shape().dims2()?;
    let (o, _) = w_oi.dims2()?;
    let (storage, w_layout) = w_oi.storage_and_layout();
    let Storage::Cpu(w) = &*storage else { bail!("a weight on another device than its input") };
    x.matmul(w, (1, t, o, i), layout, &w_layout.transpose(0, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd;
    use crate::quantized::tests::Bytes;
    use crate::rng::Rng;
    use crate::testing::{assert_close, assert_same_bits, check_gradients};

    fn normal(name: &str, shape: &[usize], dtype: DType) -> Tensor {
        Rng::new(2, name).normal_tensor(shape, 1.0, dtype).unwrap()
    }

    #[test]
    fn it_is_the_plain_product() {
        for (shape, w_shape) in
            [(vec![7, 5], (3, 5)), (vec![2, 3, 4], (6, 4)), (vec![1, 4], (1, 4)), (vec![0, 4], (2, 4))]
        {
            let (x, w) = (normal("x", &shape, DType::F32), normal("w", &[w_shape.0, w_shape.1], DType::F32));
            let y = linear(&x, &FrozenWeight::dense(&w).unwrap()).unwrap();
            let plain = x.reshape(((), w_shape.1)).unwrap().matmul(&w.t().unwrap()).unwrap();
            assert_close("product", &y.reshape(plain.shape()).unwrap(), &plain, w_shape.1);
            assert_eq!(y.dims()[..shape.len() - 1], shape[..shape.len() - 1]);
        }
    }

    #[test]
    fn its_gradient_is_right_also_for_strided_rows_and_narrow_types() {
        let (x, w) = (normal("x", &[4, 3, 6], DType::F64), normal("w", &[5, 6], DType::F64));
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let weight = FrozenWeight::dense(&w.to_dtype(dtype).unwrap()).unwrap();
            check_gradients(std::slice::from_ref(&x), |v| linear(&v[0].transpose(0, 1)?, &weight));
        }
    }

    /// More rows than one block holds: 8 MiB are 1024 rows of 1024 values in f64.
    #[test]
    fn blocks_do_not_change_the_product() {
        let w = normal("w", &[4100, 1024], DType::BF16);
        let (narrow, wide) =
            (FrozenWeight::dense(&w).unwrap(), FrozenWeight::dense(&w.to_dtype(DType::F64).unwrap()).unwrap());
        assert_eq!(narrow.blocks(DType::F64).count(), 5);
        let x = autograd::leaf(&normal("x", &[3, 1024], DType::F64)).unwrap();
        let (a, b) = (linear(&x, &narrow).unwrap(), linear(&x, &wide).unwrap());
        assert_close("forward", &a, &b, 1024);
        let dy = normal("dy", &[3, 4100], DType::F64);
        let pull = |y: &Tensor| autograd::pull(&[&x], &[(y, &dy)]).unwrap().remove(0).unwrap();
        assert_close("backward", &pull(&a), &pull(&b), 4100);
    }

    #[test]
    fn rows_and_selected_rows_are_widened() {
        let w = normal("w", &[4, 2], DType::BF16);
        let weight = FrozenWeight::dense(&w).unwrap();
        let wide = w.to_dtype(DType::F32).unwrap();
        assert_same_bits("rows", &weight.rows(1..3, DType::F32).unwrap(), &wide.narrow(0, 1, 2).unwrap());
        let picked = wide.index_select(&Tensor::new(&[3u32, 3, 0], &Device::Cpu).unwrap(), 0).unwrap();
        assert_same_bits("select", &weight.select(&[3, 3, 0], DType::F32).unwrap(), &picked);
        assert!(weight.rows(3..5, DType::F32).is_err());
        assert!(weight.select(&[4], DType::F32).is_err());
    }

    #[test]
    fn widths_that_do_not_fit_are_named() {
        let weight = FrozenWeight::dense(&normal("w", &[3, 5], DType::F32)).unwrap();
        let message = linear(&normal("x", &[2, 4], DType::F32), &weight).unwrap_err().to_string();
        assert!(message.contains("a frozen linear [3, 5] on [2, 4]; expected a last axis of 5"), "{message}");
        assert!(FrozenWeight::dense(&normal("w", &[3], DType::F32)).is_err());
    }

    /// A weight in few bits multiplies as the dense one of its numbers does, bit for bit, forward and back and in every type.
    #[test]
    fn few_bits_are_their_numbers() {
        for (shape, dtype) in [((70, 300), DType::F32), ((70, 300), DType::BF16), ((3, 5), DType::F32)] {
            let few = FrozenWeight::quantized(Arc::new(Bytes::new(shape, 5)), dtype).unwrap();
            let w = few.rows(0..shape.0, dtype).unwrap();
            let dense = FrozenWeight::dense(&w).unwrap();
            assert_eq!((few.shape(), few.dtype()), (shape, dtype));
            assert!(few.bytes() < dense.bytes());
            for kind in [DType::F32, DType::F64] {
                let x = autograd::leaf(&normal("x", &[9, shape.1], kind)).unwrap();
                let dy = normal("dy", &[9, shape.0], kind);
                let both = |weight| {
                    let y = linear(&x, weight).unwrap();
                    let dx = autograd::pull(&[&x], &[(&y, &dy)]).unwrap().remove(0).unwrap();
                    (y.detach(), dx)
                };
                let (found, expected) = (both(&few), both(&dense));
                if kind == DType::F32 {
                    assert_same_bits("forward", &found.0, &expected.0);
                    assert_same_bits("back", &found.1, &expected.1);
                } else {
                    assert_close("forward", &found.0, &expected.0, shape.1);
                    assert_close("back", &found.1, &expected.1, shape.0);
                }
            }
            let ids = [2, 0, 2];
            assert_same_bits(
                "select",
                &few.select(&ids, DType::F32).unwrap(),
                &dense.select(&ids, DType::F32).unwrap(),
            );
            assert!(few.rows(0..shape.0 + 1, dtype).is_err() && few.select(&[shape.0 as u32], dtype).is_err());
            assert_eq!(few.select(&[], dtype).unwrap().dims(), [0, shape.1]);
        }
        assert!(FrozenWeight::quantized(Arc::new(Bytes::new((2, 2), 1)), DType::F64).is_err());
    }
}
