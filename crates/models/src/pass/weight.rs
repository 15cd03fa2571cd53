//! The weight that the rows of a linear are multiplied with, and its gradient: the base's own, one that stands in for it, or
//! what components make of that.

use std::collections::BTreeSet;
use std::ops::Range;

use attune_architecture::{Site, SiteId, SiteKind};
use attune_points::adapter::{Port, WeightMap};
use attune_points::error::Context as _;
use attune_points::{Error, Region, Result, TensorId, TensorName};
use attune_tensor::kernels::{Gemm, Operand, Right};
use attune_tensor::view::{MatMut, MatRef, View, ViewMut};
use attune_tensor::{autograd, reading};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use crate::pass::arena::{Activations, Mat};
use crate::pass::ends::Ends;
use crate::pass::linear::f32s;
use crate::pass::parts::{Given, PassCx, Placed, Sinks, wants};
use crate::pass::times::Work;
use crate::regions;
use crate::regions::{entries_within, within};
use crate::stack;

/// A component that makes another weight of a linear's.
type Maps<'a> = Placed<'a, &'a dyn WeightMap>;

/// Rows that are multiplied with one weight.
pub(crate) struct Weighed<'a> {
    /// Among those given.
    pub(crate) rows: Range<usize>,
    /// One of the parts that they belong to.
    pub(crate) part: usize,
    /// What makes the weight of the one that the site has by itself, in order.
    maps: Vec<Maps<'a>>,
    /// What stands before the product, and behind it.
    pub(crate) ends: Ends<'a>,
}

impl Weighed<'_> {
    /// Whether components make the weight.
    pub(crate) fn is_made(&self) -> bool {
        !self.maps.is_empty()
    }
}

/// What components make of a linear's own tensors.
struct Made {
    w_oi: Tensor,
    b_o: Option<Tensor>,
}

/// Tensors whose gradient is asked for.
type Leaves = Vec<(TensorId, Var)>;

impl<'a> PassCx<'a> {
    /// Runs of the rows given that are multiplied with one and the same weight, and have one bias.
    pub(crate) fn weighed<'g>(&self, site: &Site, given: Given<'g>) -> Vec<Weighed<'g>>
    where
        'a: 'g,
    {
        let mut runs: Vec<Weighed<'g>> = Vec::new();
        let placed = self.formed(site, given);
        for (part, rows) in self.parts_of(given) {
            let concerns = |port: &Port<'_>| matches!(port, Port::Weight(_) | Port::Input(_) | Port::Output(_));
            let concerned = placed.iter().filter(|placed| placed.part == part && concerns(&placed.port));
            let cuts = concerned.clone().flat_map(|placed| [placed.rows.start, placed.rows.end]);
            let cuts: Vec<usize> = cuts.chain([rows.start, rows.end]).collect::<BTreeSet<_>>().into_iter().collect();
            for cuts in cuts.windows(2) {
                let (mut maps, mut ends) = (Vec::new(), Ends::default());
                let covers =
                    |placed: &&Placed<'g, Port<'g>>| placed.rows.start <= cuts[0] && cuts[1] <= placed.rows.end;
                for placed in concerned.clone().filter(covers) {
                    match placed.port {
                        Port::Weight(map) => maps.push(placed.with(map)),
                        Port::Input(map) => ends.inputs.push(placed.with(map)),
                        Port::Output(map) => ends.outputs.push(placed.with(map)),
                        _ => {}
                    }
                }
                let run = Weighed { rows: cuts[0]..cuts[1], part, maps, ends };
                match runs.last_mut().filter(|last| self.same_weight(last, &run, &site.id)) {
                    Some(last) => last.rows.end = run.rows.end,
                    None => runs.push(run),
                }
            }
        }
        runs
    }

    fn same_weight(&self, a: &Weighed<'_>, b: &Weighed<'_>, site: &SiteId) -> bool {
        let same = |(a, b): (&Maps<'_>, &Maps<'_>)| self.same(a, b);
        // What stands at the ends runs its graph on each part's rows by themselves.
        let without_ends = a.ends.is_empty() && b.ends.is_empty();
        without_ends
            && self.alike(a.part, b.part, site)
            && a.maps.len() == b.maps.len()
            && a.maps.iter().zip(&b.maps).all(same)
    }

    /// Reads the weight of some rows, as `w_oi`.
    pub(crate) fn with_weight(&self, site: &Site, of: &Weighed<'_>, then: impl FnOnce(Right<'_>)) -> Result<()> {
        if of.is_made() {
            return self.with_tensor(site, &self.made(site, of, &[])?.w_oi, then);
        }
        match self.own(of.part, &site.id, "weight") {
            Some((_, tensor)) => self.with_tensor(site, tensor, then),
            None => {
                let frozen = self.base.matrix(&self.base.tensor_name(site.id.as_str(), "weight"))?;
                let reading = frozen.read().context(|| format!("linear {}", site.id))?;
                then(reading.right());
                Ok(())
            }
        }
    }

    /// The same, and the bias where there is one.
    pub(crate) fn with_both(
        &self,
        site: &Site,
        of: &Weighed<'_>,
        then: impl FnOnce(Right<'_>, Option<&[f32]>),
    ) -> Result<()> {
        if of.is_made() {
            let made = self.made(site, of, &[])?;
            let bias = made.b_o.map(|b_o| b_o.to_vec1::<f32>()).transpose()?;
            return self.with_tensor(site, &made.w_oi, |weight| then(weight, bias.as_deref()));
        }
        let bias = match site.kind.bias_width() {
            Some(_) => Some(self.vector(of.part, &site.id, "bias")?),
            None => None,
        };
        self.with_weight(site, of, |weight| then(weight, bias.as_deref()))
    }

    /// Reads a weight that is not the base's.
    fn with_tensor(&self, site: &Site, tensor: &Tensor, then: impl FnOnce(Right<'_>)) -> Result<()> {
        let reading = reading::read(tensor).context(|| format!("linear {}", site.id))?;
        // In a pass of bf16 a weight of 32 bits is rounded like the frozen ones; its master value is not.
        match self.dtype {
            Activations::F32 => then(Operand::plain(reading.mat()).into()),
            Activations::Bf16 => {
                let mut narrow = self.arena.mat(reading.mat().rows(), reading.mat().cols(), self.dtype);
                self.kernels.convert(reading.mat(), narrow.view_mut());
                then(Operand::plain(narrow.view()).into());
            }
        }
        Ok(())
    }

    /// The weight, and the bias where there is one, that components make, of `leaves` where there are any.
    fn made(&self, site: &Site, of: &Weighed<'_>, leaves: &[(TensorId, Var)]) -> Result<Made> {
        self.meter.time(Work::Adapter, || {
            let leaf = |id: &TensorId| leaves.iter().find(|(leaf, _)| leaf == id).map(|(_, var)| var.as_tensor());
            let own = |local: &str| -> Result<Tensor> {
                let id = self.id_of(of.part, &site.id, local);
                Ok(match (leaf(&id), self.own(of.part, &site.id, local)) {
                    (Some(leaf), _) => leaf.clone(),
                    (None, Some((_, own))) => own.clone(),
                    (None, None) => self.base.tensor(&id.name, DType::F32)?,
                })
            };
            let mut w_oi = own("weight")?;
            let mut b_o = site.kind.bias_width().map(|_| own("bias")).transpose()?;
            let shapes = (w_oi.shape().clone(), b_o.as_ref().map(|b_o| b_o.shape().clone()));
            for map in &of.maps {
                let theta = self.parts[map.part].theta;
                let held = |name: &TensorName| {
                    let id = TensorId { owner: map.owner(), name: name.clone() };
                    leaf(&id).or_else(|| theta.get(&id))
                };
                let locals = stack::locals_by(map.at, held)?;
                b_o = b_o.map(|b_o| map.port.bias(&b_o, &w_oi, &locals)).transpose()?;
                w_oi = map.port.graph(&w_oi, &locals)?;
                let made = (w_oi.shape().clone(), b_o.as_ref().map(|b_o| b_o.shape().clone()));
                if made != shapes {
                    let message = format!("the component at {} made {made:?} of {shapes:?}", site.id);
                    return Err(Error::Refused(message));
                }
            }
            Ok(Made { w_oi: w_oi.contiguous()?, b_o })
        })
    }

    /// The reverse of a product with the weight of some rows, `x_ti` and `dy_to`: their share of its gradient and the bias's to the
    /// sinks, and the weight to `product`, if anything is to be multiplied with it.
    pub(crate) fn weighed_vjp(
        &self,
        site: &Site,
        of: &Weighed<'_>,
        given: Given<'_>,
        (x_ti, dy_to): (MatRef<'_>, MatRef<'_>),
        product: Option<impl FnOnce(Right<'_>)>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let within = |(part, rows): (usize, Range<usize>)| {
            let rows = rows.start.max(of.rows.start)..rows.end.min(of.rows.end);
            (!rows.is_empty()).then_some((part, rows))
        };
        let parts: Vec<(usize, Range<usize>)> = self.parts_of(given).into_iter().filter_map(within).collect();
        let operands = |rows: &Range<usize>| {
            let (start, end) = (rows.start - of.rows.start, rows.end - of.rows.start);
            (x_ti.sub_rows(start, end), dy_to.sub_rows(start, end))
        };
        if !of.is_made() {
            for (part, rows) in parts {
                self.bias_vjp(site, part, operands(&rows).1, sinks)?;
                let id = self.id_of(part, &site.id, "weight");
                if let Some(dw) = self.weight_gradient(&id, sinks[part].want(&id), operands(&rows))? {
                    sinks[part].put(&id, &dw)?;
                }
            }
            return product.map_or(Ok(()), |product| self.with_weight(site, of, product));
        }
        let leaves = self.leaves(site, of, |id| parts.iter().any(|(part, _)| wants(&*sinks[*part], id)))?;
        let made = self.made(site, of, &leaves)?;
        if let Some(product) = product {
            self.with_tensor(site, &made.w_oi, product)?;
        }
        if leaves.is_empty() {
            return Ok(());
        }
        let vars: Vec<&Var> = leaves.iter().map(|(_, var)| var).collect();
        // As many gradients by the weight at a time as are pulled back side by side.
        for some in parts.chunks(rayon::current_num_threads().max(1)) {
            let by_both = some.iter().map(|(_, rows)| {
                let db_o = made.b_o.as_ref().map(|b_o| self.by_bias(b_o.elem_count(), operands(rows).1)).transpose()?;
                Ok((self.over_rows(operands(rows))?, db_o))
            });
            let by_both = by_both.collect::<Result<Vec<_>>>()?;
            let pull = |(dw_oi, db_o): &(Tensor, Option<Tensor>)| {
                let bias = made.b_o.as_ref().zip(db_o.as_ref());
                let outputs: Vec<(&Tensor, &Tensor)> = [(&made.w_oi, dw_oi)].into_iter().chain(bias).collect();
                autograd::pull(&vars, &outputs)
            };
            let found: Vec<_> = self.meter.time(Work::Adapter, || by_both.par_iter().map(pull).collect());
            for ((part, _), gradients) in some.iter().zip(found) {
                for ((id, _), gradient) in leaves.iter().zip(gradients?) {
                    gradient.map(|gradient| regions::put(&mut *sinks[*part], id, &gradient)).transpose()?;
                }
            }
        }
        Ok(())
    }

    /// The tensors that a made weight is made of and whose gradient is wanted.
    fn leaves(&self, site: &Site, of: &Weighed<'_>, wanted: impl Fn(&TensorId) -> bool) -> Result<Leaves> {
        let mut leaves = Leaves::new();
        for local in site.locals() {
            let own = self.id_of(of.part, &site.id, local);
            if wanted(&own) {
                let value = match self.own(of.part, &site.id, local) {
                    Some((_, tensor)) => autograd::leaf(tensor)?,
                    None => autograd::leaf(&self.base.tensor(&own.name, DType::F32)?)?,
                };
                leaves.push((own, value));
            }
        }
        for map in &of.maps {
            for id in map.at.tensors.iter().map(|spec| map.id(spec)).filter(|id| wanted(id)) {
                if let Some(value) = self.parts[map.part].theta.get(&id) {
                    leaves.push((id, autograd::leaf(value)?));
                }
            }
        }
        Ok(leaves)
    }

    /// The gradient of the site's own bias by the rows of a part.
    fn bias_vjp(&self, site: &Site, part: usize, dy_to: MatRef<'_>, sinks: &mut Sinks<'_>) -> Result<()> {
        let SiteKind::Linear { output, bias: true, .. } = site.kind else { return Ok(()) };
        let id = self.id_of(part, &site.id, "bias");
        if wants(&*sinks[part], &id) {
            regions::put(&mut *sinks[part], &id, &self.by_bias(output, dy_to)?)?;
        }
        Ok(())
    }

    /// The gradient by a bias.
    fn by_bias(&self, width: usize, dy_to: MatRef<'_>) -> Result<Tensor> {
        let mut db = vec![0.0f32; width];
        let wide = self.wide(dy_to);
        let dy = wide.as_ref().map_or_else(|| f32s(dy_to), |rows| Ok(rows.view()))?;
        self.meter.time(Work::Elementwise, || self.kernels.sum_rows(dy, &mut db, false));
        Ok(Tensor::from_vec(db, width, &Device::Cpu)?)
    }

    /// What is asked for of `dW_oi = dy_toᵀ x_ti`, and no more of it.
    fn weight_gradient(
        &self,
        id: &TensorId,
        region: Region<'_>,
        (x_ti, dy_to): (MatRef<'_>, MatRef<'_>),
    ) -> Result<Option<Tensor>> {
        let (output, input) = (dy_to.cols(), x_ti.cols());
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
        Ok(Some(self.over_rows((x, dy))?))
    }

    /// `dy_toᵀ x_ti`.
    fn over_rows(&self, (x_ti, dy_to): (MatRef<'_>, MatRef<'_>)) -> Result<Tensor> {
        let shape = (dy_to.cols(), x_ti.cols());
        let mut dw = vec![0.0f32; shape.0 * shape.1];
        let of = Gemm::new(Operand::transposed(dy_to), Operand::plain(x_ti));
        self.meter.time(Work::Gemm, || self.kernels.gemm(ViewMut::new(&mut dw, shape.0, shape.1), &of));
        Ok(Tensor::from_vec(dw, shape, &Device::Cpu)?)
    }
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
