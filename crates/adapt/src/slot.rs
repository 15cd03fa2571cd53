//! From a slot's component and attachments to its first parameters.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Error, Locals, Params, Result, Weight};
use attune_tensor::rng::Rng;
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
/// Each site's numbers depend on `rng` and the site's name only. `weight` gives the base weight of a site.
///
/// # Errors
/// Whatever the initialisation raises; [`Error::Refused`] if it makes other tensors than were declared, or takes something out
/// of the base at some sites and not at others.
pub fn fresh<'w>(
    adapter: &dyn Adapter,
    init: Option<&dyn Init>,
    attachments: &[Attachment],
    weight: impl Fn(&Attachment) -> Result<Box<dyn Weight + 'w>> + Sync,
    rng: &Rng,
) -> Result<Fresh> {
    let start = |at: &Attachment| {
        let base = weight(at)?;
        let mut stream = rng.named(at.site.as_str());
        match init {
            Some(init) => init.init(adapter, at, &*base, &mut stream),
            None => adapter.init(at, &*base, &mut stream),
        }
    };
    // Sites know nothing of each other: decompositions of their weights go side by side.
    let started: Vec<Result<(Locals, BaseEdit)>> = attachments.par_iter().map(start).collect();
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
    if fresh.beside.is_empty() || fresh.beside.len() == fresh.own.len() {
        return Ok(fresh);
    }
    Err(Error::Refused("the initialisation takes something out of the base at some sites only".to_owned()))
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
