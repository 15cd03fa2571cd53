//! Rows that components put before documents, in the place of embeddings of tokens.
//!
//! They are in the layout, so that everything above the embedding knows no difference. Axes: T rows, P rows before, D hidden.

use std::ops::Range;

use attune_architecture::Site;
use attune_points::adapter::{Port, SequenceMap};
use attune_points::{BankKind, Binding, Doc, Error, Layout, Result, Row, Rows as Bound, TensorId, Theta};
use attune_tensor::autograd;
use attune_tensor::view::{View, ViewMut};
use candle_core::{Device, Tensor, Var};

use crate::pass::local;
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::regions;
use crate::stack::Stack;

type Sequence<'a> = Placed<'a, &'a dyn SequenceMap>;

/// The components with rows before documents, by their bindings, and how many rows each has.
fn sequences<'t>(stack: &Stack, theta: &'t Theta) -> Vec<(&'t Binding, u32)> {
    let length = |binding: &Binding| {
        theta.banks.get(binding.slot as usize).filter(|bank| bank.kind == BankKind::Adapter)?;
        let slot = stack.slot(binding.slot)?;
        slot.attachments().find_map(|at| match slot.adapter().port(at) {
            Port::Sequence(map) => Some(map.length() as u32),
            _ => None,
        })
    };
    theta.bindings.iter().filter_map(|binding| Some((binding, length(binding)?))).collect()
}

/// The rows that components put before a document of which `is_bound` says whether a binding's rows are its own.
fn planned(sequences: &[(&Binding, u32)], is_bound: impl Fn(&Bound) -> bool) -> Vec<Row> {
    let bound = sequences.iter().filter(|(binding, _)| is_bound(&binding.rows));
    bound.flat_map(|(binding, length)| (0..*length).map(|index| Row::Virtual { slot: binding.slot, index })).collect()
}

/// The rows that components put before a document, by the number of its first row in the layout.
pub(crate) fn before_doc(stack: &Stack, theta: &Theta, layout: &Layout, first: u32) -> Vec<Row> {
    let doc = layout.docs().iter().find(|doc| doc.rows.start == first);
    planned(&sequences(stack, theta), |rows| doc.is_some_and(|doc| is_bound(rows, doc)))
}

/// Whether a binding's rows are those of a document.
fn is_bound(rows: &Bound, doc: &Doc) -> bool {
    match rows {
        Bound::All(_) => true,
        Bound::Segments(segments) => segments.iter().any(|(rows, _)| rows.contains(&doc.rows.start)),
        Bound::Domains(domains) => domains.iter().any(|(domain, _)| *domain == doc.domain),
    }
}

/// The rows that components put before every document, whatever the layout.
pub(crate) fn before_all(stack: &Stack, theta: &Theta) -> Vec<Row> {
    planned(&sequences(stack, theta), |rows| matches!(rows, Bound::All(_)))
}

/// Whether each document begins with the rows that components put before it, and has no other such rows; one that `goes_on`
/// began in an earlier pass.
///
/// # Errors
/// [`Error::Refused`] for a layout that was packed for other components.
pub(crate) fn check(stack: &Stack, theta: &Theta, layout: &Layout, goes_on: impl Fn(usize) -> bool) -> Result<()> {
    let sequences = sequences(stack, theta);
    for (at, doc) in layout.docs().iter().enumerate().filter(|(_, doc)| doc.n_rows() > 0) {
        let is_bound = |rows: &Bound| is_bound(rows, doc);
        let before = if goes_on(at) { Vec::new() } else { planned(&sequences, is_bound) };
        let rows = &layout.rows()[doc.rows.start as usize..doc.rows.end as usize];
        let own = rows.strip_prefix(before.as_slice());
        if own.is_none_or(|own| own.iter().any(|row| matches!(row, Row::Virtual { .. }))) {
            return Err(Error::Refused(format!(
                "a document begins with other rows than the {} that components put before it: it was packed for others",
                before.len()
            )));
        }
    }
    Ok(())
}

impl<'a> PassCx<'a> {
    /// The components of a part that put rows before its documents.
    fn sequences(&self, part: usize, tokens: &Site) -> Vec<Sequence<'a>> {
        let placed = self.placed(&tokens.id, Given::All).into_iter().filter(|placed| placed.part == part);
        let sequences = placed.filter_map(|placed| match placed.port {
            Port::Sequence(map) => Some(placed.with(map)),
            _ => None,
        });
        sequences.collect()
    }

    /// The rows of a component among those of its part, each with its number.
    fn begun(&self, placed: &Sequence<'_>) -> Vec<(usize, usize)> {
        let Range { start, end } = placed.rows;
        let first = self.rows[placed.part].start;
        let of_row = |row: usize| match self.parts[placed.part].layout.rows()[row] {
            Row::Virtual { slot, index } if slot == placed.slot => Some((row, index as usize)),
            _ => None,
        };
        (start - first..end - first).filter_map(of_row).collect()
    }

    /// Writes the rows that components put before the documents of a part into `x_td`, its rows.
    ///
    /// # Errors
    /// A layout without them, or with others; whatever a component raises.
    pub(crate) fn begin(&self, part: usize, tokens: &Site, mut x_td: ViewMut<'_, f32>) -> Result<()> {
        let of = &self.parts[part];
        check(of.stack, of.theta, of.layout, |doc| self.goes_on(doc))?;
        for placed in self.sequences(part, tokens) {
            let begun = self.begun(&placed);
            if begun.is_empty() {
                continue;
            }
            let rows_pd = placed.port.graph(&local::locals(self.parts, &placed, &[])?)?;
            let mut room = self.arena.rows(placed.port.length(), x_td.cols());
            local::write(&rows_pd, room.view_mut(), false)?;
            for (row, index) in begun {
                x_td.row(row).copy_from_slice(room.view().row(index));
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::begin`], from the gradient by the rows of the part: that by one of its rows is the sum over
    /// documents, in their order.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn begin_vjp(
        &self,
        part: usize,
        tokens: &Site,
        dx_td: View<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        for placed in self.sequences(part, tokens) {
            let leaves: Vec<(TensorId, Var)> = local::leaves(self.parts, &placed, sinks)?;
            let begun = self.begun(&placed);
            if leaves.is_empty() || begun.is_empty() {
                continue;
            }
            let (length, width) = (placed.port.length(), dx_td.cols());
            let mut sums = vec![0.0f32; length * width];
            for (row, index) in begun {
                let to = &mut sums[index * width..][..width];
                to.iter_mut().zip(dx_td.row(row)).for_each(|(sum, dx)| *sum += dx);
            }
            let rows_pd = placed.port.graph(&local::locals(self.parts, &placed, &leaves)?)?;
            let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).collect();
            let sums_pd = Tensor::from_vec(sums, (length, width), &Device::Cpu)?;
            let gradients = autograd::pull(&all, &[(&rows_pd, &sums_pd)])?;
            for ((id, _), gradient) in leaves.iter().zip(gradients) {
                gradient.map(|gradient| regions::put(&mut *sinks[part], id, &gradient)).transpose()?;
            }
        }
        Ok(())
    }
}
