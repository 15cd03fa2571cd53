//! Buffers that are used again: a pass takes them, a dropped one goes back, and after the first step nothing is allocated.

use std::sync::{Arc, Mutex, PoisonError};

use attune_tensor::kernels::{self, Kernels};
use attune_tensor::store::{Number, Store};
use attune_tensor::view::{MatMut, MatRef, View, ViewMut};
use half::bf16;

/// The type of the activations that a pass multiplies and keeps. The residual stream, gradients and sums are in 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// 32-bit floats.
    F32,
    /// bf16.
    Bf16,
}

/// A number that an arena keeps buffers of.
pub trait Stored: Number {
    /// The free buffers of this type.
    fn free(free: &mut Free) -> &mut Vec<Store<Self>>;
}

/// Buffers that nobody uses, by type.
#[derive(Debug, Default)]
pub struct Free {
    f32: Vec<Store<f32>>,
    bf16: Vec<Store<bf16>>,
}

impl Stored for f32 {
    fn free(free: &mut Free) -> &mut Vec<Store<Self>> {
        &mut free.f32
    }
}

impl Stored for bf16 {
    fn free(free: &mut Free) -> &mut Vec<Store<Self>> {
        &mut free.bf16
    }
}

/// A source of buffers where a device's kernels work on them best. Clones share what they hold.
#[derive(Debug, Clone)]
pub struct Arena {
    kernels: &'static dyn Kernels,
    free: Arc<Mutex<Free>>,
}

impl Default for Arena {
    /// Of the processor.
    fn default() -> Self {
        Self::new(kernels::cpu())
    }
}

impl Arena {
    /// Of the device of these kernels.
    pub fn new(kernels: &'static dyn Kernels) -> Self {
        Self { kernels, free: Arc::default() }
    }

    /// The kernels that work on its buffers.
    pub fn kernels(&self) -> &'static dyn Kernels {
        self.kernels
    }

    /// The same buffers under kernels that make no products; `None` where there are no such.
    pub fn without_products(&self) -> Option<Self> {
        self.kernels.without_products().map(|kernels| Self { kernels, free: Arc::clone(&self.free) })
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `length` numbers of any value.
    pub fn take<T: Stored>(&self, length: usize) -> Buffer<T> {
        let mut free = self.free();
        let buffers = T::free(&mut free);
        // The smallest that is large enough, unless most of it would lie idle.
        let fits = |capacity: usize| capacity >= length && capacity / 2 <= length.max(1024);
        let best = buffers.iter().enumerate().filter(|(_, buffer)| fits(buffer.len())).min_by_key(|(_, b)| b.len());
        let best = best.map(|(index, _)| index);
        let values = best.map(|index| buffers.swap_remove(index)).unwrap_or_default();
        drop(free);
        let mut buffer = Buffer { values, length, home: self.clone() };
        if buffer.values.len() < length {
            buffer.values = Store::new(self.kernels, length);
        }
        buffer
    }

    /// A matrix of any values in the type of the activations.
    pub fn mat(&self, rows: usize, cols: usize, dtype: Activations) -> Mat {
        match dtype {
            Activations::F32 => Mat::F32(Rows { buffer: self.take(rows * cols), rows, cols }),
            Activations::Bf16 => Mat::Bf16(Rows { buffer: self.take(rows * cols), rows, cols }),
        }
    }

    /// A matrix of any values in 32 bits.
    pub fn rows(&self, rows: usize, cols: usize) -> Rows<f32> {
        Rows { buffer: self.take(rows * cols), rows, cols }
    }

    /// A matrix of zeros in 32 bits.
    pub fn zeros(&self, rows: usize, cols: usize) -> Rows<f32> {
        let mut made = self.rows(rows, cols);
        self.kernels.fill(made.view_mut(), 0.0);
        made
    }

    /// Bytes of all buffers that nobody uses at the moment: after a pass, of all that it used at once.
    pub fn idle_bytes(&self) -> usize {
        let free = self.free();
        let f32s: usize = free.f32.iter().map(|buffer| buffer.len()).sum();
        let bf16s: usize = free.bf16.iter().map(|buffer| buffer.len()).sum();
        4 * f32s + 2 * bf16s
    }
}

/// Numbers that go back to their arena when they are dropped.
#[derive(Debug)]
pub struct Buffer<T: Stored> {
    values: Store<T>,
    length: usize,
    home: Arena,
}

impl<T: Stored> Buffer<T> {
    /// The numbers for views of them and for kernels: nobody looks at them here.
    pub(crate) fn span(&self) -> &[T] {
        &self.values.span()[..self.length]
    }

    /// As [`Buffer::span`], to be written.
    pub(crate) fn span_mut(&mut self) -> &mut [T] {
        &mut self.values.span_mut()[..self.length]
    }
}

impl<T: Stored> AsRef<[T]> for Buffer<T> {
    fn as_ref(&self) -> &[T] {
        &self.values[..self.length]
    }
}

impl<T: Stored> AsMut<[T]> for Buffer<T> {
    fn as_mut(&mut self) -> &mut [T] {
        &mut self.values[..self.length]
    }
}

impl<T: Stored> Drop for Buffer<T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if !values.is_empty() {
            T::free(&mut self.home.free()).push(values);
        }
    }
}

/// A matrix in a buffer of the arena.
#[derive(Debug)]
pub struct Rows<T: Stored> {
    buffer: Buffer<T>,
    rows: usize,
    cols: usize,
}

impl<T: Stored> Rows<T> {
    /// To be read.
    pub fn view(&self) -> View<'_, T> {
        View::new(self.buffer.span(), self.rows, self.cols)
    }

    /// To be written.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::new(self.buffer.span_mut(), self.rows, self.cols)
    }

    /// The same numbers as rows of another width.
    ///
    /// # Panics
    /// If they are fewer.
    pub(crate) fn view_as(&self, rows: usize, cols: usize) -> View<'_, T> {
        View::new(self.buffer.span(), rows, cols)
    }

    /// As [`Rows::view_as`], to be written.
    ///
    /// # Panics
    /// If they are fewer.
    pub(crate) fn view_as_mut(&mut self, rows: usize, cols: usize) -> ViewMut<'_, T> {
        ViewMut::new(self.buffer.span_mut(), rows, cols)
    }

    /// All numbers, row after row.
    pub fn values(&self) -> &[T] {
        self.buffer.as_ref()
    }

    /// All numbers, to be written.
    pub fn values_mut(&mut self) -> &mut [T] {
        self.buffer.as_mut()
    }

    /// Number of rows.
    pub const fn n_rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub const fn n_cols(&self) -> usize {
        self.cols
    }
}

/// A matrix in the type of the activations.
#[derive(Debug)]
pub enum Mat {
    /// 32-bit floats.
    F32(Rows<f32>),
    /// bf16.
    Bf16(Rows<bf16>),
}

impl Mat {
    /// Its type.
    pub const fn dtype(&self) -> Activations {
        match self {
            Self::F32(_) => Activations::F32,
            Self::Bf16(_) => Activations::Bf16,
        }
    }

    /// To be read.
    pub fn view(&self) -> MatRef<'_> {
        match self {
            Self::F32(rows) => MatRef::F32(rows.view()),
            Self::Bf16(rows) => MatRef::Bf16(rows.view()),
        }
    }

    /// To be written.
    pub fn view_mut(&mut self) -> MatMut<'_> {
        match self {
            Self::F32(rows) => MatMut::F32(rows.view_mut()),
            Self::Bf16(rows) => MatMut::Bf16(rows.view_mut()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        let arena = Arena::default();
        let mut first = arena.rows(10, 300);
        first.values_mut()[0] = 7.0;
        let place = first.values().as_ptr();
        drop(first);
        let second = arena.rows(9, 300);
        assert_eq!((second.values().as_ptr(), second.values().len()), (place, 2700));
        let third = arena.rows(10, 300);
        assert_ne!(third.values().as_ptr(), place);
        assert!(arena.zeros(1, 3).values().iter().all(|v| *v == 0.0));
    }

    #[test]
    fn a_large_buffer_is_not_spent_on_a_small_need() {
        let arena = Arena::default();
        drop(arena.rows(100, 300));
        assert_eq!(arena.rows(1, 300).buffer.values.len(), 300);
    }
}
