//! Sums over the rows that linears read.
//!
//! A part's rows are multiplied with themselves in 32 bits, by the engine's kernels; the parts are added in 64 bits, in the order
//! in which they come, the lower half alone of what is symmetric. What counts of a part are its tokens, or those that are learned from; see [`Counted`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use attune_architecture::{Site, SiteId};
use attune_points::layout::NO_LABEL;
use attune_points::stats::{Counted, Covariance, Norms, Stat, What};
use attune_points::{Layout, Result, Row, Tap};
use attune_tensor::kernels::{Gemm, Kernels, Operand};
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::wanted::read_with;

/// The sums of one request at one site.
struct Sums {
    rows: Counted,
    scaled: bool,
    /// The lower half of `Σ_t x_t x_tᵀ`, row after row, or its diagonal alone.
    second: Vec<f64>,
    is_whole: bool,
    /// `Σ_t x_t`.
    first: Vec<f64>,
    n_rows: u64,
    documents: u64,
}

impl Sums {
    fn new(what: What, input: usize) -> Option<Self> {
        let (rows, scaled, is_whole) = match what {
            What::InputCovariance { rows, scaled } => (rows, scaled, true),
            What::InputNorms { rows } => (rows, false, false),
            What::Gradient | What::Fisher => return None,
        };
        let second = vec![0.0; if is_whole { input * (input + 1) / 2 } else { input }];
        Some(Self { rows, scaled, second, is_whole, first: vec![0.0; input], n_rows: 0, documents: 0 })
    }

    /// Adds the rows of a part.
    fn add(&mut self, layout: &Layout, ids: Option<&[u32]>, x_ti: View<'_, f32>, kernels: &dyn Kernels) {
        let input = x_ti.cols();
        let chosen = self.chosen(layout, ids, x_ti.rows());
        let n_rows: usize = chosen.iter().map(Vec::len).sum();
        self.n_rows += n_rows as u64;
        self.documents += chosen.len() as u64;
        if n_rows == 0 {
            return;
        }
        let copied;
        let counted_ti = if n_rows == x_ti.rows() && !self.scaled {
            x_ti
        } else {
            copied = self.copied(&chosen, x_ti);
            View::new(&copied, n_rows, input)
        };
        for row in 0..n_rows {
            self.first.iter_mut().zip(counted_ti.row(row)).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        if !self.is_whole {
            for row in 0..n_rows {
                let squares = counted_ti.row(row).iter().map(|x| f64::from(*x) * f64::from(*x));
                self.second.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
            }
            return;
        }
        let counted_ti = MatRef::F32(counted_ti);
        let mut product = vec![0.0f32; input * input];
        let of = Gemm::new(Operand::transposed(counted_ti), Operand::plain(counted_ti));
        kernels.gemm(ViewMut::new(&mut product, input, input), &of);
        let (mut rest, mut rows) = (self.second.as_mut_slice(), Vec::with_capacity(input));
        for length in 1..=input {
            let (row, others) = rest.split_at_mut(length);
            rows.push(row);
            rest = others;
        }
        rows.into_par_iter().zip(product.par_chunks_exact(input)).for_each(|(sums, parts)| {
            sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += f64::from(*part));
        });
    }

    /// The rows that count, one after the other, scaled if they are to be.
    fn copied(&self, chosen: &[Vec<usize>], x_ti: View<'_, f32>) -> Vec<f32> {
        let mut copied = Vec::with_capacity(chosen.iter().map(Vec::len).sum::<usize>() * x_ti.cols());
        for of_doc in chosen {
            let numbers = of_doc.iter().flat_map(|&row| x_ti.row(row)).copied();
            if self.scaled {
                let divisor = divisor(numbers.clone().fold(f32::NEG_INFINITY, f32::max));
                copied.extend(numbers.map(|x| x / divisor));
            } else {
                copied.extend(numbers);
            }
        }
        copied
    }

    /// The places of the rows that count, document by document; documents without one are left out.
    fn chosen(&self, layout: &Layout, ids: Option<&[u32]>, n_rows: usize) -> Vec<Vec<usize>> {
        let labels = layout.labels();
        let counts = |row: usize| match self.rows {
            Counted::Tokens => matches!(layout.rows()[row], Row::Token(_)),
            Counted::Supervised => labels.get(row).is_some_and(|label| *label != NO_LABEL),
        };
        let mut of_docs: Vec<Vec<usize>> = vec![Vec::new(); layout.docs().len()];
        for place in 0..n_rows {
            let row = ids.map_or(place, |ids| ids[place] as usize);
            let doc = layout.docs().partition_point(|doc| doc.rows.end as usize <= row);
            if counts(row) {
                of_docs[doc].push(place);
            }
        }
        of_docs.retain(|rows| !rows.is_empty());
        of_docs
    }

    fn stat(&self) -> Result<Stat> {
        let input = self.first.len();
        let (rows, documents) = (self.n_rows, self.documents);
        if !self.is_whole {
            let sum_i = Tensor::from_slice(&self.second, input, &Device::Cpu)?;
            return Ok(Stat::Norms(Norms { sum_i, rows, documents }));
        }
        let second = &self.second;
        let number = |at: usize| {
            let (row, col) = (at / input, at % input);
            let (low, high) = (row.min(col), row.max(col));
            second[high * (high + 1) / 2 + low] as f32
        };
        let sum_ii: Vec<f32> = (0..input * input).into_par_iter().map(number).collect();
        let sum_ii = Tensor::from_vec(sum_ii, (input, input), &Device::Cpu)?;
        let sum_i = Tensor::from_slice(&self.first, input, &Device::Cpu)?.to_dtype(DType::F64)?;
        Ok(Stat::Covariance(Covariance { sum_ii, sum_i, rows, documents }))
    }
}

/// What the rows of a document are divided by. Rows without a number above or below zero stay as they are.
fn divisor(largest: f32) -> f32 {
    if largest == 0.0 || !largest.is_finite() { 1.0 } else { largest.abs() }
}

/// The sums of all requests of one selection of examples.
#[derive(Default)]
pub(crate) struct Inputs {
    /// By the first site that reads the rows.
    sums: BTreeMap<SiteId, Vec<(What, Mutex<Sums>)>>,
    /// Where each site's are.
    of: BTreeMap<(What, SiteId), SiteId>,
}

impl Inputs {
    pub(crate) fn add(&mut self, what: What, sites: &BTreeMap<SiteId, Site>) {
        for site in sites.values() {
            let first = read_with(site, sites).clone();
            let known = self.sums.get(&first).is_some_and(|sums| sums.iter().any(|(other, _)| *other == what));
            let input = site.out_in().map_or(0, |(_, input)| input);
            if !known {
                let Some(sums) = Sums::new(what, input) else { return };
                self.sums.entry(first.clone()).or_default().push((what, Mutex::new(sums)));
            }
            self.of.insert((what, site.id.clone()), first);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Looks at a pass over these parts.
    pub(crate) const fn looking<'a>(&'a self, parts: &'a [Arc<Layout>]) -> Looking<'a> {
        Looking { inputs: self, parts }
    }

    /// What was found, by what was wanted and the site. Sites that read the same rows share the tensors.
    pub(crate) fn found(mut self) -> Result<Vec<(What, SiteId, Stat)>> {
        let mut stats: BTreeMap<(What, SiteId), Stat> = BTreeMap::new();
        // One site's sums in 64 bits are gone before the next one's are made smaller.
        while let Some((site, sums)) = self.sums.pop_first() {
            for (what, sums) in sums {
                let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
                stats.insert((what, site.clone()), sums.stat()?);
            }
        }
        let each = self.of.into_iter().filter_map(|((what, site), first)| {
            let stat = stats.get(&(what, first))?.clone();
            Some((what, site, stat))
        });
        Ok(each.collect())
    }
}

/// The sums at work on one pass.
pub(crate) struct Looking<'a> {
    inputs: &'a Inputs,
    parts: &'a [Arc<Layout>],
}

impl Tap for Looking<'_> {
    fn wants(&self, site: &SiteId) -> bool {
        self.inputs.sums.contains_key(site)
    }

    fn read(
        &self,
        site: &SiteId,
        part: usize,
        ids: Option<&[u32]>,
        x_ti: MatRef<'_>,
        kernels: &dyn Kernels,
    ) -> Result<()> {
        let (Some(sums), Some(layout)) = (self.inputs.sums.get(site), self.parts.get(part)) else { return Ok(()) };
        let (rows, cols) = (x_ti.rows(), x_ti.cols());
        let mut wide = Vec::new();
        let x_ti = match x_ti {
            MatRef::F32(view) => view,
            MatRef::Bf16(_) => {
                wide.resize(rows * cols, 0.0f32);
                kernels.convert(x_ti, ViewMut::new(&mut wide, rows, cols).into());
                View::new(&wide, rows, cols)
            }
        };
        for (_, sums) in sums {
            sums.lock().unwrap_or_else(PoisonError::into_inner).add(layout, ids, x_ti, kernels);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::{Place, SiteKind};
    use attune_points::layout::Source;
    use attune_tensor::kernels;

    use super::*;

    fn read(what: What, layout: Layout, ids: Option<&[u32]>, x_ti: &[f32]) -> Stat {
        let kind = SiteKind::Linear { output: 1, input: 2, bias: false, transposed: false };
        let site = Site { id: "o_proj".into(), kind, layer: None, expert: None, place: Place::Output, role: "o_proj" };
        let mut inputs = Inputs::default();
        inputs.add(what, &BTreeMap::from([(site.id.clone(), site.clone())]));
        let parts = [Arc::new(layout)];
        let x_ti = MatRef::F32(View::new(x_ti, x_ti.len() / 2, 2));
        inputs.looking(&parts).read(&site.id, 0, ids, x_ti, kernels::cpu()).unwrap();
        inputs.found().unwrap().pop().unwrap().2
    }

    /// Two documents: a row that a prompt fills, three tokens, of which the second has a label; two tokens, the first with a label.
    fn layout() -> Layout {
        let mut layout = Layout::new();
        let prompt = Row::Virtual { slot: 0, index: 0 };
        let token = Row::Token(1);
        layout.push(Source::default(), [(prompt, NO_LABEL), (token, NO_LABEL), (token, 4), (token, NO_LABEL)]);
        layout.push(Source::default(), [(token, 4), (token, NO_LABEL)]);
        layout
    }

    const X: [f32; 12] = [100.0, 100.0, 1.0, 2.0, -3.0, -2.0, 5.0, 4.0, 2.0, 8.0, 7.0, 1.0];

    #[test]
    fn tokens_count_or_those_that_are_learned_from_and_virtual_rows_never() {
        let norms = |rows| {
            let Stat::Norms(found) = read(What::InputNorms { rows }, layout(), None, &X) else { panic!() };
            (found.sum_i.to_vec1::<f64>().unwrap(), found.rows, found.documents)
        };
        assert_eq!(norms(Counted::Tokens), (vec![1.0 + 9.0 + 25.0 + 4.0 + 49.0, 4.0 + 4.0 + 16.0 + 64.0 + 1.0], 5, 2));
        assert_eq!(norms(Counted::Supervised), (vec![13.0, 68.0], 2, 2));
        // Some rows of a part: those of an expert.
        let what = What::InputNorms { rows: Counted::Supervised };
        let Stat::Norms(found) = read(what, layout(), Some(&[1, 4]), &[9.0, 9.0, 3.0, 0.0]) else { panic!() };
        assert_eq!((found.sum_i.to_vec1::<f64>().unwrap(), found.rows, found.documents), (vec![9.0, 0.0], 1, 1));
    }

    #[test]
    fn rows_are_scaled_document_by_document_by_what_counts() {
        let what = |rows| What::InputCovariance { rows, scaled: true };
        let Stat::Covariance(found) = read(what(Counted::Supervised), layout(), None, &X) else { panic!() };
        // By |-2| and 8.
        let expected = [2.25 + 0.0625, 1.5 + 0.25, 1.5 + 0.25, 1.0 + 1.0];
        assert_eq!(found.sum_ii.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
        assert_eq!(found.sum_i.to_vec1::<f64>().unwrap(), [-1.5 + 0.25, -1.0 + 1.0]);
        let Stat::Covariance(all) = read(what(Counted::Tokens), layout(), None, &X) else { panic!() };
        assert_eq!((all.rows, all.documents, all.sum_ii.dims2().unwrap()), (5, 2, (2, 2)));
    }

    #[test]
    fn rows_without_a_largest_number_stay_as_they_are() {
        assert_eq!([-2.0, 0.5, 0.0, f32::INFINITY].map(divisor), [2.0, 0.5, 1.0, 1.0]);
    }
}
