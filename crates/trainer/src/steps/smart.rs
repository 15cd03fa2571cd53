//! Smoothness-inducing regularisation and Bregman proximal steps: what the model says may neither change much when its input
//! embeddings do, in the worst direction, nor move far from what it said a moment ago.
//!
//! # Update
//! ```text
//! D(p, q) = Σ_v (p_v - q_v)(log p_v - log q_v)                      at each supervised row
//! δ       ~ N(0, σ²)
//! K times   g = ∇_δ KL(f(e + δ; θ) ‖ f(e; θ)),   δ <- Π_ε(δ + η g / ‖g‖_∞)             ‖·‖_∞ of each token
//! L       = L_job(θ) + λ (1/n) Σ D(f(e + δ; θ), f(e; θ)) + μ (1/n) Σ D(f(e; θ), sg f(e; θ̃))
//! θ       <- update(θ, clip(∇L))
//! θ̃       <- β θ̃ + (1 - β) θ
//! ```
//!
//! # Symbols
//! `e` are the embeddings of the tokens, `f` what the model makes of them, `n` the supervised rows of the step. `smoothness` is
//! λ, `proximity` μ, `radius` ε, `noise` σ, `ascent` η, `ascents` K; `momentum` is β in the first tenth of the steps,
//! `late_momentum` after that. θ̃ begins as θ.
//!
//! # Cost
//! K passes forward and back over every batch twice, and one over it three times (two without one of the terms).
//!
//! # Limits
//! λ = μ = 0 is the usual step. With β = 0 the anchor is the last iterate. Where θ = θ̃ the proximal term and its gradient are
//! zero.
//!
//! # Departures
//! The authors' code divides δ by its norm where the paper projects it on the ball; `unit_norm` does as the code, with steps
//! of norm 1 whatever ε is. Dropout's masks are the same in all copies of a text, so that without δ there is no divergence.
//!
//! # Paper
//! SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled Regularized Optimization. Jiang et al., 2020.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use attune_points::engine::{Engine, Job, Source, StepReport, StepRule};
use attune_points::objective::Level;
use attune_points::theta::Rows;
use attune_points::{BankKind, Binding, Error, Grads, Layout, Owner, Result, TensorId, Theta};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::plain;
use crate::copies::{Departure, Smoothed};

/// Weights and sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Weight of the divergence between what the model says of a text and of the same text with its embeddings moved.
    #[schemars(range(min = 0.0))]
    smoothness: f64,
    /// Weight of the divergence from the mean of what the parameters were.
    #[schemars(range(min = 0.0))]
    proximity: f64,
    /// The most that a number of an embedding is moved by.
    #[schemars(range(min = 1e-8))]
    radius: f64,
    /// Standard deviation of where the search for the worst direction begins.
    #[schemars(range(min = 0.0))]
    noise: f64,
    /// Size of a step of that search.
    #[schemars(range(min = 0.0))]
    ascent: f64,
    /// Steps of that search.
    #[schemars(range(max = 16))]
    ascents: u32,
    /// Share of the mean that stays at each step, in the first tenth of the steps.
    #[schemars(range(min = 0.0, max = 1.0))]
    momentum: f64,
    /// The same after that.
    #[schemars(range(min = 0.0, max = 1.0))]
    late_momentum: f64,
    /// Whether what an embedding is moved by is divided by its largest number instead of cut off at `radius`.
    unit_norm: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            smoothness: 5.0,
            proximity: 1.0,
            radius: 1e-5,
            noise: 1e-5,
            ascent: 1e-3,
            ascents: 1,
            momentum: 0.99,
            late_momentum: 0.999,
            unit_norm: false,
        }
    }
}

pub(super) struct Smart {
    config: Config,
    /// Steps with the first momentum.
    early: u64,
    /// θ̃, once a step was made: the tensors that train, by name.
    anchor: BTreeMap<TensorId, Tensor>,
}

impl Method for Smart {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled \
                    Regularized Optimization",
            authors: "Jiang et al.",
            year: 2020,
        }),
        copies: "1 + ceil(min(smoothness, 1)) + ceil(min(proximity, 1))",
        passes: "1 + ceil(min(smoothness, 1)) * (1 + 2 * ascents) + ceil(min(proximity, 1))",
        ..Card::new(
            "smart",
            Point::StepRule,
            "Steps that keep the model smooth around its inputs and close to what it said before: against overfitting \
             on little data; some three times the time of a step.",
        )
    };
    type Config = Config;
    type Object = dyn StepRule;

    fn build(config: Config, cx: &BuildCx<'_>) -> std::result::Result<Box<dyn StepRule>, Vec<Fault>> {
        Ok(Box::new(Self { config, early: cx.steps.0 / 10, anchor: BTreeMap::new() }))
    }
}

impl StepRule for Smart {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        let Config { smoothness, proximity, radius, unit_norm, .. } = self.config;
        let level = job.objective.level();
        if level != Level::Chunk {
            return Some(format!(
                "is `smart`, which adds to a loss of single tokens; this objective's is one of a {level:?}"
            ));
        }
        if smoothness > 0.0 && job.narrow && radius < 1e-3 && !unit_norm {
            return Some(format!(
                "is `smart` with `radius` {radius}, less than activations of bf16 can tell apart: expected 0.001 or more, \
                 or `tune.precision: f32`"
            ));
        }
        let trains_weights = job.theta.banks.iter().any(|bank| bank.train && bank.kind == BankKind::Weights);
        (proximity > 0.0 && trains_weights).then(|| {
            "is `smart` with `proximity`, which needs the model with two sets of what trains at once; all weights of a base \
             are one set: expected `proximity: 0`, or a component"
                .to_owned()
        })
    }

    fn copies(&self) -> usize {
        1 + usize::from(self.config.smoothness > 0.0) + usize::from(self.config.proximity > 0.0)
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let Config { smoothness, proximity, .. } = self.config;
        if self.copies() == 1 {
            return plain::Plain.step(step, engine);
        }
        let batch = engine.batch(Source::Train)?;
        let (job, theta) = (engine.objective(), engine.theta().clone());
        if self.anchor.is_empty() {
            self.anchor =
                engine.wanted().into_iter().filter_map(|id| Some((id.clone(), theta.get(&id)?.clone()))).collect();
        }
        let divisor = job.denominator().of(batch.counts);
        // Divergences are means over supervised rows, whatever the job's loss is divided by.
        let weight = divisor / batch.counts.tokens.max(1) as f64;
        let mut parts = Vec::with_capacity(batch.parts.len());
        for (part, layout) in &batch.parts {
            let rng = engine.rng("smart").sub(u64::from(*part));
            let moved = if smoothness > 0.0 { Some(self.worst(&theta, layout, rng, engine)?) } else { None };
            let smoothed = Smoothed {
                job: Arc::clone(&job),
                smoothness: smoothness * weight,
                proximity: proximity * weight,
                sums: Arc::default(),
            };
            let at = self.copied(&theta, layout, moved)?;
            let mut sink = Grads::wanting(engine.wanted());
            let copies = layout.with_copies(self.copies());
            let mut report = engine.grad(&at, &copies, &smoothed, 1.0 / divisor, &mut sink)?;
            let [smooth, close] = *smoothed.sums.lock().unwrap_or_else(PoisonError::into_inner);
            report.beside.insert("smart/smoothness".into(), smooth * weight);
            report.beside.insert("smart/proximity".into(), close * weight);
            parts.push((*part, sink, report));
        }
        let (gradients, loss) = engine.reduce(parts)?;
        let grad_norm = engine.update(gradients)?;
        let beta = if step.0 < self.early { self.config.momentum } else { self.config.late_momentum };
        for (id, mean) in &mut self.anchor {
            let Some(now) = engine.theta().get(id) else { continue };
            *mean = ((&*mean * beta)? + (now * (1.0 - beta))?)?;
        }
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
    }

    fn state(&self) -> BTreeMap<String, Tensor> {
        self.anchor.iter().map(|(id, tensor)| (id.to_string(), tensor.clone())).collect()
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>, theta: &Theta) -> Result<()> {
        for (id, tensor) in theta.trained() {
            if let Some(anchor) = state.remove(&id.to_string()) {
                if anchor.dims() != tensor.dims() {
                    let (got, expected) = (anchor.dims(), tensor.dims());
                    return Err(Error::Refused(format!("has {id} of {got:?}; expected {expected:?}")));
                }
                self.anchor.insert(id, anchor);
            }
        }
        state.keys().next().map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which does not train"))))
    }
}

impl Smart {
    /// What the embeddings of a batch are moved by so that the model says something else: `[T, hidden]`.
    fn worst(&self, theta: &Theta, layout: &Layout, mut rng: Rng, engine: &mut dyn Engine) -> Result<Tensor> {
        let input = TensorId::input_embeddings();
        let (rows, hidden) = (layout.n_rows(), engine.hidden());
        let mut delta = rng.normal_tensor((rows, hidden), self.config.noise, DType::F32)?;
        let twice = layout.with_copies(2);
        for _ in 0..self.config.ascents {
            let moved = Tensor::cat(&[&delta.zeros_like()?, &delta], 0)?;
            let mut sink = Grads::wanting([input.clone()]);
            engine.grad(&theta.clone().with_input(moved), &twice, &Departure, 1.0, &mut sink)?;
            let gradient = match sink.get(&input) {
                Some(gradient) => gradient.narrow(0, rows, rows)?,
                None => delta.zeros_like()?,
            };
            delta = self.ascended(&delta, &gradient)?;
        }
        self.projected(&delta)
    }

    /// One step along the gradient, of the same size for each token that has one.
    fn ascended(&self, delta_td: &Tensor, gradient_td: &Tensor) -> Result<Tensor> {
        self.projected(&(delta_td + (by_largest(gradient_td)? * self.config.ascent)?)?)
    }

    fn projected(&self, delta_td: &Tensor) -> Result<Tensor> {
        if self.config.unit_norm {
            return by_largest(delta_td);
        }
        Ok(delta_td.clamp(-self.config.radius, self.config.radius)?)
    }

    /// The parameters of all copies of a batch: as they are for the first, with moved embeddings for the second, and those of
    /// the anchor for the last.
    fn copied(&self, theta: &Theta, layout: &Layout, moved: Option<Tensor>) -> Result<Theta> {
        let (mut at, rows, copies) = (theta.clone(), layout.n_rows(), self.copies());
        if let Some(moved) = moved {
            let still = moved.zeros_like()?;
            let inputs: Vec<&Tensor> = [&still, &moved, &still].into_iter().take(copies).collect();
            at.input = Some(Tensor::cat(&inputs, 0)?);
        }
        if self.config.proximity == 0.0 {
            return Ok(at);
        }
        for (slot, bank) in at.banks.iter_mut().enumerate().filter(|(_, bank)| bank.train) {
            let Some(now) = bank.sets.first() else { continue };
            let owner = Owner::Bank { slot: slot as u16, set: 0 };
            let anchored = now.map(|name, tensor| {
                let anchor = self.anchor.get(&TensorId { owner, name: name.clone() });
                Ok::<_, Error>(anchor.unwrap_or(tensor).clone())
            });
            bank.sets.push(Arc::new(anchored?));
            let (own, all) = ((rows * (copies - 1)) as u32, (rows * copies) as u32);
            let anchor = bank.sets.len() as u32 - 1;
            at.bindings.retain(|binding| usize::from(binding.slot) != slot);
            let rows = Rows::Segments(vec![(0..own, 0), (own..all, anchor)]);
            at.bindings.push(Binding { slot: slot as u16, rows });
        }
        at.bindings.sort_by_key(|binding| binding.slot);
        Ok(at)
    }
}

/// Rows divided by the magnitude of their largest number; rows of zeros as they are.
fn by_largest(x_td: &Tensor) -> Result<Tensor> {
    let largest_t1 = x_td.abs()?.max_keepdim(1)?;
    let divisor_t1 = largest_t1.gt(0.0)?.where_cond(&largest_t1, &largest_t1.ones_like()?)?;
    Ok(x_td.broadcast_div(&divisor_t1)?)
}

#[cfg(test)]
mod tests {
    use attune_points::engine::{Batch, LossReport, Renewed, Tensors};
    use attune_points::layout::{NO_LABEL, Row, Source as Origin};
    use attune_points::{Bank, GradSink, Params, TensorName};
    use candle_core::Var;

    use attune_points::objective::{ChunkLoss, ChunkView, Denominator, LogitsLoss as _, Objective};
    use candle_core::Device;

    use super::*;
    use crate::copies::OfChunk;

    const HIDDEN: usize = 3;

    /// The cross-entropy of each row.
    struct Plainly;

    impl Objective for Plainly {
        fn denominator(&self) -> Denominator {
            Denominator::Tokens
        }

        fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
            Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
        }
    }

    /// Logits `(e + δ) W`, each row for itself, with `W` as what trains.
    struct Toy {
        theta: Theta,
        layout: Arc<Layout>,
        passes: usize,
    }

    fn id() -> TensorId {
        TensorId { owner: Owner::Bank { slot: 0, set: 0 }, name: TensorName::new("head", "weight") }
    }

    impl Toy {
        fn new() -> Self {
            let mut layout = Layout::new();
            let labels = [2, 0, NO_LABEL, 3, 1];
            layout.push(Origin::default(), labels.map(|label| (Row::Token(1), label)));
            let w = Rng::new(3, "w").normal_tensor((HIDDEN, 4), 1.0, DType::F32).unwrap();
            let set = Arc::new(Params::from_iter([(id().name, w)]));
            let bank = Bank { slot: "toy".into(), kind: BankKind::Adapter, sets: vec![set], train: true };
            Self { theta: Theta::single([bank]), layout: Arc::new(layout), passes: 0 }
        }

        /// The loss and its gradients by the embeddings and by `W`.
        fn run(&self, at: &Theta, on: &Layout, of: &dyn Objective) -> (f64, Tensor, Option<Tensor>) {
            let n = self.layout.n_rows();
            let e = Rng::new(4, "e").normal_tensor((n, HIDDEN), 1.0, DType::F32).unwrap();
            let copies = on.n_rows() / n;
            let added = at.input.clone().unwrap_or_else(|| e.zeros_like().unwrap().repeat((copies, 1)).unwrap());
            let added = Var::from_tensor(&added).unwrap();
            let own = Var::from_tensor(at.get(&id()).unwrap()).unwrap();
            let rows = on.supervised();
            let ids: Vec<u32> = rows.iter().map(|row| row.row).collect();
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let logits: Vec<Tensor> = (0..copies)
                .map(|copy| {
                    let x = (&e + added.narrow(0, copy * n, n).unwrap()).unwrap();
                    let anchored = at.banks[0].sets.len() == 2 && copy + 1 == copies;
                    let w = if anchored { at.banks[0].sets[1].get(&id().name).unwrap() } else { own.as_tensor() };
                    x.matmul(w).unwrap().index_select(&ids, 0).unwrap()
                })
                .collect();
            let logits = Tensor::cat(&logits, 0).unwrap();
            let chunk = of.chunk(&ChunkView { layout: on, rows: &rows }).unwrap();
            let loss = match chunk {
                ChunkLoss::Logits(loss) => loss.graph(&logits).unwrap(),
                loss => {
                    let sums = Arc::default();
                    OfChunk { job: loss, rows, weights: [0.0; 2], sums }.graph(&logits).unwrap()
                }
            };
            let loss = loss.sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let zeros = added.zeros_like().unwrap();
            let by_input = gradients.get(added.as_tensor()).cloned().unwrap_or(zeros);
            (f64::from(loss.to_scalar::<f32>().unwrap()), by_input, gradients.get(own.as_tensor()).cloned())
        }
    }

    impl Engine for Toy {
        fn theta(&self) -> &Theta {
            &self.theta
        }
        fn set(&mut self, theta: Theta) {
            self.theta = theta;
        }
        fn batch(&mut self, _: Source) -> Result<Batch> {
            let (counts, n_rows) = (self.layout.counts(), self.layout.n_rows() as u64);
            Ok(Batch { parts: vec![(0, Arc::clone(&self.layout))], counts, n_rows })
        }
        fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport> {
            Ok(LossReport { loss_sum: self.run(at, on, of).0, counts: on.counts(), ..LossReport::default() })
        }
        fn grad(
            &mut self,
            at: &Theta,
            on: &Layout,
            of: &dyn Objective,
            scale: f64,
            sink: &mut dyn GradSink,
        ) -> Result<LossReport> {
            self.passes += 1;
            let (loss_sum, by_input, by_w) = self.run(at, on, of);
            sink.put(&TensorId::input_embeddings(), &(by_input * scale)?)?;
            if let Some(by_w) = by_w {
                sink.put(&id(), &(by_w * scale)?)?;
            }
            Ok(LossReport { loss_sum, counts: on.counts(), ..LossReport::default() })
        }
        fn objective(&self) -> Arc<dyn Objective> {
            Arc::new(Plainly)
        }
        fn wanted(&self) -> Vec<TensorId> {
            vec![id()]
        }
        fn reduce(&mut self, mut parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
            let (_, gradients, report) = parts.remove(0);
            Ok((gradients, report))
        }
        /// Gradient descent.
        fn update(&mut self, gradients: Grads) -> Result<f64> {
            let w = (self.theta.get(&id()).unwrap() - (gradients.get(&id()).unwrap() * 0.5)?)?;
            self.theta.banks[0].sets = vec![Arc::new(Params::from_iter([(id().name, w)]))];
            Ok(0.0)
        }
        fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
            Ok(mine)
        }
        fn renew(&mut self, tensor: &TensorId, _: &[Renewed]) -> Result<()> {
            Err(Error::Refused(format!("{tensor} has no entries that come and go")))
        }
        fn hidden(&self) -> usize {
            HIDDEN
        }
        fn rng(&self, purpose: &'static str) -> Rng {
            Rng::new(9, purpose)
        }
    }

    fn smart(config: Config) -> Smart {
        Smart { config, early: 0, anchor: BTreeMap::new() }
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_search_ends_within_the_ball_and_where_the_model_says_something_else() {
        let mut toy = Toy::new();
        let (theta, layout) = (toy.theta.clone(), Arc::clone(&toy.layout));
        let divergence = |ascents, toy: &mut Toy| {
            let rule = smart(Config { radius: 0.1, noise: 0.02, ascent: 0.05, ascents, ..Config::default() });
            let delta = rule.worst(&theta, &layout, Rng::new(1, "start"), toy).unwrap();
            assert!(values(&delta).iter().all(|x| x.abs() <= 0.1 + 1e-7), "{ascents}");
            let moved = Tensor::cat(&[&delta.zeros_like().unwrap(), &delta], 0).unwrap();
            toy.score(&theta.clone().with_input(moved), &layout.with_copies(2), &Departure).unwrap().loss_sum
        };
        let [start, one, three] = [0, 1, 3].map(|ascents| divergence(ascents, &mut toy));
        assert!(start > 0.0 && one > 2.0 * start && three > one, "{start}, {one}, {three}");
        assert_eq!(toy.passes, 4, "one pass for each step of the search");
        let coded = smart(Config { unit_norm: true, noise: 0.02, ..Config::default() });
        let delta = coded.worst(&theta, &layout, Rng::new(1, "start"), &mut toy).unwrap();
        assert!(values(&delta.abs().unwrap().max(1).unwrap()).iter().all(|norm| (norm - 1.0).abs() < 1e-6));
    }

    #[test]
    fn its_card_counts_the_copies_that_its_passes_hold() {
        for (smoothness, proximity, passes) in [(0.0, 0.0, 1.0), (5.0, 0.0, 6.0), (0.0, 1e-3, 2.0), (1e-9, 40.0, 7.0)] {
            let config = Config { smoothness, proximity, ascents: 2, ..Config::default() };
            let Ok(serde_json::Value::Object(names)) = serde_json::to_value(&config) else { panic!("no mapping") };
            let number = |text| attune_spec::method::expression::number(text, &names).unwrap();
            assert_eq!(number(Smart::CARD.copies), smart(config).copies() as f64);
            assert_eq!(number(Smart::CARD.passes), passes);
        }
    }

    #[test]
    fn a_token_without_a_gradient_is_not_moved_by_it() {
        let rule = smart(Config { radius: 1.0, ascent: 0.5, ..Config::default() });
        let delta = Tensor::new(&[[0.1f32, -0.2], [0.3, 0.9]], &Device::Cpu).unwrap();
        let gradient = Tensor::new(&[[0.0f32, 0.0], [-2.0, 1.0]], &Device::Cpu).unwrap();
        let moved = values(&rule.ascended(&delta, &gradient).unwrap());
        assert!(moved.iter().zip([0.1, -0.2, -0.2, 1.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{moved:?}");
    }

    /// With all weights zero it is gradient descent; at the anchor the proximal term is nothing, and away from it it pulls back.
    #[test]
    fn without_weights_it_is_the_usual_step_and_at_the_anchor_nothing_is_added() {
        let after = |config: Config, steps: u64| {
            let (mut toy, mut rule) = (Toy::new(), smart(config));
            let reports: Vec<StepReport> = (0..steps).map(|step| rule.step(Step(step), &mut toy).unwrap()).collect();
            (values(toy.theta.get(&id()).unwrap()), reports)
        };
        let none = Config { smoothness: 0.0, proximity: 0.0, ..Config::default() };
        let near = Config { proximity: 1.0, smoothness: 0.0, ..Config::default() };
        let mut plain = Toy::new();
        plain::Plain.step(Step(0), &mut plain).unwrap();
        assert_eq!(after(none.clone(), 1).0, values(plain.theta.get(&id()).unwrap()));
        let (at_anchor, reports) = after(near.clone(), 1);
        let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off(&at_anchor, &after(none.clone(), 1).0) < 1e-6);
        assert_eq!(reports[0].loss.beside["smart/proximity"], 0.0);
        let (free, _) = after(none, 6);
        let (held, reports) = after(near, 6);
        let start = values(Toy::new().theta.get(&id()).unwrap());
        assert!(reports[5].loss.beside["smart/proximity"] > 0.0);
        assert!(off(&held, &start) < off(&free, &start), "it moves less far");
    }

    #[test]
    fn the_anchor_is_a_mean_of_what_was_and_with_no_momentum_the_last_iterate() {
        for (momentum, is_last) in [(0.0, true), (0.9, false)] {
            let (mut toy, mut rule) =
                (Toy::new(), smart(Config { late_momentum: momentum, smoothness: 0.0, ..Config::default() }));
            let mut mean = values(toy.theta.get(&id()).unwrap());
            for step in 0..3 {
                rule.step(Step(step), &mut toy).unwrap();
                let now = values(toy.theta.get(&id()).unwrap());
                mean.iter_mut().zip(&now).for_each(|(m, x)| *m = momentum as f32 * *m + (1.0 - momentum) as f32 * x);
                let anchor = values(&rule.state()[&id().to_string()]);
                assert!(anchor.iter().zip(&mean).all(|(a, m)| (a - m).abs() < 1e-6));
                assert_eq!(anchor == now, is_last);
            }
            let mut other = smart(Config::default());
            other.restore(rule.state(), &toy.theta).unwrap();
            assert_eq!(values(&other.state()[&id().to_string()]), values(&rule.state()[&id().to_string()]));
            let strange = BTreeMap::from([("strange".to_owned(), Tensor::new(1f32, &Device::Cpu).unwrap())]);
            assert!(other.restore(strange, &toy.theta).unwrap_err().to_string().contains("strange"));
        }
    }
}
