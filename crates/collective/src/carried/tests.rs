use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Barrier, Mutex};

use super::*;
use crate::mesh::Patience;
use crate::mesh::tests::{patience, run};

/// Long letters over channels between threads.
pub(crate) struct Pipes {
    to: BTreeMap<u32, Sender<Vec<u8>>>,
    from: BTreeMap<u32, Receiver<Vec<u8>>>,
    /// What it does to a letter that it sends.
    spoil: fn(&mut Vec<u8>),
    /// Letters that it has sent.
    n_sent: usize,
}

impl Pipes {
    /// The ends of all of `size` processes.
    pub(crate) fn all(size: u32, spoil: fn(&mut Vec<u8>)) -> Vec<Self> {
        let new = || Self { to: BTreeMap::new(), from: BTreeMap::new(), spoil, n_sent: 0 };
        let mut all: Vec<Self> = (0..size).map(|_| new()).collect();
        for (from, to) in (0..size).flat_map(|from| (0..size).map(move |to| (from, to))) {
            let (sender, receiver) = channel();
            all[from as usize].to.insert(to, sender);
            all[to as usize].from.insert(from, receiver);
        }
        all
    }
}

impl Link for Pipes {
    fn name(&self) -> &'static str {
        "a pipe"
    }

    fn carry(&mut self, out: &[Letter<'_>], into: &mut [(u32, Vec<u8>)], watch: &mut Watch<'_>) -> Result<(), Stopped> {
        for (rank, letter) in out {
            let mut letter = letter.to_vec();
            (self.spoil)(&mut letter);
            self.n_sent += 1;
            self.to[rank].send(letter).map_err(|_| Stopped::Failed("the pipe is broken".to_owned()))?;
        }
        for (rank, place) in into {
            let came = loop {
                match self.from[rank].try_recv() {
                    Ok(came) => break came,
                    Err(TryRecvError::Empty) => watch()?,
                    Err(TryRecvError::Disconnected) => {
                        return Err(Stopped::Failed("the pipe is broken".to_owned()));
                    }
                }
                pause();
            };
            assert_eq!(came.len(), place.len(), "places have the lengths of what comes");
            *place = came;
        }
        Ok(())
    }
}

/// Runs `work` on every process of a mesh with pipes, each on a thread.
fn carried<R: Send>(
    size: u32,
    patience: Patience,
    spoil: fn(&mut Vec<u8>),
    work: impl Fn(Carried<Pipes>) -> R + Sync,
) -> Vec<R> {
    let ends = Mutex::new(Pipes::all(size, spoil).into_iter().map(Some).collect::<Vec<_>>());
    run(size, patience, |mesh| {
        let end = ends.lock().unwrap()[mesh.rank() as usize].take().unwrap();
        work(Carried::new(mesh, end))
    })
}

#[test]
fn each_gets_what_each_sent_whichever_way_it_goes() {
    // Empty, short, the longest short one, the shortest long one, long.
    let lengths = [0, 1000, SHORT, SHORT + 1, 5 * SHORT + 7];
    for size in [1, 2, 3, 4] {
        let all = carried(
            size,
            patience(20_000),
            |_| (),
            |mut wire| {
                let rank = wire.rank();
                let letter = |from: u32, to: u32, round: u32| {
                    vec![(from * 16 + to + round) as u8; lengths[((from + 2 * to + round) % 5) as usize]]
                };
                for round in 0..10 {
                    let each = (0..size).map(|to| letter(rank, to, round)).collect();
                    let heard = wire.exchange(Letters::Each(each)).unwrap().letters;
                    let expected: Vec<Vec<u8>> = (0..size).map(|from| letter(from, rank, round)).collect();
                    assert!(heard == expected, "process {rank} of {size}, round {round}");
                }
                for length in lengths {
                    let heard = wire.exchange(Letters::All(vec![rank as u8; length])).unwrap().letters;
                    let expected: Vec<Vec<u8>> = (0..size).map(|from| vec![from as u8; length]).collect();
                    assert!(heard == expected, "process {rank} of {size}, {length} bytes to all");
                }
                // The last processes may get no letter.
                let heard = wire.exchange(Letters::Each(vec![vec![rank as u8; 3 * SHORT]])).unwrap().letters;
                let expected = if rank == 0 { 3 * SHORT } else { 0 };
                assert!((0..).zip(heard).all(|(from, letter)| letter == vec![from as u8; expected]), "process {rank}");
                assert!(wire.exchange(Letters::Each(Vec::new())).unwrap().letters.iter().all(Vec::is_empty));
                // Of an exchange in which one process alone has something long.
                let one = if rank == 0 { vec![7; 2 * SHORT] } else { Vec::new() };
                let heard = wire.exchange(Letters::All(one)).unwrap();
                assert_eq!((heard.letters[0].len(), heard.waits.len()), (2 * SHORT, size as usize));
                wire.link.n_sent
            },
        );
        let expected = if size == 1 { 0 } else { 1 };
        assert!(all.iter().all(|n_sent| *n_sent >= expected), "long letters go over the link: {all:?}");
    }
}

#[test]
fn a_bit_that_the_link_loses_is_found_and_its_sender_named() {
    let ends = carried(
        2,
        patience(20_000),
        |letter| letter[12_345] ^= 4,
        |mut wire| wire.exchange(Letters::All(vec![wire.rank() as u8; SHORT + 1])).unwrap_err(),
    );
    for (rank, error) in (0..).zip(ends) {
        let other: u32 = 1 - rank;
        assert!(matches!(error, Error::Damaged { rank, .. } if rank == other), "process {rank}: {error}");
    }
}

#[test]
fn who_dies_while_long_letters_go_is_named_by_the_mesh() {
    let watch = Instant::now();
    let ends = carried(
        3,
        patience(60_000),
        |_| (),
        |mut wire| {
            if wire.rank() == 1 {
                // It says that a long letter comes, and dies before it does.
                wire.mesh.exchange(heads(&Letters::All(vec![1; SHORT + 1]), 3)).unwrap();
                return None;
            }
            Some(wire.exchange(Letters::All(vec![0; SHORT + 1])).unwrap_err())
        },
    );
    assert!(ends.iter().flatten().any(|error| matches!(error, Error::Gone { rank: 1, .. })), "{ends:?}");
    assert!(ends.iter().flatten().all(Error::is_of_a_lost_rank), "{ends:?}");
    assert!(watch.elapsed() < Duration::from_secs(30));
}

/// The other process lives and says so, but its end of the link never gives what it has announced.
#[test]
fn a_link_that_hangs_ends_by_the_deadline() {
    let over = Barrier::new(2);
    let short = Patience { exchange: Duration::from_millis(300), ..patience(60_000) };
    let ends = carried(
        2,
        short,
        |_| (),
        |mut wire| {
            let error = if wire.rank() == 0 {
                Some(wire.exchange(Letters::All(Vec::new())).unwrap_err())
            } else {
                wire.mesh.exchange(heads(&Letters::All(vec![1; SHORT + 1]), 3)).unwrap();
                None
            };
            over.wait();
            error
        },
    );
    assert!(matches!(ends[0], Some(Error::Late { rank: 1, exchange: 0, .. })), "{ends:?}");
}

#[test]
fn a_link_that_fails_while_all_live_is_named() {
    let over = Barrier::new(2);
    let ends = carried(
        2,
        patience(60_000),
        |_| (),
        |mut wire| {
            if wire.rank() == 1 {
                wire.link.to.clear();
                wire.mesh.exchange(heads(&Letters::All(vec![1; SHORT + 1]), 3)).unwrap();

                over.wait();
                return None;
            }
            let error = wire.exchange(Letters::All(Vec::new())).unwrap_err();
            // The other one lives for as long as this one waits for word of its death.
            over.wait();
            Some(error)
        },
    );
    let expected = Error::Link { link: "a pipe", exchange: 0, what: "the pipe is broken".to_owned() };
    assert_eq!(ends[0], Some(expected));
}

#[test]
fn heads_say_what_they_were_made_of() {
    for length in [0, 1, SHORT, SHORT + 1, 3 * SHORT] {
        let letter = vec![9; length];
        for sends_long in [false, true] {
            let written = head(&letter, sends_long);
            let expected = (length > SHORT).then(|| (length as u64, checksum(&[], &letter)));
            assert_eq!(read(&written), Some((expected, sends_long)));
        }
    }
    for cut in [&[][..], &[LONG], &[LONG, 1, 2, 3], &[LONG; 24], &[LONG; 26]] {
        assert_eq!(read(cut), None, "{cut:?}");
    }
}
