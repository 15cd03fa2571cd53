//! Passes of several lanes at once: the parts of all of them go through the base in one walk.
//!
//! A part's numbers have the same bits in any company, which the pass itself holds; so nothing here decides anything but
//! speed. What fails together is done again one by one, so that each lane has its own failure and no other's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attune_models::dropout::Dropout;
use attune_models::pass::Times;
use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass, Together, grad_together, score_together};
use attune_points::engine::LossReport;
use attune_points::objective::Objective;
use attune_points::{GradSink, Grads, Layout, Result, Theta};
use attune_spec::job::plan::ROWS_PER_PASS;

use crate::meeting::Meeting;
use crate::run::words;

/// What a lane wants to know of some micro-batches.
pub(crate) struct Piece {
    pub(crate) model: Arc<Model>,
    pub(crate) objective: Arc<dyn Objective>,
    pub(crate) theta: Theta,
    pub(crate) layouts: Vec<Arc<Layout>>,
    pub(crate) dropout: Option<Dropout>,
    /// Gradients beside the losses, if they are wanted.
    pub(crate) wanted: Option<Wanted>,
    /// What it is for.
    pub(crate) purpose: Purpose,
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Its numbers.
    #[default]
    Numbers,
    /// The memory that it takes: where the kernels can, it is made without products, which take most of its time and no memory of
    /// their own. Its numbers mean nothing.
    Memory,
}

/// The same, borrowed.
pub(crate) struct Asked<'a> {
    pub(crate) model: &'a Model,
    pub(crate) objective: &'a dyn Objective,
    pub(crate) theta: &'a Theta,
    pub(crate) layouts: Vec<&'a Layout>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) wanted: Option<&'a Wanted>,
    pub(crate) purpose: Purpose,
}

impl Piece {
    fn asked(&self) -> Asked<'_> {
        Asked {
            model: &self.model,
            objective: &*self.objective,
            theta: &self.theta,
            layouts: self.layouts.iter().map(|layout| &**layout).collect(),
            dropout: self.dropout,
            wanted: self.wanted.as_ref(),
            purpose: self.purpose,
        }
    }
}

/// Gradients of `scale × loss`.
pub(crate) struct Wanted {
    pub(crate) scale: f64,
    /// What gradients are wanted, with none yet.
    pub(crate) sink: Grads,
    pub(crate) keep: Keep,
}

/// For each micro-batch its gradients, empty where none were wanted, and its loss; and where the time of the pass went.
pub(crate) type Found = (Vec<(Grads, LossReport)>, Times);

/// What became of a piece.
pub(crate) enum Outcome {
    Found(Result<Found>),
    /// The pass panicked, and said this.
    Panicked(String),
}

/// A lane among others.
#[derive(Clone, Copy)]
pub(crate) struct Company<'a> {
    pub(crate) meeting: &'a Meeting<Piece, Outcome>,
    pub(crate) lane: usize,
    /// The most rows of a pass that it may be part of.
    pub(crate) largest_pass: u64,
}

impl Company<'_> {
    /// It computes from now on: the others wait for it.
    pub(crate) fn enter(&self) {
        self.meeting.enter(self.lane);
    }

    /// It computes no more.
    pub(crate) fn leave(&self) {
        self.meeting.leave(self.lane);
    }

    /// Does a piece together with those of the lanes that are there.
    ///
    /// # Panics
    /// When the pass does.
    pub(crate) fn pass(&self, piece: Piece) -> Result<Found> {
        match self.meeting.bring(self.lane, piece, do_all) {
            Some(Outcome::Found(found)) => found,
            Some(Outcome::Panicked(message)) => std::panic::panic_any(message),
            None => std::panic::panic_any("the pass of several lanes was cut off".to_owned()),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what meets is handed over")]
fn do_all(pieces: Vec<Piece>) -> Vec<Outcome> {
    let mut outcomes: Vec<Option<Outcome>> = pieces.iter().map(|_| None).collect();
    for places in groups(&pieces) {
        let chosen: Vec<&Piece> = places.iter().map(|&place| &pieces[place]).collect();
        for (place, outcome) in places.into_iter().zip(do_alike(&chosen)) {
            outcomes[place] = Some(outcome);
        }
    }
    outcomes.into_iter().flatten().collect()
}

/// Which pieces go through the base in one pass: those that want the same of it, as many as have no more rows than a pass is
/// meant to have. More rows would only take more memory.
fn groups(pieces: &[Piece]) -> Vec<Vec<usize>> {
    /// What is wanted, the rows, and the places of the pieces.
    type Group = ((Option<Keep>, Purpose), usize, Vec<usize>);
    let mut groups: Vec<Group> = Vec::new();
    for (place, piece) in pieces.iter().enumerate() {
        let wants = (piece.wanted.as_ref().map(|wanted| wanted.keep), piece.purpose);
        let rows: usize = piece.layouts.iter().map(|layout| layout.n_rows()).sum();
        let has_room = |group: &&mut Group| group.0 == wants && group.1 + rows <= ROWS_PER_PASS as usize;
        match groups.iter_mut().find(has_room) {
            Some((_, sum, places)) => {
                *sum += rows;
                places.push(place);
            }
            None => groups.push((wants, rows, vec![place])),
        }
    }
    groups.into_iter().map(|(_, _, places)| places).collect()
}

/// Pieces that all want gradients, with the same kept, or all want none.
fn do_alike(pieces: &[&Piece]) -> Vec<Outcome> {
    let guarded =
        |pieces: &[&Piece]| catch_unwind(AssertUnwindSafe(|| do_together(pieces))).map_err(|panic| words(&*panic));
    match guarded(pieces) {
        Ok(Ok(found)) => found.into_iter().map(|found| Outcome::Found(Ok(found))).collect(),
        Ok(Err(error)) if pieces.len() == 1 => vec![Outcome::Found(Err(error))],
        Err(message) if pieces.len() == 1 => vec![Outcome::Panicked(message)],
        // One by one.
        Ok(Err(_)) | Err(_) => pieces.iter().flat_map(|piece| do_alike(&[*piece])).collect(),
    }
}

fn do_together(pieces: &[&Piece]) -> Result<Vec<Found>> {
    let asked: Vec<Asked<'_>> = pieces.iter().map(|piece| piece.asked()).collect();
    pass(&asked)
}

/// One pass over what is asked, of which all want gradients, with the same kept, or all want none; for one purpose.
pub(crate) fn pass(pieces: &[Asked<'_>]) -> Result<Vec<Found>> {
    let passes: Vec<Vec<Pass<'_>>> = pieces
        .iter()
        .map(|piece| {
            piece.layouts.iter().map(|layout| Pass { theta: piece.theta, layout, dropout: piece.dropout }).collect()
        })
        .collect();
    let is_for_memory = |piece: &&Asked<'_>| piece.purpose == Purpose::Memory;
    let arena = pieces.first().filter(is_for_memory).and_then(|piece| piece.model.arena().without_products());
    let lanes: Vec<Together<'_>> = pieces
        .iter()
        .zip(&passes)
        .map(|(piece, passes)| Together {
            model: piece.model,
            passes,
            objective: piece.objective,
            scale: piece.wanted.map_or(1.0, |wanted| wanted.scale),
            arena: arena.as_ref(),
        })
        .collect();
    let sink = |piece: &Asked<'_>| piece.wanted.map(|wanted| wanted.sink.clone()).unwrap_or_default();
    let mut sinks: Vec<Grads> = pieces.iter().flat_map(|piece| piece.layouts.iter().map(|_| sink(piece))).collect();
    let (reports, times) = match pieces.first().and_then(|piece| piece.wanted) {
        Some(wanted) => {
            let mut given: Vec<&mut dyn GradSink> = sinks.iter_mut().map(|sink| sink as &mut dyn GradSink).collect();
            grad_together(&lanes, wanted.keep, &mut given)?
        }
        None => score_together(&lanes)?,
    };
    let mut each = sinks.into_iter().zip(reports);
    Ok(pieces.iter().map(|piece| (each.by_ref().take(piece.layouts.len()).collect(), times)).collect())
}
