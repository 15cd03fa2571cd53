//! Components at the linears of a model: their gradient, what they merge to, which rows they apply to, their dropout.

use std::sync::Arc;

use attune_architecture::{Architecture, SiteId};
use attune_models::dropout::Dropout;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Merged};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{
    Bank, BankKind, Binding, Error, Grads, Layout, Params, Row, Rows, TensorId, TensorName, Theta, Weight as _,
};
use attune_tensor::{Rng, ops};
use candle_core::{DType, Device, Tensor};

use crate::low_rank::{LowRank, Rescaled, Turned};
use crate::support::{CrossEntropy, difference};
use crate::whole::{Bottleneck, Prefix};

const TINY: &str = r#"{
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false, "rope_theta": 100.0, "initializer_range": 0.5
}"#;

fn base() -> Base {
    Base::random(Architecture::from_json(TINY.as_bytes()).unwrap(), 5, DType::F64).unwrap()
}

/// A model with a slot of [`LowRank`] on every linear, the head's among them.
fn model() -> Model {
    model_of(Arc::new(LowRank { rank: 2, dropout: 0.4, fused: true }))
}

fn model_of(component: Arc<dyn Adapter>) -> Model {
    let base = base();
    let attachments = component.attach(base.architecture(), &base.architecture().sites()).unwrap();
    Model::new(base, Stack::new(vec![Slot::new(component, attachments)])).in_f64()
}

/// Random values of the slot's tensors.
fn set(model: &Model, seed: u64) -> Arc<Params> {
    let slot = &model.stack().slots()[0];
    let mut params = Params::new();
    for at in slot.attachments() {
        let site = model.base().architecture().site(at.site.as_str()).unwrap();
        let mut rng = Rng::new(seed, "test").named(at.site.as_str());
        let (locals, _) = slot.adapter().init(at, &model.base().weight(&site), &mut rng).unwrap();
        for spec in &at.tensors {
            params.insert(spec.name(at.site.as_str()), locals.get(spec.local).unwrap().clone());
        }
    }
    Arc::new(params)
}

fn theta(sets: Vec<Arc<Params>>, rows: Rows) -> Theta {
    let bank = Bank { slot: "skill".into(), kind: BankKind::Adapter, sets, train: true };
    Theta { banks: vec![bank], bindings: vec![Binding { slot: 0, rows }], ..Theta::default() }
}

/// Documents by the number of their example: the same example has the same tokens in every layout.
fn documents(examples: &[u64]) -> Layout {
    let mut layout = Layout::new();
    for &example in examples {
        let mut rng = Rng::new(9, "document").sub(example);
        let ids: Vec<u32> = (0..4 + example % 3).map(|_| rng.below(11) as u32).collect();
        let rows = ids.iter().enumerate().map(|(row, &id)| {
            let label = if row == 1 { NO_LABEL } else { ids.get(row + 1).copied().unwrap_or(NO_LABEL) };
            (Row::Token(id), label)
        });
        layout.push(Source { example, ..Source::default() }, rows.collect::<Vec<_>>());
    }
    layout
}

const DROPOUT: Option<Dropout> = Some(Dropout { seed: 4, step: 2 });

fn loss(model: &Model, theta: &Theta, layout: &Layout, dropout: Option<Dropout>) -> f64 {
    model.score(&Pass { theta, layout, dropout }, &CrossEntropy).unwrap().loss_sum
}

fn gradients(model: &Model, theta: &Theta, layout: &Layout, dropout: Option<Dropout>) -> Grads {
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&Pass { theta, layout, dropout }, &CrossEntropy, 1.0, &mut sink).unwrap();
    sink
}

#[test]
fn a_components_gradient_agrees_with_central_differences_under_dropout() {
    // Seven linears in each of two layers, and the head; two tensors each.
    assert_eq!(central_differences(&model()), 30);
}

#[test]
fn the_gradient_of_one_that_makes_a_weight_agrees_with_central_differences() {
    assert_eq!(central_differences(&model_of(Arc::new(Rescaled { rank: 2 }))), 45);
}

#[test]
fn the_gradients_of_those_at_the_ends_of_a_product_agree_with_central_differences() {
    for input in [true, false] {
        assert_eq!(central_differences(&model_of(Arc::new(Turned { input }))), 30);
    }
}

#[test]
fn the_gradients_of_those_of_whole_blocks_agree_with_central_differences() {
    assert_eq!(central_differences(&model_of(Arc::new(Bottleneck { rank: 2, dropout: 0.3 }))), 16);
    assert_eq!(central_differences(&model_of(Arc::new(Prefix { length: 3 }))), 4);
}

/// What a prefix says, a text can say: its keys and values are those of the text's rows.
#[test]
fn a_prefix_of_the_keys_and_values_of_a_text_is_that_text() {
    let plain = Model::new(base(), Stack::default()).in_f64();
    let document = documents(&[2]);
    let ids: Vec<u32> = document.rows().iter().map(|row| if let Row::Token(id) = row { *id } else { 0 }).collect();
    let (text, rest) = ids.split_at(3);
    let (off, whole, beginning) = (Theta::default(), Layout::single(&ids), Layout::single(text));
    let pass = |layout| Pass { theta: &off, layout, dropout: None };
    let expected = plain.logits(&pass(&whole)).unwrap();

    let model = model_of(Arc::new(Prefix { length: text.len() }));
    let hidden = plain.hidden(&pass(&beginning)).unwrap();
    let mut params = Params::new();
    for at in model.stack().slots()[0].attachments() {
        let layer: usize = at.site.as_str().split('.').nth(2).unwrap().parse().unwrap();
        let weight = |module: &str| {
            let name = TensorName::from_path(&format!("model.layers.{layer}.{module}.weight"));
            plain.base().tensor(&name, DType::F64).unwrap()
        };
        // Each layer is two blocks; the first reads the stream through a norm.
        let n_td = ops::rms_norm(&hidden[2 * layer], &weight("input_layernorm"), 1e-5).unwrap();
        let of = |module: &str| ops::linear(&n_td, &weight(module), None).unwrap();
        let (k, half) = (of("self_attn.k_proj").reshape((text.len(), 2, 2)).unwrap(), 1);
        let angles: Vec<f64> = (0..text.len()).map(|position| position as f64).collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().map(|angle| f(*angle)).collect();
            Tensor::from_vec(values, (text.len(), 1, half), &Device::Cpu).unwrap()
        };
        let k = ops::rope(&k, &table(f64::cos), &table(f64::sin)).unwrap().reshape((text.len(), 4)).unwrap();
        params.insert(TensorName::new(at.site.as_str(), "keys"), k);
        params.insert(TensorName::new(at.site.as_str(), "values"), of("self_attn.v_proj"));
    }
    let with = theta(vec![Arc::new(params)], Rows::All(0));
    let found = model.logits(&Pass { theta: &with, layout: &Layout::single(rest), dropout: None }).unwrap();
    let expected = expected.narrow(0, text.len(), rest.len()).unwrap();
    assert!(difference(&found, &expected) < 1e-10, "{}", difference(&found, &expected));
}

/// How many tensors were compared.
fn central_differences(model: &Model) -> usize {
    let at = theta(vec![set(model, 1)], Rows::All(0));
    let layout = documents(&[0, 1, 2, 3]);
    let found = gradients(model, &at, &layout, DROPOUT);
    let mut rng = Rng::new(1, "directions");
    let step = 1e-5;
    let mut compared = 0;
    for (id, value) in at.trained() {
        let direction = rng.normal_tensor(value.shape(), 1.0, DType::F64).unwrap();
        let moved = |sign: f64| {
            let mut params: Params = (*at.banks[0].sets[0]).clone();
            params.insert(id.name.clone(), (value + (&direction * (sign * step)).unwrap()).unwrap());
            loss(model, &theta(vec![Arc::new(params)], Rows::All(0)), &layout, DROPOUT)
        };
        let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        let gradient = found.get(&id).unwrap_or_else(|| panic!("{id} has no gradient"));
        let exact = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        // A central difference is off by O(step²) times the third derivative and by rounding of 1e-16 × loss / step.
        assert!((numeric - exact).abs() <= 1e-7 * (1.0 + exact.abs()), "{id}: {numeric} against {exact}");
        compared += 1;
    }
    compared
}

#[test]
fn a_model_with_a_component_is_the_model_with_the_merged_weights() {
    let components: [Arc<dyn Adapter>; 4] = [
        Arc::new(LowRank { rank: 2, dropout: 0.0, fused: true }),
        Arc::new(Rescaled { rank: 2 }),
        Arc::new(Turned { input: true }),
        Arc::new(Turned { input: false }),
    ];
    for component in components {
        let model = model_of(Arc::clone(&component));
        let params = set(&model, 1);
        let layout = documents(&[0, 1, 2]);
        let weights: Params = (model.stack().slots()[0].attachments())
            .map(|at| {
                let site = model.base().architecture().site(at.site.as_str()).unwrap();
                let weight = model.base().weight(&site);
                let locals = attune_models::stack::locals(at, &params).unwrap();
                let merged = match component.merge(at, &locals, &weight).unwrap() {
                    Merged::Factors { left, right, scale } => {
                        let delta = (left.matmul(&right).unwrap() * scale).unwrap();
                        (weight.dense(DType::F64).unwrap() + delta).unwrap()
                    }
                    Merged::Weight { weight, .. } => weight,
                    other => panic!("{other:?} does not merge"),
                };
                (TensorName::new(at.site.as_str(), "weight"), merged)
            })
            .collect();
        let merged = Bank { slot: "w".into(), kind: BankKind::Weights, sets: vec![Arc::new(weights)], train: false };
        let logits = |theta: &Theta| model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
        let with = logits(&theta(vec![params.clone()], Rows::All(0)));
        assert!(difference(&with, &logits(&Theta::single([merged]))) < 1e-12);
        let off = logits(&theta(vec![params], Rows::All(0)).adapters_off());
        assert_eq!(difference(&off, &logits(&Theta::default())), 0.0);
        assert!(difference(&with, &off) > 1e-2);
    }
}

#[test]
fn rows_use_the_set_that_they_are_bound_to_and_no_other() {
    bound_rows(&model(), 60);
    bound_rows(&model_of(Arc::new(Rescaled { rank: 2 })), 90);
    bound_rows(&model_of(Arc::new(Turned { input: true })), 60);
    bound_rows(&model_of(Arc::new(Turned { input: false })), 60);
}

fn bound_rows(model: &Model, tensors: usize) {
    let sets = vec![set(model, 1), set(model, 2)];
    let layout = documents(&[0, 1, 2, 3]);
    let docs = layout.docs();
    // Document 0 uses set 1, document 1 none, documents 2 and 3 use set 0.
    let segments = vec![(docs[0].rows.clone(), 1), (docs[2].rows.start..docs[3].rows.end, 0)];
    let bound = theta(sets.clone(), Rows::Segments(segments));
    let (set_0, set_1) = (theta(sets.clone(), Rows::All(0)), theta(sets, Rows::All(1)));
    let parts = [(&set_1, &[0][..]), (&Theta::default(), &[1]), (&set_0, &[2, 3])];
    let sum: f64 = parts.iter().map(|(theta, examples)| loss(model, theta, &documents(examples), DROPOUT)).sum();
    assert!((loss(model, &bound, &layout, DROPOUT) - sum).abs() < 1e-10);

    let found = gradients(model, &bound, &layout, DROPOUT);
    let alone =
        [gradients(model, &set_0, &documents(&[2, 3]), DROPOUT), gradients(model, &set_1, &documents(&[0]), DROPOUT)];
    let mut compared = 0;
    for (id, gradient) in found.iter() {
        let attune_points::Owner::Bank { set, .. } = id.owner else { panic!("{id} is no tensor of a bank") };
        let expected = alone[set as usize].get(id).unwrap();
        assert!(difference(gradient.unwrap(), expected) < 1e-11, "{id} of set {set}");
        compared += 1;
    }
    assert_eq!(compared, tensors);
}

#[test]
fn dropout_does_not_depend_on_the_pack_and_changes_with_the_step() {
    let model = model();
    let at = theta(vec![set(&model, 1)], Rows::All(0));
    let packed = loss(&model, &at, &documents(&[0, 1, 2, 3]), DROPOUT);
    let turned = loss(&model, &at, &documents(&[3, 1, 0, 2]), DROPOUT);
    let alone: f64 = (0..4).map(|example| loss(&model, &at, &documents(&[example]), DROPOUT)).sum();
    assert!((packed - turned).abs() < 1e-10 && (packed - alone).abs() < 1e-10, "{packed}, {turned}, {alone}");
    let later = loss(&model, &at, &documents(&[0, 1, 2, 3]), Some(Dropout { seed: 4, step: 3 }));
    assert!((packed - later).abs() > 1e-3);
    assert!((packed - loss(&model, &at, &documents(&[0, 1, 2, 3]), None)).abs() > 1e-3);
}

#[test]
fn a_set_that_lacks_a_tensor_of_its_component_is_named() {
    let model = model();
    let site = SiteId::new("model.layers.1.mlp.up_proj");
    let lacking: Params = (set(&model, 1).iter())
        .filter(|(name, _)| name.owner() != site.as_str() || name.local() != "up")
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .collect();
    let at = theta(vec![Arc::new(lacking)], Rows::All(0));
    let error = model.score(&Pass { theta: &at, layout: &documents(&[0]), dropout: None }, &CrossEntropy).unwrap_err();
    assert!(
        matches!(&error, Error::UnknownTensor { component, name, .. } if component == site.as_str() && name == "up")
    );
    let id =
        TensorId { owner: attune_points::Owner::Bank { slot: 0, set: 0 }, name: TensorName::new(site.as_str(), "up") };
    assert!(at.get(&id).is_none());
}
