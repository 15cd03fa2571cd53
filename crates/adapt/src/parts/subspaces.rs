//! Steps in which groups of numbers come to rest: those of all sites that mattered least so far, more and more of them.

use attune_points::adapter::{Attachment, Trained};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Grads, Owner, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use candle_core::{DType, Device, Tensor};

use crate::parts::anew::held;

/// How the number of groups that go on falls, and how they are weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Weighing {
    /// Groups of all sites that go on in the end.
    pub(crate) active: usize,
    /// The first step with a choice, and the last.
    pub(crate) begins: u64,
    pub(crate) ends: u64,
    /// Steps from one choice to the next.
    pub(crate) every: u64,
    /// What stays of the mean of sensitivities at each step, and of that of their uncertainty.
    pub(crate) keeps: (f64, f64),
    pub(crate) exponent: f64,
}

impl Weighing {
    /// How many of `all` go on after the choice at a step.
    fn at(&self, step: u64, all: usize) -> usize {
        let least = self.active.min(all);
        let (done, whole) = (step.saturating_sub(self.begins), self.ends.saturating_sub(self.begins).max(1));
        let left = (1.0 - done as f64 / whole as f64).clamp(0.0, 1.0);
        least + ((all - least) as f64 * left.powf(self.exponent)) as usize
    }
}

/// The tensors of a site: `rows`, of which each group has as many, one after the other; `outputs`, whose rows are of the groups that the fixed
/// tensor `groups` says; that is not there where there is one group.
pub(crate) struct Names {
    pub(crate) rows: &'static str,
    pub(crate) outputs: &'static str,
    pub(crate) groups: &'static str,
}

/// A site.
struct Place {
    site: String,
    rows: TensorId,
    outputs: TensorId,
    groups: Option<TensorId>,
    /// Which of its groups go on.
    active: Vec<bool>,
}

/// Means of how much the loss would change without an entry, and of how far that is from its mean.
#[derive(Clone)]
struct Means {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

/// Steps in which groups come to rest.
pub(crate) struct Resting {
    weighing: Weighing,
    places: Vec<Place>,
    /// Of the two tensors of all places, since the last choice.
    means: Vec<[Means; 2]>,
}

/// 1 at rows of a group that goes on and 0 elsewhere, `[n, 1]`.
fn mask(of_row: impl Iterator<Item = bool>) -> Result<Tensor> {
    let values: Vec<f32> = of_row.map(|goes_on| f32::from(u8::from(goes_on))).collect();
    let n = values.len();
    Ok(Tensor::from_vec(values, (n, 1), &Device::Cpu)?)
}

impl Place {
    /// The group of each row of `outputs`.
    fn groups(&self, theta: &Theta) -> Result<Vec<usize>> {
        match &self.groups {
            None => Ok(vec![0; held(theta, &self.outputs)?.dim(0)?]),
            Some(id) => {
                let of: Vec<f64> = held(theta, id)?.to_dtype(DType::F64)?.to_vec1()?;
                Ok(of.into_iter().map(|group| group as usize).collect())
            }
        }
    }

    /// 1 at the rows of both tensors that go on.
    fn masks(&self, theta: &Theta) -> Result<[Tensor; 2]> {
        let n = held(theta, &self.rows)?.dim(0)?;
        let each = n / self.active.len().max(1);
        let goes_on = |group: usize| self.active.get(group).copied().unwrap_or(true);
        let groups = self.groups(theta)?;
        Ok([mask((0..n).map(|row| goes_on(row / each.max(1))))?, mask(groups.into_iter().map(goes_on))?])
    }

    fn tensors(&self) -> [&TensorId; 2] {
        [&self.rows, &self.outputs]
    }
}

impl Resting {
    /// The steps of a component that has tensors of these names at each of its sites.
    pub(crate) fn new(weighing: Weighing, names: &Names, of: &Trained<'_>) -> Self {
        let place = |at: &&Attachment| {
            let owner = Owner::Bank { slot: of.slot, set: 0 };
            let id = |local: &str| TensorId { owner, name: TensorName::new(at.site.as_str(), local) };
            let spec = |local: &str| at.tensors.iter().find(|spec| spec.local == local);
            let first =
                |local: &str, dim: usize| spec(local).and_then(|spec| spec.shape.get(dim).copied()).unwrap_or(0);
            // As many rows a group as an output has numbers.
            let groups = first(names.rows, 0) / first(names.outputs, 1).max(1);
            Place {
                site: at.site.to_string(),
                rows: id(names.rows),
                outputs: id(names.outputs),
                groups: spec(names.groups).map(|_| id(names.groups)),
                active: vec![true; groups],
            }
        };
        Self { weighing, places: of.attachments.iter().map(place).collect(), means: Vec::new() }
    }

    /// Weighs all entries by their values now and their gradients.
    fn weigh(&mut self, theta: &Theta, gradients: &[[Tensor; 2]]) -> Result<()> {
        let (keep, keep_uncertainty) = self.weighing.keeps;
        let mut all = Vec::with_capacity(self.places.len());
        for (index, (place, gradients)) in self.places.iter().zip(gradients).enumerate() {
            let mut means = Vec::with_capacity(2);
            for (tensor, (id, gradient)) in place.tensors().into_iter().zip(gradients).enumerate() {
                let now = (held(theta, id)? * gradient)?.abs()?;
                let known = self.means.get(index).map(|means| means[tensor].clone());
                let none = || Ok::<_, Error>(Means { sensitivity: now.zeros_like()?, uncertainty: now.zeros_like()? });
                let known = known.map_or_else(none, Ok)?;
                // How far off a number is from what was known of it before.
                let off = (&now - &known.sensitivity)?.abs()?;
                means.push(Means {
                    sensitivity: ((known.sensitivity * keep)? + (now * (1.0 - keep))?)?,
                    uncertainty: ((known.uncertainty * keep_uncertainty)? + (off * (1.0 - keep_uncertainty))?)?,
                });
            }
            let means: [Means; 2] =
                means.try_into().map_err(|_| Error::Refused("a place has two tensors".to_owned()))?;
            all.push(means);
        }
        self.means = all;
        Ok(())
    }

    /// What each group of each place is worth.
    fn scores(&self, theta: &Theta) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::with_capacity(self.places.len());
        for (place, [rows, outputs]) in self.places.iter().zip(&self.means) {
            let by_row = |means: &Means| -> Result<Vec<f32>> {
                Ok((&means.sensitivity * &means.uncertainty)?.mean(1)?.to_dtype(DType::F32)?.to_vec1()?)
            };
            let (rows, outputs, groups) = (by_row(rows)?, by_row(outputs)?, place.groups(theta)?);
            let each = (rows.len() / place.active.len().max(1)).max(1);
            let mean = |values: &mut dyn Iterator<Item = f32>| {
                let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
                sum / count.max(1) as f32
            };
            let score = |group: usize| {
                let of_outputs = outputs.iter().zip(&groups).filter(|(_, of)| **of == group).map(|(value, _)| *value);
                mean(&mut rows.iter().skip(group * each).take(each).copied()) + mean(&mut of_outputs.into_iter())
            };
            all.push((0..place.active.len()).map(score).collect());
        }
        Ok(all)
    }

    /// Lets the `number` best of those that have gone on so far go on.
    fn choose(&mut self, number: usize, theta: &Theta) -> Result<()> {
        let scores = self.scores(theta)?;
        let mut all: Vec<(f32, usize, usize)> = Vec::new();
        for (place, scores) in scores.iter().enumerate() {
            let going = scores.iter().enumerate().filter(|(group, _)| self.places[place].active[*group]);
            all.extend(going.map(|(group, score)| (*score, place, group)));
        }
        // The best first; of those that are worth the same, the one that comes first. The sort is stable.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, place, group) in all.into_iter().skip(number) {
            self.places[place].active[group] = false;
        }
        Ok(())
    }

    /// Puts back what rests to what it was before an update.
    fn put_back(&self, before: &Theta, engine: &mut dyn Engine) -> Result<()> {
        if self.places.iter().all(|place| place.active.iter().all(|active| *active)) {
            return Ok(());
        }
        let mut theta = engine.theta().clone();
        for place in self.places.iter().filter(|place| place.active.contains(&false)) {
            for (id, mask) in place.tensors().into_iter().zip(place.masks(before)?) {
                let (was, now) = (held(before, id)?, held(&theta, id)?);
                let goes_on = mask.broadcast_as(now.shape())?.ne(0.0)?;
                theta.put(id, goes_on.where_cond(&now, &was)?);
            }
        }
        engine.set(theta);
        Ok(())
    }

    /// The gradients of the tensors of all places.
    fn own(&self, gradients: &Grads) -> Result<Vec<[Tensor; 2]>> {
        let gradient =
            |id: &TensorId| gradients.get(id).cloned().ok_or_else(|| Error::Refused(format!("{id} has no gradient")));
        self.places.iter().map(|place| Ok([gradient(&place.rows)?, gradient(&place.outputs)?])).collect()
    }
}

impl StepRule for Resting {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (gradients, loss) = engine::gradients_on(engine, &batch)?;
        let weighs = (self.weighing.begins..=self.weighing.ends).contains(&step.0);
        let own = if weighs { Some(self.own(&gradients)?) } else { None };
        let before = engine.theta().clone();
        let grad_norm = engine.update(gradients)?;
        self.put_back(&before, engine)?;
        let mut report = StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() };
        let Some(own) = own else { return Ok(report) };
        let theta = engine.theta().clone();
        self.weigh(&theta, &own)?;
        if step.0.is_multiple_of(self.weighing.every) || step.0 == self.weighing.ends {
            let all = self.places.iter().map(|place| place.active.len()).sum();
            self.choose(self.weighing.at(step.0, all), &theta)?;
            // The next choice is by what comes from here on.
            self.means.clear();
            let going = |place: &Place| place.active.iter().filter(|active| **active).count();
            report.metrics =
                self.places.iter().map(|place| (format!("active/{}", place.site), going(place) as f64)).collect();
            let sum: usize = self.places.iter().map(going).sum();
            report.metrics.push(("active".to_owned(), sum as f64));
        }
        Ok(report)
    }

    fn state(&self) -> Tensors {
        let mut state = Tensors::new();
        for place in &self.places {
            let active: Vec<i64> = place.active.iter().map(|active| i64::from(*active)).collect();
            if let Ok(active) = Tensor::new(active, &Device::Cpu) {
                state.insert(format!("{}/active", place.site), active);
            }
        }
        for (place, means) in self.places.iter().zip(&self.means) {
            for (id, Means { sensitivity, uncertainty }) in place.tensors().into_iter().zip(means) {
                state.insert(format!("{id}/sensitivity"), sensitivity.clone());
                state.insert(format!("{id}/uncertainty"), uncertainty.clone());
            }
        }
        state
    }

    fn restore(&mut self, mut state: Tensors, theta: &Theta) -> Result<()> {
        let mut take = |name: String, dims: &[usize]| {
            let tensor = state.remove(&name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))?;
            if tensor.dims() == dims {
                return Ok(tensor);
            }
            Err(Error::Refused(format!("has {name:?} of shape {:?}; expected {dims:?}", tensor.dims())))
        };
        for place in &mut self.places {
            let active = take(format!("{}/active", place.site), &[place.active.len()])?.to_vec1::<i64>()?;
            place.active = active.into_iter().map(|active| active != 0).collect();
        }
        self.means.clear();
        // There are none right after a choice.
        if !state.is_empty() {
            let mut take = |id: &TensorId, what: &str| {
                let (name, dims) = (format!("{id}/{what}"), held(theta, id)?.dims().to_vec());
                let tensor = state.remove(&name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))?;
                if tensor.dims() == dims {
                    return Ok(tensor);
                }
                Err(Error::Refused(format!("has {name:?} of shape {:?}; expected {dims:?}", tensor.dims())))
            };
            for place in &self.places {
                let mut means = |id| {
                    Ok::<_, Error>(Means {
                        sensitivity: take(id, "sensitivity")?,
                        uncertainty: take(id, "uncertainty")?,
                    })
                };
                self.means.push([means(&place.rows)?, means(&place.outputs)?]);
            }
        }
        state.keys().next().map_or(Ok(()), |name| Err(Error::Refused(format!("has {name:?}, which is not known"))))
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorSpec;

    use super::*;
    use crate::parts::toy::Toy;

    const NAMES: Names = Names { rows: "a", outputs: "b", groups: "g" };

    fn weighing(active: usize) -> Weighing {
        Weighing { active, begins: 1, ends: 5, every: 2, keeps: (0.5, 0.5), exponent: 1.0 }
    }

    /// Two sites of two groups each, of two and one outputs; gradients grow with a site's and a group's number.
    fn toy() -> Toy {
        let at = |site: &str| Attachment {
            site: SiteId::new(site),
            tensors: vec![
                TensorSpec::trained("a", [2, 2]),
                TensorSpec::trained("b", [3, 1]),
                TensorSpec::fixed("g", [3]),
            ],
        };
        let start = |_: &str, local: &str| match local {
            "g" => Tensor::new(&[0f32, 1.0, 0.0], &Device::Cpu).unwrap(),
            "a" => Tensor::full(1f32, (2, 2), &Device::Cpu).unwrap(),
            _ => Tensor::full(1f32, (3, 1), &Device::Cpu).unwrap(),
        };
        Toy::new(vec![at("x"), at("y")], start, 0.001, |_, id| {
            let site = if id.name.owner() == "x" { 1.0f32 } else { 10.0 };
            let rows: &[f32] = if id.name.local() == "a" { &[1.0, 2.0] } else { &[1.0, 2.0, 1.0] };
            let rows = Tensor::new(rows, &Device::Cpu).ok()?.unsqueeze(1).ok()?;
            let width = if id.name.local() == "a" { 2 } else { 1 };
            (rows * f64::from(site)).ok()?.repeat((1, width)).ok()
        })
    }

    fn rule(toy: &Toy, active: usize) -> Resting {
        Resting::new(weighing(active), &NAMES, &toy.trained(8))
    }

    #[test]
    fn what_matters_least_comes_to_rest_and_stays_where_it_is() {
        let mut toy = toy();
        let mut rule = rule(&toy, 1);
        let mut going = Vec::new();
        for step in 0..8 {
            let report = rule.step(Step(step), &mut toy).unwrap();
            going.extend(report.metrics.iter().find(|(name, _)| name == "active").map(|(_, count)| (step, *count)));
        }
        // 1 + 3 (1 - (t - 1) / 4), cut to a whole number, and 1 at the end.
        assert_eq!(going, [(2, 3.0), (4, 1.0), (5, 1.0)]);
        let active: Vec<Vec<bool>> = rule.places.iter().map(|place| place.active.clone()).collect();
        assert_eq!(active, [vec![false, false], vec![false, true]]);
        // It moves in the steps before the choice after which it rests, and no more.
        let moved = |site: &str, local: &str| -> Vec<f32> {
            let value = toy.value(site, local).narrow(1, 0, 1).unwrap().flatten_all().unwrap();
            value.to_vec1::<f32>().unwrap().iter().map(|value| ((1.0 - value) * 10_000.0).round()).collect()
        };
        assert_eq!(moved("x", "a"), [30.0, 100.0]);
        assert_eq!(moved("x", "b"), [30.0, 100.0, 30.0]);
        assert_eq!(moved("y", "b"), [500.0, 1600.0, 500.0]);
    }

    #[test]
    fn a_run_that_is_taken_up_again_goes_on_as_it_would_have() {
        let (mut whole, mut cut) = (toy(), toy());
        let mut all = rule(&whole, 2);
        (0..8).for_each(|step| drop(all.step(Step(step), &mut whole).unwrap()));
        let mut first = rule(&cut, 2);
        (0..4).for_each(|step| drop(first.step(Step(step), &mut cut).unwrap()));
        let state = first.state();
        let mut second = rule(&cut, 2);
        second.restore(state.clone(), &cut.theta).unwrap();
        (4..8).for_each(|step| drop(second.step(Step(step), &mut cut).unwrap()));
        for (site, local) in [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")] {
            let bits = |toy: &Toy| toy.value(site, local).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&whole), bits(&cut));
        }
        let mut more = state;
        more.insert("z".to_owned(), Tensor::new(&[1f32], &Device::Cpu).unwrap());
        let other = toy();
        assert!(rule(&other, 2).restore(more, &other.theta).is_err());
    }
}
