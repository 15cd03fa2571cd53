//! How tests compare numbers: tolerances that follow from the arithmetic, and gradients by central differences.
//!
//! Everything here panics on failure, as assertions do; it is for tests only.

use candle_core::{DType, Result, Tensor};

use crate::autograd;
use crate::rng::Rng;

/// Safety factor over the expected rounding error of a sum of random signs; eight such deviations never happen by chance.
const SAFETY: f64 = 8.0;

/// The distance between a number and the next, relative to it.
///
/// # Panics
/// For a type that does not round.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        other => panic!("{other:?} has no epsilon"),
    }
}

/// `k · eps(dtype) · sqrt(reduction) · max`: how far two computations of the same sum of `reduction` terms may be apart when
/// the largest result is `max`.
pub fn tolerance(dtype: DType, reduction: usize, max: f64) -> f64 {
    SAFETY * epsilon(dtype) * (reduction.max(1) as f64).sqrt() * max
}

/// The first NVIDIA device, if there is one; else the reason is printed, unless `ATTUNE_CUDA` asks for one.
///
/// # Panics
/// If `ATTUNE_CUDA` asks for a device and there is none.
#[cfg(feature = "cuda")]
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
pub fn cuda_device() -> Option<&'static crate::kernels::Cuda> {
    match crate::kernels::cuda(0, crate::kernels::Matmul::Highest) {
        Ok(device) => Some(device),
        Err(fault) => {
            assert!(std::env::var_os("ATTUNE_CUDA").is_none(), "ATTUNE_CUDA asks for a device: {fault}");
            eprintln!("skipped: {fault}");
            None
        }
    }
}

/// The values of a tensor in row-major order.
///
/// # Panics
/// If they cannot be read.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).and_then(|tensor| tensor.flatten_all());
    flat.and_then(|flat| flat.to_vec1()).expect("a tensor in memory can be read")
}

/// The largest absolute difference.
///
/// # Panics
/// If the shapes differ.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    values(a).iter().zip(values(b)).map(|(a, b)| if a.is_nan() != b.is_nan() { f64::NAN } else { (a - b).abs() }).fold(
        0.0,
        |max, d| {
            // A NaN must not be swallowed by `max`.
            if d.is_nan() || max.is_nan() { f64::NAN } else { f64::max(max, d) }
        },
    )
}

/// Asserts that two computations of the same sums of `reduction` terms agree within [`tolerance`] in the coarser dtype.
///
/// # Panics
/// If they do not.
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, reduction: usize) {
    let dtype = if epsilon(found.dtype()) > epsilon(expected.dtype()) { found.dtype() } else { expected.dtype() };
    let max = values(expected).iter().fold(0.0, |max: f64, value| max.max(value.abs()));
    let (limit, difference) = (tolerance(dtype, reduction, max), max_difference(found, expected));
    assert!(difference <= limit, "{what}: difference {difference:e} exceeds {limit:e} (largest value {max:e})");
}

/// Asserts that two tensors have the same bits.
///
/// # Panics
/// If they do not.
pub fn assert_same_bits(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()), "{what}: shape or dtype differs");
    let differing = values(found).iter().zip(values(expected)).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differing, None, "{what}: bits differ first at this flat index");
}

/// The gradient of `loss` by each value of `at`, by central differences; `loss` is called twice a value.
///
/// # Panics
/// If `at` is not in f64 or `loss` fails.
pub fn numeric_gradient(at: &Tensor, loss: impl Fn(&Tensor) -> Result<f64>) -> Tensor {
    assert_eq!(at.dtype(), DType::F64, "central differences need f64");
    let start = values(at);
    let shifted = |index: usize, by: f64| {
        let mut values = start.clone();
        values[index] += by;
        let tensor = Tensor::from_vec(values, at.dims(), at.device());
        tensor.and_then(|tensor| loss(&tensor)).expect("the function is defined around the point")
    };
    let gradient: Vec<f64> = (0..start.len())
        .map(|index| {
            let step = DIFFERENCE * start[index].abs().max(1.0);
            (shifted(index, step) - shifted(index, -step)) / (2.0 * step)
        })
        .collect();
    Tensor::from_vec(gradient, at.dims(), at.device()).expect("as many values as before")
}

/// The step at which truncation (step²) and cancellation (eps / step) balance in f64.
const DIFFERENCE: f64 = 6e-6;

/// How far a gradient by central differences is from the true one, relative to the largest value: about step² + eps/step,
/// times what a third derivative may reach in a test.
pub const GRADIENT_TOLERANCE: f64 = 1e-7;

/// Asserts that the gradients of `f` by all its inputs (f64), pulled back from a random gradient of its output, are those by
/// central differences.
///
/// # Panics
/// If they are not, or an input is not connected to the output.
pub fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let leaves: Vec<_> = inputs.iter().map(|input| autograd::leaf(input).expect("a tensor can be copied")).collect();
    let tracked: Vec<Tensor> = leaves.iter().map(|leaf| leaf.as_tensor().clone()).collect();
    let y = f(&tracked).expect("the function is defined at the point");
    let dy = Rng::new(99, "cotangent").normal_tensor(y.shape().clone(), 1.0, DType::F64).expect("f64 is a float type");
    let gradients =
        autograd::pull(&leaves.iter().collect::<Vec<_>>(), &[(&y, &dy)]).expect("every operation has a backward");
    for (index, gradient) in gradients.into_iter().enumerate() {
        let gradient = gradient.unwrap_or_else(|| panic!("input {index} is not connected to the output"));
        let numeric = numeric_gradient(&inputs[index], |moved| {
            let mut inputs = inputs.to_vec();
            inputs[index] = moved.clone();
            (f(&inputs)? * &dy)?.sum_all()?.to_scalar::<f64>()
        });
        assert_gradient(&format!("input {index}"), &gradient, &numeric);
    }
}

/// Asserts that a gradient is that by central differences.
///
/// # Panics
/// If it is not.
pub fn assert_gradient(what: &str, found: &Tensor, numeric: &Tensor) {
    let max = values(numeric).iter().fold(1.0, |max: f64, value| max.max(value.abs()));
    let difference = max_difference(found, numeric);
    let limit = GRADIENT_TOLERANCE * max;
    assert!(
        difference <= limit,
        "{what}: gradient differs from central differences by {difference:e}, limit {limit:e}"
    );
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use candle_core::Device;

    use super::*;

    #[test]
    fn a_wrong_gradient_is_found() {
        let wrong = |x: &Tensor| -> Result<Tensor> { x.sqr()? + x.detach() };
        let x = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| check_gradients(std::slice::from_ref(&x), |v| wrong(&v[0]))));
        assert!(caught.is_err());
        check_gradients(&[x], |v| v[0].sqr());
    }

    #[test]
    fn a_number_that_is_none_is_never_close() {
        let (a, b) =
            (Tensor::new(&[1f32, f32::NAN], &Device::Cpu).unwrap(), Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap());
        assert!(catch_unwind(AssertUnwindSafe(|| assert_close("x", &a, &b, 1))).is_err());
        assert_close("x", &b, &b, 1);
    }
}
