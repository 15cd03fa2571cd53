//! The functions between the linears of an MLP.

use candle_core::cpu::erf::erf_f64;

use super::copy::{read, write};
use super::{Activation, Cpu};
use crate::view::{MatMut, MatRef, View};

/// The value and the derivative.
fn at(act: Activation, x: f32) -> (f32, f32) {
    match act {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::Gelu => {
            let x = f64::from(x);
            let cdf = 0.5 * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            ((x * cdf) as f32, (cdf + x * density) as f32)
        }
        Activation::GeluTanh => {
            let c = (2.0 / std::f32::consts::PI).sqrt();
            let t = (c * (x + 0.044_715 * x * x * x)).tanh();
            let dt = (1.0 - t * t) * c * (1.0 + 3.0 * 0.044_715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * dt)
        }
        // NaN stays NaN.
        Activation::Relu => (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 }),
    }
}

/// `y = act(gate) · up`.
pub(super) fn gated(_: &Cpu, act: Activation, gate: MatRef<'_>, up: MatRef<'_>, mut y: MatMut<'_>) {
    let shape = (gate.rows(), gate.cols());
    assert_eq!(shape, (up.rows(), up.cols()), "shapes differ");
    assert_eq!(shape, (y.rows(), y.cols()), "shapes differ");
    let (mut g, mut u) = (vec![0.0; shape.1], vec![0.0; shape.1]);
    for row in 0..shape.0 {
        read(&gate, row, &mut g);
        read(&up, row, &mut u);
        u.iter_mut().zip(&g).for_each(|(u, &g)| *u *= at(act, g).0);
        write(&mut y, row, &u);
    }
}

/// `dgate = dy · up · act'(gate)`, `dup = dy · act(gate)`.
pub(super) fn gated_vjp(
    _: &Cpu,
    act: Activation,
    gate: MatRef<'_>,
    up: MatRef<'_>,
    dy: View<'_, f32>,
    mut dgate: MatMut<'_>,
    mut dup: MatMut<'_>,
) {
    let shape = (gate.rows(), gate.cols());
    for other in
        [(up.rows(), up.cols()), (dy.rows(), dy.cols()), (dgate.rows(), dgate.cols()), (dup.rows(), dup.cols())]
    {
        assert_eq!(shape, other, "shapes differ");
    }
    let (mut g, mut u) = (vec![0.0; shape.1], vec![0.0; shape.1]);
    for row in 0..shape.0 {
        read(&gate, row, &mut g);
        read(&up, row, &mut u);
        for ((g, u), dy) in g.iter_mut().zip(&mut u).zip(dy.row(row)) {
            let (value, slope) = at(act, *g);
            (*g, *u) = (dy * *u * slope, dy * value);
        }
        write(&mut dgate, row, &g);
        write(&mut dup, row, &u);
    }
}

/// `y = act(x)`.
pub(super) fn activate(_: &Cpu, act: Activation, x: MatRef<'_>, mut y: MatMut<'_>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shapes differ");
    let mut wide = vec![0.0; x.cols()];
    for row in 0..x.rows() {
        read(&x, row, &mut wide);
        wide.iter_mut().for_each(|x| *x = at(act, *x).0);
        write(&mut y, row, &wide);
    }
}

/// `dx = dy · act'(x)`.
pub(super) fn activate_vjp(_: &Cpu, act: Activation, x: MatRef<'_>, dy: View<'_, f32>, mut dx: MatMut<'_>) {
    assert_eq!((x.rows(), x.cols()), (dy.rows(), dy.cols()), "shapes differ");
    assert_eq!((x.rows(), x.cols()), (dx.rows(), dx.cols()), "shapes differ");
    let mut wide = vec![0.0; x.cols()];
    for row in 0..x.rows() {
        read(&x, row, &mut wide);
        wide.iter_mut().zip(dy.row(row)).for_each(|(x, dy)| *x = dy * at(act, *x).1);
        write(&mut dx, row, &wide);
    }
}
