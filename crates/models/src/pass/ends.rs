//! Components at the ends of a linear's own product, by their graphs on each part's rows.
//!
//! ```text
//! y_to = out(in(x_ti) W_oiᵀ + b_o)
//! ```

use attune_architecture::Site;
use attune_points::adapter::EndMap;
use attune_points::{Result, TensorId};
use attune_tensor::autograd;
use attune_tensor::kernels::{Gemm, Operand};
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::{Tensor, Var};

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
    /// `y (+)= out(in(x) Wᵀ + b)` on a run of rows with something at its ends.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn ended(
        &self,
        site: &Site,
        of: &Weighed<'_>,
        x_ti: MatRef<'_>,
        bias: Option<&[f32]>,
        y_to: ViewMut<'_, f32>,
        accumulate: bool,
    ) -> Result<()> {
        let read = self.read(of, x_ti)?;
        let mut y = self.product(site, of, read.as_ref().map_or(x_ti, Mat::view), bias, y_to.cols())?;
        self.turn(of, &of.ends.outputs, &mut y)?;
        if accumulate {
            self.kernels.add(y.view().into(), y_to);
        } else {
            self.kernels.convert(y.view().into(), y_to.into());
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
        of: &Weighed<'_>,
        given: Given<'_>,
        (x_ti, dy_to): (MatRef<'_>, MatRef<'_>),
        dx_ti: Option<(ViewMut<'_, f32>, bool)>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let Ends { inputs, outputs } = &of.ends;
        let before = self.meter.time(Work::Adapter, || self.turned(inputs, x_ti, sinks))?;
        let read = match &before {
            Some(turned) => Some(self.rows_of(&turned.made)?),
            None => None,
        };
        let read = read.map(|rows| self.narrowed(rows));
        let read = read.as_ref().map_or(x_ti, Mat::view);
        // What the product gave is not kept: it is made again.
        let mut dgiven = None;
        if !outputs.is_empty() {
            let bias = match site.kind.bias_width() {
                Some(_) => Some(self.vector(of.part, &site.id, "bias")?),
                None => None,
            };
            let y = self.product(site, of, read, bias.as_deref(), dy_to.cols())?;
            let behind = self.meter.time(Work::Adapter, || self.turned(outputs, y.view().into(), sinks))?;
            if let Some(behind) = behind {
                dgiven = self.meter.time(Work::Adapter, || self.turn_back(of, behind, dy_to, sinks))?;
            }
        }
        let dgiven = dgiven.map(|rows| self.narrowed(rows));
        let dgiven = dgiven.as_ref().map_or(dy_to, Mat::view);
        // Something before the product may learn where nothing below it does.
        let mut dread = (dx_ti.is_some() || before.is_some()).then(|| self.arena.rows(x_ti.rows(), x_ti.cols()));
        let product = dread.as_mut().map(|dread| {
            let dread = dread.view_mut();
            move |weight: Operand<'_>| {
                let of = Gemm::new(Operand::plain(dgiven), weight);
                self.meter.time(Work::Gemm, || self.kernels.gemm(dread, &of));
            }
        });
        self.weighed_vjp(site, of, given, (read, dgiven), product, sinks)?;
        let Some(mut dx) = dread else { return Ok(()) };
        if let Some(before) = before {
            let below = self.meter.time(Work::Adapter, || self.turn_back(of, before, dx.view().into(), sinks))?;
            match below {
                Some(below) => dx = below,
                None => self.kernels.fill(dx.view_mut(), 0.0),
            }
        }
        match dx_ti {
            Some((to, true)) => self.kernels.add(dx.view().into(), to),
            Some((to, false)) => self.kernels.convert(dx.view().into(), to.into()),
            None => {}
        }
        Ok(())
    }

    /// What the product reads, if components make it.
    fn read(&self, of: &Weighed<'_>, x_ti: MatRef<'_>) -> Result<Option<Mat>> {
        if of.ends.inputs.is_empty() {
            return Ok(None);
        }
        let mut rows = self.arena.rows(x_ti.rows(), x_ti.cols());
        self.kernels.convert(x_ti, rows.view_mut().into());
        self.turn(of, &of.ends.inputs, &mut rows)?;
        Ok(Some(self.narrowed(rows)))
    }

    fn product(
        &self,
        site: &Site,
        of: &Weighed<'_>,
        x_ti: MatRef<'_>,
        bias: Option<&[f32]>,
        width: usize,
    ) -> Result<Rows<f32>> {
        let mut y = self.arena.rows(x_ti.rows(), width);
        self.with_weight(site, of, |weight| {
            let b = Operand { transposed: !weight.transposed, ..weight };
            let of = Gemm { bias, ..Gemm::new(Operand::plain(x_ti), b) };
            self.meter.time(Work::Gemm, || self.kernels.gemm(y.view_mut(), &of));
        })?;
        Ok(y)
    }

    /// Puts what components make of rows of a run in their place.
    fn turn(&self, of: &Weighed<'_>, ends: &[End<'_>], rows: &mut Rows<f32>) -> Result<()> {
        self.meter.time(Work::Adapter, || {
            for end in ends {
                let tensors = local::locals(self, end, &[])?;
                for piece in local::together(self, end) {
                    let start = piece.rows.start.max(of.rows.start);
                    let at = start..piece.rows.end.min(of.rows.end).max(start);
                    if at.is_empty() {
                        continue;
                    }
                    let at = at.start - of.rows.start..at.end - of.rows.start;
                    let given = local::tensor(rows.view().sub_rows(at.start, at.end).into())?;
                    let made = end.port.graph(&given, &tensors)?;
                    local::write(&made, rows.view_mut().into_sub_rows(at.start, at.end), false)?;
                }
            }
            Ok(())
        })
    }

    /// The same in a pass whose reverse is asked for; `None` without components.
    fn turned(&self, ends: &[End<'_>], rows: MatRef<'_>, sinks: &Sinks<'_>) -> Result<Option<Turned>> {
        if ends.is_empty() {
            return Ok(None);
        }
        let from = autograd::leaf(&local::tensor(rows)?)?;
        let (mut all, mut made) = (Vec::new(), from.as_tensor().clone());
        for end in ends {
            let leaves = local::leaves(self, end, sinks)?;
            made = end.port.graph(&made, &local::locals(self, end, &leaves)?)?;
            all.extend(leaves);
        }
        Ok(Some(Turned { leaves: all, from, made }))
    }

    /// Gradients of what made rows, by theirs, to the sink of the run's part; and the one by what they were made of.
    fn turn_back(
        &self,
        of: &Weighed<'_>,
        Turned { leaves, from, made }: Turned,
        dmade: MatRef<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Option<Rows<f32>>> {
        let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&from]).collect();
        let mut gradients = autograd::pull(&all, &[(&made, &local::tensor(dmade)?)])?;
        let by_rows = gradients.pop().flatten();
        for ((id, _), gradient) in leaves.iter().zip(gradients) {
            gradient.map(|gradient| regions::put(&mut *sinks[of.part], id, &gradient)).transpose()?;
        }
        by_rows.map(|gradient| self.rows_of(&gradient)).transpose()
    }

    fn rows_of(&self, tensor: &Tensor) -> Result<Rows<f32>> {
        let (n, width) = tensor.dims2()?;
        let mut rows = self.arena.rows(n, width);
        local::write(tensor, rows.view_mut(), false)?;
        Ok(rows)
    }
}
