//! Components that put other rows in the place of those that a block adds to the stream, by their graphs on each part's rows.

use attune_architecture::Site;
use attune_points::adapter::{BranchMap, MixtureMap, Port};
use attune_points::{Error, Result, TensorId};
use attune_tensor::autograd;
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::{Tensor, Var};

use crate::pass::arena::Rows;
use crate::pass::local::{self, Together};
use crate::pass::parts::{Given, Ids, PassCx, Placed, Sinks};
use crate::pass::times::Work;
use crate::regions;

type Branch<'a> = Placed<'a, &'a dyn BranchMap>;

/// Components of a part that make other rows in one go.
enum Stage<'a> {
    /// One by itself.
    One(Branch<'a>),
    /// Some that another mixes, on the same rows.
    Mixed(Vec<Branch<'a>>, Placed<'a, &'a dyn MixtureMap>),
}

impl<'a> PassCx<'a> {
    /// The components on what `block` gives, part by part, in the order in which they apply.
    fn stages(&self, block: &Site) -> Result<Vec<Stage<'a>>> {
        let mut stages = Vec::new();
        // Those that nothing has mixed yet.
        let mut alone: Vec<Branch<'a>> = Vec::new();
        for placed in self.placed(&block.id, Given::All) {
            if alone.last().is_some_and(|last| last.part != placed.part) {
                stages.extend(alone.drain(..).map(Stage::One));
            }
            match placed.port {
                Port::Branch(map) => alone.push(placed.with(map)),
                Port::Mixture(map) => {
                    let rows = &placed.rows;
                    let (mixed, others): (Vec<_>, Vec<_>) = alone.into_iter().partition(|branch| branch.rows == *rows);
                    if others.iter().any(|other| other.rows.start < rows.end && rows.start < other.rows.end) {
                        let message =
                            format!("the component at {} mixes others that are not on all of its rows", block.id);
                        return Err(Error::Refused(message));
                    }
                    alone = others;
                    stages.push(Stage::Mixed(mixed, placed.with(map)));
                }
                _ => {}
            }
        }
        stages.extend(alone.into_iter().map(Stage::One));
        Ok(stages)
    }

    /// Whether there are any.
    pub(crate) fn is_branched(&self, block: &Site) -> bool {
        let is_one = |placed: &Placed<'_, Port<'_>>| matches!(placed.port, Port::Branch(_) | Port::Mixture(_));
        self.placed(&block.id, Given::All).iter().any(is_one)
    }

    /// The rows that a stage makes of `x_td` and `y_td`.
    fn staged(
        &self,
        block: &Site,
        stage: &Stage<'_>,
        (x_td, y_td): (&Tensor, &Tensor),
        ids: &Ids<'_>,
        tracked: &[(TensorId, Var)],
    ) -> Result<Tensor> {
        let one = |branch: &Branch<'_>| {
            local::with_tensors(self.parts, block, branch, ids, tracked, |map, tensors, cx| {
                map.graph(x_td, y_td, tensors, cx)
            })
        };
        match stage {
            Stage::One(branch) => one(branch),
            Stage::Mixed(branches, mixture) => {
                let added = branches.iter().map(|branch| Ok((one(branch)? - y_td)?)).collect::<Result<Vec<_>>>()?;
                local::with_tensors(self.parts, block, mixture, ids, tracked, |map, tensors, cx| {
                    map.graph(x_td, y_td, &added, tensors, cx)
                })
            }
        }
    }

    /// Puts what they make of it in the place of `y_td`, which the block gave for `x_td`.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn branch(&self, block: &Site, x_td: MatRef<'_>, mut y_td: ViewMut<'_, f32>) -> Result<()> {
        self.meter.time(Work::Adapter, || {
            for stage in self.stages(block)? {
                for Together { rows, ids } in stage.together(self) {
                    let x = local::tensor(x_td.sub_rows(rows.start, rows.end))?;
                    let y = y_td.reborrow().into_sub_rows(rows.start, rows.end);
                    let given = local::tensor(y.as_ref().into())?;
                    local::write(&self.staged(block, &stage, (&x, &given), &ids, &[])?, y, false)?;
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
            let stages = self.stages(block)?;
            let mut y = self.arena.rows(y_td.rows(), y_td.cols());
            self.kernels.convert(y_td.into(), y.view_mut().into());
            // What each was given, which those before it may have made.
            let mut steps = Vec::with_capacity(stages.len());
            for stage in &stages {
                let (rows, leaves) = (stage.rows(), stage.leaves(self, sinks)?);
                let x = autograd::leaf(&local::tensor(x_td.sub_rows(rows.start, rows.end))?)?;
                let given = autograd::leaf(&local::tensor(y.view().sub_rows(rows.start, rows.end).into())?)?;
                let made = self.staged(block, stage, (&x, &given), stage.ids(), &leaves)?;
                local::write(&made, y.view_mut().into_sub_rows(rows.start, rows.end), false)?;
                steps.push((leaves, x, given, made));
            }
            for (stage, (leaves, x, given, made)) in stages.iter().zip(steps).rev() {
                let rows = stage.rows();
                let dy = local::tensor(dy_td.view().sub_rows(rows.start, rows.end).into())?;
                let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&x, &given]).collect();
                let mut gradients = autograd::pull(&all, &[(&made, &dy)])?;
                let (dgiven, dx) = (gradients.pop().flatten(), gradients.pop().flatten());
                for ((id, _), gradient) in leaves.iter().zip(gradients) {
                    gradient.map(|gradient| regions::put(&mut *sinks[stage.part()], id, &gradient)).transpose()?;
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

impl Stage<'_> {
    fn part(&self) -> usize {
        match self {
            Self::One(branch) => branch.part,
            Self::Mixed(_, mixture) => mixture.part,
        }
    }

    fn rows(&self) -> std::ops::Range<usize> {
        match self {
            Self::One(branch) => branch.rows.clone(),
            Self::Mixed(_, mixture) => mixture.rows.clone(),
        }
    }

    /// The numbers of its rows in the part's layout.
    fn ids(&self) -> &Ids<'_> {
        match self {
            Self::One(branch) => &branch.ids,
            Self::Mixed(_, mixture) => &mixture.ids,
        }
    }

    /// The rows that it sees at once.
    fn together(&self, cx: &PassCx<'_>) -> Vec<Together<'_>> {
        match self {
            Self::One(branch) => local::together(cx, branch),
            Self::Mixed(_, mixture) => local::together(cx, mixture),
        }
    }

    /// Leaves for the tensors of its components whose gradient its part wants.
    fn leaves(&self, cx: &PassCx<'_>, sinks: &Sinks<'_>) -> Result<Vec<(TensorId, Var)>> {
        let of_branches = |branches: &[Branch<'_>]| -> Result<Vec<(TensorId, Var)>> {
            let all =
                branches.iter().map(|branch| local::leaves(cx.parts, branch, sinks)).collect::<Result<Vec<_>>>()?;
            Ok(all.into_iter().flatten().collect())
        };
        match self {
            Self::One(branch) => of_branches(std::slice::from_ref(branch)),
            Self::Mixed(branches, mixture) => {
                let mut leaves = of_branches(branches)?;
                leaves.extend(local::leaves(cx.parts, mixture, sinks)?);
                Ok(leaves)
            }
        }
    }
}
