//! A piece of work on a device: its operands are found or brought there, kernels are launched, results are brought back.

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys::CUdeviceptr;

use super::device::{Device, Fault};
use super::places::{Places, Whose};
use crate::store::{Number, bytes, bytes_mut};
use crate::view::{MatMut, MatRef, ViewMut};

/// Rows as kernels see them: `Rows` of `rows.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) data: CUdeviceptr,
    pub(super) stride: i64,
    pub(super) narrow: i64,
}

impl Rows {
    /// No rows.
    pub(super) const fn none() -> Self {
        Self { data: 0, stride: 0, narrow: 0 }
    }

    /// Where the first begins.
    pub(super) const fn start(self) -> Address {
        Address(self.data)
    }

    /// Without the rows above `row`.
    pub(super) const fn below(self, row: usize) -> Self {
        let width = if self.narrow != 0 { 2 } else { 4 };
        Self { data: self.data + (row as i64 * self.stride * width) as CUdeviceptr, ..self }
    }
}

/// An address on the device; null by default.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Address(pub(super) CUdeviceptr);

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Rows(Rows),
    Address(CUdeviceptr),
    I64(i64),
    I32(i32),
    F32(f32),
}

impl Arg {
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Self::Rows(value) => std::ptr::from_mut(value).cast(),
            Self::Address(value) => std::ptr::from_mut(value).cast(),
            Self::I64(value) => std::ptr::from_mut(value).cast(),
            Self::I32(value) => std::ptr::from_mut(value).cast(),
            Self::F32(value) => std::ptr::from_mut(value).cast(),
        }
    }
}

impl From<Rows> for Arg {
    fn from(value: Rows) -> Self {
        Self::Rows(value)
    }
}

impl From<Address> for Arg {
    fn from(value: Address) -> Self {
        Self::Address(value.0)
    }
}

impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Self::I64(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::I32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// The arguments of a kernel, in its order.
#[derive(Debug, Default)]
pub(super) struct Args(Vec<Arg>);

impl Args {
    pub(super) fn push(&mut self, arg: impl Into<Arg>) {
        self.0.push(arg.into());
    }
}

/// Arguments of the types that kernels take.
macro_rules! args {
    ($($arg:expr),+ $(,)?) => {{
        let mut of = $crate::kernels::cuda::work::Args::default();
        $(of.push($arg);)+
        of
    }};
}
pub(super) use args;

/// How many blocks of how many threads a kernel runs in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (usize, usize),
    pub(super) threads: (u32, u32),
    /// Bytes of shared memory of each block.
    pub(super) shared: u32,
    /// The width of heads that the kernel is compiled for, if it is one of attention.
    pub(super) width: usize,
}

impl Grid {
    const fn new(blocks: usize, threads: (u32, u32)) -> Self {
        Self { blocks: (blocks, 1), threads, shared: 0, width: 0 }
    }

    /// A thread for each of `n` numbers, or for several where there are very many.
    pub(super) fn of_numbers(n: usize) -> Self {
        Self::new(n.div_ceil(256).min(1 << 14), (256, 1))
    }

    /// A block for each row.
    pub(super) fn of_rows(rows: usize, cols: usize) -> Self {
        Self::new(rows, (cols.next_multiple_of(32).clamp(32, if cols > 8192 { 1024 } else { 256 }) as u32, 1))
    }

    /// A block for every 32 columns, with eight threads for each.
    pub(super) const fn of_columns(cols: usize) -> Self {
        Self::new(cols.div_ceil(32), (32, 8))
    }
}

/// Work that has begun and not yet ended.
pub(super) struct Work<'d> {
    pub(super) device: &'d mut Device,
    places: &'d Places,
    /// Memory of this piece of work alone.
    own: Vec<CUdeviceptr>,
    /// What is brought back at the end: from, to, bytes.
    back: Vec<(CUdeviceptr, *mut u8, usize)>,
    /// Whether its end is waited for.
    waited_for: bool,
}

impl<'d> Work<'d> {
    pub(super) fn new(device: &'d mut Device, places: &'d Places) -> Result<Self, Fault> {
        device.enter()?;
        Ok(Self { device, places, own: Vec::new(), back: Vec::new(), waited_for: false })
    }

    /// Memory of this piece of work, with any contents.
    pub(super) fn scratch<T: Number>(&mut self, len: usize) -> Result<Address, Fault> {
        // SAFETY: the stream is the device's; the memory is freed at the end of this work.
        let at = unsafe { result::malloc_async(self.device.stream, (len * size_of::<T>()).max(1))? };
        self.own.push(at);
        Ok(Address(at))
    }

    fn brought(&mut self, bytes: &[u8]) -> Result<CUdeviceptr, Fault> {
        let Address(at) = self.scratch::<u8>(bytes.len())?;
        // SAFETY: the memory is as long as the bytes, which the driver has read when this returns: they are no pinned memory.
        unsafe { result::memcpy_htod_async(at, bytes, self.device.stream)? };
        Ok(at)
    }

    /// Where numbers lie that are only read.
    pub(super) fn slice<T: Number>(&mut self, values: &[T]) -> Result<Address, Fault> {
        let bytes = bytes(values);
        match self.places.find(bytes.as_ptr() as usize, bytes.len()) {
            Some((at, _)) => Ok(Address(at)),
            None if bytes.is_empty() => Ok(Address::default()),
            None => Ok(Address(self.brought(bytes)?)),
        }
    }

    /// Where numbers lie that are written, and that whoever gave them may look at when the work returns; `kept` if what is
    /// there matters.
    pub(super) fn slice_mut<T: Number>(&mut self, values: &mut [T], kept: bool) -> Result<Address, Fault> {
        self.waited_for = true;
        self.span_mut(values, kept)
    }

    /// As [`Work::slice_mut`], of numbers that are looked at through views.
    fn span_mut<T: Number>(&mut self, values: &mut [T], kept: bool) -> Result<Address, Fault> {
        let bytes = bytes_mut(values);
        match self.places.find(bytes.as_ptr() as usize, bytes.len()) {
            Some((at, Whose::Both)) => return Ok(Address(at)),
            Some((_, Whose::Copy)) => {
                return Err(Fault::Driver("a matrix that is kept on the device was to be written".to_owned()));
            }
            None if bytes.is_empty() => return Ok(Address::default()),
            None => {}
        }
        let at = if kept { self.brought(bytes)? } else { self.scratch::<u8>(bytes.len())?.0 };
        self.back.push((at, bytes.as_mut_ptr(), bytes.len()));
        Ok(Address(at))
    }

    /// A matrix that is only read.
    pub(super) fn mat(&mut self, x: MatRef<'_>) -> Result<Rows, Fault> {
        Ok(match x {
            MatRef::F32(view) => Rows { data: self.slice(view.span())?.0, stride: view.stride() as i64, narrow: 0 },
            MatRef::Bf16(view) => Rows { data: self.slice(view.span())?.0, stride: view.stride() as i64, narrow: 1 },
        })
    }

    /// A matrix that is written; `kept` if what is there matters. What lies between its rows always does.
    pub(super) fn mat_mut(&mut self, y: MatMut<'_>, kept: bool) -> Result<Rows, Fault> {
        match y {
            MatMut::F32(view) => self.view_mut(view, kept),
            MatMut::Bf16(mut view) => {
                let (stride, kept) = (view.stride() as i64, kept || view.stride() != view.cols());
                Ok(Rows { data: self.span_mut(view.span(), kept)?.0, stride, narrow: 1 })
            }
        }
    }

    /// A matrix of 32 bits that is written.
    pub(super) fn view_mut(&mut self, mut y: ViewMut<'_, f32>, kept: bool) -> Result<Rows, Fault> {
        let (stride, kept) = (y.stride() as i64, kept || y.stride() != y.cols());
        Ok(Rows { data: self.span_mut(y.span(), kept)?.0, stride, narrow: 0 })
    }

    /// Begins a kernel.
    pub(super) fn launch(&mut self, name: &'static str, grid: Grid, mut args: Args) -> Result<(), Fault> {
        let ((x, y), (width, height)) = (grid.blocks, grid.threads);
        if x * y == 0 {
            return Ok(());
        }
        let too_many = || Fault::Driver(format!("{x} × {y} blocks are more than a launch takes"));
        let (x, y) = (i32::try_from(x).map_err(|_| too_many())?, u16::try_from(y).map_err(|_| too_many())?);
        let function = self.device.function(name, grid.width, grid.shared)?;
        let mut pointers: Vec<*mut c_void> = args.0.iter_mut().map(Arg::pointer).collect();
        // SAFETY: the arguments are the kernel's, in its order and types; their addresses lie within what the views that they
        // were made of span, and shapes were checked before.
        unsafe {
            let blocks = (x as u32, u32::from(y), 1);
            let threads = (width, height, 1);
            result::launch_kernel(function, blocks, threads, grid.shared, self.device.stream, &mut pointers)?;
        }
        Ok(())
    }

    /// Brings results back and waits for them, where there are any that the device cannot leave in their place.
    pub(super) fn finish(&mut self) -> Result<(), Fault> {
        let waited_for = self.waited_for || !self.back.is_empty();
        let mut done = Ok(());
        for (from, to, bytes) in self.back.drain(..) {
            // SAFETY: it is a mutable borrow of this length, which lives until the caller of this work returns.
            let to = unsafe { std::slice::from_raw_parts_mut(to, bytes) };
            // SAFETY: the memory is as long as the bytes.
            let copied = unsafe { result::memcpy_dtoh_async(to, from, self.device.stream) };
            let copied = copied.map_err(Fault::from);
            done = done.and(copied);
        }
        for at in self.own.drain(..) {
            // SAFETY: it was taken in this stream, and what uses it was begun before.
            let freed = unsafe { result::free_async(at, self.device.stream) };
            let freed = freed.map_err(Fault::from);
            done = done.and(freed);
        }
        if waited_for || done.is_err() {
            let rests = self.device.rest();
            return done.and(rests);
        }
        self.device.begun();
        done
    }
}
