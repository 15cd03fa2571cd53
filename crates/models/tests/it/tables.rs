//! Components with rows in place of some of a table's.

use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site};
use attune_models::generate::generate;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, TableMap};
use attune_points::generate::Sampling;
use attune_points::{Error, Grads, Locals, Params, Result, Rows, TensorId, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};

use crate::passes::{DROPOUT, MIXTURE, TINY, TOLERANCE, bank, documents, low_rank, model, rescaled, run, set, weights};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::random;

const GPT2: &str = r#"{
    "model_type": "gpt2", "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 41,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2
}"#;

/// `start_kd ∘ scale_d` as rows of some tokens, in the tables at these places.
struct Own {
    tokens: Vec<u32>,
    places: &'static [Place],
}

fn own(tokens: &[u32], places: &'static [Place]) -> Arc<dyn Adapter> {
    Arc::new(Own { tokens: tokens.to_vec(), places })
}

const READ: &[Place] = &[Place::Embedding];

impl Adapter for Own {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter(|site| self.places.contains(&site.place)).map(|site| {
            let tensors = vec![
                TensorSpec::trained("start", [self.tokens.len(), arch.hidden]),
                TensorSpec::trained("scale", [arch.hidden]),
            ];
            Attachment { site: site.id.clone(), tensors }
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Table(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} keeps its weight", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl TableMap for Own {
    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn graph(&self, tensors: &Locals) -> Result<Tensor> {
        Ok(tensors.get("start")?.broadcast_mul(tensors.get("scale")?)?)
    }
}

/// A model whose table of tokens has other rows for some, and what makes the same of one that has not.
fn changed(config: &str, tokens: &[u32], by_graphs: bool) -> (Model, Theta, Model) {
    let architecture = Architecture::from_json(config.as_bytes()).unwrap();
    let base = Base::random(architecture.clone(), 5, DType::F32).unwrap();
    let table = architecture.sites().into_iter().find(|site| site.place == Place::Embedding).unwrap().id.weight();
    let rows = Rng::new(1, "rows").normal_tensor(&[tokens.len(), architecture.hidden][..], 0.3, DType::F32).unwrap();
    let tensors = architecture.tensors().into_iter().map(|info| {
        let mut tensor = base.tensor(&TensorName::from_path(&info.name), DType::F32).unwrap();
        if info.name == table {
            let mut values = tensor.to_vec2::<f32>().unwrap();
            for (token, row) in tokens.iter().zip(rows.to_vec2::<f32>().unwrap()) {
                values[*token as usize] = row;
            }
            tensor = Tensor::new(values, &Device::Cpu).unwrap();
        }
        (info.name, tensor)
    });
    let expected =
        Model::new(Base::from_tensors(architecture.clone(), &tensors.collect()).unwrap(), Default::default());
    let with = model(config, DType::F32, vec![own(tokens, READ)]);
    let with = if by_graphs { with.by_graphs() } else { with };
    let site = table.trim_end_matches(".weight");
    let params = Params::from_iter([
        (TensorName::new(site, "start"), rows),
        (TensorName::new(site, "scale"), Tensor::ones(architecture.hidden, DType::F32, &Device::Cpu).unwrap()),
    ]);
    (with, Theta::single([bank(vec![Arc::new(params)])]), expected)
}

#[test]
fn it_is_a_model_with_these_rows_in_its_table_and_in_its_tied_head() {
    for config in [TINY, MIXTURE, GPT2] {
        for by_graphs in [false, true] {
            let (model, theta, expected) = changed(config, &[30, 3, 11], by_graphs);
            let layout = documents(&[0, 1, 2, 3]);
            let logits =
                |model: &Model, theta: &Theta| model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
            let (found, expected) = (logits(&model, &theta), logits(&expected, &Theta::default()));
            let off = difference(&found, &expected) / largest(&expected);
            assert!(off < 1e-5, "by graphs: {by_graphs}, off by {off}: {config}");
            assert!(difference(&logits(&model, &theta.adapters_off()), &expected) > 1e-2);
        }
    }
}

#[test]
fn a_text_is_made_as_by_a_model_with_these_rows() {
    for config in [TINY, GPT2] {
        let (model, theta, expected) = changed(config, &[30, 3, 11], false);
        let prompt: Vec<u32> = (0..5).map(|i| (i * 5 + 3) % 41).collect();
        let sampling = Sampling { max_tokens: 12, ..Sampling::default() };
        let made = |model: &Model, theta: &Theta| generate(model, theta, &prompt, &sampling, |_| true).unwrap();
        assert_eq!(made(&model, &theta), made(&expected, &Theta::default()));
    }
}

#[test]
fn their_gradients_are_those_of_the_graphs() {
    let both: &[Place] = &[Place::Embedding, Place::Head];
    for (config, places) in [(TINY, READ), (GPT2, READ), (MIXTURE, both)] {
        // Two components have a row for token 7, and one stands beside what is added to a head.
        let components =
            || vec![own(&[30, 7, 3], places), low_rank(2, 0.3, true), own(&[11, 7], places), low_rank(3, 0.0, false)];
        let (fast, graphs) =
            (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
        let banks: Vec<_> = (0..4).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])).collect();
        let layout = documents(&[0, 1, 2, 3, 6]);
        let docs = layout.docs();
        let mut apart = Theta::single(banks.clone());
        apart.bindings[0].rows = Rows::Segments(vec![(docs[0].rows.clone(), 1), (docs[2].rows.clone(), 0)]);
        apart.bindings[2].rows = Rows::Segments(vec![(docs[1].rows.start..docs[3].rows.end, 1)]);
        let all = Theta::single(banks.into_iter().chain([weights(&fast)]));
        for theta in [&apart, &all] {
            for dropout in [None, DROPOUT] {
                let passes = [Pass { theta, layout: &layout, dropout }];
                let (found, expected) = (run(&fast, &passes, Keep::All), run(&graphs, &passes, Keep::All));
                let off = off_of_occurring(&found[0].0, &expected[0].0);
                assert!(off < TOLERANCE, "{dropout:?}: off by a factor of {off}: {config}");
                let (found, expected) = (found[0].1.loss_sum, expected[0].1.loss_sum);
                assert!((found - expected).abs() < TOLERANCE * expected);
            }
        }
    }
}

/// The largest relative difference; rows of tokens that do not occur have no gradient by the graphs, and zeros on views.
fn off_of_occurring(found: &Grads, expected: &Grads) -> f64 {
    let off = |(id, expected): (&TensorId, Option<&Tensor>)| match (found.get(id), expected) {
        (Some(found), Some(expected)) => difference(found, expected) / largest(expected).max(1e-9),
        (Some(found), None) => largest(found),
        (None, None) => 0.0,
        (None, Some(_)) => panic!("{id} has a gradient by the graphs alone"),
    };
    expected.iter().map(off).fold(0.0, f64::max)
}

#[test]
fn a_part_has_the_same_bits_alone_beside_others_and_recomputed() {
    let model = model(TINY, DType::F32, vec![own(&[30, 7, 3], READ), low_rank(3, 0.2, true)]);
    let thetas: Vec<Theta> =
        (0..3).map(|seed| Theta::single((0..2).map(|slot| bank(vec![set(&model, slot, seed)])))).collect();
    let layouts = [&[0, 1][..], &[2, 3, 4], &[5]].map(documents);
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

#[test]
fn another_weight_of_the_same_head_is_refused() {
    let components = vec![own(&[3], READ), rescaled(2)];
    let (fast, graphs) = (model(TINY, DType::F32, components.clone()), model(TINY, DType::F32, components).by_graphs());
    let layout = documents(&[0]);
    for model in [fast, graphs] {
        let theta = Theta::single((0..2).map(|slot| bank(vec![set(&model, slot, 1)])));
        let error = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap_err();
        assert!(error.to_string().contains("has rows of a component in its table"), "{error}");
    }
}
