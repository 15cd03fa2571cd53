//! Components that add rows at linears, and those that blend what others would add, by their graphs on each part's rows.
//!
//! ```text
//! y_to += f(x_ti, z_1, …, z_n)       z_k = what component k would add for x_ti, which it does not add by itself
//! ```

use attune_architecture::Site;
use attune_points::adapter::{BlendMap, Blended, Port};
use attune_points::{Error, Result, TensorId};
use attune_tensor::autograd;
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::pass::alone;
use crate::pass::local::{self, Back, Together};
use crate::pass::parts::{Added, Given, Ids, Part, PassCx, Placed, Sinks};

/// A component and those that it blends, which are on its rows.
pub(crate) struct Blend<'a> {
    of: Vec<Added<'a>>,
    by: Placed<'a, &'a dyn BlendMap>,
}

impl<'a> PassCx<'a> {
    /// The components that add to the rows of a linear by themselves, and those that blend others, part by part in the order in which
    /// they apply.
    ///
    /// # Errors
    /// A component whose port no linear offers; one that blends others which are not on all of its rows.
    pub(crate) fn added<'g>(&self, site: &Site, given: Given<'g>) -> Result<(Vec<Added<'g>>, Vec<Blend<'g>>)>
    where
        'a: 'g,
    {
        let (mut added, mut blends): (Vec<Added<'g>>, _) = (Vec::new(), Vec::new());
        for placed in self.formed(site, given) {
            match placed.port {
                Port::Delta(map) => added.push(placed.with(map)),
                Port::Blend(map) => {
                    let (part, rows) = (placed.part, &placed.rows);
                    let (of, others): (Vec<_>, Vec<_>) =
                        added.into_iter().partition(|one| one.part == part && one.rows == *rows);
                    if others.iter().any(|one| one.rows.start < rows.end && rows.start < one.rows.end) {
                        let message =
                            format!("the component at {} blends others that are not on all of its rows", site.id);
                        return Err(Error::Refused(message));
                    }
                    added = others;
                    blends.push(Blend { of, by: placed.with(map) });
                }
                Port::Weight(_) | Port::Input(_) | Port::Output(_) | Port::Table(_) => {}
                _ => {
                    return Err(Error::Refused(format!(
                        "the component at {} has a port that no linear offers",
                        site.id
                    )));
                }
            }
        }
        Ok((added, blends))
    }

    /// `y += blend(x)` on the rows of components.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn blend(
        &self,
        site: &Site,
        blends: &[Blend<'_>],
        x_ti: MatRef<'_>,
        mut y_to: ViewMut<'_, f32>,
    ) -> Result<()> {
        let (parts, alone) = (self.parts, &self.alone);
        let pieces: Vec<(&Blend<'_>, Together<'_>)> = blends
            .iter()
            .flat_map(|blend| local::together(self, &blend.by).into_iter().map(move |piece| (blend, piece)))
            .collect();
        let made = |(blend, Together { rows, ids }): &(&Blend<'_>, Together<'_>)| {
            let x = local::tensor(x_ti.sub_rows(rows.start, rows.end))?;
            blend.graph(parts, alone, site, &x, ids, &[])
        };
        let made: Vec<Result<Tensor>> = pieces.par_iter().map(made).collect();
        for ((_, Together { rows, .. }), made) in pieces.iter().zip(made) {
            local::write(&made?, y_to.reborrow().into_sub_rows(rows.start, rows.end), true)?;
        }
        Ok(())
    }

    /// The reverse of [`PassCx::blend`].
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn blend_vjp(
        &self,
        site: &Site,
        blends: &[Blend<'_>],
        x_ti: MatRef<'_>,
        dy_to: MatRef<'_>,
        mut dx_ti: Option<ViewMut<'_, f32>>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let (parts, alone) = (self.parts, &self.alone);
        let asked: Vec<(&Blend<'_>, Vec<TensorId>)> = blends.iter().map(|blend| (blend, blend.wanted(sinks))).collect();
        let back = |(blend, wanted): &(&Blend<'_>, Vec<TensorId>)| -> Result<Back> {
            let Blend { by, .. } = blend;
            let leaves = local::leaves_for(&parts[by.part], wanted)?;
            let x = autograd::leaf(&local::tensor(x_ti.sub_rows(by.rows.start, by.rows.end))?)?;
            let made = blend.graph(parts, alone, site, &x, &by.ids, &leaves)?;
            let dy = local::tensor(dy_to.sub_rows(by.rows.start, by.rows.end))?;
            let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&x]).collect();
            let mut gradients = autograd::pull(&all, &[(&made, &dy)])?;
            let dx = gradients.pop().flatten();
            Ok((leaves.into_iter().map(|(id, _)| id).zip(gradients).collect(), dx))
        };
        let found: Vec<Result<Back>> = asked.par_iter().map(back).collect();
        for ((blend, _), found) in asked.iter().zip(found) {
            local::put_back(&blend.by, found?, dx_ti.as_mut().map(ViewMut::reborrow), sinks)?;
        }
        Ok(())
    }
}

impl Blend<'_> {
    /// The tensors of its components whose gradient its part wants.
    fn wanted(&self, sinks: &Sinks<'_>) -> Vec<TensorId> {
        let of = self.of.iter().flat_map(|placed| local::wanted_of(placed, sinks));
        of.chain(local::wanted_of(&self.by, sinks)).collect()
    }

    /// What it adds for the rows `x` of `ids`.
    fn graph(
        &self,
        parts: &[Part<'_>],
        alone: &[Option<Tensor>],
        site: &Site,
        x: &Tensor,
        ids: &Ids<'_>,
        tracked: &[(TensorId, Var)],
    ) -> Result<Tensor> {
        let of_one = |placed: &Added<'_>| {
            local::with_tensors(parts, site, placed, ids, tracked, |map, tensors, cx| map.graph(x, tensors, cx))
        };
        let added = self.of.iter().map(of_one).collect::<Result<Vec<_>>>()?;
        let base_td = alone::read(self.by.port, alone::of(alone, self.by.part), ids.some())?;
        local::with_tensors(parts, site, &self.by, ids, tracked, |map, tensors, cx| {
            map.graph(&Blended { x_ti: x, added: &added, base_td: base_td.as_ref() }, tensors, cx)
        })
    }
}
