//! The pass: examples in the order of the data through a model, and what they leave.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_architecture::Site;
use attune_points::layout::LabelCounts;
use attune_points::stats::{Fisher, Gradient, Stat, What};
use attune_points::{GradSink, Layout, Result, Stats, StatsRequest, Tap, TensorId};

use crate::gradients::{Gradients, Squares};
use crate::inputs::Inputs;
use crate::texts;
use crate::wanted::{Selection, Wanted, selection};

/// A model with its parameters and an objective, as the pass uses it. Nothing is dropped.
pub trait Model {
    /// Shows a tap what the linears below the head read of some micro-batches, in one pass.
    ///
    /// # Errors
    /// Whatever the pass or the tap raises.
    fn look(&mut self, on: &[Arc<Layout>], tap: &dyn Tap) -> Result<()>;

    /// The gradient of the sum of a micro-batch's losses into `sink`.
    ///
    /// # Errors
    /// Whatever the pass or the sink raises.
    fn gradients(&mut self, on: &Arc<Layout>, sink: &mut dyn GradSink) -> Result<()>;

    /// The id under which the gradient of a site's weight comes.
    fn weight(&self, site: &Site) -> TensorId;

    /// What the sum of losses is divided by.
    fn denominator(&self, counts: LabelCounts) -> f64;
}

/// What went through the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Documents. What is wanted of different examples counts for itself.
    pub documents: u64,
    /// Their rows.
    pub rows: u64,
}

/// What is measured on one selection of examples.
struct Measuring {
    /// Examples that are still to come.
    left: u64,
    domains: Option<BTreeSet<u16>>,
    requests: Vec<StatsRequest>,
    inputs: Inputs,
    gradients: Gradients,
    squares: Squares,
    counts: LabelCounts,
    /// Micro-batches that go through the model next, and their rows.
    waiting: Vec<Arc<Layout>>,
    rows: usize,
}

impl Measuring {
    fn new((examples, domains): Selection) -> Self {
        Self {
            left: examples,
            domains,
            requests: Vec::new(),
            inputs: Inputs::default(),
            gradients: Gradients::default(),
            squares: Squares::default(),
            counts: LabelCounts::default(),
            waiting: Vec::new(),
            rows: 0,
        }
    }

    /// The documents of a micro-batch that count.
    fn chosen(&mut self, layout: &Arc<Layout>) -> Arc<Layout> {
        let mut groups = BTreeSet::new();
        let mut chosen = Vec::with_capacity(layout.docs().len());
        for doc in layout.docs() {
            let is_of_domain = self.domains.as_ref().is_none_or(|domains| domains.contains(&doc.domain));
            if is_of_domain && !groups.contains(&doc.group) && self.left > 0 {
                groups.insert(doc.group);
                self.left -= 1;
            }
            chosen.push(groups.contains(&doc.group));
        }
        if chosen.iter().all(|chosen| *chosen) {
            Arc::clone(layout)
        } else {
            Arc::new(layout.of_docs(|at, _| chosen[at]))
        }
    }

    /// Sends what waits through the model.
    fn flush(&mut self, model: &mut dyn Model) -> Result<()> {
        let parts = std::mem::take(&mut self.waiting);
        self.rows = 0;
        if !self.inputs.is_empty() && !parts.is_empty() {
            model.look(&parts, &self.inputs.looking(&parts))?;
        }
        if !self.gradients.is_empty() {
            // One by one: gradients of a weight that is used twice come in the order of its uses, whatever goes together.
            for layout in &parts {
                model.gradients(layout, &mut self.gradients)?;
                self.counts = self.counts + layout.counts();
            }
        }
        if !self.squares.is_empty() {
            for layout in &parts {
                let examples: BTreeSet<_> = layout.docs().iter().map(|doc| doc.group).collect();
                for example in examples {
                    // What an objective compares are documents of one example.
                    let own = Arc::new(layout.of_docs(|at, _| layout.docs()[at].group == example));
                    let mut sink = self.squares.example();
                    model.gradients(&own, &mut sink)?;
                    self.squares.end(sink)?;
                }
            }
        }
        Ok(())
    }
}

/// Measures all that is wanted on micro-batches as they come, none of whose examples goes on in another; it takes no more of them
/// than it needs, and says what it saw; texts that are wanted go through the model alone. Inputs of up to `rows_per_pass` rows are looked
/// at together, which changes no bit.
///
/// Beside what a pass of the model takes it holds its sums ([`Wanted::bytes`]), and, one site at a time, the rows of a micro-batch
/// and their part of the sum. The result is as large as the sums; one of both at a time is there twice.
///
/// # Errors
/// Whatever the data or the model raise.
pub fn measure(
    model: &mut dyn Model,
    wanted: &Wanted,
    rows_per_pass: usize,
    data: &mut dyn FnMut() -> Result<Option<Arc<Layout>>>,
) -> Result<(Stats, Seen)> {
    let mut all: BTreeMap<Selection, Measuring> = BTreeMap::new();
    for (request, sites) in wanted.iter() {
        let selection = selection(request);
        let measuring = all.entry(selection.clone()).or_insert_with(|| Measuring::new(selection));
        measuring.requests.push(request.clone());
        let weights = sites.values().map(|site| (model.weight(site), site.id.clone()));
        match request.what {
            What::Gradient => weights.for_each(|(weight, site)| measuring.gradients.add(weight, site)),
            What::Fisher => weights.for_each(|(weight, site)| measuring.squares.add(weight, site)),
            what => measuring.inputs.add(what, sites),
        }
    }
    let mut seen = Seen::default();
    while all.values().any(|measuring| measuring.left > 0) {
        let Some(layout) = data()? else { break };
        for measuring in all.values_mut() {
            let chosen = measuring.chosen(&layout);
            if chosen.n_rows() == 0 {
                continue;
            }
            if measuring.rows + chosen.n_rows() > rows_per_pass {
                measuring.flush(model)?;
            }
            measuring.rows += chosen.n_rows();
            seen.rows += chosen.n_rows() as u64;
            seen.documents += chosen.docs().len() as u64;
            measuring.waiting.push(chosen);
        }
    }
    let mut stats = Stats::none();
    for (tokens, sites) in wanted.texts() {
        texts::read(model, tokens, sites, &mut stats)?;
        seen.rows += tokens.len() as u64;
        seen.documents += 1;
    }
    for mut measuring in all.into_values() {
        measuring.flush(model)?;
        let Measuring { requests, inputs, gradients, squares, counts, .. } = measuring;
        let of = |what| requests.iter().find(|request| request.what == what);
        for (what, site, stat) in inputs.found()? {
            if let Some(request) = of(what) {
                stats.insert(request.clone(), site, stat);
            }
        }
        let denominator = model.denominator(counts);
        for (site, sum_oi) in gradients.found() {
            if let Some(request) = of(What::Gradient) {
                stats.insert(request.clone(), site, Stat::Gradient(Gradient { sum_oi, denominator }));
            }
        }
        let examples = squares.examples;
        for (site, sum_oi) in squares.found() {
            if let Some(request) = of(What::Fisher) {
                stats.insert(request.clone(), site, Stat::Fisher(Fisher { sum_oi, examples }));
            }
        }
    }
    Ok((stats, seen))
}
