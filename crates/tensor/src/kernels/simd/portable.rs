//! The instruction set that every machine has: arrays of eight, left to the compiler. Also what the others are tested
//! against.
#![expect(unsafe_code, reason = "loads at pointers that the caller vouches for")]

use std::array;

use half::bf16;

use super::{Body, Simd};

/// No instructions of a particular processor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

/// Eight numbers.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Eight([f32; 8]);

/// Whether the compiler may use an instruction that multiplies and adds.
const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

#[inline(always)]
fn map(a: Eight, f: impl Fn(f32) -> f32) -> Eight {
    Eight(array::from_fn(|i| f(a.0[i])))
}

#[inline(always)]
fn zip(a: Eight, b: Eight, f: impl Fn(f32, f32) -> f32) -> Eight {
    Eight(array::from_fn(|i| f(a.0[i], b.0[i])))
}

/// `2^n` for `n` in -126..=127, and 0 for -127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

impl Simd for Portable {
    type F = Eight;
    type M = [bool; 8];
    const LANES: usize = 8;
    const REGISTERS: usize = if cfg!(target_arch = "x86_64") { 8 } else { 16 };

    #[inline(always)]
    fn call<B: Body>(self, body: B) -> B::Output {
        #[inline(never)]
        fn inner<B: Body>(body: B) -> B::Output {
            body.run(Portable)
        }
        inner(body)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Eight {
        Eight([x; 8])
    }
    #[inline(always)]
    unsafe fn load_at(self, at: *const f32) -> Eight {
        // SAFETY: the caller vouches for eight numbers; pairs of bf16 may lie anywhere.
        Eight(unsafe { at.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_part_at(self, at: *const f32, n: usize) -> Eight {
        // SAFETY: the caller vouches for `n` numbers.
        Eight(array::from_fn(|i| if i < n { unsafe { at.add(i).read() } } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn store_at(self, at: *mut f32, x: Eight) {
        // SAFETY: the caller vouches for eight numbers.
        unsafe { at.cast::<[f32; 8]>().write(x.0) }
    }
    #[inline(always)]
    unsafe fn store_part_at(self, at: *mut f32, n: usize, x: Eight) {
        for (i, x) in x.0.into_iter().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` numbers.
            unsafe { at.add(i).write(x) }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_at(self, at: *const bf16) -> Eight {
        // SAFETY: the caller vouches for eight numbers.
        let bits = unsafe { at.cast::<[u16; 8]>().read() };
        Eight(array::from_fn(|i| f32::from_bits(u32::from(bits[i]) << 16)))
    }
    #[inline(always)]
    unsafe fn load_bf16_part_at(self, at: *const bf16, n: usize) -> Eight {
        // SAFETY: the caller vouches for `n` numbers.
        Eight(array::from_fn(|i| if i < n { unsafe { at.add(i).read() }.to_f32() } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn store_bf16_at(self, at: *mut bf16, x: Eight) {
        // SAFETY: the caller vouches for eight numbers.
        unsafe { at.cast::<[bf16; 8]>().write(x.0.map(bf16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_part_at(self, at: *mut bf16, n: usize, x: Eight) {
        for (i, x) in x.0.into_iter().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` numbers.
            unsafe { at.add(i).write(bf16::from_f32(x)) }
        }
    }

    #[inline(always)]
    fn add(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Eight, b: Eight, c: Eight) -> Eight {
        Eight(array::from_fn(|i| if FUSED { a.0[i].mul_add(b.0[i], c.0[i]) } else { a.0[i] * b.0[i] + c.0[i] }))
    }
    #[inline(always)]
    fn fnma(self, a: Eight, b: Eight, c: Eight) -> Eight {
        Eight(array::from_fn(|i| if FUSED { (-a.0[i]).mul_add(b.0[i], c.0[i]) } else { c.0[i] - a.0[i] * b.0[i] }))
    }
    #[inline(always)]
    fn max(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Eight, b: Eight) -> Eight {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Eight) -> Eight {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    fn abs(self, a: Eight) -> Eight {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Eight) -> Eight {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    fn scale2(self, a: Eight, n: Eight) -> Eight {
        // In two steps, of which the first is exact: the exponent of one factor reaches to 127 only.
        zip(a, n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            a * power_of_two(half) * power_of_two(n - half)
        })
    }
    #[inline(always)]
    fn power2(self, n: Eight) -> Eight {
        map(n, |n| power_of_two(n as i32))
    }
    #[inline(always)]
    fn lt(self, a: Eight, b: Eight) -> [bool; 8] {
        array::from_fn(|i| a.0[i] < b.0[i])
    }
    #[inline(always)]
    fn le(self, a: Eight, b: Eight) -> [bool; 8] {
        array::from_fn(|i| a.0[i] <= b.0[i])
    }
    #[inline(always)]
    fn select(self, mask: [bool; 8], yes: Eight, no: Eight) -> Eight {
        Eight(array::from_fn(|i| if mask[i] { yes.0[i] } else { no.0[i] }))
    }
    #[inline(always)]
    fn reduce_add(self, a: Eight) -> f32 {
        let a: [f32; 4] = array::from_fn(|i| a.0[i] + a.0[i + 4]);
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Eight) -> f32 {
        a.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn transpose(self, row: impl Fn(usize) -> Eight, mut put: impl FnMut(usize, Eight)) {
        let rows: [Eight; 8] = array::from_fn(row);
        for j in 0..8 {
            put(j, Eight(array::from_fn(|i| rows[i].0[j])));
        }
    }

    #[inline(always)]
    fn pair(self, even: Eight, odd: Eight) -> Eight {
        zip(even, odd, |even, odd| f32::from_bits(even.to_bits() >> 16 | odd.to_bits()))
    }
    #[inline(always)]
    fn even(self, pairs: Eight) -> Eight {
        map(pairs, |x| f32::from_bits(x.to_bits() << 16))
    }
    #[inline(always)]
    fn odd(self, pairs: Eight) -> Eight {
        map(pairs, |x| f32::from_bits(x.to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}
}
