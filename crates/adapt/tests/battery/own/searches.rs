//! Of a method that takes no gradients: what it does with losses alone.

use std::sync::Arc;

use attune_adapt::ADAPTERS;
use attune_models::{Model, Pass};
use attune_points::adapter::Trained;
use attune_points::engine::{self, Batch, Engine, LossReport, Renewed, Source, StepReport, StepRule, Tensors};
use attune_points::layout::Source as DocSource;
use attune_points::objective::Objective;
use attune_points::{Error, GradSink, Grads, Layout, Params, Result, Row, Tap, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{CrossEntropy, Setup, batch, difference, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[
    ("bbtv2::its_loss_goes_down_where_there_is_no_backward_pass", by_losses_alone),
    ("bbtv2::a_turn_changes_one_layer_and_never_makes_the_loss_more", turn_by_turn),
    ("bbtv2::without_numbers_it_is_the_base_behind_drawn_tokens", behind_tokens),
    ("bbtv2::what_goes_on_from_a_state_has_the_same_bits", resumed),
    ("bbtv2::what_begins_with_what_was_found_before_begins_there", begun_again),
];

const STEPS: u64 = 40;
const POPULATION: u64 = 8;

fn small() -> Value {
    json!({"method": "bbtv2", "length": 3, "dimensions": 8, "population": POPULATION, "budget": 1 + STEPS * (POPULATION + 1)})
}

/// An engine that has no backward pass, and counts all others.
struct Blind {
    setup: Setup,
    parts: Vec<(u32, Arc<Layout>)>,
    /// Passes over the step's data.
    passes: u64,
    looks: u64,
    step: u64,
}

impl Blind {
    fn new(method: Value) -> std::result::Result<Self, Failed> {
        let setup = if method["method"] == PLAIN {
            Setup::new(build(method).map_err(fail)?, "all-linear", DType::F32)
        } else {
            let card = ADAPTERS.card(method["method"].as_str().unwrap_or_default()).ok_or("no card")?;
            Setup::of(card, build(method).map_err(fail)?, DType::F32)
        };
        let layout = setup.begun(&batch());
        let part = |of: std::ops::Range<usize>| Arc::new(layout.of_docs(|at, _| of.contains(&at)));
        let parts = vec![(0, part(0..2)), (1, part(2..3))];
        Ok(Self { setup, parts, passes: 0, looks: 0, step: 0 })
    }

    fn rule(&self) -> Option<Box<dyn StepRule>> {
        let attachments = self.setup.attachments.iter().collect();
        self.setup.adapter.step_rule(&Trained { slot: 0, attachments, steps: Step(STEPS) })
    }

    fn loss(&self) -> Result<f64> {
        let (model, theta) = (&self.setup.model, &self.setup.theta);
        let of = |(_, layout): &(u32, Arc<Layout>)| {
            Ok(model.score(&Pass { theta, layout, dropout: None }, &CrossEntropy)?.loss_sum)
        };
        self.parts.iter().map(of).sum()
    }

    fn run(&mut self, rule: &mut dyn StepRule, steps: std::ops::Range<u64>) -> Result<Vec<StepReport>> {
        steps
            .map(|step| {
                self.step = step;
                rule.step(Step(step), self)
            })
            .collect()
    }
}

impl Engine for Blind {
    fn theta(&self) -> &Theta {
        &self.setup.theta
    }

    fn set(&mut self, theta: Theta) {
        self.setup.theta = theta;
    }

    fn batch(&mut self, _: Source) -> Result<Batch> {
        let counts = self.parts.iter().map(|(_, layout)| layout.counts()).sum();
        let n_rows = self.parts.iter().map(|(_, layout)| layout.n_rows() as u64).sum();
        Ok(Batch { parts: self.parts.clone(), counts, n_rows })
    }

    fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport> {
        self.passes += u64::from(on.n_rows() == self.parts[0].1.n_rows());
        self.setup.model.score(&Pass { theta: at, layout: on, dropout: None }, of)
    }

    fn look(&mut self, at: &Theta, on: &Layout, tap: &dyn Tap) -> Result<()> {
        self.looks += u64::from(on.n_rows() == self.parts[0].1.n_rows());
        let model: &Model = &self.setup.model;
        model.look(&[Pass { theta: at, layout: on, dropout: None }], tap).map(drop)
    }

    fn grad(&mut self, _: &Theta, _: &Layout, _: &dyn Objective, _: f64, _: &mut dyn GradSink) -> Result<LossReport> {
        Err(Error::Refused("there is no backward pass".to_owned()))
    }

    fn objective(&self) -> Arc<dyn Objective> {
        Arc::new(CrossEntropy)
    }

    fn wanted(&self) -> Vec<TensorId> {
        self.setup.theta.trained().map(|(id, _)| id).collect()
    }

    fn reduce(&mut self, _: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        Err(Error::Refused("there are no gradients".to_owned()))
    }

    fn update(&mut self, _: Grads) -> Result<f64> {
        Err(Error::Refused("there are no gradients".to_owned()))
    }

    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
        Ok(mine)
    }

    fn renew(&mut self, _: &TensorId, _: &[Renewed]) -> Result<()> {
        Err(Error::Refused("nothing comes and goes".to_owned()))
    }

    fn hidden(&self) -> usize {
        24
    }

    fn rng(&self, purpose: &'static str) -> Rng {
        Rng::new(1, purpose).sub(self.step)
    }
}

fn by_losses_alone() -> std::result::Result<(), Failed> {
    let mut own = Blind::new(small())?;
    let mut rule = own.rule().ok_or("no steps of its own")?;
    assert!(!rule.takes_gradients());
    let before = own.loss()?;
    let reports = own.run(&mut *rule, 0..STEPS)?;
    let after = own.loss()?;
    assert!(after < 0.8 * before, "from {before} to {after}");
    // One pass a candidate and one at what is there, and one look at the stream; all of it is said, and in the budget.
    assert_eq!((own.passes, own.looks), (STEPS * (POPULATION + 1), 1));
    let said = |report: &StepReport| report.metrics.iter().find(|(name, _)| name == "calls").map(|(_, calls)| *calls);
    assert_eq!(reports.last().and_then(said), Some((1 + STEPS * (POPULATION + 1)) as f64));
    let last = reports.last().ok_or("no report")?;
    assert!((last.loss.loss_sum - after).abs() < 1e-5 * after, "the loss that is said is that of what is kept");

    let mut plain = Blind::new(json!({"method": PLAIN, "rank": 2}))?;
    let before = plain.loss()?;
    assert!(plain.rule().is_none());
    for _ in 0..STEPS {
        assert!(engine::usual_step(&mut plain).unwrap_err().to_string().contains("no backward pass"));
    }
    assert_eq!(plain.loss()?, before);
    Ok(())
}

fn turn_by_turn() -> std::result::Result<(), Failed> {
    let mut own = Blind::new(small())?;
    let mut rule = own.rule().ok_or("no steps of its own")?;
    // The table of tokens, and the second of two layers.
    let sites = ["model.embed_tokens", "model.layers.1.self_attn"];
    let (mut loss, mut moved) = (own.loss()?, [0; 2]);
    for step in 0..12 {
        let before = own.setup.params();
        own.run(&mut *rule, step..step + 1)?;
        let turn = sites[step as usize % 2];
        for (name, now) in own.setup.params().iter() {
            let then = before.get(name).ok_or("a tensor is new")?;
            let is_same = then.dtype() == DType::I64 || difference(now, then) == 0.0;
            if (name.owner(), name.local()) == (turn, "z") {
                moved[step as usize % 2] += u64::from(!is_same);
            } else if step > 0 || name.local() != "scale" {
                assert!(is_same, "{name} moved in step {step}, whose turn is that of {turn}");
            }
        }
        let now = own.loss()?;
        assert!(now <= loss * (1.0 + 1e-6), "from {loss} to {now} in step {step}");
        loss = now;
    }
    assert!(moved.iter().all(|moved| *moved > 0), "{moved:?}");
    // What is added is as large, at first, as the stream is where it is added.
    let name = TensorName::new(sites[1], "scale");
    let scale = own.setup.params().get(&name).ok_or("no scale")?.to_vec1::<f32>()?;
    let pass = Pass { theta: &own.setup.theta, layout: &own.parts[0].1, dropout: None };
    let rows = own.setup.model.hidden(&pass)?;
    // Before the first attention, the first MLP and the second attention.
    let spread = largest(&(rows[2].sqr()?.mean_all()?.sqrt()? / 8f64.sqrt())?.reshape(1)?);
    assert!(scale.iter().all(|x| *x == scale[0]));
    assert!((0.5..1.5).contains(&(f64::from(scale[0]) / spread)), "{} where the stream makes {spread}", scale[0]);
    Ok(())
}

fn behind_tokens() -> std::result::Result<(), Failed> {
    let own = Blind::new(small())?;
    let setup = &own.setup;
    let params = setup.params();
    let held = |local: &str| params.get(&TensorName::new("model.embed_tokens", local)).cloned().ok_or("no tensor");
    let base = setup.model.base();
    let table = base.tensor(&base.tensor_name("model.embed_tokens", "weight"), DType::F32)?.to_vec2::<f32>()?;
    let rows = held("start")?.to_vec2::<f32>()?;
    let tokens: Vec<u32> =
        rows.iter().filter_map(|row| table.iter().position(|of| of == row)).map(|at| at as u32).collect();
    assert_eq!(tokens.len(), 3);
    assert_eq!(largest(&held("z")?), 0.0);
    let (plain, mut told) = (batch(), Layout::new());
    for doc in plain.docs() {
        let own = plain.rows()[doc.rows.start as usize..doc.rows.end as usize].iter().copied();
        let rows = tokens.iter().map(|&id| Row::Token(id)).chain(own).map(|row| (row, u32::MAX));
        told.push(DocSource::default(), rows.collect::<Vec<_>>());
    }
    let all = setup.model.logits(&Pass { theta: &setup.theta.adapters_off(), layout: &told, dropout: None })?;
    let own: Vec<u32> = told.docs().iter().flat_map(|doc| doc.rows.start + 3..doc.rows.end).collect();
    let expected = all.index_select(&Tensor::new(own, all.device())?, 0)?;
    let found = setup.logits(&plain)?;
    assert!(difference(&found, &expected) < 1e-5 * largest(&expected));
    Ok(())
}

fn resumed() -> std::result::Result<(), Failed> {
    let bits = |params: Params| -> Result<Vec<Vec<f32>>> {
        let floats = params.iter().filter(|(_, tensor)| tensor.dtype() == DType::F32);
        floats.map(|(_, tensor)| Ok(tensor.flatten_all()?.to_vec1()?)).collect()
    };
    let mut whole = Blind::new(small())?;
    let mut rule = whole.rule().ok_or("no steps of its own")?;
    whole.run(&mut *rule, 0..12)?;
    for cut in [1, 2, 7] {
        let mut first = Blind::new(small())?;
        let mut rule = first.rule().ok_or("no steps of its own")?;
        first.run(&mut *rule, 0..cut)?;
        let mut second = Blind::new(small())?;
        second.set(first.theta().clone());
        let mut goes_on = second.rule().ok_or("no steps of its own")?;
        goes_on.restore(rule.state(), second.theta())?;
        second.run(&mut *goes_on, cut..12)?;
        assert!(bits(second.setup.params())? == bits(whole.setup.params())?, "cut at {cut}");
        let mut lost = rule.state();
        lost.remove("calls");
        assert!(second.rule().ok_or("no rule")?.restore(lost, first.theta()).is_err());
    }
    Ok(())
}

/// A component that was searched for before: what is added stays as large as it was, and candidates are around what was found.
fn begun_again() -> std::result::Result<(), Failed> {
    let mut own = Blind::new(small())?;
    let mut rule = own.rule().ok_or("no steps of its own")?;
    own.run(&mut *rule, 0..STEPS)?;
    let (found, before) = (own.loss()?, own.setup.params());
    let method = json!({"method": "bbtv2", "length": 3, "dimensions": 8, "population": POPULATION, "sigma": 1e-3});
    let mut again = Blind::new(method)?;
    again.set(own.theta().clone());
    let mut rule = again.rule().ok_or("no steps of its own")?;
    let first = again.run(&mut *rule, 0..2)?;
    assert!(first[0].loss.loss_sum <= found * (1.0 + 1e-6), "{} after {found}", first[0].loss.loss_sum);
    for (name, now) in again.setup.params().iter().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
        let moved = difference(now, before.get(name).ok_or("a tensor is new")?);
        assert!(if name.local() == "z" { moved < 0.01 } else { moved == 0.0 }, "{name} moved by {moved}");
    }
    assert!(again.loss()? < found, "close to what was found nothing is better");
    Ok(())
}
