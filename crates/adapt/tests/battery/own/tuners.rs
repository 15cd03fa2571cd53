//! Of PEFT's newer tuners.

use attune_adapt::ADAPTERS;
use attune_models::Pass;
use attune_models::dropout::Dropout;
use attune_points::Layout;
use attune_points::adapter::{Merged, Port, RowCx};
use attune_points::{Grads, TensorName};
use attune_spec::method::SiteKind;
use attune_tensor::linalg;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, rank, reach};
use crate::support::{CrossEntropy, Setup, batch, difference, largest};
use crate::{build, fail, gradient_of, merged_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("beft::what_it_adds_is_there_when_nothing_is_read", added_to_nothing),
    ("deft::a_linear_gives_nothing_in_directions_that_were_taken_out", taken_out),
    ("lily::one_tensor_changes_the_first_layer_and_the_last", layers_share),
    ("osf::gradients_leave_the_leading_directions_alone", leading_left_alone),
    ("peanut::columns_of_zeros_stay", columns_of_zeros),
    ("pvera::a_step_sees_noise_of_its_own_and_an_answer_none", noisy),
    ("supertuning::its_parameters_are_the_largest_entries_and_nothing_else_changes", largest_entries),
    ("tuners::every_form_has_exact_gradients_and_merges", forms),
    ("tuners::what_does_not_fit_a_linear_is_refused_with_what_would", refusals),
    ("unilora::a_single_number_changes_every_linear", single_number),
];

/// A linear of 32 outputs and 24 inputs, and a square one.
const UP: &str = "model.layers.1.mlp.up_proj";
const QUERIES: &str = "model.layers.1.self_attn.q_proj";

/// A component at a site, moved from its start.
fn moved(method: Value, site: &str) -> Result<Setup, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, site, DType::F64);
    setup.disturb(0.3);
    Ok(setup)
}

/// What becomes of a weight in place of its own.
fn merged(setup: &Setup, weight: &Tensor) -> Result<Tensor, Failed> {
    let at = &setup.attachments[0];
    let locals = attune_models::stack::locals(at, &setup.params())?;
    Ok(match setup.adapter.merge(at, &locals, weight)? {
        Merged::Factors { left, right, scale } => (weight + (left.matmul(&right)? * scale)?)?,
        Merged::Weight { weight, .. } => weight,
        other => return Err(format!("{other:?} does not merge").into()),
    })
}

/// What a component adds to a linear that reads zeros.
fn of_nothing(method: Value) -> Result<f64, Failed> {
    let setup = moved(method, UP)?;
    let at = &setup.attachments[0];
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let layout = Layout::new();
    let cx = RowCx { site: &at.site, output: 32, dropout: None, layout: &layout, rows: None };
    let Port::Delta(map) = setup.adapter.port(at) else { return Err("it adds nothing to rows".into()) };
    let x = Tensor::zeros((2, 24), DType::F64, &candle_core::Device::Cpu)?;
    Ok(largest(&map.graph(&x, &locals, &cx)?))
}

fn added_to_nothing() -> Result<(), Failed> {
    let (bias, plain) = (of_nothing(json!({"method": "beft"}))?, of_nothing(json!({"method": PLAIN, "rank": 1}))?);
    assert!(bias > 0.1 && plain == 0.0, "{bias} and {plain}");
    Ok(())
}

/// The rank of a square weight with a component, moved from its start.
fn rank_left(method: Value) -> Result<usize, Failed> {
    let setup = moved(method, QUERIES)?;
    let weight = setup.weight(&setup.attachments[0])?.dense(DType::F64)?;
    rank(&merged(&setup, &weight)?)
}

fn taken_out() -> Result<(), Failed> {
    let deft = json!({"method": "deft", "rank": 4, "projector": "qr", "remove_only": true});
    let (deft, plain) = (rank_left(deft)?, rank_left(json!({"method": PLAIN, "rank": 2}))?);
    assert_eq!((deft, plain), (20, 24));
    Ok(())
}

/// How much of the gradient of a component's left factor lies in the weight's leading direction, against its size.
fn along_leading(method: Value, factor: &str) -> Result<f64, Failed> {
    let setup = moved(method, UP)?;
    let at = &setup.attachments[0];
    let layout = batch();
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    setup.model.grad(&Pass { theta: &setup.theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let name = TensorName::new(at.site.as_str(), factor);
    let (id, _) = setup.theta.trained().find(|(id, _)| id.name == name).ok_or("no such factor")?;
    let gradient = sink.get(&id).ok_or("no gradient")?;
    let leading = linalg::svd(&setup.weight(at)?.dense(DType::F64)?)?.truncated(1)?.u;
    Ok(largest(&leading.t()?.matmul(gradient)?) / largest(gradient))
}

fn leading_left_alone() -> Result<(), Failed> {
    let osf = along_leading(json!({"method": "osf"}), "osf_U")?;
    let plain = along_leading(json!({"method": PLAIN, "rank": 2}), "lora_B")?;
    // Vectors are kept in 32 bits.
    assert!(osf < 1e-5 && plain > 0.01, "{osf} and {plain}");
    Ok(())
}

/// How much a component changes a column of zeros.
fn column_of_zeros(method: Value) -> Result<f64, Failed> {
    let setup = moved(method, UP)?;
    let weight = setup.weight(&setup.attachments[0])?.dense(DType::F64)?;
    let kept = weight.narrow(1, 1, 23)?;
    let weight = Tensor::cat(&[&kept.narrow(1, 0, 1)?.zeros_like()?, &kept], 1)?;
    let merged = merged(&setup, &weight)?;
    assert!(largest(&(&merged - &weight)?) > 0.01, "nothing moved");
    Ok(largest(&merged.narrow(1, 0, 1)?))
}

fn columns_of_zeros() -> Result<(), Failed> {
    let peanut = column_of_zeros(json!({"method": "peanut", "rank": 4, "depth": 1, "activation": "silu"}))?;
    let plain = column_of_zeros(json!({"method": PLAIN, "rank": 4}))?;
    assert!(peanut == 0.0 && plain > 0.01, "{peanut} and {plain}");
    Ok(())
}

/// How many entries of a weight change, how many of these are among as many of its largest, and how many numbers train.
fn entries(method: Value) -> Result<[usize; 3], Failed> {
    let setup = moved(method, UP)?;
    let numbers: usize = setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum();
    let weight = setup.weight(&setup.attachments[0])?.dense(DType::F64)?;
    let change = (merged(&setup, &weight)? - &weight)?.flatten_all()?.to_vec1::<f64>()?;
    let sizes = weight.abs()?.flatten_all()?.to_vec1::<f64>()?;
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|a, b| sizes[*b].total_cmp(&sizes[*a]));
    let changed = change.iter().filter(|change| **change != 0.0).count();
    let leading = order.iter().take(numbers).filter(|at| change[**at] != 0.0).count();
    Ok([changed, leading, numbers])
}

fn largest_entries() -> Result<(), Failed> {
    // A rank of 1 has 56 numbers, and so have 56 of 768 entries.
    let of_largest = entries(json!({"method": "supertuning", "sparsity": 0.927}))?;
    let plain = entries(json!({"method": PLAIN, "rank": 1}))?;
    assert_eq!((of_largest, plain), ([56; 3], [768, 56, 56]));
    Ok(())
}

/// How far apart what a component adds in two steps of training is, and in two answers.
fn noise(method: Value) -> Result<[f64; 2], Failed> {
    let setup = moved(method, UP)?;
    let layout = batch();
    let logits = |dropout| setup.model.logits(&Pass { theta: &setup.theta, layout: &layout, dropout });
    let step = |step| Some(Dropout { seed: 1, step });
    Ok([difference(&logits(step(1))?, &logits(step(2))?), difference(&logits(None)?, &logits(None)?)])
}

fn noisy() -> Result<(), Failed> {
    let [trained, answered] = noise(json!({"method": "pvera", "rank": 6}))?;
    let [plain, _] = noise(json!({"method": PLAIN, "rank": 1}))?;
    assert!(trained > 0.01 && answered == 0.0 && plain == 0.0, "{trained}, {answered} and {plain}");
    Ok(())
}

fn layers_share() -> Result<(), Failed> {
    let of = |method: Value| reach(method, "all-linear", &[SiteKind::Linear]);
    let (lily, plain) = (of(json!({"method": "lily", "rank": 4}))?, of(json!({"method": PLAIN, "rank": 2}))?);
    assert_eq!((lily, plain), (2, 1));
    Ok(())
}

/// How many linears one number changes, the first of a component's first trained tensor.
fn reached_by_one(method: Value) -> Result<usize, Failed> {
    let setup = moved(method, "all-linear")?;
    let (id, value) = setup.theta.trained().next().ok_or("nothing trains")?;
    let one: Vec<f64> = (0..value.elem_count()).map(|at| f64::from(u8::from(at == 0))).collect();
    let other = (value + Tensor::from_vec(one, value.shape(), value.device())?)?;
    let stepped = setup.clone_with(setup.with(&id.name, other));
    let mut changed = 0;
    for at in &setup.attachments {
        let product = |setup: &Setup| -> Result<Tensor, Failed> {
            let locals = attune_models::stack::locals(at, &setup.params())?;
            match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
                Merged::Factors { left, right, scale } => Ok((left.matmul(&right)? * scale)?),
                other => Err(format!("{other:?} has no factors").into()),
            }
        };
        changed += usize::from(difference(&product(&stepped)?, &product(&setup)?) > 1e-6);
    }
    Ok(changed)
}

fn single_number() -> Result<(), Failed> {
    let unilora = reached_by_one(json!({"method": "unilora", "rank": 2, "numbers": 13}))?;
    let plain = reached_by_one(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!((unilora, plain), (14, 1));
    Ok(())
}

fn forms() -> Result<(), Failed> {
    for method in [
        json!({"method": "deft", "rank": 2, "projector": "qr", "alpha": 1}),
        json!({"method": "deft", "rank": 2, "projector": "qr", "remove_only": true}),
        json!({"method": "deft", "rank": 4, "remove_only": true}),
        json!({"method": "osf", "preserved_rank": 9, "project": false}),
        json!({"method": "peanut", "rank": 4, "depth": 2, "activation": "silu", "scaling": 0.5}),
        json!({"method": "peanut", "rank": 4, "depth": 1, "activation": "gelu"}),
        json!({"method": "peanut", "rank": 4, "activation": "gelu_new"}),
        json!({"method": "peanut", "rank": 4, "depth": 3, "activation": "tanh"}),
        json!({"method": "supertuning", "sparsity": 0.9, "support": "smallest", "rank": 2, "alpha": 3}),
        json!({"method": "lily", "rank": 3, "stride": 2, "experts": 3, "scaling": 0.5, "route": "token"}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

fn refusals() -> Result<(), Failed> {
    for (method, start) in [
        (json!({"method": "deft", "rank": 33}), "`rank` is 33; model.layers.1.mlp.up_proj gives 32 numbers"),
        (json!({"method": "osf", "preserved": 0.01}), "`preserved` makes 0 of the 24 singular triples of"),
        (json!({"method": "osf", "preserved_rank": 24}), "`preserved_rank` makes 24 of the 24 singular triples of"),
        (
            json!({"method": "supertuning", "sparsity": 0.9999}),
            "`sparsity` is 0.9999, which leaves none of the 768 entries",
        ),
        (json!({"method": "supertuning", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24"),
        (
            json!({"method": "supertuning", "alpha": 4}),
            "`tune.adapter.alpha` scales a low-rank change, and `rank` is 0",
        ),
        (
            json!({"method": "unilora", "rank": 1, "numbers": 57}),
            "`numbers` is 57, more than the 56 that the factors have in all",
        ),
    ] {
        let faults = match build(method.clone()) {
            Err(faults) => faults,
            Ok(adapter) => {
                let architecture = crate::support::architecture();
                let sites = architecture.sites();
                let up: Vec<_> = sites.into_iter().filter(|site| site.id.as_str() == UP).collect();
                let faults = adapter.attach(&architecture, &up).err().ok_or_else(|| format!("{method} is accepted"))?;
                faults.iter().map(ToString::to_string).collect()
            }
        };
        assert!(faults[0].starts_with(start), "{method}: {faults:?}");
    }
    Ok(())
}
