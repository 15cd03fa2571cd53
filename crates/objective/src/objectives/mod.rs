//! The point `Objective`: layout and outputs to loss.

mod dpo;
mod grpo;
mod info_nce;
mod sft;

use attune_points::objective::Objective;
use attune_spec::method::{Point, Registry, entry};

/// All objectives.
pub static OBJECTIVES: Registry<dyn Objective> = Registry::new(
    Point::Objective,
    &[entry::<dpo::Dpo>(), entry::<grpo::Grpo>(), entry::<info_nce::InfoNce>(), entry::<sft::Sft>()],
);
