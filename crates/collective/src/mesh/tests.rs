use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;

use super::*;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

pub(crate) fn patience(silence_ms: u64) -> Patience {
    Patience {
        join: Duration::from_secs(20),
        silence: Duration::from_millis(silence_ms),
        exchange: Duration::from_secs(60),
    }
}

fn listening(size: u32) -> (Vec<Listening>, Vec<Peer>) {
    let all: Vec<Listening> = (0..size).map(|_| Listening::bind(LOCAL).unwrap()).collect();
    let peers = all.iter().map(Listening::peer).collect();
    (all, peers)
}

/// Runs `work` on every rank of a mesh, each on a thread.
pub(crate) fn run<R: Send>(size: u32, patience: Patience, work: impl Fn(Mesh) -> R + Sync) -> Vec<R> {
    let (all, peers) = listening(size);
    std::thread::scope(|scope| {
        let start = |(rank, listening): (u32, Listening)| {
            let (peers, work) = (&peers, &work);
            scope.spawn(move || work(listening.join(rank, peers, patience).unwrap()))
        };
        let threads: Vec<_> = (0..).zip(all).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn each_gets_what_each_sent_to_it_in_every_exchange() {
    for size in [1, 2, 3, 5] {
        run(size, patience(5_000), |mut mesh| {
            for round in 0..20u32 {
                // Lengths differ by sender, receiver and round; some are empty.
                let text = |from: u32, to: u32| {
                    vec![(from * 16 + to) as u8; ((from * 7 + to * 3 + round) % 5 * 1000) as usize]
                };
                let rank = mesh.rank();
                let heard = mesh.exchange(Letters::Each((0..size).map(|to| text(rank, to)).collect())).unwrap().letters;
                let expected: Vec<Vec<u8>> = (0..size).map(|from| text(from, rank)).collect();
                assert!(heard == expected, "rank {rank} of {size}, round {round}");
            }
        });
    }
}

#[test]
fn what_is_larger_than_any_buffer_goes_both_ways_at_once() {
    let sums = run(2, patience(20_000), |mut mesh| {
        let heard = mesh.exchange(Letters::All(vec![mesh.rank() as u8 + 1; 32 << 20])).unwrap();
        heard.letters.iter().map(|bytes| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>()).collect::<Vec<_>>()
    });
    let (one, two) = (32 << 20, 64 << 20);
    assert_eq!(sums, [[one, two], [one, two]]);
}

#[test]
fn who_leaves_ends_the_others_at_once_and_is_named() {
    let watch = Instant::now();
    let ends = run(3, patience(60_000), |mut mesh| {
        mesh.exchange(Letters::All(Vec::new())).unwrap();
        (mesh.rank() != 1).then(|| mesh.exchange(Letters::All(Vec::new())).unwrap_err())
    });
    let gone = Some(Error::Gone { rank: 1, exchange: 1 });
    // Of those that wait, the first to leave may be taken for the one that left first.
    let named = |end: &Option<Error>| matches!(end, None | Some(Error::Gone { exchange: 1, .. }));
    assert!(ends.contains(&gone) && ends.iter().all(named), "{ends:?}");
    assert!(watch.elapsed() < Duration::from_secs(30));
}

/// A process that is stopped, and not ended: its connection stands, and nothing comes.
#[test]
fn who_says_nothing_any_more_is_named_after_the_silence() {
    let (mut all, peers) = listening(2);
    let second = all.pop().unwrap();
    let silent = peers.clone();
    let stopped = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(silent[0].address).unwrap();
        greeting::greet(&mut stream, (1, &second.peer()), (0, &silent[0])).unwrap();
        stream
    });
    let mut mesh = all.pop().unwrap().join(0, &peers, patience(300)).unwrap();
    let _stands = stopped.join().unwrap();
    let error = mesh.exchange(Letters::All(Vec::new())).unwrap_err();
    assert_eq!(error, Error::Silent { rank: 1, exchange: 0, within: Duration::from_millis(300) });
    assert!(error.is_of_a_lost_rank());
}

#[test]
fn who_lives_may_take_its_time() {
    let ends = run(2, patience(300), |mut mesh| {
        if mesh.rank() == 1 {
            std::thread::sleep(Duration::from_millis(1500));
        }
        mesh.exchange(Letters::All(Vec::new())).map(|_| ())
    });
    assert_eq!(ends, [Ok(()), Ok(())]);
}

#[test]
fn strangers_are_turned_away_and_change_nothing() {
    let (all, peers) = listening(2);
    let address = peers[0].address;
    std::thread::scope(|scope| {
        let meshes: Vec<_> = {
            let mut silent = TcpStream::connect(address).unwrap();
            let mut garbage = TcpStream::connect(address).unwrap();
            garbage.write_all(&[0xff; 4096]).unwrap();
            // One that knows an address and no token, as a process of an earlier attempt does.
            let mut old = TcpStream::connect(address).unwrap();
            let earlier = listening(2).1;
            let refused = scope.spawn(move || greeting::greet(&mut old, (1, &earlier[1]), (0, &earlier[0])));
            let start = |(rank, listening): (u32, Listening)| {
                let peers = &peers;
                scope.spawn(move || {
                    let mut mesh = listening.join(rank, peers, patience(5_000)).unwrap();
                    mesh.exchange(Letters::All(vec![rank as u8])).unwrap().letters
                })
            };
            let threads: Vec<_> = (0..).zip(all).map(start).collect();
            let ends = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(refused.join().unwrap().is_err());
            silent.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // Nothing was said to who said nothing.
            assert_eq!(silent.read(&mut [0; 8]).unwrap_or(0), 0);
            ends
        };
        assert_eq!(meshes, vec![vec![vec![0], vec![1]]; 2]);
    });
}

#[test]
fn a_process_that_is_not_there_is_named() {
    let (mut all, peers) = listening(3);
    all.truncate(2);
    let brief = Patience { join: Duration::from_millis(300), ..patience(1000) };
    let second = all.pop().unwrap();
    let ends = std::thread::scope(|scope| {
        let peers = &peers;
        let first = scope.spawn(move || all.pop().unwrap().join(0, peers, brief).unwrap_err());
        let second = scope.spawn(move || second.join(1, peers, brief).unwrap_err());
        [first.join().unwrap(), second.join().unwrap()]
    });
    for end in ends {
        assert!(matches!(&end, Error::Unmet { rank: 2, .. }), "{end}");
    }
}

#[test]
fn how_long_is_waited_for_whom_is_known() {
    let late = Duration::from_millis(400);
    let waits = run(3, patience(5_000), |mut mesh| {
        mesh.exchange(Letters::All(Vec::new())).unwrap();
        if mesh.rank() == 1 {
            std::thread::sleep(late);
        }
        mesh.exchange(Letters::All(Vec::new())).unwrap().waits
    });
    for (rank, waits) in waits.iter().enumerate() {
        assert_eq!(waits[rank], Duration::ZERO, "nobody waits for itself");
        // The first exchange ends for all at about the same time: what is left of it is small beside the lateness.
        let of_the_late = if rank == 1 { Duration::ZERO..late / 2 } else { late / 2..Duration::MAX };
        assert!(of_the_late.contains(&waits[1]), "rank {rank}: {waits:?}");
        assert!([0, 2].iter().all(|other| waits[*other] < late / 2), "rank {rank}: {waits:?}");
    }
}

/// Passes on what comes from `from` to `to`, with one bit of it turned over.
fn turning_a_bit(mut from: TcpStream, mut to: TcpStream, at: usize) {
    let (mut passed, mut buffer) = (0, [0; 4096]);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if (passed..passed + n).contains(&at) {
            buffer[at - passed] ^= 0x10;
        }
        passed += n;
        if to.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

/// F27: a bit that is lost on the way between two processes is found, wherever in a message it was.
#[test]
fn a_bit_that_is_lost_on_the_way_is_found_before_anybody_uses_it() {
    // The one that connects says 8 + 4 + 32 + 32 bytes before its first frame, whose number, digest and text follow.
    let greeting = 8 + 4 + 32 + 32;
    for at in [3, 16, 31, 32, 32 + 5000, 32 + 99_999].map(|place| greeting + place) {
        let (mut all, mut peers) = listening(2);
        let between = TcpListener::bind((LOCAL, 0)).unwrap();
        let direct = std::mem::replace(&mut peers[0].address, between.local_addr().unwrap());
        std::thread::spawn(move || {
            let (near, far) = (between.accept().unwrap().0, TcpStream::connect(direct).unwrap());
            let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
            std::thread::spawn(move || turning_a_bit(back.0, back.1, usize::MAX));
            turning_a_bit(near, far, at);
        });
        let text = vec![7; 100_000];
        let first = std::thread::scope(|scope| {
            let (second, peers, text) = (all.pop().unwrap(), &peers, &text);
            scope.spawn(move || second.join(1, peers, patience(5_000)).unwrap().exchange(Letters::All(text.clone())));
            all.pop().unwrap().join(0, peers, patience(5_000)).unwrap().exchange(Letters::All(Vec::new()))
        });
        let Err(error @ Error::Damaged { rank: 1, exchange: 0, sent, came }) = first else {
            panic!("at byte {at}: {:?}", first.map(|heard| heard.letters[1] == text))
        };
        assert!(sent != came && !error.is_of_a_lost_rank(), "{error}");
        let words = error.to_string();
        assert!(words.contains(&sent.to_string()) && words.contains(&came.to_string()), "{words}");
    }
}
