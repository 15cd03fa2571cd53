//! An engine for tests of steps: parameters whose gradients a function says, updated down the slope.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_points::adapter::{Attachment, Trained};
use attune_points::engine::{Batch, Engine, LossReport, Renewed, Source, Tensors};
use attune_points::layout::LabelCounts;
use attune_points::objective::{Denominator, Objective};
use attune_points::{
    Bank, BankKind, Error, GradSink, Grads, Layout, Owner, Params, Result, TensorId, TensorName, Theta,
};
use attune_spec::id::Step;
use attune_tensor::Rng;
use candle_core::Tensor;

/// The gradient of a tensor at some parameters; none for 0.
type Gradient = dyn Fn(&Theta, &TensorId) -> Option<Tensor>;

/// A loss by parameters.
type Loss = dyn Fn(&Theta) -> f64;

pub(crate) struct Toy {
    pub(crate) theta: Theta,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) lr: f64,
    /// Tensors that started anew, and how many of their entries.
    pub(crate) renewed: Vec<(String, usize)>,
    pub(crate) step: u64,
    /// The base's own weights.
    pub(crate) weights: BTreeMap<String, Tensor>,
    /// The loss at some parameters, if it has one.
    pub(crate) loss: Option<Box<Loss>>,
    /// Whether there is a validation set.
    pub(crate) is_validated: bool,
    gradient: Box<Gradient>,
}

/// A tensor of the component that trains.
pub(crate) fn id(site: &str, local: &str) -> TensorId {
    TensorId { owner: Owner::Bank { slot: 0, set: 0 }, name: TensorName::new(site, local) }
}

impl Toy {
    /// A component at these sites that starts with these tensors, in the order of each site's own.
    pub(crate) fn new(
        attachments: Vec<Attachment>,
        start: impl Fn(&str, &str) -> Tensor,
        lr: f64,
        gradient: impl Fn(&Theta, &TensorId) -> Option<Tensor> + 'static,
    ) -> Self {
        let mut params = Params::new();
        for at in &attachments {
            for spec in &at.tensors {
                params.insert_declared(spec, at.site.as_str(), start(at.site.as_str(), spec.local));
            }
        }
        let bank = Bank { slot: "x".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: true };
        let (theta, gradient) = (Theta::single([bank]), Box::new(gradient));
        Self {
            theta,
            attachments,
            lr,
            renewed: Vec::new(),
            step: 0,
            weights: BTreeMap::new(),
            loss: None,
            is_validated: true,
            gradient,
        }
    }

    pub(crate) fn trained(&self, steps: u64) -> Trained<'_> {
        Trained { slot: 0, attachments: self.attachments.iter().collect(), steps: Step(steps) }
    }

    pub(crate) fn value(&self, site: &str, local: &str) -> Tensor {
        self.theta.get(&id(site, local)).unwrap().clone()
    }
}

struct Nothing;

impl Objective for Nothing {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }
}

impl Engine for Toy {
    fn theta(&self) -> &Theta {
        &self.theta
    }

    fn set(&mut self, theta: Theta) {
        self.theta = theta;
    }

    fn batch(&mut self, source: Source) -> Result<Batch> {
        match source {
            Source::Validation(set) if !self.is_validated => {
                return Err(Error::Refused(format!("there is no validation set {set}")));
            }
            Source::Validation(_) => {}
            _ => self.step += 1,
        }
        Ok(Batch { parts: vec![(0, Arc::default())], counts: LabelCounts::default(), n_rows: 1 })
    }

    fn score(&mut self, at: &Theta, _: &Layout, _: &dyn Objective) -> Result<LossReport> {
        let loss = self.loss.as_ref().ok_or_else(|| Error::Refused("nothing is scored".to_owned()))?;
        Ok(LossReport { loss_sum: loss(at), ..LossReport::default() })
    }

    fn grad(
        &mut self,
        at: &Theta,
        _: &Layout,
        _: &dyn Objective,
        _: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport> {
        for id in self.wanted() {
            let held = at.get(&id).ok_or_else(|| Error::Refused(format!("{id} has no value")))?;
            let gradient = (self.gradient)(at, &id).map_or_else(|| held.zeros_like(), Ok)?;
            sink.put(&id, &gradient)?;
        }
        Ok(LossReport::default())
    }

    fn objective(&self) -> Arc<dyn Objective> {
        Arc::new(Nothing)
    }

    fn wanted(&self) -> Vec<TensorId> {
        self.theta.trained().map(|(id, _)| id).collect()
    }

    fn reduce(&mut self, mut parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        let (_, gradients, report) = parts.remove(0);
        Ok((gradients, report))
    }

    fn update(&mut self, gradients: Grads) -> Result<f64> {
        self.update_but(gradients, &BTreeSet::new())
    }

    fn update_but(&mut self, gradients: Grads, resting: &BTreeSet<TensorId>) -> Result<f64> {
        for (id, gradient) in gradients.iter().filter(|(id, _)| !resting.contains(*id)) {
            let (Some(gradient), Some(value)) = (gradient, self.theta.get(id)) else {
                return Err(Error::Refused(format!("{id} has no gradient")));
            };
            let moved = (value - (gradient * self.lr)?)?;
            self.theta.put(id, moved);
        }
        Ok(0.0)
    }

    fn weight(&self, site: &str) -> Result<Tensor> {
        self.weights.get(site).cloned().ok_or_else(|| Error::Refused(format!("{site} has no weight")))
    }

    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
        Ok(mine)
    }

    fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
        let value = self.theta.get(tensor).ok_or_else(|| Error::Refused(format!("{tensor} has no value")))?;
        let (shape, mut values) = (value.shape().clone(), value.flatten_all()?.to_vec1::<f32>()?);
        entries.iter().for_each(|renewed| values[renewed.entry] = 0.0);
        self.theta.put(tensor, Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?);
        self.renewed.push((tensor.to_string(), entries.len()));
        Ok(())
    }

    fn hidden(&self) -> usize {
        1
    }

    fn rng(&self, purpose: &'static str) -> Rng {
        Rng::new(1, purpose).sub(self.step)
    }
}
