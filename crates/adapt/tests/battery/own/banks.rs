//! Of changes by few numbers within what is fixed: a weight's own vectors, banks of vectors, places that are drawn.

use std::collections::BTreeMap;

use attune_adapt::ADAPTERS;
use attune_models::{Base, Model, Pass};
use attune_points::adapter::{Attachment, Merged};
use attune_points::{TensorName, Theta};
use attune_spec::job::Targets;
use attune_spec::method::SiteKind;
use attune_tensor::linalg;
use candle_core::{DType, Device, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, rank};
use crate::support::{self, Setup, batch, difference, largest};
use crate::{build, cost_of, fail, gradient_of, merged_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("banks::every_form_has_exact_gradients_and_merges", forms),
    ("banks::options_have_exact_gradients_merge_and_count_their_tensors", options),
    ("banks::what_does_not_fit_a_linear_is_refused_with_what_would", refusals),
    ("clover::one_of_a_pair_stands_for_both", pairs),
    ("clover::a_heads_rows_stay_in_the_span_of_its_own", own_rows),
    ("kasa::where_nothing_trained_yet_the_smallest_singular_values_are_gone", smallest_gone),
    ("loldu::a_change_of_full_rank_is_a_diagonal_between_triangles", between_triangles),
    ("nora::a_change_stays_in_the_leading_directions_from_as_many_numbers_at_any_width", nested),
    ("psoft::rows_keep_their_lengths_and_angles_within_the_leading_directions", turned_within),
    ("sltrain::its_change_reaches_all_entries_and_a_rank_beyond_loras", sparse_and_low),
    ("svft::a_change_of_full_rank_keeps_the_singular_vectors", singular_vectors),
    ("tinylora::thirteen_numbers_change_every_linear", thirteen),
    ("vblora::pieces_of_all_factors_are_mixtures_of_few_vectors", pieces),
    ("waveft::few_numbers_change_small_patches_and_the_change_has_high_rank", patches),
];

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

/// How far the products of all rows of a weight with each other change, against the largest; how far a change reaches beyond its
/// `leading` directions, against its size; and its numbers.
fn turned_beyond(method: Value, leading: usize) -> Result<(f64, f64, usize), Failed> {
    let (weight, change, numbers) = changed(method)?;
    let gram = |w: &Tensor| w.matmul(&w.t()?);
    let before = gram(&weight)?;
    let products = largest(&(gram(&(&weight + &change)?)? - &before)?) / largest(&before);
    let v = linalg::svd(&weight)?.truncated(leading)?.v;
    let within = change.matmul(&v.t()?)?.matmul(&v)?;
    Ok((products, largest(&(within - &change)?) / largest(&change), numbers))
}

fn turned_within() -> Result<(), Failed> {
    let psoft = json!({"method": "psoft", "rank": 8, "scale_in": false, "scale_out": false});
    let (products, beyond, numbers) = turned_beyond(psoft, 8)?;
    let (plain_products, plain_beyond, plain_numbers) = turned_beyond(json!({"method": PLAIN, "rank": 1}), 8)?;
    assert!(numbers <= plain_numbers, "{numbers} trained numbers against {plain_numbers}");
    // Factors are kept in 32 bits.
    assert!(products < 1e-5 && beyond < 1e-5, "products of rows change by {products}, directions by {beyond}");
    assert!(plain_products > 0.01 && plain_beyond > 0.1, "{plain_products} and {plain_beyond}");
    Ok(())
}

/// The rank of all pieces, this long, of all factors at all linears of the model; and how many of them there are.
fn rank_of_pieces(method: Value, length: usize) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "all-linear", DType::F64);
    setup.disturb(0.3);
    let mut pieces = Vec::new();
    for at in &setup.attachments {
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let Merged::Factors { left, right, .. } = setup.adapter.merge(at, &locals, &*setup.weight(at)?)? else {
            return Err("no factors".into());
        };
        for rows in [left.t()?.contiguous()?, right] {
            pieces.push(rows.reshape((rows.elem_count() / length, length))?);
        }
    }
    let pieces = Tensor::cat(&pieces, 0)?;
    Ok((rank(&pieces)?, pieces.dim(0)?))
}

fn pieces() -> Result<(), Failed> {
    let (banked, count) = rank_of_pieces(json!({"method": "vblora", "rank": 2, "vectors": 3, "length": 4}), 4)?;
    let (plain, plain_count) = rank_of_pieces(json!({"method": PLAIN, "rank": 2}), 4)?;
    assert!(count == plain_count && count > 100);
    assert_eq!((banked, plain), (3, 4));
    Ok(())
}

/// How many entries of a weight change, the rank of the change, and how many trained numbers make it.
fn entries_rank_and_numbers(method: Value) -> Result<(usize, usize, usize), Failed> {
    let (_, change, numbers) = changed(method)?;
    let entries = change.flatten_all()?.to_vec1::<f64>()?.into_iter().filter(|entry| entry.abs() > 0.0).count();
    Ok((entries, rank(&change)?, numbers))
}

fn patches() -> Result<(), Failed> {
    let (entries, own, numbers) =
        entries_rank_and_numbers(json!({"method": "waveft", "frequencies": 56, "scaling": 2}))?;
    let (plain_entries, plain, plain_numbers) = entries_rank_and_numbers(json!({"method": PLAIN, "rank": 1}))?;
    assert_eq!((numbers, plain_numbers), (56, 56));
    assert!(entries <= 4 * 56 && plain_entries == 32 * 24, "{entries} and {plain_entries} entries");
    assert!(own >= 12 && plain == 1, "rank {own} and {plain}");
    Ok(())
}

/// What makes 1 of a matrix of full rank, from one side.
fn undone(matrix: &Tensor) -> Result<Tensor, Failed> {
    let own = linalg::svd(matrix)?;
    Ok(own.v.t()?.broadcast_div(&own.s)?.matmul(&own.u.t()?)?)
}

/// How far a change goes beyond the diagonal between the triangles of the weight's elimination, against its size; its rank; its
/// numbers.
fn beside_the_pivots(method: Value) -> Result<(f64, usize, usize), Failed> {
    let (weight, change, numbers) = changed(method)?;
    let (l, u) = linalg::lu(&weight)?;
    let between = undone(&l)?.matmul(&change)?.matmul(&undone(&u)?)?;
    let one = Tensor::eye(between.dim(0)?, DType::F64, &Device::Cpu)?;
    Ok((largest(&(&between * (1.0 - one)?)?) / largest(&between), rank(&change)?, numbers))
}

fn between_triangles() -> Result<(), Failed> {
    let (own, own_rank, own_numbers) = beside_the_pivots(json!({"method": "loldu", "rank": 24}))?;
    let (plain, plain_rank, plain_numbers) = beside_the_pivots(json!({"method": PLAIN, "rank": 1}))?;
    assert!(own_numbers <= plain_numbers && own_rank == 24 && plain_rank == 1);
    // They are kept in 32 bits.
    assert!(own < 1e-4 && plain > 0.1, "{own} and {plain} of the change are beside the diagonal");
    Ok(())
}

/// How many singular values of the weight at [`UP`] are nothing, with a component as it starts.
fn singular_values_gone(method: Value) -> Result<usize, Failed> {
    let setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let Merged::Factors { left, right, scale } = setup.adapter.merge(at, &locals, &weight)? else {
        return Err("no factors".into());
    };
    let left = linalg::svd(&(&weight + (left.matmul(&right)? * scale)?)?)?.s.to_vec1::<f64>()?;
    // What is taken out is kept in 32 bits.
    Ok(left.iter().filter(|value| **value < 1e-6 * left[0]).count())
}

fn smallest_gone() -> Result<(), Failed> {
    let (own, plain) = (
        singular_values_gone(json!({"method": "kasa", "rank": 4}))?,
        singular_values_gone(json!({"method": PLAIN, "rank": 4}))?,
    );
    assert_eq!((own, plain), (4, 0));
    Ok(())
}

fn nested() -> Result<(), Failed> {
    let method = json!({"method": "nora", "rank": 12, "inner_rank": 2});
    let (_, beyond, numbers) = turned_beyond(method, 12)?;
    let (_, plain_beyond, plain_numbers) = turned_beyond(json!({"method": PLAIN, "rank": 1}), 12)?;
    assert!((numbers, plain_numbers) == (2 * 12 * 2, 32 + 24));
    // The outer pair is kept in 32 bits.
    assert!(beyond < 1e-5 && plain_beyond > 0.1, "{beyond} and {plain_beyond} beside the directions");
    Ok(())
}

/// How many linears of the model a component, moved from its start, changes; and how many trained numbers it has in all.
fn linears_and_numbers(method: Value) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "all-linear", DType::F64);
    setup.disturb(0.3);
    let mut linears = 0;
    for at in &setup.attachments {
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let Merged::Factors { left, right, scale } = setup.adapter.merge(at, &locals, &*setup.weight(at)?)? else {
            return Err("no factors".into());
        };
        linears += usize::from(largest(&(left.matmul(&right)? * scale)?) > 1e-3);
    }
    Ok((linears, setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum()))
}

fn thirteen() -> Result<(), Failed> {
    let (linears, numbers) = linears_and_numbers(json!({"method": "tinylora", "numbers": 13, "tying": 1.0}))?;
    let (plain_linears, plain_numbers) = linears_and_numbers(json!({"method": PLAIN, "rank": 1}))?;
    assert!(linears == plain_linears && linears == 14);
    assert!(numbers == 13 && plain_numbers > 13, "{plain_numbers} is the least of {PLAIN}");
    Ok(())
}

fn sparse_and_low() -> Result<(), Failed> {
    // 56 numbers in factors and 56 entries.
    let method = json!({"method": "sltrain", "rank": 1, "density": 0.073});
    let (entries, own, numbers) = entries_rank_and_numbers(method)?;
    let (plain_entries, plain, plain_numbers) = entries_rank_and_numbers(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((numbers, plain_numbers), (112, 112));
    assert!(entries == plain_entries && entries == 32 * 24);
    assert!(own >= 12 && plain == 2, "rank {own} and {plain}");
    Ok(())
}

/// Options of methods that change what trains, or what it starts as: exact gradients, one with what is merged, and as many numbers as their cards say.
fn options() -> Result<(), Failed> {
    for method in [
        json!({"method": "clover", "block": 4, "core": "diagonal"}),
        json!({"method": "loldu", "rank": 6, "start": "normal"}),
        json!({"method": "loldu", "rank": 6, "start": "constant"}),
        json!({"method": "lorma", "rank": 2, "kind": "plain", "side": "input"}),
        json!({"method": "lorma", "kind": "complete"}),
        json!({"method": "lorma", "kind": "complete", "side": "input"}),
        json!({"method": "mora", "rank": 2, "form": "group"}),
        json!({"method": "mora", "rank": 2, "form": "group_share"}),
        json!({"method": "mora", "rank": 2, "form": "share", "every": 5}),
        json!({"method": "nora", "rank": 6, "inner_rank": 2, "alpha": 2, "reconstruct": true}),
        json!({"method": "nora", "rank": 6, "inner_rank": 2, "alpha": 2, "inputs": true}),
        json!({"method": "sltrain", "rank": 2, "replaces": true}),
        json!({"method": "spectral-ft", "rank": 6, "inner_rank": 2, "truncate_residual": true}),
        json!({"method": "svft", "bands": 1, "rank": 5, "refill": true}),
        json!({"method": "svft", "bands": 1, "start": "kaiming"}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        cost_of(card, &method).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

/// Values and outputs in pairs: one half of each has tensors, it starts as the base, and what is merged is what it computes.
fn pairs() -> Result<(), Failed> {
    let method = json!({"method": "clover", "block": 6, "pairs": true});
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let targets = Targets::Many(["q_proj", "k_proj", "v_proj", "o_proj"].map(str::to_owned).to_vec());
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &targets, &[SiteKind::Linear], DType::F64);
    let has = |at: &Attachment| at.tensors.iter().any(|spec| spec.local == "clover_L");
    let of_pairs = setup.attachments.iter().filter(|at| has(at)).map(|at| at.site.as_str()).collect::<Vec<_>>();
    assert_eq!(of_pairs, ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]);
    assert_eq!(setup.attachments.len(), 6);
    let off = Pass { theta: &setup.theta.adapters_off(), layout: &batch(), dropout: None };
    assert_eq!(difference(&setup.logits(&batch())?, &setup.model.logits(&off)?), 0.0);
    setup.disturb(0.1);
    let unmerged = setup.logits(&batch())?;
    let base = setup.model.base();
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for info in base.architecture().tensors() {
        tensors.insert(info.name.clone(), base.tensor(&TensorName::from_path(&info.name), DType::F64)?);
    }
    for at in &setup.attachments {
        let site = base.architecture().site(at.site.as_str()).ok_or("no site")?;
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let Merged::Weight { weight, bias } = setup.adapter.merge(at, &locals, &base.weight(&site))? else {
            return Err("no weight".into());
        };
        tensors.insert(format!("{}.weight", at.site), weight);
        tensors.insert(format!("{}.bias", at.site), bias.ok_or("no bias")?);
    }
    let merged = Model::new(Base::from_tensors(base.architecture().clone(), &tensors)?, Default::default()).in_f64();
    let merged = merged.logits(&Pass { theta: &Theta::default(), layout: &batch(), dropout: None })?;
    assert!(difference(&merged, &unmerged) < 1e-12 * (1.0 + largest(&unmerged)));
    let architecture = support::architecture();
    let refused = |block: u32, site: &str| -> Result<String, Failed> {
        let adapter = build(json!({"method": "clover", "block": block, "pairs": true})).map_err(fail)?;
        let site = architecture.site(site).ok_or("no site")?;
        let faults = adapter.attach(&architecture, &[site]).err().ok_or("accepted")?;
        Ok(faults[0].to_string())
    };
    let alone = refused(6, "model.layers.0.self_attn.o_proj")?;
    assert!(alone.starts_with("`targets` names model.layers.0.self_attn.o_proj without the linear"), "{alone}");
    let narrow = refused(4, "model.layers.0.self_attn.v_proj")?;
    assert!(narrow.starts_with("`block` is 4; heads of model.layers.0.self_attn.v_proj are 6 wide"), "{narrow}");
    Ok(())
}

/// Forms beside those that the battery sees by itself.
fn forms() -> Result<(), Failed> {
    for method in [
        json!({"method": "kasa", "rank": 3, "alpha": 3, "beta": 0, "gamma": 0}),
        json!({"method": "loldu", "rank": 6, "alpha": 6, "train_scale": false, "start": "uniform"}),
        json!({"method": "nora", "rank": 6, "inner_rank": 2, "alpha": 2, "outer": "plain", "iterations": 8}),
        json!({"method": "psoft", "rank": 4, "terms": 5, "bound": 0.2, "split": "balanced"}),
        json!({"method": "psoft", "rank": 4, "orthogonal": false, "scale_in": false}),
        json!({"method": "svft", "bands": 2, "rank": 5}),
        json!({"method": "svft", "bands": 2, "pattern": "random"}),
        json!({"method": "tinylora", "rank": 3, "numbers": 5, "tying": 1.0}),
        json!({"method": "vblora", "rank": 2, "vectors": 5, "length": 2, "top": 3}),
        json!({"method": "vblora", "rank": 2, "vectors": 5, "length": 2, "top": 1}),
        json!({"method": "vectorfit", "biases": false}),
        json!({"method": "waveft", "frequencies": 50, "scaling": 2, "wavelet": "db3"}),
        json!({"method": "waveft", "frequencies": 50, "scaling": 2, "wavelet": "none"}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

fn refusals() -> Result<(), Failed> {
    for (method, start) in [
        (json!({"method": "clover", "block": 5}), "`block` is 5, which does not divide 32, the output width of"),
        (
            json!({"method": "clover", "block": 32}),
            "`block` is 32, more rows than model.layers.1.mlp.up_proj has inputs, 24",
        ),
        (
            json!({"method": "kasa", "rank": 24}),
            "`rank` is 24, and model.layers.1.mlp.up_proj is 32 by 24: none of its 24",
        ),
        (json!({"method": "loldu", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (json!({"method": "loldu", "alpha": 0}), "`tune.adapter.alpha` is 0, with which no number has an effect"),
        (
            json!({"method": "nora", "rank": 4, "inner_rank": 5}),
            "`tune.adapter.inner_rank` is more than there are directions",
        ),
        (json!({"method": "psoft", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (json!({"method": "psoft", "terms": 1}), "`tune.adapter.terms` is 1, with which nothing turns"),
        (json!({"method": "psoft", "orthogonal": false, "terms": 4}), "`tune.adapter.terms` is for turns"),
        (json!({"method": "psoft", "bound": 0.5}), "`tune.adapter.bound` is for a series"),
        (json!({"method": "roselora", "begins": 0.9}), "`tune.adapter.begins` is after `ends`"),
        (json!({"method": "sltrain", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (json!({"method": "svft", "bands": 24}), "`bands` is 24, beside the diagonal of a matrix 24 wide"),
        (json!({"method": "tinylora", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (json!({"method": "vblora", "length": 7}), "`length` is 7, which does not divide the widths of"),
        (json!({"method": "vblora", "top": 300}), "`tune.adapter.top` is more than the bank has"),
        (
            json!({"method": "waveft"}),
            "`frequencies` is 2592; model.layers.1.mlp.up_proj is 32 by 24, so 768 is the most",
        ),
        (
            json!({"method": "waveft", "frequencies_pattern": {"x": 0}}),
            "`tune.adapter.frequencies_pattern` has 0 for \"x\"",
        ),
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
    Ok(())
}

/// How far the change of a block of rows goes beyond the span of these rows, against its size; and its numbers.
fn beyond_own_rows(method: Value, block: usize) -> Result<(f64, usize), Failed> {
    let (weight, change, numbers) = changed(method)?;
    let mut beyond = 0.0f64;
    for start in (0..weight.dim(0)?).step_by(block) {
        let (rows, moved) = (weight.narrow(0, start, block)?, change.narrow(0, start, block)?);
        let v = linalg::svd(&rows)?.v;
        let within = moved.matmul(&v.t()?)?.matmul(&v)?;
        beyond = beyond.max(largest(&(within - &moved)?) / largest(&moved));
    }
    Ok((beyond, numbers))
}

fn own_rows() -> Result<(), Failed> {
    let (own, numbers) = beyond_own_rows(json!({"method": "clover", "block": 8}), 8)?;
    let (plain, plain_numbers) = beyond_own_rows(json!({"method": PLAIN, "rank": 5}), 8)?;
    assert!(numbers == 32 * 8 && numbers <= plain_numbers);
    assert!(own < 1e-12 && plain > 0.1, "{own} and {plain} of the change are beyond the rows");
    Ok(())
}
