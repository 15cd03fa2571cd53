//! Components beside a base whose linears are held in few bits, and the start that makes up for what those lose.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use attune_adapt::ADAPTERS;
use attune_models::{Base, Model, Pass, Stack};
use attune_points::adapter::{Attachment, Port};
use attune_points::{Grads, TensorName};
use attune_spec::job::{Precision, Targets};
use attune_spec::method::{Card, MethodRef};
use attune_tensor::linalg;
use candle_core::{DType, Device, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::starts::{Started, init, logits};
use crate::support::{CrossEntropy, Setup, architecture, batch, difference, largest};
use crate::{build, fail};

type Run = fn() -> Result<(), Failed>;

const TRIALS: [(&str, Run); 4] = [
    ("loftq_starts_nearer_to_the_base_as_it_was_the_more_rounds_it_makes", nearer),
    ("loftq_with_all_ranks_starts_as_the_base_as_it_was", whole),
    ("loftq_makes_what_peft_makes", golden),
    ("loftq_is_for_few_bits_and_pairs_of_factors", refused),
];

pub(crate) fn trials() -> Vec<Trial> {
    let of_cards = ADAPTERS.cards().map(|card| {
        let name = format!("adapter::{}::beside_few_bits_it_is_what_it_is_beside_their_numbers", card.name);
        Trial::test(name, move || beside(card))
    });
    of_cards.chain(TRIALS.into_iter().map(|(name, run)| Trial::test(format!("init::{name}"), run))).collect()
}

fn format() -> MethodRef {
    MethodRef::named("nf4")
}

/// The same base with the numbers that few bits are widened to.
fn widened(base: &Base) -> Result<Base, Failed> {
    let infos = base.architecture().tensors().into_iter();
    let tensors: BTreeMap<String, Tensor> = infos
        .map(|info| Ok((info.name.clone(), base.tensor(&TensorName::from_path(&info.name), DType::F32)?)))
        .collect::<Result<_, attune_points::Error>>()?;
    Ok(Base::from_tensors(base.architecture().clone(), &tensors)?)
}

/// Outputs and gradients have the bits that they have on a base of those numbers, whatever the component reads and makes of weights.
/// Only one whose tensors stand in for such weights is for bases of whole numbers, and its card says so.
fn beside(card: &'static Card) -> Result<(), Failed> {
    let document = ADAPTERS.documents().find(|document| document.name == card.name).ok_or("no document")?;
    let few = Base::random(architecture(), 5, DType::F32)?.quantized(&format())?;
    let dense = widened(&few)?;
    let made = |base: Base| -> Result<Setup, Failed> {
        let adapter = build(crate::method(card)).map_err(fail)?;
        // A head is never held in few bits.
        let targets = Targets::from(if card.targets == "head" { "norm" } else { card.targets });
        let mut setup = Setup::on(base, adapter, &targets, card.applies, DType::F32);
        setup.disturb(0.1);
        Ok(setup)
    };
    let few = made(few)?;
    let held = |at: &Attachment| {
        few.model.base().architecture().site(at.site.as_str()).is_some_and(|site| site.place.quantizes())
    };
    let stands_in = few.attachments.iter().any(|at| matches!(few.adapter.port(at), Port::Weights) && held(at));
    assert_eq!(document.on_quantized(), Some(!stands_in), "what its card says of few bits");
    if stands_in {
        return Ok(());
    }
    let run = |setup: &Setup| -> Result<(Tensor, Grads), Failed> {
        let layout = setup.begun(&batch());
        let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
        let pass = Pass { theta: &setup.theta, layout: &layout, dropout: None };
        setup.model.grad(&pass, &CrossEntropy, 1.0, &mut sink)?;
        Ok((setup.logits(&batch())?, sink))
    };
    let ((found, gradients), (expected, others)) = (run(&few)?, run(&made(dense)?)?);
    assert_eq!(difference(&found, &expected), 0.0, "outputs");
    for (id, gradient) in gradients.iter() {
        match (gradient, others.get(id)) {
            (Some(gradient), Some(other)) => assert_eq!(difference(gradient, other), 0.0, "{id}"),
            (gradient, other) => assert_eq!(gradient.is_some(), other.is_some(), "{id}"),
        }
    }
    Ok(())
}

/// LoRA started by an initialisation, on the base that this makes.
fn started(base: Base, method: Value, start: Value) -> Result<Started, Failed> {
    let mut started = Started::with(base, (method, "all-linear"), start, &[batch()])?;
    if !started.fresh.requantized.is_empty() {
        let base = started.model.base();
        let less = started.attachments.iter().map(|at| {
            let locals = attune_models::stack::locals(at, &started.fresh.requantized)?;
            let none = Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?;
            match started.adapter.merge(at, &locals, &none)? {
                attune_points::adapter::Merged::Factors { left, right, scale } => {
                    Ok((base.tensor_name(at.site.as_str(), "weight"), (left, right, scale)))
                }
                other => Err(Failed::from(format!("{other:?} is no product"))),
            }
        });
        let base = base.requantized(less.collect::<Result<Vec<_>, Failed>>()?)?;
        let stack = Stack::new(started.model.stack().slots().to_vec());
        started.model = Model::new(Arc::new(base), stack);
    }
    Ok(started)
}

/// How far weights and pairs together are from the weights as they were: the square root of the sum of squares.
fn distance(started: &Started, exact: &Base) -> Result<f64, Failed> {
    let mut sum = 0.0;
    for (site, change) in started.changes()? {
        let name = TensorName::new(site.as_str(), "weight");
        let (was, is) = (exact.tensor(&name, DType::F64)?, started.model.base().tensor(&name, DType::F64)?);
        sum += (was - (is + change)?)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}

/// Plain QLoRA starts with what few bits lose; this with less of it, and more rounds never with more. So outputs are nearer to
/// those of the base as it was, where a start with zeros beside the same base is as far off as few bits are.
fn nearer() -> Result<(), Failed> {
    let exact = || Base::random(architecture(), 5, DType::F32);
    let few = || -> Result<Base, Failed> { Ok(exact()?.quantized(&format())?) };
    let lora = || json!({"method": "lora", "rank": 4, "alpha": 8});
    let plain = started(few()?, lora(), json!({"method": "kaiming"}))?;
    let whole = Model::new(exact()?, Stack::default());
    let expected = logits(&whole, &attune_points::Theta::default())?;
    let off = |started: &Started| -> Result<f64, Failed> {
        Ok((logits(&started.model, &started.theta())? - &expected)?.sqr()?.sum_all()?.to_scalar::<f32>()?.into())
    };
    let (lost, far) = (distance(&plain, &exact()?)?, off(&plain)?);
    let mut last = lost;
    for iterations in [1, 2, 4, 8] {
        let started = started(few()?, lora(), json!({"method": "loftq", "iterations": iterations}))?;
        assert_eq!(started.fresh.requantized.is_empty(), iterations == 1, "one round leaves the base as it is");
        let (left, nearer) = (distance(&started, &exact()?)?, off(&started)?);
        assert!(left < 0.9 * lost && left <= last, "{iterations} rounds leave {left} of {lost}, fewer {last}");
        assert!(nearer < 0.9 * far, "{iterations} rounds: outputs are off by {nearer}, without by {far}");
        last = left;
    }
    Ok(())
}

/// With as many ranks as a matrix has, nothing is lost.
fn whole() -> Result<(), Failed> {
    let exact = || Base::random(architecture(), 5, DType::F32);
    let few = exact()?.quantized(&format())?;
    let sites = few.architecture().sites();
    let narrowest = sites.iter().filter(|site| site.place.quantizes()).filter_map(|site| site.out_in());
    let rank = narrowest.map(|(output, input)| output.min(input)).min().ok_or("no linear")?;
    let started = started(few, json!({"method": "lora", "rank": rank, "alpha": 3}), json!({"method": "loftq"}))?;
    for (site, change) in started.changes()? {
        let name = TensorName::new(site.as_str(), "weight");
        let (was, is) = (exact()?.tensor(&name, DType::F64)?, started.model.base().tensor(&name, DType::F64)?);
        let lost = (&was - &is)?;
        let left: f64 = (&lost - &change)?.sqr()?.sum_all()?.to_scalar()?;
        // The singular values beyond the rank, which a matrix of the narrowest kind has none of.
        let all: Vec<f64> = linalg::svd(&lost)?.s.to_vec1()?;
        let rest: f64 = all[rank.min(all.len())..].iter().map(|value| value * value).sum();
        assert!((left - rest).abs() < 1e-9 + 1e-5 * rest, "{site}: {left} is left, {rest} had to be");
        assert!(largest(&change) > 1e-4, "{site} starts with nothing");
    }
    Ok(())
}

fn golden() -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for iterations in [1, 3] {
        let file = here.join(format!("golden/starts/loftq_{iterations}.safetensors"));
        let expected: BTreeMap<_, _> = candle_core::safetensors::load(file, &Device::Cpu)?.into_iter().collect();
        let base = Base::open_quantized(&here.join("../models/golden/llama"), Precision::F32, &format())?;
        let lora = json!({"method": "lora", "rank": 4, "alpha": 4});
        let started = started(base, lora, json!({"method": "loftq", "iterations": iterations}))?;
        let changes = started.changes()?;
        for (name, expected) in expected {
            let (kind, site) = name.split_once('.').ok_or("no kind")?;
            let off = match kind {
                "quantized" => {
                    let found = started.model.base().tensor(&TensorName::new(site, "weight"), DType::F32)?;
                    difference(&found, &expected)
                }
                _ => {
                    let (_, change) = changes.iter().find(|(found, _)| found == site).ok_or("no such site")?;
                    difference(change, &expected)
                }
            };
            assert!(off < 1e-5 * largest(&expected).max(0.1), "{iterations} rounds, {name}: off by {off}");
        }
    }
    Ok(())
}

fn refused() -> Result<(), Failed> {
    let base = || Base::random(architecture(), 5, DType::F32);
    let start = || json!({"method": "loftq"});
    let lora = json!({"method": "lora", "rank": 4});
    let error = |of: Result<Started, Failed>| of.err().map(|error| format!("{error:?}")).unwrap_or_default();
    let on_whole = error(Started::with(base()?, (lora.clone(), "q_proj"), start(), &[batch()]));
    assert!(on_whole.contains("is not held in few bits, so there is nothing to make up for"), "{on_whole}");
    let few = base()?.quantized(&format())?;
    let on_head = error(Started::with(few, (lora, "lm_head"), start(), &[batch()]));
    assert!(on_head.contains("lm_head is not held in few bits"), "{on_head}");
    let few = base()?.quantized(&format())?;
    let other = error(Started::with(few, (json!({"method": "dora"}), "q_proj"), start(), &[batch()]));
    assert!(other.contains("is for a pair of factors"), "{other}");
    assert!(!init(start())?.requantizes() && init(json!({"method": "loftq", "iterations": 2}))?.requantizes());
    Ok(())
}
