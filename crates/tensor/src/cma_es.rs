//! The covariance matrix adaptation evolution strategy: the least of a function that nothing is known of but its values, for some tens
//! to hundreds of numbers.
//!
//! ```text
//! x_k = m + σ y_k,  y_k ~ N(0, C)                                                          k = 1 … λ, by their values: best first
//! m   ← m + σ Σ w_i y_i                                                                    i = 1 … μ, w_i > 0, Σ w_i = 1
//! p_σ ← (1 - c_σ) p_σ + √(c_σ (2 - c_σ) μ_w) C^(-1/2) Σ w_i y_i                             σ ← σ exp(c_σ/d_σ (|p_σ| / E|N(0, I)| - 1))
//! p_c ← (1 - c_c) p_c + h √(c_c (2 - c_c) μ_w) Σ w_i y_i                                    h = 0 while p_σ is long, else 1
//! C   ← (1 - c_1 - c_μ Σ w_j) C + c_1 (p_c p_cᵀ + (1 - h) c_c (2 - c_c) C) + c_μ Σ w_j y_j y_jᵀ    j = 1 … λ, w_j < 0 beyond μ
//! ```
//! with the constants of The CMA Evolution Strategy: A Tutorial. Hansen, 2016: what a worse candidate tells counts against its direction
//! (its `y_j` is taken as long as one of N(0, C)), and C stays positive.
//!
//! It asks and is told, and never calls anything: who evaluates, where and how many at once is not its business. Only the order of the values
//! counts. All of its numbers have 64 bits, for differences in C are lost in fewer; random numbers come with each question, so that
//! what goes on from [`CmaEs::numbers`] asks the same.

use candle_core::{Device, Result, Tensor, bail};

use crate::linalg;
use crate::rng::Rng;

/// The ratio of the longest to the shortest squared axis beyond which C is no longer told from one that has lost a direction.
const CONDITION_MAX: f64 = 1e14;

/// A search.
#[derive(Debug, Clone)]
pub struct CmaEs {
    rates: Rates,
    mean: Vec<f64>,
    step: f64,
    path_step: Vec<f64>,
    path_c: Vec<f64>,
    /// `C`, row by row.
    c: Vec<f64>,
    /// Its axes when it was last decomposed, as rows, and their lengths.
    axes: Vec<f64>,
    lengths: Vec<f64>,
    /// How often it was told.
    generation: u64,
}

/// What follows from the number of dimensions and of candidates.
#[derive(Debug, Clone)]
struct Rates {
    /// By rank, the best first: those of a mean are positive.
    weights: Vec<f64>,
    mu: usize,
    mu_weight: f64,
    c_step: f64,
    damping: f64,
    c_path: f64,
    c_one: f64,
    c_mu: f64,
    /// The mean length of a vector of standard normal numbers.
    length: f64,
    /// Generations between decompositions: what C changes in them is too little to be seen in its axes.
    lag: u64,
}

impl Rates {
    fn new(dimensions: usize, population: usize) -> Self {
        let (n, lambda) = (dimensions as f64, population as f64);
        let mu = population / 2;
        let raw: Vec<f64> = (1..=population).map(|i| ((lambda + 1.0) / 2.0).ln() - (i as f64).ln()).collect();
        let effective =
            |weights: &[f64]| weights.iter().sum::<f64>().powi(2) / weights.iter().map(|w| w * w).sum::<f64>();
        let (mu_weight, mu_below) = (effective(&raw[..mu]), effective(&raw[mu..]));
        let c_step = (mu_weight + 2.0) / (n + mu_weight + 5.0);
        let damping = 1.0 + 2.0 * (((mu_weight - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + c_step;
        let c_path = (4.0 + mu_weight / n) / (n + 4.0 + 2.0 * mu_weight / n);
        let c_one = 2.0 / ((n + 1.3).powi(2) + mu_weight);
        let c_mu = 2.0 * (0.25 + mu_weight + 1.0 / mu_weight - 2.0) / ((n + 2.0).powi(2) + mu_weight);
        let c_mu = c_mu.min(1.0 - c_one);
        let (above, below): (f64, f64) = (raw[..mu].iter().sum(), raw[mu..].iter().map(|w| w.abs()).sum());
        // As much as the good ones count, as few as they are, and so little that C stays positive.
        let of_rates = 1.0 + c_one / c_mu;
        let of_number = 1.0 + 2.0 * mu_below / (mu_weight + 2.0);
        let of_sign = (1.0 - c_one - c_mu) / (n * c_mu);
        let least = of_rates.min(of_number).min(of_sign).max(0.0);
        let weights = raw.iter().map(|w| if *w >= 0.0 { w / above } else { w * least / below });
        Self {
            weights: weights.collect(),
            mu,
            mu_weight,
            c_step,
            damping,
            c_path,
            c_one,
            c_mu,
            length: n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n)),
            lag: ((1.0 / (10.0 * n * (c_one + c_mu))) as u64).max(1),
        }
    }
}

impl CmaEs {
    /// A search that starts around `mean`, `step` far in every direction, by `population` candidates at a time.
    ///
    /// # Errors
    /// No number to search for, fewer than 4 candidates, or a step that is no length.
    pub fn new(mean: Vec<f64>, step: f64, population: usize) -> Result<Self> {
        let n = mean.len();
        if n == 0 || population < 4 || !(step.is_finite() && step > 0.0) {
            bail!(
                "a search of {n} numbers by {population} candidates {step} apart; expected some, 4 or more, and a length"
            );
        }
        let unit: Vec<f64> = (0..n * n).map(|at| if at % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
        Ok(Self {
            rates: Rates::new(n, population),
            mean,
            step,
            path_step: vec![0.0; n],
            path_c: vec![0.0; n],
            axes: unit.clone(),
            c: unit,
            lengths: vec![1.0; n],
            generation: 0,
        })
    }

    /// How many candidates it asks for at a time.
    pub fn population(&self) -> usize {
        self.rates.weights.len()
    }

    /// How far candidates are from the mean, up to the shape of their distribution.
    pub const fn step(&self) -> f64 {
        self.step
    }

    /// Where it searches.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// How often it was told.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The candidates of the next generation, by numbers of `rng` alone.
    pub fn ask(&self, rng: &mut Rng) -> Vec<Vec<f64>> {
        let n = self.mean.len();
        let candidate = |_| {
            let mut x = self.mean.clone();
            for (axis, length) in self.axes.chunks_exact(n).zip(&self.lengths) {
                let along = self.step * length * rng.normal();
                x.iter_mut().zip(axis).for_each(|(x, axis)| *x += along * axis);
            }
            x
        };
        (0..self.population()).map(candidate).collect()
    }

    /// Takes in what the candidates that it asked for are worth: the least is the best, and one that is no number the worst. Equals
    /// rank in their order.
    ///
    /// # Errors
    /// Other candidates or values than it asked for; a covariance that has no axes any more.
    pub fn tell(&mut self, candidates: &[Vec<f64>], values: &[f64]) -> Result<()> {
        let n = self.mean.len();
        let lambda = self.population();
        if candidates.len() != lambda || values.len() != lambda || candidates.iter().any(|x| x.len() != n) {
            bail!(
                "{} candidates and {} values; expected {lambda} of each, of {n} numbers",
                candidates.len(),
                values.len()
            );
        }
        let mut ranked: Vec<usize> = (0..lambda).collect();
        ranked.sort_by(|a, b| known(values[*a]).total_cmp(&known(values[*b])));
        let directions: Vec<Vec<f64>> = ranked
            .iter()
            .map(|at| candidates[*at].iter().zip(&self.mean).map(|(x, m)| (x - m) / self.step).collect())
            .collect();
        self.generation += 1;
        let Rates { weights, mu, mu_weight, c_step, damping, c_path, c_one, c_mu, length, lag } = self.rates.clone();
        let mut moved = vec![0.0; n];
        for (weight, y) in weights[..mu].iter().zip(&directions) {
            moved.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
        }
        self.mean.iter_mut().zip(&moved).for_each(|(m, by)| *m += self.step * by);
        let (kept, new) = (1.0 - c_step, (c_step * (2.0 - c_step) * mu_weight).sqrt());
        let whitened = self.whitened(&moved);
        self.path_step.iter_mut().zip(&whitened).for_each(|(p, by)| *p = kept * *p + new * by);
        let long = norm(&self.path_step) / length;
        // The path of a start is short: what it would be by now tells whether it is long.
        let begun = (1.0 - kept.powf(2.0 * self.generation as f64)).sqrt();
        let is_short = long / begun < 1.4 + 2.0 / (n as f64 + 1.0);
        let h = f64::from(u8::from(is_short));
        let (kept, new) = (1.0 - c_path, h * (c_path * (2.0 - c_path) * mu_weight).sqrt());
        self.path_c.iter_mut().zip(&moved).for_each(|(p, by)| *p = kept * *p + new * by);
        // A worse candidate counts by its direction alone.
        let mut by_rank = weights.clone();
        for (weight, y) in by_rank.iter_mut().zip(&directions).filter(|(weight, _)| **weight < 0.0) {
            let size = norm(&self.whitened(y)).max(f64::MIN_POSITIVE);
            *weight *= n as f64 / (size * size);
        }
        let stays = 1.0 + c_one * (1.0 - h) * c_path * (2.0 - c_path) - c_one - c_mu * weights.iter().sum::<f64>();
        for row in 0..n {
            for col in 0..=row {
                let mut value = stays * self.c[row * n + col] + c_one * self.path_c[row] * self.path_c[col];
                for (weight, y) in by_rank.iter().zip(&directions) {
                    value += c_mu * weight * y[row] * y[col];
                }
                self.c[row * n + col] = value;
                self.c[col * n + row] = value;
            }
        }
        // No more than threefold at a time: a single lucky generation shall not throw it out of the place that it has found.
        self.step *= (c_step / damping * (long - 1.0)).min(1.0).exp();
        if self.generation.is_multiple_of(lag) {
            self.decompose()?;
        }
        Ok(())
    }

    /// `C^(-1/2) y`, by the axes that candidates were made of.
    fn whitened(&self, y: &[f64]) -> Vec<f64> {
        let n = y.len();
        let mut whitened = vec![0.0; n];
        for (axis, length) in self.axes.chunks_exact(n).zip(&self.lengths) {
            let along = axis.iter().zip(y).map(|(axis, y)| axis * y).sum::<f64>() / length;
            whitened.iter_mut().zip(axis).for_each(|(sum, axis)| *sum += along * axis);
        }
        whitened
    }

    fn decompose(&mut self) -> Result<()> {
        let n = self.mean.len();
        let found = linalg::eigen(&Tensor::from_slice(&self.c, (n, n), &Device::Cpu)?)?;
        let values: Vec<f64> = found.values.to_vec1()?;
        let largest = values.first().copied().unwrap_or(0.0);
        if largest <= 0.0 {
            bail!("a covariance whose longest axis is {largest}");
        }
        self.lengths = values.iter().map(|value| value.max(largest / CONDITION_MAX).sqrt()).collect();
        self.axes = found.vectors.flatten_all()?.to_vec1()?;
        Ok(())
    }

    /// All that another search of the same numbers of dimensions and candidates goes on from.
    pub fn numbers(&self) -> Vec<f64> {
        let single = [self.generation as f64, self.step];
        let vectors = [&self.mean, &self.path_step, &self.path_c, &self.lengths, &self.c, &self.axes];
        single.into_iter().chain(vectors.into_iter().flatten().copied()).collect()
    }

    /// Goes on from what another search was.
    ///
    /// # Errors
    /// Numbers of a search of another size.
    pub fn restore(&mut self, numbers: &[f64]) -> Result<()> {
        let n = self.mean.len();
        let expected = 2 + 4 * n + 2 * n * n;
        if numbers.len() != expected {
            bail!("{} numbers of a search; expected {expected}", numbers.len());
        }
        let mut rest = numbers;
        let mut take = |count: usize| {
            let (taken, others) = rest.split_at(count);
            rest = others;
            taken.to_vec()
        };
        let single = take(2);
        (self.generation, self.step) = (single[0] as u64, single[1]);
        for vector in [&mut self.mean, &mut self.path_step, &mut self.path_c, &mut self.lengths] {
            *vector = take(n);
        }
        (self.c, self.axes) = (take(n * n), take(n * n));
        Ok(())
    }
}

/// A value in the order of values, where what is no number comes last.
fn known(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    /// `Σ 10^(6 i / (n - 1)) (q x)_i²`, with orthonormal rows `q`.
    struct Ellipsoid {
        q: Vec<Vec<f64>>,
    }

    impl Ellipsoid {
        fn new(n: usize) -> Self {
            let random = Rng::new(3, "directions").normal_tensor((n, n), 1.0, DType::F64).unwrap();
            Self { q: linalg::qr(&random).unwrap().0.to_vec2().unwrap() }
        }

        fn at(&self, x: &[f64]) -> f64 {
            let last = self.q.len() as f64 - 1.0;
            let of = |(i, row): (usize, &Vec<f64>)| {
                let along = row.iter().zip(x).map(|(q, x)| q * x).sum::<f64>();
                10f64.powf(6.0 * i as f64 / last) * along * along
            };
            self.q.iter().enumerate().map(of).sum()
        }
    }

    fn step(search: &mut CmaEs, seed: u64, of: impl Fn(&[f64]) -> f64) -> f64 {
        let asked = search.ask(&mut Rng::new(seed, "search").sub(search.generation()));
        let values: Vec<f64> = asked.iter().map(|x| of(x)).collect();
        search.tell(&asked, &values).unwrap();
        values.into_iter().fold(f64::INFINITY, f64::min)
    }

    /// Where axes differ by a thousand and none is a coordinate: a search that did not learn the shape would take a million.
    #[test]
    fn a_turned_ellipsoid_of_20_numbers_is_found_to_1e_8_in_15_000_values() {
        let ellipsoid = Ellipsoid::new(20);
        for seed in 0..3 {
            let mut search = CmaEs::new(vec![1.0; 20], 0.5, 12).unwrap();
            let mut best = f64::INFINITY;
            for _ in 0..1250 {
                best = best.min(step(&mut search, seed, |x| ellipsoid.at(x)));
            }
            assert!(best < 1e-8, "seed {seed}: {best} after 15 000 values");
        }
    }

    /// The mean and the step of one generation, by the formulas written out for a unit covariance.
    #[test]
    fn the_first_generation_moves_as_the_formulas_say() {
        let (n, lambda) = (3usize, 6usize);
        let mut search = CmaEs::new(vec![0.5; n], 0.25, lambda).unwrap();
        let asked = search.ask(&mut Rng::new(1, "search"));
        // The third is the best, then the first, then the fifth.
        let values = [2.0, f64::NAN, 1.0, 9.0, 3.0, 4.0];
        search.tell(&asked, &values).unwrap();
        let raw = [3.5f64.ln(), 3.5f64.ln() - 2f64.ln(), 3.5f64.ln() - 3f64.ln()];
        let sum: f64 = raw.iter().sum();
        let weights = raw.map(|w| w / sum);
        let mu: f64 = 1.0 / weights.iter().map(|w| w * w).sum::<f64>();
        let mean: Vec<f64> =
            (0..n).map(|i| [2, 0, 4].iter().zip(weights).map(|(at, w)| w * asked[*at][i]).sum()).collect();
        for (found, expected) in search.mean().iter().zip(&mean) {
            assert!((found - expected).abs() < 1e-12);
        }
        let (c, dimensions) = ((mu + 2.0) / (n as f64 + mu + 5.0), n as f64);
        let damping = 1.0 + 2.0 * (((mu - 1.0) / (dimensions + 1.0)).sqrt() - 1.0).max(0.0) + c;
        let moved = mean.iter().map(|m| ((m - 0.5) / 0.25).powi(2)).sum::<f64>().sqrt();
        let expected_length = 3f64.sqrt() * (1.0 - 1.0 / 12.0 + 1.0 / (21.0 * 9.0));
        let path = (c * (2.0 - c) * mu).sqrt() * moved;
        let expected = 0.25 * (c / damping * (path / expected_length - 1.0)).min(1.0).exp();
        assert!((search.step() - expected).abs() < 1e-12, "{} against {expected}", search.step());
    }

    #[test]
    fn only_the_order_of_values_counts() {
        let ellipsoid = Ellipsoid::new(6);
        let run = |of: &dyn Fn(f64) -> f64| {
            let mut search = CmaEs::new(vec![1.0; 6], 0.5, 8).unwrap();
            (0..40).for_each(|_| {
                step(&mut search, 5, |x| of(ellipsoid.at(x)));
            });
            search.numbers()
        };
        assert_eq!(run(&|value| value), run(&|value| 3.0 * value.sqrt() - 7.0));
    }

    #[test]
    fn what_goes_on_from_its_numbers_has_the_same_bits() {
        let ellipsoid = Ellipsoid::new(7);
        let start = || CmaEs::new(vec![1.0; 7], 0.5, 9).unwrap();
        let run = |search: &mut CmaEs, steps: usize| {
            (0..steps).for_each(|_| {
                step(search, 2, |x| ellipsoid.at(x));
            });
        };
        let (mut whole, mut first, mut second) = (start(), start(), start());
        run(&mut whole, 30);
        // Between two decompositions.
        run(&mut first, 13);
        second.restore(&first.numbers()).unwrap();
        run(&mut second, 17);
        let bits = |search: &CmaEs| search.numbers().into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&second), bits(&whole));
        assert!(CmaEs::new(vec![1.0; 8], 0.5, 9).unwrap().restore(&first.numbers()).is_err());
    }

    /// The weights of a mean sum to 1, and what C keeps of itself and takes in sum to 1 as far as the good ones go; no candidate can
    /// make it lose a direction.
    #[test]
    fn rates_are_shares_and_leave_the_covariance_positive() {
        for (n, population) in [(1, 4), (2, 6), (20, 12), (500, 20), (10, 200)] {
            let rates = Rates::new(n, population);
            assert!((rates.weights[..rates.mu].iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(rates.weights.windows(2).all(|pair| pair[0] >= pair[1]));
            let against: f64 = rates.weights[rates.mu..].iter().filter(|w| **w < 0.0).map(|w| w.abs()).sum();
            assert!(rates.c_one + rates.c_mu <= 1.0 && rates.c_step < 1.0 && rates.c_path <= 1.0);
            let left = 1.0 - rates.c_one - rates.c_mu * (1.0 - against) - rates.c_mu * against * n as f64;
            assert!(left >= -1e-12, "{n} by {population}: {left} is left of a direction that all of the worse share");
        }
    }

    #[test]
    fn what_is_no_search_is_refused() {
        for (mean, step, population) in
            [(vec![], 1.0, 8), (vec![0.0], 0.0, 8), (vec![0.0], f64::NAN, 8), (vec![0.0], 1.0, 3)]
        {
            assert!(CmaEs::new(mean, step, population).is_err());
        }
        let mut search = CmaEs::new(vec![0.0; 2], 1.0, 4).unwrap();
        let asked = search.ask(&mut Rng::new(1, "search"));
        assert!(search.tell(&asked, &[1.0; 3]).unwrap_err().to_string().contains("expected 4 of each"));
    }
}
