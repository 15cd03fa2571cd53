//! The paths of files inside an artifact: relative, few and plain characters, so that they mean the same on every file
//! system and none of them leads outside the folder it is unpacked into.

use std::collections::BTreeMap;

/// Longest path in bytes.
pub const PATH_BYTES_MAX: usize = 512;
/// Longest component of a path in bytes.
const COMPONENT_BYTES_MAX: usize = 128;
/// Deepest nesting of folders.
const DEPTH_MAX: usize = 16;

const FORM: &str = "expected a relative path of letters, digits and '._+=@-' with '/' between folders";

/// Checks one path.
///
/// # Errors
/// What is wrong, in words that read on from the quoted path.
pub fn check(path: &str) -> Result<(), String> {
    if path.len() > PATH_BYTES_MAX {
        return Err(format!("is {} bytes long; at most {PATH_BYTES_MAX} are allowed", path.len()));
    }
    if path.is_empty() || path.starts_with('/') {
        return Err(format!("is {path:?}; {FORM}"));
    }
    let components: Vec<_> = path.split('/').collect();
    if components.len() > DEPTH_MAX {
        return Err(format!("is {} folders deep; at most {DEPTH_MAX} are allowed", components.len()));
    }
    components.iter().try_for_each(|component| {
        check_component(component).map_err(|reason| format!("is {path:?}: {component:?} {reason}; {FORM}"))
    })
}

fn check_component(component: &str) -> Result<(), &'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._+=@-".contains(&b);
    if component.is_empty() {
        return Err("is empty");
    }
    if component.len() > COMPONENT_BYTES_MAX {
        return Err("is longer than 128 bytes");
    }
    if !component.bytes().all(allowed) {
        return Err("has another character");
    }
    // A leading dot hides a file and covers "." and ".."; a leading hyphen turns a name into an option of a command.
    if component.starts_with(['.', '-']) {
        return Err("starts with '.' or '-'");
    }
    if component.ends_with('.') {
        return Err("ends with '.', which Windows drops");
    }
    let stem = component.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let numbered =
        |prefix: &str| stem.strip_prefix(prefix).is_some_and(|n| n.len() == 1 && n.as_bytes()[0].is_ascii_digit());
    if matches!(stem.as_str(), "con" | "prn" | "aux" | "nul") || numbered("com") || numbered("lpt") {
        return Err("is a device on Windows");
    }
    Ok(())
}

/// Finds paths that would meet on a file system: equal ones, ones that differ in case only, a file that is a folder of
/// another.
#[derive(Debug, Default)]
pub struct Collisions {
    /// Folded path or folder → its spelling and whether it is a file.
    seen: BTreeMap<String, (String, bool)>,
}

impl Collisions {
    /// Adds a checked path.
    ///
    /// # Errors
    /// The earlier path or folder that it meets, in words that read on from the quoted path.
    pub fn add(&mut self, path: &str) -> Result<(), String> {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            let (part, is_file) = (&path[..end], end == path.len());
            match self.seen.get(&part.to_ascii_lowercase()) {
                None => {
                    self.seen.insert(part.to_ascii_lowercase(), (part.to_owned(), is_file));
                }
                Some((spelling, false)) if !is_file && spelling == part => {}
                Some((spelling, true)) if is_file && spelling == part => return Err(format!("is {path:?} twice")),
                Some((spelling, _)) => return Err(format!("is {path:?}, which collides with {spelling:?}")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths_pass() {
        for good in ["config.json", "model-00001-of-00002.safetensors", "a/b/c_d.x", "Über".trim_start_matches('Ü')] {
            check(good).unwrap();
        }
        let long = "a".repeat(129);
        let deep = ["a"; 17].join("/");
        let bad = [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a/..",
            "./a",
            "a//b",
            "a/",
            ".git/config",
            "-rf",
            "a\\b",
            "C:\\x",
            "C:/x",
            "a\0b",
            "a\nb",
            "a\u{1b}[31m",
            "a\u{202e}b",
            "naïve",
            "%2e%2e",
            "con",
            "NUL.txt",
            "com1.json",
            "x.",
            "a b",
            "~root/x",
            "${HOME}",
            &long,
            &deep,
        ];
        for path in bad {
            let reason = check(path).expect_err(path);
            assert!(!reason.chars().any(char::is_control), "{reason:?} is not safe to print");
        }
        assert!(check(&"a/".repeat(300)).is_err());
    }

    #[test]
    fn paths_that_meet_on_some_file_system_are_found() {
        let check = |paths: &[&str]| {
            let mut collisions = Collisions::default();
            paths.iter().try_for_each(|path| collisions.add(path))
        };
        assert_eq!(check(&["a/x", "a/y", "b", "ab"]), Ok(()));
        assert_eq!(check(&["a", "a"]).unwrap_err(), "is \"a\" twice");
        for bad in [["a", "A"], ["a", "a/b"], ["a/b", "a"], ["a/b", "A/c"], ["x/README.md", "x/readme.md"]] {
            assert!(check(&bad).unwrap_err().contains("collides"), "{bad:?}");
        }
    }
}
