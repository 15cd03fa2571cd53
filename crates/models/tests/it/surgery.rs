//! Models that surgeries make: written, read again, trained.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use attune_architecture::{Architecture, Family, Place};
use attune_models::{Base, Model, Pass, SURGERIES, Stack, export, surgery};
use attune_points::layout::Source;
use attune_points::{Grads, Layout, Row, TensorName, Theta};
use attune_spec::job::Precision;
use attune_spec::method::{Catalogue, MethodRef};
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::support::{CrossEntropy, all_trained, difference, golden, largest};

fn upcycled(base: &Base, copies: u32, granularity: u32) -> Base {
    let params = json!({"copies": copies, "granularity": granularity, "router_std": 0.5});
    let params = params.as_object().unwrap().clone();
    surgery::operate(base, &MethodRef { method: "dynamic-dino".to_owned(), params }, 3).unwrap()
}

fn layout() -> Layout {
    let mut layout = Layout::new();
    for length in [17, 9] {
        layout.push(Source::default(), (0..length).map(|i| (Row::Token((i * 11) % 37), (i * 11 + 11) % 37)));
    }
    layout
}

fn logits(base: Base) -> Tensor {
    let (theta, layout) = (Theta::default(), layout());
    Model::new(base, Stack::default()).logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap()
}

/// Keeps a model and its logits for `golden/check_transformers_reads.py`, if that is asked for.
fn leave(case: &str, folder: &Path, logits: &Tensor) {
    let Some(to) = std::env::var_os("ATTUNE_WRITTEN") else { return };
    let to = Path::new(&to).join(case);
    std::fs::create_dir_all(to.join("model")).unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join("model").join(entry.file_name())).unwrap();
    }
    let layout = layout();
    let numbers = |numbers: Vec<i64>| Tensor::new(numbers, &Device::Cpu).unwrap();
    let token = |row: &Row| match row {
        Row::Token(id) => i64::from(*id),
        other => panic!("{other:?}"),
    };
    let tensors = HashMap::from([
        ("input_ids", numbers(layout.rows().iter().map(token).collect())),
        ("doc_lengths", numbers(layout.docs().iter().map(|doc| doc.n_rows() as i64).collect())),
        ("logits", logits.clone()),
    ]);
    candle_core::safetensors::save(&tensors, to.join("logits.safetensors")).unwrap();
}

/// Experts and routers that are no copies of one another any more.
fn apart(base: &Base) -> BTreeMap<TensorName, Tensor> {
    let sites = base.architecture().sites();
    let moves = sites.iter().filter(|site| site.expert.is_some() || site.place == Place::Router);
    let moved = moves.map(|site| {
        let name = TensorName::new(site.id.as_str(), "weight");
        let weight = base.tensor(&name, DType::F32).unwrap();
        let noise = Rng::new(8, "moved").named(site.id.as_str()).normal_tensor(weight.dims(), 0.1, DType::F32).unwrap();
        (name, (weight + noise).unwrap())
    });
    moved.collect()
}

/// Each family of those that have one with experts, its windows, scaled rotary positions and older spellings among them.
#[test]
fn a_written_model_is_read_as_what_was_made_and_computes_what_the_base_did() {
    for (case, family) in [
        ("llama", Family::Mixtral),
        ("llama_head_dim", Family::Mixtral),
        ("llama_rope_llama3", Family::Mixtral),
        ("llama_rope_yarn_old_config", Family::Mixtral),
        ("mistral", Family::Mixtral),
        ("mistral_no_window", Family::Mixtral),
        ("qwen3", Family::Qwen3Moe),
    ] {
        let base = || Base::open(&golden(case), Precision::F32).unwrap();
        let made = upcycled(&base(), 3, 4);
        assert_eq!(made.architecture().family, family, "{case}");
        let folder = tempfile::tempdir().unwrap();
        export::write(&made, &BTreeMap::new(), DType::F32, &golden(case), folder.path()).unwrap();
        let read = Base::open(folder.path(), Precision::F32).unwrap();
        assert_eq!(read.architecture(), made.architecture(), "{case}");
        let (dense, now, again) = (logits(base()), logits(made), logits(read));
        assert_eq!(difference(&now, &again), 0.0, "{case}: read again");
        let off = difference(&dense, &now);
        assert!(off < 1e-5 * largest(&dense).max(1.0), "{case}: off by {off}");
        leave(&format!("{case}-start"), folder.path(), &again);

        let made = upcycled(&base(), 3, 4);
        let folder = tempfile::tempdir().unwrap();
        export::write(&made, &apart(&made), DType::F32, &golden(case), folder.path()).unwrap();
        let moved = logits(Base::open(folder.path(), Precision::F32).unwrap());
        assert!(difference(&moved, &again) > 0.1, "{case}: experts that have moved give what they did");
        leave(&format!("{case}-moved"), folder.path(), &moved);
    }
}

/// What holds of every surgery, with its defaults: the model that its card promises, the same bits from the same seed, and the
/// base's function unless the card says why not.
#[test]
fn every_surgery_makes_what_its_card_says() {
    let base = || Base::open(&golden("llama"), Precision::F32).unwrap();
    let mut count = 0;
    for card in SURGERIES.cards() {
        let document = Catalogue::embedded().get(card.name).unwrap();
        // One that repeats layers has to be told which.
        let surgery = match document.repeats() {
            Some(_) => Catalogue::embedded().repeating(&[[0, 2], [1, 2]]).unwrap(),
            None => MethodRef::named(card.name),
        };
        assert_eq!(surgery.method, card.name);
        let made = |seed| surgery::operate(&base(), &surgery, seed).unwrap();
        let resolved = Catalogue::embedded().resolve(&surgery);
        assert_eq!(made(1).architecture(), &base().architecture().after(&resolved, document).unwrap(), "{}", card.name);
        let (once, again) = (made(1), made(1));
        for info in once.architecture().tensors() {
            let name = TensorName::from_path(&info.name);
            let [once, again] = [&once, &again].map(|base| base.tensor(&name, DType::F32).unwrap());
            assert_eq!(once.dims(), info.shape, "{}: {name}", card.name);
            assert_eq!(difference(&once, &again), 0.0, "{}: {name}", card.name);
        }
        let (dense, now) = (logits(base()), logits(once));
        let off = difference(&dense, &now) / largest(&dense);
        assert_eq!(card.moves.is_some(), off > 1e-5, "{}: off by {off}", card.name);
        count += 1;
    }
    assert!(count > 0);
}

/// The first gradient already tells the segments of a copy apart, and reaches every one that a row went through.
#[test]
fn router_rows_of_a_copy_part_and_all_its_segments_learn() {
    let base = Base::open(&golden("llama"), Precision::F32).unwrap();
    let (copies, granularity) = (3, 4);
    let model = Model::new(upcycled(&base, copies, granularity), Stack::default());
    let (theta, ids) = all_trained(&model);
    let (layout, mut sink) = (layout(), Grads::wanting(ids));
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    model.grad(&pass, &CrossEntropy, 1.0 / 24.0, &mut sink).unwrap();
    let gradients: BTreeMap<String, Tensor> =
        sink.iter().map(|(id, gradient)| (id.name.to_string(), gradient.unwrap().clone())).collect();
    let routing = model.routing(&pass).unwrap();
    let sites = model.base().architecture().sites();
    for of_layer in &routing {
        let chosen = of_layer.chosen().unwrap();
        // Whole copies, whatever the row.
        for experts in chosen.chunks_exact(granularity as usize) {
            let copy = experts[0] / granularity;
            assert_eq!(experts, (copy * granularity..(copy + 1) * granularity).collect::<Vec<_>>());
        }
        let router = format!("model.layers.{}.block_sparse_moe.gate.weight", of_layer.layer);
        for copy in (0..copies).filter(|copy| chosen.contains(&(copy * granularity))) {
            let rows = gradients[&router].narrow(0, (copy * granularity) as usize, granularity as usize).unwrap();
            let (first, second) = (rows.narrow(0, 0, 1).unwrap(), rows.narrow(0, 1, 1).unwrap());
            assert!(difference(&first, &second) > 1e-3 * largest(&rows), "the rows of copy {copy} stay one");
            let of_copy = |expert: u32| expert / granularity == copy;
            let experts =
                sites.iter().filter(|site| site.layer == Some(of_layer.layer) && site.expert.is_some_and(of_copy));
            for site in experts {
                assert!(largest(&gradients[&site.id.weight()]) > 0.0, "{} learns nothing", site.id);
            }
        }
    }
    assert!(routing.iter().any(|of_layer| of_layer.chosen().unwrap().iter().any(|&expert| expert >= granularity)));
}

#[test]
fn a_base_of_16_bits_keeps_them_and_its_function() {
    let text = std::fs::read(golden("llama").join("config.json")).unwrap();
    let base = Base::random(Architecture::from_json(&text).unwrap(), 4, DType::BF16).unwrap();
    let made = upcycled(&base, 3, 2);
    let router = TensorName::from_path("model.layers.0.block_sparse_moe.gate.weight");
    assert_eq!(made.dtype(&router), Some(DType::BF16));
    let dense = logits(base);
    // Halves are added after each was rounded, so that the two differ by a rounding or two.
    let off = difference(&dense, &logits(made)) / largest(&dense);
    assert!(off < 0.02, "off by {off}");
}

fn repeated(base: &Base, ranges: &[[u32; 2]]) -> Base {
    surgery::operate(base, &Catalogue::embedded().repeating(ranges).unwrap(), 3).unwrap()
}

/// Layers that are repeated compute as copies would, take no byte, and are copies when they are written: of each family, with windows
/// that go with their layers and layers in the transposed form.
#[test]
fn repeated_layers_are_the_base_s_own_and_a_plain_model_when_written() {
    for case in ["llama", "mistral", "qwen2", "qwen2_window", "qwen3", "gpt2", "olmoe"] {
        let base = Base::open(&golden(case), Precision::F32).unwrap();
        let made = repeated(&base, &[[0, 2], [0, 1], [1, 2], [1, 2]]);
        let architecture = made.architecture();
        assert_eq!((architecture.layers, architecture.distinct_layers()), (5, 2));
        assert_eq!(architecture.ranges(), Some(vec![[0, 2], [0, 2], [1, 2]]), "{case}");
        assert_eq!(made.bytes(), base.bytes(), "{case}: what is repeated lies there twice");
        let windows = &base.architecture().windows;
        let of = |layers: &[usize]| layers.iter().map(|layer| windows[*layer]).collect::<Vec<_>>();
        assert_eq!(architecture.windows, of(&[0, 1, 0, 1, 1]), "{case}");

        let folder = tempfile::tempdir().unwrap();
        export::write(&made, &BTreeMap::new(), DType::F32, &golden(case), folder.path()).unwrap();
        let read = Base::open(folder.path(), Precision::F32).unwrap();
        let plain = read.architecture();
        assert_eq!((plain.layers, &plain.origins, &plain.windows), (5, &None, &architecture.windows), "{case}");
        assert_eq!(plain.parameters(), architecture.parameters());
        assert_eq!(read.bytes() as u64, plain.weight_bytes(4), "{case}");
        assert_eq!(made.bytes() as u64, architecture.weight_bytes(4), "{case}");
        // As if each copy had been there by itself, and another model than the base.
        let (shallow, now, again) = (logits(base), logits(made), logits(read));
        assert_eq!(difference(&now, &again), 0.0, "{case}");
        assert!(difference(&shallow, &now) > 1e-3, "{case}");
        leave(&format!("{case}-repeated"), folder.path(), &again);
    }
}

#[test]
fn one_range_of_all_layers_is_the_base_bit_by_bit() {
    let base = Base::open(&golden("llama"), Precision::F32).unwrap();
    let made = repeated(&base, &[[0, 1], [1, 2]]);
    assert_eq!(difference(&logits(base), &logits(made)), 0.0);
}

/// In few bits too there is one of each.
#[test]
fn layers_in_few_bits_are_repeated_as_they_are() {
    let format = MethodRef::named("nf4");
    let base = || Base::open_quantized(&golden("llama"), Precision::F32, &format).unwrap();
    let made = repeated(&base(), &[[0, 2], [1, 2]]);
    assert_eq!(made.bytes(), base().bytes());
    let whole = repeated(&Base::open(&golden("llama"), Precision::F32).unwrap(), &[[0, 2], [1, 2]]);
    let copies = whole.quantized(&format).unwrap();
    assert_eq!(difference(&logits(made), &logits(copies)), 0.0);
}
