//! Token ids, and learned positions where the model has them, to rows.

use attune_architecture::{Place, Positions, Site, SiteId};
use attune_points::error::Context as _;
use attune_points::{Error, Result, Row};
use attune_tensor::ops;
use candle_core::{Device, Tensor};

use super::{Block, BlockCache, site};
use crate::context::{GraphCx, Matrix};

pub(super) struct Embedding {
    /// The table of tokens, then that of positions.
    pub(super) sites: Vec<Site>,
}

impl Embedding {
    fn rows(&self, positions: impl Iterator<Item = usize>, cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let x_td = look_up(&site(&self.sites, Place::Embedding)?.id, &tokens(cx)?, cx)?;
        let Positions::Learned { rows, offset } = cx.base.architecture().positions else { return Ok(vec![x_td]) };
        let ids = positions.map(|position| {
            if position + offset < rows {
                Ok((position + offset) as u32)
            } else {
                Err(too_long(position + 1, rows - offset))
            }
        });
        let ids = ids.collect::<Result<Vec<u32>>>()?;
        Ok(vec![(x_td + look_up(&site(&self.sites, Place::Positions)?.id, &ids, cx)?)?])
    }
}

impl Block for Embedding {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Reads the tokens of the layout; takes no stream.
    fn graph(&self, _: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        self.rows(cx.layout.docs().iter().flat_map(|doc| 0..doc.n_rows()), cx)
    }

    fn decode(&self, _: &[Tensor], cache: &mut BlockCache, cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let rows = cx.layout.rows().len();
        let start = cache.advance(rows);
        self.rows(start..start + rows, cx)
    }
}

fn too_long(length: usize, longest: usize) -> Error {
    Error::Refused(format!("a document has {length} tokens or more; this model has positions for {longest}"))
}

/// The token of each row of the layout.
fn tokens(cx: &GraphCx<'_>) -> Result<Vec<u32>> {
    let vocab = cx.base.architecture().vocab;
    let ids = cx.layout.rows().iter().map(|row| match row {
        Row::Token(id) if (*id as usize) < vocab => Ok(*id),
        Row::Token(id) => Err(Error::Refused(format!(
            "token {id} is outside of the model's vocabulary of {vocab}; tokenizer and model do not fit"
        ))),
        Row::Virtual { .. } | Row::Payload { .. } => {
            Err(Error::Refused("this embedding takes tokens only, no virtual or payload rows".to_owned()))
        }
    });
    ids.collect()
}

/// The rows `ids` of the table at `site`.
fn look_up(site: &SiteId, ids: &[u32], cx: &GraphCx<'_>) -> Result<Tensor> {
    let at = || format!("embedding {site}");
    match cx.matrix(site)? {
        Matrix::Tensor(w_vd) => ops::embedding(&Tensor::new(ids, &Device::Cpu)?, &w_vd).context(at),
        Matrix::Frozen(w_vd) => w_vd.select(ids, cx.dtype).context(at),
    }
}
