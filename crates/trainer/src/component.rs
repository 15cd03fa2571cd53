//! One component of a stack, attached to a base: fresh for a run, or read from an adapter folder.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use attune_adapt::held::{self, Held};
use attune_adapt::slot::{self, Fresh};
use attune_adapt::{ADAPTERS, BUDGETS, INITS, budgets, peft};
use attune_architecture::{Architecture, Site, SiteId, targets};
use attune_models::{Base, Slot, Stack, stack};
use attune_points::adapter::{Adapter, Attachment, Merged, Port};
use attune_points::budget::Budget;
use attune_points::init::Init;
use attune_points::{Bank, BankKind, Binding, Params, Rows, Stats, StatsRequest, Theta, Weight};
use attune_spec::id::Step;
use attune_spec::job::Targets;
use attune_spec::job::plan::PlanSlot;
use attune_spec::method::{BuildCx, Catalogue, MethodRef};
use attune_spec::{Fault, FieldPath};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::few;

/// The ranks of a slot's sites where a budget has shared them out.
pub(crate) type Shares = BTreeMap<String, Share>;

/// Those of each slot, by its name.
pub(crate) type SharesOfSlots = BTreeMap<String, Shares>;

/// What a site got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Share {
    rank: u32,
    /// What that was decided by. Numbers of 32 bits are read from JSON as they were written.
    scores: BTreeMap<String, f32>,
}

/// A component at its sites, with its tensors.
pub(crate) struct Component {
    pub(crate) slot: Slot,
    pub(crate) params: Params,
    /// What was taken out of the base for it.
    pub(crate) beside: Option<Params>,
    /// What weights of the base are less which were quantised anew for it.
    pub(crate) requantized: Option<Params>,
    /// The modules that its folder keeps whole.
    pub(crate) saved: Option<Box<Self>>,
    /// How the base was held that it was trained on, if it says so.
    pub(crate) held: Option<Held>,
    pub(crate) kind: BankKind,
}

/// A component that a slot names by its method, before it has values.
pub(crate) struct Begun {
    at: Attached,
    method: MethodRef,
    init: Option<Box<dyn Init>>,
    budget: Option<Box<dyn Budget>>,
    path: FieldPath,
}

/// The field of the job that says how ranks are shared.
const BUDGET: &str = "tune.budget";

impl Begun {
    pub(crate) fn new(
        planned: &PlanSlot,
        method: &MethodRef,
        budget: Option<&MethodRef>,
        base: &Base,
        path: &FieldPath,
        cx: &BuildCx<'_>,
    ) -> Result<Self, Error> {
        let at = Attached::new(method, &planned.targets, planned.exclude.as_ref(), base, path, cx)?;
        let init = planned.init.as_ref().map(|init| INITS.build(init, &path.field("init"), cx));
        let budget = budget.map(|budget| BUDGETS.build(budget, &BUDGET.into(), cx));
        let init = init.transpose().map_err(Error::Faults)?;
        let budget = budget.transpose().map_err(Error::Faults)?;
        Ok(Self { at, method: method.clone(), init, budget, path: path.clone() })
    }

    /// What its start, or the component itself without one, and its budget want measured, each with the field that says so.
    pub(crate) fn calibrates(&self) -> Vec<(FieldPath, StatsRequest)> {
        let of = |path: FieldPath, wanted: Vec<StatsRequest>| wanted.into_iter().map(move |one| (path.clone(), one));
        let init = self.init.iter().flat_map(|init| of(self.path.field("init"), init.calibrate()));
        let own = self.init.is_none().then(|| of(self.path.clone(), self.at.adapter.calibrate()));
        let budget = self.budget.iter().flat_map(|budget| of(BUDGET.into(), budget.calibrate()));
        init.chain(own.into_iter().flatten()).chain(budget).collect()
    }

    /// The text that its own start wants to be read, as tokens.
    pub(crate) fn reads(&self) -> Option<&[u32]> {
        self.at.adapter.reads().filter(|_| self.init.is_none())
    }

    /// Where it starts.
    pub(crate) fn path(&self) -> &FieldPath {
        &self.path
    }

    /// Where it is measured.
    pub(crate) fn sites(&self) -> &[Site] {
        &self.at.sites
    }

    /// The ranks that its budget gives its sites; none without one.
    pub(crate) fn shares(&self, base: &Base, stats: &Stats) -> Result<Option<Shares>, Error> {
        let Some(budget) = &self.budget else { return Ok(None) };
        let refused = |message: &str| cannot_start(attune_points::Error::Refused(message.to_owned()), BUDGET.into());
        let mean = budgets::rank(&self.method).ok_or_else(|| refused("what trains has no rank"))?;
        let shared = budget
            .share(mean, &self.at.attachments, &|at| self.at.weight(at, base), stats)
            .map_err(|error| cannot_start(error, BUDGET.into()))?;
        let of = |share: attune_points::budget::Share| {
            let scores = share.scores.into_iter().map(|(name, score)| (name.to_owned(), score as f32)).collect();
            Share { rank: share.rank, scores }
        };
        let sites = self.at.attachments.iter().map(|at| at.site.to_string());
        Ok(Some(sites.zip(shared.into_iter().map(of)).collect()))
    }

    /// The same component with these ranks, if there are any.
    pub(crate) fn with(self, shares: Option<&Shares>, base: &Base, cx: &BuildCx<'_>) -> Result<Self, Error> {
        let Some(shares) = shares else { return Ok(self) };
        let ranks = shares.iter().map(|(site, share)| (site.clone(), share.rank)).collect();
        let method = budgets::ranked(&self.method, &ranks);
        let at = self.at.again(&method, base, &self.path, cx)?;
        Ok(Self { at, method, ..self })
    }

    /// The component with starting values.
    pub(crate) fn start(self, name: &str, seed: u64, base: &Base, stats: &Stats) -> Result<Component, Error> {
        let Self { at, init, path, .. } = self;
        let weight = |attachment: &Attachment| at.weight(attachment, base);
        let stream = Rng::new(seed, "init").named(name);
        let fresh = slot::fresh(&*at.adapter, init.as_deref(), &at.attachments, weight, stats, &stream)
            .map_err(|error| cannot_start(error, if init.is_some() { path.field("init") } else { path.clone() }))?;
        Ok(at.with_fresh(fresh))
    }

    /// The same in a later attempt of a run, whose checkpoint has the values. What they are of an initialisation is not computed again.
    pub(crate) fn resume(self, name: &str, seed: u64, base: &Base) -> Result<Component, Error> {
        let looks = self.reads().is_some() || !self.at.adapter.calibrate().is_empty();
        if self.init.is_none() && !looks {
            return self.start(name, seed, base, &Stats::none());
        }
        let fresh = slot::blank(self.init.as_deref(), &self.at.attachments)?;
        Ok(self.at.with_fresh(fresh))
    }
}

/// The fault of a start that was refused.
pub(crate) fn cannot_start(error: attune_points::Error, path: FieldPath) -> Error {
    match error {
        attune_points::Error::Refused(message) => {
            Error::Faults(vec![Fault::new(path, format!("cannot start: {message}"))])
        }
        other => other.into(),
    }
}

impl Component {
    /// The component that an adapter folder holds.
    pub(crate) fn read(folder: &Path, base: &Base, path: &FieldPath, cx: &BuildCx<'_>) -> Result<Self, Error> {
        let mut read = peft::read(folder)?;
        stands_on(read.ranges.as_deref(), base.architecture(), path)?;
        let own = Self::of(&mut read, base, path, cx)?;
        let saved = read.saved.as_deref_mut().map(|saved| Self::of(saved, base, path, cx)).transpose()?;
        beside_its_tables(&read, base, path)?;
        let attachments: Vec<Attachment> = own.slot.attachments().cloned().collect();
        let (held, requantized) = (held::read(folder)?, held::read_less(folder, &attachments)?);
        Ok(Self { held, requantized, saved: saved.map(Box::new), ..own })
    }

    fn of(read: &mut peft::Folder, base: &Base, path: &FieldPath, cx: &BuildCx<'_>) -> Result<Self, Error> {
        let at = Attached::new(&read.method, &read.targets, None, base, path, cx)?;
        read.complete(&*at.adapter, &at.attachments, |attachment| at.weight(attachment, base))?;
        let params = read.params(&*at.adapter, &at.attachments)?;
        Ok(at.with(params))
    }
}

/// Whether the tables of tokens that an adapter's folder has of its base are this one's, as near as their types let them be.
///
/// # Errors
/// A fault at `path`.
fn beside_its_tables(read: &peft::Folder, base: &Base, path: &FieldPath) -> Result<(), Error> {
    /// Twice what a number of 16 bits is off by.
    const ROUNDING: f64 = 1.0 / 128.0;
    for (module, theirs) in read.of_base() {
        let name = base.tensor_name(module, "weight");
        let own = base.tensor(&name, DType::F32);
        let largest = |tensor: &Tensor| -> candle_core::Result<f64> {
            Ok(f64::from(tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
        };
        let is_own = match &own {
            Ok(own) if own.dims() == theirs.dims() => {
                let off = (own - theirs).and_then(|off| largest(&off));
                off? <= ROUNDING * largest(own)?
            }
            _ => false,
        };
        if !is_own {
            let message = format!(
                "was trained beside other numbers of {module} than the base has, which its folder keeps: expected the base that it was trained on"
            );
            return Err(Error::Faults(vec![Fault::new(path.clone(), message)]));
        }
    }
    Ok(())
}

/// Whether the layers of the base are those that an adapter's folder says: the same path is another layer else.
///
/// # Errors
/// A fault at `path`.
fn stands_on(ranges: Option<&[[u32; 2]]>, base: &Architecture, path: &FieldPath) -> Result<(), Error> {
    let own = || 0..base.layers as u32;
    let found = base.origins.clone().unwrap_or_else(|| own().collect());
    let said = ranges.map_or_else(
        || own().collect(),
        |ranges| ranges.iter().flat_map(|&[start, end]| start..end).collect::<Vec<_>>(),
    );
    if said == found {
        return Ok(());
    }
    let message = match ranges.and_then(|ranges| Catalogue::embedded().repeating(ranges)) {
        Some(surgery) => format!(
            "was trained on a base whose layers are repeated; expected `tune.surgery` to be {}",
            serde_json::to_string(&surgery).unwrap_or_default()
        ),
        None => "was trained on the base as it is, whose layers `tune.surgery` repeats: its sites would be others; leave one of them out".to_owned(),
    };
    Err(Error::Faults(vec![Fault::new(path.clone(), message)]))
}

/// What a component makes of those that it blends, in place of what it starts with: `before` are the slots before it, with their banks.
///
/// # Errors
/// A fault at `path` if it cannot be made of them.
pub(crate) fn made_of_blended(
    component: &mut Component,
    (before, banks): (&[Slot], &[Bank]),
    base: &Base,
    path: &FieldPath,
) -> Result<(), Error> {
    let Component { slot, params, .. } = component;
    for at in slot.attachments() {
        let Port::Blend(map) = slot.adapter().port(at) else { continue };
        let merged = |number: usize| -> attune_points::Result<Option<Merged>> {
            let (other, bank) = (&before[number], &banks[number]);
            let Some((at, set)) = other.at(&at.site).zip(bank.sets.first()) else { return Ok(None) };
            let Some(site) = base.architecture().site(at.site.as_str()) else { return Ok(None) };
            other.adapter().merge(at, &stack::locals(at, set)?, &base.weight(&site)).map(Some)
        };
        let blended = blended_at(&at.site, before).into_iter().filter_map(|number| merged(number).transpose());
        let made = blended.collect::<attune_points::Result<Vec<_>>>().and_then(|blended| map.made_of(at, &blended));
        let Some(made) = made.map_err(|error| cannot_start(error, path.clone()))? else { continue };
        for spec in &at.tensors {
            params.insert(spec.name(at.site.as_str()), made.get(spec.local)?.clone());
        }
    }
    Ok(())
}

/// Starts a component that trains weights from what adapters before it keep of these modules, which is then its own.
pub(crate) fn take_over(made: &mut Component, saved: &mut [(String, Slot, Params)]) {
    for (_, slot, params) in saved {
        let of = |slot: &Slot| {
            let mut own = Params::new();
            for (at, spec) in slot.attachments().flat_map(|at| at.tensors.iter().map(move |spec| (at, spec))) {
                if let Some(tensor) = params.get(&spec.name(at.site.as_str())) {
                    own.insert_declared(spec, at.site.as_str(), tensor.clone());
                }
            }
            own
        };
        let taken = of(&slot.at_some(|at| made.slot.at(&at.site).is_some()));
        let left = slot.at_some(|at| made.slot.at(&at.site).is_none());
        let rest = of(&left);
        for (name, tensor) in taken.iter() {
            made.params.insert(name.clone(), tensor.clone());
        }
        (*slot, *params) = (left, rest);
    }
}

/// A component at its sites, without tensors.
struct Attached {
    adapter: Arc<dyn Adapter>,
    sites: Vec<Site>,
    attachments: Vec<Attachment>,
}

impl Attached {
    fn new(
        named: &MethodRef,
        targets: &Targets,
        exclude: Option<&Targets>,
        base: &Base,
        path: &FieldPath,
        cx: &BuildCx<'_>,
    ) -> Result<Self, Error> {
        let applies = ADAPTERS.card(&named.method).map(|card| card.applies).unwrap_or_default();
        let under = |faults: Vec<Fault>| Error::Faults(faults.into_iter().map(|fault| fault.under(path)).collect());
        let takes = |site: &Site| applies.contains(&site.offers());
        let sites = targets::resolve(targets, exclude, base.architecture(), takes).map_err(under)?;
        Self::at(sites, named, base, path, cx)
    }

    /// Another method at the same sites.
    fn again(self, named: &MethodRef, base: &Base, path: &FieldPath, cx: &BuildCx<'_>) -> Result<Self, Error> {
        Self::at(self.sites, named, base, path, cx)
    }

    fn at(sites: Vec<Site>, named: &MethodRef, base: &Base, path: &FieldPath, cx: &BuildCx<'_>) -> Result<Self, Error> {
        let adapter: Arc<dyn Adapter> = ADAPTERS.build(named, path, cx).map_err(Error::Faults)?.into();
        let under = |faults: Vec<Fault>| Error::Faults(faults.into_iter().map(|fault| fault.under(path)).collect());
        let attachments = adapter.attach(base.architecture(), &sites).map_err(under)?;
        Ok(Self { adapter, sites, attachments })
    }

    /// The base's weight at an attachment.
    fn weight<'b>(&'b self, at: &Attachment, base: &'b Base) -> attune_points::Result<Box<dyn Weight + 'b>> {
        let site = self.sites.iter().find(|site| site.id == at.site);
        let site = site.ok_or_else(|| attune_points::Error::Refused(format!("{} is no target", at.site)))?;
        Ok(Box::new(base.weight(site)))
    }

    fn with_fresh(self, Fresh { own, beside, requantized }: Fresh) -> Component {
        let some = |params: Params| (!params.is_empty()).then_some(params);
        Component { beside: some(beside), requantized: some(requantized), ..self.with(own) }
    }

    fn with(self, params: Params) -> Component {
        let weights = self.attachments.iter().any(|at| matches!(self.adapter.port(at), Port::Weights));
        let kind = if weights { BankKind::Weights } else { BankKind::Adapter };
        let slot = Slot::new(self.adapter, self.attachments);
        Component { slot, params, beside: None, requantized: None, saved: None, held: None, kind }
    }
}

/// The slots whose rows one that blends others at a linear would blend, by their numbers: those before it that add to it and that none
/// has blended yet.
fn blended_at(site: &SiteId, before: &[Slot]) -> Vec<usize> {
    let mut blended = Vec::new();
    for (number, slot) in before.iter().enumerate() {
        match slot.at(site).map(|at| slot.adapter().port(at)) {
            Some(Port::Delta(_)) => blended.push(number),
            Some(Port::Blend(_)) => blended.clear(),
            _ => {}
        }
    }
    blended
}

/// Whether a slot that mixes others has some to mix, at all of its sites, among those before it; if it blends them, as many as it says.
///
/// # Errors
/// A fault at `path`.
fn has_what_it_mixes(slot: &Slot, before: &[Slot], path: &FieldPath) -> Result<(), Error> {
    let is_branch = |other: &Slot, site: &SiteId| {
        other.at(site).is_some_and(|at| matches!(other.adapter().port(at), Port::Branch(_)))
    };
    let fault = |message: String| Err(Error::Faults(vec![Fault::new(path.clone(), message)]));
    for at in slot.attachments() {
        let site = &at.site;
        match slot.adapter().port(at) {
            Port::Mixture(_) if !before.iter().any(|other| is_branch(other, site)) => {
                return fault(format!(
                    "mixes what adapters before it add to a block, and none of them adds to {site}: expected those that it was, or \
                     is to be, trained on"
                ));
            }
            Port::Blend(map) => {
                let (found, expected) = (blended_at(site, before).len(), map.blends());
                if found != expected {
                    return fault(format!(
                        "blends what {expected} adapters before it add to a linear, and {found} of them add to {site}: expected \
                         as many at each of its targets"
                    ));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a slot fits those before it.
///
/// # Errors
/// A fault at `path`: of one that lacks [what it mixes](has_what_it_mixes), and of one that takes something out of a weight that another one has taken
/// out already.
pub(crate) fn fits(slot: &Slot, before: &[Slot], path: &FieldPath) -> Result<(), Error> {
    let others = || before.iter().filter(|other| other.adapter().truncates() && slot.adapter().truncates());
    if let Some(at) = slot.attachments().find(|at| others().any(|other| other.at(&at.site).is_some())) {
        let message = format!(
            "takes the least of the weight out of {}, as an adapter before it does already: together they would take it out twice; expected one of \
             them there",
            at.site
        );
        return Err(Error::Faults(vec![Fault::new(path.clone(), message)]));
    }
    has_what_it_mixes(slot, before, path)
}

/// Adapter folders on a base, the first one innermost, frozen: what a model that speaks is made of. Weights that a component
/// makes are made once, as texts go through the model token by token; they take as much memory as those of its sites in 32 bits.
/// Weights that an adapter's start quantised anew are so in the base that comes back.
///
/// # Errors
/// [`Error`] naming the folder, file or tensor that does not fit the base.
pub fn frozen<'f>(mut base: Base, folders: impl IntoIterator<Item = &'f Path>) -> Result<(Base, Stack, Theta), Error> {
    let cx = BuildCx { steps: Step(0), domains: &[], words: None };
    let (mut slots, mut banks) = (Vec::new(), Vec::new());
    let mut made = Params::new();
    for (index, folder) in folders.into_iter().enumerate() {
        let path = FieldPath::from("adapter").index(index);
        let Component { slot, params, kind, requantized, saved, .. } = Component::read(folder, &base, &path, &cx)?;
        fits(&slot, &slots, &path)?;
        if let Some(less) = requantized {
            base = few::requantized(&base, &slot, &less)?;
        }
        make_weights(&base, &slot, &params, &mut made)?;
        let name = format!("adapter-{index}");
        banks.push(Bank { slot: name.as_str().into(), kind, sets: vec![Arc::new(params)], train: false });
        slots.push(slot);
        if let Some(Component { slot, params, kind, .. }) = saved.map(|saved| *saved) {
            let name = format!("{name}-saved");
            banks.push(Bank { slot: name.into(), kind, sets: vec![Arc::new(params)], train: false });
            slots.push(slot);
        }
    }
    let kept = |site: &SiteId| {
        banks.iter().any(|bank| bank.sets.iter().any(|set| set.iter().any(|(name, _)| name.owner() == site.as_str())))
    };
    if let Some(site) = base.fresh().iter().find(|site| !kept(site)) {
        let message =
            format!("has no {site}, and no adapter keeps one: expected the one that was trained with this head");
        return Err(Error::Input { input: "the base".to_owned(), message });
    }
    // A slot whose weights are made already is bound to no row.
    let makes = |slot: &Slot| slot.attachments().any(|at| matches!(slot.adapter().port(at), Port::Weight(_)));
    let bound: Vec<bool> = slots.iter().map(|slot| !makes(slot)).collect();
    let mut theta = Theta::single(banks);
    theta.bindings.retain(|binding| bound[usize::from(binding.slot)]);
    if !made.is_empty() {
        let slot = theta.banks.len() as u16;
        let kind = BankKind::Weights;
        theta.banks.push(Bank { slot: "made".into(), kind, sets: vec![Arc::new(made)], train: false });
        theta.bindings.push(Binding { slot, rows: Rows::All(0) });
    }
    Ok((base, Stack::new(slots), theta))
}

/// The weights that a slot makes of the base's, or of what slots before it made.
fn make_weights(base: &Base, slot: &Slot, params: &Params, made: &mut Params) -> Result<(), Error> {
    for at in slot.attachments() {
        let Port::Weight(map) = slot.adapter().port(at) else { continue };
        let name = base.tensor_name(at.site.as_str(), "weight");
        let weight = match made.get(&name) {
            Some(weight) => weight.clone(),
            None => base.tensor(&name, DType::F32)?,
        };
        let locals = stack::locals(at, params)?;
        if base.architecture().site(at.site.as_str()).is_some_and(|site| site.kind.bias_width().is_some()) {
            let name = base.tensor_name(at.site.as_str(), "bias");
            let bias = match made.get(&name) {
                Some(bias) => bias.clone(),
                None => base.tensor(&name, DType::F32)?,
            };
            made.insert(name, map.bias(&bias, &weight, &locals)?);
        }
        made.insert(name, map.graph(&weight, &locals)?);
    }
    Ok(())
}
