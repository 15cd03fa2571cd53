//! How fast products are at the shapes of training: against the `gemm` crate, which candle uses, where there is one thread against
//! `faer` as well, and against the peak of multiply-adds measured in the same run. All alternate, and medians are printed.
//!
//! `cargo bench -p attune-tensor --profile dev --bench gemm -- [words of the names of shapes…]`; `RAYON_NUM_THREADS` says how
//! many threads.
#![expect(unsafe_code, reason = "the other crate is called with pointers, the peak needs instructions by name")]
#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a bench reads the clock and prints")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use attune_tensor::kernels::{Cpu, Gemm, Kernels, LowRank, Matmul, Operand, cpu, cpu_multiplying};
use attune_tensor::view::{MatRef, View, ViewMut};
use half::bf16;

/// Time that one shape may take.
const BUDGET: Duration = Duration::from_millis(1500);

/// A kind of product with a linear of `o` outputs and `i` inputs over `t` rows.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// `x Wᵀ`.
    Forward,
    /// `dy W`.
    Backward,
    /// `dyᵀ x`.
    Weight,
}

struct Shape {
    name: String,
    kind: Kind,
    t: usize,
    o: usize,
    i: usize,
}

impl Shape {
    fn new(size: &str, kind: Kind, t: usize, (o, i): (usize, usize)) -> Self {
        let name = match kind {
            Kind::Forward => format!("{size} forward  {t}x{i} · ({o}x{i})ᵀ"),
            Kind::Backward => format!("{size} backward {t}x{o} · {o}x{i}"),
            Kind::Weight => format!("{size} weight   ({t}x{o})ᵀ · {t}x{i}"),
        };
        Self { name, kind, t, o, i }
    }

    /// Rows, columns and depth of the product.
    fn product(&self) -> (usize, usize, usize) {
        match self.kind {
            Kind::Forward => (self.t, self.o, self.i),
            Kind::Backward => (self.t, self.i, self.o),
            Kind::Weight => (self.o, self.i, self.t),
        }
    }

    /// How long the factors are, and whether each is transposed.
    fn factors(&self) -> [((usize, usize), bool); 2] {
        let (t, o, i) = (self.t, self.o, self.i);
        match self.kind {
            Kind::Forward => [((t, i), false), ((o, i), true)],
            Kind::Backward => [((t, o), false), ((o, i), false)],
            Kind::Weight => [((t, o), true), ((t, i), false)],
        }
    }
}

fn shapes() -> Vec<Shape> {
    let mut all = Vec::new();
    for pair in [(256, 256), (128, 256), (688, 256), (256, 688), (4096, 256)] {
        for kind in [Kind::Forward, Kind::Backward] {
            all.push(Shape::new("S", kind, 2048, pair));
        }
    }
    all.push(Shape::new("S", Kind::Weight, 2048, (688, 256)));
    for pair in [(896, 896), (128, 896), (4864, 896), (896, 4864)] {
        for kind in [Kind::Forward, Kind::Backward] {
            all.push(Shape::new("M", kind, 512, pair));
        }
    }
    all.push(Shape::new("M", Kind::Weight, 512, (4864, 896)));
    for kind in [Kind::Forward, Kind::Backward] {
        all.push(Shape::new("M head", kind, 512, (151_936, 896)));
    }
    for (size, t, pairs) in
        [("S", 2048, [(16, 256), (256, 16), (688, 16)]), ("M", 512, [(16, 896), (896, 16), (4864, 16)])]
    {
        for pair in pairs {
            let kinds = if pair.0 == 16 { [Kind::Forward, Kind::Weight] } else { [Kind::Backward, Kind::Weight] };
            for kind in kinds {
                all.push(Shape::new(&format!("{size} thin"), kind, t, pair));
            }
        }
    }
    all
}

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

/// Seconds of a call: of the clock, or with `--processor-time` those that the threads ran, shared among them. The latter
/// says what the code could do where other processes take their part of the processor.
fn time(run: impl FnOnce()) -> f64 {
    #[cfg(unix)]
    if std::env::args().any(|arg| arg == "--processor-time") {
        use nix::time::{ClockId, clock_gettime};
        let now = || Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("a clock can be read"));
        let start = now();
        run();
        return (now() - start).as_secs_f64() / rayon::current_num_threads() as f64;
    }
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Multiply-adds of one number in twelve independent chains, for processors whose instructions are not named below; the sum keeps
/// them alive.
fn multiply_adds(rounds: usize) -> f32 {
    let mut sums = [black_box(1.0f32); 12];
    let (a, b) = (black_box(0.999f32), black_box(1e-3f32));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn eight(rounds: usize) -> f32 {
        let mut sums = [_mm256_set1_ps(black_box(1.0)); 12];
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        _mm256_cvtss_f32(sums.into_iter().fold(b, |x, y| _mm256_add_ps(x, y)))
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) fn sixteen(rounds: usize) -> f32 {
        let mut sums = [_mm512_set1_ps(black_box(1.0)); 12];
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        _mm512_cvtss_f32(sums.into_iter().fold(b, |x, y| _mm512_add_ps(x, y)))
    }
}

/// Operations per second that all threads together reach with nothing but multiply-adds.
fn peak() -> f64 {
    const ROUNDS: usize = 200_000;
    let operations = |lanes: usize| (rayon::current_num_threads() * ROUNDS * 12 * lanes * 2) as f64;
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            let all = || drop(rayon::broadcast(|_| black_box(unsafe { wide::sixteen(ROUNDS) })));
            return operations(16) / time(all);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            let all = || drop(rayon::broadcast(|_| black_box(unsafe { wide::eight(ROUNDS) })));
            return operations(8) / time(all);
        }
    }
    operations(1) / time(|| drop(rayon::broadcast(|_| black_box(multiply_adds(ROUNDS)))))
}

/// The other crate's product.
fn theirs(shape: &Shape, a: &[f32], b: &[f32], c: &mut [f32]) {
    let (m, n, k) = shape.product();
    let [((_, a_cols), a_turned), ((_, b_cols), b_turned)] = shape.factors();
    let strides = |cols: usize, turned: bool| if turned { (cols as isize, 1) } else { (1, cols as isize) };
    let ((a_cs, a_rs), (b_cs, b_rs)) = (strides(a_cols, a_turned), strides(b_cols, b_turned));
    let threads = gemm::Parallelism::Rayon(0);
    // SAFETY: the slices have the lengths of their shapes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            a_cs,
            a_rs,
            b.as_ptr(),
            b_cs,
            b_rs,
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// faer's product, on this thread: as it is built here it has no others.
fn faers(shape: &Shape, a: &[f32], b: &[f32], c: &mut [f32]) {
    let (m, n, _) = shape.product();
    let [((a_rows, a_cols), a_turned), ((b_rows, b_cols), b_turned)] = shape.factors();
    let matrix = |values, rows, cols, turned: bool| {
        let matrix = faer::MatRef::from_row_major_slice(values, rows, cols);
        if turned { matrix.transpose() } else { matrix }
    };
    let (a, b) = (matrix(a, a_rows, a_cols, a_turned), matrix(b, b_rows, b_cols, b_turned));
    let c = faer::MatMut::from_row_major_slice_mut(c, m, n);
    faer::linalg::matmul::matmul(c, faer::Accum::Replace, a, b, 1.0, faer::Par::Seq);
}

fn run(shape: &Shape) {
    let [(a_shape, a_turned), (b_shape, b_turned)] = shape.factors();
    let (m, n, k) = shape.product();
    let (a, b) = (numbers(a_shape.0 * a_shape.1, 1), numbers(b_shape.0 * b_shape.1, 2));
    let narrow = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
    let (a16, b16) = (narrow(&a), narrow(&b));
    let mut c = vec![0.0; m * n];
    let rank = 16;
    let (left, right) = (numbers(m * rank, 3), numbers(rank * n, 4));
    let (cpu, parts) = (cpu(), cpu_multiplying(Matmul::High));
    let ours = |cpu: &Cpu, a: MatRef<'_>, b: MatRef<'_>, c: &mut [f32], thin: bool| {
        let term = LowRank {
            rows: 0..m,
            left: View::new(&left, m, rank).into(),
            right: Operand::plain(View::new(&right, rank, n)),
        };
        let mut of = Gemm::new(Operand { mat: a, transposed: a_turned }, Operand { mat: b, transposed: b_turned });
        let terms = [term];
        if thin {
            of.low_rank = &terms;
        }
        cpu.gemm(ViewMut::new(c, m, n), &of);
    };
    let f32s = (MatRef::from(View::new(&a, a_shape.0, a_shape.1)), MatRef::from(View::new(&b, b_shape.0, b_shape.1)));
    let bf16s =
        (MatRef::from(View::new(&a16, a_shape.0, a_shape.1)), MatRef::from(View::new(&b16, b_shape.0, b_shape.1)));
    let mut seconds: [Vec<f64>; 8] = Default::default();
    let alone = rayon::current_num_threads() == 1;
    let mut peaks = Vec::new();
    let start = Instant::now();
    while seconds[0].len() < 3 || start.elapsed() < BUDGET {
        seconds[0].push(time(|| ours(cpu, f32s.0, f32s.1, &mut c, false)));
        seconds[1].push(time(|| theirs(shape, &a, &b, &mut c)));
        seconds[2].push(time(|| ours(cpu, f32s.0, bf16s.1, &mut c, false)));
        seconds[3].push(time(|| ours(cpu, bf16s.0, bf16s.1, &mut c, false)));
        seconds[4].push(time(|| ours(cpu, f32s.0, f32s.1, &mut c, true)));
        // Beside more threads it would be the one that waits for nobody.
        seconds[5].push(if alone { time(|| faers(shape, &a, &b, &mut c)) } else { f64::NAN });
        seconds[6].push(time(|| ours(parts, f32s.0, f32s.1, &mut c, false)));
        seconds[7].push(time(|| ours(parts, f32s.0, f32s.1, &mut c, true)));
        peaks.push(peak());
    }
    let [ours, theirs, mixed, narrow, thin, faers, parts, parts_thin] =
        seconds.map(|seconds| 2.0 * (m * n * k) as f64 / median(seconds) / 1e9);
    let [thin, parts_thin] = [thin, parts_thin].map(|thin| thin * (k + rank) as f64 / k as f64);
    let peak = median(peaks) / 1e9;
    let share = |x: f64| format!("{x:6.1} ({:3.0} %)", 100.0 * x / peak);
    println!(
        "{:42} | {} | {theirs:6.1} | {:4.2} | {faers:6.1} | {:4.2} | {} | {} | {} | {} | {} | {peak:6.1}",
        shape.name,
        share(ours),
        ours / theirs,
        ours / faers,
        share(mixed),
        share(narrow),
        share(thin),
        share(parts),
        share(parts_thin),
    );
}

fn main() {
    // Cargo adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    println!("{}, {} threads; GFLOP/s (share of the peak)", cpu().profile(), rayon::current_num_threads());
    println!(
        "{:42} | f32 · f32      | `gemm` | ratio| `faer` | ratio| f32 · bf16     | bf16 · bf16    | with rank 16   | by parts       | both           | peak",
        ""
    );
    let all = shapes();
    // Within the pool, as a training step is.
    rayon::scope(|_| {
        for shape in all.iter().filter(|shape| words.iter().all(|word| shape.name.contains(word.as_str()))) {
            run(shape);
        }
    });
}
