//! Warnings of the libraries on standard error, which a runtime logs (CNI specification 1.1, section 2, "Overview": plugins may
//! log there). What went wrong besides what an error tells would otherwise be known to nobody.
//!
//! A plugin is started for every pod: nothing is made, formatted or looked up until there is a warning.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Lets warnings through from now on.
pub(crate) fn show() {
    // Somebody else shows them already: then there is nothing to do.
    let _ = tracing::subscriber::set_global_default(Warnings {
        show: |line: &str| drop(writeln!(io::stderr().lock(), "{line}")),
    });
}

/// Shows each warning as one line.
struct Warnings<F> {
    show: F,
}

impl<F: Fn(&str) + 'static> Subscriber for Warnings<F> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        (self.show)(&format!("husk-cni: warning: {}{}", line.message, line.fields));
    }

    // Spans are not enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event in words.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a text does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn warnings_are_shown_in_one_line_each_and_the_rest_is_not() {
        let shown = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&shown);
        let show = move |line: &str| seen.lock().unwrap().push(line.to_owned());
        tracing::subscriber::with_default(Warnings { show }, || {
            tracing::warn!(error = %"no such device", interface = "eth0", "it could not be undone");
            tracing::error!(count = 7, "worse");
            tracing::info!("not interesting");
            tracing::info_span!("span").in_scope(|| tracing::debug!("nor this"));
        });
        assert_eq!(
            *shown.lock().unwrap(),
            [
                "husk-cni: warning: it could not be undone, error: no such device, interface: eth0",
                "husk-cni: warning: worse, count: 7",
            ]
        );
    }
}
