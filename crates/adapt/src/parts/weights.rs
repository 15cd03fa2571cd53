//! Components whose tensors stand in for a site's own.

use attune_architecture::{Architecture, Site, SiteKind, TensorPart};
use attune_points::adapter::{Attachment, BaseEdit, Merged};
use attune_points::{Locals, Result, TensorSpec, Weight};
use candle_core::DType;

use crate::parts::linears::IDLE;

/// The local name of a site's weight.
pub(crate) const WEIGHT: &str = "weight";

/// The local name of a site's bias.
pub(crate) const BIAS: &str = "bias";

/// The own tensors of each site, in the base's shapes. A tied head has none. Norms and biases do not decay.
pub(crate) fn attach(arch: &Architecture, sites: &[Site]) -> Vec<Attachment> {
    let infos = arch.tensors();
    let attachments = sites.iter().map(|site| {
        let own = infos.iter().filter(|info| info.site == site.id).map(|info| {
            let local = if info.part == TensorPart::Bias { BIAS } else { WEIGHT };
            let matrix = info.part == TensorPart::Weight && !matches!(site.kind, SiteKind::Norm { .. });
            TensorSpec {
                decay: matrix,
                quiet: site.expert.map(|_| IDLE),
                ..TensorSpec::trained(local, info.shape.clone())
            }
        });
        Attachment { site: site.id.clone(), tensors: own.collect() }
    });
    attachments.filter(|at| !at.tensors.is_empty()).collect()
}

/// They start as the base's.
///
/// # Errors
/// A weight that cannot be read.
pub(crate) fn start(at: &Attachment, weight: &dyn Weight) -> Result<(Locals, BaseEdit)> {
    let mut tensors = vec![(WEIGHT, weight.dense(DType::F32)?)];
    tensors.extend(weight.bias(DType::F32)?.map(|bias| (BIAS, bias)));
    Ok((Locals::new(at.site.as_str(), tensors), BaseEdit::None))
}

/// They are what the site's become.
///
/// # Errors
/// A tensor that is not there.
pub(crate) fn merged(at: &Attachment, tensors: &Locals) -> Result<Merged> {
    let has_bias = at.tensors.iter().any(|spec| spec.local == BIAS);
    let bias = has_bias.then(|| tensors.get(BIAS).cloned()).transpose()?;
    Ok(Merged::Weight { weight: tensors.get(WEIGHT)?.clone(), bias })
}
