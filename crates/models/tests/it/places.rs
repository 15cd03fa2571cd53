//! Components that add to rows of documents by their places.

use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site};
use attune_models::generate::generate;
use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PlacesMap, Port, SequenceMap};
use attune_points::generate::Sampling;
use attune_points::{
    Error, Grads, Layout, Locals, Owner, Result, Row, Rows, TensorId, TensorName, TensorSpec, Theta, Weight,
};
use attune_spec::Fault;
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};

use crate::passes::{DROPOUT, MIXTURE, TINY, TOLERANCE, bank, documents, low_rank, model, off, prefix, run, set};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::random;

/// Learned positions and a norm on the embedding, norms after what a block adds to the stream, rows that see all others.
const BERT: &str = r#"{
    "model_type": "bert", "architectures": ["BertForTokenClassification"], "hidden_size": 36, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 41, "max_position_embeddings": 64, "num_labels": 41,
    "layer_norm_eps": 1e-3, "initializer_range": 0.2
}"#;

/// `length` rows before each document, if any, and rows added at `places` where the stream enters each of these; `rows_pd ∘ scale_d`.
struct Deep {
    length: usize,
    places: (usize, usize),
    at: fn(&Site) -> bool,
}

fn deep(length: usize, places: (usize, usize)) -> Arc<dyn Adapter> {
    Arc::new(Deep { length, places, at: |site| site.place == Place::Attention })
}

/// The same without rows of its own, at the table of tokens too.
fn shallow(places: (usize, usize)) -> Arc<dyn Adapter> {
    Arc::new(Deep { length: 0, places, at: |site| matches!(site.place, Place::Attention | Place::Embedding) })
}

impl Adapter for Deep {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let is_table = site.place == Place::Embedding && self.length > 0;
            let count = if is_table { self.length } else { self.places.1 };
            let tensors =
                vec![TensorSpec::trained("rows", [count, arch.hidden]), TensorSpec::trained("scale", [arch.hidden])];
            (is_table || (self.at)(site)).then(|| Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if self.length > 0 && at.site.as_str().contains("embed") { Port::Sequence(self) } else { Port::Places(self) }
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} keeps its weight", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

fn made(tensors: &Locals) -> Result<Tensor> {
    Ok(tensors.get("rows")?.broadcast_mul(tensors.get("scale")?)?)
}

impl SequenceMap for Deep {
    fn length(&self) -> usize {
        self.length
    }

    fn graph(&self, tensors: &Locals) -> Result<Tensor> {
        made(tensors)
    }
}

impl PlacesMap for Deep {
    fn places(&self) -> (usize, usize) {
        self.places
    }

    fn graph(&self, tensors: &Locals) -> Result<Tensor> {
        made(tensors)
    }
}

/// What is added where the stream enters the first attention is what is added to the embeddings, row by row, written out: the third to
/// fifth of a component's own two rows and a document's, whatever other components put before.
#[test]
fn rows_are_added_where_the_places_say() {
    let first: fn(&Site) -> bool = |site| site.place == Place::Attention && site.layer == Some(0);
    let components = || -> Vec<Arc<dyn Adapter>> {
        let others = Deep { length: 3, places: (0, 1), at: |_| false };
        vec![Arc::new(others), Arc::new(Deep { length: 2, places: (1, 3), at: first })]
    };
    for graphs in [false, true] {
        let views = model(TINY, DType::F32, components());
        let theta = Theta::single((0..2).map(|slot| bank(vec![set(&views, slot, 1)])));
        let model = if graphs { model(TINY, DType::F32, components()).by_graphs() } else { views };
        let layout = documents(&[0, 3]).begun_with(&model.rows_before(&theta));
        let found = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();

        let id = |local: &str| TensorId {
            owner: Owner::Bank { slot: 1, set: 0 },
            name: TensorName::new("model.layers.0.self_attn", local),
        };
        let value = |local: &str| theta.get(&id(local)).unwrap();
        let added = value("rows").broadcast_mul(value("scale")).unwrap();
        let added: Vec<Vec<f32>> = added.to_vec2().unwrap();
        let mut without = theta.clone();
        without.put(&id("rows"), value("rows").zeros_like().unwrap());
        let mut input = vec![vec![0.0f32; 36]; layout.n_rows()];
        for doc in layout.docs() {
            // Three rows of another component, two of its own, then the document's: its second, third and fourth row.
            for (at, row) in added.iter().enumerate() {
                input[doc.rows.start as usize + 3 + 1 + at].clone_from(row);
            }
        }
        let input = Tensor::new(input, &Device::Cpu).unwrap();
        let expected = without.with_input(input);
        let expected = model.logits(&Pass { theta: &expected, layout: &layout, dropout: None }).unwrap();
        assert!(difference(&found, &expected) < 1e-5 * largest(&expected), "by graphs: {graphs}");
        let plain = model.logits(&Pass { theta: &theta.adapters_off(), layout: &documents(&[0, 3]), dropout: None });
        assert_eq!(plain.unwrap().dim(0).unwrap() + 10, layout.n_rows());
    }
}

#[test]
fn their_gradient_agrees_with_central_differences() {
    let model = model(TINY, DType::F32, vec![deep(3, (1, 4)), low_rank(2, 0.0, true), shallow((2, 2))]).in_f64();
    let wide = |slot| Arc::new(set(&model, slot, 1).map(|_, tensor| tensor.to_dtype(DType::F64)).unwrap());
    let theta = Theta::single((0..3).map(|slot| bank(vec![wide(slot)])));
    let layout = documents(&[0, 1, 2]).begun_with(&model.rows_before(&theta));
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink).unwrap();
    let (mut rng, step) = (Rng::new(1, "directions"), 1e-5);
    let mut compared = 0;
    for (id, value) in theta.trained().filter(|(id, _)| ["rows", "scale"].contains(&id.name.local())) {
        let direction = rng.normal_tensor(value.shape(), 1.0, DType::F64).unwrap();
        let loss = |sign: f64| {
            let mut theta = theta.clone();
            theta.put(&id, (value + (&direction * (sign * step)).unwrap()).unwrap());
            model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap().loss_sum
        };
        let numeric = (loss(1.0) - loss(-1.0)) / (2.0 * step);
        let exact = (sink.get(&id).unwrap() * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((numeric - exact).abs() <= 1e-7 * (1.0 + exact.abs()), "{id}: {numeric} against {exact}");
        compared += 1;
    }
    // The table and two attentions, of two components.
    assert_eq!(compared, 12);
}

#[test]
fn their_gradients_and_logits_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE, BERT] {
        let components = || vec![deep(3, (0, 3)), low_rank(2, 0.3, true), prefix(2), shallow((1, 3))];
        let (fast, graphs) =
            (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
        let all = Theta::single((0..4).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])));
        let first = documents(&[0, 1]).begun_with(&fast.rows_before(&all));
        let before = fast.rows_before(&all);
        // Some documents have the rows of one set, some of another, some none.
        let second = Layout::concat(&[
            documents(&[2]).begun_with(&before),
            documents(&[3]).begun_with(&[]),
            documents(&[4]).begun_with(&before),
        ]);
        let docs = second.docs();
        let mut apart = all.clone();
        apart.bindings[0].rows = Rows::Segments(vec![(docs[0].rows.clone(), 1), (docs[2].rows.clone(), 0)]);
        apart.bindings[3].rows = Rows::Segments(vec![(docs[1].rows.clone(), 1)]);
        for dropout in [None, DROPOUT] {
            let passes =
                [Pass { theta: &all, layout: &first, dropout }, Pass { theta: &apart, layout: &second, dropout }];
            let (found, expected) = (run(&fast, &passes, Keep::All), run(&graphs, &passes, Keep::All));
            for ((found, report), (expected, by_graphs)) in found.iter().zip(&expected) {
                let off = off(found, expected);
                assert!(off < TOLERANCE, "{dropout:?}: off by a factor of {off}: {config}");
                assert!((report.loss_sum - by_graphs.loss_sum).abs() < TOLERANCE * by_graphs.loss_sum);
            }
        }
        let pass = Pass { theta: &apart, layout: &second, dropout: None };
        let (found, expected) = (fast.logits(&pass).unwrap(), graphs.logits(&pass).unwrap());
        assert!(difference(&found, &expected) < TOLERANCE * largest(&expected), "{config}");
    }
}

#[test]
fn a_part_has_the_same_bits_alone_beside_others_and_recomputed() {
    let model = model(TINY, DType::F32, vec![deep(3, (0, 5)), low_rank(3, 0.2, true), shallow((1, 2))]);
    let thetas: Vec<Theta> =
        (0..3).map(|seed| Theta::single((0..3).map(|slot| bank(vec![set(&model, slot, seed)])))).collect();
    let before: Vec<Row> = model.rows_before(&thetas[0]);
    let layouts = [&[0, 1][..], &[2, 3, 4], &[5]].map(|examples| documents(examples).begun_with(&before));
    let passes: Vec<Pass<'_>> =
        thetas.iter().zip(&layouts).map(|(theta, layout)| Pass { theta, layout, dropout: DROPOUT }).collect();
    let bits = |found: Vec<(Grads, attune_points::engine::LossReport)>| -> Vec<Vec<u32>> {
        let of = |tensor: Option<&Tensor>| tensor.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let grads = |grads: &Grads| grads.iter().flat_map(|(_, tensor)| of(tensor)).map(f32::to_bits).collect();
        found.iter().map(|(found, _)| grads(found)).collect()
    };
    let together = bits(run(&model, &passes, Keep::All));
    let alone: Vec<_> = passes.iter().flat_map(|pass| bits(run(&model, &[*pass], Keep::All))).collect();
    assert!(together == alone, "neighbours change bits");
    assert!(together == bits(run(&model, &passes, Keep::Inputs)), "running blocks again changes bits");
}

/// With a cache, rows that go through later have the places that they have in the whole text: some beyond the prompt's are reached by
/// a token that the model gave itself.
#[test]
fn texts_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE] {
        let components = || vec![deep(3, (1, 30)), deep(2, (0, 4)), shallow((3, 9))];
        let (fast, graphs) =
            (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
        let theta = Theta::single((0..3).map(|slot| bank(vec![set(&fast, slot, 1)])));
        let prompt: Vec<u32> = (0..5).map(|i| (i * 5 + 3) % 41).collect();
        let sampling = Sampling { max_tokens: 16, ..Sampling::default() };
        let [found, expected] =
            [&fast, &graphs].map(|model| generate(model, &theta, &prompt, &sampling, |_| true).unwrap());
        assert_eq!(found, expected, "{config}");
        let off = |model: &Model| generate(model, &theta.adapters_off(), &prompt, &sampling, |_| true).unwrap();
        assert_ne!(off(&fast), found, "{config}: nothing was added");
    }
}
