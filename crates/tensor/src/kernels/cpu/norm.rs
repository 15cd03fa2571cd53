//! Normalisation of rows, and of the heads within rows.

use super::Cpu;
use super::copy::write;
use crate::view::{MatMut, View, ViewMut};

/// `1 / sqrt(mean(x²) + eps)`.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + eps).sqrt()
}

/// The mean, and `1 / sqrt(var + eps)`.
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = x.iter().sum::<f32>() / x.len() as f32;
    let var = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / x.len() as f32;
    (mean, 1.0 / (var + eps).sqrt())
}

fn dot(a: &[f32], b: impl Iterator<Item = f32>) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `y = x / rms(x) · w`, for each stretch of `w`'s width.
pub(super) fn rms_norm(_: &Cpu, x_td: View<'_, f32>, w_d: &[f32], eps: f32, mut y_td: MatMut<'_>) {
    assert_eq!((x_td.rows(), x_td.cols()), (y_td.rows(), y_td.cols()), "shapes differ");
    assert!(x_td.cols().is_multiple_of(w_d.len()), "rows of {} in parts of {}", x_td.cols(), w_d.len());
    let mut y = vec![0.0; x_td.cols()];
    for row in 0..x_td.rows() {
        for (x, y) in x_td.row(row).chunks_exact(w_d.len()).zip(y.chunks_exact_mut(w_d.len())) {
            let r = inverse_rms(x, eps);
            for i in 0..x.len() {
                y[i] = x[i] * r * w_d[i];
            }
        }
        write(&mut y_td, row, &y);
    }
}

/// Adds `r (w dy - x r² mean(x w dy))` to `dx` and `Σ dy x r` to `dw`.
pub(super) fn rms_norm_vjp(
    _: &Cpu,
    x_td: View<'_, f32>,
    w_d: &[f32],
    eps: f32,
    dy_td: View<'_, f32>,
    mut dx_td: ViewMut<'_, f32>,
    mut dw_d: Option<&mut [f32]>,
) {
    assert_eq!((x_td.rows(), x_td.cols()), (dy_td.rows(), dy_td.cols()), "shapes differ");
    assert_eq!((x_td.rows(), x_td.cols()), (dx_td.rows(), dx_td.cols()), "shapes differ");
    assert!(x_td.cols().is_multiple_of(w_d.len()), "rows of {} in parts of {}", x_td.cols(), w_d.len());
    let width = w_d.len();
    for row in 0..x_td.rows() {
        for part in 0..x_td.cols() / width {
            let at = part * width..(part + 1) * width;
            let (x, dy) = (&x_td.row(row)[at.clone()], &dy_td.row(row)[at.clone()]);
            let r = inverse_rms(x, eps);
            let mean = dot(x, w_d.iter().zip(dy).map(|(w, dy)| w * dy)) / width as f32;
            let dx = &mut dx_td.row(row)[at];
            for i in 0..width {
                dx[i] += r * (w_d[i] * dy[i] - x[i] * r * r * mean);
            }
            if let Some(dw) = &mut dw_d {
                for i in 0..width {
                    dw[i] += dy[i] * x[i] * r;
                }
            }
        }
    }
}

/// `y = (x - mean) / sqrt(var + eps) · w + b`.
pub(super) fn layer_norm(_: &Cpu, x_td: View<'_, f32>, w_d: &[f32], b_d: &[f32], eps: f32, mut y_td: MatMut<'_>) {
    assert_eq!((x_td.rows(), x_td.cols()), (y_td.rows(), y_td.cols()), "shapes differ");
    assert_eq!((x_td.cols(), x_td.cols()), (w_d.len(), b_d.len()), "widths differ");
    let mut y = vec![0.0; x_td.cols()];
    for row in 0..x_td.rows() {
        let x = x_td.row(row);
        let (mean, r) = moments(x, eps);
        for i in 0..x.len() {
            y[i] = (x[i] - mean) * r * w_d[i] + b_d[i];
        }
        write(&mut y_td, row, &y);
    }
}

/// Adds `r (g - mean(g) - n mean(g n))` to `dx`, where `g = w dy` and `n` is the normalised row; `Σ dy n` and `Σ dy` to `dwb`.
pub(super) fn layer_norm_vjp(
    _: &Cpu,
    x_td: View<'_, f32>,
    w_d: &[f32],
    eps: f32,
    dy_td: View<'_, f32>,
    mut dx_td: ViewMut<'_, f32>,
    mut dwb: Option<(&mut [f32], &mut [f32])>,
) {
    assert_eq!((x_td.rows(), x_td.cols()), (dy_td.rows(), dy_td.cols()), "shapes differ");
    assert_eq!((x_td.rows(), x_td.cols()), (dx_td.rows(), dx_td.cols()), "shapes differ");
    assert_eq!(x_td.cols(), w_d.len(), "widths differ");
    let width = w_d.len();
    for row in 0..x_td.rows() {
        let (x, dy) = (x_td.row(row), dy_td.row(row));
        let (mean, r) = moments(x, eps);
        let mean_g = dot(w_d, dy.iter().copied()) / width as f32;
        let mean_gn = (0..width).map(|i| w_d[i] * dy[i] * (x[i] - mean) * r).sum::<f32>() / width as f32;
        let dx = dx_td.row(row);
        for i in 0..width {
            dx[i] += r * (w_d[i] * dy[i] - mean_g - (x[i] - mean) * r * mean_gn);
        }
        if let Some((dw, db)) = &mut dwb {
            for i in 0..width {
                dw[i] += dy[i] * (x[i] - mean) * r;
                db[i] += dy[i];
            }
        }
    }
}
