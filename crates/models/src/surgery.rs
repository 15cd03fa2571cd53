//! Another model made of a base, by a method of [`crate::surgeries`].

use std::collections::BTreeMap;

use attune_architecture::{Place, Site, SiteId, TensorInfo};
use attune_points::surgery::Derivation;
use attune_points::{TensorName, Weight};
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Catalogue, MethodRef};
use attune_spec::{Fault, FieldPath};
use attune_tensor::rng::Rng;
use candle_core::DType;

use crate::base::Base;
use crate::error::Error;
use crate::surgeries::SURGERIES;

/// What a surgery makes of a base, in the base's own precision. The old model's tensors that the new one has as they were stay where
/// they lie, mapped files among them. Each fresh tensor depends on the seed and its name only.
///
/// # Errors
/// [`Error::Refused`] with all faults of the method for this base, their paths as `tune.surgery`; whatever making a tensor raises.
pub fn operate(base: &Base, surgery: &MethodRef, seed: u64) -> Result<Base, Error> {
    let path = FieldPath::from("tune").field("surgery");
    let refused = |faults: Vec<Fault>| Error::Refused(faults.into_iter().map(|fault| fault.under(&path)).collect());
    let (catalogue, cx) = (Catalogue::embedded(), BuildCx { steps: Step(0), domains: &[], words: None });
    let method = SURGERIES.build(surgery, &path, &cx).map_err(Error::Refused)?;
    let Some(card) = catalogue.get(&surgery.method) else {
        return Err(Error::Refused(vec![Fault::new(path, catalogue.unknown(&surgery.method))]));
    };
    let from = base.architecture();
    let to = from.after(&catalogue.resolve(surgery), card).map_err(refused)?;
    let plan = method.plan(from, &to).map_err(refused)?;
    let (infos, sites) = (to.tensors(), to.sites());
    let sites: BTreeMap<&SiteId, &Site> = sites.iter().map(|site| (&site.id, site)).collect();
    let mut made = base.emptied(to);
    let rng = Rng::new(seed, "surgery");
    let mut later = Vec::new();
    for TensorInfo { name, site, part, .. } in infos {
        let name = TensorName::from_path(&name);
        let unplanned = || attune_points::Error::Refused(format!("the surgery says nothing of {name}"));
        let of = match plan.get(&name).ok_or_else(unplanned)? {
            Derivation::Kept(old) => {
                made.take(name, base, old)?;
                continue;
            }
            Derivation::Same(other) => {
                later.push((name, other.clone()));
                continue;
            }
            Derivation::Made(of) => Some(of),
            Derivation::Fresh => None,
        };
        let at = sites.get(&site).ok_or_else(unplanned)?;
        let weight = of.map(|of| base.weight(of));
        let weight = weight.as_ref().map(|weight| weight as &dyn Weight);
        let tensor = method.tensor(at, part, weight, &mut rng.named(site.as_str()))?;
        let narrow = tensor.rank() == 2 && base.activations() == crate::pass::Activations::Bf16;
        made.put(name, &tensor.to_dtype(if narrow { DType::BF16 } else { DType::F32 })?)?;
    }
    for (name, other) in later {
        made.repeat(name, &other)?;
    }
    Ok(made)
}

/// Where a site is: its place, its layer and its expert.
pub(crate) type Where = (Place, Option<u32>, Option<u32>);

/// Sites by where they are.
pub(crate) fn by_place(sites: &[Site]) -> BTreeMap<Where, &Site> {
    sites.iter().map(|site| ((site.place, site.layer, site.expert), site)).collect()
}
