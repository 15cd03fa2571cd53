//! The numbers of a candle tensor as a view, without a copy.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use parking_lot::RwLockReadGuard;

use crate::view::{MatRef, View};

/// A tensor in memory that is being read: its storage stays locked for writing as long as this lives.
pub struct TensorReading<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    start: usize,
    rows: usize,
    cols: usize,
}

/// Opens a contiguous tensor of f32 or bf16 on the CPU for reading: a matrix as its rows, anything else as one row.
///
/// # Errors
/// Another type, device or layout.
pub fn read(tensor: &Tensor) -> Result<TensorReading<'_>> {
    let (rows, cols) = match tensor.dims() {
        [rows, cols] => (*rows, *cols),
        _ => (1, tensor.elem_count()),
    };
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a tensor {:?} whose numbers are not in order; expected a contiguous one", tensor.shape());
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_)) => Ok(TensorReading { storage, start, rows, cols }),
        _ => bail!("a view of a tensor {:?} of {:?}; expected f32 or bf16 in memory", tensor.shape(), tensor.dtype()),
    }
}

impl TensorReading<'_> {
    /// The numbers.
    pub fn mat(&self) -> MatRef<'_> {
        let values = self.start..self.start + self.rows * self.cols;
        match &*self.storage {
            Storage::Cpu(CpuStorage::BF16(all)) => MatRef::Bf16(View::new(&all[values], self.rows, self.cols)),
            Storage::Cpu(CpuStorage::F32(all)) => MatRef::F32(View::new(&all[values], self.rows, self.cols)),
            _ => unreachable!("checked when it was opened"),
        }
    }

    /// The numbers of a tensor of f32; none of another type.
    pub fn f32s(&self) -> Option<&[f32]> {
        match self.mat() {
            MatRef::F32(view) => Some(view.data()),
            MatRef::Bf16(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn a_part_of_a_tensor_is_read_in_place() {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        let part = tensor.narrow(0, 1, 2).unwrap();
        let reading = read(&part).unwrap();
        let MatRef::F32(view) = reading.mat() else { panic!("another type") };
        assert_eq!((view.rows(), view.row(1)), (2, &[5.0, 6.0][..]));
        assert_eq!(read(&tensor.flatten_all().unwrap()).unwrap().f32s().unwrap().len(), 6);
        let narrow = tensor.to_dtype(DType::BF16).unwrap();
        assert!(matches!(read(&narrow).unwrap().mat(), MatRef::Bf16(_)));
    }

    #[test]
    fn other_layouts_and_types_are_refused() {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        assert!(read(&tensor.t().unwrap()).is_err());
        assert!(read(&tensor.to_dtype(DType::F64).unwrap()).is_err());
    }
}
