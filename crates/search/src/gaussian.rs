//! A Gaussian process: what is believed of a function at places where it was not asked, from where it was.
//!
//! ```text
//! f ~ GP(0, k)      k(x, z) = v (1 + √5 r + 5/3 r²) exp(-√5 r)      r² = Σ_j ρ_j (x_j - z_j)²        y = f(x) + noise of variance n
//! ```
//!
//! That is Matérn's kernel of 5/2 with a scale ρ_j for each number of a place (`1/√ρ_j` is its length). The scales, `v` and `n` are
//! those of the largest posterior density, where each ρ_j is half-Cauchy around 0: most numbers of a place are believed to be of no
//! matter until outcomes say otherwise.

use faer::linalg::solvers::{Llt, Solve as _};
use faer::{Mat, Side};

/// Width of the prior of the scales.
const TAU: f64 = 0.1;
/// Steps by which the density is climbed, from each start.
const STEPS: usize = 80;
/// Where the climb starts: all scales alike.
const STARTS: [f64; 2] = [1.0, 0.05];
/// The natural logarithms that parameters stay within.
const BOUNDS: [f64; 2] = [-10.0, 4.0];
/// Added to the diagonal, of the kernel's variance, so that a matrix of places that look alike can be decomposed.
const JITTER: f64 = 1e-6;

/// What the kernel depends on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kernel {
    /// Variance of the function.
    pub(crate) variance: f64,
    /// Variance of the noise.
    pub(crate) noise: f64,
    /// `1 / length²` of each number of a place.
    pub(crate) scales: Vec<f64>,
}

impl Kernel {
    fn at(logs: &[f64]) -> Self {
        let (own, scales) = logs.split_at(2);
        Self { variance: own[0].exp(), noise: own[1].exp(), scales: scales.iter().map(|log| log.exp()).collect() }
    }

    fn distance(&self, x: &[f64], z: &[f64]) -> f64 {
        let squares = self.scales.iter().zip(x.iter().zip(z)).map(|(scale, (x, z))| scale * (x - z) * (x - z));
        squares.sum::<f64>().sqrt()
    }

    /// The covariance of two places.
    pub(crate) fn of(&self, x: &[f64], z: &[f64]) -> f64 {
        let r = 5f64.sqrt() * self.distance(x, z);
        self.variance * (1.0 + r + r * r / 3.0) * (-r).exp()
    }

    /// Its derivative by the squared distance.
    fn slope(&self, r: f64) -> f64 {
        let r = 5f64.sqrt() * r;
        -5.0 / 6.0 * self.variance * (1.0 + r) * (-r).exp()
    }

    /// The covariances of places with one another, and `more` on the diagonal.
    fn matrix(&self, places: &[Vec<f64>], more: f64) -> Mat<f64> {
        let n = places.len();
        Mat::from_fn(n, n, |i, j| self.of(&places[i], &places[j]) + if i == j { more } else { 0.0 })
    }
}

/// `K + more = L Lᵀ`, with as much more on the diagonal as that takes.
fn decomposed(matrix: impl Fn(f64) -> Mat<f64>, more: f64, unit: f64) -> Llt<f64> {
    let mut more = more;
    loop {
        if let Ok(found) = Llt::new(matrix(more).as_ref(), Side::Lower) {
            return found;
        }
        more = 10.0 * more.max(JITTER * unit);
    }
}

fn column(of: &[f64]) -> Mat<f64> {
    Mat::from_fn(of.len(), 1, |i, _| of[i])
}

/// The logarithm of the posterior density of a kernel's logarithms, up to a constant, and its derivatives.
fn density(logs: &[f64], places: &[Vec<f64>], y: &[f64]) -> (f64, Vec<f64>) {
    let kernel = Kernel::at(logs);
    let n = places.len();
    let of = decomposed(|more| kernel.matrix(places, more), kernel.noise + JITTER * kernel.variance, kernel.variance);
    let y = column(y);
    let alpha = of.solve(&y);
    let inverse = of.solve(Mat::<f64>::identity(n, n));
    let log_det: f64 = (0..n).map(|i| of.L()[(i, i)].ln()).sum();
    let fit: f64 = (0..n).map(|i| y[(i, 0)] * alpha[(i, 0)]).sum();
    let mut value = -0.5 * fit - log_det;
    let mut slopes = vec![0.0; logs.len()];
    for i in 0..n {
        for j in 0..n {
            // d log p / dK = (α αᵀ - K⁻¹) / 2.
            let by = 0.5 * (alpha[(i, 0)] * alpha[(j, 0)] - inverse[(i, j)]);
            let r = kernel.distance(&places[i], &places[j]);
            let own = kernel.of(&places[i], &places[j]) + if i == j { JITTER * kernel.variance } else { 0.0 };
            slopes[0] += by * own;
            if i == j {
                slopes[1] += by * kernel.noise;
                continue;
            }
            let along = by * kernel.slope(r);
            let numbers = places[i].iter().zip(&places[j]).zip(&kernel.scales);
            for (slope, ((x, z), scale)) in slopes[2..].iter_mut().zip(numbers) {
                *slope += along * scale * (x - z) * (x - z);
            }
        }
    }
    // Half-Cauchy scales; variance and noise log-normal around 1 and 0.01, wide.
    for (slope, scale) in slopes[2..].iter_mut().zip(&kernel.scales) {
        let ratio = (scale / TAU) * (scale / TAU);
        value -= ratio.ln_1p();
        *slope -= 2.0 * ratio / (1.0 + ratio);
    }
    for (index, (mean, width)) in [(0.0, 1.0), (1e-2f64.ln(), 2.0)].into_iter().enumerate() {
        let off = (logs[index] - mean) / width;
        value -= 0.5 * off * off;
        slopes[index] -= off / width;
    }
    (value, slopes)
}

/// Climbs to a kernel of large posterior density.
fn fitted(places: &[Vec<f64>], y: &[f64]) -> Kernel {
    let width = places.first().map_or(0, Vec::len);
    let climb = |start: f64| {
        let mut logs = vec![start.ln(); width + 2];
        (logs[0], logs[1]) = (0.0, 1e-2f64.ln());
        let (mut mean, mut square) = (vec![0.0; logs.len()], vec![0.0; logs.len()]);
        let mut best = (f64::NEG_INFINITY, logs.clone());
        for step in 1..=STEPS {
            let (value, slopes) = density(&logs, places, y);
            if value > best.0 {
                best = (value, logs.clone());
            }
            // Adam's direction: slopes differ by orders of magnitude.
            let rate = 0.3 * (1.0 - (step - 1) as f64 / STEPS as f64);
            for (at, slope) in slopes.iter().enumerate() {
                mean[at] = 0.8 * mean[at] + 0.2 * slope;
                square[at] = 0.95 * square[at] + 0.05 * slope * slope;
                let (m, s) =
                    (mean[at] / (1.0 - 0.8f64.powi(step as i32)), square[at] / (1.0 - 0.95f64.powi(step as i32)));
                logs[at] = (logs[at] + rate * m / (s.sqrt() + 1e-8)).clamp(BOUNDS[0], BOUNDS[1]);
            }
        }
        best
    };
    let best = STARTS.into_iter().map(climb).max_by(|a, b| a.0.total_cmp(&b.0));
    Kernel::at(&best.unwrap_or_default().1)
}

/// A function as it is believed to be, after some of its values were seen.
pub(crate) struct Belief {
    kernel: Kernel,
    places: Vec<Vec<f64>>,
    /// What was seen, less its mean, by its spread.
    y: Vec<f64>,
    mean: f64,
    spread: f64,
}

impl Belief {
    /// Of what was seen at places, as numbers from 0 to 1; at least one.
    pub(crate) fn of(places: Vec<Vec<f64>>, seen: &[f64]) -> Self {
        let (y, mean, spread) = standard(seen);
        let kernel = fitted(&places, &y);
        Self { kernel, places, y, mean, spread }
    }

    #[cfg(test)]
    fn with(kernel: Kernel, places: Vec<Vec<f64>>, seen: &[f64]) -> Self {
        let (y, mean, spread) = standard(seen);
        Self { kernel, places, y, mean, spread }
    }

    /// Values of the function at the places where it was seen, as they may have been without noise: one row for each row of `normals`,
    /// in their own units.
    pub(crate) fn draws(&self, normals: &[Vec<f64>]) -> Drawn {
        let n = self.places.len();
        let (kernel, noise) = (&self.kernel, self.kernel.noise + JITTER * self.kernel.variance);
        let seen = decomposed(|more| kernel.matrix(&self.places, more), noise, kernel.variance);
        let k = kernel.matrix(&self.places, 0.0);
        let mean = &k * seen.solve(&column(&self.y));
        let taken = &k * seen.solve(&k);
        let left = decomposed(
            |more| Mat::from_fn(n, n, |i, j| k[(i, j)] - taken[(i, j)] + if i == j { more } else { 0.0 }),
            JITTER * kernel.variance,
            kernel.variance,
        );
        let rows = normals.iter().map(|z| {
            let off = left.L() * column(z);
            (0..n).map(|i| mean[(i, 0)] + off[(i, 0)]).collect()
        });
        let mut drawn = Drawn {
            kernel: self.kernel.clone(),
            places: self.places.clone(),
            rows: rows.collect(),
            solved: Vec::new(),
            by: None,
            mean: self.mean,
            spread: self.spread,
        };
        drawn.solve();
        drawn
    }
}

/// What was seen with a mean of 0 and a spread of 1, the mean, and the spread.
fn standard(seen: &[f64]) -> (Vec<f64>, f64, f64) {
    let n = seen.len().max(1) as f64;
    let mean = seen.iter().sum::<f64>() / n;
    let variance = seen.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    let spread = if variance > 0.0 { variance.sqrt() } else { 1.0 };
    (seen.iter().map(|x| (x - mean) / spread).collect(), mean, spread)
}

/// Functions that may be the one that was seen.
pub(crate) struct Drawn {
    kernel: Kernel,
    places: Vec<Vec<f64>>,
    /// Each function's values at the places.
    rows: Vec<Vec<f64>>,
    /// `K⁻¹` of each row.
    solved: Vec<Vec<f64>>,
    by: Option<Llt<f64>>,
    mean: f64,
    spread: f64,
}

impl Drawn {
    fn solve(&mut self) {
        let unit = self.kernel.variance;
        let by = decomposed(|more| self.kernel.matrix(&self.places, more), JITTER * unit, unit);
        let (n, rows) = (self.places.len(), &self.rows);
        let solved = by.solve(Mat::from_fn(n, rows.len(), |i, s| rows[s][i]));
        self.solved = (0..rows.len()).map(|s| (0..n).map(|i| solved[(i, s)]).collect()).collect();
        self.by = Some(by);
    }

    /// Each function's values at the places, in the units of what was seen.
    pub(crate) fn values(&self) -> impl Iterator<Item = Vec<f64>> + '_ {
        self.rows.iter().map(|row| row.iter().map(|y| self.mean + self.spread * y).collect())
    }

    /// Each function's value at another place, in its own units, given a normal number for each.
    fn standard_at(&self, place: &[f64], normals: &[f64]) -> Vec<f64> {
        let k: Vec<f64> = self.places.iter().map(|other| self.kernel.of(place, other)).collect();
        let known = self.by.as_ref().map_or(0.0, |by| {
            let solved = by.solve(&column(&k));
            k.iter().enumerate().map(|(i, k)| k * solved[(i, 0)]).sum()
        });
        let left = (self.kernel.variance - known).max(0.0).sqrt();
        let mean = |solved: &Vec<f64>| k.iter().zip(solved).map(|(k, s)| k * s).sum::<f64>();
        self.solved.iter().zip(normals).map(|(solved, z)| mean(solved) + left * z).collect()
    }

    /// Each function's value at another place, given a normal number for each.
    pub(crate) fn at(&self, place: &[f64], normals: &[f64]) -> Vec<f64> {
        self.standard_at(place, normals).into_iter().map(|y| self.mean + self.spread * y).collect()
    }

    /// Goes on as if each function's value had been seen at another place too.
    pub(crate) fn extend(&mut self, place: Vec<f64>, normals: &[f64]) {
        let values = self.standard_at(&place, normals);
        self.places.push(place);
        self.rows.iter_mut().zip(values).for_each(|(row, value)| row.push(value));
        self.solve();
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    fn places() -> Vec<Vec<f64>> {
        vec![vec![0.0, 0.2], vec![0.5, 0.9], vec![1.0, 0.4]]
    }

    fn kernel() -> Kernel {
        Kernel { variance: 1.3, noise: 0.05, scales: vec![2.0, 0.7] }
    }

    /// Three places, whose 3×3 systems are solved by Cramer's rule.
    #[test]
    fn the_posterior_of_three_places_is_the_closed_form() {
        let (kernel, places, seen) = (kernel(), places(), [1.0, -2.0, 0.4]);
        let belief = Belief::with(kernel.clone(), places.clone(), &seen);
        let det = |m: &[[f64; 3]; 3]| {
            m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
                + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        };
        let solve = |m: [[f64; 3]; 3], y: [f64; 3]| -> [f64; 3] {
            std::array::from_fn(|column| {
                let mut with = m;
                (0..3).for_each(|row| with[row][column] = y[row]);
                det(&with) / det(&m)
            })
        };
        let noise = kernel.noise + JITTER * kernel.variance;
        let k: [[f64; 3]; 3] = std::array::from_fn(|i| std::array::from_fn(|j| kernel.of(&places[i], &places[j])));
        let mut with_noise = k;
        (0..3).for_each(|i| with_noise[i][i] += noise);
        let alpha = solve(with_noise, [belief.y[0], belief.y[1], belief.y[2]]);
        let drawn = belief.draws(&[vec![0.0; 3]]);
        for (i, k) in k.iter().enumerate() {
            let mean: f64 = k.iter().zip(alpha).map(|(k, a)| k * a).sum();
            assert!((drawn.rows[0][i] - mean).abs() < 1e-10, "{i}");
        }
        // And at a fourth, by the same alpha: the mean of functions through their own means at the three.
        let at = [0.3, 0.3];
        let direct: f64 = places.iter().zip(alpha).map(|(place, a)| kernel.of(&at, place) * a).sum();
        assert!((drawn.standard_at(&at, &[0.0])[0] - direct).abs() < 1e-5);
        // The variance there, of many draws, is k - kᵀ (K + n)⁻¹ k.
        let mut rng = Rng::new(3, "draws");
        let normals: Vec<Vec<f64>> = (0..20_000).map(|_| (0..3).map(|_| rng.normal()).collect()).collect();
        let own: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let values = belief.draws(&normals).standard_at(&at, &own);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / values.len() as f64;
        let to: [f64; 3] = std::array::from_fn(|i| kernel.of(&at, &places[i]));
        let expected = kernel.variance - to.iter().zip(solve(with_noise, to)).map(|(a, b)| a * b).sum::<f64>();
        assert!((variance / expected - 1.0).abs() < 0.04, "{variance} {expected}");
    }

    #[test]
    fn slopes_of_the_density_agree_with_central_differences() {
        let (places, y) = (places(), [0.7, -1.2, 0.5]);
        let logs = [0.2, -2.0, 0.6, -1.5];
        let (_, slopes) = density(&logs, &places, &y);
        for at in 0..logs.len() {
            let moved = |by: f64| {
                let mut logs = logs;
                logs[at] += by;
                density(&logs, &places, &y).0
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slopes[at] - expected).abs() < 1e-6, "{at}: {} {expected}", slopes[at]);
        }
    }

    #[test]
    fn numbers_that_do_not_matter_get_small_scales() {
        let mut rng = Rng::new(1, "places");
        let places: Vec<Vec<f64>> = (0..30).map(|_| (0..4).map(|_| rng.uniform()).collect()).collect();
        let seen: Vec<f64> = places.iter().map(|x| (6.0 * x[1]).sin()).collect();
        let found = Belief::of(places, &seen).kernel;
        for other in [0, 2, 3] {
            assert!(found.scales[other] < 0.02 * found.scales[1], "{found:?}");
        }
        assert!(found.noise < 0.02, "{found:?}");
    }

    #[test]
    fn equal_places_and_equal_values_are_no_trouble() {
        let belief = Belief::of(vec![vec![0.5]; 6], &[2.0; 6]);
        let mut drawn = belief.draws(&[vec![0.3; 6], vec![-0.3; 6]]);
        drawn.extend(vec![0.5], &[0.1, 0.2]);
        assert!(drawn.values().flatten().all(|x| (x - 2.0).abs() < 1.0));
    }
}
