//! Steps that share a number of ranks among sites: parts of a decomposition that mattered least so far are set to 0, more and more
//! of them, and may come back until the number stays.

use attune_points::adapter::{Attachment, Trained};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Owner, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use candle_core::{Device, Tensor};

/// How the number of ranks falls, and how they are weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Falling {
    /// Mean rank of a site at the end.
    pub(crate) target: u32,
    /// Share of the steps before the number falls.
    pub(crate) before: f64,
    /// Share of the steps after it has fallen.
    pub(crate) after: f64,
    /// Steps from one choice to the next.
    pub(crate) every: u64,
    /// What stays of the mean of sensitivities at each step, and of that of their uncertainty.
    pub(crate) keeps: (f64, f64),
}

impl Falling {
    /// The steps before the number falls and those after.
    fn ends(&self, steps: u64) -> (u64, u64) {
        let share = |share: f64| (share * steps as f64).round() as u64;
        (share(self.before), share(self.after))
    }

    /// The number of ranks after update `number`, from `first` to `last`.
    fn at(&self, number: u64, steps: u64, (first, last): (u64, u64)) -> u64 {
        let (before, after) = self.ends(steps);
        let end = steps.saturating_sub(after);
        if number <= before {
            first
        } else if number >= end {
            last
        } else {
            let left = 1.0 - (number - before) as f64 / (end - before) as f64;
            last + ((first - last) as f64 * left.powi(3)) as u64
        }
    }
}

/// The tensors of a decomposition at a site: one part is a row of `right`, an entry of `values` and a column of `left`.
pub(crate) struct Names {
    pub(crate) right: &'static str,
    pub(crate) values: &'static str,
    pub(crate) left: &'static str,
}

/// A decomposition whose parts are weighed.
struct Place {
    site: String,
    /// `right`, `values`, `left`.
    tensors: [TensorId; 3],
    rank: usize,
}

/// Means of how much the loss would change without an entry, and of how far that is from its mean.
#[derive(Clone)]
struct Means {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

/// Steps that share ranks among sites.
pub(crate) struct Budget {
    falling: Falling,
    steps: u64,
    places: Vec<Place>,
    /// Of the tensors of all places, once a step was made.
    means: Vec<[Means; 3]>,
}

impl Budget {
    /// The steps of a component that has tensors of these names at each of its sites.
    pub(crate) fn new(falling: Falling, names: &Names, of: &Trained<'_>) -> Self {
        let place = |at: &&Attachment| {
            let site = at.site.as_str();
            let id = |local: &str| {
                let owner = Owner::Bank { slot: of.slot, set: 0 };
                TensorId { owner, name: TensorName::new(site, local) }
            };
            let rank = at.tensors.iter().find(|spec| spec.local == names.values).map_or(0, |spec| spec.shape[0]);
            Place { site: site.to_owned(), tensors: [id(names.right), id(names.values), id(names.left)], rank }
        };
        let places = of.attachments.iter().map(place).collect();
        Self { falling, steps: of.steps.0, places, means: Vec::new() }
    }

    /// The number of ranks at the start, and at the end.
    fn numbers(&self) -> (u64, u64) {
        let first: u64 = self.places.iter().map(|place| place.rank as u64).sum();
        (first, first.min(u64::from(self.falling.target) * self.places.len() as u64))
    }

    /// Weighs all entries by their values now and their gradients, in the order of places and tensors.
    fn weigh(&mut self, theta: &Theta, gradients: &[[Tensor; 3]]) -> Result<()> {
        let (keep, keep_uncertainty) = self.falling.keeps;
        let first = self.means.is_empty();
        for (index, (place, gradients)) in self.places.iter().zip(gradients).enumerate() {
            let mut means = Vec::with_capacity(3);
            for (tensor, (id, gradient)) in place.tensors.iter().zip(gradients).enumerate() {
                let now = (value(theta, id)? * gradient)?.abs()?;
                let known = if first {
                    Means { sensitivity: now.zeros_like()?, uncertainty: now.zeros_like()? }
                } else {
                    self.means[index][tensor].clone()
                };
                let sensitivity = ((known.sensitivity * keep)? + (&now * (1.0 - keep))?)?;
                let off = (now - &sensitivity)?.abs()?;
                let uncertainty = ((known.uncertainty * keep_uncertainty)? + (off * (1.0 - keep_uncertainty))?)?;
                means.push(Means { sensitivity, uncertainty });
            }
            let means: [Means; 3] =
                means.try_into().map_err(|_| Error::Refused("a place has three tensors".to_owned()))?;
            if first {
                self.means.push(means);
            } else {
                self.means[index] = means;
            }
        }
        Ok(())
    }

    /// What each part of each place is worth.
    fn scores(&self) -> Result<Vec<Vec<f32>>> {
        let score = |means: &Means| &means.sensitivity * &means.uncertainty;
        let place = |[right, values, left]: &[Means; 3]| {
            let right_r = score(right)?.mean(1)?;
            let left_r = score(left)?.mean(0)?;
            Ok(((score(values)?.flatten_all()? + right_r)? + left_r)?.to_vec1::<f32>()?)
        };
        self.means.iter().map(place).collect()
    }

    /// Sets the values of all parts but the `number` best to 0; how many each place has left.
    fn choose(&self, number: u64, engine: &mut dyn Engine) -> Result<Vec<usize>> {
        let scores = self.scores()?;
        let mut all: Vec<(f32, usize, usize)> = scores
            .iter()
            .enumerate()
            .flat_map(|(place, scores)| scores.iter().enumerate().map(move |(part, score)| (*score, place, part)))
            .collect();
        // The best first; of those that are worth the same, the one that comes first. The sort is stable.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut ranks: Vec<usize> = scores.iter().map(Vec::len).collect();
        let mut theta = engine.theta().clone();
        let mut masks: Vec<Vec<f32>> = ranks.iter().map(|rank| vec![1.0; *rank]).collect();
        for (_, place, part) in all.into_iter().skip(number as usize) {
            masks[place][part] = 0.0;
            ranks[place] -= 1;
        }
        for (place, mask) in self.places.iter().zip(masks) {
            let id = &place.tensors[1];
            let values = value(&theta, id)?;
            let mask = Tensor::from_vec(mask, values.shape(), &Device::Cpu)?;
            // A product would leave the sign of what goes.
            let kept = mask.ne(0.0)?.where_cond(&values, &values.zeros_like()?)?;
            theta.put(id, kept);
        }
        engine.set(theta);
        Ok(ranks)
    }
}

fn value(theta: &Theta, id: &TensorId) -> Result<Tensor> {
    theta.get(id).cloned().ok_or_else(|| Error::Refused(format!("{id} is not among the parameters")))
}

impl StepRule for Budget {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (gradients, loss) = engine::gradients_on(engine, &batch)?;
        let number = step.next().0;
        let (before, after) = self.falling.ends(self.steps);
        let end = self.steps.saturating_sub(after);
        // Once the number stays, so do those that it is of.
        let own = (number < end || self.means.is_empty()).then(|| {
            let of_place = |place: &Place| {
                let gradient = |id: &TensorId| {
                    gradients.get(id).cloned().ok_or_else(|| Error::Refused(format!("{id} has no gradient")))
                };
                let [right, values, left] = &place.tensors;
                Ok([gradient(right)?, gradient(values)?, gradient(left)?])
            };
            self.places.iter().map(of_place).collect::<Result<Vec<[Tensor; 3]>>>()
        });
        let grad_norm = engine.update(gradients)?;
        if let Some(own) = own.transpose()? {
            self.weigh(&engine.theta().clone(), &own)?;
        }
        let mut report = StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() };
        let is_due = number > before && (number.is_multiple_of(self.falling.every) || number >= end);
        if is_due {
            let ranks = self.choose(self.falling.at(number, self.steps, self.numbers()), engine)?;
            // While nothing changes there is nothing to say, but at the end.
            if number <= end || number == self.steps {
                let places = self.places.iter().zip(&ranks);
                report.metrics = places.map(|(place, rank)| (format!("rank/{}", place.site), *rank as f64)).collect();
                report
                    .metrics
                    .push(("rank".to_owned(), ranks.iter().sum::<usize>() as f64 / ranks.len().max(1) as f64));
            }
        }
        Ok(report)
    }

    fn state(&self) -> Tensors {
        let places = self.places.iter().zip(&self.means);
        let tensors = places.flat_map(|(place, means)| place.tensors.iter().zip(means));
        let named = tensors.flat_map(|(id, Means { sensitivity, uncertainty })| {
            [(format!("{id}/sensitivity"), sensitivity.clone()), (format!("{id}/uncertainty"), uncertainty.clone())]
        });
        named.collect()
    }

    fn restore(&mut self, mut state: Tensors, theta: &Theta) -> Result<()> {
        self.means.clear();
        if state.is_empty() {
            return Ok(());
        }
        for place in &self.places {
            let means = place.tensors.each_ref().map(|id| {
                let mut take = |what: &str| {
                    let name = format!("{id}/{what}");
                    let tensor = state.remove(&name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))?;
                    let (found, expected) = (tensor.dims(), value(theta, id)?);
                    if found == expected.dims() {
                        return Ok(tensor);
                    }
                    Err(Error::Refused(format!("has {name:?} of shape {found:?}; expected {:?}", expected.dims())))
                };
                Ok::<_, Error>(Means { sensitivity: take("sensitivity")?, uncertainty: take("uncertainty")? })
            });
            let [right, values, left] = means;
            self.means.push([right?, values?, left?]);
        }
        state
            .keys()
            .next()
            .map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which nothing is weighed by"))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use attune_architecture::SiteId;
    use attune_points::engine::{Batch, LossReport, Renewed};
    use attune_points::layout::LabelCounts;
    use attune_points::objective::{Denominator, Objective};
    use attune_points::{Bank, BankKind, GradSink, Grads, Layout, Params, TensorSpec};
    use attune_tensor::Rng;
    use candle_core::DType;
    use serde_json::Value;

    use super::*;

    const FALLING: Falling = Falling { target: 2, before: 0.1, after: 0.3, every: 5, keeps: (0.85, 0.85) };

    const NAMES: Names = Names { right: "a", values: "e", left: "b" };

    /// Sites whose tensors have the gradients of a file, one step after the other, and are updated by gradient descent.
    struct Toy {
        theta: Theta,
        gradients: Vec<Vec<Tensor>>,
        attachments: Vec<Attachment>,
        step: usize,
    }

    fn id(site: &str, local: &str) -> TensorId {
        TensorId { owner: Owner::Bank { slot: 0, set: 0 }, name: TensorName::new(site, local) }
    }

    impl Toy {
        /// Sites of these tensors, `a` `[r, i]`, `e` `[r, 1]`, `b` `[o, r]` in turn.
        fn new(start: &[Tensor], gradients: Vec<Vec<Tensor>>) -> Self {
            let (mut params, mut attachments) = (Params::new(), Vec::new());
            for (index, tensors) in start.chunks(3).enumerate() {
                let site = SiteId::new(format!("site_{index}"));
                let locals = [NAMES.right, NAMES.values, NAMES.left];
                let specs = locals
                    .iter()
                    .zip(tensors)
                    .map(|(local, tensor)| TensorSpec::trained(local, tensor.dims().to_vec()));
                attachments.push(Attachment { site: site.clone(), tensors: specs.collect() });
                for (local, tensor) in locals.into_iter().zip(tensors) {
                    params.insert(TensorName::new(site.as_str(), local), tensor.clone());
                }
            }
            let bank = Bank { slot: "x".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: true };
            Self { theta: Theta::single([bank]), gradients, attachments, step: 0 }
        }

        fn rule(&self, falling: Falling, steps: u64) -> Budget {
            let attachments = self.attachments.iter().collect();
            Budget::new(falling, &NAMES, &Trained { slot: 0, attachments, steps: Step(steps) })
        }

        fn values(&self) -> Vec<Vec<f32>> {
            let of = |at: &Attachment| self.theta.get(&id(at.site.as_str(), NAMES.values)).unwrap();
            self.attachments.iter().map(|at| of(at).flatten_all().unwrap().to_vec1().unwrap()).collect()
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
            Ok(Batch { parts: vec![(0, Arc::default())], counts: LabelCounts::default(), n_rows: 1 })
        }
        fn score(&mut self, _: &Theta, _: &Layout, _: &dyn Objective) -> Result<LossReport> {
            Err(Error::Refused("nothing is scored".to_owned()))
        }
        fn grad(
            &mut self,
            _: &Theta,
            _: &Layout,
            _: &dyn Objective,
            _: f64,
            sink: &mut dyn GradSink,
        ) -> Result<LossReport> {
            let ids = self.wanted();
            for (id, gradient) in ids.iter().zip(&self.gradients[self.step]) {
                sink.put(id, gradient)?;
            }
            self.step += 1;
            Ok(LossReport::default())
        }
        fn objective(&self) -> Arc<dyn Objective> {
            struct Nothing;
            impl Objective for Nothing {
                fn denominator(&self) -> Denominator {
                    Denominator::Tokens
                }
            }
            Arc::new(Nothing)
        }
        fn wanted(&self) -> Vec<TensorId> {
            let specs =
                self.attachments.iter().flat_map(|at| at.tensors.iter().map(|spec| (at.site.as_str(), spec.local)));
            specs.map(|(site, local)| id(site, local)).collect()
        }
        fn reduce(&mut self, mut parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
            let (_, gradients, report) = parts.remove(0);
            Ok((gradients, report))
        }
        fn update(&mut self, gradients: Grads) -> Result<f64> {
            for (id, gradient) in gradients.iter() {
                let moved = (value(&self.theta, id)? - (gradient.unwrap() * 0.1)?)?;
                self.theta.put(id, moved);
            }
            Ok(0.0)
        }
        fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
            Ok(mine)
        }
        fn renew(&mut self, tensor: &TensorId, _: &[Renewed]) -> Result<()> {
            Err(Error::Refused(format!("{tensor} has no entries that come and go")))
        }
        fn hidden(&self) -> usize {
            1
        }
        fn rng(&self, purpose: &'static str) -> Rng {
            Rng::new(1, purpose)
        }
    }

    fn tensors(of: &Value) -> Vec<Tensor> {
        let tensor = |value: &Value| {
            let rows: Vec<Vec<f32>> = serde_json::from_value(value.clone()).unwrap();
            Tensor::new(rows, &Device::Cpu).unwrap()
        };
        of.as_array().unwrap().iter().map(tensor).collect()
    }

    /// `golden/budgets.py`: what PEFT's allocator leaves of three sites in twenty steps, on the same gradients.
    #[test]
    fn what_goes_and_what_comes_back_is_as_in_peft() {
        let golden: Value = serde_json::from_str(include_str!("../../golden/adalora_budget.json")).unwrap();
        let gradients: Vec<Vec<Tensor>> = golden["gradients"].as_array().unwrap().iter().map(tensors).collect();
        let steps = gradients.len() as u64;
        let mut toy = Toy::new(&tensors(&golden["start"]), gradients);
        let falling = Falling { target: 2, before: 0.1, after: 0.3, every: 3, keeps: (0.85, 0.85) };
        let mut rule = toy.rule(falling, steps);
        let (mut least, mut returned) = (usize::MAX, false);
        let mut before = toy.values();
        for (step, expected) in (0..).zip(golden["values"].as_array().unwrap()) {
            // Whoever goes on from a checkpoint does the same.
            let mut resumed = toy.rule(falling, steps);
            resumed.restore(rule.state(), &toy.theta).unwrap();
            rule = resumed;
            let report = rule.step(Step(step), &mut toy).unwrap();
            let found = toy.values();
            for (found, expected) in found.iter().flatten().zip(expected.as_array().unwrap()) {
                let expected = expected.as_f64().unwrap();
                assert!((f64::from(*found) - expected).abs() < 1e-6, "step {step}: {found} against {expected}");
            }
            let zeros = before.iter().flatten().zip(found.iter().flatten());
            returned |= zeros.clone().any(|(before, now)| *before == 0.0 && *now != 0.0);
            least = least.min(found.iter().flatten().filter(|value| **value != 0.0).count());
            for (name, rank) in &report.metrics {
                let Some(at) = name.strip_prefix("rank/site_") else { continue };
                let live = found[at.parse::<usize>().unwrap()].iter().filter(|value| **value != 0.0).count();
                assert_eq!(*rank, live as f64, "{name} after step {step}");
            }
            before = found;
        }
        assert_eq!((least, returned), (6, true), "two parts of each of three sites are left, and one came back before");
    }

    /// Sites are ranked together: the one whose gradients are ten times larger keeps all its parts.
    #[test]
    fn a_site_that_matters_more_keeps_more() {
        let start: Vec<Tensor> = (0..9u64)
            .map(|at| {
                let shape = [(3, 4), (3, 1), (5, 3)][at as usize % 3];
                Rng::new(at, "start").normal_tensor(shape, 1.0, DType::F32).unwrap()
            })
            .collect();
        let gradients = (0..30u64).map(|step| {
            let of = |(at, tensor): (usize, &Tensor)| {
                let noise =
                    Rng::new(step * 9 + at as u64, "gradient").normal_tensor(tensor.dims().to_vec(), 0.01, DType::F32);
                (noise.unwrap() * if (3..6).contains(&at) { 10.0 } else { 1.0 }).unwrap()
            };
            start.iter().enumerate().map(of).collect()
        });
        let mut toy = Toy::new(&start, gradients.collect());
        let mut rule = toy.rule(FALLING, 30);
        let mut live = Vec::new();
        for step in 0..30 {
            rule.step(Step(step), &mut toy).unwrap();
            let of_site = |values: &Vec<f32>| values.iter().filter(|value| **value != 0.0).count();
            live.push(toy.values().iter().map(of_site).collect::<Vec<_>>());
        }
        assert_eq!(live[2], [3, 3, 3], "before");
        assert_eq!((live[29].iter().sum::<usize>(), live[29][1]), (6, 3), "{:?}", live[29]);
        assert!(live[21..].iter().all(|ranks| *ranks == live[29]), "what is left stays");
    }

    /// With as many ranks at the end as at the start nothing goes: the steps are the usual ones.
    #[test]
    fn with_nothing_to_save_nothing_goes() {
        let start: Vec<Tensor> = [(3, 4), (3, 1), (5, 3)]
            .map(|shape| Rng::new(1, "start").normal_tensor(shape, 1.0, DType::F32).unwrap())
            .to_vec();
        let gradients = vec![start.clone(); 10];
        let (mut toy, mut plain) = (Toy::new(&start, gradients.clone()), Toy::new(&start, gradients));
        let mut rule = toy.rule(Falling { target: 3, every: 1, ..FALLING }, 10);
        for step in 0..10 {
            rule.step(Step(step), &mut toy).unwrap();
            engine::usual_step(&mut plain).unwrap();
            assert_eq!(toy.values(), plain.values(), "step {step}");
        }
    }

    #[test]
    fn a_state_of_other_tensors_is_refused() {
        let start: Vec<Tensor> =
            [(3, 4), (3, 1), (5, 3)].map(|shape| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()).to_vec();
        let mut toy = Toy::new(&start, vec![start.clone()]);
        let mut rule = toy.rule(FALLING, 10);
        rule.step(Step(0), &mut toy).unwrap();
        let refused = |change: &dyn Fn(&mut Tensors)| {
            let mut state = rule.state();
            change(&mut state);
            toy.rule(FALLING, 10).restore(state, &toy.theta).unwrap_err().to_string()
        };
        let name = format!("{}/sensitivity", id("site_0", "e"));
        assert!(refused(&|state| drop(state.remove(&name))).contains("lacks"));
        assert!(
            refused(&|state| drop(state.insert(name.clone(), start[0].clone())))
                .contains("of shape [3, 4]; expected [3, 1]")
        );
        assert!(
            refused(&|state| drop(state.insert("x".to_owned(), start[0].clone()))).contains("nothing is weighed by")
        );
    }

    /// The cubic of the paper at five points, of 100 steps from 40 ranks to 20.
    #[test]
    fn the_number_falls_along_a_cubic() {
        let at = |number| FALLING.at(number, 100, (40, 20));
        assert_eq!([at(1), at(10), at(70), at(100)], [40, 40, 20, 20]);
        for (number, left) in [(11, 59.0 / 60.0), (25, 0.75), (40, 0.5), (55, 0.25), (69, 1.0 / 60.0f64)] {
            assert_eq!(at(number), 20 + (20.0 * f64::powi(left, 3)) as u64, "{number}");
        }
        assert_eq!(Falling { target: 9, before: 0.0, after: 0.0, ..FALLING }.at(100, 100, (40, 20)), 20);
    }
}
