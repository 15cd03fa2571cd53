//! A device as the driver gives it: libraries, the compiled kernels, memory, one stream.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUfunction, CUfunction_attribute, CUmodule, CUstream};
use cudarc::driver::sys::{
    CUdevice_attribute, CUmem_advise, CUmemAttach_flags, CUmemLocation, CUmemLocationType, CUmemPool_attribute,
};
use cudarc::driver::{result, sys};
use cudarc::{cublas, nvrtc};

/// The text of the kernels over rows, which those of attention build on.
const ROWS: &str = include_str!("rows.cu");
const ATTENTION: &str = include_str!("attention.cu");

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// One of CUDA's libraries cannot be loaded.
    #[error("{library} cannot be loaded; expected {hint} where the loader looks (LD_LIBRARY_PATH)")]
    Library {
        /// Its name.
        library: &'static str,
        /// What brings it.
        hint: &'static str,
    },
    /// There is no device of this number.
    #[error("there is no device {ordinal}: the driver knows {count}")]
    NoDevice {
        /// The number that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device cannot share addresses with the processor.
    #[error("{device} has no unified memory; expected a device of compute capability 6.0 or more under Linux")]
    NoUnifiedMemory {
        /// Its name.
        device: String,
    },
    /// More memory was asked for than is free.
    #[error("{wanted} bytes were asked for where {free} are free on the device")]
    Memory {
        /// What was asked for.
        wanted: usize,
        /// What is free.
        free: usize,
    },
    /// The driver refused.
    #[error("the driver says {0}")]
    Driver(String),
    /// cuBLAS refused.
    #[error("cuBLAS says {0}")]
    Blas(String),
    /// The kernels cannot be compiled for this device.
    #[error("the kernels do not compile for {architecture}: {message}")]
    Compile {
        /// For what they were compiled.
        architecture: String,
        /// What the compiler says.
        message: String,
    },
    /// What was done when it happened.
    #[error("{what}: {source}")]
    In {
        /// The operation.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: Box<Fault>,
    },
}

impl Fault {
    /// With the name of the operation.
    pub(super) fn within(self, what: &'static str) -> Self {
        Self::In { what, source: Box::new(self) }
    }
}

impl From<result::DriverError> for Fault {
    fn from(error: result::DriverError) -> Self {
        Self::Driver(format!("{error:?}"))
    }
}

impl From<cublas::result::CublasError> for Fault {
    fn from(error: cublas::result::CublasError) -> Self {
        Self::Blas(format!("{:?}", error.0))
    }
}

/// How many devices are at work.
static AT_WORK: AtomicUsize = AtomicUsize::new(0);

/// Whether any device is at work.
pub(super) fn at_work() -> bool {
    AT_WORK.load(Ordering::Acquire) > 0
}

/// Whether the driver is there.
fn driver() -> bool {
    // SAFETY: this only tries to load the library.
    unsafe { sys::is_culib_present() }
}

/// Devices that the driver knows.
pub(super) fn count() -> usize {
    if !driver() || result::init().is_err() {
        return 0;
    }
    result::device::get_count().map_or(0, |count| count.max(0) as usize)
}

/// A device that the driver knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its own name.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: usize,
}

/// What the driver says of a device, without opening it.
pub(super) fn found(ordinal: usize) -> Result<Found, Fault> {
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: the device is the driver's own.
    let memory_bytes = unsafe { result::device::total_mem(device)? };
    Ok(Found { name: result::device::get_name(device)?, memory_bytes })
}

/// A device with its one stream; whoever has it works alone.
pub(super) struct Device {
    pub(super) name: String,
    /// `cuda sm_90` and the like: kernels of one architecture are one profile.
    pub(super) profile: String,
    architecture: String,
    ordinal: i32,
    context: CUcontext,
    pub(super) stream: CUstream,
    pub(super) blas: cublas::sys::cublasHandle_t,
    /// Compiled text: for a width of heads, or for none.
    modules: HashMap<usize, CUmodule>,
    functions: HashMap<(&'static str, usize), CUfunction>,
    /// Bytes of shared memory that a block may have.
    shared_limit: i32,
    /// Whether something was begun since it last rested.
    at_work: bool,
}

// SAFETY: the driver's handles may be used from any thread that has made the context its current one, which every entry does.
unsafe impl Send for Device {}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Self, Fault> {
        if !driver() {
            return Err(Fault::Library { library: "libcuda", hint: "NVIDIA's driver" });
        }
        // SAFETY: these only try to load libraries.
        let (has_nvrtc, has_blas) = unsafe { (nvrtc::sys::is_culib_present(), cublas::sys::is_culib_present()) };
        if !has_nvrtc {
            return Err(Fault::Library { library: "libnvrtc", hint: "CUDA 12 or 13 (its run-time compiler)" });
        }
        if !has_blas {
            return Err(Fault::Library { library: "libcublas", hint: "CUDA 12 or 13 (its BLAS)" });
        }
        result::init()?;
        let count = count();
        if ordinal >= count {
            return Err(Fault::NoDevice { ordinal, count });
        }
        let device = result::device::get(ordinal as i32)?;
        let name = result::device::get_name(device)?;
        // SAFETY: the device is the driver's own.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        if attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY)? == 0 {
            return Err(Fault::NoUnifiedMemory { device: name });
        }
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared_limit = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: the device exists; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device)? };
        // SAFETY: the context was made above.
        unsafe { result::ctx::set_current(context)? };
        // Memory of finished calls stays with the process: by default it goes back at every rest, and is asked for again.
        let mut kept = u64::MAX;
        // SAFETY: the device is the driver's own, the pool is the device's, and this attribute is a number of 64 bits.
        unsafe {
            let pool = result::device::get_default_mem_pool(device)?;
            let which = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, which, std::ptr::from_mut(&mut kept).cast())?;
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        let blas = cublas::result::create_handle()?;
        // SAFETY: both were made above, in this context.
        unsafe { cublas::result::set_stream(blas, stream.cast())? };
        let mut made = Self {
            name,
            profile: format!("cuda sm_{major}{minor}"),
            architecture: format!("compute_{major}{minor}"),
            ordinal: ordinal as i32,
            context,
            stream,
            blas,
            modules: HashMap::new(),
            functions: HashMap::new(),
            shared_limit,
            at_work: false,
        };
        made.module(0)?;
        Ok(made)
    }

    /// Makes this thread one of the device's.
    pub(super) fn enter(&self) -> Result<(), Fault> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context)? };
        Ok(())
    }

    /// Something was begun that nobody waits for now.
    pub(super) fn begun(&mut self) {
        if !std::mem::replace(&mut self.at_work, true) {
            AT_WORK.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for everything that was begun.
    pub(super) fn rest(&mut self) -> Result<(), Fault> {
        // SAFETY: the stream is this device's own.
        let rests = unsafe { result::stream::synchronize(self.stream) };
        // A device that failed works no more either.
        if std::mem::take(&mut self.at_work) {
            AT_WORK.fetch_sub(1, Ordering::Release);
        }
        Ok(rests?)
    }

    pub(super) fn free_bytes(&self) -> Result<(usize, usize), Fault> {
        self.enter()?;
        Ok(result::mem_get_info()?)
    }

    fn place(&self) -> CUmemLocation {
        CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.ordinal }
    }

    /// Unified memory of zeros that lies on the device.
    pub(super) fn unified(&mut self, bytes: usize) -> Result<CUdeviceptr, Fault> {
        self.room(bytes)?;
        let place = self.place();
        // SAFETY: the address is this call's own, of that length.
        unsafe {
            let at = result::malloc_managed(bytes, CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL)?;
            // Where the driver has no say in where memory lies, it is right all the same.
            let _ = result::mem_advise(at, bytes, CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, place);
            let _ = result::mem_prefetch_async(at, bytes, place, self.stream);
            result::memset_d8_async(at, 0, bytes, self.stream)?;
            self.rest()?;
            Ok(at)
        }
    }

    /// A copy of `bytes` bytes of the processor's memory on the device.
    pub(super) fn copy_of(&self, from: &[u8]) -> Result<CUdeviceptr, Fault> {
        self.room(from.len())?;
        // SAFETY: the address is this call's own, of that length.
        unsafe {
            let at = result::malloc_sync(from.len())?;
            result::memcpy_htod_sync(at, from)?;
            Ok(at)
        }
    }

    /// Refuses what would not fit: unified memory beyond the device's own would be moved back and forth for ever.
    fn room(&self, bytes: usize) -> Result<(), Fault> {
        let (free, _) = self.free_bytes()?;
        if bytes > free { Err(Fault::Memory { wanted: bytes, free }) } else { Ok(()) }
    }

    /// Takes memory back, once nothing is at work on it.
    pub(super) fn free(&mut self, at: CUdeviceptr) -> Result<(), Fault> {
        self.enter()?;
        self.rest()?;
        // SAFETY: whoever frees it has it from this device and uses it no more.
        unsafe { result::memory_free(at)? };
        Ok(())
    }

    /// The kernels for heads of `width`, or those over rows for 0.
    fn module(&mut self, width: usize) -> Result<CUmodule, Fault> {
        if let Some(module) = self.modules.get(&width) {
            return Ok(*module);
        }
        let mut options = vec![format!("--gpu-architecture={}", self.architecture)];
        let mut text = ROWS.to_owned();
        if width > 0 {
            options.push(format!("-DW={width}"));
            text += ATTENTION;
        }
        let options = nvrtc::CompileOptions { options, ..nvrtc::CompileOptions::default() };
        let refused = |message: String| Fault::Compile { architecture: self.architecture.clone(), message };
        let compiled = nvrtc::compile_ptx_with_opts(text, options).map_err(|error| refused(format!("{error:?}")))?;
        let image = compiled.as_bytes().ok_or_else(|| refused("nothing came of it".to_owned()))?;
        // SAFETY: the image is the compiler's, and ends with a zero.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>())? };
        self.modules.insert(width, module);
        Ok(module)
    }

    /// A kernel, ready for blocks of so many bytes of shared memory.
    pub(super) fn function(&mut self, name: &'static str, width: usize, shared: u32) -> Result<CUfunction, Fault> {
        if let Some(function) = self.functions.get(&(name, width)) {
            return Ok(*function);
        }
        let module = self.module(width)?;
        let symbol = CString::new(name).map_err(|error| Fault::Driver(error.to_string()))?;
        // SAFETY: the module is loaded and never unloaded.
        let function = unsafe { result::module::get_function(module, symbol)? };
        if shared as i32 > self.shared_limit {
            let message =
                format!("heads of {width} need {shared} bytes of shared memory; it has {}", self.shared_limit);
            return Err(Fault::Driver(message));
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is the module's.
        unsafe { result::function::set_function_attribute(function, attribute, shared as i32)? };
        self.functions.insert((name, width), function);
        Ok(function)
    }
}
