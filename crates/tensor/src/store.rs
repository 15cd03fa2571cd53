//! Numbers in the memory that a device's kernels reach fastest.
#![expect(unsafe_code, reason = "memory of a device is given as an address")]

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use half::bf16;

use crate::kernels::{Kernels, settle};

/// A number as it lies in memory.
///
/// # Safety
/// Any bits are a value of the type, and it has no padding.
pub unsafe trait Number: Copy + Default + Send + Sync + fmt::Debug + 'static {}

// SAFETY: any bits are a float.
unsafe impl Number for f32 {}
// SAFETY: any bits are a float.
unsafe impl Number for bf16 {}
// SAFETY: any bits are an integer.
unsafe impl Number for u32 {}
// SAFETY: any bits are an integer.
unsafe impl Number for u8 {}

/// The bytes of numbers.
#[cfg(feature = "cuda")]
pub(crate) fn bytes<T: Number>(values: &[T]) -> &[u8] {
    // SAFETY: a number has no padding, and bytes no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of numbers, to be written.
#[cfg(feature = "cuda")]
pub(crate) fn bytes_mut<T: Number>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are numbers.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// What memory of a device goes back to.
///
/// # Safety
/// The memory that an implementation gives out is initialised, aligned to 256 bytes, and may be read and written by the
/// processor whenever no kernel is at work, until [`Owner::release`]; that waits for those that are.
pub unsafe trait Owner: Send + Sync {
    /// Takes the memory back: nobody uses it any more.
    fn release(&self, start: NonNull<u8>, bytes: usize);
}

/// Memory of a device that the processor can address too.
pub struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    owner: Arc<dyn Owner>,
}

// SAFETY: the memory belongs to this value alone, and its owner takes it back from any thread.
unsafe impl Send for Memory {}
// SAFETY: a shared reference gives no access to what is there.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of a device at {:p}", self.bytes, self.start)
    }
}

impl Memory {
    /// The memory at `start`.
    ///
    /// # Safety
    /// `owner` gave it out with this length, and nothing else refers to it.
    pub const unsafe fn new(start: NonNull<u8>, bytes: usize, owner: Arc<dyn Owner>) -> Self {
        Self { start, bytes, owner }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.owner.release(self.start, self.bytes);
    }
}

/// Numbers of one type, zero at first.
#[derive(Debug)]
pub struct Store<T: Number>(Held<T>);

#[derive(Debug)]
enum Held<T> {
    Host(Vec<T>),
    Device { memory: Memory, len: usize, of: PhantomData<T> },
}

impl<T: Number> Default for Store<T> {
    fn default() -> Self {
        Self(Held::Host(Vec::new()))
    }
}

impl<T: Number> Store<T> {
    /// `len` numbers where `kernels` work on them best: in the processor's memory if they have none of their own.
    pub fn new(kernels: &dyn Kernels, len: usize) -> Self {
        let memory = (len > 0).then(|| kernels.memory(len * size_of::<T>())).flatten();
        Self(match memory {
            Some(memory) => {
                assert!(memory.bytes >= len * size_of::<T>(), "{} bytes for {len} numbers", memory.bytes);
                Held::Device { memory, len, of: PhantomData }
            }
            None => Held::Host(vec![T::default(); len]),
        })
    }
}

impl<T: Number> Deref for Store<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        settle();
        self.span()
    }
}

impl<T: Number> DerefMut for Store<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        settle();
        self.span_mut()
    }
}

impl<T: Number> Store<T> {
    /// All numbers, for views of them: what is there is only to be looked at through these, which wait for a device.
    pub fn span(&self) -> &[T] {
        match &self.0 {
            Held::Host(values) => values,
            // SAFETY: the memory is aligned, initialised, long enough (checked when it was taken) and this value's alone; any
            // bits are a number of such a type.
            Held::Device { memory, len, .. } => unsafe {
                std::slice::from_raw_parts(memory.start.as_ptr().cast(), *len)
            },
        }
    }

    /// As [`Store::span`], to be written.
    pub fn span_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Held::Host(values) => values,
            // SAFETY: as above, and the reference to it is the only one.
            Held::Device { memory, len, .. } => unsafe {
                std::slice::from_raw_parts_mut(memory.start.as_ptr().cast(), *len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu;

    /// Gives out plain memory and counts what comes back.
    #[derive(Default)]
    struct Counting(std::sync::atomic::AtomicUsize);

    // SAFETY: the memory is a leaked, aligned box.
    unsafe impl Owner for Counting {
        fn release(&self, start: NonNull<u8>, bytes: usize) {
            let layout = std::alloc::Layout::from_size_align(bytes, 256).unwrap();
            // SAFETY: it was allocated with this layout below.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
            self.0.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        }
    }

    #[test]
    fn the_processor_keeps_its_numbers_itself() {
        let mut store = Store::<f32>::new(cpu(), 5);
        store[3] = 2.0;
        assert_eq!(store[..], [0.0, 0.0, 0.0, 2.0, 0.0]);
        assert!(Store::<f32>::new(cpu(), 0).is_empty());
    }

    #[test]
    fn memory_of_a_device_is_read_written_and_given_back() {
        let owner = Arc::new(Counting::default());
        let layout = std::alloc::Layout::from_size_align(64, 256).unwrap();
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).unwrap();
        // SAFETY: nothing else refers to it.
        let memory = unsafe { Memory::new(start, 64, Arc::clone(&owner) as Arc<dyn Owner>) };
        let mut store = Store::<f32>(Held::Device { memory, len: 16, of: PhantomData });
        store[15] = 3.0;
        assert_eq!((store.len(), store.iter().sum::<f32>()), (16, 3.0));
        drop(store);
        assert_eq!(owner.0.load(std::sync::atomic::Ordering::Relaxed), 64);
    }
}
