//! Whole runs on other numbers of threads, each in a process of its own: the number is fixed when the first of them starts.

use std::process::Command;

use crate::bits::KINDS;
use crate::support::Small;

/// Set in a process that is to say what runs make.
const ASKED: &str = "ATTUNE_TEST_SAYS_WHAT_RUNS_MAKE";

/// Says what every kind of run makes in three steps, on as many threads as its process has, where it is asked.
#[test]
fn what_every_kind_makes() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    let small = Small::with_weights();
    for (name, changes) in KINDS {
        let (_, files) = small.finish(small.plan(&[changes, &[("tune.steps", "3")]].concat()), 1);
        let mut hash = blake3::Hasher::new();
        for (file, bytes) in files {
            hash.update(file.as_bytes()).update(&bytes);
        }
        println!("made {name}: {}", hash.finalize());
    }
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let made = |threads: &str| -> Vec<String> {
        let mut own = Command::new(std::env::current_exe().unwrap());
        own.args(["--exact", "threads::what_every_kind_makes", "--nocapture"]);
        let output = own.env("RAYON_NUM_THREADS", threads).env(ASKED, "yes").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter_map(|line| Some(line.split_once("made ")?.1.to_owned())).collect()
    };
    let (one, three) = (made("1"), made("3"));
    assert_eq!(one.len(), KINDS.len());
    assert_eq!(one, three);
}
