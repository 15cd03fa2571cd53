//! Shares of each row in what several components would add.

use attune_points::Result;
use attune_points::adapter::{BlendMap, Blended};
use attune_points::error::Error;
use attune_tensor::ops;
use candle_core::{DType, Tensor};

use crate::parts::sparse;

/// What stands for a score that does not count: its share is 0 in any precision.
const NOTHING: f64 = -1e30;

/// 1 for the `k` largest scores of each row of `s_tn`, 0 for the others; the first count among equal ones. No gradient goes through it.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn largest(s_tn: &Tensor, k: usize) -> Result<Tensor> {
    let rows: Vec<Vec<f32>> = s_tn.detach().to_dtype(DType::F32)?.to_vec2()?;
    let mut marks = vec![0.0f32; s_tn.elem_count()];
    for (row, marks) in rows.iter().zip(marks.chunks_mut(s_tn.dim(1)?.max(1))) {
        sparse::largest(row, k).into_iter().for_each(|n| marks[n] = 1.0);
    }
    Ok(Tensor::from_vec(marks, s_tn.shape(), s_tn.device())?.to_dtype(s_tn.dtype())?)
}

/// The softmax of each row over the scores that are marked by 1, and 0 where `marks_tn` is 0.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn softmax(s_tn: &Tensor, marks_tn: &Tensor) -> Result<Tensor> {
    Ok(ops::softmax(&((s_tn * marks_tn)? + marks_tn.affine(-NOTHING, NOTHING)?)?)?)
}

/// `Σ_n s_tn z_n`, of one component at least.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn mixed(s_tn: &Tensor, added: &[Tensor]) -> Result<Tensor> {
    let share = |n: usize| -> Result<Tensor> { Ok(added[n].broadcast_mul(&s_tn.narrow(1, n, 1)?)?) };
    (1..added.len()).try_fold(share(0)?, |sum, n| Ok((sum + share(n)?)?))
}

/// Whether there is as much to blend as there should be.
///
/// # Errors
/// [`Error::Refused`] if there is not.
pub(crate) fn check(by: &dyn BlendMap, of: &Blended<'_>) -> Result<()> {
    match of.added.len() {
        found if found == by.blends() && found > 0 => Ok(()),
        found => Err(Error::Refused(format!("{found} components are blended; expected {}", by.blends()))),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn shares_are_those_of_what_is_marked_and_add_up() {
        let s_tn = Tensor::new(&[[1.0f64, 3.0, 2.0], [0.5, 0.5, -4.0]], &Device::Cpu).unwrap();
        let marks = largest(&s_tn, 2).unwrap();
        assert_eq!(marks.to_vec2::<f64>().unwrap(), [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]);
        let shares: Vec<Vec<f64>> = softmax(&s_tn, &marks).unwrap().to_vec2().unwrap();
        let first = 1.0 / (1.0 + (-1.0f64).exp());
        for (found, expected) in shares.iter().flatten().zip([0.0, first, 1.0 - first, 0.5, 0.5, 0.0]) {
            assert!((found - expected).abs() < 1e-12, "{shares:?}");
        }
        let added: Vec<Tensor> = (0..3).map(|n| Tensor::full(f64::from(n), (2, 4), &Device::Cpu).unwrap()).collect();
        let mixed = mixed(&Tensor::new(shares, &Device::Cpu).unwrap(), &added).unwrap();
        assert!((mixed.to_vec2::<f64>().unwrap()[0][3] - (2.0 - first)).abs() < 1e-12);
    }
}
