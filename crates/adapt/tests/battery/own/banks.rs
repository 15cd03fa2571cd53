//! Of changes by few numbers within what is fixed: a weight's own vectors, banks of vectors, places that are drawn.

use attune_points::adapter::Merged;
use attune_tensor::linalg;
use candle_core::{DType, Device, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, rank};
use crate::support::{Setup, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[("svft::a_change_of_full_rank_keeps_the_singular_vectors", singular_vectors)];

/// A linear of 32 outputs and 24 inputs.
const UP: &str = "model.layers.1.mlp.up_proj";

/// The weight at [`UP`] and what a component, moved from its start, adds to it; and how many trained numbers it has.
fn changed(method: Value) -> Result<(Tensor, Tensor, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(0.3);
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let change = match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
        Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
        Merged::Weight { weight: merged, .. } => (merged - &weight)?,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    assert!(largest(&change) > 0.01, "nothing moved");
    Ok((weight, change, setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum()))
}

/// How far a change goes beyond the diagonal between the singular vectors of the weight, against its size; its rank; its numbers.
fn beside_the_diagonal(method: Value) -> Result<(f64, usize, usize), Failed> {
    let (weight, change, numbers) = changed(method)?;
    let own = linalg::svd(&weight)?;
    let between = own.u.t()?.matmul(&change)?.matmul(&own.v.t()?)?;
    let one = Tensor::eye(between.dim(0)?, DType::F64, &Device::Cpu)?;
    let beside = (&between * (1.0 - one)?)?;
    Ok((largest(&beside) / largest(&between), rank(&change)?, numbers))
}

fn singular_vectors() -> Result<(), Failed> {
    let (svft, svft_rank, svft_numbers) = beside_the_diagonal(json!({"method": "svft"}))?;
    let (plain, plain_rank, plain_numbers) = beside_the_diagonal(json!({"method": PLAIN, "rank": 1}))?;
    assert!(svft_numbers <= plain_numbers && svft_rank == 24 && plain_rank == 1);
    // They are kept in 32 bits.
    assert!(svft < 1e-5 && plain > 0.1, "{svft} and {plain} of the change are beside the diagonal");
    Ok(())
}
