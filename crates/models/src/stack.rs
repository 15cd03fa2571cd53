//! The components of a job at the sites of a model: slot by slot, what is attached where.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use attune_architecture::SiteId;
use attune_points::adapter::{Adapter, Attachment};
use attune_points::{Layout, Locals, Params, Result, Rows, TensorName};
use candle_core::Tensor;

/// One slot: a component and its attachments.
#[derive(Clone)]
pub struct Slot {
    adapter: Arc<dyn Adapter>,
    attachments: BTreeMap<SiteId, Attachment>,
}

impl Slot {
    /// A component with the attachments that it made for a model.
    pub fn new(adapter: Arc<dyn Adapter>, attachments: impl IntoIterator<Item = Attachment>) -> Self {
        Self { adapter, attachments: attachments.into_iter().map(|at| (at.site.clone(), at)).collect() }
    }

    /// The same component at some of its sites.
    #[must_use]
    pub fn at_some(&self, keep: impl Fn(&Attachment) -> bool) -> Self {
        Self::new(Arc::clone(&self.adapter), self.attachments().filter(|at| keep(at)).cloned())
    }

    /// The component.
    pub fn adapter(&self) -> &dyn Adapter {
        &*self.adapter
    }

    /// Its attachments, by site.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.values()
    }

    /// Those of the rows that it is bound to which the component acts on: never by domains.
    pub(crate) fn acts_on<'b>(&self, bound: &'b Rows, layout: &Layout) -> Cow<'b, Rows> {
        let bound = bound.on(layout);
        let Some(acts) = self.adapter.acts_on(layout) else { return bound };
        let both = |own: &Range<u32>, acts: &Range<u32>| own.start.max(acts.start)..own.end.min(acts.end);
        let segments = match &*bound {
            Rows::All(set) => acts.into_iter().map(|rows| (rows, *set)).collect(),
            Rows::Segments(segments) => {
                let each = segments.iter().flat_map(|(own, set)| acts.iter().map(move |acts| (both(own, acts), *set)));
                each.filter(|(rows, _)| !rows.is_empty()).collect()
            }
            // Resolved above.
            Rows::Domains(_) => Vec::new(),
        };
        Cow::Owned(Rows::Segments(segments))
    }

    /// What is attached at `site`.
    pub fn at(&self, site: &SiteId) -> Option<&Attachment> {
        self.attachments.get(site)
    }
}

/// The tensors of an attachment under their local names, taken from a set.
///
/// # Errors
/// A tensor that the set does not hold.
pub fn locals(at: &Attachment, params: &Params) -> Result<Locals> {
    locals_by(at, |name| params.get(name))
}

/// The tensors of an attachment under their local names, by whoever holds them.
///
/// # Errors
/// A tensor that nobody holds.
pub(crate) fn locals_by<'t>(at: &Attachment, held: impl Fn(&TensorName) -> Option<&'t Tensor>) -> Result<Locals> {
    let site = at.site.as_str();
    let found = at.tensors.iter().map(|spec| {
        let tensor = held(&spec.name(site)).ok_or_else(|| attune_points::Error::UnknownTensor {
            component: site.to_owned(),
            name: spec.local.to_owned(),
            declared: at.tensors.iter().map(|spec| spec.local.to_owned()).collect(),
        })?;
        Ok((spec.local, tensor.clone()))
    });
    Ok(Locals::new(site, found.collect::<Result<Vec<_>>>()?))
}

/// All slots, in the order of the banks of a [`attune_points::Theta`]: slot `i` reads bank `i`.
#[derive(Clone, Default)]
pub struct Stack {
    slots: Vec<Slot>,
}

impl Stack {
    /// A stack of these slots.
    pub fn new(slots: Vec<Slot>) -> Self {
        Self { slots }
    }

    /// The slots.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The slot that reads bank `index`.
    pub fn slot(&self, index: u16) -> Option<&Slot> {
        self.slots.get(index as usize)
    }
}
