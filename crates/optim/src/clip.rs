//! Clipping by the norm of the whole gradient.

/// The sum of the squares of a tensor, in f64 in the order of its entries.
pub fn square(gradient: &[f32]) -> f64 {
    gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum()
}

/// The Euclidean norm of several tensors taken as one vector, by the sums of their squares, added in the order given.
pub fn norm(squares: impl IntoIterator<Item = f64>) -> f64 {
    squares.into_iter().sum::<f64>().sqrt()
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
        assert_eq!(norm([square(&[3.0, 0.0]), square(&[4.0])]), 5.0);
        assert_eq!(norm([]), 0.0);
        assert_eq!(factor(0.5, Some(1.0)), 1.0);
        assert!((f64::from(factor(5.0, Some(1.0))) * 5.0 - 1.0).abs() < 1e-5);
        assert_eq!(factor(5.0, None), 1.0);
    }
}
