//! Gradients by what an objective, a sink or a method asks for beyond a mean of cross-entropies and whole tensors.

use std::sync::Arc;

use attune_models::dropout::Dropout;
use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass};
use attune_points::engine::LossReport;
use attune_points::layout::{Column, LabelCounts, REFERENCE, Source, Values};
use attune_points::objective::{Level, Objective};
use attune_points::theta::Rows;
use attune_points::{Bank, GradSink, Grads, Layout, Region, Result, TensorId, Theta};
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};

use crate::passes::{MIXTURE, TINY, TOLERANCE, bank, documents, gated, low_rank, model, off, set, weights};
use crate::support::{Alternating, Apart, CrossEntropy, Smoothed, difference, largest};

/// The documents with every two that follow each other in a group.
fn pairs(examples: &[u64]) -> Layout {
    let (from, mut layout) = (documents(examples), Layout::new());
    for (i, doc) in from.docs().iter().enumerate() {
        let rows = doc.rows.start as usize..doc.rows.end as usize;
        let of_doc = from.rows()[rows.clone()].iter().copied().zip(from.labels()[rows].iter().copied());
        let (example, domain) = (doc.example, doc.domain);
        layout.push(Source { example, domain, group: Some(i as u32 / 2), ..Source::default() }, of_doc);
    }
    layout
}

fn tuned(model: &Model) -> Theta {
    Theta::single([bank(vec![set(model, 0, 1)]), weights(model)])
}

fn grad(model: &Model, pass: Pass<'_>, objective: &dyn Objective) -> (Grads, LossReport) {
    let mut sink = Grads::wanting(pass.theta.trained().map(|(id, _)| id));
    let mut given: [&mut dyn GradSink; 1] = [&mut sink];
    let (mut reports, _) = model.grad_parts(&[pass], objective, 0.3, Keep::All, &mut given).unwrap();
    (sink, reports.remove(0))
}

#[test]
fn every_kind_of_objective_has_the_losses_and_gradients_of_the_graphs() {
    let components = || vec![low_rank(3, 0.0, true)];
    let (fast, graphs) = (model(TINY, DType::F32, components()), model(TINY, DType::F32, components()).by_graphs());
    let theta = tuned(&fast);
    let layout = pairs(&[0, 1, 2, 3, 6]);
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let scoped =
        [Level::Document, Level::Group, Level::Part].map(|level| Box::new(Alternating(level)) as Box<dyn Objective>);
    for objective in scoped.into_iter().chain([Box::new(Smoothed) as Box<dyn Objective>]) {
        let ((found, report), (expected, by_graphs)) =
            (grad(&fast, pass, &*objective), grad(&graphs, pass, &*objective));
        let off = off(&found, &expected);
        assert!(off < TOLERANCE, "{:?}: off by a factor of {off}", objective.level());
        assert!((report.loss_sum - by_graphs.loss_sum).abs() < TOLERANCE * by_graphs.loss_sum);
        assert_eq!((report.counts, layout.counts()), (by_graphs.counts, report.counts));
        let of_domains: f64 = report.by_domain.iter().map(|(loss, _)| loss).sum();
        assert!((of_domains - report.loss_sum).abs() < 1e-9 * report.loss_sum);
        let counts: LabelCounts = report.by_domain.iter().map(|(_, counts)| *counts).sum();
        assert_eq!((counts.tokens, counts.documents), (report.counts.tokens, report.counts.documents));
        let scored = fast.score(&pass, &*objective).unwrap();
        assert_eq!(scored, report, "{:?}: a loss depends on whether gradients are taken", objective.level());
    }
}

/// In bf16 the gradient by the logits is rounded after it was computed in 32 bits; see the bound of whole passes.
#[test]
fn a_loss_by_logits_agrees_with_the_fused_one_in_both_precisions() {
    for (dtype, bound) in [(DType::F32, TOLERANCE), (DType::BF16, 0.028)] {
        let model = model(TINY, dtype, vec![low_rank(3, 0.0, true)]);
        let theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
        let layout = documents(&[0, 1, 2]);
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let ((fused, report), (by_logits, by_graph)) =
            (grad(&model, pass, &CrossEntropy), grad(&model, pass, &crate::support::ByLogits));
        assert!(off(&by_logits, &fused) < bound);
        assert!((report.loss_sum - by_graph.loss_sum).abs() < 1e-5 * report.loss_sum);
    }
}

#[test]
fn a_group_whose_documents_are_apart_is_refused() {
    let model = model(TINY, DType::F32, Vec::new());
    let (from, mut layout) = (documents(&[1, 2, 3]), Layout::new());
    for (doc, group) in from.docs().iter().zip([0, 1, 0]) {
        let rows = doc.rows.start as usize..doc.rows.end as usize;
        let of_doc = from.rows()[rows.clone()].iter().copied().zip(from.labels()[rows].iter().copied());
        layout.push(Source { group: Some(group), ..Source::default() }, of_doc);
    }
    let pass = Pass { theta: &Theta::default(), layout: &layout, dropout: None };
    let error = model.score(&pass, &Alternating(Level::Group)).unwrap_err();
    assert_eq!(error.to_string(), "documents of group 0 do not follow each other in the batch");
}

/// A token's row of the table gets the sum of the gradients by the embeddings that it was looked up for.
#[test]
fn gradients_by_input_embeddings_add_up_to_that_of_the_table() {
    let fast = model(MIXTURE, DType::F32, Vec::new());
    let exact = model(MIXTURE, DType::F32, Vec::new()).by_graphs();
    let theta = Theta::single([weights(&fast)]);
    let layout = documents(&[0, 1, 2, 3]);
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let input = TensorId::input_embeddings();
    let table = theta.trained().map(|(id, _)| id).find(|id| id.to_string() == "model.embed_tokens.weight").unwrap();
    let by_input = |model: &Model| {
        let mut sink = Grads::wanting([input.clone(), table.clone()]);
        model.grad(&pass, &CrossEntropy, 0.3, &mut sink).unwrap();
        (sink.get(&input).unwrap().clone(), sink.get(&table).unwrap().clone())
    };
    let ((dx_td, dw_vd), (by_graphs, _)) = (by_input(&fast), by_input(&exact));
    assert!(difference(&dx_td, &by_graphs) < TOLERANCE * largest(&by_graphs));
    let tokens: Vec<u32> = layout
        .rows()
        .iter()
        .map(|row| match row {
            attune_points::Row::Token(id) => *id,
            _ => panic!("only tokens here"),
        })
        .collect();
    let sums = dw_vd.zeros_like().unwrap().index_add(&Tensor::new(tokens, &Device::Cpu).unwrap(), &dx_td, 0).unwrap();
    assert!(difference(&sums, &dw_vd) < 1e-5 * largest(&dw_vd));
    // With nothing else wanted, the whole trunk is still walked down to it.
    let mut alone = Grads::wanting([input.clone()]);
    fast.grad(&pass, &CrossEntropy, 0.3, &mut alone).unwrap();
    assert_eq!(difference(alone.get(&input).unwrap(), &dx_td), 0.0);
}

/// Parameters moved along a direction by so much.
fn along(theta: &Theta, direction: &[(TensorId, Tensor)], by: f64) -> Theta {
    let mut moved = theta.clone();
    for (id, tensor) in direction {
        let held = theta.get(id).unwrap();
        moved.put(id, (held + (tensor.to_dtype(held.dtype()).unwrap() * by).unwrap()).unwrap());
    }
    moved
}

fn dot(gradients: &Grads, direction: &[(TensorId, Tensor)]) -> f64 {
    let product = |(id, tensor): &(TensorId, Tensor)| {
        let found = gradients.get(id).unwrap().to_dtype(DType::F64).unwrap();
        (found * tensor).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    direction.iter().map(product).sum()
}

/// `H v = (∇L(θ + εv) - ∇L(θ - εv)) / 2ε` to ε² and rounding by ε: in 64 bits it is symmetric and the second difference of the loss, and
/// passes in 32 bits have a hundredth of it at a step of a hundredth.
#[test]
fn differences_of_gradients_are_products_with_the_hessian() {
    let wide = model(TINY, DType::F64, vec![low_rank(3, 0.0, true)]).in_f64();
    let fast = model(TINY, DType::F32, vec![low_rank(3, 0.0, true)]);
    let layout = documents(&[0, 1, 2, 3]);
    let start = |(model, dtype): (&Model, DType)| {
        let mut theta = Theta::single([bank(vec![set(model, 0, 1)])]);
        let held: Vec<_> = theta.trained().map(|(id, tensor)| (id, tensor.clone())).collect();
        for (id, tensor) in held {
            theta.put(&id, tensor.to_dtype(dtype).unwrap());
        }
        theta
    };
    let direction = |seed: u64| -> Vec<(TensorId, Tensor)> {
        let mut rng = Rng::new(seed, "direction");
        let of = |(id, tensor): (TensorId, &Tensor)| (id, rng.normal_tensor(tensor.dims(), 0.3, DType::F64).unwrap());
        start((&fast, DType::F32)).trained().map(of).collect()
    };
    let (u, v) = (direction(1), direction(2));
    let product = |of: (&Model, DType), v: &[(TensorId, Tensor)], step: f64, with: &[(TensorId, Tensor)]| -> f64 {
        let at = |by: f64| {
            let moved = along(&start(of), v, by);
            dot(&grad(of.0, Pass { theta: &moved, layout: &layout, dropout: None }, &CrossEntropy).0, with)
        };
        (at(step) - at(-step)) / (2.0 * step)
    };
    let loss = |by: f64| {
        let moved = along(&start((&wide, DType::F64)), &v, by);
        0.3 * wide.score(&Pass { theta: &moved, layout: &layout, dropout: None }, &CrossEntropy).unwrap().loss_sum
    };
    let exact = product((&wide, DType::F64), &v, 1e-4, &v);
    let second = (loss(1e-3) - 2.0 * loss(0.0) + loss(-1e-3)) / 1e-6;
    assert!((exact - second).abs() < 1e-4 * exact.abs(), "{exact} against {second}");
    let (uhv, vhu) = (product((&wide, DType::F64), &v, 1e-4, &u), product((&wide, DType::F64), &u, 1e-4, &v));
    assert!((uhv - vhu).abs() < 1e-6 * exact.abs(), "{uhv} against {vhu}");
    let in_32_bits = product((&fast, DType::F32), &v, 1e-2, &v);
    assert!((in_32_bits - exact).abs() < 1e-2 * exact.abs(), "{in_32_bits} against {exact}");
}

/// The second copy of each text has other parameters and moved embeddings; gradients come from both.
#[test]
fn copies_with_other_parameters_and_moved_embeddings_have_the_gradients_of_the_graphs_and_of_differences() {
    let fast = model(TINY, DType::F32, vec![low_rank(3, 0.1, true)]);
    let graphs = model(TINY, DType::F32, vec![low_rank(3, 0.1, true)]).by_graphs();
    let layout = documents(&[0, 2, 3]);
    let twice = layout.with_copies(2);
    let (one, all) = (layout.n_rows() as u32, twice.n_rows());
    let hidden = fast.base().architecture().hidden;
    let moved = |seed, size| Rng::new(seed, "moved").normal_tensor((all, hidden), size, DType::F32).unwrap();
    let mut theta = Theta::single([bank(vec![set(&fast, 0, 1), set(&fast, 0, 2)])]).with_input(moved(1, 0.1));
    theta.bindings[0].rows = Rows::Segments(vec![(0..one, 0), (one..all as u32, 1)]);
    let dropout = Some(Dropout { seed: 5, step: 3 });
    let pass = Pass { theta: &theta, layout: &twice, dropout };
    let input = TensorId::input_embeddings();
    let wanted = || Grads::wanting(theta.trained().map(|(id, _)| id).chain([input.clone()]));
    let (mut found, mut expected) = (wanted(), wanted());
    let report = fast.grad(&pass, &Apart, 0.3, &mut found).unwrap();
    let by_graphs = graphs.grad(&pass, &Apart, 0.3, &mut expected).unwrap();
    assert!(off(&found, &expected) < TOLERANCE);
    assert!((report.loss_sum - by_graphs.loss_sum).abs() < TOLERANCE * by_graphs.loss_sum);
    assert_eq!(report.counts, layout.counts(), "copies are not counted");

    // Along one direction, by central differences of two widths, whose errors of second order cancel; losses of some thousands
    // in 32 bits lose about 1e-3 to rounding, over a width of 1e-3.
    let direction = moved(2, 1.0);
    let loss = |h: f64| {
        let input = (theta.input.as_ref().unwrap() + (&direction * h).unwrap()).unwrap();
        let at = theta.clone().with_input(input);
        fast.score(&Pass { theta: &at, layout: &twice, dropout }, &Apart).unwrap().loss_sum
    };
    let central = |h: f64| 0.3 * (loss(h) - loss(-h)) / (2.0 * h);
    let differences = (4.0 * central(5e-4) - central(1e-3)) / 3.0;
    let gradient = found.get(&input).unwrap();
    let along = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert!((differences - f64::from(along)).abs() < 1e-3 * differences.abs(), "{differences}, {along}");

    // Copies of the same text, in the same state, are not apart: dropout's masks are the same.
    let same = Theta::single([bank(vec![set(&fast, 0, 1)])]);
    let none = fast.score(&Pass { theta: &same, layout: &twice, dropout }, &Apart).unwrap();
    assert_eq!(none.loss_sum, 0.0);
}

#[test]
fn copies_and_moved_embeddings_that_do_not_fit_are_refused() {
    let model = model(TINY, DType::F32, Vec::new());
    let layout = documents(&[0, 1]);
    let refused = |theta: &Theta, layout: &Layout| {
        model.score(&Pass { theta, layout, dropout: None }, &Apart).unwrap_err().to_string()
    };
    let message = refused(&Theta::default(), &layout);
    assert!(message.contains("does not hold its documents 2 times"), "{message}");
    let short = Theta::default().with_input(Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap());
    let message = refused(&short, &layout.with_copies(2));
    assert!(message.contains("added to the embeddings has the shape (3, 4)"), "{message}");
}

/// A part of a whole gradient.
type Cut = fn(&Tensor) -> Tensor;

/// Wants one region of every tensor of two axes whose name ends in `of`, and keeps what is put.
struct Part<'r> {
    region: Region<'r>,
    of: &'r str,
    found: Vec<(TensorId, Tensor)>,
}

impl GradSink for Part<'_> {
    fn want(&self, id: &TensorId) -> Region<'_> {
        if id.to_string().ends_with(self.of) { self.region } else { Region::None }
    }

    fn put(&mut self, id: &TensorId, gradient: &Tensor) -> Result<()> {
        self.found.push((id.clone(), gradient.clone()));
        Ok(())
    }
}

#[test]
fn a_part_of_a_gradient_is_that_part_of_the_whole_one() {
    for dtype in [DType::F32, DType::BF16] {
        let model = model(TINY, dtype, vec![low_rank(3, 0.0, true)]);
        let theta = tuned(&model);
        let layout = documents(&[0, 1, 2, 3]);
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let (whole, _) = grad(&model, pass, &CrossEntropy);
        for of in ["1.mlp.down_proj.weight", "0.self_attn.q_proj.weight", "0.mlp.up_proj.down", "0.self_attn.k_proj.up"]
        {
            let regions: [(Region<'_>, Cut); 4] = [
                (Region::Rows(&[2, 0]), |g| pick(g, &[2, 0], 0)),
                (Region::Cols(&[1]), |g| pick(g, &[1], 1)),
                (Region::Cross(&[1], &[2, 0]), |g| pick(&pick(g, &[1], 0), &[2, 0], 1)),
                (Region::Entries(&[5, 1]), |g| pick(&g.flatten_all().unwrap(), &[5, 1], 0)),
            ];
            for (region, of_whole) in regions {
                let mut sink = Part { region, of, found: Vec::new() };
                let mut given: [&mut dyn GradSink; 1] = [&mut sink];
                model.grad_parts(&[pass], &CrossEntropy, 0.3, Keep::All, &mut given).unwrap();
                let [(id, found)] = &sink.found[..] else { panic!("{of}: {} parts", sink.found.len()) };
                let whole = whole.get(id).unwrap();
                let off = difference(found, &of_whole(whole)) / largest(whole);
                assert!(off < 1e-5, "{of}, {region:?}: off by a factor of {off}");
            }
        }
        let mut sink = Part { region: Region::Rows(&[99]), of: "0.mlp.up_proj.weight", found: Vec::new() };
        let mut given: [&mut dyn GradSink; 1] = [&mut sink];
        let error = model.grad_parts(&[pass], &CrossEntropy, 0.3, Keep::All, &mut given).unwrap_err().to_string();
        assert_eq!(error, "row 99 of model.layers.0.mlp.up_proj.weight was asked for; it has 52");
    }
}

fn pick(from: &Tensor, which: &[u32], dim: usize) -> Tensor {
    from.index_select(&Tensor::new(which, &Device::Cpu).unwrap(), dim).unwrap()
}

/// Log-probabilities under the reference by a pass without what trains, or stored before.
#[test]
fn a_reference_is_the_same_computed_or_stored() {
    let model = model(TINY, DType::F32, vec![low_rank(3, 0.2, true), low_rank(2, 0.0, true)]);
    let frozen = Bank { train: false, ..bank(vec![set(&model, 0, 1)]) };
    let theta = Theta::single([frozen.clone(), bank(vec![set(&model, 1, 1)])]);
    let layouts = [Arc::new(pairs(&[0, 1])), Arc::new(pairs(&[2, 3, 6]))];
    let (with, _) = model.with_logp(REFERENCE, &theta.untrained(), None, &layouts).unwrap();
    // Without the trained slot, by other parameters.
    let mut bare = Theta::single([frozen]);
    bare.banks.extend(theta.banks[1..].iter().cloned());
    assert_eq!(model.with_logp(REFERENCE, &bare, None, &layouts).unwrap().0, with);
    assert_ne!(model.with_logp(REFERENCE, &theta, None, &layouts).unwrap().0, with);
    // What is there is not computed again.
    assert_eq!(model.with_logp(REFERENCE, &theta, None, &with).unwrap().0, with);
    for (layout, with) in layouts.iter().zip(&with) {
        let Some(Column { values: Values::F64(logp_t), .. }) = with.column(REFERENCE) else { panic!("no column") };
        let pass = Pass { theta: &bare, layout, dropout: None };
        let nll = model.score(&pass, &CrossEntropy).unwrap().loss_sum;
        let sum: f64 = layout.supervised().iter().map(|row| logp_t[row.row as usize]).sum();
        assert!((nll + sum).abs() < 1e-9 * nll, "{nll} against {sum}");
    }
}

/// A component's loss counts as one of each supervised token: of what only that loss depends on the gradient is known.
#[test]
fn the_loss_of_a_component_counts_as_that_of_every_supervised_token() {
    let model = model(TINY, DType::F32, vec![gated(2)]);
    let theta = Theta::single([bank(vec![set(&model, 0, 1)])]);
    let layout = pairs(&[0, 1, 2]);
    let (found, report) = grad(&model, Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy);
    let bare = model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy).unwrap();
    assert_eq!(report, bare, "a report has another loss than the objective's");
    let mut compared = 0;
    let own = theta.trained().filter(|(id, _)| id.name.local() == "own" && id.name.owner().contains("layers"));
    for (id, value) in own {
        // That loss is the sum of squares, and the helper's scale is 0.3.
        let expected = (value * (0.3 * layout.counts().tokens as f64 * 2.0)).unwrap();
        let off = difference(found.get(&id).unwrap(), &expected);
        assert!(off < 1e-5 * largest(&expected), "{id}: off by {off}");
        compared += 1;
    }
    // Seven linears in each of two layers; a head has no such loss.
    assert_eq!(compared, 14);
}
