//! Rows or columns of a matrix times a number each, or each of its entries. candle's broadcast product has a gradient by the numbers that
//! adds up a strided copy of the matrix, one number at a time, and its products have gradients for frozen factors.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, WithDType, bail};

/// What has a number each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    Rows,
    Columns,
    Entries,
}

/// `x_tw` with each row or column times its number of `v`.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn scale(x_tw: &Tensor, v: &Tensor, axis: Axis) -> Result<Tensor> {
    x_tw.contiguous()?.apply_op2(&v.contiguous()?, Scale(axis))
}

struct Scale(Axis);

/// What is made of the numbers of two tensors of one type.
pub(crate) fn with<R>(
    (x, x_at): (&CpuStorage, &Layout),
    (v, v_at): (&CpuStorage, &Layout),
    f32s: impl FnOnce(&[f32], &[f32]) -> R,
    f64s: impl FnOnce(&[f64], &[f64]) -> R,
) -> Result<R> {
    let (Some((x_start, x_end)), Some((v_start, v_end))) = (x_at.contiguous_offsets(), v_at.contiguous_offsets())
    else {
        bail!("numbers that are not in order")
    };
    match (x, v) {
        (CpuStorage::F32(x), CpuStorage::F32(v)) => Ok(f32s(&x[x_start..x_end], &v[v_start..v_end])),
        (CpuStorage::F64(x), CpuStorage::F64(v)) => Ok(f64s(&x[x_start..x_end], &v[v_start..v_end])),
        _ => bail!("numbers of two types, or of another than f32 and f64"),
    }
}

/// The same of tensors.
pub(crate) fn tensors<R>(
    x: &Tensor,
    v: &Tensor,
    f32s: impl FnOnce(&[f32], &[f32]) -> R,
    f64s: impl FnOnce(&[f64], &[f64]) -> R,
) -> Result<R> {
    let ((x_read, x_at), (v_read, v_at)) = (x.storage_and_layout(), v.storage_and_layout());
    let (Storage::Cpu(x_read), Storage::Cpu(v_read)) = (&*x_read, &*v_read) else {
        bail!("numbers on a device; expected them in memory")
    };
    with((x_read, x_at), (v_read, v_at), f32s, f64s)
}

/// `Σ x y`: several sums side by side, in a fixed order.
pub(crate) fn dot<T: WithDType>(x: &[T], y: &[T]) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::zero(); LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder()).fold(T::zero(), |sum, (&x, &y)| sum + x * y);
    for (x, y) in xs.zip(ys) {
        lanes.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (&x, &y))| *sum += x * y);
    }
    lanes.into_iter().fold(rest, |sum, lane| sum + lane)
}

/// Rows `width` wide, each times its number, or number by number.
fn scaled<T: WithDType>(axis: Axis, width: usize, x: &[T], v: &[T]) -> Vec<T> {
    let mut to = Vec::with_capacity(x.len());
    for (row, x) in x.chunks_exact(width.max(1)).enumerate() {
        match axis {
            Axis::Rows => to.extend(x.iter().map(|&x| x * v[row])),
            Axis::Columns => to.extend(x.iter().zip(v).map(|(&x, &v)| x * v)),
            Axis::Entries => to.extend(x.iter().zip(&v[row * width..]).map(|(&x, &v)| x * v)),
        }
    }
    to
}

/// The sums of `x dy` over each row, or over each column.
fn sums<T: WithDType>(axis: Axis, (rows, width): (usize, usize), x: &[T], dy: &[T]) -> Vec<T> {
    let zero = T::zero();
    let pairs = x.chunks_exact(width.max(1)).zip(dy.chunks_exact(width.max(1)));
    match axis {
        Axis::Entries => x.iter().zip(dy).map(|(&x, &dy)| x * dy).collect(),
        Axis::Rows if width == 0 => vec![zero; rows],
        Axis::Rows => pairs.map(|(x, dy)| dot(x, dy)).collect(),
        Axis::Columns => {
            let mut sums = vec![zero; width];
            for (x, dy) in pairs {
                sums.iter_mut().zip(x.iter().zip(dy)).for_each(|(sum, (&x, &dy))| *sum += x * dy);
            }
            sums
        }
    }
}

impl CustomOp2 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout, v: &CpuStorage, v_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((rows, width), count) = (x_at.shape().dims2()?, v_at.shape().elem_count());
        let expected = match self.0 {
            Axis::Rows => rows,
            Axis::Columns => width,
            Axis::Entries => rows * width,
        };
        if count != expected {
            bail!("{count} numbers for the {:?} of [{rows}, {width}]; expected {expected}", self.0);
        }
        let made = with(
            (x, x_at),
            (v, v_at),
            |x, v| CpuStorage::F32(scaled(self.0, width, x, v)),
            |x, v| CpuStorage::F64(scaled(self.0, width, x, v)),
        )?;
        Ok((made, Shape::from((rows, width))))
    }

    fn bwd(&self, x: &Tensor, v: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = if x.track_op() { Some(scale(&dy.detach(), &v.detach(), self.0)?) } else { None };
        if !v.track_op() {
            return Ok((dx, None));
        }
        let (dy, shape) = (dy.contiguous()?, x.dims2()?);
        let dv = tensors(
            x,
            &dy,
            |x, dy| Tensor::from_vec(sums(self.0, shape, x, dy), v.shape(), v.device()),
            |x, dy| Tensor::from_vec(sums(self.0, shape, x, dy), v.shape(), v.device()),
        )??;
        Ok((dx, Some(dv)))
    }
}
