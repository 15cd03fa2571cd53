//! Functions between the linears of an MLP, plain and gated, and their gradients.
//!
//! # Numerics
//! GELU takes the tail `Q(x) = 1 - Φ(x)` of the normal distribution as `e^(-x²/2) g(x)`, where `g` falls slowly and is a
//! polynomial of `1 / (1 + x/4)` to 6e-8, so that small values are as exact, relatively, as large ones.

use super::exponent::{exp, polynomial};
use super::map::{Formula, map};
use crate::kernels::Activation;
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::Simd;
use crate::view::{MatMut, MatRef, View};

/// A function of one number.
trait Function: Sync {
    /// The value.
    fn value<S: Simd>(s: S, x: S::F) -> S::F;

    /// The value and the derivative.
    fn both<S: Simd>(s: S, x: S::F) -> (S::F, S::F);
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct Relu;

/// `1 / (1 + e^-x)`, and 1 less that, each as exact as the other.
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let e = exp(s, s.sub(s.splat(0.0), x));
    let sigmoid = s.div(s.splat(1.0), s.add(s.splat(1.0), e));
    (sigmoid, s.mul(e, sigmoid))
}

impl Function for Silu {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F) -> S::F {
        s.mul(x, sigmoid(s, x).0)
    }

    #[inline(always)]
    fn both<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
        let (up, down) = sigmoid(s, x);
        let value = s.mul(x, up);
        (value, s.fma(value, down, up))
    }
}

/// `g(x) e^(x²/2)`, `x ≥ 0`, by powers of `1 / (1 + x/4) - 1/2`, without one factor of `1 / (1 + x/4)`.
const TAIL: [f32; 9] = [
    0.188_821_29,
    0.303_948_37,
    0.387_134_08,
    0.373_036_7,
    0.241_756_56,
    0.060_397_7,
    -0.058_646_35,
    -0.049_915_355,
    0.025_723_43,
];

/// `Φ(x)`, and `e^(-x²/2)`.
#[inline(always)]
fn cumulative<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let zero = s.splat(0.0);
    // Beyond 40 both results are what they are there.
    let magnitude = s.min(s.splat(40.0), s.abs(x));
    let t = s.div(s.splat(1.0), s.fma(magnitude, s.splat(0.25), s.splat(1.0)));
    let g = s.mul(t, polynomial(s, TAIL, s.sub(t, s.splat(0.5))));
    // What squaring rounds off matters: the exponent is as large as 80.
    let square = s.mul(magnitude, magnitude);
    let rounded_off = s.fma(magnitude, magnitude, s.sub(zero, square));
    let bell = exp(s, s.mul(square, s.splat(-0.5)));
    let bell = s.fma(s.mul(rounded_off, s.splat(-0.5)), bell, bell);
    let tail = s.mul(g, bell);
    // 1 - tail for x ≥ 0, tail for x < 0; what is not a number stays so.
    (s.select(s.lt(x, zero), tail, s.sub(s.splat(1.0), tail)), bell)
}

impl Function for Gelu {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F) -> S::F {
        s.mul(x, cumulative(s, x).0)
    }

    #[inline(always)]
    fn both<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
        /// `1 / sqrt(2 π)`.
        const DENSITY: f32 = 0.398_942_3;
        let (phi, bell) = cumulative(s, x);
        (s.mul(x, phi), s.fma(s.mul(x, s.splat(DENSITY)), bell, phi))
    }
}

/// `2 sqrt(2 / π)`: as `(1 + tanh u) / 2 = sigmoid 2u`.
const TANH: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

impl Function for GeluTanh {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F) -> S::F {
        let inner = s.mul(s.mul(x, s.splat(TANH)), s.fma(s.mul(x, x), s.splat(CUBE), s.splat(1.0)));
        s.mul(x, sigmoid(s, inner).0)
    }

    #[inline(always)]
    fn both<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
        let square = s.mul(x, x);
        let inner = s.mul(s.mul(x, s.splat(TANH)), s.fma(square, s.splat(CUBE), s.splat(1.0)));
        let slope = s.mul(s.splat(TANH), s.fma(square, s.splat(3.0 * CUBE), s.splat(1.0)));
        let (up, down) = sigmoid(s, inner);
        let value = s.mul(x, up);
        (value, s.fma(s.mul(value, down), slope, up))
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::F) -> S::F {
        s.max(s.splat(0.0), x)
    }

    #[inline(always)]
    fn both<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
        let zero = s.splat(0.0);
        (s.max(zero, x), s.select(s.lt(zero, x), s.splat(1.0), zero))
    }
}

/// `x ↦ f(x)`.
struct Plain<F>(F);

impl<F: Function> Formula<1, 1> for Plain<F> {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
        [F::value(s, x)]
    }
}

/// `x, dy ↦ dy f'(x)`.
struct PlainVjp<F>(F);

impl<F: Function> Formula<2, 1> for PlainVjp<F> {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, dy]: [S::F; 2], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(dy, F::both(s, x).1)]
    }
}

/// `gate, up ↦ f(gate) up`.
struct Gated<F>(F);

impl<F: Function> Formula<2, 1> for Gated<F> {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [gate, up]: [S::F; 2], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(F::value(s, gate), up)]
    }
}

/// `gate, up, dy ↦ dy f'(gate) up, dy f(gate)`.
struct GatedVjp<F>(F);

impl<F: Function> Formula<3, 2> for GatedVjp<F> {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [gate, up, dy]: [S::F; 3], _: [S::F; 2]) -> [S::F; 2] {
        let (value, slope) = F::both(s, gate);
        [s.mul(s.mul(dy, slope), up), s.mul(dy, value)]
    }
}

/// See [`crate::kernels::Kernels::activate`].
pub(super) fn activate(cpu: &Cpu, act: Activation, x: MatRef<'_>, y: MatMut<'_>) {
    match act {
        Activation::Silu => map(cpu, [x], [y], &Plain(Silu)),
        Activation::Gelu => map(cpu, [x], [y], &Plain(Gelu)),
        Activation::GeluTanh => map(cpu, [x], [y], &Plain(GeluTanh)),
        Activation::Relu => map(cpu, [x], [y], &Plain(Relu)),
    }
}

/// See [`crate::kernels::Kernels::activate_vjp`].
pub(super) fn activate_vjp(cpu: &Cpu, act: Activation, x: MatRef<'_>, dy: View<'_, f32>, dx: MatMut<'_>) {
    let inputs = [x, dy.into()];
    match act {
        Activation::Silu => map(cpu, inputs, [dx], &PlainVjp(Silu)),
        Activation::Gelu => map(cpu, inputs, [dx], &PlainVjp(Gelu)),
        Activation::GeluTanh => map(cpu, inputs, [dx], &PlainVjp(GeluTanh)),
        Activation::Relu => map(cpu, inputs, [dx], &PlainVjp(Relu)),
    }
}

/// See [`crate::kernels::Kernels::gated`].
pub(super) fn gated(cpu: &Cpu, act: Activation, gate: MatRef<'_>, up: MatRef<'_>, y: MatMut<'_>) {
    let inputs = [gate, up];
    match act {
        Activation::Silu => map(cpu, inputs, [y], &Gated(Silu)),
        Activation::Gelu => map(cpu, inputs, [y], &Gated(Gelu)),
        Activation::GeluTanh => map(cpu, inputs, [y], &Gated(GeluTanh)),
        Activation::Relu => map(cpu, inputs, [y], &Gated(Relu)),
    }
}

/// See [`crate::kernels::Kernels::gated_vjp`].
pub(super) fn gated_vjp(
    cpu: &Cpu,
    act: Activation,
    gate: MatRef<'_>,
    up: MatRef<'_>,
    dy: View<'_, f32>,
    dgate: MatMut<'_>,
    dup: MatMut<'_>,
) {
    let (inputs, outputs) = ([gate, up, dy.into()], [dgate, dup]);
    match act {
        Activation::Silu => map(cpu, inputs, outputs, &GatedVjp(Silu)),
        Activation::Gelu => map(cpu, inputs, outputs, &GatedVjp(Gelu)),
        Activation::GeluTanh => map(cpu, inputs, outputs, &GatedVjp(GeluTanh)),
        Activation::Relu => map(cpu, inputs, outputs, &GatedVjp(Relu)),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::cpu::erf::{erf_f64, erfc_f64};
    use half::bf16;

    use super::*;
    use crate::kernels::Kernels;
    use crate::kernels::cpu::Isa;
    use crate::kernels::cpu::checks::*;
    use crate::view::ViewMut;

    const ALL: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

    /// The value in f64.
    fn reference(act: Activation, x: f64) -> f64 {
        match act {
            Activation::Silu => x / (1.0 + (-x).exp()),
            // Either form where it loses nothing.
            Activation::Gelu if x > 0.0 => x * 0.5 * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2)),
            Activation::Gelu => x * 0.5 * erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2),
            Activation::GeluTanh => x / (1.0 + (-1.595_769_121_605_730_8 * x * (1.0 + 0.044_715 * x * x)).exp()),
            Activation::Relu => x.max(0.0),
        }
    }

    /// The slope in f64, by a difference that the exact value's smoothness allows.
    fn slope(act: Activation, x: f64) -> f64 {
        match act {
            Activation::Relu => f64::from(x > 0.0),
            Activation::Silu | Activation::Gelu | Activation::GeluTanh => {
                let step = 1e-4;
                let at = |by: f64| reference(act, x + by * step);
                // Of fourth order: 1e-16 of truncation, 1e-12 of cancellation.
                (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step)
            }
        }
    }

    /// A grid over what activations are, and what is far beyond.
    fn points() -> Vec<f32> {
        let grid = (-4000..=4000).map(|i| i as f32 / 400.0);
        grid.chain([1e-30, -1e-30, -12.5, 30.0, -30.0, 88.0, -88.0, 1e4, -1e4, 0.0, 3e38, -3e38]).collect()
    }

    #[test]
    fn values_are_those_of_f64() {
        let x = points();
        for act in ALL {
            for cpu in cpus() {
                let mut y = vec![f32::NAN; x.len()];
                cpu.activate(act, View::new(&x, 1, x.len()).into(), ViewMut::new(&mut y, 1, x.len()).into());
                for (&x, &y) in x.iter().zip(&y) {
                    let expected = reference(act, f64::from(x));
                    // The exponent of tanh's sigmoid is rounded, which weighs as much as it is large.
                    let x64 = f64::from(x);
                    let inner = x64.abs() * (1.0 + 0.044_715 * x64.powi(2));
                    let inexact = match act {
                        Activation::GeluTanh if x < 0.0 => 1.0 + 0.5 * inner.min(90.0),
                        // So is that of the bell, where multiply-adds round twice.
                        Activation::Gelu if x < 0.0 && cpu.isa() == Isa::Portable => 1.0 + 0.1 * x64.powi(2).min(180.0),
                        _ => 1.0,
                    };
                    let limit = 1e-6 * inexact * expected.abs() + 1e-36 * f64::from(x).abs();
                    assert!((f64::from(y) - expected).abs() <= limit, "{act:?}({x}) = {y}, not {expected} ({cpu:?})");
                }
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes() {
        let x: Vec<f32> = points().into_iter().filter(|x| x.abs() < 1e5 && *x != 0.0).collect();
        let dy = normal("dy", x.len());
        for act in ALL {
            for cpu in cpus() {
                let mut dx = vec![f32::NAN; x.len()];
                let view = View::new(&x, 1, x.len());
                cpu.activate_vjp(
                    act,
                    view.into(),
                    View::new(&dy, 1, x.len()),
                    ViewMut::new(&mut dx, 1, x.len()).into(),
                );
                for ((&x, &dy), &dx) in x.iter().zip(&dy).zip(&dx) {
                    let expected = slope(act, f64::from(x)) * f64::from(dy);
                    // Terms of the slope cancel where it changes its sign.
                    let limit = 2e-6 * (expected.abs() + f64::from(dy).abs());
                    assert!((f64::from(dx) - expected).abs() <= limit, "{act:?}'({x}) {dy} = {dx}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn gates_multiply_and_take_either_type() {
        let (rows, cols, stride) = (5, 39, 90);
        // Gate and up as a fused linear leaves them: halves of one row.
        let both = normal("both", rows * stride);
        let both16 = rounded(&both);
        let both = wide(&both16);
        let dy = normal("dy", rows * cols);
        for act in ALL {
            for cpu in cpus() {
                let fused = View::strided(&both, rows, stride, stride);
                let (gate, up) = (fused.sub_cols(0, cols), fused.sub_cols(45, 45 + cols));
                let fused16 = View::strided(&both16, rows, stride, stride);
                let (gate16, up16) = (fused16.sub_cols(0, cols), fused16.sub_cols(45, 45 + cols));
                let mut y = vec![f32::NAN; rows * cols];
                cpu.gated(act, gate.into(), up.into(), ViewMut::new(&mut y, rows, cols).into());
                let (mut dgate, mut dup) = (y.clone(), y.clone());
                cpu.gated_vjp(
                    act,
                    gate.into(),
                    up.into(),
                    View::new(&dy, rows, cols),
                    ViewMut::new(&mut dgate, rows, cols).into(),
                    ViewMut::new(&mut dup, rows, cols).into(),
                );
                for row in 0..rows {
                    for col in 0..cols {
                        let (at, g, u) = (row * cols + col, f64::from(gate.row(row)[col]), f64::from(up.row(row)[col]));
                        let d = f64::from(dy[at]);
                        assert_within("y", &y[at..=at], &[reference(act, g) * u], 1e-6 * u.abs() * (1.0 + g.abs()));
                        assert_within("dgate", &dgate[at..=at], &[slope(act, g) * u * d], 4e-6 * (u * d).abs());
                        assert_within("dup", &dup[at..=at], &[reference(act, g) * d], 1e-6 * d.abs() * (1.0 + g.abs()));
                    }
                }
                let (mut y16, mut dgate16, mut dup16) =
                    (vec![bf16::NAN; rows * cols], vec![bf16::NAN; rows * cols], vec![bf16::NAN; rows * cols]);
                cpu.gated(act, gate16.into(), up16.into(), ViewMut::new(&mut y16, rows, cols).into());
                cpu.gated_vjp(
                    act,
                    gate16.into(),
                    up.into(),
                    View::new(&dy, rows, cols),
                    ViewMut::new(&mut dgate16, rows, cols).into(),
                    ViewMut::new(&mut dup16, rows, cols).into(),
                );
                assert_eq!((y16, dgate16, dup16), (rounded(&y), rounded(&dgate), rounded(&dup)));
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_and_rows_are_for_themselves() {
        for act in ALL {
            for cpu in cpus() {
                let x: Vec<f32> =
                    (0..3 * 700).map(|i| if i == 1111 { f32::NAN } else { i as f32 / 300.0 - 3.0 }).collect();
                let run = |x: &[f32], rows: usize| {
                    let mut y = vec![0.0; x.len()];
                    let cols = x.len() / rows;
                    cpu.activate(act, View::new(x, rows, cols).into(), ViewMut::new(&mut y, rows, cols).into());
                    y
                };
                let together = run(&x, 3);
                assert_eq!(together.iter().position(|y| y.is_nan()), Some(1111), "{act:?}");
                let alone: Vec<f32> = x.chunks(700).flat_map(|x| run(x, 1)).collect();
                assert_eq!(bits(&together), bits(&alone));
            }
        }
    }
}
