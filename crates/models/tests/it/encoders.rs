//! Encoders, classifiers and embeddings against transformers (`golden/encoders.py` names the versions).

use std::collections::{BTreeMap, HashMap};

use attune_architecture::{Architecture, HeadKind, PooledRow, Pooling};
use attune_models::generate::generate;
use attune_models::{Base, Model, Pass, Stack, export};
use attune_points::generate::Sampling;
use attune_points::{Grads, TensorName, Theta};
use attune_spec::Fault;
use attune_spec::job::Precision;
use candle_core::{DType, Device, Tensor};

use crate::support::{CrossEntropy, Golden, all_trained, difference, golden, largest};

pub(crate) const CASES: [&str; 5] = ["bert", "bert_sequence", "bert_tokens", "llama_bidirectional", "llama_sequence"];

/// Both sides compute in f32; the bound that logits have to keep.
const TOLERANCE: f64 = 1e-4;

fn open(case: &str) -> Model {
    open_in(case, Precision::F32)
}

fn open_in(case: &str, precision: Precision) -> Model {
    let change = |architecture: Architecture| -> Result<Architecture, Fault> {
        Ok(if case == "llama_bidirectional" { architecture.bidirectional() } else { architecture })
    };
    Model::new(Base::open_as(&golden(case), precision, None, change, 0).unwrap(), Stack::default())
}

fn pooled(case: &str, pooling: Pooling) -> Model {
    let change = |architecture: Architecture| {
        let architecture = if case == "llama_bidirectional" { architecture.bidirectional() } else { architecture };
        architecture.with_head(HeadKind::Embedding(pooling))
    };
    Model::new(Base::open_as(&golden(case), Precision::F32, None, change, 0).unwrap(), Stack::default())
}

/// The engine on views and the blocks' graphs that define it.
fn both(case: &str) -> [Model; 2] {
    [open(case), open(case).by_graphs()]
}

#[test]
fn heads_are_read_from_the_class() {
    let heads = CASES.map(|case| open(case).base().architecture().head);
    assert_eq!(
        heads,
        [
            HeadKind::Embedding(Pooling::Mean),
            HeadKind::Sequence { labels: 3, row: PooledRow::First },
            HeadKind::Rows { labels: 5 },
            HeadKind::Embedding(Pooling::Row(PooledRow::Last)),
            HeadKind::Sequence { labels: 3, row: PooledRow::Last },
        ]
    );
}

/// Of rows behind the last block, in the root of the mean square; the bound is that of decoders' logits.
#[test]
fn bases_of_bf16_are_the_references_within_the_precision_of_bf16() {
    for case in CASES {
        let expected = Golden::open(case, "expected.safetensors").unwrap();
        let (model, layout, theta) = (open_in(case, Precision::Bf16), expected.layout(), Theta::default());
        let hidden = model.hidden(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
        let last = (0..).take_while(|block| expected.has(&format!("hidden.{block}"))).last().unwrap();
        let reference = expected.tensor(&format!("hidden.{last}"));
        let size = |tensor: &Tensor| tensor.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let off = size(&(&hidden[2 * last] - reference).unwrap()) / size(reference);
        assert!((1e-5..0.028).contains(&off), "{case}: off by a factor of {off}");
    }
}

#[test]
fn hidden_rows_logits_and_loss_are_the_references() {
    for case in CASES {
        let expected = Golden::open(case, "expected.safetensors").unwrap();
        let (model, layout, theta) = (open(case), expected.layout(), Theta::default());
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let mut compared = 0;
        for (index, hidden) in model.hidden(&pass).unwrap().iter().enumerate() {
            let name = format!("hidden.{}", index / 2);
            if index % 2 == 0 && expected.has(&name) {
                let off = difference(hidden, expected.tensor(&name));
                assert!(off < TOLERANCE, "{case}: {name} is off by {off}");
                compared += 1;
            }
        }
        assert!(compared >= 2, "{case}: {compared} blocks");
        let logits = match model.base().architecture().head {
            HeadKind::Sequence { .. } => model.classify(&pass).unwrap(),
            HeadKind::Rows { .. } => model.logits(&pass).unwrap(),
            _ => {
                assert!(model.logits(&pass).unwrap_err().to_string().contains("it has no logits"));
                continue;
            }
        };
        let off = difference(&logits, expected.tensor("logits"));
        assert!(off < TOLERANCE, "{case}: logits are off by {off}");
        for model in both(case) {
            let off = (model.score(&pass, &CrossEntropy).unwrap().mean() - expected.float("loss")).abs();
            assert!(off < 1e-5, "{case}: the loss is off by {off}");
        }
    }
}

#[test]
fn vectors_of_documents_are_the_references() {
    for case in ["bert", "llama_bidirectional"] {
        let expected = Golden::open(case, "expected.safetensors").unwrap();
        for (name, pooling) in [
            ("mean", Pooling::Mean),
            ("first", Pooling::Row(PooledRow::First)),
            ("last", Pooling::Row(PooledRow::Last)),
        ] {
            let (model, layout, theta) = (pooled(case, pooling), expected.layout(), Theta::default());
            let found = model.embed(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
            let off = difference(&found, expected.tensor(&format!("pooled.{name}")));
            assert!(off < TOLERANCE, "{case}: pooled by {name} it is off by {off}");
        }
    }
}

#[test]
fn gradients_of_all_weights_are_the_references() {
    for case in CASES {
        let (expected, reference) =
            (Golden::open(case, "expected.safetensors").unwrap(), Golden::open(case, "gradients.safetensors").unwrap());
        if expected.has("dy") {
            gradients(case, &pooled(case, Pooling::Mean), &expected, &reference);
            gradients(case, &pooled(case, Pooling::Mean).by_graphs(), &expected, &reference);
        } else {
            both(case).iter().for_each(|model| gradients(case, model, &expected, &reference));
        }
    }
}

fn gradients(case: &str, model: &Model, expected: &Golden, reference: &Golden) {
    let embeds = expected.has("dy");
    let (theta, ids) = all_trained(model);
    let layout = expected.layout();
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let mut sink = Grads::wanting(ids);
    if embeds {
        let vectors = model.embed_grad(&pass, expected.tensor("dy"), &mut sink).unwrap();
        assert_eq!(difference(&vectors, &model.embed(&pass).unwrap()), 0.0, "{case}");
    } else {
        model.grad(&pass, &CrossEntropy, 1.0 / layout.counts().tokens as f64, &mut sink).unwrap();
    }
    let architecture = model.base().architecture();
    let found: BTreeMap<String, &Tensor> = sink
        .iter()
        .map(|(id, gradient)| {
            // A class of the trunk alone names its tensors without the prefix.
            let names = architecture.spellings(&id.name.to_string());
            let name = names.into_iter().find(|name| reference.has(name));
            (name.unwrap_or_else(|| panic!("{case}: no gradient of {id}")), gradient.unwrap())
        })
        .collect();
    assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), reference.names().collect::<Vec<_>>());
    // A bias of keys shifts all scores of a query alike: its gradient is 0 but for rounding.
    let scale = reference.names().map(|name| largest(reference.tensor(name))).fold(0.0, f64::max);
    for (name, gradient) in found {
        let expected = reference.tensor(&name);
        let off = difference(gradient, expected) / largest(expected).max(1e-2 * scale);
        assert!(off < TOLERANCE, "{case}: the gradient of {name} is off by a factor of {off}");
    }
}

#[test]
fn a_document_does_not_see_its_neighbours_in_either_direction() {
    let expected = Golden::open("bert_tokens", "expected.safetensors").unwrap();
    let (model, layout, theta) = (open("bert_tokens"), expected.layout(), Theta::default());
    let all = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
    let mut changed = attune_points::Layout::new();
    for (index, doc) in layout.docs().iter().enumerate() {
        let rows = layout.rows()[doc.rows.start as usize..doc.rows.end as usize].iter();
        let rows = rows.map(|row| (if index == 1 { *row } else { attune_points::Row::Token(7) }, u32::MAX));
        changed.push(Default::default(), rows.collect::<Vec<_>>());
    }
    let types = layout.column("token_types").unwrap().clone();
    changed.set_column("token_types", types).unwrap();
    let other = model.logits(&Pass { theta: &theta, layout: &changed, dropout: None }).unwrap();
    let doc = &layout.docs()[1];
    let own = |logits: &Tensor| logits.narrow(0, doc.rows.start as usize, doc.n_rows()).unwrap();
    assert_eq!(difference(&own(&all), &own(&other)), 0.0);
    assert!(difference(&all, &other) > 0.1);
}

/// A classifier on a folder without one: it starts from the seed, trains, and is written so that it is read back.
#[test]
fn a_new_head_starts_at_random_and_is_exported_under_its_class() {
    let head = HeadKind::Sequence { labels: 4, row: PooledRow::First };
    let fresh = |seed| Base::open_as(&golden("bert"), Precision::F32, None, |a| a.with_head(head), seed).unwrap();
    let name = TensorName::from_path("classifier.weight");
    let weight = |base: &Base| base.tensor(&name, DType::F32).unwrap();
    assert_eq!(difference(&weight(&fresh(1)), &weight(&fresh(1))), 0.0);
    assert!(difference(&weight(&fresh(1)), &weight(&fresh(2))) > 0.0);

    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("classifier");
    export::write(&fresh(1), &BTreeMap::new(), DType::F32, &golden("bert"), &to).unwrap();
    let read = Base::open(&to, Precision::F32).unwrap();
    assert_eq!(read.architecture(), fresh(1).architecture());
    assert_eq!(difference(&weight(&read), &weight(&fresh(1))), 0.0);
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(to.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"][0], "BertForSequenceClassification");
    assert_eq!((config["id2label"]["3"].as_str(), config["label2id"]["LABEL_3"].as_u64()), (Some("LABEL_3"), Some(3)));

    let error = fresh(1).architecture().clone().with_head(HeadKind::Tokens).unwrap_err();
    assert_eq!(error.to_string(), "`head` is Tokens, which models of family bert do not have");
}

#[test]
fn norms_under_their_old_names_are_read() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("bert_tokens").join("config.json"), folder.path().join("config.json")).unwrap();
    let tensors =
        candle_core::safetensors::load(golden("bert_tokens").join("model.safetensors"), &Device::Cpu).unwrap();
    let old: HashMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            (name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"), tensor)
        })
        .collect();
    assert!(old.contains_key("bert.embeddings.LayerNorm.gamma"));
    candle_core::safetensors::save(&old, folder.path().join("model.safetensors")).unwrap();
    let (base, exact) = (Base::open(folder.path(), Precision::F32).unwrap(), open("bert_tokens"));
    for info in base.architecture().tensors() {
        let name = TensorName::from_path(&info.name);
        let exact = exact.base().tensor(&name, DType::F32).unwrap();
        assert_eq!(difference(&base.tensor(&name, DType::F32).unwrap(), &exact), 0.0, "{name}");
    }
}

#[test]
fn what_an_encoder_cannot_do_is_refused() {
    let (model, theta) = (open("bert_sequence"), Theta::default());
    let expected = Golden::open("bert_sequence", "expected.safetensors").unwrap();
    let refused = generate(&model, &theta, &[1], &Sampling::default(), |_| true).unwrap_err().to_string();
    assert!(refused.contains("does not generate"), "{refused}");
    let mut layout = expected.layout();
    let types = attune_points::layout::Values::U32(vec![2; layout.n_rows()]);
    layout
        .set_column(
            "token_types",
            attune_points::layout::Column { axis: attune_points::layout::Axis::Row, values: types },
        )
        .unwrap();
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    assert_eq!(model.classify(&pass).unwrap_err().to_string(), "token type 2 is outside of the model's 2");
    assert!(model.embed(&pass).unwrap_err().to_string().contains("no vector per document"));
}
