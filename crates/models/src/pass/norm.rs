//! Normalisation at a site, and its reverse.

use attune_architecture::{NormKind, Site};
use attune_points::Result;
use attune_tensor::view::{MatMut, View, ViewMut};
use candle_core::{Device, Tensor};

use crate::pass::arena::{Mat, Rows};
use crate::pass::parts::{Given, PassCx, Sinks, wants};
use crate::pass::times::Work;
use crate::regions;

impl PassCx<'_> {
    /// `norm(x)` on the rows given, in the type of the activations.
    ///
    /// # Errors
    /// A tensor that the base does not have.
    pub(crate) fn norm(&self, site: &Site, x_td: View<'_, f32>, given: Given<'_>) -> Result<Mat> {
        let mut y = self.arena.mat(x_td.rows(), x_td.cols(), self.dtype);
        self.norm_into(site, x_td, 1, given, y.view_mut())?;
        Ok(y)
    }

    /// `norm(x)` on the rows given, in 32 bits.
    ///
    /// # Errors
    /// As for [`PassCx::norm`].
    pub(crate) fn norm_rows(&self, site: &Site, x_td: &Rows<f32>, given: Given<'_>) -> Result<Rows<f32>> {
        let mut y = self.arena.rows(x_td.n_rows(), x_td.n_cols());
        self.norm_into(site, x_td.view(), 1, given, y.view_mut().into())?;
        Ok(y)
    }

    /// The norm of each of `per_row` equal pieces of every row, in 32 bits.
    ///
    /// # Errors
    /// As for [`PassCx::norm`].
    pub(crate) fn norm_heads(&self, site: &Site, x: &Rows<f32>, per_row: usize) -> Result<Rows<f32>> {
        let (rows, width) = (x.n_rows() * per_row, x.n_cols() / per_row);
        let mut y = self.arena.rows(x.n_rows(), x.n_cols());
        let to = y.view_as_mut(rows, width);
        self.norm_into(site, x.view_as(rows, width), per_row, Given::All, to.into())?;
        Ok(y)
    }

    /// The norm of `x`, of which every row given is `per_row` rows.
    fn norm_into(
        &self,
        site: &Site,
        x: View<'_, f32>,
        per_row: usize,
        given: Given<'_>,
        mut y: MatMut<'_>,
    ) -> Result<()> {
        for (rows, part) in self.shared(given, &site.id) {
            let rows = rows.start * per_row..rows.end * per_row;
            let w_d = self.vector(part, &site.id, "weight")?;
            let x = x.sub_rows(rows.start, rows.end);
            let y = y.reborrow().into_sub_rows(rows.start, rows.end);
            match self.architecture().norm {
                NormKind::Rms { eps } => {
                    self.meter.time(Work::Elementwise, || self.kernels.rms_norm(x, &w_d, eps as f32, y));
                }
                NormKind::Layer { eps } => {
                    let b_d = self.vector(part, &site.id, "bias")?;
                    self.meter.time(Work::Elementwise, || self.kernels.layer_norm(x, &w_d, &b_d, eps as f32, y));
                }
            }
        }
        Ok(())
    }

    /// Adds the gradient by `x` to `dx`; those of the site's own tensors go to the sinks.
    ///
    /// # Errors
    /// Whatever a sink raises.
    pub(crate) fn norm_vjp(
        &self,
        site: &Site,
        x_td: View<'_, f32>,
        given: Given<'_>,
        dy_td: View<'_, f32>,
        dx_td: ViewMut<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        self.norm_back(site, x_td, 1, given, dy_td, dx_td, sinks)
    }

    /// The reverse of [`PassCx::norm_heads`].
    ///
    /// # Errors
    /// Whatever a sink raises.
    pub(crate) fn norm_heads_vjp(
        &self,
        site: &Site,
        x: &Rows<f32>,
        per_row: usize,
        dy: &Rows<f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Rows<f32>> {
        let (rows, width) = (x.n_rows() * per_row, x.n_cols() / per_row);
        let mut dx = self.arena.zeros(x.n_rows(), x.n_cols());
        let to = dx.view_as_mut(rows, width);
        let (x, dy) = (x.view_as(rows, width), dy.view_as(rows, width));
        self.norm_back(site, x, per_row, Given::All, dy, to, sinks)?;
        Ok(dx)
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
    fn norm_back(
        &self,
        site: &Site,
        x: View<'_, f32>,
        per_row: usize,
        given: Given<'_>,
        dy: View<'_, f32>,
        mut dx: ViewMut<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        for (part, rows) in self.parts_of(given) {
            let rows = rows.start * per_row..rows.end * per_row;
            let w_d = self.vector(part, &site.id, "weight")?;
            let (x, dy) = (x.sub_rows(rows.start, rows.end), dy.sub_rows(rows.start, rows.end));
            let dx = dx.reborrow().into_sub_rows(rows.start, rows.end);
            let mut wanted = Vec::new();
            for local in site.locals() {
                let id = self.id_of(part, &site.id, local);
                wanted.push(if wants(&*sinks[part], &id) { Some(id) } else { None });
            }
            let any = wanted.iter().any(Option::is_some);
            let (mut dw_d, mut db_d) = (vec![0.0; w_d.len()], vec![0.0; w_d.len()]);
            self.meter.time(Work::Elementwise, || match self.architecture().norm {
                NormKind::Rms { eps } => {
                    self.kernels.rms_norm_vjp(x, &w_d, eps as f32, dy, dx, any.then_some(&mut dw_d[..]));
                }
                NormKind::Layer { eps } => {
                    let sums = any.then_some((&mut dw_d[..], &mut db_d[..]));
                    self.kernels.layer_norm_vjp(x, &w_d, eps as f32, dy, dx, sums);
                }
            });
            for (id, gradient) in wanted.into_iter().zip([dw_d, db_d]) {
                if let Some(id) = id {
                    let width = gradient.len();
                    regions::put(&mut *sinks[part], &id, &Tensor::from_vec(gradient, width, &Device::Cpu)?)?;
                }
            }
        }
        Ok(())
    }
}
