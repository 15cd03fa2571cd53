//! The backward pass: documents are cut into chunks of rows, and a task is the queries of one chunk against the keys of
//! another.
//!
//! Tasks run in turns; in turn `n` the queries of chunk `i` meet the keys of chunk `i - n` (wrapping around). Within a turn no
//! two tasks share queries or keys, so each adds to the gradients of its own rows, and every sum has its order from the turns:
//! all threads work on one long document, nothing is computed twice, and no bit depends on their number.
#![expect(unsafe_code, reason = "tiles work on packed blocks through pointers; tasks write disjoint heads of one view")]

use super::tile::{Left, product, tile};
use super::{KEYS, Shape, Sight, Task, pack};
use crate::kernels::Attention;
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::exponent::exp2;
use crate::kernels::cpu::rows::{Row, Scratch, Shared, for_tasks, take};
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatRef, View, ViewMut};

/// Rows of queries whose probabilities are kept at a time: a multiple of every tile's height.
const ROWS: usize = 48;

/// See [`crate::kernels::Kernels::attention_vjp`].
#[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
pub(in crate::kernels::cpu) fn attention_vjp(
    cpu: &Cpu,
    how: &Attention<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    o: MatRef<'_>,
    lse_th: &[f32],
    d_o: View<'_, f32>,
    dlse_th: Option<&[f32]>,
    dq: ViewMut<'_, f32>,
    dk: ViewMut<'_, f32>,
    dv: ViewMut<'_, f32>,
) {
    let shape = Shape::new(how, &q, &k, &v);
    let rows = q.rows();
    for (name, found) in [("o", (o.rows(), o.cols())), ("do", (d_o.rows(), d_o.cols())), ("dq", (dq.rows(), dq.cols()))]
    {
        assert_eq!(found, (rows, q.cols()), "shape of {name}");
    }
    for (name, found) in [("dk", (dk.rows(), dk.cols())), ("dv", (dv.rows(), dv.cols()))] {
        assert_eq!(found, (rows, k.cols()), "shape of {name}");
    }
    let lse = View::new(lse_th, rows, how.heads);
    let dlse = dlse_th.map(|dlse_th| View::new(dlse_th, rows, how.heads));
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    for row in shape.gaps(rows).flatten() {
        // SAFETY: no task has begun.
        unsafe {
            dq.row(row, 0..q.cols()).fill(0.0);
            dk.row(row, 0..k.cols()).fill(0.0);
            dv.row(row, 0..k.cols()).fill(0.0);
        }
    }
    let call = Call { shape, q, k, v, o, lse, d_o, dlse, dq, dk, dv };
    let turns = how.docs.iter().map(|doc| doc.len().div_ceil(KEYS)).max().unwrap_or(0);
    let mut tasks = Vec::new();
    for turn in 0..turns {
        tasks.clear();
        call.tasks(turn, &mut tasks);
        for_tasks(tasks.len(), shape.worth_sharing(), |task| {
            cpu.call_f32(Block { call: &call, task: tasks[task], first: turn == 0 });
        });
    }
}

/// The operands of a call.
struct Call<'a> {
    shape: Shape<'a>,
    q: MatRef<'a>,
    k: MatRef<'a>,
    v: MatRef<'a>,
    o: MatRef<'a>,
    lse: View<'a, f32>,
    d_o: View<'a, f32>,
    dlse: Option<View<'a, f32>>,
    dq: Shared<'a, f32>,
    dk: Shared<'a, f32>,
    dv: Shared<'a, f32>,
}

impl Call<'_> {
    /// The tasks of a turn whose queries see some of their keys.
    fn tasks(&self, turn: usize, tasks: &mut Vec<Task>) {
        for doc in self.shape.how.docs {
            let (start, len) = (doc.start, doc.len());
            let chunks = len.div_ceil(KEYS);
            if turn >= chunks {
                continue;
            }
            for queries in 0..chunks {
                let keys = (queries + chunks - turn) % chunks;
                let (top, bottom) = (queries * KEYS, ((queries + 1) * KEYS).min(len) - 1);
                if Sight::of(&self.shape, len, (top, bottom), keys * KEYS, 1).is_some() {
                    tasks.extend((0..self.shape.how.kv_heads).map(|kv| Task { start, len, kv, queries, keys }));
                }
            }
        }
    }
}

/// One task on one instruction set.
struct Block<'a> {
    call: &'a Call<'a>,
    task: Task,
    /// Whether it is the first that these rows' gradients come from.
    first: bool,
}

impl Body for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::LANES == 16 { self.chunk::<S, 12>(s) } else { self.chunk::<S, 6>(s) }
    }
}

/// The packed blocks of a task.
struct Packed<'a> {
    /// Keys, and keys and values turned.
    k: &'a mut [f32],
    k_turned: &'a mut [f32],
    v_turned: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Some rows of queries, scaled for exponentials of base 2, and what belongs to them.
    q: &'a mut [f32],
    d_o: &'a mut [f32],
    dq: &'a mut [f32],
    lse: &'a mut [f32],
    d: &'a mut [f32],
    /// Their probabilities, and the gradients of their scores.
    p: &'a mut [f32],
    ds: &'a mut [f32],
}

impl Block<'_> {
    #[inline(always)]
    fn chunk<S: Simd, const M: usize>(&self, s: S) {
        let shape = self.call.shape;
        let width = shape.how.head_dim;
        let padded = width.next_multiple_of(S::LANES);
        let len = 5 * KEYS * padded + 3 * ROWS * padded + 2 * ROWS + 2 * ROWS * KEYS + 12 * 16;
        let mut scratch = Scratch::new(len);
        let scratch = &mut &mut scratch[..];
        let mut packed = Packed {
            k: take(scratch, KEYS * padded),
            k_turned: take(scratch, KEYS * padded),
            v_turned: take(scratch, KEYS * padded),
            dk: take(scratch, KEYS * padded),
            dv: take(scratch, KEYS * padded),
            q: take(scratch, ROWS * padded),
            d_o: take(scratch, ROWS * padded),
            dq: take(scratch, ROWS * padded),
            lse: take(scratch, ROWS),
            d: take(scratch, ROWS),
            p: take(scratch, ROWS * KEYS),
            ds: take(scratch, ROWS * KEYS),
        };
        self.pack_keys(s, padded, &mut packed);
        let first = self.task.queries * KEYS;
        let count = KEYS.min(self.task.len - first);
        for row in (0..count * shape.group).step_by(ROWS) {
            let rows = ROWS.min(count * shape.group - row);
            self.rows::<S, M>(s, row, rows, padded, &mut packed);
        }
        self.finish(padded, &packed);
    }

    /// Rows of the batch that hold the task's keys, and the columns of their head.
    fn keys(&self) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let width = self.call.shape.how.head_dim;
        let first = self.task.keys * KEYS;
        let end = (first + KEYS).min(self.task.len);
        (self.task.start + first..self.task.start + end, self.task.kv * width..(self.task.kv + 1) * width)
    }

    /// The query of the document that row `row` of the task belongs to, and the query head.
    fn query(&self, row: usize) -> (usize, usize) {
        let group = self.call.shape.group;
        (self.task.queries * KEYS + row / group, self.task.kv * group + row % group)
    }

    #[inline(always)]
    fn pack_keys<S: Simd>(&self, s: S, padded: usize, packed: &mut Packed<'_>) {
        let width = self.call.shape.how.head_dim;
        let (rows, cols) = self.keys();
        let (count, tile) = (rows.len(), 2 * S::LANES);
        // The values' rows are needed turned only; where the keys go next is room for them.
        pack::block(s, &self.call.v, rows.clone(), cols.clone(), padded, packed.k);
        pack::turned(packed.k, count, width, padded, tile, packed.v_turned);
        pack::block(s, &self.call.k, rows, cols, padded, packed.k);
        packed.k[count * padded..].fill(0.0);
        pack::turned(packed.k, count, width, padded, tile, packed.k_turned);
        packed.dk.fill(0.0);
        packed.dv.fill(0.0);
    }

    /// Takes rows `row..row + rows` of the task's queries into account.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&self, s: S, row: usize, rows: usize, padded: usize, packed: &mut Packed<'_>) {
        let (shape, len, from) = (self.call.shape, self.task.len, self.task.keys * KEYS);
        let query = |at: usize| self.query(row + at.min(rows - 1)).0;
        if Sight::of(&shape, len, (query(0), query(rows - 1)), from, 1).is_none() {
            return;
        }
        self.pack_queries(s, row, rows, padded, packed);
        let tile = 2 * S::LANES;
        for at in (0..rows).step_by(M) {
            match Sight::of(&shape, len, (query(at), query(at + M - 1)), from, tile) {
                Some(sight) => self.panel::<S, M>(s, at, sight, padded, packed, |row| {
                    let seen = shape.seen(query(row), len);
                    (seen.start.saturating_sub(from), seen.end.saturating_sub(from))
                }),
                None => {
                    packed.p[at * KEYS..(at + M) * KEYS].fill(0.0);
                    packed.ds[at * KEYS..(at + M) * KEYS].fill(0.0);
                }
            }
        }
        self.sum_over_rows::<S, M>(s, rows, padded, packed, |at| {
            let seen = shape.seen(query(at), len);
            (seen.start, seen.end)
        });
        self.add_queries(row, rows, padded, packed);
    }

    /// Packs queries, `do`, `lse` and `D`; rows up to a whole panel are zero.
    #[inline(always)]
    fn pack_queries<S: Simd>(&self, s: S, row: usize, rows: usize, padded: usize, packed: &mut Packed<'_>) {
        let call = self.call;
        let factor = call.shape.how.scale * std::f32::consts::LOG2_E;
        for at in 0..rows {
            let (query, head) = self.query(row + at);
            let (query, cols) = (self.task.start + query, call.shape.query_cols(head));
            let (q, d_o) = (&mut packed.q[at * padded..][..padded], &mut packed.d_o[at * padded..][..padded]);
            pack::row(s, Row::of(&call.q, query, cols.clone()), factor, q);
            pack::row(s, Row::F32(&call.d_o.row(query)[cols.clone()]), 1.0, d_o);
            let dlse = call.dlse.map_or(0.0, |dlse| dlse.row(query)[head]);
            packed.d[at] = pack::dot(s, Row::of(&call.o, query, cols), d_o) - dlse;
            packed.lse[at] = call.lse.row(query)[head] * std::f32::consts::LOG2_E;
        }
        packed.q[rows * padded..].fill(0.0);
        packed.d_o[rows * padded..].fill(0.0);
        packed.d[rows..].fill(0.0);
        packed.lse[rows..].fill(0.0);
        packed.dq.fill(0.0);
    }

    /// Probabilities, the gradients of scores and from them of the queries, for rows `row..row + M`.
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
        let rows = row * KEYS..(row + M) * KEYS;
        let (p, ds) = (packed.p[rows.clone()].as_mut_ptr(), packed.ds[rows.clone()].as_mut_ptr());
        let q = Left { first: packed.q[row * padded..].as_ptr(), row: padded, col: 1 };
        let d_o = Left { first: packed.d_o[row * padded..].as_ptr(), row: padded, col: 1 };
        for at in (first..end).step_by(cols) {
            // SAFETY: `q` and `d_o` have M rows from there, the turned blocks a panel of `width` rows, `p` and `ds` M rows of
            // KEYS.
            unsafe {
                tile::<S, M, 2>(s, width, q, (packed.k_turned[at * width..].as_ptr(), cols), (p.add(at), KEYS), false);
                tile::<S, M, 2>(
                    s,
                    width,
                    d_o,
                    (packed.v_turned[at * width..].as_ptr(), cols),
                    (ds.add(at), KEYS),
                    false,
                );
            }
        }
        if !sight.whole {
            for (i, p) in packed.p[rows.clone()].chunks_exact_mut(KEYS).enumerate() {
                let (from, to) = seen(row + i);
                p[first..from.clamp(first, end)].fill(f32::NEG_INFINITY);
                p[to.clamp(first, end)..end].fill(f32::NEG_INFINITY);
            }
        }
        if end - first < KEYS {
            // The sums over rows read whole tiles of keys.
            for row in packed.p[rows.clone()].chunks_exact_mut(KEYS).chain(packed.ds[rows].chunks_exact_mut(KEYS)) {
                row[..first].fill(0.0);
                row[end..].fill(0.0);
            }
        }
        for i in 0..M {
            let (lse, d) = (s.splat(packed.lse[row + i]), s.splat(packed.d[row + i]));
            for at in (i * KEYS + first..i * KEYS + end).step_by(S::LANES) {
                // SAFETY: columns below `end` are within the row of KEYS.
                unsafe {
                    let value = exp2(s, s.sub(s.load_at(p.add(at)), lse));
                    s.store_at(p.add(at), value);
                    s.store_at(ds.add(at), s.mul(value, s.sub(s.load_at(ds.add(at)), d)));
                }
            }
        }
        // SAFETY: `ds` has M rows of KEYS, `k` KEYS rows and `dq` M rows of `padded`.
        unsafe {
            let ds = Left { first: ds.add(sight.first), row: KEYS, col: 1 };
            let k = packed.k[sight.first * padded..].as_ptr();
            let dq = packed.dq[row * padded..].as_mut_ptr();
            product::<S, M>(s, sight.end - sight.first, ds, (k, padded), (dq, padded), padded / S::LANES, true);
        }
    }

    /// Adds to the gradients of the keys and values what comes from the packed rows; `seen` says which keys of the document a
    /// row sees.
    #[inline(always)]
    fn sum_over_rows<S: Simd, const M: usize>(
        &self,
        s: S,
        rows: usize,
        padded: usize,
        packed: &mut Packed<'_>,
        seen: impl Fn(usize) -> (usize, usize),
    ) {
        let from = self.task.keys * KEYS;
        // Rows that see any of a tile's keys are a range whose ends never fall from one tile to the next.
        let (mut first, mut end) = (0, 0);
        for key in (0..KEYS.min(self.task.len - from)).step_by(M) {
            while first < rows && seen(first).1 <= from + key {
                first += 1;
            }
            end = end.max(first);
            while end < rows && seen(end).0 < from + key + M {
                end += 1;
            }
            if first == end {
                continue;
            }
            let left = |of: &[f32]| Left { first: of[first * KEYS + key..].as_ptr(), row: 1, col: KEYS };
            let (p, ds) = (left(packed.p), left(packed.ds));
            let (q, d_o) = (packed.q[first * padded..].as_ptr(), packed.d_o[first * padded..].as_ptr());
            let (dk, dv) = (packed.dk[key * padded..].as_mut_ptr(), packed.dv[key * padded..].as_mut_ptr());
            let vectors = padded / S::LANES;
            // SAFETY: rows below `end` of all four are packed, and M keys from `key` on are within KEYS.
            unsafe {
                product::<S, M>(s, end - first, p, (d_o, padded), (dv, padded), vectors, true);
                product::<S, M>(s, end - first, ds, (q, padded), (dk, padded), vectors, true);
            }
        }
    }

    /// Writes or adds the gradients of the packed rows of queries.
    #[inline(always)]
    fn add_queries(&self, row: usize, rows: usize, padded: usize, packed: &Packed<'_>) {
        let call = self.call;
        for (at, dq) in packed.dq.chunks_exact(padded).enumerate().take(rows) {
            let (query, head) = self.query(row + at);
            // SAFETY: no other task of this turn has these queries of this head.
            let to = unsafe { call.dq.row(self.task.start + query, call.shape.query_cols(head)) };
            add(to, dq, call.shape.how.scale, self.first);
        }
    }

    /// Writes or adds the gradients of the keys and values.
    #[inline(always)]
    fn finish(&self, padded: usize, packed: &Packed<'_>) {
        let (rows, cols) = self.keys();
        for (at, row) in rows.enumerate() {
            let of = |block: &'_ [f32]| at * padded..at * padded + block.len().min(padded);
            // SAFETY: no other task of this turn has these keys of this head.
            unsafe {
                // The queries were scaled by log2 e beside the scale.
                add(self.call.dk.row(row, cols.clone()), &packed.dk[of(packed.dk)], std::f32::consts::LN_2, self.first);
                add(self.call.dv.row(row, cols.clone()), &packed.dv[of(packed.dv)], 1.0, self.first);
            }
        }
    }
}

/// `to (+)= factor · from`.
#[inline(always)]
fn add(to: &mut [f32], from: &[f32], factor: f32, first: bool) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = if first { from * factor } else { *to + from * factor };
    }
}
