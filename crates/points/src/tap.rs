//! Who looks at what linears read, at the stream between layers and at keys and values, while a model runs.

use attune_architecture::SiteId;
use attune_tensor::kernels::Kernels;
use attune_tensor::view::MatRef;

use crate::error::Result;

/// Looks at the rows that linears read, and at those of the stream that enter an attention (under the block's own site, before
/// components add to them), part by part, in the order in which the model comes to them.
pub trait Tap: Sync {
    /// Whether it looks at those of a site.
    fn wants(&self, site: &SiteId) -> bool;

    /// The rows `x_ti` of a part, in the type of the activations; `ids` are their numbers in its layout, if they are not all of
    /// them. Rows of a part come in the order of their numbers.
    ///
    /// # Errors
    /// Whatever it makes of them raises.
    fn read(
        &self,
        site: &SiteId,
        part: usize,
        ids: Option<&[u32]>,
        x_ti: MatRef<'_>,
        kernels: &dyn Kernels,
    ) -> Result<()>;

    /// The keys and values `[T, k]` of a part's rows at an attention, under the block's own site, in the type of the activations; keys as
    /// queries are compared with them: normed, and turned by their positions where these are. Most do not look at them.
    ///
    /// # Errors
    /// Whatever it makes of them raises.
    fn keys_values(
        &self,
        _site: &SiteId,
        _part: usize,
        _k: MatRef<'_>,
        _v: MatRef<'_>,
        _kernels: &dyn Kernels,
    ) -> Result<()> {
        Ok(())
    }
}
