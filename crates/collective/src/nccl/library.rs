//! NVIDIA's library of exchanges, loaded when it is first asked for.
#![expect(unsafe_code, reason = "functions of a library are called by the types that its header gives them")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

/// What the loader knows it by: packages of systems and of Python bring the first, the second comes with headers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version whose communicators need not block and can be configured in the way below.
const OLDEST: c_int = 21_800;

/// `ncclSuccess`.
pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`.
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTES: c_int = 1;

/// `ncclComm_t`.
pub(super) type Communicator = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Id(pub(super) [u8; ID]);

/// Bytes of an [`Id`].
pub(super) const ID: usize = 128;

/// `ncclConfig_t` as version 2.17 has it: later ones read as much of it as its size says.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return before they are done; all else as the library sees fit.
    const fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

type Carry<P> = unsafe extern "C" fn(P, usize, c_int, c_int, Communicator, *mut c_void) -> c_int;

/// The functions that are used. Results are numbers: a later version has more of them than an enumeration could hold.
pub(super) struct Nccl {
    version: c_int,
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Communicator, c_int, Id, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Communicator, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Communicator) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: Carry<*const c_void>,
    recv: Carry<*mut c_void>,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Communicator) -> *const c_char,
    /// Its functions live as long as it is loaded.
    _library: Library,
}

/// The library, loaded once for the life of the process.
///
/// # Errors
/// It is not there, is too old, or lacks a function, in words.
pub(super) fn nccl() -> Result<&'static Nccl, String> {
    static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
    LOADED.get_or_init(Nccl::load).as_ref().map_err(Clone::clone)
}

impl Nccl {
    fn load() -> Result<Self, String> {
        // SAFETY: what the library does when it is loaded is its maker's: it reads its environment.
        let mut tries = NAMES.iter().map(|name| unsafe { Library::new(*name) });
        let library = tries.find_map(Result::ok).ok_or_else(|| {
            format!(
                "{} cannot be loaded; expected NCCL 2.18 or later where the loader looks (LD_LIBRARY_PATH)",
                NAMES[0]
            )
        })?;
        /// A function by its name, of the type that is asked for.
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the type is the one that the library's header gives the function.
                let found = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                *found.map_err(|_| format!("{} has no {}; expected NCCL 2.18 or later", NAMES[0], $name))?
            }};
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!("ncclGetVersion");
        let mut version = 0;
        // SAFETY: it writes the one number.
        let result = unsafe { get_version(&raw mut version) };
        if result != SUCCESS || version < OLDEST {
            return Err(format!("NCCL is of version {}; expected 2.18 or later", spelt(version)));
        }
        Ok(Self {
            version,
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank_config: function!("ncclCommInitRankConfig"),
            comm_get_async_error: function!("ncclCommGetAsyncError"),
            comm_abort: function!("ncclCommAbort"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            get_error_string: function!("ncclGetErrorString"),
            get_last_error: function!("ncclGetLastError"),
            _library: library,
        })
    }

    /// Its version, as it counts.
    pub(super) const fn version(&self) -> c_int {
        self.version
    }

    /// What the processes of a new group know one another by. The process that asks must stay until all have met.
    pub(super) fn unique_id(&self) -> Result<Id, String> {
        let mut id = Id([0; ID]);
        // SAFETY: it fills the one value.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&raw mut id) }, None)?;
        Ok(id)
    }

    /// Begins to make the end of process `rank` of `size`, on the device that is this thread's current one.
    pub(super) fn begin(&self, id: Id, rank: u32, size: u32) -> Result<Communicator, String> {
        let (mut made, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: it fills the one value and reads the configuration within the call.
        let begin =
            unsafe { (self.comm_init_rank_config)(&raw mut made, size as c_int, id, rank as c_int, &raw mut config) };
        self.check("ncclCommInitRankConfig", begin, None)?;
        Ok(made)
    }

    /// Whether all that was begun with a communicator is on its way.
    ///
    /// # Errors
    /// What has failed since, in the library's words.
    pub(super) fn is_settled(&self, communicator: Communicator) -> Result<bool, String> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is one that `begin` has made and nobody has ended.
        let asked = unsafe { (self.comm_get_async_error)(communicator, &raw mut state) };
        self.check("ncclCommGetAsyncError", asked, Some(communicator))?;
        self.check("NCCL", state, Some(communicator))?;
        Ok(state != IN_PROGRESS)
    }

    /// Ends a communicator, whatever it was at.
    ///
    /// # Safety
    /// It is not used again.
    pub(super) unsafe fn abort(&self, communicator: Communicator) {
        // SAFETY: as above. What it says changes nothing.
        let _ = unsafe { (self.comm_abort)(communicator) };
    }

    /// Begins to send and to receive on a stream of the device: number of the other process, address, bytes.
    ///
    /// # Safety
    /// The addresses are the device's, of those lengths, and stay until the stream has done it.
    pub(super) unsafe fn swap(
        &self,
        communicator: Communicator,
        stream: *mut c_void,
        out: impl Iterator<Item = (u32, u64, usize)>,
        into: impl Iterator<Item = (u32, u64, usize)>,
    ) -> Result<(), String> {
        let check = |what, result| self.check(what, result, Some(communicator));
        // SAFETY: as above; every group that is begun is ended.
        unsafe {
            check("ncclGroupStart", (self.group_start)())?;
            let begin = || {
                for (rank, at, bytes) in out {
                    let at = at as *const c_void;
                    check("ncclSend", (self.send)(at, bytes, BYTES, rank as c_int, communicator, stream))?;
                }
                for (rank, at, bytes) in into {
                    let at = at as *mut c_void;
                    check("ncclRecv", (self.recv)(at, bytes, BYTES, rank as c_int, communicator, stream))?;
                }
                Ok(())
            };
            let begun: Result<(), String> = begin();
            let ended = check("ncclGroupEnd", (self.group_end)());
            begun.and(ended)
        }
    }

    fn check(&self, what: &str, result: c_int, of: Option<Communicator>) -> Result<(), String> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both give a text that ends with a zero and stays, or nothing.
        let text =
            |at: *const c_char| (!at.is_null()).then(|| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned());
        // SAFETY: the communicator, if there is one, was made by `begin`.
        let (plain, last) = unsafe {
            let last = (self.get_last_error)(of.unwrap_or(std::ptr::null_mut()));
            (text((self.get_error_string)(result)), text(last).filter(|last| !last.is_empty()))
        };
        let plain = plain.unwrap_or_else(|| format!("error {result}"));
        Err(match last {
            Some(last) => format!("{what} says {plain}: {}", last.trim()),
            None => format!("{what} says {plain}"),
        })
    }
}

/// A version as people write it.
pub(super) fn spelt(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}
