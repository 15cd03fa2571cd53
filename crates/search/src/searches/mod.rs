//! The point `Search`: which jobs of a grid next? One file each, and one line in the list.

mod autopeft;
mod nsga2;
mod parts;
mod random;

use attune_spec::method::{Point, Registry, entry};

use crate::Search;

/// All searches.
pub static SEARCHES: Registry<dyn Search> =
    Registry::new(Point::Search, &[entry::<autopeft::AutoPeft>(), entry::<nsga2::Nsga2>(), entry::<random::Random>()]);
