//! Names that were checked once, when they entered.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not the name it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?} is not valid: {rule}")]
pub struct NameError {
    /// What the text should have been, for example "interface name".
    pub kind: &'static str,
    /// The text as given.
    pub value: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:path, $rule:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name.
            ///
            /// # Errors
            /// When the text breaks the rule of this kind of name.
            pub fn new(value: &str) -> Result<Self, NameError> {
                if $check(value) {
                    Ok(Self(value.to_owned()))
                } else {
                    Err(NameError { kind: $kind, value: value.to_owned(), rule: $rule })
                }
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(value: &str) -> Result<Self, NameError> {
                Self::new(value)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(value: String) -> Result<Self, NameError> {
                Self::new(&value)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name_type!(
    /// A node's name: an RFC 1123 subdomain, as Kubernetes wants it for `Node` objects.
    NodeName,
    "node name",
    is_subdomain,
    "1 to 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit"
);
name_type!(
    /// A Linux interface name (`dev_valid_name` in net/core/dev.c, with a stricter character set: the kernel takes `eth%d` for
    /// a pattern and chooses another name).
    InterfaceName,
    "interface name",
    is_interface_name,
    "1 to 15 printable ASCII characters without '/', ':', '%' and white space, not '.' or '..'"
);
name_type!(
    /// A CNI container id (CNI specification 1.1, section 2, `CNI_CONTAINERID`).
    ContainerId,
    "container id",
    is_container_id,
    "a letter or digit followed by letters, digits, '_', '.' or '-', at most 253 in all"
);
name_type!(
    /// A CNI network name (CNI specification 1.1, section 1): same alphabet as a container id.
    NetworkName,
    "network name",
    is_container_id,
    "a letter or digit followed by letters, digits, '_', '.' or '-', at most 253 in all"
);

name_type!(
    /// What tells two hosts apart that use one node name: random, kept in the host's state directory.
    InstanceId,
    "instance id",
    is_instance_id,
    "16 to 64 lower-case hexadecimal digits"
);

fn is_instance_id(value: &str) -> bool {
    (16..=64).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_subdomain(value: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
    (1..=253).contains(&value.len())
        && value.split('.').all(|part| {
            let bytes = part.as_bytes();
            part.len() <= 63 && bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
        })
}

fn is_interface_name(value: &str) -> bool {
    (1..=15).contains(&value.len())
        && value != "."
        && value != ".."
        && value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
}

fn is_container_id(value: &str) -> bool {
    let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=253).contains(&value.len()) && value.as_bytes()[0].is_ascii_alphanumeric() && value.bytes().all(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names() {
        for good in ["a", "node-1", "ip-10-0-0-1.eu.compute.internal"] {
            assert!(NodeName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a..b", "a/b", "..", &"a".repeat(254), "a b", "ä"] {
            assert!(NodeName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names() {
        for good in ["eth0", "husk-wg0", "enp0s31f6", "a.b"] {
            assert!(InterfaceName::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a%d", "a b", "sixteen-letters-", "é", "a\n"] {
            assert!(InterfaceName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn container_ids() {
        for good in ["0", "abc", "a_b.c-d", &"f".repeat(64)] {
            assert!(ContainerId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "_a", ".", "-x", "a/b", "a b", &"f".repeat(254)] {
            assert!(ContainerId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_error_names_kind_value_and_rule() {
        let error = InterfaceName::new("a/b").unwrap_err().to_string();
        assert!(error.contains("interface name") && error.contains("a/b") && error.contains("15"), "{error}");
    }
}
