//! Several updates on each batch: for objectives whose batches are dear, such as answers that the model has to give first.
//!
//! # Update
//! ```text
//! every `times` steps   B <- the next batch,   log π_made <- log π(B; θ)
//! θ <- update(θ, clip(∇ L(B; θ)))
//! ```
//!
//! # Symbols
//! `B` is a batch, `log π_made` the log-probabilities of its labels under the parameters that it was made with, without dropout;
//! they are taken where the objective learns from answers of the model, which compares what it says with what it said then.
//!
//! # Cost
//! One forward and one backward pass a step; one more forward pass every `times` steps where the objective compares. The batch is
//! in every checkpoint.
//!
//! # Limits
//! `times` 1 is the usual step. A step is an update, so a run of so many steps sees that number divided by `times` of batches; one
//! that is counted in epochs or tokens of data sees that share of them.
//!
//! # Departures
//! Batches are taken in the order of the data each time, in whole steps: PPO's shuffled parts of a batch are not here.
//!
//! # Paper
//! Proximal Policy Optimization Algorithms. Schulman et al., 2017 (several epochs on what was sampled).

use std::sync::Arc;

use attune_points::engine::{Batch, Engine, Source, StepReport, StepRule, Tensors, update_on};
use attune_points::layout::{Axis, Column, LabelCounts, MADE, Source as Origin, Values};
use attune_points::{Error, Layout, Result, Row, Theta, View};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of the rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Updates on each batch.
    #[schemars(range(min = 1, max = 1000))]
    times: u64,
}

impl Default for Config {
    /// As many epochs as PPO's authors take on simple tasks at least.
    fn default() -> Self {
        Self { times: 3 }
    }
}

#[derive(Default)]
pub(super) struct Reuse {
    times: u64,
    /// Updates that were made on the batch at hand.
    done: u64,
    /// The parts of the batch on all ranks, by their numbers; each rank has its own as layouts too.
    all: Vec<(u32, Tensors)>,
    batch: Option<Batch>,
}

impl Method for Reuse {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Proximal Policy Optimization Algorithms",
            authors: "John Schulman, Filip Wolski, Prafulla Dhariwal, Alec Radford, Oleg Klimov",
            year: 2017,
        }),
        ..Card::new(
            "reuse",
            Point::StepRule,
            "Several updates on each batch: for objectives whose batches are dear, such as answers that the model has to give first.",
        )
    };
    type Config = Config;
    type Object = dyn StepRule;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn StepRule>, Vec<Fault>> {
        Ok(Box::new(Self { times: config.times, ..Self::default() }))
    }
}

impl Reuse {
    /// The next batch, kept.
    fn take(&mut self, engine: &mut dyn Engine) -> Result<Batch> {
        let mut batch = engine.batch(Source::Train)?;
        if self.times > 1 {
            if engine.objective().needs().answers.is_some() {
                let theta = engine.theta().clone();
                batch.parts = engine.with_logp(MADE, &theta, &batch.parts)?;
            }
            let said = batch.parts.iter().map(|(part, layout)| Ok((*part, written(layout)?)));
            let said = said.collect::<Result<Vec<_>>>()?;
            self.all = engine.gather(said)?;
        }
        self.done = 0;
        self.batch = Some(batch.clone());
        Ok(batch)
    }

    /// The batch at hand, if it has updates left.
    fn held(&mut self, engine: &dyn Engine) -> Result<Option<Batch>> {
        if self.done >= self.times || (self.batch.is_none() && self.all.is_empty()) {
            return Ok(None);
        }
        if self.batch.is_none() {
            // A run that was resumed: its parts may be those of other ranks now.
            let layouts = self.all.iter().map(|(part, tensors)| Ok((*part, Arc::new(read(tensors)?))));
            let layouts = layouts.collect::<Result<Vec<_>>>()?;
            let counts = layouts.iter().map(|(_, layout)| layout.counts()).sum::<LabelCounts>();
            let n_rows = layouts.iter().map(|(_, layout)| layout.n_rows() as u64).sum();
            let parts = layouts.into_iter().filter(|(part, _)| engine.owns(*part)).collect();
            self.batch = Some(Batch { parts, counts, n_rows });
        }
        Ok(self.batch.clone())
    }
}

impl StepRule for Reuse {
    fn step(&mut self, _: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = match self.held(engine)? {
            Some(batch) => batch,
            None => self.take(engine)?,
        };
        self.done += 1;
        update_on(engine, &batch)
    }

    fn state(&self) -> Tensors {
        if self.done >= self.times || self.all.is_empty() {
            return Tensors::new();
        }
        let parts = self.all.iter().flat_map(|(part, tensors)| {
            tensors.iter().map(move |(name, tensor)| (format!("{part}.{name}"), tensor.clone()))
        });
        let done = Tensor::new(&[self.done as i64], &Device::Cpu).map(|done| ("done".to_owned(), done));
        parts.chain(done).collect()
    }

    fn restore(&mut self, mut state: Tensors, _: &Theta) -> Result<()> {
        let Some(done) = state.remove("done") else {
            return match state.keys().next() {
                None => Ok(()),
                Some(name) => Err(Error::Refused(format!("has {name:?}, and not how often its batch was used"))),
            };
        };
        self.done = done.to_vec1::<i64>()?.first().map_or(0, |done| *done as u64);
        for (name, tensor) in state {
            let unknown = || Error::Refused(format!("has {name:?}, which is no part of a batch"));
            let (part, of_part) = name.split_once('.').ok_or_else(unknown)?;
            let part: u32 = part.parse().map_err(|_| unknown())?;
            let at = self.all.partition_point(|(known, _)| *known < part);
            if self.all.get(at).is_none_or(|(known, _)| *known != part) {
                self.all.insert(at, (part, Tensors::new()));
            }
            self.all[at].1.insert(of_part.to_owned(), tensor);
        }
        Ok(())
    }
}

/// Numbers that each document has in a checkpoint.
const OF_DOC: usize = 6;

/// A row as a number: a token as it is, one that a component put before a document below zero.
fn number_of(row: &Row) -> Result<i64> {
    match row {
        Row::Token(id) => Ok(i64::from(*id)),
        Row::Virtual { slot, index } => Ok(-1 - (i64::from(*slot) << 32 | i64::from(*index))),
        Row::Payload { .. } => {
            Err(Error::Refused("a batch with rows from columns cannot be kept for several updates".to_owned()))
        }
    }
}

/// The row of a number.
fn row_of(number: i64) -> Row {
    match u32::try_from(number) {
        Ok(id) => Row::Token(id),
        Err(_) => Row::Virtual { slot: ((-1 - number) >> 32) as u16, index: (-1 - number) as u32 },
    }
}

/// A layout as tensors: whole numbers of 64 bits, of which some are the bits of a real one.
fn written(layout: &Layout) -> Result<Tensors> {
    let whole = |values: Vec<i64>| Tensor::new(values, &Device::Cpu);
    let rows = layout.rows().iter().map(number_of).collect::<Result<Vec<i64>>>()?;
    let docs = layout.docs().iter().flat_map(|doc| {
        let numbers: [i64; OF_DOC] = [
            doc.n_rows() as i64,
            doc.example as i64,
            view_number(doc.view),
            i64::from(doc.lane),
            i64::from(doc.domain),
            i64::from(doc.group),
        ];
        numbers
    });
    let mut tensors = Tensors::from([("rows".to_owned(), whole(rows)?), ("docs".to_owned(), whole(docs.collect())?)]);
    for (name, Column { axis, values }) in layout.columns() {
        let (kind, values) = match values {
            Values::Vectors { width, numbers } => {
                (format!("v{width}"), numbers.iter().map(|number| i64::from(number.to_bits())).collect())
            }
            Values::U32(values) => ("u32".to_owned(), values.iter().map(|value| i64::from(*value)).collect()),
            Values::F32(values) => ("f32".to_owned(), values.iter().map(|value| i64::from(value.to_bits())).collect()),
            Values::F64(values) => ("f64".to_owned(), values.iter().map(|value| value.to_bits() as i64).collect()),
        };
        let axis = if *axis == Axis::Row { "row" } else { "doc" };
        tensors.insert(format!("{axis}.{kind}.{name}"), whole(values)?);
    }
    Ok(tensors)
}

/// A layout that was written.
fn read(tensors: &Tensors) -> Result<Layout> {
    let of = |name: &str| -> Result<Vec<i64>> {
        let lack = || Error::Refused(format!("a kept batch lacks {name:?}"));
        Ok(tensors.get(name).ok_or_else(lack)?.to_vec1::<i64>()?)
    };
    let (rows, docs) = (of("rows")?, of("docs")?);
    let mut layout = Layout::new();
    let mut rest = rows.iter();
    for doc in docs.chunks_exact(OF_DOC) {
        let origin = Origin {
            example: doc[1] as u64,
            view: view_of(doc[2]),
            lane: doc[3] as u16,
            domain: doc[4] as u16,
            group: Some(doc[5] as u32),
        };
        // Labels come with the other columns.
        let own = rest.by_ref().take(doc[0] as usize).map(|number| (row_of(*number), 0));
        layout.push(origin, own.collect::<Vec<_>>());
    }
    for (name, tensor) in tensors {
        let mut words = name.splitn(3, '.');
        let (Some(axis), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
        let values = tensor.to_vec1::<i64>()?;
        let values = match kind {
            kind if kind.starts_with('v') => Values::Vectors {
                width: kind[1..].parse().unwrap_or_default(),
                numbers: values.iter().map(|value| f32::from_bits(*value as u32)).collect(),
            },
            "u32" => Values::U32(values.iter().map(|value| *value as u32).collect()),
            "f32" => Values::F32(values.iter().map(|value| f32::from_bits(*value as u32)).collect()),
            _ => Values::F64(values.iter().map(|value| f64::from_bits(*value as u64)).collect()),
        };
        let axis = if axis == "row" { Axis::Row } else { Axis::Doc };
        layout.set_column(name, Column { axis, values })?;
    }
    Ok(layout)
}

/// Views with a number of their own come after those without.
const NUMBERED: i64 = 1 << 16;

fn view_number(view: View) -> i64 {
    match view {
        View::Main => 0,
        View::Chosen => 1,
        View::Rejected => 2,
        View::Teacher => 3,
        View::Query => 4,
        View::Sample(index) => NUMBERED + i64::from(index),
        View::Passage(index) => 2 * NUMBERED + i64::from(index),
    }
}

fn view_of(number: i64) -> View {
    match (number / NUMBERED, number % NUMBERED) {
        (0, 1) => View::Chosen,
        (0, 2) => View::Rejected,
        (0, 3) => View::Teacher,
        (0, 4) => View::Query,
        (1, index) => View::Sample(index as u16),
        (2, index) => View::Passage(index as u16),
        _ => View::Main,
    }
}

#[cfg(test)]
mod tests {
    use attune_points::layout::{LABELS, NO_LABEL, REWARD};

    use super::*;

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let mut layout = Layout::new();
        for (view, group) in [(View::Sample(3), 5), (View::Sample(4), 5), (View::Passage(7), 6), (View::Rejected, 7)] {
            let origin = Origin { example: 9, view, lane: 2, domain: 1, group: Some(group) };
            let before = (Row::Virtual { slot: 2, index: 7 }, NO_LABEL);
            layout.push(origin, [before, (Row::Token(1), NO_LABEL), (Row::Token(2), 3)]);
        }
        let rewards = Values::F64(vec![1.5, f64::NEG_INFINITY, -0.0, 1e-300]);
        layout.set_column(REWARD, Column { axis: Axis::Doc, values: rewards }).unwrap();
        let vectors = Values::Vectors { width: 3, numbers: (0..12).map(|number| 0.1 * number as f32).collect() };
        layout.set_column("vectors", Column { axis: Axis::Doc, values: vectors }).unwrap();
        layout.set_column("weight", Column { axis: Axis::Row, values: Values::F32(vec![0.1; 12]) }).unwrap();
        let found = read(&written(&layout).unwrap()).unwrap();
        assert_eq!(found, layout);
        assert!(found.column(LABELS).is_some());
    }

    #[test]
    fn every_view_has_a_number_of_its_own() {
        let views = [View::Main, View::Chosen, View::Rejected, View::Teacher, View::Query];
        let numbered = [0, 1, u16::MAX].into_iter().flat_map(|index| [View::Sample(index), View::Passage(index)]);
        for view in views.into_iter().chain(numbered) {
            assert_eq!(view_of(view_number(view)), view);
        }
    }

    #[test]
    fn a_state_of_something_else_is_refused() {
        let strange = |name: &str| {
            let tensor = Tensor::new(&[1i64], &Device::Cpu).unwrap();
            let state = Tensors::from([("done".to_owned(), tensor.clone()), (name.to_owned(), tensor)]);
            Reuse { times: 2, ..Reuse::default() }.restore(state, &Theta::default()).unwrap_err().to_string()
        };
        assert!(strange("anchor").contains("\"anchor\", which is no part of a batch"));
        assert!(strange("x.rows").contains("\"x.rows\""));
    }
}
