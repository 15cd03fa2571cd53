//! No process beside this one: threads are started as before, `fork` and its like are refused.
//!
//! What gets hold of a process that trains could otherwise fill the machine with copies of it, which no limit of memory or files stops.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Refuses to start processes from now on, for this thread and all that it starts.
///
/// # Errors
/// What the kernel refused. A processor that the filters are not made for is none: there nothing is refused.
pub(super) fn stay() -> Result<(), seccompiler::Error> {
    let Ok(processor) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(()) };
    // Flags of `clone3` lie in memory, where no filter looks: who hears that there is none takes `clone`.
    let without = [(libc::SYS_clone3, Vec::new())];
    for (calls, answer) in [(starts()?, libc::EPERM), (without.into(), libc::ENOSYS)] {
        let answer = SeccompAction::Errno(answer.unsigned_abs());
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, answer, processor)?;
        apply_filter(&BpfProgram::try_from(filter)?)?;
    }
    Ok(())
}

/// The calls that start a process.
fn starts() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::Error> {
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let is_process = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), 0)?;
    let mut calls = BTreeMap::from([(libc::SYS_clone, vec![SeccompRule::new(vec![is_process])?])]);
    #[cfg(target_arch = "x86_64")]
    calls.extend([(libc::SYS_fork, Vec::new()), (libc::SYS_vfork, Vec::new())]);
    Ok(calls)
}
