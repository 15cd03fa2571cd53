//! What a test plants at a fail point: `kill` ends the process as `kill -9` does; anything else is a database that
//! cannot be written now.

/// The failure, unless the process ends here.
pub(crate) fn failure(what: Option<&str>) -> attune_store::Error {
    if what == Some("kill") {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
    attune_store::Error::Unavailable("a test planted this failure".to_owned())
}
