//! Norm, MLP, residual.

use attune_architecture::{Activation, MlpKind, Place, Site};
use attune_points::Result;
use attune_tensor::view::MatRef;
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
    gate: Option<Mat>,
    up: Mat,
    sum: Option<Rows<f32>>,
    thin_gate: Option<Thin>,
    thin_up: Thin,
    thin_down: Thin,
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
        Ok(vec![super::residual(&x[0], norm, cx, |h_td| graph(&self.sites, h_td, cx))?])
    }

    fn forward(&self, x: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<block::Saved>)> {
        let norm = site(&self.sites, Place::MlpNorm)?;
        let n_td = residual::read(norm, &x[0], cx)?;
        let linear = |place| -> Result<(Rows<f32>, Thin)> {
            let mut y = cx.arena.rows(cx.n_rows(), cx.architecture().inner);
            let thin = cx.linear(site(&self.sites, place)?, n_td.view(), Given::All, y.view_mut(), false)?;
            Ok((y, thin))
        };
        let gate = match cx.architecture().mlp {
            MlpKind::Gated(_) => Some(linear(Place::Gate)?),
            MlpKind::Plain(_) => None,
        };
        let (gate, thin_gate) = gate.unzip();
        let (up, thin_up) = linear(Place::Up)?;
        drop(n_td);
        let inner_ti = inner(gate.as_ref().map(|gate| gate.view().into()), up.view().into(), cx);
        let last = Last { linear: site(&self.sites, Place::Down)?, x_ti: inner_ti.view() };
        let Joined { y, sum, thin: thin_down } = residual::join(norm, &x[0], &last, cx, run)?;
        drop(inner_ti);
        let saved = run.saves().then(|| {
            let (gate, up) = cx.meter.time(Work::Elementwise, || (gate.map(|gate| cx.narrowed(gate)), cx.narrowed(up)));
            block::Saved::Mlp(Box::new(Saved { gate, up, sum, thin_gate, thin_up, thin_down }))
        });
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
        let saved = *saved;
        let norm = site(&self.sites, Place::MlpNorm)?;
        let (t, inner_width) = (cx.n_rows(), cx.architecture().inner);
        let dsum = residual::join_vjp(norm, saved.sum.as_ref(), super::only(dy)?, cx, sinks)?;
        let mut dinner_ti = cx.arena.rows(t, inner_width);
        {
            let inner_ti = inner(saved.gate.as_ref().map(Mat::view), saved.up.view(), cx);
            let (down, dy) = (site(&self.sites, Place::Down)?, cx.as_activations(dsum.view()));
            let to = Some((dinner_ti.view_mut(), false));
            let dy = dy.view(dsum.view());
            cx.linear_vjp(down, inner_ti.view(), Given::All, &saved.thin_down, dy, to, sinks)?;
        }
        let mut dup = cx.arena.mat(t, inner_width, cx.dtype);
        let dgate = cx.meter.time(Work::Elementwise, || {
            let f = kernel(cx.architecture().mlp.activation());
            let Some(gate) = &saved.gate else {
                cx.kernels.activate_vjp(f, saved.up.view(), dinner_ti.view(), dup.view_mut());
                return None;
            };
            let mut dgate = cx.arena.mat(t, inner_width, cx.dtype);
            let (gate, up) = (gate.view(), saved.up.view());
            cx.kernels.gated_vjp(f, gate, up, dinner_ti.view(), dgate.view_mut(), dup.view_mut());
            Some(dgate)
        });
        drop((dinner_ti, saved.gate, saved.up));
        let n_td = residual::read(norm, &x[0], cx)?;
        let through = residual::reads(norm, below, cx, sinks)?;
        let mut dn_td = through.then(|| cx.arena.rows(t, x[0].n_cols()));
        let up = (Place::Up, dup, saved.thin_up);
        let gate = dgate.zip(saved.thin_gate).map(|(dgate, thin)| (Place::Gate, dgate, thin));
        for (i, (place, dy, thin)) in gate.into_iter().chain([up]).enumerate() {
            let to = dn_td.as_mut().map(|dn| (dn.view_mut(), i > 0));
            cx.linear_vjp(site(&self.sites, place)?, n_td.view(), Given::All, &thin, dy.view(), to, sinks)?;
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
