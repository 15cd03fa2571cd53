//! The point `Surgery`: one architecture and its weights to another.

mod dynamic_dino;
mod layer_replication;

use attune_points::surgery::Surgery;
use attune_spec::method::{Point, Registry, entry};

/// All surgeries.
pub static SURGERIES: Registry<dyn Surgery> = Registry::new(
    Point::Surgery,
    &[entry::<dynamic_dino::DynamicDino>(), entry::<layer_replication::LayerReplication>()],
);
