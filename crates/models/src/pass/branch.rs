//! Components that put other rows in the place of those that a block adds to the stream, by their graphs on each part's rows.

use attune_architecture::Site;
use attune_points::Result;
use attune_points::adapter::{BranchMap, DropoutMask, Port, RowCx};
use attune_tensor::autograd;
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::Var;

use crate::pass::arena::Rows;
use crate::pass::local::{self, Together};
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::pass::times::Work;
use crate::regions;

type Branch<'a> = Placed<'a, &'a dyn BranchMap>;

impl<'a> PassCx<'a> {
    /// The components on what `block` gives, part by part, in the order in which they apply.
    fn branches(&self, block: &Site) -> Vec<Branch<'a>> {
        let placed = self.placed(&block.id, Given::All).into_iter();
        let branches = placed.filter_map(|placed| match placed.port {
            Port::Branch(map) => Some(placed.with(map)),
            _ => None,
        });
        branches.collect()
    }

    /// Whether there are any.
    pub(crate) fn is_branched(&self, block: &Site) -> bool {
        !self.branches(block).is_empty()
    }

    /// Puts what they make of it in the place of `y_td`, which the block gave for `x_td`.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn branch(&self, block: &Site, x_td: MatRef<'_>, mut y_td: ViewMut<'_, f32>) -> Result<()> {
        self.meter.time(Work::Adapter, || {
            for placed in self.branches(block) {
                let (masks, tensors) = (local::masks(self, &placed), local::locals(self, &placed, &[])?);
                let dropout = masks.as_ref().map(|masks| masks as &dyn DropoutMask);
                for Together { rows, ids } in local::together(self, &placed) {
                    let x = local::tensor(x_td.sub_rows(rows.start, rows.end))?;
                    let y = y_td.reborrow().into_sub_rows(rows.start, rows.end);
                    let given = local::tensor(y.as_ref().into())?;
                    let cx = RowCx { rows: ids.some(), ..local::row_cx(self, &block.id, &placed, dropout) };
                    let made = placed.port.graph(&x, &given, &tensors, &cx)?;
                    local::write(&made, y, false)?;
                }
            }
            Ok(())
        })
    }

    /// The reverse of [`PassCx::branch`]: `dy_td`, the gradient by what they made, becomes the one by `y_td`, which the block
    /// gave; the one by `x_td` is added to `dx_td`.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn branch_vjp(
        &self,
        block: &Site,
        x_td: MatRef<'_>,
        y_td: View<'_, f32>,
        dy_td: &mut Rows<f32>,
        mut dx_td: Option<ViewMut<'_, f32>>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        self.meter.time(Work::Adapter, || {
            let branches = self.branches(block);
            let mut y = self.arena.rows(y_td.rows(), y_td.cols());
            self.kernels.convert(y_td.into(), y.view_mut().into());
            // What each was given, which those before it may have made.
            let mut steps = Vec::with_capacity(branches.len());
            for placed in &branches {
                let (rows, leaves) = (placed.rows.clone(), local::leaves(self, placed, sinks)?);
                let x = autograd::leaf(&local::tensor(x_td.sub_rows(rows.start, rows.end))?)?;
                let given = autograd::leaf(&local::tensor(y.view().sub_rows(rows.start, rows.end).into())?)?;
                let masks = local::masks(self, placed);
                let dropout = masks.as_ref().map(|masks| masks as &dyn DropoutMask);
                let tensors = local::locals(self, placed, &leaves)?;
                let made = placed.port.graph(&x, &given, &tensors, &local::row_cx(self, &block.id, placed, dropout))?;
                local::write(&made, y.view_mut().into_sub_rows(rows.start, rows.end), false)?;
                steps.push((leaves, x, given, made));
            }
            for (placed, (leaves, x, given, made)) in branches.iter().zip(steps).rev() {
                let rows = placed.rows.clone();
                let dy = local::tensor(dy_td.view().sub_rows(rows.start, rows.end).into())?;
                let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&x, &given]).collect();
                let mut gradients = autograd::pull(&all, &[(&made, &dy)])?;
                let (dgiven, dx) = (gradients.pop().flatten(), gradients.pop().flatten());
                for ((id, _), gradient) in leaves.iter().zip(gradients) {
                    gradient.map(|gradient| regions::put(&mut *sinks[placed.part], id, &gradient)).transpose()?;
                }
                let to = dy_td.view_mut().into_sub_rows(rows.start, rows.end);
                match dgiven {
                    Some(dgiven) => local::write(&dgiven, to, false)?,
                    None => self.kernels.fill(to, 0.0),
                }
                if let (Some(dx_td), Some(dx)) = (&mut dx_td, dx) {
                    local::write(&dx, dx_td.reborrow().into_sub_rows(rows.start, rows.end), true)?;
                }
            }
            Ok(())
        })
    }
}
