//! The point `Mixing`: which domain does the next document come from, given feedback?

mod fixed;

use attune_points::mixing::Mixing;
use attune_spec::method::{Point, Registry, entry};

/// All mixing methods.
pub static MIXINGS: Registry<dyn Mixing> = Registry::new(Point::Mixing, &[entry::<fixed::Fixed>()]);
