//! Structured logs on standard error, for people or for machines.

use husk_overlay::config::{LogConfig, LogFormat, LogLevel};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Crates whose trace and debug output holds packets, some with keys in them, or every step of every request to an API server.
const QUIET: [&str; 9] =
    ["netlink_packet_core", "netlink_sys", "gotatun", "mio", "hyper", "hyper_util", "kube_client", "rustls", "tower"];

/// What is let through at a level.
pub(crate) fn filter(config: &LogConfig) -> EnvFilter {
    let level = match config.level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    let mut filter = EnvFilter::new(level);
    for name in QUIET {
        // At `info` none of them prints packet contents; more is never let through, whatever the level asked for.
        let ceiling = if level == "error" { "error" } else { "warn" };
        if let Ok(directive) = format!("{name}={ceiling}").parse() {
            filter = filter.add_directive(directive);
        }
    }
    filter
}

/// Installs the log writer of this process; a second call changes nothing.
pub fn start(config: &LogConfig) {
    let registry = tracing_subscriber::registry().with(filter(config));
    let result = match config.format {
        LogFormat::Json => registry
            .with(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr))
            .try_init(),
        LogFormat::Text => {
            let colour = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
            registry.with(tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(std::io::stderr)).try_init()
        }
    };
    // Only a test that starts two daemons in one process gets here twice.
    let _ = result;
}
