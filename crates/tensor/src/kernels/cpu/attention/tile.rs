//! The small products that attention consists of, on packed blocks that fit the caches.
#![expect(unsafe_code, reason = "packed blocks are read and written through pointers, without a check at each number")]

use crate::kernels::simd::Simd;

/// A factor whose numbers are broadcast one by one: `at(i, k) = first[i · rows + k · cols]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub(super) first: *const f32,
    pub(super) row: usize,
    pub(super) col: usize,
}

/// `c (+)= left right` for `M` rows and `vectors` vectors of columns; `depth` rows of `right`, each `right_row` numbers after
/// the one before.
///
/// # Safety
/// All of `left`, `right` and `c` that the shape spans may be accessed, and nobody else writes there.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, const M: usize>(
    s: S,
    depth: usize,
    left: Left,
    right: (*const f32, usize),
    c: (*mut f32, usize),
    vectors: usize,
    add: bool,
) {
    let mut at = 0;
    while at + 2 <= vectors {
        // SAFETY: the caller's promise.
        unsafe {
            tile::<S, M, 2>(s, depth, left, (right.0.add(at * S::LANES), right.1), (c.0.add(at * S::LANES), c.1), add)
        };
        at += 2;
    }
    if at < vectors {
        // SAFETY: the caller's promise.
        unsafe {
            tile::<S, M, 1>(s, depth, left, (right.0.add(at * S::LANES), right.1), (c.0.add(at * S::LANES), c.1), add)
        };
    }
}

/// [`product`] of `N` vectors, whose sums stay in registers.
///
/// # Safety
/// As [`product`].
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const M: usize, const N: usize>(
    s: S,
    depth: usize,
    left: Left,
    right: (*const f32, usize),
    c: (*mut f32, usize),
    add: bool,
) {
    let mut sums = [[s.splat(0.0); N]; M];
    // SAFETY: the caller's promise.
    unsafe {
        for k in 0..depth {
            let mut row = [s.splat(0.0); N];
            for (j, row) in row.iter_mut().enumerate() {
                *row = s.load_at(right.0.add(k * right.1 + j * S::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = s.splat(*left.first.add(i * left.row + k * left.col));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = s.fma(factor, row, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                let to = c.0.add(i * c.1 + j * S::LANES);
                s.store_at(to, if add { s.add(s.load_at(to), *sum) } else { *sum });
            }
        }
    }
}
