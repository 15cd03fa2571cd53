//! Components at the ends of a linear's own product, by their graphs on each part's rows.
//!
//! ```text
//! y_to = out(in(x_ti) W_oiᵀ + b_o)
//! ```

use attune_architecture::Site;
use attune_points::adapter::EndMap;
use attune_points::{Result, TensorId};
use attune_tensor::autograd;
use attune_tensor::kernels::{Gemm, Operand, Right};
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::pass::arena::{Mat, Rows};
use crate::pass::local;
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::pass::times::Work;
use crate::pass::weight::Weighed;
use crate::regions;

type End<'a> = Placed<'a, &'a dyn EndMap>;

/// What stands before a product, and behind it, each in the order in which it applies.
#[derive(Default)]
pub(crate) struct Ends<'a> {
    pub(crate) inputs: Vec<End<'a>>,
    pub(crate) outputs: Vec<End<'a>>,
}

impl Ends<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        self.inputs.is_empty() && self.outputs.is_empty()
    }
}

/// Rows that components made of others, with what their reverse needs.
struct Turned {
    leaves: Vec<(TensorId, Var)>,
    from: Var,
    made: Tensor,
}

impl PassCx<'_> {
    /// `y (+)= out(in(x) Wᵀ + b)` on runs of rows with something at their ends. What runs have there goes side by side.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn ended(
        &self,
        site: &Site,
        runs: &[&Weighed<'_>],
        x_ti: MatRef<'_>,
        mut y_to: ViewMut<'_, f32>,
        accumulate: bool,
    ) -> Result<()> {
        let rows_of_x: Vec<MatRef<'_>> = runs.iter().map(|of| x_ti.sub_rows(of.rows.start, of.rows.end)).collect();
        let read = self.turn(runs, |of| &of.ends.inputs, &rows_of_x)?;
        let read = self.mats(read)?;
        let mut given = Vec::with_capacity(runs.len());
        for ((of, x), read) in runs.iter().zip(&rows_of_x).zip(&read) {
            given.push(self.product(site, of, read.as_ref().map_or(*x, Mat::view), y_to.cols())?);
        }
        let views: Vec<MatRef<'_>> = given.iter().map(|y| y.view().into()).collect();
        let made = self.turn(runs, |of| &of.ends.outputs, &views)?;
        for ((of, given), made) in runs.iter().zip(&given).zip(made) {
            let to = y_to.reborrow().into_sub_rows(of.rows.start, of.rows.end);
            match made {
                Some(made) => self.meter.time(Work::Adapter, || local::write(&made, to, accumulate))?,
                None if accumulate => self.kernels.add(given.view().into(), to),
                None => self.kernels.convert(given.view().into(), to.into()),
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::ended`]: gradients to the sinks, and `dx (+)= …` where it is asked for.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn ended_vjp(
        &self,
        site: &Site,
        runs: &[&Weighed<'_>],
        given: Given<'_>,
        (x_ti, dy_to): (MatRef<'_>, MatRef<'_>),
        mut dx_ti: Option<(ViewMut<'_, f32>, bool)>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let xs: Vec<MatRef<'_>> = runs.iter().map(|of| x_ti.sub_rows(of.rows.start, of.rows.end)).collect();
        let dys: Vec<MatRef<'_>> = runs.iter().map(|of| dy_to.sub_rows(of.rows.start, of.rows.end)).collect();
        let before = self.turned(runs, |of| &of.ends.inputs, &xs, sinks)?;
        let read: Vec<Option<Tensor>> =
            before.iter().map(|turned| turned.as_ref().map(|turned| turned.made.clone())).collect();
        let read = self.mats(read)?;
        let reads: Vec<MatRef<'_>> =
            xs.iter().zip(&read).map(|(x, read)| read.as_ref().map_or(*x, Mat::view)).collect();
        // What the products gave is not kept: it is made again.
        let mut made_again = Vec::with_capacity(runs.len());
        for (of, read) in runs.iter().zip(&reads) {
            let needed = !of.ends.outputs.is_empty();
            made_again.push(if needed { Some(self.product(site, of, *read, dy_to.cols())?) } else { None });
        }
        let views: Vec<MatRef<'_>> = made_again
            .iter()
            .zip(&dys)
            .map(|(made, dy)| made.as_ref().map_or(*dy, |made| made.view().into()))
            .collect();
        let behind = self.turned(runs, |of| &of.ends.outputs, &views, sinks)?;
        let dgiven = self.mats(self.turn_back(runs, &behind, &dys, sinks)?)?;
        let mut dreads = Vec::with_capacity(runs.len());
        for (at, of) in runs.iter().enumerate() {
            let dgiven = dgiven[at].as_ref().map_or(dys[at], Mat::view);
            // Something before the product may learn where nothing below it does.
            let needed = dx_ti.is_some() || before[at].is_some();
            let mut dread = needed.then(|| self.arena.rows(xs[at].rows(), xs[at].cols()));
            let product = dread.as_mut().map(|dread| {
                let dread = dread.view_mut();
                move |weight: Right<'_>| {
                    let of = Gemm::new(Operand::plain(dgiven), weight);
                    self.meter.time(Work::Gemm, || self.kernels.gemm(dread, &of));
                }
            });
            self.weighed_vjp(site, of, given, (reads[at], dgiven), product, sinks)?;
            dreads.push(dread);
        }
        let views: Vec<MatRef<'_>> =
            dreads.iter().zip(&xs).map(|(dread, x)| dread.as_ref().map_or(*x, |dread| dread.view().into())).collect();
        let below = self.turn_back(runs, &before, &views, sinks)?;
        let Some((dx_ti, accumulate)) = &mut dx_ti else { return Ok(()) };
        for ((of, dread), below) in runs.iter().zip(&dreads).zip(below) {
            let to = dx_ti.reborrow().into_sub_rows(of.rows.start, of.rows.end);
            match (below, dread) {
                (Some(below), _) => self.meter.time(Work::Adapter, || local::write(&below, to, *accumulate))?,
                (None, Some(dread)) if *accumulate => self.kernels.add(dread.view().into(), to),
                (None, Some(dread)) => self.kernels.convert(dread.view().into(), to.into()),
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn product(&self, site: &Site, of: &Weighed<'_>, x_ti: MatRef<'_>, width: usize) -> Result<Rows<f32>> {
        let mut y = self.arena.rows(x_ti.rows(), width);
        self.with_both(site, of, |weight, bias| {
            let of = Gemm { bias, ..Gemm::new(Operand::plain(x_ti), weight.turned()) };
            self.meter.time(Work::Gemm, || self.kernels.gemm(y.view_mut(), &of));
        })?;
        Ok(y)
    }

    /// What components make of the rows of each run; `None` where there are none.
    fn turn<'r>(
        &self,
        runs: &[&'r Weighed<'r>],
        ends: impl Fn(&'r Weighed<'r>) -> &'r [End<'r>],
        rows: &[MatRef<'_>],
    ) -> Result<Vec<Option<Tensor>>> {
        let parts = self.parts;
        // Where texts go on each goes by itself: all components of a run see the same pieces.
        let pieces = runs.iter().map(|of| {
            let of_first = ends(of).first().map(|end| local::together(self, end)).unwrap_or_default();
            let within = of_first.into_iter().map(|piece| {
                let start = piece.rows.start.max(of.rows.start);
                start - of.rows.start..piece.rows.end.min(of.rows.end).max(start) - of.rows.start
            });
            within.filter(|rows| !rows.is_empty()).collect::<Vec<_>>()
        });
        let work: Vec<_> =
            runs.iter().zip(pieces).zip(rows).map(|((of, pieces), rows)| (ends(of), pieces, *rows)).collect();
        let made = |(ends, pieces, rows): &(&[End<'_>], Vec<std::ops::Range<usize>>, MatRef<'_>)| {
            if ends.is_empty() {
                return Ok(None);
            }
            let mut all = Vec::with_capacity(pieces.len());
            for piece in pieces {
                let mut made = local::tensor(rows.sub_rows(piece.start, piece.end))?;
                for end in *ends {
                    made = end.port.graph(&made, &local::locals(parts, end, &[])?)?;
                }
                all.push(made);
            }
            Ok(Some(Tensor::cat(&all, 0)?))
        };
        self.meter.time(Work::Adapter, || work.par_iter().map(made).collect())
    }

    /// The same in a pass whose reverse is asked for.
    fn turned<'r>(
        &self,
        runs: &[&'r Weighed<'r>],
        ends: impl Fn(&'r Weighed<'r>) -> &'r [End<'r>],
        rows: &[MatRef<'_>],
        sinks: &Sinks<'_>,
    ) -> Result<Vec<Option<Turned>>> {
        let parts = self.parts;
        let work = runs.iter().zip(rows).map(|(of, rows)| {
            let wanted = ends(of).iter().map(|end| (end, local::wanted_of(end, sinks)));
            (wanted.collect::<Vec<_>>(), *rows)
        });
        let work: Vec<_> = work.collect();
        let turned = |(ends, rows): &(Vec<(&End<'_>, Vec<TensorId>)>, MatRef<'_>)| {
            if ends.is_empty() {
                return Ok(None);
            }
            let from = autograd::leaf(&local::tensor(*rows)?)?;
            let (mut all, mut made) = (Vec::new(), from.as_tensor().clone());
            for (end, wanted) in ends {
                let leaves = local::leaves_for(&parts[end.part], wanted)?;
                made = end.port.graph(&made, &local::locals(parts, end, &leaves)?)?;
                all.extend(leaves);
            }
            Ok(Some(Turned { leaves: all, from, made }))
        };
        self.meter.time(Work::Adapter, || work.par_iter().map(turned).collect())
    }

    /// Gradients of what made rows, by theirs, to the sinks of the runs' parts; and those by what they were made of.
    fn turn_back(
        &self,
        runs: &[&Weighed<'_>],
        turned: &[Option<Turned>],
        dmade: &[MatRef<'_>],
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Option<Tensor>>> {
        let back = |(turned, dmade): (&Option<Turned>, &MatRef<'_>)| -> Result<local::Back> {
            let Some(Turned { leaves, from, made }) = turned else { return Ok(local::Back::default()) };
            let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([from]).collect();
            let mut gradients = autograd::pull(&all, &[(made, &local::tensor(*dmade)?)])?;
            let by_rows = match gradients.pop().flatten() {
                Some(by_rows) => by_rows,
                None => from.zeros_like()?,
            };
            Ok((leaves.iter().map(|(id, _)| id.clone()).zip(gradients).collect(), Some(by_rows)))
        };
        let found: Vec<Result<local::Back>> =
            self.meter.time(Work::Adapter, || turned.par_iter().zip(dmade).map(back).collect());
        let mut below = Vec::with_capacity(runs.len());
        for (of, found) in runs.iter().zip(found) {
            let (gradients, by_rows) = found?;
            for (id, gradient) in gradients {
                gradient.map(|gradient| regions::put(&mut *sinks[of.part], &id, &gradient)).transpose()?;
            }
            below.push(by_rows);
        }
        Ok(below)
    }

    /// Tensors as rows in the type of the activations.
    fn mats(&self, tensors: Vec<Option<Tensor>>) -> Result<Vec<Option<Mat>>> {
        let mat = |tensor: Tensor| -> Result<Mat> {
            let (n, width) = tensor.dims2()?;
            let mut rows = self.arena.rows(n, width);
            local::write(&tensor, rows.view_mut(), false)?;
            Ok(self.narrowed(rows))
        };
        tensors.into_iter().map(|tensor| tensor.map(mat).transpose()).collect()
    }
}
