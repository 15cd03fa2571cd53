//! A model: the base, the components at its sites, and the walks over its blocks.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_architecture::{HeadKind, Pooling, Site};
use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::{Error, GradSink, Layout, Owner, Result, TensorId, Theta};
use attune_tensor::autograd;
use candle_core::{DType, Device, Tensor, Var};

use crate::attention::RowPlan;
use crate::base::Base;
use crate::block::{Block, BlockCache, trunk};
use crate::context::{GraphCx, Tracked};
use crate::dropout::Dropout;
use crate::head::{self, Head};
use crate::loss::{Backward, losses};
use crate::pass::parts::{self, Part};
use crate::pass::walk::{self, Keep, Machine, Task};
use crate::pass::{Arena, Times};
use crate::regions;
use crate::routing::{Auxiliary, Routing};
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
enum How {
    /// On views of rows, with hand-written gradients: [`crate::pass`].
    Views,
    /// By the graphs of its blocks, in this type.
    Graphs(DType),
}

/// A base and the components at its sites.
pub struct Model {
    base: Arc<Base>,
    stack: Stack,
    trunk: Vec<Box<dyn Block>>,
    head: Head,
    auxiliary: Option<Arc<dyn Auxiliary>>,
    how: How,
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
    fn dtype(&self) -> DType {
        match self.how {
            How::Views => DType::F32,
            How::Graphs(dtype) => dtype,
        }
    }

    fn machine(&self) -> Machine<'_> {
        let auxiliary = self.auxiliary.as_deref();
        Machine { base: &self.base, trunk: &self.trunk, head: &self.head, auxiliary, arena: self.base.arena() }
    }

    fn task<'a>(&'a self, pass: &Pass<'a>, objective: &'a dyn Objective, scale: f64) -> Task<'a> {
        let Pass { theta, layout, dropout } = *pass;
        Task { part: Part { stack: &self.stack, theta, layout, dropout }, objective, scale }
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

    /// A forward walk, `top` on the hidden rows (it gives their gradient where [`Backward::below`] asks for it), and the
    /// reverse walk.
    fn backward<T>(
        &self,
        pass: &Pass<'_>,
        scale: f64,
        sink: &mut dyn GradSink,
        top: impl FnOnce(&GraphCx<'_>, &Tensor, Backward<'_>) -> Result<(T, Option<Tensor>)>,
    ) -> Result<T> {
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype())?;
        let none = Tracked::new();
        let cx = self.context(pass, &plan, &none);
        let wanted: Vec<Vec<TensorId>> =
            self.trunk.iter().map(|block| self.wanted(block.sites(), pass.theta, sink)).collect();
        let lowest = wanted.iter().position(|ids| !ids.is_empty());
        let mut saved = Saved { from: lowest.unwrap_or(self.trunk.len()), inputs: BTreeMap::new() };
        let mut routing = Vec::new();
        let collected = self.auxiliary.is_some().then_some(&mut routing);
        let h = self.walk(&cx, Some(&mut saved), collected)?;

        let (leaves, tracked) =
            self.leaves(&self.wanted(&self.head.sites, pass.theta, sink), pass.theta, pass.layout.n_rows())?;
        let backward =
            Backward { scale, leaves: &leaves, tracked: &tracked, sink: &mut *sink, below: lowest.is_some() };
        let (found, dh_td) = top(&cx, &h[0], backward)?;
        let (Some(lowest), Some(dh_td)) = (lowest, dh_td) else { return Ok(found) };

        let mut dprobs = match &self.auxiliary {
            Some(auxiliary) => auxiliary.loss(&routing, pass.layout)?.dprobs,
            None => Vec::new(),
        };
        let mut dy = vec![dh_td];
        for index in (lowest..self.trunk.len()).rev() {
            let input = saved.inputs.remove(&index).unwrap_or_default();
            // Routings come in the order of layers, so the last one left is this block's.
            if let Some(dprobs_te) = self.trunk[index].routes().and_then(|_| dprobs.pop()) {
                dy.push((dprobs_te * scale)?);
            }
            dy = self.reverse(index, &input, &dy, &wanted[index], index > lowest, &cx, sink)?;
        }
        Ok(found)
    }

    /// A vector per document, `[N, D]`, of a model with an embedding head.
    ///
    /// # Errors
    /// Another head; whatever the pass raises.
    pub fn embed(&self, pass: &Pass<'_>) -> Result<Tensor> {
        let pooling = self.pooling()?;
        self.by_graph(pass, |cx| self.head.pooled(&self.walk(cx, None, None)?[0], pooling, cx))
    }

    /// The gradient of a loss whose gradient by [`Model::embed`]'s vectors is `dy_nd`, into `sink`; gives the vectors.
    ///
    /// # Errors
    /// As for [`Model::embed`].
    pub fn embed_grad(&self, pass: &Pass<'_>, dy_nd: &Tensor, sink: &mut dyn GradSink) -> Result<Tensor> {
        let pooling = self.pooling()?;
        self.backward(pass, 1.0, sink, |cx, h_td, backward| {
            let h_leaf = autograd::leaf(h_td)?;
            let y_nd = self.head.pooled(h_leaf.as_tensor(), pooling, &cx.with(backward.tracked, None))?;
            let leaves: Vec<&Var> = backward.leaves.iter().map(|(_, var)| var).chain([&h_leaf]).collect();
            let mut gradients = autograd::pull(&leaves, &[(&y_nd, dy_nd)])?;
            let dh_td = gradients.pop().flatten();
            for ((id, _), gradient) in backward.leaves.iter().zip(gradients) {
                gradient.map(|gradient| regions::put(&mut *backward.sink, id, &gradient)).transpose()?;
            }
            Ok((y_nd.detach(), dh_td))
        })
    }

    fn pooling(&self) -> Result<Pooling> {
        match self.base.architecture().head {
            HeadKind::Embedding(pooling) => Ok(pooling),
            other => Err(Error::Refused(format!("this model's head is {other:?}; it gives no vector per document"))),
        }
    }

    /// Logits of each document's class, `[N, classes]`, of a model that classifies documents.
    ///
    /// # Errors
    /// Another head; whatever the pass raises.
    pub fn classify(&self, pass: &Pass<'_>) -> Result<Tensor> {
        let HeadKind::Sequence { row, .. } = self.base.architecture().head else {
            return Err(Error::Refused("this model does not classify documents".to_owned()));
        };
        let rows = head::rows(pass.layout, row)?;
        let rows_n = Tensor::new(rows.as_slice(), &Device::Cpu)?;
        self.by_graph(pass, |cx| {
            let h_nd = self.walk(cx, None, None)?[0].index_select(&rows_n, 0)?;
            self.head.graph(&h_nd, &cx.with(cx.tracked, Some(&rows)))
        })
    }

    /// One block in reverse: its graph is run again on its saved input, with leaves for the input and the wanted tensors.
    #[expect(clippy::too_many_arguments, reason = "the state of the walk, spelt out")]
    fn reverse(
        &self,
        index: usize,
        input: &[Tensor],
        dy: &[Tensor],
        wanted: &[TensorId],
        below: bool,
        cx: &GraphCx<'_>,
        sink: &mut dyn GradSink,
    ) -> Result<Vec<Tensor>> {
        let (leaves, tracked) = self.leaves(wanted, cx.theta, cx.layout.n_rows())?;
        let x: Vec<Var> =
            if below { input.iter().map(autograd::leaf).collect::<candle_core::Result<_>>()? } else { Vec::new() };
        let streams: Vec<Tensor> =
            if below { x.iter().map(|x| x.as_tensor().clone()).collect() } else { input.to_vec() };
        let y = self.trunk[index].graph(&streams, &cx.with(&tracked, None))?;
        let outputs: Vec<(&Tensor, &Tensor)> = y.iter().zip(dy).collect();
        let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain(&x).collect();
        let mut gradients = autograd::pull(&all, &outputs)?.into_iter();
        for ((id, _), gradient) in leaves.iter().zip(gradients.by_ref()) {
            match gradient {
                Some(gradient) => regions::put(sink, id, &gradient)?,
                // No row went there: the loss does not depend on it.
                None if self.of_expert(index, id) => {
                    let leaf = tracked.get(id).map(|var| var.zeros_like()).transpose()?;
                    leaf.map(|zeros| regions::put(sink, id, &zeros)).transpose()?;
                }
                None => {}
            }
        }
        gradients.zip(&x).map(|(dx, x)| Ok(dx.map_or_else(|| x.zeros_like(), Ok)?)).collect()
    }

    /// Whether a tensor belongs to one of several experts of a block.
    fn of_expert(&self, index: usize, id: &TensorId) -> bool {
        let mut sites = self.trunk[index].sites().iter();
        sites.any(|site| site.expert.is_some() && site.id.as_str() == id.name.owner())
    }

    /// The routing of each layer of experts, from the first; empty for a model without.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn routing(&self, pass: &Pass<'_>) -> Result<Vec<Routing>> {
        let mut routing = Vec::new();
        self.by_graph(pass, |cx| self.walk(cx, None, Some(&mut routing)))?;
        Ok(routing)
    }

    /// Hidden rows before each block of the trunk above the embedding, and after the last: for audits and tests.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn hidden(&self, pass: &Pass<'_>) -> Result<Vec<Tensor>> {
        let mut saved = Saved { from: 1, inputs: BTreeMap::new() };
        let last = self.by_graph(pass, |cx| self.walk(cx, Some(&mut saved), None))?;
        Ok(saved.inputs.into_values().flatten().chain(last).collect())
    }

    /// Logits of every row, `[T, V]` or `[T, classes]`: for scoring short texts and tests; training never makes them.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn logits(&self, pass: &Pass<'_>) -> Result<Tensor> {
        self.by_graph(pass, |cx| self.head.graph(&self.walk(cx, None, None)?[0], cx))
    }

    /// An empty cache.
    pub(crate) fn caches(&self) -> Vec<BlockCache> {
        vec![BlockCache::default(); self.trunk.len()]
    }

    /// Logits `[V]` after the last of `tokens`, which follow those in the caches.
    pub(crate) fn decode(&self, theta: &Theta, tokens: &[u32], caches: &mut [BlockCache]) -> Result<Tensor> {
        let layout = Layout::single(tokens);
        self.by_graph(&Pass { theta, layout: &layout, dropout: None }, |cx| {
            let mut x = Vec::new();
            for (block, cache) in self.trunk.iter().zip(caches) {
                x = block.decode(&x, cache, cx)?;
            }
            let last = x[0].narrow(0, tokens.len() - 1, 1)?;
            Ok(self.head.graph(&last, cx)?.squeeze(0)?)
        })
    }

    /// Does `f` on the blocks' graphs, without leaves.
    fn by_graph<T>(&self, pass: &Pass<'_>, f: impl FnOnce(&GraphCx<'_>) -> Result<T>) -> Result<T> {
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype())?;
        f(&self.context(pass, &plan, &Tracked::new()))
    }

    fn context<'a>(&'a self, pass: &Pass<'a>, plan: &'a RowPlan, tracked: &'a Tracked) -> GraphCx<'a> {
        let Pass { theta, layout, dropout } = *pass;
        GraphCx {
            base: &self.base,
            stack: &self.stack,
            theta,
            layout,
            plan,
            dropout,
            rows: None,
            tracked,
            dtype: self.dtype(),
        }
    }

    /// The forward walk; keeps the inputs of blocks from `saved.from` on, and the routing of every layer of experts.
    fn walk(
        &self,
        cx: &GraphCx<'_>,
        mut saved: Option<&mut Saved>,
        mut routing: Option<&mut Vec<Routing>>,
    ) -> Result<Vec<Tensor>> {
        let mut x = Vec::new();
        for (index, block) in self.trunk.iter().enumerate() {
            if let Some(saved) = saved.as_mut().filter(|saved| index >= saved.from) {
                saved.inputs.insert(index, x.clone());
            }
            x = block.graph(&x, cx)?;
            let Some(layer) = block.routes() else { continue };
            let (probs_te, experts) = (x.pop(), self.base.architecture().experts);
            if let (Some(routing), Some(probs_te), Some(experts)) = (routing.as_mut(), probs_te, experts) {
                routing.push(Routing { layer, probs_te, per_token: experts.per_token });
            }
        }
        Ok(x)
    }

    /// The tensors at `sites` whose gradient the sink wants.
    fn wanted(&self, sites: &[Site], theta: &Theta, sink: &dyn GradSink) -> Vec<TensorId> {
        let layout = Layout::new();
        parts::wanted(&self.base, &Part { stack: &self.stack, theta, layout: &layout, dropout: None }, sites, sink)
    }

    /// A leaf for each wanted tensor.
    fn leaves(&self, wanted: &[TensorId], theta: &Theta, rows: usize) -> Result<(Vec<(TensorId, Var)>, Tracked)> {
        let mut leaves = Vec::with_capacity(wanted.len());
        for id in wanted {
            let var = match theta.get(id) {
                Some(tensor) => autograd::leaf(tensor)?,
                // What is added to the embeddings has their gradient.
                None if id.owner == Owner::Input => {
                    let shape = (rows, self.base.architecture().hidden);
                    Var::zeros(shape, self.dtype(), &Device::Cpu)?
                }
                None => autograd::leaf(&self.base.tensor(&id.name, self.dtype())?)?,
            };
            leaves.push((id.clone(), var));
        }
        let tracked = leaves.iter().cloned().collect();
        Ok((leaves, tracked))
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
        let (of_one, took) = one.model.grad_parts(one.passes, one.objective, one.scale, keep, own)?;
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
        let (of_one, took) = one.model.score_parts(one.passes, one.objective)?;
        reports.extend(of_one);
        times += took;
    }
    Ok((reports, times))
}

/// What a pass over all of these runs on, if they have it in common.
fn one_machine<'a>(models: &[Together<'a>]) -> Option<Machine<'a>> {
    let first = models.first()?.model;
    let is_alike = |one: &Together<'_>| {
        Arc::ptr_eq(&one.model.base, &first.base) && one.model.how == How::Views && one.model.auxiliary.is_none()
    };
    models.iter().all(is_alike).then(|| first.machine())
}

fn tasks<'a>(models: &[Together<'a>]) -> Vec<Task<'a>> {
    let of_one = |one: &Together<'a>| {
        let Together { model, passes, objective, scale } = *one;
        passes.iter().map(move |pass| model.task(pass, objective, scale))
    };
    models.iter().flat_map(of_one).collect()
}

/// The inputs of blocks that the forward walk keeps for the reverse one.
struct Saved {
    from: usize,
    inputs: BTreeMap<usize, Vec<Tensor>>,
}
