//! Attention within documents.

use std::ops::Range;

use super::copy::{read, write};
use super::{Attention, Cpu};
use crate::kernels::Mask;
use crate::view::{MatMut, MatRef, View, ViewMut};

impl Attention<'_> {
    /// The rows that a row of a document attends to.
    fn keys(&self, doc: &Range<usize>, row: usize) -> Range<usize> {
        match self.mask {
            Mask::Bidirectional => doc.clone(),
            Mask::Causal { window } => doc.start.max((row + 1).saturating_sub(window.unwrap_or(usize::MAX)))..row + 1,
        }
    }

    /// Columns of a query head, and of the key head that it reads.
    fn columns(&self, head: usize) -> (Range<usize>, Range<usize>) {
        let (w, key_head) = (self.head_dim, head / (self.heads / self.kv_heads));
        (head * w..(head + 1) * w, key_head * w..(key_head + 1) * w)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// All rows in f32.
fn wide(mat: &MatRef<'_>) -> Vec<f32> {
    let mut out = vec![0.0; mat.rows() * mat.cols()];
    for row in 0..mat.rows() {
        read(mat, row, &mut out[row * mat.cols()..][..mat.cols()]);
    }
    out
}

/// See [`crate::kernels::Kernels::attention`]. Rows of no document get zeros and a sum of nothing.
pub(super) fn attention(
    _: &Cpu,
    how: &Attention<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    mut o: MatMut<'_>,
    lse_th: &mut [f32],
) {
    let (rows, width, kv_width) = (q.rows(), how.heads * how.head_dim, how.kv_heads * how.head_dim);
    assert_eq!((q.cols(), k.cols(), v.cols(), o.cols()), (width, kv_width, kv_width, width), "widths do not fit");
    assert_eq!((k.rows(), v.rows(), o.rows(), lse_th.len()), (rows, rows, rows, rows * how.heads), "rows do not fit");
    let (q, k, v) = (wide(&q), wide(&k), wide(&v));
    let mut out = vec![0.0; rows * width];
    lse_th.fill(f32::NEG_INFINITY);
    for doc in how.docs {
        for row in doc.clone() {
            for head in 0..how.heads {
                let (cols, kv_cols) = how.columns(head);
                let keys = how.keys(doc, row);
                let q = &q[row * width..][cols.clone()];
                let key = |at: usize| &k[at * kv_width..][kv_cols.clone()];
                let mut p: Vec<f32> = keys.clone().map(|at| how.scale * dot(q, key(at))).collect();
                let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                p.iter_mut().for_each(|p| *p = (*p - max).exp());
                let sum: f32 = p.iter().sum();
                lse_th[row * how.heads + head] = max + sum.ln();
                let out = &mut out[row * width..][cols];
                for (at, p) in keys.zip(p) {
                    out.iter_mut().zip(&v[at * kv_width..][kv_cols.clone()]).for_each(|(o, v)| *o += p / sum * v);
                }
            }
        }
    }
    for row in 0..rows {
        write(&mut o, row, &out[row * width..][..width]);
    }
}

/// See [`crate::kernels::Kernels::attention_vjp`].
#[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
pub(super) fn attention_vjp(
    _: &Cpu,
    how: &Attention<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    o: MatRef<'_>,
    lse_th: &[f32],
    d_o: View<'_, f32>,
    dlse_th: Option<&[f32]>,
    mut dq: ViewMut<'_, f32>,
    mut dk: ViewMut<'_, f32>,
    mut dv: ViewMut<'_, f32>,
) {
    let (rows, width, kv_width) = (q.rows(), how.heads * how.head_dim, how.kv_heads * how.head_dim);
    assert_eq!((q.cols(), o.cols(), d_o.cols(), dq.cols()), (width, width, width, width), "widths do not fit");
    assert_eq!(
        (k.cols(), v.cols(), dk.cols(), dv.cols()),
        (kv_width, kv_width, kv_width, kv_width),
        "widths do not fit"
    );
    assert_eq!(
        (o.rows(), d_o.rows(), dq.rows(), lse_th.len()),
        (rows, rows, rows, rows * how.heads),
        "rows do not fit"
    );
    assert_eq!((k.rows(), v.rows(), dk.rows(), dv.rows()), (rows, rows, rows, rows), "rows do not fit");
    let (q, k, v, o) = (wide(&q), wide(&k), wide(&v), wide(&o));
    for row in 0..rows {
        dq.row(row).fill(0.0);
        dk.row(row).fill(0.0);
        dv.row(row).fill(0.0);
    }
    for doc in how.docs {
        for row in doc.clone() {
            for head in 0..how.heads {
                let (cols, kv_cols) = how.columns(head);
                let (q, d_o) = (&q[row * width..][cols.clone()], &d_o.row(row)[cols.clone()]);
                let at_head = row * how.heads + head;
                let shift = dlse_th.map_or(0.0, |dlse| dlse[at_head]) - dot(d_o, &o[row * width..][cols.clone()]);
                for at in how.keys(doc, row) {
                    let (k, v) = (&k[at * kv_width..][kv_cols.clone()], &v[at * kv_width..][kv_cols.clone()]);
                    let p = (how.scale * dot(q, k) - lse_th[at_head]).exp();
                    let ds = p * (dot(d_o, v) + shift) * how.scale;
                    dq.row(row)[cols.clone()].iter_mut().zip(k).for_each(|(dq, k)| *dq += ds * k);
                    dk.row(at)[kv_cols.clone()].iter_mut().zip(q).for_each(|(dk, q)| *dk += ds * q);
                    dv.row(at)[kv_cols.clone()].iter_mut().zip(d_o).for_each(|(dv, d_o)| *dv += p * d_o);
                }
            }
        }
    }
}
