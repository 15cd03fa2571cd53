//! From a slot's component and attachments to its first parameters.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Error, Params, Result, Weight};
use attune_tensor::rng::Rng;

/// The starting parameters of a component at its attachments: by `init` if it is given, else by the component's own.
/// Each site's numbers depend on `rng` and the site's name only. `weight` gives the base weight of a site.
///
/// # Errors
/// Whatever the initialisation raises; [`Error::Refused`] if it makes other tensors than were declared.
pub fn fresh<'w>(
    adapter: &dyn Adapter,
    init: Option<&dyn Init>,
    attachments: &[Attachment],
    weight: impl Fn(&Attachment) -> Result<Box<dyn Weight + 'w>>,
    rng: &Rng,
) -> Result<Params> {
    let mut params = Params::new();
    for at in attachments {
        let base = weight(at)?;
        let mut stream = rng.named(at.site.as_str());
        let (tensors, BaseEdit::None) = (match init {
            Some(init) => init.init(at, &*base, &mut stream)?,
            None => adapter.init(at, &*base, &mut stream)?,
        }) else {
            return Err(Error::Refused(format!(
                "the initialisation at {} edits the base, which this engine does not",
                at.site
            )));
        };
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
            let name = spec.name(at.site.as_str());
            if params.get(&name).is_none() {
                params.insert_declared(spec, at.site.as_str(), tensor.clone());
            }
        }
    }
    Ok(params)
}
