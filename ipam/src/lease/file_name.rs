//! Names of the files in the store, which carry most of its meaning.
//!
//! - lease: `<key>_<IPv4 or ->_<IPv6 or ->.json`
//! - tombstone: `<key>_<IPv4 or ->_<IPv6 or ->.released-<milliseconds since boot>`
//! - `lock`, `cursors`, and the temporary file `new`
//!
//! The key is the start of a SHA-256 over the attachment.

use std::ffi::OsStr;

use husk_overlay::endpoint::AttachmentId;
use husk_overlay::record::DualStack;

use super::BootTime;

/// File that is locked.
pub(super) const LOCK: &str = "lock";

/// File with the last address taken from each block.
pub(super) const CURSORS: &str = "cursors";

/// A file being written. One is enough: only the holder of the lock writes.
const TEMPORARY: &str = "new";

/// Hexadecimal digits of the key: 64 bits, on a node with some hundred attachments at a time.
const KEY_DIGITS: usize = 16;

/// A file in the store, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// A lease.
    Lease { key: String, addresses: DualStack },
    /// Addresses that were released.
    Released { key: String, addresses: DualStack, at: BootTime },
    /// Left by a crash, or being written.
    Temporary,
    /// The store's own book-keeping.
    Own,
    /// Nothing we made.
    Unknown,
}

impl Entry {
    pub(super) fn parse(name: &OsStr) -> Self {
        let Some(name) = name.to_str() else { return Self::Unknown };
        match name {
            LOCK | CURSORS => Self::Own,
            TEMPORARY => Self::Temporary,
            _ => Self::parse_attachment(name).unwrap_or(Self::Unknown),
        }
    }

    fn parse_attachment(name: &str) -> Option<Self> {
        if let Some((stem, at)) = name.split_once(".released-") {
            let (key, addresses) = parse_stem(stem)?;
            return Some(Self::Released { key, addresses, at: BootTime(at.parse().ok()?) });
        }
        let (key, addresses) = parse_stem(name.strip_suffix(".json")?)?;
        Some(Self::Lease { key, addresses })
    }
}

fn parse_stem(stem: &str) -> Option<(String, DualStack)> {
    let mut parts = stem.split('_');
    let (key, ipv4, ipv6) = (parts.next()?, parts.next()?, parts.next()?);
    let hexadecimal = key.len() == KEY_DIGITS && key.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !hexadecimal || parts.next().is_some() {
        return None;
    }
    let mut addresses = DualStack::default();
    if ipv4 != "-" {
        addresses.ipv4 = Some(ipv4.parse().ok()?);
    }
    if ipv6 != "-" {
        addresses.ipv6 = Some(ipv6.parse().ok()?);
    }
    addresses.iter().next().map(|_| (key.to_owned(), addresses))
}

fn stem(key: &str, addresses: &DualStack) -> String {
    let ipv4 = addresses.ipv4.map_or("-".to_owned(), |it| it.to_string());
    let ipv6 = addresses.ipv6.map_or("-".to_owned(), |it| it.to_string());
    format!("{key}_{ipv4}_{ipv6}")
}

/// Key of an attachment.
pub(super) fn key(id: &AttachmentId) -> String {
    let mut digest =
        husk_overlay::digest::hex(&["lease", id.network.as_str(), id.container_id.as_str(), id.ifname.as_str()]);
    digest.truncate(KEY_DIGITS);
    digest
}

/// Name of a lease.
pub(super) fn lease(key: &str, addresses: &DualStack) -> String {
    format!("{}.json", stem(key, addresses))
}

/// Name of a tombstone.
pub(super) fn released(key: &str, addresses: &DualStack, at: BootTime) -> String {
    format!("{}.released-{}", stem(key, addresses), at.0)
}

/// Name of a file being written.
pub(super) fn temporary() -> &'static str {
    TEMPORARY
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_round_trip(
            key in "[0-9a-f]{16}", ipv4 in any::<Option<std::net::Ipv4Addr>>(), ipv6 in any::<Option<std::net::Ipv6Addr>>(),
            at in any::<u64>(),
        ) {
            prop_assume!(ipv4.is_some() || ipv6.is_some());
            let addresses = DualStack { ipv4, ipv6 };
            prop_assert_eq!(
                Entry::parse(lease(&key, &addresses).as_ref()),
                Entry::Lease { key: key.clone(), addresses }
            );
            prop_assert_eq!(
                Entry::parse(released(&key, &addresses, BootTime(at)).as_ref()),
                Entry::Released { key, addresses, at: BootTime(at) }
            );
        }

        #[test]
        fn no_name_panics(name in any::<String>()) {
            let _ = Entry::parse(name.as_ref());
        }
    }

    #[test]
    fn foreign_names_are_unknown() {
        for name in [
            "",
            "x.json",
            "0123456789abcdef_-_-.json",
            "0123456789abcdef_10.0.0.1.json",
            "0123456789abcdef_10.0.0.1_-_-.json",
            "0123456789ABCDEF_10.0.0.1_-.json",
            "0123456789abcdef_10.0.0.1_-",
            "0123456789abcdef_10.0.0.1_-.released-",
            "0123456789abcdef_fd42::1_10.0.0.1.json",
        ] {
            assert_eq!(Entry::parse(name.as_ref()), Entry::Unknown, "{name}");
        }
    }
}
