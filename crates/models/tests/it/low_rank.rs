//! The plainest components: one that adds to the rows of a linear, one that makes another weight of a linear's, one at its ends.

use std::ops::Range;

use attune_architecture::{Architecture, Site, SiteKind};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, BlendMap, Blended, EndMap, FusedRows, Merged, Peft, Port, RowCx, RowMap, WeightMap,
};
use attune_points::{Layout, Locals, Result, TensorSpec, Weight};
use attune_spec::Fault;
use attune_tensor::{Rng, ops};
use candle_core::{DType, Tensor};

/// `y += r/2 (mask ∘ x) down_riᵀ up_orᵀ`: the plainest component that has two tensors and dropout.
pub(crate) struct LowRank {
    pub(crate) rank: usize,
    pub(crate) dropout: f64,
    /// Whether it tells the engine of its form.
    pub(crate) fused: bool,
}

/// Tensors away from zero.
fn random(at: &Attachment, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
    let tensor = |spec: &TensorSpec, rng: &mut Rng| -> Result<_> {
        Ok((spec.local, rng.normal_tensor(spec.shape.as_slice(), 0.3, DType::F64)?))
    };
    let tensors = at.tensors.iter().map(|spec| tensor(spec, rng)).collect::<Result<Vec<_>>>()?;
    Ok((Locals::new(at.site.as_str(), tensors), BaseEdit::None))
}

impl Adapter for LowRank {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Linear { output, input, .. } = site.kind else { return None };
            let tensors =
                vec![TensorSpec::trained("down", [self.rank, input]), TensorSpec::trained("up", [output, self.rank])];
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::Factors {
            left: tensors.get("up")?.clone(),
            right: tensors.get("down")?.clone(),
            scale: self.rank as f64 / 2.0,
        })
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl RowMap for LowRank {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor> {
        let x_ti = match cx.dropout {
            Some(dropout) => (x_ti * dropout.mask(cx.site, x_ti.dim(1)?, self.dropout, x_ti)?)?,
            None => x_ti.clone(),
        };
        let h_tr = (ops::linear(&x_ti, tensors.get("down")?, None)? * (self.rank as f64 / 2.0))?;
        Ok(ops::linear(&h_tr, tensors.get("up")?, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        let (rank, dropout) = (self.rank as f64, self.dropout);
        self.fused.then_some(FusedRows::LowRank { down: "down", up: "up", scale: rank / 2.0, dropout })
    }
}

/// The same on rows from the third of a document on.
pub(crate) struct Later(pub(crate) LowRank);

impl Adapter for Later {
    fn attach(&self, of: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        self.0.attach(of, sites)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        self.0.init(at, weight, rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        self.0.port(at)
    }

    fn acts_on(&self, layout: &Layout) -> Option<Vec<Range<u32>>> {
        Some(layout.docs().iter().map(|doc| (doc.rows.start + 2).min(doc.rows.end)..doc.rows.end).collect())
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No("it acts on some rows"))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

/// `W' = (1 + gain_o) ∘ W + up_or down_ri` and `b' = (1 + gain_o) ∘ b + W down_1i`, row by row: no change of rows alone can tell what it does to a weight that is
/// made by another.
pub(crate) struct Rescaled {
    pub(crate) rank: usize,
}

impl Adapter for Rescaled {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Linear { output, input, .. } = site.kind else { return None };
            let tensors = vec![
                TensorSpec::trained("down", [self.rank, input]),
                TensorSpec::trained("gain", [output]),
                TensorSpec::trained("up", [output, self.rank]),
            ];
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> Result<Merged> {
        let dtype = tensors.get("gain")?.dtype();
        let w_oi = weight.dense(dtype)?;
        let bias = weight.bias(dtype)?.map(|b_o| self.bias(&b_o, &w_oi, tensors)).transpose()?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias })
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl WeightMap for Rescaled {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let gain_o1 = (tensors.get("gain")? + 1.0)?.unsqueeze(1)?;
        Ok((w_oi.broadcast_mul(&gain_o1)? + tensors.get("up")?.matmul(tensors.get("down")?)?)?)
    }

    fn bias(&self, b_o: &Tensor, w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let first_i1 = tensors.get("down")?.narrow(0, 0, 1)?.t()?.contiguous()?;
        Ok(((b_o * (tensors.get("gain")? + 1.0)?)? + w_oi.matmul(&first_i1)?.flatten_all()?)?)
    }
}

/// `x'_j = (1 + gain_j) x_j + next_j x_{j+1}`, around the end, of what a linear's own product reads or of what it gives.
pub(crate) struct Turned {
    pub(crate) input: bool,
}

impl Adapter for Turned {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Linear { output, input, .. } = site.kind else { return None };
            let width = if self.input { input } else { output };
            let tensors = ["gain", "next"].map(|local| TensorSpec::trained(local, [width])).to_vec();
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        if self.input { Port::Input(self) } else { Port::Output(self) }
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> Result<Merged> {
        let w_oi = weight.dense(tensors.get("gain")?.dtype())?;
        let turned = if self.input {
            // What is read turned has the transposed map in its weight.
            let (own, next) = (w_oi.broadcast_mul(&(tensors.get("gain")? + 1.0)?)?, tensors.get("next")?);
            (own + around(&w_oi.broadcast_mul(next)?, w_oi.dim(1)? - 1)?)?
        } else {
            self.graph(&w_oi.t()?.contiguous()?, tensors)?.t()?.contiguous()?
        };
        Ok(Merged::Weight { weight: turned, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

/// Rows that begin at their number `start`.
fn around(x_tw: &Tensor, start: usize) -> Result<Tensor> {
    Ok(Tensor::cat(&[&x_tw.narrow(1, start, x_tw.dim(1)? - start)?, &x_tw.narrow(1, 0, start)?], 1)?)
}

impl EndMap for Turned {
    fn graph(&self, x_tw: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let own = x_tw.broadcast_mul(&(tensors.get("gain")? + 1.0)?)?;
        Ok((own + around(x_tw, 1)?.broadcast_mul(tensors.get("next")?)?)?)
    }
}

/// `y += σ(x gate_i) ∘ (x down_riᵀ up_orᵀ)`, and a loss of its own: the squares of each document's mean of σ, and those of `own`,
/// which does nothing else.
pub(crate) struct Gated {
    pub(crate) rank: usize,
}

impl Adapter for Gated {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Linear { output, input, .. } = site.kind else { return None };
            let tensors = vec![
                TensorSpec::trained("down", [self.rank, input]),
                TensorSpec::trained("gate", [1, input]),
                TensorSpec::trained("own", [2]),
                TensorSpec::trained("up", [output, self.rank]),
            ];
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, _: &mut Rng) -> Result<(Locals, BaseEdit)> {
        Err(attune_points::Error::Refused(format!("the tensors of {} are given", at.site)))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No("it has gates"))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl Gated {
    fn gates(x_ti: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let score_t1 = ops::linear(x_ti, tensors.get("gate")?, None)?;
        Ok((score_t1.neg()?.exp()? + 1.0)?.recip()?)
    }
}

impl RowMap for Gated {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> Result<Tensor> {
        let h_tr = ops::linear(x_ti, tensors.get("down")?, None)?;
        Ok(ops::linear(&h_tr, tensors.get("up")?, None)?.broadcast_mul(&Self::gates(x_ti, tensors)?)?)
    }

    fn loss(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Option<Tensor>> {
        let gates_t1 = Self::gates(x_ti, tensors)?;
        let mut loss = tensors.get("own")?.sqr()?.sum_all()?;
        for (_, rows) in cx.docs() {
            loss = (loss + gates_t1.narrow(0, rows.start, rows.len())?.mean_all()?.sqr()?)?;
        }
        Ok(Some(loss))
    }
}

/// `y += Σ_n s_n silu(gate_o ∘ z_n)` with `s_tn = softmax_n(x_ti route_niᵀ)`, where `z_n` is what the `n`th of two others would add; with
/// what the base gives by itself, `s_tn = softmax_n(x_ti route_niᵀ + h_td top_ndᵀ)`.
pub(crate) struct Blender {
    /// Whether it reads what the base gives by itself.
    pub(crate) reads_base: bool,
}

impl Adapter for Blender {
    fn attach(&self, of: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachments = sites.iter().filter_map(|site| {
            let SiteKind::Linear { output, input, .. } = site.kind else { return None };
            let mut tensors = vec![TensorSpec::trained("gate", [output]), TensorSpec::trained("route", [2, input])];
            if self.reads_base {
                tensors.push(TensorSpec::trained("top", [2, of.hidden]));
            }
            Some(Attachment { site: site.id.clone(), tensors })
        });
        Ok(attachments.collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        random(at, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Blend(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No("it is not linear"))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

impl BlendMap for Blender {
    fn blends(&self) -> usize {
        2
    }

    fn reads_base(&self) -> bool {
        self.reads_base
    }

    fn graph(&self, of: &Blended<'_>, tensors: &Locals, _: &RowCx<'_>) -> Result<Tensor> {
        let mut scores_tn = ops::linear(of.x_ti, tensors.get("route")?, None)?;
        if let Some(h_td) = of.base_td {
            scores_tn = (scores_tn + ops::linear(h_td, tensors.get("top")?, None)?)?;
        }
        let s_tn = ops::softmax(&scores_tn)?;
        let one = |n: usize| -> Result<Tensor> {
            let z_to = ops::silu(&of.added[n].broadcast_mul(tensors.get("gate")?)?)?;
            Ok(z_to.broadcast_mul(&s_tn.narrow(1, n, 1)?)?)
        };
        Ok((one(0)? + one(1)?)?)
    }
}
