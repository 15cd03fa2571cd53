//! Matrices that are held in few bits, and widened piece by piece where they are read: no copy of the whole is made.

use std::fmt;
use std::ops::Range;

use half::bf16;

/// Numbers that are widened at a time before they are rounded.
const AT_ONCE: usize = 256;

/// A matrix `w_oi` in few bits. How it is held is a format's own; whoever multiplies with it asks for pieces of rows.
pub trait Quantized: fmt::Debug + Send + Sync {
    /// Output and input width, `(o, i)`.
    fn shape(&self) -> (usize, usize);

    /// Bytes that it takes.
    fn bytes(&self) -> usize;

    /// Writes the numbers `cols` of row `row` to `to`, which is as long. Each number depends on nothing but its place.
    fn widen(&self, row: usize, cols: Range<usize>, to: &mut [f32]);
}

/// Such a matrix as a product reads it: its numbers are those of the type that it multiplies in.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedRef<'a> {
    of: &'a dyn Quantized,
    narrow: bool,
}

impl<'a> QuantizedRef<'a> {
    /// The numbers of `of`, rounded to bf16 if `narrow`.
    pub fn new(of: &'a dyn Quantized, narrow: bool) -> Self {
        Self { of, narrow }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.of.shape().0
    }

    /// Numbers in a row.
    pub fn cols(&self) -> usize {
        self.of.shape().1
    }

    /// Whether its numbers are of bf16.
    pub const fn is_narrow(&self) -> bool {
        self.narrow
    }

    /// Writes a piece of some rows to `to`, row after row, in 32 bits: numbers of bf16 are rounded all the same.
    ///
    /// # Panics
    /// If the piece is not within the matrix or `to` is shorter: bugs of the caller, never of an input.
    pub fn widen(&self, rows: Range<usize>, cols: Range<usize>, to: &mut [f32]) {
        self.pieces(rows, cols, to, |numbers, to| {
            if self.narrow {
                to.iter_mut().zip(numbers).for_each(|(to, x)| *to = rounded(*x).to_f32());
            } else {
                to.copy_from_slice(numbers);
            }
        });
    }

    /// The same in bf16, whatever the type of its numbers.
    ///
    /// # Panics
    /// As for [`QuantizedRef::widen`].
    pub fn widen_narrow(&self, rows: Range<usize>, cols: Range<usize>, to: &mut [bf16]) {
        self.pieces(rows, cols, to, |numbers, to| to.iter_mut().zip(numbers).for_each(|(to, x)| *to = rounded(*x)));
    }

    /// Goes through a piece a few numbers at a time, each with its place in `to`.
    fn pieces<T>(&self, rows: Range<usize>, cols: Range<usize>, to: &mut [T], each: impl Fn(&[f32], &mut [T])) {
        assert!(rows.end <= self.rows() && cols.end <= self.cols(), "a piece outside of a matrix");
        assert!(to.len() >= rows.len() * cols.len(), "a piece that is larger than its place");
        let mut room = [0.0f32; AT_ONCE];
        for (row, to) in rows.zip(to.chunks_exact_mut(cols.len().max(1))) {
            for (start, to) in cols.clone().step_by(AT_ONCE).zip(to.chunks_mut(AT_ONCE)) {
                let numbers = &mut room[..to.len()];
                self.of.widen(row, start..start + to.len(), numbers);
                each(numbers, to);
            }
        }
    }
}

/// The nearest bf16, the even one of two. Numbers of a format are finite: nothing is asked about those that are not, so that the
/// loop around it becomes vectors.
#[inline(always)]
fn rounded(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Whole numbers of eight bits with a factor a row: the simplest format, for tests of whoever reads one.
    #[derive(Debug)]
    pub(crate) struct Bytes {
        pub(crate) shape: (usize, usize),
        pub(crate) values: Vec<i8>,
        pub(crate) scales: Vec<f32>,
    }

    impl Bytes {
        pub(crate) fn new(shape: (usize, usize), seed: u64) -> Self {
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u32
            };
            let values = (0..shape.0 * shape.1).map(|_| (next() % 255) as i8).collect();
            Self { shape, values, scales: (0..shape.0).map(|_| (1 + next() % 1000) as f32 * 1e-5).collect() }
        }
    }

    impl Quantized for Bytes {
        fn shape(&self) -> (usize, usize) {
            self.shape
        }

        fn bytes(&self) -> usize {
            self.values.len() + 4 * self.scales.len()
        }

        fn widen(&self, row: usize, cols: Range<usize>, to: &mut [f32]) {
            let values = &self.values[row * self.shape.1..][cols];
            to.iter_mut().zip(values).for_each(|(to, value)| *to = f32::from(*value) * self.scales[row]);
        }
    }

    #[test]
    fn pieces_are_those_of_the_whole_in_both_types() {
        let of = Bytes::new((5, 600), 3);
        let (exact, narrow) = (QuantizedRef::new(&of, false), QuantizedRef::new(&of, true));
        let mut whole = vec![0.0f32; 5 * 600];
        exact.widen(0..5, 0..600, &mut whole);
        for (rows, cols) in [(1..4, 0..600), (0..5, 7..590), (2..3, 599..600), (0..0, 0..3), (1..2, 4..4)] {
            let expected: Vec<f32> =
                rows.clone().flat_map(|row| whole[row * 600..][cols.clone()].iter().copied()).collect();
            let rounded: Vec<bf16> = expected.iter().map(|x| bf16::from_f32(*x)).collect();
            let (mut wide, mut short) = (vec![0.0f32; expected.len()], vec![bf16::ZERO; expected.len()]);
            exact.widen(rows.clone(), cols.clone(), &mut wide);
            assert_eq!(wide, expected);
            narrow.widen_narrow(rows.clone(), cols.clone(), &mut short);
            assert_eq!(short, rounded);
            narrow.widen(rows, cols, &mut wide);
            assert_eq!(wide, rounded.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        }
    }
}
