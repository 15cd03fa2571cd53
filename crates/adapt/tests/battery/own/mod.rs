//! What a method has and plain LoRA lacks: each trial runs on both, passes on the method and fails on LoRA.

mod banks;
mod blends;
mod connected;
mod drawn;
mod parts;
mod products;
mod prompts;
mod reach;
mod searches;
pub(crate) mod steps;
mod tuners;
mod turns;
mod wider;

use std::collections::BTreeSet;

use attune_adapt::ADAPTERS;
use attune_models::{Base, Pass};
use attune_points::adapter::{Merged, Port, RowCx};
use attune_points::layout::Source;
use attune_points::{Grads, Layout, Owner, Row, TensorId, TensorName, Theta};
use attune_spec::job::Targets;
use attune_spec::method::SiteKind;
use attune_tensor::{Rng, autograd};
use candle_core::{DType, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::support::{self, CrossEntropy, Setup, batch, difference, largest};
use crate::{build, cost_of, fail, gradient_of};

/// The plain member of the point.
const PLAIN: &str = "lora";

type Own = fn() -> Result<(), Failed>;

const OWN: [(&str, Own); 14] = [
    ("adalora::its_vectors_are_pulled_apart_by_themselves", pulled_apart),
    ("adapterfusion::by_itself_it_adds_nothing", nothing_alone),
    ("bottleneck_and_loramoe::what_they_add_to_a_sum_is_no_sum", no_sum),
    ("blocks::every_form_has_exact_gradients_and_counts_its_tensors", forms_at_blocks),
    ("blocks::every_form_starts_as_the_base", starts_at_blocks),
    ("compacter_and_lotr::one_tensor_changes_the_first_layer_and_the_last", shared_rule),
    ("dora::factors_turn_rows_and_leave_their_lengths", row_lengths),
    ("full::a_step_changes_weights_beyond_the_rank_of_lora", full_rank),
    ("ia3::rows_keep_their_directions", directions),
    ("road::rows_that_a_linear_gives_keep_their_lengths", turned_outputs),
    ("spiel::as_many_entries_change_as_it_has_parameters", single_entries),
    ("ln_tuning::no_matrix_changes", vectors_only),
    ("modules_to_save::a_step_changes_weights_and_biases_beyond_the_rank_of_lora", whole_modules),
    ("prefix_tuning::queries_of_a_single_row_matter", lone_row),
];

pub(crate) fn trials() -> Vec<Trial> {
    let all = OWN
        .iter()
        .chain(products::OWN.iter())
        .chain(turns::OWN)
        .chain(banks::OWN)
        .chain(blends::OWN)
        .chain(connected::OWN)
        .chain(drawn::OWN)
        .chain(parts::OWN)
        .chain(reach::OWN)
        .chain(searches::OWN)
        .chain(steps::OWN)
        .chain(tuners::OWN)
        .chain(wider::OWN)
        .chain(&prompts::OWN);
    all.map(|(name, run)| Trial::test(format!("adapter::{name}"), *run)).collect()
}

/// Every way of making, inserting and composing what a small network at a block adds, and a prefix that a perceptron makes.
fn forms() -> Vec<Value> {
    let activations = ["relu", "gelu", "silu", "tanh", "identity"];
    let compositions = ["scaled", "learned", "gated"];
    let networks = activations.iter().flat_map(|activation| compositions.iter().map(move |how| (activation, how)));
    let both = networks.flat_map(|(activation, how)| [true, false].map(|parallel| (*activation, *how, parallel)));
    let network = |(activation, how, parallel): (&str, &str, bool)| json!({"method": "bottleneck", "width": 5, "activation": activation, "composition": how, "parallel": parallel});
    both.map(network).chain([json!({"method": "prefix-tuning", "length": 3, "hidden": 6})]).collect()
}

fn forms_at_blocks() -> Result<(), Failed> {
    for method in forms() {
        let card = ADAPTERS.card(method["method"].as_str().ok_or("no name")?).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        cost_of(card, &method).map_err(|why| format!("{method}: {why:?}"))?;
    }
    let refused = |method: Value| build(method).err().map(|faults| faults.join("; ")).unwrap_or_default();
    let gated = refused(json!({"method": "bottleneck", "composition": "gated", "scale": 4}));
    assert!(gated.starts_with("`tune.adapter.scale` is a factor beside the gate"), "{gated}");
    let still = refused(json!({"method": "bottleneck", "composition": "learned", "scale": 0}));
    assert!(still.starts_with("`tune.adapter.scale` is 0"), "{still}");
    Ok(())
}

fn starts_at_blocks() -> Result<(), Failed> {
    for method in forms() {
        let card = ADAPTERS.card(method["method"].as_str().ok_or("no name")?).ok_or("no card")?;
        let setup = Setup::of(card, build(method.clone()).map_err(fail)?, DType::F32);
        let layout = batch();
        let off = Pass { theta: &setup.theta.adapters_off(), layout: &layout, dropout: None };
        let moved = difference(&setup.logits(&layout)?, &setup.model.logits(&off)?);
        assert_eq!(moved > 0.0, card.moves.is_some(), "{method} starts {moved} away from the base");
    }
    Ok(())
}

/// The numeric rank of a matrix by elimination with full pivots.
fn rank(matrix: &Tensor) -> Result<usize, Failed> {
    let mut rows: Vec<Vec<f64>> = matrix.to_dtype(DType::F64)?.to_vec2()?;
    let limit = 1e-9 * largest(matrix);
    let mut rank = 0;
    while let Some((row, col)) = (rank..rows.len())
        .flat_map(|row| (0..rows[row].len()).map(move |col| (row, col)))
        .max_by(|a, b| rows[a.0][a.1].abs().total_cmp(&rows[b.0][b.1].abs()))
        .filter(|(row, col)| rows[*row][*col].abs() > limit)
    {
        rows.swap(rank, row);
        let pivot = rows[rank].clone();
        for other in &mut rows[rank + 1..] {
            let factor = other[col] / pivot[col];
            other.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
            other[col] = 0.0;
        }
        rank += 1;
    }
    Ok(rank)
}

/// What a component adds to the weight of its first site.
fn change(setup: &Setup) -> Result<Tensor, Failed> {
    let at = &setup.attachments[0];
    let base = setup.model.base();
    let site = base.architecture().site(at.site.as_str()).ok_or("no site")?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    Ok(match setup.adapter.merge(at, &locals, &base.weight(&site))? {
        Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
        Merged::Weight { weight, .. } => (weight - own_weight(setup)?)?,
        other => return Err(format!("{other:?} does not merge").into()),
    })
}

/// The base's weight of the first site.
fn own_weight(setup: &Setup) -> Result<Tensor, Failed> {
    let base = setup.model.base();
    Ok(base.tensor(&base.tensor_name(setup.attachments[0].site.as_str(), "weight"), DType::F64)?)
}

/// How far one gradient step reaches: the rank of the change of a square weight.
fn step_rank(method: Value) -> Result<usize, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    setup.disturb(0.1);
    let layout = batch();
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    setup.model.grad(&Pass { theta: &setup.theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let mut stepped = setup.clone_with(setup.theta.clone());
    for (id, value) in setup.theta.trained() {
        let gradient = sink.get(&id).ok_or("no gradient")?;
        stepped.theta = stepped.with(&id.name, (value - (gradient * 0.1)?)?);
    }
    rank(&(change(&stepped)? - change(&setup)?)?)
}

/// LoRA's change before and after a step has rank r at most, so a step changes it by 2 r at most; a weight has no such bound.
fn full_rank() -> Result<(), Failed> {
    let bound = 2 * 2;
    let (full, plain) = (step_rank(json!({"method": "full"}))?, step_rank(json!({"method": PLAIN, "rank": 2}))?);
    assert!(full > bound, "a step of full has rank {full}");
    assert!(plain <= bound, "a step of {PLAIN} has rank {plain}");
    Ok(())
}

/// So it is of modules that are kept whole, and their biases change as well, which LoRA has none of.
fn whole_modules() -> Result<(), Failed> {
    let (bound, named) = (2 * 2, "modules-to-save");
    let rank = step_rank(json!({"method": named}))?;
    assert!(rank > bound, "a step of {named} has rank {rank}");
    let biases = |method: Value| -> Result<usize, Failed> {
        let base = Base::random(support::architecture(), 5, DType::F32)?;
        let setup =
            Setup::on(base, build(method).map_err(fail)?, &Targets::from("q_proj"), &[SiteKind::Linear], DType::F32);
        Ok(setup.theta.trained().filter(|(id, _)| id.name.local() == "bias").count())
    };
    assert_eq!((biases(json!({"method": named}))?, biases(json!({"method": PLAIN, "rank": 2}))?), (2, 0));
    Ok(())
}

/// How many layers a change of one tensor, by itself, changes what is added to the stream in: of the tensor that reaches most.
fn reach(method: Value, targets: &str, applies: &[SiteKind]) -> Result<usize, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let adapter = build(method).map_err(fail)?;
    let mut setup = Setup::on(base, adapter, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.1);
    let mut most = 0;
    for (id, _) in setup.theta.trained() {
        let users =
            setup.attachments.iter().filter(|at| at.tensors.iter().any(|t| t.name(at.site.as_str()) == id.name));
        let layers: BTreeSet<_> =
            users.filter_map(|at| setup.model.base().architecture().site(at.site.as_str())?.layer).collect();
        // Each of these layers has its share in the gradient: without the tensor's part there, it is another one.
        most = most.max(layers.len());
    }
    Ok(most)
}

fn shared_rule() -> Result<(), Failed> {
    let blocks = [SiteKind::Attention, SiteKind::Mlp];
    let (compacter, lotr, plain) = (
        reach(json!({"method": "compacter", "reduction": 4, "factors": 2}), "all", &blocks)?,
        reach(json!({"method": "lotr", "rank": 4}), "all-linear", &[SiteKind::Linear])?,
        reach(json!({"method": PLAIN, "rank": 2}), "all-linear", &[SiteKind::Linear])?,
    );
    assert_eq!((compacter, lotr, plain), (2, 2, 1));
    Ok(())
}

/// How far logits are from the base's with a component alone, moved from its start, and nothing beside it.
fn alone(method: Value, targets: &str, applies: &[SiteKind]) -> Result<f64, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.3);
    let mut theta = setup.theta.clone();
    theta.bindings.retain(|binding| binding.slot == 0);
    let layout = batch();
    let logits = |theta: &Theta| setup.model.logits(&Pass { theta, layout: &layout, dropout: None });
    Ok(difference(&logits(&theta)?, &logits(&theta.adapters_off())?))
}

/// What mixes others adds only what they do; LoRA adds by itself.
fn nothing_alone() -> Result<(), Failed> {
    let fusion = alone(json!({"method": "adapterfusion"}), "mlp", &[SiteKind::Mlp])?;
    let plain = alone(json!({"method": PLAIN, "rank": 2}), "all-linear", &[SiteKind::Linear])?;
    assert_eq!(fusion, 0.0);
    assert!(plain > 1e-3, "logits change by {plain}");
    Ok(())
}

/// How far what a component adds for the sum of two rows is from the sum of what it adds for each, against the latter; beyond what
/// it adds for nothing.
fn additivity(method: Value, targets: &str, applies: &[SiteKind]) -> Result<f64, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.3);
    let at = &setup.attachments[0];
    let tensors = attune_models::stack::locals(at, &setup.params())?;
    let (layout, mut rng) = (Layout::new(), Rng::new(5, "rows"));
    let cx = RowCx { site: &at.site, output: 32, dropout: None, layout: &layout, rows: None };
    let [a, b] = [0; 2].map(|_| rng.normal_tensor(&[4, 24][..], 1.0, DType::F64));
    let (a, b) = (a?, b?);
    let added = |x: &Tensor| match setup.adapter.port(at) {
        Port::Delta(map) => map.graph(x, &tensors, &cx),
        Port::Branch(map) => Ok((map.graph(x, x, &tensors, &cx)? - x)?),
        _ => Err(attune_points::Error::Refused("it adds nothing to rows".to_owned())),
    };
    let nothing = added(&a.zeros_like()?)?;
    let (together, apart) = ((added(&(&a + &b)?)? + nothing)?, (added(&a)? + added(&b)?)?);
    Ok(difference(&together, &apart) / largest(&apart))
}

/// A row chooses its own mixture, and an activation its own slope; LoRA is linear.
fn no_sum() -> Result<(), Failed> {
    let (linear, blocks) = ([SiteKind::Linear], [SiteKind::Attention, SiteKind::Mlp]);
    let up = "model.layers.1.mlp.up_proj";
    let mixed = additivity(json!({"method": "loramoe", "rank": 2}), up, &linear)?;
    let bent = additivity(json!({"method": "bottleneck", "reduction": 4}), "model.layers.1.mlp", &blocks)?;
    let plain = additivity(json!({"method": PLAIN, "rank": 2}), up, &linear)?;
    assert!(mixed > 0.01 && bent > 0.01, "off by {mixed} and {bent} of what they add");
    assert!(plain < 1e-12, "off by {plain} of what it adds");
    Ok(())
}

/// The largest gradient of the loss by the weight of queries in a document of one row, which by itself can attend to nothing but
/// itself.
fn lone_queries(method: Value, targets: &str, applies: &[SiteKind]) -> Result<f64, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.1);
    let mut layout = Layout::new();
    layout.push(Source::default(), [(Row::Token(3), 5)]);
    let name = TensorName::from_path("model.layers.0.self_attn.q_proj.weight");
    let id = TensorId { owner: Owner::Base, name };
    let mut sink = Grads::wanting([id.clone()]);
    setup.model.grad(&Pass { theta: &setup.theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    Ok(sink.get(&id).map_or(0.0, largest))
}

/// Keys that are there before a document give even its first row a choice; no change of weights does.
fn lone_row() -> Result<(), Failed> {
    let prefix = lone_queries(json!({"method": "prefix-tuning", "length": 3}), "all", &[SiteKind::Attention])?;
    let plain = lone_queries(json!({"method": PLAIN, "rank": 2}), "all-linear", &[SiteKind::Linear])?;
    assert!(prefix > 1e-4, "queries have a gradient of {prefix} at most");
    assert!(plain < 1e-15, "queries have a gradient of {plain}");
    Ok(())
}

/// How much the factors of a change, moved from their start, change the length of a row at most, against its length.
fn lengths_off(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    let start = setup.params();
    setup.disturb(0.3);
    for (name, tensor) in start.iter().filter(|(name, _)| !["lora_A", "lora_B"].contains(&name.local())) {
        setup.theta = setup.with(name, tensor.clone());
    }
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let merged = match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
        Merged::Factors { left, right, scale } => (&weight + (left.matmul(&right)? * scale)?)?,
        Merged::Weight { weight, .. } => weight,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    assert!(difference(&merged, &weight) > 0.1, "nothing moved");
    let lengths = |w: &Tensor| w.sqr()?.sum(1)?.sqrt();
    Ok(largest(&((lengths(&merged)? / lengths(&weight)?)? - 1.0)?))
}

/// Direction and length are apart: LoRA's factors change both.
fn row_lengths() -> Result<(), Failed> {
    let (dora, plain) =
        (lengths_off(json!({"method": "dora", "rank": 2}))?, lengths_off(json!({"method": PLAIN, "rank": 2}))?);
    // The lengths are held in 32 bits from the start on.
    assert!(dora < 1e-6, "lengths change by {dora}");
    assert!(plain > 0.01, "lengths change by {plain}");
    Ok(())
}

/// How far the rows of a component's first matrix are from orthonormal after descent along its own loss, and before.
fn apart_by_itself(method: Value) -> Result<[f64; 2], Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    setup.disturb(0.3);
    let at = setup.attachments[0].clone();
    let off = |setup: &Setup| -> Result<f64, Failed> {
        let a_ri = attune_models::stack::locals(&at, &setup.params())?.get("lora_A")?.clone();
        let product = a_ri.matmul(&a_ri.t()?)?;
        Ok(difference(&product, &Tensor::eye(product.dim(0)?, DType::F64, product.device())?))
    };
    let before = off(&setup)?;
    for _ in 0..400 {
        let plain = attune_models::stack::locals(&at, &setup.params())?;
        let leaves: Vec<(&'static str, candle_core::Var)> = at
            .tensors
            .iter()
            .map(|spec| Ok((spec.local, autograd::leaf(plain.get(spec.local)?)?)))
            .collect::<Result<_, Failed>>()?;
        let tensors = leaves.iter().map(|(local, leaf)| (*local, leaf.as_tensor().clone()));
        let locals = attune_points::Locals::new(at.site.as_str(), tensors);
        let Some(own) = setup.adapter.penalty(&at, &locals)? else { break };
        let all: Vec<&candle_core::Var> = leaves.iter().map(|(_, leaf)| leaf).collect();
        let gradients = autograd::pull(&all, &[(&own, &own.ones_like()?)])?;
        for ((local, leaf), gradient) in leaves.iter().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let name = TensorName::new(at.site.as_str(), *local);
            setup.theta = setup.with(&name, (leaf.as_tensor() - (gradient * 0.02)?)?);
        }
    }
    Ok([before, off(&setup)?])
}

/// Its own loss alone makes them orthonormal; nothing does that to LoRA's.
fn pulled_apart() -> Result<(), Failed> {
    let [before, after] = apart_by_itself(json!({"method": "adalora", "rank": 3, "target_rank": 2}))?;
    let [plain, still] = apart_by_itself(json!({"method": PLAIN, "rank": 3}))?;
    assert!(before > 0.3 && after < 0.05, "from {before} to {after}");
    assert!(plain > 0.3 && (plain - still).abs() < 1e-12, "{PLAIN}: from {plain} to {still}");
    Ok(())
}

/// How many entries of a weight a component of some parameters, moved from its start, changes; and how many parameters it has.
fn entries_changed(method: Value) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    setup.disturb(0.3);
    let at = &setup.attachments[0];
    let change = change(&setup)?.flatten_all()?.to_vec1::<f64>()?;
    let parameters = at.tensors.iter().filter(|spec| spec.train).map(|spec| spec.shape.iter().product::<usize>());
    Ok((change.iter().filter(|change| change.abs() > 0.0).count(), parameters.sum()))
}

/// A parameter is an entry; a parameter of LoRA is in a whole row or column.
fn single_entries() -> Result<(), Failed> {
    let (sparse, plain) = (
        entries_changed(json!({"method": "spiel", "density": 0.146}))?,
        entries_changed(json!({"method": PLAIN, "rank": 2}))?,
    );
    assert_eq!((sparse, plain), ((112, 112), (24 * 32, 112)));
    Ok(())
}

/// How far rows of a weight, with a component moved from its start, are from being multiples of what they were: the sine of the
/// largest angle.
fn turned_rows(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    setup.disturb(0.3);
    let weight = own_weight(&setup)?;
    let merged = (&weight + change(&setup)?)?;
    let along = ((&weight * &merged)?.sum(1)?.sqr()? / (weight.sqr()?.sum(1)? * merged.sqr()?.sum(1)?)?)?;
    Ok(largest(&(1.0 - along)?).max(0.0).sqrt())
}

/// A scale of outputs turns no row of a weight; LoRA does.
fn directions() -> Result<(), Failed> {
    let (scaled, plain) = (turned_rows(json!({"method": "ia3"}))?, turned_rows(json!({"method": PLAIN, "rank": 1}))?);
    assert!(scaled < 1e-7 && plain > 0.1, "rows turn by {scaled} and {plain}");
    Ok(())
}

/// How much the length of a row that a linear gives changes at most, against its length, by those tensors of a component that do
/// not stretch.
fn outputs_stretched(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    let start = setup.params();
    setup.disturb(0.3);
    for (name, tensor) in start.iter().filter(|(name, _)| name.local() == "road_alpha") {
        setup.theta = setup.with(name, tensor.clone());
    }
    let weight = own_weight(&setup)?;
    let merged = (&weight + change(&setup)?)?;
    assert!(difference(&merged, &weight) > 0.1, "nothing moved");
    let rows = Rng::new(5, "rows").normal_tensor(&[6, 24][..], 1.0, DType::F64)?;
    let lengths = |w: &Tensor| rows.matmul(&w.t()?)?.sqr()?.sum(1)?.sqrt();
    Ok(largest(&((lengths(&merged)? / lengths(&weight)?)? - 1.0)?))
}

/// Angles turn what a linear gives and leave its length; LoRA changes it.
fn turned_outputs() -> Result<(), Failed> {
    let (turned, plain) = (
        outputs_stretched(json!({"method": "road", "group_size": 4}))?,
        outputs_stretched(json!({"method": PLAIN, "rank": 1}))?,
    );
    assert!(turned < 1e-12 && plain > 0.01, "lengths change by {turned} and {plain}");
    Ok(())
}

/// How many matrices of a model a component on the sites that it takes by itself changes, and how many vectors.
fn changed(method: Value, targets: &str, applies: &[SiteKind]) -> Result<(usize, usize), Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.3);
    let (mut matrices, mut vectors) = (0, 0);
    for at in &setup.attachments {
        let base = setup.model.base();
        let site = base.architecture().site(at.site.as_str()).ok_or("no site")?;
        let locals = attune_models::stack::locals(at, &setup.params())?;
        match setup.adapter.merge(at, &locals, &base.weight(&site))? {
            Merged::Weight { weight, .. } if weight.dims().len() == 1 => vectors += 1,
            _ => matrices += 1,
        }
    }
    Ok((matrices, vectors))
}

/// Norms are vectors; LoRA changes matrices only.
fn vectors_only() -> Result<(), Failed> {
    let norms = changed(json!({"method": "ln-tuning"}), "all", &[SiteKind::Norm])?;
    let plain = changed(json!({"method": PLAIN, "rank": 1}), "all-linear", &[SiteKind::Linear])?;
    assert_eq!((norms, plain), ((0, 5), (14, 0)));
    Ok(())
}
