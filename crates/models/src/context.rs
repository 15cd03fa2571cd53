//! What a block's graph sees: its weights, whichever set holds them, and the components at its sites.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use attune_architecture::{NormKind, Site, SiteId};
use attune_points::adapter::{Attachment, BlendMap, Blended, EndMap, Port, RowCx, RowMap, WeightMap};
use attune_points::error::Context as _;
use attune_points::{BankKind, Binding, Error, Layout, Locals, Owner, Result, Row, Rows, TensorId, Theta};
use attune_tensor::{FrozenWeight, frozen, ops};
use candle_core::{DType, Device, Tensor, Var};

use crate::attention::RowPlan;
use crate::base::Base;
use crate::dropout::{Dropout, RowMasks};
use crate::pass::{alone, lookups, places, sequence};
use crate::stack::{self, Stack};

/// Tensors whose gradient is asked for in the pass at hand, as leaves of the local graph.
pub(crate) type Tracked = BTreeMap<TensorId, Var>;

/// A block's view of a pass.
pub struct GraphCx<'a> {
    pub(crate) base: &'a Base,
    pub(crate) stack: &'a Stack,
    pub(crate) theta: &'a Theta,
    pub(crate) layout: &'a Layout,
    pub(crate) plan: &'a RowPlan,
    pub(crate) dropout: Option<Dropout>,
    /// The rows at hand, where a block sees only some (the head's chunks).
    pub(crate) rows: Option<&'a [u32]>,
    pub(crate) tracked: &'a Tracked,
    /// Where the losses of components go, if anybody wants their gradients.
    pub(crate) heard: Option<&'a RefCell<Vec<Tensor>>>,
    /// What the base gives by itself on all rows, where a component reads it.
    pub(crate) alone: Option<&'a Tensor>,
    pub(crate) dtype: DType,
}

/// A weight matrix as a graph may use it.
pub(crate) enum Matrix<'a> {
    /// It gets a gradient, or it stands in for the base's.
    Tensor(Tensor),
    /// It is the base's, and nobody wants its gradient.
    Frozen(&'a FrozenWeight),
}

impl<'a> GraphCx<'a> {
    /// The same view with other leaves, and on some rows only.
    pub(crate) fn with(&self, tracked: &'a Tracked, rows: Option<&'a [u32]>) -> Self {
        Self { tracked, rows, heard: self.heard, ..*self }
    }

    /// The trained or replaced tensor `local` of `site`; `None` if it is the base's own.
    fn own(&self, site: &SiteId, local: &str) -> Option<Tensor> {
        let name = self.base.tensor_name(site.as_str(), local);
        if let Some((id, tensor)) = self.theta.weight(&name) {
            return Some(self.tracked.get(&id).map_or_else(|| tensor.clone(), |var| var.as_tensor().clone()));
        }
        let id = TensorId { owner: Owner::Base, name };
        self.tracked.get(&id).map(|var| var.as_tensor().clone())
    }

    /// The weight of a linear or an embedding.
    pub(crate) fn matrix(&self, site: &SiteId) -> Result<Matrix<'a>> {
        match self.own(site, "weight") {
            Some(tensor) => Ok(Matrix::Tensor(tensor)),
            None => Ok(Matrix::Frozen(self.base.matrix(&self.base.tensor_name(site.as_str(), "weight"))?)),
        }
    }

    /// A vector: the scale of a norm, a bias.
    pub(crate) fn vector(&self, site: &SiteId, local: &str) -> Result<Tensor> {
        match self.own(site, local) {
            Some(tensor) => Ok(tensor),
            None => Ok(self.base.vector(&self.base.tensor_name(site.as_str(), local))?.to_dtype(self.dtype)?),
        }
    }

    /// `x_ti` through the linear operator at `site` and every component there: `y_to`.
    ///
    /// # Errors
    /// Whatever the operator or a component raises, with the site's name.
    pub fn linear(&self, site: &'a Site, x_ti: &Tensor) -> Result<Tensor> {
        let mut own_ti = x_ti.clone();
        for (binding, at, port) in self.attached(&site.id) {
            if let Port::Input(map) = port {
                own_ti = self.turned(site, (binding, at, map), own_ti)?;
            }
        }
        let mut y_to = self.columns(site, x_ti, self.product(site, &own_ti)?)?;
        for (binding, at, port) in self.attached(&site.id) {
            if let Port::Output(map) = port {
                y_to = self.turned(site, (binding, at, map), y_to)?;
            }
        }
        let attached: Vec<_> = self.attached(&site.id).collect();
        let last_blend = attached.iter().rposition(|(_, _, port)| matches!(port, Port::Blend(_)));
        // What components would add, until it is blended.
        let mut added = Vec::new();
        for (i, (binding, at, port)) in attached.into_iter().enumerate() {
            y_to = match port {
                Port::Delta(map) if last_blend > Some(i) => {
                    let none = y_to.zeros_like()?;
                    added.push(self.by_runs(site, (binding, at), x_ti, none, |x_ti, none, tensors, cx| {
                        Ok((none + map.graph(x_ti, tensors, cx)?)?)
                    })?);
                    y_to
                }
                Port::Delta(map) => self.add(site, (binding, at, map), x_ti, y_to)?,
                Port::Blend(map) => self.blend(site, (binding, at, map), x_ti, &std::mem::take(&mut added), y_to)?,
                Port::Weight(_) | Port::Input(_) | Port::Output(_) | Port::Table(_) => y_to,
                _ => {
                    let message = format!("the component at {} has a port that no linear offers", site.id);
                    return Err(Error::Refused(message));
                }
            };
        }
        Ok(y_to)
    }

    /// The rows that the component of a bank acts on.
    fn acts_on<'b>(&self, binding: &'b Binding) -> Cow<'b, Rows> {
        match self.stack.slot(binding.slot) {
            Some(slot) => slot.acts_on(&binding.rows, self.layout),
            None => binding.rows.on(self.layout),
        }
    }

    /// What is attached at `site`, in order.
    pub(crate) fn attached(&self, site: &SiteId) -> impl Iterator<Item = (&'a Binding, &'a Attachment, Port<'a>)> {
        let (theta, stack) = (self.theta, self.stack);
        theta.bindings.iter().filter_map(move |binding| {
            let bank = theta.banks.get(binding.slot as usize).filter(|bank| bank.kind == BankKind::Adapter);
            let slot = bank.and_then(|_| stack.slot(binding.slot))?;
            let at = slot.at(site)?;
            Some((binding, at, slot.adapter().port(at)))
        })
    }

    /// Rows times the weight at `site` and its bias, where it has one, or what components make of them.
    fn product(&self, site: &Site, x_ti: &Tensor) -> Result<Tensor> {
        let maps = self.attached(&site.id).filter_map(|(binding, at, port)| match port {
            Port::Weight(map) => Some((binding, at, map)),
            _ => None,
        });
        let maps: Vec<(&Binding, &Attachment, &dyn WeightMap)> = maps.collect();
        let (weight, at) = (self.matrix(&site.id)?, || format!("linear {}", site.id));
        let own_o = site.kind.bias_width().map(|_| self.vector(&site.id, "bias")).transpose()?;
        let with_bias = |y_to: Tensor, b_o: Option<&Tensor>| match b_o {
            Some(b_o) => y_to.broadcast_add(b_o).context(at),
            None => Ok(y_to),
        };
        if maps.is_empty() {
            let y_to = match weight {
                Matrix::Tensor(w_oi) => ops::linear(x_ti, &w_oi, None).context(at)?,
                Matrix::Frozen(w_oi) => frozen::linear(x_ti, w_oi).context(at)?,
            };
            return with_bias(y_to, own_o.as_ref());
        }
        let own_oi = match weight {
            Matrix::Tensor(w_oi) => w_oi,
            Matrix::Frozen(w_oi) => w_oi.rows(0..w_oi.shape().0, self.dtype)?,
        };
        let ids = self.ids(x_ti.dim(0)?);
        let bound: Vec<_> = maps.iter().map(|(binding, _, _)| self.acts_on(binding)).collect();
        // Rows that every one of the components binds alike have one weight.
        let sets: Vec<Vec<Option<u32>>> =
            (ids.iter()).map(|&id| bound.iter().map(|rows| set_of(rows, id)).collect()).collect();
        let (mut parts, mut start) = (Vec::new(), 0);
        for run in sets.chunk_by(|a, b| a == b) {
            let (mut w_oi, mut b_o) = (own_oi.clone(), own_o.clone());
            for ((binding, at, map), set) in maps.iter().zip(&run[0]) {
                if let Some(set) = set {
                    let locals = self.locals(binding.slot, *set, at)?;
                    b_o = b_o.map(|b_o| map.bias(&b_o, &w_oi, &locals)).transpose()?;
                    w_oi = map.graph(&w_oi, &locals)?;
                }
            }
            let y_to = ops::linear(&x_ti.narrow(0, start, run.len())?, &w_oi, None).context(at)?;
            parts.push(with_bias(y_to, b_o.as_ref())?);
            start += run.len();
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The numbers of the rows at hand.
    fn ids(&self, n_rows: usize) -> Vec<u32> {
        self.rows.map_or_else(|| (0..n_rows as u32).collect(), <[u32]>::to_vec)
    }

    /// The model's normalisation at `site`, over the last axis of `x`.
    ///
    /// # Errors
    /// Whatever the operation raises, with the site's name.
    pub fn norm(&self, site: &Site, x: &Tensor) -> Result<Tensor> {
        let w_d = self.vector(&site.id, "weight")?;
        let y = match self.base.architecture().norm {
            NormKind::Rms { eps } => ops::rms_norm(x, &w_d, eps),
            NormKind::Layer { eps } => ops::layer_norm(x, &w_d, &self.vector(&site.id, "bias")?, eps),
        };
        y.context(|| format!("norm {}", site.id))
    }

    /// Adds what the component of one bank contributes at `site`.
    fn add(
        &self,
        site: &Site,
        (binding, at, map): (&Binding, &Attachment, &dyn RowMap),
        x_ti: &Tensor,
        y_to: Tensor,
    ) -> Result<Tensor> {
        self.by_runs(site, (binding, at), x_ti, y_to, |x_ti, y_to, tensors, cx| {
            if let Some(heard) = self.heard {
                heard.borrow_mut().extend(map.loss(x_ti, tensors, cx)?);
            }
            Ok((y_to + map.graph(x_ti, tensors, cx)?)?)
        })
    }

    /// Adds what the component of one bank makes of `added`, what those before it would add.
    fn blend(
        &self,
        site: &Site,
        (binding, at, map): (&Binding, &Attachment, &dyn BlendMap),
        x_ti: &Tensor,
        added: &[Tensor],
        y_to: Tensor,
    ) -> Result<Tensor> {
        // Side by side with what the operator reads, so that they are cut along with it.
        let beside: Vec<&Tensor> = std::iter::once(x_ti).chain(added).collect();
        let (beside, input, output) = (Tensor::cat(&beside, 1)?, x_ti.dim(1)?, y_to.dim(1)?);
        self.by_runs(site, (binding, at), &beside, y_to, |beside, y_to, tensors, cx| {
            let cut = |start: usize, width: usize| beside.narrow(1, start, width)?.contiguous();
            let of_one = |n: usize| cut(input + n * output, output);
            let added = (0..added.len()).map(of_one).collect::<candle_core::Result<Vec<_>>>()?;
            let (x_ti, base_td) = (cut(0, input)?, alone::read(map, self.alone, cx.rows)?);
            let of = Blended { x_ti: &x_ti, added: &added, base_td: base_td.as_ref() };
            Ok((y_to + map.graph(&of, tensors, cx)?)?)
        })
    }

    /// What the component of one bank makes of the rows at one end of `site`.
    fn turned(
        &self,
        site: &Site,
        (binding, at, map): (&Binding, &Attachment, &dyn EndMap),
        rows: Tensor,
    ) -> Result<Tensor> {
        self.by_runs(site, (binding, at), &rows.clone(), rows, |_, rows, tensors, _| map.graph(&rows, tensors))
    }

    /// What components make of the rows that `block` gave, `y_td`, for those that it read, `x_td`.
    pub(crate) fn branch(&self, block: &Site, x_td: &Tensor, mut y_td: Tensor) -> Result<Tensor> {
        let attached: Vec<_> = self.attached(&block.id).collect();
        let last_mixture = attached.iter().rposition(|(_, _, port)| matches!(port, Port::Mixture(_)));
        // What branches would add, until it is mixed.
        let mut added = Vec::new();
        for (i, (binding, at, port)) in attached.into_iter().enumerate() {
            match port {
                Port::Branch(map) => {
                    let made = |x_td: &Tensor, y_td: Tensor, tensors: &Locals, cx: &RowCx<'_>| {
                        map.graph(x_td, &y_td, tensors, cx)
                    };
                    let made = self.by_runs(block, (binding, at), x_td, y_td.clone(), made)?;
                    if last_mixture > Some(i) {
                        added.push((made - &y_td)?);
                    } else {
                        y_td = made;
                    }
                }
                Port::Mixture(map) => {
                    // Side by side with what the block reads, so that they are cut along with it.
                    let width = x_td.dim(1)?;
                    let beside: Vec<&Tensor> = std::iter::once(x_td).chain(&added).collect();
                    let beside = Tensor::cat(&beside, 1)?;
                    let made = |x: &Tensor, y_td: Tensor, tensors: &Locals, cx: &RowCx<'_>| {
                        let of = |at: usize| x.narrow(1, at * width, width)?.contiguous();
                        let added = (1..=added.len()).map(of).collect::<candle_core::Result<Vec<_>>>()?;
                        map.graph(&of(0)?, &y_td, &added, tensors, cx)
                    };
                    y_td = self.by_runs(block, (binding, at), &beside, y_td, made)?;
                    added.clear();
                }
                _ => {}
            }
        }
        Ok(y_td)
    }

    /// For each document the keys and values `[P, K, W]` that components put before its own at `block`.
    pub(crate) fn keys_before(&self, block: &Site, heads: usize) -> Result<Vec<Option<(Tensor, Tensor)>>> {
        let mut before: Vec<Option<(Tensor, Tensor)>> = vec![None; self.layout.docs().len()];
        for (binding, at, port) in self.attached(&block.id) {
            let Port::Attention(map) = port else { continue };
            let rows = binding.rows.on(self.layout);
            let mut made: BTreeMap<u32, (Tensor, Tensor)> = BTreeMap::new();
            for (doc, before) in self.layout.docs().iter().zip(&mut before) {
                let Some(set) = set_of(&rows, doc.rows.start) else { continue };
                if let Entry::Vacant(entry) = made.entry(set) {
                    let (k, v) = map.graph(&self.locals(binding.slot, set, at)?)?;
                    let split = |x: Tensor| x.reshape((x.dim(0)?, heads, x.dim(1)? / heads));
                    entry.insert((split(k)?, split(v)?));
                }
                let (k, v) = &made[&set];
                *before = Some(match before.take() {
                    None => (k.clone(), v.clone()),
                    Some((all_k, all_v)) => (Tensor::cat(&[&all_k, k], 0)?, Tensor::cat(&[&all_v, v], 0)?),
                });
            }
        }
        Ok(before)
    }

    /// The embeddings `x_td` with the rows that components put before documents in their places.
    pub(crate) fn begin(&self, tokens: &Site, x_td: Tensor) -> Result<Tensor> {
        sequence::check(self.stack, self.theta, self.layout, |_| false)?;
        let mut from: Vec<u32> = (0..self.layout.n_rows() as u32).collect();
        let mut end = from.len() as u32;
        let mut made = vec![x_td];
        for (binding, at, port) in self.attached(&tokens.id) {
            let Port::Sequence(map) = port else { continue };
            let rows = binding.rows.on(self.layout);
            let mut first: BTreeMap<u32, u32> = BTreeMap::new();
            for (at_row, row) in (0..).zip(self.layout.rows()) {
                let Row::Virtual { slot, index } = *row else { continue };
                let Some(set) = set_of(&rows, at_row).filter(|_| slot == binding.slot) else { continue };
                if let Entry::Vacant(entry) = first.entry(set) {
                    made.push(map.graph(&self.locals(binding.slot, set, at)?)?);
                    entry.insert(end);
                    end += map.length() as u32;
                }
                from[at_row as usize] = first[&set] + index;
            }
        }
        match made.as_slice() {
            [x_td] => Ok(x_td.clone()),
            _ => Ok(Tensor::cat(&made, 0)?.index_select(&Tensor::new(from, &Device::Cpu)?, 0)?),
        }
    }

    /// The embeddings `x_td` with what components add to those of tokens at `site`.
    pub(crate) fn add_lookups(&self, site: &Site, mut x_td: Tensor) -> Result<Tensor> {
        for (binding, at, port) in self.attached(&site.id) {
            let Port::Lookup(map) = port else { continue };
            let bound = binding.rows.on(self.layout);
            let set_at = |row: usize| set_of(&bound, row as u32);
            let sets: BTreeSet<u32> = (0..self.layout.n_rows()).filter_map(set_at).collect();
            // Nothing, then the rows of each set's tokens.
            let (width, mut end) = (x_td.dim(1)?, 1);
            let mut made = vec![Tensor::zeros((1, width), x_td.dtype(), x_td.device())?];
            let mut from = vec![0u32; self.layout.n_rows()];
            for set in sets {
                let rows = self.layout.rows().iter().enumerate().filter(|(row, _)| set_at(*row) == Some(set));
                let (tokens, of_rows) = lookups::tokens(rows);
                if tokens.is_empty() {
                    continue;
                }
                made.push(lookups::rows_of(map, &tokens, width, &self.locals(binding.slot, set, at)?)?);
                of_rows.into_iter().for_each(|(row, place)| from[row] = end + place as u32);
                end += tokens.len() as u32;
            }
            let added_td = Tensor::cat(&made, 0)?.index_select(&Tensor::new(from, &Device::Cpu)?, 0)?;
            x_td = (x_td + added_td)?;
        }
        Ok(x_td)
    }

    /// The rows `x_td` with what components add to them by their places at `site`.
    pub(crate) fn add_places(&self, site: &Site, mut x_td: Tensor) -> Result<Tensor> {
        for (binding, at, port) in self.attached(&site.id) {
            let Port::Places(map) = port else { continue };
            let (start, count) = map.places();
            // Nothing, then the rows of each set.
            let mut made = vec![Tensor::zeros((1, x_td.dim(1)?), x_td.dtype(), x_td.device())?];
            let (mut first, mut end) = (BTreeMap::new(), 1);
            let mut from = vec![0u32; self.layout.n_rows()];
            let bound = binding.rows.on(self.layout);
            for doc in self.layout.docs() {
                let Some(set) = set_of(&bound, doc.rows.start) else { continue };
                if let Entry::Vacant(entry) = first.entry(set) {
                    made.push(map.graph(&self.locals(binding.slot, set, at)?)?);
                    entry.insert(end);
                    end += count as u32;
                }
                let rows = doc.rows.start as usize..doc.rows.end as usize;
                let of_doc = places::of_rows(&self.layout.rows()[rows.clone()], binding.slot, 0);
                for (from, place) in from[rows].iter_mut().zip(of_doc) {
                    let index = place.and_then(|place| place.checked_sub(start)).filter(|index| *index < count);
                    *from = index.map_or(0, |index| first[&set] + index as u32);
                }
            }
            let added_td = Tensor::cat(&made, 0)?.index_select(&Tensor::new(from, &Device::Cpu)?, 0)?;
            x_td = (x_td + added_td)?;
        }
        Ok(x_td)
    }

    /// Runs a component on the rows of each of its sets; others stay.
    pub(crate) fn by_runs(
        &self,
        site: &Site,
        (binding, at): (&Binding, &Attachment),
        x: &Tensor,
        y: Tensor,
        run: impl Fn(&Tensor, Tensor, &Locals, &RowCx<'_>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let on = |rows: Option<&[u32]>, x: &Tensor, y: Tensor, set: u32| {
            let trains = self.theta.banks.get(usize::from(binding.slot)).is_some_and(|bank| bank.train);
            let masks = self.dropout.filter(|_| trains).map(|key| RowMasks { key, layout: self.layout, rows });
            let dropout = masks.as_ref().map(|masks| masks as &dyn attune_points::adapter::DropoutMask);
            let output = site.out_in().map_or(0, |(output, _)| output);
            let cx = RowCx { site: &site.id, output, dropout, layout: self.layout, rows };
            run(x, y, &self.locals(binding.slot, set, at)?, &cx)
        };
        let bound = self.acts_on(binding);
        if let Rows::All(set) = *bound {
            return on(self.rows, x, y, set);
        }
        let ids = self.ids(x.dim(0)?);
        let mut parts = Vec::new();
        for (run, set) in runs(&bound, &ids) {
            let y = y.narrow(0, run.start, run.len())?;
            parts.push(match set {
                None => y,
                Some(set) => on(Some(&ids[run.clone()]), &x.narrow(0, run.start, run.len())?, y, set)?,
            });
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The tensors of an attachment, leaves where a gradient is asked for.
    pub(crate) fn locals(&self, slot: u16, set: u32, at: &Attachment) -> Result<Locals> {
        stack::locals_by(at, |name| {
            let id = TensorId { owner: Owner::Bank { slot, set }, name: name.clone() };
            self.tracked.get(&id).map(|var| var.as_tensor()).or_else(|| self.theta.get(&id))
        })
    }
}

/// The set of a row, of rows that are not given by domains.
pub(crate) fn set_of(rows: &Rows, row: u32) -> Option<u32> {
    match rows {
        Rows::All(set) => Some(*set),
        Rows::Segments(segments) => {
            let at = segments.partition_point(|(range, _)| range.end <= row);
            segments.get(at).filter(|(range, _)| range.contains(&row)).map(|(_, set)| *set)
        }
        Rows::Domains(_) => None,
    }
}

/// Runs of `ids` that are bound to one set: places in `ids`, and the set. `rows` are not given by domains.
pub(crate) fn runs(rows: &Rows, ids: &[u32]) -> Vec<(Range<usize>, Option<u32>)> {
    let mut runs: Vec<(Range<usize>, Option<u32>)> = Vec::new();
    for (place, &row) in ids.iter().enumerate() {
        let set = set_of(rows, row);
        match runs.last_mut() {
            Some((run, last)) if *last == set => run.end = place + 1,
            _ => runs.push((place..place + 1, set)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fall_into_runs_of_one_set() {
        let rows = Rows::Segments(vec![(1..3, 0), (3..5, 1)]);
        assert_eq!(runs(&rows, &[0, 1, 2, 3, 5]), [(0..1, None), (1..3, Some(0)), (3..4, Some(1)), (4..5, None)]);
        assert_eq!(runs(&Rows::All(2), &[0, 7]), [(0..2, Some(2))]);
    }
}
