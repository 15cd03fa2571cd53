//! Token ids to rows.

use attune_architecture::Site;
use attune_points::error::Context as _;
use attune_points::{Error, Result, Row};
use attune_tensor::ops;
use candle_core::{Device, Tensor};

use super::Block;
use crate::context::{GraphCx, Matrix};

pub(super) struct Embedding {
    /// `[embed_tokens]`.
    pub(super) sites: Vec<Site>,
}

impl Block for Embedding {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Reads the tokens of the layout; takes no stream.
    fn graph(&self, _: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let site = &self.sites[0].id;
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
        let ids = ids.collect::<Result<Vec<u32>>>()?;
        let at = || format!("embedding {site}");
        let x_td = match cx.matrix(site)? {
            Matrix::Tensor(w_vd) => ops::embedding(&Tensor::new(ids, &Device::Cpu)?, &w_vd).context(at)?,
            Matrix::Frozen(w_vd) => w_vd.select(&ids, cx.dtype).context(at)?,
        };
        Ok(vec![x_td])
    }
}
