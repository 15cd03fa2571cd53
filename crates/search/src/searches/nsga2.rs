//! Evolves a population of configurations towards those that no other one beats in both outcomes: for spaces of many axes, where each has its say
//! in both, and jobs are cheap.
//!
//! # Update
//! ```text
//! first:    `population` places at random
//! then, `population` at a time, until `evaluations`:
//!     children of two places by tournaments: fewer fronts before it, then more room around it on its own; each axis as in either of them, and anew with
//!     probability 1 / axes
//!     population <- the best of it and of its children, front by front
//! ```
//!
//! # Symbols
//! A front is of places that no other one beats of those that are not on a front before it.
//!
//! # Cost
//! None beside its jobs.
//!
//! # Limits
//! Nothing is run twice; where it can run every place it finds the front. A job that failed is worse than all.
//!
//! # Departures
//! none; axes are of values, so that there is no crossover within one.
//!
//! # Paper
//! A fast and elitist multiobjective genetic algorithm: NSGA-II. Deb, Pratap, Agarwal, Meyarivan, 2002.

use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::Rng;
use attune_tensor::nsga2::{Genome, Nsga2 as Evolution};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Place, Search, Space, Tried};

/// What came of a job that failed.
const FAILED: [f64; 2] = [f64::INFINITY; 2];

/// Parameters of the search.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Jobs that it runs in all.
    #[schemars(range(min = 2, max = 10000))]
    evaluations: u32,
    /// How many it runs at a time, and keeps.
    #[schemars(range(min = 2, max = 1000))]
    population: u32,
    /// Which random numbers it draws.
    seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { evaluations: 200, population: 8, seed: 0 }
    }
}

pub(super) struct Nsga2 {
    config: Config,
}

impl Method for Nsga2 {
    const CARD: Card = Card {
        aliases: &["nsga2"],
        paper: Some(Paper {
            title: "A fast and elitist multiobjective genetic algorithm: NSGA-II",
            authors: "Kalyanmoy Deb, Amrit Pratap, Sameer Agarwal, T. Meyarivan",
            year: 2002,
        }),
        ..Card::new(
            "nsga-ii",
            Point::Search,
            "Evolves a population of configurations towards those that no other one beats in both outcomes: for spaces of many axes, \
             where each has its say in both, and jobs are cheap.",
        )
    };
    type Config = Config;
    type Object = dyn Search;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Search>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Search for Nsga2 {
    fn evaluations(&self) -> usize {
        self.config.evaluations as usize
    }

    /// What was asked for before is asked for again, and told what came of it: so the population is what it was.
    fn next(&self, space: &Space, tried: &[Tried], fits: &mut dyn FnMut(&Place) -> bool) -> Vec<Place> {
        let values = space.axes().iter().map(|axis| axis.values).collect();
        let mut evolution = Evolution::new(values, self.config.population as usize, Vec::new());
        let rng = Rng::new(self.config.seed, "search");
        let (mut told, mut generation) = (0, 0);
        loop {
            let left = self.evaluations().saturating_sub(told);
            let asked = if left == 0 { Vec::new() } else { evolution.ask(left, &rng.sub(generation)) };
            if asked.is_empty() {
                return Vec::new();
            }
            generation += 1;
            // There is no job where none fits.
            let runs: Vec<bool> = asked.iter().map(&mut *fits).collect();
            let known = &tried[told.min(tried.len())..];
            let wanted = runs.iter().filter(|runs| **runs).count();
            if wanted > known.len() {
                let all: Vec<Genome> =
                    asked.into_iter().zip(runs).filter(|(_, runs)| *runs).map(|(one, _)| one).collect();
                return all.into_iter().skip(known.len()).collect();
            }
            let mut outcomes = known.iter().map(|tried| tried.outcome.unwrap_or(FAILED));
            let outcome = |runs: &bool| if *runs { outcomes.next().unwrap_or(FAILED) } else { FAILED };
            let came: Vec<[f64; 2]> = runs.iter().map(outcome).collect();
            evolution.tell(&came);
            told += wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::front::{front, hypervolume};
    use crate::{Axis, SEARCHES};

    fn built(text: &str) -> Box<dyn Search> {
        let named = serde_json::from_str(text).unwrap();
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        SEARCHES.build(&named, &"search".into(), &cx).unwrap()
    }

    fn space() -> Space {
        Space::new(vec![Axis { values: 3, ordered: true }; 8])
    }

    /// Parts that cost alike and help unequally.
    fn outcome(place: &Place) -> [f64; 2] {
        let helps = [0.9, 0.05, 0.5, 0.02, 0.3, 0.1, 0.01, 0.2];
        let missed: f64 = place.iter().zip(helps).map(|(value, help)| help / (1.0 + *value as f64)).sum();
        [missed, place.iter().sum::<usize>() as f64]
    }

    fn run(search: &dyn Search, space: &Space, fits: &dyn Fn(&Place) -> bool, mut tried: Vec<Tried>) -> Vec<Tried> {
        loop {
            let next = search.next(space, &tried, &mut |place| fits(place));
            if next.is_empty() {
                return tried;
            }
            tried.extend(next.into_iter().map(|place| Tried { outcome: Some(outcome(&place)), place }));
        }
    }

    #[test]
    fn it_beats_random_search_and_runs_nothing_twice() {
        let mean = |name: &str, more: &str| {
            let area = |seed: u32| {
                let search = built(&format!(r#"{{"method": "{name}", "evaluations": 120, "seed": {seed}{more}}}"#));
                let tried = run(&*search, &space(), &|_| true, Vec::new());
                assert_eq!(tried.iter().map(|one| &one.place).collect::<BTreeSet<_>>().len(), 120);
                let outcomes: Vec<[f64; 2]> = tried.iter().filter_map(|one| one.outcome).collect();
                hypervolume(&outcomes, [4.0, 20.0])
            };
            (0..10).map(area).sum::<f64>() / 10.0
        };
        let (evolved, random) = (mean("nsga-ii", r#", "population": 10"#), mean("random-search", ""));
        assert!(evolved > random, "{evolved} {random}");
    }

    #[test]
    fn one_that_was_cut_off_goes_on_as_if_it_had_not_been() {
        let search = built(r#"{"method": "nsga-ii", "evaluations": 50, "population": 6, "seed": 3}"#);
        // Some places have no job.
        let fits = |place: &Place| place[0] != 1;
        let whole = run(&*search, &space(), &fits, Vec::new());
        assert!(whole.len() == 50 && whole.iter().all(|one| one.place[0] != 1));
        for cut in [1, 6, 17, 49] {
            assert_eq!(run(&*search, &space(), &fits, whole[..cut].to_vec()), whole, "cut at {cut}");
        }
    }

    #[test]
    fn where_everything_is_run_the_front_is_that_of_all_places() {
        let small = Space::new(vec![Axis { values: 3, ordered: true }; 3]);
        let tried = run(&*built(r#"{"method": "nsga-ii", "population": 5}"#), &small, &|_| true, Vec::new());
        assert_eq!(tried.len(), 27);
        let of = |places: Vec<Place>| {
            let outcomes: Vec<[f64; 2]> = places.iter().map(outcome).collect();
            front(&outcomes).into_iter().map(|at| outcomes[at].map(f64::to_bits)).collect::<BTreeSet<_>>()
        };
        assert_eq!(of(tried.into_iter().map(|one| one.place).collect()), of(small.all().collect()));
        let failing = |place: &Place| Tried { outcome: None, place: place.clone() };
        let search = built(r#"{"method": "nsga-ii", "population": 5, "evaluations": 27}"#);
        let failed: Vec<Tried> = search.next(&small, &[], &mut |_| true).iter().map(failing).collect();
        assert_eq!(search.next(&small, &failed, &mut |_| true).len(), 5);
    }
}
