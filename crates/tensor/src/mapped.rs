//! Tensors in memory-mapped safetensors files: the header is checked at once, values are read where they are used.
#![expect(unsafe_code, reason = "mapping a file")]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, bail};
use half::slice::HalfBitsSliceExt as _;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::error::Error;
use crate::view::{MatRef, View};

/// A safetensors file.
#[derive(Debug, Clone)]
pub struct Mapped {
    path: PathBuf,
    map: Arc<Mmap>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Mapped {
    /// Maps a file and checks its header: lengths, offsets, and that no byte is missing at the end.
    ///
    /// # Errors
    /// [`Error::Open`] or [`Error::Format`], naming the file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        let format = |message: String| Error::Format { path: path.to_owned(), message };
        let file = File::open(path).map_err(open)?;
        if file.metadata().map_err(open)?.len() == 0 {
            return Err(format("the file is empty".to_owned()));
        }
        // SAFETY: the map is read-only. A process that truncates the file under us would raise SIGBUS; the files that are
        // mapped are a worker's verified cache or a user's model folder, which nobody writes during a run.
        let map = unsafe { Mmap::map(&file) }.map_err(open)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| format(error.to_string()))?;
        // Eight bytes of length stand before the header.
        let start = header + 8;
        let entries = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
                (name, Entry { dtype: info.dtype, shape: info.shape.clone(), bytes })
            })
            .collect();
        Ok(Self { path: path.to_owned(), map: Arc::new(map), entries })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// A tensor of any type by name, as the bytes that it is stored in; `None` if the file has none of that name.
    pub fn stored(&self, name: &str) -> Option<Stored<'_>> {
        let entry = self.entries.get(name)?;
        let bytes = self.map.get(entry.bytes.clone())?;
        Some(Stored { dtype: format!("{:?}", entry.dtype), shape: &entry.shape, bytes })
    }

    /// Lets go of the memory that reading a tensor took: see [`MappedTensor::forget`].
    pub fn forget(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            forget(&self.map, &entry.bytes);
        }
    }

    /// A tensor of floats by name; `None` if the file has none of that name.
    ///
    /// # Errors
    /// [`Error::Dtype`] if it is stored in a type that is not read.
    pub fn get(&self, name: &str) -> Result<Option<MappedTensor>, Error> {
        match self.get_number(name)? {
            Some(tensor) if tensor.dtype == DType::I64 => Err(self.unread(name, Dtype::I64)),
            found => Ok(found),
        }
    }

    /// A tensor of floats or of whole numbers (I64) by name.
    ///
    /// # Errors
    /// As for [`Mapped::get`].
    pub fn get_number(&self, name: &str) -> Result<Option<MappedTensor>, Error> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        let dtype = match entry.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::I64 => DType::I64,
            other => return Err(self.unread(name, other)),
        };
        let (map, shape, bytes) = (Arc::clone(&self.map), entry.shape.clone(), entry.bytes.clone());
        Ok(Some(MappedTensor { map, dtype, shape, bytes }))
    }

    fn unread(&self, name: &str, dtype: Dtype) -> Error {
        Error::Dtype { path: self.path.clone(), name: name.to_owned(), dtype: format!("{dtype:?}") }
    }
}

/// A tensor as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<'a> {
    /// Its type, as safetensors calls it.
    pub dtype: String,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its numbers, little-endian, at any address.
    pub bytes: &'a [u8],
}

/// A tensor in a mapped file. Cheap to clone; the file stays mapped as long as one of its tensors lives.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    map: Arc<Mmap>,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl MappedTensor {
    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The type that it is stored in: F64, F32, BF16, F16 or I64.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A matrix of f32 or bf16 as it lies in the file; none of another type or rank, or where the file does not align it.
    pub fn view(&self) -> Option<MatRef<'_>> {
        let &[rows, cols] = self.shape.as_slice() else { return None };
        let bytes = self.map.get(self.bytes.clone())?;
        match self.dtype {
            DType::F32 => Some(MatRef::F32(View::new(bytemuck::try_cast_slice(bytes).ok()?, rows, cols))),
            DType::BF16 => {
                let bits: &[u16] = bytemuck::try_cast_slice(bytes).ok()?;
                Some(MatRef::Bf16(View::new(bits.reinterpret_cast(), rows, cols)))
            }
            _ => None,
        }
    }

    /// Lets go of the memory that reading it took: the system reads it again from the file where it is looked at once more. For who
    /// has made something smaller of it and goes on to the next.
    pub fn forget(&self) {
        forget(&self.map, &self.bytes);
    }

    /// All of it, in memory.
    ///
    /// # Errors
    /// A dtype that is not a float type.
    pub fn to_tensor(&self, dtype: DType) -> candle_core::Result<Tensor> {
        self.read(self.map.get(self.bytes.clone()).unwrap_or_default(), self.shape.clone(), dtype)
    }

    /// All of it, in memory: floats in 32 bits, whole numbers as they are.
    ///
    /// # Errors
    /// Bytes that are not there.
    pub fn to_numbers(&self) -> candle_core::Result<Tensor> {
        self.to_tensor(if self.dtype == DType::I64 { DType::I64 } else { DType::F32 })
    }

    /// A range along its first axis, in memory.
    ///
    /// # Errors
    /// A range outside of the tensor.
    pub fn rows(&self, rows: Range<usize>, dtype: DType) -> candle_core::Result<Tensor> {
        let (stride, n) = self.stride()?;
        if rows.start > rows.end || rows.end > n {
            bail!("rows {rows:?} of a tensor of {n}");
        }
        let bytes = self.bytes.start + rows.start * stride..self.bytes.start + rows.end * stride;
        let shape = [&[rows.len()], &self.shape[1..]].concat();
        self.read(&self.map[bytes], shape, dtype)
    }

    /// Places along its first axis, in memory.
    ///
    /// # Errors
    /// A place outside of the tensor.
    pub fn select(&self, ids: &[u32], dtype: DType) -> candle_core::Result<Tensor> {
        let (stride, n) = self.stride()?;
        let mut bytes = Vec::with_capacity(ids.len() * stride);
        for &id in ids {
            if id as usize >= n {
                bail!("row {id} of a tensor of {n}");
            }
            let start = self.bytes.start + id as usize * stride;
            bytes.extend_from_slice(&self.map[start..start + stride]);
        }
        self.read(&bytes, [&[ids.len()], &self.shape[1..]].concat(), dtype)
    }

    /// Bytes between neighbours along the first axis, and their number.
    fn stride(&self) -> candle_core::Result<(usize, usize)> {
        match self.shape.split_first() {
            Some((&n, rest)) => Ok((rest.iter().product::<usize>() * self.dtype.size_in_bytes(), n)),
            None => bail!("rows of a scalar"),
        }
    }

    /// Values from little-endian bytes, which may stand at any address.
    fn read(&self, bytes: &[u8], shape: Vec<usize>, dtype: DType) -> candle_core::Result<Tensor> {
        macro_rules! values {
            ($from:ty, $size:literal, $to:expr) => {
                bytes
                    .chunks_exact($size)
                    .map(|b| $to(<$from>::from_le_bytes(b.try_into().unwrap_or([0; $size]))))
                    .collect::<Vec<_>>()
            };
        }
        // The two conversions that every pass of a bf16 base makes go directly; the others by way of the stored type.
        let tensor = match (self.dtype, dtype) {
            (DType::BF16, DType::F32) => Tensor::from_vec(values!(bf16, 2, bf16::to_f32), shape, &Device::Cpu),
            (DType::F16, DType::F32) => Tensor::from_vec(values!(f16, 2, f16::to_f32), shape, &Device::Cpu),
            (DType::BF16, _) => Tensor::from_vec(values!(bf16, 2, |x| x), shape, &Device::Cpu),
            (DType::F16, _) => Tensor::from_vec(values!(f16, 2, |x| x), shape, &Device::Cpu),
            (DType::F32, _) => Tensor::from_vec(values!(f32, 4, |x| x), shape, &Device::Cpu),
            (DType::F64, _) => Tensor::from_vec(values!(f64, 8, |x| x), shape, &Device::Cpu),
            (DType::I64, _) => Tensor::from_vec(values!(i64, 8, |x| x), shape, &Device::Cpu),
            (other, _) => bail!("a mapped tensor of {other:?}"),
        };
        tensor?.to_dtype(dtype)
    }
}

/// Lets go of the memory of a part of a map.
fn forget(map: &Mmap, bytes: &Range<usize>) {
    #[cfg(unix)]
    {
        // Whole pages within it; what else lies on the first and the last is somebody else's.
        const PAGE: usize = 4096;
        let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end / PAGE * PAGE);
        if start < end {
            // SAFETY: the map is of a file, read-only and shared: pages that are dropped are read again, with the same bytes.
            // Failing would cost memory and nothing else.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
    #[cfg(not(unix))]
    let _ = (map, bytes);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::frozen::{FrozenWeight, linear};
    use crate::rng::Rng;
    use crate::testing::assert_same_bits;

    fn file(folder: &Path, tensors: &[(&str, Tensor)]) -> PathBuf {
        let path = folder.join("x.safetensors");
        let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        path
    }

    #[test]
    fn every_float_type_is_read_back_and_widened() {
        let folder = tempfile::tempdir().unwrap();
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let x = Rng::new(1, "x").normal_tensor((5, 3), 1.0, dtype).unwrap();
            // An odd name makes the values stand at an odd address.
            let path = file(folder.path(), &[("odd", x.clone()), ("a", x.clone())]);
            let mapped = Mapped::open(&path).unwrap();
            assert_eq!(mapped.names().collect::<Vec<_>>(), ["a", "odd"]);
            let found = mapped.get("odd").unwrap().unwrap();
            assert_eq!((found.shape(), found.dtype()), (&[5, 3][..], dtype));
            assert_same_bits("same type", &found.to_tensor(dtype).unwrap(), &x);
            let wide = x.to_dtype(DType::F64).unwrap();
            assert_same_bits("f64", &found.to_tensor(DType::F64).unwrap(), &wide);
            assert_same_bits("rows", &found.rows(2..4, DType::F64).unwrap(), &wide.narrow(0, 2, 2).unwrap());
            let ids = Tensor::new(&[4u32, 0, 4], &Device::Cpu).unwrap();
            assert_same_bits(
                "select",
                &found.select(&[4, 0, 4], DType::F64).unwrap(),
                &wide.index_select(&ids, 0).unwrap(),
            );
            assert!(found.rows(4..6, DType::F32).is_err() && found.select(&[5], DType::F32).is_err());
            assert!(mapped.get("b").unwrap().is_none());
        }
    }

    #[test]
    fn a_mapped_weight_multiplies_as_a_dense_one() {
        let folder = tempfile::tempdir().unwrap();
        let w = Rng::new(1, "w").normal_tensor((4, 6), 1.0, DType::BF16).unwrap();
        let mapped = Mapped::open(&file(folder.path(), &[("w", w.clone())])).unwrap().get("w").unwrap().unwrap();
        let x = Rng::new(1, "x").normal_tensor((3, 6), 1.0, DType::F32).unwrap();
        let y = linear(&x, &FrozenWeight::mapped(mapped).unwrap()).unwrap();
        assert_same_bits("product", &y, &linear(&x, &FrozenWeight::dense(&w).unwrap()).unwrap());
    }

    #[test]
    fn what_was_let_go_of_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let w = Rng::new(1, "w").normal_tensor((70, 100), 1.0, DType::F32).unwrap();
        let mapped = Mapped::open(&file(folder.path(), &[("w", w.clone())])).unwrap().get("w").unwrap().unwrap();
        for _ in 0..2 {
            assert_same_bits("read", &mapped.to_tensor(DType::F32).unwrap(), &w);
            mapped.forget();
        }
        let file = Mapped::open(&folder.path().join("x.safetensors")).unwrap();
        let before = file.stored("w").unwrap().bytes.to_vec();
        file.forget("w");
        file.forget("none");
        assert_eq!(file.stored("w").unwrap().bytes, before);
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let x = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let whole = std::fs::read(file(folder.path(), &[("x", x)])).unwrap();
        let path = folder.path().join("damaged.safetensors");
        for cut in [0, 3, 8, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = Mapped::open(&path).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{cut}: {error}");
            assert!(error.to_string().contains("damaged.safetensors: is no complete safetensors file"), "{error}");
        }
        let mut huge = whole;
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, &huge).unwrap();
        assert!(matches!(Mapped::open(&path), Err(Error::Format { .. })));
        assert!(matches!(Mapped::open(&folder.path().join("none")), Err(Error::Open { .. })));
    }

    #[test]
    fn integers_are_refused_by_name_and_type() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), &[("q", Tensor::new(&[1u8, 2], &Device::Cpu).unwrap())]);
        let error = Mapped::open(&path).unwrap().get("q").unwrap_err();
        assert!(error.to_string().contains("tensor \"q\" is stored as U8; expected F32"), "{error}");
        let mapped = Mapped::open(&path).unwrap();
        let stored = mapped.stored("q").unwrap();
        assert_eq!((stored.dtype.as_str(), stored.shape, stored.bytes), ("U8", &[2][..], &[1u8, 2][..]));
        assert_eq!(mapped.stored("r"), None);
    }
}
