//! A linear operator with the components at its site: one product over all rows, in whose accumulation low-rank
//! components take part; other components by their graph.
//!
//! ```text
//! y_to  = x_ti W_oiᵀ + b_o + h_tr up_orᵀ           h_tr  = scale (mask ∘ x_ti) down_riᵀ
//! dx_ti = dy_to W_oi + mask ∘ (g_tr down_ri)       g_tr  = scale dy_to up_or
//! dup_or = dy_toᵀ h_tr      ddown_ri = g_trᵀ (mask ∘ x_ti)      dW_oi = dy_toᵀ x_ti      db_o = Σ_t dy_to
//! ```

use std::ops::Range;

use attune_architecture::{Site, SiteKind};
use attune_points::adapter::FusedRows;
use attune_points::error::Context as _;
use attune_points::{Error, Owner, Region, Result, TensorId};
use attune_tensor::kernels::{Gemm, LowRank, Operand};
use attune_tensor::reading;
use attune_tensor::view::{MatMut, MatRef, View, ViewMut};
use candle_core::{Device, Tensor};

use crate::dropout::{Kept, RowMasks};
use crate::pass::arena::{Activations, Mat, Rows};
use crate::pass::local;
use crate::pass::parts::{Given, PassCx, Placed, Sinks, wants};
use crate::pass::times::Work;
use crate::regions::{self, entries_within, within};

/// What the reverse pass of a linear needs of each of its low-rank components.
#[derive(Debug, Default)]
pub(crate) struct Thin(Vec<ThinRows>);

/// The thin rows of a low-rank component, and which values of what it read were kept, if some were dropped.
#[derive(Debug)]
struct ThinRows {
    h_tr: Mat,
    kept: Option<Kept>,
}

/// A low-rank component at work.
struct Factors<'p, 'a> {
    placed: &'p Placed<'a>,
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
        let placed = self.placed(&site.id, given)?;
        let factors = self.factors(&placed)?;
        let thin = self.meter.time(Work::Adapter, || {
            factors.iter().map(|factors| self.thin(site, factors, x_ti)).collect::<Result<Vec<_>>>()
        })?;
        let (within, beside) = first_of_each_row(&factors);
        let terms: Vec<LowRank<'_>> = within
            .iter()
            .map(|&i| LowRank {
                rows: factors[i].placed.rows.clone(),
                left: thin[i].h_tr.view(),
                right: Operand::transposed(factors[i].up.1.view()),
            })
            .collect();
        for (rows, part, own) in self.shared(given, &site.id, "weight") {
            let bias = match site.kind {
                SiteKind::Linear { bias: true, .. } => Some(self.vector(part, &site.id, "bias")?),
                _ => None,
            };
            self.with_weight(site, own, |weight| {
                let y = y_to.reborrow().into_sub_rows(rows.start, rows.end);
                let of = Gemm {
                    a: Operand::plain(x_ti.sub_rows(rows.start, rows.end)),
                    b: Operand { transposed: !weight.transposed, ..weight },
                    low_rank: &cut(&terms, &rows),
                    bias: bias.as_deref(),
                    accumulate,
                };
                self.meter.time(Work::Gemm, || self.kernels.gemm(y, &of));
            })?;
        }
        self.meter.time(Work::Adapter, || {
            for i in beside {
                let rows = &factors[i].placed.rows;
                let b = Operand::transposed(factors[i].up.1.view());
                let of = Gemm { accumulate: true, ..Gemm::new(Operand::plain(thin[i].h_tr.view()), b) };
                self.kernels.gemm(y_to.reborrow().into_sub_rows(rows.start, rows.end), &of);
            }
            for placed in placed.iter().filter(|placed| placed.fused.is_none()) {
                local::add_component(self, site, placed, x_ti, y_to.reborrow())?;
            }
            Ok::<_, Error>(())
        })?;
        Ok(Thin(thin))
    }

    /// What the reverse pass of [`PassCx::linear`] needs, without the product.
    ///
    /// # Errors
    /// As for [`PassCx::linear`].
    pub(crate) fn thin_only(&self, site: &Site, x_ti: MatRef<'_>, given: Given<'_>) -> Result<Thin> {
        let placed = self.placed(&site.id, given)?;
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
        let placed = self.placed(&site.id, given)?;
        let factors = self.factors(&placed)?;
        let mut back = Vec::with_capacity(factors.len());
        for (factors, thin) in factors.iter().zip(&thin.0) {
            let g_tr = self.meter.time(Work::Adapter, || self.factors_vjp(factors, x_ti, thin, dy_to, sinks))?;
            back.push(g_tr);
        }
        self.own_vjp(site, x_ti, given, dy_to, sinks)?;
        if let Some((dx, accumulate)) = &mut dx_ti {
            let (within, beside) = first_of_each_row(&factors);
            // A mask stands between a component's gradient and the rows: it cannot be summed within the product.
            let (within, masked): (Vec<usize>, Vec<usize>) =
                within.into_iter().partition(|&i| factors[i].dropout == 0.0);
            let terms: Vec<LowRank<'_>> = within
                .iter()
                .map(|&i| LowRank {
                    rows: factors[i].placed.rows.clone(),
                    left: back[i].view(),
                    right: Operand::plain(factors[i].down.1.view()),
                })
                .collect();
            for (rows, _, own) in self.shared(given, &site.id, "weight") {
                self.with_weight(site, own, |weight| {
                    let of = Gemm {
                        a: Operand::plain(dy_to.sub_rows(rows.start, rows.end)),
                        b: weight,
                        low_rank: &cut(&terms, &rows),
                        bias: None,
                        accumulate: *accumulate,
                    };
                    let dx = dx.reborrow().into_sub_rows(rows.start, rows.end);
                    self.meter.time(Work::Gemm, || self.kernels.gemm(dx, &of));
                })?;
            }
            for i in masked.into_iter().chain(beside) {
                self.meter.time(Work::Adapter, || {
                    self.add_back(&factors[i], thin.0[i].kept.as_ref(), &back[i], dx.reborrow())
                });
            }
        }
        for placed in placed.iter().filter(|placed| placed.fused.is_none()) {
            let dx = dx_ti.as_mut().map(|(dx, _)| dx.reborrow());
            self.meter.time(Work::Adapter, || local::component_vjp(self, site, placed, x_ti, dy_to, dx, sinks))?;
        }
        Ok(())
    }

    /// The gradients of the site's own weight and bias, part by part.
    fn own_vjp(
        &self,
        site: &Site,
        x_ti: MatRef<'_>,
        given: Given<'_>,
        dy_to: MatRef<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let SiteKind::Linear { output, input, bias, .. } = site.kind else { return Ok(()) };
        for (part, rows) in self.parts_of(given) {
            let (x, dy) = (x_ti.sub_rows(rows.start, rows.end), dy_to.sub_rows(rows.start, rows.end));
            let id = self.id_of(part, &site.id, "weight");
            let dw = self.weight_gradient(&id, sinks[part].want(&id), (output, input), x, dy)?;
            if let Some(dw) = dw {
                sinks[part].put(&id, &dw)?;
            }
            let id = self.id_of(part, &site.id, "bias");
            if bias && wants(&*sinks[part], &id) {
                let mut db = vec![0.0f32; output];
                let wide = self.wide(dy);
                let dy = wide.as_ref().map_or_else(|| f32s(dy), |rows| Ok(rows.view()))?;
                self.meter.time(Work::Elementwise, || self.kernels.sum_rows(dy, &mut db, false));
                regions::put(&mut *sinks[part], &id, &Tensor::from_vec(db, output, &Device::Cpu)?)?;
            }
        }
        Ok(())
    }

    /// What is asked for of `dW_oi = dy_toᵀ x_ti`, and no more of it.
    fn weight_gradient(
        &self,
        id: &TensorId,
        region: Region<'_>,
        (output, input): (usize, usize),
        x_ti: MatRef<'_>,
        dy_to: MatRef<'_>,
    ) -> Result<Option<Tensor>> {
        let (rows, cols) = match region {
            Region::None => return Ok(None),
            Region::Entries(entries) => {
                entries_within(id, entries, output * input)?;
                let dw = self.meter.time(Work::Gemm, || entries_of_product(entries, input, x_ti, dy_to));
                let length = dw.len();
                return Ok(Some(Tensor::from_vec(dw, length, &Device::Cpu)?));
            }
            Region::All => (None, None),
            Region::Rows(rows) => (Some(rows), None),
            Region::Cols(cols) => (None, Some(cols)),
            Region::Cross(rows, cols) => (Some(rows), Some(cols)),
        };
        let cut = |mat: MatRef<'_>, wanted: Option<&[u32]>, dim| -> Result<Option<Mat>> {
            let Some(wanted) = wanted else { return Ok(None) };
            within(id, wanted, mat.cols(), dim)?;
            let mut to = self.arena.mat(mat.rows(), wanted.len(), self.dtype);
            self.meter.time(Work::Elementwise, || columns(mat, wanted, to.view_mut()));
            Ok(Some(to))
        };
        let (cut_dy, cut_x) = (cut(dy_to, rows, 0)?, cut(x_ti, cols, 1)?);
        let dy = cut_dy.as_ref().map_or(dy_to, Mat::view);
        let x = cut_x.as_ref().map_or(x_ti, Mat::view);
        let shape = (dy.cols(), x.cols());
        let mut dw = vec![0.0f32; shape.0 * shape.1];
        let of = Gemm::new(Operand::transposed(dy), Operand::plain(x));
        self.meter.time(Work::Gemm, || self.kernels.gemm(ViewMut::new(&mut dw, shape.0, shape.1), &of));
        Ok(Some(Tensor::from_vec(dw, shape, &Device::Cpu)?))
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

    /// Reads the weight of a linear, as `w_oi`: the one that stands in for the base's, or the base's.
    fn with_weight(&self, site: &Site, own: Option<&Tensor>, then: impl FnOnce(Operand<'_>)) -> Result<()> {
        let at = || format!("linear {}", site.id);
        match own {
            Some(tensor) => {
                let reading = reading::read(tensor).context(at)?;
                // In a pass of bf16 a trained weight is rounded like the frozen ones; its master value stays in 32 bits.
                match self.dtype {
                    Activations::F32 => then(Operand::plain(reading.mat())),
                    Activations::Bf16 => {
                        let mut narrow = self.arena.mat(reading.mat().rows(), reading.mat().cols(), self.dtype);
                        self.kernels.convert(reading.mat(), narrow.view_mut());
                        then(Operand::plain(narrow.view()));
                    }
                }
            }
            None => {
                let frozen = self.base.matrix(&self.base.tensor_name(site.id.as_str(), "weight"))?;
                then(Operand::plain(frozen.read().context(at)?.mat()));
            }
        }
        Ok(())
    }

    /// The low-rank components among those placed, with their tensors in the type of the activations.
    fn factors<'p, 'g>(&self, placed: &'p [Placed<'g>]) -> Result<Vec<Factors<'p, 'g>>> {
        let mut found = Vec::new();
        for placed in placed {
            let Some(FusedRows::LowRank { down, up, scale, dropout }) = placed.fused else { continue };
            let dropout = if self.parts[placed.part].dropout.is_some() { dropout } else { 0.0 };
            let (down, up) = (self.factor(placed, down)?, self.factor(placed, up)?);
            found.push(Factors { placed, down, up, scale: scale as f32, dropout });
        }
        Ok(found)
    }

    /// A tensor of a component, in the type of the activations.
    fn factor(&self, placed: &Placed<'_>, local: &'static str) -> Result<(TensorId, Mat)> {
        let site = placed.at.site.as_str();
        let unknown = || Error::UnknownTensor {
            component: site.to_owned(),
            name: local.to_owned(),
            declared: placed.at.tensors.iter().map(|spec| spec.local.to_owned()).collect(),
        };
        let spec = placed.at.tensors.iter().find(|spec| spec.local == local).ok_or_else(unknown)?;
        let id = TensorId { owner: Owner::Bank { slot: placed.slot, set: placed.set }, name: spec.name(site) };
        let tensor = self.parts[placed.part].theta.get(&id).ok_or_else(unknown)?;
        let reading = reading::read(tensor).context(|| format!("{id}"))?;
        let mut mat = self.arena.mat(reading.mat().rows(), reading.mat().cols(), self.dtype);
        self.kernels.convert(reading.mat(), mat.view_mut());
        Ok((id, mat))
    }

    /// `h_tr = scale (mask ∘ x) downᵀ`.
    fn thin(&self, site: &Site, factors: &Factors<'_, '_>, x_ti: MatRef<'_>) -> Result<ThinRows> {
        let rows = &factors.placed.rows;
        let x = x_ti.sub_rows(rows.start, rows.end);
        let kept = self.kept(site, factors, x.cols());
        let masked = kept.as_ref().map(|kept| self.masked(kept, x));
        let x = masked.as_ref().map_or(x, Mat::view);
        let down = factors.down.1.view();
        let mut h = self.arena.rows(rows.len(), down.rows());
        self.kernels.gemm(h.view_mut(), &Gemm::new(Operand::plain(x), Operand::transposed(down)));
        self.kernels.scale(h.view_mut(), factors.scale);
        Ok(ThinRows { h_tr: self.narrowed(h), kept })
    }

    /// `mask ∘ x`.
    fn masked(&self, kept: &Kept, x: MatRef<'_>) -> Mat {
        let mut masked = self.arena.rows(x.rows(), x.cols());
        self.kernels.convert(x, masked.view_mut().into());
        self.kernels.multiply(View::new(&kept.factors(), x.rows(), x.cols()).into(), masked.view_mut());
        self.narrowed(masked)
    }

    /// Which of the values that a component reads are kept; `None` if it drops nothing.
    fn kept(&self, site: &Site, factors: &Factors<'_, '_>, width: usize) -> Option<Kept> {
        let part = &self.parts[factors.placed.part];
        let key = part.dropout.filter(|_| factors.dropout > 0.0)?;
        let masks = RowMasks { key, layout: part.layout, rows: factors.placed.ids.some() };
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
        let Placed { rows, part, .. } = factors.placed;
        let (x, dy) = (x_ti.sub_rows(rows.start, rows.end), dy_to.sub_rows(rows.start, rows.end));
        let (down, up) = (factors.down.1.view(), factors.up.1.view());
        let (rank, input, output) = (down.rows(), down.cols(), up.rows());
        let sink = &mut sinks[*part];
        if wants(&**sink, &factors.up.0) {
            let mut dup = vec![0.0f32; output * rank];
            let of = Gemm::new(Operand::transposed(dy), Operand::plain(h_tr.view()));
            self.kernels.gemm(ViewMut::new(&mut dup, output, rank), &of);
            regions::put(&mut **sink, &factors.up.0, &Tensor::from_vec(dup, (output, rank), &Device::Cpu)?)?;
        }
        let mut g = self.arena.rows(rows.len(), rank);
        self.kernels.gemm(g.view_mut(), &Gemm::new(Operand::plain(dy), Operand::plain(up)));
        self.kernels.scale(g.view_mut(), factors.scale);
        let g = self.narrowed(g);
        if wants(&**sink, &factors.down.0) {
            let masked = kept.as_ref().map(|kept| self.masked(kept, x));
            let x = masked.as_ref().map_or(x, Mat::view);
            let mut ddown = vec![0.0f32; rank * input];
            let of = Gemm::new(Operand::transposed(g.view()), Operand::plain(x));
            self.kernels.gemm(ViewMut::new(&mut ddown, rank, input), &of);
            regions::put(&mut **sink, &factors.down.0, &Tensor::from_vec(ddown, (rank, input), &Device::Cpu)?)?;
        }
        Ok(g)
    }

    /// `dx += mask ∘ (g down)` for a component that is not summed within the product.
    fn add_back(&self, factors: &Factors<'_, '_>, kept: Option<&Kept>, g_tr: &Mat, dx: ViewMut<'_, f32>) {
        let rows = &factors.placed.rows;
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
        let rows = &factors_i.placed.rows;
        let taken = first.iter().any(|&j| {
            let other: &Range<usize> = &factors[j].placed.rows;
            rows.start < other.end && other.start < rows.end
        });
        if taken { others.push(i) } else { first.push(i) }
    }
    first.sort_by_key(|&i| factors[i].placed.rows.start);
    (first, others)
}

/// The terms on the rows of a run, by their rows within it. A term belongs to one part, and a run is of whole parts.
fn cut<'t>(terms: &[LowRank<'t>], run: &Range<usize>) -> Vec<LowRank<'t>> {
    let within = terms.iter().filter(|term| run.start <= term.rows.start && term.rows.end <= run.end);
    within
        .map(|term| LowRank { rows: term.rows.start - run.start..term.rows.end - run.start, ..term.clone() })
        .collect()
}

/// Some columns of a matrix, in its own type.
fn columns(from: MatRef<'_>, wanted: &[u32], to: MatMut<'_>) {
    fn copy<T: Copy>(from: View<'_, T>, wanted: &[u32], mut to: ViewMut<'_, T>) {
        for row in 0..from.rows() {
            let from = from.row(row);
            to.row(row).iter_mut().zip(wanted).for_each(|(to, &col)| *to = from[col as usize]);
        }
    }
    match (from, to) {
        (MatRef::F32(from), MatMut::F32(to)) => copy(from, wanted, to),
        (MatRef::Bf16(from), MatMut::Bf16(to)) => copy(from, wanted, to),
        _ => unreachable!("operands of a product are in the type of the activations"),
    }
}

/// Single entries of `dy_toᵀ x_ti`, by flat index: row after row, so that both are read as they lie.
fn entries_of_product(entries: &[u64], input: usize, x_ti: MatRef<'_>, dy_to: MatRef<'_>) -> Vec<f32> {
    fn add<T: Copy, F: Fn(T) -> f32>(
        sums: &mut [f32],
        at: &[(usize, usize)],
        x: View<'_, T>,
        dy: View<'_, T>,
        wide: F,
    ) {
        for row in 0..x.rows() {
            let (x, dy) = (x.row(row), dy.row(row));
            sums.iter_mut().zip(at).for_each(|(sum, &(o, i))| *sum += wide(dy[o]) * wide(x[i]));
        }
    }
    let at: Vec<(usize, usize)> =
        entries.iter().map(|&entry| (entry as usize / input, entry as usize % input)).collect();
    let mut sums = vec![0.0; at.len()];
    match (x_ti, dy_to) {
        (MatRef::F32(x), MatRef::F32(dy)) => add(&mut sums, &at, x, dy, |v| v),
        (MatRef::Bf16(x), MatRef::Bf16(dy)) => add(&mut sums, &at, x, dy, |v: half::bf16| v.to_f32()),
        _ => unreachable!("operands of a product are in the type of the activations"),
    }
    sums
}

/// A view that is known to be of 32 bits.
pub(crate) fn f32s(x: MatRef<'_>) -> Result<View<'_, f32>> {
    match x {
        MatRef::F32(view) => Ok(view),
        MatRef::Bf16(_) => Err(Error::Refused("rows of bf16 where rows of f32 were due".to_owned())),
    }
}
