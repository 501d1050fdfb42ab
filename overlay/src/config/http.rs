//! What the daemon serves over HTTP: metrics and health, and its page.

use std::net::{Ipv4Addr, SocketAddr};

/// Port of the endpoint of metrics, which no other exporter is known to use (the Prometheus project's list of default ports has none
/// of that number).
const METRICS_PORT: u16 = 9472;

/// Port of the page.
const UI_PORT: u16 = 9473;

/// The endpoint of metrics and health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Where to listen; none: nowhere.
    pub listen: Option<SocketAddr>,
    /// Series for each peer, too, of which a large cluster has many thousands.
    pub per_peer: bool,
}

/// The page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UiConfig {
    /// Where to listen, always a loopback address; none: nowhere.
    pub listen: Option<SocketAddr>,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS_PORT))), per_peer: false }
    }
}

impl Default for UiConfig {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, UI_PORT))) }
    }
}
