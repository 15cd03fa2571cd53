//! Programs of engines, called with arguments and never by way of a shell.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::ProviderError;

/// Longest time for a program to answer.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Characters of what it says that are passed on.
const SAID_MAX: usize = 400;
/// All that such a program sees of the scheduler's environment, which has secrets in it.
const VARIABLES: [&str; 9] =
    ["PATH", "HOME", "USER", "LOGNAME", "TZ", "LD_LIBRARY_PATH", "SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER"];

/// Runs `program` and gives what it wrote.
pub(super) async fn call<S: AsRef<OsStr>>(
    (engine, doing): (&'static str, &'static str),
    program: &Path,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String, ProviderError> {
    let failed = |why: String| ProviderError { engine, doing, why: format!("{}: {why}", program.display()) };
    let variables = VARIABLES.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(variables).stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(CALL_LIMIT, command.output()).await {
        Ok(output) => output.map_err(|error| failed(error.to_string()))?,
        Err(_) => return Err(failed(format!("no answer within {} s", CALL_LIMIT.as_secs()))),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(SAID_MAX).collect();
        return Err(failed(if said.is_empty() { output.status.to_string() } else { said }));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
