//! Norm, MLP, residual.

use std::ops::Range;

use attune_architecture::{Activation, MlpKind, Place, Site};
use attune_points::Result;
use attune_tensor::view::{MatRef, ViewMut};
use attune_tensor::{kernels, ops};
use candle_core::Tensor;

use super::residual::{Joined, Last};
use super::{Block, residual, site};
use crate::block;
use crate::context::GraphCx;
use crate::pass::linear::Thin;
use crate::pass::parts::Given;
use crate::pass::times::Work;
use crate::pass::walk::Run;
use crate::pass::{Mat, PassCx, Rows, Sinks};

/// What the reverse pass needs: the rest is computed again.
pub struct Saved {
    opened: Opened<Mat>,
    sum: Option<Rows<f32>>,
    /// What the block gave, where components make something else of it.
    given: Option<Rows<f32>>,
    down: Thin,
}

/// What the first linears of an MLP gave: in 32 bits at first, in the type of the activations where it is kept.
pub(super) struct Opened<M> {
    pub(super) gate: Option<M>,
    pub(super) up: M,
    /// Of the linears that gave it; of several, where rows differ in them.
    pub(super) thin: Vec<Firsts>,
}

/// The low-rank rows of an MLP's first linears.
pub(super) struct Firsts {
    gate: Option<Thin>,
    up: Thin,
}

impl Opened<Rows<f32>> {
    /// Room for `rows` of them.
    pub(super) fn room(rows: usize, cx: &PassCx<'_>) -> Self {
        let room = || cx.arena.rows(rows, cx.architecture().inner);
        let gate = matches!(cx.architecture().mlp, MlpKind::Gated(_)).then(room);
        Self { gate, up: room(), thin: Vec::new() }
    }

    /// Runs the first linears of `sites` on `n_td`, the rows `at` of these.
    pub(super) fn open(
        &mut self,
        sites: &[Site],
        n_td: MatRef<'_>,
        given: Given<'_>,
        at: Range<usize>,
        cx: &PassCx<'_>,
    ) -> Result<()> {
        let linear = |place, to: &mut Rows<f32>| {
            let to = to.view_mut().into_sub_rows(at.start, at.end);
            cx.linear(site(sites, place)?, n_td, given, to, false)
        };
        let gate = self.gate.as_mut().map(|gate| linear(Place::Gate, gate)).transpose()?;
        let up = linear(Place::Up, &mut self.up)?;
        self.thin.push(Firsts { gate, up });
        Ok(())
    }

    /// What the last linear reads.
    pub(super) fn inner(&self, cx: &PassCx<'_>) -> Mat {
        inner(self.gate.as_ref().map(|gate| gate.view().into()), self.up.view().into(), cx)
    }

    /// In the type of the activations, to be kept.
    pub(super) fn narrowed(self, cx: &PassCx<'_>) -> Opened<Mat> {
        let Self { gate, up, thin } = self;
        let narrowed = || (gate.map(|gate| cx.narrowed(gate)), cx.narrowed(up));
        let (gate, up) = cx.meter.time(Work::Elementwise, narrowed);
        Opened { gate, up, thin }
    }
}

impl Opened<Mat> {
    /// What the last linear reads.
    pub(super) fn inner(&self, cx: &PassCx<'_>) -> Mat {
        inner(self.gate.as_ref().map(Mat::view), self.up.view(), cx)
    }

    /// The gradients by what the first linears gave, from the one by what the last linear read.
    pub(super) fn vjp(self, dinner_ti: &Rows<f32>, cx: &PassCx<'_>) -> Opened<Mat> {
        let Self { gate, up, thin } = self;
        let (t, width) = (dinner_ti.n_rows(), dinner_ti.n_cols());
        let f = kernel(cx.architecture().mlp.activation());
        let mut dup = cx.arena.mat(t, width, cx.dtype);
        let dgate = cx.meter.time(Work::Elementwise, || {
            let Some(gate) = &gate else {
                cx.kernels.activate_vjp(f, up.view(), dinner_ti.view(), dup.view_mut());
                return None;
            };
            let mut dgate = cx.arena.mat(t, width, cx.dtype);
            cx.kernels.gated_vjp(f, gate.view(), up.view(), dinner_ti.view(), dgate.view_mut(), dup.view_mut());
            Some(dgate)
        });
        Opened { gate: dgate, up: dup, thin }
    }

    /// The reverse of [`Opened::open`], of which these are the gradients: `thin` is the number of the call.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
    pub(super) fn open_vjp(
        &self,
        thin: usize,
        sites: &[Site],
        n_td: MatRef<'_>,
        given: Given<'_>,
        at: Range<usize>,
        mut dn_td: Option<ViewMut<'_, f32>>,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let firsts = &self.thin[thin];
        let gate = self.gate.as_ref().zip(firsts.gate.as_ref()).map(|(dy, thin)| (Place::Gate, dy, thin));
        for (i, (place, dy, thin)) in gate.into_iter().chain([(Place::Up, &self.up, &firsts.up)]).enumerate() {
            let (dy, to) = (dy.view().sub_rows(at.start, at.end), dn_td.as_mut().map(|dn| (dn.reborrow(), i > 0)));
            cx.linear_vjp(site(sites, place)?, n_td, given, thin, dy, to, sinks)?;
        }
        Ok(())
    }
}

pub(super) struct Mlp {
    /// Norm, gate where there is one, up, down.
    pub(super) sites: Vec<Site>,
}

impl Block for Mlp {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let norm = site(&self.sites, Place::MlpNorm)?;
        let block = site(&self.sites, Place::Mlp)?;
        Ok(vec![super::residual(&x[0], norm, block, cx, |h_td| graph(&self.sites, h_td, cx))?])
    }

    fn forward(&self, x: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<block::Saved>)> {
        let norm = site(&self.sites, Place::MlpNorm)?;
        let n_td = residual::read(norm, &x[0], cx)?;
        let mut opened = Opened::room(cx.n_rows(), cx);
        opened.open(&self.sites, n_td.view(), Given::All, 0..cx.n_rows(), cx)?;
        drop(n_td);
        let inner_ti = opened.inner(cx);
        let block = site(&self.sites, Place::Mlp)?;
        let last = Last { block, linear: site(&self.sites, Place::Down)?, x_ti: inner_ti.view() };
        let Joined { y, sum, thin: down, given } = residual::join(norm, &x[0], &last, cx, run)?;
        drop(inner_ti);
        let saved =
            run.saves().then(|| block::Saved::Mlp(Box::new(Saved { opened: opened.narrowed(cx), sum, given, down })));
        Ok((y, saved))
    }

    fn vjp(
        &self,
        x: &[Rows<f32>],
        saved: Option<block::Saved>,
        dy: Vec<Rows<f32>>,
        below: bool,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Rows<f32>>> {
        let Some(block::Saved::Mlp(saved)) = saved else { return Err(super::nothing_saved("an MLP")) };
        let Saved { opened, sum, given, down } = *saved;
        let norm = site(&self.sites, Place::MlpNorm)?;
        let t = cx.n_rows();
        let dsum = residual::join_vjp(norm, sum.as_ref(), super::only(dy)?, cx, sinks)?;
        let through = residual::reads(norm, below, cx, sinks);
        let block = site(&self.sites, Place::Mlp)?;
        let parted = residual::part_vjp(norm, block, &x[0], given.as_ref(), (&dsum, through), cx, sinks)?;
        drop(given);
        let mut dinner_ti = cx.arena.rows(t, cx.architecture().inner);
        {
            let dgiven = parted.as_ref().map_or(&dsum, |(dgiven, _)| dgiven);
            let (inner_ti, dy) = (opened.inner(cx), cx.as_activations(dgiven.view()));
            let to = Some((dinner_ti.view_mut(), false));
            let (last, dy) = (site(&self.sites, Place::Down)?, dy.view(dgiven.view()));
            cx.linear_vjp(last, inner_ti.view(), Given::All, &down, dy, to, sinks)?;
        }
        let dopened = opened.vjp(&dinner_ti, cx);
        drop(dinner_ti);
        let n_td = residual::read(norm, &x[0], cx)?;
        let mut dn_td = through.then(|| cx.arena.rows(t, x[0].n_cols()));
        let dn = dn_td.as_mut().map(Rows::view_mut);
        dopened.open_vjp(0, &self.sites, n_td.view(), Given::All, 0..t, dn, cx, sinks)?;
        if let (Some(dn_td), Some((_, Some(beside)))) = (&mut dn_td, parted) {
            cx.kernels.add(beside.view().into(), dn_td.view_mut());
        }
        Ok(vec![residual::read_vjp(norm, &x[0], dsum, dn_td, cx, sinks)?])
    }
}

/// What the last linear reads: `f(gate) · up`, or `f(up)`.
fn inner(gate_ti: Option<MatRef<'_>>, up_ti: MatRef<'_>, cx: &PassCx<'_>) -> Mat {
    let mut inner_ti = cx.arena.mat(up_ti.rows(), up_ti.cols(), cx.dtype);
    let f = kernel(cx.architecture().mlp.activation());
    cx.meter.time(Work::Elementwise, || match gate_ti {
        Some(gate_ti) => cx.kernels.gated(f, gate_ti, up_ti, inner_ti.view_mut()),
        None => cx.kernels.activate(f, up_ti, inner_ti.view_mut()),
    });
    inner_ti
}

/// The kernel's name of an activation.
fn kernel(f: Activation) -> kernels::Activation {
    match f {
        Activation::Silu => kernels::Activation::Silu,
        Activation::Gelu => kernels::Activation::Gelu,
        Activation::GeluTanh => kernels::Activation::GeluTanh,
        Activation::Relu => kernels::Activation::Relu,
    }
}

/// The MLP of these sites, whole or one expert's: `h_td` to `[T, D]`.
pub(super) fn graph(sites: &[Site], h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
    let linear = |place, x: &Tensor| cx.linear(site(sites, place)?, x);
    let inner_ti = match cx.base.architecture().mlp {
        MlpKind::Gated(f) => (activate(f, &linear(Place::Gate, h_td)?)? * linear(Place::Up, h_td)?)?,
        MlpKind::Plain(f) => activate(f, &linear(Place::Up, h_td)?)?,
    };
    linear(Place::Down, &inner_ti)
}

/// The activation `f` of each value.
fn activate(f: Activation, x: &Tensor) -> Result<Tensor> {
    let y = match f {
        Activation::Silu => ops::silu(x),
        Activation::Gelu => ops::gelu(x),
        Activation::GeluTanh => ops::gelu_tanh(x),
        Activation::Relu => ops::relu(x),
    };
    Ok(y?)
}
