//! The point `Merge`: what do several sets of weights become together?

mod dare_linear;
mod dare_ties;
mod magnitude_prune;
mod task_arithmetic;
mod ties;

use attune_points::merge::Merge;
use attune_spec::method::{Point, Registry, entry};

/// All merges.
pub static MERGES: Registry<dyn Merge> = Registry::new(
    Point::Merge,
    &[
        entry::<dare_linear::DareLinear>(),
        entry::<dare_ties::DareTies>(),
        entry::<magnitude_prune::MagnitudePrune>(),
        entry::<task_arithmetic::TaskArithmetic>(),
        entry::<ties::Ties>(),
    ],
);
