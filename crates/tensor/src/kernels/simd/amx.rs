//! AMX: eight tiles of sixteen rows of 64 bytes, and the instruction that multiplies two of them as pairs of bf16 into a third
//! of f32. The intrinsics are not stable, so instructions are written out.
#![expect(unsafe_code, reason = "tiles are loaded and stored at pointers, in assembly")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile, and numbers of f32 or pairs of bf16 in one of its rows.
pub(crate) const SIDE: usize = 16;

/// The proof that the processor has tiles of bf16 and that the kernel lets this process use them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    /// The proof, where it holds. Asks the kernel once: it makes room for tiles in the state of threads only for who asks.
    pub(crate) fn detect() -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        let granted = *GRANTED.get_or_init(|| {
            let leaves = __cpuid_count(0, 0).eax;
            let has = if leaves < 7 { 0 } else { __cpuid_count(7, 0).edx };
            // AMX-TILE and AMX-BF16.
            has >> 24 & 1 == 1 && has >> 22 & 1 == 1 && ask()
        });
        granted.then_some(Self(()))
    }

    /// Sets this thread's tiles up, all of full size, until the value is dropped.
    pub(crate) fn configure(self) -> Tiles {
        static ALL: Configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: `self` proves that the instruction may run; the configuration is a valid one of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const ALL, options(nostack, readonly)) }
        Tiles(PhantomData)
    }
}

/// Asks the kernel for the use of tiles.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: the call reads and writes no memory of this process; a kernel that does not know it says so.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles, set up. It does not leave the thread.
#[derive(Debug)]
pub(crate) struct Tiles(PhantomData<*const ()>);

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles were set up, so the instruction may run; without them the thread's state is smaller to switch.
        unsafe { asm!("tilerelease", options(nomem, nostack)) }
    }
}

/// Rows of pairs and columns of pairs that are multiplied, and where the result is.
#[derive(Clone, Copy)]
pub(crate) struct Stretch {
    /// Rows of pairs.
    pub(crate) a: *const f32,
    /// Bytes from row to row.
    pub(crate) apart: usize,
    /// For each pair along the contraction those of two tiles' columns.
    pub(crate) b: *const f32,
    /// Tiles along the contraction, of [`SIDE`] pairs each.
    pub(crate) tiles: usize,
    /// The result's first number.
    pub(crate) c: *mut f32,
    /// Numbers from row to row of the result.
    pub(crate) c_stride: usize,
    /// Whether the result is added to what is there.
    pub(crate) add: bool,
}

impl Tiles {
    /// Asks for the cache line of `at`, which need not exist, to be written.
    #[inline(always)]
    pub(crate) fn prefetch_to_write(&self, at: *const f32) {
        // SAFETY: a hint that every processor with tiles has; it never faults.
        unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, readonly, preserves_flags)) }
    }

    /// `ROWS` times sixteen rows, one or two, times two tiles of columns. Each number is the sum of its tiles along the
    /// contraction, first to last, whatever rows and columns are beside it. Within a tile products at even and at odd places
    /// are summed apart, and numbers below the normal range are zero.
    ///
    /// # Safety
    /// Rows, columns and the place of the result exist, and no one else uses the latter.
    #[inline(always)]
    pub(crate) unsafe fn multiply<const ROWS: usize>(&self, of: Stretch) {
        const { assert!(ROWS == 1 || ROWS == 2) };
        let Stretch { a, apart, b, tiles, c, c_stride, add } = of;
        let (a_lower, c_apart) = (a.wrapping_byte_add(SIDE * apart), 4 * c_stride);
        let c_lower = c.wrapping_byte_add(SIDE * c_apart);
        // SAFETY: the caller's, and `self` is the proof that tiles are set up.
        unsafe {
            if ROWS == 2 {
                asm!(
                    "test {add}, {add}",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {c_apart}]",
                    "tileloadd tmm1, [{c} + {c_apart} + 64]",
                    "tileloadd tmm2, [{c_lower} + {c_apart}]",
                    "tileloadd tmm3, [{c_lower} + {c_apart} + 64]",
                    "3:",
                    "test {tiles}, {tiles}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm4, [{a} + {apart}]",
                    "tileloadd tmm6, [{b} + {b_apart}]",
                    "tileloadd tmm7, [{b} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a_lower} + {apart}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 64",
                    "add {a_lower}, 64",
                    "add {b}, 2048",
                    "dec {tiles}",
                    "jnz 4b",
                    "5:",
                    "tilestored [{c} + {c_apart}], tmm0",
                    "tilestored [{c} + {c_apart} + 64], tmm1",
                    "tilestored [{c_lower} + {c_apart}], tmm2",
                    "tilestored [{c_lower} + {c_apart} + 64], tmm3",
                    add = in(reg) u64::from(add),
                    a = inout(reg) a => _,
                    a_lower = inout(reg) a_lower => _,
                    apart = in(reg) apart,
                    b = inout(reg) b => _,
                    b_apart = in(reg) 2 * SIDE * 4,
                    tiles = inout(reg) tiles => _,
                    c = in(reg) c,
                    c_lower = in(reg) c_lower,
                    c_apart = in(reg) c_apart,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            } else {
                asm!(
                    "test {add}, {add}",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {c_apart}]",
                    "tileloadd tmm1, [{c} + {c_apart} + 64]",
                    "3:",
                    "test {tiles}, {tiles}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm4, [{a} + {apart}]",
                    "tileloadd tmm6, [{b} + {b_apart}]",
                    "tileloadd tmm7, [{b} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 64",
                    "add {b}, 2048",
                    "dec {tiles}",
                    "jnz 4b",
                    "5:",
                    "tilestored [{c} + {c_apart}], tmm0",
                    "tilestored [{c} + {c_apart} + 64], tmm1",
                    add = in(reg) u64::from(add),
                    a = inout(reg) a => _,
                    apart = in(reg) apart,
                    b = inout(reg) b => _,
                    b_apart = in(reg) 2 * SIDE * 4,
                    tiles = inout(reg) tiles => _,
                    c = in(reg) c,
                    c_apart = in(reg) c_apart,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }

    /// As [`Tiles::multiply`] of numbers in two parts each: first by second ones, first by first, second by first are summed for
    /// each tile along the contraction, in this order. Of rows and of columns the second parts lie behind all the first ones.
    ///
    /// # Safety
    /// As for it.
    #[inline(always)]
    pub(crate) unsafe fn multiply_parts<const ROWS: usize>(&self, of: Stretch) {
        const { assert!(ROWS == 1 || ROWS == 2) };
        let Stretch { a, apart, b, tiles, c, c_stride, add } = of;
        let (a_second, b_second) = (a.wrapping_add(tiles * SIDE), b.wrapping_add(2 * SIDE * tiles * SIDE));
        let c_apart = 4 * c_stride;
        // SAFETY: the caller's, and `self` is the proof that tiles are set up.
        unsafe {
            if ROWS == 2 {
                asm!(
                    "test {lower}, {lower}",
                    // Nothing below needs to know it any more: the rows of the second tile.
                    "mov {lower}, {c_apart}",
                    "lea {lower}, [{lower} * 8]",
                    "lea {lower}, [{c} + {lower} * 2]",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {c_apart}]",
                    "tileloadd tmm1, [{c} + {c_apart} + 64]",
                    "tileloadd tmm2, [{lower} + {c_apart}]",
                    "tileloadd tmm3, [{lower} + {c_apart} + 64]",
                    "3:",
                    "test {tiles}, {tiles}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm4, [{a} + {apart}]",
                    "tileloadd tmm6, [{b_second} + {b_apart}]",
                    "tileloadd tmm7, [{b_second} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a_lower} + {apart}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm6, [{b} + {b_apart}]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm7, [{b} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{a_second} + {apart}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm5, [{a_second_lower} + {apart}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 64",
                    "add {a_lower}, 64",
                    "add {a_second}, 64",
                    "add {a_second_lower}, 64",
                    "add {b}, 2048",
                    "add {b_second}, 2048",
                    "dec {tiles}",
                    "jnz 4b",
                    "5:",
                    "tilestored [{c} + {c_apart}], tmm0",
                    "tilestored [{c} + {c_apart} + 64], tmm1",
                    "tilestored [{lower} + {c_apart}], tmm2",
                    "tilestored [{lower} + {c_apart} + 64], tmm3",
                    lower = inout(reg) u64::from(add) => _,
                    a = inout(reg) a => _,
                    a_lower = inout(reg) a.wrapping_byte_add(SIDE * apart) => _,
                    a_second = inout(reg) a_second => _,
                    a_second_lower = inout(reg) a_second.wrapping_byte_add(SIDE * apart) => _,
                    apart = in(reg) apart,
                    b = inout(reg) b => _,
                    b_second = inout(reg) b_second => _,
                    b_apart = in(reg) 2 * SIDE * 4,
                    tiles = inout(reg) tiles => _,
                    c = in(reg) c,
                    c_apart = in(reg) c_apart,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            } else {
                asm!(
                    "test {add}, {add}",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {c_apart}]",
                    "tileloadd tmm1, [{c} + {c_apart} + 64]",
                    "3:",
                    "test {tiles}, {tiles}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm4, [{a} + {apart}]",
                    "tileloadd tmm6, [{b_second} + {b_apart}]",
                    "tileloadd tmm7, [{b_second} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{b} + {b_apart}]",
                    "tileloadd tmm7, [{b} + {b_apart} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{a_second} + {apart}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 64",
                    "add {a_second}, 64",
                    "add {b}, 2048",
                    "add {b_second}, 2048",
                    "dec {tiles}",
                    "jnz 4b",
                    "5:",
                    "tilestored [{c} + {c_apart}], tmm0",
                    "tilestored [{c} + {c_apart} + 64], tmm1",
                    add = in(reg) u64::from(add),
                    a = inout(reg) a => _,
                    a_second = inout(reg) a_second => _,
                    apart = in(reg) apart,
                    b = inout(reg) b => _,
                    b_second = inout(reg) b_second => _,
                    b_apart = in(reg) 2 * SIDE * 4,
                    tiles = inout(reg) tiles => _,
                    c = in(reg) c,
                    c_apart = in(reg) c_apart,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }
}
