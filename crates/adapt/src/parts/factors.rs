//! Pairs of thin matrices, `A_ri` and `B_or`, beside a linear.

use attune_architecture::Site;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Port};
use attune_points::{Error, Locals, Result, TensorSpec};
use attune_spec::Fault;
use attune_tensor::linalg::Svd;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};

use crate::parts::linears;
use crate::parts::starts::{self, Start};

/// A pair at each site, of the rank that `rank` says for it.
///
/// # Errors
/// One fault for each site that is no linear or too narrow for the rank.
pub(crate) fn attach(
    sites: &[Site],
    a: &'static str,
    b: &'static str,
    rank: impl Fn(&str) -> u32,
) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
    linears::attach(sites, |site, output, input| {
        let r = within(rank(site.id.as_str()), site, (output, input))?;
        Ok(vec![TensorSpec::trained(a, [r, input]), TensorSpec::trained(b, [output, r])])
    })
}

/// A rank, if a matrix of this shape can have it.
///
/// # Errors
/// The fault of a rank beyond it.
pub(crate) fn within(rank: u32, site: &Site, (o, i): (usize, usize)) -> std::result::Result<usize, Fault> {
    let most = o.min(i);
    if rank as usize > most {
        let message = format!("is {rank}; {} is {o} by {i}, so its rank is at most {most}", site.id);
        return Err(Fault::new("rank", message));
    }
    Ok(rank as usize)
}

/// The names and shapes of an attachment that is such a pair: `(a, [r, i])`, `(b, [o, r])`.
///
/// # Errors
/// [`Error::Refused`] if it is something else.
pub(crate) fn pair(at: &Attachment) -> Result<(&TensorSpec, &TensorSpec)> {
    match at.tensors.as_slice() {
        [a, b] if a.shape.len() == 2 && b.shape.len() == 2 && a.shape[0] == b.shape[1] => Ok((a, b)),
        _ => {
            Err(Error::Refused(format!("this initialisation is for a pair of factors; {} has other tensors", at.site)))
        }
    }
}

/// The factor on the product of a pair, where the component adds that product and nothing else: what takes the product of a start
/// out of the base has to know it.
///
/// # Errors
/// [`Error::Refused`] if the component does something else with its tensors.
pub(crate) fn scale(of: &dyn Adapter, at: &Attachment) -> Result<f64> {
    let (a, b) = pair(at)?;
    match of.port(at) {
        Port::Delta(map) => match map.fused() {
            Some(FusedRows::LowRank { down, up, scale, .. }) if down == a.local && up == b.local && scale != 0.0 => {
                Ok(scale)
            }
            _ => {
                Err(Error::Refused(format!("this initialisation is for a product of factors; {} has another", at.site)))
            }
        },
        _ => Err(Error::Refused(format!("this initialisation is for a product of factors; {} has another", at.site))),
    }
}

/// The product of some singular triples as a pair: `√S V` as `[r, i]` and `U √S` as `[o, r]`.
///
/// # Errors
/// Whatever making them raises.
pub(crate) fn balanced(triples: &Svd) -> Result<(Tensor, Tensor)> {
    let root = triples.s.sqrt()?;
    Ok((triples.v.broadcast_mul(&root.unsqueeze(1)?)?, triples.u.broadcast_mul(&root)?))
}

/// A pair that starts with these values, and the same product taken out of the base.
///
/// # Errors
/// As for [`pair`], or shapes that do not fit.
pub(crate) fn taken_out(at: &Attachment, a_ri: &Tensor, b_or: &Tensor) -> Result<(Locals, BaseEdit)> {
    let (a, b) = pair(at)?;
    let (a_ri, b_or) = (a_ri.to_dtype(DType::F32)?.contiguous()?, b_or.to_dtype(DType::F32)?.contiguous()?);
    let site = at.site.as_str();
    let beside = Locals::new(site, [(a.local, a_ri.clone()), (b.local, b_or.neg()?)]);
    Ok((Locals::new(site, [(a.local, a_ri), (b.local, b_or)]), BaseEdit::Beside(beside)))
}

/// A uniform in ±1/sqrt(i) (Kaiming's bound sqrt(6 / ((1 + a²) i)) with a = sqrt(5), as PyTorch's linears start), B zero.
///
/// # Errors
/// As for [`pair`].
pub(crate) fn kaiming(at: &Attachment, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
    let (a, _) = pair(at)?;
    starts::each(at, rng, |spec| if spec.local == a.local { Start::kaiming(spec) } else { Start::Constant(0.0) })
}

/// A normal with standard deviation `std`, B zero.
///
/// # Errors
/// As for [`pair`].
pub(crate) fn gaussian(at: &Attachment, std: f64, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
    let (a, _) = pair(at)?;
    starts::each(at, rng, |spec| if spec.local == a.local { Start::Normal(std) } else { Start::Constant(0.0) })
}
