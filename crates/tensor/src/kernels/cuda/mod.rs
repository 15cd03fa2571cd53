//! The kernels of an NVIDIA device: products by cuBLAS, everything else by own kernels that NVRTC compiles at the start, so
//! that building needs no CUDA. Libraries are loaded when a device is opened.
//!
//! # Where numbers are
//! What [`crate::store::Store`] gives for these kernels is unified memory: its addresses mean the same on both sides, and it
//! lies on the device until the processor looks at it. A matrix that is [kept](Kernels::keep) has a copy on the device for
//! as long as the guard lives. Any other memory is copied there and back within the call: right, and slow for large ones.
//!
//! # When it is done
//! A call returns when its work has been begun: one stream does it in order. Results in unified memory stay there, and who looks
//! at them waits first ([`settle`]: views and stores call it), so that a borrow of numbers means what it says. Results for any
//! other memory are waited for within the call.
//!
//! # What is promised
//! The same call on the same device gives the same bits. Not promised, other than on the processor: that a row's bits do not
//! depend on the rows beside it, for cuBLAS chooses its kernel by the shape.
//!
//! # Faults
//! The first thing that fails (a launch, a copy, memory that is used up) is kept and given by [`Kernels::fault`]; calls after it
//! do nothing.
#![expect(unsafe_code, reason = "kernels are launched by address, and what they touch is this module's duty")]

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::bf16;

use self::device::Device;
use self::places::Places;
use self::work::{Grid, Work, args};
use super::{Activation, Attention, Gemm, Kernels, Matmul};
use crate::store::Memory;
use crate::view::{MatMut, MatRef, View, ViewMut};

mod attention;
mod device;
mod gemm;
mod places;
#[cfg(test)]
mod tests;
mod work;

pub use device::{Fault, Found};

/// An NVIDIA device that is ready to work.
pub struct Cuda {
    name: String,
    profile: &'static str,
    device: Arc<Mutex<Device>>,
    places: Arc<Places>,
    fault: Arc<OnceLock<Fault>>,
    matmul: Matmul,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.profile)
    }
}

/// The NVIDIA devices that this process sees, by their numbers; none without a driver.
pub fn devices() -> Vec<Found> {
    (0..device::count()).filter_map(|ordinal| device::found(ordinal).ok()).collect()
}

/// The devices that were opened, by their numbers and how they multiply.
static OPEN: Mutex<Vec<(usize, &'static Cuda)>> = Mutex::new(Vec::new());

/// Waits until no device is at work.
#[inline]
pub(super) fn settle() {
    if device::at_work() {
        let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner).clone();
        open.iter().for_each(|(_, device)| device.wait());
    }
}

/// The device of this number with products of f32 in this way, opened once for the life of the process: the libraries are loaded
/// and the kernels compiled.
///
/// # Errors
/// [`Fault`]: no driver, no such device, a library that is missing or too old.
pub fn cuda(ordinal: usize, matmul: Matmul) -> Result<&'static Cuda, Fault> {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let of_number = || open.iter().filter(|(other, _)| *other == ordinal).map(|(_, cuda)| *cuda);
    if let Some(found) = of_number().find(|cuda| cuda.matmul == matmul) {
        return Ok(found);
    }
    let made = match of_number().next() {
        Some(other) => other.multiplying(matmul),
        None => Cuda::open(ordinal)?.multiplying(matmul),
    };
    let made: &'static Cuda = Box::leak(Box::new(made));
    open.push((ordinal, made));
    Ok(made)
}

impl Cuda {
    fn open(ordinal: usize) -> Result<Self, Fault> {
        let device = Device::open(ordinal)?;
        let (name, profile) = (device.name.clone(), &*device.profile.clone().leak());
        let device = Arc::new(Mutex::new(device));
        let places = Arc::new(Places::new(Arc::clone(&device)));
        Ok(Self { name, profile, device, places, fault: Arc::default(), matmul: Matmul::Highest })
    }

    /// The same device, multiplying in this way.
    fn multiplying(&self, matmul: Matmul) -> Self {
        let plain = self.profile.trim_end_matches("-high");
        let profile = match matmul {
            Matmul::Highest => plain,
            Matmul::High => &*format!("{plain}-high").leak(),
        };
        let (device, places, fault) = (Arc::clone(&self.device), Arc::clone(&self.places), Arc::clone(&self.fault));
        Self { name: self.name.clone(), profile, device, places, fault, matmul }
    }

    /// The device's own name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its memory that are free, and all of them.
    ///
    /// # Errors
    /// Whatever the driver says.
    pub fn free_bytes(&self) -> Result<(usize, usize), Fault> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner).free_bytes()
    }

    /// Does a piece of work to its end. After a fault nothing is done.
    fn run(&self, what: &'static str, f: impl FnOnce(&mut Work<'_>) -> Result<(), Fault>) {
        if self.fault.get().is_some() {
            return;
        }
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let done = Work::new(&mut device, &self.places).and_then(|mut work| {
            let (done, ended) = (f(&mut work), work.finish());
            done.and(ended)
        });
        if let Err(fault) = done {
            // Only the first is kept: what follows it is its consequence.
            let _ = self.fault.set(fault.within(what));
        }
    }

    /// An operation on every number of `rows × cols`.
    fn each(
        &self,
        what: &'static str,
        (rows, cols): (usize, usize),
        f: impl FnOnce(&mut Work<'_>) -> Result<work::Args, Fault>,
    ) {
        if rows * cols > 0 {
            self.run(what, |work| {
                let mut of = f(work)?;
                of.push(rows as i64);
                of.push(cols as i64);
                work.launch(what, Grid::of_numbers(rows * cols), of)
            });
        }
    }
}

/// The number of an activation in `rows.cu`.
const fn number(act: Activation) -> i32 {
    match act {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
    }
}

/// Asserts that two matrices have one shape.
fn alike(what: &str, a: (usize, usize), b: (usize, usize)) {
    assert_eq!(a, b, "{what}: shapes differ");
}

fn shape(x: &MatRef<'_>) -> (usize, usize) {
    (x.rows(), x.cols())
}

const fn shape_mut(y: &MatMut<'_>) -> (usize, usize) {
    (y.rows(), y.cols())
}

impl Kernels for Cuda {
    fn profile(&self) -> &'static str {
        self.profile
    }

    fn memory(&self, bytes: usize) -> Option<Memory> {
        if self.fault.get().is_some() {
            return None;
        }
        match Places::allocate(&self.places, bytes) {
            Ok(memory) => Some(memory),
            Err(fault) => {
                let _ = self.fault.set(fault.within("memory"));
                None
            }
        }
    }

    fn keep(&self, x: MatRef<'_>) -> Option<super::DeviceCopy> {
        if self.fault.get().is_some() {
            return None;
        }
        match Places::keep(&self.places, x) {
            Ok(kept) => kept,
            Err(fault) => {
                let _ = self.fault.set(fault.within("a copy of a weight"));
                None
            }
        }
    }

    fn free_bytes(&self) -> Option<u64> {
        Self::free_bytes(self).ok().map(|(free, _)| free as u64)
    }

    fn works_ahead(&self) -> bool {
        true
    }

    fn wait(&self) {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(fault) = device.enter().and_then(|()| device.rest()) {
            let _ = self.fault.set(fault.within("what was begun before"));
        }
    }

    fn fault(&self) -> Result<(), crate::kernels::Fault> {
        match self.fault.get() {
            Some(fault) => Err(crate::kernels::Fault { device: self.name.clone(), message: fault.to_string() }),
            None => Ok(()),
        }
    }

    fn gemm(&self, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>) {
        self.run("gemm", |work| gemm::gemm(work, self.matmul, c_mn, of));
    }

    fn convert(&self, x: MatRef<'_>, y: MatMut<'_>) {
        alike("convert", shape(&x), shape_mut(&y));
        self.each("convert", shape(&x), |work| Ok(args![work.mat(x)?, work.mat_mut(y, false)?]));
    }

    fn add(&self, x: MatRef<'_>, y: ViewMut<'_, f32>) {
        alike("add", shape(&x), (y.rows(), y.cols()));
        self.each("add", shape(&x), |work| Ok(args![work.mat(x)?, work.view_mut(y, true)?]));
    }

    fn multiply(&self, x: MatRef<'_>, y: ViewMut<'_, f32>) {
        alike("multiply", shape(&x), (y.rows(), y.cols()));
        self.each("multiply", shape(&x), |work| Ok(args![work.mat(x)?, work.view_mut(y, true)?]));
    }

    fn scale(&self, y: ViewMut<'_, f32>, factor: f32) {
        self.each("scale", (y.rows(), y.cols()), |work| Ok(args![work.view_mut(y, true)?, factor]));
    }

    fn fill(&self, y: ViewMut<'_, f32>, value: f32) {
        self.each("fill", (y.rows(), y.cols()), |work| Ok(args![work.view_mut(y, false)?, value]));
    }

    fn gather(&self, x: MatRef<'_>, rows: &[u32], y: MatMut<'_>, accumulate: bool) {
        alike("gather", (rows.len(), x.cols()), shape_mut(&y));
        assert!(rows.iter().all(|&row| (row as usize) < x.rows()), "gather: a row of {} or more", x.rows());
        if !rows.is_empty() && x.cols() > 0 {
            let (n, cols) = shape_mut(&y);
            self.run("gather", |work| {
                let ids = work.slice(rows)?;
                let of = args![
                    work.mat(x)?,
                    ids,
                    work.mat_mut(y, accumulate)?,
                    n as i64,
                    cols as i64,
                    i64::from(accumulate)
                ];
                work.launch("gather", Grid::of_numbers(n * cols), of)
            });
        }
    }

    fn scatter(&self, x: View<'_, f32>, rows: &[u32], y: ViewMut<'_, f32>) {
        alike("scatter", (rows.len(), y.cols()), (x.rows(), x.cols()));
        assert!(rows.iter().all(|&row| (row as usize) < y.rows()), "scatter: a row of {} or more", y.rows());
        self.each("scatter", (x.rows(), x.cols()), |work| {
            let ids = work.slice(rows)?;
            Ok(args![work.mat(x.into())?, ids, work.view_mut(y, true)?])
        });
    }

    fn sum_rows(&self, x_td: View<'_, f32>, y_d: &mut [f32], accumulate: bool) {
        let (rows, cols) = (x_td.rows(), x_td.cols());
        assert_eq!(y_d.len(), cols, "sum_rows: widths differ");
        self.run("sum_rows", |work| {
            let of = args![
                work.mat(x_td.into())?,
                work.slice_mut(y_d, accumulate)?,
                rows as i64,
                cols as i64,
                i64::from(accumulate)
            ];
            work.launch("sum_rows", Grid::of_columns(cols), of)
        });
    }

    fn rms_norm(&self, x_td: View<'_, f32>, w_d: &[f32], eps: f32, y_td: MatMut<'_>) {
        let (rows, cols) = (x_td.rows(), x_td.cols());
        alike("rms_norm", (rows, cols), shape_mut(&y_td));
        assert_eq!(w_d.len(), cols, "rms_norm: widths differ");
        self.run("rms_norm", |work| {
            let of = args![work.mat(x_td.into())?, work.slice(w_d)?, eps, work.mat_mut(y_td, false)?, cols as i64];
            work.launch("rms_norm", Grid::of_rows(rows, cols), of)
        });
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
        let (rows, cols) = (x_td.rows(), x_td.cols());
        alike("rms_norm_vjp", (rows, cols), (dy_td.rows(), dy_td.cols()));
        alike("rms_norm_vjp", (rows, cols), (dx_td.rows(), dx_td.cols()));
        self.run("rms_norm_vjp", |work| {
            let (x, dy) = (work.mat(x_td.into())?, work.mat(dy_td.into())?);
            let (w, dx, inverse) = (work.slice(w_d)?, work.view_mut(dx_td, true)?, work.scratch::<f32>(rows)?);
            let of = args![x, w, eps, dy, dx, inverse, cols as i64];
            work.launch("rms_norm_dx", Grid::of_rows(rows, cols), of)?;
            let Some(dw_d) = dw_d else { return Ok(()) };
            let of = args![x, inverse, dy, work.slice_mut(dw_d, true)?, rows as i64, cols as i64];
            work.launch("rms_norm_dw", Grid::of_columns(cols), of)
        });
    }

    fn layer_norm(&self, x_td: View<'_, f32>, w_d: &[f32], b_d: &[f32], eps: f32, y_td: MatMut<'_>) {
        let (rows, cols) = (x_td.rows(), x_td.cols());
        alike("layer_norm", (rows, cols), shape_mut(&y_td));
        assert_eq!((w_d.len(), b_d.len()), (cols, cols), "layer_norm: widths differ");
        self.run("layer_norm", |work| {
            let (w, b) = (work.slice(w_d)?, work.slice(b_d)?);
            let of = args![work.mat(x_td.into())?, w, b, eps, work.mat_mut(y_td, false)?, cols as i64];
            work.launch("layer_norm", Grid::of_rows(rows, cols), of)
        });
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
        let (rows, cols) = (x_td.rows(), x_td.cols());
        alike("layer_norm_vjp", (rows, cols), (dy_td.rows(), dy_td.cols()));
        alike("layer_norm_vjp", (rows, cols), (dx_td.rows(), dx_td.cols()));
        self.run("layer_norm_vjp", |work| {
            let (x, dy) = (work.mat(x_td.into())?, work.mat(dy_td.into())?);
            let (w, dx) = (work.slice(w_d)?, work.view_mut(dx_td, true)?);
            let (mean, inverse) = (work.scratch::<f32>(rows)?, work.scratch::<f32>(rows)?);
            let of = args![x, w, eps, dy, dx, mean, inverse, cols as i64];
            work.launch("layer_norm_dx", Grid::of_rows(rows, cols), of)?;
            let Some((dw_d, db_d)) = dwb else { return Ok(()) };
            let (dw, db) = (work.slice_mut(dw_d, true)?, work.slice_mut(db_d, true)?);
            let of = args![x, mean, inverse, dy, dw, db, rows as i64, cols as i64];
            work.launch("layer_norm_dwb", Grid::of_columns(cols), of)
        });
    }

    fn rope(&self, x: ViewMut<'_, f32>, head_dim: usize, cos: View<'_, f32>, sin: View<'_, f32>, inverse: bool) {
        let (rows, cols) = (x.rows(), x.cols());
        assert!(head_dim.is_multiple_of(2) && cols.is_multiple_of(head_dim), "rope: heads of {head_dim} in {cols}");
        alike("rope", (cos.rows(), cos.cols()), (rows, head_dim / 2));
        alike("rope", (sin.rows(), sin.cols()), (rows, head_dim / 2));
        self.run("rope", |work| {
            let (cos, sin) = (work.mat(cos.into())?, work.mat(sin.into())?);
            let sign = if inverse { -1.0f32 } else { 1.0 };
            let (heads, width) = ((cols / head_dim) as i64, head_dim as i64);
            let of = args![work.view_mut(x, true)?, cos, sin, sign, rows as i64, heads, width];
            work.launch("rope", Grid::of_numbers(rows * cols / 2), of)
        });
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
        self.run("attention", |work| attention::forward(work, how, [q, k, v], o, lse_th));
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
        let given = attention::Given { q, k, v, o, lse_th, d_o, dlse_th };
        self.run("attention_vjp", |work| attention::reverse(work, how, &given, [dq, dk, dv]));
    }

    fn gated(&self, act: Activation, gate: MatRef<'_>, up: MatRef<'_>, y: MatMut<'_>) {
        alike("gated", shape(&gate), shape(&up));
        alike("gated", shape(&gate), shape_mut(&y));
        self.each("gated", shape(&gate), |work| {
            Ok(args![number(act), work.mat(gate)?, work.mat(up)?, work.mat_mut(y, false)?])
        });
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
        let of = shape(&gate);
        for other in [shape(&up), (dy.rows(), dy.cols()), shape_mut(&dgate), shape_mut(&dup)] {
            alike("gated_vjp", of, other);
        }
        self.each("gated_vjp", of, |work| {
            let (gate, up, dy) = (work.mat(gate)?, work.mat(up)?, work.mat(dy.into())?);
            Ok(args![number(act), gate, up, dy, work.mat_mut(dgate, false)?, work.mat_mut(dup, false)?])
        });
    }

    fn activate(&self, act: Activation, x: MatRef<'_>, y: MatMut<'_>) {
        alike("activate", shape(&x), shape_mut(&y));
        self.each("activate", shape(&x), |work| Ok(args![number(act), work.mat(x)?, work.mat_mut(y, false)?]));
    }

    fn activate_vjp(&self, act: Activation, x: MatRef<'_>, dy: View<'_, f32>, dx: MatMut<'_>) {
        alike("activate_vjp", shape(&x), (dy.rows(), dy.cols()));
        alike("activate_vjp", shape(&x), shape_mut(&dx));
        self.each("activate_vjp", shape(&x), |work| {
            let (x, dy) = (work.mat(x)?, work.mat(dy.into())?);
            Ok(args![number(act), x, dy, work.mat_mut(dx, false)?])
        });
    }

    fn cross_entropy(
        &self,
        logits_cv: ViewMut<'_, f32>,
        labels_c: &[u32],
        weight_c: Option<&[f32]>,
        rounded: Option<ViewMut<'_, bf16>>,
        nll_c: &mut [f32],
    ) {
        let (rows, vocab) = (logits_cv.rows(), logits_cv.cols());
        assert_eq!((labels_c.len(), nll_c.len()), (rows, rows), "rows of labels and results");
        assert!(weight_c.is_none_or(|weight_c| weight_c.len() == rows), "rows of weights");
        assert!(labels_c.iter().all(|label| (*label as usize) < vocab), "a label of {vocab} or more");
        self.run("cross_entropy", |work| {
            let (logits, labels) = (work.view_mut(logits_cv, true)?, work.slice(labels_c)?);
            let weights = weight_c.map(|weight_c| work.slice(weight_c)).transpose()?.unwrap_or_default();
            let rounded = match rounded {
                Some(rounded) => {
                    alike("cross_entropy", (rows, vocab), (rounded.rows(), rounded.cols()));
                    work.mat_mut(rounded.into(), false)?
                }
                None => work::Rows::none(),
            };
            let of = args![logits, labels, weights, rounded, work.slice_mut(nll_c, false)?, vocab as i64];
            work.launch("cross_entropy", Grid::of_rows(rows, vocab), of)
        });
    }
}
