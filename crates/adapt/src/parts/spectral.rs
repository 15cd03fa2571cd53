//! The singular vectors of a weight, which some methods keep and change what lies between.

use attune_architecture::Site;
use attune_points::{Result, Weight};
use attune_spec::Fault;
use attune_tensor::linalg::{self, Svd};
use attune_tensor::rng::Rng;
use candle_core::DType;

use crate::parts::factors;

/// How many singular triples a site's weight is asked for, where `rank` 0 stands for all.
///
/// # Errors
/// The fault of more than there are.
pub(crate) fn triples(rank: u32, site: &Site, (o, i): (usize, usize)) -> std::result::Result<usize, Fault> {
    if rank == 0 { Ok(o.min(i)) } else { factors::within(rank, site, (o, i)) }
}

/// The `rank` largest singular triples of a weight: exact ones, or with a number of rounds by random directions.
///
/// # Errors
/// A weight that cannot be read, or one with numbers that are not finite.
pub(crate) fn leading(weight: &dyn Weight, rank: usize, rounds: Option<u32>, rng: &Rng) -> Result<Svd> {
    let w_oi = weight.dense(DType::F64)?;
    Ok(match rounds {
        None => linalg::svd(&w_oi)?.truncated(rank)?,
        Some(rounds) => linalg::randomised_svd(&w_oi, rank, rounds as usize, &mut rng.named("directions"))?,
    })
}
