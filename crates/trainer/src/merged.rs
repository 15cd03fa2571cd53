//! The weights of a base with every component of a stack merged into them.

use std::collections::{BTreeMap, BTreeSet};

use attune_architecture::Site;
use attune_models::{Base, Slot, Stack, stack};
use attune_points::adapter::{Merged, Port};
use attune_points::{BankKind, Params, TensorName, Theta, Weight};
use attune_spec::Fault;
use candle_core::{DType, Tensor};

use crate::engine::params;
use crate::error::Error;

/// The weights that the slots with these numbers change, in the order of the stack.
///
/// # Errors
/// A component that does not merge.
pub(crate) fn weights(
    base: &Base,
    stack: &Stack,
    theta: &Theta,
    takes: impl Fn(usize) -> bool,
) -> Result<BTreeMap<TensorName, Tensor>, Error> {
    let mut replaced: BTreeMap<TensorName, Tensor> = BTreeMap::new();
    for stage in [Stage::Weight, Stage::Ends, Stage::Beside] {
        for (index, slot) in stack.slots().iter().enumerate().filter(|(at, _)| takes(*at)) {
            merge_slot(base, theta, index, slot, stage, &mut replaced)?;
        }
    }
    Ok(replaced)
}

/// Whether the components that these slots begin with merge into the base: of sites of one name, which are alike, the first is tried.
///
/// # Errors
/// The sites that do not, and why.
pub(crate) fn check(base: &Base, stack: &Stack, theta: &Theta, takes: impl Fn(usize) -> bool) -> Result<(), Error> {
    let sites = base.architecture().sites();
    let mut faults = Vec::new();
    for (index, slot) in stack.slots().iter().enumerate().filter(|(at, _)| takes(*at)) {
        let Some(own) = adapter_params(theta, index) else { continue };
        let mut tried = BTreeSet::new();
        for at in slot.attachments().filter(|at| tried.insert(at.site.as_str().rsplit('.').next())) {
            let Some(site) = sites.iter().find(|site| site.id == at.site) else { continue };
            let made = Made::of(base, site, &BTreeMap::new())?;
            if let Merged::No(why) = slot.adapter().merge(at, &stack::locals(at, own)?, &made)? {
                let message = format!("is true, but the component at {} does not merge: {why}", at.site);
                faults.push(Fault::new("outputs.merged", message));
            }
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Faults(faults)) }
}

/// What an adapter in this slot has; nothing where the base's own weights train, or nothing does.
fn adapter_params(theta: &Theta, index: usize) -> Option<&Params> {
    let weights = theta.banks.get(index).is_some_and(|bank| bank.kind == BankKind::Weights);
    params(theta, index).filter(|_| !weights)
}

/// What is merged when, as in a pass: another weight of a site's first, then what stands at the ends of its product, then what is
/// added beside that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Weight,
    Ends,
    Beside,
}

impl Stage {
    fn of(port: &Port<'_>) -> Self {
        match port {
            Port::Weight(_) | Port::Table(_) => Self::Weight,
            Port::Input(_) | Port::Output(_) => Self::Ends,
            _ => Self::Beside,
        }
    }
}

/// The weight and the bias of a linear, as what was merged so far made them.
struct Made {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Made {
    fn of(base: &Base, site: &Site, replaced: &BTreeMap<TensorName, Tensor>) -> Result<Self, Error> {
        let [name, bias] = names(base, site);
        Ok(Self {
            weight: match replaced.get(&name) {
                Some(weight) => weight.clone(),
                None => base.tensor(&name, DType::F32)?,
            },
            bias: match replaced.get(&bias) {
                Some(bias) => Some(bias.clone()),
                None => base.weight(site).bias(DType::F32)?,
            },
        })
    }
}

impl Weight for Made {
    fn shape(&self) -> (usize, usize) {
        Weight::shape(&self.weight)
    }

    fn rows(&self, rows: std::ops::Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
        self.weight.rows(rows, dtype)
    }

    fn bias(&self, dtype: DType) -> attune_points::Result<Option<Tensor>> {
        Ok(self.bias.as_ref().map(|bias| bias.to_dtype(dtype)).transpose()?)
    }
}

fn merge_slot(
    base: &Base,
    theta: &Theta,
    index: usize,
    slot: &Slot,
    stage: Stage,
    replaced: &mut BTreeMap<TensorName, Tensor>,
) -> Result<(), Error> {
    let Some(own) = adapter_params(theta, index) else {
        if let (Some(own), Stage::Weight) = (params(theta, index), stage) {
            replaced.extend(own.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        }
        return Ok(());
    };
    let sites = base.architecture().sites();
    for at in slot.attachments() {
        let Some(site) = sites.iter().find(|site| site.id == at.site) else { continue };
        if Stage::of(&slot.adapter().port(at)) != stage {
            continue;
        }
        let made = Made::of(base, site, replaced)?;
        let [name, bias] = names(base, site);
        match slot.adapter().merge(at, &stack::locals(at, own)?, &made)? {
            Merged::Factors { left, right, scale } => {
                replaced.insert(name, (made.weight + (left.matmul(&right)? * scale)?)?);
            }
            Merged::Weight { weight, bias: own } => {
                replaced.insert(name, weight);
                replaced.extend(own.map(|own| (bias, own)));
            }
            Merged::No(why) => {
                let message = format!("the component at {} does not merge: {why}", at.site);
                return Err(attune_points::Error::Refused(message).into());
            }
            other => {
                let message = format!("the component at {} merges to {other:?}, which is not known here", at.site);
                return Err(attune_points::Error::Refused(message).into());
            }
        }
    }
    Ok(())
}

/// What a site's weight and bias are called.
fn names(base: &Base, site: &Site) -> [TensorName; 2] {
    ["weight", "bias"].map(|local| base.tensor_name(site.id.as_str(), local))
}
