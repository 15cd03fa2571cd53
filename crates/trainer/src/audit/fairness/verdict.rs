//! Whether a run of few directions went as far from the base's ways as one of all weights did.
//!
//! ```text
//! R = m(base) − m(reference)                 what the reference took off a metric of which less is better
//! recovered = (m(base) − m(run)) / R
//! S = least · R − (m(base) − m(run))         how far the run falls short of the least share
//! ```
//! Intervals are of R and S, which are sums of means; a quotient's would be of no use where R is near 0.

use serde::Serialize;

use crate::audit::bootstrap::{Bootstrap, Interval};

/// What a run is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// A run of all weights.
    Full,
    /// The run with the most directions, in the place of one of all weights: it may fall short itself.
    LargestRank,
}

/// What can be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// The run keeps what the reference got rid of: surely short of the least share.
    Flagged,
    /// As little is left as of the run of all weights, or surely within the share.
    Mitigated,
    /// It keeps up with the run with the most directions. What one of all weights would have done nobody knows.
    AsLargestRank,
    /// The items are too few to tell.
    Unclear,
    /// The reference itself has taken nothing off.
    NothingToRecover,
    /// There is nothing to hold it against.
    NoReference,
}

/// A metric of a run beside those of its base and its reference; of all of them less is better.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Of the base.
    pub base: f64,
    /// Of the reference.
    pub reference: Option<f64>,
    /// Of the run.
    pub run: f64,
    /// What the reference took off.
    pub reduction: Option<Interval>,
    /// The share of it that the run took off; none where the reference took off nothing.
    pub recovered: Option<f64>,
    /// How far the run falls short of the least share.
    pub shortfall: Option<Interval>,
    /// What it comes to.
    pub label: Label,
}

/// A metric of some of the items.
pub type Metric<'m> = &'m dyn Fn(&[usize]) -> Option<f64>;

/// Judges a run by a metric of `items` things; nothing where the base or the run has none. The run is flagged if it surely recovers less than the share `least` of the reference's reduction.
pub fn judge(
    bootstrap: &Bootstrap,
    items: usize,
    (base, reference, run): (Metric<'_>, Option<(Against, Metric<'_>)>, Metric<'_>),
    least: f64,
) -> Option<Verdict> {
    let all: Vec<usize> = (0..items).collect();
    let (of_base, of_run) = (base(&all)?, run(&all)?);
    let mut verdict = Verdict {
        base: of_base,
        reference: None,
        run: of_run,
        reduction: None,
        recovered: None,
        shortfall: None,
        label: Label::NoReference,
    };
    let Some((against, reference)) = reference else { return Some(verdict) };
    verdict.reference = reference(&all);
    verdict.reduction = bootstrap.interval(items, |drawn| Some(base(drawn)? - reference(drawn)?));
    let Some(reduction) = verdict.reduction else { return Some(verdict) };
    if reduction.low <= 0.0 {
        verdict.label = Label::NothingToRecover;
        return Some(verdict);
    }
    verdict.recovered = Some((of_base - of_run) / reduction.value);
    verdict.shortfall = bootstrap.interval(items, |drawn| {
        let base = base(drawn)?;
        Some(least * (base - reference(drawn)?) - (base - run(drawn)?))
    });
    verdict.label = match verdict.shortfall {
        None => Label::Unclear,
        Some(shortfall) if shortfall.low > 0.0 => Label::Flagged,
        Some(shortfall) if shortfall.high > 0.0 => Label::Unclear,
        Some(_) => match against {
            Against::Full => Label::Mitigated,
            Against::LargestRank => Label::AsLargestRank,
        },
    };
    Some(verdict)
}

#[cfg(test)]
mod tests {
    use attune_tensor::{Rng, linalg};
    use candle_core::{DType, Tensor};

    use super::*;

    const BOOTSTRAP: Bootstrap = Bootstrap { resamples: 400, level: 0.95, seed: 5 };

    fn mean(of: &[f64]) -> impl Fn(&[usize]) -> Option<f64> {
        move |items| Some(items.iter().map(|&item| of[item]).sum::<f64>() / items.len() as f64)
    }

    fn judged(base: &[f64], reference: Option<(Against, &[f64])>, run: &[f64]) -> Verdict {
        let (of_base, of_run) = (mean(base), mean(run));
        let of_reference = reference.map(|(against, of)| (against, mean(of)));
        let of_reference = of_reference.as_ref().map(|(against, of)| (*against, of as Metric<'_>));
        judge(&BOOTSTRAP, base.len(), (&of_base, of_reference, &of_run), 0.8).unwrap()
    }

    /// What is to be learnt is a change of rank 6. The best change of rank r is its r largest directions, by which a linear model goes
    /// as far as it can: with two it keeps most of the error of the base, with eight none.
    #[test]
    fn a_change_of_six_directions_is_missed_by_two_and_not_by_eight() {
        let (o, i, items) = (16, 20, 200);
        let mut rng = Rng::new(3, "planted");
        let mut normal = |rows: usize, cols: usize| rng.normal_tensor((rows, cols), 1.0, DType::F64).unwrap();
        let (left, _) = linalg::qr(&normal(o, 6)).unwrap();
        let (right, _) = linalg::qr(&normal(i, 6)).unwrap();
        let change_oi = left.matmul(&right.t().unwrap()).unwrap();
        let x_ti = normal(items, i);
        // Squared errors of a model whose change is this one, item by item.
        let errors = |change: &Tensor| {
            let off = x_ti.matmul(&(&change_oi - change).unwrap().t().unwrap()).unwrap();
            off.sqr().unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap()
        };
        let of_rank = |rank: usize| {
            let best = linalg::svd(&change_oi).unwrap().truncated(rank).unwrap();
            errors(&best.u.broadcast_mul(&best.s).unwrap().matmul(&best.v).unwrap())
        };
        let (base, full) = (errors(&change_oi.zeros_like().unwrap()), errors(&change_oi));
        let held = |rank| judged(&base, Some((Against::Full, &full)), &of_rank(rank));
        let two = held(2);
        assert_eq!(two.label, Label::Flagged, "{two:?}");
        assert!((two.recovered.unwrap() - 1.0 / 3.0).abs() < 0.1, "{two:?}");
        let eight = held(8);
        assert_eq!(eight.label, Label::Mitigated, "{eight:?}");
        assert!((eight.recovered.unwrap() - 1.0).abs() < 1e-9);
        // Held against a run with many directions, or nothing, it is never said to be mitigated.
        let largest = of_rank(12);
        assert_eq!(judged(&base, Some((Against::LargestRank, &largest)), &of_rank(8)).label, Label::AsLargestRank);
        assert_eq!(judged(&base, Some((Against::LargestRank, &largest)), &of_rank(2)).label, Label::Flagged);
        assert_eq!(judged(&base, None, &of_rank(8)).label, Label::NoReference);
    }

    #[test]
    fn identical_models_have_nothing_to_recover_and_no_flag() {
        let values: Vec<f64> = (0..50).map(|item| f64::from(item % 7)).collect();
        let verdict = judged(&values, Some((Against::Full, &values)), &values);
        assert_eq!((verdict.label, verdict.recovered), (Label::NothingToRecover, None));
        let reduction = verdict.reduction.unwrap();
        assert_eq!((reduction.value, reduction.low, reduction.high), (0.0, 0.0, 0.0));
    }

    /// One item in five says something, and a few of them say little; many of them say it.
    #[test]
    fn few_items_are_not_enough_to_tell() {
        let judged = |items: usize| {
            let of = |rare: f64| (0..items).map(|item| if item % 5 == 0 { rare } else { 0.0 }).collect::<Vec<f64>>();
            let noisy: Vec<f64> = (0..items).map(|item| if item % 10 == 0 { 0.6 } else { 0.0 }).collect();
            judged(&of(1.0), Some((Against::Full, &of(0.1))), &noisy)
        };
        assert_eq!(judged(10).label, Label::NothingToRecover);
        assert_eq!(judged(40).label, Label::Unclear);
        let many = judged(4000);
        assert!((many.recovered.unwrap() - 0.7 / 0.9).abs() < 1e-9);
    }
}
