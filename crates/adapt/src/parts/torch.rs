//! Random choices as torch draws them, for methods whose files say a seed in place of what was drawn.

use std::collections::BTreeMap;

/// How many numbers torch puts in order at random in the way that is known here.
pub(crate) const PERMUTED_MAX: u64 = u32::MAX as u64 / 20;

/// The first `count` numbers of `torch.randperm(n)` on a processor with a generator of this seed: Fisher and Yates' shuffle from the
/// front, of which no more is done than asked for. `n` is below [`PERMUTED_MAX`].
pub(crate) fn permutation(n: u64, count: usize, seed: u64) -> Vec<u64> {
    let mut words = Mersenne::new(seed as u32);
    // Places whose number is not their own any more.
    let mut moved: BTreeMap<u64, u64> = BTreeMap::new();
    let at = |moved: &BTreeMap<u64, u64>, place: u64| moved.get(&place).copied().unwrap_or(place);
    let draw = |place: u64| {
        // The last place is not drawn for: one number is left.
        let other = if place + 1 < n { place + u64::from(words.next()) % (n - place) } else { place };
        let number = at(&moved, other);
        let own = at(&moved, place);
        moved.insert(other, own);
        number
    };
    (0..n.min(count as u64)).map(draw).collect()
}

const LENGTH: usize = 624;
const MIDDLE: usize = 397;

/// The Mersenne Twister of 32 bits (MT19937).
struct Mersenne {
    state: Vec<u32>,
    at: usize,
}

impl Mersenne {
    fn new(seed: u32) -> Self {
        let mut state = vec![seed; LENGTH];
        for i in 1..LENGTH {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { state, at: LENGTH }
    }

    fn next(&mut self) -> u32 {
        if self.at == LENGTH {
            for i in 0..LENGTH {
                let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % LENGTH] & 0x7fff_ffff);
                let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + MIDDLE) % LENGTH] ^ (mixed >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut word = self.state[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))` of torch 2.15 on a processor.
    #[test]
    fn permutations_are_those_of_torch() {
        assert_eq!(permutation(10, 10, 777), [5, 9, 0, 3, 1, 7, 4, 8, 6, 2]);
        assert_eq!(permutation(576, 8, 777), [167, 485, 487, 374, 2, 153, 363, 46]);
        let large = [32_633_893, 44_532_042, 27_734_038, 37_492_051, 491_267, 9_225_162, 36_023_161, 7_414_053];
        assert_eq!(permutation(45_088_768, 8, 1), large);
        assert_eq!(permutation(300, 8, (1 << 33) + 5), [11, 146, 273, 204, 10, 85, 238, 28]);
        // Beyond the first words of the generator's state.
        assert_eq!(permutation(1_000_003, 700, 5)[696..], [470_823, 278_244, 274_671, 108_311]);
        assert_eq!(permutation(1, 4, 0), [0]);
    }

    #[test]
    fn numbers_come_once_each() {
        let mut all = permutation(97, 97, 3);
        all.sort_unstable();
        assert_eq!(all, (0..97).collect::<Vec<_>>());
    }
}
