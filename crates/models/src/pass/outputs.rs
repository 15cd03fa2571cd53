//! What a forward pass gives beside losses: logits, vectors of documents, hidden rows, routing, and what may follow a text.

use attune_architecture::{Place, PooledRow, Pooling};
use attune_points::Result;
use candle_core::{Device, Tensor};

use crate::cache::Cache;
use crate::head::{self as graphs, Head};
use crate::pass::arena::Rows;
use crate::pass::parts::{Given, Part, PassCx};
use crate::pass::walk::{Machine, Run, up};
use crate::pass::{head, local};
use crate::routing::Routing;

/// A forward walk over a part, and `top` on its rows.
fn forward<T>(
    machine: &Machine<'_>,
    part: Part<'_>,
    top: impl FnOnce(&Rows<f32>, &PassCx<'_>) -> Result<T>,
) -> Result<T> {
    let parts = [part];
    let cx = PassCx::over(machine, &parts)?;
    let h_td = up(machine.trunk, &cx, |_, block, x| block.forward(x, &cx, Run::Output), |_| Ok(()))?;
    top(&h_td, &cx)
}

/// Logits of rows `ids` of a part, `[C, V]` or `[C, classes]`: the rows of one chunk at a time go through the head.
pub(crate) fn logits(machine: &Machine<'_>, part: Part<'_>, ids: &[u32]) -> Result<Tensor> {
    machine.head.last(machine.base.architecture())?;
    forward(machine, part, |h_td, cx| {
        let width = cx.architecture().logits_width();
        let mut all = Vec::with_capacity(ids.len() * width);
        for ids in ids.chunks(cx.architecture().logits_rows()) {
            all.extend_from_slice(head::logits(machine.head, h_td, 0, ids, cx)?.values());
        }
        Ok(Tensor::from_vec(all, (ids.len(), width), &Device::Cpu)?)
    })
}

/// A vector per document of a part, `[N, D]`.
pub(crate) fn embed(machine: &Machine<'_>, part: Part<'_>, pooling: Pooling) -> Result<Tensor> {
    forward(machine, part, |h_td, cx| graphs::pool(&normed(machine.head, h_td, Given::All, cx)?, part.layout, pooling))
}

/// Hidden rows after the last norm, in 32 bits whatever the type of the activations: they are an output.
pub(crate) fn normed(head: &Head, h_td: &Rows<f32>, given: Given<'_>, cx: &PassCx<'_>) -> Result<Tensor> {
    match head.at(Place::FinalNorm) {
        Some(norm) => local::tensor(cx.norm_rows(norm, h_td, given)?.view().into()),
        None => local::tensor(h_td.view().into()),
    }
}

/// Hidden rows before each block above the first, and after the last.
pub(crate) fn hidden(machine: &Machine<'_>, part: Part<'_>) -> Result<Vec<Tensor>> {
    let (parts, mut hidden) = ([part], Vec::new());
    let cx = PassCx::over(machine, &parts)?;
    let last = up(
        machine.trunk,
        &cx,
        |_, block, x| block.forward(x, &cx, Run::Output),
        |passed| {
            let streams = passed.input.iter().map(|x| local::tensor(x.view().into()));
            hidden.extend(streams.collect::<Result<Vec<_>>>()?);
            Ok(())
        },
    )?;
    hidden.push(local::tensor(last.view().into())?);
    Ok(hidden)
}

/// The routing of each layer of experts.
pub(crate) fn routing(machine: &Machine<'_>, part: Part<'_>) -> Result<Vec<Routing>> {
    let Some(experts) = machine.base.architecture().experts else { return Ok(Vec::new()) };
    let (parts, mut routing) = ([part], Vec::new());
    let cx = PassCx::over(machine, &parts)?;
    up(
        machine.trunk,
        &cx,
        |_, block, x| block.forward(x, &cx, Run::Output),
        |passed| {
            let of_layer = passed.routed.and_then(|routed| routed.of(&cx.rows[0], experts));
            routing.extend(of_layer.transpose()?);
            Ok(())
        },
    )?;
    Ok(routing)
}

/// The logits after the last row of each document of a part, `[N, V]`. The documents are the next rows of those that `cache`
/// knows by the numbers `of`, and it has room for them; each has a row at least.
pub(crate) fn decode(machine: &Machine<'_>, part: Part<'_>, of: &[usize], cache: &mut Cache) -> Result<Rows<f32>> {
    let lengths = part.layout.docs().iter().map(attune_points::Doc::n_rows);
    let new: Vec<(usize, usize)> = of.iter().copied().zip(lengths).collect();
    let parts = [part];
    let mut cx = PassCx::new(machine.base, &parts, Some(cache.extend(&new)), machine.arena);
    if let Some(alone) = cache.alone() {
        cx.go_on_alone(machine, &part, &new, alone)?;
    }
    let cx = cx;
    let blocks = cache.blocks();
    let h_td =
        up(machine.trunk, &cx, |index, block, x| Ok((block.decode(x, &mut blocks[index], &cx)?, None)), |_| Ok(()))?;
    head::logits(machine.head, &h_td, 0, &graphs::rows(part.layout, PooledRow::Last)?, &cx)
}
