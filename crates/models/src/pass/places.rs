//! Rows that components add to those of documents by their places: to embeddings, or to the stream where it enters an attention.
//!
//! Axes: T rows, P rows added, D hidden.

use attune_architecture::{Site, SiteId};
use attune_points::adapter::{PlacesMap, Port};
use attune_points::{Result, Row, TensorId};
use attune_tensor::view::{View, ViewMut};
use candle_core::{Device, Tensor, Var};

use crate::pass::arena::Rows;
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::pass::{local, sequence};

type Added<'a> = Placed<'a, &'a dyn PlacesMap>;

/// The places of some rows of a document for the component of a slot, from `first` on; rows of other components have none.
pub(crate) fn of_rows(rows: &[Row], slot: u16, first: usize) -> impl Iterator<Item = Option<usize>> {
    let mut next = first;
    rows.iter().map(move |row| match row {
        Row::Virtual { slot: other, .. } if *other != slot => None,
        _ => {
            next += 1;
            Some(next - 1)
        }
    })
}

impl<'a> PassCx<'a> {
    /// The components that add to rows at `site`.
    fn adding(&self, site: &SiteId) -> Vec<Added<'a>> {
        let placed = self.placed(site, Given::All).into_iter();
        let adding = placed.filter_map(|placed| match placed.port {
            Port::Places(map) => Some(placed.with(map)),
            _ => None,
        });
        adding.collect()
    }

    /// The rows of the pass that a component adds to, each with the number of the row that is added.
    fn reached(&self, placed: &Added<'_>) -> Vec<(usize, usize)> {
        let (part, of) = (&self.rows[placed.part], &self.parts[placed.part]);
        let (start, count) = placed.port.places();
        let mut reached = Vec::new();
        for (number, doc) in
            self.docs.iter().enumerate().filter(|(_, doc)| part.start <= doc.start && doc.end <= part.end)
        {
            if !placed.rows.contains(&doc.start) {
                continue;
            }
            let rows = &of.layout.rows()[doc.start - part.start..doc.end - part.start];
            // Of the rows that went through before, those of other components have no place.
            let first = match self.before(number) {
                0 => 0,
                before => {
                    let others = sequence::before_doc(of.stack, of.theta, of.layout, (doc.start - part.start) as u32);
                    let others =
                        others.iter().filter(|row| matches!(row, Row::Virtual { slot, .. } if *slot != placed.slot));
                    before - others.count()
                }
            };
            for (row, place) in doc.clone().zip(of_rows(rows, placed.slot, first)) {
                let index = place.and_then(|place| place.checked_sub(start)).filter(|index| *index < count);
                reached.extend(index.map(|index| (row, index)));
            }
        }
        reached
    }

    /// The stream with what components add where it enters a block; none where they add nothing.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn enter(&self, block: &Site, x_td: &Rows<f32>) -> Result<Option<Rows<f32>>> {
        if self.adding(&block.id).is_empty() {
            return Ok(None);
        }
        let mut entered = self.arena.rows(x_td.n_rows(), x_td.n_cols());
        self.kernels.convert(x_td.view().into(), entered.view_mut().into());
        self.add_places(block, entered.view_mut())?;
        Ok(Some(entered))
    }

    /// Adds to `x_td`, the rows of the pass, what components add to them at `site`.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn add_places(&self, site: &Site, mut x_td: ViewMut<'_, f32>) -> Result<()> {
        for placed in self.adding(&site.id) {
            let reached = self.reached(&placed);
            if reached.is_empty() {
                continue;
            }
            let rows_pd = placed.port.graph(&local::locals(self.parts, &placed, &[])?)?;
            let mut room = self.arena.rows(placed.port.places().1, x_td.cols());
            local::write(&rows_pd, room.view_mut(), false)?;
            for (row, index) in reached {
                x_td.row(row).iter_mut().zip(room.view().row(index)).for_each(|(x, by)| *x += by);
            }
        }
        Ok(())
    }

    /// Whether anybody wants the gradient of what is added at `site`.
    pub(crate) fn wants_places(&self, site: &Site, sinks: &Sinks<'_>) -> bool {
        self.adding(&site.id).iter().any(|placed| !local::wanted_of(placed, sinks).is_empty())
    }

    /// The reverse of [`PassCx::add_places`], from the gradient by the rows of the pass, which is that by what they were before: the
    /// one by a row that is added is the sum over documents, in their order.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn places_vjp(&self, site: &Site, dx_td: View<'_, f32>, sinks: &mut Sinks<'_>) -> Result<()> {
        for placed in self.adding(&site.id) {
            let leaves: Vec<(TensorId, Var)> = local::leaves(self.parts, &placed, sinks)?;
            let reached = self.reached(&placed);
            if leaves.is_empty() || reached.is_empty() {
                continue;
            }
            let (count, width) = (placed.port.places().1, dx_td.cols());
            let mut sums = vec![0.0f32; count * width];
            for (row, index) in reached {
                let to = &mut sums[index * width..][..width];
                to.iter_mut().zip(dx_td.row(row)).for_each(|(sum, dx)| *sum += dx);
            }
            let rows_pd = placed.port.graph(&local::locals(self.parts, &placed, &leaves)?)?;
            let sums_pd = Tensor::from_vec(sums, (count, width), &Device::Cpu)?;
            local::pull(&rows_pd, &sums_pd, &leaves, &mut *sinks[placed.part])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_others_take_no_place() {
        let rows = [(1, 0), (0, 0), (0, 1), (2, 0)].map(|(slot, index)| Row::Virtual { slot, index });
        let rows = [&rows[..], &[Row::Token(5), Row::Token(6)]].concat();
        let places = |slot, first| of_rows(&rows, slot, first).collect::<Vec<_>>();
        assert_eq!(places(0, 0), [None, Some(0), Some(1), None, Some(2), Some(3)]);
        assert_eq!(places(7, 4), [None, None, None, None, Some(4), Some(5)]);
    }
}
