//! The device against the processor. Where there is no device the tests say so and end, unless `ATTUNE_CUDA` asks for one.

use half::bf16;

use super::{Cuda, cuda};
use crate::kernels::{Activation, Attention, Gemm, Kernels, LowRank, Mask, Matmul, Operand, cpu};
use crate::rng::Rng;
use crate::store::Store;
use crate::testing::cuda_device as device;
use crate::view::{MatMut, MatRef, View, ViewMut};

fn normal(name: &str, len: usize) -> Vec<f32> {
    let mut rng = Rng::new(11, name);
    (0..len).map(|_| rng.normal() as f32).collect()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Asserts that no number is further from the processor's than `limit` of the largest.
fn near(what: &str, device: &Cuda, found: &[f32], expected: &[f32], limit: f32) {
    device.fault().unwrap();
    let largest = expected.iter().fold(1e-3f32, |max, value| max.max(value.abs()));
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs();
        assert!(off <= limit * largest, "{what}: {found} instead of {expected} at {at}: off by {off:e} of {largest}");
    }
}

/// Does the same on both, and compares the results.
fn both<const N: usize>(what: &str, limit: f32, given: &[Vec<f32>; N], f: impl Fn(&dyn Kernels, &mut [Vec<f32>; N])) {
    let Some(device) = device() else { return };
    let (mut expected, mut found, mut again) = (given.clone(), given.clone(), given.clone());
    f(cpu(), &mut expected);
    f(device, &mut found);
    f(device, &mut again);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        near(&format!("{what}, result {at}"), device, found, expected, limit);
    }
    let bits = |all: &[Vec<f32>; N]| all.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&again), "{what}: the same call gave other bits");
}

#[test]
fn products_are_the_processors() {
    for (m, n, k) in [(1, 1, 1), (33, 17, 65), (64, 128, 256), (5, 300, 1), (128, 1, 40)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (normal("a", m * k), normal("b", k * n));
            let (a_bf, b_bf) = (narrow(&a), narrow(&b));
            let shape = |transposed, rows, cols| if transposed { (cols, rows) } else { (rows, cols) };
            let ((ar, ac), (br, bc)) = (shape(ta, m, k), shape(tb, k, n));
            let kinds: [(MatRef<'_>, MatRef<'_>); 3] = [
                (View::new(&a, ar, ac).into(), View::new(&b, br, bc).into()),
                (View::new(&a_bf, ar, ac).into(), View::new(&b_bf, br, bc).into()),
                (View::new(&a, ar, ac).into(), View::new(&b_bf, br, bc).into()),
            ];
            for (kind, (a, b)) in kinds.into_iter().enumerate() {
                let (left, right, bias) = (normal("left", m * 4), normal("right", 4 * n), normal("bias", n));
                let rows = m / 3..m;
                let low_rank = [LowRank {
                    rows: rows.clone(),
                    left: View::new(&left, m, 4).sub_rows(rows.start, rows.end).into(),
                    right: Operand::plain(View::new(&right, 4, n)),
                }];
                let plain =
                    Gemm { ..Gemm::new(Operand { mat: a, transposed: ta }, Operand { mat: b, transposed: tb }) };
                let full = Gemm { low_rank: &low_rank, bias: Some(&bias), accumulate: true, ..plain.clone() };
                for of in [plain, full] {
                    let what = format!("{m}×{n}×{k}, {ta}, {tb}, {kind}");
                    both(&what, 1e-5, &[normal("c", m * (n + 3))], |kernels, [c]| {
                        kernels.gemm(ViewMut::strided(c, m, n, n + 3), &of);
                    });
                }
            }
        }
    }
}

#[test]
fn products_of_fewer_bits_are_near_and_say_so() {
    let Some(plain) = device() else { return };
    let high = cuda(0, Matmul::High).unwrap();
    assert_eq!(high.profile(), format!("{}-high", plain.profile()));
    assert!(
        std::ptr::eq(high, cuda(0, Matmul::High).unwrap()) && std::ptr::eq(plain, cuda(0, Matmul::Highest).unwrap())
    );
    let (m, n, k) = (64, 96, 500);
    let (a, b) = (normal("a", m * k), normal("b", k * n));
    let product = |kernels: &dyn Kernels| {
        let mut c = vec![0.0; m * n];
        let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
        kernels.gemm(ViewMut::new(&mut c, m, n), &Gemm::new(Operand::plain(a), Operand::plain(b)));
        c
    };
    let (expected, found) = (product(cpu()), product(high));
    near("eleven bits", high, &found, &expected, 1e-3);
    assert_eq!(found, product(high), "the same call gave other bits");
    let worst = |c: &[f32]| c.iter().zip(&expected).map(|(c, of)| (c - of).abs()).fold(0.0, f32::max);
    assert!(worst(&found) > 4.0 * worst(&product(plain)), "products of fewer bits are as exact as those of all");
}

#[test]
fn rows_are_moved_and_summed_like_the_processors() {
    let (x, ids) = (normal("x", 50 * 37), [3u32, 49, 0, 3, 7]);
    let x_bf = narrow(&x);
    for x in [MatRef::from(View::new(&x, 50, 37)), View::new(&x_bf, 50, 37).into()] {
        both("moved", 1e-6, &[normal("y", 50 * 40), normal("z", 5 * 37)], |kernels, [y, z]| {
            kernels.add(x, ViewMut::strided(y, 50, 37, 40));
            kernels.multiply(x, ViewMut::strided(y, 50, 37, 40));
            kernels.scale(ViewMut::strided(y, 50, 37, 40), 0.37);
            kernels.fill(ViewMut::strided(y, 50, 37, 40).into_sub_cols(2, 3), 4.0);
            kernels.gather(x, &ids, ViewMut::new(z, 5, 37).into(), true);
            kernels.scatter(View::new(z, 5, 37).sub_rows(0, 3), &[11, 2, 30], ViewMut::strided(y, 50, 37, 40));
            kernels.convert(x.sub_rows(0, 5), ViewMut::strided(y, 50, 37, 40).into_sub_rows(40, 45).into());
        });
    }
    both("summed", 1e-5, &[normal("sums", 37)], |kernels, [y]| {
        kernels.sum_rows(View::new(&x, 50, 37), y, true);
        let mut fresh = vec![0.0; 37];
        kernels.sum_rows(View::new(&x, 50, 37), &mut fresh, false);
        y.iter_mut().zip(fresh).for_each(|(y, fresh)| *y -= 0.5 * fresh);
    });
    let Some(device) = device() else { return };
    let (mut found, mut expected) = (vec![bf16::ZERO; 50 * 37], vec![bf16::ZERO; 50 * 37]);
    let odd: Vec<f32> = x.iter().enumerate().map(|(i, x)| if i % 97 == 0 { f32::NAN } else { x * 1e3 }).collect();
    device.convert(View::new(&odd, 50, 37).into(), ViewMut::new(&mut found, 50, 37).into());
    cpu().convert(View::new(&odd, 50, 37).into(), ViewMut::new(&mut expected, 50, 37).into());
    device.fault().unwrap();
    let same = |(a, b): (&bf16, &bf16)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    assert!(found.iter().zip(&expected).all(same), "numbers are rounded otherwise");
}

#[test]
fn norms_are_the_processors() {
    for (rows, cols) in [(1, 8), (40, 64), (7, 300), (9, 1536)] {
        let n = rows * cols;
        let (w, b, dy) = (normal("w", cols), normal("b", cols), normal("dy", n));
        let x = normal("x", n);
        let what = format!("{rows} × {cols}");
        both(&what, 2e-5, &[vec![0.0; n], normal("dx", n), normal("dw", cols)], |kernels, [y, dx, dw]| {
            kernels.rms_norm(View::new(&x, rows, cols), &w, 1e-5, ViewMut::new(y, rows, cols).into());
            let (x, dy) = (View::new(&x, rows, cols), View::new(&dy, rows, cols));
            kernels.rms_norm_vjp(x, &w, 1e-5, dy, ViewMut::new(dx, rows, cols), Some(dw));
        });
        let given = [vec![0.0; n], normal("dx", n), normal("dw", cols), normal("db", cols)];
        both(&what, 2e-5, &given, |kernels, [y, dx, dw, db]| {
            kernels.layer_norm(View::new(&x, rows, cols), &w, &b, 1e-5, ViewMut::new(y, rows, cols).into());
            let (x, dy) = (View::new(&x, rows, cols), View::new(&dy, rows, cols));
            kernels.layer_norm_vjp(x, &w, 1e-5, dy, ViewMut::new(dx, rows, cols), Some((dw, db)));
        });
    }
}

#[test]
fn heads_are_turned_and_activations_computed_like_the_processors() {
    let (rows, heads, width) = (19, 3, 16);
    let angles = normal("angles", rows * width / 2);
    let (cos, sin): (Vec<f32>, Vec<f32>) =
        (angles.iter().map(|a| a.cos()).collect(), angles.iter().map(|a| a.sin()).collect());
    for inverse in [false, true] {
        both("turned", 1e-6, &[normal("x", rows * heads * width)], |kernels, [x]| {
            let (cos, sin) = (View::new(&cos, rows, width / 2), View::new(&sin, rows, width / 2));
            kernels.rope(ViewMut::new(x, rows, heads * width), width, cos, sin, inverse);
        });
    }
    let (gate, up, dy) = (normal("gate", 700), normal("up", 700), normal("dy", 700));
    let wide: Vec<f32> = gate.iter().map(|x| 4.0 * x).collect();
    let (gate_bf, up_bf) = (narrow(&wide), narrow(&up));
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let kinds: [(MatRef<'_>, MatRef<'_>); 2] = [
            (View::new(&wide, 7, 100).into(), View::new(&up, 7, 100).into()),
            (View::new(&gate_bf, 7, 100).into(), View::new(&up_bf, 7, 100).into()),
        ];
        for (gate, up) in kinds {
            both(&format!("{act:?}"), 1e-5, &[(); 5].map(|()| vec![0.0; 700]), |kernels, [y, dgate, dup, z, dz]| {
                let dy = View::new(&dy, 7, 100);
                kernels.gated(act, gate, up, ViewMut::new(y, 7, 100).into());
                let (dgate, dup) = (ViewMut::new(dgate, 7, 100).into(), ViewMut::new(dup, 7, 100).into());
                kernels.gated_vjp(act, gate, up, dy, dgate, dup);
                kernels.activate(act, gate, ViewMut::new(z, 7, 100).into());
                kernels.activate_vjp(act, gate, dy, ViewMut::new(dz, 7, 100).into());
            });
        }
    }
}

#[test]
fn likelihoods_are_the_processors() {
    for (rows, vocab) in [(3, 5), (17, 1000), (4, 20_000)] {
        let logits: Vec<f32> = normal("logits", rows * vocab).iter().map(|x| 8.0 * x).collect();
        let labels: Vec<u32> = (0..rows).map(|row| (row * 7919 % vocab) as u32).collect();
        let weights = normal("weights", rows);
        both("scored", 1e-5, &[logits.clone(), vec![0.0; rows]], |kernels, [logits, nll]| {
            kernels.cross_entropy(ViewMut::new(logits, rows, vocab), &labels, None, None, nll);
        });
        both("with gradients", 1e-5, &[logits.clone(), vec![0.0; rows]], |kernels, [logits, nll]| {
            kernels.cross_entropy(ViewMut::new(logits, rows, vocab), &labels, Some(&weights), None, nll);
        });
        both("rounded", 1e-2, &[vec![0.0; rows * vocab], vec![0.0; rows]], |kernels, [gradient, nll]| {
            let (mut scratch, mut rounded) = (logits.clone(), vec![bf16::ZERO; rows * vocab]);
            let to = Some(ViewMut::new(&mut rounded, rows, vocab));
            kernels.cross_entropy(ViewMut::new(&mut scratch, rows, vocab), &labels, Some(&weights), to, nll);
            gradient.iter_mut().zip(&rounded).for_each(|(gradient, rounded)| *gradient = rounded.to_f32());
        });
    }
}

#[test]
fn attention_is_the_processors() {
    let docs = [0..1, 1..33, 33..133, 133..164, 164..196];
    let rows = 196;
    let masks = [
        Mask::Causal { window: None },
        Mask::Causal { window: Some(5) },
        Mask::Causal { window: Some(40) },
        Mask::Bidirectional,
    ];
    for (heads, kv_heads, head_dim) in [(4, 2, 8), (2, 2, 64), (6, 1, 24), (2, 1, 128)] {
        let (wide, thin) = (heads * head_dim, kv_heads * head_dim);
        let (q, k, v) = (normal("q", rows * wide), normal("k", rows * thin), normal("v", rows * thin));
        let (q_bf, k_bf, v_bf) = (narrow(&q), narrow(&k), narrow(&v));
        let (d_o, dlse) = (normal("d_o", rows * wide), normal("dlse", rows * heads));
        for mask in masks {
            let scale = (head_dim as f32).sqrt().recip();
            let how = Attention { heads, kv_heads, head_dim, scale, mask, docs: &docs, keys: None };
            let kinds: [[MatRef<'_>; 3]; 2] = [
                [View::new(&q, rows, wide).into(), View::new(&k, rows, thin).into(), View::new(&v, rows, thin).into()],
                [
                    View::new(&q_bf, rows, wide).into(),
                    View::new(&k_bf, rows, thin).into(),
                    View::new(&v_bf, rows, thin).into(),
                ],
            ];
            for [q, k, v] in kinds {
                for dlse in [None, Some(&dlse[..])] {
                    let given =
                        [rows * wide, rows * heads, rows * wide, rows * thin, rows * thin].map(|n| vec![0.0; n]);
                    both(
                        &format!("{heads}/{kv_heads} of {head_dim}, {mask:?}"),
                        2e-5,
                        &given,
                        |kernels, [o, lse, dq, dk, dv]| {
                            kernels.attention(
                                &how,
                                q,
                                k,
                                v,
                                MatMut::F32(ViewMut::new(o, rows, wide)),
                                ViewMut::new(lse, rows, heads),
                            );
                            let (o, d_o) = (View::new(o, rows, wide), View::new(&d_o, rows, wide));
                            let (dk, dv) = (ViewMut::new(dk, rows, thin), ViewMut::new(dv, rows, thin));
                            let dq = ViewMut::new(dq, rows, wide);
                            kernels.attention_vjp(&how, q, k, v, o.into(), lse, d_o, dlse, dq, dk, dv);
                        },
                    );
                }
            }
        }
    }
}

#[test]
fn the_last_rows_of_documents_attend_like_the_processors() {
    let (docs, keys) = ([0..1, 1..4, 4..44], [0..70, 80..83, 90..190]);
    let (heads, kv_heads, head_dim, rows, all) = (4, 2, 32, 44, 190);
    let (wide, thin) = (heads * head_dim, kv_heads * head_dim);
    let (q, k, v) = (normal("q", rows * wide), normal("k", all * thin), normal("v", all * thin));
    for mask in [Mask::Causal { window: None }, Mask::Causal { window: Some(9) }] {
        let how = Attention { heads, kv_heads, head_dim, scale: 0.2, mask, docs: &docs, keys: Some(&keys) };
        both(&format!("{mask:?}"), 2e-5, &[vec![0.0; rows * wide], vec![0.0; rows * heads]], |kernels, [o, lse]| {
            let (q, k, v) = (View::new(&q, rows, wide), View::new(&k, all, thin), View::new(&v, all, thin));
            kernels.attention(
                &how,
                q.into(),
                k.into(),
                v.into(),
                MatMut::F32(ViewMut::new(o, rows, wide)),
                ViewMut::new(lse, rows, heads),
            );
        });
    }
}

#[test]
fn the_devices_own_memory_is_worked_in_and_given_back() {
    let Some(device) = device() else { return };
    let mut x = Store::<f32>::new(device, 1 << 24);
    let mut y = Store::<f32>::new(device, 1 << 24);
    assert!(x.iter().chain(y.iter()).all(|x| *x == 0.0));
    x.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
    let (rows, cols) = (1 << 12, 1 << 12);
    device.convert(View::new(&x, rows, cols).into(), ViewMut::new(&mut y, rows, cols).into());
    device.scale(ViewMut::new(&mut y, rows, cols), 2.0);
    device.wait();
    device.fault().unwrap();
    assert!(y.iter().enumerate().all(|(i, y)| *y == 2.0 * i as f32));
    // By address: other processes take and give back memory of the device meanwhile.
    let known = |at: usize| device.places.find(at, 4).is_some();
    let (at_x, at_y) = (x.as_ptr() as usize, y.as_ptr() as usize);
    assert!(known(at_x) && known(at_y));
    drop((x, y));
    assert!(!known(at_x) && !known(at_y));
}

/// Products that keep the device at work for a while, and looks at what they read and write right after each was begun.
#[test]
fn who_looks_at_numbers_waits_for_the_device() {
    let Some(device) = device() else { return };
    let n = 2048;
    let [mut a, mut b, mut c, mut d] = std::array::from_fn(|_| Store::<f32>::new(device, n * n));
    device.fill(ViewMut::new(a.span_mut(), n, n), 1.0);
    device.fill(ViewMut::new(b.span_mut(), n, n), 1.0);
    for round in 1..=4 {
        let ones = |a: &Store<f32>, c: &mut Store<f32>| {
            let of = Gemm::new(Operand::plain(View::new(a.span(), n, n)), Operand::plain(View::new(b.span(), n, n)));
            (0..20).for_each(|_| device.gemm(ViewMut::new(c.span_mut(), n, n), &of));
        };
        ones(&a, &mut c);
        // A product that reads these rows is still at work; they change once it has read them.
        ViewMut::new(a.span_mut(), n, n).row(n - 1).fill(3.0);
        assert_eq!(View::new(c.span(), n, n).row(n - 1), vec![n as f32; n], "round {round}");
        ones(&a, &mut d);
        assert_eq!(d[n * n - 1], 3.0 * n as f32, "round {round}");
        ViewMut::new(a.span_mut(), n, n).data().fill(1.0);
        let mut sums = vec![0.0; n];
        ones(&a, &mut c);
        device.sum_rows(View::new(c.span(), n, n), &mut sums, false);
        assert_eq!(sums, vec![(n * n) as f32; n], "round {round}");
    }
    ones_given_back(device, n);
    device.wait();
    device.fault().unwrap();
}

/// Memory goes back while the device is at work on it.
fn ones_given_back(device: &'static Cuda, n: usize) {
    let [mut x, mut y] = std::array::from_fn(|_| Store::<f32>::new(device, n * n));
    device.fill(ViewMut::new(x.span_mut(), n, n), 1.0);
    let of = Gemm::new(Operand::plain(View::new(x.span(), n, n)), Operand::plain(View::new(x.span(), n, n)));
    (0..20).for_each(|_| device.gemm(ViewMut::new(y.span_mut(), n, n), &of));
}

#[test]
fn a_kept_matrix_is_read_from_its_copy_until_its_guard_goes() {
    let Some(device) = device() else { return };
    let (a, b) = (normal("a", 8 * 16), normal("b", 16 * 4));
    let product = || {
        let mut c = vec![0.0; 32];
        let (a, b) = (Operand::plain(View::new(&a, 8, 16)), Operand::plain(View::new(&b, 16, 4)));
        device.gemm(ViewMut::new(&mut c, 8, 4), &Gemm::new(a, b));
        device.fault().unwrap();
        c
    };
    let expected = product();
    let kept = device.keep(View::new(&b, 16, 4).into()).unwrap();
    assert!(device.keep(View::new(&b, 16, 4).into()).is_none(), "it was kept twice");
    assert_eq!(product(), expected);
    // Some rows of it are found within the copy.
    let mut rows = vec![0.0; 8];
    device.convert(View::new(&b, 16, 4).sub_rows(3, 5).into(), ViewMut::new(&mut rows, 2, 4).into());
    assert_eq!(rows, b[12..20]);
    drop(kept);
    assert_eq!(product(), expected);
    assert!(device.keep(View::new(&b, 16, 4).into()).is_some());
}

#[test]
fn what_does_not_fit_is_a_fault_and_nothing_is_done_after_it() {
    let Some(device) = device() else { return };
    let (free, _) = device.free_bytes().unwrap();
    assert!(device.memory(free + 1).is_none());
    let fault = device.fault().unwrap_err().to_string();
    assert!(fault.contains("bytes were asked for"), "{fault}");
    let mut y = vec![1.0f32; 4];
    device.scale(ViewMut::new(&mut y, 2, 2), 3.0);
    assert_eq!(y, [1.0; 4]);
}
