//! Dropout masks from logical indices: a row's mask depends on the seed, the step, the site and which example's which
//! position it is, never on its place in a pack, on a rank or on a thread.

use attune_architecture::SiteId;
use attune_points::adapter::DropoutMask;
use attune_points::{Layout, Result};
use attune_tensor::Rng;
use attune_tensor::rng;
use candle_core::{Device, Tensor};

/// The key of a pass's dropout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropout {
    /// The job's seed.
    pub seed: u64,
    /// The optimiser step.
    pub step: u64,
}

/// The masks of some rows of a batch.
pub(crate) struct RowMasks<'a> {
    pub(crate) key: Dropout,
    pub(crate) layout: &'a Layout,
    /// The rows at hand; all of them if `None`.
    pub(crate) rows: Option<&'a [u32]>,
}

/// Which values of some rows are kept: a bit each.
#[derive(Debug)]
pub(crate) struct DropoutBits {
    bits: Vec<u32>,
    width: usize,
    /// What a kept value is multiplied with.
    factor: f32,
}

impl DropoutBits {
    /// The same of all these rows, which are of one width and factor; none of no rows.
    pub(crate) fn join(rows: impl IntoIterator<Item = Self>) -> Option<Self> {
        rows.into_iter().reduce(|mut all, rows| {
            all.bits.extend(rows.bits);
            all
        })
    }

    /// The factor on each value, row after row.
    pub(crate) fn factors(&self) -> Vec<f32> {
        rng::spread(&self.bits, self.width, self.factor)
    }
}

impl RowMasks<'_> {
    fn n_rows(&self) -> usize {
        self.rows.map_or_else(|| self.layout.n_rows(), <[u32]>::len)
    }

    /// The stream of each row at hand for a purpose at a site.
    fn streams(&self, purpose: &str, site: &SiteId) -> impl Fn(usize) -> Rng + Sync {
        let stream = Rng::new(self.key.seed, purpose).sub(self.key.step).named(site.as_str());
        let docs = self.layout.docs();
        move |at: usize| {
            let row = self.rows.map_or(at as u32, |rows| rows[at]);
            let doc = &docs[docs.partition_point(|doc| doc.rows.end <= row)];
            stream.sub(u64::from(doc.domain)).sub(doc.example).sub(u64::from(row - doc.rows.start))
        }
    }

    /// Which values of the rows at hand are kept at a site, where each is dropped with probability `p`.
    pub(crate) fn kept(&self, site: &SiteId, width: usize, p: f64) -> DropoutBits {
        // A word below the threshold drops the value.
        let threshold = (p * 4_294_967_296.0) as u32;
        let bits = rng::bits(self.n_rows(), width, threshold, self.streams("dropout", site));
        DropoutBits { bits, width, factor: (1.0 / (1.0 - p)) as f32 }
    }
}

impl DropoutMask for RowMasks<'_> {
    fn mask(&self, site: &SiteId, width: usize, p: f64, like: &Tensor) -> Result<Tensor> {
        let factors = self.kept(site, width, p).factors();
        Ok(Tensor::from_vec(factors, (self.n_rows(), width), &Device::Cpu)?.to_dtype(like.dtype())?)
    }

    fn noise(&self, site: &SiteId, width: usize, like: &Tensor) -> Result<Tensor> {
        let stream = self.streams("noise", site);
        let row = |at: usize| {
            let mut stream = stream(at);
            (0..width).map(move |_| stream.normal())
        };
        let values: Vec<f64> = (0..self.n_rows()).flat_map(row).collect();
        Ok(Tensor::from_vec(values, (self.n_rows(), width), &Device::Cpu)?.to_dtype(like.dtype())?)
    }

    fn shared_noise(&self, site: &SiteId, what: &str, shape: &[usize], like: &Tensor) -> Result<Tensor> {
        let of_step = Rng::new(self.key.seed, "shared noise").sub(self.key.step);
        Ok(of_step.named(site.as_str()).named(what).normal_tensor(shape, 1.0, like.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use attune_points::Row;
    use attune_points::layout::{NO_LABEL, Source};
    use candle_core::DType;

    use super::*;

    fn layout(examples: &[u64]) -> Layout {
        let mut layout = Layout::new();
        for &example in examples {
            layout
                .push(Source { example, ..Source::default() }, [(Row::Token(1), NO_LABEL), (Row::Token(2), NO_LABEL)]);
        }
        layout
    }

    fn mask(layout: &Layout, rows: Option<&[u32]>, step: u64) -> Vec<Vec<f32>> {
        let like = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let masks = RowMasks { key: Dropout { seed: 1, step }, layout, rows };
        masks.mask(&SiteId::new("q_proj"), 64, 0.25, &like).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn a_row_keeps_its_mask_wherever_it_is_packed() {
        let (a, b) = (layout(&[4, 9]), layout(&[9, 2, 4]));
        let (in_a, in_b) = (mask(&a, None, 3), mask(&b, None, 3));
        assert_eq!(in_a[0..2], in_b[4..6]);
        assert_eq!(in_a[2..4], in_b[0..2]);
        assert_ne!(in_a[0], in_a[1]);
        assert_ne!(in_a, mask(&a, None, 4));
        assert_eq!(mask(&b, Some(&[1, 4]), 3), [in_b[1].clone(), in_b[4].clone()]);
    }

    /// 4,096 draws; the bound of five standard errors is a false alarm in fewer than one of a million seeds.
    #[test]
    fn about_a_share_of_p_is_dropped_and_the_rest_is_scaled() {
        let rows = mask(&layout(&(0..32).collect::<Vec<_>>()), None, 0);
        let values: Vec<f32> = rows.into_iter().flatten().collect();
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64;
        let n = values.len() as f64;
        assert!((dropped - 0.25 * n).abs() < 5.0 * (n * 0.25 * 0.75).sqrt(), "{dropped} of {n}");
        assert!(values.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
    }

    /// Bounds at five standard errors of 4,096 draws.
    #[test]
    fn noise_is_normal_keyed_by_rows_and_apart_from_dropout() {
        let noise = |layout: &Layout, rows: Option<&[u32]>, step: u64| -> Vec<Vec<f64>> {
            let like = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
            let masks = RowMasks { key: Dropout { seed: 1, step }, layout, rows };
            masks.noise(&SiteId::new("q_proj"), 64, &like).unwrap().to_vec2().unwrap()
        };
        let (a, b) = (layout(&[4, 9]), layout(&[9, 2, 4]));
        assert_eq!(noise(&a, None, 3)[0..2], noise(&b, None, 3)[4..6]);
        assert_eq!(noise(&b, Some(&[1, 4]), 3)[1], noise(&a, None, 3)[0]);
        assert_ne!(noise(&a, None, 3), noise(&a, None, 4));
        let values: Vec<f64> = noise(&layout(&(0..32).collect::<Vec<_>>()), None, 0).into_iter().flatten().collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let square = values.iter().map(|value| value * value).sum::<f64>() / n;
        assert!(mean.abs() < 5.0 / n.sqrt() && (square - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{mean} {square}");
    }

    #[test]
    fn shared_noise_is_keyed_by_what_it_is_for_and_not_by_rows() {
        let (a, b) = (layout(&[4, 9]), layout(&[9, 2, 4]));
        let like = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
        let noise = |layout: &Layout, rows: Option<&[u32]>, (seed, step): (u64, u64), site: &str, what: &str| {
            let masks = RowMasks { key: Dropout { seed, step }, layout, rows };
            let drawn = masks.shared_noise(&SiteId::new(site), what, &[3, 200], &like).unwrap();
            drawn.flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        let first = noise(&a, None, (1, 3), "q_proj", "draws");
        assert_eq!(first, noise(&b, Some(&[0, 5]), (1, 3), "q_proj", "draws"));
        for (key, site, what) in [
            ((2, 3), "q_proj", "draws"),
            ((1, 4), "q_proj", "draws"),
            ((1, 3), "k_proj", "draws"),
            ((1, 3), "q_proj", "shares"),
        ] {
            assert_ne!(first, noise(&a, None, key, site, what), "{key:?}, {site}, {what}");
        }
        let mean = first.iter().sum::<f64>() / 600.0;
        let variance = first.iter().map(|x| x * x).sum::<f64>() / 600.0;
        // Four standard errors of 600 numbers.
        assert!(mean.abs() < 0.17 && (variance - 1.0).abs() < 0.24, "{mean} and {variance}");
    }
}
