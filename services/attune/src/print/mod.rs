//! What people and programs read: tables, JSON, progress, errors.
//!
//! Data goes to standard output, everything else to standard error. A reader that goes away is success.

use std::borrow::Cow;
use std::io::Write as _;

mod failure;
pub(crate) mod manual;
mod out;
mod progress;
mod table;

pub(crate) use failure::{FAILED, Failure, USAGE};
pub(crate) use out::Out;
pub(crate) use progress::Progress;
pub(crate) use table::{Column, Table};

/// A line for people on standard error. There is nobody left to tell when that is gone.
pub(crate) fn note(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{}", plain(text)));
}

/// What others wrote, so that it steers no terminal: characters that do more than stand where they are (but for tabs and line breaks)
/// are written as Rust writes them.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let steers = |c: char| {
        // Controls of terminals, and those that turn the direction of what follows them.
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let written = |c: char| if steers(c) { c.escape_unicode().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(written).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_steers_no_terminal() {
        assert_eq!(plain("größe\t12\nand more"), "größe\t12\nand more");
        assert_eq!(plain("\u{1b}[31mred\r\u{7}"), "\\u{1b}[31mred\\u{d}\\u{7}");
        assert_eq!(plain("a\u{202e}b\u{9b}c"), "a\\u{202e}b\\u{9b}c");
        let mut table = Table::new([Column::left("NAME")]);
        table.row(["\u{1b}]0;title\u{7}"]);
        assert!(!table.to_string().contains('\u{1b}'));
    }
}
