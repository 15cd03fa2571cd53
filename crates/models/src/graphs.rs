//! A model by its blocks' graphs, which define it: the oracle of passes on views, in 32 or 64 bits. A block is reversed by
//! running its graph again on its saved input.

use std::cell::RefCell;
use std::collections::BTreeMap;

use attune_architecture::Site;
use attune_points::{GradSink, Layout, Owner, Result, TensorId, Theta};
use attune_tensor::autograd;
use candle_core::{Device, Tensor, Var};

use crate::attention::RowPlan;
use crate::context::{GraphCx, Tracked};
use crate::loss::Backward;
use crate::model::{Model, Pass};
use crate::pass::alone;
use crate::pass::parts::{self, Part};
use crate::regions;
use crate::routing::Routing;

impl Model {
    /// A forward walk, `top` on the hidden rows (it gives their gradient where [`Backward::below`] asks for it), and the
    /// reverse walk.
    pub(crate) fn backward<T>(
        &self,
        pass: &Pass<'_>,
        scale: f64,
        sink: &mut dyn GradSink,
        top: impl FnOnce(&GraphCx<'_>, &Tensor, Backward<'_>) -> Result<(T, Option<Tensor>)>,
    ) -> Result<T> {
        let plan = self.part(pass).plan(self.base.architecture(), self.dtype())?;
        let (none, alone) = (Tracked::new(), self.alone(pass)?);
        let cx = self.context(pass, &plan, &none, alone.as_ref());
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
        let beside = scale * pass.layout.counts().tokens as f64;
        // Nobody reads what components carry behind the last block.
        let unread = h[1..].iter().map(Tensor::zeros_like).collect::<candle_core::Result<Vec<_>>>()?;
        let mut dy: Vec<Tensor> = std::iter::once(dh_td).chain(unread).collect();
        for index in (lowest..self.trunk.len()).rev() {
            let input = saved.inputs.remove(&index).unwrap_or_default();
            // Routings come in the order of layers, so the last one left is this block's.
            if let Some(dprobs_te) = self.trunk[index].routes().and_then(|_| dprobs.pop()) {
                dy.push((dprobs_te * scale)?);
            }
            dy = self.reverse(index, &input, &dy, &wanted[index], index > lowest, beside, &cx, sink)?;
        }
        Ok(found)
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
        beside: f64,
        cx: &GraphCx<'_>,
        sink: &mut dyn GradSink,
    ) -> Result<Vec<Tensor>> {
        let (leaves, tracked) = self.leaves(wanted, cx.theta, cx.layout.n_rows())?;
        let x: Vec<Var> =
            if below { input.iter().map(autograd::leaf).collect::<candle_core::Result<_>>()? } else { Vec::new() };
        let streams: Vec<Tensor> =
            if below { x.iter().map(|x| x.as_tensor().clone()).collect() } else { input.to_vec() };
        let heard = RefCell::new(Vec::new());
        let y = self.step(index, &streams, &GraphCx { heard: Some(&heard), ..cx.with(&tracked, None) })?;
        let heard = heard.into_inner();
        let weight = Tensor::new(beside, &Device::Cpu)?.to_dtype(self.dtype())?;
        let beside = heard.iter().filter(|_| !leaves.is_empty() || below).map(|loss| (loss, &weight));
        let outputs: Vec<(&Tensor, &Tensor)> = y.iter().zip(dy).chain(beside).collect();
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

    /// Does `f` on the blocks' graphs, without leaves.
    pub(crate) fn by_graph<T>(&self, pass: &Pass<'_>, f: impl FnOnce(&GraphCx<'_>) -> Result<T>) -> Result<T> {
        let plan = self.part(pass).plan(self.base.architecture(), self.dtype())?;
        f(&self.context(pass, &plan, &Tracked::new(), self.alone(pass)?.as_ref()))
    }

    /// What the base gives by itself on the rows of a pass, if a component reads it.
    fn alone(&self, pass: &Pass<'_>) -> Result<Option<Tensor>> {
        if !alone::is_read(&self.stack, pass.theta) {
            return Ok(None);
        }
        alone::check(pass.layout)?;
        let bare = Pass { theta: &pass.theta.adapters_off(), layout: pass.layout, dropout: None };
        let plan = self.part(&bare).plan(self.base.architecture(), self.dtype())?;
        let none = Tracked::new();
        let cx = self.context(&bare, &plan, &none, None);
        Ok(Some(self.head.norm(&self.walk(&cx, None, None)?[0], &cx)?.detach()))
    }

    fn context<'a>(
        &'a self,
        pass: &Pass<'a>,
        plan: &'a RowPlan,
        tracked: &'a Tracked,
        alone: Option<&'a Tensor>,
    ) -> GraphCx<'a> {
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
            heard: None,
            alone,
            dtype: self.dtype(),
        }
    }

    /// The forward walk; keeps the inputs of blocks from `saved.from` on, and the routing of every layer of experts.
    pub(crate) fn walk(
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
            x = self.step(index, &x, cx)?;
            let Some(layer) = block.routes() else { continue };
            let (probs_te, experts) = (x.pop(), self.base.architecture().experts);
            if let (Some(routing), Some(probs_te), Some(experts)) = (routing.as_mut(), probs_te, experts) {
                routing.push(Routing { layer, probs_te, per_token: experts.per_token });
            }
        }
        Ok(x)
    }

    /// The streams behind a block: the residual one and what components carry, then its routing, if it has one.
    fn step(&self, index: usize, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let block = &self.trunk[index];
        let mut y = block.graph(x.get(..1).unwrap_or_default(), cx)?;
        let probs_te = block.routes().and_then(|_| y.pop());
        match x {
            [] => y.extend(cx.begin_carried(y[0].dim(0)?)?),
            [_, carried @ ..] => y.extend(carried.iter().cloned()),
        }
        let mut y = cx.carry(block.sites(), y)?;
        y.extend(probs_te);
        Ok(y)
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

/// The inputs of blocks that the forward walk keeps for the reverse one.
#[derive(Default)]
pub(crate) struct Saved {
    pub(crate) from: usize,
    pub(crate) inputs: BTreeMap<usize, Vec<Tensor>>,
}
