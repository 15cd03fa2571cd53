//! A model: the base, the components at its sites, its losses and their gradients.

use std::sync::Arc;

use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::{Error, GradSink, Layout, Result, Tap, Theta};
use candle_core::DType;

use crate::base::Base;
use crate::block::{Block, trunk};
use crate::dropout::Dropout;
use crate::head::Head;
use crate::loss::losses;
use crate::pass::parts::Part;
use crate::pass::walk::{self, Keep, Machine, Task};
use crate::pass::{Arena, Times};
use crate::routing::Auxiliary;
use crate::stack::Stack;

/// What a pass runs on.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The parameters beyond the base.
    pub theta: &'a Theta,
    /// The batch.
    pub layout: &'a Layout,
    /// The key of dropout; `None` in evaluation.
    pub dropout: Option<Dropout>,
}

/// How a model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// On views of rows, with hand-written gradients: [`crate::pass`].
    Views,
    /// By the graphs of its blocks, in this type.
    Graphs(DType),
}

/// A base and the components at its sites.
pub struct Model {
    pub(crate) base: Arc<Base>,
    pub(crate) stack: Stack,
    pub(crate) trunk: Vec<Box<dyn Block>>,
    pub(crate) head: Head,
    pub(crate) auxiliary: Option<Arc<dyn Auxiliary>>,
    pub(crate) how: How,
}

impl Model {
    /// A model that computes with the engine's kernels, in the precision of its base. Several models may have one base.
    pub fn new(base: impl Into<Arc<Base>>, stack: Stack) -> Self {
        let base = base.into();
        let (trunk, head) = (trunk(base.architecture()), Head::new(base.architecture()));
        Self { base, stack, trunk, head, auxiliary: None, how: How::Views }
    }

    /// The same model computing by its blocks' graphs, which define it, in 64 bits: what tests hold the engine to. The
    /// tensors of a pass's `Theta` must be f64 as well.
    #[must_use]
    pub fn in_f64(self) -> Self {
        Self { how: How::Graphs(DType::F64), ..self }
    }

    /// The same model computing by its blocks' graphs in 32 bits.
    #[must_use]
    pub fn by_graphs(self) -> Self {
        Self { how: How::Graphs(DType::F32), ..self }
    }

    /// The type of its graphs.
    pub(crate) fn dtype(&self) -> DType {
        match self.how {
            How::Views => DType::F32,
            How::Graphs(dtype) => dtype,
        }
    }

    pub(crate) fn machine(&self) -> Machine<'_> {
        self.machine_on(self.base.arena())
    }

    fn machine_on<'a>(&'a self, arena: &'a Arena) -> Machine<'a> {
        let auxiliary = self.auxiliary.as_deref();
        Machine { base: &self.base, trunk: &self.trunk, head: &self.head, auxiliary, arena }
    }

    fn task<'a>(&'a self, pass: &Pass<'a>, objective: &'a dyn Objective, scale: f64) -> Task<'a> {
        Task { part: self.part(pass), objective, scale }
    }

    /// A part of a pass on views.
    pub(crate) fn part<'a>(&'a self, pass: &Pass<'a>) -> Part<'a> {
        let Pass { theta, layout, dropout } = *pass;
        Part { stack: &self.stack, theta, layout, dropout }
    }

    /// The losses of several parts in one pass, without gradients.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn score_parts(&self, passes: &[Pass<'_>], objective: &dyn Objective) -> Result<(Vec<LossReport>, Times)> {
        if let How::Graphs(_) = self.how {
            let reports = passes.iter().map(|pass| self.score(pass, objective)).collect::<Result<_>>()?;
            return Ok((reports, Times::default()));
        }
        let tasks: Vec<Task<'_>> = passes.iter().map(|pass| self.task(pass, objective, 1.0)).collect();
        walk::score(&self.machine(), &tasks)
    }

    /// Shows a tap what the linears below the head read, in one pass over several parts that goes no higher than it has to. What is
    /// seen of a part has the same bits in any company.
    ///
    /// # Errors
    /// Whatever the pass or the tap raises; a model that computes by its graphs shows nothing.
    pub fn look(&self, passes: &[Pass<'_>], tap: &dyn Tap) -> Result<Times> {
        if let How::Graphs(_) = self.how {
            return Err(Error::Refused("a model that computes by its graphs shows no inputs of linears".to_owned()));
        }
        let parts: Vec<Part<'_>> = passes.iter().map(|pass| self.part(pass)).collect();
        walk::look(&self.machine(), &parts, tap)
    }

    /// The gradients of `scale × (sum of losses)` of several parts in one pass, each into its own sink, as if each were
    /// alone; with their losses, and where the time went.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn grad_parts(
        &self,
        passes: &[Pass<'_>],
        objective: &dyn Objective,
        scale: f64,
        keep: Keep,
        sinks: &mut [&mut dyn GradSink],
    ) -> Result<(Vec<LossReport>, Times)> {
        if let How::Graphs(_) = self.how {
            let each = passes.iter().zip(sinks);
            let reports =
                each.map(|(pass, sink)| self.grad(pass, objective, scale, &mut **sink)).collect::<Result<_>>()?;
            return Ok((reports, Times::default()));
        }
        let tasks: Vec<Task<'_>> = passes.iter().map(|pass| self.task(pass, objective, scale)).collect();
        walk::grads(&self.machine(), &tasks, keep, sinks)
    }

    /// The same model with a loss on its routing, whose gradient every [`Model::grad`] adds to the objective's. Reports hold
    /// the objective's loss alone; [`Model::routing`] gives what the auxiliary one was computed from.
    #[must_use]
    pub fn with_auxiliary(mut self, auxiliary: Arc<dyn Auxiliary>) -> Self {
        self.auxiliary = Some(auxiliary);
        self
    }

    /// The frozen base.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The buffers that its passes use again.
    pub fn arena(&self) -> &Arena {
        self.base.arena()
    }

    /// The components.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// The loss of a batch, without gradients.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn score(&self, pass: &Pass<'_>, objective: &dyn Objective) -> Result<LossReport> {
        if self.how == How::Views {
            let (mut reports, _) = walk::score(&self.machine(), &[self.task(pass, objective, 1.0)])?;
            return Ok(reports.pop().unwrap_or_default());
        }
        self.by_graph(pass, |cx| Ok(losses(&self.head, &self.walk(cx, None, None)?[0], objective, cx, None)?.report))
    }

    /// The gradient of `scale × (sum of losses)` into `sink`, tensor by tensor, and the loss.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn grad(
        &self,
        pass: &Pass<'_>,
        objective: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport> {
        if self.how == How::Views {
            let task = self.task(pass, objective, scale);
            let (mut reports, _) = walk::grads(&self.machine(), &[task], Keep::All, &mut [sink])?;
            return Ok(reports.pop().unwrap_or_default());
        }
        self.backward(pass, scale, sink, |cx, h_td, backward| {
            let losses = losses(&self.head, h_td, objective, cx, Some(backward))?;
            Ok((losses.report, losses.dh_td))
        })
    }
}

/// A model's parts of a pass over several models.
#[derive(Clone, Copy)]
pub struct Together<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its parts.
    pub passes: &'a [Pass<'a>],
    /// The loss of its parts.
    pub objective: &'a dyn Objective,
    /// Factor on the loss before gradients are taken.
    pub scale: f64,
    /// What the pass runs on, if not on the buffers and kernels of the base.
    pub arena: Option<&'a Arena>,
}

impl<'a> Together<'a> {
    fn machine(&self) -> Machine<'a> {
        self.model.machine_on(self.arena.unwrap_or_else(|| self.model.base.arena()))
    }
}

/// The gradients of `scale × (sum of losses)` of the parts of several models, each into its own sink as if it were alone, with
/// their losses and where the time went; sinks and losses in the order of models and their parts. Models over one [`Base`] go
/// through it in one pass.
///
/// # Errors
/// Whatever the pass raises.
pub fn grad_together(
    models: &[Together<'_>],
    keep: Keep,
    sinks: &mut [&mut dyn GradSink],
) -> Result<(Vec<LossReport>, Times)> {
    if let Some(machine) = one_machine(models) {
        return walk::grads(&machine, &tasks(models), keep, sinks);
    }
    let (mut reports, mut times, mut rest) = (Vec::new(), Times::default(), sinks);
    for one in models {
        let (own, others) = rest.split_at_mut(one.passes.len());
        let (of_one, took) = match one.model.how {
            How::Views => walk::grads(&one.machine(), &tasks(&[*one]), keep, own)?,
            How::Graphs(_) => one.model.grad_parts(one.passes, one.objective, one.scale, keep, own)?,
        };
        reports.extend(of_one);
        times += took;
        rest = others;
    }
    Ok((reports, times))
}

/// The losses of the parts of several models, in their order, and where the time went.
///
/// # Errors
/// Whatever the pass raises.
pub fn score_together(models: &[Together<'_>]) -> Result<(Vec<LossReport>, Times)> {
    if let Some(machine) = one_machine(models) {
        return walk::score(&machine, &tasks(models));
    }
    let (mut reports, mut times) = (Vec::new(), Times::default());
    for one in models {
        let (of_one, took) = match one.model.how {
            How::Views => walk::score(&one.machine(), &tasks(&[*one]))?,
            How::Graphs(_) => one.model.score_parts(one.passes, one.objective)?,
        };
        reports.extend(of_one);
        times += took;
    }
    Ok((reports, times))
}

/// What a pass over all of these runs on, if they have it in common.
fn one_machine<'a>(models: &[Together<'a>]) -> Option<Machine<'a>> {
    let first = models.first()?;
    let is_alike = |one: &Together<'_>| {
        Arc::ptr_eq(&one.model.base, &first.model.base)
            && one.arena.map(std::ptr::from_ref) == first.arena.map(std::ptr::from_ref)
            && one.model.how == How::Views
            && one.model.auxiliary.is_none()
    };
    models.iter().all(is_alike).then(|| first.machine())
}

fn tasks<'a>(models: &[Together<'a>]) -> Vec<Task<'a>> {
    let of_one = |one: &Together<'a>| {
        let Together { model, passes, objective, scale, .. } = *one;
        passes.iter().map(move |pass| model.task(pass, objective, scale))
    };
    models.iter().flat_map(of_one).collect()
}
