//! Memory of a thread that outlives a product, so that none is allocated in the steady state.

use std::cell::Cell;

/// Sixteen numbers, as many as a cache line holds.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    #[expect(dead_code, reason = "reached by pointers")]
    numbers: [f32; 16],
}

/// Buffers that begin at cache lines and grow as needed.
#[derive(Default)]
pub(super) struct Scratch {
    left: Buffer,
    right: Buffer,
    thin_left: Buffer,
    thin_right: Buffer,
    widened: Buffer,
}

/// One of them.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// Where `len` numbers are; what they are is left from before.
    pub(super) fn reserve(&mut self, len: usize) -> *mut f32 {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line { numbers: [0.0; 16] });
        }
        self.0.as_mut_ptr().cast()
    }
}

impl Scratch {
    /// Buffers for rows of the left factor, columns of the right one, both of a thin term, and what is held in few bits.
    pub(super) fn parts(&mut self) -> [&mut Buffer; 5] {
        [&mut self.left, &mut self.right, &mut self.thin_left, &mut self.thin_right, &mut self.widened]
    }
}

/// Lends the thread's buffers. They are taken meanwhile: a task that begins within another finds new ones.
pub(super) fn with<R>(use_it: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
    }
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let result = use_it(&mut scratch);
    SCRATCH.set(Some(scratch));
    result
}
