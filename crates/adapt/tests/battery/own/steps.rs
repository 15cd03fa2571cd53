//! Of methods whose steps are their own: what they have shows after some of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use attune_models::{Base, Pass};
use attune_points::adapter::{Merged, Trained};
use attune_points::engine::{self, Batch, Engine, LossReport, Renewed, Source, StepReport, Tensors};
use attune_points::objective::Objective;
use attune_points::{Error, GradSink, Grads, Layout, Params, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use attune_spec::job::Targets;
use attune_spec::method::SiteKind;
use attune_tensor::{Rng, linalg};
use candle_core::{DType, Device, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{self, CrossEntropy, Setup, batch, difference, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[
    ("chain_of_lora::what_a_link_has_learned_stays_while_the_next_learns", links),
    ("context_aware_prompt::no_token_moves_further_than_its_bound", within_bounds),
    ("dsee_and_elastic_lora::as_many_entries_of_weights_are_0_in_the_end_as_were_to_go", zeros),
    ("dsee::whole_heads_and_neurons_are_0_in_the_end", whole_structures),
    ("elastic_lora::a_part_of_its_rank_does_most_of_what_the_whole_does", parts_of_a_rank),
    ("poet::rounds_go_further_and_singular_values_stay", rounds),
    ("roselora::in_the_end_most_entries_of_a_weight_are_as_they_were", sparse_change),
    ("selective_lora::all_but_a_share_of_linears_are_the_bases", share_of_linears),
    ("taps::most_weights_are_the_bases_in_the_end", shared_weights),
    ("vectorfit::what_moved_most_rests_while_all_else_learns", resting),
];

/// A linear of 32 outputs and 24 inputs.
const UP: &str = "model.layers.1.mlp.up_proj";

/// Steps of a model on one batch, down the slope.
pub(crate) struct Slope {
    pub(crate) setup: Setup,
    pub(crate) layout: Arc<Layout>,
    pub(crate) lr: f64,
}

impl Slope {
    fn new(method: Value, targets: &str, lr: f64) -> std::result::Result<Self, Failed> {
        let setup = Setup::new(build(method).map_err(fail)?, targets, DType::F32);
        Ok(Self { setup, layout: Arc::new(batch()), lr })
    }

    /// Trains for this many steps and looks on after each.
    fn run(
        &mut self,
        steps: u64,
        mut look: impl FnMut(u64, &Self) -> std::result::Result<(), Failed>,
    ) -> std::result::Result<(), Failed> {
        self.steps(steps, |step, _, slope| look(step, slope))
    }

    /// The same by the component's own steps if it has any, with what each reports.
    pub(crate) fn steps(
        &mut self,
        steps: u64,
        mut look: impl FnMut(u64, &StepReport, &Self) -> std::result::Result<(), Failed>,
    ) -> std::result::Result<(), Failed> {
        let adapter = Arc::clone(&self.setup.adapter);
        let attachments = self.setup.attachments.clone();
        let of = Trained { slot: 0, attachments: attachments.iter().collect(), steps: Step(steps) };
        let mut rule = adapter.step_rule(&of);
        for step in 0..steps {
            let report = match &mut rule {
                Some(rule) => rule.step(Step(step), self)?,
                None => engine::usual_step(self)?,
            };
            look(step, &report, self)?;
        }
        Ok(())
    }
}

impl Engine for Slope {
    fn theta(&self) -> &Theta {
        &self.setup.theta
    }

    fn set(&mut self, theta: Theta) {
        self.setup.theta = theta;
    }

    fn batch(&mut self, _: Source) -> Result<Batch> {
        let (counts, n_rows) = (self.layout.counts(), self.layout.n_rows() as u64);
        Ok(Batch { parts: vec![(0, Arc::clone(&self.layout))], counts, n_rows })
    }

    fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport> {
        self.setup.model.score(&Pass { theta: at, layout: on, dropout: None }, of)
    }

    fn grad(
        &mut self,
        at: &Theta,
        on: &Layout,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport> {
        self.setup.model.grad(&Pass { theta: at, layout: on, dropout: None }, of, scale, sink)
    }

    fn objective(&self) -> Arc<dyn Objective> {
        Arc::new(CrossEntropy)
    }

    fn wanted(&self) -> Vec<TensorId> {
        self.setup.theta.trained().map(|(id, _)| id).collect()
    }

    fn reduce(&mut self, mut parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        let (_, gradients, report) = parts.remove(0);
        Ok((gradients, report))
    }

    fn update(&mut self, gradients: Grads) -> Result<f64> {
        self.update_but(gradients, &BTreeSet::new())
    }

    fn update_but(&mut self, gradients: Grads, resting: &BTreeSet<TensorId>) -> Result<f64> {
        for (id, gradient) in gradients.iter().filter(|(id, _)| !resting.contains(*id)) {
            let gradient = gradient.ok_or_else(|| Error::Refused(format!("{id} has no gradient")))?;
            let value = self.setup.theta.get(id).ok_or_else(|| Error::Refused(format!("{id} has no value")))?;
            let moved = (value - (gradient * self.lr)?)?;
            self.setup.theta.put(id, moved);
        }
        Ok(0.0)
    }

    fn weight(&self, site: &str) -> Result<Tensor> {
        let base = self.setup.model.base();
        base.tensor(&base.tensor_name(site, "weight"), DType::F32)
    }

    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
        Ok(mine)
    }

    /// Nothing of the past is kept here.
    fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
        let value = self.setup.theta.get(tensor).ok_or_else(|| Error::Refused(format!("{tensor} has no value")))?;
        let (shape, mut values) = (value.shape().clone(), value.flatten_all()?.to_vec1::<f32>()?);
        entries.iter().for_each(|renewed| values[renewed.entry] = 0.0);
        self.setup.theta.put(tensor, Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    }

    fn hidden(&self) -> usize {
        24
    }

    fn rng(&self, purpose: &'static str) -> Rng {
        Rng::new(1, purpose)
    }
}

/// What the loss and the weight of the first site are after some steps, and the weight before them.
fn trained(method: Value, steps: u64) -> std::result::Result<(f64, Tensor, Tensor), Failed> {
    let mut slope = Slope::new(method, UP, 0.5)?;
    slope.run(steps, |_, _| Ok(()))?;
    let (theta, layout) = (slope.setup.theta.clone(), Arc::clone(&slope.layout));
    let loss = slope.score(&theta, &layout, &CrossEntropy)?.loss_sum;
    let at = slope.setup.attachments[0].clone();
    let weight = slope.setup.weight(&at)?.dense(DType::F32)?;
    let locals = attune_models::stack::locals(&at, &slope.setup.params())?;
    let made = match slope.setup.adapter.merge(&at, &locals, &*slope.setup.weight(&at)?)? {
        Merged::Factors { left, right, scale } => (&weight + (left.matmul(&right)? * scale)?)?,
        Merged::Weight { weight, .. } => weight,
        other => return Err(format!("{other:?} does not merge").into()),
    };
    Ok((loss, made, weight))
}

/// By which share of the largest singular values change at most.
fn values_off((_, made, weight): &(f64, Tensor, Tensor)) -> std::result::Result<f64, Failed> {
    let (made, weight) = (linalg::svd(made)?.s, linalg::svd(weight)?.s);
    Ok(difference(&made, &weight) / largest(&weight))
}

fn rounds() -> std::result::Result<(), Failed> {
    // 56 * 3 / 2 = 84 numbers against 112.
    let poet = |every: u64| trained(json!({"method": "poet", "block_size": 4, "terms": 0, "every": every}), 60);
    let (once, often) = (poet(0)?, poet(6)?);
    let plain = trained(json!({"method": PLAIN, "rank": 2, "alpha": 8}), 60)?;
    assert!(often.0 < once.0, "losses are {} and {}", often.0, once.0);
    assert!(values_off(&often)? < 1e-5, "singular values change by {}", values_off(&often)?);
    assert!(values_off(&plain)? > 0.01, "singular values change by {}", values_off(&plain)?);
    Ok(())
}

/// How many entries of the weight a component changes after some steps, and how far the loss went down, against what it was.
fn entries_and_progress(method: Value) -> std::result::Result<(usize, f64), Failed> {
    let mut slope = Slope::new(method, UP, 0.5)?;
    let loss = |slope: &mut Slope| -> Result<f64> {
        let (theta, layout) = (slope.setup.theta.clone(), Arc::clone(&slope.layout));
        Ok(slope.score(&theta, &layout, &CrossEntropy)?.loss_sum)
    };
    let before = loss(&mut slope)?;
    slope.run(30, |_, _| Ok(()))?;
    let progress = 1.0 - loss(&mut slope)? / before;
    let (setup, at) = (&slope.setup, &slope.setup.attachments[0]);
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let Merged::Factors { left, right, scale } = setup.adapter.merge(at, &locals, &*setup.weight(at)?)? else {
        return Err("no factors".into());
    };
    let change: Tensor = (left.matmul(&right)? * scale)?;
    let changed = change.flatten_all()?.to_vec1::<f32>()?.into_iter().filter(|change| *change != 0.0).count();
    Ok((changed, progress))
}

fn sparse_change() -> std::result::Result<(), Failed> {
    let (own, progress) =
        entries_and_progress(json!({"method": "roselora", "rank": 2, "alpha": 8, "keep": 0.25, "ends": 0.6}))?;
    let (plain, plain_progress) = entries_and_progress(json!({"method": PLAIN, "rank": 2, "alpha": 8}))?;
    // 6 of 24 and 8 of 32, for each of two ranks.
    assert!(own > 0 && own <= 2 * 6 * 8, "{own} entries change");
    assert_eq!(plain, 32 * 24);
    assert!(progress > 0.0 && plain_progress > 0.0, "losses went down by {progress} and {plain_progress}");
    Ok(())
}

/// How many trained tensors are bit for bit what they were a step before, step after step but for the first, and whether they were always those that
/// had moved most.
fn at_rest(method: Value) -> std::result::Result<(Vec<usize>, bool), Failed> {
    let mut slope = Slope::new(method, "all-linear", 0.05)?;
    let start = slope.setup.params();
    let (mut before, mut resting, mut most) = (start.clone(), Vec::new(), true);
    let moved = |params: &Params, name: &TensorName| -> std::result::Result<f64, Failed> {
        let (now, then) = (params.get(name).ok_or("no tensor")?, start.get(name).ok_or("no tensor")?);
        Ok((now - then)?.abs()?.mean_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
    };
    slope.run(20, |step, slope| {
        let now = slope.setup.params();
        let names = now.iter().filter(|(name, _)| !now.is_fixed(name)).map(|(name, _)| name);
        let still = |name: &&TensorName| match (now.get(name), before.get(name)) {
            (Some(now), Some(before)) => difference(now, before) == 0.0,
            _ => false,
        };
        let (still, learning): (Vec<&TensorName>, Vec<&TensorName>) = names.partition(still);
        if step > 0 {
            resting.push(still.len());
        }
        // At the first check nothing was smoothed yet.
        if step == 4 {
            let least = still.iter().map(|name| moved(&before, name)).collect::<std::result::Result<Vec<f64>, _>>()?;
            let least = least.into_iter().fold(f64::MAX, f64::min);
            for name in learning {
                most &= moved(&before, name)? <= least;
            }
        }
        before = now;
        Ok(())
    })?;
    Ok((resting, most))
}

fn resting() -> std::result::Result<(), Failed> {
    // Of 14 linears, 6 of which have a bias, 20 vectors; checks at the steps 4, 8 and 12, and the end of all rest at 16.
    let method = json!({"method": "vectorfit", "freeze": 0.25, "begins": 0.2, "every": 0.2, "checks": 3});
    let (own, most) = at_rest(method)?;
    let expected: Vec<usize> = (1..20).map(|step| if (4..16).contains(&step) { 5 } else { 0 }).collect();
    assert_eq!(own, expected);
    assert!(most, "others had moved more");
    let (plain, _) = at_rest(json!({"method": PLAIN, "rank": 2}))?;
    assert_eq!(plain, vec![0; 19]);
    Ok(())
}

/// How many of the model's linears a component changes after some steps, and how far the loss went down, against what it was.
fn linears_and_progress(method: Value, lr: f64) -> std::result::Result<(usize, f64), Failed> {
    let mut slope = Slope::new(method, "all-linear", lr)?;
    let loss = |slope: &mut Slope| -> Result<f64> {
        let (theta, layout) = (slope.setup.theta.clone(), Arc::clone(&slope.layout));
        Ok(slope.score(&theta, &layout, &CrossEntropy)?.loss_sum)
    };
    let before = loss(&mut slope)?;
    slope.run(40, |_, _| Ok(()))?;
    let progress = 1.0 - loss(&mut slope)? / before;
    let mut changed = 0;
    for at in &slope.setup.attachments {
        let weight = slope.setup.weight(at)?.dense(DType::F32)?;
        let locals = attune_models::stack::locals(at, &slope.setup.params())?;
        changed += usize::from(match slope.setup.adapter.merge(at, &locals, &weight)? {
            Merged::Factors { left, right, scale } => largest(&(left.matmul(&right)? * scale)?) > 0.0,
            Merged::Weight { weight: merged, .. } => difference(&merged, &weight) > 0.0,
            other => return Err(format!("{other:?} does not merge").into()),
        });
    }
    Ok((changed, progress))
}

fn shared_weights() -> std::result::Result<(), Failed> {
    let (own, progress) = linears_and_progress(json!({"method": "taps", "score_lr": 1, "penalty": 4}), 0.05)?;
    let (plain, _) = linears_and_progress(json!({"method": PLAIN, "rank": 2}), 0.05)?;
    assert!(own > 0 && own <= 7, "{own} of 14 linears change");
    assert_eq!(plain, 14);
    assert!(progress > 0.0, "the loss went down by {progress}");
    Ok(())
}

fn share_of_linears() -> std::result::Result<(), Failed> {
    let (own, progress) = linears_and_progress(
        json!({"method": "selective-lora", "rank": 2, "most": 0.2, "every": 5, "score_lr": 1}),
        0.5,
    )?;
    let (plain, _) = linears_and_progress(json!({"method": PLAIN, "rank": 2}), 0.5)?;
    assert_eq!((own, plain), (3, 14));
    assert!(progress > 0.0, "the loss went down by {progress}");
    Ok(())
}

/// How much of what a component took off the loss in some steps it takes off with the first of its ranks alone.
fn by_first_rank(method: Value) -> std::result::Result<f64, Failed> {
    let mut slope = Slope::new(method, UP, 0.5)?;
    let layout = Arc::clone(&slope.layout);
    let start = slope.setup.theta.clone();
    let before = slope.score(&start, &layout, &CrossEntropy)?.loss_sum;
    slope.run(60, |_, _| Ok(()))?;
    let whole = slope.setup.theta.clone();
    let mut first = whole.clone();
    for (id, value) in whole.trained().filter(|(id, _)| id.name.local() == "lora_B") {
        let others = value.narrow(1, 1, value.dim(1)? - 1)?.zeros_like()?;
        first.put(&id, Tensor::cat(&[&value.narrow(1, 0, 1)?, &others], 1)?);
    }
    let gain = |slope: &mut Slope, theta: &Theta| {
        Ok::<_, Failed>(before - slope.score(theta, &layout, &CrossEntropy)?.loss_sum)
    };
    Ok(gain(&mut slope, &first)? / gain(&mut slope, &whole)?)
}

fn parts_of_a_rank() -> std::result::Result<(), Failed> {
    let method = json!({"method": "elastic-lora", "rank": 4, "step": 1, "smallest": 1, "left": "largest", "alpha": 16});
    let (own, plain) = (by_first_rank(method)?, by_first_rank(json!({"method": PLAIN, "rank": 4, "alpha": 16}))?);
    assert!(own > 0.5 && plain < 0.5, "the first of four ranks does {own} of it, and {plain} of {PLAIN}");
    Ok(())
}

/// By how much the first rank of a pair of factors changes in the second half of some steps, and by how much the second one.
fn halves(method: Value) -> std::result::Result<[f64; 2], Failed> {
    let mut slope = Slope::new(method, UP, 0.5)?;
    let columns = |slope: &Slope| -> std::result::Result<[Tensor; 2], Failed> {
        let name = TensorName::new(UP, "lora_B");
        let b = slope.setup.params().get(&name).ok_or("no factor")?.clone();
        Ok([b.narrow(1, 0, 1)?, b.narrow(1, 1, 1)?])
    };
    let mut half = None;
    slope.run(20, |step, slope| {
        if step == 9 {
            half = Some(columns(slope)?);
        }
        Ok(())
    })?;
    let (half, end) = (half.ok_or("no half")?, columns(&slope)?);
    Ok([difference(&end[0], &half[0]), difference(&end[1], &half[1])])
}

fn links() -> std::result::Result<(), Failed> {
    let own = halves(json!({"method": "chain-of-lora", "rank": 1, "alpha": 4, "links": 2}))?;
    let plain = halves(json!({"method": PLAIN, "rank": 2, "alpha": 8}))?;
    assert!(own[0] == 0.0 && own[1] > 1e-3, "links change by {own:?}");
    assert!(plain.iter().all(|by| *by > 1e-3), "ranks change by {plain:?}");
    Ok(())
}

/// The tokens of two demonstrations, and what each is of.
const SHOWN: [[u32; 8]; 2] = [[5, 30, 2, 7, 5, 11, 2, 9], [1, 2, 3, 4, 5, 6, 7, 8]];

/// How far each row of what trains goes from where it starts, in units of what demonstrations may at most.
fn furthest(method: Value, targets: &str, applies: SiteKind) -> std::result::Result<Vec<f64>, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F32)?;
    let setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), &[applies], DType::F32);
    let layout = Arc::new(setup.begun(&batch()));
    let starts: Vec<(TensorId, Tensor)> = setup.theta.trained().map(|(id, start)| (id, start.clone())).collect();
    let mut slope = Slope { setup, layout, lr: 20.0 };
    let mut most = vec![0.0; starts[0].1.dim(0)?];
    slope.run(8, |_, slope| {
        let (id, start) = &starts[0];
        let moved = (slope.setup.theta.get(id).ok_or("no value")? - start)?;
        let lengths: Vec<f32> = moved.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
        most.iter_mut().zip(lengths).for_each(|(most, length)| *most = f64::max(*most, f64::from(length)));
        Ok(())
    })?;
    Ok(most.into_iter().map(|length| length / (24.0f64 / 2048.0).sqrt()).collect())
}

/// What stands around inputs and labels has a bound of its own, and labels do not move.
fn within_bounds() -> std::result::Result<(), Failed> {
    let [tokens, types] = SHOWN;
    let method =
        json!({"method": "context-aware-prompt", "tokens": tokens, "types": types, "bound": 0.5, "format_bound": 0.25});
    let moved = furthest(method, "all", SiteKind::Embedding)?;
    for (moved, of) in moved.iter().zip(types) {
        let bound = [0.0, 0.25, 0.5, 0.25][of as usize % 4];
        assert!(*moved <= bound * (1.0 + 1e-5), "{moved} of {bound}");
    }
    // At least one of them would have gone further.
    assert!(moved.iter().any(|moved| (moved - 0.5).abs() < 1e-4), "{moved:?}");
    for (method, targets, applies) in [
        (json!({"method": "prompt-tuning", "length": 8}), "all", SiteKind::Embedding),
        (json!({"method": PLAIN, "rank": 2}), UP, SiteKind::Linear),
    ] {
        let moved = furthest(method, targets, applies)?;
        assert!(moved.iter().any(|moved| *moved > 1.0), "{moved:?}");
    }
    Ok(())
}

/// The weights of all linears after some steps, and how far the loss went down in the last of them.
fn pruned(method: Value) -> std::result::Result<(Vec<(String, Tensor)>, f64), Failed> {
    let mut slope = Slope::new(method, "all-linear", 0.05)?;
    let layout = Arc::clone(&slope.layout);
    let mut losses = Vec::new();
    slope.run(20, |step, slope| {
        let pass = Pass { theta: &slope.setup.theta, layout: &layout, dropout: None };
        if step >= 10 {
            losses.push(slope.setup.model.score(&pass, &CrossEntropy)?.loss_sum);
        }
        Ok(())
    })?;
    let mut weights = Vec::new();
    for at in &slope.setup.attachments {
        let weight = slope.setup.weight(at)?.dense(DType::F32)?;
        let locals = attune_models::stack::locals(at, &slope.setup.params())?;
        let made = match slope.setup.adapter.merge(at, &locals, &weight)? {
            Merged::Factors { left, right, scale } => (&weight + (left.matmul(&right)? * scale)?)?,
            Merged::Weight { weight, .. } => weight,
            other => return Err(format!("{other:?} does not merge").into()),
        };
        weights.push((at.site.to_string(), made));
    }
    Ok((weights, 1.0 - losses[9] / losses[0]))
}

/// Which share of the entries of all linears is 0 after some steps, and how far the loss went down in the last of them.
fn gone(method: Value) -> std::result::Result<(f64, f64), Failed> {
    let (weights, progress) = pruned(method)?;
    let (mut zeros, mut all) = (0, 0);
    for (_, made) in weights {
        let made = made.flatten_all()?.to_vec1::<f32>()?;
        zeros += made.iter().filter(|entry| **entry == 0.0).count();
        all += made.len();
    }
    Ok((zeros as f64 / all as f64, progress))
}

/// The columns of a weight that are 0.
fn empty(weight: &Tensor) -> std::result::Result<Vec<bool>, Failed> {
    Ok(weight.abs()?.max(0)?.to_vec1::<f32>()?.into_iter().map(|largest| largest == 0.0).collect())
}

/// Half of the heads of each attention, all columns of each, and a quarter of the neurons of each MLP.
fn whole_structures() -> std::result::Result<(), Failed> {
    let heads = support::architecture().heads;
    let shares = |method: Value| -> std::result::Result<(Vec<(f64, f64)>, f64), Failed> {
        let (weights, progress) = pruned(method)?;
        let leads_out = |site: &str| site.ends_with("o_proj") || site.ends_with("down_proj");
        let mut shares = Vec::new();
        for (site, weight) in weights.iter().filter(|(site, _)| leads_out(site)) {
            let empty = empty(weight)?;
            let units = if site.ends_with("o_proj") { heads } else { empty.len() };
            let whole = empty.chunks(empty.len() / units).filter(|unit| unit.iter().all(|empty| *empty)).count();
            let columns = empty.iter().filter(|empty| **empty).count();
            shares.push((whole as f64 / units as f64, columns as f64 / empty.len() as f64));
        }
        Ok((shares, progress))
    };
    let method = json!({"method": "dsee", "rank": 2, "entries": 20, "prune_heads": 0.5, "prune_neurons": 0.25});
    let (own, progress) = shares(method)?;
    assert!(own.chunks(2).all(|layer| layer == [(0.5, 0.5), (0.25, 0.25)]), "{own:?}");
    assert!(progress > 0.0, "the loss went down by {progress} since");
    let (plain, _) = shares(json!({"method": PLAIN, "rank": 2}))?;
    assert!(plain.iter().all(|shares| *shares == (0.0, 0.0)), "{plain:?}");
    Ok(())
}

fn zeros() -> std::result::Result<(), Failed> {
    for method in [
        json!({"method": "dsee", "rank": 2, "entries": 20, "prune": 0.5, "mask_delta": true}),
        json!({"method": "elastic-lora", "rank": 2, "step": 1, "smallest": 1, "sparsity": 0.5, "masked": true}),
    ] {
        let (own, progress) = gone(method.clone())?;
        assert_eq!(own, 0.5, "{method}");
        assert!(progress > 0.0, "{method}: the loss went down by {progress} since");
    }
    assert_eq!(gone(json!({"method": PLAIN, "rank": 2}))?.0, 0.0);
    Ok(())
}
