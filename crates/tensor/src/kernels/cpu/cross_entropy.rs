//! Negative log-likelihoods of labels, and the gradient by the logits in their place.

use half::bf16;

use super::Cpu;
use crate::view::ViewMut;

/// See [`crate::kernels::Kernels::cross_entropy`].
pub(super) fn cross_entropy(
    _: &Cpu,
    mut logits_cv: ViewMut<'_, f32>,
    labels_c: &[u32],
    weight_c: Option<&[f32]>,
    mut rounded: Option<ViewMut<'_, bf16>>,
    nll_c: &mut [f32],
) {
    assert_eq!((logits_cv.rows(), logits_cv.rows()), (labels_c.len(), nll_c.len()), "rows and labels differ");
    assert!(weight_c.is_none_or(|weight| weight.len() == labels_c.len()), "rows and weights differ");
    if let Some(rounded) = &rounded {
        assert_eq!((rounded.rows(), rounded.cols()), (logits_cv.rows(), logits_cv.cols()), "shapes differ");
    }
    for (row, &label) in labels_c.iter().enumerate() {
        let logits = logits_cv.row(row);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = logits.iter().map(|x| (x - max).exp()).sum();
        nll_c[row] = max + sum.ln() - logits[label as usize];
        let Some(weight) = weight_c.map(|weight| weight[row]) else { continue };
        for x in logits.iter_mut() {
            *x = weight * ((*x - max).exp() / sum);
        }
        logits[label as usize] -= weight;
        if let Some(rounded) = &mut rounded {
            rounded.row(row).iter_mut().zip(&*logits).for_each(|(to, from)| *to = bf16::from_f32(*from));
        }
    }
}
