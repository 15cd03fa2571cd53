//! The files that the rules look at.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The repository's root.
pub(super) fn root() -> PathBuf {
    // Cargo sets it when it runs a test, too, so that a copy of the repository can be looked at with the same binary.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).parent().expect("this package lies one folder below the root").to_owned()
}

/// A text file of the repository.
pub(super) struct File {
    /// Path from the root, `/` between folders.
    pub(super) path: String,
    pub(super) text: String,
}

impl File {
    /// The file's name without its ending.
    pub(super) fn stem(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        name.split_once('.').map_or(name, |(stem, _)| stem)
    }

    /// The path of the folder that it lies in.
    pub(super) fn folder(&self) -> &str {
        self.path.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// Lines with their numbers.
    pub(super) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(i, line)| (i + 1, line))
    }
}

/// Every file below `folders` of the root whose name ends in one of `endings`, sorted by path. Hidden files and what is
/// built are left out.
pub(super) fn files(folders: &[&str], endings: &[&str]) -> Vec<File> {
    let root = root();
    let mut found = Vec::new();
    for folder in folders {
        walk(&root, &root.join(folder), endings, &mut found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no {endings:?} below {folders:?}: the rule looks in the wrong place");
    found
}

fn walk(root: &Path, at: &Path, endings: &[&str], found: &mut Vec<File>) {
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.map(|entry| entry.expect("a folder of the repository can be read")) {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.') || name == "target" || name == "node_modules" {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, endings, found);
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            // A file may be renamed by an editor between the listing and the reading.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let path = path.strip_prefix(root).expect("it lies below the root").to_string_lossy().replace('\\', "/");
            found.push(File { path, text });
        }
    }
}

/// Folders with our Rust code.
pub(super) const CODE: &[&str] = &["benches", "crates", "services", "tests"];

/// All Rust files but those of these rules, which must quote what they forbid.
pub(super) fn rust() -> Vec<File> {
    let mut files = files(CODE, &[".rs"]);
    files.retain(|file| !file.path.starts_with("tests/it/tidy/"));
    files
}

/// The modules that a Rust file declares in files of their own, and whether only for tests.
pub(super) fn modules(file: &File) -> Vec<(&str, bool)> {
    let mut found = Vec::new();
    let mut for_tests = false;
    for line in file.text.lines().map(str::trim) {
        if line.starts_with("#[") {
            for_tests |= line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test");
            continue;
        }
        let visible = line.strip_prefix("pub").map_or(line, |rest| match rest.strip_prefix('(') {
            Some(rest) => rest.split_once(") ").map_or(rest, |(_, rest)| rest),
            None => rest.trim_start(),
        });
        if let Some(name) = visible.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) {
            found.push((name, for_tests));
        }
        for_tests = false;
    }
    found
}

/// The file that must declare the module in `file`: its folder's head, or the head above for a folder's own head.
/// Nothing for the root of a crate.
pub(super) fn parent<'a>(file: &File, all: &'a [File]) -> Option<Result<(&'a File, String), String>> {
    let is_root = ["lib", "main", "build"].contains(&file.stem()) || file.folder().ends_with("/src/bin");
    if is_root {
        return None;
    }
    let (folder, name) = if file.stem() == "mod" {
        let (above, name) = file.folder().rsplit_once('/').unwrap_or_else(|| ("", file.folder()));
        (above, name)
    } else {
        (file.folder(), file.stem())
    };
    let head = ["mod.rs", "lib.rs", "main.rs"].iter().find_map(|head| {
        let path = format!("{folder}/{head}");
        all.iter().find(|other| other.path == path)
    });
    Some(head.map(|head| (head, name.to_owned())).ok_or_else(|| format!("{folder} has no mod.rs, lib.rs or main.rs")))
}

/// Paths of files that are compiled for tests only, because they or a folder above are declared so.
pub(super) fn test_only(all: &[File]) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for file in all {
        if file.path.contains("/tests/") || file.path.starts_with("tests/") {
            found.insert(file.path.as_str());
            continue;
        }
        let mut at = file;
        while let Some(Ok((head, name))) = parent(at, all) {
            if modules(head).iter().any(|(module, for_tests)| *module == name && *for_tests) {
                found.insert(file.path.as_str());
                break;
            }
            at = head;
        }
    }
    found
}

/// What stands before a file's own tests.
pub(super) fn before_tests(file: &File) -> &str {
    let at = file.text.find("\n#[cfg(test)]\n").map_or(file.text.len(), |at| at + 1);
    file.text.get(..at).unwrap_or(&file.text)
}

/// Fails with every violation, if there is one.
pub(super) fn none(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}\n  {}\n", violations.join("\n  "));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.into(), text: text.into() }
    }

    #[test]
    fn modules_are_found_with_their_visibility_and_condition() {
        let head = file(
            "crates/x/src/lib.rs",
            "mod a;\n    pub mod b;\npub(crate) mod c;\n#[cfg(test)]\nmod d;\nmod e;\nmod inline {\n}\n// mod gone;\n#[cfg(test)]\nuse x;\nmod f;\n",
        );
        let found = modules(&head);
        assert_eq!(found, [("a", false), ("b", false), ("c", false), ("d", true), ("e", false), ("f", false)]);
    }

    #[test]
    fn a_file_under_a_test_module_is_a_test() {
        let all = [
            file("crates/x/src/lib.rs", "mod a;\n#[cfg(test)]\nmod t;\n"),
            file("crates/x/src/a.rs", "fn a() {}\n#[cfg(test)]\nmod tests {}\n"),
            file("crates/x/src/t/mod.rs", "mod deep;\n"),
            file("crates/x/src/t/deep.rs", ""),
            file("crates/x/tests/it/main.rs", ""),
        ];
        let tests: Vec<_> = test_only(&all).into_iter().collect();
        assert_eq!(tests, ["crates/x/src/t/deep.rs", "crates/x/src/t/mod.rs", "crates/x/tests/it/main.rs"]);
        assert_eq!(before_tests(&all[1]), "fn a() {}\n");
        assert!(parent(&file("crates/x/src/no/where.rs", ""), &all).unwrap().is_err());
        assert!(parent(&all[0], &all).is_none());
    }
}
