//! How a block joins the residual stream, on views of rows: `x + f(norm(x))`, or `norm(x + f(x))` where norms come last.

use attune_architecture::{NormPlacement, Site};
use attune_points::Result;
use attune_tensor::view::MatRef;

use crate::pass::linear::Thin;
use crate::pass::parts::Given;
use crate::pass::walk::Run;
use crate::pass::{Mat, PassCx, Rows, Sinks};

/// What a block adds to the stream: its last linear, on the rows that it reads.
pub(super) struct Last<'l> {
    pub(super) linear: &'l Site,
    pub(super) x_ti: MatRef<'l>,
}

/// What comes of it.
pub(super) struct Joined {
    /// The block's output, if it was asked for.
    pub(super) y: Vec<Rows<f32>>,
    /// `x + f(x)` where norms come last and the reverse is wanted.
    pub(super) sum: Option<Rows<f32>>,
    /// Of the last linear.
    pub(super) thin: Thin,
}

/// What `f` reads: `norm(x)`, or `x` where norms come last.
pub(super) fn read(norm: &Site, x_td: &Rows<f32>, cx: &PassCx<'_>) -> Result<Mat> {
    match cx.architecture().placement {
        NormPlacement::Pre => cx.norm(norm, x_td.view(), Given::All),
        NormPlacement::Post => Ok(cx.narrow(x_td.view())),
    }
}

/// Adds `f`, by its last linear, to the stream.
pub(super) fn join(norm: &Site, x_td: &Rows<f32>, last: &Last<'_>, cx: &PassCx<'_>, run: Run) -> Result<Joined> {
    let post = cx.architecture().placement == NormPlacement::Post;
    if run == Run::Saved && !post {
        // The rows of a low-rank component are needed, the product is not.
        let thin = cx.thin_only(last.linear, last.x_ti, Given::All)?;
        return Ok(Joined { y: Vec::new(), sum: None, thin });
    }
    let mut sum = cx.arena.rows(x_td.n_rows(), x_td.n_cols());
    cx.kernels.convert(x_td.view().into(), sum.view_mut().into());
    let thin = cx.linear(last.linear, last.x_ti, Given::All, sum.view_mut(), true)?;
    let (y, sum) = close(norm, sum, cx, run)?;
    Ok(Joined { y, sum, thin })
}

/// A block's output, if it was asked for, and `x + f(x)` where its reverse needs it.
type Closed = (Vec<Rows<f32>>, Option<Rows<f32>>);

/// Ends a block whose `x + f(x)` is known.
pub(super) fn close(norm: &Site, sum: Rows<f32>, cx: &PassCx<'_>, run: Run) -> Result<Closed> {
    if cx.architecture().placement == NormPlacement::Pre {
        return Ok((vec![sum], None));
    }
    let y = if run == Run::Saved { Vec::new() } else { vec![cx.norm_rows(norm, &sum)?] };
    Ok((y, run.saves().then_some(sum)))
}

/// The gradient by `x + f`, from the one by the block's output.
pub(super) fn join_vjp(
    norm: &Site,
    sum: Option<&Rows<f32>>,
    dy: Rows<f32>,
    cx: &PassCx<'_>,
    sinks: &mut Sinks<'_>,
) -> Result<Rows<f32>> {
    let Some(sum) = sum else { return Ok(dy) };
    let mut dsum = cx.arena.zeros(sum.n_rows(), sum.n_cols());
    cx.norm_vjp(norm, sum.view(), Given::All, dy.view(), dsum.view_mut(), sinks)?;
    Ok(dsum)
}

/// Whether the gradient by what `f` reads is needed: for what lies below, or for the norm's own tensors.
pub(super) fn reads(norm: &Site, below: bool, cx: &PassCx<'_>, sinks: &Sinks<'_>) -> bool {
    below || (cx.architecture().placement == NormPlacement::Pre && cx.wants_any(norm, sinks))
}

/// The gradient by the block's input, from those by `x + f` and by what `f` reads.
pub(super) fn read_vjp(
    norm: &Site,
    x_td: &Rows<f32>,
    mut dsum: Rows<f32>,
    dn_td: Option<Rows<f32>>,
    cx: &PassCx<'_>,
    sinks: &mut Sinks<'_>,
) -> Result<Rows<f32>> {
    let Some(dn_td) = dn_td else { return Ok(dsum) };
    match cx.architecture().placement {
        NormPlacement::Pre => {
            cx.norm_vjp(norm, x_td.view(), Given::All, dn_td.view(), dsum.view_mut(), sinks)?;
        }
        NormPlacement::Post => cx.kernels.add(dn_td.view().into(), dsum.view_mut()),
    }
    Ok(dsum)
}
