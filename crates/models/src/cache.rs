//! Keys and values of rows that went through before, of several documents at once.
//!
//! All documents lie in the same buffers, each in a span of its own with room to grow. When one is full, every span gets as
//! much room again as it holds, so that a row is copied a constant number of times on average, however long a text becomes.

use std::ops::Range;

use attune_tensor::view::MatRef;

use crate::pass::{Arena, Mat, PassCx};

/// The rows that a document may grow by at least before all are moved.
const LEAST: usize = 64;

/// The keys and values of a model's blocks.
pub(crate) struct Cache {
    spans: Vec<Span>,
    /// Rows of the buffers: of all spans together.
    room: usize,
    blocks: Vec<BlockCache>,
    /// Those of the base by itself for the same documents, where components read what it gives.
    alone: Option<Box<Cache>>,
}

/// Where a document lies.
#[derive(Debug, Clone, Default)]
struct Span {
    start: usize,
    rows: usize,
    room: usize,
}

/// The cache of one block; empty for blocks that look at one row at a time, whatever its position.
#[derive(Debug, Default)]
pub struct BlockCache(Option<[Mat; 2]>);

/// Where a pass finds the keys and values of its documents.
#[derive(Debug, Clone)]
pub(crate) struct CachedRows {
    /// The rows of each document's, those that the pass adds at the end.
    pub(crate) rows: Vec<Range<usize>>,
    /// The rows of the buffers.
    room: usize,
}

impl Cache {
    /// An empty cache of this many blocks for this many documents.
    pub(crate) fn new(blocks: usize, documents: usize) -> Self {
        let blocks = std::iter::repeat_with(BlockCache::default).take(blocks).collect();
        Self { spans: vec![Span::default(); documents], room: 0, blocks, alone: None }
    }

    /// The same with one of the base by itself beside it.
    pub(crate) fn with_alone(self) -> Self {
        let alone = Some(Box::new(Self::new(self.blocks.len(), self.spans.len())));
        Self { alone, ..self }
    }

    /// That of the base by itself, which goes on by the same rows.
    pub(crate) fn alone(&mut self) -> Option<&mut Self> {
        self.alone.as_deref_mut()
    }

    /// How many rows of a document it holds.
    pub(crate) fn rows(&self, document: usize) -> usize {
        self.spans[document].rows
    }

    /// Forgets a document.
    pub(crate) fn clear(&mut self, document: usize) {
        self.spans[document].rows = 0;
        if let Some(alone) = &mut self.alone {
            alone.clear(document);
        }
    }

    /// The caches of the blocks.
    pub(crate) fn blocks(&mut self) -> &mut [BlockCache] {
        &mut self.blocks
    }

    /// Makes room for documents to have so many rows.
    pub(crate) fn reserve(&mut self, needs: &[(usize, usize)], arena: &Arena) {
        if let Some(alone) = &mut self.alone {
            alone.reserve(needs, arena);
        }
        if needs.iter().all(|&(document, rows)| rows <= self.spans[document].room) {
            return;
        }
        let before = self.spans.clone();
        let mut rows: Vec<usize> = before.iter().map(|span| span.rows).collect();
        needs.iter().for_each(|&(document, needed)| rows[document] = rows[document].max(needed));
        self.room = 0;
        for (span, rows) in self.spans.iter_mut().zip(rows) {
            // Documents that ended leave their room to the others.
            let room = if rows == 0 { 0 } else { rows + rows.max(LEAST) };
            *span = Span { start: self.room, rows: span.rows, room };
            self.room += room;
        }
        for mat in self.blocks.iter_mut().filter_map(|block| block.0.as_mut()).flatten() {
            let mut moved = like(mat, self.room, arena);
            for (from, to) in before.iter().zip(&self.spans).filter(|(from, _)| from.rows > 0) {
                let rows = mat.view().sub_rows(from.start, from.start + from.rows);
                arena.kernels().convert(rows, moved.view_mut().into_sub_rows(to.start, to.start + to.rows));
            }
            *mat = moved;
        }
    }

    /// Counts new rows of documents, for which there is room, and says where these lie then.
    pub(crate) fn extend(&mut self, by: &[(usize, usize)]) -> CachedRows {
        let rows = by.iter().map(|&(document, rows)| {
            let span = &mut self.spans[document];
            span.rows += rows;
            debug_assert!(span.rows <= span.room, "rows beyond the room that was made");
            span.start..span.start + span.rows
        });
        CachedRows { rows: rows.collect(), room: self.room }
    }
}

/// A matrix of the same type and width.
fn like(mat: &Mat, rows: usize, arena: &Arena) -> Mat {
    arena.mat(rows, mat.view().cols(), mat.dtype())
}

impl BlockCache {
    /// Takes the keys and values of a pass's rows in, and gives those of all rows.
    pub(crate) fn extend(&mut self, k: &Mat, v: &Mat, kept: &CachedRows, cx: &PassCx<'_>) -> [MatRef<'_>; 2] {
        let all = self.0.get_or_insert_with(|| [k, v].map(|mat| like(mat, kept.room, &cx.arena)));
        for (all, new) in all.iter_mut().zip([k, v]) {
            for (doc, rows) in cx.docs.iter().zip(&kept.rows) {
                let to = all.view_mut().into_sub_rows(rows.end - doc.len(), rows.end);
                cx.kernels.convert(new.view().sub_rows(doc.start, doc.end), to);
            }
        }
        all.each_ref().map(Mat::view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pass::Activations;

    /// Writes `rows` rows, each its own number, to document `at`.
    fn write(cache: &mut Cache, arena: &Arena, at: usize, rows: usize) {
        cache.reserve(&[(at, cache.rows(at) + rows)], arena);
        let CachedRows { rows: of_docs, room } = cache.extend(&[(at, rows)]);
        let block = &mut cache.blocks[0].0;
        let [mat, _] = block.get_or_insert_with(|| [0; 2].map(|_| arena.mat(room, 1, Activations::F32)));
        let (Mat::F32(mat), end) = (mat, of_docs[0].end) else { panic!("made in 32 bits") };
        for row in end - rows..end {
            mat.values_mut()[row] = (100 * at + row - of_docs[0].start) as f32;
        }
    }

    fn read(cache: &Cache, at: usize) -> Vec<f32> {
        let Some([Mat::F32(mat), _]) = &cache.blocks[0].0 else { panic!("made in 32 bits") };
        let span = &cache.spans[at];
        mat.values()[span.start..span.start + span.rows].to_vec()
    }

    #[test]
    fn documents_keep_their_rows_while_they_grow_and_are_seldom_moved() {
        let (mut cache, arena, mut moves, mut room) = (Cache::new(1, 3), Arena::default(), 0, 0);
        write(&mut cache, &arena, 0, 5);
        write(&mut cache, &arena, 2, 90);
        for _ in 0..1000 {
            write(&mut cache, &arena, 1, 1);
            write(&mut cache, &arena, 0, 1);
            moves += usize::from(std::mem::replace(&mut room, cache.room) != cache.room);
        }
        for (at, rows) in [(0, 1005), (1, 1000), (2, 90)] {
            assert!(read(&cache, at) == (0..rows).map(|row| (100 * at + row) as f32).collect::<Vec<_>>(), "{at}");
        }
        assert!(moves < 16, "{moves} moves");
        assert!(cache.room < 3 * 2095, "{} rows of room", cache.room);
    }

    #[test]
    fn a_document_that_ended_leaves_its_room() {
        let (mut cache, arena) = (Cache::new(1, 2), Arena::default());
        write(&mut cache, &arena, 0, 500);
        cache.clear(0);
        write(&mut cache, &arena, 1, 3);
        assert_eq!((cache.rows(0), cache.room), (0, 3 + LEAST));
        write(&mut cache, &arena, 0, 2);
        assert_eq!((read(&cache, 0), read(&cache, 1)), (vec![0.0, 1.0], vec![100.0, 101.0, 102.0]));
    }
}
