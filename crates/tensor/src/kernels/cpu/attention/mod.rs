//! Attention within documents by blocks: nothing of size T × T is ever kept.
//!
//! # Numerics
//! Forward, for each query row over blocks of keys, with `s = scale · q kᵀ`:
//! ```text
//! m' = max(m, max s)    l' = l e^(m - m') + Σ e^(s - m')    o' = o e^(m - m') + e^(s - m') v
//! ```
//! and at the end `o / l` and `lse = m + log l`. Backward recomputes `p = e^(s - lse)`; with `D = Σ do · o - dlse`:
//! ```text
//! dv = pᵀ do    ds = p (do vᵀ - D)    dq = scale · ds k    dk = scale · dsᵀ q
//! ```
//! The query heads of a group are rows beside each other, so that they share the packed keys and values. Blocks begin at
//! multiples of their length from the start of their document, and what a row does not see adds zeros to its sums; hence a
//! row's bits depend neither on what is beside its document nor on which rows of it are asked for.
//!
//! # Paper
//! FlashAttention-2: faster attention with better parallelism and work partitioning. Dao, 2023.

mod backward;
mod forward;
mod pack;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

pub(in crate::kernels::cpu) use backward::attention_vjp;
pub(in crate::kernels::cpu) use forward::attention;

use crate::kernels::{Attention, Mask};
use crate::view::MatRef;

/// Keys in a block: a multiple of every tile's height and width.
const KEYS: usize = 96;

/// The shape of one call.
#[derive(Debug, Clone, Copy)]
struct Shape<'a> {
    how: &'a Attention<'a>,
    /// Query heads of a key head.
    group: usize,
}

impl<'a> Shape<'a> {
    /// Checks the operands' shapes, which the caller answers for.
    fn new(how: &'a Attention<'a>, q: &MatRef<'_>, k: &MatRef<'_>, v: &MatRef<'_>) -> Self {
        let &Attention { heads, kv_heads, head_dim, mask, docs, keys, .. } = how;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads of {kv_heads} key heads");
        assert_eq!(q.cols(), heads * head_dim, "width of q");
        assert_eq!((k.cols(), v.cols()), (kv_heads * head_dim, kv_heads * head_dim), "widths of k and v");
        assert!(k.rows() == v.rows() && (keys.is_some() || k.rows() == q.rows()), "rows of k and v");
        assert_ne!(mask, Mask::Causal { window: Some(0) }, "a window holds at least the row itself");
        let mut end = 0;
        for doc in docs {
            assert!(end <= doc.start && doc.start <= doc.end, "documents ascend and are disjoint");
            end = doc.end;
        }
        assert!(end <= q.rows(), "documents of {end} rows, of which there are {}", q.rows());
        if let Some(keys) = keys {
            assert_eq!(keys.len(), docs.len(), "documents with keys");
            let fits = |(doc, keys): (&Range<usize>, &Range<usize>)| doc.len() <= keys.len() && keys.end <= k.rows();
            assert!(docs.iter().zip(keys).all(fits), "queries are the last of the rows of keys");
        }
        Self { how, group: heads / kv_heads }
    }

    /// The documents: their queries and their keys.
    fn docs(&self) -> impl Iterator<Item = (&'a Range<usize>, &'a Range<usize>)> + use<'a> {
        self.how.docs.iter().zip(self.how.keys.unwrap_or(self.how.docs))
    }

    /// The keys that query `at` of a document of `len` rows sees. Both ends never fall from one query to the next.
    fn seen(&self, at: usize, len: usize) -> Range<usize> {
        match self.how.mask {
            Mask::Bidirectional => 0..len,
            Mask::Causal { window: None } => 0..at + 1,
            Mask::Causal { window: Some(window) } => (at + 1).saturating_sub(window)..at + 1,
        }
    }

    /// The queries of a document of `len` rows that see any of `keys`.
    fn seers(&self, keys: Range<usize>, len: usize) -> Range<usize> {
        match self.how.mask {
            Mask::Bidirectional => 0..len,
            Mask::Causal { window: None } => keys.start..len,
            Mask::Causal { window: Some(window) } => keys.start..(keys.end - 1).saturating_add(window).min(len),
        }
    }

    /// Columns of a query head's operands.
    fn query_cols(&self, head: usize) -> Range<usize> {
        head * self.how.head_dim..(head + 1) * self.how.head_dim
    }

    /// Columns of the query heads that share a key head.
    fn group_cols(&self, kv: usize) -> Range<usize> {
        let width = self.group * self.how.head_dim;
        kv * width..(kv + 1) * width
    }

    /// Products of a query with a key that a call takes.
    fn pairs(&self) -> usize {
        let seen = |(doc, keys): (&Range<usize>, &Range<usize>)| match self.how.mask {
            Mask::Bidirectional | Mask::Causal { window: None } => doc.len() * keys.len(),
            Mask::Causal { window: Some(window) } => doc.len() * window.min(keys.len()),
        };
        self.docs().map(seen).sum::<usize>() * self.how.heads
    }

    /// Whether all threads are worth waking.
    fn worth_sharing(&self) -> bool {
        self.pairs() * self.how.head_dim >= 1 << 18
    }

    /// Rows that belong to no document.
    fn gaps(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<'a> {
        let ends = std::iter::once(0).chain(self.how.docs.iter().map(|doc| doc.end));
        let starts = self.how.docs.iter().map(|doc| doc.start).chain(std::iter::once(rows));
        ends.zip(starts).map(|(end, start)| end..start)
    }
}

/// What some rows of queries see of a block of keys, counted from the block's first.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// The least range that holds what each row sees.
    first: usize,
    end: usize,
    /// Whether each row sees all that whole tiles around that range hold.
    whole: bool,
}

impl Sight {
    /// Of queries `top..=bottom` of a document of `len`, on the block that begins with key `from`; `None` if they see nothing.
    #[inline(always)]
    fn of(shape: &Shape<'_>, len: usize, (top, bottom): (usize, usize), from: usize, tile: usize) -> Option<Self> {
        let (high, low) = (shape.seen(top, len), shape.seen(bottom, len));
        let first = high.start.max(from) - from;
        let end = low.end.min(from + KEYS).checked_sub(from)?;
        if first >= end {
            return None;
        }
        let (tiled_first, tiled_end) = (first / tile * tile, end.next_multiple_of(tile));
        Some(Self { first, end, whole: low.start <= from + tiled_first && from + tiled_end <= high.end })
    }
}
