//! What the daemon writes: its log, and the files of flows and decisions.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Form of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object per line.
    Json,
}

/// Least severity that is logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what changed.
    #[default]
    Info,
    /// And why.
    Debug,
    /// And everything else.
    Trace,
}

/// Logging.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// Form.
    pub format: LogFormat,
    /// Level.
    pub level: LogLevel,
}

/// Logs in JSON lines, for whoever collects them; none by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionLogs {
    /// File of flows; absolute.
    pub flows: Option<PathBuf>,
    /// File of what people and the daemon decided; absolute.
    pub audit: Option<PathBuf>,
    /// Flows are also connections that began and ended, not only what was denied.
    pub connections: bool,
    /// Room for each of the files.
    pub limits: LogLimits,
}

/// Room for a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of the file; with more it is renamed and begun anew.
    pub bytes: u64,
    /// Files that are kept besides.
    pub keep: u8,
}

impl LogLimits {
    /// Least number of bytes of a file.
    pub const LEAST_BYTES: u64 = 64 << 10;
}

impl Default for DecisionLogs {
    fn default() -> Self {
        Self { flows: None, audit: None, connections: true, limits: LogLimits::default() }
    }
}

impl Default for LogLimits {
    /// 400 MiB at most, which holds a million flows.
    fn default() -> Self {
        Self { bytes: 100 << 20, keep: 3 }
    }
}
