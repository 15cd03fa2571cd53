//! What is told of a run on its way: of its steps, and of ranks that wait for each other.

use std::time::Duration;

use attune_points::engine::StepReport;

use crate::agreement::Waits;
use crate::kernel;
use crate::protocol::{Event, Metric};
use crate::run::Rank;

impl Rank<'_> {
    /// Model FLOP utilisation: the share of the fastest product of this machine that the operations which a model needs reach.
    /// All ranks of this process compute here, side by side; what is computed again to save memory counts for nothing.
    pub(super) fn utilisation(&self, flops: f64, took: Duration) -> f64 {
        flops * f64::from(self.request.ranks) / took.as_secs_f64().max(1e-9) / self.gemm_peak()
    }

    pub(super) fn gemm_peak(&self) -> f64 {
        let base = self.engine.shared.model.base();
        kernel::gemm_peak(base.arena().kernels(), base.activations())
    }

    pub(super) fn report(&self, report: &StepReport, lr: f64, took: Duration) {
        let (step, total_steps) = (self.engine.step, self.prepared.shared.total_steps);
        let tokens_per_second = report.n_rows as f64 / took.as_secs_f64().max(1e-9);
        let mean_seconds = self.speed.1.as_secs_f64() / (self.speed.0.max(1) as f64) * report.n_rows as f64;
        let eta_seconds = mean_seconds * (total_steps.0 - step.0) as f64;
        let metric = |name: String, value: f64| Metric { name, value };
        let denominator = self.engine.shared.objective.denominator();
        let mut metrics = vec![
            metric("train/loss".to_owned(), report.loss.loss_sum / denominator.of(report.loss.counts)),
            metric("train/tokens_per_second".to_owned(), tokens_per_second),
            metric("train/mfu".to_owned(), self.utilisation(self.engine.spent.flops, took)),
        ];
        if self.rule.takes_gradients() {
            metrics.push(metric("train/grad_norm".to_owned(), report.grad_norm));
            metrics.push(metric("train/lr".to_owned(), lr));
        }
        for (name, sum) in &report.loss.beside {
            metrics.push(metric(format!("train/{name}"), sum / denominator.of(report.loss.counts)));
        }
        let rules = self.prepared.shared.judge.iter().flat_map(|judge| self.engine.judged.metrics(&judge.rules));
        metrics.extend(rules.chain(report.metrics.iter().cloned()).map(|(name, value)| metric(name, value)));
        for (domain, (loss, counts)) in self.prepared.domains.iter().zip(&report.loss.by_domain) {
            if counts.tokens > 0 {
                metrics.push(metric(format!("data/{}/loss", domain.name), loss / denominator.of(*counts)));
            }
        }
        for (domain, tokens) in self.prepared.domains.iter().zip(&self.engine.loader.counters().tokens) {
            metrics.push(metric(format!("data/{}/tokens", domain.name), *tokens as f64));
        }
        for (work, time) in self.engine.spent.shares(took) {
            metrics.push(metric(format!("time/{work}"), time.as_secs_f64()));
        }
        self.emit(Event::Metrics { step, tokens: self.tokens, metrics });
        self.emit(Event::Progress { step, total_steps, tokens: self.tokens, tokens_per_second, eta_seconds });
    }

    /// Tells how long the ranks of several processes wait for each other, and of one that holds up the others: once when it
    /// begins to and once when it is over.
    pub(super) fn tell_waits(&mut self, waits: &Waits) {
        if !self.leads() || waits.of.is_empty() {
            return;
        }
        let per_step = |wait: Duration| wait.as_secs_f64() / waits.steps.max(1) as f64;
        let metric = |(rank, wait)| Metric { name: format!("time/waiting_for_rank_{rank}"), value: per_step(wait) };
        let metrics = (0..).zip(waits.for_each()).map(metric).collect::<Vec<_>>();
        self.emit(Event::Metrics { step: self.engine.step, tokens: self.tokens, metrics });
        let now = waits.straggler().map(|straggler| straggler.rank);
        let before = std::mem::replace(&mut self.straggler, now);
        let message = match (before, now) {
            (before, Some(rank)) if before != now => format!(
                "rank {rank} holds up the others: in the last {} steps, which took {:.1} s, {}",
                waits.steps,
                waits.took.as_secs_f64(),
                waits.words(rank)
            ),
            (Some(rank), None) => format!("rank {rank} no longer holds up the others"),
            _ => return,
        };
        self.emit(Event::Note { topic: "straggler".to_owned(), message });
    }
}
