use std::sync::{Arc, Mutex};

use super::*;
use crate::carried::tests::Pipes;
use crate::mesh::tests::{patience, run};

/// A device whose link is a pipe.
struct Piped {
    device: u8,
    link: &'static str,
    /// What becomes of joining.
    joins: Result<(), Stopped>,
    ends: Arc<Mutex<Vec<Option<Pipes>>>>,
}

impl End for Piped {
    type Link = Pipes;

    fn link(&self) -> String {
        self.link.to_owned()
    }

    fn device(&self) -> [u8; 16] {
        [self.device; 16]
    }

    fn new_group(&self) -> Result<Vec<u8>, String> {
        Ok(b"a group".to_vec())
    }

    fn join(self, group: &[u8], mesh: &Mesh) -> Result<Pipes, Stopped> {
        assert_eq!(group, b"a group");
        self.joins?;
        Ok(self.ends.lock().unwrap()[mesh.rank() as usize].take().unwrap())
    }
}

/// The words of all processes, which then exchange letters that are long.
fn words(end: impl Fn(u32, Piped) -> Result<Piped, String> + Sync) -> Vec<Result<String, Error>> {
    let size = 3;
    let ends = Arc::new(Mutex::new(Pipes::all(size, |_| ()).into_iter().map(Some).collect::<Vec<_>>()));
    run(size, patience(20_000), |mesh| {
        let rank = mesh.rank();
        let piped = Piped { device: rank as u8, link: "pipes 2.1", joins: Ok(()), ends: Arc::clone(&ends) };
        let Way { mut wire, words } = choose(mesh, end(rank, piped))?;
        let heard = wire.exchange(Letters::All(vec![rank as u8; 100_000]))?.letters;
        assert!((0..size).zip(heard).all(|(from, letter)| letter == vec![from as u8; 100_000]), "{words}");
        Ok(words)
    })
}

#[test]
fn devices_of_one_kind_are_joined() {
    let all = words(|_, piped| Ok(piped));
    assert!(all.iter().all(|words| words.as_deref() == Ok("gradients go by pipes 2.1")), "{all:?}");
}

#[test]
fn where_one_cannot_all_stay_with_the_mesh_and_say_why() {
    let said = |end: fn(u32, Piped) -> Result<Piped, String>| {
        let all: Vec<String> = words(end).into_iter().map(Result::unwrap).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "all come to the same: {all:?}");
        all[0].clone()
    };
    let without = said(|rank, piped| if rank == 1 { Err("has no cables".to_owned()) } else { Ok(piped) });
    assert_eq!(without, "gradients go over TCP: process 1 has no cables");
    let shared = said(|rank, piped| Ok(Piped { device: rank as u8 / 2, ..piped }));
    assert_eq!(shared, "gradients go over TCP: processes 0 and 1 share a device");
    let older = said(|rank, piped| Ok(Piped { link: if rank == 2 { "pipes 2.0" } else { piped.link }, ..piped }));
    assert_eq!(older, "gradients go over TCP: process 2 has pipes 2.0, process 0 pipes 2.1");
    let failing = said(|rank, piped| {
        let failed = || Err(Stopped::Failed("the cable is too short".to_owned()));
        Ok(Piped { joins: if rank == 2 { failed() } else { Ok(()) }, ..piped })
    });
    let expected = "gradients go over TCP: pipes 2.1 fails at process 2, which says: the cable is too short";
    assert_eq!(failing, expected);
}

#[test]
fn who_is_lost_while_devices_are_joined_ends_the_others() {
    let lost = || Error::Gone { rank: 0, exchange: 2 };
    let all =
        words(|rank, piped| Ok(Piped { joins: if rank == 1 { Err(Stopped::By(lost())) } else { Ok(()) }, ..piped }));
    assert_eq!(all[1], Err(lost()));
    assert!(all.iter().all(|end| end.as_ref().is_err_and(Error::is_of_a_lost_rank)), "{all:?}");
}

#[test]
fn offers_are_read_as_they_were_written() {
    let offers = [
        Offer::Device { device: [7; 16], link: "NCCL 2.30.7".to_owned() },
        Offer::Nothing("works on no NVIDIA device".to_owned()),
        Offer::Nothing(String::new()),
    ];
    for offer in offers {
        assert_eq!(Offer::read(&offer.written()), offer);
    }
    for unclear in [&[][..], &[1], &[1; 16]] {
        assert!(matches!(Offer::read(unclear), Offer::Nothing(words) if words.starts_with("says nothing")));
    }
}
