//! How the processes of a gang hear of each other: each worker tells the others, through the scheduler, where its own listens.
//!
//! The scheduler passes words on and keeps none, and any may be lost. So a worker that lacks one says its own again with every
//! heartbeat, and whoever hears that answers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use attune_proto::v1;
use attune_spec::id::CohortId;
use attune_trainer::protocol::Peer;
use url::Url;

/// The processes of a gang, as one worker knows them.
#[derive(Debug)]
pub(crate) struct Meeting {
    cohort: CohortId,
    rank: u32,
    size: u32,
    known: BTreeMap<u32, Peer>,
    /// Its own process has been told of all.
    is_over: bool,
}

impl Meeting {
    pub(crate) fn new(cohort: CohortId, rank: u32, size: u32) -> Self {
        Self { cohort, rank, size, known: BTreeMap::new(), is_over: false }
    }

    /// The worker's own process listens.
    pub(crate) fn listens(&mut self, peer: Peer) {
        self.known.insert(self.rank, peer);
    }

    /// What is said, if there is something to say and somebody is still unknown.
    pub(crate) fn announcement(&self) -> Option<v1::GangPeer> {
        if self.is_over { None } else { self.word(true) }
    }

    fn word(&self, wants_answer: bool) -> Option<v1::GangPeer> {
        let own = self.known.get(&self.rank)?;
        let (cohort_id, rank) = (self.cohort.0, self.rank);
        Some(v1::GangPeer { cohort_id, rank, address: own.address.to_string(), token: own.token.clone(), wants_answer })
    }

    /// Takes what another worker says; an answer, if it wants one.
    pub(crate) fn heard(&mut self, told: &v1::GangPeer) -> Option<v1::GangPeer> {
        let Ok(address) = told.address.parse() else {
            tracing::warn!(cohort = %self.cohort, rank = told.rank, address = told.address, "no address");
            return None;
        };
        if told.rank < self.size && told.rank != self.rank {
            self.known.entry(told.rank).or_insert_with(|| Peer { address, token: told.token.clone() });
        }
        self.word(false).filter(|_| told.wants_answer)
    }

    /// All processes by rank, once, as soon as they are known.
    pub(crate) fn complete(&mut self) -> Option<Vec<Peer>> {
        if self.is_over || self.known.len() < self.size as usize {
            return None;
        }
        self.is_over = true;
        Some(self.known.values().cloned().collect())
    }
}

/// The address of this machine by which it reaches the first of these schedulers: others that reach that reach it as well.
pub(crate) async fn address_towards(schedulers: &str) -> std::io::Result<IpAddr> {
    let first = schedulers.split(',').next().unwrap_or_default().trim();
    let url = Url::parse(first).map_err(std::io::Error::other)?;
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = url.port_or_known_default().unwrap_or(80);
    let mut last = std::io::Error::other(format!("{host} has no address"));
    for to in tokio::net::lookup_host((host, port)).await? {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // Nothing is sent: the system only looks up the way.
        let looked_up = async {
            let socket = tokio::net::UdpSocket::bind(any).await?;
            socket.connect(to).await?;
            socket.local_addr()
        };
        match looked_up.await {
            Ok(own) => return Ok(own.ip()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(rank: u32) -> Peer {
        Peer { address: format!("127.0.0.1:{}", 7000 + rank).parse().unwrap(), token: format!("{rank}") }
    }

    /// Passes words between workers, some of which get lost, until all know all.
    fn rounds_until_all_know(size: u32, is_lost: impl Fn(usize) -> bool) -> usize {
        let mut all: Vec<Meeting> = (0..size).map(|rank| Meeting::new(CohortId(1), rank, size)).collect();
        let (mut n_said, mut done) = (0, 0);
        for round in 0..100 {
            // One process after the other begins to listen.
            if let Some(meeting) = all.get_mut(round) {
                meeting.listens(peer(round as u32));
            }
            let mut words: Vec<v1::GangPeer> = all.iter().filter_map(Meeting::announcement).collect();
            while let Some(word) = words.pop() {
                n_said += 1;
                assert!(n_said < 10_000, "they never stop talking");
                for meeting in all.iter_mut().filter(|meeting| meeting.rank != word.rank) {
                    words.extend(meeting.heard(&word).filter(|_| !is_lost(n_said)));
                }
            }
            for meeting in &mut all {
                if let Some(peers) = meeting.complete() {
                    assert_eq!(peers, (0..size).map(peer).collect::<Vec<_>>());
                    assert_eq!((meeting.complete(), meeting.announcement()), (None, None));
                    done += 1;
                }
            }
            if done == size {
                return round;
            }
        }
        panic!("they do not meet");
    }

    #[test]
    fn all_meet_when_the_last_one_listens_and_nobody_talks_for_ever() {
        for size in [2, 3, 8] {
            assert_eq!(rounds_until_all_know(size, |_| false), size as usize - 1);
        }
    }

    #[test]
    fn words_that_are_lost_are_said_again() {
        for lost in 2..5 {
            rounds_until_all_know(4, |number| number % lost != 0);
        }
    }

    #[test]
    fn who_claims_another_rank_or_an_unknown_one_changes_nothing() {
        let mut meeting = Meeting::new(CohortId(1), 0, 2);
        meeting.listens(peer(0));
        for rank in [0, 2, 9] {
            let mut word = Meeting::new(CohortId(1), rank, 10);
            word.listens(peer(5));
            meeting.heard(&word.announcement().unwrap());
        }
        assert_eq!((meeting.complete(), meeting.known.get(&0)), (None, Some(&peer(0))));
    }

    #[tokio::test]
    async fn the_way_to_a_scheduler_on_this_machine_is_the_loopback() {
        for url in ["http://127.0.0.1:7070", "http://127.0.0.1:1,http://10.255.255.1:2"] {
            assert_eq!(address_towards(url).await.unwrap(), IpAddr::from([127, 0, 0, 1]));
        }
        assert!(address_towards("no url").await.is_err());
    }
}
