//! Components at blocks: what attention or an MLP gives as a whole.

use attune_architecture::{Site, SiteKind};
use attune_points::TensorSpec;
use attune_points::adapter::Attachment;
use attune_spec::Fault;

/// An attachment at each site with the tensors that `tensors` says for a block of this width.
///
/// # Errors
/// One fault for each site that is no block; the first that `tensors` finds, for blocks of a model are alike.
pub(crate) fn attach(
    sites: &[Site],
    tensors: impl Fn(&Site, usize) -> Result<Vec<TensorSpec>, Fault>,
) -> Result<Vec<Attachment>, Vec<Fault>> {
    let no_block = |site: &Site| {
        let message = format!("names {}, which is a {}; expected blocks", site.id, site.kind.name());
        Fault::new("targets", message)
    };
    let is_block = |site: &&Site| matches!(site.kind, SiteKind::Block { .. });
    let faults: Vec<Fault> = sites.iter().filter(|site| !is_block(site)).map(no_block).collect();
    if !faults.is_empty() {
        return Err(faults);
    }
    let attachment = |site: &Site| {
        let width = if let SiteKind::Block { width } = site.kind { width } else { 0 };
        let tensors = tensors(site, width).map_err(|fault| vec![fault])?;
        Ok(Attachment { site: site.id.clone(), tensors })
    };
    sites.iter().map(attachment).collect()
}
