//! The point `Init`: given base weight and statistics, what are the starting tensors?

mod corda;
mod eva;
mod gaussian;
mod kaiming;
mod kore;
mod loftq;
mod lora_ga;
mod mica;
mod olora;
mod orthogonal;
mod orthonormal;
mod pissa;

use attune_points::init::Init;
use attune_spec::method::{Point, Registry, entry};

/// All initialisations.
pub static INITS: Registry<dyn Init> = Registry::new(
    Point::Init,
    &[
        entry::<corda::Corda>(),
        entry::<eva::Eva>(),
        entry::<gaussian::Gaussian>(),
        entry::<kaiming::Kaiming>(),
        entry::<kore::Kore>(),
        entry::<loftq::Loftq>(),
        entry::<lora_ga::LoraGa>(),
        entry::<mica::Mica>(),
        entry::<olora::Olora>(),
        entry::<orthogonal::Orthogonal>(),
        entry::<orthonormal::Orthonormal>(),
        entry::<pissa::Pissa>(),
    ],
);
