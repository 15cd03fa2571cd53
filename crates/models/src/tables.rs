//! Rows that components have in place of some of a table's own, as a block's graph sees them.
//!
//! Axes: T rows, D hidden, V vocabulary, K tokens of a component.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use attune_architecture::{Site, SiteId};
use attune_points::adapter::{Attachment, Port, TableMap};
use attune_points::{Binding, Result, Row};
use attune_tensor::ops;
use candle_core::{Device, Tensor};

use crate::context::{GraphCx, set_of};
use crate::pass::table::{checked, clash, places};

impl<'a> GraphCx<'a> {
    /// The components with rows in the table that is the weight at `site`.
    fn tables(&self, site: &Site) -> Vec<(&'a Binding, &'a Attachment, &'a dyn TableMap)> {
        // No table stands in a layer.
        if site.layer.is_some() {
            return Vec::new();
        }
        let kept = SiteId::new(self.base.tensor_name(site.id.as_str(), "weight").owner());
        let tables = self.attached(&kept).filter_map(|(binding, at, port)| match port {
            Port::Table(map) => Some((binding, at, map)),
            _ => None,
        });
        tables.collect()
    }

    fn shape(&self) -> (usize, usize) {
        (self.base.architecture().vocab, self.base.architecture().hidden)
    }

    /// Embeddings `x_td` that were looked up, with rows of components in their places.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn looked_up(&self, tokens: &Site, x_td: Tensor) -> Result<Tensor> {
        let mut from: Vec<u32> = (0..self.layout.n_rows() as u32).collect();
        let mut end = from.len() as u32;
        let mut made = vec![x_td];
        for (binding, at, map) in self.tables(tokens) {
            let (places, bound) = (places(map), binding.rows.on(self.layout));
            let mut first: BTreeMap<u32, u32> = BTreeMap::new();
            for (at_row, row) in (0..).zip(self.layout.rows()) {
                let Row::Token(token) = row else { continue };
                let (Some(&k), Some(set)) = (places.get(token), set_of(&bound, at_row)) else { continue };
                if let Entry::Vacant(entry) = first.entry(set) {
                    made.push(checked(map, map.graph(&self.locals(binding.slot, set, at)?)?, self.shape())?);
                    entry.insert(end);
                    end += map.tokens().len() as u32;
                }
                from[at_row as usize] = first[&set] + k as u32;
            }
        }
        match made.as_slice() {
            [x_td] => Ok(x_td.clone()),
            _ => Ok(Tensor::cat(&made, 0)?.index_select(&Tensor::new(from, &Device::Cpu)?, 0)?),
        }
    }

    /// The product `y_tv` of rows with the weight at `site`, with what rows of components give in the place of the table's own.
    ///
    /// # Errors
    /// Whatever a component raises; one whose product is not the table's.
    pub(crate) fn columns(&self, site: &Site, x_td: &Tensor, mut y_tv: Tensor) -> Result<Tensor> {
        let tables = self.tables(site);
        if tables.is_empty() {
            return Ok(y_tv);
        }
        if self
            .attached(&site.id)
            .any(|(_, _, port)| matches!(port, Port::Weight(_) | Port::Input(_) | Port::Output(_)))
        {
            return Err(clash(&site.id));
        }
        for (binding, at, map) in tables {
            let tokens = map.tokens();
            y_tv = self.by_runs(site, (binding, at), x_td, y_tv, |x_td, y_tv, tensors, _| {
                let rows_kd = checked(map, map.graph(tensors)?, self.shape())?;
                let mut kept = vec![1.0f64; y_tv.dim(1)?];
                tokens.iter().for_each(|token| kept[*token as usize] = 0.0);
                let kept_v = Tensor::new(kept, y_tv.device())?.to_dtype(y_tv.dtype())?;
                let own_tk = ops::linear(x_td, &rows_kd, None)?;
                Ok(y_tv.broadcast_mul(&kept_v)?.index_add(&Tensor::new(tokens, y_tv.device())?, &own_tk, 1)?)
            })?;
        }
        Ok(y_tv)
    }
}
