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
    /// The block as a site.
    pub(super) block: &'l Site,
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
    /// What the block gave, where components make something else of it and the reverse is wanted.
    pub(super) given: Option<Rows<f32>>,
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
    if cx.is_branched(last.block) {
        let mut given = cx.arena.rows(x_td.n_rows(), x_td.n_cols());
        let thin = cx.linear(last.linear, last.x_ti, Given::All, given.view_mut(), false)?;
        let (y, sum, given) = part(norm, last.block, x_td, given, cx, run)?;
        return Ok(Joined { y, sum, thin, given });
    }
    if run == Run::Saved && !post {
        // The rows of a low-rank component are needed, the product is not.
        let thin = cx.thin_only(last.linear, last.x_ti, Given::All)?;
        return Ok(Joined { y: Vec::new(), sum: None, thin, given: None });
    }
    // The stream comes last, as where a component stands between: rows beside one's keep their bits.
    let mut sum = cx.arena.rows(x_td.n_rows(), x_td.n_cols());
    let thin = cx.linear(last.linear, last.x_ti, Given::All, sum.view_mut(), false)?;
    cx.kernels.add(x_td.view().into(), sum.view_mut());
    let (y, sum) = close(norm, sum, cx, run)?;
    Ok(Joined { y, sum, thin, given: None })
}

/// A block's output, if it was asked for, and `x + f(x)` where its reverse needs it.
type Closed = (Vec<Rows<f32>>, Option<Rows<f32>>);

/// Ends a block whose `x + f(x)` is known.
pub(super) fn close(norm: &Site, sum: Rows<f32>, cx: &PassCx<'_>, run: Run) -> Result<Closed> {
    if cx.architecture().placement == NormPlacement::Pre {
        return Ok((vec![sum], None));
    }
    let y = if run == Run::Saved { Vec::new() } else { vec![cx.norm_rows(norm, &sum, Given::All)?] };
    Ok((y, run.saves().then_some(sum)))
}

/// A block's output, `x + f(x)` and `f(x)`, each where it is needed.
type Parted = (Vec<Rows<f32>>, Option<Rows<f32>>, Option<Rows<f32>>);

/// Ends a block that gave `given`, of which components make something else.
pub(super) fn part(
    norm: &Site,
    block: &Site,
    x_td: &Rows<f32>,
    given: Rows<f32>,
    cx: &PassCx<'_>,
    run: Run,
) -> Result<Parted> {
    if run == Run::Saved && cx.architecture().placement == NormPlacement::Pre {
        return Ok((Vec::new(), None, Some(given)));
    }
    let mut made = cx.arena.rows(given.n_rows(), given.n_cols());
    cx.kernels.convert(given.view().into(), made.view_mut().into());
    cx.branch(block, read(norm, x_td, cx)?.view(), made.view_mut())?;
    cx.kernels.add(x_td.view().into(), made.view_mut());
    let (y, sum) = close(norm, made, cx, run)?;
    Ok((y, sum, run.saves().then_some(given)))
}

/// The gradients by what a block gave, and by what it read.
type Apart = (Rows<f32>, Option<Rows<f32>>);

/// The gradients by what a block gave and, if it is asked for, by what it read, from the one by what it adds to the stream;
/// nothing if no component stands between the former and the latter.
pub(super) fn part_vjp(
    norm: &Site,
    block: &Site,
    x_td: &Rows<f32>,
    given: Option<&Rows<f32>>,
    (dadded, through): (&Rows<f32>, bool),
    cx: &PassCx<'_>,
    sinks: &mut Sinks<'_>,
) -> Result<Option<Apart>> {
    let Some(given) = given else { return Ok(None) };
    let mut dgiven = cx.arena.rows(given.n_rows(), given.n_cols());
    cx.kernels.convert(dadded.view().into(), dgiven.view_mut().into());
    let mut dn_td = through.then(|| cx.arena.zeros(x_td.n_rows(), x_td.n_cols()));
    let n_td = read(norm, x_td, cx)?;
    let to = dn_td.as_mut().map(Rows::view_mut);
    cx.branch_vjp(block, n_td.view(), given.view(), &mut dgiven, to, sinks)?;
    Ok(Some((dgiven, dn_td)))
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
