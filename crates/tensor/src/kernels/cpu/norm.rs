//! Root-mean-square and layer normalisation of rows or of heads, and their gradients.
//!
//! # Numerics
//! With `n = x / sqrt(mean x² + eps)`, or `(x - mean x) / sqrt(var x + eps)` whose variance is taken around the mean:
//! ```text
//! dx += (g - n mean(g n) [- mean g]) / sqrt(…)    where g = dy w
//! dw += Σ_t dy n    db += Σ_t dy
//! ```
//! Sums over rows are taken in chunks of a fixed number of rows, and the chunks' sums added in order.
#![expect(unsafe_code, reason = "tasks write disjoint rows of one view")]

use std::ops::Range;

use super::map::{Added, Formula, PIECE, Same, sums, update, write};
use super::rows::{Scratch, Shared, SharedMat, for_chunks, sum_over_chunks};
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatMut, View, ViewMut};

/// Which normalisation.
#[derive(Debug, Clone, Copy)]
struct Norm<'a> {
    weight_d: &'a [f32],
    /// The layer norm's, whose presence also says that the mean is taken off.
    centred: bool,
    eps: f32,
}

impl Norm<'_> {
    /// How a row is normalised.
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: &[f32]) -> Row {
        let width = x.len() as f32;
        let mean = if self.centred { sums(s, [x], [0.0], &Same)[0] / width } else { 0.0 };
        let [square] = sums(s, [x], [mean], &Square { mean });
        Row { mean, scale: 1.0 / (square / width + self.eps).sqrt() }
    }
}

/// `x ↦ (x - mean)²`.
struct Square {
    mean: f32,
}

impl Formula<1, 1> for Square {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
        let x = s.sub(x, s.splat(self.mean));
        [s.mul(x, x)]
    }
}

/// What is taken off a row, and what it is then multiplied by.
#[derive(Clone, Copy)]
struct Row {
    mean: f32,
    scale: f32,
}

impl Row {
    #[inline(always)]
    fn normal<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.mul(s.sub(x, s.splat(self.mean)), s.splat(self.scale))
    }
}

/// `x, w ↦ n w`.
impl Formula<2, 1> for Row {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, w]: [S::F; 2], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(self.normal(s, x), w)]
    }
}

/// `x, w, b ↦ n w + b`.
impl Formula<3, 1> for Row {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, w, b]: [S::F; 3], _: [S::F; 1]) -> [S::F; 1] {
        [s.fma(self.normal(s, x), w, b)]
    }
}

/// `x, dy, w ↦ g n, g`.
impl Formula<3, 2> for Row {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, dy, w]: [S::F; 3], _: [S::F; 2]) -> [S::F; 2] {
        let g = s.mul(dy, w);
        [s.mul(g, self.normal(s, x)), g]
    }
}

/// `x, dy, w` and a gradient by `x` to which is added.
struct ByInput {
    row: Row,
    /// The means of `g n` and, for a layer norm, of `g`.
    along: f32,
    mean: f32,
}

impl Formula<3, 1> for ByInput {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, dy, w]: [S::F; 3], [dx]: [S::F; 1]) -> [S::F; 1] {
        let g = s.fnma(self.row.normal(s, x), s.splat(self.along), s.mul(dy, w));
        [s.fma(s.sub(g, s.splat(self.mean)), s.splat(self.row.scale), dx)]
    }
}

/// `x, dy` and a gradient by the weight to which is added.
struct ByWeight(Row);

impl Formula<2, 1> for ByWeight {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, dy]: [S::F; 2], [dw]: [S::F; 1]) -> [S::F; 1] {
        [s.fma(dy, self.0.normal(s, x), dw)]
    }
}

/// See [`crate::kernels::Kernels::rms_norm`].
pub(super) fn rms_norm(cpu: &Cpu, x_td: View<'_, f32>, weight_d: &[f32], eps: f32, y_td: MatMut<'_>) {
    forward(cpu, x_td, Norm { weight_d, centred: false, eps }, None, y_td);
}

/// See [`crate::kernels::Kernels::layer_norm`].
pub(super) fn layer_norm(cpu: &Cpu, x_td: View<'_, f32>, weight_d: &[f32], bias_d: &[f32], eps: f32, y_td: MatMut<'_>) {
    assert_eq!(bias_d.len(), weight_d.len(), "length of the bias");
    forward(cpu, x_td, Norm { weight_d, centred: true, eps }, Some(bias_d), y_td);
}

/// See [`crate::kernels::Kernels::rms_norm_vjp`].
pub(super) fn rms_norm_vjp(
    cpu: &Cpu,
    x_td: View<'_, f32>,
    weight_d: &[f32],
    eps: f32,
    dy_td: View<'_, f32>,
    dx_td: ViewMut<'_, f32>,
    dw_d: Option<&mut [f32]>,
) {
    let norm = Norm { weight_d, centred: false, eps };
    match dw_d {
        None => backward(cpu, x_td, norm, dy_td, dx_td, []),
        Some(dw_d) => backward(cpu, x_td, norm, dy_td, dx_td, [dw_d]),
    }
}

/// See [`crate::kernels::Kernels::layer_norm_vjp`].
pub(super) fn layer_norm_vjp(
    cpu: &Cpu,
    x_td: View<'_, f32>,
    weight_d: &[f32],
    eps: f32,
    dy_td: View<'_, f32>,
    dx_td: ViewMut<'_, f32>,
    dwb: Option<(&mut [f32], &mut [f32])>,
) {
    let norm = Norm { weight_d, centred: true, eps };
    match dwb {
        None => backward(cpu, x_td, norm, dy_td, dx_td, []),
        Some((dw_d, db_d)) => backward(cpu, x_td, norm, dy_td, dx_td, [dw_d, db_d]),
    }
}

/// Asserts that rows of `cols` numbers consist of heads as wide as the weight.
fn check(cols: usize, weight_d: &[f32]) {
    assert!(
        !weight_d.is_empty() && cols.is_multiple_of(weight_d.len()),
        "{cols} columns of heads of {}",
        weight_d.len()
    );
}

fn forward(cpu: &Cpu, x: View<'_, f32>, norm: Norm<'_>, bias: Option<&[f32]>, y: MatMut<'_>) {
    check(x.cols(), norm.weight_d);
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shape of the result");
    let y = SharedMat::new(y);
    for_chunks(x.rows(), x.cols(), |rows| cpu.call_f32(Forward { x, norm, bias, y: &y, rows }));
}

/// Some rows of the forward pass.
struct Forward<'a> {
    x: View<'a, f32>,
    norm: Norm<'a>,
    bias: Option<&'a [f32]>,
    y: &'a SharedMat<'a>,
    rows: Range<usize>,
}

impl Body for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let weight_d = self.norm.weight_d;
        let mut room = Scratch::new(PIECE);
        for row in self.rows.clone() {
            for head in 0..self.x.cols() / weight_d.len() {
                let cols = head * weight_d.len()..(head + 1) * weight_d.len();
                let x = &self.x.row(row)[cols.clone()];
                let how = self.norm.of(s, x);
                for at in (0..x.len()).step_by(PIECE) {
                    let piece = at..(at + PIECE).min(x.len());
                    // SAFETY: a task has its rows to itself.
                    let y = unsafe { self.y.row(row, cols.start + piece.start..cols.start + piece.end) };
                    let (x, w) = (&x[piece.clone()], &weight_d[piece.clone()]);
                    match self.bias {
                        None => write(s, [x, w], [y], &mut room, &how),
                        Some(b) => write(s, [x, w, &b[piece]], [y], &mut room, &how),
                    }
                }
            }
        }
    }
}

fn backward<const N: usize>(
    cpu: &Cpu,
    x: View<'_, f32>,
    norm: Norm<'_>,
    dy: View<'_, f32>,
    dx: ViewMut<'_, f32>,
    dwb: [&mut [f32]; N],
) {
    check(x.cols(), norm.weight_d);
    let shape = (x.rows(), x.cols());
    assert_eq!((dy.rows(), dy.cols()), shape, "shape of the result's gradient");
    assert_eq!((dx.rows(), dx.cols()), shape, "shape of the gradient");
    assert!(dwb.iter().all(|sum| sum.len() == norm.weight_d.len()), "length of a weight's gradient");
    let dx = Shared::new(dx);
    if N == 0 {
        for_chunks(x.rows(), x.cols(), |rows| cpu.call_f32(Backward::<0> { x, norm, dy, dx: &dx, rows, dwb: [] }));
    } else {
        sum_over_chunks(x.rows(), x.cols(), dwb, |rows, dwb| {
            cpu.call_f32(Backward { x, norm, dy, dx: &dx, rows, dwb })
        });
    }
}

/// Some rows of the backward pass.
struct Backward<'a, const N: usize> {
    x: View<'a, f32>,
    norm: Norm<'a>,
    dy: View<'a, f32>,
    dx: &'a Shared<'a, f32>,
    rows: Range<usize>,
    /// Their share of the gradients of the weight and the bias.
    dwb: [&'a mut [f32]; N],
}

impl<const N: usize> Body for Backward<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let w = self.norm.weight_d;
        let width = w.len() as f32;
        for row in self.rows.clone() {
            for head in 0..self.x.cols() / w.len() {
                let cols = head * w.len()..(head + 1) * w.len();
                let (x, dy) = (&self.x.row(row)[cols.clone()], &self.dy.row(row)[cols.clone()]);
                let how = self.norm.of(s, x);
                let [along, total] = sums(s, [x, dy, w], [how.mean, 0.0, 0.0], &how);
                let mean = if self.norm.centred { total / width } else { 0.0 };
                // SAFETY: a task has its rows to itself.
                let dx = unsafe { self.dx.row(row, cols) };
                update(s, [x, dy, w], [dx], &ByInput { row: how, along: along / width, mean });
                let mut dwb = self.dwb.iter_mut();
                if let Some(dw) = dwb.next() {
                    update(s, [x, dy], [&mut **dw], &ByWeight(how));
                }
                if let Some(db) = dwb.next() {
                    update(s, [dy], [&mut **db], &Added);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::kernels::Kernels;
    use crate::kernels::cpu::checks::*;

    const EPS: f32 = 1e-5;

    /// Values in f64.
    fn reference(x: &[f64], w: &[f64], b: Option<&[f64]>) -> Vec<f64> {
        let width = w.len() as f64;
        x.chunks(w.len())
            .flat_map(|x| {
                let mean = if b.is_some() { x.iter().sum::<f64>() / width } else { 0.0 };
                let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width;
                let factor = 1.0 / (square + f64::from(EPS)).sqrt();
                let of = |(i, x): (usize, &f64)| (x - mean) * factor * w[i] + b.map_or(0.0, |b| b[i]);
                x.iter().enumerate().map(of).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Gradients in f64 by the formulas at the head of this file: `dx`, `dw`, `db`.
    fn gradients(x: &[f64], w: &[f64], dy: &[f64], centred: bool) -> [Vec<f64>; 3] {
        let width = w.len() as f64;
        let [mut dx, mut dw, mut db] = [vec![], vec![0.0; w.len()], vec![0.0; w.len()]];
        for (x, dy) in x.chunks(w.len()).zip(dy.chunks(w.len())) {
            let mean = if centred { x.iter().sum::<f64>() / width } else { 0.0 };
            let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width;
            let factor = 1.0 / (square + f64::from(EPS)).sqrt();
            let n: Vec<f64> = x.iter().map(|x| (x - mean) * factor).collect();
            let g: Vec<f64> = dy.iter().zip(w).map(|(dy, w)| dy * w).collect();
            let along = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f64>() / width;
            let total = if centred { g.iter().sum::<f64>() / width } else { 0.0 };
            dx.extend(g.iter().zip(&n).map(|(g, n)| (g - n * along - total) * factor));
            for i in 0..w.len() {
                dw[i] += dy[i] * n[i];
                db[i] += dy[i];
            }
        }
        [dx, dw, db]
    }

    struct Found {
        y: Vec<f32>,
        dx: Vec<f32>,
        dw: Vec<f32>,
        db: Vec<f32>,
    }

    /// Runs forward and backward; gradients are added to ones.
    fn run(cpu: &Cpu, x: View<'_, f32>, w: &[f32], b: Option<&[f32]>, dy: View<'_, f32>) -> Found {
        let (rows, cols) = (x.rows(), x.cols());
        let mut found = Found {
            y: vec![f32::NAN; rows * cols],
            dx: vec![1.0; rows * cols],
            dw: vec![1.0; w.len()],
            db: vec![1.0; w.len()],
        };
        let y = ViewMut::new(&mut found.y, rows, cols);
        let dx = ViewMut::new(&mut found.dx, rows, cols);
        match b {
            None => {
                cpu.rms_norm(x, w, EPS, y.into());
                cpu.rms_norm_vjp(x, w, EPS, dy, dx, Some(&mut found.dw));
            }
            Some(b) => {
                cpu.layer_norm(x, w, b, EPS, y.into());
                cpu.layer_norm_vjp(x, w, EPS, dy, dx, Some((&mut found.dw, &mut found.db)));
            }
        }
        found
    }

    /// Rows, heads and their width.
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (3, 1, 3), (70, 1, 17), (5, 4, 24), (40, 3, 64), (33, 1, 896), (2, 1, 1030)];

    #[test]
    fn results_and_gradients_are_those_of_f64() {
        for (rows, heads, width) in SHAPES {
            let (cols, stride) = (heads * width, heads * width + 5);
            let (x, dy) = (normal("x", rows * stride), normal("dy", rows * stride));
            let (w, b) = (normal("w", width), normal("b", width));
            let view = |of| View::strided(of, rows, cols, stride);
            let dense = |of: View<'_, f32>| (0..rows).flat_map(|row| doubles(of.row(row))).collect::<Vec<f64>>();
            let (x64, w64, b64, dy64) = (dense(view(&x)), doubles(&w), doubles(&b), dense(view(&dy)));
            for bias in [None, Some(&b[..])] {
                let expected = reference(&x64, &w64, bias.map(|_| &b64[..]));
                let [dx, dw, db] = gradients(&x64, &w64, &dy64, bias.is_some());
                let plus_one = |of: &[f64]| of.iter().map(|of| of + 1.0).collect::<Vec<_>>();
                for cpu in cpus() {
                    let what = |part| format!("{part} of {rows} rows of {heads} × {width}, {}", cpu.isa().name());
                    let found = run(&cpu, view(&x), &w, bias, view(&dy));
                    // A row's own scale multiplies what is rounded, up to 1 / sqrt(eps).
                    let steep = if width == 1 { 300.0 } else { 8.0 };
                    assert_sums(&what("y"), DType::F32, &found.y, &expected, width, steep);
                    assert_sums(&what("dx"), DType::F32, &found.dx, &plus_one(&dx), width, steep);
                    assert_sums(&what("dw"), DType::F32, &found.dw, &plus_one(&dw), width + rows * heads, steep);
                    if bias.is_some() {
                        assert_sums(&what("db"), DType::F32, &found.db, &plus_one(&db), rows * heads, 1.0);
                    }
                }
            }
        }
    }

    #[test]
    fn formulas_have_the_slopes_of_the_reference() {
        let (x, w, b, dy) =
            (doubles(&normal("x", 12)), doubles(&normal("w", 4)), doubles(&normal("b", 4)), normal("dy", 12));
        for centred in [false, true] {
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let y = reference(x, w, centred.then_some(b));
                y.iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>()
            };
            let [dx, dw, db] = gradients(&x, &w, &doubles(&dy), centred);
            assert_slopes("dx", &dx, &differences(&x, |x| loss(x, &w, &b)));
            assert_slopes("dw", &dw, &differences(&w, |w| loss(&x, w, &b)));
            if centred {
                assert_slopes("db", &db, &differences(&b, |b| loss(&x, &w, b)));
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_other_rows() {
        let (rows, width) = (150, 300);
        let (x, dy) = (normal("x", rows * width), normal("dy", rows * width));
        let (w, b) = (normal("w", width), normal("b", width));
        let view = |of| View::new(of, rows, width);
        for cpu in cpus() {
            for bias in [None, Some(&b[..])] {
                let all = |found: &Found| bits(&[&found.y[..], &found.dx, &found.dw, &found.db].concat());
                let found = run(&cpu, view(&x), &w, bias, view(&dy));
                for threads in [1, 2, 4] {
                    let again = with_threads(threads, || run(&cpu, view(&x), &w, bias, view(&dy)));
                    assert!(all(&found) == all(&again), "{threads} threads");
                }
                let part = run(&cpu, view(&x).sub_rows(140, 150), &w, bias, view(&dy).sub_rows(140, 150));
                assert_eq!(bits(&part.y), bits(&found.y[140 * width..]));
                assert_eq!(bits(&part.dx), bits(&found.dx[140 * width..]));
            }
        }
    }

    #[test]
    fn results_may_be_bf16_and_weights_without_gradient() {
        let (rows, width) = (7, 600);
        let (x, dy, w, b) =
            (normal("x", rows * width), normal("dy", rows * width), normal("w", width), normal("b", width));
        let (x, dy) = (View::new(&x, rows, width), View::new(&dy, rows, width));
        for cpu in cpus() {
            let wide = run(&cpu, x, &w, Some(&b), dy);
            let mut y = vec![half::bf16::NAN; rows * width];
            let mut dx = vec![1.0; rows * width];
            cpu.layer_norm(x, &w, &b, EPS, ViewMut::new(&mut y, rows, width).into());
            cpu.layer_norm_vjp(x, &w, EPS, dy, ViewMut::new(&mut dx, rows, width), None);
            assert_eq!((y, bits(&dx)), (rounded(&wide.y), bits(&wide.dx)));
        }
    }

    #[test]
    fn constant_and_large_rows_stay_finite() {
        for cpu in cpus() {
            for value in [0.0, 1e-20, 1e4, -1e15] {
                let x = vec![value; 40];
                for bias in [None, Some(&[0.5; 20][..])] {
                    let found = run(&cpu, View::new(&x, 2, 20), &[1.0; 20], bias, View::new(&[1.0; 40], 2, 20));
                    assert!([found.y, found.dx, found.dw].concat().iter().all(|x| x.is_finite()), "{value} {bias:?}");
                }
            }
        }
    }
}
