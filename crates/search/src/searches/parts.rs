//! What searches do alike.

use std::collections::BTreeSet;

use attune_tensor::Rng;

use crate::{Place, Space, Tried};

/// How often a place is drawn before all are gone through.
const DRAWS: usize = 64;

/// Where jobs are no longer asked for: tried, chosen, or found to be none.
pub(super) struct Taken(BTreeSet<Place>);

impl Taken {
    pub(super) fn of(tried: &[Tried]) -> Self {
        Self(tried.iter().map(|tried| tried.place.clone()).collect())
    }

    pub(super) fn has(&self, place: &Place) -> bool {
        self.0.contains(place)
    }

    /// Takes a place, and says whether it can be tried.
    pub(super) fn take(&mut self, place: &Place, fits: &mut dyn FnMut(&Place) -> bool) -> bool {
        self.0.insert(place.clone()) && fits(place)
    }

    /// A place at random that can be tried; none if nothing is left.
    pub(super) fn any(&mut self, space: &Space, rng: &mut Rng, fits: &mut dyn FnMut(&Place) -> bool) -> Option<Place> {
        let drawn = (0..DRAWS).map(|_| space.any(rng)).find(|place| self.take(place, fits));
        // Nearly all may be taken, and then there are few.
        drawn.or_else(|| {
            let few = space.places() <= 1 << 16;
            few.then(|| space.all().find(|place| self.take(place, fits))).flatten()
        })
    }

    /// So many places that cover each axis evenly, as far as they can be tried, and others at random for those that cannot.
    pub(super) fn spread(
        &mut self,
        space: &Space,
        places: usize,
        rng: &mut Rng,
        fits: &mut dyn FnMut(&Place) -> bool,
    ) -> Vec<Place> {
        let spread = space.spread(places, rng);
        let mut found: Vec<Place> = spread.into_iter().filter(|place| self.take(place, fits)).collect();
        while found.len() < places {
            let Some(place) = self.any(space, rng, fits) else { break };
            found.push(place);
        }
        found
    }
}
