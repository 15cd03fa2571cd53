//! What a test plants at a fail point: `kill` ends the process as `kill -9` does; `lost` is a write that the disk
//! may have lost; anything else is a database that cannot be written now. And a defect, for a test to find: nobody looks at epochs.

/// The failure, unless the process ends here.
pub(crate) fn failure(what: Option<&str>) -> attune_store::Error {
    if what == Some("kill") {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
    let why = "a test planted this failure".to_owned();
    if what == Some("lost") { attune_store::Error::NotDurable(why) } else { attune_store::Error::Unavailable(why) }
}

/// A push with the newest attempt of its job in place of the one that it names.
#[cfg(feature = "failpoints")]
pub(crate) async fn taken_for_the_newest(
    context: &crate::context::Context,
    mut header: crate::services::push::Header,
) -> Result<crate::services::push::Header, tonic::Status> {
    if let Some(named) = &mut header.attempt {
        let attempts = context.store.attempts(&header.project, &named.key.job).await.map_err(crate::status::store)?;
        if let Some(newest) = attempts.into_iter().max_by_key(|attempt| attempt.epoch) {
            named.epoch = newest.epoch;
            named.worker = newest.workers.first().cloned().unwrap_or_else(|| named.worker.clone());
        }
    }
    Ok(header)
}
