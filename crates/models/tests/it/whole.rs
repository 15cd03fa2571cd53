//! The plainest components of whole blocks: one that changes what a block gives, one that mixes such, one that puts keys and values before those of
//! documents.

use attune_architecture::{Architecture, Place, Site, SiteKind};
use attune_points::adapter::{
    Adapter, Attachment, AttentionMap, BaseEdit, BranchMap, DropoutMask, Merged, MixtureMap, Peft, Port, RowCx,
};
use attune_points::{Error, Locals, Result, TensorSpec, Weight};
use attune_spec::Fault;
use attune_tensor::{Rng, ops};
use candle_core::{DType, Tensor};

pub(crate) fn random(at: &Attachment, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
    let tensor = |spec: &TensorSpec, rng: &mut Rng| -> Result<_> {
        Ok((spec.local, rng.normal_tensor(spec.shape.as_slice(), 0.3, DType::F64)?))
    };
    let tensors = at.tensors.iter().map(|spec| tensor(spec, rng)).collect::<Result<Vec<_>>>()?;
    Ok((Locals::new(at.site.as_str(), tensors), BaseEdit::None))
}

/// `y' = (1 + gain) ∘ y + (silu(y down_rdᵀ) + mask ∘ silu(x beside_rdᵀ)) up_drᵀ`: after a block and beside it.
pub(crate) struct Bottleneck {
    pub(crate) rank: usize,
    pub(crate) dropout: f64,
}

impl Adapter for Bottleneck {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Block { width } = site.kind else { return None };
            let tensors = vec![
                TensorSpec::trained("beside", [self.rank, width]),
                TensorSpec::trained("down", [self.rank, width]),
                TensorSpec::trained("gain", [width]),
                TensorSpec::trained("up", [width, self.rank]),
            ];
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Branch(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} is a block", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl BranchMap for Bottleneck {
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor> {
        let beside_tr = ops::silu(&ops::linear(x_td, tensors.get("beside")?, None)?)?;
        let mask = |masks: &dyn DropoutMask| masks.mask(cx.site, self.rank, self.dropout, &beside_tr);
        let beside_tr = match cx.dropout.map(mask).transpose()? {
            Some(mask_tr) => (beside_tr * mask_tr)?,
            None => beside_tr,
        };
        let h_tr = (ops::silu(&ops::linear(y_td, tensors.get("down")?, None)?)? + beside_tr)?;
        let scaled_td = y_td.broadcast_mul(&(tensors.get("gain")? + 1.0)?)?;
        Ok((scaled_td + ops::linear(&h_tr, tensors.get("up")?, None)?)?)
    }
}

/// `y' = y + Σ_n silu(z_n ∘ gate + x) ∘ z_n`, where `z_n` is what the `n`th branch would add.
pub(crate) struct Mixer;

impl Adapter for Mixer {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Block { width } = site.kind else { return None };
            Some(Attachment { site: site.id.clone(), tensors: vec![TensorSpec::trained("gate", [width])] })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Mixture(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} is a block", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl MixtureMap for Mixer {
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, added: &[Tensor], tensors: &Locals, _: &RowCx<'_>) -> Result<Tensor> {
        let mut mixed_td = y_td.clone();
        for z_td in added {
            let gate_td = (z_td.broadcast_mul(tensors.get("gate")?)? + x_td)?;
            mixed_td = (mixed_td + (ops::silu(&gate_td)? * z_td)?)?;
        }
        Ok(mixed_td)
    }
}

/// `length` keys and values before those of each document.
pub(crate) struct Prefix {
    pub(crate) length: usize,
}

impl Adapter for Prefix {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter(|site| site.place == Place::Attention).map(|site| {
            let shape = [self.length, arch.kv_width()];
            let tensors = vec![TensorSpec::trained("keys", shape), TensorSpec::trained("values", shape)];
            Attachment { site: site.id.clone(), tensors }
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Attention(self)
    }

    fn merge(&self, at: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Err(Error::Refused(format!("{} is a block", at.site)))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl AttentionMap for Prefix {
    fn length(&self) -> usize {
        self.length
    }

    fn graph(&self, tensors: &Locals) -> Result<(Tensor, Tensor)> {
        Ok((tensors.get("keys")?.clone(), tensors.get("values")?.clone()))
    }
}
