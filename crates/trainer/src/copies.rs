//! Losses of several copies of a text: how far what is said of one is from what is said of another.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use attune_points::layout::Supervised;
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, LogitsLoss, Needs, Objective};
use attune_points::{Error, Result};
use attune_tensor::ops;
use candle_core::{DType, Device, Tensor};

/// `KL(second copy ‖ first)`.
#[derive(Debug)]
pub(crate) struct Departure;

impl Objective for Departure {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn copies(&self) -> usize {
        2
    }

    fn chunk(&self, _: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::Logits(Arc::new(Self)))
    }
}

impl LogitsLoss for Departure {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let rows = logits_cv.dim(0)? / 2;
        let still = ops::log_softmax(&logits_cv.narrow(0, 0, rows)?.detach())?;
        let moved = ops::log_softmax(&logits_cv.narrow(0, rows, rows)?)?;
        Ok((moved.exp()? * (&moved - still)?)?.sum(1)?)
    }
}

/// The symmetric divergence of each row.
fn symmetric(a_cv: &Tensor, b_cv: &Tensor) -> Result<Tensor> {
    Ok(((a_cv.exp()? - b_cv.exp()?)? * (a_cv - b_cv)?)?.sum(1)?)
}

/// The job's loss with divergences from the other copies.
pub(crate) struct Smoothed {
    pub(crate) job: Arc<dyn Objective>,
    pub(crate) smoothness: f64,
    pub(crate) proximity: f64,
    /// Sums of the two divergences.
    pub(crate) sums: Arc<Mutex<[f64; 2]>>,
}

impl Objective for Smoothed {
    fn needs(&self) -> Needs {
        self.job.needs()
    }

    fn denominator(&self) -> Denominator {
        self.job.denominator()
    }

    fn copies(&self) -> usize {
        1 + usize::from(self.smoothness > 0.0) + usize::from(self.proximity > 0.0)
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::Logits(Arc::new(OfChunk {
            job: self.job.chunk(chunk)?,
            rows: chunk.rows.to_vec(),
            weights: [self.smoothness, self.proximity],
            sums: Arc::clone(&self.sums),
        })))
    }
}

/// The same of one chunk.
pub(crate) struct OfChunk {
    pub(crate) job: ChunkLoss,
    pub(crate) rows: Vec<Supervised>,
    pub(crate) weights: [f64; 2],
    pub(crate) sums: Arc<Mutex<[f64; 2]>>,
}

impl fmt::Debug for OfChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OfChunk").field("job", &self.job).finish_non_exhaustive()
    }
}

impl LogitsLoss for OfChunk {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let rows = self.rows.len();
        let copy = |at: usize| logits_cv.narrow(0, at * rows, rows);
        let first_cv = copy(0)?;
        let log_p_cv = ops::log_softmax(&first_cv)?;
        let mut loss_c = match &self.job {
            ChunkLoss::CrossEntropy { weight_t } => {
                let labels: Vec<u32> = self.rows.iter().map(|row| row.label).collect();
                let labels_c1 = Tensor::new(labels, &Device::Cpu)?.unsqueeze(1)?;
                let weight_c = Tensor::new(weight_t.as_slice(), &Device::Cpu)?.to_dtype(log_p_cv.dtype())?;
                (log_p_cv.gather(&labels_c1, 1)?.squeeze(1)?.neg()? * weight_c)?
            }
            ChunkLoss::Logits(loss) => loss.graph(&first_cv)?,
            _ => return Err(Error::Refused("`smart` does not know how to add to such a loss".to_owned())),
        };
        let [smoothness, proximity] = self.weights;
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = 1;
        for (weight, sum, through) in
            [smoothness, proximity].into_iter().zip(sums.iter_mut()).zip([true, false]).map(|((w, s), t)| (w, s, t))
        {
            if weight == 0.0 {
                continue;
            }
            let other_cv = if through { copy(next)? } else { copy(next)?.detach() };
            next += 1;
            let divergence_c = symmetric(&log_p_cv, &ops::log_softmax(&other_cv)?)?;
            *sum += divergence_c.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            loss_c = (loss_c + (divergence_c * weight)?)?;
        }
        Ok(loss_c)
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;
    use candle_core::Var;

    use super::*;

    /// The loss of a chunk by the logits of its three copies, in f64, against central differences: both branches of the first
    /// divergence and one of the second have a gradient.
    #[test]
    fn the_gradient_is_that_of_differences() {
        let rows = vec![Supervised { row: 0, label: 2 }, Supervised { row: 1, label: 0 }];
        let of = |weights| OfChunk {
            job: ChunkLoss::CrossEntropy { weight_t: vec![1.0, 0.5] },
            rows: rows.clone(),
            weights,
            sums: Arc::default(),
        };
        let logits = Rng::new(2, "logits").normal_tensor((6, 4), 1.0, DType::F64).unwrap();
        let loss = of([0.7, 0.3]);
        let leaf = Var::from_tensor(&logits).unwrap();
        let gradients = loss.graph(leaf.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let gradient: Vec<f64> = gradients.get(leaf.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let flat: Vec<f64> = logits.flatten_all().unwrap().to_vec1().unwrap();
        for (at, gradient) in gradient.iter().enumerate() {
            let value = |h: f64| {
                let mut moved = flat.clone();
                moved[at] += h;
                let moved = Tensor::from_vec(moved, (6, 4), &Device::Cpu).unwrap();
                loss.graph(&moved).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
            };
            let difference = (value(1e-5) - value(-1e-5)) / 2e-5;
            let expected = if at < 16 { difference } else { 0.0 };
            assert!((gradient - expected).abs() < 1e-8, "{at}: {gradient}, {expected}");
            assert!(difference.abs() > 1e-6, "each of the copies counts");
        }
    }
}
