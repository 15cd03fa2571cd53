//! Long letters from device to device, by NVIDIA's library (NCCL): over links between devices and networks that reach their memory.
//!
//! It only carries bytes, in pieces, between what [`crate::carried`] gives and takes: sends and receives, no sums. Nothing of it blocks: who
//! waits asks again and again whether something has failed, there or at another process, and whether it is too late. Ending
//! a communicator has been seen to hang where the device does, so nobody waits for that longer than a moment; what is left ends
//! with the process.
#![expect(unsafe_code, reason = "what a device is told to copy is this module's duty")]
#![expect(clippy::disallowed_methods, reason = "to meet others has a deadline")]

mod library;

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUresult, CUstream};

use self::library::{Communicator, ID, Id, Nccl, nccl, spelt};
use crate::Wire as _;
use crate::carried::{Letter, Link, Stopped, Watch, pause};
use crate::mesh::Mesh;
use crate::way::End;

/// Bytes of a letter that go at a time: each process has room for so many to and from each other one on its device.
const PIECE: usize = 8 << 20;
/// How long is waited for a communicator to end.
const TO_END: Duration = Duration::from_secs(5);

/// A device that could be joined to others.
pub(crate) struct Device {
    nccl: &'static Nccl,
    uuid: [u8; 16],
    context: CUcontext,
}

/// Makes this thread one of the device's.
fn enter(context: CUcontext) -> Result<(), String> {
    // SAFETY: contexts here live as long as the process.
    unsafe { result::ctx::set_current(context) }.map_err(plain("its context"))
}

fn plain(what: &str) -> impl Fn(DriverError) -> String {
    move |error| format!("cannot use its device: {what}: {error:?}")
}

impl Device {
    /// The one of this number.
    ///
    /// # Errors
    /// Why it cannot be joined to others, as what is said of its process.
    pub(crate) fn of(card: u32) -> Result<Self, String> {
        let nccl = nccl().map_err(|words| format!("has no NCCL: {words}"))?;
        // SAFETY: this only tries to load the library.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err("has no driver of NVIDIA's".to_owned());
        }
        result::init().map_err(plain("the driver"))?;
        let device = result::device::get(card as i32).map_err(plain("the device"))?;
        let uuid = result::device::get_uuid(device).map_err(plain("its name"))?.bytes.map(|byte| byte as u8);
        // SAFETY: the device exists; the context is the one that kernels use as well, and is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(plain("its context"))?;
        Ok(Self { nccl, uuid, context })
    }
}

impl End for Device {
    type Link = Joined;

    fn link(&self) -> String {
        format!("NCCL {}", spelt(self.nccl.version()))
    }

    fn device(&self) -> [u8; 16] {
        self.uuid
    }

    fn new_group(&self) -> Result<Vec<u8>, String> {
        Ok(self.nccl.unique_id()?.0.to_vec())
    }

    fn join(self, group: &[u8], mesh: &Mesh) -> Result<Joined, Stopped> {
        let failed = Stopped::Failed;
        let Ok(group) = group.try_into() else {
            return Err(failed(format!("a group of {} bytes of name; expected {ID}", group.len())));
        };
        enter(self.context).map_err(failed)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let stream = stream.map_err(|error| failed(plain("a stream")(error)))?;
        // To and from each, now: where there is no room, that is no surprise in the middle of a step.
        // SAFETY: the address is this end's own.
        let room = unsafe { result::malloc_sync(2 * mesh.size() as usize * PIECE) };
        let room = room.map_err(|error| failed(plain("room for letters on their way")(error)))?;
        let communicator = self.nccl.begin(Id(group), mesh.rank(), mesh.size()).map_err(failed)?;
        let joined = Joined { nccl: self.nccl, context: self.context, stream, communicator, room };
        let (within, start) = (mesh.patience().join, Instant::now());
        let mut watch = || mesh.lost().map_or(Ok(()), Err);
        wait(&mut watch, || {
            if start.elapsed() > within {
                return Err(format!("the group did not come together within {within:?}"));
            }
            joined.nccl.is_settled(communicator)
        })?;
        Ok(joined)
    }
}

/// Waits until something is done, unless it fails or whoever watches ends it.
fn wait(watch: &mut Watch<'_>, mut is_done: impl FnMut() -> Result<bool, String>) -> Result<(), Stopped> {
    loop {
        if is_done().map_err(Stopped::Failed)? {
            return Ok(());
        }
        watch()?;
        pause();
    }
}

/// One end of a group of devices.
pub(crate) struct Joined {
    nccl: &'static Nccl,
    context: CUcontext,
    stream: CUstream,
    communicator: Communicator,
    /// Memory of the device for pieces on their way: one to and one from each process of the group.
    room: CUdeviceptr,
}

// SAFETY: the handles may be used from any thread, one at a time, that has made the context its current one, which `carry` does.
unsafe impl Send for Joined {}

/// The lengths of the `round`th pieces of letters, where there are such.
fn pieces(lengths: impl Iterator<Item = (u32, usize)>, round: usize) -> impl Iterator<Item = (usize, u32, usize)> {
    let left = lengths.enumerate().map(move |(idx, (rank, length))| (idx, rank, length.saturating_sub(round * PIECE)));
    left.map(|(idx, rank, left)| (idx, rank, left.min(PIECE))).filter(|(_, _, length)| *length > 0)
}

impl Joined {
    /// Whether the stream has done what it was given.
    fn is_at_rest(&self) -> Result<bool, String> {
        // SAFETY: the stream is this end's own.
        match unsafe { cudarc::driver::sys::cuStreamQuery(self.stream) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(format!("the device says {error:?}")),
        }
    }
}

impl Link for Joined {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    fn carry(&mut self, out: &[Letter<'_>], into: &mut [(u32, Vec<u8>)], watch: &mut Watch<'_>) -> Result<(), Stopped> {
        let failed = Stopped::Failed;
        enter(self.context).map_err(failed)?;
        let room = self.room;
        let place = |idx: usize| room + (idx * PIECE) as CUdeviceptr;
        let lengths = out.iter().map(|(_, letter)| letter.len()).chain(into.iter().map(|(_, letter)| letter.len()));
        let n_rounds = lengths.max().unwrap_or_default().div_ceil(PIECE);
        let copied = |error: DriverError| Stopped::Failed(format!("a copy of a letter: {error:?}"));
        for round in 0..n_rounds {
            // Both ends of a letter know how long it is, so each round of one is that round of the other.
            let sent: Vec<_> = pieces(out.iter().map(|(rank, letter)| (*rank, letter.len())), round).collect();
            let taken: Vec<_> = pieces(into.iter().map(|(rank, letter)| (*rank, letter.len())), round).collect();
            let (begin, n_out) = (round * PIECE, out.len());
            for (idx, _, length) in &sent {
                // SAFETY: the place has room for a piece, and of memory that is not pinned the driver has its own copy when this returns.
                unsafe {
                    result::memcpy_htod_async(place(*idx), &out[*idx].1[begin..begin + length], self.stream)
                        .map_err(copied)?;
                }
            }
            let at =
                |base: usize| move |(idx, rank, length): &(usize, u32, usize)| (*rank, place(base + *idx), *length);
            // SAFETY: each place has room for a piece, and nothing else is done with it until the stream is at rest.
            let begun = unsafe {
                let (out, into) = (sent.iter().map(at(0)), taken.iter().map(at(n_out)));
                self.nccl.swap(self.communicator, self.stream.cast(), out, into)
            };
            begun.map_err(failed)?;
            wait(watch, || Ok(self.nccl.is_settled(self.communicator)? && self.is_at_rest()?))?;
            for (idx, _, length) in &taken {
                // SAFETY: the place has what came, which the stream has done.
                unsafe {
                    result::memcpy_dtoh_sync(&mut into[*idx].1[begin..begin + length], place(n_out + idx))
                        .map_err(copied)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        /// The communicator on its way to the thread that ends it.
        struct Last(&'static Nccl, Communicator, CUcontext);
        // SAFETY: it is that thread's alone.
        unsafe impl Send for Last {}
        let last = Last(self.nccl, self.communicator, self.context);
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let Last(nccl, communicator, context) = { last };
            if enter(context).is_ok() {
                // SAFETY: nobody has the communicator any more.
                unsafe { nccl.abort(communicator) };
            }
            let _ = tell.send(());
        });
        // One that hangs ends with the process, and so does what it holds.
        if told.recv_timeout(TO_END).is_ok() && enter(self.context).is_ok() {
            // SAFETY: nothing is on its way any more, and both are this end's own.
            unsafe {
                let _ = result::stream::destroy(self.stream);
                let _ = result::free_sync(self.room);
            }
        }
    }
}

#[cfg(test)]
mod tests;
