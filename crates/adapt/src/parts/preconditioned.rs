//! Steps along the gradients of a pair of factors as their product sees them: each factor's gradient is divided by what the other one
//! makes of a change.
//!
//! The change of the product `B A` that a step makes is then the same however the product is split into factors, which that of plain
//! gradients is not.

use attune_points::adapter::Trained;
use attune_points::engine::{self, Engine, Source, StepReport, StepRule};
use attune_points::{Error, Owner, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Tensor};

/// A step whose gradients of `A_ri` and `B_or` are
/// ```text
/// ∂A <- (B^T B + δ 1)^-1 ∂A        ∂B <- ∂B (A A^T + δ 1)^-1
/// ```
/// for those of the two that train, before they are clipped and the optimiser sees them.
pub(crate) struct Preconditioned {
    damping: f64,
    pairs: Vec<(TensorId, TensorId)>,
}

impl Preconditioned {
    /// For the tensors `a` and `b` of every site of a component; `damping` is δ.
    pub(crate) fn new(of: &Trained<'_>, (a, b): (&str, &str), damping: f64) -> Self {
        let id = |site: &str, local: &str| TensorId {
            owner: Owner::Bank { slot: of.slot, set: 0 },
            name: TensorName::new(site, local),
        };
        let pairs = of.attachments.iter().map(|at| (id(at.site.as_str(), a), id(at.site.as_str(), b)));
        Self { damping, pairs: pairs.collect() }
    }

    /// `(G + δ 1)^-1` of a Gram matrix, in 64 bits.
    fn inverse(&self, gram: &Tensor) -> Result<Tensor> {
        let gram = gram.to_dtype(DType::F64)?;
        let damping = (Tensor::eye(gram.dim(0)?, DType::F64, gram.device())? * self.damping)?;
        Ok(linalg::inverse(&(gram + damping)?)?)
    }
}

impl StepRule for Preconditioned {
    fn step(&mut self, _: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let theta = engine.theta().clone();
        let (mut gradients, loss) = engine::gradients_on(engine, &batch)?;
        for (a, b) in &self.pairs {
            let (a_ri, b_or) = (held(&theta, a)?, held(&theta, b)?);
            if let Some(gradient) = gradients.get(a) {
                let by = self.inverse(&ops::matmul(&b_or.t()?.contiguous()?, b_or)?)?.to_dtype(gradient.dtype())?;
                let made = ops::matmul(&by, gradient)?;
                gradients.set(a, made);
            }
            if let Some(gradient) = gradients.get(b) {
                let by = self.inverse(&ops::matmul(a_ri, &a_ri.t()?.contiguous()?)?)?.to_dtype(gradient.dtype())?;
                let made = ops::matmul(gradient, &by)?;
                gradients.set(b, made);
            }
        }
        let grad_norm = engine.update(gradients)?;
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() })
    }
}

fn held<'a>(theta: &'a Theta, id: &TensorId) -> Result<&'a Tensor> {
    theta.get(id).ok_or_else(|| Error::Refused(format!("{id} is not among the parameters")))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorSpec;
    use attune_points::adapter::Attachment;
    use attune_tensor::Rng;
    use candle_core::Device;

    use super::*;
    use crate::parts::toy::{Toy, id};

    const NAMES: (&str, &str) = ("a", "b");

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(3, name).normal_tensor(&shape[..], 1.0, DType::F32).unwrap()
    }

    /// How a product moves in one small step toward a target, its factors being `B R` and `R^-1 A`.
    fn moved(r: &[[f32; 2]; 2], damping: Option<f64>, lr: f64) -> Vec<f32> {
        let r = Tensor::new(r, &Device::Cpu).unwrap();
        let undo = linalg::inverse(&r.to_dtype(DType::F64).unwrap()).unwrap().to_dtype(DType::F32).unwrap();
        let a = ops::matmul(&undo, &normal("a", [2, 5])).unwrap();
        let b = ops::matmul(&normal("b", [4, 2]), &r).unwrap();
        let product = |theta: &Theta| {
            ops::matmul(theta.get(&id("up", "b")).unwrap(), theta.get(&id("up", "a")).unwrap()).unwrap()
        };
        let target = normal("target", [4, 5]);
        let gradient = move |theta: &Theta, of: &TensorId| {
            let off = (product(theta) - &target).unwrap();
            Some(if *of == id("up", "a") {
                let b = theta.get(&id("up", "b")).unwrap();
                ops::matmul(&b.t().unwrap().contiguous().unwrap(), &off).unwrap()
            } else {
                let a = theta.get(&id("up", "a")).unwrap();
                ops::matmul(&off, &a.t().unwrap().contiguous().unwrap()).unwrap()
            })
        };
        let spec = TensorSpec::trained;
        let at = Attachment { site: SiteId::new("up"), tensors: vec![spec("a", [2, 5]), spec("b", [4, 2])] };
        let start = move |_: &str, local: &str| if local == "a" { a.clone() } else { b.clone() };
        let mut toy = Toy::new(vec![at], start, lr, gradient);
        let before = product(&toy.theta);
        match damping {
            Some(damping) => {
                Preconditioned::new(&toy.trained(1), NAMES, damping).step(Step(0), &mut toy).unwrap();
            }
            None => drop(engine::usual_step(&mut toy).unwrap()),
        }
        let moved = ((product(&toy.theta) - before).unwrap() * 1e3).unwrap();
        moved.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        let size = b.iter().fold(0.0f32, |size, x| size.max(x.abs()));
        a.iter().zip(b).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / size
    }

    #[test]
    fn a_step_of_the_product_does_not_depend_on_its_factors_and_a_plain_one_does() {
        let (one, skew) = ([[1.0, 0.0], [0.0, 1.0]], [[4.0, 1.0], [0.0, 0.2]]);
        assert!(apart(&moved(&skew, Some(1e-9), 1e-3), &moved(&one, Some(1e-9), 1e-3)) < 0.02);
        assert!(apart(&moved(&skew, None, 1e-3), &moved(&one, None, 1e-3)) > 0.5);
    }

    /// With a large damping a step is the plain one, divided by it.
    #[test]
    fn damping_leads_back_to_plain_gradients() {
        let one = [[1.0, 0.0], [0.0, 1.0]];
        let (plain, damped) = (moved(&one, None, 1e-3), moved(&one, Some(1e4), 1e-3 * 1e4));
        assert!(apart(&damped, &plain) < 0.01, "{damped:?} against {plain:?}");
    }

    /// Where B alone trains its gradient is the one whose change of the product is nearest to the weight's own gradient (LoRA-FA).
    #[test]
    fn beside_a_frozen_factor_the_change_is_the_weights_gradient_in_its_span() {
        let (a, dw) = (normal("a", [2, 5]), normal("dw", [4, 5]));
        let spec = TensorSpec::trained;
        let mut frozen = spec("a", [2, 5]);
        frozen.train = false;
        let at = Attachment { site: SiteId::new("up"), tensors: vec![frozen, spec("b", [4, 2])] };
        let (held, gradient) = (a.clone(), dw.clone());
        let start = move |_: &str, local: &str| {
            if local == "a" { held.clone() } else { Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap() }
        };
        let by_b = move |theta: &Theta, _: &TensorId| {
            let a = theta.get(&id("up", "a")).unwrap();
            Some(ops::matmul(&gradient, &a.t().unwrap().contiguous().unwrap()).unwrap())
        };
        let mut toy = Toy::new(vec![at], start, 1.0, by_b);
        Preconditioned::new(&toy.trained(1), NAMES, 1e-9).step(Step(0), &mut toy).unwrap();
        let change = ops::matmul(&toy.value("up", "b"), &a).unwrap();
        // What is left of the gradient is orthogonal to the rows of A.
        let left = ops::matmul(&(change + dw).unwrap(), &a.t().unwrap().contiguous().unwrap()).unwrap();
        let left = left.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(left < 1e-4, "{left}");
    }
}
