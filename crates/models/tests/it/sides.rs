//! Components that carry rows from block to block beside the stream.

use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site, SiteKind};
use attune_models::generate::generate;
use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, SideMap};
use attune_points::generate::Sampling;
use attune_points::{Error, Grads, Locals, Result, Rows, TensorSpec, Theta, Weight};
use attune_spec::Fault;
use attune_tensor::{Rng, ops};
use candle_core::{DType, Tensor};

use crate::passes::{DROPOUT, MIXTURE, TINY, TOLERANCE, bank, documents, low_rank, model, off, prefix, run, set};
use crate::support::{CrossEntropy, difference, largest};
use crate::whole::random;

/// Norms after what a block adds to the stream, learned positions, rows that see all others.
const LAST: &str = r#"{
    "model_type": "bert", "architectures": ["BertForTokenClassification"], "hidden_size": 36, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 41, "max_position_embeddings": 64, "num_labels": 41,
    "layer_norm_eps": 1e-3, "initializer_range": 0.2
}"#;

/// Carries `width` rows behind the table of tokens, every attention and every MLP.
struct Carrier {
    width: usize,
}

pub(crate) fn carrier(width: usize) -> Arc<dyn Adapter> {
    Arc::new(Carrier { width })
}

impl Adapter for Carrier {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let (d, z) = (arch.hidden, self.width);
        let stands = |site: &&Site| matches!(site.kind, SiteKind::Block { .. }) || site.place == Place::Embedding;
        let attachments = sites.iter().filter(stands).map(|site| {
            let tensors = vec![
                TensorSpec::trained("in", [z, d]),
                TensorSpec::trained("on", [z, z]),
                TensorSpec::trained("out", [d, z]),
            ];
            Attachment { site: site.id.clone(), tensors }
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Side(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} is a block", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl SideMap for Carrier {
    fn width(&self) -> usize {
        self.width
    }

    fn graph(&self, h_td: &Tensor, z_tz: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<(Tensor, Tensor)> {
        let times = |x: &Tensor, local: &str| Ok::<_, Error>(ops::linear(x, tensors.get(local)?, None)?);
        let mut z_tz = (times(h_td, "in")? + times(z_tz, "on")?)?.tanh()?;
        if let Some(masks) = cx.dropout {
            z_tz = (&z_tz * masks.mask(cx.site, self.width, 0.3, &z_tz)?)?;
        }
        Ok(((h_td + times(&z_tz, "out")?)?, z_tz))
    }
}

#[test]
fn their_gradient_agrees_with_central_differences() {
    let model = model(TINY, DType::F32, vec![carrier(3), carrier(2)]).in_f64();
    let wide = |slot| Arc::new(set(&model, slot, 1).map(|_, tensor| tensor.to_dtype(DType::F64)).unwrap());
    let theta = Theta::single((0..2).map(|slot| bank(vec![wide(slot)])));
    let layout = documents(&[0, 1, 2]);
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink).unwrap();
    let (mut rng, step) = (Rng::new(1, "directions"), 1e-5);
    let mut compared = 0;
    for (id, value) in theta.trained() {
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
    assert_eq!(compared, 30);
}

/// Two slots that carry rows, keys before documents and low-rank components.
fn both(config: &str) -> (Model, Model, Theta) {
    let components = || vec![carrier(3), low_rank(2, 0.3, true), prefix(2), carrier(4)];
    let (fast, graphs) = (model(config, DType::F32, components()), model(config, DType::F32, components()).by_graphs());
    let theta = Theta::single((0..4).map(|slot| bank(vec![set(&fast, slot, 1), set(&fast, slot, 2)])));
    (fast, graphs, theta)
}

#[test]
fn their_gradients_and_logits_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE, LAST] {
        let (fast, graphs, all) = both(config);
        let (first, second) = (documents(&[0, 1, 2]), documents(&[3, 4]));
        let mut apart = all.clone();
        apart.bindings[0].rows =
            Rows::Segments(vec![(first.docs()[0].rows.clone(), 1), (first.docs()[2].rows.clone(), 0)]);
        for dropout in [None, DROPOUT] {
            let passes =
                [Pass { theta: &apart, layout: &first, dropout }, Pass { theta: &all, layout: &second, dropout }];
            let (found, expected) = (run(&fast, &passes, Keep::All), run(&graphs, &passes, Keep::All));
            for ((found, report), (expected, by_graphs)) in found.iter().zip(&expected) {
                let off = off(found, expected);
                assert!(off < TOLERANCE, "{dropout:?}: off by a factor of {off}: {config}");
                assert!((report.loss_sum - by_graphs.loss_sum).abs() < TOLERANCE * by_graphs.loss_sum);
            }
        }
        let pass = Pass { theta: &all, layout: &first, dropout: None };
        let (found, expected) = (fast.logits(&pass).unwrap(), graphs.logits(&pass).unwrap());
        assert!(difference(&found, &expected) < TOLERANCE * largest(&expected), "{config}");
    }
}

#[test]
fn a_part_has_the_same_bits_alone_beside_others_and_recomputed() {
    let (model, _, theta) = both(TINY);
    let layouts = [documents(&[0, 1]), documents(&[2, 3, 4]), documents(&[5])];
    let passes: Vec<Pass<'_>> = layouts.iter().map(|layout| Pass { theta: &theta, layout, dropout: DROPOUT }).collect();
    let bits = |found: Vec<(Grads, attune_points::engine::LossReport)>| -> Vec<Vec<u32>> {
        let values = |tensor: Option<&Tensor>| {
            tensor.map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()).unwrap_or_default()
        };
        let of = |grads: &Grads| grads.iter().flat_map(|(_, tensor)| values(tensor)).map(f32::to_bits).collect();
        found.iter().map(|(found, _)| of(found)).collect()
    };
    let together = bits(run(&model, &passes, Keep::All));
    let alone: Vec<_> = passes.iter().flat_map(|pass| bits(run(&model, &[*pass], Keep::All))).collect();
    assert!(together == alone, "neighbours change bits");
    assert!(together == bits(run(&model, &passes, Keep::Inputs)), "running blocks again changes bits");
}

#[test]
fn texts_are_those_of_the_graphs() {
    for config in [TINY, MIXTURE] {
        let (fast, graphs, theta) = both(config);
        let prompt: Vec<u32> = (0..9).map(|i| (i * 5 + 3) % 41).collect();
        let sampling = Sampling { max_tokens: 20, ..Sampling::default() };
        let [found, expected] =
            [&fast, &graphs].map(|model| generate(model, &theta, &prompt, &sampling, |_| true).unwrap());
        assert_eq!(found, expected, "{config}");
    }
}
