//! A linear operator with the components at its site: one product over all rows, in whose accumulation low-rank
//! components take part; other components by their graph.
//!
//! ```text
//! y_to  = x_ti W_oiᵀ + b_o + h_tr up_orᵀ           h_tr  = scale (mask ∘ x_ti) down_riᵀ
//! dx_ti = dy_to W_oi + mask ∘ (g_tr down_ri)       g_tr  = scale dy_to up_or
//! dup_or = dy_toᵀ h_tr      ddown_ri = g_trᵀ (mask ∘ x_ti)      dW_oi = dy_toᵀ x_ti      db_o = Σ_t dy_to
//! ```

use std::ops::Range;

use attune_architecture::Site;
use attune_points::adapter::FusedRows;
use attune_points::error::Context as _;
use attune_points::{Error, Result, TensorId};
use attune_tensor::kernels::{Gemm, LowRank, Operand, Right};
use attune_tensor::reading;
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::{Device, Tensor};

use crate::dropout::{DropoutBits, RowMasks};
use crate::pass::arena::{Activations, Mat, Rows};
use crate::pass::local;
use crate::pass::parts::{Added, Given, PassCx, Sinks, wants};
use crate::pass::times::Work;
use crate::pass::weight::Weighed;
use crate::regions;

/// What the reverse pass of a linear needs of each of its low-rank components.
#[derive(Debug, Default)]
pub(crate) struct Thin(Vec<ThinRows>);

/// The thin rows of a low-rank component, and which values of what it read were kept, if some were dropped.
#[derive(Debug)]
struct ThinRows {
    h_tr: Mat,
    kept: Option<DropoutBits>,
}

/// A low-rank component at work, on the rows of parts that follow each other and have the same tensors: their products are
/// one, and only sums over rows are each part's own.
struct Factors<'p, 'a> {
    placed: Vec<&'p Added<'a>>,
    /// Of all of them.
    rows: Range<usize>,
    down: (TensorId, Mat),
    up: (TensorId, Mat),
    scale: f32,
    dropout: f64,
}

impl<'a> PassCx<'a> {
    /// `y (+)= linear(x)` on the rows given; returns what the reverse pass needs.
    ///
    /// # Errors
    /// Whatever a component raises, with the site's name.
    pub(crate) fn linear(
        &self,
        site: &Site,
        x_ti: MatRef<'_>,
        given: Given<'_>,
        mut y_to: ViewMut<'_, f32>,
        accumulate: bool,
    ) -> Result<Thin> {
        self.show(&site.id, x_ti, given)?;
        let (placed, blends) = self.added(site, given)?;
        let factors = self.factors(&placed)?;
        let thin = self.meter.time(Work::Adapter, || {
            factors.iter().map(|factors| self.thin(site, factors, x_ti)).collect::<Result<Vec<_>>>()
        })?;
        let (within, beside) = first_of_each_row(&factors);
        let terms: Vec<LowRank<'_>> = within
            .iter()
            .map(|&i| LowRank {
                rows: factors[i].rows.clone(),
                left: thin[i].h_tr.view(),
                right: Operand::transposed(factors[i].up.1.view()),
            })
            .collect();
        let weighed = self.weighed(site, given);
        let tables = self.tables(site, given);
        let (ended, plain): (Vec<&Weighed<'_>>, Vec<_>) = weighed.iter().partition(|of| !of.ends.is_empty());
        if !ended.is_empty() {
            self.ended(site, &ended, x_ti, y_to.reborrow(), accumulate)?;
            for of in ended {
                let y = y_to.reborrow().into_sub_rows(of.rows.start, of.rows.end);
                self.add_terms(&cut(&terms, &of.rows), y);
            }
        }
        for of in &plain {
            let rows = of.rows.clone();
            // What is added to the logits of a table is added after rows in it have theirs.
            let within = if tables.is_empty() { cut(&terms, &rows) } else { Vec::new() };
            let x = x_ti.sub_rows(rows.start, rows.end);
            self.with_both(site, of, |weight, bias| {
                let y = y_to.reborrow().into_sub_rows(rows.start, rows.end);
                let of = Gemm { a: Operand::plain(x), b: weight.turned(), low_rank: &within, bias, accumulate };
                self.meter.time(Work::Gemm, || self.kernels.gemm(y, &of));
            })?;
        }
        if !tables.is_empty() {
            self.meter.time(Work::Adapter, || self.columns(site, &tables, &weighed, x_ti, y_to.reborrow()))?;
            self.add_terms(&terms, y_to.reborrow());
        }
        self.meter.time(Work::Adapter, || {
            for i in beside {
                let rows = &factors[i].rows;
                let b = Operand::transposed(factors[i].up.1.view());
                let of = Gemm { accumulate: true, ..Gemm::new(Operand::plain(thin[i].h_tr.view()), b) };
                self.kernels.gemm(y_to.reborrow().into_sub_rows(rows.start, rows.end), &of);
            }
            let by_graph: Vec<&Added<'_>> = placed.iter().filter(|placed| placed.port.fused().is_none()).collect();
            local::add_components(self, site, &by_graph, x_ti, y_to.reborrow())?;
            self.blend(site, &blends, x_ti, y_to.reborrow())
        })?;
        Ok(Thin(thin))
    }

    /// What the reverse pass of [`PassCx::linear`] needs, without the product.
    ///
    /// # Errors
    /// As for [`PassCx::linear`].
    pub(crate) fn thin_only(&self, site: &Site, x_ti: MatRef<'_>, given: Given<'_>) -> Result<Thin> {
        let (placed, _) = self.added(site, given)?;
        let factors = self.factors(&placed)?;
        self.meter.time(Work::Adapter, || {
            Ok(Thin(factors.iter().map(|factors| self.thin(site, factors, x_ti)).collect::<Result<Vec<_>>>()?))
        })
    }

    /// The reverse of [`PassCx::linear`]: gradients to the sinks, and `dx (+)= …` where it is asked for.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
    pub(crate) fn linear_vjp(
        &self,
        site: &Site,
        x_ti: MatRef<'_>,
        given: Given<'_>,
        thin: &Thin,
        dy_to: MatRef<'_>,
        mut dx_ti: Option<(ViewMut<'_, f32>, bool)>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let (placed, blends) = self.added(site, given)?;
        let factors = self.factors(&placed)?;
        let mut back = Vec::with_capacity(factors.len());
        for (factors, thin) in factors.iter().zip(&thin.0) {
            let g_tr = self.meter.time(Work::Adapter, || self.factors_vjp(factors, x_ti, thin, dy_to, sinks))?;
            back.push(g_tr);
        }
        let (within, beside) = first_of_each_row(&factors);
        // A mask stands between a component's gradient and the rows: it cannot be summed within the product.
        let (within, masked): (Vec<usize>, Vec<usize>) = within.into_iter().partition(|&i| factors[i].dropout == 0.0);
        let terms: Vec<LowRank<'_>> = within
            .iter()
            .map(|&i| LowRank {
                rows: factors[i].rows.clone(),
                left: back[i].view(),
                right: Operand::plain(factors[i].down.1.view()),
            })
            .collect();
        let weighed = self.weighed(site, given);
        let tables = self.tables(site, given);
        let columns = if tables.is_empty() {
            None
        } else {
            Some(self.meter.time(Work::Adapter, || self.columns_vjp(&tables, x_ti, dy_to, sinks))?)
        };
        // What the site's own weight gave.
        let own_to = columns.as_ref().map_or(dy_to, |columns| columns.left.view());
        let (ended, plain): (Vec<&Weighed<'_>>, Vec<_>) = weighed.iter().partition(|of| !of.ends.is_empty());
        if !ended.is_empty() {
            let to = dx_ti.as_mut().map(|(dx, accumulate)| (dx.reborrow(), *accumulate));
            self.ended_vjp(site, &ended, given, (x_ti, dy_to), to, sinks)?;
            if let Some((dx, _)) = &mut dx_ti {
                for of in ended {
                    self.add_terms(&cut(&terms, &of.rows), dx.reborrow().into_sub_rows(of.rows.start, of.rows.end));
                }
            }
        }
        for of in plain {
            let rows = of.rows.clone();
            let (x, dy) = (x_ti.sub_rows(rows.start, rows.end), own_to.sub_rows(rows.start, rows.end));
            let dx =
                dx_ti.as_mut().map(|(dx, accumulate)| (dx.reborrow().into_sub_rows(rows.start, rows.end), *accumulate));
            let product = dx.map(|(dx, accumulate)| {
                let (a, terms) = (Operand::plain(dy), cut(&terms, &rows));
                move |b: Right<'_>| {
                    let of = Gemm { a, b, low_rank: &terms, bias: None, accumulate };
                    self.meter.time(Work::Gemm, || self.kernels.gemm(dx, &of));
                }
            });
            self.weighed_vjp(site, of, given, (x, dy), product, sinks)?;
        }
        if let (Some((dx, _)), Some(columns)) = (&mut dx_ti, &columns) {
            self.meter.time(Work::Adapter, || self.add_columns(columns, dx.reborrow()));
        }
        if let Some((dx, _)) = &mut dx_ti {
            for i in masked.into_iter().chain(beside) {
                self.meter.time(Work::Adapter, || {
                    self.add_back(&factors[i], thin.0[i].kept.as_ref(), &back[i], dx.reborrow())
                });
            }
        }
        let by_graph: Vec<&Added<'_>> = placed.iter().filter(|placed| placed.port.fused().is_none()).collect();
        self.meter.time(Work::Adapter, || {
            let mut dx = dx_ti.map(|(dx, _)| dx);
            local::components_vjp(self, site, &by_graph, x_ti, dy_to, dx.as_mut().map(ViewMut::reborrow), sinks)?;
            self.blend_vjp(site, &blends, x_ti, dy_to, dx, sinks)
        })
    }

    /// `y += left right` for terms of their own.
    fn add_terms(&self, terms: &[LowRank<'_>], mut y: ViewMut<'_, f32>) {
        for term in terms {
            let of = Gemm { accumulate: true, ..Gemm::new(Operand::plain(term.left), term.right) };
            let to = y.reborrow().into_sub_rows(term.rows.start, term.rows.end);
            self.meter.time(Work::Adapter, || self.kernels.gemm(to, &of));
        }
    }

    /// A copy in 32 bits of what is not.
    pub(crate) fn wide(&self, x: MatRef<'_>) -> Option<Rows<f32>> {
        match x {
            MatRef::F32(_) => None,
            MatRef::Bf16(_) => {
                let mut wide = self.arena.rows(x.rows(), x.cols());
                self.kernels.convert(x, wide.view_mut().into());
                Some(wide)
            }
        }
    }

    /// The low-rank components among those placed, with their tensors in the type of the activations, in the order in which
    /// they apply to a row.
    fn factors<'p, 'g>(&self, placed: &'p [Added<'g>]) -> Result<Vec<Factors<'p, 'g>>> {
        let mut found: Vec<Factors<'p, 'g>> = Vec::new();
        for placed in placed {
            let Some(FusedRows::LowRank { down, up, scale, dropout }) = placed.port.fused() else { continue };
            let dropout = if self.dropout(placed).is_some() { dropout } else { 0.0 };
            let follows = |before: &&mut Factors<'p, 'g>| {
                let same = before.placed.last().is_some_and(|last| self.same(last, placed));
                same && before.rows.end == placed.rows.start && before.dropout == dropout
            };
            if let Some(before) = found.iter_mut().find(follows) {
                before.rows.end = placed.rows.end;
                before.placed.push(placed);
                continue;
            }
            let (down, up) = (self.factor(placed, down)?, self.factor(placed, up)?);
            let rows = placed.rows.clone();
            found.push(Factors { placed: vec![placed], rows, down, up, scale: scale as f32, dropout });
        }
        found.sort_by_key(|factors| factors.placed.first().map(|placed| (placed.order, placed.rows.start)));
        Ok(found)
    }

    /// A tensor of a component, in the type of the activations.
    fn factor(&self, placed: &Added<'_>, local: &'static str) -> Result<(TensorId, Mat)> {
        let site = placed.at.site.as_str();
        let unknown = || Error::UnknownTensor {
            component: site.to_owned(),
            name: local.to_owned(),
            declared: placed.at.tensors.iter().map(|spec| spec.local.to_owned()).collect(),
        };
        let spec = placed.at.tensors.iter().find(|spec| spec.local == local).ok_or_else(unknown)?;
        let id = placed.id(spec);
        let tensor = self.parts[placed.part].theta.get(&id).ok_or_else(unknown)?;
        let reading = reading::read(tensor).context(|| format!("{id}"))?;
        let mut mat = self.arena.mat(reading.mat().rows(), reading.mat().cols(), self.dtype);
        self.kernels.convert(reading.mat(), mat.view_mut());
        Ok((id, mat))
    }

    /// `h_tr = scale (mask ∘ x) downᵀ`.
    fn thin(&self, site: &Site, factors: &Factors<'_, '_>, x_ti: MatRef<'_>) -> Result<ThinRows> {
        let rows = &factors.rows;
        let x = x_ti.sub_rows(rows.start, rows.end);
        let kept =
            DropoutBits::join(factors.placed.iter().filter_map(|placed| self.kept(site, placed, factors, x.cols())));
        let masked = kept.as_ref().map(|kept| self.masked(kept, x));
        let x = masked.as_ref().map_or(x, Mat::view);
        let down = factors.down.1.view();
        let mut h = self.arena.rows(rows.len(), down.rows());
        self.kernels.gemm(h.view_mut(), &Gemm::new(Operand::plain(x), Operand::transposed(down)));
        self.kernels.scale(h.view_mut(), factors.scale);
        Ok(ThinRows { h_tr: self.narrowed(h), kept })
    }

    /// `mask ∘ x`.
    fn masked(&self, kept: &DropoutBits, x: MatRef<'_>) -> Mat {
        let mut masked = self.arena.rows(x.rows(), x.cols());
        self.kernels.convert(x, masked.view_mut().into());
        self.kernels.multiply(View::new(&kept.factors(), x.rows(), x.cols()).into(), masked.view_mut());
        self.narrowed(masked)
    }

    /// Which of the values that a component reads are kept; `None` if it drops nothing.
    fn kept(&self, site: &Site, placed: &Added<'_>, factors: &Factors<'_, '_>, width: usize) -> Option<DropoutBits> {
        let part = &self.parts[placed.part];
        let key = self.dropout(placed).filter(|_| factors.dropout > 0.0)?;
        let masks = RowMasks { key, layout: part.layout, rows: placed.ids.some() };
        Some(masks.kept(&site.id, width, factors.dropout))
    }

    /// A gradient in the type of the activations: a copy where they differ.
    pub(crate) fn as_activations(&self, dy: View<'_, f32>) -> Narrowed {
        match self.dtype {
            Activations::F32 => Narrowed(None),
            Activations::Bf16 => Narrowed(Some(self.meter.time(Work::Elementwise, || self.narrow(dy)))),
        }
    }

    /// A matrix of 32 bits in the type of the activations.
    pub(crate) fn narrowed(&self, x: Rows<f32>) -> Mat {
        match self.dtype {
            Activations::F32 => Mat::F32(x),
            Activations::Bf16 => self.narrow(x.view()),
        }
    }

    /// Gradients of a low-rank component's tensors to its part's sink; returns `g_tr`.
    fn factors_vjp(
        &self,
        factors: &Factors<'_, '_>,
        x_ti: MatRef<'_>,
        ThinRows { h_tr, kept }: &ThinRows,
        dy_to: MatRef<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Mat> {
        let rows = &factors.rows;
        let (x, dy) = (x_ti.sub_rows(rows.start, rows.end), dy_to.sub_rows(rows.start, rows.end));
        let (down, up) = (factors.down.1.view(), factors.up.1.view());
        let mut g = self.arena.rows(rows.len(), down.rows());
        let by_rows = (g.view_mut(), Gemm::new(Operand::plain(dy), Operand::plain(up)));
        self.over_parts(factors, &factors.up.0, dy, h_tr.view(), Some(by_rows), sinks)?;
        self.kernels.scale(g.view_mut(), factors.scale);
        let g = self.narrowed(g);
        if factors.placed.iter().any(|placed| wants(&*sinks[placed.part], &factors.down.0)) {
            let masked = kept.as_ref().map(|kept| self.masked(kept, x));
            self.over_parts(factors, &factors.down.0, g.view(), masked.as_ref().map_or(x, Mat::view), None, sinks)?;
        }
        Ok(g)
    }

    /// Each part's `aᵀ b`, as its gradient of a tensor, on the rows of a component; and another product beside them.
    fn over_parts(
        &self,
        factors: &Factors<'_, '_>,
        id: &TensorId,
        a: MatRef<'_>,
        b: MatRef<'_>,
        beside: Option<(ViewMut<'_, f32>, Gemm<'_>)>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let shape = (a.cols(), b.cols());
        let wanting = factors.placed.iter().filter(|placed| wants(&*sinks[placed.part], id));
        let of_part = |placed: &Added<'_>, sum| {
            let (start, end) = (placed.rows.start - factors.rows.start, placed.rows.end - factors.rows.start);
            let (a, b) = (a.sub_rows(start, end), b.sub_rows(start, end));
            (sum, Gemm::new(Operand::transposed(a), Operand::plain(b)))
        };
        if self.kernels.works_ahead() {
            let mut sums: Vec<(&Added<'_>, Rows<f32>)> =
                wanting.map(|placed| (*placed, self.arena.rows(shape.0, shape.1))).collect();
            let of_parts = sums.iter_mut().map(|(placed, sum)| of_part(placed, sum.view_mut()));
            self.kernels.gemms(beside.into_iter().chain(of_parts).collect());
            sums.into_iter().for_each(|(placed, sum)| self.put_late(placed.part, id.clone(), sum));
            return Ok(());
        }
        let mut sums: Vec<(&Added<'_>, Vec<f32>)> =
            wanting.map(|placed| (*placed, vec![0.0f32; shape.0 * shape.1])).collect();
        let of_parts = sums.iter_mut().map(|(placed, sum)| of_part(placed, ViewMut::new(sum, shape.0, shape.1)));
        self.kernels.gemms(beside.into_iter().chain(of_parts).collect());
        for (placed, sum) in sums {
            regions::put(&mut *sinks[placed.part], id, &Tensor::from_vec(sum, shape, &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// `dx += mask ∘ (g down)` for a component that is not summed within the product.
    fn add_back(&self, factors: &Factors<'_, '_>, kept: Option<&DropoutBits>, g_tr: &Mat, dx: ViewMut<'_, f32>) {
        let rows = &factors.rows;
        let down = factors.down.1.view();
        let of = Gemm::new(Operand::plain(g_tr.view()), Operand::plain(down));
        let mut dx = dx.into_sub_rows(rows.start, rows.end);
        let mut back = self.arena.rows(rows.len(), down.cols());
        self.kernels.gemm(back.view_mut(), &of);
        if let Some(kept) = kept {
            self.kernels.multiply(View::new(&kept.factors(), back.n_rows(), back.n_cols()).into(), back.view_mut());
        }
        self.kernels.add(back.view().into(), dx.reborrow());
    }
}

/// A matrix in the type of the activations, unless it had it before.
pub(crate) struct Narrowed(Option<Mat>);

impl Narrowed {
    /// The copy, or the original.
    pub(crate) fn view<'v>(&'v self, original: View<'v, f32>) -> MatRef<'v> {
        self.0.as_ref().map_or(MatRef::F32(original), Mat::view)
    }
}

/// Which of the components are the first on their rows, and which others follow; both in order.
fn first_of_each_row(factors: &[Factors<'_, '_>]) -> (Vec<usize>, Vec<usize>) {
    let (mut first, mut others): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    for (i, factors_i) in factors.iter().enumerate() {
        let rows = &factors_i.rows;
        let taken = first.iter().any(|&j| {
            let other: &Range<usize> = &factors[j].rows;
            rows.start < other.end && other.start < rows.end
        });
        if taken { others.push(i) } else { first.push(i) }
    }
    first.sort_by_key(|&i| factors[i].rows.start);
    (first, others)
}

/// What of the terms is on the rows of a run, by their rows within it.
fn cut<'t>(terms: &[LowRank<'t>], run: &Range<usize>) -> Vec<LowRank<'t>> {
    let on_run = terms.iter().filter_map(|term| {
        let rows = term.rows.start.max(run.start)..term.rows.end.min(run.end);
        let left = |rows: &Range<usize>| term.left.sub_rows(rows.start - term.rows.start, rows.end - term.rows.start);
        (!rows.is_empty()).then(|| LowRank {
            left: left(&rows),
            rows: rows.start - run.start..rows.end - run.start,
            right: term.right,
        })
    });
    on_run.collect()
}

/// A view that is known to be of 32 bits.
pub(crate) fn f32s(x: MatRef<'_>) -> Result<View<'_, f32>> {
    match x {
        MatRef::F32(view) => Ok(view),
        MatRef::Bf16(_) => Err(Error::Refused("rows of bf16 where rows of f32 were due".to_owned())),
    }
}
