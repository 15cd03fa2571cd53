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
    /// Those of the same component, less whose change the weights of its sites are quantised anew; nowhere, if it is empty.
    pub requantized: Params,
}

impl Fresh {
    /// Takes in what one site starts as.
    fn add(&mut self, at: &Attachment, tensors: &Locals, edit: BaseEdit) -> Result<()> {
        insert(&mut self.own, at, tensors)?;
        match edit {
            BaseEdit::None => Ok(()),
            BaseEdit::Beside(tensors) => insert(&mut self.beside, at, &tensors),
            BaseEdit::Requantized(tensors) => insert(&mut self.requantized, at, &tensors),
            other => {
                let message =
                    format!("the initialisation at {} asks for {other:?}, which this engine does not", at.site);
                Err(Error::Refused(message))
            }
        }
    }
}

/// The starting parameters of a component at its attachments: by `init` if it is given, else by the component's own.
/// Each site's numbers depend on `rng` and the site's name only. `weight` gives the base weight of a site, and
/// `stats` what either asked for.
///
/// # Errors
/// Whatever the initialisation raises; [`Error::Refused`] if it makes other tensors than were declared, or changes the base at some
/// sites and not at others, or unsaid.
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
    let mut fresh = Fresh::default();
    if let Some(started) = together {
        for (at, (tensors, edit)) in attachments.iter().zip(started) {
            fresh.add(at, &tensors, edit)?;
        }
    } else {
        // Sites know nothing of each other: decompositions of their weights go side by side. Few at a time, since each makes
        // what all of them share anew, of which one is kept.
        for some in attachments.chunks(rayon::current_num_threads()) {
            let started: Vec<Result<(Locals, BaseEdit)>> = some.par_iter().map(start).collect();
            for (at, started) in some.iter().zip(started) {
                let (tensors, edit) = started?;
                fresh.add(at, &tensors, edit)?;
            }
        }
    }
    let changes = [
        ("takes something out of the base", init.is_some_and(Init::takes_out), fresh.beside.len()),
        ("quantises weights of the base anew", init.is_some_and(Init::requantizes), fresh.requantized.len()),
    ];
    for (what, said, found) in changes {
        let how = match found {
            n if n == if said { fresh.own.len() } else { 0 } => continue,
            0 => "nowhere, though it said so",
            _ if said => "at some sites only",
            _ => "unsaid",
        };
        return Err(Error::Refused(format!("the initialisation {what} {how}")));
    }
    Ok(fresh)
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
        if init.is_some_and(Init::requantizes) {
            insert(&mut fresh.requantized, at, &tensors)?;
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
