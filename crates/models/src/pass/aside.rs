//! What attentions find among rows of components, beside their documents.
//!
//! With rows `R_pd` and a gate `g`, what is found for queries `q` is
//! ```text
//! o' = o + g softmax(q Kᵀ / sqrt(W)) V          K = R W_kᵀ + b_k, V = R W_vᵀ + b_v
//! ```
//! with the base's own weights: what components do to these linears they do to documents alone. Axes: T rows, P rows of a
//! component, D hidden, H W the width of all queries.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{AsideMap, Port};
use attune_points::{Error, Result, TensorId};
use attune_tensor::view::{MatRef, View, ViewMut};
use attune_tensor::{autograd, frozen, ops};
use candle_core::{Tensor, Var};

use crate::block::site;
use crate::context::{GraphCx, Matrix};
use crate::pass::local::{self, Together};
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::pass::{Mat, Rows};
use crate::regions;

type Aside<'a> = Placed<'a, &'a dyn AsideMap>;

/// What queries `q_th` find among rows `(R_pd, g)`, weighed by the gate: `[T, H W]`.
fn found(
    of: &Architecture,
    q_th: &Tensor,
    (rows_pd, gate): &(Tensor, Tensor),
    project: impl Fn(Place, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (t, kv, width) = (q_th.dim(0)?, of.kv_heads, of.head_dim);
    let group = of.heads / kv;
    let keys = |place| -> Result<Tensor> {
        let y = project(place, rows_pd)?;
        Ok(y.reshape((y.dim(0)?, kv, width))?.transpose(0, 1)?.contiguous()?)
    };
    let (k, v) = (keys(Place::Key)?, keys(Place::Value)?);
    let q = q_th.reshape((t, kv, group, width))?.permute((1, 0, 2, 3))?.contiguous()?;
    let q = (q.reshape((kv, t * group, width))? * (1.0 / (width as f64).sqrt()))?;
    let o = ops::softmax(&q.matmul(&k.t()?.contiguous()?)?)?.matmul(&v)?;
    let o = o.reshape((kv, t, group, width))?.permute((1, 0, 2, 3))?.contiguous()?;
    Ok(o.reshape((t, kv * group * width))?.broadcast_mul(gate)?)
}

impl GraphCx<'_> {
    /// Adds to `o_th` what queries `q_thw` find among the rows of components at `block`, of these sites.
    pub(crate) fn add_asides(&self, block: &Site, sites: &[Site], q_thw: &Tensor, o_th: Tensor) -> Result<Tensor> {
        let of = self.base.architecture();
        let project = |place, x: &Tensor| {
            let at = site(sites, place)?;
            let y = match self.matrix(&at.id)? {
                Matrix::Tensor(w_oi) => ops::linear(x, &w_oi, None)?,
                Matrix::Frozen(w_oi) => frozen::linear(x, w_oi)?,
            };
            Ok(match at.kind.bias_width() {
                Some(_) => y.broadcast_add(&self.vector(&at.id, "bias")?)?,
                None => y,
            })
        };
        let q_th = q_thw.flatten_from(1)?;
        let mut sum_th = o_th;
        for (binding, at, port) in self.attached(&block.id) {
            let Port::Aside(map) = port else { continue };
            sum_th = self.by_runs(block, (binding, at), &q_th, sum_th, |q_th, o_th, tensors, _| {
                Ok((o_th + found(of, q_th, &map.graph(tensors)?, project)?)?)
            })?;
        }
        Ok(sum_th)
    }
}

impl<'a> PassCx<'a> {
    fn asides(&self, block: &Site) -> Vec<Aside<'a>> {
        let placed = self.placed(&block.id, Given::All).into_iter();
        let asides = placed.filter_map(|placed| match placed.port {
            Port::Aside(map) => Some(placed.with(map)),
            _ => None,
        });
        asides.collect()
    }

    /// Rows of a part through one of a block's linears, as the base has it.
    fn project(&self, part: usize, at: &Site, x: &Tensor) -> Result<Tensor> {
        if self.own(part, &at.id, "weight").is_some() {
            return Err(trained(at));
        }
        let y = frozen::linear(x, self.base.matrix(&self.base.tensor_name(at.id.as_str(), "weight"))?)?;
        let Some(width) = at.kind.bias_width() else { return Ok(y) };
        let bias = Tensor::from_vec(self.vector(part, &at.id, "bias")?, width, y.device())?;
        Ok(y.broadcast_add(&bias)?)
    }

    /// Adds to `o` what queries find among the rows of components; gives `o` as it was, if there are any.
    ///
    /// # Errors
    /// Whatever a component raises; a weight that trains where it makes keys or values of such rows.
    pub(crate) fn add_asides(&self, block: &Site, sites: &[Site], q: MatRef<'_>, o: &mut Mat) -> Result<Option<Mat>> {
        let asides = self.asides(block);
        if asides.is_empty() {
            return Ok(None);
        }
        let mut own = self.arena.mat(o.view().rows(), o.view().cols(), o.dtype());
        self.kernels.convert(o.view(), own.view_mut());
        for placed in asides {
            let made = placed.port.graph(&local::locals(self.parts, &placed, &[])?)?;
            let project = |place, x: &Tensor| self.project(placed.part, site(sites, place)?, x);
            for Together { rows, .. } in local::together(self, &placed) {
                let q_th = local::tensor(q.sub_rows(rows.start, rows.end))?;
                let found_th = found(self.architecture(), &q_th, &made, project)?;
                let sum_th = (local::tensor(o.view().sub_rows(rows.start, rows.end))? + found_th)?;
                let mut room: Rows<f32> = self.arena.rows(rows.len(), sum_th.dim(1)?);
                local::write(&sum_th, room.view_mut(), false)?;
                self.kernels.convert(room.view().into(), o.view_mut().into_sub_rows(rows.start, rows.end));
            }
        }
        Ok(Some(own))
    }

    /// The reverse of [`PassCx::add_asides`]: adds the gradient by queries to `dq`; those of the components' tensors go to the sinks.
    ///
    /// # Errors
    /// Whatever a component or a sink raises; a gradient that is wanted of a weight that makes keys or values of such rows.
    pub(crate) fn asides_vjp(
        &self,
        block: &Site,
        sites: &[Site],
        q: MatRef<'_>,
        d_o: View<'_, f32>,
        mut dq: ViewMut<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        for placed in self.asides(block) {
            for place in [Place::Key, Place::Value] {
                let at = site(sites, place)?;
                if self.wants_any(at, sinks) {
                    return Err(trained(at));
                }
            }
            let (leaves, rows) = (local::leaves(self.parts, &placed, sinks)?, placed.rows.clone());
            let q_th = autograd::leaf(&local::tensor(q.sub_rows(rows.start, rows.end))?)?;
            let made = placed.port.graph(&local::locals(self.parts, &placed, &leaves)?)?;
            let project = |place, x: &Tensor| self.project(placed.part, site(sites, place)?, x);
            let found_th = found(self.architecture(), q_th.as_tensor(), &made, project)?;
            let d_o = local::tensor(d_o.sub_rows(rows.start, rows.end).into())?;
            let all: Vec<&Var> = leaves.iter().map(|(_, var): &(TensorId, Var)| var).chain([&q_th]).collect();
            let mut gradients = autograd::pull(&all, &[(&found_th, &d_o)])?;
            if let Some(own) = gradients.pop().flatten() {
                local::write(&own, dq.reborrow().into_sub_rows(rows.start, rows.end), true)?;
            }
            for ((id, _), gradient) in leaves.iter().zip(gradients) {
                gradient.map(|gradient| regions::put(&mut *sinks[placed.part], id, &gradient)).transpose()?;
            }
        }
        Ok(())
    }
}

fn trained(at: &Site) -> Error {
    Error::Refused(format!("{} trains, and a component makes keys or values of rows of its own by it", at.id))
}
