//! AVX2 with FMA: eight lanes.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;

use half::bf16;

use super::{Body, Simd};

/// The proof that the processor has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, where it holds.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// A window of eight that begins `8 - n` numbers in has its first `n` set.
static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// # Safety
/// The processor has AVX2; `n <= 8`.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: eight numbers from there are within the table.
    unsafe { _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast()) }
}

/// Widens eight numbers.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn widen(bits: __m128i) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
}

/// Rounds eight numbers to nearest even; NaN stays NaN.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn narrow(x: __m256) -> __m128i {
    // SAFETY: the caller's.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
        let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(upper, upper));
        _mm256_castsi256_si128(packed)
    }
}

/// Transposes four rows within each half: the columns j and j + 4 share a vector.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn columns_of_four([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    // SAFETY: the caller's.
    unsafe {
        let (al, ah) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (cl, ch) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(al, cl),
            _mm256_shuffle_ps::<0b11_10_11_10>(al, cl),
            _mm256_shuffle_ps::<0b01_00_01_00>(ah, ch),
            _mm256_shuffle_ps::<0b11_10_11_10>(ah, ch),
        ]
    }
}

/// `2^n` for `n` in -126..=127.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn power_of_two(n: __m256i) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}

// SAFETY of every block below: `self` proves that the processor has the instructions; what is loaded and stored is what the
// contract of the function has the caller vouch for.
impl Simd for Avx2 {
    type F = __m256;
    type M = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn call<B: Body>(self, body: B) -> B::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma")]
        fn inner<B: Body>(s: Avx2, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { inner(self, body) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_at(self, at: *const f32) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_part_at(self, at: *const f32, n: usize) -> __m256 {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { _mm256_maskload_ps(at, first(n)) }
    }
    #[inline(always)]
    unsafe fn store_at(self, at: *mut f32, x: __m256) {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_storeu_ps(at, x) }
    }
    #[inline(always)]
    unsafe fn store_part_at(self, at: *mut f32, n: usize, x: __m256) {
        // SAFETY: see the head of the impl; lanes beyond `n` are not touched.
        unsafe { _mm256_maskstore_ps(at, first(n), x) }
    }
    #[inline(always)]
    unsafe fn load_bf16_at(self, at: *const bf16) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { widen(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part_at(self, at: *const bf16, n: usize) -> __m256 {
        let mut bits = [bf16::ZERO; 8];
        // SAFETY: see the head of the impl; `n <= 8`.
        unsafe {
            std::ptr::copy_nonoverlapping(at, bits.as_mut_ptr(), n);
            widen(_mm_loadu_si128(bits.as_ptr().cast()))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_at(self, at: *mut bf16, x: __m256) {
        // SAFETY: see the head of the impl.
        unsafe { _mm_storeu_si128(at.cast(), narrow(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_part_at(self, at: *mut bf16, n: usize, x: __m256) {
        let mut bits = [bf16::ZERO; 8];
        // SAFETY: see the head of the impl; `n <= 8`.
        unsafe {
            _mm_storeu_si128(bits.as_mut_ptr().cast(), narrow(x));
            std::ptr::copy_nonoverlapping(bits.as_ptr(), at, n);
        }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn fnma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: see the head of the impl. In two steps, of which the first is exact: the exponent of one factor reaches
        // to 127 only.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(n, half)))
        }
    }
    #[inline(always)]
    fn power2(self, n: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn lt(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn le(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_cmp_ps::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_blendv_ps(no, yes, mask) }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        // SAFETY: see the head of the impl.
        unsafe {
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        // SAFETY: see the head of the impl.
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn transpose(self, row: impl Fn(usize) -> __m256, mut put: impl FnMut(usize, __m256)) {
        // SAFETY: see the head of the impl.
        unsafe {
            let upper = columns_of_four([row(0), row(1), row(2), row(3)]);
            let lower = columns_of_four([row(4), row(5), row(6), row(7)]);
            for (j, (upper, lower)) in upper.into_iter().zip(lower).enumerate() {
                put(j, _mm256_permute2f128_ps::<0x20>(upper, lower));
                put(j + 4, _mm256_permute2f128_ps::<0x31>(upper, lower));
            }
        }
    }

    #[inline(always)]
    fn pair(self, even: __m256, odd: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_or_ps(_mm256_castsi256_ps(_mm256_srli_epi32::<16>(_mm256_castps_si256(even))), odd) }
    }
    #[inline(always)]
    fn even(self, pairs: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(pairs))) }
    }
    #[inline(always)]
    fn odd(self, pairs: __m256) -> __m256 {
        // SAFETY: see the head of the impl.
        unsafe { _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32))) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
