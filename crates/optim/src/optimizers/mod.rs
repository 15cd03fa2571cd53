//! The point `Optimizer`: gradients to update.

mod adamw;

use attune_points::optimizer::Optimizer;
use attune_spec::method::{Point, Registry, entry};

/// All optimisers.
pub static OPTIMIZERS: Registry<dyn Optimizer> = Registry::new(Point::Optimizer, &[entry::<adamw::AdamW>()]);
