//! Words that mean something to whoever wrote them and nothing to whoever reads them.

use super::repository::{files, none};

/// The words, and what to write instead.
const STRANGERS: &[(&str, &str)] = &[
    ("/work/", "a folder of one machine; take it as an argument or from the environment"),
    ("../shared", "a folder of one machine; name what is meant"),
    ("issue #", "say what it is about; numbers are kept elsewhere"),
    ("/tmp/", "a fixed folder that others can write; make a temporary one"),
    ("/root/", "a folder of one machine"),
    ("/home/", "a folder of one machine"),
];

/// Where one of them is right.
const MEANT: &[(&str, &str, &str)] = &[
    ("crates/artifacts/tests/it/unpacking.rs", "/tmp/", "a hostile path that must be refused; nothing is written"),
    ("crates/trainer/src/protocol.rs", "/work/", "an attempt's folder in the example of a message"),
];

#[test]
fn no_word_is_a_stranger_to_users() {
    let folders =
        ["benches", "crates", "deploy", "docs", "examples", "migrations", "proto", "services", "tests", "tools"];
    let endings = [".rs", ".md", ".toml", ".proto", ".sql", ".sh", ".py", ".yaml", ".yml", ".html", ".js"];
    let mut violations = Vec::new();
    for file in files(&folders, &endings) {
        if file.path.starts_with("tests/it/tidy/") {
            continue;
        }
        for (number, line) in file.lines() {
            for (word, remedy) in STRANGERS {
                let meant = MEANT.iter().any(|(path, of, _)| *path == file.path && of == word);
                if line.contains(word) && !meant {
                    violations.push(format!("{}:{number}: {word:?}: {remedy}", file.path));
                }
            }
        }
    }
    none("words that mean nothing to users:", &violations);
}

#[test]
fn text_files_end_in_a_line_break_and_have_no_blank_ends() {
    let mut violations = Vec::new();
    for file in files(
        &["crates", "docs", "migrations", "proto", "services", "tests", "tools"],
        &[".rs", ".toml", ".proto", ".sql", ".sh"],
    ) {
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            violations.push(format!("{}: does not end in a line break", file.path));
        }
        let blank = file.lines().filter(|(_, line)| line.ends_with([' ', '\t', '\r']));
        violations.extend(blank.map(|(number, _)| format!("{}:{number}: ends in white space", file.path)));
    }
    none("white space:", &violations);
}
