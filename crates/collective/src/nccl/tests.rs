use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::error::Error;
use crate::mesh::{Listening, Patience};

/// Whether this machine has what is tested: `ATTUNE_CUDA=1` says that it has to.
fn device() -> Option<Device> {
    let must = std::env::var_os("ATTUNE_CUDA").is_some();
    match Device::of(0) {
        Ok(device) => Some(device),
        Err(words) if must => panic!("device 0 {words}"),
        Err(words) => {
            eprintln!("skipped: device 0 {words}");
            None
        }
    }
}

/// A mesh of one process.
fn alone() -> Mesh {
    let listening = Listening::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let own = listening.peer();
    listening.join(0, &[own], Patience::default()).unwrap()
}

#[test]
fn pieces_are_of_both_ends_the_same_and_end_to_end() {
    for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
        let mut sum = 0;
        for round in 0..length.div_ceil(PIECE) {
            let found: Vec<_> = pieces([(4, length), (5, 1)].into_iter(), round).collect();
            let expected = (length - sum).min(PIECE);
            assert_eq!(found[0], (0, 4, expected));
            assert_eq!(found.len(), 1 + usize::from(round == 0), "the short one has one piece");
            sum += expected;
        }
        assert_eq!(sum, length);
    }
}

#[test]
fn versions_are_spelt_as_people_do() {
    assert_eq!([spelt(21_803), spelt(23_007), spelt(0)], ["2.18.3", "2.30.7", "0.0.0"]);
}

#[test]
fn groups_have_names_of_their_own() {
    match nccl() {
        Ok(nccl) => {
            let [one, other] = [(); 2].map(|()| nccl.unique_id().unwrap().0);
            assert!(one != other && nccl.version() >= 21_800);
        }
        Err(words) => eprintln!("skipped: {words}"),
    }
}

#[test]
fn cuda_letters_come_back_from_the_device_as_they_went() {
    let Some(device) = device() else { return };
    let group = device.new_group().unwrap();
    assert_eq!(group.len(), ID);
    let mut joined = device.join(&group, &alone()).unwrap();
    let letter = |salt: usize, length: usize| -> Vec<u8> { (0..length).map(|idx| (idx * 31 + salt) as u8).collect() };
    // One process alone may send to itself. Lengths of several pieces, of one, and of one byte more.
    for (salt, length) in [(1, 100_000), (2, PIECE), (3, PIECE + 1), (4, 3 * PIECE + 12_345)] {
        let sent = letter(salt, length);
        let mut into = [(0, vec![0; length])];
        joined.carry(&[(0, Cow::Borrowed(&sent))], &mut into, &mut || Ok(())).unwrap();
        assert!(into[0].1 == sent, "{length} bytes");
    }
}

#[test]
fn cuda_who_watches_ends_what_never_comes() {
    let Some(device) = device() else { return };
    let group = device.new_group().unwrap();
    let mut joined = device.join(&group, &alone()).unwrap();
    let start = Instant::now();
    // A letter that nobody sends.
    let error = joined.carry(&[], &mut [(0, vec![0; 100_000])], &mut || {
        let lost = Error::Gone { rank: 0, exchange: 0 };
        if start.elapsed() > Duration::from_millis(300) { Err(lost) } else { Ok(()) }
    });
    assert!(matches!(&error, Err(Stopped::By(Error::Gone { .. }) | Stopped::Failed(_))), "{error:?}");
    drop(joined);
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn who_has_no_such_device_says_so() {
    let words = Device::of(4096).err().unwrap();
    assert!(words.starts_with("has no") || words.starts_with("cannot use its device"), "{words}");
}
