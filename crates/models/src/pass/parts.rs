//! Who owns which rows of a pass, and what every block of it sees.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site, SiteId};
use attune_points::adapter::{Attachment, Port, RowMap};
use attune_points::{
    BankKind, Binding, GradSink, Layout, Owner, Region, Result, Rows as Bound, Tap, TensorId, TensorName, TensorSpec,
    Theta,
};
use attune_tensor::kernels::Kernels;
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::{DType, Device, Tensor};

use crate::attention::RowPlan;
use crate::base::Base;
use crate::cache::CachedRows;
use crate::dropout::Dropout;
use crate::pass::arena::{Activations, Arena, Mat, Rows};
use crate::pass::prefix;
use crate::pass::times::{Meter, Work};
use crate::regions;
use crate::stack::{Slot, Stack};

/// Where the gradients of each part go; none in a pass without gradients.
pub type Sinks<'s> = [&'s mut dyn GradSink];

/// One part of a pass.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// Its components.
    pub stack: &'a Stack,
    /// Its parameters.
    pub theta: &'a Theta,
    /// Its documents.
    pub layout: &'a Layout,
    /// The key of its dropout; `None` in evaluation.
    pub dropout: Option<Dropout>,
}

/// What the blocks of a pass see.
pub struct PassCx<'a> {
    pub(crate) kernels: &'static dyn Kernels,
    pub(crate) base: &'a Base,
    pub(crate) parts: &'a [Part<'a>],
    /// The rows of each part.
    pub(crate) rows: Vec<Range<usize>>,
    /// The rows of each document of each part.
    pub(crate) docs: Vec<Range<usize>>,
    /// How many places are taken before each document.
    pub(crate) taken: Vec<usize>,
    /// The factor on the losses of each part's components.
    pub(crate) beside: Vec<f64>,
    /// Where the keys and values of each document lie, if its rows follow others that went through before.
    pub(crate) kept: Option<CachedRows>,
    /// Cosines and sines of each row's angles, `[T, W/2]`; none where positions are not turned.
    pub(crate) angles: Option<(Rows<f32>, Rows<f32>)>,
    pub(crate) arena: Arena,
    pub(crate) dtype: Activations,
    pub(crate) meter: Meter,
    /// Who looks at what linears read.
    pub(crate) tap: Option<&'a dyn Tap>,
    /// What the base gives by itself on the rows of each part; empty, or none, where nobody reads it.
    pub(crate) alone: Vec<Option<Tensor>>,
    /// Gradients that a device may still be working at.
    late: RefCell<Vec<Late>>,
}

/// A part's gradient of a tensor, on a device.
struct Late {
    part: usize,
    id: TensorId,
    sum: Rows<f32>,
}

/// The rows that an operation is given.
#[derive(Clone, Copy)]
pub(crate) enum Given<'g> {
    /// All rows of the pass.
    All,
    /// Some rows of one part, by their numbers in its layout.
    Of { part: usize, ids: &'g [u32] },
    /// Some rows of some parts, in the order of the parts.
    Among(&'g [(usize, Vec<u32>)]),
}

impl<'g> Given<'g> {
    /// The numbers of a part's rows in its layout; `None` for all of them.
    pub(crate) fn ids(self, part: usize) -> Option<&'g [u32]> {
        match self {
            Self::All => None,
            Self::Of { ids, .. } => Some(ids),
            Self::Among(parts) => Some(parts.iter().find(|(other, _)| *other == part).map_or(&[], |(_, ids)| ids)),
        }
    }
}

/// A component on some of the rows that an operation is given.
pub(crate) struct Placed<'a, P> {
    pub(crate) part: usize,
    /// Its rows among those given.
    pub(crate) rows: Range<usize>,
    /// Their numbers in the part's layout.
    pub(crate) ids: Ids<'a>,
    /// Its place among the components of its rows.
    pub(crate) order: usize,
    pub(crate) slot: u16,
    pub(crate) set: u32,
    pub(crate) at: &'a Attachment,
    /// How it takes part.
    pub(crate) port: P,
}

impl<'a, P> Placed<'a, P> {
    /// Whose its tensors are.
    pub(crate) const fn owner(&self) -> Owner {
        Owner::Bank { slot: self.slot, set: self.set }
    }

    /// The id of one of its tensors.
    pub(crate) fn id(&self, spec: &TensorSpec) -> TensorId {
        TensorId { owner: self.owner(), name: spec.name(self.at.site.as_str()) }
    }

    /// The same with another port.
    pub(crate) fn with<Q>(&self, port: Q) -> Placed<'a, Q> {
        let Self { part, order, slot, set, at, .. } = *self;
        Placed { part, rows: self.rows.clone(), ids: self.ids.clone(), order, slot, set, at, port }
    }
}

/// A component that adds to the rows of a linear.
pub(crate) type Added<'a> = Placed<'a, &'a dyn RowMap>;

/// Numbers of rows in a layout.
#[derive(Clone)]
pub(crate) enum Ids<'a> {
    /// All of them.
    All,
    /// These.
    Some(Vec<u32>),
    /// These, of somebody else.
    Borrowed(&'a [u32]),
}

impl Ids<'_> {
    /// The numbers; `None` for all rows.
    pub(crate) fn some(&self) -> Option<&[u32]> {
        match self {
            Self::All => None,
            Self::Some(ids) => Some(ids),
            Self::Borrowed(ids) => Some(ids),
        }
    }
}

impl<'a> PassCx<'a> {
    /// What the blocks see of a pass over whole documents or, with `kept`, over the rows that follow those in a cache.
    pub(crate) fn new(base: &'a Base, parts: &'a [Part<'a>], kept: Option<CachedRows>, arena: &Arena) -> Self {
        let (mut rows, mut docs, mut taken, mut end) = (Vec::with_capacity(parts.len()), Vec::new(), Vec::new(), 0);
        for part in parts {
            let start = end;
            end += part.layout.n_rows();
            rows.push(start..end);
            let shifted = |doc: &attune_points::Doc| start + doc.rows.start as usize..start + doc.rows.end as usize;
            let of_part = part.layout.docs().iter().zip(prefix::lengths(part)).filter(|(doc, _)| doc.n_rows() > 0);
            let (of_part, lengths): (Vec<_>, Vec<_>) = of_part.map(|(doc, length)| (shifted(doc), length)).unzip();
            docs.extend(of_part);
            taken.extend(lengths);
        }
        let (dtype, arena, kernels) = (base.activations(), arena.clone(), arena.kernels());
        let mut cx = Self {
            kernels,
            base,
            parts,
            rows,
            docs,
            taken,
            beside: vec![0.0; parts.len()],
            kept,
            angles: None,
            arena,
            dtype,
            meter: Meter::default(),
            tap: None,
            alone: Vec::new(),
            late: RefCell::default(),
        };
        cx.angles = angles(&cx);
        cx
    }

    /// How many rows of a document, by its number in the pass, went through before.
    pub(crate) fn before(&self, doc: usize) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.rows[doc].len() - self.docs[doc].len())
    }

    /// Whether a document, by its number in the pass, began in an earlier one.
    pub(crate) fn goes_on(&self, doc: usize) -> bool {
        self.kept.is_some() && self.before(doc) > 0
    }

    /// The position of the first row of a document that goes through now, by its number in the pass.
    fn first(&self, doc: usize) -> usize {
        self.before(doc) + self.taken[doc]
    }

    /// The positions of a part's rows.
    pub(crate) fn positions(&self, part: usize) -> impl Iterator<Item = usize> {
        let of_part = |row: usize| self.docs.partition_point(|doc| doc.start < row);
        let docs = of_part(self.rows[part].start)..of_part(self.rows[part].end);
        docs.flat_map(|doc| (self.first(doc)..).take(self.docs[doc].len()))
    }

    /// Shows the rows that a linear reads to whoever wants to see them.
    ///
    /// # Errors
    /// Whatever they make of them raises.
    pub(crate) fn show(&self, site: &SiteId, x_ti: MatRef<'_>, given: Given<'_>) -> Result<()> {
        let Some(tap) = self.tap.filter(|tap| tap.wants(site)) else { return Ok(()) };
        for (part, rows) in self.parts_of(given) {
            let x_ti = x_ti.sub_rows(rows.start, rows.end);
            self.meter.time(Work::Gemm, || tap.read(site, part, given.ids(part), x_ti, self.kernels))?;
        }
        Ok(())
    }

    /// Shows keys and values at an attention to whoever wants to see them.
    ///
    /// # Errors
    /// Whatever they make of them raises.
    pub(crate) fn show_keys(&self, site: &SiteId, k: MatRef<'_>, v: MatRef<'_>) -> Result<()> {
        let Some(tap) = self.tap.filter(|tap| tap.wants(site)) else { return Ok(()) };
        for (part, rows) in self.parts_of(Given::All) {
            let [k, v] = [k, v].map(|x| x.sub_rows(rows.start, rows.end));
            self.meter.time(Work::Attention, || tap.keys_values(site, part, k, v, self.kernels))?;
        }
        Ok(())
    }

    /// Keeps a part's gradient of a tensor until the end of the pass, when all of them are waited for at once.
    pub(crate) fn put_late(&self, part: usize, id: TensorId, sum: Rows<f32>) {
        let mut late = self.late.borrow_mut();
        // A component on some rows of many documents has a sum of each: they are one at once.
        match late.iter_mut().rev().find(|before| before.part == part && before.id == id) {
            Some(before) => self.kernels.add(sum.view().into(), before.sum.view_mut()),
            None => late.push(Late { part, id, sum }),
        }
    }

    /// Puts what was kept, in order; nothing is left.
    ///
    /// # Errors
    /// Whatever a sink raises.
    pub(crate) fn settle_late(&self, sinks: &mut Sinks<'_>) -> Result<()> {
        for Late { part, id, sum } in self.late.take() {
            let shape = (sum.n_rows(), sum.n_cols());
            let mut values = vec![0.0f32; shape.0 * shape.1];
            self.kernels.convert(sum.view().into(), ViewMut::new(&mut values, shape.0, shape.1).into());
            regions::put(&mut *sinks[part], &id, &Tensor::from_vec(values, shape, &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// Waits until the device has done everything so far.
    ///
    /// # Errors
    /// What it failed at.
    pub(crate) fn finish(&self) -> Result<()> {
        self.kernels.wait();
        self.check()
    }

    /// Whether a fault of the device is known.
    ///
    /// # Errors
    /// What it failed at.
    pub(crate) fn check(&self) -> Result<()> {
        Ok(self.kernels.fault()?)
    }

    pub(crate) fn architecture(&self) -> &'a Architecture {
        self.base.architecture()
    }

    /// Rows of the whole pass.
    pub(crate) fn n_rows(&self) -> usize {
        self.rows.last().map_or(0, |rows| rows.end)
    }

    /// `x` in the type of the activations.
    pub(crate) fn narrow(&self, x: View<'_, f32>) -> Mat {
        let mut y = self.arena.mat(x.rows(), x.cols(), self.dtype);
        self.kernels.convert(x.into(), y.view_mut());
        y
    }

    /// The parts among the rows given, and their rows there.
    pub(crate) fn parts_of(&self, given: Given<'_>) -> Vec<(usize, Range<usize>)> {
        match given {
            Given::All => self.rows.iter().cloned().enumerate().filter(|(_, rows)| !rows.is_empty()).collect(),
            Given::Of { part, ids } => vec![(part, 0..ids.len())],
            Given::Among(parts) => {
                let mut end = 0;
                let rows = parts.iter().map(|(part, ids)| {
                    let start = end;
                    end += ids.len();
                    (*part, start..end)
                });
                rows.collect()
            }
        }
    }

    /// The components at `site` on the rows given, part by part, in the order in which they apply.
    pub(crate) fn placed<'g>(&self, site: &SiteId, given: Given<'g>) -> Vec<Placed<'g, Port<'g>>>
    where
        'a: 'g,
    {
        let mut placed = Vec::new();
        for (index, rows) in self.parts_of(given) {
            let part = &self.parts[index];
            for (order, binding) in part.theta.bindings.iter().enumerate() {
                let Some((owner, at, port)) = component(part, binding, site) else { continue };
                let (slot, start) = (binding.slot, rows.start);
                let bound = owner.acts_on(&binding.rows, part.layout);
                if let Bound::All(set) = *bound {
                    let ids = given.ids(index).map_or(Ids::All, Ids::Borrowed);
                    placed.push(Placed { part: index, rows: rows.clone(), ids, order, slot, set, at, port });
                    continue;
                }
                let ids = given.ids(index).map_or_else(|| (0..rows.len() as u32).collect(), <[u32]>::to_vec);
                for (run, set) in crate::context::runs(&bound, &ids) {
                    let Some(set) = set else { continue };
                    let rows = start + run.start..start + run.end;
                    let ids = Ids::Some(ids[run].to_vec());
                    placed.push(Placed { part: index, rows, ids, order, slot, set, at, port });
                }
            }
        }
        placed
    }

    /// A tensor that stands in for the base's in all parts (a trained weight), with its id in each part that has one; `None`
    /// for parts that use the base's.
    pub(crate) fn own(&self, part: usize, site: &SiteId, local: &str) -> Option<(TensorId, &'a Tensor)> {
        self.parts[part].theta.weight(&self.base.tensor_name(site.as_str(), local))
    }

    /// The id under which the gradient of a site's own tensor is put by a part.
    pub(crate) fn id_of(&self, part: usize, site: &SiteId, local: &str) -> TensorId {
        match self.own(part, site, local) {
            Some((id, _)) => id,
            None => TensorId { owner: Owner::Base, name: self.base.tensor_name(site.as_str(), local) },
        }
    }

    /// Whether any part wants the gradient of one of a site's own tensors.
    ///
    pub(crate) fn wants_any(&self, site: &Site, sinks: &Sinks<'_>) -> bool {
        let wanted =
            |part: usize| site.locals().iter().any(|local| wants(&*sinks[part], &self.id_of(part, &site.id, local)));
        self.parts_of(Given::All).into_iter().any(|(part, _)| wanted(part))
    }

    /// A vector of a site (a norm's scale, a bias) as a part sees it.
    ///
    /// # Errors
    /// A tensor that the base does not have.
    pub(crate) fn vector(&self, part: usize, site: &SiteId, local: &str) -> Result<Vec<f32>> {
        let tensor = match self.own(part, site, local) {
            Some((_, tensor)) => tensor,
            None => self.base.vector(&self.base.tensor_name(site.as_str(), local))?,
        };
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// Runs of parts among the rows given that read the same tensors at `site`: the rows, and one of the parts.
    pub(crate) fn shared(&self, given: Given<'_>, site: &SiteId) -> Vec<(Range<usize>, usize)> {
        let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
        for (part, rows) in self.parts_of(given) {
            match runs.last_mut().filter(|(_, last)| self.alike(*last, part, site)) {
                Some((run, _)) => run.end = rows.end,
                None => runs.push((rows, part)),
            }
        }
        runs
    }

    /// The key of a component's dropout: none in evaluation, or if it does not train.
    pub(crate) fn dropout<P>(&self, placed: &Placed<'_, P>) -> Option<Dropout> {
        self.parts[placed.part].dropout_of(placed.slot)
    }

    /// Whether two components are one, with the same tensors.
    pub(crate) fn same<P>(&self, a: &Placed<'_, P>, b: &Placed<'_, P>) -> bool {
        let set = |placed: &Placed<'_, P>| self.parts[placed.part].theta.set(placed.slot, placed.set);
        std::ptr::eq(a.at, b.at)
            && (a.order, a.slot, a.set) == (b.order, b.slot, b.set)
            && matches!((set(a), set(b)), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
    }

    /// Whether two parts read the same tensors at `site`, components aside.
    pub(crate) fn alike(&self, a: usize, b: usize, site: &SiteId) -> bool {
        let id = |part, local| self.own(part, site, local).map(|(_, tensor)| tensor.id());
        ["weight", "bias"].into_iter().all(|local| id(a, local) == id(b, local))
    }
}

/// What a binding of a part attaches at `site`, and the slot whose it is.
fn component<'a>(part: &Part<'a>, binding: &Binding, site: &SiteId) -> Option<(&'a Slot, &'a Attachment, Port<'a>)> {
    let bank = part.theta.banks.get(binding.slot as usize).filter(|bank| bank.kind == BankKind::Adapter);
    let slot = bank.and_then(|_| part.stack.slot(binding.slot))?;
    let at = slot.at(site)?;
    Some((slot, at, slot.adapter().port(at)))
}

impl Part<'_> {
    /// The key of the dropout of a slot's component: none in evaluation, or if it does not train.
    pub(crate) fn dropout_of(&self, slot: u16) -> Option<Dropout> {
        self.dropout.filter(|_| self.theta.banks.get(slot as usize).is_some_and(|bank| bank.train))
    }

    /// How its rows attend, for graphs.
    pub(crate) fn plan(&self, architecture: &Architecture, dtype: DType) -> Result<RowPlan> {
        RowPlan::new(architecture, self.layout, &prefix::lengths(self), dtype)
    }
}

/// The tensors at `sites` whose gradient the sink of a part wants.
pub(crate) fn wanted(base: &Base, part: &Part<'_>, sites: &[Site], sink: &dyn GradSink) -> Vec<TensorId> {
    let mut found = Vec::new();
    let mut ask = |id: TensorId| {
        if wants(sink, &id) && !found.contains(&id) {
            found.push(id);
        }
    };
    for site in sites {
        for local in site.locals() {
            let name: TensorName = base.tensor_name(site.id.as_str(), local);
            match part.theta.weight(&name) {
                Some((id, _)) => ask(id),
                None => ask(TensorId { owner: Owner::Base, name }),
            }
        }
        if site.place == Place::Embedding {
            ask(TensorId::input_embeddings());
        }
        // A head may have the table of tokens as its weight, and so components with rows in it.
        let kept = SiteId::new(base.tensor_name(site.id.as_str(), "weight").owner());
        for binding in &part.theta.bindings {
            let slot = binding.slot;
            let own = component(part, binding, &site.id).map(|(_, at, _)| at);
            let table = component(part, binding, &kept).filter(|(.., port)| matches!(port, Port::Table(_)));
            let at = own.or_else(|| table.map(|(_, at, _)| at));
            for (at, spec) in at.into_iter().flat_map(|at| at.tensors.iter().map(move |spec| (at, spec))) {
                for set in sets(&binding.rows) {
                    ask(TensorId { owner: Owner::Bank { slot, set }, name: spec.name(at.site.as_str()) });
                }
            }
        }
    }
    found
}

/// Whether a sink wants the gradient of a tensor, or a part of it.
pub(crate) fn wants(sink: &dyn GradSink, id: &TensorId) -> bool {
    sink.want(id) != Region::None
}

/// The sets that a binding uses.
fn sets(rows: &Bound) -> Vec<u32> {
    match rows {
        Bound::All(set) => vec![*set],
        Bound::Segments(segments) => {
            let mut sets: Vec<u32> = segments.iter().map(|(_, set)| *set).collect();
            sets.sort_unstable();
            sets.dedup();
            sets
        }
        Bound::Domains(domains) => {
            let mut sets: Vec<u32> = domains.iter().map(|(_, set)| *set).collect();
            sets.sort_unstable();
            sets.dedup();
            sets
        }
    }
}

/// Cosines and sines of the angles of each row. They are computed in f64: a position of some thousands times a frequency
/// near 1 loses all its digits in f32. The frequencies of dynamic scaling depend on the length of the document.
fn angles(cx: &PassCx<'_>) -> Option<(Rows<f32>, Rows<f32>)> {
    let architecture = cx.architecture();
    let rope = architecture.positions.rope()?;
    let half = architecture.head_dim / 2;
    let factor = rope.attention_factor();
    let (mut cos, mut sin) = (cx.arena.rows(cx.n_rows(), half), cx.arena.rows(cx.n_rows(), half));
    let mut frequencies = Vec::new();
    // The table of the longest document so far with these frequencies: others are its beginning.
    let mut longest: Option<Range<usize>> = None;
    for (doc, before) in cx.docs.iter().zip((0..).map(|doc| cx.first(doc))) {
        let length = doc.len();
        let own = rope.frequencies(architecture.head_dim, before + length);
        if own != frequencies {
            frequencies = own;
            longest = None;
        }
        let known = longest.as_ref().filter(|_| before == 0);
        if let Some(longest) = known {
            let from = longest.start * half..(longest.start + longest.len().min(length)) * half;
            cos.values_mut().copy_within(from.clone(), doc.start * half);
            sin.values_mut().copy_within(from, doc.start * half);
        }
        let known = known.map_or(0, Range::len);
        for row in known.min(length)..length {
            let at = (doc.start + row) * half;
            for (i, frequency) in frequencies.iter().enumerate() {
                let angle = (before + row) as f64 * frequency;
                cos.values_mut()[at + i] = (angle.cos() * factor) as f32;
                sin.values_mut()[at + i] = (angle.sin() * factor) as f32;
            }
        }
        if before == 0 && length > known {
            longest = Some(doc.clone());
        }
    }
    Some((cos, sin))
}
