//! Components that turn a weight, or change all of it by few numbers.

use attune_models::Pass;
use attune_points::adapter::Merged;
use attune_points::{Grads, TensorName};
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, rank};
use crate::support::{CrossEntropy, Setup, batch, difference, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[
    ("boft::rows_keep_their_angles_whatever_their_lengths", angles),
    ("c3a::a_change_has_full_rank_with_fewer_numbers", full_rank),
    ("capaboost::masks_make_more_rank_of_the_same_numbers", boosted),
    ("flora_tucker::a_first_step_stays_among_the_columns_that_were_drawn", first_step),
    ("fourierft::one_number_changes_the_whole_weight", waves),
    ("hra::a_change_of_low_rank_keeps_lengths_and_angles", reflected),
    ("lorma::a_change_stays_among_the_rows_of_the_weight", within_rows),
    ("lotr::fewer_numbers_have_more_rank_in_every_layer", common_factors),
    ("oft::rows_keep_their_lengths_and_angles", turned),
    ("shira::few_entries_change_and_the_change_has_full_rank", sparse),
];

/// The weight at a site without a component and with it, away from its start.
fn weights(method: Value, site: &str) -> Result<(Tensor, Tensor), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, site, DType::F64);
    setup.disturb(0.3);
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let merged = match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
        Merged::Factors { left, right, scale } => (&weight + (left.matmul(&right)? * scale)?)?,
        Merged::Weight { weight, .. } => weight,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    assert!(difference(&merged, &weight) > 0.01, "nothing moved");
    Ok((weight, merged))
}

const UP: &str = "model.layers.1.mlp.up_proj";

/// How far the products of all rows with each other change, against the largest.
fn gram_off(method: Value) -> Result<f64, Failed> {
    let (before, after) = weights(method, UP)?;
    let gram = |w: &Tensor| -> Result<Tensor, Failed> { Ok(w.matmul(&w.t()?)?) };
    let before = gram(&before)?;
    Ok(difference(&gram(&after)?, &before) / largest(&before))
}

/// Inputs are turned: what a row is to another stays.
fn turned() -> Result<(), Failed> {
    // 24 * 3 / 2 = 36 numbers against 56.
    let oft = gram_off(json!({"method": "oft", "block_size": 4, "terms": 0}))?;
    let plain = gram_off(json!({"method": PLAIN, "rank": 1}))?;
    assert!(oft < 1e-12, "products of rows change by {oft}");
    assert!(plain > 0.01, "products of rows change by {plain}");
    Ok(())
}

/// How far the cosines between rows change.
fn cosines_off(method: Value) -> Result<(f64, f64), Failed> {
    let (before, after) = weights(method, UP)?;
    let length = |w: &Tensor| -> Result<Tensor, Failed> { Ok(w.sqr()?.sum_keepdim(1)?.sqrt()?) };
    let cosines = |w: &Tensor| -> Result<Tensor, Failed> {
        let w = w.broadcast_div(&length(w)?)?;
        // A row of negative scale points the other way.
        Ok(w.matmul(&w.t()?)?.abs()?)
    };
    let lengths = difference(&length(&after)?, &length(&before)?);
    Ok((difference(&cosines(&after)?, &cosines(&before)?), lengths))
}

/// Inputs are turned and rows scaled: angles stay and lengths do not.
fn angles() -> Result<(), Failed> {
    // 2 * 24 * 2 + 32 = 128 numbers against 168.
    let (boft, lengths) = cosines_off(json!({"method": "boft", "block_size": 2, "factors": 2}))?;
    let (plain, _) = cosines_off(json!({"method": PLAIN, "rank": 3}))?;
    assert!(boft < 1e-12 && lengths > 0.1, "cosines change by {boft}, lengths by {lengths}");
    assert!(plain > 0.01, "cosines change by {plain}");
    Ok(())
}

/// The rank of the change of a weight.
fn change_rank(method: Value) -> Result<usize, Failed> {
    let (before, after) = weights(method, UP)?;
    rank(&(after - before)?)
}

/// The change has no more rank than LoRA's, and no product of rows changes.
fn reflected() -> Result<(), Failed> {
    // 2 * 24 = 48 numbers against 56.
    let (hra, plain) = (json!({"method": "hra", "rank": 2}), json!({"method": PLAIN, "rank": 1}));
    assert_eq!((change_rank(hra.clone())?, change_rank(plain.clone())?), (2, 1));
    let (hra, plain) = (gram_off(hra)?, gram_off(plain)?);
    assert!(hra < 1e-12, "products of rows change by {hra}");
    assert!(plain > 0.01, "products of rows change by {plain}");
    Ok(())
}

/// Rows of a block are one row, rotated; a factor of LoRA has to hold each.
fn full_rank() -> Result<(), Failed> {
    // 32 * 24 / 8 = 96 numbers against 112.
    let c3a = change_rank(json!({"method": "c3a", "block_size": 8}))?;
    let plain = change_rank(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((c3a, plain), (24, 2));
    Ok(())
}

/// Two masks of the same two factors have twice their rank.
fn boosted() -> Result<(), Failed> {
    let capaboost = change_rank(json!({"method": "capaboost", "rank": 2, "branches": 2}))?;
    let plain = change_rank(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((capaboost, plain), (4, 2));
    Ok(())
}

/// How many columns the change of a first step has outside of the space of the factor on the side of the output, as it starts.
fn columns_beyond(method: Value, outer: &str) -> Result<usize, Failed> {
    let setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    let at = &setup.attachments[0];
    let layout = batch();
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    setup.model.grad(&Pass { theta: &setup.theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let mut stepped = setup.clone_with(setup.theta.clone());
    for (id, value) in setup.theta.trained() {
        let gradient = sink.get(&id).ok_or("no gradient")?;
        stepped.theta = stepped.with(&id.name, (value - (gradient * 0.1)?)?);
    }
    let locals = attune_models::stack::locals(at, &stepped.params())?;
    let Merged::Factors { left, right, scale } = stepped.adapter.merge(at, &locals, &*stepped.weight(at)?)? else {
        return Err("it does not merge to factors".into());
    };
    let change = (left.matmul(&right)? * scale)?;
    assert!(largest(&change) > 0.0, "nothing moved");
    let params = setup.params();
    let outer = params.get(&TensorName::new(at.site.as_str(), outer)).ok_or("no such factor")?;
    Ok(rank(&Tensor::cat(&[outer, &change], 1)?)? - rank(outer)?)
}

/// The core alone moves first, between factors that are there; what LoRA's factor starts from is 0, and its columns are the data's.
fn first_step() -> Result<(), Failed> {
    // 2 * 24 + 4 + 2 * 32 = 116 numbers against 112.
    let flora = columns_beyond(json!({"method": "flora-tucker", "rank_in": 2, "rank_out": 2}), "flora_out")?;
    let plain = columns_beyond(json!({"method": PLAIN, "rank": 2}), "lora_B")?;
    assert_eq!((flora, plain), (0, 2));
    Ok(())
}

/// How many rows a change has outside of the space of the weight's own.
fn rows_beyond(method: Value) -> Result<usize, Failed> {
    // 24 outputs of 32 inputs: most directions of inputs are none of its rows'.
    let (before, after) = weights(method, "model.layers.1.mlp.down_proj")?;
    Ok(rank(&Tensor::cat(&[&before, &(&after - &before)?], 0)?)? - rank(&before)?)
}

/// What is multiplied from the left answers to nothing that the weight did not answer to.
fn within_rows() -> Result<(), Failed> {
    // 2 * 2 * 24 = 96 numbers against 112.
    let lorma = rows_beyond(json!({"method": "lorma", "rank": 2}))?;
    let plain = rows_beyond(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((lorma, plain), (0, 2));
    Ok(())
}

/// How many entries of a weight change, and the rank of the change.
fn entries(method: Value) -> Result<(usize, usize), Failed> {
    let (before, after) = weights(method, UP)?;
    let change = (after - before)?;
    let changed = change.flatten_all()?.to_vec1::<f64>()?.into_iter().filter(|value| *value != 0.0).count();
    Ok((changed, rank(&change)?))
}

/// As many entries as LoRA has numbers; of LoRA's change, all.
fn sparse() -> Result<(), Failed> {
    let (shira, rank_of_shira) = entries(json!({"method": "shira", "rank": 2}))?;
    let (plain, rank_of_plain) = entries(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((shira, plain), (2 * (32 + 24), 32 * 24));
    assert!(rank_of_shira > 10 && rank_of_plain == 2, "ranks {rank_of_shira} and {rank_of_plain}");
    Ok(())
}

/// The largest share of a weight's entries that a single number of a component changes.
fn reach(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(0.3);
    let at = &setup.attachments[0];
    let merged = |setup: &Setup| -> Result<Tensor, Failed> {
        let locals = attune_models::stack::locals(at, &setup.params())?;
        Ok(match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
            Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
            Merged::Weight { weight, .. } => weight,
            other => return Err(format!("{other:?} does not merge").into()),
        })
    };
    let before = merged(&setup)?;
    let mut most = 0;
    for (id, value) in setup.theta.trained() {
        let mut values = value.flatten_all()?.to_vec1::<f64>()?;
        values[0] += 10.0;
        let moved = setup.clone_with(setup.with(&id.name, Tensor::from_vec(values, value.shape(), value.device())?));
        let change = (merged(&moved)? - &before)?.flatten_all()?.to_vec1::<f64>()?;
        most = most.max(change.into_iter().filter(|value| value.abs() > 1e-6).count());
    }
    Ok(most as f64 / before.elem_count() as f64)
}

/// A number is a wave over the whole weight; of LoRA it is in a row or a column.
fn waves() -> Result<(), Failed> {
    // 56 numbers each.
    let fourierft = reach(json!({"method": "fourierft", "frequencies": 56}))?;
    let plain = reach(json!({"method": PLAIN, "rank": 1}))?;
    assert!(fourierft > 0.9, "of all entries {fourierft} change");
    assert!(plain <= 1.0 / 24.0, "of all entries {plain} change");
    Ok(())
}

/// How many numbers a component has at one linear of all layers, and the least rank of its changes there.
fn numbers_and_rank(method: Value) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "up_proj", DType::F64);
    setup.disturb(0.3);
    let numbers = setup.theta.trained().map(|(_, value)| value.elem_count()).sum();
    let mut least = usize::MAX;
    for at in &setup.attachments {
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let Merged::Factors { left, right, .. } = setup.adapter.merge(at, &locals, &*setup.weight(at)?)? else {
            return Err("it does not merge to factors".into());
        };
        least = least.min(rank(&left.matmul(&right)?)?);
    }
    assert_eq!(setup.attachments.len(), 2);
    Ok((numbers, least))
}

/// Factors that layers have in common are paid for once.
fn common_factors() -> Result<(), Failed> {
    let (of_lotr, lotr) = numbers_and_rank(json!({"method": "lotr", "rank": 3}))?;
    let (of_plain, plain) = numbers_and_rank(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((of_lotr, of_plain), (3 * 56 + 2 * 9, 2 * 2 * 56));
    assert_eq!((lotr, plain), (3, 2));
    Ok(())
}
