//! Workers that are jobs of Slurm: one batch job of one node each.
//!
//! A request is the job's comment, the pool its name: what `squeue` lists is all that there is to know, whoever asked. The batch script is
//! the same for all and starts what its arguments say, so nothing is interpolated into it; it replaces itself by the worker, so that the
//! signal that `scancel --batch` sends arrives there. Jobs see nothing of the scheduler's environment.
//!
//! A job that Slurm ends (its time, a node that failed, somebody's `scancel`) is a worker that went: its attempts go on elsewhere from
//! their last checkpoints, and a worker is asked for anew if something waits for it. Before its time is over Slurm sends SIGTERM, early
//! enough for attempts to write a checkpoint. Jobs are not requeued; where an option says otherwise, one that is counts as coming again.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_scheduler_core::supply::{Pool, RequestId, Standing};
use tokio::sync::Mutex;

use super::engine::call;
use super::launch::{Launch, shown};
use super::{ProviderError, WorkerProvider};

const ENGINE: &str = "Slurm";
/// Time beyond their grace that workers have when the time of their job ends.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// How jobs are submitted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// Folder of Slurm's programs; those of `PATH` if absent.
    pub(super) bin: Option<PathBuf>,
    pub(super) partition: Option<String>,
    pub(super) account: Option<String>,
    /// Longest time of a job, in whole minutes; the partition's if absent.
    pub(super) minutes: Option<u64>,
    pub(super) cpus: u32,
    /// Memory of a job, as Slurm writes it.
    pub(super) memory: String,
    pub(super) gres: Option<String>,
    /// Further options of `sbatch`.
    pub(super) options: Vec<String>,
    /// Folder on the node in which each worker makes its own, and removes it when it ends.
    pub(super) work_dir: PathBuf,
    /// Where the node writes what a worker says.
    pub(super) output: String,
    /// Lines of shell before the worker starts.
    pub(super) prologue: String,
}

/// The workers of a pool.
#[derive(Debug)]
pub(super) struct Slurm {
    pool: Pool,
    launch: Launch,
    settings: Settings,
    /// Slurm's number of each request that has not ended.
    numbers: Mutex<BTreeMap<RequestId, String>>,
}

impl Slurm {
    pub(super) fn new(pool: Pool, launch: Launch, settings: Settings) -> Self {
        Self { pool, launch, settings, numbers: Mutex::default() }
    }

    fn program(&self, name: &str) -> PathBuf {
        self.settings.bin.as_ref().map_or_else(|| name.into(), |bin| bin.join(name))
    }

    fn job_name(&self) -> String {
        format!("attune-{}", self.pool.name)
    }

    /// The script that every job runs.
    fn script(&self) -> String {
        format!("#!/bin/sh\n{}\nexec \"$@\"\n", self.settings.prologue.trim_end())
    }

    /// What `sbatch` is told before the script and the worker's command line.
    fn options(&self, request: &RequestId) -> Vec<String> {
        let Settings { partition, account, minutes, cpus, memory, gres, options, output, .. } = &self.settings;
        let notice = (self.launch.grace + LAST_WORDS).as_secs();
        let mut all: Vec<String> =
            ["--parsable", "--export=NIL", "--no-requeue", "--nodes=1", "--ntasks=1", "--chdir=/"]
                .map(str::to_owned)
                .into();
        all.extend([
            format!("--job-name={}", self.job_name()),
            format!("--comment={request}"),
            format!("--cpus-per-task={cpus}"),
            format!("--mem={memory}"),
            format!("--output={output}"),
            format!("--signal=B:TERM@{notice}"),
        ]);
        let some = |name: &str, value: &Option<String>| value.as_ref().map(|value| format!("--{name}={value}"));
        all.extend(some("partition", partition));
        all.extend(some("account", account));
        all.extend(some("time", &minutes.map(|minutes| minutes.to_string())));
        all.extend(some("gres", gres));
        all.extend(options.iter().cloned());
        all
    }

    /// All that `sbatch` is told: its options, the script, and the worker's command line.
    fn arguments(&self, request: &RequestId, script: &Path) -> Vec<OsString> {
        let folder = self.settings.work_dir.join(request.to_string());
        let mut arguments: Vec<OsString> = self.options(request).into_iter().map(OsString::from).collect();
        arguments.extend([script.into(), self.launch.program.clone().into()]);
        arguments.extend(self.launch.arguments(&self.pool, request, &folder));
        arguments.push("--discard-work-dir".into());
        arguments
    }

    /// Sends a signal to a job, or ends it; one that is gone is none to complain about.
    async fn cancel(&self, doing: &'static str, request: &RequestId, options: &[&str]) -> Result<(), ProviderError> {
        let Some(number) = self.numbers.lock().await.get(request).cloned() else { return Ok(()) };
        let arguments = options.iter().copied().chain([number.as_str()]);
        call((ENGINE, doing), &self.program("scancel"), arguments).await.map(drop)
    }
}

/// A line of `squeue`: number, state, comment, and the reason where it waits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line<'t> {
    number: &'t str,
    state: &'t str,
    request: RequestId,
    reason: &'t str,
}

const FORMAT: &str = "--format=%i|%T|%k|%r";

/// A line of Attune's; nothing where it is no job of a request.
fn line(text: &str) -> Option<Line<'_>> {
    let mut fields = text.trim().splitn(4, '|');
    let (number, state) = (fields.next()?, fields.next()?);
    let request = RequestId(fields.next()?.parse().ok()?);
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| Line { number, state, request, reason: fields.next().unwrap_or_default() })
}

/// What a state of Slurm's is to us; nothing for a job that has ended. One that nobody knows has not ended: it counts.
fn standing(state: &str) -> Option<Standing> {
    match state {
        "PENDING" | "CONFIGURING" | "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "RESV_DEL_HOLD" | "SPECIAL_EXIT" => {
            Some(Standing::Waiting)
        }
        "BOOT_FAIL" | "CANCELLED" | "COMPLETED" | "DEADLINE" | "FAILED" | "NODE_FAIL" | "OUT_OF_MEMORY"
        | "PREEMPTED" | "REVOKED" | "TIMEOUT" => None,
        _ => Some(Standing::Running),
    }
}

#[tonic::async_trait]
impl WorkerProvider for Slurm {
    async fn list(&self) -> Result<BTreeMap<RequestId, Standing>, ProviderError> {
        let name = format!("--name={}", self.job_name());
        let arguments = ["--noheader", "--me", "--states=all", name.as_str(), FORMAT];
        let mut numbers = self.numbers.lock().await;
        let text = call((ENGINE, "say what it has"), &self.program("squeue"), arguments).await?;
        let mut found = BTreeMap::new();
        for Line { number, state, request, reason } in text.lines().filter_map(line) {
            match standing(state) {
                Some(standing) => {
                    tracing::debug!(pool = %self.pool.name, %request, number, state, reason, "a job of Slurm");
                    numbers.insert(request.clone(), number.to_owned());
                    found.insert(request, standing);
                }
                None if numbers.contains_key(&request) => {
                    tracing::info!(pool = %self.pool.name, %request, number, state, reason, "a job of Slurm has ended");
                }
                None => {}
            }
        }
        numbers.retain(|request, _| found.contains_key(request));
        Ok(found)
    }

    async fn ask(&self, request: &RequestId) -> Result<(), ProviderError> {
        let doing = "start a worker";
        let unwritten =
            |error: std::io::Error| ProviderError { engine: ENGINE, doing, why: format!("the script: {error}") };
        let mut script = tempfile::NamedTempFile::new().map_err(unwritten)?;
        script.write_all(self.script().as_bytes()).map_err(unwritten)?;
        let said = call((ENGINE, doing), &self.program("sbatch"), self.arguments(request, script.path())).await?;
        // The number, and behind a semicolon a cluster's name where there are several.
        let number = said.trim().split(';').next().unwrap_or_default();
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            let why = format!("sbatch answers {:?}; expected the number of a job", said.trim());
            return Err(ProviderError { engine: ENGINE, doing, why });
        }
        self.numbers.lock().await.insert(request.clone(), number.to_owned());
        Ok(())
    }

    async fn give_back(&self, request: &RequestId) -> Result<(), ProviderError> {
        self.cancel("tell a worker to end", request, &["--signal=TERM", "--batch"]).await
    }

    async fn withdraw(&self, request: &RequestId) -> Result<(), ProviderError> {
        self.cancel("end a worker", request, &[]).await
    }

    fn rendered(&self, request: &RequestId) -> String {
        let (program, arguments) = (self.program("sbatch"), self.arguments(request, "SCRIPT".as_ref()));
        let words = [program.as_os_str()].into_iter().chain(arguments.iter().map(OsString::as_os_str));
        format!("{}\n# SCRIPT\n{}", shown(words), self.script())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use attune_scheduler_core::Devices;

    use super::*;

    fn slurm(settings: Settings) -> Slurm {
        let pool = Pool {
            name: "gpu".parse().unwrap(),
            devices: Devices { n_cpu: 2, n_cuda: 1 },
            labels: BTreeMap::from([("zone".to_owned(), "it's; $(here)".to_owned())]),
            min: 0,
            max: 2,
            idle: Duration::from_secs(60),
            start: Duration::from_secs(60),
        };
        let launch = Launch {
            program: "/opt/attune".into(),
            server: "https://scheduler:7070".to_owned(),
            token_file: Some("/etc/attune/worker.token".into()),
            ca: None,
            identity: None,
            grace: Duration::from_secs(60),
        };
        Slurm::new(pool, launch, settings)
    }

    fn settings() -> Settings {
        Settings { cpus: 2, memory: "4G".to_owned(), output: "/dev/null".to_owned(), ..Settings::default() }
    }

    #[test]
    fn lines_of_squeue_are_read_and_those_of_others_are_not() {
        let read = line("17|PENDING|r-1|Resources").unwrap();
        assert_eq!((read.number, standing(read.state), read.reason), ("17", Some(Standing::Waiting), "Resources"));
        assert_eq!(read.request.to_string(), "r-1");
        assert_eq!(line("18|RUNNING|r-2|None").and_then(|read| standing(read.state)), Some(Standing::Running));
        assert_eq!(line("18|RUNNING|r-2|a|b").unwrap().reason, "a|b");
        for other in ["", "19|RUNNING", "19_[1-4]|PENDING|r-3|None", "20|RUNNING|(null)|None", "x|RUNNING|r-1|None"] {
            assert_eq!(line(other), None, "{other:?}");
        }
        for ended in ["CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "COMPLETED"] {
            assert_eq!(standing(ended), None);
        }
        for unsure in ["COMPLETING", "SUSPENDED", "A_STATE_OF_TOMORROW"] {
            assert_eq!(standing(unsure), Some(Standing::Running));
        }
    }

    #[test]
    fn a_job_is_rendered_from_its_settings_and_the_script_holds_nothing_of_them() {
        let full = Settings {
            partition: Some("main".to_owned()),
            account: Some("ml".to_owned()),
            minutes: Some(90),
            gres: Some("gpu:1".to_owned()),
            options: vec!["--constraint=a100".to_owned()],
            prologue: "module load cuda\n".to_owned(),
            ..settings()
        };
        let slurm = slurm(full);
        let request = RequestId("r-1".parse().unwrap());
        assert_eq!(slurm.script(), "#!/bin/sh\nmodule load cuda\nexec \"$@\"\n");
        let options = slurm.options(&request).join(" ");
        for expected in [
            "--export=NIL",
            "--job-name=attune-gpu",
            "--comment=r-1",
            "--partition=main --account=ml --time=90 --gres=gpu:1 --constraint=a100",
            "--cpus-per-task=2 --mem=4G",
            "--signal=B:TERM@90",
        ] {
            assert!(options.contains(expected), "{expected} in {options}");
        }
        let arguments = slurm.launch.arguments(&slurm.pool, &request, "/scratch/r-1".as_ref());
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_str().unwrap()).collect();
        assert_eq!(
            arguments,
            [
                "worker",
                "--server",
                "https://scheduler:7070",
                "--name",
                "gpu-r-1",
                "--work-dir",
                "/scratch/r-1",
                "--devices",
                "2",
                "--cards",
                "1",
                "--grace",
                "60",
                "--label",
                "attune.request=r-1",
                "--label",
                "zone=it's; $(here)",
                "--token-file",
                "/etc/attune/worker.token",
            ]
        );
    }

    /// Programs that write down how they were called.
    #[tokio::test]
    async fn programs_are_called_without_a_shell_and_see_no_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let answers = [
            (
                "sbatch",
                "for a in \"$@\"; do printf '%s\\n' \"$a\"; done > \"$d/sbatch.args\"; env > \"$d/env\"; echo '41;east'",
            ),
            ("squeue", "printf '41|RUNNING|r-1|None\\n7|PENDING|other job|x\\n'"),
            ("scancel", "echo \"$@\" >> \"$d/scancel.args\"; [ \"$1\" != 41 ] || { echo 'it is held' >&2; exit 1; }"),
        ];
        for (name, answer) in answers {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\nd=$(dirname \"$0\")\n{answer}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let slurm = slurm(Settings { bin: Some(folder.path().to_owned()), ..settings() });
        let request = RequestId("r-1".parse().unwrap());
        slurm.ask(&request).await.unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let called = read("sbatch.args");
        assert!(called.lines().any(|argument| argument == "zone=it's; $(here)"), "{called}");
        assert!(called.ends_with("--discard-work-dir\n"), "{called}");
        // Cargo's variables are among the secrets here.
        let seen = read("env");
        assert!(seen.contains("PATH=") && !seen.contains("CARGO"), "{seen}");
        assert_eq!(slurm.list().await.unwrap(), BTreeMap::from([(request.clone(), Standing::Running)]));
        slurm.give_back(&request).await.unwrap();
        let error = slurm.withdraw(&request).await.unwrap_err().to_string();
        assert!(error.starts_with("Slurm cannot end a worker: ") && error.ends_with("it is held"), "{error}");
        assert_eq!(read("scancel.args"), "--signal=TERM --batch 41\n41\n");
        let missing = Slurm { settings: Settings { bin: Some("/nowhere".into()), ..settings() }, ..slurm };
        let error = missing.list().await.unwrap_err().to_string();
        assert!(error.starts_with("Slurm cannot say what it has: /nowhere/squeue: "), "{error}");
    }
}
