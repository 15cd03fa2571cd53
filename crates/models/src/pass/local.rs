//! What has no hand-written gradient: a component or a whole block runs its graph on each part's rows, and its reverse is
//! candle's on that small local graph.

use std::ops::Range;

use attune_architecture::Site;
use attune_points::adapter::{DropoutMask, RowCx};
use attune_points::{Error, GradSink, Locals, Result, TensorId};
use attune_tensor::autograd;
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use crate::attention::RowPlan;
use crate::context::{GraphCx, Tracked};
use crate::dropout::RowMasks;
use crate::pass::alone;
use crate::pass::arena::Rows;
use crate::pass::parts::{Added, Given, Ids, Part, PassCx, Placed, Sinks, wanted, wants};
use crate::regions;
use crate::stack;

/// Rows as a tensor of f32.
pub(crate) fn tensor(x: MatRef<'_>) -> Result<Tensor> {
    let (rows, cols) = (x.rows(), x.cols());
    let mut values = Vec::with_capacity(rows * cols);
    match x {
        MatRef::F32(view) => (0..rows).for_each(|row| values.extend_from_slice(view.row(row))),
        MatRef::Bf16(view) => (0..rows).for_each(|row| values.extend(view.row(row).iter().map(|v| v.to_f32()))),
    }
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}

/// Writes (or adds) a tensor to rows.
pub(crate) fn write(tensor: &Tensor, mut to: ViewMut<'_, f32>, add: bool) -> Result<()> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let (rows, cols) = (to.rows(), to.cols());
    if values.len() != rows * cols {
        return Err(Error::Refused(format!("a component made {:?}; expected [{rows}, {cols}]", tensor.shape())));
    }
    for (row, values) in values.chunks_exact(cols.max(1)).enumerate() {
        if add {
            to.row(row).iter_mut().zip(values).for_each(|(y, v)| *y += v);
        } else {
            to.row(row).copy_from_slice(values);
        }
    }
    Ok(())
}

/// Gives a sink the gradients by a component's leaves, from that by the rows that were made of them.
pub(crate) fn pull(made: &Tensor, by: &Tensor, leaves: &[(TensorId, Var)], sink: &mut dyn GradSink) -> Result<()> {
    let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).collect();
    for ((id, _), gradient) in leaves.iter().zip(autograd::pull(&all, &[(made, by)])?) {
        gradient.map(|gradient| regions::put(&mut *sink, id, &gradient)).transpose()?;
    }
    Ok(())
}

/// The masks of a component's rows.
pub(crate) fn masks<'m, P>(parts: &'m [Part<'m>], placed: &'m Placed<'_, P>) -> Option<RowMasks<'m>> {
    let part = &parts[placed.part];
    part.dropout_of(placed.slot).map(|key| RowMasks { key, layout: part.layout, rows: placed.ids.some() })
}

/// The tensors of a component, leaves where a gradient is wanted.
pub(crate) fn locals<P>(parts: &[Part<'_>], placed: &Placed<'_, P>, tracked: &[(TensorId, Var)]) -> Result<Locals> {
    let theta = parts[placed.part].theta;
    stack::locals_by(placed.at, |name| {
        let id = TensorId { owner: placed.owner(), name: name.clone() };
        let leaf = tracked.iter().find(|(tracked, _)| *tracked == id).map(|(_, var)| var.as_tensor());
        leaf.or_else(|| theta.get(&id))
    })
}

/// The tensors of a component whose gradient its part wants.
pub(crate) fn wanted_of<P>(placed: &Placed<'_, P>, sinks: &Sinks<'_>) -> Vec<TensorId> {
    let ids = placed.at.tensors.iter().map(|spec| placed.id(spec));
    ids.filter(|id| wants(&*sinks[placed.part], id)).collect()
}

/// Leaves for tensors of a part.
pub(crate) fn leaves_for(part: &Part<'_>, ids: &[TensorId]) -> Result<Vec<(TensorId, Var)>> {
    let held = ids.iter().filter_map(|id| Some((id, part.theta.get(id)?)));
    held.map(|(id, value)| Ok((id.clone(), autograd::leaf(value)?))).collect()
}

/// Leaves for the tensors of a component whose gradient its part wants.
pub(crate) fn leaves<P>(parts: &[Part<'_>], placed: &Placed<'_, P>, sinks: &Sinks<'_>) -> Result<Vec<(TensorId, Var)>> {
    leaves_for(&parts[placed.part], &wanted_of(placed, sinks))
}

/// What a component may know of the pass.
pub(crate) fn row_cx<'r, P>(
    parts: &'r [Part<'r>],
    site: &'r Site,
    placed: &'r Placed<'_, P>,
    dropout: Option<&'r dyn DropoutMask>,
) -> RowCx<'r> {
    let (layout, output) = (parts[placed.part].layout, site.out_in().map_or(0, |(output, _)| output));
    RowCx { site: &site.id, output, dropout, layout, rows: placed.ids.some() }
}

/// Runs the graph of a component with its tensors, leaves in `tracked` among them, on the rows of `ids`.
pub(crate) fn with_tensors<P: Copy>(
    parts: &[Part<'_>],
    site: &Site,
    placed: &Placed<'_, P>,
    ids: &Ids<'_>,
    tracked: &[(TensorId, Var)],
    graph: impl FnOnce(P, &Locals, &RowCx<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let masks = masks(parts, placed);
    let dropout = masks.as_ref().map(|masks| masks as &dyn DropoutMask);
    let tensors = locals(parts, placed, tracked)?;
    let cx = RowCx { rows: ids.some(), ..row_cx(parts, site, placed, dropout) };
    graph(placed.port, &tensors, &cx)
}

/// `y += delta(x)` on the rows of components. They know nothing of each other, so their graphs go side by side; what they give is
/// added in their order.
pub(crate) fn add_components(
    cx: &PassCx<'_>,
    site: &Site,
    placed: &[&Added<'_>],
    x_ti: MatRef<'_>,
    mut y_to: ViewMut<'_, f32>,
) -> Result<()> {
    let parts = cx.parts;
    let pieces: Vec<(&Added<'_>, Together<'_>)> =
        placed.iter().flat_map(|placed| together(cx, placed).into_iter().map(move |piece| (*placed, piece))).collect();
    let delta = |(placed, Together { rows, ids }): &(&Added<'_>, Together<'_>)| {
        let x = tensor(x_ti.sub_rows(rows.start, rows.end))?;
        with_tensors(parts, site, placed, ids, &[], |map, tensors, cx| map.graph(&x, tensors, cx))
    };
    let deltas: Vec<Result<Tensor>> = pieces.par_iter().map(delta).collect();
    for ((_, Together { rows, .. }), delta) in pieces.iter().zip(deltas) {
        write(&delta?, y_to.reborrow().into_sub_rows(rows.start, rows.end), true)?;
    }
    Ok(())
}

/// Rows that a component sees at once, and their numbers in the part's layout.
pub(crate) struct Together<'i> {
    pub(crate) rows: Range<usize>,
    pub(crate) ids: Ids<'i>,
}

/// The rows that a component sees at once: all of its own. Where texts go on, which drops nothing, it sees one document after
/// the other: a graph's bits may depend on all rows that it is given, and a text's shall not on those beside it.
pub(crate) fn together<'i, P>(cx: &PassCx<'_>, placed: &'i Placed<'_, P>) -> Vec<Together<'i>> {
    if cx.kept.is_none() || placed.rows.is_empty() {
        let ids = placed.ids.some().map_or(Ids::All, Ids::Borrowed);
        return vec![Together { rows: placed.rows.clone(), ids }];
    }
    let start = cx.rows[placed.part].start;
    let id = |at: usize| placed.ids.some().map_or(at as u32, |ids| ids[at]);
    let doc = |at: usize| cx.docs.partition_point(|doc| doc.end <= start + id(at) as usize);
    let docs: Vec<usize> = (0..placed.rows.len()).map(doc).collect();
    let mut end = 0;
    let of_doc = |docs: &[usize]| {
        let at = end..end + docs.len();
        end = at.end;
        let rows = placed.rows.start + at.start..placed.rows.start + at.end;
        Together { rows, ids: Ids::Some(at.map(id).collect()) }
    };
    docs.chunk_by(|a, b| a == b).map(of_doc).collect()
}

/// Gradients by the tensors of components, and by the rows that they read.
pub(crate) type Back = (Vec<(TensorId, Option<Tensor>)>, Option<Tensor>);

/// The reverse of [`add_components`].
pub(crate) fn components_vjp(
    cx: &PassCx<'_>,
    site: &Site,
    placed: &[&Added<'_>],
    x_ti: MatRef<'_>,
    dy_to: MatRef<'_>,
    mut dx_ti: Option<ViewMut<'_, f32>>,
    sinks: &mut Sinks<'_>,
) -> Result<()> {
    let (parts, beside) = (cx.parts, &cx.beside);
    let asked: Vec<(&Added<'_>, Vec<TensorId>)> =
        placed.iter().map(|placed| (*placed, wanted_of(placed, sinks))).collect();
    let back = |(placed, wanted): &(&Added<'_>, Vec<TensorId>)| -> Result<Back> {
        let rows = &placed.rows;
        let leaves = leaves_for(&parts[placed.part], wanted)?;
        let x = autograd::leaf(&tensor(x_ti.sub_rows(rows.start, rows.end))?)?;
        let masks = masks(parts, placed);
        let dropout = masks.as_ref().map(|masks| masks as &dyn DropoutMask);
        let (tensors, of_rows) = (locals(parts, placed, &leaves)?, row_cx(parts, site, placed, dropout));
        let delta = placed.port.graph(&x, &tensors, &of_rows)?;
        let dy = tensor(dy_to.sub_rows(rows.start, rows.end))?;
        let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&x]).collect();
        // The rows of a head come in chunks: no component sees enough of them there.
        let loss = if site.layer.is_some() { placed.port.loss(&x, &tensors, &of_rows)? } else { None };
        let weight = Tensor::new(beside[placed.part] as f32, &Device::Cpu)?;
        let outputs: Vec<(&Tensor, &Tensor)> =
            [(&delta, &dy)].into_iter().chain(loss.iter().map(|loss| (loss, &weight))).collect();
        let mut gradients = autograd::pull(&all, &outputs)?;
        let dx = gradients.pop().flatten();
        Ok((leaves.into_iter().map(|(id, _)| id).zip(gradients).collect(), dx))
    };
    let found: Vec<Result<Back>> = asked.par_iter().map(back).collect();
    for ((placed, _), found) in asked.iter().zip(found) {
        put_back(placed, found?, dx_ti.as_mut().map(ViewMut::reborrow), sinks)?;
    }
    Ok(())
}

/// Puts the gradients of a component where they belong: those by its tensors into its part's sink, and the one by what it read to `dx`.
pub(crate) fn put_back<P>(
    placed: &Placed<'_, P>,
    (gradients, dx): Back,
    dx_ti: Option<ViewMut<'_, f32>>,
    sinks: &mut Sinks<'_>,
) -> Result<()> {
    for (id, gradient) in gradients {
        gradient.map(|gradient| regions::put(&mut *sinks[placed.part], &id, &gradient)).transpose()?;
    }
    match (dx_ti, dx) {
        (Some(to), Some(dx)) => write(&dx, to.into_sub_rows(placed.rows.start, placed.rows.end), true),
        _ => Ok(()),
    }
}

/// What the graph of a block sees of one part.
fn graph_cx<'g, 'a: 'g>(cx: &'g PassCx<'a>, part: usize, plan: &'g RowPlan, tracked: &'g Tracked) -> GraphCx<'g> {
    let (part, alone) = (&cx.parts[part], alone::of(&cx.alone, part));
    GraphCx {
        base: cx.base,
        stack: part.stack,
        theta: part.theta,
        layout: part.layout,
        plan,
        dropout: part.dropout,
        rows: None,
        tracked,
        heard: None,
        alone,
        dtype: DType::F32,
    }
}

/// The rows of a part in each stream, as tensors.
fn streams(x: &[Rows<f32>], rows: &Range<usize>) -> Result<Vec<Tensor>> {
    x.iter().map(|x| tensor(x.view().sub_rows(rows.start, rows.end).into())).collect()
}

/// The graph of a block.
type Graph<'g> = dyn Fn(&[Tensor], &GraphCx<'_>) -> Result<Vec<Tensor>> + 'g;

/// A block's output by its graph.
pub(crate) fn block(graph: &Graph<'_>, x: &[Rows<f32>], cx: &PassCx<'_>) -> Result<Vec<Rows<f32>>> {
    let none = Tracked::new();
    let mut y: Vec<Rows<f32>> = Vec::new();
    for (part, rows) in cx.parts_of(Given::All) {
        let plan = cx.parts[part].plan(cx.architecture(), DType::F32)?;
        let made = graph(&streams(x, &rows)?, &graph_cx(cx, part, &plan, &none))?;
        if y.is_empty() {
            for made in &made {
                y.push(cx.arena.rows(cx.n_rows(), made.dim(1)?));
            }
        }
        for (y, made) in y.iter_mut().zip(&made) {
            write(made, y.view_mut().into_sub_rows(rows.start, rows.end), false)?;
        }
    }
    Ok(y)
}

/// The reverse of [`block`]: the gradients by its inputs, if they are asked for.
pub(crate) fn block_vjp(
    graph: &Graph<'_>,
    sites: &[Site],
    x: &[Rows<f32>],
    dy: &[Rows<f32>],
    below: bool,
    cx: &PassCx<'_>,
    sinks: &mut Sinks<'_>,
) -> Result<Vec<Rows<f32>>> {
    let mut dx: Vec<Rows<f32>> =
        if below { x.iter().map(|x| cx.arena.rows(x.n_rows(), x.n_cols())).collect() } else { Vec::new() };
    for (part, rows) in cx.parts_of(Given::All) {
        let plan = cx.parts[part].plan(cx.architecture(), DType::F32)?;
        let wanted = wanted(cx.base, &cx.parts[part], sites, &*sinks[part]);
        let mut leaves = Vec::with_capacity(wanted.len());
        for id in wanted {
            let var = match cx.parts[part].theta.get(&id) {
                Some(tensor) => autograd::leaf(tensor)?,
                None => autograd::leaf(&cx.base.tensor(&id.name, DType::F32)?)?,
            };
            leaves.push((id, var));
        }
        let tracked: Tracked = leaves.iter().cloned().collect();
        let inputs = streams(x, &rows)?;
        let x: Vec<Var> =
            if below { inputs.iter().map(autograd::leaf).collect::<candle_core::Result<_>>()? } else { Vec::new() };
        let inputs = if below { x.iter().map(|x| x.as_tensor().clone()).collect() } else { inputs };
        let y = graph(&inputs, &graph_cx(cx, part, &plan, &tracked))?;
        let dy = streams(dy, &rows)?;
        let outputs: Vec<(&Tensor, &Tensor)> = y.iter().zip(&dy).collect();
        let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain(&x).collect();
        let mut gradients = autograd::pull(&all, &outputs)?.into_iter();
        for ((id, var), gradient) in leaves.iter().zip(gradients.by_ref()) {
            let of_expert = || sites.iter().any(|site| site.expert.is_some() && site.id.as_str() == id.name.owner());
            match gradient {
                Some(gradient) => regions::put(&mut *sinks[part], id, &gradient)?,
                // No row went to this expert: the loss does not depend on it.
                None if of_expert() => regions::put(&mut *sinks[part], id, &var.zeros_like()?)?,
                None => {}
            }
        }
        for ((gradient, x), dx) in gradients.zip(&x).zip(&mut dx) {
            let gradient = gradient.map_or_else(|| x.zeros_like(), Ok)?;
            write(&gradient, dx.view_mut().into_sub_rows(rows.start, rows.end), false)?;
        }
    }
    Ok(dx)
}
