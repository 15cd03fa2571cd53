//! Rows that components carry beside the stream from block to block, by their graphs on each part's rows.
//!
//! ```text
//! h'_td, z'_tz = f(h_td, z_tz)       behind a block: what it gave, and what the component carries; zeros below its first attachment
//! dh_td, dz_tz = f's reverse of dh'_td, dz'_tz
//! ```
//! In reverse `dz` goes from block to block as `z` does forwards: a gradient reaches a component lower down without crossing the
//! blocks between. Axes: T rows, D hidden, Z what a component carries.

use std::collections::BTreeMap;

use attune_architecture::{Site, SiteKind};
use attune_points::adapter::{DropoutMask, Port, RowCx, SideMap};
use attune_points::{BankKind, Binding, Result, TensorId};
use attune_tensor::autograd;
use candle_core::{DType, Device, Tensor, Var};

use crate::context::GraphCx;
use crate::pass::arena::Rows;
use crate::pass::local::{self, Together};
use crate::pass::parts::{Given, Ids, PassCx, Placed, Sinks};
use crate::pass::times::Work;
use crate::regions;

type Side<'a> = Placed<'a, &'a dyn SideMap>;

/// What components carry, by their part, their slot, and the first of their rows of the pass.
pub(crate) type Carried = BTreeMap<(usize, u16, usize), Tensor>;

/// What a block gave, and what was carried, before components made something else of both.
pub(crate) struct Before {
    /// None where the block is run again to get it.
    pub(crate) h_td: Option<Rows<f32>>,
    carried: Carried,
}

/// One component in reverse.
struct Step {
    leaves: Vec<(TensorId, Var)>,
    h: Var,
    z: Var,
    made: (Tensor, Tensor),
}

fn key<P>(placed: &Placed<'_, P>) -> (usize, u16, usize) {
    (placed.part, placed.slot, placed.rows.start)
}

/// What a component carries on so many rows before it has made anything.
fn nothing(rows: usize, width: usize, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros((rows, width), dtype, &Device::Cpu)?)
}

impl<'a> PassCx<'a> {
    /// The components that carry rows and stand behind a block of these sites, in the order in which they apply.
    fn sides<'s>(&self, sites: &'s [Site]) -> Vec<(&'s Site, Side<'a>)> {
        let of_site = |site: &'s Site| {
            let placed = self.placed(&site.id, Given::All).into_iter().filter(|placed| !placed.rows.is_empty());
            placed.filter_map(move |placed| match placed.port {
                Port::Side(map) => Some((site, placed.with(map))),
                _ => None,
            })
        };
        // Linears and norms have none; who stands there need not be looked up for it at every block.
        let may_have = |site: &&Site| !matches!(site.kind, SiteKind::Linear { .. } | SiteKind::Norm { .. });
        sites.iter().filter(may_have).flat_map(of_site).collect()
    }

    fn carried(&self, placed: &Side<'_>, carried: &Carried) -> Result<Tensor> {
        match carried.get(&key(placed)) {
            Some(z_tz) => Ok(z_tz.clone()),
            None => nothing(placed.rows.len(), placed.port.width(), DType::F32),
        }
    }

    fn sided(
        &self,
        site: &Site,
        placed: &Side<'_>,
        (h_td, z_tz): (&Tensor, &Tensor),
        ids: &Ids<'_>,
        tracked: &[(TensorId, Var)],
    ) -> Result<(Tensor, Tensor)> {
        let masks = local::masks(self.parts, placed);
        let dropout = masks.as_ref().map(|masks| masks as &dyn DropoutMask);
        let tensors = local::locals(self.parts, placed, tracked)?;
        let cx = RowCx { rows: ids.some(), ..local::row_cx(self.parts, site, placed, dropout) };
        placed.port.graph(h_td, z_tz, &tensors, &cx)
    }

    /// Puts what components make of `h_td`, which a block of these sites gave, in its place, and of what they carry; says what both
    /// were before, if there are such components.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn carry(&self, sites: &[Site], h_td: &mut Rows<f32>, carried: &mut Carried) -> Result<Option<Before>> {
        let sides = self.sides(sites);
        if sides.is_empty() {
            return Ok(None);
        }
        self.meter.time(Work::Adapter, || {
            let mut given = self.arena.rows(h_td.n_rows(), h_td.n_cols());
            self.kernels.convert(h_td.view().into(), given.view_mut().into());
            let before = Before { h_td: Some(given), carried: carried.clone() };
            for (site, placed) in &sides {
                let (z_tz, mut pieces) = (self.carried(placed, carried)?, Vec::new());
                for Together { rows, ids } in local::together(self, placed) {
                    let h = local::tensor(h_td.view().sub_rows(rows.start, rows.end).into())?;
                    let z = z_tz.narrow(0, rows.start - placed.rows.start, rows.len())?.contiguous()?;
                    let (h, z) = self.sided(site, placed, (&h, &z), &ids, &[])?;
                    local::write(&h, h_td.view_mut().into_sub_rows(rows.start, rows.end), false)?;
                    pieces.push(z);
                }
                carried.insert(key(placed), Tensor::cat(&pieces, 0)?);
            }
            Ok(Some(before))
        })
    }

    /// The reverse of [`PassCx::carry`]: `dh_td` and `dcarried`, the gradients by what components made, become those by what they
    /// were given.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn carry_vjp(
        &self,
        sites: &[Site],
        (mut h_td, mut carried): (Rows<f32>, Carried),
        dh_td: &mut Rows<f32>,
        dcarried: &mut Carried,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        self.meter.time(Work::Adapter, || {
            let sides = self.sides(sites);
            // What each was given, which those before it may have made.
            let mut steps = Vec::with_capacity(sides.len());
            for (site, placed) in &sides {
                let (rows, leaves) = (&placed.rows, local::leaves(self.parts, placed, sinks)?);
                let h = autograd::leaf(&local::tensor(h_td.view().sub_rows(rows.start, rows.end).into())?)?;
                let z = autograd::leaf(&self.carried(placed, &carried)?)?;
                let made = self.sided(site, placed, (&h, &z), &placed.ids, &leaves)?;
                local::write(&made.0, h_td.view_mut().into_sub_rows(rows.start, rows.end), false)?;
                carried.insert(key(placed), made.1.detach());
                steps.push(Step { leaves, h, z, made });
            }
            for ((_, placed), Step { leaves, h, z, made }) in sides.iter().zip(steps).rev() {
                let rows = &placed.rows;
                let dh = local::tensor(dh_td.view().sub_rows(rows.start, rows.end).into())?;
                let dz = dcarried.remove(&key(placed));
                let outputs: Vec<(&Tensor, &Tensor)> =
                    std::iter::once((&made.0, &dh)).chain(dz.iter().map(|dz| (&made.1, dz))).collect();
                let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).chain([&h, &z]).collect();
                let mut gradients = autograd::pull(&all, &outputs)?;
                let (dz, dh) = (gradients.pop().flatten(), gradients.pop().flatten());
                for ((id, _), gradient) in leaves.iter().zip(gradients) {
                    gradient.map(|gradient| regions::put(&mut *sinks[placed.part], id, &gradient)).transpose()?;
                }
                let to = dh_td.view_mut().into_sub_rows(rows.start, rows.end);
                match dh {
                    Some(dh) => local::write(&dh, to, false)?,
                    None => self.kernels.fill(to, 0.0),
                }
                dcarried.extend(dz.map(|dz| (key(placed), dz)));
            }
            Ok(())
        })
    }
}

impl Before {
    /// What a block gave, as it was kept or as the block gives it `again`, and what was carried.
    ///
    /// # Errors
    /// Whatever running the block again raises.
    pub(crate) fn or(self, again: impl FnOnce() -> Result<Rows<f32>>) -> Result<(Rows<f32>, Carried)> {
        let Self { h_td, carried } = self;
        Ok((h_td.map_or_else(again, Ok)?, carried))
    }
}

impl<'a> GraphCx<'a> {
    /// The bindings of components that carry rows, and how wide these are.
    fn carrying(&self) -> Vec<(&'a Binding, usize)> {
        let (theta, stack) = (self.theta, self.stack);
        let carrying = theta.bindings.iter().filter_map(|binding| {
            let bank = theta.banks.get(usize::from(binding.slot)).filter(|bank| bank.kind == BankKind::Adapter);
            let slot = bank.and_then(|_| stack.slot(binding.slot))?;
            let width = slot.attachments().find_map(|at| match slot.adapter().port(at) {
                Port::Side(map) => Some(map.width()),
                _ => None,
            });
            Some((binding, width?))
        });
        carrying.collect()
    }

    /// What components carry below the first block beside so many rows, each in the order of its binding.
    pub(crate) fn begin_carried(&self, rows: usize) -> Result<Vec<Tensor>> {
        self.carrying().into_iter().map(|(_, width)| nothing(rows, width, self.dtype)).collect()
    }

    /// What components make of the `streams` behind a block of these sites: the one that it gave, then what each carries.
    pub(crate) fn carry(&self, sites: &[Site], mut streams: Vec<Tensor>) -> Result<Vec<Tensor>> {
        for site in sites {
            for (binding, at, port) in self.attached(&site.id) {
                let Port::Side(map) = port else { continue };
                let carrying = self.carrying();
                let place = carrying.iter().position(|(other, _)| std::ptr::eq(*other, binding));
                let Some(place) = place.map(|place| place + 1) else { continue };
                // Side by side, so that they are cut alike where rows are bound to several sets.
                let (d, z) = (streams[0].dim(1)?, streams[place].dim(1)?);
                let both = Tensor::cat(&[&streams[0], &streams[place]], 1)?;
                let made = self.by_runs(site, (binding, at), &both.clone(), both, |both, _, tensors, cx| {
                    let (h_td, z_tz) = (both.narrow(1, 0, d)?.contiguous()?, both.narrow(1, d, z)?.contiguous()?);
                    let (h_td, z_tz) = map.graph(&h_td, &z_tz, tensors, cx)?;
                    Ok(Tensor::cat(&[h_td, z_tz], 1)?)
                })?;
                streams[0] = made.narrow(1, 0, d)?.contiguous()?;
                streams[place] = made.narrow(1, d, z)?.contiguous()?;
            }
        }
        Ok(streams)
    }
}
