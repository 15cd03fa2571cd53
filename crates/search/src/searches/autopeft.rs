//! Searches a space of configurations for those that no other one beats in both quality and size; for choosing what to train, and
//! where, when nobody knows it for a task.
//!
//! # Update
//! ```text
//! first:    `first` places of a Latin hypercube
//! then, `batch` at a time, until `evaluations`:
//!     f_m ~ GP(places, outcome_m)  for both outcomes m, standardised        Matérn 5/2 with a scale ρ_j a number, ρ_j half-Cauchy(0.1)
//!     NEHVI(z) = mean over draws s of  HV(front_s ∪ f_s(z)) - HV(front_s)        front_s: of f_s at what was tried, and at the batch so far
//!     next = argmax NEHVI, by exchanging one axis at a time, from the front, its neighbours and places at random
//! ```
//!
//! # Symbols
//! `f_s` functions drawn from what is believed of both outcomes, noise taken away; HV the area that outcomes beat of what is below a
//! reference: the worst that was seen of each, and a tenth of the range more.
//!
//! # Cost
//! `evaluations` jobs; between them, for n of them and d numbers a place, 160 times `n³ + d n²`, and `n² + draws·n` for each place that is
//! weighed: seconds at two hundred.
//!
//! # Limits
//! With `first` as large as `evaluations` it is `random-search`. Where it can try every place it finds the front.
//!
//! # Departures
//! Scales are those of the largest posterior density under the prior; the paper samples them (NUTS). Outcomes are standardised, not
//! mapped by ranks. Its first places are a Latin hypercube's, not Sobol's. The area's reference is found from what was tried.
//!
//! # Paper
//! AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning. Han Zhou, Xingchen Wan, Ivan Vulić, Anna Korhonen, 2024.

use std::collections::BTreeMap;

use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point, Rule};
use attune_tensor::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parts::Taken;
use crate::front::{front, gain, reference};
use crate::gaussian::{Belief, Drawn};
use crate::{Place, Search, Space, Tried};

/// Places at random from which the best next one is looked for.
const STARTS: usize = 8;
/// The most exchanges from one start.
const EXCHANGES: usize = 32;

/// Parameters of the search.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Jobs that it runs in all.
    #[schemars(range(min = 2, max = 1000))]
    evaluations: u32,
    /// How many of them are spread over the space before it chooses.
    #[schemars(range(min = 2, max = 1000))]
    first: u32,
    /// How many it chooses at a time, which can run side by side.
    #[schemars(range(min = 1, max = 64))]
    batch: u32,
    /// Functions over which a place's worth is averaged.
    #[schemars(range(min = 8, max = 1024))]
    draws: u32,
    /// Which random numbers it draws.
    seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { evaluations: 200, first: 100, batch: 4, draws: 64, seed: 0 }
    }
}

pub(super) struct AutoPeft {
    config: Config,
}

impl Method for AutoPeft {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning",
            authors: "Han Zhou, Xingchen Wan, Ivan Vulić, Anna Korhonen",
            year: 2024,
        }),
        rules: &[Rule {
            when: "true",
            require: "first <= evaluations",
            message: "is more than `evaluations`, of which it is a part",
            path: "first",
        }],
        ..Card::new(
            "autopeft",
            Point::Search,
            "Searches a space of configurations for those that no other one beats in both quality and size; for choosing what to \
             train, and where, when nobody knows it for a task.",
        )
    };
    type Config = Config;
    type Object = dyn Search;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Search>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Search for AutoPeft {
    fn evaluations(&self) -> usize {
        self.config.evaluations as usize
    }

    fn next(&self, space: &Space, tried: &[Tried], fits: &mut dyn FnMut(&Place) -> bool) -> Vec<Place> {
        let rng = Rng::new(self.config.seed, "search").sub(tried.len() as u64);
        let mut taken = Taken::of(tried);
        if tried.is_empty() {
            return taken.spread(space, self.config.first as usize, &mut rng.named("first"), fits);
        }
        let batch = (self.config.batch as usize).min(self.evaluations().saturating_sub(tried.len()));
        let (places, outcomes): (Vec<&Place>, Vec<[f64; 2]>) =
            tried.iter().filter_map(|tried| Some((&tried.place, tried.outcome?))).unzip();
        if outcomes.is_empty() {
            // Nothing is known yet but what fails.
            let mut rng = rng.named("again");
            return (0..batch).map_while(|_| taken.any(space, &mut rng, fits)).collect();
        }
        let mut worth = Worth::of(space, &places, &outcomes, self.config.draws as usize, &rng);
        let mut found = Vec::new();
        while found.len() < batch {
            let Some(place) = worth.best(space, &taken, &rng.sub(found.len() as u64)) else {
                // No place is worth anything: one that is not known yet.
                let Some(place) = taken.any(space, &mut rng.named("any"), fits) else { break };
                found.push(place);
                continue;
            };
            if taken.take(&place, fits) {
                worth.extend(space, &place);
                found.push(place);
            }
        }
        found
    }
}

/// What a place is worth: by how much the area grows that outcomes beat, in the mean over functions.
struct Worth {
    of: [Drawn; 2],
    /// Two normal numbers for each function, the same for all places that are compared.
    normals: [Vec<f64>; 2],
    /// What no other outcome beats, in each pair of functions.
    fronts: Vec<Vec<[f64; 2]>>,
    reference: [f64; 2],
    /// Where to look from.
    starts: Vec<Place>,
}

impl Worth {
    fn of(space: &Space, places: &[&Place], outcomes: &[[f64; 2]], draws: usize, rng: &Rng) -> Self {
        let features: Vec<Vec<f64>> = places.iter().map(|place| space.features(place)).collect();
        let of = [0, 1].map(|m| {
            let seen: Vec<f64> = outcomes.iter().map(|outcome| outcome[m]).collect();
            let mut rng = rng.named("draws").sub(m as u64);
            let normals: Vec<Vec<f64>> = (0..draws).map(|_| (0..seen.len()).map(|_| rng.normal()).collect()).collect();
            Belief::of(features.clone(), &seen).draws(&normals)
        });
        let normals = [0, 1].map(|m| {
            let mut rng = rng.named("places").sub(m);
            (0..draws).map(|_| rng.normal()).collect()
        });
        let starts = front(outcomes).into_iter().map(|index| places[index].clone()).collect();
        let mut worth = Self { of, normals, fronts: Vec::new(), reference: reference(outcomes), starts };
        worth.find_fronts();
        worth
    }

    fn find_fronts(&mut self) {
        let [a, b] = &self.of;
        let fronts = a.values().zip(b.values()).map(|(a, b)| {
            let points: Vec<[f64; 2]> = a.into_iter().zip(b).map(|(a, b)| [a, b]).collect();
            front(&points).into_iter().map(|index| points[index]).collect()
        });
        self.fronts = fronts.collect();
    }

    fn at(&self, space: &Space, place: &Place) -> f64 {
        let features = space.features(place);
        let [a, b] = [0, 1].map(|m| self.of[m].at(&features, &self.normals[m]));
        let gains = self.fronts.iter().zip(a.iter().zip(b)).map(|(front, (a, b))| gain(front, [*a, b], self.reference));
        gains.sum::<f64>() / self.fronts.len().max(1) as f64
    }

    /// The free place that is worth most among those that exchanges lead to; none if all are worth nothing.
    fn best(&self, space: &Space, taken: &Taken, rng: &Rng) -> Option<Place> {
        let mut rng = rng.named("starts");
        let starts: Vec<Place> = self.starts.iter().cloned().chain((0..STARTS).map(|_| space.any(&mut rng))).collect();
        let mut known: BTreeMap<Place, f64> = BTreeMap::new();
        let mut best: Option<(f64, Place)> = None;
        for start in starts {
            let mut here = start;
            // A place that was tried is left for the best of its neighbours, whatever that is worth.
            let mut value = if taken.has(&here) { 0.0 } else { self.known(space, &here, &mut known) };
            for _ in 0..EXCHANGES {
                let free = space.neighbours(&here).filter(|place| !taken.has(place));
                let valued = free.map(|place| (self.known(space, &place, &mut known), place));
                let Some((better, place)) = valued.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))) else {
                    break;
                };
                if better <= value {
                    break;
                }
                (value, here) = (better, place);
            }
            if value > best.as_ref().map_or(0.0, |(value, _)| *value) {
                best = Some((value, here));
            }
        }
        best.map(|(_, place)| place)
    }

    fn known(&self, space: &Space, place: &Place, known: &mut BTreeMap<Place, f64>) -> f64 {
        if let Some(value) = known.get(place) {
            return *value;
        }
        let value = self.at(space, place);
        known.insert(place.clone(), value);
        value
    }

    /// Goes on as if a place's outcomes were known, in each pair of functions.
    fn extend(&mut self, space: &Space, place: &Place) {
        let features = space.features(place);
        for (drawn, normals) in self.of.iter_mut().zip(&self.normals) {
            drawn.extend(features.clone(), normals);
        }
        self.find_fronts();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::random::Random;
    use super::*;
    use crate::front::{beats, hypervolume};
    use crate::{Axis, SEARCHES};

    fn built(text: &str) -> Box<dyn Search> {
        let named = serde_json::from_str(text).unwrap();
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        SEARCHES.build(&named, &"search".into(), &cx).unwrap()
    }

    /// Runs a search to its end, or only so many rounds of it.
    fn run(
        search: &dyn Search,
        space: &Space,
        outcome: &dyn Fn(&Place) -> Option<[f64; 2]>,
        mut tried: Vec<Tried>,
        rounds: usize,
    ) -> Vec<Tried> {
        for _ in 0..rounds {
            let next = search.next(space, &tried, &mut |_| true);
            if next.is_empty() {
                break;
            }
            tried.extend(next.into_iter().map(|place| Tried { outcome: outcome(&place), place }));
        }
        tried
    }

    fn outcomes(tried: &[Tried]) -> Vec<[f64; 2]> {
        tried.iter().filter_map(|tried| tried.outcome).collect()
    }

    fn bits() -> Space {
        Space::new(vec![Axis { values: 2, ordered: true }; 8])
    }

    /// Parts that cost alike and help unequally, two of them only together.
    fn parts(place: &Place) -> [f64; 2] {
        let helps = [0.9, 0.05, 0.5, 0.02, 0.3, 0.1, 0.0, 0.0];
        let on = |at: usize| place[at] as f64;
        let own: f64 = (0..6).map(|at| helps[at] * on(at)).sum();
        [2.0 - own - 0.8 * on(6) * on(7), place.iter().sum::<usize>() as f64]
    }

    #[test]
    fn where_everything_is_tried_the_front_is_that_of_all_places() {
        let space = bits();
        let search = built(r#"{"method": "autopeft", "evaluations": 256, "first": 240, "batch": 8, "draws": 8}"#);
        let tried = run(&*search, &space, &|place| Some(parts(place)), Vec::new(), usize::MAX);
        let distinct: BTreeSet<&Place> = tried.iter().map(|tried| &tried.place).collect();
        assert_eq!((tried.len(), distinct.len()), (256, 256));
        let seen = outcomes(&tried);
        let found: BTreeSet<[u64; 2]> = front(&seen).into_iter().map(|at| seen[at].map(f64::to_bits)).collect();
        let all: Vec<[f64; 2]> = space.all().map(|place| parts(&place)).collect();
        let slow = all.iter().filter(|a| !all.iter().any(|b| beats(*b, **a)));
        assert_eq!(found, slow.map(|one| one.map(f64::to_bits)).collect());
    }

    #[test]
    fn it_beats_random_search_with_as_many_jobs_and_its_area_never_shrinks() {
        let space = Space::new(vec![Axis { values: 11, ordered: true }; 4]);
        // Two aims that pull apart along the first axis; the others have a best value each, of unequal weight.
        let outcome = |place: &Place| {
            let x: Vec<f64> = place.iter().map(|value| *value as f64 / 10.0).collect();
            let off = 2.0 * (x[1] - 0.3).powi(2) + (x[2] - 0.8).powi(2) + 0.1 * x[3];
            Some([(1.0 - x[0]).powi(2) + off, x[0].powi(2) + off])
        };
        let reference = [2.0, 2.0];
        let mean = |name: &str| {
            let areas = (0..10).map(|seed| {
                let fields = if name == "autopeft" { r#", "first": 10, "batch": 3, "draws": 32"# } else { "" };
                let search = built(&format!(r#"{{"method": "{name}", "evaluations": 25, "seed": {seed}{fields}}}"#));
                let seen = outcomes(&run(&*search, &space, &outcome, Vec::new(), usize::MAX));
                assert_eq!(seen.len(), 25);
                let trace: Vec<f64> = (0..=25).map(|count| hypervolume(&seen[..count], reference)).collect();
                assert!(trace.is_sorted(), "{trace:?}");
                trace[25]
            });
            areas.sum::<f64>() / 10.0
        };
        let (own, random, best) = {
            let all: Vec<[f64; 2]> = space.all().filter_map(|place| outcome(&place)).collect();
            (mean("autopeft"), mean(Random::CARD.name), hypervolume(&all, reference))
        };
        assert!(best - own < 0.25 * (best - random), "{own} of {best}, random {random}");
    }

    #[test]
    fn it_goes_on_as_if_it_had_not_been_cut_off() {
        let (space, outcome) = (bits(), |place: &Place| (place[3] == 0).then(|| parts(place)));
        let search = built(r#"{"method": "autopeft", "evaluations": 24, "first": 12, "batch": 4, "draws": 16}"#);
        let whole = run(&*search, &space, &outcome, Vec::new(), usize::MAX);
        let cut = run(&*search, &space, &outcome, Vec::new(), 2);
        assert!(cut.len() < whole.len());
        assert_eq!(run(&*search, &space, &outcome, cut, usize::MAX), whole);
        assert!(whole.iter().any(|tried| tried.outcome.is_none()), "failures are tried once and left");
        let distinct: BTreeSet<&Place> = whole.iter().map(|tried| &tried.place).collect();
        assert_eq!((whole.len(), distinct.len()), (24, 24));
    }

    #[test]
    fn places_without_a_job_are_not_asked_for() {
        let space = bits();
        let search = built(r#"{"method": "autopeft", "evaluations": 200, "first": 8, "batch": 4, "draws": 8}"#);
        let mut fits = |place: &Place| place.iter().sum::<usize>() == 2;
        let mut tried: Vec<Tried> = Vec::new();
        loop {
            let next = search.next(&space, &tried, &mut fits);
            if next.is_empty() {
                break;
            }
            tried.extend(next.into_iter().map(|place| Tried { outcome: Some(parts(&place)), place }));
        }
        assert_eq!(tried.len(), 28, "of eight two");
        assert!(tried.iter().all(|tried| tried.place.iter().sum::<usize>() == 2));
    }
}
