//! Views of rows: what the trunk of a model speaks. A view borrows numbers that live in a buffer of the pass, a memory map
//! or a candle tensor; it never owns them. Numbers are given out once no device is at work on them any more.

use half::bf16;

use crate::kernels::settle;

/// Rows of `cols` numbers, each `stride` after the one before.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// The same, to be written.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// How many numbers a view of this shape spans.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a, T> View<'a, T> {
    /// Rows that follow each other without a gap.
    ///
    /// # Panics
    /// If `data` is shorter than `rows × cols`: a bug of the caller, never of an input.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that begin `stride` numbers apart.
    ///
    /// # Panics
    /// If `data` does not reach to the last row's end, or rows overlap.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} numbers that begin {stride} apart overlap");
        let needed = span(rows, cols, stride);
        assert!(data.len() >= needed, "a view of {needed} numbers on {}", data.len());
        Self { data: &data[..needed], rows, cols, stride }
    }

    /// Number of rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// How far apart rows begin.
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &'a [T] {
        settle();
        &self.data[row * self.stride..][..self.cols]
    }

    /// Everything that it spans, from the first number of the first row to the last of the last.
    pub fn data(&self) -> &'a [T] {
        settle();
        self.data
    }

    /// The same, for a device: nobody looks at the numbers.
    #[cfg(feature = "cuda")]
    pub(crate) const fn span(&self) -> &'a [T] {
        self.data
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn sub_rows(&self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.rows, "rows {start}..{end} of {}", self.rows);
        let at = (start * self.stride).min(self.data.len());
        Self::strided(&self.data[at..], end - start, self.cols, self.stride)
    }

    /// Columns `start..end` of all rows.
    ///
    /// # Panics
    /// If there are no such columns.
    #[must_use]
    pub fn sub_cols(&self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.cols, "columns {start}..{end} of {}", self.cols);
        let at = start.min(self.data.len());
        Self::strided(&self.data[at..], self.rows, end - start, self.stride)
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// As [`View::new`].
    ///
    /// # Panics
    /// As [`View::new`].
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// As [`View::strided`].
    ///
    /// # Panics
    /// As [`View::strided`].
    pub fn strided(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} numbers that begin {stride} apart overlap");
        let needed = span(rows, cols, stride);
        assert!(data.len() >= needed, "a view of {needed} numbers on {}", data.len());
        Self { data: &mut data[..needed], rows, cols, stride }
    }

    /// Number of rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// How far apart rows begin.
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        settle();
        &mut self.data[row * self.stride..][..self.cols]
    }

    /// Everything that it spans.
    pub fn data(&mut self) -> &mut [T] {
        settle();
        self.data
    }

    /// The same, for a device: nobody looks at the numbers.
    #[cfg(feature = "cuda")]
    pub(crate) const fn span(&mut self) -> &mut [T] {
        self.data
    }

    /// The same rows to be read.
    pub fn as_ref(&self) -> View<'_, T> {
        View { data: self.data, rows: self.rows, cols: self.cols, stride: self.stride }
    }

    /// The same rows, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { data: self.data, rows: self.rows, cols: self.cols, stride: self.stride }
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn into_sub_rows(self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.rows, "rows {start}..{end} of {}", self.rows);
        let at = (start * self.stride).min(self.data.len());
        Self::strided(&mut self.data[at..], end - start, self.cols, self.stride)
    }

    /// Columns `start..end` of all rows.
    ///
    /// # Panics
    /// If there are no such columns.
    #[must_use]
    pub fn into_sub_cols(self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.cols, "columns {start}..{end} of {}", self.cols);
        let at = start.min(self.data.len());
        Self::strided(&mut self.data[at..], self.rows, end - start, self.stride)
    }
}

/// Rows in one of the types that the trunk computes in.
#[derive(Debug, Clone, Copy)]
pub enum MatRef<'a> {
    /// 32-bit floats.
    F32(View<'a, f32>),
    /// The upper halves of 32-bit floats.
    Bf16(View<'a, bf16>),
}

/// The same, to be written.
#[derive(Debug)]
pub enum MatMut<'a> {
    /// 32-bit floats.
    F32(ViewMut<'a, f32>),
    /// The upper halves of 32-bit floats; results are rounded to nearest even.
    Bf16(ViewMut<'a, bf16>),
}

impl<'a> MatRef<'a> {
    /// Number of rows.
    pub const fn rows(&self) -> usize {
        match self {
            Self::F32(view) => view.rows,
            Self::Bf16(view) => view.rows,
        }
    }

    /// Numbers in a row.
    pub const fn cols(&self) -> usize {
        match self {
            Self::F32(view) => view.cols,
            Self::Bf16(view) => view.cols,
        }
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn sub_rows(&self, start: usize, end: usize) -> Self {
        match self {
            Self::F32(view) => Self::F32(view.sub_rows(start, end)),
            Self::Bf16(view) => Self::Bf16(view.sub_rows(start, end)),
        }
    }

    /// Columns `start..end` of all rows.
    ///
    /// # Panics
    /// If there are no such columns.
    #[must_use]
    pub fn sub_cols(&self, start: usize, end: usize) -> Self {
        match self {
            Self::F32(view) => Self::F32(view.sub_cols(start, end)),
            Self::Bf16(view) => Self::Bf16(view.sub_cols(start, end)),
        }
    }
}

impl MatMut<'_> {
    /// Number of rows.
    pub const fn rows(&self) -> usize {
        match self {
            Self::F32(view) => view.rows,
            Self::Bf16(view) => view.rows,
        }
    }

    /// Numbers in a row.
    pub const fn cols(&self) -> usize {
        match self {
            Self::F32(view) => view.cols,
            Self::Bf16(view) => view.cols,
        }
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn into_sub_rows(self, start: usize, end: usize) -> Self {
        match self {
            Self::F32(view) => Self::F32(view.into_sub_rows(start, end)),
            Self::Bf16(view) => Self::Bf16(view.into_sub_rows(start, end)),
        }
    }

    /// The same rows, for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        match self {
            Self::F32(view) => MatMut::F32(view.reborrow()),
            Self::Bf16(view) => MatMut::Bf16(view.reborrow()),
        }
    }
}

impl<'a> From<View<'a, f32>> for MatRef<'a> {
    fn from(view: View<'a, f32>) -> Self {
        Self::F32(view)
    }
}

impl<'a> From<View<'a, bf16>> for MatRef<'a> {
    fn from(view: View<'a, bf16>) -> Self {
        Self::Bf16(view)
    }
}

impl<'a> From<ViewMut<'a, f32>> for MatMut<'a> {
    fn from(view: ViewMut<'a, f32>) -> Self {
        Self::F32(view)
    }
}

impl<'a> From<ViewMut<'a, bf16>> for MatMut<'a> {
    fn from(view: ViewMut<'a, bf16>) -> Self {
        Self::Bf16(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_view_are_where_they_should_be() {
        let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let view = View::new(&data, 3, 4);
        assert_eq!(view.row(2), [8.0, 9.0, 10.0, 11.0]);
        let part = view.sub_rows(1, 3).sub_cols(1, 3);
        assert_eq!((part.rows(), part.cols(), part.stride()), (2, 2, 4));
        assert_eq!((part.row(0), part.row(1)), (&[5.0, 6.0][..], &[9.0, 10.0][..]));
        assert_eq!(view.sub_rows(3, 3).rows(), 0);
        let mut data = data.clone();
        let mut part = ViewMut::new(&mut data, 3, 4).into_sub_rows(2, 3).into_sub_cols(3, 4);
        part.row(0)[0] = 0.5;
        assert_eq!(data[11], 0.5);
    }

    #[test]
    fn the_last_row_may_end_where_the_data_does() {
        let data = [1.0f32, 2.0, 9.0, 3.0, 4.0];
        let view = View::strided(&data, 2, 2, 3);
        assert_eq!((view.row(0), view.row(1)), (&[1.0, 2.0][..], &[3.0, 4.0][..]));
    }
}
