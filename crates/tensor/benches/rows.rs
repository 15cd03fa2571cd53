//! How fast the kernels beside the products are at the shapes of training: attention as a share of the peak of multiply-adds
//! measured in the same run, and what passes over memory in GB/s beside a plain copy.
//!
//! `cargo bench -p attune-tensor --profile dev --bench rows -- [words of the names…]`; `RAYON_NUM_THREADS` says how many threads.
//! The shortest of many calls counts, so that other work on the machine tells least.
#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a bench reads the clock and prints")]

use std::cell::RefCell;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use attune_tensor::kernels::{Activation, Attention, Kernels, Mask, cpu};
use attune_tensor::view::{MatMut, MatRef, View, ViewMut};
use half::bf16;

/// Time that one line may take.
const BUDGET: Duration = Duration::from_millis(1000);

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

/// Seconds of the shortest call.
fn time(mut run: impl FnMut()) -> f64 {
    let (begun, mut least) = (Instant::now(), f64::INFINITY);
    while begun.elapsed() < BUDGET {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

/// Multiply-adds of `W` lanes in twelve independent chains; the sum keeps them alive.
#[inline(always)]
fn multiply_adds<const W: usize>() -> f32 {
    let mut sums = [[black_box(1.0f32); W]; 12];
    let (a, b) = ([black_box(0.999f32); W], [black_box(1e-3f32); W]);
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for lane in 0..W {
                sum[lane] = sum[lane].mul_add(a[lane], b[lane]);
            }
        }
    }
    sums.iter().flatten().sum()
}

const ROUNDS: usize = 20_000;

#[cfg(target_arch = "x86_64")]
mod wide {
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn eight() -> f32 {
        super::multiply_adds::<8>()
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) fn sixteen() -> f32 {
        super::multiply_adds::<16>()
    }
}

/// Operations per second that all threads together reach with nothing but multiply-adds.
#[expect(unsafe_code, reason = "the peak needs instructions by name")]
fn peak() -> f64 {
    let operations = |lanes: usize| (rayon::current_num_threads() * ROUNDS * 12 * lanes * 2) as f64;
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return operations(16) / time(|| drop(rayon::broadcast(|_| black_box(unsafe { wide::sixteen() }))));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            return operations(8) / time(|| drop(rayon::broadcast(|_| black_box(unsafe { wide::eight() }))));
        }
    }
    operations(8) / time(|| drop(rayon::broadcast(|_| black_box(multiply_adds::<8>()))))
}

/// Attention at one shape: operations that the mask leaves, per second.
fn attention(
    name: &str,
    docs: &[Range<usize>],
    (heads, kv_heads, head_dim): (usize, usize, usize),
    mask: Mask,
    peak: f64,
) {
    let rows = docs.last().map_or(0, |doc| doc.end);
    let how = Attention { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), mask, docs, keys: None };
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let (q, k, v) = (numbers(rows * wide, 1), numbers(rows * narrow, 2), numbers(rows * narrow, 3));
    let d_o = numbers(rows * wide, 4);
    let lse = RefCell::new(vec![0.0; rows * heads]);
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    let forwards = |[q, k, v]: [MatRef<'_>; 3], mut o: MatMut<'_>| {
        time(|| cpu().attention(&how, q, k, v, o.reborrow(), ViewMut::new(&mut lse.borrow_mut(), rows, heads)))
    };
    let mut backwards = |[q, k, v]: [MatRef<'_>; 3], o: MatRef<'_>| {
        time(|| {
            let (lse, d_o) = (lse.borrow(), View::new(&d_o, rows, wide));
            let dq = ViewMut::new(&mut dq, rows, wide);
            let (dk, dv) = (ViewMut::new(&mut dk, rows, narrow), ViewMut::new(&mut dv, rows, narrow));
            cpu().attention_vjp(&how, q, k, v, o, &lse, d_o, None, dq, dk, dv);
        })
    };
    let mut o = vec![0.0f32; rows * wide];
    let qkv =
        [View::new(&q, rows, wide).into(), View::new(&k, rows, narrow).into(), View::new(&v, rows, narrow).into()];
    let forward = forwards(qkv, ViewMut::new(&mut o, rows, wide).into());
    let backward = backwards(qkv, View::new(&o, rows, wide).into());
    let half = |of: &[f32]| of.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (q, k, v, mut o) = (half(&q), half(&k), half(&v), half(&o));
    let qkv =
        [View::new(&q, rows, wide).into(), View::new(&k, rows, narrow).into(), View::new(&v, rows, narrow).into()];
    let forward16 = forwards(qkv, ViewMut::new(&mut o, rows, wide).into());
    let backward16 = backwards(qkv, View::new(&o, rows, wide).into());
    let seen = |at: usize, len: usize| match mask {
        Mask::Bidirectional => len,
        Mask::Causal { window } => (at + 1).min(window.unwrap_or(len)),
    };
    let pairs: usize = docs.iter().map(|doc| (0..doc.len()).map(|at| seen(at, doc.len())).sum::<usize>()).sum();
    let operations = (pairs * heads * head_dim * 2) as f64;
    let line = |name: &str, products: f64, seconds: f64| {
        let rate = products * operations / seconds;
        println!("  {name:8} {:9.3} ms {:7.1} GFLOP/s ({:2.0} %)", seconds * 1e3, rate / 1e9, 100.0 * rate / peak);
    };
    println!("attention {name}");
    line("forward", 2.0, forward);
    line("backward", 5.0, backward);
    line("both", 7.0, forward + backward);
    line("of bf16", 7.0, forward16 + backward16);
}

/// A pass over so many bytes.
fn pass(name: &str, bytes: usize, run: impl FnMut()) {
    let seconds = time(run);
    println!("{name:34} {:9.3} ms {:7.1} GB/s", seconds * 1e3, bytes as f64 / seconds / 1e9);
}

/// Everything else at one shape.
fn passes(
    size: &str,
    t: usize,
    d: usize,
    f: usize,
    (heads, width): (usize, usize),
    vocab: usize,
    wanted: &impl Fn(&str) -> bool,
) {
    let (x, dy, w) = (numbers(t * d, 1), numbers(t * d, 2), numbers(d, 3));
    let (gate, up, dh) = (numbers(t * f, 4), numbers(t * f, 5), numbers(t * f, 6));
    let half = |of: &[f32]| of.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (gate16, up16) = (half(&gate), half(&up));
    let (mut y, mut dx, mut dw) = (x.clone(), x.clone(), w.clone());
    let (mut h, mut dgate, mut dup, mut h16) = (gate.clone(), gate.clone(), gate.clone(), gate16.clone());
    let named = |name: &str, bytes: usize, run: &mut dyn FnMut()| {
        let name = format!("{size} {name}");
        if wanted(&name) {
            pass(&name, bytes, run);
        }
    };
    fn mat(of: &[f32], cols: usize) -> View<'_, f32> {
        View::new(of, of.len() / cols, cols)
    }
    named("copy", 8 * t * f, &mut || cpu().convert(mat(&gate, f).into(), ViewMut::new(&mut h, t, f).into()));
    named("f32 to bf16", 6 * t * f, &mut || cpu().convert(mat(&gate, f).into(), ViewMut::new(&mut h16, t, f).into()));
    named("add", 12 * t * f, &mut || cpu().add(mat(&gate, f).into(), ViewMut::new(&mut h, t, f)));
    named("sum of rows", 4 * t * f, &mut || cpu().sum_rows(mat(&gate, f), &mut dup[..f], false));
    named("rms norm", 8 * t * d, &mut || cpu().rms_norm(mat(&x, d), &w, 1e-5, ViewMut::new(&mut y, t, d).into()));
    named("rms norm backward", 16 * t * d, &mut || {
        cpu().rms_norm_vjp(mat(&x, d), &w, 1e-5, mat(&dy, d), ViewMut::new(&mut dx, t, d), None);
    });
    named("rms norm backward with weight", 16 * t * d, &mut || {
        cpu().rms_norm_vjp(mat(&x, d), &w, 1e-5, mat(&dy, d), ViewMut::new(&mut dx, t, d), Some(&mut dw));
    });
    named("layer norm backward with weight", 16 * t * d, &mut || {
        let mut db = w.clone();
        let sums = Some((&mut dw[..], &mut db[..]));
        cpu().layer_norm_vjp(mat(&x, d), &w, 1e-5, mat(&dy, d), ViewMut::new(&mut dx, t, d), sums);
    });
    let angles = numbers(t * width / 2, 7);
    let mut q = numbers(t * heads * width, 8);
    named("rope", 8 * t * heads * width, &mut || {
        let angles = mat(&angles, width / 2);
        cpu().rope(ViewMut::new(&mut q, t, heads * width), width, angles, angles, false);
    });
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        named(&format!("gated {act:?}"), 12 * t * f, &mut || {
            cpu().gated(act, mat(&gate, f).into(), mat(&up, f).into(), ViewMut::new(&mut h, t, f).into());
        });
        named(&format!("gated {act:?} backward"), 20 * t * f, &mut || {
            let (dgate, dup) = (ViewMut::new(&mut dgate, t, f), ViewMut::new(&mut dup, t, f));
            cpu().gated_vjp(act, mat(&gate, f).into(), mat(&up, f).into(), mat(&dh, f), dgate.into(), dup.into());
        });
    }
    named("gated Silu of bf16", 6 * t * f, &mut || {
        let (gate, up) = (View::new(&gate16, t, f), View::new(&up16, t, f));
        cpu().gated(Activation::Silu, gate.into(), up.into(), ViewMut::new(&mut h16, t, f).into());
    });
    let rows = 64;
    let mut logits = numbers(rows * vocab, 9);
    let (labels, weights, mut nll) = (vec![1; rows], vec![1.0; rows], vec![0.0; rows]);
    named("cross entropy, 64 rows", 4 * rows * vocab, &mut || {
        cpu().cross_entropy(ViewMut::new(&mut logits, rows, vocab), &labels, None, None, &mut nll);
    });
    named("with gradient", 12 * rows * vocab, &mut || {
        cpu().cross_entropy(ViewMut::new(&mut logits, rows, vocab), &labels, Some(&weights), None, &mut nll);
    });
}

fn main() {
    // Cargo adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let wanted = |name: &str| words.iter().all(|word| name.contains(word.as_str()));
    println!("{}, {} threads", cpu().profile(), rayon::current_num_threads());
    // Within the pool, as a training step is.
    rayon::scope(|_| {
        let causal = Mask::Causal { window: None };
        let docs = |count: usize, len: usize| (0..count).map(|doc| doc * len..(doc + 1) * len).collect::<Vec<_>>();
        let cases = [
            ("S: 8 × 256, 8/4 heads of 32", docs(8, 256), (8, 4, 32), causal),
            ("M: 2 × 256, 14/2 heads of 64", docs(2, 256), (14, 2, 64), causal),
            ("long: 8192, 14/2 heads of 64", docs(1, 8192), (14, 2, 64), causal),
            (
                "window: 8192, 1024 seen, 8/8 heads of 128",
                docs(1, 8192),
                (8, 8, 128),
                Mask::Causal { window: Some(1024) },
            ),
            ("encoder: 8 × 128, 12/12 heads of 64", docs(8, 128), (12, 12, 64), Mask::Bidirectional),
        ];
        for (name, docs, heads, mask) in cases {
            if wanted(&format!("attention {name}")) {
                attention(name, &docs, heads, mask, peak());
            }
        }
        passes("S", 2048, 256, 688, (8, 32), 4096, &wanted);
        passes("M", 512, 896, 4864, (14, 64), 151_936, &wanted);
    });
}
