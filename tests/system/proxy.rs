//! A network between workers and the scheduler that a test may break.

#![expect(clippy::disallowed_methods, reason = "a connection that is lost is what this is for")]

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    /// It arrives.
    Fair,
    /// It arrives late.
    Slow,
    /// What workers send is kept until the weather changes, and arrives then; answers arrive at once.
    Held,
    /// Connections break, and no new one comes about.
    Cut,
}

/// How late what is slow arrives, chunk by chunk.
const LATE: Duration = Duration::from_millis(15);

/// The network: an address that leads to the scheduler.
pub(crate) struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
}

impl Proxy {
    /// A network to `port` of this machine, in fair weather.
    pub(crate) async fn start(port: u16) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), port).await
    }

    /// The same at an address.
    pub(crate) async fn start_at(at: SocketAddr, port: u16) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let (address, (weather, seen)) = (listener.local_addr().unwrap(), watch::channel(Weather::Fair));
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let seen = seen.clone();
                tokio::spawn(async move {
                    if *seen.borrow() == Weather::Cut {
                        return;
                    }
                    let Ok(to) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let ((worker_says, worker_hears), (scheduler_says, scheduler_hears)) =
                        (from.into_split(), to.into_split());
                    tokio::select! {
                        () = carry(worker_says, scheduler_hears, seen.clone(), true) => {}
                        () = carry(scheduler_says, worker_hears, seen.clone(), false) => {}
                        () = cut(seen) => {}
                    }
                });
            }
        });
        Self { address, weather }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn turn(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

async fn cut(mut seen: watch::Receiver<Weather>) {
    // Without anybody to change it, it stays.
    if seen.wait_for(|weather| *weather == Weather::Cut).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut seen: watch::Receiver<Weather>, is_held: bool) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut bytes).await {
        if is_held && seen.wait_for(|weather| *weather != Weather::Held).await.is_err() {
            return;
        }
        if *seen.borrow() == Weather::Slow {
            tokio::time::sleep(LATE).await;
        }
        if n == 0 || to.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}
