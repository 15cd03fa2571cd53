//! Attention on the device: documents are cut into tiles of 32 rows, each a block of threads for every head.

use std::ops::Range;

use super::device::Fault;
use super::work::{Grid, Work, args};
use crate::kernels::{Attention, Mask};
use crate::store::Number;
use crate::view::{MatMut, MatRef, View, ViewMut};

/// Rows of a tile: `B` of `attention.cu`.
const TILE: usize = 32;

/// `Tile` of `attention.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Tile {
    row: i32,
    count: i32,
    position: i32,
    other: i32,
    length: i32,
}

// SAFETY: five integers of one size.
unsafe impl Number for Tile {}

/// The tiles of all documents.
fn tiles(how: &Attention<'_>) -> Vec<Tile> {
    let of_doc = |(doc, keys): (&Range<usize>, &Range<usize>)| {
        let (doc, keys) = (doc.clone(), keys.clone());
        let before = keys.len() - doc.len();
        (0..doc.len()).step_by(TILE).map(move |first| Tile {
            row: (doc.start + first) as i32,
            count: (doc.len() - first).min(TILE) as i32,
            position: (before + first) as i32,
            other: keys.start as i32,
            length: keys.len() as i32,
        })
    };
    how.docs.iter().zip(how.keys.unwrap_or(how.docs)).flat_map(of_doc).collect()
}

/// Whether attention is causal, and the length of its window or 0.
const fn mask(how: &Attention<'_>) -> (i32, i32) {
    match how.mask {
        Mask::Causal { window: Some(window) } => (1, window as i32),
        Mask::Causal { window: None } => (1, 0),
        Mask::Bidirectional => (0, 0),
    }
}

/// A block of 16 × 16 threads for each tile and head, with room for `mats` tiles of rows and `squares` of scores.
fn grid(how: &Attention<'_>, tiles: usize, heads: usize, mats: usize, squares: usize) -> Grid {
    let shared = 4 * TILE * (mats * (how.head_dim + 1) + squares * (TILE + 1));
    Grid { blocks: (tiles, heads), threads: (16, 16), shared: shared as u32, width: how.head_dim }
}

fn check(how: &Attention<'_>, q: (usize, usize), k: (usize, usize), v: (usize, usize)) {
    let Attention { heads, kv_heads, head_dim, docs, .. } = *how;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {heads} heads on {kv_heads}");
    assert_eq!((q.1, k.1, v.1), (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), "attention: widths");
    let keys = how.keys.unwrap_or(docs);
    assert_eq!(keys.len(), docs.len(), "attention: documents of keys");
    assert!(docs.iter().zip(keys).all(|(doc, keys)| doc.len() <= keys.len()), "attention: more queries than keys");
    let end = |docs: &[Range<usize>]| docs.iter().map(|doc| doc.end).max().unwrap_or(0);
    assert!(
        end(docs) <= q.0 && end(keys) <= k.0 && end(keys) <= v.0,
        "attention: documents reach to row {}",
        end(keys)
    );
}

/// See [`crate::kernels::Kernels::attention`].
pub(super) fn forward(
    work: &mut Work<'_>,
    how: &Attention<'_>,
    [q, k, v]: [MatRef<'_>; 3],
    o: MatMut<'_>,
    lse_th: ViewMut<'_, f32>,
) -> Result<(), Fault> {
    check(how, (q.rows(), q.cols()), (k.rows(), k.cols()), (v.rows(), v.cols()));
    assert_eq!((o.rows(), o.cols()), (q.rows(), q.cols()), "attention: results");
    assert_eq!((lse_th.rows(), lse_th.cols(), lse_th.stride()), (q.rows(), how.heads, how.heads), "attention: sums");
    let tiles = tiles(how);
    let (q, k, v) = (work.mat(q)?, work.mat(k)?, work.mat(v)?);
    let (o, lse) = (work.mat_mut(o, true)?, work.view_mut(lse_th, true)?.start());
    let (causal, window) = mask(how);
    let (heads, kv_heads) = (how.heads as i32, how.kv_heads as i32);
    let of = args![q, k, v, o, lse, work.slice(&tiles)?, heads, kv_heads, how.scale, causal, window];
    work.launch("attention", grid(how, tiles.len(), how.heads, 3, 1), of)
}

/// What the reverse of attention reads.
pub(super) struct Given<'g> {
    pub(super) q: MatRef<'g>,
    pub(super) k: MatRef<'g>,
    pub(super) v: MatRef<'g>,
    pub(super) o: MatRef<'g>,
    pub(super) lse_th: &'g [f32],
    pub(super) d_o: View<'g, f32>,
    pub(super) dlse_th: Option<&'g [f32]>,
}

/// See [`crate::kernels::Kernels::attention_vjp`].
pub(super) fn reverse(
    work: &mut Work<'_>,
    how: &Attention<'_>,
    given: &Given<'_>,
    [dq, dk, dv]: [ViewMut<'_, f32>; 3],
) -> Result<(), Fault> {
    let Given { q, k, v, o, lse_th, d_o, dlse_th } = *given;
    assert!(how.keys.is_none(), "attention_vjp: queries that are some rows of their documents have no gradient");
    check(how, (q.rows(), q.cols()), (k.rows(), k.cols()), (v.rows(), v.cols()));
    let (rows, heads, kv_heads) = (q.rows(), how.heads as i32, how.kv_heads as i32);
    assert_eq!((lse_th.len(), o.rows(), d_o.rows()), (rows * how.heads, rows, rows), "attention_vjp: rows");
    assert!(dlse_th.is_none_or(|dlse_th| dlse_th.len() == lse_th.len()), "attention_vjp: rows of dlse");
    assert_eq!((dq.rows(), dk.rows(), dv.rows()), (rows, k.rows(), v.rows()), "attention_vjp: rows of gradients");
    let tiles = tiles(how);
    let (q, k, v, o) = (work.mat(q)?, work.mat(k)?, work.mat(v)?, work.mat(o)?);
    let (lse, d_o) = (work.slice(lse_th)?, work.mat(d_o.into())?);
    let dlse = dlse_th.map(|dlse_th| work.slice(dlse_th)).transpose()?.unwrap_or_default();
    let (dq, dk, dv) = (work.view_mut(dq, true)?, work.view_mut(dk, true)?, work.view_mut(dv, true)?);
    let (at, level) = (work.slice(&tiles)?, work.scratch::<f32>(rows * how.heads)?);
    let (causal, window) = mask(how);
    let of = args![o, d_o, dlse, level, rows as i64, heads];
    let threads = rows * how.heads * 32;
    let all = Grid { blocks: (threads.div_ceil(256), 1), threads: (256, 1), shared: 0, width: how.head_dim };
    work.launch("attention_level", all, of)?;
    let of = args![q, k, v, lse, level, d_o, dq, at, heads, kv_heads, how.scale, causal, window];
    work.launch("attention_dq", grid(how, tiles.len(), how.heads, 4, 1), of)?;
    let of = args![q, k, v, lse, level, d_o, dk, dv, at, heads, kv_heads, how.scale, causal, window];
    work.launch("attention_dkv", grid(how, tiles.len(), how.kv_heads, 4, 2), of)
}
