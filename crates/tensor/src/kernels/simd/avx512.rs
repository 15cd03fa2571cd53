//! AVX-512 (F, BW, DQ, VL): sixteen lanes; with `PAIRS` also the dot product of pairs of bf16.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;

use half::bf16;

use super::{Body, Simd};

/// The proof that the processor has AVX-512, and with `PAIRS` its BF16 instructions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const PAIRS: bool>(());

impl<const PAIRS: bool> Avx512<PAIRS> {
    /// The proof, where it holds.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && (!PAIRS || is_x86_feature_detected!("avx512bf16"));
        found.then_some(Self(()))
    }
}

impl Avx512<true> {
    /// The same without the dot products: what has no use for them need not be compiled twice.
    pub(crate) const fn without_pairs(self) -> Avx512<false> {
        Avx512(())
    }
}

/// The first `n <= 16` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

/// Widens sixteen numbers.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
unsafe fn widen(bits: __m256i) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) }
}

/// Rounds sixteen numbers to nearest even; NaN stays NaN. The instruction for it takes numbers below the normal range for
/// zero, which this does not.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
unsafe fn narrow(x: __m512) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000));
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen))
    }
}

/// The upper half.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
unsafe fn upper(x: __m512) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x))) }
}

/// Transposes four rows within each quarter: the columns j, j + 4, j + 8 and j + 12 share a vector.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
unsafe fn columns_of_four([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: the caller's.
    unsafe {
        let (al, ah) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (cl, ch) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        [
            _mm512_shuffle_ps::<0b01_00_01_00>(al, cl),
            _mm512_shuffle_ps::<0b11_10_11_10>(al, cl),
            _mm512_shuffle_ps::<0b01_00_01_00>(ah, ch),
            _mm512_shuffle_ps::<0b11_10_11_10>(ah, ch),
        ]
    }
}

// SAFETY of every block below: `self` proves that the processor has the instructions; what is loaded and stored is what the
// contract of the function has the caller vouch for.
impl<const PAIRS: bool> Simd for Avx512<PAIRS> {
    type F = __m512;
    type M = __mmask16;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const NATIVE_PAIRS: bool = PAIRS;

    #[inline(always)]
    fn call<B: Body>(self, body: B) -> B::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn plain<const PAIRS: bool, B: Body>(s: Avx512<PAIRS>, body: B) -> B::Output {
            body.run(s)
        }
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        fn pairs<const PAIRS: bool, B: Body>(s: Avx512<PAIRS>, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { if PAIRS { pairs(self, body) } else { plain(self, body) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_at(self, at: *const f32) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_part_at(self, at: *const f32, n: usize) -> __m512 {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { _mm512_maskz_loadu_ps(first(n), at) }
    }
    #[inline(always)]
    unsafe fn store_at(self, at: *mut f32, x: __m512) {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_storeu_ps(at, x) }
    }
    #[inline(always)]
    unsafe fn store_part_at(self, at: *mut f32, n: usize, x: __m512) {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { _mm512_mask_storeu_ps(at, first(n), x) }
    }
    #[inline(always)]
    unsafe fn load_bf16_at(self, at: *const bf16) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { widen(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part_at(self, at: *const bf16, n: usize) -> __m512 {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { widen(_mm256_maskz_loadu_epi16(first(n), at.cast())) }
    }
    #[inline(always)]
    unsafe fn store_bf16_at(self, at: *mut bf16, x: __m512) {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_storeu_si256(at.cast(), narrow(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_part_at(self, at: *mut bf16, n: usize, x: __m512) {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { _mm256_mask_storeu_epi16(at.cast(), first(n), narrow(x)) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn fnma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn power2(self, n: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn le(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_mask_blend_ps(mask, no, yes) }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        // SAFETY: see the head of the impl.
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn transpose(self, row: impl Fn(usize) -> __m512, mut put: impl FnMut(usize, __m512)) {
        // SAFETY: see the head of the impl.
        unsafe {
            let first = columns_of_four([row(0), row(1), row(2), row(3)]);
            let second = columns_of_four([row(4), row(5), row(6), row(7)]);
            let third = columns_of_four([row(8), row(9), row(10), row(11)]);
            let fourth = columns_of_four([row(12), row(13), row(14), row(15)]);
            // Quarters are gathered in two rounds.
            for j in 0..4 {
                let [a, b, c, d] = [first[j], second[j], third[j], fourth[j]];
                let (ab_even, ab_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (cd_even, cd_odd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                put(j, _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even));
                put(j + 4, _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
                put(j + 8, _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even));
                put(j + 12, _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
            }
        }
    }

    #[inline(always)]
    fn pair(self, even: __m512, odd: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe {
            let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_castps_si512(odd)))
        }
    }
    #[inline(always)]
    fn even(self, pairs: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(pairs))) }
    }
    #[inline(always)]
    fn odd(self, pairs: __m512) -> __m512 {
        // SAFETY: see the head of the impl.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), mask))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        if PAIRS {
            // SAFETY: see the head of the impl; a vector of pairs and one of f32 have the same size and no invalid bits.
            unsafe {
                let (a, b) = (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
                _mm512_dpbf16_ps(c, a, b)
            }
        } else {
            let c = self.fma(self.even(a), self.even(b), c);
            self.fma(self.odd(a), self.odd(b), c)
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
