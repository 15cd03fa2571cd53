//! How soon a run was nearly as good as it ever was, from the losses that it logged on the way.

use std::fmt::Write as _;

use super::record::Record;

/// The share of its own way from the first loss to the best at which a run is nearly as good.
pub(crate) const NEARLY: f64 = 0.95;

/// How far a run came, and how soon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reached {
    /// The loss before the first step.
    pub(crate) first: f64,
    /// The smallest loss, at whichever step.
    pub(crate) best: f64,
    /// The first logged step that is nearly as good.
    pub(crate) steps: u64,
}

impl Reached {
    /// How much better the best is than the first.
    pub(crate) fn gain(&self) -> f64 {
        self.first - self.best
    }
}

/// Of logged losses, each with its step, in their order; nothing of fewer than two. One that is never better than before the first step
/// is nearly as good as ever at once.
pub(crate) fn reached(curve: &[(u64, f64)]) -> Option<Reached> {
    let &[(_, first), _, ..] = curve else { return None };
    let losses = curve.iter().map(|(_, loss)| *loss).filter(|loss| loss.is_finite());
    let best = losses.fold(first, f64::min);
    let enough = first - NEARLY * (first - best);
    let (steps, _) = curve.iter().find(|(_, loss)| *loss <= enough)?;
    Some(Reached { first, best, steps: *steps })
}

/// The seconds of training until a step of a run: those of its share of all steps, which take as long as one another; measuring the
/// loss is none of them.
pub(crate) fn seconds(record: &Record, steps: u64) -> f64 {
    let all = record.tokens as f64 / record.tokens_per_second.max(f64::MIN_POSITIVE);
    all * steps as f64 / record.steps.max(1) as f64
}

/// The curves of all records, a line for each loss.
pub(crate) fn csv(records: &[&Record]) -> String {
    let mut text = "job,place,set,step,loss\n".to_owned();
    for record in records {
        let place: Vec<String> = record.place.iter().map(|(axis, value)| format!("{axis}={value}")).collect();
        let place = place.join(" ").replace('"', "'");
        for (set, curve) in &record.curves {
            for (step, loss) in curve {
                let _ = writeln!(text, "{},\"{place}\",{set},{step},{loss}", record.job);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::record::of;
    use super::*;

    #[test]
    fn a_run_is_nearly_as_good_at_the_first_loss_that_is_and_not_at_its_end() {
        // From 5 to 3: nearly is 3.1, which step 20 is the first to reach; the end is worse again.
        let curve = [(0, 5.0), (10, 3.2), (20, 3.05), (30, 3.0), (40, 3.6)];
        let found = reached(&curve).unwrap();
        assert_eq!((found.best, found.steps, found.gain()), (3.0, 20, 2.0));
        let mut record = of(&[], 1, &[]);
        // A thousand tokens at 500 a second, in ten steps.
        record.steps = 10;
        assert_eq!(seconds(&record, 5), 1.0);
    }

    #[test]
    fn what_is_never_better_is_as_good_at_once_and_what_is_no_number_is_passed_over() {
        assert_eq!(reached(&[(0, 2.0), (5, 2.5)]).unwrap(), Reached { first: 2.0, best: 2.0, steps: 0 });
        assert_eq!(reached(&[(0, 2.0), (5, f64::NAN), (10, 1.0)]).unwrap().steps, 10);
        assert_eq!(reached(&[(0, 2.0)]), None);
    }

    #[test]
    fn curves_are_written_a_line_for_each_loss() {
        let mut record = of(&[("method", "lora"), ("rows", "100")], 1, &[]);
        record.curves.insert("a".to_owned(), vec![(0, 2.5), (4, 2.0)]);
        assert_eq!(
            csv(&[&record]),
            "job,place,set,step,loss\nj-1,\"method=lora rows=100\",a,0,2.5\nj-1,\"method=lora rows=100\",a,4,2\n"
        );
    }
}
