//! Passes on views are held to the blocks' graphs, and their bits to nothing but a part's own rows.

use std::sync::Arc;

use attune_architecture::{Architecture, Place, TensorInfo, TensorPart};
use attune_models::dropout::Dropout;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::Adapter;
use attune_points::engine::LossReport;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Bank, BankKind, Binding, GradSink, Grads, Layout, Params, Row, Rows, TensorName, Theta};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

use crate::low_rank::{Blender, Gated, Later, LowRank, Rescaled, Turned};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::{Bottleneck, Mixer, Prefix};

/// Biases, a window in the second layer, grouped heads of an even but odd-halved width, sizes that fill no register.
pub(crate) const TINY: &str = r#"{
    "model_type": "qwen2", "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 41, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": true, "rope_theta": 100.0, "use_sliding_window": true, "sliding_window": 3,
    "max_window_layers": 1, "initializer_range": 0.2
}"#;

/// Three of seven experts a row, weighed by their probabilities over their sum.
pub(crate) const MIXTURE: &str = r#"{
    "model_type": "olmoe", "hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 41, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": true,
    "initializer_range": 0.2
}"#;

/// Norms after what a block adds to the stream, learned positions, rows that see all others; as many classes as the others have
/// tokens.
const LAST: &str = r#"{
    "model_type": "bert", "architectures": ["BertForTokenClassification"], "hidden_size": 36, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 41, "max_position_embeddings": 64, "num_labels": 41,
    "layer_norm_eps": 1e-3, "initializer_range": 0.2
}"#;

pub(crate) const DROPOUT: Option<Dropout> = Some(Dropout { seed: 4, step: 2 });

pub(crate) fn base(config: &str, dtype: DType) -> Base {
    Base::random(Architecture::from_json(config.as_bytes()).unwrap(), 5, dtype).unwrap()
}

/// A model with a slot of each of `components` on every linear, the head's among them.
pub(crate) fn model(config: &str, dtype: DType, components: Vec<Arc<dyn Adapter>>) -> Model {
    model_over(base(config, dtype), components)
}

/// The same over a base that is there.
pub(crate) fn model_over(base: Base, components: Vec<Arc<dyn Adapter>>) -> Model {
    let sites = base.architecture().sites();
    let slots = components.into_iter().map(|component| {
        let attachments = component.attach(base.architecture(), &sites).unwrap();
        Slot::new(component, attachments)
    });
    let stack = Stack::new(slots.collect());
    Model::new(base, stack)
}

/// Random values of a slot's tensors.
pub(crate) fn set(model: &Model, slot: usize, seed: u64) -> Arc<Params> {
    let mut params = Params::new();
    for at in model.stack().slots()[slot].attachments() {
        let mut rng = Rng::new(seed, "set").sub(slot as u64).named(at.site.as_str());
        for spec in &at.tensors {
            let value = rng.normal_tensor(spec.shape.as_slice(), 0.2, DType::F32).unwrap();
            params.insert(spec.name(at.site.as_str()), value);
        }
    }
    Arc::new(params)
}

/// One random set for each slot.
#[cfg(feature = "cuda")]
pub(crate) fn theta(model: &Model, slots: usize) -> Theta {
    Theta::single((0..slots).map(|slot| bank(vec![set(model, slot, 1)])))
}

pub(crate) fn bank(sets: Vec<Arc<Params>>) -> Bank {
    Bank { slot: "skill".into(), kind: BankKind::Adapter, sets, train: true }
}

/// Every weight of the base as a trained one, moved away from special values; but for the bias of keys that nothing turns: what
/// all keys have in common changes no softmax, so its gradient is rounding alone.
pub(crate) fn weights(model: &Model) -> Bank {
    let mut rng = Rng::new(3, "moved");
    let architecture = model.base().architecture();
    let is_seen = |info: &TensorInfo| {
        architecture.positions.rope().is_some() || info.place != Place::Key || info.part != TensorPart::Bias
    };
    let names = architecture.tensors().into_iter().filter(is_seen).map(|info| TensorName::from_path(&info.name));
    let params: Params = names
        .map(|name| {
            let value = model.base().tensor(&name, DType::F32).unwrap();
            let noise = rng.normal_tensor(value.shape(), 0.05, DType::F32).unwrap();
            (name, (value + noise).unwrap())
        })
        .collect();
    Bank { slot: "weights".into(), kind: BankKind::Weights, sets: vec![Arc::new(params)], train: true }
}

pub(crate) fn documents(examples: &[u64]) -> Layout {
    let mut layout = Layout::new();
    for &example in examples {
        let mut rng = Rng::new(9, "document").sub(example);
        let ids: Vec<u32> = (0..5 + 3 * (example % 4)).map(|_| rng.below(41) as u32).collect();
        let rows = ids.iter().enumerate().map(|(row, &id)| {
            let label = if row == 1 { NO_LABEL } else { ids.get(row + 1).copied().unwrap_or(NO_LABEL) };
            (Row::Token(id), label)
        });
        let source = Source { example, domain: (example % 2) as u16, ..Source::default() };
        layout.push(source, rows.collect::<Vec<_>>());
    }
    layout
}

pub(crate) fn run(model: &Model, passes: &[Pass<'_>], keep: Keep) -> Vec<(Grads, LossReport)> {
    let wanted = |pass: &Pass<'_>| Grads::wanting(pass.theta.trained().map(|(id, _)| id));
    let mut sinks: Vec<Grads> = passes.iter().map(wanted).collect();
    let mut given: Vec<&mut dyn GradSink> = sinks.iter_mut().map(|sink| sink as &mut dyn GradSink).collect();
    let (reports, _) = model.grad_parts(passes, &CrossEntropy, 0.3, keep, &mut given).unwrap();
    sinks.into_iter().zip(reports).collect()
}

/// The largest relative difference of two sinks' tensors, each against the largest value of the second's.
pub(crate) fn off(found: &Grads, expected: &Grads) -> f64 {
    let pairs = expected.iter().map(|(id, expected)| {
        let (found, expected) = (found.get(id), expected);
        match (found, expected) {
            (Some(found), Some(expected)) => difference(found, expected) / largest(expected).max(1e-9),
            (None, None) => 0.0,
            _ => panic!("{id} has a gradient on one side only"),
        }
    });
    pairs.fold(0.0, f64::max)
}

fn bits(of: &[(Grads, LossReport)]) -> Vec<(Vec<Option<Vec<f32>>>, LossReport)> {
    let values = |tensor: Option<&Tensor>| tensor.map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap());
    of.iter()
        .map(|(grads, report)| (grads.iter().map(|(_, tensor)| values(tensor)).collect(), report.clone()))
        .collect()
}

pub(crate) fn low_rank(rank: usize, dropout: f64, fused: bool) -> Arc<dyn Adapter> {
    Arc::new(LowRank { rank, dropout, fused })
}

pub(crate) fn later(rank: usize, dropout: f64, fused: bool) -> Arc<dyn Adapter> {
    Arc::new(Later(LowRank { rank, dropout, fused }))
}

pub(crate) fn bottleneck(rank: usize, dropout: f64) -> Arc<dyn Adapter> {
    Arc::new(Bottleneck { rank, dropout })
}

pub(crate) fn mixer() -> Arc<dyn Adapter> {
    Arc::new(Mixer)
}

pub(crate) fn blender(reads_base: bool) -> Arc<dyn Adapter> {
    Arc::new(Blender { reads_base })
}

pub(crate) fn gated(rank: usize) -> Arc<dyn Adapter> {
    Arc::new(Gated { rank })
}

pub(crate) fn prefix(length: usize) -> Arc<dyn Adapter> {
    Arc::new(Prefix { length })
}

pub(crate) fn rescaled(rank: usize) -> Arc<dyn Adapter> {
    Arc::new(Rescaled { rank })
}

pub(crate) fn turned(input: bool) -> Arc<dyn Adapter> {
    Arc::new(Turned { input })
}

/// Both sides compute in f32, with sums in another order: the bound that the golden files are held to as well.
pub(crate) const TOLERANCE: f64 = 1e-4;

#[test]
fn gradients_are_those_of_the_graphs() {
    gradients_by_graphs(TINY);
}

#[test]
fn gradients_of_a_mixture_are_those_of_the_graphs() {
    gradients_by_graphs(MIXTURE);
    let chosen_apart = MIXTURE.replace("\"norm_topk_prob\": true", "\"norm_topk_prob\": false");
    gradients_by_graphs(&chosen_apart);
}

#[test]
fn gradients_where_norms_come_last_are_those_of_the_graphs() {
    gradients_by_graphs(LAST);
}

fn gradients_by_graphs(config: &str) {
    let layout = documents(&[0, 1, 2, 3, 6]);
    let second = documents(&[4, 5]);
    for components in [
        vec![low_rank(4, 0.0, true)],
        vec![low_rank(3, 0.4, true)],
        vec![low_rank(4, 0.4, false)],
        vec![low_rank(2, 0.0, true), low_rank(5, 0.0, true)],
        vec![low_rank(2, 0.3, false), low_rank(5, 0.3, true)],
        vec![later(3, 0.3, true)],
        vec![later(2, 0.3, false), low_rank(3, 0.0, true), later(4, 0.0, true)],
        vec![rescaled(2)],
        vec![rescaled(2), low_rank(3, 0.3, true), rescaled(3)],
        vec![turned(true)],
        vec![turned(false), low_rank(3, 0.3, true)],
        vec![low_rank(2, 0.0, true), turned(true), rescaled(2), turned(false), low_rank(3, 0.3, false)],
        vec![gated(2)],
        vec![bottleneck(3, 0.3)],
        vec![prefix(5)],
        vec![prefix(2), bottleneck(3, 0.3), bottleneck(2, 0.0), mixer(), bottleneck(2, 0.0)],
        vec![prefix(2), bottleneck(2, 0.0), low_rank(3, 0.3, true), bottleneck(3, 0.3), prefix(3)],
        vec![prefix(2), low_rank(2, 0.3, true), low_rank(3, 0.0, false), blender(false), low_rank(2, 0.0, true)],
        vec![prefix(2), low_rank(2, 0.0, true), low_rank(3, 0.3, true), blender(true), rescaled(2)],
    ] {
        let n = components.len();
        let (fast, graphs) =
            (model(config, DType::F32, components.clone()), model(config, DType::F32, components).by_graphs());
        let mut banks: Vec<Bank> = (0..n).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])).collect();
        let docs = layout.docs();
        let segments = vec![(docs[0].rows.clone(), 1), (docs[2].rows.start..docs[3].rows.end, 0)];
        let mut theta = Theta::single(banks.clone());
        theta.bindings[0].rows = Rows::Segments(segments);
        banks.push(weights(&fast));
        let all = Theta::single(banks);
        for theta in [&theta, &all] {
            for dropout in [None, DROPOUT] {
                let passes = [Pass { theta, layout: &layout, dropout }, Pass { theta: &all, layout: &second, dropout }];
                let (found, expected) = (run(&fast, &passes, Keep::All), run(&graphs, &passes, Keep::All));
                for ((found, report), (expected, by_graphs)) in found.iter().zip(&expected) {
                    let off = off(found, expected);
                    assert!(off < TOLERANCE, "{n} components, {dropout:?}: off by a factor of {off}");
                    assert!((report.loss_sum - by_graphs.loss_sum).abs() < TOLERANCE * by_graphs.loss_sum);
                    assert_eq!(report.counts, by_graphs.counts);
                }
            }
        }
    }
}

#[test]
fn a_part_has_the_same_bits_alone_beside_others_recomputed_and_on_any_number_of_threads() {
    same_bits(TINY);
}

#[test]
fn a_part_of_a_mixture_has_the_same_bits_alone_beside_others_recomputed_and_on_any_number_of_threads() {
    same_bits(MIXTURE);
}

fn same_bits(config: &str) {
    let mut components = vec![low_rank(4, 0.2, true), low_rank(3, 0.0, false), rescaled(2), prefix(3), gated(2)];
    components.extend([turned(true), turned(false), later(2, 0.2, true), later(3, 0.0, false)]);
    components.extend([bottleneck(2, 0.2), bottleneck(3, 0.0), mixer(), bottleneck(2, 0.0)]);
    // Two that are blended without the base, and two with it, among others.
    components.splice(..0, [low_rank(2, 0.0, true), low_rank(2, 0.3, false), blender(false)]);
    components.splice(..0, [low_rank(2, 0.2, true), low_rank(3, 0.0, true), blender(true)]);
    let slots = components.len();
    let model = model(config, DType::F32, components);
    let thetas: Vec<Theta> =
        (0..3).map(|seed| Theta::single((0..slots).map(|slot| bank(vec![set(&model, slot, seed)])))).collect();
    let layouts = [documents(&[0, 1]), documents(&[2, 3, 4]), documents(&[5])];
    let passes: Vec<Pass<'_>> =
        thetas.iter().zip(&layouts).map(|(theta, layout)| Pass { theta, layout, dropout: DROPOUT }).collect();
    let together = bits(&run(&model, &passes, Keep::All));
    let alone: Vec<_> = passes.iter().flat_map(|pass| bits(&run(&model, &[*pass], Keep::All))).collect();
    assert!(together == alone, "neighbours change bits");
    assert!(together == bits(&run(&model, &passes, Keep::Inputs)), "running blocks again changes bits");
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(together == bits(&pool.install(|| run(&model, &passes, Keep::All))), "{threads} threads change bits");
    }
}

#[test]
fn full_fine_tuning_has_the_same_bits_alone_and_recomputed() {
    for config in [TINY, MIXTURE] {
        let model = model(config, DType::F32, Vec::new());
        fully_tuned(&model);
    }
}

fn fully_tuned(model: &Model) {
    let theta = Theta::single([weights(model)]);
    let layouts = [documents(&[0, 1]), documents(&[2, 3, 4])];
    let passes: Vec<Pass<'_>> = layouts.iter().map(|layout| Pass { theta: &theta, layout, dropout: None }).collect();
    let together = bits(&run(model, &passes, Keep::All));
    let alone: Vec<_> = passes.iter().flat_map(|pass| bits(&run(model, &[*pass], Keep::All))).collect();
    assert!(together == alone && together == bits(&run(model, &passes, Keep::Inputs)));
}

/// Rounding to bf16 is off by at most 2^-9, in the root of the mean square by 2^-9/√3 = 0.11 %; a gradient goes through some
/// forty roundings, which add up in quadrature to 0.7 %. Sums that cancel make it more: four times that is the bound.
#[test]
fn a_base_of_bf16_gives_the_gradients_of_its_widened_weights_within_the_precision_of_bf16() {
    let narrow = model(TINY, DType::BF16, vec![low_rank(4, 0.0, true)]);
    let graphs = model(TINY, DType::BF16, vec![low_rank(4, 0.0, true)]).by_graphs();
    let theta = Theta::single([bank(vec![set(&narrow, 0, 1)])]);
    let layout = documents(&[0, 1, 2, 3]);
    let passes = [Pass { theta: &theta, layout: &layout, dropout: None }];
    let (found, expected) = (run(&narrow, &passes, Keep::All), run(&graphs, &passes, Keep::All));
    let square = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    let (mut error, mut whole) = (0.0, 0.0);
    for (id, expected) in expected[0].0.iter() {
        let (found, expected) = (found[0].0.get(id).unwrap(), expected.unwrap());
        error += square(&(found - expected).unwrap());
        whole += square(expected);
    }
    let off = (error / whole).sqrt();
    assert!(off > 1e-4, "nothing was rounded");
    assert!(off < 0.028, "off by a factor of {off}");
    let (loss, by_graphs) = (found[0].1.loss_sum, expected[0].1.loss_sum);
    assert!((loss - by_graphs).abs() < 0.007 * by_graphs, "{loss} against {by_graphs}");
}

#[test]
fn what_is_not_on_all_rows_of_what_mixes_it_is_refused() {
    let model = model(TINY, DType::F32, vec![bottleneck(2, 0.0), mixer()]);
    let layout = documents(&[0, 1]);
    let mut theta = Theta::single((0..2).map(|slot| bank(vec![set(&model, slot, 1)])));
    theta.bindings[0].rows = Rows::Segments(vec![(layout.docs()[0].rows.clone(), 0)]);
    let error = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap_err();
    assert!(error.to_string().contains("mixes others that are not on all of its rows"), "{error}");
}

#[test]
fn what_is_not_on_all_rows_of_what_blends_it_is_refused() {
    let model = model(TINY, DType::F32, vec![low_rank(2, 0.0, true), low_rank(2, 0.0, true), blender(false)]);
    let layout = documents(&[0, 1]);
    let mut theta = Theta::single((0..3).map(|slot| bank(vec![set(&model, slot, 1)])));
    theta.bindings[0].rows = Rows::Segments(vec![(layout.docs()[0].rows.clone(), 0)]);
    let error = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap_err();
    assert!(error.to_string().contains("blends others that are not on all of its rows"), "{error}");
}

/// The base by itself has no rows for those that are put before documents.
#[test]
fn what_the_base_gives_by_itself_is_refused_beside_rows_before_documents() {
    let components = || vec![low_rank(2, 0.0, true), low_rank(2, 0.0, true), blender(true)];
    for model in [model(TINY, DType::F32, components()), model(TINY, DType::F32, components()).by_graphs()] {
        let theta = Theta::single((0..3).map(|slot| bank(vec![set(&model, slot, 1)])));
        let layout = documents(&[0]).begun_with(&[Row::Virtual { slot: 3, index: 0 }]);
        let error = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap_err();
        assert!(error.to_string().contains("reads what the base gives by itself, beside one"), "{error}");
    }
}

#[test]
fn rows_without_a_set_are_the_bases() {
    let model = model(TINY, DType::F32, vec![low_rank(4, 0.0, true)]);
    let layout = documents(&[1]);
    let mut theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
    theta.bindings = vec![Binding { slot: 0, rows: Rows::Segments(Vec::new()) }];
    let plain = Theta::default();
    let loss =
        |theta: &Theta| model.score(&Pass { theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap().loss_sum;
    assert_eq!(loss(&theta), loss(&plain));
}

#[test]
fn rows_that_a_component_does_not_act_on_are_the_bases_to_the_last_bit() {
    for (config, fused) in [TINY, MIXTURE].into_iter().flat_map(|config| [(config, true), (config, false)]) {
        let model = model(config, DType::F32, vec![later(3, 0.0, fused)]);
        let (layout, theta) = (documents(&[0, 1, 2]), Theta::single([bank(vec![set(&model, 0, 1)])]));
        let logits = |theta: &Theta| {
            let logits = model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
            logits.to_vec2::<f32>().unwrap()
        };
        let (with, without) = (logits(&theta), logits(&theta.adapters_off()));
        for doc in layout.docs() {
            for (place, row) in doc.rows.clone().enumerate() {
                assert_eq!(with[row as usize] == without[row as usize], place < 2, "row {place} of {doc:?}");
            }
        }
    }
}

/// More rows than a chunk of logits, as in use; wide enough that the thin rows of components, which the forecast leaves out,
/// are few.
const WIDE: &str = r#"{
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false
}"#;

#[test]
fn what_a_pass_uses_is_what_the_forecast_says() {
    forecast(WIDE);
}

#[test]
fn what_a_pass_of_a_mixture_uses_is_what_the_forecast_says() {
    let experts = "\"model_type\": \"olmoe\", \"num_experts\": 8, \"num_experts_per_tok\": 2";
    forecast(&WIDE.replace("\"model_type\": \"llama\"", experts));
}

fn forecast(config: &str) {
    let mut layout = Layout::new();
    for example in 0..16 {
        layout.push(Source { example, ..Source::default() }, (0..128).map(|row| (Row::Token(row), row + 1)));
    }
    for (dtype, bytes) in [(DType::F32, 4), (DType::BF16, 2)] {
        for (keep, again) in [(Keep::All, false), (Keep::Inputs, true)] {
            let base = Base::random(Architecture::from_json(config.as_bytes()).unwrap(), 5, dtype).unwrap();
            let architecture = base.architecture().clone();
            let component = low_rank(1, 0.0, true);
            let attachments = component.attach(&architecture, &architecture.sites()).unwrap();
            let model = Model::new(base, Stack::new(vec![Slot::new(component, attachments)]));
            let theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
            run(&model, &[Pass { theta: &theta, layout: &layout, dropout: None }], keep);
            let per_row =
                architecture.kept_bytes_per_row(bytes, again) + architecture.working_bytes_per_row(bytes, again);
            let forecast = 2048 * per_row + architecture.head_bytes(2048, bytes);
            let ratio = model.arena().idle_bytes() as f64 / forecast as f64;
            assert!((0.9..1.1).contains(&ratio), "{dtype:?}, {keep:?}: used {ratio} of the forecast");
        }
    }
}

/// Norms, activations and attentions need for their own way back whatever the linears of a block read, or what that is made of; so the
/// gradient of a factor that reads it takes no byte more than that of one that does not, and there is nothing that a smaller copy of it
/// could be kept in place of.
#[test]
fn what_linears_read_is_kept_for_no_component_alone() {
    let mut layout = Layout::new();
    for example in 0..8 {
        layout.push(Source { example, ..Source::default() }, (0..40).map(|row| (Row::Token(row), row + 1)));
    }
    for config in [TINY, MIXTURE, LAST] {
        for dtype in [DType::F32, DType::BF16] {
            let used = |locals: &[&str]| {
                let model = model(config, dtype, vec![low_rank(1, 0.0, true)]);
                let theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
                let ids = theta.trained().map(|(id, _)| id).filter(|id| locals.contains(&id.name.local()));
                let mut sink = Grads::wanting(ids);
                let pass = Pass { theta: &theta, layout: &layout, dropout: None };
                model.grad_parts(&[pass], &CrossEntropy, 0.3, Keep::All, &mut [&mut sink]).unwrap();
                model.arena().idle_bytes()
            };
            assert_eq!(used(&["down", "up"]), used(&["up"]), "{dtype:?}, {config}");
        }
    }
}
