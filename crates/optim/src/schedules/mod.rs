//! The point `Schedule`: how the learning rate runs over time.

mod constant;
mod cosine;
mod linear;
mod parts;

use attune_points::schedule::Schedule;
use attune_spec::method::{Point, Registry, entry};

/// All schedules.
pub static SCHEDULES: Registry<dyn Schedule> = Registry::new(
    Point::Schedule,
    &[entry::<constant::Constant>(), entry::<cosine::Cosine>(), entry::<linear::Linear>()],
);
