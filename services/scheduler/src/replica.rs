//! Whether this scheduler leads or follows, and who leads where it follows.
//!
//! One that leads has said where it is reached, and a word. One that follows shows that word with a call that it passes on, so that the
//! one that leads knows from which address the call came first. The word proves nothing else: who calls is still the credential's.

use std::sync::Arc;
use std::time::Duration;

use attune_proto::client::{Options, Tls};
use attune_proto::{Class, Client, Secret};
use attune_store::Announced;
use tokio::sync::watch;
use tonic::Status;
use tonic::codegen::http::HeaderMap;

use crate::guard::is_same_secret;

/// The header of the word.
pub(crate) const WORD: &str = "attune-passed-on";
/// The header of the address that a call that is passed on came from first.
pub(crate) const PEER: &str = "attune-passed-on-for";

/// What this scheduler is now.
#[derive(Debug, Clone)]
enum State {
    /// It leads, and believes who shows this word.
    Leads(Secret),
    /// It follows: the one that leads, or why none is known.
    Follows(Result<Arc<Lead>, String>),
}

/// The scheduler that leads.
#[derive(Debug)]
pub(crate) struct Lead {
    announced: Announced,
    /// How it is reached. It carries no credential of its own.
    pub(crate) client: Client,
}

/// What this scheduler is, for whoever wants to know.
#[derive(Debug)]
pub(crate) struct Replica {
    state: watch::Sender<State>,
    tls: Tls,
}

/// A call that some scheduler passed on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PassedOn {
    /// Where it came from first, if the one that passed it on is believed.
    pub(crate) peer: Option<String>,
}

impl Replica {
    /// One that follows nobody yet. Connections to the one that leads are made with `tls`.
    pub(crate) fn new(tls: Tls) -> Self {
        let state = State::Follows(Err("no scheduler leads now".to_owned()));
        Self { state: watch::Sender::new(state), tls }
    }

    /// Leads from now on, known to others by a word.
    pub(crate) fn lead(&self, word: Secret) {
        self.state.send_replace(State::Leads(word));
    }

    /// Follows whoever has said that it leads.
    pub(crate) fn follow(&self, announced: Option<Announced>) {
        let announced = announced.filter(|announced| !announced.url.is_empty());
        let is_known = match &*self.state.borrow() {
            State::Leads(_) => true,
            State::Follows(Ok(lead)) => announced.as_ref() == Some(&lead.announced),
            State::Follows(Err(_)) => announced.is_none(),
        };
        if is_known {
            return;
        }
        let lead = announced.ok_or_else(|| "no scheduler leads now".to_owned()).and_then(|announced| {
            let options = Options { tls: self.tls.clone(), ..Options::default() };
            let client = Client::lazy(&announced.url, options);
            let client = client.map_err(|error| format!("the scheduler that leads cannot be asked: {error}"))?;
            tracing::info!(url = announced.url, term = announced.term, "this scheduler follows");
            Ok(Arc::new(Lead { announced, client }))
        });
        self.state.send_replace(State::Follows(lead));
    }

    /// Reads the files again that connections to the one that leads are made with, as often as `interval` says.
    pub(crate) async fn keep(self: Arc<Self>, interval: Duration) {
        let mut last = None;
        loop {
            tokio::time::sleep(interval).await;
            let client = match &*self.state.borrow() {
                State::Follows(Ok(lead)) => lead.client.clone(),
                State::Follows(Err(_)) | State::Leads(_) => continue,
            };
            let why = match client.renew().await {
                Ok(true) => {
                    tracing::info!("new connections to the scheduler that leads use renewed certificates");
                    None
                }
                Ok(false) => None,
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = why.as_ref().filter(|why| last.as_ref() != Some(*why)) {
                tracing::error!(why, "certificates have changed and cannot be used; new connections use the old ones");
            }
            last = why;
        }
    }

    /// Nothing if this scheduler leads; else the one that does, or why it cannot be asked.
    pub(crate) fn other(&self) -> Option<Result<Arc<Lead>, Status>> {
        match &*self.state.borrow() {
            State::Leads(_) => None,
            State::Follows(lead) => Some(lead.clone().map_err(|why| {
                let message = format!("{why}; this scheduler follows, and answers what it reads from the database");
                Class::Unavailable.status(message)
            })),
        }
    }

    /// Done when somebody else than `lead` leads.
    pub(crate) async fn has_changed_from(self: Arc<Self>, lead: Arc<Lead>) {
        let is_other = |state: &State| match state {
            State::Follows(Ok(now)) => now.announced != lead.announced,
            State::Follows(Err(_)) | State::Leads(_) => true,
        };
        // The sender is this value itself.
        let _ = self.state.subscribe().wait_for(is_other).await;
    }

    /// Takes what another scheduler has put beside a call out of its headers.
    pub(crate) fn passed_on(&self, headers: &mut HeaderMap) -> Option<PassedOn> {
        let (word, peer) = (headers.remove(WORD), headers.remove(PEER));
        let word = Secret::new(word?.to_str().unwrap_or_default());
        let is_believed = match &*self.state.borrow() {
            State::Leads(own) => is_same_secret(own, &word),
            State::Follows(_) => false,
        };
        let peer = peer.filter(|_| is_believed).and_then(|peer| peer.to_str().ok().map(str::to_owned));
        Some(PassedOn { peer })
    }
}

impl Lead {
    /// Where it is reached.
    pub(crate) fn url(&self) -> &str {
        &self.announced.url
    }

    /// The word by which it believes who passes a call on.
    pub(crate) fn word(&self) -> &str {
        &self.announced.word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announced(term: u64, url: &str) -> Announced {
        Announced { term, url: url.to_owned(), word: format!("word {term}") }
    }

    fn headers(word: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(WORD, word.parse().unwrap());
        headers.insert(PEER, "10.1.2.3".parse().unwrap());
        headers
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "what waits is asked for its result")]
    async fn whoever_leads_is_known_until_another_does() {
        let replica = Arc::new(Replica::new(Tls::default()));
        let nobody = replica.other().unwrap().unwrap_err();
        assert!(nobody.message().starts_with("no scheduler leads now; this scheduler follows"), "{nobody}");
        replica.follow(Some(announced(1, "http://127.0.0.1:1")));
        let first = replica.other().unwrap().unwrap();
        assert_eq!((first.url(), first.word()), ("http://127.0.0.1:1", "word 1"));
        let changed = tokio::spawn(Arc::clone(&replica).has_changed_from(Arc::clone(&first)));
        replica.follow(Some(announced(1, "http://127.0.0.1:1")));
        assert!(Arc::ptr_eq(&first, &replica.other().unwrap().unwrap()), "nothing has changed");
        replica.follow(Some(announced(2, "http://127.0.0.1:1")));
        changed.await.unwrap();
        // What is no address is said, and what has ended in good order is nobody.
        replica.follow(Some(announced(3, "nowhere")));
        let bad = replica.other().unwrap().unwrap_err();
        assert!(bad.message().contains("cannot be asked: server \"nowhere\" is not a URL"), "{bad}");
        replica.follow(Some(announced(3, "")));
        replica.lead(Secret::new("own"));
        assert!(replica.other().is_none());
        replica.follow(Some(announced(3, "http://127.0.0.1:1")));
        assert!(replica.other().is_none(), "who leads follows nobody any more");
    }

    #[test]
    fn an_address_is_believed_of_those_that_know_the_word() {
        let replica = Replica::new(Tls::default());
        assert_eq!(replica.passed_on(&mut HeaderMap::new()), None);
        assert_eq!(
            replica.passed_on(&mut headers("own")),
            Some(PassedOn { peer: None }),
            "who follows believes nobody"
        );
        replica.lead(Secret::new("own"));
        for (word, peer) in [("own", Some("10.1.2.3".to_owned())), ("another", None), ("", None)] {
            let mut headers = headers(word);
            assert_eq!(replica.passed_on(&mut headers), Some(PassedOn { peer }), "{word}");
            assert!(headers.is_empty(), "no service sees them");
        }
    }
}
