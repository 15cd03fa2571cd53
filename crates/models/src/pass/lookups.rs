//! Rows that components add to the embeddings of tokens, by the tokens.
//!
//! Axes: T rows, K different tokens, D hidden.

use std::collections::BTreeMap;

use attune_architecture::{Site, SiteId};
use attune_points::adapter::{LookupMap, Port};
use attune_points::{Error, Locals, Result, Row, TensorId};
use attune_tensor::view::{View, ViewMut};
use candle_core::{Device, Tensor, Var};

use crate::pass::local;
use crate::pass::parts::{Given, PassCx, Placed, Sinks};

type Added<'a> = Placed<'a, &'a dyn LookupMap>;

/// The different tokens of some rows in the order in which they first come, and each row that is one, by its number, with the place
/// of its token among them.
pub(crate) fn tokens<'r>(rows: impl Iterator<Item = (usize, &'r Row)>) -> (Vec<u32>, Vec<(usize, usize)>) {
    let (mut places, mut all, mut of_rows) = (BTreeMap::new(), Vec::new(), Vec::new());
    for (number, row) in rows {
        let Row::Token(token) = row else { continue };
        let place = *places.entry(*token).or_insert_with(|| {
            all.push(*token);
            all.len() - 1
        });
        of_rows.push((number, place));
    }
    (all, of_rows)
}

/// What a component adds to the embeddings of some tokens.
///
/// # Errors
/// Whatever it raises; rows that are not these tokens'.
pub(crate) fn rows_of(map: &dyn LookupMap, tokens: &[u32], width: usize, tensors: &Locals) -> Result<Tensor> {
    let rows_kd = map.of_tokens(&Tensor::new(tokens, &Device::Cpu)?, tensors)?;
    if rows_kd.dims() != [tokens.len(), width] {
        let message =
            format!("a component made {:?} for {} tokens; expected rows of {width}", rows_kd.shape(), tokens.len());
        return Err(Error::Refused(message));
    }
    Ok(rows_kd)
}

impl<'a> PassCx<'a> {
    /// The components that add to embeddings at `site`.
    fn looking(&self, site: &SiteId) -> Vec<Added<'a>> {
        let placed = self.placed(site, Given::All).into_iter();
        let adding = placed.filter_map(|placed| match placed.port {
            Port::Lookup(map) => Some(placed.with(map)),
            _ => None,
        });
        adding.collect()
    }

    /// The tokens of a component's rows; see [`tokens`].
    fn tokens_of(&self, placed: &Added<'_>) -> (Vec<u32>, Vec<(usize, usize)>) {
        let first = self.rows[placed.part].start;
        let rows = self.parts[placed.part].layout.rows();
        tokens(placed.rows.clone().map(|row| (row, &rows[row - first])))
    }

    /// Adds to `x_td`, the embeddings of all rows of the pass, what components add to those of tokens.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn add_lookups(&self, site: &Site, mut x_td: ViewMut<'_, f32>) -> Result<()> {
        for placed in self.looking(&site.id) {
            let (tokens, of_rows) = self.tokens_of(&placed);
            if tokens.is_empty() {
                continue;
            }
            let rows_kd = rows_of(placed.port, &tokens, x_td.cols(), &local::locals(self.parts, &placed, &[])?)?;
            let mut room = self.arena.rows(tokens.len(), x_td.cols());
            local::write(&rows_kd, room.view_mut(), false)?;
            for (row, place) in of_rows {
                x_td.row(row).iter_mut().zip(room.view().row(place)).for_each(|(x, by)| *x += by);
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::add_lookups`], from the gradient by the embeddings: that by a token's row is the sum over its
    /// rows, in their order.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn lookups_vjp(&self, site: &Site, dx_td: View<'_, f32>, sinks: &mut Sinks<'_>) -> Result<()> {
        for placed in self.looking(&site.id) {
            let leaves: Vec<(TensorId, Var)> = local::leaves(self.parts, &placed, sinks)?;
            let (tokens, of_rows) = self.tokens_of(&placed);
            if leaves.is_empty() || tokens.is_empty() {
                continue;
            }
            let width = dx_td.cols();
            let mut sums = vec![0.0f32; tokens.len() * width];
            for (row, place) in of_rows {
                let to = &mut sums[place * width..][..width];
                to.iter_mut().zip(dx_td.row(row)).for_each(|(sum, dx)| *sum += dx);
            }
            let rows_kd = rows_of(placed.port, &tokens, width, &local::locals(self.parts, &placed, &leaves)?)?;
            let sums_kd = Tensor::from_vec(sums, (tokens.len(), width), &Device::Cpu)?;
            local::pull(&rows_kd, &sums_kd, &leaves, &mut *sinks[placed.part])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_has_one_row_and_rows_that_are_none_have_no_place() {
        let rows = [Row::Token(7), Row::Virtual { slot: 0, index: 0 }, Row::Token(2), Row::Token(7)];
        let (all, of_rows) = tokens(rows.iter().enumerate().map(|(at, row)| (at + 10, row)));
        assert_eq!(all, [7, 2]);
        assert_eq!(of_rows, [(10, 0), (12, 1), (13, 0)]);
    }
}
