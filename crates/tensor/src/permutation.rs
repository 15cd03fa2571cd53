//! A random order of `0 .. n` that is never written down: the place of each index is computed.
//!
//! A balanced Feistel network permutes the numbers of 2b bits for the smallest such power above `n`; an index that lands
//! outside is sent through again until it lands inside, at most four times on average. So a data set of any size is
//! shuffled in no memory, and a resumed run goes on at index i without walking there.

use crate::rng::{Rng, philox};

const ROUNDS: u32 = 8;

/// A random order of `0 .. n`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: [u32; 2],
}

impl Permutation {
    /// The order of `0 .. n` that the stream `rng` gives.
    pub fn new(n: u64, rng: &Rng) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut stream = rng.named("permutation");
        Self { n, half_bits: bits.div_ceil(2).max(1), key: [stream.next_u32(), stream.next_u32()] }
    }

    /// Number of indices.
    pub const fn len(&self) -> u64 {
        self.n
    }

    /// Whether there is no index.
    pub const fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// What stands at place `index`.
    ///
    /// # Panics
    /// If `index` is not below the length.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.n, "place {index} of a permutation of {}", self.n);
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for round in 0..ROUNDS {
                let words = philox(self.key, [right as u32, (right >> 32) as u32, round, self.half_bits]);
                let mixed = u64::from(words[0]) | u64::from(words[1]) << 32;
                (left, right) = (right, left ^ (mixed & mask));
            }
            value = left << self.half_bits | right;
            // A walk along a cycle of the larger permutation comes back to a number below n, its start at the latest.
            if value < self.n {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn every_number_stands_at_one_place(n in 1u64..700, seed: u64) {
            let order = Permutation::new(n, &Rng::new(seed, "data"));
            let mut found: Vec<u64> = (0..n).map(|i| order.at(i)).collect();
            found.sort_unstable();
            prop_assert_eq!(found, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn large_orders_need_no_memory_and_differ_by_stream() {
        let n = (1 << 62) + 12_345;
        let (a, b) = (Permutation::new(n, &Rng::new(1, "a")), Permutation::new(n, &Rng::new(1, "b")));
        assert!(a.at(n - 1) < n);
        assert_ne!(a.at(0), b.at(0));
    }

    /// The first place of an order of four is each number about equally often: 5 standard errors, fixed seeds.
    #[test]
    fn places_are_uniform() {
        let trials = 4000;
        let mut counts = [0u32; 4];
        for seed in 0..trials {
            counts[Permutation::new(4, &Rng::new(seed, "data")).at(0) as usize] += 1;
        }
        let deviation = 5.0 * (trials as f64 * 3.0 / 16.0).sqrt();
        assert!(counts.iter().all(|&c| (f64::from(c) - trials as f64 / 4.0).abs() < deviation), "{counts:?}");
    }
}
