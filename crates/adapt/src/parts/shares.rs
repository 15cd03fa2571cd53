//! A number of ranks shared among linears by what each scores.

use std::cmp::Ordering;

use attune_points::{Error, Result};

/// A sum that the order of its terms does not change.
pub(crate) fn sum(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    values.into_iter().sum()
}

/// How much there is to share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shared {
    /// The rank that linears have on average.
    pub(crate) mean: u32,
    /// The least one.
    pub(crate) least: u32,
    /// The largest one; four times the mean if left out.
    pub(crate) most: Option<u32>,
}

impl Shared {
    /// The ranks of linears by their scores: in proportion above the least one, none beyond what it can have, and `mean` on average.
    pub(crate) fn among(&self, linears: &[(&str, (usize, usize))], scores: &[f64]) -> Result<Vec<u32>> {
        let Self { mean, least, .. } = *self;
        let most = self.most.unwrap_or_else(|| mean.saturating_mul(4));
        if mean < least || most < mean {
            let message =
                format!("ranks are {mean} on average; expected a rank from `least`, {least}, to `most`, {most}");
            return Err(Error::Refused(message));
        }
        let n = linears.len();
        let room: Vec<u32> =
            linears.iter().map(|(_, (o, i))| most.min(*o.min(i) as u32).saturating_sub(least)).collect();
        if let Some((name, (o, i))) = linears.iter().find(|(_, (o, i))| *o.min(i) < mean as usize) {
            return Err(Error::Refused(format!("rank {mean} is beyond what {name}, {o} by {i}, can have")));
        }
        let mut free = u64::from(mean - least) * n as u64;
        let (mut ranks, mut left) = (vec![least; n], vec![true; n]);
        // Whoever would get more than it has room for gets that, and what it leaves goes to the others.
        let proportional = loop {
            let of_left = || (0..n).filter(|at| left[*at]);
            let whole = sum(of_left().map(|at| scores[at]));
            let (count, free_now) = (of_left().count() as f64, free as f64);
            let part = |at: usize| free_now * if whole > 0.0 { scores[at] / whole } else { 1.0 / count };
            let full: Vec<usize> = of_left().filter(|at| part(*at) >= f64::from(room[*at])).collect();
            if full.is_empty() || free == 0 {
                break of_left().map(|at| (at, part(at))).collect::<Vec<_>>();
            }
            for at in full {
                ranks[at] += room[at];
                free = free.saturating_sub(u64::from(room[at]));
                left[at] = false;
            }
        };
        let mut remainders = Vec::with_capacity(proportional.len());
        for (at, part) in proportional {
            // A whole number that rounding has left just below itself is meant.
            let whole = (part + 1e-9).floor();
            ranks[at] += whole as u32;
            free = free.saturating_sub(whole as u64);
            remainders.push((at, part - whole));
        }
        // The largest remainder first; of those that are the same, the larger score, then the name that comes first.
        let order = |a: &(usize, f64), b: &(usize, f64)| -> Ordering {
            let by_score = || scores[b.0].total_cmp(&scores[a.0]);
            b.1.total_cmp(&a.1).then_with(by_score).then_with(|| linears[a.0].0.cmp(linears[b.0].0))
        };
        remainders.sort_unstable_by(order);
        for (at, _) in remainders.into_iter().take(free as usize) {
            ranks[at] += 1;
        }
        Ok(ranks)
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    #[test]
    fn ranks_add_up_and_stay_within_bounds() {
        let mut rng = Rng::new(8, "cases");
        for case in 0..200u64 {
            let n = 1 + rng.below(30) as usize;
            let mean = 2 + rng.below(7) as u32;
            let names: Vec<String> = (0..n).map(|at| format!("{at:02}")).collect();
            let linears: Vec<(&str, (usize, usize))> =
                names.iter().map(|name| (name.as_str(), (mean as usize + rng.below(40) as usize, 64))).collect();
            // Some of nothing, some of very much.
            let scores: Vec<f64> = (0..n).map(|_| (rng.below(4) as f64).powi(rng.below(9) as i32 - 1)).collect();
            let scores: Vec<f64> = scores.into_iter().map(|s| if s.is_finite() { s } else { 0.0 }).collect();
            let most = (rng.below(2) == 0).then(|| mean + rng.below(9) as u32);
            let least = 1 + rng.below(u64::from(mean)) as u32;
            let ranks = Shared { mean, least, most }.among(&linears, &scores).unwrap();
            assert_eq!(ranks.iter().sum::<u32>(), mean * n as u32, "case {case}: {ranks:?}");
            for (rank, (_, (o, i))) in ranks.iter().zip(&linears) {
                let most = most.unwrap_or(4 * mean).min(*o.min(i) as u32);
                assert!((least..=most).contains(rank), "case {case}: {rank} of {least} to {most}");
            }
        }
    }
}
