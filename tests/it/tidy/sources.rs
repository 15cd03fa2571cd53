//! Rust files: compiled, of a size that a person reads, without left-overs.

use std::collections::BTreeSet;

use super::repository::{files, modules, none, parent, rust};

/// A file without a `mod` line is not compiled, and nobody notices.
#[test]
fn every_file_is_compiled() {
    let all = rust();
    let mut violations = Vec::new();
    for file in &all {
        // Each file of these folders of a package is a root of its own; folders in them have a `main.rs`.
        let is_root = ["/tests", "/benches", "/examples"].iter().any(|folder| file.folder().ends_with(folder));
        if is_root || file.path.ends_with("/build.rs") {
            continue;
        }
        match parent(file, &all) {
            None => {}
            Some(Err(why)) => violations.push(format!("{}: {why}", file.path)),
            Some(Ok((head, name))) if modules(head).iter().any(|(module, _)| *module == name) => {}
            Some(Ok((head, name))) => violations.push(format!("{}: {} has no `mod {name};`", file.path, head.path)),
        }
    }
    none("files that are not compiled:", &violations);
}

const LINES_MAX: usize = 600;

/// Longer files, with the reason why cutting them would not help a reader.
const LONG: &[(&str, &str)] = &[(
    "crates/store/tests/it/suite.rs",
    "one suite of promises, instantiated for every database; a list, not a design",
)];

#[test]
fn no_file_is_longer_than_a_person_reads() {
    let mut violations = Vec::new();
    for file in rust() {
        let lines = file.text.lines().count();
        if lines > LINES_MAX && !LONG.iter().any(|(path, _)| *path == file.path) {
            violations.push(format!("{}: {lines} lines; split it by idea, or list it here with the reason", file.path));
        }
    }
    let paths: BTreeSet<_> = rust().into_iter().map(|file| file.path).collect();
    let gone = LONG.iter().filter(|(path, _)| !paths.contains(*path));
    violations.extend(gone.map(|(path, _)| format!("{path}: is listed as long and is not there")));
    none(&format!("files of more than {LINES_MAX} lines:"), &violations);
}

/// Marks of unfinished work, and attributes that hide a test or move a module.
const LEFT_OVERS: &[(&str, &str)] = &[
    ("TODO", "finish it, or write the condition under which it must be done as a plain sentence"),
    ("FIXME", "fix it"),
    ("XXX", "say what is odd in a sentence"),
    ("HACK", "say why it is so in a sentence"),
    ("dbg!(", "remove it"),
    ("todo!(", "write it"),
    ("unimplemented!(", "write it"),
    ("#[ignore", "run the test or delete it; one that needs something from outside skips aloud"),
    ("#[should_panic", "assert the error"),
    ("#[path =", "put the module where its name says"),
    ("include_str!(\"/", "use a path inside the repository"),
];

#[test]
fn nothing_unfinished_is_left() {
    let mut violations = Vec::new();
    for file in rust() {
        for (number, line) in file.lines() {
            for (mark, remedy) in LEFT_OVERS {
                if contains_mark(line, mark) {
                    violations.push(format!("{}:{number}: {mark:?}: {remedy}", file.path));
                }
            }
        }
    }
    none("left-overs:", &violations);
}

/// Whether `mark` stands in the line and is not part of a longer word.
fn contains_mark(line: &str, mark: &str) -> bool {
    line.match_indices(mark).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + mark.len()..].chars().next();
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !(word(before) || mark.ends_with(char::is_alphanumeric) && word(after))
    })
}

/// What begins a statement or an item. Prose rarely begins with these *and* ends like code.
const CODE_STARTS: &[&str] = &[
    "let ",
    "use ",
    "fn ",
    "pub ",
    "if ",
    "for ",
    "while ",
    "return ",
    "match ",
    "impl ",
    "struct ",
    "enum ",
    "mod ",
    "assert!(",
    "assert_eq!(",
    "println!(",
    "self.",
    "#[",
];

#[test]
fn no_code_is_commented_out() {
    let mut violations = Vec::new();
    for file in rust() {
        for (number, line) in file.lines() {
            if is_commented_code(line) {
                violations.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    none("commented-out code (delete it; history has it):", &violations);
}

fn is_commented_code(line: &str) -> bool {
    // `///` and `//!` hold examples, which are compiled.
    let Some(comment) = line.trim_start().strip_prefix("// ") else { return false };
    let comment = comment.trim();
    let code_end =
        comment.ends_with(';') || comment.ends_with('{') || (comment.starts_with("#[") && comment.ends_with(']'));
    code_end && CODE_STARTS.iter().any(|start| comment.starts_with(start))
}

/// The rules above see what they are for.
#[test]
fn the_marks_are_found_and_words_are_not_taken_for_them() {
    for line in ["// TODO: later", "x(); // TODO", "dbg!(x)", "    todo!()", "#[ignore]", "    #[ignore = \"slow\"]"] {
        assert!(LEFT_OVERS.iter().any(|(mark, _)| contains_mark(line, mark)), "{line}");
    }
    for line in ["TODOS", "let mastodon = todo;", "do_todo!()", "HACKATHON", "a path = 1"] {
        assert!(!LEFT_OVERS.iter().any(|(mark, _)| contains_mark(line, mark)), "{line}");
    }
    for line in ["// let x = 1;", "    // if x {", "  // use std::fs;", "// #[derive(Debug)]", "// self.run();"] {
        assert!(is_commented_code(line), "{line}");
    }
    for line in
        ["// let it be; it is right", "/// let x = 1;", "//! use a;", "// for all x: y", "// if so, wait", "let x = 1;"]
    {
        assert!(!is_commented_code(line), "{line}");
    }
}

/// A golden file is small enough to be read by a person with a tool, and by everybody's clone.
const GOLDEN_BYTES_MAX: u64 = 64 << 10;

#[test]
fn golden_files_are_small_and_say_how_they_were_made() {
    let root = super::repository::root();
    let mut violations = Vec::new();
    let scripts: BTreeSet<_> = files(&["crates"], &[".py"]).iter().map(|file| file.folder().to_owned()).collect();
    for folder in std::fs::read_dir(root.join("crates")).expect("the crates are there").flatten() {
        let golden = folder.path().join("golden");
        if !golden.is_dir() {
            continue;
        }
        let shown = golden.strip_prefix(&root).unwrap_or(&golden).display().to_string();
        if !scripts.contains(&shown) {
            violations.push(format!("{shown}: has no script that makes it"));
        }
        let mut open = vec![golden];
        while let Some(at) = open.pop() {
            for entry in std::fs::read_dir(&at).expect("a golden folder can be read").flatten() {
                let size = entry.metadata().map_or(0, |found| found.len());
                if entry.path().is_dir() {
                    open.push(entry.path());
                } else if size > GOLDEN_BYTES_MAX {
                    violations.push(format!("{}: {size} bytes; at most {GOLDEN_BYTES_MAX}", entry.path().display()));
                }
            }
        }
    }
    none("golden files:", &violations);
}
