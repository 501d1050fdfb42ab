//! What can go wrong between Husk and the kernel: every variant names the operation and the object.

mod remedy;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why the kernel, or a program or file that stands for it, did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel answered a request with an error.
    #[error("{0}")]
    Refused(Refusal),

    /// A socket could not be opened, set up, written or read.
    #[error("cannot {operation} a {protocol} socket: {source}")]
    Socket {
        /// What was tried, for example "open".
        operation: &'static str,
        /// Netlink protocol, for example "NETLINK_ROUTE".
        protocol: &'static str,
        /// The system's word.
        source: io::Error,
    },

    /// The socket that probes are sent from and answered at could not be opened, set up or read.
    #[error("cannot {operation} the UDP socket of probes at {address}: {source}")]
    ProbeSocket {
        /// What was tried, for example "bind".
        operation: &'static str,
        /// Own address and port.
        address: SocketAddr,
        /// The system's word.
        source: io::Error,
    },

    /// Packets of an interface could not be captured.
    #[error("cannot {operation} {interface} to capture its packets: {source}")]
    Capture {
        /// What was tried, for example "listen on".
        operation: &'static str,
        /// The interface.
        interface: String,
        /// The system's word.
        source: io::Error,
    },

    /// The kernel did not answer in time. What became of the request is unknown; the next read tells.
    #[error("cannot {operation} {object}: the kernel did not answer within {seconds} s")]
    TimedOut {
        /// Operation of the request.
        operation: &'static str,
        /// Object of the request.
        object: String,
        /// How long it was waited for, in seconds.
        seconds: u64,
    },

    /// A table changed during every attempt to read it.
    #[error("cannot {operation} {object}: it changed during each of {attempts} attempts")]
    Interrupted {
        /// Operation of the request.
        operation: &'static str,
        /// Object of the request.
        object: String,
        /// How often it was tried.
        attempts: u32,
    },

    /// The kernel dropped answers because they came faster than they were read. What became of the request is unknown;
    /// the next read tells.
    #[error("cannot tell whether {operation} {object} succeeded: the kernel dropped answers (receive buffer overrun)")]
    Overrun {
        /// Operation of the request.
        operation: &'static str,
        /// Object of the request.
        object: String,
    },

    /// An answer that could not be understood.
    #[error("cannot {operation} {object}: the answer could not be understood: {reason}")]
    Malformed {
        /// Operation of the request.
        operation: &'static str,
        /// Object of the request.
        object: String,
        /// What was wrong with the answer; never holds the answer of a WireGuard device, which has keys in it.
        reason: String,
    },

    /// A network namespace could not be opened or entered.
    #[error("cannot {operation} the network namespace {path}: {source}")]
    Namespace {
        /// What was tried, for example "enter".
        operation: &'static str,
        /// Path of the namespace file.
        path: String,
        /// The system's word.
        source: io::Error,
    },

    /// A path that should lead to a network namespace leads to something else.
    #[error("{path} is not a network namespace: it is {found}")]
    NotANamespace {
        /// The path.
        path: String,
        /// What it is instead.
        found: &'static str,
    },

    /// A file below `/proc` or `/sys`, or a control socket, could not be used.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried, for example "write".
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },

    /// A program that Husk runs failed.
    #[error("cannot {operation} {object} with {program}: {reason}")]
    Program {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// Name of the program.
        program: &'static str,
        /// What it said, or why it could not be run.
        reason: String,
    },

    /// A program that Husk runs is not installed.
    #[error("cannot {operation} {object}: the program {program} is not installed")]
    NoProgram {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// Name of the program.
        program: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },

    /// The kernel lacks something the operation needs.
    #[error("cannot {operation} {object}: {reason}")]
    Unsupported {
        /// Operation.
        operation: &'static str,
        /// Object.
        object: String,
        /// What is missing.
        reason: String,
        /// What would help, for example which module to load.
        remedy: &'static str,
    },

    /// A change that needs a private key found none in the key ring.
    #[error("cannot configure {interface}: its private key is not in the key ring")]
    NoPrivateKey {
        /// WireGuard device.
        interface: String,
    },

    /// An ESP association's key could not be made.
    #[error("cannot install the association {association}: {reason}")]
    NoAssociationKey {
        /// SPI, and the epochs and addresses at its ends.
        association: String,
        /// Why not; holds no secret.
        reason: String,
    },

    /// A change that was to be made together with others, whose failure is reported with the first of them.
    #[error("it was to be made in one step with the change before it, which failed")]
    WithTheOthers,

    /// Changes that were not made, since what makes them safe is not in place.
    #[error("{withheld} withheld, since {missing} is not in place: {reason}")]
    Withheld {
        /// The changes with a verb, for example "\"add route 10.42.1.0/24 dev husk-vx\" and 3 more changes are".
        withheld: String,
        /// What is not in place.
        missing: &'static str,
        /// Why it is not.
        reason: String,
    },

    /// A change to a device that a userspace WireGuard process has not created yet.
    #[error("cannot configure {interface}: its userspace process has not created the device yet")]
    WaitingForUserspaceDevice {
        /// WireGuard device.
        interface: String,
    },
}

/// The kernel's refusal of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Operation, for example "add route".
    pub operation: &'static str,
    /// Object, for example "10.42.1.0/24 via 10.42.1.0 dev husk-vx".
    pub object: String,
    /// Error number.
    pub errno: Errno,
    /// The kernel's extended acknowledgement, if it gave one: usually says more than the number.
    pub explanation: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, object, errno, explanation } = self;
        write!(f, "the kernel refused to {operation} {object}: ")?;
        match explanation {
            Some(text) => write!(f, "{text} ({})", errno.desc()),
            None => f.write_str(errno.desc()),
        }
    }
}

impl Error {
    /// The error number, when the system gave one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused(refusal) => Some(refusal.errno),
            Self::Socket { source, .. }
            | Self::ProbeSocket { source, .. }
            | Self::Capture { source, .. }
            | Self::Namespace { source, .. }
            | Self::File { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }

    /// The kernel's extended acknowledgement, when it gave one.
    #[must_use]
    pub fn explanation(&self) -> Option<&str> {
        match self {
            Self::Refused(refusal) => refusal.explanation.as_deref(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn refusal(errno: Errno, explanation: Option<&str>) -> Error {
        Error::Refused(Refusal {
            operation: "add route",
            object: "10.42.1.0/24 dev husk-vx".to_owned(),
            errno,
            explanation: explanation.map(str::to_owned),
        })
    }

    #[test]
    fn a_refusal_says_what_on_what_and_why() {
        assert_eq!(
            refusal(Errno::EINVAL, Some("Nexthop has invalid gateway")).to_string(),
            "the kernel refused to add route 10.42.1.0/24 dev husk-vx: Nexthop has invalid gateway (Invalid argument)"
        );
        assert_eq!(
            refusal(Errno::EPERM, None).to_string(),
            "the kernel refused to add route 10.42.1.0/24 dev husk-vx: Operation not permitted"
        );
    }
}
