//! Token ids, with token types, learned positions and a norm where the model has them, to rows.

use attune_architecture::{Architecture, Place, Positions, Site, SiteId, SiteKind};
use attune_points::error::Context as _;
use attune_points::layout::{Axis, Column, TOKEN_TYPES, Values};
use attune_points::{Error, Layout, Result, Row, TensorId};
use attune_tensor::{ops, reading};
use candle_core::{Device, Tensor};

use super::{Block, Saved, site};
use crate::context::{GraphCx, Matrix};
use crate::pass::parts::{Given, wants};
use crate::pass::walk::Run;
use crate::pass::{PassCx, Rows, Sinks, local};
use crate::regions;

pub(super) struct Embedding {
    /// The table of tokens, then those of positions and of token types, then the norm.
    pub(super) sites: Vec<Site>,
}

impl Embedding {
    /// The tables that are looked up for a part, and the row of each for each of its rows.
    fn tables(&self, part: usize, cx: &PassCx<'_>) -> Result<Vec<(Place, Vec<u32>)>> {
        let (layout, architecture) = (cx.parts[part].layout, cx.architecture());
        let mut tables = vec![(Place::Embedding, tokens(layout, architecture.vocab)?)];
        if let Some(ids) = places(cx.positions(part), architecture)? {
            tables.push((Place::Positions, ids));
        }
        if let Some(types) = architecture.token_types {
            tables.push((Place::TokenTypes, token_types(layout, types)?));
        }
        Ok(tables)
    }

    /// The sum of the rows of all tables.
    fn sum(&self, cx: &PassCx<'_>) -> Result<Rows<f32>> {
        let mut x_td = cx.arena.rows(cx.n_rows(), cx.architecture().hidden);
        for (part, rows) in cx.parts_of(Given::All) {
            for (i, (place, ids)) in self.tables(part, cx)?.iter().enumerate() {
                let to = x_td.view_mut().into_sub_rows(rows.start, rows.end);
                let table = site(&self.sites, *place)?;
                let id = &table.id;
                let at = || format!("embedding {id}");
                match cx.own(part, id, "weight") {
                    Some((_, w_vd)) => {
                        cx.kernels.gather(reading::read(w_vd).context(at)?.mat(), ids, to.into(), i > 0);
                    }
                    None => {
                        let frozen = cx.base.matrix(&cx.base.tensor_name(id.as_str(), "weight"))?;
                        let reading = frozen.read().context(at)?;
                        let few = || Error::Refused(format!("{id} is held in few bits, which no table is"));
                        cx.kernels.gather(reading.mat().ok_or_else(few)?, ids, to.into(), i > 0);
                    }
                }
                if *place == Place::Embedding {
                    cx.look_up(part, table, x_td.view_mut().into_sub_rows(rows.start, rows.end))?;
                    cx.begin(part, table, x_td.view_mut().into_sub_rows(rows.start, rows.end))?;
                }
            }
            if let Some(input_td) = &cx.parts[part].theta.input {
                let at = || "what is added to the embeddings".to_owned();
                let added = reading::read(input_td).context(at)?;
                let got = (added.mat().rows(), added.mat().cols());
                if got != (rows.len(), x_td.n_cols()) {
                    return Err(not_of_rows(got, (rows.len(), x_td.n_cols())));
                }
                cx.kernels.add(added.mat(), x_td.view_mut().into_sub_rows(rows.start, rows.end));
            }
        }
        let table = site(&self.sites, Place::Embedding)?;
        cx.add_lookups(table, x_td.view_mut())?;
        cx.add_places(table, x_td.view_mut())?;
        Ok(x_td)
    }

    /// The norm on the sum, where there is one.
    fn norm(&self) -> Option<&Site> {
        self.sites.iter().find(|site| site.place == Place::EmbeddingNorm)
    }
}

impl Block for Embedding {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Reads the tokens of the layout; takes no stream.
    fn graph(&self, _: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let architecture = cx.base.architecture();
        let ids = tokens(cx.layout, architecture.vocab)?;
        let table = site(&self.sites, Place::Embedding)?;
        let known_td = cx.looked_up(table, look_up(&table.id, &ids, cx)?)?;
        let mut x_td = cx.add_places(table, cx.add_lookups(table, cx.begin(table, known_td)?)?)?;
        let tracked = cx.tracked.get(&TensorId::input_embeddings()).map(|added| added.as_tensor());
        if let Some(added_td) = tracked.or(cx.theta.input.as_ref()) {
            let (got, expected) = (added_td.dims2()?, x_td.dims2()?);
            if got != expected {
                return Err(not_of_rows(got, expected));
            }
            x_td = (x_td + added_td)?;
        }
        if let Some(ids) = places(cx.plan.positions.iter().copied(), architecture)? {
            x_td = (x_td + look_up(&site(&self.sites, Place::Positions)?.id, &ids, cx)?)?;
        }
        if let Some(types) = architecture.token_types {
            let ids = token_types(cx.layout, types)?;
            x_td = (x_td + look_up(&site(&self.sites, Place::TokenTypes)?.id, &ids, cx)?)?;
        }
        Ok(vec![match self.norm() {
            Some(norm) => cx.norm(norm, &x_td)?,
            None => x_td,
        }])
    }

    fn forward(&self, _: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<Saved>)> {
        if run == Run::Saved {
            return Ok((Vec::new(), None));
        }
        let x_td = self.sum(cx)?;
        let y_td = match self.norm() {
            Some(norm) => cx.norm_rows(norm, &x_td, Given::All)?,
            None => x_td,
        };
        Ok((vec![y_td], None))
    }

    fn vjp(
        &self,
        _: &[Rows<f32>],
        _: Option<Saved>,
        dy: Vec<Rows<f32>>,
        _: bool,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Rows<f32>>> {
        let mut dx_td = super::only(dy)?;
        if let Some(norm) = self.norm() {
            // Adding up rows again costs less than keeping the sum.
            let (x_td, dy_td) = (self.sum(cx)?, dx_td);
            dx_td = cx.arena.zeros(x_td.n_rows(), x_td.n_cols());
            cx.norm_vjp(norm, x_td.view(), Given::All, dy_td.view(), dx_td.view_mut(), sinks)?;
        }
        let table = site(&self.sites, Place::Embedding)?;
        cx.places_vjp(table, dx_td.view(), sinks)?;
        cx.lookups_vjp(table, dx_td.view(), sinks)?;
        for (part, rows) in cx.parts_of(Given::All) {
            let dx = dx_td.view().sub_rows(rows.start, rows.end);
            if wants(&*sinks[part], &TensorId::input_embeddings()) {
                regions::put(&mut *sinks[part], &TensorId::input_embeddings(), &local::tensor(dx.into())?)?;
            }
            let tokens = site(&self.sites, Place::Embedding)?;
            cx.begin_vjp(part, tokens, dx, sinks)?;
            let replaced = cx.look_up_vjp(part, tokens, dx, sinks)?;
            let layout = cx.parts[part].layout.rows();
            for (place, ids) in self.tables(part, cx)? {
                let site = site(&self.sites, place)?;
                let id = cx.id_of(part, &site.id, "weight");
                let SiteKind::Embedding { vocab, width } = site.kind else { continue };
                if !wants(&*sinks[part], &id) {
                    continue;
                }
                let mut dw_vd = vec![0.0f32; vocab * width];
                // What stands in the place of a token's embedding is no row of that table.
                let is_own = |row: usize| {
                    matches!(layout[row], Row::Token(_)) && !replaced.get(row).copied().unwrap_or_default()
                };
                let is_of = |row: usize| place != Place::Embedding || is_own(row);
                for (row, id) in ids.into_iter().enumerate().filter(|(row, _)| is_of(*row)) {
                    let to = &mut dw_vd[id as usize * width..][..width];
                    to.iter_mut().zip(dx.row(row)).for_each(|(sum, dx)| *sum += dx);
                }
                regions::put(&mut *sinks[part], &id, &Tensor::from_vec(dw_vd, (vocab, width), &Device::Cpu)?)?;
            }
        }
        Ok(Vec::new())
    }
}

fn not_of_rows(got: (usize, usize), expected: (usize, usize)) -> Error {
    Error::Refused(format!("what is added to the embeddings has the shape {got:?}; expected {expected:?}"))
}

fn too_long(length: usize, longest: usize) -> Error {
    Error::Refused(format!("a document has {length} tokens or more; this model has positions for {longest}"))
}

/// The row of the table of positions for each position; none where positions are not learned.
fn places(positions: impl Iterator<Item = usize>, architecture: &Architecture) -> Result<Option<Vec<u32>>> {
    let Positions::Learned { rows, offset } = architecture.positions else { return Ok(None) };
    let ids = positions.map(|position| {
        if position + offset < rows {
            Ok((position + offset) as u32)
        } else {
            Err(too_long(position + 1, rows - offset))
        }
    });
    ids.collect::<Result<Vec<u32>>>().map(Some)
}

/// The token of each row of a layout; any of them where a component has a row of its own.
fn tokens(layout: &Layout, vocab: usize) -> Result<Vec<u32>> {
    let ids = layout.rows().iter().map(|row| match row {
        Row::Token(id) if (*id as usize) < vocab => Ok(*id),
        Row::Token(id) => Err(Error::Refused(format!(
            "token {id} is outside of the model's vocabulary of {vocab}; tokenizer and model do not fit"
        ))),
        Row::Virtual { .. } => Ok(0),
        Row::Payload { .. } => {
            Err(Error::Refused("this embedding takes tokens and rows of components only, no payload".to_owned()))
        }
    });
    ids.collect()
}

/// The type of each row of a layout, below `types`.
fn token_types(layout: &Layout, types: usize) -> Result<Vec<u32>> {
    let refused = |message: String| Err(Error::Refused(message));
    match layout.column(TOKEN_TYPES) {
        None => Ok(vec![0; layout.n_rows()]),
        Some(Column { axis: Axis::Row, values: Values::U32(ids) }) => {
            match ids.iter().find(|id| **id as usize >= types) {
                None => Ok(ids.clone()),
                Some(id) => refused(format!("token type {id} is outside of the model's {types}")),
            }
        }
        Some(_) => refused(format!("column {TOKEN_TYPES:?} has to hold one whole number a row")),
    }
}

/// The rows `ids` of the table at `site`.
fn look_up(site: &SiteId, ids: &[u32], cx: &GraphCx<'_>) -> Result<Tensor> {
    let at = || format!("embedding {site}");
    match cx.matrix(site)? {
        Matrix::Tensor(w_vd) => ops::embedding(&Tensor::new(ids, &Device::Cpu)?, &w_vd).context(at),
        Matrix::Frozen(w_vd) => w_vd.select(ids, cx.dtype).context(at),
    }
}
