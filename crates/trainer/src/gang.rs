//! Processes that train one job together, each on a worker of its own.
//!
//! Everything that ranks send one another crosses the wire as bytes. Gradients go another way than the rest: each tensor has
//! one process that owns it, which gets the parts of all and adds them up in the order of their numbers; the sums are then
//! given to all. So what crosses the network does not grow with the number of processes, the work of adding up is shared,
//! and the sum has the bits that one process alone gives it.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_collective::{Collective, Error, Listening, Parts, Patience, Wire, in_order};
use attune_points::engine::LossReport;
use attune_points::{GradSink as _, Grads, Region, TensorId, TensorSpec};
use attune_spec::id::Digest;
use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::engine::Message;
use crate::protocol::{Request, Seat};

/// How long processes wait for one another. Steps may be long; that one hangs, its worker sees, and that one is gone, the
/// wire.
const PATIENCE: Patience = Patience {
    join: std::time::Duration::from_secs(60),
    silence: std::time::Duration::from_secs(10),
    exchange: std::time::Duration::from_secs(3600),
};

/// Meets the other processes of a run. They are told of this one through `control`, and it of them. Nothing if the run is
/// asked to stop before.
///
/// # Errors
/// Nobody else is heard of, or one cannot be reached.
pub(crate) fn join(seat: &Seat, control: &dyn Control) -> Result<Option<Box<dyn Wire>>, crate::Error> {
    let listening = Listening::bind(seat.host).map_err(crate::Error::io(format!("a port of {}", seat.host)))?;
    let Some(peers) = control.meet(&listening.peer())? else { return Ok(None) };
    Ok(Some(Box::new(listening.join(seat.rank, &peers, PATIENCE)?)))
}

/// What must be the same in all processes, or their sums would not be those of one.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Likeness {
    plan: Digest,
    ranks: u32,
    code_version: String,
    kernel_profile: String,
}

/// This process's place among those of a run.
pub(crate) struct Gang {
    wire: Box<dyn Wire>,
    /// Who adds up which tensor.
    owners: BTreeMap<TensorId, u32>,
    exchange: u64,
}

impl Gang {
    /// Over a wire whose processes are found to do the same. `specs` are the tensors that train.
    ///
    /// # Errors
    /// One that does not: it is named, with what differs.
    pub(crate) fn new(
        wire: Box<dyn Wire>,
        specs: &BTreeMap<TensorId, TensorSpec>,
        request: &Request,
        (plan, kernel_profile): (Digest, String),
    ) -> Result<Self, crate::Error> {
        let code_version = crate::kernel::CODE_VERSION.to_owned();
        let own = Likeness { plan, ranks: request.ranks, code_version, kernel_profile };
        let mut gang = Self { owners: owners(specs, wire.size()), wire, exchange: 0 };
        for (rank, theirs) in (0..).zip(gang.tell_all::<Likeness>(&own)?) {
            let differs = if theirs.kernel_profile != own.kernel_profile {
                format!("by {:?}, this one by {:?}", theirs.kernel_profile, own.kernel_profile)
            } else if theirs != own {
                format!("{theirs:?}, this one {own:?}")
            } else {
                continue;
            };
            let message = format!(
                "places it on workers that do not compute the same: process {rank} computes {differs}; ask for workers that are \
                 alike by their labels"
            );
            return Err(crate::Error::Faults(vec![attune_spec::Fault::new("resources.labels", message)]));
        }
        Ok(gang)
    }

    /// What each process says, by number, where each says one thing to all.
    fn tell_all<T: Serialize + DeserializeOwned>(&mut self, own: &T) -> Result<Vec<T>, Error> {
        let bytes = postcard::to_stdvec(own).map_err(|error| self.unsent(&error))?;
        let heard = self.wire.exchange(vec![bytes; self.wire.size() as usize])?;
        self.exchange += 1;
        (0..)
            .zip(heard)
            .map(|(rank, bytes)| postcard::from_bytes(&bytes).map_err(|error| unclear(rank, &error)))
            .collect()
    }

    fn unsent(&self, error: &dyn std::fmt::Display) -> Error {
        Error::Unexpected { rank: self.wire.rank(), what: format!("what it has to say cannot be sent: {error}") }
    }

    /// The parts of all processes.
    fn tell(&mut self, parts: &Parts<Message>) -> Result<Parts<Message>, Error> {
        let all = self.tell_all(parts)?.into_iter().flatten().collect();
        in_order(all, self.exchange)
    }

    /// The sum of all parts, as if it were the only one.
    fn reduce(&mut self, parts: Parts<Message>) -> Result<Parts<Message>, Error> {
        let size = self.wire.size();
        let (mut reports, mut shares) = (Vec::new(), vec![Share::default(); size as usize]);
        for (number, message) in parts {
            let Message::Part { gradients, report, stop } = message else {
                return Err(self.unsent(&"a gradient and something else go together"));
            };
            reports.push((number, report, stop));
            for (id, value) in gradients.iter() {
                let share = &mut shares[self.owner(id) as usize];
                share.push(number, id, &gradients, value).map_err(|error| self.unsent(&error))?;
            }
        }
        let mut to = Vec::with_capacity(shares.len());
        for share in shares {
            to.push(pack(&(&reports, &share.pieces), &share.values).map_err(|error| self.unsent(&error))?);
        }
        drop(reports);
        let heard = self.wire.exchange(to)?;
        self.exchange += 1;
        let (mut told, mut mine) = (Vec::new(), Vec::new());
        for (rank, bytes) in (0..).zip(heard) {
            let ((reports, pieces), values): ((Vec<(u32, LossReport, bool)>, Vec<Piece>), _) = unpack(rank, &bytes)?;
            told.extend(reports.into_iter().map(|(number, report, stop)| (number, (report, stop))));
            mine.extend(gathered(rank, pieces, values)?);
        }
        let told = in_order(told, self.exchange)?;
        let mine = in_order(mine, self.exchange)?;
        let mut sum = Grads::default();
        for (_, part) in &mine {
            sum.widen(part);
            sum.add(part).map_err(|error| self.unsent(&error))?;
        }
        drop(mine);
        let mut share = Share::default();
        for (id, value) in sum.iter() {
            share.push(0, id, &sum, value).map_err(|error| self.unsent(&error))?;
        }
        drop(sum);
        let sums = pack(&share.pieces, &share.values).map_err(|error| self.unsent(&error))?;
        drop(share);
        let heard = self.wire.exchange(vec![sums; size as usize])?;
        self.exchange += 1;
        let mut gradients = Grads::default();
        for (rank, bytes) in (0..).zip(heard) {
            let (pieces, values): (Vec<Piece>, _) = unpack(rank, &bytes)?;
            for (_, sums) in gathered(rank, pieces, values)? {
                gradients.widen(&sums);
                gradients.add(&sums).map_err(|error| self.unsent(&error))?;
            }
        }
        let (mut report, mut stop) = (LossReport::default(), false);
        for (_, (part, asks)) in told {
            report.add(&part);
            stop |= asks;
        }
        Ok(vec![(0, Message::Part { gradients, report, stop })])
    }

    /// Who adds up a tensor: also one that is no parameter of the run, of which all processes must think alike.
    fn owner(&self, id: &TensorId) -> u32 {
        self.owners.get(id).copied().unwrap_or_else(|| {
            let hash = blake3::hash(format!("{:?} {id}", id.owner).as_bytes());
            u32::from_le_bytes(hash.as_bytes()[..4].try_into().unwrap_or_default()) % self.wire.size()
        })
    }
}

impl Collective<Message> for Gang {
    fn rank(&self) -> u32 {
        self.wire.rank()
    }

    fn size(&self) -> u32 {
        self.wire.size()
    }

    /// Of gradients, the sum of the parts in place of them.
    fn exchange(&mut self, parts: Parts<Message>) -> Result<Parts<Message>, Error> {
        if parts.iter().any(|(_, message)| matches!(message, Message::Part { .. })) {
            self.reduce(parts)
        } else {
            self.tell(&parts)
        }
    }
}

/// Deals the tensors out, the largest first, each to whom has least so far.
fn owners(specs: &BTreeMap<TensorId, TensorSpec>, size: u32) -> BTreeMap<TensorId, u32> {
    let mut all: Vec<(usize, &TensorId)> = specs.iter().map(|(id, spec)| (spec.shape.iter().product(), id)).collect();
    all.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    let mut loads = vec![0; size as usize];
    let mut deal = |(n, id): (usize, &TensorId)| {
        let owner = (0..size).min_by_key(|owner| loads[*owner as usize]).unwrap_or(0);
        loads[owner as usize] += n;
        (id.clone(), owner)
    };
    all.into_iter().map(&mut deal).collect()
}

/// One tensor of a part.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Piece {
    /// The part's number.
    number: u32,
    id: TensorId,
    /// Which entries of the tensor; all of them without.
    entries: Option<Vec<u64>>,
    /// The shape; none where nothing was put.
    shape: Option<Vec<usize>>,
}

/// What goes to one process: pieces, and their values one after the other.
#[derive(Debug, Clone, Default)]
struct Share {
    pieces: Vec<Piece>,
    values: Vec<f32>,
}

impl Share {
    fn push(&mut self, number: u32, id: &TensorId, of: &Grads, value: Option<&Tensor>) -> candle_core::Result<()> {
        let entries = match of.want(id) {
            Region::Entries(entries) => Some(entries.to_vec()),
            _ => None,
        };
        if let Some(value) = value {
            if value.dtype() != DType::F32 {
                candle_core::bail!("the gradient of {id} is of {:?}; expected f32", value.dtype());
            }
            self.values.extend(value.flatten_all()?.to_vec1::<f32>()?);
        }
        let shape = value.map(|value| value.dims().to_vec());
        self.pieces.push(Piece { number, id: id.clone(), entries, shape });
        Ok(())
    }
}

/// A head, and numbers after it.
fn pack(head: &impl Serialize, values: &[f32]) -> Result<Vec<u8>, postcard::Error> {
    let head = postcard::to_stdvec(head)?;
    let mut bytes = Vec::with_capacity(8 + head.len() + size_of_val(values));
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(&head);
    for value in values {
        bytes.extend(value.to_le_bytes());
    }
    Ok(bytes)
}

fn unclear(rank: u32, what: &dyn std::fmt::Display) -> Error {
    Error::Unexpected { rank, what: what.to_string() }
}

fn unpack<T: DeserializeOwned>(rank: u32, bytes: &[u8]) -> Result<(T, Vec<f32>), Error> {
    let short = || unclear(rank, &"it ends before its head does");
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| short())?;
    let (head, values) = rest.split_at_checked(length).ok_or_else(short)?;
    let head = postcard::from_bytes(head).map_err(|error| unclear(rank, &error))?;
    let (values, rest) = values.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(unclear(rank, &"its numbers are cut"));
    }
    Ok((head, values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
}

/// Pieces as gradients again, part by part.
fn gathered(rank: u32, pieces: Vec<Piece>, values: Vec<f32>) -> Result<Parts<Grads>, Error> {
    let mut parts: BTreeMap<u32, Grads> = BTreeMap::new();
    let mut values = values.into_iter();
    for Piece { number, id, entries, shape } in pieces {
        let wanted = match entries {
            Some(entries) => Grads::default().and_entries(&BTreeMap::from([(id.clone(), Arc::from(entries))])),
            None => Grads::wanting([id.clone()]),
        };
        let part = parts.entry(number).or_default();
        part.widen(&wanted);
        let Some(shape) = shape else { continue };
        let n = shape.iter().product();
        let own: Vec<f32> = values.by_ref().take(n).collect();
        let tensor = Tensor::from_vec(own, shape, &Device::Cpu).map_err(|error| unclear(rank, &error))?;
        part.put(&id, &tensor).map_err(|error| unclear(rank, &error))?;
    }
    Ok(parts.into_iter().collect())
}

/// Tensors of a step rule's as bytes and back, in the format of their files.
pub(crate) mod said {
    use attune_points::engine::Tensors;
    use candle_core::Device;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(crate) fn serialize<S: Serializer>(tensors: &Tensors, serializer: S) -> Result<S::Ok, S::Error> {
        safetensors::serialize(tensors, None).map_err(S::Error::custom)?.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Tensors, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        let loaded = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(D::Error::custom)?;
        Ok(loaded.into_iter().collect())
    }
}
