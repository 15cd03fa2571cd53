//! The forward pass: a task is some queries of a key head's group, over all keys that they see.
#![expect(unsafe_code, reason = "tiles work on packed blocks through pointers; tasks write disjoint heads of one view")]

use std::ops::Range;

use super::tile::{Left, product, tile};
use super::{KEYS, Shape, Sight, pack};
use crate::kernels::Attention;
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::exponent::exp2;
use crate::kernels::cpu::map::{Formula, narrow, update};
use crate::kernels::cpu::rows::{Row, RowMut, Scratch, Shared, SharedMat, for_tasks, take};
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatMut, MatRef, ViewMut};

/// Numbers of queries that share packed keys: what fits the second cache beside them.
const NUMBERS: usize = 1 << 14;

/// Queries in a task.
fn queries(shape: &Shape<'_>) -> usize {
    (NUMBERS / (shape.group * shape.how.head_dim).max(1)).clamp(16, 256)
}

/// Some queries of a document, for the heads of a key head.
#[derive(Debug, Clone)]
struct Task {
    /// Their rows, and the place of the first of them in the document.
    rows: Range<usize>,
    first: usize,
    /// The rows of the document's keys.
    keys: Range<usize>,
    /// The key head.
    kv: usize,
}

/// See [`crate::kernels::Kernels::attention`].
pub(in crate::kernels::cpu) fn attention(
    cpu: &Cpu,
    how: &Attention<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    o: MatMut<'_>,
    lse_th: ViewMut<'_, f32>,
) {
    let shape = Shape::new(how, &q, &k, &v);
    let rows = q.rows();
    assert_eq!((o.rows(), o.cols()), (rows, q.cols()), "shape of o");
    assert_eq!((lse_th.rows(), lse_th.cols()), (rows, how.heads), "the shape of lse");
    let call = Call { shape, q, k, v, o: SharedMat::new(o), lse: Shared::new(lse_th) };
    for row in shape.gaps(rows).flatten() {
        call.clear(row);
    }
    let each = queries(&shape);
    let mut tasks = Vec::new();
    for (doc, keys) in shape.docs() {
        for kv in 0..how.kv_heads {
            tasks.extend(doc.clone().step_by(each).map(|row| Task {
                rows: row..doc.end.min(row + each),
                first: keys.len() - (doc.end - row),
                keys: keys.clone(),
                kv,
            }));
        }
    }
    for_tasks(tasks.len(), shape.worth_sharing(), |task| cpu.call_f32(Block { call: &call, task: &tasks[task] }));
}

/// The operands of a call.
struct Call<'a> {
    shape: Shape<'a>,
    q: MatRef<'a>,
    k: MatRef<'a>,
    v: MatRef<'a>,
    o: SharedMat<'a>,
    lse: Shared<'a, f32>,
}

impl Call<'_> {
    /// Results for a row of no document.
    fn clear(&self, row: usize) {
        // SAFETY: no task has begun.
        unsafe {
            self.lse.row(row, 0..self.shape.how.heads).fill(0.0);
            match self.o.row(row, 0..self.q.cols()) {
                RowMut::F32(row) => row.fill(0.0),
                RowMut::Bf16(row) => row.fill(half::bf16::ZERO),
            }
        }
    }
}

/// One task on one instruction set.
struct Block<'a> {
    call: &'a Call<'a>,
    task: &'a Task,
}

impl Body for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::LANES == 16 { self.rows::<S, 12>(s) } else { self.rows::<S, 6>(s) }
    }
}

/// `x ↦ factor · x`.
struct Times(f32);

impl Formula<1, 1> for Times {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(x, s.splat(self.0))]
    }
}

/// The packed blocks of a task, and what is known of its rows so far.
struct Packed<'a> {
    q: &'a mut [f32],
    o: &'a mut [f32],
    /// The largest score and the sum of exponentials, of base 2.
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Keys, turned, and values.
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Scores and then probabilities of a panel of rows.
    p: &'a mut [f32],
}

impl Block<'_> {
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&self, s: S) {
        let Shape { how, group } = self.call.shape;
        let Task { first, ref keys, .. } = *self.task;
        let count = self.task.rows.len();
        let (rows, width) = ((count * group).next_multiple_of(M), how.head_dim);
        let padded = width.next_multiple_of(S::LANES);
        let len = 2 * rows * padded + 2 * rows + 2 * KEYS * padded + M * KEYS + 8 * 16;
        let mut scratch = Scratch::new(len);
        let scratch = &mut &mut scratch[..];
        let mut packed = Packed {
            q: take(scratch, rows * padded),
            o: take(scratch, rows * padded),
            max: take(scratch, rows),
            sum: take(scratch, rows),
            k: take(scratch, KEYS * padded),
            v: take(scratch, KEYS * padded),
            p: take(scratch, M * KEYS),
        };
        self.begin(s, count, padded, &mut packed);
        let shape = &self.call.shape;
        let (from, to) = (shape.seen(first, keys.len()).start, shape.seen(first + count - 1, keys.len()).end);
        for from in (from / KEYS * KEYS..to).step_by(KEYS) {
            self.pack_keys(s, from, padded, &mut packed);
            for panel in 0..rows / M {
                let query = |row: usize| first + (row / group).min(count - 1);
                let span = (query(panel * M), query(panel * M + M - 1));
                if let Some(sight) = Sight::of(shape, keys.len(), span, from, 2 * S::LANES) {
                    self.panel::<S, M>(s, panel * M, sight, padded, &mut packed, |row| {
                        let seen = shape.seen(query(row), keys.len());
                        (seen.start.saturating_sub(from), seen.end.saturating_sub(from))
                    });
                }
            }
        }
        self.finish(s, count, padded, &packed);
    }

    /// Packs the queries, scaled for exponentials of base 2.
    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, count: usize, padded: usize, packed: &mut Packed<'_>) {
        let Shape { how, group } = self.call.shape;
        let factor = how.scale * std::f32::consts::LOG2_E;
        packed.max.fill(f32::NEG_INFINITY);
        packed.sum.fill(0.0);
        packed.o.fill(0.0);
        let (filled, rest) = packed.q.split_at_mut(count * group * padded);
        for (row, to) in filled.chunks_exact_mut(padded).enumerate() {
            let (at, head) = (self.task.rows.start + row / group, self.task.kv * group + row % group);
            if row % group == 0 {
                pack::ahead(s, &self.call.q, at, self.call.shape.group_cols(self.task.kv));
            }
            pack::row(s, Row::of(&self.call.q, at, self.call.shape.query_cols(head)), factor, to);
        }
        rest.fill(0.0);
    }

    /// Packs the keys from `from` on, and their values.
    #[inline(always)]
    fn pack_keys<S: Simd>(&self, s: S, from: usize, padded: usize, packed: &mut Packed<'_>) {
        let width = self.call.shape.how.head_dim;
        let Task { ref keys, kv, .. } = *self.task;
        let (rows, cols) = (keys.start + from..keys.end.min(keys.start + from + KEYS), kv * width..(kv + 1) * width);
        pack::block(s, &self.call.k, rows.clone(), cols.clone(), padded, packed.v);
        pack::turned(s, packed.v, padded, packed.k);
        pack::block(s, &self.call.v, rows, cols, padded, packed.v);
    }

    /// Takes a block of keys into account for rows `row..row + M`; `seen` says what each of them sees.
    #[inline(always)]
    fn panel<S: Simd, const M: usize>(
        &self,
        s: S,
        row: usize,
        sight: Sight,
        padded: usize,
        packed: &mut Packed<'_>,
        seen: impl Fn(usize) -> (usize, usize),
    ) {
        let width = self.call.shape.how.head_dim;
        let cols = 2 * S::LANES;
        let (first, end) = (sight.first / cols * cols, sight.end.next_multiple_of(cols));
        let p = packed.p.as_mut_ptr();
        let q = Left { first: packed.q[row * padded..].as_ptr(), row: padded, col: 1 };
        for at in (first..end).step_by(cols) {
            // SAFETY: `q` has M rows from there, `k` a panel of `width` rows, `p` M rows of KEYS.
            unsafe { tile::<S, M, 2>(s, width, q, (packed.k[at * padded..].as_ptr(), cols), (p.add(at), KEYS), false) };
        }
        if !sight.whole {
            for (i, p) in packed.p.chunks_exact_mut(KEYS).enumerate() {
                let (from, to) = seen(row + i);
                p[first..from.clamp(first, end)].fill(f32::NEG_INFINITY);
                p[to.clamp(first, end)..end].fill(f32::NEG_INFINITY);
            }
        }
        self.softmax::<S, M>(s, row, (first, end), padded, packed);
        let p = Left { first: packed.p[sight.first..].as_ptr(), row: KEYS, col: 1 };
        let v = packed.v[sight.first * padded..].as_ptr();
        let o = packed.o[row * padded..].as_mut_ptr();
        // SAFETY: `p` has M rows of KEYS, `v` KEYS rows and `o` M rows of `padded`.
        unsafe { product::<S, M>(s, sight.end - sight.first, p, (v, padded), (o, padded), padded / S::LANES, true) };
    }

    /// Turns a panel's scores into probabilities up to a factor that later blocks may change.
    #[inline(always)]
    fn softmax<S: Simd, const M: usize>(
        &self,
        s: S,
        row: usize,
        (first, end): (usize, usize),
        padded: usize,
        packed: &mut Packed<'_>,
    ) {
        // M is at most 16: one vector or two.
        let (mut shift, mut fade) = ([0.0; 16], [0.0; 16]);
        for i in 0..M {
            let p = packed.p[i * KEYS..].as_ptr();
            // SAFETY: columns below `end` are within the row of KEYS.
            let max = unsafe {
                let mut max = s.load_at(p.add(first));
                for at in (first + S::LANES..end).step_by(S::LANES) {
                    max = s.max(max, s.load_at(p.add(at)));
                }
                s.reduce_max(max)
            };
            let before = packed.max[row + i];
            let max = if max > before { max } else { before };
            packed.max[row + i] = max;
            // A row that has seen nothing yet has no number to be measured against.
            shift[i] = if max == f32::NEG_INFINITY { 0.0 } else { max };
            fade[i] = before - shift[i];
        }
        for at in (0..M).step_by(S::LANES) {
            // SAFETY: 16 is a multiple of the lanes.
            unsafe { s.store_at(fade[at..].as_mut_ptr(), exp2(s, s.load_at(fade[at..].as_ptr()))) };
        }
        for i in 0..M {
            let p = packed.p[i * KEYS..].as_mut_ptr();
            let shift = s.splat(shift[i]);
            let mut sum = s.splat(0.0);
            for at in (first..end).step_by(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let value = exp2(s, s.sub(s.load_at(p.add(at)), shift));
                    sum = s.add(sum, value);
                    s.store_at(p.add(at), value);
                }
            }
            packed.sum[row + i] = packed.sum[row + i] * fade[i] + s.reduce_add(sum);
            if fade[i] != 1.0 {
                let factor = s.splat(fade[i]);
                let o = packed.o[(row + i) * padded..][..padded].as_mut_ptr();
                for at in (0..padded).step_by(S::LANES) {
                    // SAFETY: within the row, whose length is a multiple of the lanes.
                    unsafe { s.store_at(o.add(at), s.mul(s.load_at(o.add(at)), factor)) };
                }
            }
        }
    }

    /// Writes what has become of the rows.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, count: usize, padded: usize, packed: &Packed<'_>) {
        let Shape { how, group } = self.call.shape;
        for row in 0..count * group {
            let (at, head) = (self.task.rows.start + row / group, self.task.kv * group + row % group);
            let (sum, o) = (packed.sum[row], &packed.o[row * padded..][..how.head_dim]);
            let factor = Times(1.0 / sum);
            // SAFETY: a task has these heads of these rows to itself.
            unsafe {
                self.call.lse.row(at, head..head + 1)[0] = (packed.max[row] + sum.log2()) * std::f32::consts::LN_2;
                match self.call.o.row(at, self.call.shape.query_cols(head)) {
                    RowMut::F32(to) => update(s, [o], [to], &factor),
                    RowMut::Bf16(to) => narrow(s, o, to, &factor),
                }
            }
        }
    }
}
