//! Failures as a CNI runtime sees them (CNI specification 1.1, section 5, "Error").

use serde_json::{Value, json};

use husk_dataplane::Error as KernelError;
use husk_ipam::Error as LeaseError;
use nix::errno::Errno;

/// Error codes: those of the specification up to 99, our own from 100 on. Code 3 (unknown container) is not used: it tells
/// the runtime that no DEL is needed, which only a DEL can know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Code {
    /// Incompatible CNI version.
    IncompatibleVersion = 1,
    /// Unsupported field in the network configuration; the message has its key and value.
    UnsupportedField = 2,
    /// Invalid necessary environment variables; the message names them.
    InvalidEnvironment = 4,
    /// I/O failure.
    Io = 5,
    /// Failed to decode content.
    Decode = 6,
    /// Invalid network configuration.
    InvalidConfig = 7,
    /// Try again later.
    TryAgainLater = 11,
    /// STATUS: the plugin cannot service ADD requests.
    NotAvailable = 50,
    /// STATUS: nor can it, and existing pods may have limited connectivity.
    LimitedConnectivity = 51,
    /// No pod address is left.
    Exhausted = 100,
    /// The attachment exists already.
    AlreadyAttached = 101,
    /// The kernel refused a change.
    Kernel = 102,
    /// CHECK: the attachment is not as it was made.
    Deviates = 103,
    /// GC: something could not be removed.
    Residue = 104,
    /// The daemon refuses the pod for good.
    Refused = 105,
    /// Another pod has the port of the host, or a tunnel of the node.
    PortClaimed = 106,
}

/// A failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}", joined(.details))]
pub(crate) struct Failure {
    /// Which kind.
    pub(crate) code: Code,
    /// What failed, on what, why, and what to do.
    pub(crate) message: String,
    /// What went wrong besides, for example while undoing.
    pub(crate) details: Vec<String>,
}

fn joined(details: &[String]) -> String {
    details.iter().map(|detail| format!("; {detail}")).collect()
}

impl Failure {
    /// A failure without details.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Vec::new() }
    }

    /// The failure with more details.
    pub(crate) fn with_details(mut self, details: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(details);
        self
    }

    /// The form a runtime reads.
    pub(crate) fn json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u16,
            "msg": self.message,
            "details": self.details.join("; "),
        })
    }
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        let code = match &error {
            KernelError::TimedOut { .. } | KernelError::Interrupted { .. } | KernelError::Overrun { .. } => {
                Code::TryAgainLater
            }
            KernelError::File { .. } => Code::Io,
            KernelError::Refused(refusal) if refusal.operation == "create" && refusal.errno == Errno::EEXIST => {
                Code::AlreadyAttached
            }
            _ => Code::Kernel,
        };
        Self::new(code, error.to_string()).with_details([error.remedy_once().to_owned()])
    }
}

impl From<LeaseError> for Failure {
    fn from(error: LeaseError) -> Self {
        let code = match &error {
            LeaseError::Io { .. } => Code::Io,
            LeaseError::Locked { .. } => Code::TryAgainLater,
            LeaseError::AlreadyLeased { .. } => Code::AlreadyAttached,
            LeaseError::Exhausted(_) => Code::Exhausted,
            LeaseError::PortClaimed(_) => Code::PortClaimed,
            LeaseError::NoFamily
            | LeaseError::TwoOfAFamily { .. }
            | LeaseError::FamilyNotServed(_)
            | LeaseError::NotOurs { .. }
            | LeaseError::Reserved(_)
            | LeaseError::Taken { .. } => Code::InvalidConfig,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_does_not_promise_to_try_again() {
        let source = std::io::Error::from(Errno::EIO);
        let failure = Failure::from(KernelError::File { operation: "write", path: "/proc/sys/net/x".into(), source });
        assert_eq!(failure.code, Code::Io);
        let [remedy] = failure.details.as_slice() else { panic!("{failure}") };
        assert!(remedy.contains("try again") && !remedy.contains("every few seconds"), "{failure}");
    }
}
