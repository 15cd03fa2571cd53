//! Reports of one attempt: numbered, kept until the scheduler has them, few even when it is long away.

use std::collections::VecDeque;

use attune_proto::v1::{self, attempt_report::Report};

/// Most reports that are kept; beyond it notes and metrics are the first to go.
const REPORTS_MAX: usize = 4096;
/// Most reports that are sent and not acknowledged. Behind them progress and metrics become one report each: a scheduler that is
/// slow has less to store.
const WINDOW: usize = 64;
/// Most metric points of a report.
const POINTS_MAX: usize = 1000;

/// The reports of one attempt that are not acknowledged yet.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    last: u64,
    kept: VecDeque<(u64, Report)>,
    /// Reports up to this number were sent on the present connection.
    sent: u64,
    /// Reports up to this number were sent on some connection: what they say may be stored under their numbers.
    told: u64,
    dropped: u64,
}

impl Outbox {
    /// Takes a report.
    pub(crate) fn push(&mut self, mut report: Report) {
        if let Report::Metrics(metrics) = &mut report {
            metrics.dropped += std::mem::take(&mut self.dropped);
        }
        if self.merge(&mut report) {
            return;
        }
        if self.kept.len() >= REPORTS_MAX {
            self.thin();
        }
        self.last += 1;
        self.kept.push_back((self.last, report));
    }

    /// Puts progress and metrics into a report of their kind that nobody has seen, if only such follow it: newer progress takes
    /// the place of the older.
    fn merge(&mut self, report: &mut Report) -> bool {
        let unseen = self.kept.iter_mut().rev().take_while(|(number, _)| *number > self.told);
        for (_, kept) in unseen {
            match (kept, &mut *report) {
                (Report::Progress(old), Report::Progress(new)) => {
                    *old = std::mem::take(new);
                    return true;
                }
                (Report::Metrics(old), Report::Metrics(new)) if old.points.len() + new.points.len() <= POINTS_MAX => {
                    old.points.append(&mut new.points);
                    old.dropped += new.dropped;
                    return true;
                }
                (Report::Metrics(_), Report::Progress(_)) | (Report::Progress(_), Report::Metrics(_)) => {}
                _ => return false,
            }
        }
        false
    }

    /// Drops the oldest report that may be lost.
    fn thin(&mut self) {
        let at = self
            .kept
            .iter()
            .position(|(_, report)| matches!(report, Report::Metrics(_) | Report::Note(_) | Report::Progress(_)));
        if let Some((_, Report::Metrics(metrics))) = at.and_then(|at| self.kept.remove(at)) {
            self.dropped += metrics.dropped + metrics.points.len() as u64;
        }
    }

    /// The next reports that the present connection has not carried, which count as sent now; the rest follows what is
    /// acknowledged.
    pub(crate) fn take_unsent(&mut self, attempt: &v1::AttemptRef) -> Vec<v1::AttemptReport> {
        let unsent = self.kept.iter().take(WINDOW).filter(|(number, _)| *number > self.sent);
        let reports = unsent.map(|(number, report)| v1::AttemptReport {
            attempt: Some(attempt.clone()),
            sequence: *number,
            report: Some(report.clone()),
        });
        let reports: Vec<_> = reports.collect();
        self.sent = reports.last().map_or(self.sent, |report| report.sequence);
        self.told = self.told.max(self.sent);
        reports
    }

    /// A new connection has carried nothing.
    pub(crate) fn reconnected(&mut self) {
        self.sent = 0;
    }

    /// The scheduler has every report up to `number`.
    pub(crate) fn acknowledged(&mut self, number: u64) {
        while self.kept.front().is_some_and(|(kept, _)| *kept <= number) {
            self.kept.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(step: u64) -> Report {
        Report::Progress(v1::JobProgress { step, ..Default::default() })
    }

    fn numbers(outbox: &mut Outbox) -> Vec<u64> {
        outbox.take_unsent(&v1::AttemptRef::default()).iter().map(|report| report.sequence).collect()
    }

    #[test]
    fn reports_are_sent_again_on_a_new_connection_until_they_are_acknowledged() {
        let mut outbox = Outbox::default();
        outbox.push(Report::Started(v1::AttemptStarted::default()));
        outbox.push(progress(1));
        assert_eq!(numbers(&mut outbox), [1, 2]);
        assert_eq!(numbers(&mut outbox), [0; 0]);
        outbox.acknowledged(1);
        outbox.reconnected();
        outbox.push(Report::Running(v1::AttemptRunning::default()));
        assert_eq!(numbers(&mut outbox), [2, 3]);
        outbox.acknowledged(3);
        outbox.reconnected();
        assert_eq!(numbers(&mut outbox), [0; 0]);
    }

    #[test]
    fn progress_that_nobody_saw_is_replaced() {
        let mut outbox = Outbox::default();
        outbox.push(progress(1));
        outbox.push(progress(2));
        let sent = outbox.take_unsent(&v1::AttemptRef::default());
        assert_eq!((sent.len(), sent[0].report.clone()), (1, Some(progress(2))));
        outbox.push(progress(3));
        assert_eq!(numbers(&mut outbox), [2]);
        // What an earlier connection carried may be stored.
        outbox.reconnected();
        outbox.push(progress(4));
        assert_eq!(numbers(&mut outbox), [1, 2, 3]);
    }

    #[test]
    fn a_slow_scheduler_is_sent_less() {
        let mut outbox = Outbox::default();
        let metrics = |step| {
            let points = vec![v1::MetricPoint { step, ..Default::default() }];
            Report::Metrics(v1::AttemptMetrics { points, dropped: 0 })
        };
        for step in 0..WINDOW as u64 {
            outbox.push(Report::Note(v1::JobNote::default()));
            assert_eq!(numbers(&mut outbox), [step + 1]);
        }
        for step in 0..100 {
            outbox.push(metrics(step));
            outbox.push(progress(step));
        }
        assert_eq!(numbers(&mut outbox), [0; 0], "as many as may be on their way are");
        outbox.acknowledged(1);
        let [told] = &outbox.take_unsent(&v1::AttemptRef::default())[..] else { panic!("room for one") };
        let Some(Report::Metrics(told)) = &told.report else { panic!("{told:?}") };
        assert!(told.points.iter().map(|point| point.step).eq(0..100), "nothing is lost, and in order");
        outbox.push(metrics(100));
        outbox.push(Report::Note(v1::JobNote::default()));
        outbox.push(metrics(101));
        outbox.acknowledged(WINDOW as u64 + 1);
        let sent = outbox.take_unsent(&v1::AttemptRef::default());
        let kinds = sent.iter().map(|report| match report.report.as_ref().unwrap() {
            Report::Progress(told) => ("progress", told.step),
            Report::Metrics(told) => ("metrics", told.points[0].step),
            _ => ("note", 0),
        });
        let expected = [("progress", 99), ("metrics", 100), ("note", 0), ("metrics", 101)];
        assert!(
            kinds.clone().eq(expected),
            "what came after something else stays after it: {:?}",
            kinds.collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_long_silence_keeps_what_must_not_be_lost() {
        let mut outbox = Outbox::default();
        outbox.push(Report::Checkpoint(v1::CheckpointCommitted::default()));
        for _ in 0..REPORTS_MAX / 2 + 10 {
            let points = vec![v1::MetricPoint::default()];
            outbox.push(Report::Metrics(v1::AttemptMetrics { points, dropped: 0 }));
            outbox.push(Report::Note(v1::JobNote::default()));
        }
        assert_eq!(outbox.kept.len(), REPORTS_MAX);
        assert!(matches!(outbox.kept[0].1, Report::Checkpoint(_)));
        let dropped: u64 = outbox
            .kept
            .iter()
            .map(|(_, report)| match report {
                Report::Metrics(metrics) => metrics.dropped,
                _ => 0,
            })
            .sum();
        // The last one dropped is told by the next report.
        assert_eq!(dropped + outbox.dropped, 11);
    }
}
