//! What a companion does, and how one that does it is recognised.

use std::fmt;
use std::path::PathBuf;

use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};

use crate::wireguard_userspace::socket_path;

/// What a companion does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Be the WireGuard device of this name.
    WireguardUserspace {
        /// Its name.
        interface: InterfaceName,
    },
    /// Keep open the socket at which ESP in UDP arrives. There is at most one such process, whatever its port.
    UdpEncapsulation {
        /// UDP port.
        port: u16,
        /// Family of the underlay.
        family: Family,
    },
}

impl Job {
    /// The subcommand of `huskd`, by which the process is recognised.
    pub(super) fn subcommand(&self) -> &'static str {
        match self {
            Self::WireguardUserspace { .. } => "wireguard-userspace",
            Self::UdpEncapsulation { .. } => "udp-encapsulation",
        }
    }

    /// What the subcommand is told besides the run directory.
    pub(super) fn arguments(&self) -> Vec<String> {
        match self {
            Self::WireguardUserspace { interface } => vec!["--interface".into(), interface.to_string()],
            Self::UdpEncapsulation { port, family } => {
                vec!["--port".into(), port.to_string(), "--family".into(), family.to_string().to_lowercase()]
            }
        }
    }

    /// Directory of lock and log below the run directory.
    pub(super) fn directory(&self) -> &'static str {
        match self {
            Self::WireguardUserspace { .. } => "wireguard",
            Self::UdpEncapsulation { .. } => "ipsec",
        }
    }

    /// Beginning of the names of lock and log.
    pub(super) fn stem(&self) -> &str {
        match self {
            Self::WireguardUserspace { interface } => interface.as_str(),
            Self::UdpEncapsulation { .. } => "udp-encapsulation",
        }
    }

    /// What one process at a time can serve, in words.
    pub(super) fn subject(&self) -> String {
        match self {
            Self::WireguardUserspace { interface } => interface.to_string(),
            Self::UdpEncapsulation { .. } => "ESP in UDP".into(),
        }
    }

    /// Where the process answers questions; one without says in its lock file that it is ready.
    pub(super) fn socket(&self) -> Option<PathBuf> {
        match self {
            Self::WireguardUserspace { interface } => Some(socket_path(interface)),
            Self::UdpEncapsulation { .. } => None,
        }
    }

    /// What a process without a socket writes below its id when it is ready: what it does.
    pub(crate) fn ready_line(&self) -> String {
        format!("ready {}", self.arguments().join(" "))
    }

    /// True if what goes with the process is there; nothing that can be seen from outside does for some.
    pub(super) fn is_there(&self) -> Option<bool> {
        match self {
            Self::WireguardUserspace { interface } => Some(if_nametoindex(interface.as_str()).is_ok()),
            Self::UdpEncapsulation { .. } => None,
        }
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WireguardUserspace { interface } => write!(f, "userspace WireGuard process for {interface}"),
            Self::UdpEncapsulation { .. } => f.write_str("process that takes ESP in UDP"),
        }
    }
}
