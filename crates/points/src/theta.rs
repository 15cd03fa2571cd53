//! Parameters as an argument of a pass.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use crate::layout::{Doc, Layout};
use crate::params::{Owner, Params, TensorId, TensorName};

/// What the sets of a bank are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BankKind {
    /// Tensors of an adapter, read through its ports.
    Adapter,
    /// Weights that stand in for those of the base with the same name: full fine-tuning, an average, a merge.
    Weights,
}

/// The parameters of one slot of the stack.
#[derive(Debug, Clone)]
pub struct Bank {
    /// The slot's name in the job file.
    pub slot: Arc<str>,
    /// What the sets hold.
    pub kind: BankKind,
    /// One set a lane, or one an example (then frozen); usually a single one.
    pub sets: Vec<Arc<Params>>,
    /// Whether the sets get gradients. Those that do not drop nothing, in training either: they are as they were made.
    pub train: bool,
}

/// Which rows of the batch use which set of a bank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows {
    /// Every row uses this set, whatever the layout.
    All(u32),
    /// Contiguous rows and the set they use, ascending and disjoint; rows in no segment use no set.
    Segments(Vec<(Range<u32>, u32)>),
    /// Domains and the set that the rows of their documents use; those of other domains use no set.
    Domains(Vec<(u16, u32)>),
}

impl Rows {
    /// The same for the rows of a layout: never by domains.
    pub fn on(&self, layout: &Layout) -> Cow<'_, Self> {
        let Self::Domains(domains) = self else { return Cow::Borrowed(self) };
        let set = |doc: &Doc| domains.iter().find(|(domain, _)| *domain == doc.domain).map(|(_, set)| *set);
        let segments = layout.docs().iter().filter_map(|doc| Some((doc.rows.clone(), set(doc)?)));
        Cow::Owned(Self::Segments(segments.collect()))
    }
}

/// Binds rows of the batch to a set of a bank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Index of the bank.
    pub slot: u16,
    /// The rows and their sets.
    pub rows: Rows,
}

/// The parameters of a pass beyond the frozen base: banks, and which rows use which set.
///
/// Cloning is cheap: sets are shared. "Adapters off" is a `Theta` without bindings; an average, a perturbed or a
/// generated set is another `Theta` with other sets.
#[derive(Debug, Clone, Default)]
pub struct Theta {
    /// The slots of the stack, in the order in which they apply at a site.
    pub banks: Vec<Bank>,
    /// Which rows use which sets.
    pub bindings: Vec<Binding>,
    /// For banks whose component starts as something: the bank of what was taken out of the base for that.
    pub beside: BTreeMap<u16, u16>,
    /// For banks whose component had weights of the base quantised anew: the bank of what these were less. It is bound to no row and has no
    /// slot.
    pub requantized: BTreeMap<u16, u16>,
    /// What is added to the embeddings of the batch's rows, `[T, hidden]`; its id is [`TensorId::input_embeddings`].
    pub input: Option<Tensor>,
}

impl Theta {
    /// One set a bank, bound to every row: a single job.
    pub fn single(banks: impl IntoIterator<Item = Bank>) -> Self {
        let banks: Vec<Bank> = banks.into_iter().collect();
        let bindings = (0..banks.len() as u16).map(|slot| Binding { slot, rows: Rows::All(0) }).collect();
        Self { banks, bindings, ..Self::default() }
    }

    /// The same banks with no row bound: the base model alone.
    #[must_use]
    pub fn adapters_off(&self) -> Self {
        Self { bindings: Vec::new(), ..self.clone() }
    }

    /// The same banks with no row bound to those that train and to what stands beside these: the model that training starts from,
    /// if what trains starts as nothing.
    #[must_use]
    pub fn untrained(&self) -> Self {
        let trains = |slot: u16| self.banks.get(slot as usize).is_some_and(|bank| bank.train);
        let goes = |slot: u16| trains(slot) || self.beside.iter().any(|(own, beside)| *beside == slot && trains(*own));
        let bindings = self.bindings.iter().filter(|binding| !goes(binding.slot)).cloned().collect();
        Self { bindings, ..self.clone() }
    }

    /// The same with this added to the embeddings.
    #[must_use]
    pub fn with_input(self, input_td: Tensor) -> Self {
        Self { input: Some(input_td), ..self }
    }

    /// The ids of all tensors in trained banks but for the fixed ones, bank by bank and set by set, in the order of their names.
    pub fn trained(&self) -> impl Iterator<Item = (TensorId, &Tensor)> {
        let trains = |id: &TensorId| match id.owner {
            Owner::Bank { slot, set } => {
                self.banks.get(slot as usize).is_some_and(|bank| bank.train)
                    && self.set(slot, set).is_some_and(|params| !params.is_fixed(&id.name))
            }
            _ => false,
        };
        self.held().filter(move |(id, _)| trains(id))
    }

    /// The ids of all tensors in trained banks, in those beside them, and in those of what the base is less for them, fixed ones among
    /// them: what a run made or changes.
    pub fn held(&self) -> impl Iterator<Item = (TensorId, &Tensor)> {
        let is_held = |slot: usize, bank: &Bank| {
            let further = self.beside.values().chain(self.requantized.values());
            bank.train || further.into_iter().any(|other| *other as usize == slot)
        };
        self.banks.iter().enumerate().filter(move |(slot, bank)| is_held(*slot, bank)).flat_map(|(slot, bank)| {
            bank.sets.iter().enumerate().flat_map(move |(set, params)| {
                let owner = Owner::Bank { slot: slot as u16, set: set as u32 };
                params.iter().map(move |(name, tensor)| (TensorId { owner, name: name.clone() }, tensor))
            })
        })
    }

    /// Puts a tensor in place of the one of this id; nothing, if the set is not there.
    pub fn put(&mut self, id: &TensorId, tensor: Tensor) {
        if let Owner::Bank { slot, set } = id.owner
            && let Some(params) = self.banks.get_mut(slot as usize).and_then(|bank| bank.sets.get_mut(set as usize))
        {
            Arc::make_mut(params).insert(id.name.clone(), tensor);
        }
    }

    /// A tensor by id.
    pub fn get(&self, id: &TensorId) -> Option<&Tensor> {
        match id.owner {
            Owner::Base => None,
            Owner::Input => self.input.as_ref(),
            Owner::Bank { slot, set } => self.set(slot, set)?.get(&id.name),
        }
    }

    /// The set `set` of bank `slot`.
    pub fn set(&self, slot: u16, set: u32) -> Option<&Arc<Params>> {
        self.banks.get(slot as usize)?.sets.get(set as usize)
    }

    /// The weight that stands in for the base's `name` in every row, with its id: the last bank of weights wins.
    pub fn weight(&self, name: &TensorName) -> Option<(TensorId, &Tensor)> {
        self.bindings.iter().rev().find_map(|binding| {
            let Rows::All(set) = binding.rows else { return None };
            let bank = self.banks.get(binding.slot as usize).filter(|bank| bank.kind == BankKind::Weights)?;
            let tensor = bank.sets.get(set as usize)?.get(name)?;
            let owner = Owner::Bank { slot: binding.slot, set };
            Some((TensorId { owner, name: name.clone() }, tensor))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn weights_stand_in_for_the_base_only_while_bound() {
        let name = TensorName::from_path("lm_head.weight");
        let tensor = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let set = Arc::new(Params::from_iter([(name.clone(), tensor)]));
        let theta =
            Theta::single([Bank { slot: "weights".into(), kind: BankKind::Weights, sets: vec![set], train: true }]);
        let (id, _) = theta.weight(&name).unwrap();
        assert_eq!(id.owner, Owner::Bank { slot: 0, set: 0 });
        assert!(theta.get(&id).is_some());
        assert_eq!(theta.trained().count(), 1);
        assert!(theta.adapters_off().weight(&name).is_none());
    }

    #[test]
    fn rows_of_domains_are_those_of_their_documents() {
        let mut layout = Layout::new();
        for (domain, n_rows) in [(1, 2), (0, 3), (2, 1), (1, 1)] {
            let rows = (0..n_rows).map(|row| (crate::layout::Row::Token(row), 0));
            layout.push(crate::layout::Source { domain, ..Default::default() }, rows);
        }
        let rows = Rows::Domains(vec![(1, 0), (2, 4)]);
        assert_eq!(*rows.on(&layout), Rows::Segments(vec![(0..2, 0), (5..6, 4), (6..7, 0)]));
        assert_eq!(*Rows::All(3).on(&layout), Rows::All(3));
    }

    #[test]
    fn what_stands_beside_a_bank_that_trains_is_held_and_goes_with_it() {
        let set = |value: f32| {
            let tensor = Tensor::new(&[value], &Device::Cpu).unwrap();
            vec![Arc::new(Params::from_iter([(TensorName::from_path("q_proj.lora_A"), tensor)]))]
        };
        let bank = |slot: &str, train| Bank { slot: slot.into(), kind: BankKind::Adapter, sets: set(1.0), train };
        let mut theta = Theta::single([bank("skill", true), bank("other", false), bank("start", false)]);
        theta.beside.insert(0, 2);
        assert_eq!((theta.held().count(), theta.trained().count()), (2, 1));
        let slots = |theta: &Theta| theta.bindings.iter().map(|binding| binding.slot).collect::<Vec<_>>();
        assert_eq!((slots(&theta), slots(&theta.untrained())), (vec![0, 1, 2], vec![1]));
        theta.requantized.insert(0, 1);
        assert_eq!((theta.held().count(), theta.trained().count()), (3, 1), "what the base is less is held as well");
    }
}
