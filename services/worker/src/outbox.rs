//! Reports of one attempt: numbered, kept until the scheduler has them, few even when it is long away.

use std::collections::VecDeque;

use attune_proto::v1::{self, attempt_report::Report};

/// Most reports that are kept; beyond it notes and metrics are the first to go.
const REPORTS_MAX: usize = 4096;

/// The reports of one attempt that are not acknowledged yet.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    last: u64,
    kept: VecDeque<(u64, Report)>,
    /// Reports up to this number were sent on the present connection.
    sent: u64,
    dropped: u64,
}

impl Outbox {
    /// Takes a report.
    pub(crate) fn push(&mut self, mut report: Report) {
        // Progress that nobody has seen is replaced by newer progress under its number.
        if let (Report::Progress(_), Some((number, Report::Progress(old)))) = (&report, self.kept.back_mut())
            && *number > self.sent
        {
            let Report::Progress(new) = report else { return };
            *old = new;
            return;
        }
        if let Report::Metrics(metrics) = &mut report {
            metrics.dropped += std::mem::take(&mut self.dropped);
        }
        if self.kept.len() >= REPORTS_MAX {
            self.thin();
        }
        self.last += 1;
        self.kept.push_back((self.last, report));
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

    /// The reports that the present connection has not carried, which counts as done now.
    pub(crate) fn take_unsent(&mut self, attempt: &v1::AttemptRef) -> Vec<v1::AttemptReport> {
        let unsent = self.kept.iter().filter(|(number, _)| *number > self.sent);
        let reports = unsent.map(|(number, report)| v1::AttemptReport {
            attempt: Some(attempt.clone()),
            sequence: *number,
            report: Some(report.clone()),
        });
        let reports = reports.collect();
        self.sent = self.last;
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
    }

    #[test]
    fn a_long_silence_keeps_what_must_not_be_lost() {
        let mut outbox = Outbox::default();
        outbox.push(Report::Checkpoint(v1::CheckpointCommitted::default()));
        for _ in 0..REPORTS_MAX + 10 {
            let points = vec![v1::MetricPoint::default()];
            outbox.push(Report::Metrics(v1::AttemptMetrics { points, dropped: 0 }));
        }
        let sent = outbox.take_unsent(&v1::AttemptRef::default());
        assert_eq!(sent.len(), REPORTS_MAX);
        assert!(matches!(sent[0].report, Some(Report::Checkpoint(_))));
        let dropped: u64 = sent
            .iter()
            .map(|report| match &report.report {
                Some(Report::Metrics(metrics)) => metrics.dropped,
                _ => 0,
            })
            .sum();
        // The last one dropped is told by the next report.
        assert_eq!(dropped + outbox.dropped, 11);
    }
}
