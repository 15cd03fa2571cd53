//! Losses at parameters that an engine is given, without gradients: of the micro-batches of all ranks, the same on each of them.

use std::sync::Arc;

use attune_models::Pass;
use attune_points::engine::{Engine as _, LossReport};
use attune_points::layout::REFERENCE;
use attune_points::objective::{Level, Objective};
use attune_points::{Error, Layout, Result, Tap, Theta};

use crate::engine::{Message, RankEngine, Wishes, groups};
use crate::together::{self, Asked, Company};

impl RankEngine<'_> {
    /// The losses of the micro-batches of all ranks, of which `parts` are this rank's, at each of `at`. Like a sum of gradients it tells
    /// whether a rank was asked to stop.
    pub(crate) fn scored(
        &mut self,
        at: &[Theta],
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
    ) -> Result<Vec<LossReport>> {
        let mut sums = vec![LossReport::default(); at.len()];
        // What the objective needs of a model without what trains is the same at all of them.
        let parts = match at.first().filter(|_| of.needs().reference) {
            Some(theta) => self.with_logp(REFERENCE, &theta.untrained(), parts)?,
            None => parts.to_vec(),
        };
        // A step's loss is one of all micro-batches: every rank finds the same by itself.
        let by_step = of.level() == Level::Step;
        let mut found: Vec<Vec<LossReport>> = vec![Vec::new(); parts.len()];
        if by_step {
            for (theta, sum) in at.iter().zip(&mut sums) {
                *sum = self.scope(theta, &parts, None, of)?.1;
            }
        } else {
            // A pass of its own: lanes beside it need not wait.
            self.company.inspect(Company::leave);
            let made = self.side_by_side(at, &parts, of);
            self.company.inspect(Company::enter);
            found = made?;
        }
        let wishes = self.wishes;
        let message = |((part, _), reports): (&(u32, Arc<Layout>), _)| (*part, Message::Reports { reports, wishes });
        let mut messages: Vec<(u32, Message)> = parts.iter().zip(found).map(message).collect();
        if messages.is_empty() {
            // A rank without data still tells whether it was asked to stop, under a number that no part has.
            messages.push((u32::MAX - self.collective.rank(), Message::Reports { reports: Vec::new(), wishes }));
        }
        self.agreed = Wishes::default();
        for (_, message) in self.exchange(messages)? {
            let Message::Reports { reports, wishes } = message else {
                return Err(Error::Refused("a rank sent something else where losses were due".to_owned()));
            };
            sums.iter_mut().zip(&reports).for_each(|(sum, report)| sum.add(report));
            self.agreed |= wishes;
        }
        Ok(sums)
    }

    /// The losses of each micro-batch at each of `at`: as many go through the model together as a pass takes.
    fn side_by_side(
        &mut self,
        at: &[Theta],
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
    ) -> Result<Vec<Vec<LossReport>>> {
        let of_theta = |theta: u32| parts.iter().map(move |(_, layout)| (theta, Arc::clone(layout)));
        let all: Vec<(u32, Arc<Layout>)> = (0..at.len() as u32).flat_map(of_theta).collect();
        let mut reports = Vec::with_capacity(all.len());
        let model = &self.shared.model;
        for group in groups(&all, self.rows_per_pass) {
            self.spent.flops += group.iter().map(|(_, layout)| model.forward_flops(layout)).sum::<f64>();
            let asked = group.chunk_by(|(a, _), (b, _)| a == b).map(|of_theta| Asked {
                model,
                objective: of,
                theta: &at[of_theta[0].0 as usize],
                layouts: of_theta.iter().map(|(_, layout)| &**layout).collect(),
                dropout: None,
                wanted: None,
                purpose: self.purpose,
            });
            let found = together::pass(&asked.collect::<Vec<_>>())?;
            // All of them were in one pass, which took its time once.
            self.spent.passes += found.first().map(|(_, times)| *times).unwrap_or_default();
            reports.extend(found.into_iter().flat_map(|(each, _)| each).map(|(_, report)| report));
        }
        let of_part = |part: usize| reports.iter().skip(part).step_by(parts.len()).cloned().collect();
        Ok((0..parts.len()).map(of_part).collect())
    }

    /// Shows a tap what a model at `at` makes of a micro-batch of this rank.
    pub(crate) fn shown(&mut self, at: &Theta, on: &Layout, tap: &dyn Tap) -> Result<()> {
        self.company.inspect(Company::leave);
        let times = self.shared.model.look(&[Pass { theta: at, layout: on, dropout: None }], tap);
        self.company.inspect(Company::enter);
        self.spent.passes += times?;
        Ok(())
    }
}
