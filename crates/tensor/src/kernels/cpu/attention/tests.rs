//! Attention against plain f64, and its invariants.

use std::ops::Range;

use candle_core::DType;
use half::bf16;

use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::checks::*;
use crate::kernels::{Attention, Kernels, Mask};
use crate::view::{MatMut, MatRef, View, ViewMut};

const CAUSAL: Mask = Mask::Causal { window: None };

/// A problem: its shape and its operands.
struct Case {
    rows: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    mask: Mask,
    docs: Vec<Range<usize>>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    dlse: Vec<f32>,
}

/// What a kernel or the reference makes of it.
struct Results<T> {
    o: Vec<T>,
    lse: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

impl Results<f32> {
    fn bits(&self) -> Vec<u32> {
        [&self.o, &self.lse, &self.dq, &self.dk, &self.dv].into_iter().flat_map(|part| bits(part)).collect()
    }
}

/// Documents of these lengths, one behind the other.
fn documents(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    lengths
        .iter()
        .map(|length| {
            end += length;
            end - length..end
        })
        .collect()
}

impl Case {
    fn new(docs: Vec<Range<usize>>, (heads, kv_heads, head_dim): (usize, usize, usize), mask: Mask) -> Self {
        let rows = docs.last().map_or(0, |doc| doc.end);
        let (wide, narrow) = (rows * heads * head_dim, rows * kv_heads * head_dim);
        Self {
            rows,
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            mask,
            docs,
            q: normal("q", wide),
            k: normal("k", narrow),
            v: normal("v", narrow),
            d_o: normal("do", wide),
            dlse: normal("dlse", rows * heads),
        }
    }

    fn how(&self) -> Attention<'_> {
        let &Self { heads, kv_heads, head_dim, scale, mask, ref docs, .. } = self;
        Attention { heads, kv_heads, head_dim, scale, mask, docs, keys: None }
    }

    fn wide(&self) -> usize {
        self.heads * self.head_dim
    }

    fn narrow(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Rounds the operands to what bf16 holds.
    fn rounded(mut self) -> Self {
        for operand in [&mut self.q, &mut self.k, &mut self.v] {
            *operand = wide(&rounded(operand));
        }
        self
    }

    fn view<'a>(&self, of: &'a [f32], cols: usize) -> View<'a, f32> {
        View::new(of, self.rows, cols)
    }

    fn run(&self, cpu: &Cpu) -> Results<f32> {
        let (wide, narrow) = (self.wide(), self.narrow());
        // What is there before does not matter.
        let mut results = Results {
            o: vec![f32::NAN; self.q.len()],
            lse: vec![f32::NAN; self.dlse.len()],
            dq: vec![f32::NAN; self.q.len()],
            dk: vec![f32::NAN; self.k.len()],
            dv: vec![f32::NAN; self.v.len()],
        };
        let (q, k, v) = (self.view(&self.q, wide), self.view(&self.k, narrow), self.view(&self.v, narrow));
        let o = MatMut::F32(ViewMut::new(&mut results.o, self.rows, wide));
        let lse = ViewMut::new(&mut results.lse, self.rows, self.heads);
        cpu.attention(&self.how(), q.into(), k.into(), v.into(), o, lse);
        cpu.attention_vjp(
            &self.how(),
            q.into(),
            k.into(),
            v.into(),
            self.view(&results.o, wide).into(),
            &results.lse,
            self.view(&self.d_o, wide),
            Some(&self.dlse),
            ViewMut::new(&mut results.dq, self.rows, wide),
            ViewMut::new(&mut results.dk, self.rows, narrow),
            ViewMut::new(&mut results.dv, self.rows, narrow),
        );
        results
    }

    /// The same with operands in bf16.
    fn run_bf16(&self, cpu: &Cpu) -> Results<f32> {
        let (wide_cols, narrow) = (self.wide(), self.narrow());
        let (q, k, v) = (rounded(&self.q), rounded(&self.k), rounded(&self.v));
        let view = |of, cols| MatRef::Bf16(View::new(of, self.rows, cols));
        let (q, k, v) = (view(&q, wide_cols), view(&k, narrow), view(&v, narrow));
        let mut o = vec![bf16::NAN; self.q.len()];
        let mut lse = vec![f32::NAN; self.dlse.len()];
        let (mut dq, mut dk, mut dv) = (self.q.clone(), self.k.clone(), self.v.clone());
        let to = MatMut::Bf16(ViewMut::new(&mut o, self.rows, wide_cols));
        cpu.attention(&self.how(), q, k, v, to, ViewMut::new(&mut lse, self.rows, self.heads));
        cpu.attention_vjp(
            &self.how(),
            q,
            k,
            v,
            view(&o, wide_cols),
            &lse,
            self.view(&self.d_o, wide_cols),
            None,
            ViewMut::new(&mut dq, self.rows, wide_cols),
            ViewMut::new(&mut dk, self.rows, narrow),
            ViewMut::new(&mut dv, self.rows, narrow),
        );
        Results { o: wide(&o), lse, dq, dk, dv }
    }

    /// Attention of the last `most` rows of each document alone: these rows, their outputs and logarithms of sums. Keys and
    /// values lie in another order than queries, apart from each other.
    fn last(&self, cpu: &Cpu, most: usize) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
        let (wide, narrow) = (self.wide(), self.narrow());
        let (mut rows, mut docs, mut q) = (Vec::new(), Vec::new(), Vec::new());
        for doc in &self.docs {
            let of_doc = doc.end - most.min(doc.len())..doc.end;
            docs.push(rows.len()..rows.len() + of_doc.len());
            q.extend_from_slice(&self.q[of_doc.start * wide..of_doc.end * wide]);
            rows.extend(of_doc);
        }
        let (mut keys, mut k, mut v) = (vec![0..0; docs.len()], Vec::new(), Vec::new());
        for (keys, doc) in keys.iter_mut().zip(&self.docs).rev() {
            for (to, from) in [(&mut k, &self.k), (&mut v, &self.v)] {
                to.extend(vec![f32::NAN; narrow]);
                *keys = to.len() / narrow..to.len() / narrow + doc.len();
                to.extend_from_slice(&from[doc.start * narrow..doc.end * narrow]);
            }
        }
        let (mut o, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; rows.len() * self.heads]);
        let how = Attention { docs: &docs, keys: Some(&keys), ..self.how() };
        let of_keys = |of| View::new(of, k.len() / narrow, narrow).into();
        let to = MatMut::F32(ViewMut::new(&mut o, rows.len(), wide));
        let sums = ViewMut::new(&mut lse, rows.len(), self.heads);
        cpu.attention(&how, View::new(&q, rows.len(), wide).into(), of_keys(&k), of_keys(&v), to, sums);
        (rows, o, lse)
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        let Some(doc) = self.docs.iter().find(|doc| doc.contains(&query)) else { return false };
        let masked = match self.mask {
            Mask::Bidirectional => false,
            Mask::Causal { window } => key > query || window.is_some_and(|window| query - key >= window),
        };
        doc.contains(&key) && !masked
    }

    /// Outputs and logarithms of sums from operands in f64.
    fn reference(&self, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; self.rows * self.heads]);
        self.each_row(q, k, |row, head, p, logarithm| {
            lse[row * self.heads + head] = logarithm;
            for (key, p) in p {
                for at in 0..self.head_dim {
                    o[self.at_query(row, head) + at] += p * v[self.at_key(key, head) + at];
                }
            }
        });
        (o, lse)
    }

    fn at_query(&self, row: usize, head: usize) -> usize {
        row * self.wide() + head * self.head_dim
    }

    fn at_key(&self, row: usize, head: usize) -> usize {
        row * self.narrow() + head / (self.heads / self.kv_heads) * self.head_dim
    }

    /// Tells `f` of every head of every row what it attends to and how much.
    fn each_row(&self, q: &[f64], k: &[f64], mut f: impl FnMut(usize, usize, Vec<(usize, f64)>, f64)) {
        for row in 0..self.rows {
            for head in 0..self.heads {
                let score = |key: usize| {
                    let (q, k) = (&q[self.at_query(row, head)..], &k[self.at_key(key, head)..]);
                    (0..self.head_dim).map(|at| q[at] * k[at]).sum::<f64>() * f64::from(self.scale)
                };
                let seen: Vec<_> =
                    (0..self.rows).filter(|key| self.sees(row, *key)).map(|key| (key, score(key))).collect();
                if seen.is_empty() {
                    continue;
                }
                let max = seen.iter().fold(f64::NEG_INFINITY, |max, (_, score)| max.max(*score));
                let lse = max + seen.iter().map(|(_, score)| (score - max).exp()).sum::<f64>().ln();
                f(row, head, seen.iter().map(|(key, score)| (*key, (score - lse).exp())).collect(), lse);
            }
        }
    }

    /// Everything, by the formulas, with gradients of both results.
    fn expected(&self, with_dlse: bool) -> Results<f64> {
        let (q, k, v, d_o) = (doubles(&self.q), doubles(&self.k), doubles(&self.v), doubles(&self.d_o));
        let (o, lse) = self.reference(&q, &k, &v);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let scale = f64::from(self.scale);
        self.each_row(&q, &k, |row, head, p, _| {
            let at_q = self.at_query(row, head);
            let dot = |a: &[f64], b: &[f64]| (0..self.head_dim).map(|at| a[at] * b[at]).sum::<f64>();
            let dlse = if with_dlse { f64::from(self.dlse[row * self.heads + head]) } else { 0.0 };
            let d = dot(&d_o[at_q..], &o[at_q..]) - dlse;
            for (key, p) in p {
                let at_k = self.at_key(key, head);
                let ds = p * (dot(&d_o[at_q..], &v[at_k..]) - d) * scale;
                for at in 0..self.head_dim {
                    dq[at_q + at] += ds * k[at_k + at];
                    dk[at_k + at] += ds * q[at_q + at];
                    dv[at_k + at] += p * d_o[at_q + at];
                }
            }
        });
        Results { o, lse, dq, dk, dv }
    }

    /// The largest magnitude of a score: probabilities are as inexact as that says.
    fn amplified(&self) -> f64 {
        let norm = |of: &[f32]| {
            let lengths =
                of.chunks(self.head_dim).map(|head| head.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt());
            lengths.fold(0.0, f64::max)
        };
        1.0 + norm(&self.q) * norm(&self.k) * f64::from(self.scale)
    }

    fn check(&self, what: &str, dtype: DType, found: &Results<f32>, expected: &Results<f64>) {
        // Gradients sum over rows and heads what was summed over keys.
        let (terms, amplified) = (self.head_dim + self.rows, self.amplified());
        let group = self.heads / self.kv_heads;
        assert_sums(&format!("{what}: o"), dtype, &found.o, &expected.o, terms, amplified);
        assert_sums(&format!("{what}: lse"), DType::F32, &found.lse, &expected.lse, terms, amplified);
        for (name, found, expected) in
            [("dq", &found.dq, &expected.dq), ("dk", &found.dk, &expected.dk), ("dv", &found.dv, &expected.dv)]
        {
            assert_sums(&format!("{what}: {name}"), dtype, found, expected, terms * group, amplified);
        }
    }
}

/// Shapes that are awkward in one way each.
fn cases() -> Vec<(&'static str, Case)> {
    let windowed = |window| Mask::Causal { window: Some(window) };
    let gaps = vec![2..3, 7..60, 60..60, 64..161];
    vec![
        ("one row", Case::new(documents(&[1]), (1, 1, 1), CAUSAL)),
        ("short documents", Case::new(documents(&[1, 2, 5, 1, 33]), (4, 2, 3), CAUSAL)),
        ("gaps", Case::new(gaps, (3, 1, 17), CAUSAL)),
        ("whole blocks", Case::new(documents(&[192, 96]), (2, 2, 32), CAUSAL)),
        ("many blocks", Case::new(documents(&[301]), (2, 1, 16), CAUSAL)),
        ("groups of seven", Case::new(documents(&[100, 31]), (14, 2, 64), CAUSAL)),
        ("wide heads", Case::new(documents(&[50, 99]), (2, 1, 200), CAUSAL)),
        ("window of one", Case::new(documents(&[7, 120]), (2, 1, 8), windowed(1))),
        ("window within a block", Case::new(documents(&[130, 3]), (2, 2, 20), windowed(5))),
        ("window over blocks", Case::new(documents(&[330]), (2, 1, 12), windowed(150))),
        ("window over all", Case::new(documents(&[100]), (1, 1, 12), windowed(1000))),
        ("bidirectional", Case::new(documents(&[210, 1, 96, 40]), (4, 2, 24), Mask::Bidirectional)),
    ]
}

#[test]
fn results_are_those_of_the_formulas() {
    for (name, case) in cases() {
        let expected = case.expected(true);
        for cpu in cpus() {
            case.check(&format!("{name}, {}", cpu.isa().name()), DType::F32, &case.run(&cpu), &expected);
        }
    }
}

#[test]
fn operands_may_be_bf16() {
    for (name, case) in cases() {
        let case = case.rounded();
        let mut expected = case.expected(false);
        for cpu in cpus() {
            let found = case.run_bf16(&cpu);
            assert_sums(name, DType::BF16, &found.o, &expected.o, 1, 1.0);
            // The gradient's D is that of the rounded o; else nothing is rounded to bf16.
            expected.o = doubles(&found.o);
            case.check(name, DType::BF16, &found, &expected);
        }
    }
}

#[test]
fn formulas_have_the_slopes_of_the_reference() {
    let case = Case::new(vec![0..3, 4..9], (2, 1, 2), Mask::Causal { window: Some(3) });
    let expected = case.expected(true);
    let (q, k, v) = (doubles(&case.q), doubles(&case.k), doubles(&case.v));
    let loss = |q: &[f64], k: &[f64], v: &[f64]| {
        let (o, lse) = case.reference(q, k, v);
        let of_o: f64 = o.iter().zip(&case.d_o).map(|(o, d_o)| o * f64::from(*d_o)).sum();
        of_o + lse.iter().zip(&case.dlse).map(|(lse, dlse)| lse * f64::from(*dlse)).sum::<f64>()
    };
    assert_slopes("dq", &expected.dq, &differences(&q, |q| loss(q, &k, &v)));
    assert_slopes("dk", &expected.dk, &differences(&k, |k| loss(&q, k, &v)));
    assert_slopes("dv", &expected.dv, &differences(&v, |v| loss(&q, &k, v)));
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for (name, case) in cases() {
        for cpu in cpus() {
            let alone = case.run(&cpu).bits();
            for threads in [1, 2, 4] {
                assert!(with_threads(threads, || case.run(&cpu).bits()) == alone, "{name}, {threads} threads");
            }
        }
    }
}

#[test]
fn a_document_has_the_bits_that_it_has_alone() {
    for mask in [CAUSAL, Mask::Causal { window: Some(40) }, Mask::Bidirectional] {
        let packed = Case::new(documents(&[3, 150, 1, 97]), (4, 2, 12), mask);
        for cpu in cpus() {
            let together = packed.run(&cpu);
            for doc in packed.docs.clone() {
                let mut alone = Case::new(documents(&[doc.len()]), (4, 2, 12), mask);
                let part = |of: &[f32]| {
                    let cols = of.len() / packed.rows;
                    of[doc.start * cols..doc.end * cols].to_vec()
                };
                (alone.q, alone.k, alone.v) = (part(&packed.q), part(&packed.k), part(&packed.v));
                (alone.d_o, alone.dlse) = (part(&packed.d_o), part(&packed.dlse));
                let Results { o, lse, dq, dk, dv } = &together;
                let of_packed = [o, lse, dq, dk, dv].into_iter().flat_map(|of| bits(&part(of))).collect::<Vec<_>>();
                assert!(alone.run(&cpu).bits() == of_packed, "{doc:?} under {mask:?}");
            }
        }
    }
}

#[test]
fn the_last_rows_of_documents_have_the_results_that_they_have_among_all() {
    for (name, case) in cases() {
        let (wide, expected) = (case.wide(), case.expected(false));
        let rows_of = |of: &[f64], rows: &[usize], cols: usize| -> Vec<f64> {
            rows.iter().flat_map(|row| of[row * cols..(row + 1) * cols].to_vec()).collect()
        };
        for cpu in cpus() {
            let all = case.run(&cpu);
            for most in [1, 2, 13, 100] {
                let what = format!("{name}, the last {most}, {}", cpu.isa().name());
                let (rows, o, lse) = case.last(&cpu, most);
                let (terms, amplified) = (case.head_dim + case.rows, case.amplified());
                assert_sums(&what, DType::F32, &o, &rows_of(&expected.o, &rows, wide), terms, amplified);
                assert_sums(&what, DType::F32, &lse, &rows_of(&expected.lse, &rows, case.heads), terms, amplified);
                for (at, row) in rows.iter().enumerate() {
                    assert_eq!(bits(&o[at * wide..][..wide]), bits(&all.o[row * wide..][..wide]), "{what}: row {row}");
                }
            }
        }
    }
}

#[test]
fn large_scores_stay_finite() {
    for cpu in cpus() {
        let mut case = Case::new(documents(&[110]), (2, 1, 4), CAUSAL);
        // Scores of about ±1e4, of which one per row wins.
        case.q.iter_mut().for_each(|q| *q *= 100.0);
        case.k.iter_mut().for_each(|k| *k *= 100.0);
        let found = case.run(&cpu);
        case.check("large", DType::F32, &found, &case.expected(true));
        let (_, o, lse) = case.last(&cpu, 1);
        assert!(o.iter().chain(&lse).all(|x| x.is_finite()));
    }
}

#[test]
fn rows_of_no_document_get_zeros() {
    let case = Case::new(vec![2..4, 6..7], (2, 1, 3), CAUSAL);
    for cpu in cpus() {
        let found = case.run(&cpu);
        for row in [0, 1, 4, 5] {
            assert_eq!(found.o[row * 6..][..6], [0.0; 6]);
            assert_eq!(found.lse[row * 2..][..2], [0.0; 2]);
            assert_eq!(found.dq[row * 6..][..6], [0.0; 6]);
            assert_eq!((&found.dk[row * 3..][..3], &found.dv[row * 3..][..3]), (&[0.0; 3][..], &[0.0; 3][..]));
        }
    }
}

#[test]
fn what_is_not_a_number_shows() {
    for cpu in cpus() {
        let mut case = Case::new(documents(&[40]), (1, 1, 8), CAUSAL);
        case.q[20 * 8 + 3] = f32::NAN;
        let found = case.run(&cpu);
        assert!(found.o[20 * 8..][..8].iter().all(|o| o.is_nan()));
        assert!(found.o[21 * 8..].iter().all(|o| o.is_finite()));
    }
}
