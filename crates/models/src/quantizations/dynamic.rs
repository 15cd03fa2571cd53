//! Numbers in eight bits by blocks, with a dynamic exponent: what the scales of a coarser format are held in.
//!
//! A code word has a sign, some zeros that count as a decimal exponent, and the rest as a fraction: many values near zero, seven
//! decades down. A block's numbers are divided by the largest magnitude in it, and each becomes the nearest value.
//! 8-bit Optimizers via Block-wise Quantization. Dettmers, Lewis, Shleifer, Zettlemoyer, 2022.

use std::sync::LazyLock;

/// Numbers of a block.
pub(super) const BLOCK: usize = 256;

/// The values of all code words, ascending. Their sums and products are made in 32 bits, as elsewhere, so that they have the same
/// bits.
static VALUES: LazyLock<[f32; 256]> = LazyLock::new(values);

fn values() -> [f32; 256] {
    const EXPONENTS: i32 = 7;
    let mut all = vec![0.0f32, 1.0];
    for i in 0..EXPONENTS {
        // The middles of 2^i equal steps from 0.1 to 1, times a power of ten.
        let steps = 1usize << i;
        let step = (1.0f32 - 0.1) / steps as f32;
        // From the nearer end.
        let at = |n: usize| {
            if n < steps.div_ceil(2) { step.mul_add(n as f32, 0.1) } else { (-step).mul_add((steps - n) as f32, 1.0) }
        };
        let power = 10f64.powi(i - (EXPONENTS - 1)) as f32;
        for n in 0..steps {
            let middle = f64::from((at(n) + at(n + 1)) / 2.0 * power) as f32;
            all.extend([middle, -middle]);
        }
    }
    all.sort_by(f32::total_cmp);
    let mut values = [0.0; 256];
    values.copy_from_slice(&all);
    values
}

/// Numbers in eight bits.
#[derive(Debug)]
pub(super) struct Dynamic {
    codes: Vec<u8>,
    /// The largest magnitude of each block.
    scales: Vec<f32>,
}

impl Dynamic {
    pub(super) fn new(numbers: &[f32]) -> Self {
        let values = &*VALUES;
        let (mut codes, mut scales) = (Vec::with_capacity(numbers.len()), Vec::new());
        for block in numbers.chunks(BLOCK) {
            let scale = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let inverse = 1.0 / scale.max(1e-38);
            codes.extend(block.iter().map(|x| {
                let x = (x * inverse).clamp(-1.0, 1.0);
                // The first value that is not below, or the one before it if that is nearer.
                let above = values.partition_point(|value| *value < x).min(values.len() - 1);
                let below = above.saturating_sub(1);
                if x - values[below] <= values[above] - x { below as u8 } else { above as u8 }
            }));
            scales.push(scale);
        }
        Self { codes, scales }
    }

    /// Numbers that somebody else has made, with blocks of the same length and code words of the same values.
    pub(super) fn stored(codes: Vec<u8>, scales: Vec<f32>) -> Option<Self> {
        (scales.len() == codes.len().div_ceil(BLOCK)).then_some(Self { codes, scales })
    }

    /// Whether these are the values of the code words.
    pub(super) fn has_values(values: &[f32]) -> bool {
        values.len() == VALUES.len() && values.iter().zip(VALUES.iter()).all(|(a, b)| (a - b).abs() <= 1e-7)
    }

    /// The number at a place.
    pub(super) fn at(&self, place: usize) -> f32 {
        VALUES[usize::from(self.codes[place])] * self.scales[place / BLOCK]
    }

    pub(super) const fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    #[cfg(test)]
    pub(super) fn codes(&self) -> &[u8] {
        &self.codes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_bitsandbytes() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/nf4/matrices.safetensors");
        let map = attune_tensor::Mapped::open(&file).unwrap().get("dynamic_map").unwrap().unwrap();
        let map = map.to_tensor(candle_core::DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let off: Vec<(usize, f32, f32)> =
            (0..256).filter(|i| map[*i] != VALUES[*i]).map(|i| (i, map[i], VALUES[i])).collect();
        assert!(off.is_empty(), "{off:?}");
    }

    #[test]
    fn values_ascend_from_almost_minus_one_to_one() {
        assert!(VALUES.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((VALUES[255], VALUES[127]), (1.0, 0.0));
        assert!((-1.0..-0.99).contains(&VALUES[0]));
    }

    /// Each number becomes the nearest value: half of the gap around it, times the block's scale, is the most that is lost.
    #[test]
    fn numbers_are_as_near_as_values_are() {
        let numbers: Vec<f32> = (0..600).map(|i| (i as f32 - 250.0) * 1e-3).collect();
        let held = Dynamic::new(&numbers);
        assert_eq!(held.bytes(), 600 + 3 * 4);
        for (place, x) in numbers.iter().enumerate() {
            let scale = held.scales[place / BLOCK];
            let nearest = VALUES.iter().map(|value| (value * scale - x).abs()).fold(f32::INFINITY, f32::min);
            assert!((held.at(place) - x).abs() <= nearest + 1e-9, "{place}");
        }
        assert_eq!(Dynamic::new(&[0.0; 3]).at(2), 0.0);
    }
}
