//! Every instruction set that the machine has, held to plain arithmetic, lane by lane.

use half::bf16;

use super::math::exp;
use super::{Body, Portable, Simd};

/// Numbers of all magnitudes, and the special ones.
fn samples() -> Vec<f32> {
    let mut xs = vec![0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 3.5, 1e-40, -1e-40, f32::MAX, f32::MIN_POSITIVE];
    xs.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.003_906_3, 1.011_718_8, 3.39e38, 88.0, -103.0]);
    let mut state = 1u32;
    while xs.len() < 160 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let unit = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
        xs.push(unit * [1.0f32, 1e3, 1e-20, 160.0][xs.len() % 4]);
    }
    xs
}

/// Runs the checks with each instruction set.
fn each(body: impl Body<Output = ()> + Copy) {
    Portable.call(body);
    #[cfg(target_arch = "x86_64")]
    {
        match super::Avx2::detect() {
            Some(s) => s.call(body),
            None => println!("skipped: the processor has no AVX2"),
        }
        match super::Avx512::<false>::detect() {
            Some(s) => s.call(body),
            None => println!("skipped: the processor has no AVX-512"),
        }
        match super::Avx512::<true>::detect() {
            Some(s) => s.call(body),
            None => println!("skipped: the processor has no AVX-512 BF16"),
        }
    }
}

fn lanes<S: Simd>(s: S, x: S::F) -> Vec<f32> {
    let mut out = vec![0.0; S::LANES];
    s.store(&mut out, x);
    out
}

/// The same number, or NaN both.
#[track_caller]
fn same(a: f32, b: f32, what: &str) {
    assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{what}: {a:e} is not {b:e}");
}

#[derive(Clone, Copy)]
struct Arithmetic;

impl Body for Arithmetic {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let xs = samples();
        let ys: Vec<f32> = xs.iter().rev().copied().collect();
        for (xs, ys) in xs.chunks_exact(S::LANES).zip(ys.chunks_exact(S::LANES)) {
            let (a, b) = (s.load(xs), s.load(ys));
            let c = s.splat(0.75);
            let pick = |mask| lanes(s, s.select(mask, s.splat(1.0), s.zero()));
            let results = [
                lanes(s, s.add(a, b)),
                lanes(s, s.sub(a, b)),
                lanes(s, s.mul(a, b)),
                lanes(s, s.div(a, b)),
                lanes(s, s.max(a, b)),
                lanes(s, s.min(a, b)),
                lanes(s, s.sqrt(a)),
                lanes(s, s.abs(a)),
                lanes(s, s.round(a)),
                pick(s.lt(a, b)),
                pick(s.le(a, b)),
                lanes(s, s.select(s.lt(a, b), a, b)),
            ];
            let (fused, negated) = (lanes(s, s.fma(a, b, c)), lanes(s, s.fnma(a, b, c)));
            for (i, (&x, &y)) in xs.iter().zip(ys).enumerate() {
                let flag = |is: bool| f32::from(u8::from(is));
                let expected = [
                    x + y,
                    x - y,
                    x * y,
                    x / y,
                    if x > y { x } else { y },
                    if x < y { x } else { y },
                    x.sqrt(),
                    x.abs(),
                    x.round_ties_even(),
                    flag(x < y),
                    flag(x <= y),
                    if x < y { x } else { y },
                ];
                for (which, (result, expected)) in results.iter().zip(expected).enumerate() {
                    same(result[i], expected, &format!("operation {which} of {x:e}, {y:e}"));
                }
                for (result, once, twice) in
                    [(fused[i], x.mul_add(y, 0.75), x * y + 0.75), (negated[i], (-x).mul_add(y, 0.75), 0.75 - x * y)]
                {
                    same(result, if S::LANES == 8 && result == twice { twice } else { once }, "multiply and add");
                }
            }
        }
    }
}

#[test]
fn arithmetic_is_that_of_single_numbers() {
    each(Arithmetic);
}

#[derive(Clone, Copy)]
struct Memory;

impl Body for Memory {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let xs = samples();
        for n in 0..=S::LANES {
            for xs in (0..xs.len() - n).step_by(7).map(|at| &xs[at..at + n]) {
                let narrow: Vec<bf16> = xs.iter().map(|&x| bf16::from_f32(x)).collect();
                let x = s.load_part(xs);
                assert!(lanes(s, x)[n..].iter().all(|x| x.to_bits() == 0), "the rest is zero");
                let mut back = vec![0.0; n];
                s.store_part(&mut back, x);
                let mut rounded = vec![bf16::ONE; n];
                s.store_bf16_part(&mut rounded, x);
                let wide = lanes(s, s.load_bf16_part(&narrow));
                assert!(wide[n..].iter().all(|x| x.to_bits() == 0), "the rest is zero");
                if n == S::LANES {
                    let mut whole = vec![bf16::ONE; n];
                    s.store_bf16(&mut whole, s.load(xs));
                    assert_eq!(whole.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits(&rounded));
                    assert_eq!(bits32(&lanes(s, s.load_bf16(&narrow))), bits32(&wide));
                }
                for i in 0..n {
                    assert_eq!(back[i].to_bits(), xs[i].to_bits());
                    same(rounded[i].to_f32(), narrow[i].to_f32(), &format!("{:e} rounded", xs[i]));
                    same(wide[i], narrow[i].to_f32(), "widened");
                }
            }
        }
        let mut guarded = vec![7.0; S::LANES + 1];
        s.store_part(&mut guarded[..3], s.zero());
        assert_eq!(guarded[3..], vec![7.0; S::LANES - 2]);
    }
}

fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn bits32(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn loads_and_stores_move_what_they_say() {
    each(Memory);
}

#[derive(Clone, Copy)]
struct Across;

impl Body for Across {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let xs: Vec<f32> = samples().into_iter().filter(|x| x.abs() < 1e4).collect();
        for xs in xs.chunks_exact(S::LANES) {
            let mut sum = xs.to_vec();
            while sum.len() > 1 {
                let (low, high) = sum.split_at(sum.len() / 2);
                sum = low.iter().zip(high).map(|(a, b)| a + b).collect();
            }
            same(s.reduce_add(s.load(xs)), sum[0], "sum");
            let largest = xs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(s.reduce_max(s.load(xs)), largest);
        }
        let matrix: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
        let mut turned = vec![0.0; matrix.len()];
        s.transpose(|i| s.load(&matrix[i * S::LANES..]), |j, x| s.store(&mut turned[j * S::LANES..], x));
        for (at, x) in turned.into_iter().enumerate() {
            assert_eq!(x, matrix[at % S::LANES * S::LANES + at / S::LANES]);
        }
        let wide = |at: usize| -> Vec<f32> { (0..S::LANES).map(|i| (i * at) as f32 - 3.0).collect() };
        let (even, odd) = (wide(1), wide(2));
        let pairs = s.pair(s.load(&even), s.load(&odd));
        assert_eq!((lanes(s, s.even(pairs)), lanes(s, s.odd(pairs))), (even.clone(), odd.clone()));
        let dot = lanes(s, s.dot_pairs(pairs, pairs, s.splat(0.5)));
        for i in 0..S::LANES {
            assert_eq!(dot[i], 0.5 + even[i] * even[i] + odd[i] * odd[i]);
        }
    }
}

#[test]
fn operations_across_lanes_follow_their_order() {
    each(Across);
}

#[derive(Clone, Copy)]
struct Exponential;

impl Body for Exponential {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let mut worst = 0f64;
        for step in 0..(194_700 / S::LANES) {
            let xs: Vec<f32> = (0..S::LANES).map(|i| -106.0 + (step * S::LANES + i) as f32 * 1e-3).collect();
            for (&x, y) in xs.iter().zip(lanes(s, exp(s, s.load(&xs)))) {
                let exact = f64::from(x).exp();
                // Below the normal range the distance between numbers no longer shrinks.
                let unit = (exact * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
                worst = worst.max((f64::from(y) - exact).abs() / unit);
            }
        }
        assert!(worst < 2.0, "{worst} units in the last place");
        let x = [f32::NEG_INFINITY, -200.0, 0.0, 88.8, 1e30, f32::INFINITY, f32::NAN, -0.0];
        let y = lanes(s, exp(s, s.load(&[x, x].concat())));
        assert_eq!(y[..6], [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
        assert!(y[6].is_nan() && y[7] == 1.0);
    }
}

#[test]
fn the_exponential_is_close_everywhere() {
    each(Exponential);
}
