//! A component and what was taken out of the base for it, as one adapter that anybody can add to the unchanged base; and what components
//! add, as pairs of factors.

use std::collections::{BTreeMap, BTreeSet};

use attune_architecture::{Architecture, SiteId, SiteKind};
use attune_points::adapter::{Adapter, Attachment, Merged};
use attune_points::{Error, Locals, Params, Result};
use candle_core::{DType, Device, Tensor};

use crate::adapters::{OF_RANKS, of_ranks, reads};

/// An adapter with its parameters.
pub struct Joined {
    /// What the method is called.
    pub method: &'static str,
    /// The adapter: LoRA.
    pub adapter: Box<dyn Adapter>,
    /// Where it is attached.
    pub attachments: Vec<Attachment>,
    /// Its parameters.
    pub params: Params,
}

/// The sum of a component with its parameters `own` and of the same with those `beside` it: of the sum of their ranks, or of the
/// width of a linear, if that is less.
///
/// # Errors
/// [`Error::Refused`] if the component is no low-rank change of a weight.
pub fn joined(
    adapter: &dyn Adapter,
    attachments: &[Attachment],
    own: &Params,
    beside: &Params,
    architecture: &Architecture,
) -> Result<Joined> {
    let mut pairs = BTreeMap::new();
    for at in attachments {
        let (left, right) = (product(adapter, at, own)?, product(adapter, at, beside)?);
        let (b_or, a_ri) = (Tensor::cat(&[&left.0, &right.0], 1)?, Tensor::cat(&[&left.1, &right.1], 0)?);
        pairs.insert(at.site.clone(), narrowed(b_or, a_ri)?);
    }
    of_pairs(pairs, architecture)
}

/// The adapter that adds the product of two factors, `b_or` and `a_ri`, at each of these sites.
///
/// # Errors
/// [`Error::Refused`] for sites or shapes that are not the base's.
pub fn of_pairs(mut pairs: BTreeMap<SiteId, (Tensor, Tensor)>, architecture: &Architecture) -> Result<Joined> {
    let ranks = pairs.iter().map(|(site, (_, a_ri))| Ok((site.to_string(), a_ri.dim(0)? as u32)));
    let adapter = of_ranks(ranks.collect::<Result<_>>()?);
    let sites: Vec<_> = architecture.sites().into_iter().filter(|site| pairs.contains_key(&site.id)).collect();
    let attachments = adapter.attach(architecture, &sites).map_err(|faults| {
        Error::Refused(faults.first().map_or_else(|| "the sites are not the base's".to_owned(), ToString::to_string))
    })?;
    let mut params = Params::new();
    for at in &attachments {
        let Some((b_or, a_ri)) = pairs.remove(&at.site) else { continue };
        for spec in &at.tensors {
            let tensor = if reads(spec) { &a_ri } else { &b_or };
            if tensor.dims() != spec.shape {
                let message = format!(
                    "{} has a factor of shape {:?}; its base makes it {:?}",
                    at.site,
                    tensor.dims(),
                    spec.shape
                );
                return Err(Error::Refused(message));
            }
            params.insert_declared(spec, at.site.as_str(), tensor.clone());
        }
    }
    Ok(Joined { method: OF_RANKS, adapter, attachments, params })
}

/// The factors of what a component adds to a weight, `b_or` and `a_ri`, and the factor on their product.
pub type Factors = (Tensor, Tensor, f64);

/// Those of what a component adds at each of its sites.
///
/// # Errors
/// [`Error::Refused`] if the component is no low-rank change of a weight.
pub fn pairs(
    adapter: &dyn Adapter,
    attachments: &[Attachment],
    params: &Params,
    architecture: &Architecture,
) -> Result<Vec<(SiteId, Factors)>> {
    let tables = architecture.sites().into_iter().filter(|site| matches!(site.kind, SiteKind::Embedding { .. }));
    let tables: BTreeSet<SiteId> = tables.map(|site| site.id).collect();
    let pair = |at: &Attachment| {
        let (b_or, a_ri, scale) = factors(adapter, at, params)?;
        // A table is the weight of what reads numbers of tokens, turned around.
        let turned = |factor: Tensor| factor.t()?.contiguous().map_err(Error::from);
        let (b_or, a_ri) = if tables.contains(&at.site) { (turned(a_ri)?, turned(b_or)?) } else { (b_or, a_ri) };
        Ok((at.site.clone(), (b_or, a_ri, scale)))
    };
    attachments.iter().map(pair).collect()
}

/// What a component adds to a weight, as `b_or` (with the factor on the product) and `a_ri`.
fn product(adapter: &dyn Adapter, at: &Attachment, params: &Params) -> Result<(Tensor, Tensor)> {
    let (left, right, scale) = factors(adapter, at, params)?;
    Ok(((left * scale)?, right))
}

/// What a component adds to a weight: two factors, and the factor on their product.
fn factors(adapter: &dyn Adapter, at: &Attachment, params: &Params) -> Result<Factors> {
    let site = at.site.as_str();
    let tensors = at.tensors.iter().map(|spec| {
        let name = spec.name(site);
        let tensor = params.get(&name).ok_or_else(|| Error::Refused(format!("{name} has no value")))?;
        Ok((spec.local, tensor.clone()))
    });
    let tensors = Locals::new(site, tensors.collect::<Result<Vec<_>>>()?);
    let none = Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?;
    match adapter.merge(at, &tensors, &none)? {
        Merged::Factors { left, right, scale } => Ok((left, right, scale)),
        _ => Err(Error::Refused(format!("the component at {site} is no product of two factors"))),
    }
}

/// The same product with no more rank than the matrix has rows or columns.
fn narrowed(b_or: Tensor, a_ri: Tensor) -> Result<(Tensor, Tensor)> {
    let (output, rank) = b_or.dims2()?;
    let input = a_ri.dim(1)?;
    if rank <= output.min(input) {
        return Ok((b_or, a_ri));
    }
    let change_oi = b_or.matmul(&a_ri)?;
    let unit = |width| Tensor::eye(width, DType::F32, &Device::Cpu);
    Ok(if output <= input { (unit(output)?, change_oi) } else { (change_oi, unit(input)?) })
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    #[test]
    fn a_product_of_too_many_factors_stays_the_same_matrix() {
        let random =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F32).unwrap();
        for (output, input) in [(3, 5), (5, 3)] {
            let (b, a) = (random("b", [output, 4]), random("a", [4, input]));
            let whole = b.matmul(&a).unwrap();
            let (left, right) = narrowed(b, a).unwrap();
            assert_eq!(right.dim(0).unwrap(), 3);
            let off = (left.matmul(&right).unwrap() - whole).unwrap().abs().unwrap().flatten_all().unwrap();
            assert!(off.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-6);
        }
    }
}
