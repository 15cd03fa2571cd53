//! The point `Init`: given the base weight, what are the starting tensors?

mod gaussian;
mod kaiming;
mod mica;
mod olora;
mod orthonormal;
mod pissa;

use attune_points::init::Init;
use attune_spec::method::{Point, Registry, entry};

/// All initialisations.
pub static INITS: Registry<dyn Init> = Registry::new(
    Point::Init,
    &[
        entry::<gaussian::Gaussian>(),
        entry::<kaiming::Kaiming>(),
        entry::<mica::Mica>(),
        entry::<olora::Olora>(),
        entry::<orthonormal::Orthonormal>(),
        entry::<pissa::Pissa>(),
    ],
);
