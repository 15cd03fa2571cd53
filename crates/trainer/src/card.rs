//! Where the passes of a run work: on the processor, or on one of the machine's NVIDIA devices.

use attune_points::Error;
use attune_spec::job::Matmul;
use attune_tensor::kernels::{self, Kernels};

/// An NVIDIA device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its own name.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: u64,
}

/// The NVIDIA devices that this build can work on, by their numbers; none without a driver, or without the feature `cuda`.
#[cfg(feature = "cuda")]
pub fn cards() -> Vec<Card> {
    let found = kernels::cuda_devices().into_iter();
    found.map(|device| Card { name: device.name, memory_bytes: device.memory_bytes as u64 }).collect()
}

/// The NVIDIA devices that this build can work on, by their numbers; none without a driver, or without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub const fn cards() -> Vec<Card> {
    Vec::new()
}

/// The kernels of a device by its number, or of the processor, with products of 32 bits as the plan has them.
///
/// # Errors
/// [`Error::Device`]: there is no such device, or this build knows none.
pub fn kernels(card: Option<u32>, matmul: Matmul) -> Result<&'static dyn Kernels, Error> {
    let matmul = match matmul {
        Matmul::Highest => kernels::Matmul::Highest,
        Matmul::High => kernels::Matmul::High,
    };
    let Some(number) = card else { return Ok(kernels::cpu_multiplying(matmul)) };
    match open(number, matmul) {
        Ok(kernels) => Ok(kernels),
        Err(message) => Err(Error::Device(kernels::Fault { device: format!("NVIDIA device {number}"), message })),
    }
}

#[cfg(feature = "cuda")]
fn open(number: u32, matmul: kernels::Matmul) -> Result<&'static dyn Kernels, String> {
    kernels::cuda(number as usize, matmul).map(|cuda| cuda as &dyn Kernels).map_err(|fault| fault.to_string())
}

#[cfg(not(feature = "cuda"))]
fn open(_: u32, _: kernels::Matmul) -> Result<&'static dyn Kernels, String> {
    Err("this program was built without the feature `cuda`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_is_not_there_is_an_error_with_its_number() {
        let error = kernels(Some(4096), Matmul::Highest).map(Kernels::profile).unwrap_err().to_string();
        assert!(error.starts_with("NVIDIA device 4096: "), "{error}");
        for matmul in [Matmul::Highest, Matmul::High] {
            assert!(kernels(None, matmul).unwrap().profile().starts_with("cpu/"));
        }
    }
}
