//! Components that add to the embeddings of tokens.

use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site};
use attune_models::generate::generate;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, LookupMap, Merged, Peft, Port};
use attune_points::generate::Sampling;
use attune_points::{Error, Locals, Result, Rows, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_tensor::{Rng, ops};
use candle_core::{DType, Device, Tensor};

use crate::passes::{DROPOUT, MIXTURE, TINY, TOLERANCE, bank, documents, low_rank, model, off, run, set};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::random;

const RANK: usize = 3;

/// `up_dr down_rv[:, token]`.
struct LowRank;

fn added() -> Arc<dyn Adapter> {
    Arc::new(LowRank)
}

impl Adapter for LowRank {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let tables = sites.iter().filter(|site| site.place == Place::Embedding).map(|site| {
            let (down, up) =
                (TensorSpec::trained("down", [RANK, arch.vocab]), TensorSpec::trained("up", [arch.hidden, RANK]));
            Attachment { site: site.id.clone(), tensors: vec![down, up] }
        });
        Ok(tables.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Lookup(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} keeps its weight", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl LookupMap for LowRank {
    fn of_tokens(&self, tokens_k: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let down_kr = tensors.get("down")?.index_select(tokens_k, 1)?.t()?.contiguous()?;
        Ok(ops::linear(&down_kr, tensors.get("up")?, None)?)
    }
}

/// A model with such a component, and one whose table has all that it adds, where the head is another matrix.
fn changed(config: &str) -> (Model, Theta, Model) {
    let config = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    let architecture = Architecture::from_json(config.as_bytes()).unwrap();
    let with = model(&config, DType::F32, vec![added()]);
    let theta = Theta::single([bank(vec![set(&with, 0, 1)])]);
    let table = architecture.sites().into_iter().find(|site| site.place == Place::Embedding).unwrap().id;
    let held = |local: &str| theta.banks[0].sets[0].get(&TensorName::new(table.as_str(), local)).unwrap().clone();
    let tokens = Tensor::arange(0u32, architecture.vocab as u32, &Device::Cpu).unwrap();
    let locals = Locals::new(table.as_str(), [("down", held("down")), ("up", held("up"))]);
    let rows_vd = LowRank.of_tokens(&tokens, &locals).unwrap();
    let tensors = architecture.tensors().into_iter().map(|info| {
        let tensor = with.base().tensor(&TensorName::from_path(&info.name), DType::F32).unwrap();
        let is_table = info.name == table.weight();
        (info.name, if is_table { (tensor + &rows_vd).unwrap() } else { tensor })
    });
    let expected = Model::new(Base::from_tensors(architecture, &tensors.collect()).unwrap(), Default::default());
    (with, theta, expected)
}

#[test]
fn it_is_a_model_with_these_rows_added_to_its_table_and_to_no_head() {
    for config in [TINY, MIXTURE] {
        let (model, theta, expected) = changed(config);
        let layout = documents(&[0, 1, 2, 3]);
        let logits =
            |model: &Model, theta: &Theta| model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
        let expected = logits(&expected, &Theta::default());
        for model in [changed(config).0.by_graphs(), model] {
            let off = difference(&logits(&model, &theta), &expected) / largest(&expected);
            assert!(off < 1e-5, "off by {off}: {config}");
            assert!(difference(&logits(&model, &theta.adapters_off()), &expected) > 1e-2);
        }
    }
}

#[test]
fn a_text_is_made_as_by_a_model_with_these_rows() {
    let (model, theta, expected) = changed(TINY);
    let prompt: Vec<u32> = (0..5).map(|i| (i * 5 + 3) % 41).collect();
    let sampling = Sampling { max_tokens: 12, ..Sampling::default() };
    let made = |model: &Model, theta: &Theta| generate(model, theta, &prompt, &sampling, |_| true).unwrap();
    assert_eq!(made(&model, &theta), made(&expected, &Theta::default()));
}

#[test]
fn their_gradients_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE] {
        let components = || vec![added(), low_rank(2, 0.3, true), added()];
        let (fast, graphs) =
            (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
        let banks: Vec<_> = (0..3).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])).collect();
        let layout = documents(&[0, 1, 2, 3, 6]);
        let docs = layout.docs();
        let all = Theta::single(banks.clone());
        let mut apart = Theta::single(banks);
        apart.bindings[0].rows = Rows::Segments(vec![(docs[0].rows.clone(), 1), (docs[2].rows.clone(), 0)]);
        for theta in [&apart, &all] {
            let passes = [Pass { theta, layout: &layout, dropout: DROPOUT }];
            let (found, expected) = (run(&fast, &passes, Keep::All), run(&graphs, &passes, Keep::All));
            let off = off(&found[0].0, &expected[0].0);
            assert!(off < TOLERANCE, "off by a factor of {off}: {config}");
            let (found, expected) = (found[0].1.loss_sum, expected[0].1.loss_sum);
            assert!((found - expected).abs() < TOLERANCE * expected);
        }
    }
}

#[test]
fn rows_that_are_not_those_of_the_tokens_are_refused() {
    struct Short;
    impl LookupMap for Short {
        fn of_tokens(&self, tokens_k: &Tensor, tensors: &Locals) -> Result<Tensor> {
            LowRank.of_tokens(&tokens_k.narrow(0, 0, 1)?, tensors)
        }
    }
    struct Wrong;
    impl Adapter for Wrong {
        fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
            LowRank.attach(arch, sites)
        }

        fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
            LowRank.init(at, weight, rng)
        }

        fn port(&self, _: &Attachment) -> Port<'_> {
            Port::Lookup(&Short)
        }

        fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> Result<Merged> {
            LowRank.merge(at, tensors, weight)
        }

        fn peft(&self) -> Option<Peft> {
            None
        }
    }
    let model = model(TINY, DType::F32, vec![Arc::new(Wrong)]);
    let theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
    let layout = documents(&[0, 1]);
    let error = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap_err();
    assert!(error.to_string().contains("expected rows of 36"), "{error}");
}
