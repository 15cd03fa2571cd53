//! Of changes that leave a part of a weight as it is: its trailing directions, its singular values, most of its entries.

use attune_adapt::ADAPTERS;
use attune_points::adapter::Merged;
use attune_tensor::linalg;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{self, Setup, largest};
use crate::{build, fail, gradient_of, merged_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("parts::every_form_has_exact_gradients_and_merges", forms),
    ("parts::what_does_not_fit_a_linear_is_refused_with_what_would", refusals),
    ("elastic_lora::in_few_bits_a_weight_has_few_values_and_what_is_merged_is_what_trained", few_bits),
    ("dsee::with_factors_at_rest_the_entries_that_stand_out_are_all_that_changes", standing_out),
    ("poet::both_sides_turn_and_singular_values_stay", turned),
    ("spectral_ft::what_is_beyond_the_leading_directions_on_both_sides_moves_by_the_square_of_what_trains", trailing),
];

/// A linear of 32 outputs and 24 inputs.
const UP: &str = "model.layers.1.mlp.up_proj";

/// The weight at [`UP`] and what a component, moved this far from its start, adds to it; and how many trained numbers it has.
fn changed(method: Value, by: f64) -> Result<(Tensor, Tensor, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(by);
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let change = match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
        Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
        Merged::Weight { weight: merged, .. } => (merged - &weight)?,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    Ok((weight, change, setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum()))
}

/// Forms beside those that the battery sees by itself.
fn forms() -> Result<(), Failed> {
    for method in [
        json!({"method": "dsee", "rank": 2, "entries": 30, "search": "random"}),
        json!({"method": "dsee", "rank": 2, "entries": 30, "prune": 0.5}),
        json!({"method": "dsee", "rank": 2, "entries": 30, "prune": 0.5, "mask_delta": true}),
        json!({"method": "dsee", "rank": 2, "entries": 30, "prune_heads": 0.5, "prune_neurons": 0.3}),
        json!({"method": "elastic-lora", "rank": 3, "smallest": 1, "alpha": 3, "masked": true}),
        json!({"method": "elastic-lora", "rank": 3, "smallest": 1, "alpha": 3, "narrowest": 0.5}),
        json!({"method": "elastic-lora", "rank": 3, "smallest": 1, "alpha": 3, "masked": true, "sparsity": 0.4}),
        json!({"method": "chain-of-lora", "ranks": [4, 2, 1]}),
        json!({"method": "svft", "pattern": "top_k", "bands": 1}),
        json!({"method": "poet", "block_size": 2, "terms": 0, "every": 0}),
        json!({"method": "poet", "block_size": 7, "cover": "single"}),
        json!({"method": "spectral-ft", "rank": 5, "inner_rank": 0}),
        json!({"method": "spectral-ft", "rank": 0, "inner_rank": 8}),
        json!({"method": "spectral-ft", "rank": 0, "inner_rank": 0}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

fn refusals() -> Result<(), Failed> {
    for (method, start) in [
        (json!({"method": "chain-of-lora", "ranks": [4, 0]}), "`tune.adapter.ranks` is [4, 0]; expected 64 links"),
        (json!({"method": "chain-of-lora", "links": 4}), "`rank` is 32; model.layers.1.mlp.up_proj is 32 by 24"),
        (
            json!({"method": "dsee", "entries": 769}),
            "`entries` is 769; model.layers.1.mlp.up_proj is 32 by 24, so 768 is the most",
        ),
        (json!({"method": "dsee", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (
            json!({"method": "dsee", "prune": 0.5, "dropout": 0.1}),
            "`tune.adapter.dropout` is for a change on rows, and where something is pruned",
        ),
        (
            json!({"method": "dsee", "prune_heads": 0.5}),
            "`prune_heads` needs linears that lead out of attentions among the targets",
        ),
        (json!({"method": "dsee", "mask_delta": true}), "`tune.adapter.mask_delta` is true, and nothing is pruned"),
        (
            json!({"method": "elastic-lora", "masked": true, "dropout": 0.1}),
            "`tune.adapter.dropout` is for a change on rows",
        ),
        (
            json!({"method": "elastic-lora", "rank": 4, "smallest": 1, "ranks": {"up_proj": 4}}),
            "`ranks` names \"up_proj\", which is none of its sites",
        ),
        (
            json!({"method": "elastic-lora", "rank": 4, "smallest": 2, "step": 1, "ranks": {UP: 1}}),
            "`ranks` has 1 for \"model.layers.1.mlp.up_proj\"; expected one of [4, 3, 2]",
        ),
        (json!({"method": "elastic-lora", "bits": 1}), "`tune.adapter.bits` is 1, with which a number and 0"),
        (
            json!({"method": "elastic-lora", "rank": 4, "smallest": 1, "step": 1, "left": "searched", "ranks": {UP: 2}}),
            "`ranks` says what is left, which is searched for",
        ),
        (json!({"method": "elastic-lora", "smallest": 33}), "`tune.adapter.smallest` is more than the largest rank"),
        (json!({"method": "poet", "terms": 1}), "`tune.adapter.terms` is 1, with which nothing turns"),
        (
            json!({"method": "poet", "block_size": 16}),
            "`block_size` is 16; model.layers.1.mlp.up_proj is 32 by 24: expected a divisor of both widths",
        ),
        (
            json!({"method": "poet", "block_size": 25, "cover": "single"}),
            "`block_size` is 25; model.layers.1.mlp.up_proj is 32 by 24: expected the smaller width at most",
        ),
        (json!({"method": "selective-lora", "before": 0.95}), "`tune.adapter.after` leaves no steps"),
        (json!({"method": "spectral-ft"}), "`rank` is 256; model.layers.1.mlp.up_proj is 32 by 24"),
        (
            json!({"method": "spectral-ft", "rank": 4, "inner_rank": 5}),
            "`inner_rank` is 5; model.layers.1.mlp.up_proj has 4 directions that change",
        ),
        (
            json!({"method": "svft", "pattern": "top_k", "rank": 5}),
            "`pattern` is `top_k`, but model.layers.1.mlp.up_proj is 32 by 24, with 5 vectors",
        ),
        (
            json!({"method": "vectorfit", "add_biases": true, "biases": false}),
            "`tune.adapter.add_biases` is true, and those that are there do not train",
        ),
        (json!({"method": "taps", "before": 0.5, "after": 0.5}), "`tune.adapter.after` leaves no steps"),
    ] {
        let found = match build(method.clone()) {
            Err(faults) => faults[0].clone(),
            Ok(adapter) => {
                let architecture = support::architecture();
                let site = architecture.site(UP).ok_or("no site")?;
                let Err(faults) = adapter.attach(&architecture, &[site]) else { return Err("accepted".into()) };
                faults[0].to_string()
            }
        };
        assert!(found.starts_with(start), "{method}: {found}");
    }
    let halves = build(json!({"method": "elastic-lora", "rank": 4, "smallest": 1, "step": 1, "ranks": {UP: 2}}));
    let architecture = support::architecture();
    let sites = [UP, "model.layers.1.mlp.gate_proj"].into_iter().filter_map(|path| architecture.site(path));
    let faults = halves.map_err(fail)?.attach(&architecture, &sites.collect::<Vec<_>>()).err().ok_or("accepted")?;
    assert!(faults[0].to_string().contains("which reads the same rows"), "{}", faults[0]);
    Ok(())
}

/// How many values the groups of a weight have at most, after what a component adds, and how many of its zeros are none any more.
fn values_of_groups(method: Value) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F32);
    setup.disturb(0.3);
    let at = setup.attachments[0].clone();
    let weight = setup.weight(&at)?.dense(DType::F32)?;
    let locals = attune_models::stack::locals(&at, &setup.params())?;
    let merged = |weight: &Tensor| match setup.adapter.merge(&at, &locals, weight)? {
        Merged::Factors { left, right, scale } => Ok((weight + (left.matmul(&right)? * scale)?)?),
        Merged::Weight { weight, .. } => Ok(weight),
        other => Err(Failed::from(format!("{other:?} does not merge"))),
    };
    // Where the weight is 0 before.
    let size = weight.abs()?.mean_all()?.to_scalar::<f32>()?;
    let holes = weight.abs()?.ge(f64::from(0.3 * size))?.to_dtype(DType::F32)?;
    let made = merged(&(&weight * &holes)?)?;
    if let attune_points::adapter::Port::Weight(map) = setup.adapter.port(&at) {
        let passed = map.graph(&(&weight * &holes)?, &locals)?;
        assert_eq!(passed.to_vec2::<f32>()?, made.to_vec2::<f32>()?, "what is merged is not what trained");
    }
    let rows = made.to_vec2::<f32>()?;
    let distinct =
        |group: &[f32]| group.iter().map(|number| number.to_bits()).collect::<std::collections::BTreeSet<_>>().len();
    let most = rows.iter().flat_map(|row| row.chunks(12)).map(distinct).max().unwrap_or_default();
    let filled = (made.ne(0.0)?.to_dtype(DType::F32)? * (1.0 - holes)?)?.sum_all()?.to_scalar::<f32>()?;
    Ok((most, filled as usize))
}

/// As many bits hold the weight with the change as held it before: a group of twelve numbers has four values, and none of its zeros is lost.
fn few_bits() -> Result<(), Failed> {
    let few = json!({
        "method": "elastic-lora", "rank": 2, "smallest": 1, "step": 1, "alpha": 2, "masked": true, "bits": 2, "group_size": 12,
    });
    let (own, filled) = values_of_groups(few)?;
    assert!(own <= 4 && filled == 0, "{own} values, {filled} zeros lost");
    let (plain, filled) = values_of_groups(json!({"method": PLAIN, "rank": 2}))?;
    assert!(plain > 6 && filled > 0, "{plain} values, {filled} zeros lost");
    Ok(())
}

/// How much of a change is between directions that are none of the weight's `leading` ones on either side, against its size; and its numbers.
fn beyond_both(method: Value, leading: usize, by: f64) -> Result<(f64, usize), Failed> {
    let (weight, change, numbers) = changed(method, by)?;
    let own = linalg::svd(&weight)?.truncated(leading)?;
    let beyond_left = (&change - own.u.matmul(&own.u.t()?.matmul(&change)?)?)?;
    let beyond = (&beyond_left - beyond_left.matmul(&own.v.t()?)?.matmul(&own.v)?)?;
    Ok((largest(&beyond) / largest(&change), numbers))
}

/// A hundredth of the way moves it by a hundredth of its share; LoRA's share is the same at any way.
fn trailing() -> Result<(), Failed> {
    // 56 + 2 * 6 numbers against 112.
    let own = |by| beyond_both(json!({"method": "spectral-ft", "rank": 6, "inner_rank": 1}), 6, by);
    let plain = |by| beyond_both(json!({"method": PLAIN, "rank": 2}), 6, by);
    let ((near, numbers), (far, _)) = (own(1e-3)?, own(1e-1)?);
    let ((plain_near, plain_numbers), _) = (plain(1e-3)?, plain(1e-1)?);
    assert!(numbers <= plain_numbers, "{numbers} trained numbers against {plain_numbers}");
    assert!(near < 1e-2 && far > 10.0 * near, "{near} and {far} of the change are beyond the leading directions");
    assert!(plain_near > 0.1, "{plain_near} of the change of {PLAIN} is beyond the leading directions");
    Ok(())
}

/// How far products of rows, products of columns and singular values change, against the largest; and the numbers that change them.
fn turned_by(method: Value) -> Result<([f64; 3], usize), Failed> {
    let (weight, change, numbers) = changed(method, 0.3)?;
    let after = (&weight + change)?;
    let rows = |w: &Tensor| w.matmul(&w.t()?);
    let columns = |w: &Tensor| w.t()?.matmul(w);
    let values = |w: &Tensor| linalg::svd(w).map(|own| own.s);
    let off = |before: Tensor, after: Tensor| Ok::<_, Failed>(largest(&(after - &before)?) / largest(&before));
    let found = [
        off(rows(&weight)?, rows(&after)?)?,
        off(columns(&weight)?, columns(&after)?)?,
        off(values(&weight)?, values(&after)?)?,
    ];
    Ok((found, numbers))
}

fn turned() -> Result<(), Failed> {
    // 56 * 7 / 2 = 196 numbers against 224.
    let ([rows, columns, values], numbers) =
        turned_by(json!({"method": "poet", "block_size": 8, "terms": 0, "every": 0}))?;
    let ([_, _, plain], plain_numbers) = turned_by(json!({"method": PLAIN, "rank": 4}))?;
    assert!(numbers <= plain_numbers, "{numbers} trained numbers against {plain_numbers}");
    assert!(rows > 0.01 && columns > 0.01, "products of rows change by {rows}, of columns by {columns}");
    assert!(values < 1e-12 && plain > 0.01, "singular values change by {values} and {plain}");
    Ok(())
}

/// How many entries of a weight a component changes whose first factor stays at its start of 0, and how many of them are among those that
/// stand out most of what is left of the weight without its leading directions.
fn entries_beside(method: Value, leading: usize) -> Result<(usize, usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    let start = setup.params();
    setup.disturb(0.3);
    for (name, tensor) in start.iter().filter(|(name, _)| name.local() == "lora_A") {
        setup.theta = setup.with(name, tensor.zeros_like()?);
    }
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let change = match setup.adapter.merge(at, &locals, &weight)? {
        Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
        Merged::Weight { weight: merged, .. } => (merged - &weight)?,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    let values = |x: &Tensor| x.abs()?.flatten_all()?.to_vec1::<f64>();
    let changed: Vec<usize> = (0..768).zip(values(&change)?).filter(|(_, by)| *by > 0.0).map(|(at, _)| at).collect();
    let own = linalg::svd(&weight)?.truncated(leading)?;
    let rest = values(&(&weight - own.u.broadcast_mul(&own.s)?.matmul(&own.v)?)?)?;
    let mut order: Vec<usize> = (0..768).collect();
    order.sort_by(|a, b| rest[*b].total_cmp(&rest[*a]));
    let among = changed.iter().filter(|at| order[..192].contains(at)).count();
    Ok((changed.len(), among, setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum()))
}

/// A quarter of all entries would be among a quarter of them by chance.
fn standing_out() -> Result<(), Failed> {
    // 56 numbers in factors and 40 entries against 112.
    let method = json!({"method": "dsee", "rank": 1, "entries": 40, "rounds": 1});
    let (own, among, numbers) = entries_beside(method, 1)?;
    let (plain, _, plain_numbers) = entries_beside(json!({"method": PLAIN, "rank": 2}), 1)?;
    assert!(numbers <= plain_numbers, "{numbers} trained numbers against {plain_numbers}");
    assert!(own == 40 && among >= 36, "{own} entries change, {among} of them stand out");
    assert_eq!(plain, 0);
    Ok(())
}
