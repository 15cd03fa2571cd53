//! Components that blend what others would add to the rows of a linear.

use std::sync::Arc;

use attune_adapt::ADAPTERS;
use attune_models::{Pass, stack};
use attune_points::adapter::{Blended, Port, RowCx};
use attune_points::{Grads, Layout, Owner, Theta};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{CrossEntropy, Setup, batch, difference, largest};
use crate::{build, cost_of, fail, gradient_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("arrow::rows_choose_whom_they_go_to", sent),
    ("xlora::what_it_adds_goes_by_what_the_base_says", heard),
    ("xlora::every_form_has_exact_gradients_and_counts_its_tensors", forms),
    ("arrow_and_xlora::gradients_go_through_what_they_blend", through),
    ("arrow_and_xlora::a_document_has_the_same_logits_beside_others", apart),
];

const SITE: &str = "model.layers.1.mlp.up_proj";

/// What a component at a linear adds for rows `x_ti`, where the base by itself says `base_td`.
fn added(method: Value, x_ti: &Tensor, base_td: &Tensor) -> Result<Tensor, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, SITE, DType::F64);
    setup.disturb(0.3);
    let (at, layout) = (&setup.attachments[0], Layout::new());
    let cx = RowCx { site: &at.site, output: 32, dropout: None, layout: &layout, rows: None };
    let tensors = stack::locals(at, &setup.params())?;
    match setup.adapter.port(at) {
        Port::Delta(map) => Ok(map.graph(x_ti, &tensors, &cx)?),
        Port::Blend(map) => {
            let others = setup.model.stack().slots().iter().zip(&setup.theta.banks).skip(1);
            let mut added = Vec::new();
            for (slot, bank) in others {
                let own = slot.at(&at.site).ok_or("it is elsewhere")?;
                let Port::Delta(map) = slot.adapter().port(own) else { return Err("it adds nothing".into()) };
                added.push(map.graph(x_ti, &stack::locals(own, &bank.sets[0])?, &cx)?);
            }
            Ok(map.graph(&Blended { x_ti, added: &added, base_td: Some(base_td) }, &tensors, &cx)?)
        }
        _ => Err("it adds nothing to rows".into()),
    }
}

fn rows(name: &str) -> Result<Tensor, Failed> {
    Ok(Rng::new(5, name).normal_tensor(&[4, 24][..], 1.0, DType::F64)?)
}

/// A row chooses; LoRA is linear.
fn sent() -> Result<(), Failed> {
    let (a, b, h) = (rows("a")?, rows("b")?, rows("h")?);
    let off = |method: Value| -> Result<f64, Failed> {
        let of = |x: &Tensor| added(method.clone(), x, &h);
        let (together, apart) = (of(&(&a + &b)?)?, (of(&a)? + of(&b)?)?);
        Ok(difference(&together, &apart) / largest(&apart))
    };
    let (arrow, plain) = (off(json!({"method": "arrow", "top_k": 1}))?, off(json!({"method": PLAIN, "rank": 2}))?);
    assert!(arrow > 0.01, "off by {arrow} of what it adds");
    assert!(plain < 1e-12, "off by {plain} of what it adds");
    Ok(())
}

/// The same rows under another text of the base get something else; LoRA knows of its own rows alone.
fn heard() -> Result<(), Failed> {
    let (x, h, other) = (rows("x")?, rows("h")?, rows("other")?);
    let moved = |method: Value| -> Result<f64, Failed> {
        let (one, another) = (added(method.clone(), &x, &h)?, added(method, &x, &other)?);
        Ok(difference(&one, &another) / largest(&one))
    };
    let xlora = moved(json!({"method": "xlora"}))?;
    assert!(xlora > 0.01, "it changes by {xlora} of what it adds");
    assert_eq!(moved(json!({"method": PLAIN, "rank": 2}))?, 0.0);
    Ok(())
}

fn forms() -> Result<(), Failed> {
    let card = ADAPTERS.card("xlora").ok_or("no card")?;
    for (depth, layerwise, top) in
        [(1, false, 0), (1, true, 0), (2, false, 2), (2, true, 2), (4, true, 0), (3, false, 1)]
    {
        for (softmax, softmax_top) in [(true, false), (false, false), (false, true), (true, true)] {
            // The largest of a softmax by itself is always 1.
            if softmax_top && top < 2 {
                continue;
            }
            let method = json!({
                "method": "xlora", "adapters": 3, "depth": depth, "size": 5, "layerwise": layerwise, "top_k": top, "softmax": softmax,
                "softmax_top": softmax_top, "temperature": 0.8, "scaling": 1.3,
            });
            gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
            cost_of(card, &method).map_err(|why| format!("{method}: {why:?}"))?;
        }
    }
    let refused = |method: Value| build(method).err().map(|faults| faults.join("; ")).unwrap_or_default();
    let many = refused(json!({"method": "xlora", "top_k": 3}));
    assert!(many.starts_with("`tune.adapter.top_k` is more than there are"), "{many}");
    let none = refused(json!({"method": "xlora", "softmax_top": true}));
    assert!(none.starts_with("`tune.adapter.softmax_top` is for those that `top_k` leaves"), "{none}");
    let general = refused(json!({"method": "arrow", "general": 2}));
    assert!(general.starts_with("`tune.adapter.general` leaves no adapter to send rows to"), "{general}");
    Ok(())
}

/// Every choice of both, small.
fn blends() -> [Value; 4] {
    [
        json!({"method": "arrow", "temperature": 0.5}),
        json!({"method": "arrow", "adapters": 4, "general": 1, "top_k": 2}),
        json!({"method": "xlora", "depth": 2, "size": 5}),
        json!({"method": "xlora", "adapters": 3, "top_k": 2, "layerwise": true}),
    ]
}

fn set_up(method: Value, dtype: DType) -> Result<Setup, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "all-linear", dtype);
    setup.disturb(0.1);
    Ok(setup)
}

/// What is blended may train as well: the derivative along a random direction in each tensor against a central difference.
fn through() -> Result<(), Failed> {
    let layout = batch();
    for method in blends() {
        let setup = set_up(method.clone(), DType::F64)?;
        let mut theta = setup.theta.clone();
        theta.banks.iter_mut().for_each(|bank| bank.train = true);
        let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
        setup.model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
        let (mut rng, mut compared) = (Rng::new(4, "directions"), 0);
        for (id, value) in theta.trained().filter(|(id, _)| !matches!(id.owner, Owner::Bank { slot: 0, .. })).step_by(5)
        {
            let direction = rng.normal_tensor(value.shape(), 1.0, DType::F64)?;
            let loss = |step: f64| -> Result<f64, Failed> {
                let mut theta: Theta = theta.clone();
                let Owner::Bank { slot, .. } = id.owner else { return Err("it is of no bank".into()) };
                let moved = (value + (&direction * step)?)?;
                Arc::make_mut(&mut theta.banks[usize::from(slot)].sets[0]).insert(id.name.clone(), moved);
                let pass = Pass { theta: &theta, layout: &layout, dropout: None };
                Ok(setup.model.score(&pass, &CrossEntropy)?.loss_sum)
            };
            let exact = (sink.get(&id).ok_or("no gradient")? * &direction)?.sum_all()?.to_scalar::<f64>()?;
            // Adapters of this size bend the loss so strongly that some steps have to be small, and others would drown in rounding.
            let mut off = f64::INFINITY;
            for step in [3e-6, 3e-7, 3e-8] {
                let numeric = (loss(step)? - loss(-step)?) / (2.0 * step);
                off = off.min((numeric - exact).abs() / (1.0 + exact.abs()));
            }
            assert!(off <= 1e-6, "{method}, {id}: off by {off} of {exact}");
            compared += 1;
        }
        assert!(compared > 5, "{compared} tensors");
    }
    Ok(())
}

/// What a row gets is its own document's business, and the engine's kernels agree with the graphs.
fn apart() -> Result<(), Failed> {
    let layout = batch();
    for method in blends() {
        let (setup, exact) = (set_up(method.clone(), DType::F32)?, set_up(method.clone(), DType::F64)?);
        let (all, in_f64) = (setup.logits(&layout)?, exact.logits(&layout)?);
        assert!(difference(&all, &in_f64) < 1e-4 * largest(&in_f64), "{method}: {}", difference(&all, &in_f64));
        let first = layout.docs()[0].rows.end as usize;
        let ids: Vec<u32> = layout.rows()[..first]
            .iter()
            .map(|row| if let attune_points::Row::Token(id) = row { *id } else { 0 })
            .collect();
        let alone = exact.logits(&Layout::single(&ids))?;
        assert!(difference(&alone, &in_f64.narrow(0, 0, first)?) < 1e-10, "{method}");
    }
    Ok(())
}
