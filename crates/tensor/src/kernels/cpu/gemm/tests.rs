//! Products held to f64, and to themselves: other neighbours, other blocks, other numbers of threads.

use half::bf16;
use proptest::prelude::*;

use super::{Cpu, Isa, gemm, product};
use crate::kernels::{Gemm, LowRank, Matmul, Operand, Right};
use crate::quantized::QuantizedRef;
use crate::quantized::tests::Bytes;
use crate::view::{MatRef, View, ViewMut};

/// Numbers in both types; the rows of both lie further apart than they are long.
#[derive(Clone, Debug)]
struct Stored {
    rows: usize,
    cols: usize,
    stride: usize,
    wide: Vec<f32>,
    narrow: Vec<bf16>,
    is_narrow: bool,
}

impl Stored {
    fn new((rows, cols): (usize, usize), gap: usize, is_narrow: bool, seed: u64) -> Self {
        let stride = cols + gap;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let narrow: Vec<_> = (0..rows * stride).map(|_| bf16::from_f32(next())).collect();
        let wide = narrow.iter().map(|x| if is_narrow { x.to_f32() } else { x.to_f32() + next() * 1e-3 }).collect();
        Self { rows, cols, stride, wide, narrow, is_narrow }
    }

    fn mat(&self) -> MatRef<'_> {
        if self.is_narrow {
            View::strided(&self.narrow, self.rows, self.cols, self.stride).into()
        } else {
            View::strided(&self.wide, self.rows, self.cols, self.stride).into()
        }
    }
}

/// A factor, stored as it is or transposed.
fn factor((rows, cols): (usize, usize), transposed: bool, gap: usize, is_narrow: bool, seed: u64) -> (Stored, bool) {
    (Stored::new(if transposed { (cols, rows) } else { (rows, cols) }, gap, is_narrow, seed), transposed)
}

fn operand((stored, transposed): &(Stored, bool)) -> Operand<'_> {
    Operand { mat: stored.mat(), transposed: *transposed }
}

fn at((stored, transposed): &(Stored, bool), row: usize, col: usize) -> f64 {
    let (row, col) = if *transposed { (col, row) } else { (row, col) };
    f64::from(stored.wide[row * stored.stride + col])
}

/// The rows of a low-rank term and its factors, each with whether it is transposed.
type Term = (std::ops::Range<usize>, (Stored, bool), (Stored, bool));

/// A product with all that can be added to it.
#[derive(Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: (Stored, bool),
    b: (Stored, bool),
    /// Rows, `[rows, r]` and `[r, n]`.
    terms: Vec<Term>,
    bias: Option<Vec<f32>>,
    before: Option<Stored>,
}

impl Case {
    /// What is varied by `seed` alone: types, orders, gaps, terms.
    fn new([m, n, k]: [usize; 3], seed: u64) -> Self {
        let bit = |i: u32| seed >> i & 1 == 1;
        let gap = |i: u32| (seed >> i & 3) as usize;
        let a = factor((m, k), bit(0), gap(4), bit(1), seed ^ 1);
        let b = factor((k, n), bit(2), gap(6), bit(3), seed ^ 2);
        let mut terms = Vec::new();
        let mut start = gap(8);
        while bit(10) && start <= m {
            let end = (start + 1 + (seed >> 11) as usize % 13).min(m);
            let r = [0, 1, 5, 16, 19][(seed as usize + terms.len()) % 5];
            let left = factor((end - start, r), false, gap(16), bit(18), seed ^ 3 ^ (start as u64) << 32);
            let right = factor((r, n), bit(19), gap(20), bit(22), seed ^ 4 ^ (start as u64) << 32);
            terms.push((start..end, left, right));
            start = end + 1 + gap(23);
        }
        let bias = bit(25).then(|| Stored::new((1, n), 0, false, seed ^ 5).wide);
        let before = bit(26).then(|| Stored::new((m, n), 0, false, seed ^ 6));
        Self { m, n, k, a, b, terms, bias, before }
    }

    /// Rows `start..end` of the result.
    fn rows(&self, cpu: &Cpu, rows: std::ops::Range<usize>, pairs: bool) -> Vec<f32> {
        let gap = 3;
        let (m, stride) = (rows.len(), self.n + gap);
        let mut c = vec![-7.0; m * stride];
        if let Some(before) = &self.before {
            for (i, c) in c.chunks_exact_mut(stride).enumerate() {
                c[..self.n].copy_from_slice(&before.wide[(rows.start + i) * self.n..][..self.n]);
            }
        }
        let mut a = operand(&self.a);
        a.mat = if a.transposed { a.mat.sub_cols(rows.start, rows.end) } else { a.mat.sub_rows(rows.start, rows.end) };
        let terms: Vec<_> = self
            .terms
            .iter()
            .filter_map(|(of, left, right)| {
                let (start, end) = (of.start.max(rows.start), of.end.min(rows.end));
                (start < end).then(|| LowRank {
                    rows: start - rows.start..end - rows.start,
                    left: left.0.mat().sub_rows(start - of.start, end - of.start),
                    right: operand(right),
                })
            })
            .collect();
        let of = Gemm {
            low_rank: &terms,
            bias: self.bias.as_deref(),
            accumulate: self.before.is_some(),
            ..Gemm::new(a, operand(&self.b))
        };
        product(cpu, ViewMut::strided(&mut c, m, self.n, stride), &of, pairs);
        for c in c.chunks_exact(stride) {
            assert_eq!(c[self.n..], [-7.0; 3], "what is between rows stays");
        }
        c.chunks_exact(stride).flat_map(|c| &c[..self.n]).copied().collect()
    }

    fn all(&self, cpu: &Cpu, pairs: bool) -> Vec<f32> {
        self.rows(cpu, 0..self.m, pairs)
    }

    /// Both types of pairs where they apply; tests compute them with each instruction set.
    fn modes(&self) -> &'static [bool] {
        if self.a.0.is_narrow && self.b.0.is_narrow { &[false, true] } else { &[false] }
    }

    /// Each number against f64: its error is at most that of as many roundings as it has terms, of the sum of magnitudes, and of what
    /// two parts of a number leave out.
    fn check(&self, cpu: &Cpu) {
        for &pairs in self.modes() {
            let c = self.all(cpu, pairs);
            for (at_c, &c) in c.iter().enumerate() {
                let (i, j) = (at_c / self.n, at_c % self.n);
                let mut terms: Vec<f64> = (0..self.k).map(|p| at(&self.a, i, p) * at(&self.b, p, j)).collect();
                for (rows, left, right) in self.terms.iter().filter(|(rows, ..)| rows.contains(&i)) {
                    terms.extend((0..left.0.cols).map(|r| at(left, i - rows.start, r) * at(right, r, j)));
                }
                terms.extend(self.bias.as_ref().map(|bias| f64::from(bias[j])));
                terms.extend(self.before.as_ref().map(|before| f64::from(before.wide[at_c])));
                let (sum, size) = terms.iter().fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                // Twice, for processors that round a product before they add it.
                let left_out = if cpu.matmul == Matmul::High { f64::from(f32::EPSILON) * 256.0 } else { 0.0 };
                let tolerance = (2.0 * (terms.len() + 2) as f64 * f64::from(f32::EPSILON) + left_out) * size;
                let error = (f64::from(c) - sum).abs();
                assert!(error <= tolerance, "({i}, {j}) is {c}, not {sum}: {:?}, pairs {pairs}, {self:?}", cpu.isa());
            }
        }
    }
}

fn each_isa(run: impl Fn(&Cpu)) {
    for isa in Isa::ALL {
        match Cpu::with(isa) {
            Some(cpu) => {
                run(&cpu);
                let parts = cpu.multiplying(Matmul::High);
                if parts.matmul == Matmul::High {
                    run(&parts);
                }
            }
            None => println!("skipped: the processor has no {}", isa.name()),
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_those_of_f64(m in 0usize..50, n in 0usize..75, k in 0usize..60, seed: u64) {
        each_isa(|cpu| Case::new([m, n, k], seed).check(cpu));
    }

    #[test]
    fn a_row_is_what_it_is_alone(m in 1usize..40, n in 1usize..75, k in 0usize..60, seed: u64, cut in 0usize..40) {
        let case = Case::new([m, n, k], seed);
        each_isa(|cpu| {
            for &pairs in case.modes() {
                let all = case.all(cpu, pairs);
                for row in 0..m {
                    let alone = case.rows(cpu, row..row + 1, pairs);
                    assert_eq!(bits(&all[row * n..][..n]), bits(&alone), "row {row}, pairs {pairs}, {case:?}");
                }
                let cut = cut.min(m);
                let parts = [case.rows(cpu, 0..cut, pairs), case.rows(cpu, cut..m, pairs)].concat();
                assert_eq!(bits(&all), bits(&parts), "cut at {cut}");
            }
        });
    }
}

/// Where results are thinner than they are high, the factors change places: their rows must not tell.
#[test]
fn a_row_of_a_thin_result_is_what_it_is_alone() {
    for [m, n] in [[37, 33], [70, 33], [130, 64], [66, 32], [40, 1]] {
        for order in 0..16 {
            let case = Case::new([m, n, 70], order);
            each_isa(|cpu| {
                for &pairs in case.modes() {
                    let all = case.all(cpu, pairs);
                    for row in [0, m / 2, m - 1] {
                        let alone = case.rows(cpu, row..row + 1, pairs);
                        assert_eq!(bits(&all[row * n..][..n]), bits(&alone), "[{m}, {n}], row {row}, order {order}");
                    }
                }
            });
        }
    }
}

/// Shapes with several stretches, blocks and tasks: every order of the factors, thin ones among them.
const LARGE: [[usize; 3]; 8] = [
    [200, 300, 600],
    [130, 700, 257],
    [700, 16, 600],
    [16, 700, 520],
    [1, 2000, 513],
    [333, 8, 1025],
    [100, 100, 1024],
    [513, 33, 128],
];

#[test]
fn large_products_are_those_of_f64() {
    for (i, shape) in LARGE.into_iter().enumerate() {
        for order in 0..16 {
            // All types and orders of both factors; the other properties in turn.
            let seed = order | (i as u64 * 16 + order).wrapping_mul(0x1234_5670) << 4;
            each_isa(|cpu| {
                if cpu.isa() != Isa::Portable || order % 5 == 0 {
                    Case::new(shape, seed).check(cpu);
                }
            });
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let pools: Vec<_> = [1, 2, 4]
        .map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads can be started"))
        .into();
    for (i, shape) in LARGE.into_iter().enumerate() {
        for order in 0..16 {
            let case = Case::new(shape, order | (i as u64 * 16 + order).wrapping_mul(0x7654_3210) << 4);
            each_isa(|cpu| {
                if cpu.isa() == Isa::Portable && order % 5 != 0 {
                    return;
                }
                let results: Vec<_> = pools.iter().map(|pool| pool.install(|| case.all(cpu, false))).collect();
                assert!(results.iter().all(|result| bits(result) == bits(&results[0])), "{shape:?}, order {order}");
                let row = case.m / 2;
                assert_eq!(bits(&results[0][row * case.n..][..case.n]), bits(&case.rows(cpu, row..row + 1, false)));
            });
        }
    }
}

/// A right factor in few bits: every order, both types, and each unit that is multiplied at a time.
#[test]
fn few_bits_multiply_as_their_numbers_do() {
    let pools: Vec<_> =
        [1, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads can be started")).into();
    for (i, [m, n, k]) in LARGE.into_iter().chain([[5, 40, 7], [0, 3, 4], [33, 70, 0]]).enumerate() {
        for order in 0..8u64 {
            let (transposed, narrow, left) = (order & 1 == 1, order & 2 == 2, order & 4 == 4);
            let shape = if transposed { (n, k) } else { (k, n) };
            let few = Bytes::new(shape, i as u64 + 7);
            let few = QuantizedRef::new(&few, narrow);
            let mut wide = vec![0.0f32; n * k];
            let mut short = vec![bf16::ZERO; n * k];
            few.widen(0..shape.0, 0..shape.1, &mut wide);
            few.widen_narrow(0..shape.0, 0..shape.1, &mut short);
            let dense: MatRef<'_> = if narrow {
                View::new(&short, shape.0, shape.1).into()
            } else {
                View::new(&wide, shape.0, shape.1).into()
            };
            let a = factor((m, k), left, 2, narrow, i as u64 + 3);
            let bias = Stored::new((1, n), 0, false, 9).wide;
            each_isa(|cpu| {
                if cpu.isa() == Isa::Portable && order % 5 != 0 {
                    return;
                }
                let run = |b: Right<'_>| {
                    let mut c = vec![0.5f32; m * n];
                    let of = Gemm { bias: Some(&bias), accumulate: true, ..Gemm::new(operand(&a), b) };
                    gemm(cpu, ViewMut::new(&mut c, m, n), &of);
                    bits(&c)
                };
                let expected = run(Operand { mat: dense, transposed }.into());
                for pool in &pools {
                    let found = pool.install(|| run(Right::Quantized { mat: few, transposed }));
                    assert!(found == expected, "[{m}, {n}, {k}], order {order}, {:?}", cpu.isa());
                }
            });
        }
    }
}

#[test]
fn what_is_not_a_number_spreads_to_its_row_and_column_only() {
    for special in [f32::NAN, f32::INFINITY] {
        each_isa(|cpu| {
            let (m, n, k) = (15, 40, 300);
            let (mut a, b) = (vec![1.0; m * k], vec![0.5; k * n]);
            a[7 * k + 299] = special;
            let mut c = vec![0.0; m * n];
            let of = Gemm::new(Operand::plain(View::new(&a, m, k)), Operand::plain(View::new(&b, k, n)));
            gemm(cpu, ViewMut::new(&mut c, m, n), &of);
            for (row, c) in c.chunks_exact(n).enumerate() {
                let expected = if row == 7 { special } else { 150.0 };
                // An infinity has no second part.
                let is_nan = expected.is_nan() || (cpu.matmul == Matmul::High && expected.is_infinite());
                assert!(c.iter().all(|c| *c == expected || (c.is_nan() && is_nan)), "row {row}");
            }
        });
    }
}

#[test]
fn nothing_times_nothing_is_the_bias() {
    each_isa(|cpu| {
        let bias = [1.0, 2.0, 3.0];
        let mut c = vec![9.0; 6];
        let mut of = Gemm::new(Operand::plain(View::new(&[0.0; 0], 2, 0)), Operand::plain(View::new(&[0.0; 0], 0, 3)));
        gemm(cpu, ViewMut::new(&mut c, 2, 3), &of);
        assert_eq!(c, [0.0; 6]);
        of.bias = Some(&bias);
        of.accumulate = true;
        gemm(cpu, ViewMut::new(&mut c, 2, 3), &of);
        assert_eq!(c, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        gemm(
            cpu,
            ViewMut::new(&mut [], 0, 3),
            &Gemm::new(Operand::plain(View::new(&[0.0; 0], 0, 4)), Operand::plain(View::new(&[0.0; 12], 4, 3))),
        );
    });
}

#[test]
fn products_side_by_side_have_the_bits_that_they_have_alone() {
    let shapes = [(16, 300, 700), (5, 5, 5), (0, 3, 4), (256, 16, 90), (700, 40, 33)];
    let factors: Vec<_> = (0u64..)
        .zip(shapes)
        .map(|(seed, (m, n, k))| {
            (
                factor((m, k), seed % 2 == 0, 3, false, seed + 1),
                factor((k, n), seed % 3 == 0, 0, seed % 2 == 1, seed + 90),
            )
        })
        .collect();
    each_isa(|cpu| {
        let room = || shapes.map(|(m, n, _)| vec![0.5f32; m * n]);
        let (mut alone, mut together) = (room(), room());
        for ((c, (a, b)), (m, n, _)) in alone.iter_mut().zip(&factors).zip(shapes) {
            gemm(cpu, ViewMut::new(c, m, n), &Gemm::new(operand(a), operand(b)));
        }
        let products =
            together.iter_mut().zip(&factors).zip(shapes).map(|((c, (a, b)), (m, n, _))| {
                (ViewMut::new(c.as_mut_slice(), m, n), Gemm::new(operand(a), operand(b)))
            });
        super::gemms(cpu, &mut products.collect::<Vec<_>>());
        assert_eq!(alone, together, "{cpu:?}");
    });
}

/// Two parts of a number are worth more than one, and less than the number: errors of both kinds are told apart.
#[test]
fn parts_are_worth_sixteen_bits() {
    let Some(cpu) = Cpu::with(Isa::Amx).map(|cpu| cpu.multiplying(Matmul::High)) else {
        println!("skipped: the processor has no tiles");
        return;
    };
    let (m, n, k) = (64, 96, 1000);
    let (a, b) = (factor((m, k), false, 0, false, 1), factor((k, n), true, 0, false, 2));
    let error = |cpu: &Cpu| {
        let mut c = vec![0.0; m * n];
        gemm(cpu, ViewMut::new(&mut c, m, n), &Gemm::new(operand(&a), operand(&b)));
        let exact = |at_c: usize| (0..k).map(|p| at(&a, at_c / n, p) * at(&b, p, at_c % n)).sum::<f64>();
        let squares = c.iter().enumerate().map(|(at_c, c)| (f64::from(*c) - exact(at_c)).powi(2));
        (squares.sum::<f64>() / (m * n) as f64).sqrt()
    };
    // Of numbers up to 1 a sum has about a third of a square root of its terms.
    let (size, parts, numbers) = ((k as f64).sqrt() / 3.0, error(&cpu), error(&cpu.multiplying(Matmul::Highest)));
    assert!(parts < size * 2f64.powi(-16) && numbers < parts, "{parts:e} and {numbers:e} of {size}");
}

#[test]
fn without_products_a_result_is_zeros_and_a_sum_stays() {
    use crate::kernels::Kernels as _;

    let kernels = crate::kernels::cpu().without_products().unwrap();
    assert_eq!(kernels.profile(), crate::kernels::cpu().profile());
    let (a, b) = (vec![1.0; 6], vec![1.0; 8]);
    let of = || {
        let mut of = Gemm::new(Operand::plain(View::new(&a, 3, 2)), Operand::plain(View::new(&b, 2, 4)));
        of.bias = Some(&[5.0; 4]);
        of
    };
    let made = |accumulate: bool, at_once: bool| {
        let mut c = vec![7.0; 12];
        let of = Gemm { accumulate, ..of() };
        let c_mn = ViewMut::new(&mut c, 3, 4);
        if at_once {
            kernels.gemms(vec![(c_mn, of)])
        } else {
            kernels.gemm(c_mn, &of)
        }
        c
    };
    for at_once in [false, true] {
        assert_eq!((made(false, at_once), made(true, at_once)), (vec![0.0; 12], vec![7.0; 12]));
    }
}
