//! A base whose linears are held in few bits, or whose layers are repeated, and adapters that were trained on one.

use std::path::{Path, PathBuf};

use attune_adapt::held::{self, Held};
use attune_adapt::{headed, peft};
use attune_models::{Base, Slot, stack, surgery};
use attune_points::Params;
use attune_points::adapter::{Attachment, Merged};
use attune_spec::job::{HeadSpec, Plan, Precision};
use attune_spec::method::{Catalogue, MethodRef};
use attune_spec::{Fault, FieldPath};

use crate::error::Error;

/// How a job holds its base, if in few bits.
pub(crate) fn of(plan: &Plan) -> Option<Held> {
    let quantization = plan.quantization.clone()?;
    Some(Held { precision: plan.precision, quantization })
}

/// A base as it is held, or in `precision`.
pub(crate) fn open(folder: &Path, precision: Precision, quantization: Option<&MethodRef>) -> Result<Base, Error> {
    Ok(match quantization {
        Some(format) => Base::open_quantized(folder, precision, format)?,
        None => Base::open(folder, precision)?,
    })
}

/// The base of a job, in this format: its trunk under the head that the job names, where it names one.
pub(crate) fn open_of(plan: &Plan, folder: &Path, quantization: Option<&MethodRef>) -> Result<Base, Error> {
    let Some(head) = &plan.head else { return open(folder, plan.precision, quantization) };
    Ok(Base::open_as(folder, plan.precision, quantization, |trunk| trunk.over(head), plan.seed)?)
}

/// The base that adapters were trained on: as their folders say that it was held, else in `precision`, and with the layers that the
/// first of them says that are repeated. That all of them say the same of these is seen when they are read.
///
/// # Errors
/// [`Error`] naming the folder or file at fault; adapters that say different things.
pub fn open_for(base: &Path, adapters: &[PathBuf], precision: Precision) -> Result<Base, Error> {
    open_under(base, adapters, precision, head_of(adapters)?.as_ref())
}

/// The same under a head that is known, or under the base's own.
///
/// # Errors
/// As for [`open_for`].
pub fn open_under(
    base: &Path,
    adapters: &[PathBuf],
    precision: Precision,
    head: Option<&HeadSpec>,
) -> Result<Base, Error> {
    let mut said: Option<(&Path, Held)> = None;
    for folder in adapters {
        let Some(held) = held::read(folder)? else { continue };
        match &said {
            Some((first, other)) if *other != held => {
                let message = format!(
                    "was trained on a base of {}, and {} on one of {}: no base is both",
                    spelt(&held),
                    first.display(),
                    spelt(other)
                );
                return Err(Error::Input { input: folder.display().to_string(), message });
            }
            Some(_) => {}
            None => said = Some((folder, held)),
        }
    }
    let (precision, quantization) = match &said {
        Some((_, held)) => (held.precision, Some(&held.quantization)),
        None => (precision, None),
    };
    let opened = match head {
        // What is new of a head, adapters that were trained under it have.
        Some(head) => Base::open_as(base, precision, quantization, |trunk| trunk.over(head), 0)?,
        None => open(base, precision, quantization)?,
    };
    for folder in adapters {
        let Some(ranges) = peft::ranges(folder)? else { continue };
        let of_folder = |faults: Vec<Fault>| Error::Input {
            input: folder.display().to_string(),
            message: faults.iter().map(|fault| format!("says of its base: {fault}")).collect::<Vec<_>>().join("; "),
        };
        let Some(surgery) = Catalogue::embedded().repeating(&ranges) else { continue };
        return surgery::operate(&opened, &surgery, 0).map_err(|error| match error {
            attune_models::Error::Refused(faults) => of_folder(faults),
            error => error.into(),
        });
    }
    Ok(opened)
}

/// The head that adapters were trained under, if they say one.
///
/// # Errors
/// A folder that cannot be read; adapters that say different heads.
pub fn head_of(adapters: &[PathBuf]) -> Result<Option<HeadSpec>, Error> {
    let mut said: Option<(&Path, HeadSpec)> = None;
    for folder in adapters {
        let Some(head) = headed::read(folder)? else { continue };
        match &said {
            Some((first, other)) if *other != head => {
                let (own, first, other) = (headed::spelt(&head), first.display(), headed::spelt(other));
                let message = format!("was trained to {own}, and {first} to {other}: no head does both");
                return Err(Error::Input { input: folder.display().to_string(), message });
            }
            Some(_) => {}
            None => said = Some((folder, head)),
        }
    }
    Ok(said.map(|(_, head)| head))
}

/// Whether a job holds its base as that of an adapter was which it starts from: else the adapter would stand beside other weights
/// than those that it was made for.
///
/// # Errors
/// A fault at `path`.
pub(crate) fn fits(adapter: Option<&Held>, base: Option<&Held>, path: &FieldPath) -> Result<(), Error> {
    match adapter {
        Some(held) if base != Some(held) => {
            let message = format!(
                "was trained on a base of {}; expected `tune.quantization` and `tune.precision` to say so (for another base merge it \
                 first: `outputs.merged_into` of the job that made it)",
                spelt(held)
            );
            Err(Error::Faults(vec![Fault::new(path.field("from"), message)]))
        }
        _ => Ok(()),
    }
}

/// Whether weights that a slot trains in the place of the base's own have whole numbers there: those in few bits never change.
///
/// # Errors
/// A fault at `path`.
pub(crate) fn whole(slot: &Slot, base: &Base, path: &FieldPath) -> Result<(), Error> {
    let sites = base.architecture().sites();
    let in_few = |at: &&Attachment| sites.iter().any(|site| site.id == at.site && site.place.quantizes());
    match slot.attachments().find(in_few) {
        Some(at) if base.holds_few() => {
            let message = format!(
                "names {}, which `tune.quantization` holds in few bits, and such weights do not train: leave it out",
                at.site
            );
            Err(Error::Faults(vec![Fault::new(path.field("targets"), message)]))
        }
        _ => Ok(()),
    }
}

/// The format of a base in a few words.
pub(crate) fn spelt(held: &Held) -> String {
    let format = serde_json::to_string(&held.quantization).unwrap_or_default();
    let precision = serde_json::to_string(&held.precision).unwrap_or_default();
    format!("{format} with products in {}", precision.trim_matches('"'))
}

/// The base with weights of a component's sites quantised anew, less what the component with the parameters `less` adds to them.
///
/// # Errors
/// A component that adds something else than a product of two factors; weights that are not held in few bits.
pub(crate) fn requantized(base: &Base, slot: &Slot, less: &Params) -> Result<Base, Error> {
    let mut products = Vec::new();
    for at in slot.attachments() {
        let site = base.architecture().site(at.site.as_str());
        let refused = |message: String| Error::from(attune_points::Error::Refused(message));
        let site = site.ok_or_else(|| refused(format!("the base has no {}", at.site)))?;
        match slot.adapter().merge(at, &stack::locals(at, less)?, &base.weight(&site))? {
            Merged::Factors { left, right, scale } => {
                products.push((base.tensor_name(at.site.as_str(), "weight"), (left, right, scale)));
            }
            _ => return Err(refused(format!("the component at {} is no product of two factors", at.site))),
        }
    }
    Ok(base.requantized(products)?)
}
