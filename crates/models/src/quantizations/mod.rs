//! The point `Quantization`: in how few bits are the frozen matrices of the base held?

mod dynamic;
mod nf4;

use attune_points::quantization::Quantization;
use attune_spec::method::{Point, Registry, entry};

/// All formats.
pub static QUANTIZATIONS: Registry<dyn Quantization> = Registry::new(Point::Quantization, &[entry::<nf4::Nf4>()]);
