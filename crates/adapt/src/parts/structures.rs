//! Heads of attentions and neurons of MLPs, each scaled by a number of its own that is learned, until those of the smallest numbers go as a
//! whole: columns of the linears that lead out of attentions and MLPs.

use attune_architecture::{Architecture, Place, Site};
use attune_points::{Locals, Result, TensorSpec};
use attune_spec::Fault;
use candle_core::{DType, Tensor};

use crate::parts::masks::{self, optional};

/// The local name of the numbers.
pub(crate) const GATES: &str = "gates";
/// That of a bit for each, whether it stays.
pub(crate) const LEFT: &str = "gates_left";

/// Which shares of them go in the end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Structures {
    /// Of the heads of each attention.
    pub(crate) heads: f64,
    /// Of the neurons of each MLP.
    pub(crate) neurons: f64,
}

impl Structures {
    /// Whether any do.
    pub(crate) fn any(self) -> bool {
        self.heads > 0.0 || self.neurons > 0.0
    }

    /// The share of what a linear reads that goes, and of how many; none at linears that do not lead out of one.
    fn at(self, site: &Site, input: usize, architecture: &Architecture) -> Option<usize> {
        match site.place {
            Place::Output if self.heads > 0.0 => Some(architecture.heads),
            Place::Down if self.neurons > 0.0 => Some(input),
            _ => None,
        }
    }

    /// The tensors of a linear `[_, input]`: the numbers, and which of them stay.
    pub(crate) fn specs(self, site: &Site, input: usize, architecture: &Architecture) -> Vec<TensorSpec> {
        let Some(count) = self.at(site, input, architecture) else { return Vec::new() };
        // What decays would be small for no reason of its own.
        let gates = TensorSpec { decay: false, ..TensorSpec::trained(GATES, [count]) };
        vec![gates, TensorSpec { local: LEFT, ..masks::spec(count) }]
    }

    /// Where there is nothing to which a share could apply.
    pub(crate) fn faults(self, sites: &[Site]) -> Vec<Fault> {
        let missing = |share: f64, place: Place| share > 0.0 && sites.iter().all(|site| site.place != place);
        let fault = |field: &'static str, what: &str| {
            Fault::new(field, format!("needs {what} among the targets, whose columns they are; there is none"))
        };
        let heads =
            missing(self.heads, Place::Output).then(|| fault("prune_heads", "linears that lead out of attentions"));
        let neurons =
            missing(self.neurons, Place::Down).then(|| fault("prune_neurons", "linears that lead out of MLPs"));
        heads.into_iter().chain(neurons).collect()
    }

    /// How many of so many go at a site of this place: a share, rounded, and never all.
    pub(crate) fn goes(self, heads: bool, count: usize) -> usize {
        let share = if heads { self.heads } else { self.neurons };
        ((share * count as f64).round() as usize).min(count.saturating_sub(1))
    }
}

/// A weight whose columns are scaled by the numbers of those that stay, and 0 for all others: as it is where there are none.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn scaled(w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
    let (Some(gates), Some(left)) = (optional(tensors, GATES), optional(tensors, LEFT)) else {
        return Ok(w_oi.clone());
    };
    let (count, input) = (gates.elem_count(), w_oi.dim(1)?);
    let gates = (gates * masks::as_matrix(left, gates)?)?;
    let columns = gates.unsqueeze(1)?.broadcast_as((count, input / count))?.reshape(input)?;
    Ok(w_oi.broadcast_mul(&columns)?)
}

/// `weight` times the sum of the numbers' sizes, until some are gone: what is left is not made smaller any more.
///
/// # Errors
/// A mask of another size.
pub(crate) fn penalty(tensors: &Locals, weight: f64) -> Result<Option<Tensor>> {
    let (Some(gates), Some(left)) = (optional(tensors, GATES), optional(tensors, LEFT)) else { return Ok(None) };
    if weight == 0.0 || masks::unpacked(left, gates.elem_count())?.contains(&false) {
        return Ok(None);
    }
    Ok(Some((gates.abs()?.sum_all()? * weight)?))
}

/// The bits of those that stay where so many of the smallest numbers go, of equal ones the first.
///
/// # Errors
/// As for [`masks::packed`].
pub(crate) fn left(gates: &Tensor, goes: usize) -> Result<Tensor> {
    let sizes: Vec<f64> = gates.to_dtype(DType::F64)?.abs()?.to_vec1()?;
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|&a, &b| sizes[a].total_cmp(&sizes[b]).then(a.cmp(&b)));
    let mut stays = vec![true; sizes.len()];
    order.into_iter().take(goes).for_each(|at| stays[at] = false);
    masks::packed(&stays)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor(values: &[f64]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn locals(gates: &[f64], left: &[bool]) -> Locals {
        Locals::new("o", [(GATES, tensor(gates)), (LEFT, masks::packed(left).unwrap())])
    }

    #[test]
    fn columns_of_a_head_are_scaled_together_and_those_of_one_that_is_gone_are_0() {
        let w = Tensor::ones((2, 6), DType::F64, &Device::Cpu).unwrap();
        let made = scaled(&w, &locals(&[2.0, 3.0, 4.0], &[true, false, true])).unwrap();
        assert_eq!(made.to_vec2::<f64>().unwrap(), [[2.0, 2.0, 0.0, 0.0, 4.0, 4.0]; 2]);
        let none = Locals::new("o", [("other", w.clone())]);
        assert_eq!(scaled(&w, &none).unwrap().to_vec2::<f64>().unwrap(), w.to_vec2::<f64>().unwrap());
    }

    #[test]
    fn sizes_count_until_some_are_gone() {
        let loss = |left: &[bool]| penalty(&locals(&[2.0, -3.0], left), 0.5).unwrap();
        assert_eq!(loss(&[true, true]).unwrap().to_scalar::<f64>().unwrap(), 2.5);
        assert!(loss(&[true, false]).is_none());
    }

    #[test]
    fn the_smallest_go_and_never_all() {
        let stays = |goes| masks::unpacked(&left(&tensor(&[0.5, -0.1, 0.1, -2.0]), goes).unwrap(), 4).unwrap();
        assert_eq!(stays(0), [true; 4]);
        assert_eq!(stays(1), [true, false, true, true]);
        assert_eq!(stays(2), [true, false, false, true]);
        let of = Structures { heads: 0.99, neurons: 0.4 };
        assert_eq!((of.goes(true, 4), of.goes(false, 10), of.goes(true, 1)), (3, 4, 0));
    }
}
