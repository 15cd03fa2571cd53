//! The operations that a training step spends its time in, behind one trait per device.
//!
//! The one invariant: no result depends on the number of threads, nor any row's result on which rows are beside it. Sums
//! over rows run in chunks of fixed size from the first row of what they are given.
//!
//! Axes: T rows, D width, H heads, K key/value heads, W width of a head, O output, I input, R rank, V vocabulary.

use std::fmt;
use std::ops::Range;

use crate::quantized::QuantizedRef;
use crate::store::Memory;
use crate::view::{MatMut, MatRef, View, ViewMut};

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod simd;

pub use cpu::{Cpu, Isa, cpu, cpu_multiplying};
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, Fault as CudaFault, Found as CudaDevice, cuda, devices as cuda_devices};

/// A factor of a product: a matrix, or its transpose.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// The matrix as it is stored.
    pub mat: MatRef<'a>,
    /// Whether its transpose is meant.
    pub transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix as it is.
    pub fn plain(mat: impl Into<MatRef<'a>>) -> Self {
        Self { mat: mat.into(), transposed: false }
    }

    /// The transpose of the matrix.
    pub fn transposed(mat: impl Into<MatRef<'a>>) -> Self {
        Self { mat: mat.into(), transposed: true }
    }

    /// Rows and columns of the factor.
    pub const fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.mat.cols(), self.mat.rows()) } else { (self.mat.rows(), self.mat.cols()) }
    }
}

/// The right factor of a product: a matrix or its transpose, as it lies or in few bits.
#[derive(Debug, Clone, Copy)]
pub enum Right<'a> {
    /// Numbers as they lie.
    Dense(Operand<'a>),
    /// Numbers in few bits, which are widened while they are laid out. They count as numbers of their type: the product has the
    /// bits of one with the widened matrix.
    Quantized {
        /// The matrix.
        mat: QuantizedRef<'a>,
        /// Whether its transpose is meant.
        transposed: bool,
    },
}

impl Right<'_> {
    /// Rows and columns of the factor.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(operand) => operand.shape(),
            Self::Quantized { mat, transposed: true } => (mat.cols(), mat.rows()),
            Self::Quantized { mat, transposed: false } => (mat.rows(), mat.cols()),
        }
    }

    /// Whether its numbers are of bf16.
    pub const fn is_narrow(&self) -> bool {
        match self {
            Self::Dense(operand) => matches!(operand.mat, MatRef::Bf16(_)),
            Self::Quantized { mat, .. } => mat.is_narrow(),
        }
    }

    /// Its transpose.
    #[must_use]
    pub const fn turned(self) -> Self {
        match self {
            Self::Dense(operand) => Self::Dense(Operand { transposed: !operand.transposed, ..operand }),
            Self::Quantized { mat, transposed } => Self::Quantized { mat, transposed: !transposed },
        }
    }
}

impl<'a> From<Operand<'a>> for Right<'a> {
    fn from(operand: Operand<'a>) -> Self {
        Self::Dense(operand)
    }
}

/// A second, thin product that is added to some rows of a first one: an adapter's.
#[derive(Debug, Clone)]
pub struct LowRank<'a> {
    /// The rows of the result that it is added to.
    pub rows: Range<usize>,
    /// `[rows, r]`.
    pub left: MatRef<'a>,
    /// `[r, n]`.
    pub right: Operand<'a>,
}

/// `c_mn (+)= a_mk b_kn + bias_n + Σ left_r right_rn` (each low-rank term on its own rows), accumulated in f32. Factors of
/// bf16 are multiplied as such where the processor can, and widened elsewhere.
#[derive(Debug, Clone)]
pub struct Gemm<'a> {
    /// `[m, k]`.
    pub a: Operand<'a>,
    /// `[k, n]`.
    pub b: Right<'a>,
    /// Terms on disjoint, ascending rows; summed within the accumulation of the product.
    pub low_rank: &'a [LowRank<'a>],
    /// Added to every row.
    pub bias: Option<&'a [f32]>,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
}

impl<'a> Gemm<'a> {
    /// A plain product that overwrites.
    pub fn new(a: Operand<'a>, b: impl Into<Right<'a>>) -> Self {
        Self { a, b: b.into(), low_rank: &[], bias: None, accumulate: false }
    }
}

/// How exactly matrices of f32 are multiplied, in the words that PyTorch has for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Matmul {
    /// In f32.
    #[default]
    Highest,
    /// In fewer bits where that is faster: as sums of products of parts of bf16, sixteen bits of twenty-four (AMX), or in TF32,
    /// eleven of them (NVIDIA); else in f32.
    High,
}

/// A function between the linears of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Φ(x)` with the error function.
    Gelu,
    /// The approximation of GELU by a hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Which rows of its document a row attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Itself and the rows before it; with a window only the last `window`, itself included.
    Causal {
        /// Length of the window.
        window: Option<usize>,
    },
    /// All rows.
    Bidirectional,
}

/// Attention within documents.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K; divides H. Query head h reads key head `h / (H / K)`.
    pub kv_heads: usize,
    /// Width of a head, W.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Who attends to whom.
    pub mask: Mask,
    /// The rows of each document: ascending and disjoint.
    pub docs: &'a [Range<usize>],
    /// For each document the rows of its keys and values, where these are more than its queries: the queries are the last
    /// rows of the document. `None` if queries, keys and values are the same rows; only then there are gradients.
    pub keys: Option<&'a [Range<usize>]>,
}

/// A copy of a matrix in a device's own memory, which lasts as long as this guard. The matrix must not change or move before.
pub struct DeviceCopy {
    _guard: Box<dyn Send + Sync>,
}

impl fmt::Debug for DeviceCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceCopy")
    }
}

impl DeviceCopy {
    /// The copy lasts until `guard` is dropped.
    pub fn new(guard: impl Send + Sync + 'static) -> Self {
        Self { _guard: Box::new(guard) }
    }
}

/// Waits until no device is at work on memory that the processor may look at. What gives out numbers calls it first.
#[inline]
pub(crate) fn settle() {
    #[cfg(feature = "cuda")]
    cuda::settle();
}

/// A device that failed: what it was asked for since then has not been done.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{device}: {message}")]
pub struct Fault {
    /// The device's name.
    pub device: String,
    /// What failed first.
    pub message: String,
}

/// The kernels of a device. Shapes that do not fit are bugs of the caller and panic.
///
/// Views are of memory that the processor may address, on every device. A call may return while the device is still at work:
/// whoever looks at numbers, through a view or a [`crate::store::Store`], waits for it there. Slices that a call writes are
/// written when it returns.
///
/// Inputs of type [`MatRef`] may be f32 or bf16; arithmetic is in f32.
pub trait Kernels: Send + Sync + fmt::Debug {
    /// A short name of the device and its instruction set, part of a run's kernel profile.
    fn profile(&self) -> &'static str;

    /// Memory that these kernels work in best; `None` if that is the processor's, or if there is none left (a [`Fault`]).
    fn memory(&self, _bytes: usize) -> Option<Memory> {
        None
    }

    /// Brings a matrix near that many calls will read; `None` if it is there, or if it cannot be brought (a [`Fault`]).
    fn keep(&self, _x: MatRef<'_>) -> Option<DeviceCopy> {
        None
    }

    /// Bytes that are free in the memory that [`Kernels::memory`] gives; `None` where that is the processor's.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Whether a call may return before its work is done: who then looks at a result soon waits for what could go on beside.
    fn works_ahead(&self) -> bool {
        false
    }

    /// The same kernels without their products: these take no time and are zeros. For whoever wants to know what memory a pass takes, and
    /// not its numbers; `None` where there are no such.
    fn without_products(&self) -> Option<&'static dyn Kernels> {
        None
    }

    /// Waits until everything that was asked for has been done, or has failed. Numbers are waited for where they are read; this is
    /// for clocks, and for whoever asks for a fault.
    fn wait(&self) {}

    /// Whether something that was asked for is known to have failed: of everything so far after [`Kernels::wait`].
    ///
    /// # Errors
    /// The first [`Fault`].
    fn fault(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// A product.
    fn gemm(&self, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>);

    /// Products that have nothing to do with each other, side by side: for several that are too small to be shared out one by
    /// one. Each has the bits that it has alone.
    fn gemms(&self, products: Vec<(ViewMut<'_, f32>, Gemm<'_>)>) {
        products.into_iter().for_each(|(c_mn, of)| self.gemm(c_mn, &of));
    }

    /// `y = x` in the type of `y`.
    fn convert(&self, x: MatRef<'_>, y: MatMut<'_>);

    /// `y += x`.
    fn add(&self, x: MatRef<'_>, y: ViewMut<'_, f32>);

    /// `y *= x`.
    fn multiply(&self, x: MatRef<'_>, y: ViewMut<'_, f32>);

    /// `y *= factor`.
    fn scale(&self, y: ViewMut<'_, f32>, factor: f32);

    /// `y = value`.
    fn fill(&self, y: ViewMut<'_, f32>, value: f32);

    /// `y_nd (+)= x_td` of the rows `t = rows[n]`. Sums are of 32 bits only.
    fn gather(&self, x: MatRef<'_>, rows: &[u32], y: MatMut<'_>, accumulate: bool);

    /// `y_td = x_nd` for the rows `t = rows[n]`, which are distinct; the others stay.
    fn scatter(&self, x: View<'_, f32>, rows: &[u32], y: ViewMut<'_, f32>);

    /// `y_d (+)= Σ_t x_td`: the gradient of a bias.
    fn sum_rows(&self, x_td: View<'_, f32>, y_d: &mut [f32], accumulate: bool);

    /// `y_td = x_td / sqrt(mean_d(x²) + eps) · w_d`. A row may be a head: the width is `w_d`'s.
    fn rms_norm(&self, x_td: View<'_, f32>, w_d: &[f32], eps: f32, y_td: MatMut<'_>);

    /// Adds the gradient by `x` to `dx`, and the one by `w` to `dw`.
    fn rms_norm_vjp(
        &self,
        x_td: View<'_, f32>,
        w_d: &[f32],
        eps: f32,
        dy_td: View<'_, f32>,
        dx_td: ViewMut<'_, f32>,
        dw_d: Option<&mut [f32]>,
    );

    /// `y_td = (x_td - mean_d(x)) / sqrt(var_d(x) + eps) · w_d + b_d`.
    fn layer_norm(&self, x_td: View<'_, f32>, w_d: &[f32], b_d: &[f32], eps: f32, y_td: MatMut<'_>);

    /// Adds the gradient by `x` to `dx`, and those by `w` and `b` to `dwb`.
    fn layer_norm_vjp(
        &self,
        x_td: View<'_, f32>,
        w_d: &[f32],
        eps: f32,
        dy_td: View<'_, f32>,
        dx_td: ViewMut<'_, f32>,
        dwb: Option<(&mut [f32], &mut [f32])>,
    );

    /// Turns each head of each row by the row's angles, in place: pairs are (i, i + W/2), `cos` and `sin` are `[T, W/2]`.
    /// The inverse turns back, which is also the gradient.
    fn rope(&self, x: ViewMut<'_, f32>, head_dim: usize, cos: View<'_, f32>, sin: View<'_, f32>, inverse: bool);

    /// `o = softmax(scale q kᵀ + mask) v` by blocks, and the logarithm of each row's sum of exponentials, `lse_th`.
    /// `q, o [T, H W]`, `k, v [T, K W]`, or as many rows of keys and values as [`Attention::keys`] speaks of.
    fn attention(
        &self,
        how: &Attention<'_>,
        q: MatRef<'_>,
        k: MatRef<'_>,
        v: MatRef<'_>,
        o: MatMut<'_>,
        lse_th: ViewMut<'_, f32>,
    );

    /// The gradients by `q`, `k` and `v`, from those by `o` and (where given) `lse`; they overwrite.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
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
    );

    /// `y = act(gate) · up`.
    fn gated(&self, act: Activation, gate: MatRef<'_>, up: MatRef<'_>, y: MatMut<'_>);

    /// The gradients by `gate` and `up`; they overwrite.
    fn gated_vjp(
        &self,
        act: Activation,
        gate: MatRef<'_>,
        up: MatRef<'_>,
        dy: View<'_, f32>,
        dgate: MatMut<'_>,
        dup: MatMut<'_>,
    );

    /// `y = act(x)`.
    fn activate(&self, act: Activation, x: MatRef<'_>, y: MatMut<'_>);

    /// The gradient by `x`; it overwrites.
    fn activate_vjp(&self, act: Activation, x: MatRef<'_>, dy: View<'_, f32>, dx: MatMut<'_>);

    /// Negative log-likelihoods of `labels` under rows of logits, into `nll_c`. With weights, the logits are replaced by the
    /// gradient `weight_c (softmax - onehot)`, in f32 or, where `rounded` is given, there in bf16 (the logits are scratch then).
    fn cross_entropy(
        &self,
        logits_cv: ViewMut<'_, f32>,
        labels_c: &[u32],
        weight_c: Option<&[f32]>,
        rounded: Option<ViewMut<'_, half::bf16>>,
        nll_c: &mut [f32],
    );
}
