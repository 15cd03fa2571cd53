//! Components that are on or off as a whole, by a score of each site that is learned along with them.

use attune_points::adapter::{Attachment, Trained};
use attune_points::engine::{self, Engine, Source, StepReport, StepRule};
use attune_points::{Error, Locals, Owner, Params, Result, TensorId, TensorName, TensorSpec, Theta};
use attune_spec::id::Step;
use candle_core::{DType, Device, Tensor};

use crate::parts::{anew, sparse};

/// The local name of a score.
pub(crate) const SCORE: &str = "score";

/// The local name of what is 0 where a site has to be off whatever its score is.
pub(crate) const OPEN: &str = "open";

/// Why what a gate is before may have no gradient.
pub(crate) const OFF: &str = "its site may be off";

/// What opens and closes gates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Gates {
    /// The least score with which a site is on.
    pub(crate) threshold: f64,
    /// Weight of the mean size of all scores in the loss.
    pub(crate) penalty: f64,
    /// Share of the steps before it counts.
    pub(crate) before: f64,
    /// Share of the steps at the end in which no gate opens or closes.
    pub(crate) after: f64,
    /// Share of all sites that are on at most, once the penalty counts.
    pub(crate) most: Option<f64>,
    /// Steps from one choice of those to the next.
    pub(crate) every: u64,
}

/// A score that learns at this many times the rate of all else.
pub(crate) fn score(lr_factor: f64) -> TensorSpec {
    TensorSpec { lr_factor, decay: false, quiet: Some(OFF), ..TensorSpec::trained(SCORE, [1]) }
}

impl Gates {
    /// Whether a score is of a site that is on.
    fn hard(&self, score: &Tensor, open: Option<&Tensor>) -> Result<Tensor> {
        let hard = score.detach().ge(self.threshold)?.to_dtype(score.dtype())?;
        Ok(match open {
            Some(open) => (hard * open)?,
            None => hard,
        })
    }

    /// 1 where a site is on and 0 where it is off, exactly, with a gradient that passes to the score as if it were the score itself.
    ///
    /// # Errors
    /// A tensor that was not declared.
    pub(crate) fn gate(&self, tensors: &Locals) -> Result<Tensor> {
        let score = tensors.get(SCORE)?;
        let open = tensors.iter().find(|(local, _)| *local == OPEN).map(|(_, open)| open);
        Ok((self.hard(score, open)? + (score - score.detach())?)?)
    }
}

impl Gates {
    /// The attachments whose gates are open, with their parameters: all that such a component does. None if all are open. One stays where none is,
    /// for a component is somewhere.
    ///
    /// # Errors
    /// Parameters that are not those of `at`.
    pub(crate) fn opened(&self, at: &[Attachment], params: &Params) -> Result<Option<(Vec<Attachment>, Params)>> {
        let value = |at: &Attachment, local: &str| {
            let found = at.tensors.iter().find(|spec| spec.local == local).map(|spec| spec.name(at.site.as_str()));
            found.and_then(|name| params.get(&name))
        };
        let is_open = |at: &Attachment| {
            let score = value(at, SCORE).ok_or_else(|| Error::Refused(format!("{} has no score", at.site)))?;
            let hard = self.hard(score, value(at, OPEN))?.to_dtype(DType::F32)?;
            Ok(hard.to_vec1::<f32>()? == [1.0])
        };
        let mut open = at.iter().map(is_open).collect::<Result<Vec<bool>>>()?;
        if open.iter().all(|open| *open) || open.len() == 1 {
            return Ok(None);
        }
        if !open.contains(&true) {
            open[0] = true;
        }
        let attachments: Vec<Attachment> =
            at.iter().zip(open).filter(|(_, open)| *open).map(|(at, _)| at.clone()).collect();
        let mut own = Params::new();
        for at in &attachments {
            for spec in &at.tensors {
                let held = value(at, spec.local);
                let held = held.ok_or_else(|| Error::Refused(format!("{} has no {}", at.site, spec.local)))?;
                own.insert_declared(spec, at.site.as_str(), held.clone());
            }
        }
        Ok(Some((attachments, own)))
    }
}

/// A site with a gate.
struct Place {
    site: String,
    score: TensorId,
    open: Option<TensorId>,
    /// What the gate is before.
    behind: Vec<TensorId>,
}

/// Steps in which scores are held down, and what is off in the end goes.
pub(crate) struct Gated {
    gates: Gates,
    steps: u64,
    places: Vec<Place>,
}

impl Gated {
    /// The steps of a component that has a score at each of its sites, and `behind` its gate.
    pub(crate) fn new(gates: Gates, behind: &[&str], of: &Trained<'_>) -> Self {
        let place = |at: &&Attachment| {
            let owner = Owner::Bank { slot: of.slot, set: 0 };
            let id = |local: &str| TensorId { owner, name: TensorName::new(at.site.as_str(), local) };
            Place {
                site: at.site.as_str().to_owned(),
                score: id(SCORE),
                open: at.tensors.iter().any(|spec| spec.local == OPEN).then(|| id(OPEN)),
                behind: behind.iter().map(|local| id(local)).collect(),
            }
        };
        Self { gates, steps: of.steps.0, places: of.attachments.iter().map(place).collect() }
    }

    /// The steps before the penalty counts, and those until gates stay.
    fn ends(&self) -> (u64, u64) {
        let share = |share: f64| (share * self.steps as f64).round() as u64;
        (share(self.gates.before), self.steps.saturating_sub(share(self.gates.after)))
    }

    /// Which sites are on.
    fn on(&self, theta: &Theta) -> Result<Vec<bool>> {
        let on = |place: &Place| {
            let open = place.open.as_ref().map(|open| anew::held(theta, open)).transpose()?;
            let hard = self.gates.hard(&anew::held(theta, &place.score)?, open.as_ref())?;
            Ok(hard.to_dtype(DType::F32)?.to_vec1::<f32>()? == [1.0])
        };
        self.places.iter().map(on).collect()
    }

    /// Lets those sites be on whose scores are largest, and no others.
    fn choose(&self, most: f64, theta: &mut Theta) -> Result<()> {
        let scores = self.places.iter().map(|place| Ok(anew::held(theta, &place.score)?.to_vec1::<f32>()?[0]));
        let scores = scores.collect::<Result<Vec<f32>>>()?;
        let count = ((most * scores.len() as f64).round() as usize).max(1);
        let mut open = vec![0.0f32; scores.len()];
        sparse::largest(&scores, count).into_iter().for_each(|at| open[at] = 1.0);
        for (place, open) in self.places.iter().zip(open) {
            if let Some(id) = &place.open {
                theta.put(id, Tensor::new(&[open], &Device::Cpu)?);
            }
        }
        Ok(())
    }
}

impl StepRule for Gated {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (mut gradients, loss) = engine::gradients_on(engine, &batch)?;
        let before = engine.theta().clone();
        let (starts, stays) = self.ends();
        let number = step.next().0;
        if step.0 >= starts {
            let share = self.gates.penalty / self.places.len().max(1) as f64;
            for place in &self.places {
                let gradient = gradients.get(&place.score).cloned();
                let gradient = gradient.ok_or_else(|| Error::Refused(format!("{} has no gradient", place.score)))?;
                let down = (anew::held(&before, &place.score)?.sign()? * share)?;
                gradients.set(&place.score, (gradient + down)?);
            }
        }
        let grad_norm = engine.update(gradients)?;
        let mut theta = engine.theta().clone();
        if step.0 >= stays {
            for place in &self.places {
                theta.put(&place.score, anew::held(&before, &place.score)?);
            }
        } else if let Some(most) = self.gates.most
            && number >= starts
            && (number == starts.max(1) || number.is_multiple_of(self.gates.every) || number == stays)
        {
            self.choose(most, &mut theta)?;
        }
        let (was, on) = (self.on(&before)?, self.on(&theta)?);
        let mut report = StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() };
        let count = on.iter().filter(|on| **on).count();
        report.metrics.push(("on".to_owned(), count as f64));
        let is_last = number == self.steps;
        let told = self.places.iter().zip(was.iter().zip(&on)).filter(|(_, (was, on))| is_last || was != on);
        report.metrics.extend(told.map(|(place, (_, on))| (format!("on/{}", place.site), f64::from(u8::from(*on)))));
        if is_last {
            for (place, _) in self.places.iter().zip(&on).filter(|(_, on)| !**on) {
                for id in &place.behind {
                    let gone = anew::held(&theta, id)?.zeros_like()?;
                    theta.put(id, gone);
                }
            }
        }
        engine.set(theta);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;

    use super::*;
    use crate::parts::toy::{self, Toy};

    const GATES: Gates = Gates { threshold: 0.1, penalty: 1.0, before: 0.1, after: 0.0, most: None, every: 5 };

    const DELTA: &str = "delta";

    /// How large the change is that the only site which has to change needs.
    const WANTED: f32 = 1.0;

    /// Four sites, of which the last has to change, under half the squared distance from what it wants; all start at a score of 0.15.
    fn planted(gates: Gates) -> Toy {
        let attachment = |at: usize| Attachment {
            site: SiteId::new(format!("site_{at}")),
            tensors: vec![TensorSpec::trained(DELTA, [2]), score(1.0), TensorSpec::fixed(OPEN, [1])],
        };
        let start = |_: &str, local: &str| match local {
            SCORE => Tensor::new(&[0.15f32], &Device::Cpu).unwrap(),
            OPEN => Tensor::new(&[1f32], &Device::Cpu).unwrap(),
            _ => Tensor::new(&[0f32, 0.0], &Device::Cpu).unwrap(),
        };
        let gradient = move |theta: &Theta, id: &TensorId| {
            let of = |local: &str| theta.get(&toy::id(id.name.owner(), local)).unwrap().clone();
            let (delta, gate) = (of(DELTA), gates.hard(&of(SCORE), Some(&of(OPEN))).unwrap());
            let wanted = if id.name.owner() == "site_3" { WANTED } else { 0.0 };
            let off = (delta.broadcast_mul(&gate).unwrap() - f64::from(wanted)).unwrap();
            Some(match id.name.local() {
                SCORE => (off * delta).unwrap().sum_keepdim(0).unwrap(),
                _ => off.broadcast_mul(&gate).unwrap(),
            })
        };
        Toy::new((0..4).map(attachment).collect(), start, 0.05, gradient)
    }

    fn on(gates: Gates, toy: &Toy) -> Vec<bool> {
        Gated::new(gates, &[DELTA], &toy.trained(1)).on(&toy.theta).unwrap()
    }

    #[test]
    fn a_gate_is_exact_and_its_gradient_is_that_of_what_it_lets_through() {
        let delta = Tensor::new(&[0.3f64, -2.0], &Device::Cpu).unwrap();
        let dy = Tensor::new(&[1.7f64, 0.4], &Device::Cpu).unwrap();
        for (value, expected) in [(0.1, 1.0), (0.0999, 0.0), (7.3, 1.0), (-0.3, 0.0)] {
            let leaf = autograd::leaf(&Tensor::new(&[value], &Device::Cpu).unwrap()).unwrap();
            let of_delta = autograd::leaf(&delta).unwrap();
            let gate = GATES.gate(&Locals::new("up", [(SCORE, leaf.as_tensor().clone())])).unwrap();
            assert_eq!(gate.to_vec1::<f64>().unwrap(), [expected]);
            let through = of_delta.as_tensor().broadcast_mul(&gate).unwrap();
            let found = autograd::pull(&[&leaf, &of_delta], &[(&through, &dy)]).unwrap();
            let of = |at: usize| found[at].as_ref().unwrap().to_vec1::<f64>().unwrap();
            assert!((of(0)[0] - (1.7 * 0.3 - 0.4 * 2.0)).abs() < 1e-12);
            assert_eq!(of(1), [1.7 * expected, 0.4 * expected]);
        }
        let closed = Tensor::new(&[0f64], &Device::Cpu).unwrap();
        let score = Tensor::new(&[0.5f64], &Device::Cpu).unwrap();
        let gate = GATES.gate(&Locals::new("up", [(SCORE, score), (OPEN, closed)])).unwrap();
        assert_eq!(gate.to_vec1::<f64>().unwrap(), [0.0]);
    }

    /// How many of the last steps each site was on in.
    fn on_at_last(gates: Gates) -> Vec<usize> {
        let mut toy = planted(gates);
        let mut rule = Gated::new(gates, &[DELTA], &toy.trained(200));
        let mut counts = vec![0; 4];
        for step in 0..200 {
            let report = rule.step(Step(step), &mut toy).unwrap();
            let on = on(gates, &toy);
            assert_eq!(report.metrics[0].1, on.iter().filter(|on| **on).count() as f64);
            if step >= 150 {
                counts.iter_mut().zip(on).for_each(|(count, on)| *count += usize::from(on));
            }
        }
        counts
    }

    #[test]
    fn the_site_that_has_to_change_is_the_last_that_is_on_and_a_higher_price_leaves_no_more() {
        let of = |penalty| on_at_last(Gates { penalty, ..GATES });
        assert_eq!(of(0.0), [50; 4]);
        for penalty in [0.5, 1.0, 2.0] {
            let counts = of(penalty);
            assert!(counts[..3] == [0; 3] && counts[3] >= 25, "{penalty}: {counts:?}");
        }
        // Off, it would win 2 by the step; its share of the price is 25.
        let counts = of(100.0);
        assert!(counts[3] < 25, "{counts:?}");
    }

    #[test]
    fn nothing_is_held_down_before_its_time_and_gates_stay_at_the_end() {
        let gates = Gates { before: 0.5, after: 0.2, ..GATES };
        let mut toy = planted(gates);
        let mut rule = Gated::new(gates, &[DELTA], &toy.trained(10));
        let score = |toy: &Toy, site: &str| toy.value(site, SCORE).to_vec1::<f32>().unwrap()[0];
        for step in 0..5 {
            rule.step(Step(step), &mut toy).unwrap();
        }
        assert_eq!(score(&toy, "site_0"), 0.15);
        assert!(score(&toy, "site_3") > 0.15);
        rule.step(Step(5), &mut toy).unwrap();
        // A quarter of the penalty for each of four sites, at a rate of 0.05.
        assert!((score(&toy, "site_0") - (0.15 - 0.05 / 4.0)).abs() < 1e-6);
        (6..8).for_each(|step| drop(rule.step(Step(step), &mut toy).unwrap()));
        let held = score(&toy, "site_3");
        (8..10).for_each(|step| drop(rule.step(Step(step), &mut toy).unwrap()));
        assert_eq!(score(&toy, "site_3"), held);
    }

    #[test]
    fn what_is_off_in_the_end_goes_and_is_told_of() {
        let gates = Gates { penalty: 100.0, ..GATES };
        let mut toy = planted(gates);
        let mut rule = Gated::new(gates, &[DELTA], &toy.trained(30));
        let mut last = StepReport::default();
        for step in 0..30 {
            last = rule.step(Step(step), &mut toy).unwrap();
        }
        let told: Vec<(String, f64)> = last.metrics;
        assert_eq!(told.len(), 5, "{told:?}");
        for (at, on) in on(gates, &toy).into_iter().enumerate() {
            let delta = toy.value(&format!("site_{at}"), DELTA).to_vec1::<f32>().unwrap();
            assert!(on || delta == [0.0, 0.0]);
            assert_eq!(told[at + 1], (format!("on/site_{at}"), f64::from(u8::from(on))));
        }
    }

    #[test]
    fn what_is_off_is_no_more_part_of_it() {
        let gates = Gates { penalty: 1.0, ..GATES };
        let toy = planted(gates);
        let whole = (*toy.theta.banks[0].sets[0]).clone();
        assert!(gates.opened(&toy.attachments, &whole).unwrap().is_none(), "all are on");
        let with = |scores: [f32; 4]| {
            let mut params = whole.clone();
            for (at, score) in scores.into_iter().enumerate() {
                params
                    .insert(TensorName::new(format!("site_{at}"), SCORE), Tensor::new(&[score], &Device::Cpu).unwrap());
            }
            let (attachments, own) = gates.opened(&toy.attachments, &params).unwrap().unwrap();
            assert_eq!(own.len(), 3 * attachments.len());
            assert!(attachments.iter().all(|at| own.is_fixed(&TensorName::new(at.site.as_str(), OPEN))));
            attachments.iter().map(|at| at.site.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(with([0.0, 0.1, 0.09, 0.3]), ["site_1", "site_3"]);
        assert_eq!(with([0.0; 4]), ["site_0"]);
    }

    #[test]
    fn no_more_than_a_share_of_sites_is_on_and_those_are_of_the_largest_scores() {
        let gates = Gates { penalty: 0.0, most: Some(0.25), ..GATES };
        assert_eq!(on_at_last(gates), [0, 0, 0, 50]);
        let gates = Gates { penalty: 0.0, most: Some(0.05), before: 0.0, every: 1, ..GATES };
        let many = |at: usize| Attachment {
            site: SiteId::new(format!("site_{at:03}")),
            tensors: vec![score(1.0), TensorSpec::fixed(OPEN, [1])],
        };
        let start = |site: &str, local: &str| {
            let at: f32 = site[5..].parse().unwrap();
            Tensor::new(&[if local == OPEN { 1.0 } else { 0.2 + at / 1000.0 }], &Device::Cpu).unwrap()
        };
        let mut toy = Toy::new((0..100).map(many).collect(), start, 0.1, |_, _| None);
        let mut rule = Gated::new(gates, &[], &toy.trained(3));
        let report = rule.step(Step(0), &mut toy).unwrap();
        assert_eq!(report.metrics[0], ("on".to_owned(), 5.0));
        let on = rule.on(&toy.theta).unwrap();
        assert_eq!((0..100).filter(|&at| on[at]).collect::<Vec<_>>(), [95, 96, 97, 98, 99]);
    }
}
