//! The older text format, made from OpenMetrics: they differ in what heads a metric, and in the end.
//!
//! OpenMetrics names a counter `x` whose sample is `x_total`, and has a type `info`; the older format names what is asked for,
//! and has gauges (Prometheus, "Exposition formats"). Samples are the same in both.

use std::fmt::Write as _;

use super::catalogue::{ALL, Kind};

/// The same metrics in the older format.
pub(super) fn of(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1024);
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        let (Some(keyword), Some(stem), Some(rest)) = (words.next(), words.next(), words.next()) else {
            // The end.
            continue;
        };
        let metric = ALL.iter().find(|metric| metric.stem() == stem);
        let name = metric.map_or(stem, |metric| metric.name);
        let rest =
            if keyword == "TYPE" && metric.is_some_and(|metric| metric.kind == Kind::Info) { "gauge" } else { rest };
        // Writing to a text does not fail.
        let _ = writeln!(text, "# {keyword} {name} {rest}");
    }
    text
}
