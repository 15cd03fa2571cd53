//! Which document comes next: a pure function of seed, shares and counters.
//!
//! Draw number `k` of the run picks a domain by a keyed uniform number; the domain's own counter `t` says which document:
//! place `t mod n` of the random order of epoch `t div n`. A resumed run goes on from the counters.

use attune_points::mixing::Simplex;
use attune_tensor::Rng;
use attune_tensor::permutation::Permutation;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The counters of a stream: all that a checkpoint needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Documents drawn.
    pub draws: u64,
    /// Documents drawn of each domain.
    pub documents: Vec<u64>,
    /// Tokens of them.
    pub tokens: Vec<u64>,
}

/// A document by domain and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    /// The domain.
    pub domain: usize,
    /// The document's index in it.
    pub index: usize,
}

/// A domain as the stream sees it.
#[derive(Debug, Clone)]
struct Domain {
    name: String,
    size: u64,
    /// The order of the epoch that was asked for last.
    order: Option<(u64, Permutation)>,
}

/// The most that documents of some domains may be of all that are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Cap {
    /// The domains, by their numbers.
    pub domains: Vec<usize>,
    /// The share, above 0.
    pub share: f64,
}

/// Draws documents.
#[derive(Debug, Clone)]
pub struct Stream {
    seed: u64,
    domains: Vec<Domain>,
    caps: Vec<Cap>,
    counters: Counters,
}

impl Stream {
    /// The stream of a run over domains of these names and sizes, from its beginning.
    pub fn new(seed: u64, domains: impl IntoIterator<Item = (String, usize)>) -> Self {
        let domain = |(name, size): (String, usize)| Domain { name, size: size as u64, order: None };
        let domains: Vec<Domain> = domains.into_iter().map(domain).collect();
        let counters = Counters { draws: 0, documents: vec![0; domains.len()], tokens: vec![0; domains.len()] };
        Self { seed, domains, caps: Vec::new(), counters }
    }

    /// The same with bounds, which all drawn so far keep to within one document.
    #[must_use]
    pub fn capped(self, caps: Vec<Cap>) -> Self {
        Self { caps, ..self }
    }

    /// The shares without those domains of which one more document would be too many; nothing if they are as they were, or if that
    /// leaves none.
    fn open(&self, shares: &Simplex) -> Option<Simplex> {
        let next = (self.counters.draws + 1) as f64;
        let is_full = |cap: &&Cap| {
            let drawn: u64 = cap.domains.iter().map(|domain| self.counters.documents[*domain]).sum();
            (drawn + 1) as f64 > cap.share * next
        };
        let mut full = self.caps.iter().filter(is_full).flat_map(|cap| &cap.domains).peekable();
        // Most draws are of jobs without caps.
        full.peek()?;
        let mut open = shares.shares().to_vec();
        full.for_each(|domain| open[*domain] = 0.0);
        Simplex::new(open).ok()
    }

    /// The document that comes next under these shares. Asking changes nothing.
    pub fn peek(&mut self, shares: &Simplex) -> Drawn {
        let u = Rng::keyed(self.seed, "mixing", 0, self.counters.draws).uniform();
        let open = self.open(shares);
        let domain = open.as_ref().unwrap_or(shares).pick(u);
        let Domain { name, size, order } = &mut self.domains[domain];
        let taken = self.counters.documents[domain];
        let (epoch, place) = (taken / *size, taken % *size);
        if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let stream = Rng::new(self.seed, "order").named(name).sub(epoch);
            *order = Some((epoch, Permutation::new(*size, &stream)));
        }
        let index = order.as_ref().map_or(0, |(_, order)| order.at(place) as usize);
        Drawn { domain, index }
    }

    /// Counts a document of `tokens` tokens of `domain` as drawn.
    pub fn take(&mut self, domain: usize, tokens: usize) {
        self.counters.draws += 1;
        self.counters.documents[domain] += 1;
        self.counters.tokens[domain] += tokens as u64;
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Goes on from saved counters.
    ///
    /// # Errors
    /// [`Error::State`] if they are of another number of domains.
    pub fn restore(&mut self, counters: Counters) -> Result<(), Error> {
        if counters.documents.len() != self.domains.len() || counters.tokens.len() != self.domains.len() {
            let message = format!("it counts {} domains; the job has {}", counters.documents.len(), self.domains.len());
            return Err(Error::State(message));
        }
        self.counters = counters;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(3, [("a".to_owned(), 5), ("b".to_owned(), 3)])
    }

    fn draw(stream: &mut Stream, shares: &Simplex, n: usize) -> Vec<Drawn> {
        (0..n)
            .map(|_| {
                let drawn = stream.peek(shares);
                assert_eq!(stream.peek(shares), drawn);
                stream.take(drawn.domain, 1);
                drawn
            })
            .collect()
    }

    #[test]
    fn each_epoch_shows_every_document_once_in_another_order() {
        let shares = Simplex::new(vec![1.0, 0.0]).unwrap();
        let drawn = draw(&mut stream(), &shares, 50);
        let epochs: Vec<Vec<usize>> = drawn.chunks(5).map(|epoch| epoch.iter().map(|d| d.index).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
        }
        assert!(epochs.iter().any(|epoch| *epoch != epochs[0]));
    }

    #[test]
    fn a_restored_stream_goes_on_as_if_nothing_had_happened() {
        let shares = Simplex::new(vec![1.0, 2.0]).unwrap();
        let (mut whole, mut first) = (stream(), stream());
        let all = draw(&mut whole, &shares, 60);
        for cut in [0, 1, 7, 23, 59] {
            let mut before = stream();
            draw(&mut before, &shares, cut);
            first.restore(before.counters().clone()).unwrap();
            assert_eq!(draw(&mut first, &shares, 60 - cut), all[cut..], "cut at {cut}");
        }
        let other = Stream::new(3, [("a".to_owned(), 5)]);
        assert!(stream().restore(other.counters().clone()).is_err());
    }

    /// At each draw, of one class and of two, also where their caps leave no room but for each other; what no cap is about is as before.
    #[test]
    fn classes_keep_to_their_caps_within_one_document() {
        let three = || Stream::new(3, [("a".to_owned(), 5), ("b".to_owned(), 3), ("c".to_owned(), 7)]);
        let shares = Simplex::new(vec![5.0, 4.0, 1.0]).unwrap();
        let cap = |domains: &[usize], share| Cap { domains: domains.to_vec(), share };
        for caps in [
            vec![cap(&[0], 0.25)],
            vec![cap(&[0, 1], 0.5)],
            vec![cap(&[0], 0.3), cap(&[1, 2], 0.7)],
            vec![cap(&[0], 0.1), cap(&[1], 0.2)],
        ] {
            let mut stream = three().capped(caps.clone());
            for draws in 1..=500 {
                draw(&mut stream, &shares, 1);
                for Cap { domains, share } in &caps {
                    let drawn: u64 = domains.iter().map(|domain| stream.counters().documents[*domain]).sum();
                    assert!(drawn as f64 <= share * f64::from(draws) + 1.0, "{drawn} of {draws}: {caps:?}");
                }
            }
            // A cap below the share of its domains is made use of.
            let Cap { domains, share } = &caps[0];
            let drawn: u64 = domains.iter().map(|domain| stream.counters().documents[*domain]).sum();
            assert!(drawn as f64 >= share * 500.0 - 6.0, "{drawn}: {caps:?}");
        }
        let roomy = draw(&mut three().capped(vec![cap(&[0], 1.0)]), &shares, 200);
        assert_eq!(roomy, draw(&mut three(), &shares, 200));
    }

    /// 3,000 draws at a share of 2/3; five standard errors are a false alarm in fewer than one of a million seeds.
    #[test]
    fn domains_are_drawn_by_their_shares() {
        let shares = Simplex::new(vec![1.0, 2.0]).unwrap();
        let mut stream = stream();
        draw(&mut stream, &shares, 3000);
        let second = stream.counters().documents[1] as f64;
        assert!((second - 2000.0).abs() < 5.0 * (3000.0f64 * 2.0 / 9.0).sqrt(), "{second}");
    }
}
