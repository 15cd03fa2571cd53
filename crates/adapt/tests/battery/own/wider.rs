//! Of tuners whose change is no low-rank sum at linears alone.

use attune_adapt::ADAPTERS;
use attune_models::{Base, Pass};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Layout, Row, TensorName};
use attune_spec::job::Targets;
use attune_spec::method::SiteKind;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, change, rank};
use crate::support::{self, Setup, difference};
use crate::{build, fail, gradient_of, merged_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("trainable_tokens::a_text_without_its_tokens_has_the_logits_of_all_others", others_stay),
    ("glora::a_column_of_numbers_changes_a_weight_by_all_ranks", all_ranks),
    ("adamss::rows_of_one_group_change_along_one_direction_and_those_of_all_along_more", grouped),
    ("frod::few_numbers_change_a_weight_by_all_ranks", turned_basis),
    ("poly::a_text_is_another_one_to_another_task", tasks_apart),
    ("wider::every_form_has_exact_gradients_and_merges", forms),
    ("bdlora::what_its_halves_change_has_nothing_in_common", halves),
];

/// A linear of 32 outputs and 24 inputs.
const UP: &str = "model.layers.1.mlp.up_proj";

/// How many logits of a text without the tokens 5, 30 and 2 a component, moved from its start, changes; and how many numbers train.
fn logits_changed(method: Value, targets: &str, applies: &[SiteKind]) -> Result<(usize, usize), Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), applies, DType::F64);
    setup.disturb(0.3);
    let mut layout = Layout::new();
    layout.push(Source::default(), [3u32, 9, 31, 9, 17].map(|token| (Row::Token(token), NO_LABEL)));
    let without = setup.theta.adapters_off();
    let [with, without] =
        [&setup.theta, &without].map(|theta| setup.model.logits(&Pass { theta, layout: &layout, dropout: None }));
    let off = (with? - without?)?.abs()?.max(0)?.to_vec1::<f64>()?;
    let numbers = setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum();
    Ok((off.into_iter().filter(|off| *off > 1e-9).count(), numbers))
}

fn others_stay() -> Result<(), Failed> {
    let tokens = json!({"method": "trainable-tokens", "tokens": [5, 30, 2]});
    let own = logits_changed(tokens, "all", &[SiteKind::Embedding])?;
    let plain = logits_changed(json!({"method": PLAIN, "rank": 1}), UP, &[SiteKind::Linear])?;
    // The head has the table as its weight.
    assert_eq!((own, plain), ((3, 72), (37, 56)));
    Ok(())
}

/// The rank of the change of a weight by a component, moved from its start, and how many numbers it trains.
fn rank_of_change(method: Value) -> Result<(usize, usize), Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(0.3);
    let numbers = setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum();
    Ok((rank(&change(&setup)?)?, numbers))
}

fn all_ranks() -> Result<(), Failed> {
    let glora = rank_of_change(json!({"method": "glora", "weight": "vector"}))?;
    let plain = rank_of_change(json!({"method": PLAIN, "rank": 1}))?;
    assert_eq!((glora, plain), ((24, 64), (1, 56)));
    Ok(())
}

fn turned_basis() -> Result<(), Failed> {
    let frod = rank_of_change(json!({"method": "frod"}))?;
    let plain = rank_of_change(json!({"method": PLAIN, "rank": 1}))?;
    assert_eq!((frod, plain), ((24, 29), (1, 56)));
    Ok(())
}

/// The rank of the change of a weight as a whole, and of its rows of one group; LoRA's are all of one.
fn grouped_ranks(method: Value) -> Result<[usize; 3], Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(0.3);
    let change = change(&setup)?;
    let name = TensorName::new(UP, "adamss_groups");
    let groups: Vec<f64> = match setup.params().get(&name) {
        Some(groups) => groups.to_dtype(DType::F64)?.to_vec1()?,
        None => vec![0.0; 32],
    };
    let mut most = 0;
    for group in 0..4 {
        let rows: Vec<u32> = (0..32u32).filter(|row| groups[*row as usize] == f64::from(group)).collect();
        if !rows.is_empty() {
            most = most.max(rank(&change.index_select(&Tensor::new(rows, change.device())?, 0)?)?);
        }
    }
    let numbers = setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum();
    Ok([rank(&change)?, most, numbers])
}

fn grouped() -> Result<(), Failed> {
    let adamss = grouped_ranks(json!({"method": "adamss", "rank": 6, "subspaces": 4}))?;
    let plain = grouped_ranks(json!({"method": PLAIN, "rank": 1}))?;
    assert_eq!((adamss, plain), ([4, 1, 56], [1, 1, 56]));
    Ok(())
}

/// How far logits of one text as a document of two domains are from each other.
fn apart_by_domain(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, UP, DType::F64);
    setup.disturb(0.3);
    let logits = |domain: u16| -> Result<Tensor, Failed> {
        let mut layout = Layout::new();
        let source = Source { domain, ..Source::default() };
        layout.push(source, [3u32, 9, 31, 9, 17].map(|token| (Row::Token(token), NO_LABEL)));
        Ok(setup.model.logits(&Pass { theta: &setup.theta, layout: &layout, dropout: None })?)
    };
    Ok(difference(&logits(0)?, &logits(1)?))
}

fn tasks_apart() -> Result<(), Failed> {
    let poly = apart_by_domain(json!({"method": "poly", "rank": 1, "tasks": 2, "skills": 2}))?;
    let plain = apart_by_domain(json!({"method": PLAIN, "rank": 2}))?;
    assert!(poly > 1e-4 && plain == 0.0, "{poly} and {plain}");
    Ok(())
}

fn forms() -> Result<(), Failed> {
    for method in [
        json!({"method": PLAIN, "rank": 3, "alpha": 5, "trains": "b"}),
        json!({"method": "glora", "rank": 2, "coupling": "vector", "bias": "vector"}),
        json!({"method": "glora", "weight": "vector", "coupling": "none"}),
        json!({"method": "glora", "weight": "constant", "bias": "none"}),
        json!({"method": "adamss", "rank": 5, "subspaces": 1, "subspace_rank": 2}),
        json!({"method": "adamss", "rank": 24, "subspaces": 2, "subspace_rank": 3, "least": 0.5}),
        json!({"method": "frod", "density": 0.2}),
        json!({"method": "frod", "density": 0}),
        json!({"method": "poly", "rank": 2, "skills": 3, "splits": 4}),
        json!({"method": "poly", "rank": 2, "tasks": 3, "skills": 2, "splits": 2, "task": 0}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

/// The rank of a change, and those of its halves, of outputs or of inputs.
fn of_halves(method: Value, site: &str, dim: usize) -> Result<[usize; 3], Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, site, DType::F64);
    setup.disturb(0.3);
    let change = super::change(&setup)?;
    let half = change.dim(dim)? / 2;
    let part = |at: usize| rank(&change.narrow(dim, at * half, half)?.contiguous()?);
    Ok([rank(&change)?, part(0)?, part(1)?])
}

fn halves() -> Result<(), Failed> {
    for (site, dim) in [("model.layers.1.mlp.up_proj", 0), ("model.layers.1.mlp.down_proj", 1)] {
        // 160 numbers and 168.
        let blocks = of_halves(json!({"method": "bdlora", "rank": 4, "blocks": 2}), site, dim)?;
        let plain = of_halves(json!({"method": PLAIN, "rank": 3}), site, dim)?;
        assert_eq!((blocks, plain), ([4, 2, 2], [3, 3, 3]), "{site}");
        let outer = of_halves(json!({"method": "bdlora", "rank": 4, "blocks": 2, "side": "outer"}), site, 1 - dim)?;
        assert_eq!(outer, [4, 2, 2], "{site}");
    }
    Ok(())
}
