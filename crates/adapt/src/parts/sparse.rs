//! Changes of single entries of a weight: their places, fixed or chosen anew on the way, and their values.

use attune_points::{Error, Result};
use attune_tensor::permutation::Permutation;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};

/// The local name of the values.
pub(crate) const VALUES: &str = "values";

/// The local name of their flat places.
pub(crate) const INDICES: &str = "indices";

/// `w_oi` with `values_k` added at the entries `indices_k`, flat places of the matrix.
///
/// # Errors
/// A place outside of the matrix.
pub(crate) fn added(w_oi: &Tensor, indices_k: &Tensor, values_k: &Tensor) -> Result<Tensor> {
    Ok(w_oi.flatten_all()?.index_add(indices_k, values_k, 0)?.reshape(w_oi.shape())?)
}

/// Flat places as they may come from a file, if all are below `all`.
///
/// # Errors
/// [`Error::Refused`] of one that is not.
pub(crate) fn places(indices_k: &Tensor, all: usize) -> Result<Tensor> {
    let indices_k = indices_k.to_dtype(DType::I64)?;
    match indices_k.to_vec1::<i64>()?.into_iter().find(|place| *place < 0 || *place as usize >= all) {
        None => Ok(indices_k),
        Some(place) => Err(Error::Refused(format!("a place is {place}; expected 0 to {}", all.saturating_sub(1)))),
    }
}

/// Some `k` of the entries `0 .. all`, ascending.
///
/// # Errors
/// Whatever making the tensor raises.
pub(crate) fn some(all: usize, k: usize, rng: &Rng) -> Result<Tensor> {
    let order = Permutation::new(all as u64, rng);
    let mut places: Vec<i64> = (0..k as u64).map(|index| order.at(index) as i64).collect();
    places.sort_unstable();
    Ok(Tensor::new(places, &Device::Cpu)?)
}

/// The places of the `k` largest of some scores, those that come first among equal ones.
pub(crate) fn largest(scores: &[f32], k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    let before = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if k < places.len() {
        places.select_nth_unstable_by(k, before);
        places.truncate(k);
    }
    places.sort_unstable_by(before);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_the_first_of_equal_ones() {
        assert_eq!(largest(&[1.0, 3.0, 2.0, 3.0, 0.0], 3), [1, 3, 2]);
        assert_eq!(largest(&[0.0; 4], 2), [0, 1]);
        assert_eq!(largest(&[2.0, 5.0], 7), [1, 0]);
        assert!(largest(&[2.0], 0).is_empty());
    }

    #[test]
    fn chosen_places_are_distinct_and_added_to() {
        let places = some(50, 20, &Rng::new(1, "places")).unwrap();
        let mut distinct = places.to_vec1::<i64>().unwrap();
        distinct.dedup();
        assert_eq!((distinct.len(), distinct.iter().all(|place| (0..50).contains(place))), (20, true));
        let w_oi = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let (at, values) = (Tensor::new(&[4i64, 0], &Device::Cpu).unwrap(), Tensor::new(&[2f32, 3.0], &Device::Cpu));
        let made = added(&w_oi, &at, &values.unwrap()).unwrap();
        assert_eq!(made.to_vec2::<f32>().unwrap(), [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]);
        let outside = Tensor::new(&[6i64], &Device::Cpu).unwrap();
        assert!(added(&w_oi, &outside, &Tensor::new(&[1f32], &Device::Cpu).unwrap()).is_err());
    }
}
