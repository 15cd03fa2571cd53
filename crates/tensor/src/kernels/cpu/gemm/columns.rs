//! The right factor of a product, of which one block after another is laid out: a block of few bits is widened first.
#![expect(unsafe_code, reason = "a thread's scratch is reached by pointers")]

use std::ops::Range;

use half::bf16;

use super::pack::Factor;
use super::scratch::Buffer;
use crate::quantized::QuantizedRef;
use crate::view::View;

/// The columns of register tiles.
#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    /// Rows of this factor.
    Dense(Factor<'a>),
    /// Those of a matrix in few bits.
    Quantized {
        mat: QuantizedRef<'a>,
        /// As [`Factor::along`].
        along: bool,
    },
}

/// A block of columns as it can be laid out: which rows of which factor, and which numbers of these.
pub(super) struct Piece<'p> {
    pub(super) of: Factor<'p>,
    pub(super) outer: Range<usize>,
    pub(super) ks: Range<usize>,
}

impl<'a> Columns<'a> {
    /// How many there are.
    pub(super) fn outer(&self) -> usize {
        match self {
            Self::Dense(factor) => factor.outer(),
            Self::Quantized { mat, along: true } => mat.rows(),
            Self::Quantized { mat, along: false } => mat.cols(),
        }
    }

    /// Where the numbers of columns from `outer` on lie side by side: see [`Factor::across`].
    pub(super) fn across(&self, outer: usize, p: usize) -> Option<(*const f32, usize)> {
        match self {
            Self::Dense(factor) => factor.across(outer, p),
            Self::Quantized { .. } => None,
        }
    }

    /// The columns `outer` with their numbers `ks`, widened into `room` if they are held in few bits.
    pub(super) fn piece<'p>(&self, outer: Range<usize>, ks: Range<usize>, room: &'p mut Buffer) -> Piece<'p>
    where
        'a: 'p,
    {
        let (mat, along) = match *self {
            Self::Dense(of) => return Piece { of, outer, ks },
            Self::Quantized { mat, along } => (mat, along),
        };
        let (rows, cols) = if along { (outer.clone(), ks.clone()) } else { (ks.clone(), outer.clone()) };
        let (n_rows, n_cols) = (rows.len(), cols.len());
        let at = room.reserve(n_rows * n_cols);
        let mat = if mat.is_narrow() {
            // SAFETY: the room holds as many numbers of twice the size, is aligned for them and was initialised, and is borrowed as
            // long as the piece.
            let to = unsafe { std::slice::from_raw_parts_mut(at.cast::<bf16>(), n_rows * n_cols) };
            mat.widen_narrow(rows, cols, to);
            View::new(to, n_rows, n_cols).into()
        } else {
            // SAFETY: as above.
            let to = unsafe { std::slice::from_raw_parts_mut(at, n_rows * n_cols) };
            mat.widen(rows, cols, to);
            View::new(to, n_rows, n_cols).into()
        };
        Piece { of: Factor { mat, along }, outer: 0..outer.len(), ks: 0..ks.len() }
    }
}
