//! Changes of single entries of a weight: their places, fixed or chosen anew on the way, and their values.

use attune_points::{Error, Result};
use attune_tensor::permutation::Permutation;
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
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

/// How many directions a round of a search adds.
const MORE: usize = 5;

/// By how much each entry stands out of the low rank of a weight; those below the threshold come below 0, in the order of theirs.
///
/// # Errors
/// A matrix of numbers that are not finite.
pub(crate) fn standing_out(w_oi: &Tensor, rounds: u32, threshold: f64, rng: &mut Rng) -> Result<Tensor> {
    let (o, i) = w_oi.dims2()?;
    let mut r_ki = rng.normal_tensor((1, i), 1.0, DType::F64)?;
    let mut d_oi = w_oi.zeros_like()?;
    let mut rest_oi = w_oi.clone();
    for round in 1..=rounds {
        let mut low_oi = w_oi.zeros_like()?;
        for _ in 0..2 {
            let smooth_oi = (w_oi - &d_oi)?;
            let (l_ok, _) = linalg::qr(&ops::matmul(&smooth_oi, &r_ki.t()?.contiguous()?)?)?;
            r_ki = ops::matmul(&l_ok.t()?.contiguous()?, &smooth_oi)?;
            low_oi = ops::matmul(&l_ok, &r_ki)?;
            rest_oi = (w_oi - &low_oi)?;
            let stands = rest_oi.abs()?.ge(threshold)?;
            d_oi = stands.where_cond(&rest_oi, &rest_oi.zeros_like()?)?;
        }
        let more = MORE.min(o.min(i) - r_ki.dim(0)?);
        if round == rounds || more == 0 {
            break;
        }
        // The first rows of a triangle are what the first columns span of all others.
        let left_oi = ((w_oi - low_oi)? - &d_oi)?;
        if left_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()? == 0.0 {
            break;
        }
        let (first_om, _) = linalg::qr(&left_oi.narrow(1, 0, more)?.contiguous()?)?;
        r_ki = Tensor::cat(&[&r_ki, &ops::matmul(&first_om.t()?.contiguous()?, &left_oi)?], 0)?;
    }
    // Those of the sparse part come before all others, whose order is that of what they are off by.
    let beside = (rest_oi.abs()? - rest_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)?;
    let stands = d_oi.ne(0.0)?;
    Ok(stands.where_cond(&d_oi.abs()?, &(beside - 1.0)?)?)
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
