//! Ranks that are processes, on one node or several: a connection between each two of them.
//!
//! Each process listens on a port of its own and is told of the others by whoever started them ([`Peer`]). A process that
//! dies closes its connections, which the others see at once; one that hangs, or that the network cuts off, does not say
//! that it lives any more, which they see after [`Patience::silence`].
//!
//! All sums are made by who receives the parts, in the order of the shards: the mesh moves bytes and adds nothing up.

#![expect(clippy::disallowed_methods, reason = "a wire has deadlines, and waits for who is not there yet")]

mod greeting;
mod line;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::{Heard, Letters, Wire};
pub(crate) use line::checksum;
use line::{Inbox, Line};

/// Wait between tries to reach a process, and between looks for one that connects.
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// Longest wait for a word of a greeting.
const GREETING: Duration = Duration::from_secs(5);
/// Strangers whose greetings are waited for at once.
const GREETINGS_MAX: usize = 64;

/// Where a process of a run listens, and what proves to it that somebody belongs to the run.
#[derive(Clone, PartialEq, Eq)]
pub struct Peer {
    /// The address.
    pub address: SocketAddr,
    /// The proof: random, for this run alone.
    pub token: [u8; greeting::SECRET],
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("address", &self.address).finish_non_exhaustive()
    }
}

/// How long is waited, for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For all processes to be met.
    pub join: Duration,
    /// For a sign of life of each.
    pub silence: Duration,
    /// For one that lives to come to an exchange.
    pub exchange: Duration,
}

impl Default for Patience {
    /// A minute to meet, ten seconds without a sign of life, an hour to come to an exchange: steps may be long, and whoever
    /// started a process knows better when it hangs.
    fn default() -> Self {
        Self { join: Duration::from_secs(60), silence: Duration::from_secs(10), exchange: Duration::from_secs(3600) }
    }
}

/// A process's open port, before it knows the others.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    own: Peer,
}

impl Listening {
    /// Listens on a free port of `host`, under a new token.
    ///
    /// # Errors
    /// The system's: the address is not of this machine, or there is no port.
    pub fn bind(host: IpAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((host, 0))?;
        listener.set_nonblocking(true)?;
        let mut token = [0; greeting::SECRET];
        getrandom::fill(&mut token).map_err(|error| io::Error::other(error.to_string()))?;
        let own = Peer { address: listener.local_addr()?, token };
        Ok(Self { listener, own })
    }

    /// What the others must be told.
    pub fn peer(&self) -> Peer {
        self.own.clone()
    }

    /// Meets the other processes. `peers` are all of them by number, this one's own at `rank`. Each connects to those with
    /// smaller numbers. Strangers are turned away and change nothing.
    ///
    /// # Errors
    /// [`Error::Unmet`] if one is not met in time.
    pub fn join(self, rank: u32, peers: &[Peer], patience: Patience) -> Result<Mesh, Error> {
        let give_up = Instant::now() + patience.join;
        let own = (rank, &self.own);
        let n_above = peers.len().saturating_sub(rank as usize + 1);
        let mut streams: Vec<Option<TcpStream>> = peers.iter().map(|_| None).collect();
        // Whoever has connected waits for an answer while this one still connects: both go on at once.
        let (met, below) = std::thread::scope(|scope| {
            let above = scope.spawn(|| accept(&self.listener, own, peers, n_above, give_up));
            let reach = |(number, peer)| Ok((number, reach(own, (number, peer), give_up, patience.join)?));
            let below: Result<Vec<_>, Error> = (0..rank).zip(peers).map(reach).collect();
            (above.join().unwrap_or_default(), below)
        });
        for (number, stream) in below?.into_iter().chain(met) {
            streams[number as usize] = Some(stream);
        }
        let missing = (0..).zip(&streams).find(|(number, stream)| *number != rank && stream.is_none());
        if let Some((missing, _)) = missing {
            let why = "it did not connect".to_owned();
            return Err(Error::Unmet { rank: missing, within: patience.join, why });
        }
        let unusable = |number: u32| {
            move |error: io::Error| Error::Unmet { rank: number, within: patience.join, why: error.to_string() }
        };
        let inbox = Arc::new(Inbox::new(peers.len()));
        let mut lines = Vec::with_capacity(peers.len());
        for (number, stream) in (0..).zip(streams) {
            let line = stream.map(|stream| Line::open(stream, number, patience.silence, &inbox));
            lines.push(line.transpose().map_err(unusable(number))?.map(Mutex::new));
        }
        Ok(Mesh::new(rank, lines, inbox, patience))
    }
}

/// Connects to a process, trying again until it listens.
fn reach(own: (u32, &Peer), to: (u32, &Peer), give_up: Instant, within: Duration) -> Result<TcpStream, Error> {
    loop {
        let left = give_up.saturating_duration_since(Instant::now()).max(TRY_AGAIN);
        let tried = TcpStream::connect_timeout(&to.1.address, left).and_then(|mut stream| {
            stream.set_read_timeout(Some(left))?;
            stream.set_write_timeout(Some(left))?;
            greeting::greet(&mut stream, own, to)?;
            Ok(stream)
        });
        match tried {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= give_up => {
                return Err(Error::Unmet { rank: to.0, within, why: error.to_string() });
            }
            Err(_) => std::thread::sleep(TRY_AGAIN),
        }
    }
}

/// Lets in the processes that are expected, until all are there or time is over.
fn accept(
    listener: &TcpListener,
    own: (u32, &Peer),
    peers: &[Peer],
    n_expected: usize,
    give_up: Instant,
) -> BTreeMap<u32, TcpStream> {
    let (all, own): (Arc<[Peer]>, _) = (peers.into(), (own.0, own.1.clone()));
    let (tell, told) = channel();
    let (mut met, greetings) = (BTreeMap::new(), Arc::new(()));
    while met.len() < n_expected && Instant::now() < give_up {
        // Who connects again has given the connection before up.
        met.extend(told.try_iter());
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(TRY_AGAIN);
            continue;
        };
        if Arc::strong_count(&greetings) > GREETINGS_MAX {
            continue;
        }
        let (all, own, tell, counted) = (Arc::clone(&all), own.clone(), tell.clone(), Arc::clone(&greetings));
        // One that says nothing holds up nobody: its thread ends when its time is over.
        std::thread::spawn(move || {
            let answered = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(GREETING)))
                .and_then(|()| stream.set_write_timeout(Some(GREETING)))
                .and_then(|()| greeting::answer(&mut stream, (own.0, &own.1), &all));
            if let Ok(rank) = answered {
                // Nobody asks any more once all are met.
                let _ = tell.send((rank, stream));
            }
            drop(counted);
        });
    }
    met
}

/// A process of a run that is joined to all others.
#[derive(Debug)]
pub struct Mesh {
    rank: u32,
    /// A line to each process but this one.
    lines: Arc<[Option<Mutex<Line>>]>,
    inbox: Arc<Inbox>,
    patience: Patience,
    exchange: u64,
    /// Ends the thread that says that this process lives, when it is dropped.
    _alive: SyncSender<()>,
}

impl Mesh {
    fn new(rank: u32, lines: Vec<Option<Mutex<Line>>>, inbox: Arc<Inbox>, patience: Patience) -> Self {
        let (alive, ended) = sync_channel(0);
        let lines: Arc<[_]> = lines.into();
        let spoken = Arc::clone(&lines);
        std::thread::spawn(move || say_alive(&spoken, &ended, patience.silence / 5));
        Self { rank, lines, inbox, patience, exchange: 0, _alive: alive }
    }
}

/// Says again and again that this process lives, on lines on which nothing else is being said.
fn say_alive(lines: &[Option<Mutex<Line>>], ended: &Receiver<()>, every: Duration) {
    while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        for line in lines.iter().flatten() {
            if let Ok(mut line) = line.try_lock() {
                // One that is gone is found by whoever waits for it.
                let _ = line.say_alive();
            }
        }
    }
}

impl Mesh {
    /// How long is waited, for what.
    pub const fn patience(&self) -> Patience {
        self.patience
    }

    /// The number of the exchange that comes next.
    pub const fn next_exchange(&self) -> u64 {
        self.exchange
    }

    /// What became of the first process that is not there any more, if there is one: for who waits for something else than the
    /// mesh.
    pub fn lost(&self) -> Option<Error> {
        (0..self.size()).find_map(|rank| self.inbox.lost(rank, self.exchange, self.patience.silence))
    }
}

impl Wire for Mesh {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.lines.len() as u32
    }

    fn exchange(&mut self, mut letters: Letters) -> Result<Heard, Error> {
        let (size, own, number) = (self.lines.len(), self.rank as usize, self.exchange);
        self.exchange += 1;
        // Each begins with its neighbour, so that not all write to the same one at once.
        for peer in (1..size).map(|offset| (own + offset) % size) {
            let Some(line) = &self.lines[peer] else { continue };
            let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
            if line.say(number, &letters.take(peer)).is_err() {
                // What was heard of it says better what became of it.
                let lost = self.inbox.lost(peer as u32, number, self.patience.silence);
                return Err(lost.unwrap_or(Error::Gone { rank: peer as u32, exchange: number }));
            }
        }
        let mut heard = self.inbox.take(self.rank, number, self.patience)?;
        heard.letters[own] = letters.take(own).into_owned();
        Ok(heard)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for line in self.lines.iter().flatten() {
            line.lock().unwrap_or_else(PoisonError::into_inner).close(Shutdown::Both);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
