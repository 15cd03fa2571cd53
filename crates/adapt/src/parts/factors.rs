//! Pairs of thin matrices, `A_ri` and `B_or`, beside a linear.

use attune_architecture::{Site, SiteKind};
use attune_points::adapter::Attachment;
use attune_points::{Error, Locals, Result, TensorSpec};
use attune_spec::Fault;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};

/// Why a tensor of an expert may have no gradient for a while.
pub(crate) const IDLE: &str = "its expert may not be routed to";

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
    let mut faults = Vec::new();
    let mut attachments = Vec::new();
    for site in sites {
        let SiteKind::Linear { output, input, .. } = site.kind else {
            faults.push(Fault::new(
                "targets",
                format!("names {}, which is a {}; expected linears", site.id, site.kind.name()),
            ));
            continue;
        };
        let r = rank(site.id.as_str()) as usize;
        if r > output.min(input) {
            let message =
                format!("is {r}; {} is {output} by {input}, so its rank is at most {}", site.id, output.min(input));
            faults.push(Fault::new("rank", message));
            continue;
        }
        let quiet = site.expert.map(|_| IDLE);
        let tensors = [TensorSpec::trained(a, [r, input]), TensorSpec::trained(b, [output, r])];
        let tensors = tensors.into_iter().map(|spec| TensorSpec { quiet, ..spec }).collect();
        attachments.push(Attachment { site: site.id.clone(), tensors });
    }
    if faults.is_empty() { Ok(attachments) } else { Err(faults) }
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
pub(crate) fn kaiming(at: &Attachment, rng: &mut Rng) -> Result<Locals> {
    let (a, b) = pair(at)?;
    let bound = 1.0 / (a.shape[1] as f64).sqrt();
    let a_ri = rng.named(a.local).uniform_tensor(a.shape.as_slice(), bound, DType::F32)?;
    started(at, a, b, a_ri)
}

/// A normal with standard deviation `std`, B zero.
///
/// # Errors
/// As for [`pair`].
pub(crate) fn gaussian(at: &Attachment, std: f64, rng: &mut Rng) -> Result<Locals> {
    let (a, b) = pair(at)?;
    let a_ri = rng.named(a.local).normal_tensor(a.shape.as_slice(), std, DType::F32)?;
    started(at, a, b, a_ri)
}

fn started(at: &Attachment, a: &TensorSpec, b: &TensorSpec, a_ri: Tensor) -> Result<Locals> {
    let b_or = Tensor::zeros(b.shape.as_slice(), DType::F32, &Device::Cpu)?;
    Ok(Locals::new(at.site.as_str(), [(a.local, a_ri), (b.local, b_or)]))
}
