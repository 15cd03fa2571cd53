//! From a slot's component and attachments to its first parameters.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Error, Locals, Params, Result, Stats, TensorSpec, Weight};
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// What a component starts as.
#[derive(Debug, Clone, Default)]
pub struct Fresh {
    /// Its parameters.
    pub own: Params,
    /// Those of the same component, frozen, that stays beside it at the same sites, so that both together start as nothing;
    /// nowhere, if it is empty.
    pub beside: Params,
}

/// The starting parameters of a component at its attachments: by `init` if it is given, else by the component's own.
/// Each site's numbers depend on `rng` and the site's name only. `weight` gives the base weight of a site, and
/// `stats` what either asked for.
///
/// # Errors
/// Whatever the initialisation raises; [`Error::Refused`] if it makes other tensors than were declared, or takes something out
/// of the base at some sites and not at others.
pub fn fresh<'w>(
    adapter: &dyn Adapter,
    init: Option<&dyn Init>,
    attachments: &[Attachment],
    weight: impl Fn(&Attachment) -> Result<Box<dyn Weight + 'w>> + Sync,
    stats: &Stats,
    rng: &Rng,
) -> Result<Fresh> {
    let start = |at: &Attachment| {
        let base = weight(at)?;
        let mut stream = rng.named(at.site.as_str());
        match init {
            Some(init) => init.init(adapter, at, &*base, stats, &mut stream),
            None => adapter.init_by(at, &*base, stats, &mut stream),
        }
    };
    let together = if init.is_none() { adapter.init_together(attachments, &weight, rng)? } else { None };
    let started: Vec<Result<(Locals, BaseEdit)>> = match together {
        Some(started) => started.into_iter().map(Ok).collect(),
        // Sites know nothing of each other: decompositions of their weights go side by side.
        None => attachments.par_iter().map(start).collect(),
    };
    let mut fresh = Fresh::default();
    for (at, started) in attachments.iter().zip(started) {
        let (tensors, edit) = started?;
        insert(&mut fresh.own, at, &tensors)?;
        match edit {
            BaseEdit::None => {}
            BaseEdit::Beside(tensors) => insert(&mut fresh.beside, at, &tensors)?,
            other => {
                let message =
                    format!("the initialisation at {} asks for {other:?}, which this engine does not", at.site);
                return Err(Error::Refused(message));
            }
        }
    }
    let takes_out = init.is_some_and(Init::takes_out);
    match fresh.beside.len() {
        n if n == if takes_out { fresh.own.len() } else { 0 } => Ok(fresh),
        0 => Err(Error::Refused("the initialisation takes nothing out of the base, which it said it would".to_owned())),
        _ if takes_out => {
            Err(Error::Refused("the initialisation takes something out of the base at some sites only".to_owned()))
        }
        _ => Err(Error::Refused("the initialisation takes something out of the base unsaid".to_owned())),
    }
}

/// Tensors in the place of those that [`fresh`] made, by `init` if it is given, in an earlier attempt of the same run: their values come
/// from its checkpoint.
///
/// # Errors
/// Whatever making a tensor raises.
pub fn blank(init: Option<&dyn Init>, attachments: &[Attachment]) -> Result<Fresh> {
    let mut fresh = Fresh::default();
    for at in attachments {
        let zeros =
            |spec: &TensorSpec| Ok((spec.local, Tensor::zeros(spec.shape.as_slice(), DType::F32, &Device::Cpu)?));
        let tensors = Locals::new(at.site.as_str(), at.tensors.iter().map(zeros).collect::<Result<Vec<_>>>()?);
        insert(&mut fresh.own, at, &tensors)?;
        if init.is_some_and(Init::takes_out) {
            insert(&mut fresh.beside, at, &tensors)?;
        }
    }
    Ok(fresh)
}

/// Adds the tensors of an attachment.
fn insert(params: &mut Params, at: &Attachment, tensors: &Locals) -> Result<()> {
    for spec in &at.tensors {
        let tensor = tensors.get(spec.local)?;
        if tensor.dims() != spec.shape {
            let message = format!(
                "{} at {} starts with shape {:?}; it was declared as {:?}",
                spec.local,
                at.site,
                tensor.dims(),
                spec.shape
            );
            return Err(Error::Refused(message));
        }
        // A tensor that several sites share starts with what the first of them makes.
        if params.get(&spec.name(at.site.as_str())).is_none() {
            params.insert_declared(spec, at.site.as_str(), tensor.clone());
        }
    }
    Ok(())
}
