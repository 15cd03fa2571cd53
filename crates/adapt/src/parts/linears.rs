//! Components at linears.

use attune_architecture::{Site, SiteKind};
use attune_points::TensorSpec;
use attune_points::adapter::Attachment;
use attune_spec::Fault;

/// Why a tensor of an expert may have no gradient for a while.
pub(crate) const IDLE: &str = "its expert may not be routed to";

/// The largest output and the largest input width of the linears.
pub(crate) fn widest(sites: &[Site]) -> (usize, usize) {
    let widths = sites.iter().filter_map(|site| match site.kind {
        SiteKind::Linear { output, input, .. } => Some((output, input)),
        _ => None,
    });
    widths.fold((0, 0), |(o, i), (output, input)| (o.max(output), i.max(input)))
}

/// How many sites are told of that a component cannot be put on.
const SHOWN: usize = 3;

/// What `tensors` says for each site, by its output and input width.
///
/// # Errors
/// One fault for each site that is no linear, and for each that `tensors` cannot be put on.
pub(crate) fn attach(
    sites: &[Site],
    tensors: impl Fn(&Site, usize, usize) -> Result<Vec<TensorSpec>, Fault>,
) -> Result<Vec<Attachment>, Vec<Fault>> {
    let (mut faults, mut attachments) = (Vec::new(), Vec::new());
    for site in sites {
        let SiteKind::Linear { output, input, .. } = site.kind else {
            let message = format!("names {}, which is a {}; expected linears", site.id, site.kind.name());
            faults.push(Fault::new("targets", message));
            continue;
        };
        match tensors(site, output, input) {
            Ok(mut tensors) => {
                if site.expert.is_some() {
                    tensors.iter_mut().for_each(|spec| spec.quiet = spec.quiet.or(Some(IDLE)));
                }
                attachments.push(Attachment { site: site.id.clone(), tensors });
            }
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() {
        return Ok(attachments);
    }
    // Layers are alike: what is wrong with one is wrong with all.
    let more = faults.len().saturating_sub(SHOWN);
    faults.truncate(SHOWN);
    if let Some(last) = faults.last_mut().filter(|_| more > 0) {
        last.message.push_str(&format!("; {more} more sites are like these"));
    }
    Err(faults)
}
