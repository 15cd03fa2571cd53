//! The non-dominated sorting genetic algorithm, NSGA-II: what no other choice beats in two outcomes at once, where a choice is one of some
//! values for each of many things.
//!
//! ```text
//! parents:   the first ones as given and at random
//! children:  two parents by tournaments (fewer fronts before it; then more room around it on its own), each gene of either, a gene
//!            anew with probability 1 / genes
//! parents <- the best of parents and children, front by front, on the last front those with the most room
//! ```
//!
//! It asks and is told, and never calls anything. It asks for nothing twice. Random numbers come with each question: whoever asks the same with
//! the same numbers, and tells the same, is asked the same. Outcomes are to be made small; one that is not finite is worse than all.
//! A fast and elitist multiobjective genetic algorithm: NSGA-II. Deb, Pratap, Agarwal, Meyarivan, 2002.

use std::collections::BTreeSet;

use crate::rng::Rng;

/// A value of each gene, by its number.
pub type Genome = Vec<usize>;

/// How often a child is made anew that is known already, before one at random is looked for.
const TRIES: usize = 16;

/// The search.
#[derive(Debug, Clone)]
pub struct Nsga2 {
    /// How many values each gene has.
    values: Vec<usize>,
    population: usize,
    first: Vec<Genome>,
    parents: Vec<(Genome, [f64; 2])>,
    asked: Vec<Genome>,
    known: BTreeSet<Genome>,
    /// All that it was told, in that order.
    told: Vec<(Genome, [f64; 2])>,
}

impl Nsga2 {
    /// A search among `values` of each gene, whose first population has the genomes `first`, and others at random.
    pub fn new(values: Vec<usize>, population: usize, first: Vec<Genome>) -> Self {
        let population = population.max(2);
        let (parents, asked, known, told) = (Vec::new(), Vec::new(), BTreeSet::new(), Vec::new());
        Self { values, population, first, parents, asked, known, told }
    }

    /// What to evaluate next, at most `most` genomes that were not asked for before; none when there are no others.
    pub fn ask(&mut self, most: usize, rng: &Rng) -> Vec<Genome> {
        let mut asked = Vec::new();
        let wanted = self.population.max(self.first.len()).min(most);
        if self.told.is_empty() {
            for genome in std::mem::take(&mut self.first) {
                if asked.len() < wanted && self.fits(&genome) && self.known.insert(genome.clone()) {
                    asked.push(genome);
                }
            }
        }
        let wanted = self.population.min(most).max(asked.len());
        let mut number = 0;
        while asked.len() < wanted {
            let mut rng = rng.sub(number);
            number += 1;
            let mut child = self.child(&mut rng);
            for _ in 0..TRIES {
                if !self.known.contains(&child) {
                    break;
                }
                child = self.child(&mut rng);
            }
            let Some(child) = self.free(child, &mut rng) else { break };
            self.known.insert(child.clone());
            asked.push(child);
        }
        self.asked.clone_from(&asked);
        asked
    }

    /// The outcomes of what was asked for last, in its order.
    pub fn tell(&mut self, outcomes: &[[f64; 2]]) {
        let told: Vec<_> = std::mem::take(&mut self.asked).into_iter().zip(outcomes.iter().copied()).collect();
        self.told.extend(told.iter().cloned());
        self.parents.extend(told);
        let outcomes: Vec<[f64; 2]> = self.parents.iter().map(|(_, outcome)| *outcome).collect();
        let ranked = ranked(&outcomes);
        let parents = ranked.into_iter().take(self.population).map(|one| self.parents[one.index].clone());
        self.parents = parents.collect();
    }

    /// All that was told, in its order.
    pub fn told(&self) -> &[(Genome, [f64; 2])] {
        &self.told
    }

    /// Of all that was told what nothing beats, by the first outcome; of equal ones the first.
    pub fn front(&self) -> Vec<&(Genome, [f64; 2])> {
        let outcomes: Vec<[f64; 2]> = self.told.iter().map(|(_, outcome)| *outcome).collect();
        let mut front: Vec<usize> =
            (0..outcomes.len()).filter(|one| outcomes[*one].iter().all(|outcome| outcome.is_finite())).collect();
        front.sort_by(|a, b| {
            let (x, y) = (outcomes[*a], outcomes[*b]);
            x[0].total_cmp(&y[0]).then(x[1].total_cmp(&y[1])).then(a.cmp(b))
        });
        let mut least = f64::INFINITY;
        front.retain(|one| {
            let is_less = outcomes[*one][1] < least;
            least = least.min(outcomes[*one][1]);
            is_less
        });
        front.into_iter().map(|one| &self.told[one]).collect()
    }

    fn fits(&self, genome: &[usize]) -> bool {
        genome.len() == self.values.len() && genome.iter().zip(&self.values).all(|(value, values)| value < values)
    }

    fn any(&self, rng: &mut Rng) -> Genome {
        self.values.iter().map(|values| rng.below((*values).max(1) as u64) as usize).collect()
    }

    /// The same genome if nobody knows it; else the next one, in the order of numbers whose digits genes are, that nobody knows.
    fn free(&self, mut genome: Genome, rng: &mut Rng) -> Option<Genome> {
        if !self.known.contains(&genome) {
            return Some(genome);
        }
        let all = self.values.iter().fold(1u128, |all, values| all.saturating_mul((*values).max(1) as u128));
        if self.known.len() as u128 >= all {
            return None;
        }
        genome = self.any(rng);
        while self.known.contains(&genome) {
            for (gene, values) in genome.iter_mut().zip(&self.values) {
                *gene += 1;
                if *gene < *values {
                    break;
                }
                *gene = 0;
            }
        }
        Some(genome)
    }

    /// A child of two parents; anything, where there are none.
    fn child(&self, rng: &mut Rng) -> Genome {
        if self.parents.is_empty() {
            return self.any(rng);
        }
        // Parents stand in their order, so that of two the first one is the better.
        let mut parent = || {
            let of = self.parents.len() as u64;
            let (a, b) = (rng.below(of), rng.below(of));
            &self.parents[a.min(b) as usize].0
        };
        let (mother, father) = (parent(), parent());
        let genes = self.values.len().max(1) as u64;
        let gene = |at: usize, rng: &mut Rng| {
            let inherited = if rng.below(2) == 0 { mother[at] } else { father[at] };
            if rng.below(genes) == 0 { rng.below(self.values[at].max(1) as u64) as usize } else { inherited }
        };
        (0..self.values.len()).map(|at| gene(at, rng)).collect()
    }
}

/// Where one stands among others.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ranked {
    index: usize,
    /// How many fronts are before its own.
    front: usize,
    /// How far those next to it on its front are apart, the ends of a front farthest.
    room: f64,
}

/// All of some outcomes, the best first.
fn ranked(outcomes: &[[f64; 2]]) -> Vec<Ranked> {
    let beats = |a: [f64; 2], b: [f64; 2]| {
        let worse = |x: f64| if x.is_finite() { x } else { f64::MAX };
        let (a, b) = (a.map(worse), b.map(worse));
        a[0] <= b[0] && a[1] <= b[1] && a != b
    };
    let mut left: Vec<usize> = (0..outcomes.len()).collect();
    let (mut all, mut number) = (Vec::with_capacity(outcomes.len()), 0);
    while !left.is_empty() {
        let (front, others): (Vec<usize>, Vec<usize>) =
            left.iter().partition(|one| !left.iter().any(|other| beats(outcomes[*other], outcomes[**one])));
        let mut of_front: Vec<Ranked> = front
            .iter()
            .zip(rooms(&front, outcomes))
            .map(|(index, room)| Ranked { index: *index, front: number, room })
            .collect();
        of_front.sort_by(|a, b| b.room.total_cmp(&a.room).then(a.index.cmp(&b.index)));
        all.extend(of_front);
        left = others;
        number += 1;
    }
    all
}

/// The room of each on a front: the sum, over both outcomes, of how far the next ones on either side are apart, as shares of the range.
fn rooms(front: &[usize], outcomes: &[[f64; 2]]) -> Vec<f64> {
    let mut rooms = vec![0.0; front.len()];
    let first: fn(&[f64; 2]) -> f64 = |outcome| outcome[0];
    for of in [first, |outcome| outcome[1]] {
        let mut order: Vec<usize> = (0..front.len()).collect();
        order.sort_by(|a, b| of(&outcomes[front[*a]]).total_cmp(&of(&outcomes[front[*b]])).then(a.cmp(b)));
        let at = |place: usize| of(&outcomes[front[order[place]]]);
        let last = order.len() - 1;
        let range = at(last) - at(0);
        for place in 0..=last {
            let room = &mut rooms[order[place]];
            if place == 0 || place == last {
                *room = f64::INFINITY;
            } else if range > 0.0 && range.is_finite() {
                *room += (at(place + 1) - at(place - 1)) / range;
            }
        }
    }
    rooms
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Choices that cost what they are and help unequally: the front takes what helps most first.
    fn outcome(genome: &Genome) -> [f64; 2] {
        let helps = [0.9, 0.05, 0.5, 0.02, 0.3, 0.1, 0.01, 0.2];
        let missed: f64 = genome.iter().zip(helps).map(|(value, help)| help / (1.0 + *value as f64)).sum();
        [missed, genome.iter().sum::<usize>() as f64]
    }

    fn searched(evaluations: usize, seed: u64) -> Nsga2 {
        let mut search = Nsga2::new(vec![3; 8], 10, vec![vec![2; 8], vec![1; 8], vec![0; 8]]);
        let rng = Rng::new(seed, "search");
        let mut generation = 0;
        while search.told().len() < evaluations {
            let asked = search.ask(evaluations - search.told().len(), &rng.sub(generation));
            if asked.is_empty() {
                break;
            }
            search.tell(&asked.iter().map(outcome).collect::<Vec<_>>());
            generation += 1;
        }
        search
    }

    fn area(front: &[[f64; 2]]) -> f64 {
        let (mut area, mut above) = (0.0, 20.0);
        for [a, b] in front {
            area += (4.0 - a).max(0.0) * (above - b).max(0.0);
            above = above.min(*b);
        }
        area
    }

    #[test]
    fn nothing_that_was_told_beats_the_front_and_it_has_the_ends() {
        let search = searched(200, 1);
        let front = search.front();
        assert_eq!(search.told().len(), 200);
        let beats = |a: [f64; 2], b: [f64; 2]| a[0] <= b[0] && a[1] <= b[1] && a != b;
        assert!(front.iter().all(|one| !search.told().iter().any(|other| beats(other.1, one.1))));
        assert!(front.windows(2).all(|two| two[0].1[0] < two[1].1[0] && two[0].1[1] > two[1].1[1]));
        assert_eq!((&front[0].0, &front[front.len() - 1].0), (&vec![2; 8], &vec![0; 8]));
    }

    #[test]
    fn nothing_is_asked_for_twice_and_the_same_numbers_ask_the_same() {
        let search = searched(200, 1);
        let distinct: BTreeSet<&Genome> = search.told().iter().map(|(genome, _)| genome).collect();
        assert_eq!(distinct.len(), 200);
        assert_eq!(search.told(), searched(200, 1).told());
        assert_ne!(search.told(), searched(200, 2).told());
    }

    #[test]
    fn where_everything_is_asked_for_it_ends() {
        let mut search = Nsga2::new(vec![2, 3], 4, Vec::new());
        let mut all = BTreeSet::new();
        for generation in 0..10 {
            let asked = search.ask(100, &Rng::new(0, "search").sub(generation));
            search.tell(&asked.iter().map(|genome| [genome[0] as f64, -(genome[1] as f64)]).collect::<Vec<_>>());
            all.extend(asked);
        }
        assert_eq!((all.len(), search.told().len()), (6, 6));
        assert_eq!(search.front(), [&(vec![0, 2], [0.0, -2.0])]);
    }

    /// With as many evaluations, in the mean over seeds, its front beats more of the plane than choices at random.
    #[test]
    fn it_beats_choices_at_random() {
        let mean = |found: &dyn Fn(u64) -> Vec<[f64; 2]>| (0..10).map(|seed| area(&found(seed))).sum::<f64>() / 10.0;
        let evolved = mean(&|seed| searched(150, seed).front().iter().map(|one| one.1).collect());
        let random = mean(&|seed| {
            let mut search = Nsga2::new(vec![3; 8], 150, vec![vec![2; 8], vec![1; 8], vec![0; 8]]);
            let asked = search.ask(150, &Rng::new(seed, "search"));
            search.tell(&asked.iter().map(outcome).collect::<Vec<_>>());
            search.front().iter().map(|one| one.1).collect()
        });
        assert!(evolved > random, "{evolved} {random}");
    }

    #[test]
    fn outcomes_that_are_no_numbers_are_on_no_front() {
        let mut search = Nsga2::new(vec![2], 2, vec![vec![0], vec![1]]);
        search.ask(2, &Rng::new(0, "search"));
        search.tell(&[[f64::NAN, 0.0], [1.0, 1.0]]);
        assert_eq!(search.front(), [&(vec![1], [1.0, 1.0])]);
    }
}
