//! Names of tensors, and sets of tensors by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name of a tensor within one set: who owns it and what it is called there, such as `model.layers.0.self_attn.q_proj`
/// and `lora_A`. For weights of the base the owner is the module path and the local name is `weight` or `bias`.
///
/// Names order by owner first, so that an owner's tensors are neighbours; every loop over a set runs in this order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorName {
    owner: Arc<str>,
    local: Arc<str>,
}

impl TensorName {
    /// The tensor `local` of `owner`.
    pub fn new(owner: impl Into<Arc<str>>, local: impl Into<Arc<str>>) -> Self {
        Self { owner: owner.into(), local: local.into() }
    }

    /// Splits a Hugging Face parameter name at its last dot.
    pub fn from_path(path: &str) -> Self {
        let (owner, local) = path.rsplit_once('.').unwrap_or(("", path));
        Self::new(owner, local)
    }

    /// The site, group or module that owns it.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// What the owner calls it.
    pub fn local(&self) -> &str {
        &self.local
    }
}

impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.owner.is_empty() { f.write_str(&self.local) } else { write!(f, "{}.{}", self.owner, self.local) }
    }
}

impl fmt::Debug for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Which set of parameters a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Owner {
    /// The frozen base model.
    Base,
    /// The batch: nothing that is kept, only what gradients are taken by.
    Input,
    /// Set `set` of the bank of slot `slot`.
    Bank {
        /// Index of the bank in [`crate::Theta::banks`].
        slot: u16,
        /// Index of the set in the bank.
        set: u32,
    },
}

/// A tensor of a pass: which set, and its name there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorId {
    /// The set.
    pub owner: Owner,
    /// The name in the set.
    pub name: TensorName,
}

impl TensorId {
    /// The embeddings of the tokens of a part, `[T, D]`: what a row of the table of tokens adds to the trunk's first rows,
    /// before positions, token types and norms. A sink that wants it gets the loss's gradient by each input embedding.
    pub fn input_embeddings() -> Self {
        Self { owner: Owner::Input, name: TensorName::new("", "inputs_embeds") }
    }
}

impl fmt::Display for TensorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.name, f)
    }
}

/// A set of tensors by name. Some may be fixed: they never train, whatever happens to the others (the random matrices that
/// a method draws once, the part of a weight that it took out).
#[derive(Debug, Clone, Default)]
pub struct Params {
    tensors: BTreeMap<TensorName, Tensor>,
    fixed: BTreeSet<TensorName>,
}

impl Params {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tensor by name.
    pub fn get(&self, name: &TensorName) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Adds or replaces a tensor; one that is replaced stays fixed if it was.
    pub fn insert(&mut self, name: TensorName, tensor: Tensor) {
        self.tensors.insert(name, tensor);
    }

    /// Adds or replaces a tensor that an adapter declared at `site`: fixed, if it does not train.
    pub fn insert_declared(&mut self, spec: &TensorSpec, site: &str, tensor: Tensor) {
        let name = spec.name(site);
        if !spec.train {
            self.fixed.insert(name.clone());
        }
        self.insert(name, tensor);
    }

    /// Whether a tensor never trains.
    pub fn is_fixed(&self, name: &TensorName) -> bool {
        self.fixed.contains(name)
    }

    /// All tensors in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorName, &Tensor)> {
        self.tensors.iter()
    }

    /// The same set with other values: what `of` makes of each tensor.
    ///
    /// # Errors
    /// Whatever `of` raises.
    pub fn map<E>(
        &self,
        of: impl Fn(&TensorName, &Tensor) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let tensors = self.iter().map(|(name, tensor)| Ok((name.clone(), of(name, tensor)?)));
        Ok(Self { tensors: tensors.collect::<std::result::Result<_, E>>()?, fixed: self.fixed.clone() })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl FromIterator<(TensorName, Tensor)> for Params {
    fn from_iter<I: IntoIterator<Item = (TensorName, Tensor)>>(tensors: I) -> Self {
        Self { tensors: tensors.into_iter().collect(), fixed: BTreeSet::new() }
    }
}

/// Who owns a tensor that an adapter declares.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The site of the attachment.
    Site,
    /// A named group of sites that share it.
    Group(String),
    /// The whole slot.
    Model,
}

/// A tensor that an adapter declares at an attachment.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its local name, such as `lora_A`.
    pub local: &'static str,
    /// Who owns it.
    pub scope: Scope,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether it gets a gradient.
    pub train: bool,
    /// Factor on the learning rate (LoRA+ gives B a larger one than A).
    pub lr_factor: f64,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether its entries come and go in training, so that optimisers count updates entry by entry.
    pub comes_and_goes: bool,
    /// Why its gradient may be zero for the first steps, if it may; the signal guard prints it.
    pub quiet: Option<&'static str>,
}

impl TensorSpec {
    /// A tensor of the site that trains with the slot's learning rate and weight decay.
    pub fn trained(local: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        Self {
            local,
            scope: Scope::Site,
            shape,
            train: true,
            lr_factor: 1.0,
            decay: true,
            comes_and_goes: false,
            quiet: None,
        }
    }

    /// A tensor of the site that never trains.
    pub fn fixed(local: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self { train: false, ..Self::trained(local, shape) }
    }

    /// The name of the tensor in its set, for an attachment at `site`.
    pub fn name(&self, site: &str) -> TensorName {
        match &self.scope {
            Scope::Site => TensorName::new(site, self.local),
            Scope::Group(group) => TensorName::new(group.as_str(), self.local),
            Scope::Model => TensorName::new("", self.local),
        }
    }
}

/// The tensors of one attachment under their local names: what a port's `graph` sees.
#[derive(Debug, Clone, Default)]
pub struct Locals {
    component: Arc<str>,
    tensors: BTreeMap<&'static str, Tensor>,
}

impl Locals {
    /// Tensors for the attachment `component` (its site, for messages).
    pub fn new(component: impl Into<Arc<str>>, tensors: impl IntoIterator<Item = (&'static str, Tensor)>) -> Self {
        Self { component: component.into(), tensors: tensors.into_iter().collect() }
    }

    /// A tensor by its local name.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`] if the adapter did not declare it.
    pub fn get(&self, local: &str) -> Result<&Tensor> {
        self.tensors.get(local).ok_or_else(|| Error::UnknownTensor {
            component: self.component.to_string(),
            name: local.to_owned(),
            declared: self.tensors.keys().map(|&name| name.to_owned()).collect(),
        })
    }

    /// All tensors in the order of their local names.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.tensors.iter().map(|(&name, tensor)| (name, tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_at_the_last_dot_and_order_by_owner() {
        let name = TensorName::from_path("model.layers.0.self_attn.q_proj.weight");
        assert_eq!((name.owner(), name.local()), ("model.layers.0.self_attn.q_proj", "weight"));
        assert_eq!(name.to_string(), "model.layers.0.self_attn.q_proj.weight");
        assert_eq!(TensorName::from_path("scale").to_string(), "scale");
        assert!(TensorName::new("a", "z") < TensorName::new("a.b", "a"));
    }

    #[test]
    fn a_shared_tensor_has_one_name_at_all_sites() {
        let shared = TensorSpec { scope: Scope::Group("mlp".to_owned()), ..TensorSpec::trained("left", [2, 2]) };
        assert_eq!(shared.name("site.a"), shared.name("site.b"));
        assert_ne!(TensorSpec::trained("a", [1]).name("site.a"), TensorSpec::trained("a", [1]).name("site.b"));
    }

    #[test]
    fn what_is_fixed_stays_so_with_other_values() {
        let tensor = Tensor::zeros(2, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let mut params = Params::new();
        params.insert_declared(&TensorSpec::trained("a", [2]), "q_proj", tensor.clone());
        params.insert_declared(&TensorSpec::fixed("b", [2]), "q_proj", tensor.clone());
        let [a, b] = ["a", "b"].map(|local| TensorName::new("q_proj", local));
        params.insert(b.clone(), tensor);
        let mapped = params.map(|_, tensor| tensor + 1.0).unwrap();
        assert_eq!((mapped.is_fixed(&a), mapped.is_fixed(&b)), (false, true));
        assert_eq!(mapped.get(&b).unwrap().to_vec1::<f32>().unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn an_undeclared_local_is_named_with_the_declared_ones() {
        let error = Locals::new("model.q_proj", []).get("lora_C").unwrap_err();
        assert_eq!(
            error.to_string(),
            "model.q_proj asks for tensor \"lora_C\", which it did not declare; declared are []"
        );
    }
}
