//! Rotary positions.

use super::Cpu;
use crate::view::{View, ViewMut};

/// Turns the pairs (i, i + W/2) of each head by the row's angles, or back.
pub(super) fn rope(
    _: &Cpu,
    mut x: ViewMut<'_, f32>,
    head_dim: usize,
    cos: View<'_, f32>,
    sin: View<'_, f32>,
    inverse: bool,
) {
    let half = head_dim / 2;
    assert!(x.cols().is_multiple_of(head_dim), "rows of {} in heads of {head_dim}", x.cols());
    assert_eq!((cos.rows(), cos.cols()), (x.rows(), half), "angles do not fit");
    assert_eq!((sin.rows(), sin.cols()), (x.rows(), half), "angles do not fit");
    for row in 0..x.rows() {
        let (cos, sin) = (cos.row(row), sin.row(row));
        for head in x.row(row).chunks_exact_mut(head_dim) {
            let (left, right) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (left[i], right[i]);
                let sin = if inverse { -sin[i] } else { sin[i] };
                left[i] = a * cos[i] - b * sin;
                right[i] = b * cos[i] + a * sin;
            }
        }
    }
}
