//! The logarithm of the gamma function and its derivative, in differentiable operations: for losses that compare distributions.

use attune_points::Result;
use candle_core::Tensor;

/// How far arguments are moved before the series of large ones is used: from there its four terms are good to 1e-11.
const SHIFT: u32 = 8;

/// `ln Γ(x)` of positive numbers, number by number.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn log_gamma(x: &Tensor) -> Result<Tensor> {
    // Stirling: (z - 1/2) ln z - z + ln(2π)/2 + 1/(12 z) - 1/(360 z³) + 1/(1260 z⁵) - 1/(1680 z⁷).
    let (z, below) = shifted(x, |x| Ok(x.log()?))?;
    let (inverse, square) = (z.recip()?, z.sqr()?.recip()?);
    let series = polynomial(&square, [1.0 / 12.0, -1.0 / 360.0, 1.0 / 1260.0, -1.0 / 1680.0])?;
    let head = (((&z - 0.5)? * z.log()?)? - z)?;
    let constant = 0.5 * (2.0 * std::f64::consts::PI).ln();
    Ok((((head + constant)? + (series * inverse)?)? - below)?)
}

/// The derivative of [`log_gamma`].
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn digamma(x: &Tensor) -> Result<Tensor> {
    // ln z - 1/(2 z) - 1/(12 z²) + 1/(120 z⁴) - 1/(252 z⁶) + 1/(240 z⁸).
    let (z, below) = shifted(x, |x| Ok(x.recip()?))?;
    let (inverse, square) = (z.recip()?, z.sqr()?.recip()?);
    let series = polynomial(&square, [-1.0 / 12.0, 1.0 / 120.0, -1.0 / 252.0, 1.0 / 240.0])?;
    Ok((((z.log()? - (inverse * 0.5)?)? + (series * square)?)? - below)?)
}

/// The argument moved up, and the sum of a function of those that it was moved over.
fn shifted(x: &Tensor, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let mut sum = of(x)?;
    for at in 1..SHIFT {
        sum = (sum + of(&(x + f64::from(at))?)?)?;
    }
    Ok(((x + f64::from(SHIFT))?, sum))
}

fn polynomial(x: &Tensor, of: [f64; 4]) -> Result<Tensor> {
    let [a, b, c, d] = of;
    let inner = ((x * d)? + c)?;
    Ok((((((inner * x)? + b)? * x)?) + a)?)
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;
    use candle_core::Device;

    use super::*;

    fn close(found: &Tensor, expected: &[f64]) {
        for (found, expected) in found.to_vec1::<f64>().unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-10 * (1.0 + expected.abs()), "{found} and {expected}");
        }
    }

    #[test]
    fn they_have_the_values_that_are_known() {
        let x = Tensor::new(&[0.5f64, 1.0, 2.0, 5.0, 0.1, 40.0], &Device::Cpu).unwrap();
        let root_pi = std::f64::consts::PI.sqrt().ln();
        let of_forty: f64 = (1..40).map(|n| f64::from(n).ln()).sum();
        close(&log_gamma(&x).unwrap(), &[root_pi, 0.0, 0.0, 24f64.ln(), 2.252_712_651_734_205_7, of_forty]);
        // Euler's constant, and what one and two steps from it come to.
        let euler = 0.577_215_664_901_532_9;
        let harmonic = |n: u32| (1..n).map(|n| 1.0 / f64::from(n)).sum::<f64>() - euler;
        let half = -euler - 2.0 * 2f64.ln();
        let expected = [half, harmonic(1), harmonic(2), harmonic(5), -10.423_754_940_411_077, harmonic(40)];
        close(&digamma(&x).unwrap(), &expected);
    }

    #[test]
    fn one_is_the_derivative_of_the_other() {
        let x = Tensor::new(&[0.07f64, 0.9, 3.3, 17.0], &Device::Cpu).unwrap();
        let leaf = autograd::leaf(&x).unwrap();
        let made = log_gamma(leaf.as_tensor()).unwrap();
        let ones = made.ones_like().unwrap();
        let slope = autograd::pull(&[&leaf], &[(&made, &ones)]).unwrap().remove(0).unwrap();
        close(&slope, &digamma(&x).unwrap().to_vec1::<f64>().unwrap());
    }
}
