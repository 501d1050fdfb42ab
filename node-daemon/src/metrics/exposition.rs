//! Writes the exposition.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::catalogue::{ALL, Kind, Metric};
use super::families::{Inputs, series};
use super::text;

/// Form of the exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0, which Prometheus asks for.
    OpenMetrics,
    /// The older text format of Prometheus, version 0.0.4, for whoever does not: people with curl, and other agents.
    Text,
}

impl Form {
    /// The form for somebody who accepts this (RFC 9110, section 12.5.1). Weights do not count: who names OpenMetrics can read it.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Text }
    }

    /// Its media type.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The exposition of all metrics.
///
/// # Errors
/// None that could happen: writing to a text does not fail.
pub fn exposition(inputs: Inputs, form: Form) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Everything(inputs)));
    let mut written = String::new();
    encode(&mut written, &registry)?;
    Ok(match form {
        Form::OpenMetrics => written,
        Form::Text => text::of(&written),
    })
}

#[derive(Debug)]
struct Everything(Inputs);

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        ALL.iter().try_for_each(|metric| self.write(metric, &mut encoder))
    }
}

impl Everything {
    fn write(&self, metric: &Metric, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match metric.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
            Kind::Info => MetricType::Info,
        };
        if let Some(live) = self.0.live.metric(metric) {
            if live.is_empty() {
                return Ok(());
            }
            return live.encode(encoder.encode_descriptor(metric.stem(), metric.help, None, kind)?);
        }
        let series = series(metric, &self.0);
        if series.is_empty() {
            return Ok(());
        }
        let mut encoder = encoder.encode_descriptor(metric.stem(), metric.help, None, kind)?;
        for (labels, value) in &series {
            match metric.kind {
                Kind::Info => encoder.encode_info(labels)?,
                // Braces with nothing in them are allowed, and ugly.
                kind if labels.is_empty() => write_value(&mut encoder, kind, *value)?,
                kind => write_value(&mut encoder.encode_family(labels)?, kind, *value)?,
            }
        }
        Ok(())
    }
}

fn write_value(encoder: &mut MetricEncoder<'_>, kind: Kind, value: f64) -> fmt::Result {
    match kind {
        Kind::Counter => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
        Kind::Gauge | Kind::Histogram | Kind::Info => encoder.encode_gauge(&value),
    }
}
