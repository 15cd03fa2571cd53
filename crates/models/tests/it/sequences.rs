//! Components with rows of their own before each document.

use std::sync::Arc;

use attune_architecture::{Architecture, HeadKind, Place, PooledRow, Pooling, Site};
use attune_models::generate::generate;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, SequenceMap};
use attune_points::generate::Sampling;
use attune_points::layout::{Column, LOGP, Values};
use attune_points::{Error, Grads, Layout, Locals, Params, Result, Row, Rows, TensorName, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

use crate::passes::{
    DROPOUT, MIXTURE, TINY, TOLERANCE, bank, base, documents, low_rank, model, model_over, off, prefix, run, set,
    weights,
};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::random;

const GPT2: &str = r#"{
    "model_type": "gpt2", "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 41,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2
}"#;

/// Norms after what a block adds to the stream and on the embedding, types of tokens, rows that see all others.
const BERT: &str = r#"{
    "model_type": "bert", "architectures": ["BertForTokenClassification"], "hidden_size": 36, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 41, "max_position_embeddings": 64, "num_labels": 41,
    "layer_norm_eps": 1e-3, "initializer_range": 0.2
}"#;

/// `length` rows `start_pd ∘ scale_d` before each document.
struct Prompt {
    length: usize,
}

fn prompt(length: usize) -> Arc<dyn Adapter> {
    Arc::new(Prompt { length })
}

impl Adapter for Prompt {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter(|site| site.place == Place::Embedding).map(|site| {
            let tensors = vec![
                TensorSpec::trained("start", [self.length, arch.hidden]),
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
        Port::Sequence(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} keeps its weight", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl SequenceMap for Prompt {
    fn length(&self) -> usize {
        self.length
    }

    fn graph(&self, tensors: &Locals) -> Result<Tensor> {
        Ok(tensors.get("start")?.broadcast_mul(tensors.get("scale")?)?)
    }
}

fn site(base: &Base) -> String {
    let sites = base.architecture().sites();
    sites.into_iter().find(|site| site.place == Place::Embedding).unwrap().id.to_string()
}

/// The parameters of a [`Prompt`] that says these tokens.
fn saying(model: &Model, text: &[u32], dtype: DType) -> Arc<Params> {
    let (base, at) = (model.base(), site(model.base()));
    let w_vd = base.tensor(&base.tensor_name(&at, "weight"), dtype).unwrap();
    let start = w_vd.index_select(&Tensor::new(text, w_vd.device()).unwrap(), 0).unwrap();
    let scale = Tensor::ones(start.dim(1).unwrap(), start.dtype(), start.device()).unwrap();
    Arc::new(Params::from_iter([
        (TensorName::new(at.as_str(), "start"), start),
        (TensorName::new(at.as_str(), "scale"), scale),
    ]))
}

const TEXT: [u32; 3] = [7, 30, 2];

/// Two documents, and the same with a text before each.
fn plain_and_told() -> (Layout, Layout) {
    let (mut plain, mut told) = (Layout::new(), Layout::new());
    for doc in [&[3u32, 9, 4, 40][..], &[5, 6]] {
        let rows = |text: &[u32]| text.iter().map(|&id| (Row::Token(id), u32::MAX)).collect::<Vec<_>>();
        plain.push(Default::default(), rows(doc));
        told.push(Default::default(), rows(&[&TEXT[..], doc].concat()));
    }
    (plain, told)
}

/// What rows before a document say, a text can say: they are its embeddings.
#[test]
fn rows_that_are_the_embeddings_of_a_text_are_that_text() {
    for config in [TINY, MIXTURE, GPT2, BERT] {
        for graphs in [false, true] {
            let model = model(config, DType::F32, vec![prompt(3)]);
            let model = if graphs { model.in_f64() } else { model };
            let (bound, dtype) = if graphs { (1e-10, DType::F64) } else { (1e-5, DType::F32) };
            let theta = Theta::single([bank(vec![saying(&model, &TEXT, dtype)])]);
            let (plain, told) = plain_and_told();
            let begun = plain.begun_with(&model.rows_before(&theta));
            let found = model.logits(&Pass { theta: &theta, layout: &begun, dropout: None }).unwrap();
            let expected = model.logits(&Pass { theta: &Theta::default(), layout: &told, dropout: None }).unwrap();
            let off = difference(&found, &expected) / largest(&expected);
            assert!(off < bound, "by graphs: {graphs}, off by {off}: {config}");
        }
    }
}

/// They are rows of the document: an encoder's vector is of them too, as if they were its text.
#[test]
fn vectors_of_documents_count_rows_before_them() {
    for pooling in [Pooling::Mean, Pooling::Row(PooledRow::First), Pooling::Row(PooledRow::Last)] {
        let architecture =
            base(BERT, DType::F32).architecture().clone().with_head(HeadKind::Embedding(pooling)).unwrap();
        let model = model_over(Base::random(architecture, 5, DType::F32).unwrap(), vec![prompt(3)]);
        let theta = Theta::single([bank(vec![saying(&model, &TEXT, DType::F32)])]);
        let (plain, told) = plain_and_told();
        let begun = plain.begun_with(&model.rows_before(&theta));
        let found = model.embed(&Pass { theta: &theta, layout: &begun, dropout: None }).unwrap();
        let expected = model.embed(&Pass { theta: &Theta::default(), layout: &told, dropout: None }).unwrap();
        assert!(difference(&found, &expected) < 1e-5 * largest(&expected), "{pooling:?}");
    }
}

#[test]
fn their_gradient_agrees_with_central_differences() {
    let model = model(TINY, DType::F32, vec![prompt(3), low_rank(2, 0.0, true), prompt(2)]).in_f64();
    let wide = |set: Arc<Params>| Arc::new(set.map(|_, tensor| tensor.to_dtype(DType::F64)).unwrap());
    let theta = Theta::single((0..3).map(|slot| bank(vec![wide(set(&model, slot, 1))])));
    let layout = documents(&[0, 1, 2]).begun_with(&model.rows_before(&theta));
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink).unwrap();
    let (mut rng, step) = (Rng::new(1, "directions"), 1e-5);
    let mut compared = 0;
    for (id, value) in theta.trained().filter(|(id, _)| ["start", "scale"].contains(&id.name.local())) {
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
    assert_eq!(compared, 4);
}

#[test]
fn their_gradients_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE, GPT2, BERT] {
        let components = || vec![prompt(3), low_rank(2, 0.3, true), prompt(2), prefix(2)];
        let (fast, graphs) =
            (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
        let banks: Vec<_> = (0..4).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])).collect();
        let all = Theta::single(banks.iter().cloned().chain([weights(&fast)]));
        let first = documents(&[0, 1]).begun_with(&fast.rows_before(&all));
        // Some documents begin with the rows of one set, some with those of another, some with none.
        let mut apart = Theta::single(banks);
        let (begun, with) =
            (documents(&[2, 3, 4]), |slot| (0..3).map(move |index| Row::Virtual { slot, index }).collect::<Vec<_>>());
        let second_prompt = [0, 1].map(|index| Row::Virtual { slot: 2, index });
        let parts = [
            begun.of_docs(|at, _| at == 0).begun_with(&[&with(0)[..], &second_prompt].concat()),
            begun.of_docs(|at, _| at == 1).begun_with(&second_prompt),
            begun.of_docs(|at, _| at == 2).begun_with(&[&with(0)[..], &second_prompt].concat()),
        ];
        let second = Layout::concat(&parts);
        let docs = second.docs();
        apart.bindings[0].rows = Rows::Segments(vec![(docs[0].rows.clone(), 1), (docs[2].rows.clone(), 0)]);
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
    }
}

#[test]
fn a_part_with_rows_before_documents_has_the_same_bits_alone_beside_others_and_recomputed() {
    let model = model(TINY, DType::F32, vec![prompt(3), low_rank(3, 0.2, true), prompt(2)]);
    let thetas: Vec<Theta> =
        (0..3).map(|seed| Theta::single((0..3).map(|slot| bank(vec![set(&model, slot, seed)])))).collect();
    let before = model.rows_before(&thetas[0]);
    assert_eq!(before.len(), 5);
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
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert!(together == bits(pool.install(|| run(&model, &passes, Keep::All))), "threads change bits");
}

/// Frequencies change with the length beyond 16 rows, those before a document among them.
const DYNAMIC: &str = r#"{
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": 41, "rms_norm_eps": 1e-5, "max_position_embeddings": 16, "hidden_act": "silu",
    "tie_word_embeddings": false, "initializer_range": 0.2, "rope_scaling": {"type": "dynamic", "factor": 2.0}
}"#;

#[test]
fn a_text_is_made_after_rows_as_after_the_text_that_they_say() {
    for config in [TINY, MIXTURE, GPT2, DYNAMIC] {
        let views = model(config, DType::F32, vec![prompt(3)]);
        let graphs = model(config, DType::F32, vec![prompt(3)]).by_graphs();
        let theta = Theta::single([bank(vec![saying(&views, &TEXT, DType::F32)])]);
        let rest: Vec<u32> = (0..4).map(|i| (i * 5 + 3) % 41).collect();
        let sampling = Sampling { max_tokens: 14, ..Sampling::default() };
        let told = [&TEXT[..], &rest].concat();
        let expected = generate(&views, &Theta::default(), &told, &sampling, |_| true).unwrap();
        for model in [&views, &graphs] {
            assert_eq!(generate(model, &theta, &rest, &sampling, |_| true).unwrap(), expected, "{config}");
        }
    }
}

#[test]
fn a_component_that_is_away_has_no_rows_either() {
    let model = model(TINY, DType::F32, vec![prompt(3), prompt(2)]);
    let frozen = attune_points::Bank { train: false, ..bank(vec![set(&model, 0, 1)]) };
    let theta = Theta::single([frozen, bank(vec![set(&model, 1, 1)])]);
    let plain = documents(&[0, 1, 2]);
    let logp = |at: &Theta, layout: Layout| {
        let (with, _) = model.with_logp(LOGP, at, None, &[Arc::new(layout)]).unwrap();
        let Some(Column { values: Values::F64(logp_t), .. }) = with[0].column(LOGP).cloned() else {
            panic!("no column")
        };
        with[0].supervised().iter().map(|row| logp_t[row.row as usize]).collect::<Vec<_>>()
    };
    let away = theta.untrained();
    let begun = |theta: &Theta| plain.begun_with(&model.rows_before(theta));
    assert_eq!(logp(&away, begun(&theta)), logp(&away, begun(&away)));
    assert_ne!(logp(&theta, begun(&theta)), logp(&away, begun(&theta)));
}

#[test]
fn a_layout_that_was_packed_for_others_is_refused() {
    let model = model(TINY, DType::F32, vec![prompt(3)]);
    let with = Theta::single([bank(vec![set(&model, 0, 1)])]);
    let (plain, none) = (documents(&[0, 1]), Theta::default());
    let begun = plain.begun_with(&model.rows_before(&with));
    let fewer = plain.begun_with(&model.rows_before(&with)[..2]);
    for (theta, layout) in [(&with, &plain), (&with, &fewer), (&none, &begun)] {
        let error = model.score(&Pass { theta, layout, dropout: None }, &CrossEntropy).unwrap_err().to_string();
        assert!(error.contains("it was packed for others"), "{error}");
    }
}
