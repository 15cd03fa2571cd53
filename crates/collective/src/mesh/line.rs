//! One connection of the mesh: frames out, frames in, and what became of who is at its other end.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Patience;
use crate::Heard;
use crate::error::{Checksum, Error};

/// A frame: the number of its exchange, the length of what follows, and what both and that hash to. Nothing but a number,
/// [`ALIVE`], says that the process lives.
const HEADER: usize = 32;
/// The number of a frame that belongs to no exchange.
const ALIVE: u64 = u64::MAX;
/// Bytes that are made room for before they have come.
const AT_ONCE: usize = 16 << 20;

/// The end of a connection that is written to.
#[derive(Debug)]
pub(super) struct Line {
    stream: TcpStream,
}

impl Line {
    /// Takes a connection that was greeted; what comes in goes to the inbox.
    pub(super) fn open(stream: TcpStream, rank: u32, silence: Duration, inbox: &Arc<Inbox>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(silence))?;
        stream.set_write_timeout(Some(silence))?;
        let (reading, inbox) = (stream.try_clone()?, Arc::clone(inbox));
        std::thread::spawn(move || read(reading, rank, &inbox));
        Ok(Self { stream })
    }

    pub(super) fn say(&mut self, exchange: u64, what: &[u8]) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&exchange.to_le_bytes());
        header[8..16].copy_from_slice(&(what.len() as u64).to_le_bytes());
        let checksum = checksum(&header[..16], what);
        header[16..].copy_from_slice(&checksum.0);
        self.stream.write_all(&header)?;
        self.stream.write_all(what)
    }

    pub(super) fn say_alive(&mut self) -> io::Result<()> {
        self.say(ALIVE, &[])
    }

    pub(super) fn close(&self, how: Shutdown) {
        // It may have been closed from the other side.
        drop(self.stream.shutdown(how));
    }
}

/// What a frame hashes to. The checksum of TCP is of 16 bits, and made anew by whatever passes packets on.
pub(crate) fn checksum(head: &[u8], what: &[u8]) -> Checksum {
    let mut hash = blake3::Hasher::new();
    hash.update(head).update(what);
    let mut checksum = [0; 16];
    hash.finalize_xof().fill(&mut checksum);
    Checksum(checksum)
}

fn read(mut stream: TcpStream, rank: u32, inbox: &Inbox) {
    loop {
        match read_frame(&mut stream) {
            Ok(Frame { sent, came, .. }) if sent != came => return inbox.lose(rank, Lost::Damaged { sent, came }),
            Ok(Frame { number: ALIVE, .. }) => {}
            Ok(Frame { number, bytes, .. }) => inbox.put(rank, number, bytes),
            Err(error) => {
                let is_silent = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                return inbox.lose(rank, if is_silent { Lost::Silent } else { Lost::Gone });
            }
        }
    }
}

struct Frame {
    number: u64,
    bytes: Vec<u8>,
    sent: Checksum,
    came: Checksum,
}

fn read_frame(stream: &mut TcpStream) -> io::Result<Frame> {
    let (mut head, mut number, mut length, mut sent) = ([0; 16], [0; 8], [0; 8], [0; 16]);
    stream.read_exact(&mut head)?;
    stream.read_exact(&mut sent)?;
    number.copy_from_slice(&head[..8]);
    length.copy_from_slice(&head[8..]);
    let length = u64::from_le_bytes(length);
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(AT_ONCE).min(AT_ONCE));
    if stream.take(length).read_to_end(&mut bytes)? as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let came = checksum(&head, &bytes);
    Ok(Frame { number: u64::from_le_bytes(number), bytes, sent: Checksum(sent), came })
}

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// Its connection is closed.
    Gone,
    /// It says nothing any more.
    Silent,
    /// What it said came as something else: nothing after that can be told apart.
    Damaged { sent: Checksum, came: Checksum },
}

impl Lost {
    fn error(self, rank: u32, exchange: u64, silence: Duration) -> Error {
        match self {
            Self::Gone => Error::Gone { rank, exchange },
            Self::Silent => Error::Silent { rank, exchange, within: silence },
            Self::Damaged { sent, came } => Error::Damaged { rank, exchange, sent, came },
        }
    }
}

#[derive(Debug, Default)]
struct Of {
    /// Number, moment of coming, and bytes.
    frames: VecDeque<(u64, Instant, Vec<u8>)>,
    lost: Option<Lost>,
}

/// What has come from the other processes.
#[derive(Debug)]
pub(super) struct Inbox {
    heard: Mutex<Vec<Of>>,
    changed: Condvar,
}

impl Inbox {
    pub(super) fn new(size: usize) -> Self {
        Self { heard: Mutex::new((0..size).map(|_| Of::default()).collect()), changed: Condvar::new() }
    }

    /// Each change is one assignment: a thread that panicked left whole values behind.
    fn lock(&self) -> MutexGuard<'_, Vec<Of>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, rank: u32, number: u64, bytes: Vec<u8>) {
        self.lock()[rank as usize].frames.push_back((number, Instant::now(), bytes));
        self.changed.notify_all();
    }

    fn lose(&self, rank: u32, lost: Lost) {
        self.lock()[rank as usize].lost = Some(lost);
        self.changed.notify_all();
    }

    /// What became of a process, if anything did.
    pub(super) fn lost(&self, rank: u32, exchange: u64, silence: Duration) -> Option<Error> {
        self.lock()[rank as usize].lost.map(|lost| lost.error(rank, exchange, silence))
    }

    /// What each process but `own` sent to an exchange, once all have. What was sent before its sender was lost counts.
    pub(super) fn take(&self, own: u32, number: u64, patience: Patience) -> Result<Heard, Error> {
        let start = Instant::now();
        let give_up = start + patience.exchange;
        let mut heard = self.lock();
        loop {
            let missing = (0..).zip(&*heard).filter(|(rank, of)| *rank != own && of.frames.is_empty());
            let (mut missing, mut lost) = (missing.peekable(), None);
            let Some((first, _)) = missing.peek().copied() else { break };
            for (rank, of) in missing {
                lost = lost.or_else(|| of.lost.map(|lost| (rank, lost)));
            }
            if let Some((rank, lost)) = lost {
                return Err(lost.error(rank, number, patience.silence));
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Late { rank: first, exchange: number, within: patience.exchange });
            }
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut all = Heard { letters: vec![Vec::new(); heard.len()], waits: vec![Duration::ZERO; heard.len()] };
        for (rank, of) in (0..).zip(heard.iter_mut()) {
            match of.frames.pop_front() {
                Some((found, came, bytes)) if found == number => {
                    all.letters[rank as usize] = bytes;
                    all.waits[rank as usize] = came.saturating_duration_since(start);
                }
                Some((found, ..)) => {
                    let what = format!("it is at exchange {found}, this one at {number}");
                    return Err(Error::Unexpected { rank, what });
                }
                None => {}
            }
        }
        Ok(all)
    }
}
