//! Steps that choose anew, every so often, which single entries of weights train: those that moved least go, and those that the
//! loss pulled at most, while they were watched, come.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_points::adapter::{Attachment, Trained};
use attune_points::engine::{self, Batch, Engine, Job, LossReport, Renewed, Source, StepReport, StepRule, Tensors};
use attune_points::objective::Level;
use attune_points::{Entries, Error, GradSink, Owner, Region, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::sparse::{self, INDICES, VALUES};

/// How the share of entries that are chosen anew falls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Falls {
    /// In a line, to 0 at the end of the run.
    #[default]
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// When entries are chosen, and how many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choices {
    /// Steps from one choice to the next.
    pub(crate) every: u64,
    /// For how many of them candidates are watched.
    pub(crate) watch: u64,
    /// Share of the entries that are chosen anew at the start.
    pub(crate) rate: f64,
    /// How that share falls.
    pub(crate) falls: Falls,
}

/// Steps that choose anew which entries train.
pub(crate) struct Choice {
    choices: Choices,
    steps: u64,
    places: Vec<Place>,
    /// Candidates, while they are watched; as many as there are places.
    watched: Vec<Watched>,
}

/// A weight of which some entries train.
struct Place {
    weight: TensorId,
    values: TensorId,
    indices: TensorId,
    k: usize,
}

/// The candidates of a weight.
struct Watched {
    entries: Arc<[u64]>,
    /// Sums of their gradients and of the squares of these, over steps.
    sums: Vec<f32>,
    squares: Vec<f32>,
}

impl Choice {
    /// The steps of a component that has these tensors, [`VALUES`] and [`INDICES`], at each of its sites.
    pub(crate) fn new(choices: Choices, of: &Trained<'_>) -> Self {
        let own = |at: &Attachment, local: &str| TensorId {
            owner: Owner::Bank { slot: of.slot, set: 0 },
            name: TensorName::new(at.site.as_str(), local),
        };
        let place = |at: &&Attachment| Place {
            weight: TensorId { owner: Owner::Base, name: TensorName::new(at.site.as_str(), "weight") },
            values: own(at, VALUES),
            indices: own(at, INDICES),
            k: at.tensors.first().map_or(0, |spec| spec.shape.iter().product()),
        };
        Self { places: of.attachments.iter().map(place).collect(), choices, steps: of.steps.0, watched: Vec::new() }
    }

    /// The entries of largest gradient on the first micro-batch of all ranks.
    fn candidates(&self, theta: &Theta, batch: &Batch, scale: f64, engine: &mut dyn Engine) -> Result<Vec<Watched>> {
        let mut said = Vec::new();
        if let Some((number, layout)) = batch.parts.iter().min_by_key(|(number, _)| number) {
            let wanted = self.places.iter().map(|place| (place.weight.clone(), place.k)).collect();
            let mut sink = Largest { wanted, found: BTreeMap::new() };
            let objective = engine.objective();
            engine.grad(theta, layout, &*objective, scale, &mut sink)?;
            let tensors = sink.found.into_iter().map(|(id, entries)| {
                Ok((id.to_string(), Tensor::from_vec(entries.clone(), entries.len(), &Device::Cpu)?))
            });
            said.push((*number, tensors.collect::<Result<Tensors>>()?));
        }
        let Some((_, mut first)) = engine.gather(said)?.into_iter().next() else {
            return Err(Error::Refused("a step has no data to choose by".to_owned()));
        };
        let watched = self.places.iter().map(|place| {
            let entries = first.remove(&place.weight.to_string());
            let entries = entries.ok_or_else(|| Error::Refused(format!("{} has no gradient", place.weight)))?;
            let entries: Arc<[u64]> = entries.to_vec1::<i64>()?.into_iter().map(|entry| entry as u64).collect();
            let zeros = vec![0.0; entries.len()];
            Ok(Watched { entries, sums: zeros.clone(), squares: zeros })
        });
        watched.collect()
    }

    /// The share of entries that a choice at `step` is of.
    fn share(&self, step: u64) -> f64 {
        let Choices { every, rate, falls, .. } = self.choices;
        let done = step as f64 / self.steps.max(1) as f64;
        match falls {
            _ if step < every => 1.0,
            Falls::Linear => rate * (1.0 - done),
            Falls::Cosine => rate * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0,
        }
    }

    /// Lets entries go and others come; how many.
    fn choose(&mut self, step: u64, engine: &mut dyn Engine) -> Result<usize> {
        let share = self.share(step);
        let mut theta = engine.theta().clone();
        let mut all = Vec::with_capacity(self.places.len());
        for (place, watched) in self.places.iter().zip(self.watched.drain(..)) {
            let held = |id: &TensorId| {
                theta.get(id).cloned().ok_or_else(|| Error::Refused(format!("{id} is not among the parameters")))
            };
            let mut indices = held(&place.indices)?.to_vec1::<i64>()?;
            let values = held(&place.values)?.to_vec1::<f32>()?;
            let renewed = exchanged(&mut indices, &values, &watched, share, self.choices.watch);
            let length = indices.len();
            theta.put(&place.indices, Tensor::from_vec(indices, length, &Device::Cpu)?);
            all.push((place.values.clone(), renewed));
        }
        engine.set(theta);
        for (values, renewed) in &all {
            engine.renew(values, renewed)?;
        }
        Ok(all.iter().map(|(_, renewed)| renewed.len()).sum())
    }
}

/// Puts candidates in the place of the entries that moved least.
fn exchanged(indices: &mut [i64], values: &[f32], watched: &Watched, share: f64, watch: u64) -> Vec<Renewed> {
    let count = ((share * indices.len() as f64).floor() as usize).min(indices.len());
    let small: Vec<f32> = values.iter().map(|value| -value.abs()).collect();
    let leaving = sparse::largest(&small, count);
    let going: BTreeSet<usize> = leaving.iter().copied().collect();
    let staying: BTreeSet<i64> =
        (0..indices.len()).filter(|place| !going.contains(place)).map(|place| indices[place]).collect();
    let eligible: Vec<usize> =
        (0..watched.entries.len()).filter(|&at| !staying.contains(&(watched.entries[at] as i64))).collect();
    let pull: Vec<f32> = eligible.iter().map(|&at| watched.sums[at].abs()).collect();
    let coming: Vec<usize> = sparse::largest(&pull, count).into_iter().map(|at| eligible[at]).collect();
    // What goes and comes at once stays as it is.
    let returns: BTreeSet<i64> = coming.iter().map(|&at| watched.entries[at] as i64).collect();
    let left: BTreeSet<i64> = leaving.iter().map(|&place| indices[place]).collect();
    let free = leaving.iter().filter(|&&place| !returns.contains(&indices[place])).copied();
    let free: Vec<usize> = free.collect();
    let new = coming.into_iter().filter(|&at| !left.contains(&(watched.entries[at] as i64)));
    free.into_iter()
        .zip(new)
        .map(|(entry, at)| {
            indices[entry] = watched.entries[at] as i64;
            let mean = |sum: f32| sum / watch as f32;
            Renewed { entry, age: watch, mean: mean(watched.sums[at]), square: mean(watched.squares[at]) }
        })
        .collect()
}

impl StepRule for Choice {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        if job.objective.level() == Level::Step {
            return Some(
                "is that of a component which looks at the gradient of a single micro-batch; this objective is one of a whole \
                 step: expected `rate: 0`, or another objective"
                    .to_owned(),
            );
        }
        job.optimizer.begun(1, 0.0, 0.0).is_none().then(|| {
            "is that of a component whose entries come and go; this optimiser keeps nothing entry by entry: expected one that \
             does, such as AdamW"
                .to_owned()
        })
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let Choices { every, watch, .. } = self.choices;
        let at = step.0 % every;
        // What comes in the last update would come for nothing.
        if at >= watch || step.0 - at + watch >= self.steps {
            return engine::usual_step(engine);
        }
        let batch = engine.batch(Source::Train)?;
        let (objective, theta) = (engine.objective(), engine.theta().clone());
        let divisor = objective.denominator().of(batch.counts);
        if at == 0 {
            self.watched = self.candidates(&theta, &batch, 1.0 / divisor, engine)?;
        }
        let watched = self.places.iter().zip(&self.watched);
        let beside: Entries =
            watched.map(|(place, watched)| (place.weight.clone(), Arc::clone(&watched.entries))).collect();
        let parts = engine.grads_beside(&theta, &batch.parts, &*objective, 1.0 / divisor, &beside)?;
        let (mut gradients, mut loss): (_, LossReport) = engine.reduce(parts)?;
        for (place, watched) in self.places.iter().zip(&mut self.watched) {
            let gradient = gradients.take(&place.weight).map(|gradient| gradient.to_vec1::<f32>()).transpose()?;
            let sums = watched.sums.iter_mut().zip(&mut watched.squares);
            for ((sum, square), gradient) in sums.zip(gradient.unwrap_or_default()) {
                *sum += gradient;
                *square += gradient * gradient;
            }
        }
        let grad_norm = engine.update(gradients)?;
        if at + 1 == watch {
            let renewed = self.choose(step.0, engine)?;
            loss.beside.insert("entries/renewed".into(), renewed as f64 * divisor);
        }
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
    }

    fn state(&self) -> Tensors {
        let mut state = Tensors::new();
        for (place, watched) in self.places.iter().zip(&self.watched) {
            let entries: Vec<i64> = watched.entries.iter().map(|&entry| entry as i64).collect();
            let tensors = [
                ("entries", Tensor::new(entries.as_slice(), &Device::Cpu)),
                ("sums", Tensor::new(watched.sums.as_slice(), &Device::Cpu)),
                ("squares", Tensor::new(watched.squares.as_slice(), &Device::Cpu)),
            ];
            let named = tensors.into_iter().filter_map(|(name, tensor)| Some((name, tensor.ok()?)));
            state.extend(named.map(|(name, tensor)| (format!("{}/{name}", place.weight), tensor)));
        }
        state
    }

    fn restore(&mut self, mut state: Tensors, _: &Theta) -> Result<()> {
        self.watched.clear();
        if state.is_empty() {
            return Ok(());
        }
        for place in &self.places {
            let mut take = |name: &str| {
                let name = format!("{}/{name}", place.weight);
                state.remove(&name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))
            };
            let entries = take("entries")?.to_vec1::<i64>()?.into_iter().map(|entry| entry as u64).collect::<Arc<_>>();
            let (sums, squares) = (take("sums")?.to_vec1::<f32>()?, take("squares")?.to_vec1::<f32>()?);
            if sums.len() != entries.len() || squares.len() != entries.len() {
                return Err(Error::Refused(format!("has {} sums for {} entries", sums.len(), entries.len())));
            }
            self.watched.push(Watched { entries, sums, squares });
        }
        state.keys().next().map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which is not watched"))))
    }
}

/// Takes of each gradient the places of its largest entries, and lets it go.
struct Largest {
    wanted: BTreeMap<TensorId, usize>,
    found: BTreeMap<TensorId, Vec<i64>>,
}

impl GradSink for Largest {
    fn want(&self, tensor: &TensorId) -> Region<'_> {
        if self.wanted.contains_key(tensor) { Region::All } else { Region::None }
    }

    fn put(&mut self, tensor: &TensorId, gradient: &Tensor) -> Result<()> {
        if let Some(&k) = self.wanted.get(tensor) {
            let sizes = gradient.abs()?.flatten_all()?.to_vec1::<f32>()?;
            let places = sparse::largest(&sizes, k).into_iter().map(|place| place as i64);
            self.found.insert(tensor.clone(), places.collect());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use attune_points::layout::{NO_LABEL, Row, Source as Origin};
    use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
    use attune_points::{Bank, BankKind, Grads, Layout, Params, TensorSpec};
    use attune_tensor::rng::Rng;
    use candle_core::DType;

    use super::*;

    const SITE: &str = "up_proj";
    /// The entries of a matrix of 8 by 8 by which a target differs.
    const PLANTED: [u64; 5] = [3, 17, 30, 44, 61];

    const CHOICES: Choices = Choices { every: 20, watch: 5, rate: 0.2, falls: Falls::Linear };

    fn watched(entries: &[u64], sums: &[f32]) -> Watched {
        let squares = sums.iter().map(|sum| sum * sum).collect();
        Watched { entries: entries.into(), sums: sums.to_vec(), squares }
    }

    #[test]
    fn those_that_moved_least_go_for_those_that_are_pulled_at_most() {
        let mut indices = [10, 11, 12, 13];
        // 11 and 13 go; of the candidates 12 is there already, and 40 is pulled at most.
        let of = watched(&[12, 40, 41], &[9.0, -4.0, 2.0]);
        let renewed = exchanged(&mut indices, &[0.5, -0.1, 0.4, 0.2], &of, 0.5, 4);
        assert_eq!(indices, [10, 40, 12, 41]);
        assert_eq!(
            renewed,
            [
                Renewed { entry: 1, age: 4, mean: -1.0, square: 4.0 },
                Renewed { entry: 3, age: 4, mean: 0.5, square: 1.0 },
            ]
        );
    }

    #[test]
    fn what_goes_and_comes_at_once_stays_and_no_entry_is_there_twice() {
        let mut indices = [10, 11, 12];
        let renewed = exchanged(&mut indices, &[0.1, 0.2, 0.3], &watched(&[11, 50, 10], &[3.0, 2.0, 1.0]), 0.7, 1);
        // 10 and 11 go, 11 and 50 come.
        assert_eq!((indices, renewed.len(), renewed[0].entry), ([50, 11, 12], 1, 0));
        // Fewer candidates than places that became free.
        let mut indices = [10, 11, 12];
        assert_eq!(exchanged(&mut indices, &[0.1, 0.2, 0.3], &watched(&[12, 10], &[1.0, 1.0]), 1.0, 1).len(), 0);
        assert_eq!(indices, [10, 11, 12]);
    }

    fn choice(choices: Choices, k: usize, steps: u64) -> Choice {
        let values = TensorSpec { comes_and_goes: true, ..TensorSpec::trained(VALUES, [k]) };
        let at = Attachment {
            site: attune_architecture::SiteId::new(SITE),
            tensors: vec![values, TensorSpec::fixed(INDICES, [k])],
        };
        Choice::new(choices, &Trained { slot: 0, attachments: vec![&at], steps: Step(steps) })
    }

    #[test]
    fn the_first_choice_is_of_all_and_later_ones_of_fewer_and_fewer() {
        let of = |falls| choice(Choices { falls, ..CHOICES }, 4, 100);
        assert_eq!(of(Falls::Linear).share(4), 1.0);
        assert!((of(Falls::Linear).share(50) - 0.1).abs() < 1e-12 && (of(Falls::Cosine).share(50) - 0.1).abs() < 1e-12);
        assert!(of(Falls::Cosine).share(80) < of(Falls::Linear).share(80));
    }

    /// Half the squared distance of a matrix to a target, whose gradient is their difference.
    struct Toy {
        theta: Theta,
        target: Vec<f32>,
        layout: Arc<Layout>,
        /// Every weight as it was after each update.
        weights: Vec<Vec<f32>>,
    }

    impl Toy {
        fn id(local: &str) -> TensorId {
            TensorId { owner: Owner::Bank { slot: 0, set: 0 }, name: TensorName::new(SITE, local) }
        }

        fn new(k: usize) -> Self {
            let mut target = vec![0.0; 64];
            PLANTED.iter().zip([3.0, -2.5, 2.0, 3.5, -3.0]).for_each(|(&at, value)| target[at as usize] = value);
            let mut params = Params::new();
            let values = TensorSpec::trained(VALUES, [k]);
            params.insert_declared(&values, SITE, Tensor::zeros(k, DType::F32, &Device::Cpu).unwrap());
            let indices = sparse::some(64, k, &Rng::new(3, "toy")).unwrap();
            params.insert_declared(&TensorSpec::fixed(INDICES, [k]), SITE, indices);
            let sets = vec![Arc::new(params)];
            let bank = Bank { slot: "toy".into(), kind: BankKind::Adapter, sets, train: true };
            let mut layout = Layout::new();
            layout.push(Origin::default(), [(Row::Token(1), 1), (Row::Token(2), NO_LABEL)]);
            Self { theta: Theta::single([bank]), target, layout: Arc::new(layout), weights: Vec::new() }
        }

        fn indices(&self) -> Vec<i64> {
            self.theta.get(&Self::id(INDICES)).unwrap().to_vec1().unwrap()
        }

        fn values(&self) -> Vec<f32> {
            self.theta.get(&Self::id(VALUES)).unwrap().to_vec1().unwrap()
        }

        fn weight(&self) -> Vec<f32> {
            let mut weight = vec![0.0; 64];
            self.indices().iter().zip(self.values()).for_each(|(&at, value)| weight[at as usize] += value);
            weight
        }
    }

    struct Distance;

    impl Objective for Distance {
        fn denominator(&self) -> Denominator {
            Denominator::Tokens
        }

        fn chunk(&self, _: &ChunkView<'_>) -> Result<ChunkLoss> {
            Err(Error::Refused("nothing is computed by chunks".to_owned()))
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
            Ok(Batch { parts: vec![(0, Arc::clone(&self.layout))], counts: self.layout.counts(), n_rows: 2 })
        }

        fn score(&mut self, _: &Theta, _: &Layout, _: &dyn Objective) -> Result<LossReport> {
            Err(Error::Refused("nothing is scored".to_owned()))
        }

        fn grad(
            &mut self,
            _: &Theta,
            on: &Layout,
            _: &dyn Objective,
            scale: f64,
            sink: &mut dyn GradSink,
        ) -> Result<LossReport> {
            let gradient: Vec<f32> =
                self.weight().iter().zip(&self.target).map(|(w, target)| (w - target) * scale as f32).collect();
            let weight = TensorId { owner: Owner::Base, name: TensorName::new(SITE, "weight") };
            let of = match sink.want(&weight) {
                Region::All => Some(Tensor::from_vec(gradient.clone(), (8, 8), &Device::Cpu)?),
                Region::Entries(entries) => {
                    let some: Vec<f32> = entries.iter().map(|&entry| gradient[entry as usize]).collect();
                    Some(Tensor::new(some, &Device::Cpu)?)
                }
                _ => None,
            };
            of.map(|gradient| sink.put(&weight, &gradient)).transpose()?;
            let own: Vec<f32> = self.indices().iter().map(|&at| gradient[at as usize]).collect();
            sink.put(&Self::id(VALUES), &Tensor::new(own, &Device::Cpu)?)?;
            Ok(LossReport { counts: on.counts(), ..LossReport::default() })
        }

        fn objective(&self) -> Arc<dyn Objective> {
            Arc::new(Distance)
        }

        fn wanted(&self) -> Vec<TensorId> {
            vec![Self::id(VALUES)]
        }

        fn reduce(&mut self, mut parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
            let (_, gradients, report) = parts.remove(0);
            Ok((gradients, report))
        }

        fn update(&mut self, gradients: Grads) -> Result<f64> {
            assert_eq!(gradients.iter().count(), 1, "only what trains is updated");
            let step = (gradients.get(&Self::id(VALUES)).unwrap() * 0.2)?;
            let values = (self.theta.get(&Self::id(VALUES)).unwrap() - step)?;
            self.theta.put(&Self::id(VALUES), values);
            self.weights.push(self.weight());
            Ok(0.0)
        }

        fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
            Ok(mine)
        }

        fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
            let mut values = self.values();
            entries.iter().for_each(|renewed| values[renewed.entry] = 0.0);
            let length = values.len();
            self.theta.put(tensor, Tensor::from_vec(values, length, &Device::Cpu)?);
            Ok(())
        }

        fn hidden(&self) -> usize {
            8
        }

        fn rng(&self, purpose: &'static str) -> Rng {
            Rng::new(1, purpose)
        }
    }

    #[test]
    fn planted_entries_are_found_within_two_choices_and_what_went_is_back_at_the_base() {
        let k = 10;
        let (mut toy, mut rule) = (Toy::new(k), choice(Choices { every: 6, watch: 2, ..CHOICES }, k, 60));
        let found = |toy: &Toy| {
            let there: BTreeSet<i64> = toy.indices().into_iter().collect();
            assert_eq!(there.len(), k, "entries are distinct");
            PLANTED.iter().filter(|&&at| there.contains(&(at as i64))).count()
        };
        assert!(found(&toy) < PLANTED.len());
        for step in 0..8 {
            rule.step(Step(step), &mut toy).unwrap();
            let there: BTreeSet<i64> = toy.indices().into_iter().collect();
            let elsewhere = toy.weight().iter().enumerate().any(|(at, w)| !there.contains(&(at as i64)) && *w != 0.0);
            assert!(!elsewhere, "an entry that went has a change");
        }
        assert_eq!(found(&toy), PLANTED.len());
        for step in 8..60 {
            rule.step(Step(step), &mut toy).unwrap();
        }
        assert_eq!(found(&toy), PLANTED.len(), "what moved far stays");
        let off = toy.weight().iter().zip(&toy.target).map(|(w, target)| (w - target).abs()).fold(0.0, f32::max);
        assert!(off < 0.01, "{off}");
    }

    #[test]
    fn a_choice_goes_on_where_it_was_left() {
        let choices = || Choices { every: 6, watch: 3, ..CHOICES };
        let (mut toy, mut rule) = (Toy::new(10), choice(choices(), 10, 60));
        assert!(rule.state().is_empty());
        for step in 0..2 {
            rule.step(Step(step), &mut toy).unwrap();
        }
        let state = rule.state();
        let mut again = choice(choices(), 10, 60);
        again.restore(state.clone(), &toy.theta).unwrap();
        let theta = toy.theta.clone();
        rule.step(Step(2), &mut toy).unwrap();
        let whole = toy.indices();
        toy.theta = theta;
        again.step(Step(2), &mut toy).unwrap();
        assert_eq!(toy.indices(), whole);
        let lacking = state.into_iter().filter(|(name, _)| !name.ends_with("sums")).collect();
        let error = again.restore(lacking, &toy.theta).unwrap_err().to_string();
        assert!(error.contains("lacks \"up_proj.weight/sums\""), "{error}");
    }
}
