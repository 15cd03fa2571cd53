//! The kernels of a processor: which instruction set runs, and where each operation lives.

use std::sync::OnceLock;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512, amx::Amx};
use super::simd::{Body, Portable};
use super::{Activation, Attention, Gemm, Kernels, Matmul};
use crate::view::{MatMut, MatRef, View, ViewMut};

mod activation;
mod attention;
#[cfg(test)]
mod checks;
mod copy;
mod cross_entropy;
mod exponent;
mod gemm;
mod map;
mod norm;
mod rope;
mod rows;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// What every processor has.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with dot products of bf16.
    Avx512Bf16,
    /// The same with AMX's tiles of bf16.
    Amx,
}

impl Isa {
    /// All of them, the slowest first.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Its name, as users and kernel profiles write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }
}

/// The proof that the machine has an instruction set.
#[derive(Debug, Clone, Copy)]
enum Proof {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512<true>),
    #[cfg(target_arch = "x86_64")]
    Amx(Avx512<true>, Amx),
}

/// The processor, with one instruction set chosen. Work is spread over the global pool of rayon.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    isa: Isa,
    proof: Proof,
    matmul: Matmul,
    /// Whether products are made; they are zeros otherwise.
    multiplies: bool,
}

impl Cpu {
    /// With the best instruction set that the machine has.
    pub fn detect() -> Self {
        let best = Isa::ALL.into_iter().rev().find_map(Self::with);
        best.unwrap_or(Self::of(Isa::Portable, Proof::Portable(Portable)))
    }

    /// With this instruction set, if the machine has it.
    pub fn with(isa: Isa) -> Option<Self> {
        let proof = match isa {
            Isa::Portable => Some(Proof::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map(Proof::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().map(Proof::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::detect().map(Proof::Avx512Bf16),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Avx512::detect().zip(Amx::detect()).map(|(vectors, tiles)| Proof::Amx(vectors, tiles)),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => None,
        };
        proof.map(|proof| Self::of(isa, proof))
    }

    const fn of(isa: Isa, proof: Proof) -> Self {
        Self { isa, proof, matmul: Matmul::Highest, multiplies: true }
    }

    /// The same that multiplies matrices of f32 in this way.
    pub fn multiplying(self, matmul: Matmul) -> Self {
        let faster = self.isa == Isa::Amx;
        Self { matmul: if faster { matmul } else { Matmul::Highest }, ..self }
    }

    /// The instruction set.
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// As [`Cpu::call`] for a body that has no use for dot products of bf16.
    fn call_f32<B: Body>(&self, body: B) -> B::Output {
        use super::simd::Simd;
        match self.proof {
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512Bf16(s) | Proof::Amx(s, _) => s.without_pairs().call(body),
            Proof::Portable(s) => s.call(body),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx2(s) => s.call(body),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512(s) => s.call(body),
        }
    }

    /// Runs a body compiled for the instruction set; called within each task of the pool, never around it.
    pub(in crate::kernels) fn call<B: Body>(&self, body: B) -> B::Output {
        use super::simd::Simd;
        match self.proof {
            Proof::Portable(s) => s.call(body),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx2(s) => s.call(body),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512(s) => s.call(body),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512Bf16(s) | Proof::Amx(s, _) => s.call(body),
        }
    }
}

/// The processor as this process uses it: the best instruction set, or the one that `ATTUNE_ISA` names.
///
/// # Panics
/// If `ATTUNE_ISA` names one that does not exist or that the machine lacks.
pub fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(|| {
        let Some(wanted) = std::env::var_os("ATTUNE_ISA").filter(|wanted| !wanted.is_empty()) else {
            return Cpu::detect();
        };
        let found = Isa::ALL.into_iter().filter(|isa| Some(isa.name()) == wanted.to_str()).find_map(Cpu::with);
        found.unwrap_or_else(|| {
            let has: Vec<_> = Isa::ALL.into_iter().filter(|&isa| Cpu::with(isa).is_some()).map(Isa::name).collect();
            panic!("ATTUNE_ISA is {}; this machine has {}", wanted.to_string_lossy(), has.join(", "))
        })
    })
}

/// The processor as this process uses it, with products of f32 in this way.
pub fn cpu_multiplying(matmul: Matmul) -> &'static Cpu {
    static HIGH: OnceLock<Cpu> = OnceLock::new();
    match matmul {
        Matmul::Highest => cpu(),
        Matmul::High => HIGH.get_or_init(|| cpu().multiplying(matmul)),
    }
}

impl Kernels for Cpu {
    fn profile(&self) -> &'static str {
        match self.isa {
            Isa::Amx if self.matmul == Matmul::High => "cpu/amx-high",
            Isa::Portable => "cpu/portable",
            Isa::Avx2 => "cpu/avx2",
            Isa::Avx512 => "cpu/avx512",
            Isa::Avx512Bf16 => "cpu/avx512-bf16",
            Isa::Amx => "cpu/amx",
        }
    }

    fn without_products(&self) -> Option<&'static dyn Kernels> {
        static LIKE: [OnceLock<Cpu>; 2] = [OnceLock::new(), OnceLock::new()];
        // As this process uses it, once for each way to multiply.
        let is_used = self.isa == cpu().isa;
        let like = || LIKE[self.matmul as usize].get_or_init(|| Self { multiplies: false, ..*self });
        is_used.then(|| like() as &dyn Kernels)
    }

    fn gemm(&self, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>) {
        match (self.multiplies, of.accumulate) {
            (true, _) => gemm::gemm(self, c_mn, of),
            // Memory is taken when it is written to.
            (false, true) => self.scale(c_mn, 1.0),
            (false, false) => self.fill(c_mn, 0.0),
        }
    }

    fn gemms(&self, mut products: Vec<(ViewMut<'_, f32>, Gemm<'_>)>) {
        if self.multiplies {
            gemm::gemms(self, &mut products);
        } else {
            products.into_iter().for_each(|(c_mn, of)| self.gemm(c_mn, &of));
        }
    }

    fn convert(&self, x: MatRef<'_>, y: MatMut<'_>) {
        copy::convert(self, x, y);
    }

    fn add(&self, x: MatRef<'_>, y: ViewMut<'_, f32>) {
        copy::add(self, x, y);
    }

    fn multiply(&self, x: MatRef<'_>, y: ViewMut<'_, f32>) {
        copy::multiply(x, y);
    }

    fn scale(&self, y: ViewMut<'_, f32>, factor: f32) {
        copy::each_row(y, |y| y.iter_mut().for_each(|y| *y *= factor));
    }

    fn fill(&self, y: ViewMut<'_, f32>, value: f32) {
        copy::each_row(y, |y| y.fill(value));
    }

    fn gather(&self, x: MatRef<'_>, rows: &[u32], y: MatMut<'_>, accumulate: bool) {
        copy::gather(self, x, rows, y, accumulate);
    }

    fn scatter(&self, x: View<'_, f32>, rows: &[u32], y: ViewMut<'_, f32>) {
        copy::scatter(x, rows, y);
    }

    fn sum_rows(&self, x_td: View<'_, f32>, y_d: &mut [f32], accumulate: bool) {
        copy::sum_rows(self, x_td, y_d, accumulate);
    }

    fn rms_norm(&self, x_td: View<'_, f32>, w_d: &[f32], eps: f32, y_td: MatMut<'_>) {
        norm::rms_norm(self, x_td, w_d, eps, y_td);
    }

    fn rms_norm_vjp(
        &self,
        x_td: View<'_, f32>,
        w_d: &[f32],
        eps: f32,
        dy_td: View<'_, f32>,
        dx_td: ViewMut<'_, f32>,
        dw_d: Option<&mut [f32]>,
    ) {
        norm::rms_norm_vjp(self, x_td, w_d, eps, dy_td, dx_td, dw_d);
    }

    fn layer_norm(&self, x_td: View<'_, f32>, w_d: &[f32], b_d: &[f32], eps: f32, y_td: MatMut<'_>) {
        norm::layer_norm(self, x_td, w_d, b_d, eps, y_td);
    }

    fn layer_norm_vjp(
        &self,
        x_td: View<'_, f32>,
        w_d: &[f32],
        eps: f32,
        dy_td: View<'_, f32>,
        dx_td: ViewMut<'_, f32>,
        dwb: Option<(&mut [f32], &mut [f32])>,
    ) {
        norm::layer_norm_vjp(self, x_td, w_d, eps, dy_td, dx_td, dwb);
    }

    fn rope(&self, x: ViewMut<'_, f32>, head_dim: usize, cos: View<'_, f32>, sin: View<'_, f32>, inverse: bool) {
        rope::rope(self, x, head_dim, cos, sin, inverse);
    }

    fn attention(
        &self,
        how: &Attention<'_>,
        q: MatRef<'_>,
        k: MatRef<'_>,
        v: MatRef<'_>,
        o: MatMut<'_>,
        lse_th: ViewMut<'_, f32>,
    ) {
        attention::attention(self, how, q, k, v, o, lse_th);
    }

    fn attention_vjp(
        &self,
        how: &Attention<'_>,
        q: MatRef<'_>,
        k: MatRef<'_>,
        v: MatRef<'_>,
        o: MatRef<'_>,
        lse_th: &[f32],
        d_o: View<'_, f32>,
        dlse_th: Option<&[f32]>,
        dq: ViewMut<'_, f32>,
        dk: ViewMut<'_, f32>,
        dv: ViewMut<'_, f32>,
    ) {
        attention::attention_vjp(self, how, q, k, v, o, lse_th, d_o, dlse_th, dq, dk, dv);
    }

    fn gated(&self, act: Activation, gate: MatRef<'_>, up: MatRef<'_>, y: MatMut<'_>) {
        activation::gated(self, act, gate, up, y);
    }

    fn gated_vjp(
        &self,
        act: Activation,
        gate: MatRef<'_>,
        up: MatRef<'_>,
        dy: View<'_, f32>,
        dgate: MatMut<'_>,
        dup: MatMut<'_>,
    ) {
        activation::gated_vjp(self, act, gate, up, dy, dgate, dup);
    }

    fn activate(&self, act: Activation, x: MatRef<'_>, y: MatMut<'_>) {
        activation::activate(self, act, x, y);
    }

    fn activate_vjp(&self, act: Activation, x: MatRef<'_>, dy: View<'_, f32>, dx: MatMut<'_>) {
        activation::activate_vjp(self, act, x, dy, dx);
    }

    fn cross_entropy(
        &self,
        logits_cv: ViewMut<'_, f32>,
        labels_c: &[u32],
        weight_c: Option<&[f32]>,
        rounded: Option<ViewMut<'_, bf16>>,
        nll_c: &mut [f32],
    ) {
        cross_entropy::cross_entropy(self, logits_cv, labels_c, weight_c, rounded, nll_c);
    }
}
