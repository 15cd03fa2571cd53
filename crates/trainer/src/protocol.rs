//! What a worker's agent and the process that trains say to each other: JSON, one message a line.
//!
//! The agent writes one [`Request`], or a [`Cohort`] of several that share the process as lanes, then [`Command`]s, to the
//! process's standard input and reads [`Event`]s from its standard output; standard error is the log. What is said to or by
//! a lane has its number, see [`Tagged`]. The process ends when its input ends, so that it never outlives its agent.
//! It knows no server and no store: inputs are folders that the agent has verified, outputs are folders that it announces.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use attune_spec::Fault;
use attune_spec::id::{Digest, Name, Step, Tokens};
use attune_spec::job::Plan;
use serde::{Deserialize, Serialize};

/// The version of these messages; both sides are built together, so another version is refused.
pub const VERSION: u32 = 2;

/// What is to be done. The first line of the process's input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// The job's name, for model cards.
    pub name: String,
    /// What will run.
    pub plan: Plan,
    /// Where each input artifact lies: a file's or a folder's verified copy, by digest.
    pub inputs: BTreeMap<Digest, PathBuf>,
    /// An empty folder for checkpoints and outputs.
    pub work: PathBuf,
    /// Ranks of data-parallel training in this process.
    pub ranks: u32,
    /// The number of the NVIDIA device that all ranks work on; the processor without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<u32>,
    /// The checkpoint to go on from: a folder as this program wrote it.
    pub resume: Option<PathBuf>,
    /// Its place among the processes that train this together; none if it is the only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<Seat>,
}

impl Request {
    /// Ranks of all processes.
    pub fn all_ranks(&self) -> u32 {
        self.ranks * self.seat.as_ref().map_or(1, |seat| seat.size)
    }
}

/// A process's place among those of one run. The one of rank 0 leads: it alone writes checkpoints and results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seat {
    /// Its number, from 0.
    pub rank: u32,
    /// How many they are.
    pub size: u32,
    /// The address of this node by which the others reach it.
    pub host: IpAddr,
}

/// Where a process of a run listens, and the proof that somebody belongs to the run. Not for logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The address.
    pub address: SocketAddr,
    /// The proof, in hexadecimal digits.
    pub token: String,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl From<&attune_collective::Peer> for Peer {
    fn from(peer: &attune_collective::Peer) -> Self {
        Self { address: peer.address, token: blake3::Hash::from_bytes(peer.token).to_hex().to_string() }
    }
}

impl TryFrom<&Peer> for attune_collective::Peer {
    type Error = String;

    fn try_from(peer: &Peer) -> Result<Self, String> {
        let token =
            blake3::Hash::from_hex(&peer.token).map_err(|error| format!("the token of {}: {error}", peer.address))?;
        Ok(Self { address: peer.address, token: *token.as_bytes() })
    }
}

/// Several runs over one base, as lanes of one process: the first line of its input in place of a [`Request`]. Lanes are
/// numbered by their place here, from 0; each ends for itself, and the process ends well when the last one has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cohort {
    /// [`VERSION`].
    pub version: u32,
    /// What each lane is to do.
    pub lanes: Vec<Request>,
}

/// A command to a lane, or an event of one. Without a number, as all messages of a process with one lane are, it is lane 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tagged<T> {
    /// The lane.
    #[serde(default, skip_serializing_if = "is_first")]
    pub lane: u32,
    /// What is said.
    #[serde(flatten)]
    pub message: T,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
const fn is_first(lane: &u32) -> bool {
    *lane == 0
}

/// What the agent asks for while the run goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Write a checkpoint after the current step, then end.
    CheckpointAndStop,
    /// Write a checkpoint after the current step, and go on.
    Checkpoint,
    /// End after the current step, without a checkpoint: nobody wants the result.
    Leave,
    /// Where all processes of the run listen, by number: the answer to [`Event::Listening`].
    Peers {
        /// The processes, this one among them.
        peers: Vec<Peer>,
    },
    /// The announced checkpoint is stored; its folder may be deleted.
    CheckpointStored {
        /// The checkpoint's step.
        step: Step,
    },
}

/// Which part of starting is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The base and its tokeniser are loaded.
    Base,
    /// Data is read, checked and tokenised.
    Data,
    /// What components want to know of the base before they start is measured on the first of the data.
    Calibration,
    /// One forward and backward pass over the largest batch that can occur.
    Rehearsal,
    /// The validation loss before the first step is measured.
    Evaluation,
}

/// What a folder that is announced as output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputKind {
    /// An adapter in PEFT's layout.
    Adapter,
    /// A whole model.
    Model,
    /// What was measured.
    Report,
    /// Statistics of the base.
    Statistics,
}

/// Which of a run's results an output is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputRole {
    /// What the job is for: it gets the job's tag. Of several slots that train, the first.
    Result,
    /// What a further slot that trains became: the slot's name.
    Further(Name),
    /// A plain model folder with the adapter merged in.
    Merged,
    /// The report.
    Report,
    /// What was measured of the base before anything trained.
    Statistics,
}

/// One thing that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Its name, as in `train/loss`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// What the run was like; no part of any output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Steps of the whole run.
    pub steps: Step,
    /// Tokens of the whole run.
    pub tokens: Tokens,
    /// Trained parameters.
    pub trained_parameters: u64,
    /// Mean speed of this attempt's steps.
    pub tokens_per_second: f64,
    /// The largest resident memory of the process.
    pub peak_memory_bytes: u64,
    /// Validation loss by set, before the first step.
    pub before: BTreeMap<String, f64>,
    /// Validation loss by set, after the last step.
    pub after: BTreeMap<String, f64>,
}

/// Why a run failed, by what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The job asks for something that cannot be: its file, its data or its base is wrong.
    Input,
    /// A loss, gradient or weight was not finite.
    NotFinite,
    /// A tensor that should train got no gradient.
    NoGradient,
    /// A validation set did not come to what the job asks of it.
    Gate,
    /// There was not enough memory.
    Memory,
    /// Another process of the run is gone or says nothing; it, or its worker, knows why.
    LostRank,
    /// A file could not be read or written, or a remote object did not answer.
    Io,
    /// A disk was full.
    DiskFull,
    /// Bytes are not those that were there before: a memory, a disk or a wire has lost a bit.
    Corrupt,
    /// A fault of this program.
    Internal,
}

impl FailureClass {
    /// Whether the same attempt may succeed when it is made again.
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::Input | Self::NotFinite | Self::NoGradient | Self::Gate => false,
            Self::Memory | Self::LostRank | Self::Io | Self::DiskFull | Self::Corrupt | Self::Internal => true,
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process waits for the others of its run: they are to be told of it.
    Listening {
        /// Where, and under which proof.
        peer: Peer,
    },
    /// A part of starting begins.
    Starting {
        /// Which.
        phase: Phase,
    },
    /// Something that a person should know and that stops nothing.
    Note {
        /// What it is about, in a word.
        topic: String,
        /// What is the case, and where.
        message: String,
    },
    /// Everything is ready; steps begin.
    Running {
        /// The step that the run goes on from.
        step: Step,
        /// Steps of the whole run.
        total_steps: Step,
        /// What the run will compute with: instruction set and versions. The same profile gives the same bits.
        kernel_profile: String,
        /// Content digests of inputs that are read where they lie, by URL or path.
        pinned: BTreeMap<String, Digest>,
    },
    /// A step is done.
    Progress {
        /// Steps done.
        step: Step,
        /// Steps of the whole run.
        total_steps: Step,
        /// Tokens of the whole run so far.
        tokens: Tokens,
        /// Speed of the last steps.
        tokens_per_second: f64,
        /// Seconds to the end at that speed.
        eta_seconds: f64,
    },
    /// Things that were measured at a step.
    Metrics {
        /// Steps done.
        step: Step,
        /// Tokens of the whole run so far.
        tokens: Tokens,
        /// What was measured.
        metrics: Vec<Metric>,
    },
    /// A checkpoint is complete in `folder`.
    Checkpoint {
        /// Steps done.
        step: Step,
        /// Where it lies.
        folder: PathBuf,
    },
    /// A result is complete in `folder`.
    Output {
        /// Which of the results it is.
        role: OutputRole,
        /// What the folder holds.
        kind: OutputKind,
        /// Where it lies.
        folder: PathBuf,
        /// The largest resident memory of the process so far, in bytes; 0 where the system does not say.
        peak_memory_bytes: u64,
    },
    /// The run ends as it was asked to, after its last checkpoint unless it was asked to leave.
    Stopped {
        /// Steps done.
        step: Step,
    },
    /// The run is done; all outputs were announced.
    Finished {
        /// What it was like.
        summary: Summary,
    },
    /// The run cannot go on.
    Failed {
        /// By what can be done about it.
        class: FailureClass,
        /// What is wrong, where, and what would do.
        message: String,
        /// Fields of the job at fault, if any.
        faults: Vec<Fault>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_and_name_themselves() {
        let event = Event::Checkpoint { step: Step(5), folder: "checkpoints/a\nb".into() };
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(line, r#"{"event":"checkpoint","step":5,"folder":"checkpoints/a\nb"}"#);
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        let command = Command::CheckpointStored { step: Step(5) };
        assert_eq!(serde_json::to_string(&command).unwrap(), r#"{"command":"checkpoint_stored","step":5}"#);
    }

    #[test]
    fn the_first_lane_needs_no_number() {
        let told = |lane| Tagged { lane, message: Command::CheckpointStored { step: Step(5) } };
        for (lane, line) in [
            (0, r#"{"command":"checkpoint_stored","step":5}"#),
            (3, r#"{"lane":3,"command":"checkpoint_stored","step":5}"#),
        ] {
            assert_eq!(serde_json::to_string(&told(lane)).unwrap(), line);
            assert_eq!(serde_json::from_str::<Tagged<Command>>(line).unwrap(), told(lane));
        }
        let event = Tagged { lane: 1, message: Event::Stopped { step: Step(2) } };
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(line, r#"{"lane":1,"event":"stopped","step":2}"#);
        assert_eq!(serde_json::from_str::<Tagged<Event>>(&line).unwrap(), event);
    }
}
