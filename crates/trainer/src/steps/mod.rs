//! The point `StepRule`: how does one optimiser step use the engine?

mod plain;
mod reuse;
mod smart;

use attune_points::engine::StepRule;
use attune_spec::method::{Point, Registry, entry};

/// All step rules.
pub static STEP_RULES: Registry<dyn StepRule> =
    Registry::new(Point::StepRule, &[entry::<plain::Plain>(), entry::<reuse::Reuse>(), entry::<smart::Smart>()]);
