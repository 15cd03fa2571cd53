//! The log of a process: `tracing` events on standard error, as text for people or JSON lines for programs.
//!
//! Standard output belongs to data (a command's result, a child's protocol), so the log never goes there.

use std::io::IsTerminal as _;

use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt};

use crate::Error;

/// The environment variable that holds the filter, such as `info,attune_scheduler=debug`.
pub const FILTER_VARIABLE: &str = "ATTUNE_LOG";

/// How an event is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// One line of text per event.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What to log and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// How an event is written.
    pub format: Format,
    /// The filter used when `ATTUNE_LOG` is not set.
    pub default_filter: String,
}

impl Default for Logging {
    /// Text; state changes of our own crates, and trouble from everybody.
    fn default() -> Self {
        Self { format: Format::Text, default_filter: "warn,attune=info".to_owned() }
    }
}

impl Logging {
    /// Installs the log for the whole process.
    ///
    /// # Errors
    /// [`Error::Filter`] when `ATTUNE_LOG` does not parse; [`Error::AlreadyInstalled`] on a second call.
    pub fn install(&self) -> Result<(), Error> {
        let given = std::env::var(FILTER_VARIABLE).ok().filter(|text| !text.trim().is_empty());
        let (filter, origin) = match given {
            Some(text) => (text, FILTER_VARIABLE),
            None => (self.default_filter.clone(), "default"),
        };
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let subscriber = self.subscriber(&filter, origin, colour, std::io::stderr)?;
        subscriber.try_init().map_err(|_| Error::AlreadyInstalled)
    }

    fn subscriber<W>(
        &self,
        filter: &str,
        origin: &'static str,
        colour: bool,
        writer: W,
    ) -> Result<Box<dyn Subscriber + Send + Sync>, Error>
    where
        W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
    {
        let filter = EnvFilter::builder().parse(filter).map_err(|source| Error::Filter {
            filter: filter.to_owned(),
            origin,
            reason: source.to_string(),
        })?;
        let builder = fmt().with_env_filter(filter).with_ansi(colour).with_writer(writer);
        Ok(match self.format {
            Format::Text => Box::new(builder.finish()),
            Format::Json => Box::new(builder.json().flatten_event(true).finish()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: Format, filter: &str) -> String {
        let page = Page::default();
        let writer = page.clone();
        let logging = Logging { format, ..Logging::default() };
        let subscriber = logging.subscriber(filter, "default", false, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(job = "j1", "job granted");
            tracing::debug!("not asked for");
        });
        String::from_utf8(page.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn text_holds_level_fields_and_message_and_the_filter_cuts() {
        let text = logged(Format::Text, "info");
        assert!(text.contains("INFO") && text.contains("job granted") && text.contains("job=\"j1\""), "{text}");
        assert!(!text.contains("not asked for"), "{text}");
        assert_eq!(logged(Format::Text, "error"), "");
    }

    #[test]
    fn json_is_one_object_per_line_with_fields_at_the_top() {
        let text = logged(Format::Json, "debug");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with('{') && lines[0].contains("\"job\":\"j1\""), "{text}");
    }

    #[test]
    fn a_bad_filter_is_refused_with_its_text_and_origin() {
        let error = Logging::default().subscriber("attune=lots", FILTER_VARIABLE, false, std::io::sink).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("attune=lots") && text.contains("ATTUNE_LOG"), "{text}");
    }
}
