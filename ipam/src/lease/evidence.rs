//! When a lease may be taken from an attachment that nobody deleted.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;

use husk_overlay::endpoint::NetnsIdentity;

/// What became of a network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetnsEvidence {
    /// The path still leads to it.
    Alive,
    /// The path is missing.
    Missing,
    /// The path leads to something else.
    Replaced,
    /// It could not be found out.
    Unknown,
}

impl NetnsEvidence {
    /// Looks at the path.
    #[must_use]
    pub fn observe(netns: &NetnsIdentity) -> Self {
        match std::fs::metadata(&netns.path) {
            Ok(file) if (file.dev(), file.ino()) == (netns.device, netns.inode) => Self::Alive,
            Ok(_) => Self::Replaced,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Self::Missing,
            Err(_) => Self::Unknown,
        }
    }
}

/// What is known about an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// Its network namespace.
    pub netns: NetnsEvidence,
    /// Its host interface exists. As long as it does, the pod's end exists too, wherever that is.
    pub host_interface_exists: bool,
    /// A process is still wiring it.
    pub being_wired: bool,
}

/// True if the attachment is provably gone: no interface, no namespace, nobody at work on it. A path alone proves
/// nothing, as a daemon in a container may not see the runtime's.
#[must_use]
pub fn stale(evidence: &Evidence) -> bool {
    let namespace_gone = matches!(evidence.netns, NetnsEvidence::Missing | NetnsEvidence::Replaced);
    namespace_gone && !evidence.host_interface_exists && !evidence.being_wired
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_proof_makes_a_lease_stale() {
        let gone = Evidence { netns: NetnsEvidence::Missing, host_interface_exists: false, being_wired: false };
        assert!(stale(&gone));
        assert!(stale(&Evidence { netns: NetnsEvidence::Replaced, ..gone }));
        assert!(!stale(&Evidence { netns: NetnsEvidence::Alive, ..gone }));
        assert!(!stale(&Evidence { netns: NetnsEvidence::Unknown, ..gone }));
        assert!(!stale(&Evidence { host_interface_exists: true, ..gone }));
        assert!(!stale(&Evidence { being_wired: true, ..gone }));
    }

    #[test]
    fn a_path_is_compared_by_device_and_inode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let meta = file.as_file().metadata().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let mut netns = NetnsIdentity { path, device: meta.dev(), inode: meta.ino() };
        assert_eq!(NetnsEvidence::observe(&netns), NetnsEvidence::Alive);
        netns.inode += 1;
        assert_eq!(NetnsEvidence::observe(&netns), NetnsEvidence::Replaced);
        drop(file);
        assert_eq!(NetnsEvidence::observe(&netns), NetnsEvidence::Missing);
    }
}
