//! What is kept of a run on the way, and how it goes on from that.

use std::borrow::Cow;
use std::path::Path;

use crate::checkpoint::{self, Buffer, State};
use crate::engine::RankEngine;
use crate::error::Error;
use crate::kernel;
use crate::protocol::Event;
use crate::run::Rank;

impl Rank<'_> {
    /// Everything of it that is no tensor.
    pub(super) fn state(&self) -> State {
        State {
            format: 0,
            plan: self.prepared.plan_digest,
            code_version: kernel::CODE_VERSION.to_owned(),
            kernel_profiles: self.kernel_profiles.clone(),
            step: self.engine.step,
            tokens: self.tokens,
            data: self.engine.loader.state(),
            guard: self.engine.guard.clone(),
            validation: self.validation.clone(),
            pinned: self.prepared.pinned.clone(),
            shares: self.prepared.shares.clone(),
        }
    }

    /// Writes the state of all ranks to a folder of the leading one's, buffer by buffer from whoever has it: all call it.
    pub(super) fn write(&mut self, folder: &Path) -> Result<(), Error> {
        let all = self.engine.all_buffers();
        let (state, rule, leads) = (self.state(), self.rule.state(), self.leads());
        let engine = &mut self.engine;
        let (own, collective) = (&engine.buffers, &mut engine.collective);
        let mut due = |buffer: &Buffer| {
            let numbers = own.get(&buffer.of).and_then(|own| own.get(buffer.place)).map(Vec::as_slice);
            match collective.gang() {
                Some(gang) => Ok::<_, Error>(gang.for_leader(&buffer.of, numbers)?.map(Cow::Owned)),
                None => Ok(numbers.map(Cow::Borrowed)),
            }
        };
        if !leads {
            return all.iter().try_for_each(|buffer| due(buffer).map(drop));
        }
        checkpoint::save(folder, &state, &engine.theta, rule, &all, |buffer, put| {
            let numbers = due(buffer)?.unwrap_or_default();
            put(&numbers).map_err(Error::io(folder))
        })
    }

    /// Writes a checkpoint: first under another name, so that a folder of the final name is complete.
    pub(super) fn save(&mut self) -> Result<(), Error> {
        let step = self.engine.step;
        let folder = self.request.work.join(format!("checkpoint-{step}"));
        let partial = self.request.work.join(format!(".checkpoint-{step}"));
        if !self.leads() {
            return self.write(&partial);
        }
        for left in [&folder, &partial] {
            match std::fs::remove_dir_all(left) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(left)(error)),
                _ => {}
            }
        }
        self.write(&partial)?;
        fail::fail_point!("trainer::checkpoint_written");
        std::fs::rename(&partial, &folder).map_err(Error::io(&folder))?;
        self.emit(Event::Checkpoint { step, folder });
        Ok(())
    }
}

/// Puts an engine where a checkpoint was.
pub(super) fn restore(engine: &mut RankEngine<'_>, state: &State, folder: &Path) -> Result<(), Error> {
    let mut theta = engine.theta.clone();
    let known = engine.all_buffers();
    let mut buffers = std::mem::take(&mut engine.buffers);
    checkpoint::load_tensors(folder, &mut theta, &known, &mut buffers)?;
    engine.theta = theta;
    engine.buffers = buffers;
    engine.step = state.step;
    engine.guard = state.guard.clone();
    engine.loader.restore(state.data.clone())?;
    Ok(())
}
