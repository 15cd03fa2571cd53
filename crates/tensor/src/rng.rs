//! Randomness that depends on logical indices only: a counter-based generator (Philox4x32-10).
//!
//! # Update
//! ```text
//! block(i)   = philox(key, counter = [i, nonce])          four 32-bit words a block, i = 0, 1, 2, …
//! sub(j)     : (key', nonce') = philox(key ^ DERIVE, counter = [j, nonce])
//! ```
//! A stream is named by 128 bits (`key`, `nonce`); a sub-stream by the index that it was asked for. So the numbers of
//! (seed, purpose, step, example, position) are the same whoever asks, in whatever order, on whichever thread or rank.
//!
//! # Paper
//! Parallel random numbers: as easy as 1, 2, 3. Salmon, Moraes, Dror, Shaw, 2011.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Shape, Tensor};
use rayon::prelude::*;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
/// Separates the derivation of streams from the drawing of numbers; digits of pi.
const DERIVE: u64 = 0x243F_6A88_85A3_08D3;

/// Philox4x32 with ten rounds: a keyed bijection of 128-bit counters that passes all tests of randomness in BigCrush.
pub const fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    let mut round = 0;
    while round < ROUNDS {
        let (p0, p1) = (MULTIPLIERS[0] * c[0] as u64, MULTIPLIERS[1] * c[2] as u64);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        round += 1;
    }
    c
}

/// The words of eight blocks that follow each other, from `first` on: word by word, block by block.
#[inline(always)]
fn eight_blocks(key: [u32; 2], first: u64, nonce: [u32; 2]) -> [[u32; 8]; 4] {
    let mut k = key;
    let counters: [[u32; 2]; 8] = std::array::from_fn(|block| halves(first.wrapping_add(block as u64)));
    let mut c = [counters.map(|[low, _]| low), counters.map(|[_, high]| high), [nonce[0]; 8], [nonce[1]; 8]];
    for _ in 0..ROUNDS {
        let mut next = [[0u32; 8]; 4];
        for i in 0..8 {
            let (p0, p1) = (MULTIPLIERS[0] * u64::from(c[0][i]), MULTIPLIERS[1] * u64::from(c[2][i]));
            next[0][i] = (p1 >> 32) as u32 ^ c[1][i] ^ k[0];
            next[1][i] = p1 as u32;
            next[2][i] = (p0 >> 32) as u32 ^ c[3][i] ^ k[1];
            next[3][i] = p0 as u32;
        }
        c = next;
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// For each of `rows` rows and each of `width` values whether a word of the row's stream is `least` or more; bit `i % 32` of
/// number `i / 32` of the row is value `i`'s. The rows are shared out to the threads of the pool.
pub fn bits(rows: usize, width: usize, least: u32, stream: impl Fn(usize) -> Rng + Sync) -> Vec<u32> {
    let words = width.div_ceil(32);
    let mut bits = vec![0; rows * words];
    if words > 0 {
        let rows = bits.par_chunks_mut(words).enumerate().with_min_len((1usize << 12).div_ceil(width));
        rows.for_each(|(row, bits)| stream(row).at_least(least, width, bits));
    }
    bits
}

/// `value` where a bit of [`bits`] is set, else 0: rows of `width` numbers.
pub fn spread(bits: &[u32], width: usize, value: f32) -> Vec<f32> {
    let words = width.div_ceil(32).max(1);
    let mut values = vec![0.0; bits.len() / words * width];
    if width > 0 {
        let rows =
            values.par_chunks_mut(width).zip(bits.par_chunks(words)).with_min_len((1usize << 14).div_ceil(width));
        rows.for_each(|(values, bits)| {
            for (values, bits) in values.chunks_mut(32).zip(bits) {
                values.iter_mut().enumerate().for_each(|(i, x)| *x = if bits >> i & 1 == 1 { value } else { 0.0 });
            }
        });
    }
    values
}

const fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

const fn joined(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// A stream of random numbers, and the root of its sub-streams. Cloning it clones the place in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    key: u64,
    nonce: u64,
    /// Index of the next 32-bit word.
    position: u64,
    /// The block that `position` is in, once it was computed.
    block: Option<(u64, [u32; 4])>,
}

impl Rng {
    /// The stream of a job's seed for one purpose (`"init"`, `"dropout"`, `"shuffle"`); purposes never share numbers.
    pub fn new(seed: u64, purpose: &str) -> Self {
        Self { key: seed, nonce: 0, position: 0, block: None }.named(purpose)
    }

    /// The stream for (seed, purpose, step, logical index): the same as `new(seed, purpose).sub(step).sub(index)`.
    pub fn keyed(seed: u64, purpose: &str, step: u64, index: u64) -> Self {
        Self::new(seed, purpose).sub(step).sub(index)
    }

    /// The sub-stream `index`, from its beginning. It does not depend on how much of this stream was used.
    #[must_use]
    pub fn sub(&self, index: u64) -> Self {
        let ([i0, i1], [n0, n1]) = (halves(index), halves(self.nonce));
        let [a, b, c, d] = philox(halves(self.key ^ DERIVE), [i0, i1, n0, n1]);
        Self { key: joined(a, b), nonce: joined(c, d), position: 0, block: None }
    }

    /// The sub-stream of a name (a site, a tensor), from its beginning.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        // The length first, so that no name is the beginning of another; from the top, where no index counts to.
        name.as_bytes().chunks(8).fold(self.sub(u64::MAX - name.len() as u64), |stream, chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            stream.sub(u64::from_le_bytes(word))
        })
    }

    /// Goes to the 32-bit word `position` of the stream.
    pub fn seek(&mut self, position: u64) {
        self.position = position;
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let (index, word) = (self.position / 4, (self.position % 4) as usize);
        self.position = self.position.wrapping_add(1);
        match self.block {
            Some((at, words)) if at == index => words[word],
            _ => {
                let ([i0, i1], [n0, n1]) = (halves(index), halves(self.nonce));
                let words = philox(halves(self.key), [i0, i1, n0, n1]);
                self.block = Some((index, words));
                words[word]
            }
        }
    }

    /// For each of `width` words from the stream's beginning on whether it is `least` or more: bit `i % 32` of number `i / 32`.
    /// The same as asking [`Rng::next_u32`] for each, in a fraction of the time.
    fn at_least(&self, least: u32, width: usize, bits: &mut [u32]) {
        let (key, nonce) = (halves(self.key), halves(self.nonce));
        for (group, bits) in bits.iter_mut().enumerate() {
            let words = eight_blocks(key, 8 * group as u64, nonce);
            let all = (0..32).map(|i| u32::from(words[i % 4][i / 4] >= least) << i).sum::<u32>();
            let n = width - 32 * group;
            *bits = if n < 32 { all & ((1 << n) - 1) } else { all };
        }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let low = self.next_u32();
        joined(low, self.next_u32())
    }

    /// A number in `[0, 1)`, a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }

    /// A whole number below `n`, each equally likely.
    ///
    /// # Panics
    /// If `n` is 0: there is no such number.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a number below 0 was asked for");
        // Lemire: the high half of x * n; the low half tells the few x that would favour some results.
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A standard normal number (Box–Muller; two uniform numbers each, so that the place in the stream stays simple).
    pub fn normal(&mut self) -> f64 {
        // 1 - u is in (0, 1], so its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (TAU * self.uniform()).cos()
    }

    /// Puts a list in random order (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }

    /// The numbers `0 .. n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }

    /// A tensor of normal numbers with standard deviation `std`, drawn in row-major order.
    ///
    /// # Errors
    /// A dtype that is not a floating-point one.
    pub fn normal_tensor(&mut self, shape: impl Into<Shape>, std: f64, dtype: DType) -> candle_core::Result<Tensor> {
        let shape = shape.into();
        let values: Vec<f64> = (0..shape.elem_count()).map(|_| self.normal() * std).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    /// A tensor of numbers uniform in `[-bound, bound)`, drawn in row-major order.
    ///
    /// # Errors
    /// A dtype that is not a floating-point one.
    pub fn uniform_tensor(&mut self, shape: impl Into<Shape>, bound: f64, dtype: DType) -> candle_core::Result<Tensor> {
        let shape = shape.into();
        let values: Vec<f64> = (0..shape.elem_count()).map(|_| (2.0 * self.uniform() - 1.0) * bound).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // kat_vectors of Random123 1.14, philox4x32 with 10 rounds.
    #[test]
    fn philox_gives_the_known_answers() {
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(key, counter), expected);
        }
    }

    /// The mapping from (seed, purpose, step, index) to numbers is a promise: checkpoints rely on it.
    #[test]
    fn streams_are_what_they_were() {
        let mut stream = Rng::keyed(7, "dropout", 3, 12);
        let found = [stream.next_u32(), stream.next_u32(), stream.next_u32(), stream.next_u32(), stream.next_u32()];
        assert_eq!(found, FROZEN);
    }
    const FROZEN: [u32; 5] = [324_625_240, 2_086_673_888, 577_870_259, 2_936_539_534, 3_923_889_106];

    #[test]
    fn bits_are_those_of_words_one_by_one() {
        for (width, least) in [(1, 0), (31, 1 << 30), (32, 1 << 31), (100, u32::MAX), (257, 0x1234_5678)] {
            let stream = |row: usize| Rng::keyed(5, "bits", 2, row as u64);
            let found = bits(7, width, least, stream);
            let words = width.div_ceil(32);
            for row in 0..7 {
                let mut one_by_one = stream(row);
                for i in 0..32 * words {
                    let bit = found[row * words + i / 32] >> (i % 32) & 1 == 1;
                    assert_eq!(bit, i < width && one_by_one.next_u32() >= least, "row {row}, value {i} of {width}");
                }
            }
            let spread = spread(&found, width, 2.5);
            let bit = |row: usize, i: usize| found[row * words + i / 32] >> (i % 32) & 1 == 1;
            let expected = (0..7 * width).map(|at| if bit(at / width, at % width) { 2.5 } else { 0.0 });
            assert!(spread.iter().copied().eq(expected), "{width}");
        }
    }

    #[test]
    fn sub_streams_do_not_depend_on_use_and_do_not_repeat() {
        let root = Rng::new(7, "init");
        let mut used = root.clone();
        for _ in 0..10 {
            used.next_u64();
        }
        assert_eq!(root.sub(5), used.sub(5));
        assert_eq!(root.named("q_proj"), used.named("q_proj"));
        let mut streams: Vec<Rng> = (0..50).map(|i| root.sub(i)).collect();
        streams.extend(["", "a", "ab", "a\0", "abcdefgh", "abcdefgh\0", "abcdefghi"].map(|name| root.named(name)));
        streams.push(Rng::new(8, "init"));
        streams.push(Rng::new(7, "init "));
        let mut first: Vec<u64> = streams.iter_mut().map(Rng::next_u64).collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), streams.len());
    }

    #[test]
    fn a_place_in_the_stream_can_be_sought() {
        let mut stream = Rng::new(1, "x");
        let words: Vec<u32> = (0..11).map(|_| stream.next_u32()).collect();
        for at in [10, 3, 7, 0] {
            stream.seek(at);
            assert_eq!(stream.next_u32(), words[at as usize]);
        }
    }

    /// Bounds at five standard errors: a false alarm in fewer than one of a million seeds, and the seed is fixed.
    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 40_000;
        let mut stream = Rng::new(3, "moments");
        let normals: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let mean = normals.iter().sum::<f64>() / n as f64;
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / n as f64;
        assert!(mean.abs() < 5.0 / (n as f64).sqrt(), "{mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "{variance}");
        let uniforms: Vec<f64> = (0..n).map(|_| stream.uniform()).collect();
        assert!(uniforms.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = uniforms.iter().sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5.0 / (12.0 * n as f64).sqrt(), "{mean}");
        let mut counts = [0u32; 3];
        (0..n).for_each(|_| counts[stream.below(3) as usize] += 1);
        let deviation = 5.0 * (n as f64 * 2.0 / 9.0).sqrt();
        assert!(counts.iter().all(|&c| (f64::from(c) - n as f64 / 3.0).abs() < deviation), "{counts:?}");
    }

    #[test]
    fn a_shuffle_is_a_permutation() {
        let mut order = Rng::new(5, "shuffle").permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
