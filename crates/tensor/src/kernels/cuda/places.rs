//! Which addresses of the processor mean something on the device.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::sys::CUdeviceptr;

use super::device::{Device, Fault};
use crate::kernels::DeviceCopy;
use crate::store::{Memory, Owner, bytes};
use crate::view::MatRef;

/// The regions of memory that a device knows, by their first address.
pub(super) struct Places {
    device: Arc<Mutex<Device>>,
    regions: RwLock<BTreeMap<usize, Region>>,
}

struct Region {
    bytes: usize,
    /// Where its copy lies; none for unified memory.
    copy: Option<CUdeviceptr>,
}

impl Places {
    pub(super) const fn new(device: Arc<Mutex<Device>>) -> Self {
        Self { device, regions: RwLock::new(BTreeMap::new()) }
    }

    /// Where `bytes` bytes from `start` lie for the device; `None` for memory that it does not know.
    pub(super) fn find(&self, start: usize, bytes: usize) -> Option<(CUdeviceptr, Whose)> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let (first, region) = regions.range(..=start).next_back()?;
        let offset = start - first;
        if offset + bytes > region.bytes {
            return None;
        }
        Some(match region.copy {
            Some(copy) => (copy + offset as CUdeviceptr, Whose::Copy),
            None => (start as CUdeviceptr, Whose::Both),
        })
    }

    fn enter(&self, start: usize, region: Region) {
        self.regions.write().unwrap_or_else(PoisonError::into_inner).insert(start, region);
    }

    fn leave(&self, start: usize) -> Option<Region> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner).remove(&start)
    }

    fn free(&self, at: CUdeviceptr) {
        // A device that refuses to take memory back has a fault that the next call meets.
        let _ = self.device.lock().unwrap_or_else(PoisonError::into_inner).free(at);
    }

    /// Unified memory.
    pub(super) fn allocate(this: &Arc<Self>, bytes: usize) -> Result<Memory, Fault> {
        let at = this.device.lock().unwrap_or_else(PoisonError::into_inner).unified(bytes)?;
        let start = NonNull::new(at as *mut u8).ok_or(Fault::Memory { wanted: bytes, free: 0 })?;
        this.enter(at as usize, Region { bytes, copy: None });
        // SAFETY: the memory is this call's own, and nothing else refers to it.
        Ok(unsafe { Memory::new(start, bytes, Arc::clone(this) as Arc<dyn Owner>) })
    }

    /// A copy of a matrix on the device, for as long as the guard lives; none if there is one, or nothing to copy.
    pub(super) fn keep(this: &Arc<Self>, x: MatRef<'_>) -> Result<Option<DeviceCopy>, Fault> {
        let bytes = match x {
            MatRef::F32(view) => bytes(view.data()),
            MatRef::Bf16(view) => bytes(view.data()),
        };
        let start = bytes.as_ptr() as usize;
        if bytes.is_empty() || this.find(start, bytes.len()).is_some() {
            return Ok(None);
        }
        let device = this.device.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = device.copy_of(bytes)?;
        drop(device);
        this.enter(start, Region { bytes: bytes.len(), copy: Some(copy) });
        Ok(Some(DeviceCopy::new(Guard { places: Arc::clone(this), start })))
    }
}

/// Who sees what is written at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Both sides.
    Both,
    /// The device alone: only to be read.
    Copy,
}

// SAFETY: unified memory is aligned to 512 bytes, was filled with zeros, and may be addressed by the processor while no kernel
// is at work, which whoever gives out its numbers waits for; the device takes it back when it rests.
unsafe impl Owner for Places {
    fn release(&self, start: NonNull<u8>, _: usize) {
        let start = start.as_ptr() as usize;
        self.leave(start);
        self.free(start as CUdeviceptr);
    }
}

/// The end of a copy.
struct Guard {
    places: Arc<Places>,
    start: usize,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(Region { copy: Some(copy), .. }) = self.places.leave(self.start) {
            self.places.free(copy);
        }
    }
}
