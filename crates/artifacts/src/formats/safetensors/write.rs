//! Writing a file whose bytes depend on its tensors only.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use super::dtype::{Dtype, size_bytes};
use super::{METADATA, at};
use crate::error::{Error, Result};
use crate::formats::write_file;

/// A tensor to be written: its bytes in row-major order, little endian.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub data: &'a [u8],
}

/// A tensor whose bytes come when it is their turn.
#[derive(Debug, Clone)]
pub struct Due {
    /// Its name in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

/// Writes `tensors` to `path`: the same tensors in any order give the same bytes, and the file appears only when it is
/// complete. Blocks.
///
/// # Errors
/// [`Error::Refused`] when a name repeats or the bytes do not fit the shape; [`Error::Io`], [`Error::Full`].
pub fn write(path: &Path, tensors: &[Tensor<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let due = |tensor: &Tensor<'_>| Due { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
    let due: Vec<Due> = tensors.iter().map(due).collect();
    let has = |place: usize| Some(tensors[place].data.len() as u64);
    write_in_turn(path, &due, metadata, has, |place, file| file.write_all(tensors[place].data))
}

/// The same, with one tensor's bytes in memory at a time: `give` writes those of the tensor at a place of `tensors`, called once
/// for each in the order of the file. Blocks.
///
/// # Errors
/// As for [`write()`]; whatever `give` raises.
pub fn write_as_due(
    path: &Path,
    tensors: &[Due],
    metadata: &BTreeMap<String, String>,
    give: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    write_in_turn(path, tensors, metadata, |_| None, give)
}

fn write_in_turn(
    path: &Path,
    tensors: &[Due],
    metadata: &BTreeMap<String, String>,
    has: impl Fn(usize) -> Option<u64>,
    mut give: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let mut sorted: Vec<(usize, &Due)> = tensors.iter().enumerate().collect();
    // Wide elements first, so that each tensor starts at a multiple of its element size.
    sorted.sort_by(|(_, a), (_, b)| b.dtype.bits().cmp(&a.dtype.bits()).then_with(|| a.name.cmp(&b.name)));
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.into(), serde_json::json!(metadata));
    }
    let mut sizes = Vec::with_capacity(sorted.len());
    let mut offset = 0;
    for (place, tensor) in &sorted {
        if tensor.name == METADATA || !names.insert(&tensor.name) {
            faults.push(at(&tensor.name, "is there twice"));
        }
        let shape: Vec<u64> = tensor.shape.iter().map(|n| *n as u64).collect();
        let due = size_bytes(tensor.dtype, &shape);
        let size = has(*place).or(due).unwrap_or_default();
        if due != Some(size) {
            faults.push(at(&tensor.name, format!("is {} of shape {shape:?}, but has {size} bytes", tensor.dtype)));
        }
        sizes.push(size);
        let info = serde_json::json!({"dtype": tensor.dtype.as_str(), "shape": shape, "data_offsets": [offset, offset + size]});
        header.insert(tensor.name.clone(), info);
        offset += size;
    }
    if !faults.is_empty() {
        return Err(Error::Refused { what: path.display().to_string(), faults });
    }
    let mut text = serde_json::Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    write_file(path, |file| {
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        for ((place, tensor), size) in sorted.iter().zip(&sizes) {
            let mut counted = Counted { file: &mut *file, n_bytes: 0 };
            give(*place, &mut counted)?;
            if counted.n_bytes != *size {
                let what = format!("tensor {:?} came with {} bytes; expected {size}", tensor.name, counted.n_bytes);
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
            }
        }
        Ok(())
    })
}

/// Counts what is written.
struct Counted<'f> {
    file: &'f mut dyn Write,
    n_bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.n_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Header;
    use super::*;

    fn tensor<'a>(name: &str, dtype: Dtype, shape: &[usize], data: &'a [u8]) -> Tensor<'a> {
        Tensor { name: name.into(), dtype, shape: shape.to_vec(), data }
    }

    #[test]
    fn the_bytes_depend_on_the_tensors_only_and_other_readers_find_them() {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..64).collect();
        let tensors = [
            tensor("z", Dtype::F64, &[2], &data[..16]),
            tensor("b", Dtype::Bf16, &[3, 1], &data[16..22]),
            tensor("a", Dtype::F32, &[2, 2], &data[22..38]),
            tensor("é \"quoted\"", Dtype::U8, &[1], &data[38..39]),
            tensor("empty", Dtype::F32, &[0, 3], &[]),
            tensor("scalar", Dtype::I64, &[], &data[39..47]),
        ];
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        write(&one, &tensors, &metadata).unwrap();
        let mut turned = tensors.to_vec();
        turned.reverse();
        write(&two, &turned, &metadata).unwrap();
        let bytes = std::fs::read(&one).unwrap();
        assert_eq!(bytes, std::fs::read(&two).unwrap());
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let header = Header::read(&one).unwrap();
        assert_eq!((header.tensors().len(), theirs.len()), (6, 6));
        assert_eq!(*header.metadata(), metadata);
        for tensor in &tensors {
            let info = &header.tensors()[&tensor.name];
            assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
            assert_eq!(&bytes[info.bytes.start as usize..info.bytes.end as usize], tensor.data, "{}", tensor.name);
            assert_eq!(info.bytes.start % (tensor.dtype.bits() / 8), 0, "{} is not aligned", tensor.name);
            assert_eq!(theirs.tensor(&tensor.name).unwrap().data(), tensor.data, "{}", tensor.name);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "something was left beside the files");
    }

    #[test]
    fn bytes_that_come_in_turn_make_the_same_file_and_must_be_as_many_as_the_shape_says() {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..16).collect();
        let tensors = [tensor("b", Dtype::F32, &[2], &data[..8]), tensor("a", Dtype::F32, &[2], &data[8..])];
        let due: Vec<Due> = tensors
            .iter()
            .map(|tensor| Due { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() })
            .collect();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        write(&one, &tensors, &BTreeMap::new()).unwrap();
        let mut order = Vec::new();
        let give = |place: usize, file: &mut dyn Write| {
            order.push(place);
            file.write_all(tensors[place].data)
        };
        write_as_due(&two, &due, &BTreeMap::new(), give).unwrap();
        assert_eq!((order, std::fs::read(&one).unwrap()), (vec![1, 0], std::fs::read(&two).unwrap()));
        let short =
            write_as_due(&folder.path().join("three"), &due, &BTreeMap::new(), |_, file| file.write_all(&[0; 7]));
        assert!(short.unwrap_err().to_string().contains("three"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn every_type_is_one_that_the_reference_knows() {
        for dtype in Dtype::ALL {
            let text = format!("\"{dtype}\"");
            let theirs: ::safetensors::Dtype = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{dtype}: {e}"));
            assert_eq!(theirs.bitsize() as u64, dtype.bits(), "{dtype}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_nothing_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let tensors = [
            tensor("a", Dtype::F32, &[2], &[0; 4]),
            tensor("b", Dtype::U8, &[1], &[0]),
            tensor("b", Dtype::U8, &[1], &[0]),
            tensor("__metadata__", Dtype::U8, &[1], &[0]),
        ];
        let text = write(&path, &tensors, &BTreeMap::new()).unwrap_err().to_string();
        assert!(text.contains("`a` is F32 of shape [2], but has 4 bytes"), "{text}");
        assert!(text.contains("`b` is there twice") && text.contains("`__metadata__` is there twice"), "{text}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
