//! Parts of gradients: what a sink asks for of each tensor, and no more.

use attune_points::error::Context as _;
use attune_points::{Error, GradSink, Region, Result, TensorId};
use candle_core::{Device, Tensor};

/// Puts what the sink wants of a whole gradient.
///
/// # Errors
/// A region outside of the tensor; whatever the sink raises.
pub(crate) fn put(sink: &mut dyn GradSink, id: &TensorId, gradient: &Tensor) -> Result<()> {
    let part = match sink.want(id) {
        Region::None => return Ok(()),
        Region::All => gradient.clone(),
        Region::Rows(rows) => along(id, gradient, 0, rows)?,
        Region::Cols(cols) => along(id, gradient, 1, cols)?,
        Region::Cross(rows, cols) => along(id, &along(id, gradient, 0, rows)?, 1, cols)?,
        Region::Entries(entries) => {
            entries_within(id, entries, gradient.elem_count())?;
            let entries: Vec<i64> = entries.iter().map(|&entry| entry as i64).collect();
            gradient.flatten_all()?.index_select(&Tensor::new(entries, &Device::Cpu)?, 0)?
        }
    };
    sink.put(id, &part)
}

/// Some rows or columns.
fn along(id: &TensorId, gradient: &Tensor, dim: usize, wanted: &[u32]) -> Result<Tensor> {
    within(id, wanted, gradient.dims().get(dim).copied().unwrap_or(0), dim)?;
    gradient.index_select(&Tensor::new(wanted, &Device::Cpu)?, dim).context(|| format!("the gradient of {id}"))
}

/// Refuses rows (`dim` 0) or columns that a tensor does not have.
///
/// # Errors
/// As said.
pub(crate) fn within(id: &TensorId, wanted: &[u32], length: usize, dim: usize) -> Result<()> {
    let what = if dim == 0 { "row" } else { "column" };
    match wanted.iter().find(|index| **index as usize >= length) {
        Some(index) => Err(Error::Refused(format!("{what} {index} of {id} was asked for; it has {length}"))),
        None => Ok(()),
    }
}

/// Refuses entries that a tensor of `all` does not have.
///
/// # Errors
/// As said.
pub(crate) fn entries_within(id: &TensorId, entries: &[u64], all: usize) -> Result<()> {
    match entries.iter().find(|entry| **entry >= all as u64) {
        Some(entry) => Err(Error::Refused(format!("entry {entry} of {id} was asked for; it has {all}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use attune_points::{Owner, TensorName};

    use super::*;

    /// Wants one region of every tensor, and keeps what is put.
    struct Sink<'r>(Region<'r>, Vec<Tensor>);

    impl GradSink for Sink<'_> {
        fn want(&self, _: &TensorId) -> Region<'_> {
            self.0
        }

        fn put(&mut self, _: &TensorId, gradient: &Tensor) -> Result<()> {
            self.1.push(gradient.clone());
            Ok(())
        }
    }

    fn given(region: Region<'_>) -> Result<Vec<f32>> {
        let id = TensorId { owner: Owner::Base, name: TensorName::from_path("head.weight") };
        let gradient = Tensor::new(&[[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu)?;
        let mut sink = Sink(region, Vec::new());
        put(&mut sink, &id, &gradient)?;
        Ok(sink.1.iter().flat_map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect())
    }

    #[test]
    fn a_region_is_cut_out_and_one_outside_is_refused() {
        assert!(given(Region::None).unwrap().is_empty());
        assert_eq!(given(Region::Rows(&[1])).unwrap(), [4.0, 5.0, 6.0]);
        assert_eq!(given(Region::Cols(&[2, 0])).unwrap(), [3.0, 1.0, 6.0, 4.0]);
        assert_eq!(given(Region::Cross(&[1, 0], &[1])).unwrap(), [5.0, 2.0]);
        assert_eq!(given(Region::Entries(&[5, 0])).unwrap(), [6.0, 1.0]);
        let message = |region| given(region).unwrap_err().to_string();
        assert_eq!(message(Region::Rows(&[2])), "row 2 of head.weight was asked for; it has 2");
        assert_eq!(message(Region::Cross(&[0], &[3])), "column 3 of head.weight was asked for; it has 3");
        assert_eq!(message(Region::Entries(&[6])), "entry 6 of head.weight was asked for; it has 6");
    }
}
