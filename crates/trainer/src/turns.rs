//! Frozen components that stand beside documents of some domains, in training alone.
//!
//! Of several that name a domain one stands beside its documents, each in its turn from step to step, so that what trains sees
//! all of them and can lean on none. They are no part of the model that is measured, and of none that is made.

use std::collections::BTreeMap;

use attune_points::{Binding, Rows, Theta};
use attune_spec::id::{Name, Step};
use attune_spec::job::Plan;

/// The components, by their places in the stack, and the domains that each stands beside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Turns {
    slots: BTreeMap<u16, Vec<u16>>,
}

impl Turns {
    /// Those of a plan.
    pub(crate) fn of(plan: &Plan) -> Self {
        let place = |name: &Name| plan.domains.iter().position(|domain| domain.name == *name).map(|at| at as u16);
        let slots = (0u16..).zip(&plan.stack).filter(|(_, slot)| !slot.domains.is_empty());
        Self { slots: slots.map(|(at, slot)| (at, slot.domains.iter().filter_map(place).collect())).collect() }
    }

    /// Whether the component of a slot takes turns.
    pub(crate) fn has(&self, slot: usize) -> bool {
        self.slots.keys().any(|own| usize::from(*own) == slot)
    }

    /// Binds the components that stand beside the documents of step `at`; none of them outside of training.
    pub(crate) fn bind(&self, theta: &mut Theta, at: Option<Step>) {
        if self.slots.is_empty() {
            return;
        }
        theta.bindings.retain(|binding| !self.slots.contains_key(&binding.slot));
        let Some(Step(step)) = at else { return };
        let mut beside: BTreeMap<u16, Vec<u16>> = BTreeMap::new();
        for (slot, domains) in &self.slots {
            for domain in domains {
                beside.entry(*domain).or_default().push(*slot);
            }
        }
        let mut bound: BTreeMap<u16, Vec<(u16, u32)>> = BTreeMap::new();
        for (domain, slots) in beside {
            let turn = slots[(step % slots.len() as u64) as usize];
            bound.entry(turn).or_default().push((domain, 0));
        }
        theta.bindings.extend(bound.into_iter().map(|(slot, domains)| Binding { slot, rows: Rows::Domains(domains) }));
        // Components apply in the order of the stack; what was taken out of the base for one stands behind them all.
        theta.bindings.sort_by_key(|binding| binding.slot);
    }
}

#[cfg(test)]
mod tests {
    use attune_points::{Bank, BankKind};

    use super::*;

    #[test]
    fn those_of_a_domain_take_turns_and_others_stay() {
        let bank = |name: &str| Bank { slot: name.into(), kind: BankKind::Adapter, sets: Vec::new(), train: false };
        let mut theta = Theta::single(["a", "b", "skill", "c"].map(bank));
        let turns = Turns { slots: BTreeMap::from([(0, vec![0]), (1, vec![0]), (3, vec![1])]) };
        let mut bound = |at: Option<u64>| {
            turns.bind(&mut theta, at.map(Step));
            theta.bindings.iter().map(|binding| (binding.slot, binding.rows.clone())).collect::<Vec<_>>()
        };
        let of = |domain| Rows::Domains(vec![(domain, 0)]);
        assert_eq!(bound(Some(0)), [(0, of(0)), (2, Rows::All(0)), (3, of(1))]);
        assert_eq!(bound(Some(1)), [(1, of(0)), (2, Rows::All(0)), (3, of(1))]);
        assert_eq!(bound(Some(2)), [(0, of(0)), (2, Rows::All(0)), (3, of(1))]);
        assert_eq!(bound(None), [(2, Rows::All(0))]);
        assert!(turns.has(3) && !turns.has(2));
    }
}
