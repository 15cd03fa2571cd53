//! No process beside this one: threads are started as before, `fork` and its like are refused.
//!
//! What gets hold of a process that trains could otherwise fill the machine with copies of it, which no limit of memory or files stops.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Refuses to start processes from now on, for this thread and all that it starts.
///
/// # Errors
/// What the kernel refused, although it knows filters. On a processor that they are not made for, and under a kernel that has none, nothing
/// is refused.
pub(super) fn stay() -> Result<(), Error> {
    let Ok(processor) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(()) };
    // Flags of `clone3` lie in memory, where no filter looks: who hears that there is none takes `clone`.
    let without = [(libc::SYS_clone3, Vec::new())];
    for (calls, answer) in [(starts()?, libc::EPERM), (without.into(), libc::ENOSYS)] {
        let answer = SeccompAction::Errno(answer.unsigned_abs());
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, answer, processor)?;
        match apply_filter(&BpfProgram::try_from(filter)?) {
            Err(Error::Prctl(why) | Error::Seccomp(why)) if is_unknown(&why) => return Ok(()),
            applied => applied?,
        }
    }
    Ok(())
}

/// Whether a kernel knows no such call, or no such filter.
fn is_unknown(why: &std::io::Error) -> bool {
    matches!(why.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
}

/// The calls that start a process.
fn starts() -> Result<BTreeMap<i64, Vec<SeccompRule>>, Error> {
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let is_process = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), 0)?;
    let mut calls = BTreeMap::from([(libc::SYS_clone, vec![SeccompRule::new(vec![is_process])?])]);
    #[cfg(target_arch = "x86_64")]
    calls.extend([(libc::SYS_fork, Vec::new()), (libc::SYS_vfork, Vec::new())]);
    Ok(calls)
}
