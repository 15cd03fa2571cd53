//! Clipping by the norm of the whole gradient.

/// The Euclidean norm of several slices taken as one vector, summed in f64 in the order given.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    let square = |gradient: &[f32]| gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    gradients.into_iter().map(square).sum::<f64>().sqrt()
}

/// The factor that brings a gradient of `norm` down to `limit`: `min(1, limit / (norm + 1e-6))`, as
/// `torch.nn.utils.clip_grad_norm_` has it. The small number keeps the factor finite at a norm of 0.
pub fn factor(norm: f64, limit: Option<f64>) -> f32 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_that_of_one_vector_and_the_factor_never_grows_it() {
        assert_eq!(norm([&[3.0f32, 0.0][..], &[4.0][..]]), 5.0);
        assert_eq!(norm([]), 0.0);
        assert_eq!(factor(0.5, Some(1.0)), 1.0);
        assert!((f64::from(factor(5.0, Some(1.0))) * 5.0 - 1.0).abs() < 1e-5);
        assert_eq!(factor(5.0, None), 1.0);
    }
}
