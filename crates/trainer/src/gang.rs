//! Processes that train one job together, each on a worker of its own.
//!
//! Everything that ranks send one another crosses the wire as bytes. Gradients go another way than the rest: each tensor has
//! one process that owns it, which gets the parts of all and adds them up in the order of their numbers. For a plain step it
//! keeps the sum, has the tensor's optimiser buffers, makes the new value and gives that to all (as ZeRO's second stage
//! does, Rajbhandari et al. 2020): gradients and optimiser state are then in one process each, and what is found of one micro-batch
//! travels while the next one is computed. For a step rule that looks at gradients the sums are given to all. The bits are those that
//! one process alone makes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use attune_collective::way::{self, Way};
use attune_collective::{Collective, Error, Heard, Letters, Listening, LocalRank, Parts, Patience, Wire, in_order};
use attune_points::engine::LossReport;
use attune_points::{GradSink as _, Grads, Region, TensorId, TensorSpec};
use attune_spec::id::Digest;
use attune_tensor::bytes;
use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::engine::{Message, Wishes};
use crate::guard::Squares;
use crate::protocol::{Event, Request, Seat};

/// Meets the other processes of a run. They are told of this one through `control`, and it of them. Nothing if the run is
/// asked to stop before. `card` is the number of this one's NVIDIA device, if it works on one.
///
/// # Errors
/// Nobody else is heard of, or one cannot be reached.
pub(crate) fn join(
    seat: &Seat,
    card: Option<u32>,
    control: &dyn Control,
) -> Result<Option<Box<dyn Wire>>, crate::Error> {
    let listening = Listening::bind(seat.host).map_err(crate::Error::io(format!("a port of {}", seat.host)))?;
    fail::fail_point!("trainer::before_meeting");
    let Some(peers) = control.meet(&listening.peer())? else { return Ok(None) };
    let Way { wire, words } = way::over(listening.join(seat.rank, &peers, Patience::default())?, card)?;
    if card.is_some() && seat.rank == 0 {
        control.emit(Event::Note { topic: "link".to_owned(), message: words });
    }
    Ok(Some(wire))
}

/// What must be the same in all processes, or their sums would not be those of one.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Likeness {
    plan: Digest,
    ranks: u32,
    code_version: String,
    kernel_profile: String,
}

/// A wire on a thread of its own: what is sent travels while this process computes.
struct Line {
    say: Sender<Letters>,
    hear: Receiver<Result<Heard, Error>>,
}

impl Line {
    fn over(mut wire: Box<dyn Wire>) -> Self {
        let ((say, said), (tell, hear)) = (channel(), channel());
        std::thread::spawn(move || {
            for letters in said {
                if tell.send(wire.exchange(letters)).is_err() {
                    return;
                }
            }
        });
        Self { say, hear }
    }

    /// Begins an exchange.
    fn start(&self, letters: Letters) {
        // A thread that is gone has nothing to hear either, which is found there.
        let _ = self.say.send(letters);
    }

    /// What comes of the exchange that was begun first.
    fn finish(&self) -> Result<Heard, Error> {
        self.hear.recv().unwrap_or_else(|_| Err(unclear(0, &"the thread of the wire is gone")))
    }
}

/// The sum of a step's parts, while it is made. Round by round each process gives one part, or none.
#[derive(Default)]
struct Sum {
    wishes: Wishes,
    /// Rounds that were begun.
    begun: u32,
    /// Whether the last of them is on its way.
    is_travelling: bool,
    /// The sums so far of the tensors that this process owns.
    gradients: Grads,
    report: LossReport,
    agreed: Wishes,
}

/// This process's place among those of a run.
pub(crate) struct Gang {
    line: Line,
    rank: u32,
    size: u32,
    /// Who adds up which tensor.
    owners: BTreeMap<TensorId, u32>,
    exchange: u64,
    sum: Sum,
    /// How long each process was waited for.
    waits: Vec<Duration>,
}

/// What an engine needs of the ranks beside its own.
pub(crate) trait Ranks: Collective<Message> {
    /// The gang, where each rank is a process of its own: it shares the work of updates.
    fn gang(&mut self) -> Option<&mut Gang> {
        None
    }
}

impl Ranks for LocalRank<Message> {}

impl Ranks for Gang {
    fn gang(&mut self) -> Option<&mut Gang> {
        Some(self)
    }
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
        let (rank, size) = (wire.rank(), wire.size());
        let (owners, line) = (owners(specs, size), Line::over(wire));
        let mut gang = Self { line, rank, size, owners, exchange: 0, sum: Sum::default(), waits: Vec::new() };
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

    /// Sends letters, and waits for what all send.
    fn send(&mut self, letters: Letters) -> Result<Vec<Vec<u8>>, Error> {
        if self.sum.is_travelling {
            return Err(self.unsent(&"a part of a sum is on its way"));
        }
        self.exchange += 1;
        self.line.start(letters);
        self.heard()
    }

    /// What comes of the exchange that was begun first.
    fn heard(&mut self) -> Result<Vec<Vec<u8>>, Error> {
        let Heard { letters, waits } = self.line.finish()?;
        self.waits.resize(waits.len(), Duration::ZERO);
        self.waits.iter_mut().zip(waits).for_each(|(sum, wait)| *sum += wait);
        Ok(letters)
    }

    /// What each process says, by number, where each says one thing to all.
    fn tell_all<T: Serialize + DeserializeOwned>(&mut self, own: &T) -> Result<Vec<T>, Error> {
        let bytes = postcard::to_stdvec(own).map_err(|error| self.unsent(&error))?;
        let heard = self.send(Letters::All(bytes))?;
        let read = |(rank, bytes): (u32, Vec<u8>)| postcard::from_bytes(&bytes).map_err(|error| unclear(rank, &error));
        (0..).zip(heard).map(read).collect()
    }

    fn unsent(&self, error: &dyn std::fmt::Display) -> Error {
        unclear(self.rank, &format_args!("what it has to say cannot be sent: {error}"))
    }

    /// The parts of all processes.
    fn tell(&mut self, parts: &Parts<Message>) -> Result<Parts<Message>, Error> {
        let all = self.tell_all(parts)?.into_iter().flatten().collect();
        in_order(all, self.exchange)
    }

    /// The sum of all parts, as if it were the only one.
    fn reduce(&mut self, parts: Parts<Message>) -> Result<Parts<Message>, Error> {
        let (mut reports, mut shares) = (Vec::new(), vec![Share::default(); self.size as usize]);
        for (number, message) in parts {
            let Message::Part { gradients, report, wishes } = message else {
                return Err(self.unsent(&"a gradient and something else go together"));
            };
            reports.push((number, report, wishes));
            self.deal(number, &gradients, &mut shares)?;
        }
        let letters = self.sealed(&reports, shares)?;
        drop(reports);
        let heard = self.send(letters)?;
        let (mut told, mut mine) = (Vec::new(), Vec::new());
        for (rank, bytes) in (0..).zip(heard) {
            let ((reports, pieces), values): (Told<Vec<Numbered>>, _) = unpack(rank, &bytes)?;
            told.extend(reports.into_iter().map(|(number, report, wishes)| (number, (report, wishes))));
            mine.extend(gathered(rank, pieces, values)?);
        }
        let told = in_order(told, self.exchange)?;
        let mine = in_order(mine, self.exchange)?;
        let mut sum = Grads::default();
        for (_, part) in &mine {
            add(&mut sum, part)?;
        }
        drop(mine);
        let mut share = Share::default();
        for (id, value) in sum.iter() {
            share.push(0, id, entries(&sum, id), value).map_err(|error| self.unsent(&error))?;
        }
        drop(sum);
        let mut gradients = Grads::default();
        for (rank, bytes) in (0..).zip(self.tell_share(share)?) {
            let ((_, pieces), values): (Told<()>, _) = unpack(rank, &bytes)?;
            for (_, sums) in gathered(rank, pieces, values)? {
                add(&mut gradients, &sums)?;
            }
        }
        let (mut report, mut wishes) = (LossReport::default(), Wishes::default());
        for (_, (part, wish)) in told {
            report.add(&part);
            wishes |= wish;
        }
        Ok(vec![(0, Message::Part { gradients, report, wishes })])
    }

    /// Deals a part's gradients out to those who own the tensors.
    fn deal(&self, number: u32, gradients: &Grads, shares: &mut [Share]) -> Result<(), Error> {
        for (id, value) in gradients.iter() {
            let share = &mut shares[self.owner(id) as usize];
            share.push(number, id, entries(gradients, id), value).map_err(|error| self.unsent(&error))?;
        }
        Ok(())
    }

    /// What is said beside each share.
    fn sealed(&self, said: &impl Serialize, shares: Vec<Share>) -> Result<Letters, Error> {
        let seal = |share: Share| share.sealed(said).map_err(|error| self.unsent(&error));
        Ok(Letters::Each(shares.into_iter().map(seal).collect::<Result<_, _>>()?))
    }

    /// Gives all the same share, and what all give.
    fn tell_share(&mut self, share: Share) -> Result<Vec<Vec<u8>>, Error> {
        let letter = share.sealed(&()).map_err(|error| self.unsent(&error))?;
        self.send(Letters::All(letter))
    }

    /// Begins the sum of a step, with what this process was asked for.
    pub(crate) fn begin(&mut self, wishes: Wishes) {
        self.sum = Sum { wishes, ..Sum::default() };
    }

    /// Gives a part of this process, in the order of their numbers: it travels while the next one is found.
    pub(crate) fn give(&mut self, part: u32, gradients: Grads, report: LossReport) -> Result<(), Error> {
        let round = part / self.size;
        if part % self.size != self.rank || round < self.sum.begun {
            return Err(self.unsent(&format_args!("part {part} is not the next one of it")));
        }
        while self.sum.begun < round {
            self.round(None)?;
        }
        self.round(Some((gradients, report)))
    }

    fn round(&mut self, part: Option<(Grads, LossReport)>) -> Result<(), Error> {
        self.take_in()?;
        let (mut shares, mut told) = (vec![Share::default(); self.size as usize], None);
        if let Some((gradients, report)) = part {
            self.deal(self.sum.begun * self.size + self.rank, &gradients, &mut shares)?;
            told = Some(report);
        }
        let letters = self.sealed(&(told, self.sum.wishes), shares)?;
        self.exchange += 1;
        self.line.start(letters);
        self.sum.begun += 1;
        self.sum.is_travelling = true;
        Ok(())
    }

    /// Adds up the round that is on its way.
    fn take_in(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.sum.is_travelling) {
            return Ok(());
        }
        for (rank, bytes) in (0..).zip(self.heard()?) {
            let (((report, wishes), pieces), values): (Told<(Option<LossReport>, Wishes)>, _) = unpack(rank, &bytes)?;
            self.sum.agreed |= wishes;
            if let Some(report) = report {
                self.sum.report.add(&report);
            }
            for (_, part) in gathered(rank, pieces, values)? {
                add(&mut self.sum.gradients, &part)?;
            }
        }
        Ok(())
    }

    /// Ends the sum of a step of `n_parts`: what the tensors of this process come to, the loss, and what anybody was asked for.
    pub(crate) fn end(&mut self, n_parts: u32) -> Result<(Grads, LossReport, Wishes), Error> {
        while self.sum.begun < n_parts / self.size {
            self.round(None)?;
        }
        self.take_in()?;
        let Sum { gradients, report, agreed, .. } = std::mem::take(&mut self.sum);
        Ok((gradients, report, agreed))
    }

    /// What all processes found of their tensors.
    pub(crate) fn all_squares(&mut self, own: &Squares) -> Result<Squares, Error> {
        Ok(self.tell_all(own)?.into_iter().flatten().collect())
    }

    /// The values that the other processes have made of their tensors; of `values` it gives them those of its own.
    pub(crate) fn all_values<'t>(
        &mut self,
        values: impl Iterator<Item = (&'t TensorId, &'t Tensor)>,
    ) -> Result<Vec<(TensorId, Tensor)>, Error> {
        let mut share = Share::default();
        for (id, value) in values.filter(|(id, _)| self.has(id)) {
            share.push(0, id, None, Some(value)).map_err(|error| self.unsent(&error))?;
        }
        let own = self.rank;
        let mut all = Vec::new();
        for (rank, bytes) in (0..).zip(self.tell_share(share)?).filter(|(rank, _)| *rank != own) {
            let ((_, pieces), values): (Told<()>, _) = unpack(rank, &bytes)?;
            for (_, values) in gathered(rank, pieces, values)? {
                all.extend(values.iter().filter_map(|(id, value)| Some((id.clone(), value?.clone()))));
            }
        }
        Ok(all)
    }

    /// Numbers that the owner of a tensor has, for the process that leads; nothing for the others. All call it, one tensor
    /// after the other.
    pub(crate) fn for_leader(&mut self, id: &TensorId, own: Option<&[f32]>) -> Result<Option<Vec<f32>>, Error> {
        let owner = self.owner(id);
        if owner == 0 {
            return Ok(own.filter(|_| self.rank == 0).map(<[f32]>::to_vec));
        }
        let own = own.filter(|_| owner == self.rank).map(|own| bytes::of_f32(own).into_owned());
        // The rest is nobody's and empty.
        let heard = self.send(Letters::Each(own.into_iter().collect()))?;
        Ok((self.rank == 0).then(|| bytes::to_f32(&heard[owner as usize])))
    }

    /// Whether a tensor is this process's to update.
    pub(crate) fn has(&self, id: &TensorId) -> bool {
        self.owner(id) == self.rank
    }

    /// Who adds up a tensor: also one that is no parameter of the run, of which all processes must think alike.
    fn owner(&self, id: &TensorId) -> u32 {
        self.owners.get(id).copied().unwrap_or_else(|| {
            let hash = blake3::hash(format!("{:?} {id}", id.owner).as_bytes());
            u32::from_le_bytes(hash.as_bytes()[..4].try_into().unwrap_or_default()) % self.size
        })
    }
}

impl Collective<Message> for Gang {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    /// Of gradients, the sum of the parts in place of them.
    fn exchange(&mut self, parts: Parts<Message>) -> Result<Parts<Message>, Error> {
        if parts.iter().any(|(_, message)| matches!(message, Message::Part { .. })) {
            self.reduce(parts)
        } else {
            self.tell(&parts)
        }
    }

    fn take_waits(&mut self) -> Vec<Duration> {
        std::mem::take(&mut self.waits)
    }
}

/// `sum + part`, also of what only the part has.
fn add(sum: &mut Grads, part: &Grads) -> Result<(), Error> {
    sum.widen(part);
    sum.add(part).map_err(|error| unclear(0, &error))
}

/// Which entries of a tensor a gradient is of; all of them without.
fn entries<'g>(of: &'g Grads, id: &TensorId) -> Option<&'g [u64]> {
    match of.want(id) {
        Region::Entries(entries) => Some(entries),
        _ => None,
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

/// What a process has to say of its parts, and the pieces of gradients that it sends.
type Told<T> = (T, Vec<Piece>);

/// The loss of a part, and what its rank was asked for.
type Numbered = (u32, LossReport, Wishes);

/// What goes to one process: pieces, and the bytes of their values one after the other.
#[derive(Debug, Clone, Default)]
struct Share {
    pieces: Vec<Piece>,
    values: Vec<u8>,
}

impl Share {
    fn push(
        &mut self,
        number: u32,
        id: &TensorId,
        entries: Option<&[u64]>,
        value: Option<&Tensor>,
    ) -> candle_core::Result<()> {
        if let Some(value) = value {
            if value.dtype() != DType::F32 {
                candle_core::bail!("{id} is of {:?}; expected f32", value.dtype());
            }
            self.values.extend_from_slice(&bytes::of_f32(&value.flatten_all()?.to_vec1::<f32>()?));
        }
        let (entries, shape) = (entries.map(<[u64]>::to_vec), value.map(|value| value.dims().to_vec()));
        self.pieces.push(Piece { number, id: id.clone(), entries, shape });
        Ok(())
    }

    /// The values, then what is said and which pieces they are of, then how long that is: the values stay where they are.
    fn sealed(mut self, said: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
        let head = postcard::to_stdvec(&(said, &self.pieces))?;
        self.values.extend_from_slice(&head);
        self.values.extend((head.len() as u64).to_le_bytes());
        Ok(self.values)
    }
}

fn unclear(rank: u32, what: &dyn std::fmt::Display) -> Error {
    Error::Unexpected { rank, what: what.to_string() }
}

/// What a [`Share`] was sealed to: what is said, and the bytes of values.
fn unpack<T: DeserializeOwned>(rank: u32, letter: &[u8]) -> Result<(T, &[u8]), Error> {
    let short = || unclear(rank, &"it is shorter than it says");
    let (rest, length) = letter.split_last_chunk::<8>().ok_or_else(short)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| short())?;
    let (values, head) = rest.split_at(rest.len().checked_sub(length).ok_or_else(short)?);
    Ok((postcard::from_bytes(head).map_err(|error| unclear(rank, &error))?, values))
}

/// Pieces as gradients again, part by part.
fn gathered(rank: u32, pieces: Vec<Piece>, values: &[u8]) -> Result<Parts<Grads>, Error> {
    let mut parts: BTreeMap<u32, Grads> = BTreeMap::new();
    let mut values = values;
    for Piece { number, id, entries, shape } in pieces {
        let wanted = match entries {
            Some(entries) => Grads::default().and_entries(&BTreeMap::from([(id.clone(), Arc::from(entries))])),
            None => Grads::wanting([id.clone()]),
        };
        let part = parts.entry(number).or_default();
        part.widen(&wanted);
        let Some(shape) = shape else { continue };
        let n_bytes = shape.iter().product::<usize>() * size_of::<f32>();
        let (own, rest) = values.split_at_checked(n_bytes).ok_or_else(|| unclear(rank, &"its values are too few"))?;
        values = rest;
        let tensor =
            Tensor::from_vec(bytes::to_f32(own), shape, &Device::Cpu).map_err(|error| unclear(rank, &error))?;
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
