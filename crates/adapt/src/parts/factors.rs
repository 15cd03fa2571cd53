//! Pairs of thin matrices, `A_ri` and `B_or`, beside a linear.

use attune_architecture::Site;
use attune_points::adapter::{Attachment, BaseEdit};
use attune_points::{Error, Locals, Result, TensorSpec};
use attune_spec::Fault;
use attune_tensor::rng::Rng;

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
