//! Every input of the fuzz targets' corpus, the ones that once broke something among them.

#![allow(clippy::print_stdout, reason = "the last line names the input that a reader breaks on")]

use std::fs;
use std::path::{Path, PathBuf};

use attune_untrusted::TARGETS;

/// The committed inputs, or those of a folder that is built alike.
fn corpus() -> PathBuf {
    if let Some(folder) = std::env::var_os("ATTUNE_CORPUS") {
        return folder.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

#[test]
fn every_input_of_the_corpus_is_read_without_harm() {
    for (name, target) in TARGETS {
        let folder = corpus().join(name);
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut inputs = 0;
        for entry in entries {
            let path = entry.expect("the folder can be read").path();
            println!("{}", path.display());
            target(&fs::read(&path).expect("the input can be read"));
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no inputs");
    }
}

#[test]
fn every_target_has_inputs_and_a_program_and_none_is_left_over() {
    let mut known: Vec<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    known.sort();
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).expect("the folder can be read");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("the folder can be read").path())
            .map(|path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(&corpus()), known);
    assert_eq!(list(&corpus().join("../targets")), known);
}
