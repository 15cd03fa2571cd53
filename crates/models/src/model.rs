//! A model: the base, the components at its sites, and the walks over its blocks.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_architecture::Site;
use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::{BankKind, Error, GradSink, Layout, Owner, Region, Result, Rows, TensorId, TensorName, Theta};
use attune_tensor::autograd;
use candle_core::{DType, Tensor, Var};

use crate::attention::RowPlan;
use crate::base::Base;
use crate::block::{Block, BlockCache, trunk};
use crate::context::{GraphCx, Tracked};
use crate::dropout::Dropout;
use crate::head::Head;
use crate::loss::{Backward, losses};
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

/// A base and the components at its sites.
pub struct Model {
    base: Base,
    stack: Stack,
    trunk: Vec<Box<dyn Block>>,
    head: Head,
    auxiliary: Option<Arc<dyn Auxiliary>>,
    dtype: DType,
}

impl Model {
    /// A model that computes in 32 bits.
    pub fn new(base: Base, stack: Stack) -> Self {
        let (trunk, head) = (trunk(base.architecture()), Head::new(base.architecture()));
        Self { base, stack, trunk, head, auxiliary: None, dtype: DType::F32 }
    }

    /// The same model computing in 64 bits, as tests do; the tensors of a pass's `Theta` must be f64 as well.
    #[must_use]
    pub fn in_f64(mut self) -> Self {
        self.dtype = DType::F64;
        self
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

    /// The components.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// The loss of a batch, without gradients.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn score(&self, pass: &Pass<'_>, objective: &dyn Objective) -> Result<LossReport> {
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype)?;
        let none = Tracked::new();
        let cx = self.context(pass, &plan, &none);
        let h = self.walk(&cx, None, None)?;
        Ok(losses(&self.head, &h[0], objective, &cx, None)?.report)
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
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype)?;
        let none = Tracked::new();
        let cx = self.context(pass, &plan, &none);
        let wanted: Vec<Vec<TensorId>> =
            self.trunk.iter().map(|block| self.wanted(block.sites(), pass.theta, sink)).collect::<Result<_>>()?;
        let lowest = wanted.iter().position(|ids| !ids.is_empty());
        let mut saved = Saved { from: lowest.unwrap_or(self.trunk.len()), inputs: BTreeMap::new() };
        let mut routing = Vec::new();
        let collected = self.auxiliary.is_some().then_some(&mut routing);
        let h = self.walk(&cx, Some(&mut saved), collected)?;

        let (leaves, tracked) = self.leaves(&self.wanted(&self.head.sites, pass.theta, sink)?, pass.theta)?;
        let backward =
            Backward { scale, leaves: &leaves, tracked: &tracked, sink: &mut *sink, below: lowest.is_some() };
        let losses = losses(&self.head, &h[0], objective, &cx, Some(backward))?;
        let (Some(lowest), Some(dh_td)) = (lowest, losses.dh_td) else { return Ok(losses.report) };

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
        Ok(losses.report)
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
        let (leaves, tracked) = self.leaves(wanted, cx.theta)?;
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
                Some(gradient) => sink.put(id, &gradient)?,
                // No row went there: the loss does not depend on it.
                None if self.of_expert(index, id) => {
                    let leaf = tracked.get(id).map(|var| var.zeros_like()).transpose()?;
                    leaf.map(|zeros| sink.put(id, &zeros)).transpose()?;
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
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype)?;
        let (none, mut routing) = (Tracked::new(), Vec::new());
        self.walk(&self.context(pass, &plan, &none), None, Some(&mut routing))?;
        Ok(routing)
    }

    /// Hidden rows before each block of the trunk above the embedding, and after the last: for audits and tests.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn hidden(&self, pass: &Pass<'_>) -> Result<Vec<Tensor>> {
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype)?;
        let none = Tracked::new();
        let mut saved = Saved { from: 1, inputs: BTreeMap::new() };
        let last = self.walk(&self.context(pass, &plan, &none), Some(&mut saved), None)?;
        Ok(saved.inputs.into_values().flatten().chain(last).collect())
    }

    /// Logits of every row, `[T, V]`: for scoring short texts and tests; training never makes them.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn logits(&self, pass: &Pass<'_>) -> Result<Tensor> {
        let plan = RowPlan::new(self.base.architecture(), pass.layout, self.dtype)?;
        let none = Tracked::new();
        let cx = self.context(pass, &plan, &none);
        self.head.graph(&self.walk(&cx, None, None)?[0], &cx)
    }

    /// An empty cache.
    pub(crate) fn caches(&self) -> Vec<BlockCache> {
        vec![BlockCache::default(); self.trunk.len()]
    }

    /// Logits `[V]` after the last of `tokens`, which follow those in the caches.
    pub(crate) fn decode(&self, theta: &Theta, tokens: &[u32], caches: &mut [BlockCache]) -> Result<Tensor> {
        let layout = Layout::single(tokens);
        let plan = RowPlan::new(self.base.architecture(), &layout, self.dtype)?;
        let none = Tracked::new();
        let cx = self.context(&Pass { theta, layout: &layout, dropout: None }, &plan, &none);
        let mut x = Vec::new();
        for (block, cache) in self.trunk.iter().zip(caches) {
            x = block.decode(&x, cache, &cx)?;
        }
        let last = x[0].narrow(0, tokens.len() - 1, 1)?;
        Ok(self.head.graph(&last, &cx)?.squeeze(0)?)
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
            dtype: self.dtype,
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
    fn wanted(&self, sites: &[Site], theta: &Theta, sink: &dyn GradSink) -> Result<Vec<TensorId>> {
        let mut found = Vec::new();
        let mut ask = |id: TensorId| match sink.want(&id) {
            Region::None => Ok(()),
            Region::All => {
                if !found.contains(&id) {
                    found.push(id);
                }
                Ok(())
            }
            Region::Rows(_) | Region::Cols(_) | Region::Cross(..) | Region::Entries(_) => Err(Error::Refused(format!(
                "part of the gradient of {id} was asked for; this engine computes whole gradients"
            ))),
        };
        for site in sites {
            for name in self.names(site) {
                match theta.weight(&name) {
                    Some((id, _)) => ask(id)?,
                    None => ask(TensorId { owner: Owner::Base, name })?,
                }
            }
            for binding in &theta.bindings {
                let slot = binding.slot;
                let bank = theta.banks.get(slot as usize).filter(|bank| bank.kind == BankKind::Adapter);
                let at = bank.and_then(|_| self.stack.slot(slot)?.at(&site.id));
                for spec in at.into_iter().flat_map(|at| &at.tensors) {
                    for set in sets(&binding.rows) {
                        ask(TensorId { owner: Owner::Bank { slot, set }, name: spec.name(site.id.as_str()) })?;
                    }
                }
            }
        }
        Ok(found)
    }

    /// The names of a site's own tensors.
    fn names(&self, site: &Site) -> Vec<TensorName> {
        let locals = if site.kind.bias_width().is_some() { &["weight", "bias"][..] } else { &["weight"][..] };
        locals.iter().map(|local| self.base.tensor_name(site.id.as_str(), local)).collect()
    }

    /// A leaf for each wanted tensor.
    fn leaves(&self, wanted: &[TensorId], theta: &Theta) -> Result<(Vec<(TensorId, Var)>, Tracked)> {
        let mut leaves = Vec::with_capacity(wanted.len());
        for id in wanted {
            let var = match theta.get(id) {
                Some(tensor) => autograd::leaf(tensor)?,
                None => autograd::leaf(&self.base.tensor(&id.name, self.dtype)?)?,
            };
            leaves.push((id.clone(), var));
        }
        let tracked = leaves.iter().cloned().collect();
        Ok((leaves, tracked))
    }
}

/// The inputs of blocks that the forward walk keeps for the reverse one.
struct Saved {
    from: usize,
    inputs: BTreeMap<usize, Vec<Tensor>>,
}

/// The sets that a binding uses.
fn sets(rows: &Rows) -> Vec<u32> {
    match rows {
        Rows::All(set) => vec![*set],
        Rows::Segments(segments) => {
            let mut sets: Vec<u32> = segments.iter().map(|(_, set)| *set).collect();
            sets.sort_unstable();
            sets.dedup();
            sets
        }
    }
}
