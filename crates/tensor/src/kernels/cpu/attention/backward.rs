//! The backward pass: documents are cut into chunks of rows, and a task is the queries of one chunk against the keys of
//! another.
//!
//! Tasks run in turns; in turn `n` the queries of chunk `i` meet the keys of chunk `i - n` (wrapping around). Within a turn no
//! two tasks share queries or keys, so each adds to the gradients of its own rows, and every sum has its order from the turns:
//! all threads work on one long document, nothing is computed twice, and no bit depends on their number.
#![expect(unsafe_code, reason = "tiles work on packed blocks through pointers; tasks write disjoint heads of one view")]

use std::ops::Range;

use super::tile::{Left, product, tile};
use super::{KEYS, Shape, Sight, pack};
use crate::kernels::Attention;
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::exponent::exp2;
use crate::kernels::cpu::rows::{Row, Scratch, Shared, for_tasks, take};
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatRef, View, ViewMut};

/// Rows of queries whose probabilities are kept at a time: a multiple of every tile's height.
const ROWS: usize = 48;

/// Rows in a chunk: as many blocks of keys as fit the second cache, packed.
fn chunk(head_dim: usize) -> usize {
    KEYS * (128 / head_dim.max(1)).clamp(1, 4)
}

/// A head's share of the rows of a document, as tasks are cut.
#[derive(Debug, Clone, Copy)]
struct Task {
    /// First row of the document, and its length.
    start: usize,
    len: usize,
    /// The key head.
    kv: usize,
    /// Which chunks of queries and of keys.
    queries: usize,
    keys: usize,
}

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
    assert!(how.keys.is_none(), "gradients of queries that see keys of earlier rows");
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
    let chunk = chunk(how.head_dim);
    let call = Call { shape, chunk, q, k, v, o, lse, d_o, dlse, dq, dk, dv };
    let turns = how.docs.iter().map(|doc| doc.len().div_ceil(chunk)).max().unwrap_or(0);
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
    /// Rows in a chunk.
    chunk: usize,
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
        let chunk = self.chunk;
        for doc in self.shape.how.docs {
            let (start, len) = (doc.start, doc.len());
            let chunks = len.div_ceil(chunk);
            if turn >= chunks {
                continue;
            }
            for queries in 0..chunks {
                let keys = (queries + chunks - turn) % chunks;
                let seers = self.shape.seers(keys * chunk..((keys + 1) * chunk).min(len), len);
                if seers.start < (queries + 1) * chunk && queries * chunk < seers.end {
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
    /// Keys, and keys and values turned, block by block.
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
        let keys = self.call.chunk;
        let len = 5 * keys * padded + 3 * ROWS * padded + 2 * ROWS + 2 * ROWS * KEYS + 12 * 16;
        let mut scratch = Scratch::new(len);
        let scratch = &mut &mut scratch[..];
        let mut packed = Packed {
            k: take(scratch, keys * padded),
            k_turned: take(scratch, keys * padded),
            v_turned: take(scratch, keys * padded),
            dk: take(scratch, keys * padded),
            dv: take(scratch, keys * padded),
            q: take(scratch, ROWS * padded),
            d_o: take(scratch, ROWS * padded),
            dq: take(scratch, ROWS * padded),
            lse: take(scratch, ROWS),
            d: take(scratch, ROWS),
            p: take(scratch, ROWS * KEYS),
            ds: take(scratch, ROWS * KEYS),
        };
        self.pack_keys(s, padded, &mut packed);
        let first = self.task.queries * keys;
        let count = keys.min(self.task.len - first);
        for row in (0..count * shape.group).step_by(ROWS) {
            let rows = ROWS.min(count * shape.group - row);
            self.rows::<S, M>(s, row, rows, padded, &mut packed);
        }
        self.finish(padded, &packed);
    }

    /// The blocks of the task's keys: where each begins in the packed ones, and the keys of the document that it holds.
    fn keys(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let chunk = self.call.chunk;
        let (first, len) = (self.task.keys * chunk, self.task.len);
        let starts = (first..(first + chunk).min(len)).step_by(KEYS);
        starts.map(move |from| (from - first, from..(from + KEYS).min(len)))
    }

    /// The columns of the task's key head.
    fn key_cols(&self) -> Range<usize> {
        let width = self.call.shape.how.head_dim;
        self.task.kv * width..(self.task.kv + 1) * width
    }

    /// The query of the document that row `row` of the task belongs to, and the query head.
    fn query(&self, row: usize) -> (usize, usize) {
        let group = self.call.shape.group;
        (self.task.queries * self.call.chunk + row / group, self.task.kv * group + row % group)
    }

    #[inline(always)]
    fn pack_keys<S: Simd>(&self, s: S, padded: usize, packed: &mut Packed<'_>) {
        let cols = self.key_cols();
        for (at, keys) in self.keys() {
            let rows = self.task.start + keys.start..self.task.start + keys.end;
            let block = at * padded..(at + KEYS) * padded;
            // The values' rows are needed turned only; where the keys go next is room for them.
            let k = &mut packed.k[block.clone()];
            pack::block(s, &self.call.v, rows.clone(), cols.clone(), padded, k);
            pack::turned(s, k, padded, &mut packed.v_turned[block.clone()]);
            pack::block(s, &self.call.k, rows, cols.clone(), padded, k);
            pack::turned(s, k, padded, &mut packed.k_turned[block]);
        }
        packed.dk.fill(0.0);
        packed.dv.fill(0.0);
    }

    /// Takes rows `row..row + rows` of the task's queries into account.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&self, s: S, row: usize, rows: usize, padded: usize, packed: &mut Packed<'_>) {
        let (shape, len) = (self.call.shape, self.task.len);
        let query = |at: usize| self.query(row + at.min(rows - 1)).0;
        let span = (query(0), query(rows - 1));
        let mut filled = false;
        for (block, keys) in self.keys() {
            if Sight::of(&shape, len, span, keys.start, 1).is_none() {
                continue;
            }
            if !filled {
                self.pack_queries(s, row, rows, padded, packed);
                filled = true;
            }
            for at in (0..rows).step_by(M) {
                let span = (query(at), query(at + M - 1));
                if let Some(sight) = Sight::of(&shape, len, span, keys.start, 2 * S::LANES) {
                    self.panel::<S, M>(s, (at, block), sight, padded, packed, |row| {
                        let seen = shape.seen(query(row), len);
                        (seen.start.saturating_sub(keys.start), seen.end.saturating_sub(keys.start))
                    });
                }
            }
            let first = self.query(0).0 * shape.group + row;
            for tile in (0..keys.len()).step_by(M) {
                let seers = shape.seers(keys.start + tile..(keys.start + tile + M).min(len), len);
                let at = |query: usize| (query * shape.group).saturating_sub(first).min(rows);
                let seers = at(seers.start)..at(seers.end);
                self.sum_over_rows::<S, M>(s, block + tile, tile, seers, padded, packed);
            }
        }
        if filled {
            self.add_queries(row, rows, padded, packed);
        }
    }

    /// Packs queries, `do`, `lse` and `D`; rows up to a whole panel are zero.
    #[inline(always)]
    fn pack_queries<S: Simd>(&self, s: S, row: usize, rows: usize, padded: usize, packed: &mut Packed<'_>) {
        let call = self.call;
        let factor = call.shape.how.scale * std::f32::consts::LOG2_E;
        for at in 0..rows {
            let (query, head) = self.query(row + at);
            let (query, cols) = (self.task.start + query, call.shape.query_cols(head));
            for operand in [&call.q, &MatRef::F32(call.d_o), &call.o] {
                pack::ahead(s, operand, query, cols.clone());
            }
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

    /// Probabilities of the keys that are packed from `block` on, the gradients of scores and from them of the queries, for rows
    /// `row..row + M`.
    #[inline(always)]
    fn panel<S: Simd, const M: usize>(
        &self,
        s: S,
        (row, block): (usize, usize),
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
                tile::<S, M, 2>(
                    s,
                    width,
                    q,
                    (packed.k_turned[(block + at) * padded..].as_ptr(), cols),
                    (p.add(at), KEYS),
                    false,
                );
                tile::<S, M, 2>(
                    s,
                    width,
                    d_o,
                    (packed.v_turned[(block + at) * padded..].as_ptr(), cols),
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
            let k = packed.k[(block + sight.first) * padded..].as_ptr();
            let dq = packed.dq[row * padded..].as_mut_ptr();
            product::<S, M>(s, sight.end - sight.first, ds, (k, padded), (dq, padded), padded / S::LANES, true);
        }
    }

    /// Adds to the gradients of `M` packed keys from `key` on, which are at `col` of the probabilities, what comes from the packed
    /// rows that see any of them.
    #[inline(always)]
    fn sum_over_rows<S: Simd, const M: usize>(
        &self,
        s: S,
        key: usize,
        col: usize,
        rows: Range<usize>,
        padded: usize,
        packed: &mut Packed<'_>,
    ) {
        if rows.is_empty() {
            return;
        }
        let first = rows.start * KEYS + col;
        let p = Left { first: packed.p[first..].as_ptr(), row: 1, col: KEYS };
        let ds = Left { first: packed.ds[first..].as_ptr(), row: 1, col: KEYS };
        let (q, d_o) = (packed.q[rows.start * padded..].as_ptr(), packed.d_o[rows.start * padded..].as_ptr());
        let (dk, dv) = (packed.dk[key * padded..].as_mut_ptr(), packed.dv[key * padded..].as_mut_ptr());
        let vectors = padded / S::LANES;
        // SAFETY: these rows of all four are packed, and M keys from `col` on are within KEYS.
        unsafe {
            product::<S, M>(s, rows.len(), p, (d_o, padded), (dv, padded), vectors, true);
            product::<S, M>(s, rows.len(), ds, (q, padded), (dk, padded), vectors, true);
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
        let (call, cols) = (self.call, self.key_cols());
        let first = self.task.keys * call.chunk;
        for (_, keys) in self.keys() {
            for key in keys {
                let of = (key - first) * padded..(key - first + 1) * padded;
                // SAFETY: no other task of this turn has these keys of this head.
                let (dk, dv) = unsafe {
                    (call.dk.row(self.task.start + key, cols.clone()), call.dv.row(self.task.start + key, cols.clone()))
                };
                // The queries were scaled by log2 e beside the scale.
                add(dk, &packed.dk[of.clone()], std::f32::consts::LN_2, self.first);
                add(dv, &packed.dv[of], 1.0, self.first);
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
