//! The walk over the blocks, forward and in reverse.

use std::ops::Range;

use attune_architecture::Experts;
use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::{Error, GradSink, Result, Tap};

use crate::base::Base;
use crate::block::{Block, Saved};
use crate::head::Head;
use crate::pass::arena::{Arena, Rows};
use crate::pass::parts::{Given, Part, PassCx, wanted};
use crate::pass::side::{Before, Carried};
use crate::pass::times::{Times, Work};
use crate::pass::{head, local};
use crate::routing::{Auxiliary, Routing};

/// What a forward pass keeps of each block beside its input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keep {
    /// What its reverse needs.
    #[default]
    All,
    /// Nothing: the reverse runs the block again first.
    Inputs,
}

/// What a block's forward pass is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Its output.
    Output,
    /// Its output, and what its reverse needs.
    OutputAndSaved,
    /// What its reverse needs; the output is not looked at.
    Saved,
}

impl Run {
    /// Whether anything is saved.
    pub const fn saves(self) -> bool {
        !matches!(self, Self::Output)
    }
}

/// What a pass is made of beside its parts.
pub(crate) struct Machine<'a> {
    pub(crate) base: &'a Base,
    pub(crate) trunk: &'a [Box<dyn Block>],
    pub(crate) head: &'a Head,
    /// A loss on routing, whose gradient is added to the objectives'.
    pub(crate) auxiliary: Option<&'a dyn Auxiliary>,
    pub(crate) arena: &'a Arena,
}

/// A part of a pass with its objective.
pub(crate) struct Task<'a> {
    pub(crate) part: Part<'a>,
    pub(crate) objective: &'a dyn Objective,
    /// Factor on its loss before the gradient is taken.
    pub(crate) scale: f64,
}

/// A block that the forward walk went through.
pub(crate) struct Passed {
    pub(crate) index: usize,
    pub(crate) input: Vec<Rows<f32>>,
    pub(crate) saved: Option<Saved>,
    /// What it gave, where components that carry rows made something else of it.
    pub(crate) before: Option<Before>,
    /// Where it sent its rows, if it is a mixture of experts.
    pub(crate) routed: Option<Routed>,
}

/// The forward walk: gives the rows above the last block. `step` runs a block, by its index, and `passed` gets what is left
/// of it.
pub(crate) fn up(
    trunk: &[Box<dyn Block>],
    cx: &PassCx<'_>,
    mut step: impl FnMut(usize, &dyn Block, &[Rows<f32>]) -> Result<(Vec<Rows<f32>>, Option<Saved>)>,
    mut passed: impl FnMut(Passed) -> Result<()>,
) -> Result<Rows<f32>> {
    let (mut x, mut carried) = (Vec::new(), Carried::new());
    for (index, block) in trunk.iter().enumerate() {
        let (mut y, saved) = step(index, &**block, &x)?;
        cx.check()?;
        let routed = block.routes().map(|layer| Routed { layer, probs_te: y.pop() });
        let before = match y.first_mut() {
            Some(h_td) => cx.carry(block.sites(), h_td, &mut carried)?,
            None => None,
        };
        passed(Passed { index, input: std::mem::replace(&mut x, y), saved, before, routed })?;
    }
    cx.finish()?;
    x.into_iter().next().ok_or_else(|| Error::Refused("a model without blocks has no rows".to_owned()))
}

/// The losses of the parts, without gradients, and where the time went.
pub(crate) fn score(machine: &Machine<'_>, tasks: &[Task<'_>]) -> Result<(Vec<LossReport>, Times)> {
    let parts: Vec<Part<'_>> = tasks.iter().map(|task| task.part).collect();
    let cx = PassCx::over(machine, &parts)?;
    let h_td = up(machine.trunk, &cx, |_, block, x| block.forward(x, &cx, Run::Output), |_| Ok(()))?;
    let reports = head::losses(machine.head, &h_td, tasks, &cx, None)?;
    cx.finish()?;
    Ok((reports, cx.meter.times()))
}

/// Shows a tap what the linears below the head read, and goes no higher than the last block that it wants to see; with where the
/// time went.
pub(crate) fn look(machine: &Machine<'_>, parts: &[Part<'_>], tap: &dyn Tap) -> Result<Times> {
    let mut cx = PassCx::over(machine, parts)?;
    cx.tap = Some(tap);
    let is_wanted = |block: &dyn Block| block.sites().iter().any(|site| tap.wants(&site.id));
    let Some(last) = machine.trunk.iter().rposition(|block| is_wanted(&**block)) else { return Ok(Times::default()) };
    up(&machine.trunk[..=last], &cx, |_, block, x| block.forward(x, &cx, Run::Output), |_| Ok(()))?;
    Ok(cx.meter.times())
}

/// The gradients of `scale × (sum of losses)` of each part into its sink, the losses, and where the time went.
pub(crate) fn grads(
    machine: &Machine<'_>,
    tasks: &[Task<'_>],
    keep: Keep,
    sinks: &mut [&mut dyn GradSink],
) -> Result<(Vec<LossReport>, Times)> {
    let parts: Vec<Part<'_>> = tasks.iter().map(|task| task.part).collect();
    let scales: Vec<f64> = tasks.iter().map(|task| task.scale).collect();
    reverse(machine, &parts, &scales, keep, sinks, |h_td, cx, backward| {
        head::losses(machine.head, h_td, tasks, cx, Some(backward))
    })
}

/// A forward walk, `top` on its rows (it adds their gradient to [`head::Backward::dh_td`], where there is one), and the reverse
/// walk; with where the time went. A loss on routing counts by the `scales` of the parts.
pub(crate) fn reverse<T>(
    machine: &Machine<'_>,
    parts: &[Part<'_>],
    scales: &[f64],
    keep: Keep,
    sinks: &mut [&mut dyn GradSink],
    top: impl FnOnce(&Rows<f32>, &PassCx<'_>, head::Backward<'_, '_>) -> Result<T>,
) -> Result<(T, Times)> {
    let mut cx = PassCx::over(machine, parts)?;
    cx.beside = scales.iter().zip(parts).map(|(scale, part)| scale * part.layout.counts().tokens as f64).collect();
    let cx = cx;
    let mut lowest = machine.trunk.len();
    for (index, block) in machine.trunk.iter().enumerate() {
        for (part, sink) in parts.iter().zip(sinks.iter()) {
            if lowest == machine.trunk.len() && !wanted(machine.base, part, block.sites(), &**sink).is_empty() {
                lowest = index;
            }
        }
    }
    // The blocks from the lowest on.
    let mut kept: Vec<Passed> = Vec::new();
    let mut routing = Vec::new();
    let step = |index, block: &dyn Block, x: &[Rows<f32>]| {
        let run = if index >= lowest && keep == Keep::All { Run::OutputAndSaved } else { Run::Output };
        block.forward(x, &cx, run)
    };
    let h_td = up(machine.trunk, &cx, step, |mut passed| {
        routing.extend(passed.routed.take());
        if passed.index >= lowest {
            if let (Keep::Inputs, Some(before)) = (keep, &mut passed.before) {
                before.h_td = None;
            }
            kept.push(passed);
        }
        Ok(())
    })?;
    let mut dh_td = (lowest < machine.trunk.len()).then(|| cx.arena.zeros(cx.n_rows(), cx.architecture().hidden));
    let backward = head::Backward { dh_td: dh_td.as_mut(), sinks: &mut *sinks };
    let found = top(&h_td, &cx, backward)?;
    cx.check()?;
    drop(h_td);
    let mut dprobs = dprobs(machine, &routing, scales, &cx)?;
    drop(routing);
    let (mut dy, mut dcarried): (Vec<Rows<f32>>, _) = (dh_td.into_iter().collect(), Carried::new());
    for (index, block) in machine.trunk.iter().enumerate().skip(lowest).rev() {
        let Some(Passed { input: x, saved, before, .. }) = kept.pop() else { break };
        // What it gave is needed where components made something else of it.
        let run = if before.is_some() { Run::OutputAndSaved } else { Run::Saved };
        let (mut y, saved) = match saved {
            None if keep == Keep::Inputs => block.forward(&x, &cx, run)?,
            saved => (Vec::new(), saved),
        };
        if let (Some(before), Some(dh_td)) = (before, dy.first_mut()) {
            let gone = || Error::Refused("a block was not run again".to_owned());
            let given = before.or(|| if y.is_empty() { Err(gone()) } else { Ok(y.swap_remove(0)) })?;
            cx.carry_vjp(block.sites(), given, dh_td, &mut dcarried, sinks)?;
        }
        // Routings come in the order of layers, so the last one left is this block's.
        dy.extend(block.routes().and_then(|_| dprobs.pop()));
        dy = block.vjp(&x, saved, dy, index > lowest, &cx, sinks)?;
        cx.check()?;
    }
    if cx.kernels.works_ahead() {
        cx.meter.time(Work::Device, || cx.settle_late(sinks).and_then(|()| cx.finish()))?;
    }
    Ok((found, cx.meter.times()))
}

/// The probabilities that a layer of experts gave to each row.
pub(crate) struct Routed {
    layer: u32,
    probs_te: Option<Rows<f32>>,
}

impl Routed {
    /// That of the rows of one part.
    pub(crate) fn of(&self, rows: &Range<usize>, experts: Experts) -> Option<Result<Routing>> {
        let probs = self.probs_te.as_ref()?.view().sub_rows(rows.start, rows.end);
        let (layer, per_token) = (self.layer, experts.per_token);
        Some(local::tensor(probs.into()).map(|probs_te| Routing { layer, probs_te, per_token }))
    }
}

/// The gradient of the auxiliary loss by each layer's probabilities, in the order of layers: each part's own loss, on its own
/// rows. Empty without such a loss.
fn dprobs(machine: &Machine<'_>, routing: &[Routed], scales: &[f64], cx: &PassCx<'_>) -> Result<Vec<Rows<f32>>> {
    let (Some(auxiliary), Some(experts)) = (machine.auxiliary, cx.architecture().experts) else {
        return Ok(Vec::new());
    };
    let whole = |routed: &Routed| routed.probs_te.as_ref().map(|probs| cx.arena.zeros(probs.n_rows(), probs.n_cols()));
    let mut dprobs: Vec<Rows<f32>> = routing.iter().filter_map(whole).collect();
    for (part, rows) in cx.parts_of(Given::All) {
        let of_part: Vec<Routing> =
            routing.iter().filter_map(|routed| routed.of(&rows, experts)).collect::<Result<_>>()?;
        let loss = auxiliary.loss(&of_part, cx.parts[part].layout)?;
        for (dprobs, of_part) in dprobs.iter_mut().zip(&loss.dprobs) {
            let scaled = (of_part * scales[part])?;
            local::write(&scaled, dprobs.view_mut().into_sub_rows(rows.start, rows.end), false)?;
        }
    }
    Ok(dprobs)
}
