//! What the base gives by itself, in a pass of its own before one in which components read it.
//!
//! Its rows are those behind the last norm, `[T, D]` for each part, in 32 bits. Gradients end there.

use attune_points::adapter::{BlendMap, Port};
use attune_points::{BankKind, Error, Layout, Result, Row, Theta};
use candle_core::{Device, Tensor};

use crate::block::Block;
use crate::cache::Cache;
use crate::pass::arena::Rows;
use crate::pass::outputs;
use crate::pass::parts::{Given, Part, PassCx};
use crate::pass::times::Meter;
use crate::pass::walk::{Machine, Run, up};
use crate::stack::Stack;

/// Whether a component that rows are bound to reads what the base gives by itself.
pub(crate) fn is_read(stack: &Stack, theta: &Theta) -> bool {
    theta.bindings.iter().any(|binding| {
        let bank = theta.banks.get(usize::from(binding.slot)).filter(|bank| bank.kind == BankKind::Adapter);
        bank.and_then(|_| stack.slot(binding.slot)).is_some_and(|slot| {
            let mut ports = slot.attachments().map(|at| slot.adapter().port(at));
            ports.any(|port| matches!(port, Port::Blend(map) if map.reads_base()))
        })
    })
}

/// What there is of a part.
pub(crate) fn of(alone: &[Option<Tensor>], part: usize) -> Option<&Tensor> {
    alone.get(part).and_then(Option::as_ref)
}

/// The rows at hand of what there is of all of them, for a component that reads them.
pub(crate) fn read(by: &dyn BlendMap, alone: Option<&Tensor>, ids: Option<&[u32]>) -> Result<Option<Tensor>> {
    let Some(all_td) = alone.filter(|_| by.reads_base()) else { return Ok(None) };
    Ok(Some(match ids {
        None => all_td.clone(),
        Some(ids) => all_td.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?,
    }))
}

/// Whether the base by itself can read a batch.
///
/// # Errors
/// [`Error::Refused`] for rows that components put before documents.
pub(crate) fn check(layout: &Layout) -> Result<()> {
    if layout.rows().iter().any(|row| matches!(row, Row::Virtual { .. })) {
        let message = "a component reads what the base gives by itself, beside one that puts rows before documents, \
                       which the base by itself has not: expected one of both";
        return Err(Error::Refused(message.to_owned()));
    }
    Ok(())
}

impl<'a> PassCx<'a> {
    /// What the blocks see of a pass over whole documents, with what the base gives by itself on the rows of parts that read it.
    ///
    /// # Errors
    /// Whatever the pass of the base raises.
    pub(crate) fn over(machine: &Machine<'a>, parts: &'a [Part<'a>]) -> Result<Self> {
        let mut cx = Self::new(machine.base, parts, None, machine.arena);
        let reading: Vec<usize> =
            (0..parts.len()).filter(|part| is_read(parts[*part].stack, parts[*part].theta)).collect();
        if reading.is_empty() {
            return Ok(cx);
        }
        let thetas: Vec<Theta> = reading.iter().map(|part| parts[*part].theta.adapters_off()).collect();
        let bare = reading.iter().zip(&thetas).map(|(part, theta)| bare(&parts[*part], theta));
        let bare = bare.collect::<Result<Vec<_>>>()?;
        let own = PassCx::new(machine.base, &bare, None, machine.arena);
        let h_td = up(machine.trunk, &own, |_, block, x| block.forward(x, &own, Run::Output), |_| Ok(()))?;
        let all_td = outputs::normed(machine.head, &h_td, Given::All, &own)?;
        cx.alone = vec![None; parts.len()];
        for (part, rows) in reading.into_iter().zip(&own.rows) {
            cx.alone[part] = Some(all_td.narrow(0, rows.start, rows.len())?.contiguous()?);
        }
        cx.meter = Meter::from(own.meter.times());
        Ok(cx)
    }

    /// What the base gives by itself on the rows of a part that follow those in a cache of its own, for a pass over the same rows.
    ///
    /// # Errors
    /// Whatever the pass of the base raises.
    pub(crate) fn go_on_alone(
        &mut self,
        machine: &Machine<'_>,
        part: &Part<'_>,
        new: &[(usize, usize)],
        cache: &mut Cache,
    ) -> Result<()> {
        let theta = part.theta.adapters_off();
        let bare = [bare(part, &theta)?];
        let own = PassCx::new(machine.base, &bare, Some(cache.extend(new)), machine.arena);
        let blocks = cache.blocks();
        let step = |index: usize, block: &dyn Block, x: &[Rows<f32>]| -> Result<_> {
            Ok((block.decode(x, &mut blocks[index], &own)?, None))
        };
        let h_td = up(machine.trunk, &own, step, |_| Ok(()))?;
        self.alone = vec![Some(outputs::normed(machine.head, &h_td, Given::All, &own)?)];
        Ok(())
    }
}

/// A part without its components.
fn bare<'p>(part: &Part<'p>, theta: &'p Theta) -> Result<Part<'p>> {
    check(part.layout)?;
    Ok(Part { theta, dropout: None, ..*part })
}
