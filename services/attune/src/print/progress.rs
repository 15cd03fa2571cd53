//! How far long work has come: a bar on a terminal, now and then a line elsewhere; always on standard error.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between lines where there is no terminal; work that is done sooner says nothing.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

const STYLE: &str = "{prefix} {wide_bar} {pos}/{len} {msg}";

/// The progress of one piece of work.
pub(crate) struct Progress {
    /// The bar, on a terminal.
    bar: Option<ProgressBar>,
    label: String,
    total: u64,
    last_line: Instant,
}

impl Progress {
    /// Work of `total` units that has just begun.
    pub(crate) fn new(label: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_prefix(label.to_owned());
            bar.with_style(ProgressStyle::with_template(STYLE).unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, label: label.to_owned(), total, last_line: now() }
    }

    /// `done` units are done; `note` is what is worth knowing about it.
    pub(crate) fn at(&mut self, done: u64, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(note.to_owned());
            bar.set_position(done);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = now();
            // Progress that nobody can read is not worth failing for.
            drop(writeln!(std::io::stderr(), "{}", line(&self.label, done, self.total, note)));
        }
    }
}

impl Progress {
    /// A line that stays, above the bar.
    pub(crate) fn above(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| super::note(text)),
            None => super::note(text),
        }
    }
}

impl Drop for Progress {
    // The work is done or has failed: the bar goes away.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(label: &str, done: u64, total: u64, note: &str) -> String {
    format!("{label} {done}/{total} {note}").trim_end().to_owned()
}

#[expect(clippy::disallowed_methods, reason = "the shell reads the clock, to pace what it prints")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_how_far_and_how_well() {
        assert_eq!(line("training", 30, 200, "loss 1.25"), "training 30/200 loss 1.25");
        assert_eq!(line("reading", 1, 2, ""), "reading 1/2");
    }
}
