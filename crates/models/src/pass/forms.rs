//! In which form components take part at a linear: what costs less as another weight than on rows becomes one.
//!
//! Which form that is depends on the site and the component alone, never on the rows of a pass, so that a part has the same bits whatever
//! goes through beside it. In a pass of bf16 everything stays on rows: a small change would be rounded away with the weight that it is
//! added to. So it does where texts go on, row by row.

use std::ops::Range;

use attune_architecture::Site;
use attune_points::adapter::Port;

use crate::pass::arena::Activations;
use crate::pass::parts::{Given, Ids, PassCx, Placed};

impl<'a> PassCx<'a> {
    /// The components at a linear on the rows given, part by part in the order in which they apply; those that became weights come behind
    /// all others, what stood at the ends before what was added.
    pub(crate) fn formed<'g>(&self, site: &Site, given: Given<'g>) -> Vec<Placed<'g, Port<'g>>>
    where
        'a: 'g,
    {
        let mut placed = self.placed(&site.id, given);
        let on_rows = self.dtype != Activations::F32 || self.kept.is_some() || self.kernels.works_ahead();
        let (Given::All, false, None, Some(shape)) = (given, on_rows, site.expert, site.out_in()) else {
            return placed;
        };
        let of_parts: Vec<Range<usize>> = runs(&placed);
        for of_part in of_parts {
            become_weights(&mut placed[of_part], shape);
        }
        placed
    }
}

/// Components of one part after the other.
fn runs(placed: &[Placed<'_, Port<'_>>]) -> Vec<Range<usize>> {
    let mut end = 0;
    let of_part = |run: &[Placed<'_, Port<'_>>]| {
        end += run.len();
        end - run.len()..end
    };
    placed.chunk_by(|a, b| a.part == b.part).map(of_part).collect()
}

/// Gives the components of one part at a site another port, where that costs less and changes nothing for the others.
fn become_weights<'g>(placed: &mut [Placed<'g, Port<'g>>], shape: (usize, usize)) {
    let plain = |placed: &Placed<'_, Port<'_>>| {
        let known = matches!(placed.port, Port::Delta(_) | Port::Weight(_) | Port::Input(_) | Port::Output(_));
        known && matches!(placed.ids, Ids::All)
    };
    if !placed.iter().all(plain) {
        return;
    }
    let is_end = |placed: &Placed<'_, Port<'_>>| matches!(placed.port, Port::Input(_) | Port::Output(_));
    let ends = placed.iter().filter(|placed| is_end(placed));
    // What is added to what an end gives, or reads what one reads, stays beside it.
    if ends.clone().any(|end| as_weight(end.port, shape).is_none()) {
        return;
    }
    // A weight is made of the base's, then turned as its ends would, and then added to.
    placed.sort_by_cached_key(|placed| match (is_end(placed), as_weight(placed.port, shape)) {
        (_, None) => 0,
        (true, Some(_)) => 1,
        (false, Some(_)) => 2,
    });
    for placed in placed {
        placed.port = as_weight(placed.port, shape).unwrap_or(placed.port);
    }
}

/// A port as that of another weight, if the component has such a form and it costs less.
fn as_weight<'g>(port: Port<'g>, shape: (usize, usize)) -> Option<Port<'g>> {
    let form = match port {
        Port::Delta(map) => map.as_weight(shape),
        Port::Input(map) | Port::Output(map) => map.as_weight(shape),
        _ => None,
    };
    form.filter(|form| form.pays(shape)).map(|form| Port::Weight(form.map))
}
