//! Sums of plane waves over a grid, by a fast transform.
//!
//! ```text
//! y_pq = Σ_k c_k cos(2π (p u_k / o + q v_k / i))        dc_k = Σ_pq dy_pq cos(2π (p u_k / o + q v_k / i))
//! ```
//! The first is an inverse transform of a spectrum that is c_k / 2 at (u_k, v_k) and at (-u_k, -v_k), of which half of the columns say
//! all; the second a transform of which these places are read. Rows and columns know nothing of each other, so that no bit depends on
//! how many threads share them out.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;
use realfft::{FftNum, RealFftPlanner};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;

use crate::scaled::{tensors, with};

/// What [`crate::ops::waves`] says.
pub(crate) fn waves(c_k: &Tensor, places: Vec<(usize, usize)>, (o, i): (usize, usize)) -> Result<Tensor> {
    if c_k.elem_count() != places.len() {
        bail!("{} amplitudes of {} waves; expected one each", c_k.elem_count(), places.len());
    }
    if let Some((u, v)) = places.iter().find(|(u, v)| *u >= o || *v >= i) {
        bail!("a wave of frequencies ({u}, {v}) on a grid of {o} by {i}; expected lower ones");
    }
    c_k.contiguous()?.apply_op1(Waves { places, o, i })
}

/// How transforms of each length are done: found out once.
struct Plans<T: FftNum> {
    real: RealFftPlanner<T>,
    complex: FftPlanner<T>,
}

type Shared<T> = LazyLock<Mutex<Plans<T>>>;

static NARROW: Shared<f32> = LazyLock::new(|| Mutex::new(Plans::new()));
static WIDE: Shared<f64> = LazyLock::new(|| Mutex::new(Plans::new()));

impl<T: FftNum> Plans<T> {
    fn new() -> Self {
        Self { real: RealFftPlanner::new(), complex: FftPlanner::new() }
    }
}

/// Numbers that are transformed.
trait Number: FftNum + WithDType {
    fn plans() -> &'static Mutex<Plans<Self>>;
}

impl Number for f32 {
    fn plans() -> &'static Mutex<Plans<Self>> {
        &NARROW
    }
}

impl Number for f64 {
    fn plans() -> &'static Mutex<Plans<Self>> {
        &WIDE
    }
}

struct Waves {
    places: Vec<(usize, usize)>,
    o: usize,
    i: usize,
}

impl Waves {
    /// How many columns of the spectrum say all.
    const fn half(&self) -> usize {
        self.i / 2 + 1
    }

    /// The place of the same wave the other way round.
    const fn mirrored(&self, (u, v): (usize, usize)) -> (usize, usize) {
        ((self.o - u) % self.o, (self.i - v) % self.i)
    }

    /// The sum of the waves, row after row.
    fn forward<T: Number>(&self, c: &[T]) -> Result<Vec<T>> {
        let (o, i, half) = (self.o, self.i, self.half());
        let (columns, rows) = {
            let mut plans = T::plans().lock().unwrap_or_else(PoisonError::into_inner);
            (plans.complex.plan_fft_inverse(o), plans.real.plan_fft_inverse(i))
        };
        // Column after column, so that each lies together.
        let mut spectrum = vec![Complex::new(T::zero(), T::zero()); half * o];
        let (two, mut touched) = (T::one() + T::one(), BTreeSet::new());
        for (&place, &c) in self.places.iter().zip(c) {
            for (u, v) in [place, self.mirrored(place)] {
                if v < half {
                    touched.insert(v);
                    spectrum[v * o + u].re += c / two;
                }
            }
        }
        spectrum.par_chunks_mut(o).enumerate().for_each(|(v, column)| {
            if touched.contains(&v) {
                columns.process(column);
            }
        });
        let mut y = vec![T::zero(); o * i];
        let of_row = |(p, row): (usize, &mut [T])| {
            let mut bins: Vec<Complex<T>> = (0..half).map(|v| spectrum[v * o + p]).collect();
            // They are real but for what was rounded.
            bins[0].im = T::zero();
            if i.is_multiple_of(2) {
                bins[half - 1].im = T::zero();
            }
            rows.process(&mut bins, row)
        };
        y.par_chunks_mut(i).enumerate().map(of_row).collect::<std::result::Result<(), _>>().map_err(Error::wrap)?;
        Ok(y)
    }

    /// What the gradient has of each wave.
    fn backward<T: Number>(&self, dy: &[T]) -> Result<Vec<T>> {
        let (o, i, half) = (self.o, self.i, self.half());
        let (columns, rows) = {
            let mut plans = T::plans().lock().unwrap_or_else(PoisonError::into_inner);
            (plans.complex.plan_fft_forward(o), plans.real.plan_fft_forward(i))
        };
        let mut by_rows = vec![Complex::new(T::zero(), T::zero()); o * half];
        let of_row = |(bins, row): (&mut [Complex<T>], &[T])| rows.process(&mut row.to_vec(), bins);
        let transformed = by_rows.par_chunks_mut(half).zip(dy.par_chunks(i)).map(of_row);
        transformed.collect::<std::result::Result<(), _>>().map_err(Error::wrap)?;
        // What is beyond half of the columns is the same the other way round.
        let read = |place: (usize, usize)| if place.1 < half { place } else { self.mirrored(place) };
        let wanted: BTreeSet<usize> = self.places.iter().map(|&place| read(place).1).collect();
        let wanted: Vec<usize> = wanted.into_iter().collect();
        let of_column = |&v: &usize| {
            let mut column: Vec<Complex<T>> = (0..o).map(|p| by_rows[p * half + v]).collect();
            columns.process(&mut column);
            column
        };
        let found: Vec<Vec<Complex<T>>> = wanted.par_iter().map(of_column).collect();
        let of_wave = |&place: &(usize, usize)| {
            let (u, v) = read(place);
            found[wanted.partition_point(|&column| column < v)][u].re
        };
        Ok(self.places.iter().map(of_wave).collect())
    }
}

impl CustomOp1 for Waves {
    fn name(&self) -> &'static str {
        "waves"
    }

    fn cpu_fwd(&self, c: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let narrow = |c: &[f32], _: &[f32]| self.forward(c).map(CpuStorage::F32);
        let wide = |c: &[f64], _: &[f64]| self.forward(c).map(CpuStorage::F64);
        Ok((with((c, at), (c, at), narrow, wide)??, Shape::from((self.o, self.i))))
    }

    fn bwd(&self, c: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let narrow = |dy: &[f32], _: &[f32]| Tensor::from_vec(self.backward(dy)?, c.shape(), c.device());
        let wide = |dy: &[f64], _: &[f64]| Tensor::from_vec(self.backward(dy)?, c.shape(), c.device());
        tensors(&dy, &dy, narrow, wide)?.map(Some)
    }
}
