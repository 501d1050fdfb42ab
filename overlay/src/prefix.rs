//! IP prefixes in canonical form.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// `0.0.0.0` or `::`.
    #[must_use]
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::Ipv4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Ipv6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// Bits in an address of this family.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::Ipv4 => 32,
            Self::Ipv6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// Why a text is not a prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Neither `address/length` nor parseable.
    #[error("{0:?} is not a CIDR such as 10.42.0.0/16 or fd42::/48")]
    Syntax(String),
    /// Bits are set behind the length.
    #[error("{given} has bits set behind its length; the prefix is {canonical}")]
    HostBits {
        /// The text as given.
        given: String,
        /// What was probably meant.
        canonical: Prefix,
    },
}

/// A prefix without host bits: equality is equality of the set of addresses.
///
/// Text and serde form is `address/length`; a bare address is refused, host bits are refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(IpNetwork);

impl Prefix {
    /// The prefix of `length` bits that holds `address`; host bits are cleared.
    ///
    /// # Errors
    /// When the length exceeds the family's bits.
    pub fn containing(address: IpAddr, length: u8) -> Result<Self, PrefixError> {
        let network =
            IpNetwork::new(address, length).map_err(|_| PrefixError::Syntax(format!("{address}/{length}")))?;
        Ok(Self(IpNetwork::new(network.network(), length).expect("the length was accepted above")))
    }

    /// The prefix that holds just this address (/32 or /128).
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self::containing(address, Family::of(address).bits()).expect("full length fits its family")
    }

    /// `0.0.0.0/0` or `::/0`.
    #[must_use]
    pub fn default_route(family: Family) -> Self {
        Self::containing(family.unspecified(), 0).expect("zero fits every family")
    }

    /// First address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.0.ip()
    }

    /// Length in bits.
    #[must_use]
    pub fn length(&self) -> u8 {
        self.0.prefix()
    }

    /// Address family.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.address())
    }

    /// True if the address lies in the prefix; false for the other family.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(address)
    }

    /// True if every address of `other` lies in this prefix.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.length() <= other.length() && self.contains(other.address())
    }

    /// True if the two share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Number of addresses; saturates at `u128::MAX` for `::/0`.
    #[must_use]
    pub fn size(&self) -> u128 {
        1_u128.checked_shl(u32::from(self.family().bits() - self.length())).unwrap_or(u128::MAX)
    }

    /// The address at `index` from the first, none when the prefix is smaller.
    #[must_use]
    pub fn nth(&self, index: u128) -> Option<IpAddr> {
        if index >= self.size() {
            return None;
        }
        Some(match self.address() {
            IpAddr::V4(first) => IpAddr::V4(Ipv4Addr::from(u32::from(first) + u32::try_from(index).ok()?)),
            IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first) + index)),
        })
    }

    /// Position of an address within the prefix, none when it is outside.
    #[must_use]
    pub fn index_of(&self, address: IpAddr) -> Option<u128> {
        if !self.contains(address) {
            return None;
        }
        match (self.address(), address) {
            (IpAddr::V4(first), IpAddr::V4(it)) => Some(u128::from(u32::from(it) - u32::from(first))),
            (IpAddr::V6(first), IpAddr::V6(it)) => Some(u128::from(it) - u128::from(first)),
            _ => None,
        }
    }

    /// Number of prefixes of `length` bits within this one; zero when `length` is shorter.
    #[must_use]
    pub fn subnet_count(&self, length: u8) -> u128 {
        if length < self.length() || length > self.family().bits() {
            return 0;
        }
        1_u128.checked_shl(u32::from(length - self.length())).unwrap_or(u128::MAX)
    }

    /// The `index`th prefix of `length` bits within this one.
    #[must_use]
    pub fn subnet(&self, length: u8, index: u128) -> Option<Self> {
        if index >= self.subnet_count(length) {
            return None;
        }
        let step = u32::from(self.family().bits() - length);
        let offset = index.checked_shl(step)?;
        Self::containing(self.nth(offset)?, length).ok()
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let syntax = || PrefixError::Syntax(text.to_owned());
        if !text.contains('/') {
            return Err(syntax());
        }
        let given: IpNetwork = text.parse().map_err(|_| syntax())?;
        let canonical = Self::containing(given.ip(), given.prefix())?;
        if canonical.address() == given.ip() {
            Ok(canonical)
        } else {
            Err(PrefixError::HostBits { given: text.to_owned(), canonical })
        }
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;
    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> String {
        prefix.to_string()
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_string())
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PartialOrd for Prefix {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Prefix {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.address(), self.length()).cmp(&(other.address(), other.length()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn only_canonical_prefixes_parse() {
        assert_eq!(p("10.42.0.0/16").to_string(), "10.42.0.0/16");
        assert!(matches!("10.42.0.1/16".parse::<Prefix>(), Err(PrefixError::HostBits { .. })));
        for bad in ["10.42.0.0", "10.42.0.0/33", "fd42::/129", "x/8", "", "10.0.0.0/-1", "10.0.0.0/ 8"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn covering_and_overlap() {
        assert!(p("10.0.0.0/8").covers(&p("10.42.0.0/16")));
        assert!(!p("10.42.0.0/16").covers(&p("10.0.0.0/8")));
        assert!(p("10.42.0.0/16").overlaps(&p("10.0.0.0/8")));
        assert!(!p("10.0.0.0/8").overlaps(&p("fd00::/8")));
        assert!(p("::/0").covers(&p("fd42::/48")));
    }

    #[test]
    fn addresses_and_subnets() {
        let block = p("10.42.0.64/26");
        assert_eq!(block.size(), 64);
        assert_eq!(block.nth(63), Some("10.42.0.127".parse().unwrap()));
        assert_eq!(block.nth(64), None);
        assert_eq!(block.index_of("10.42.0.65".parse().unwrap()), Some(1));
        assert_eq!(block.index_of("10.42.0.1".parse().unwrap()), None);
        assert_eq!(p("10.42.0.0/16").subnet_count(26), 1024);
        assert_eq!(p("10.42.0.0/16").subnet(26, 1), Some(block));
        assert_eq!(p("10.42.0.0/16").subnet(26, 1024), None);
        assert_eq!(p("10.42.0.0/16").subnet(8, 0), None);
        assert_eq!(p("fd42::/48").subnet(122, 2), Some(p("fd42::80/122")));
        assert_eq!(p("::/0").size(), u128::MAX);
        assert_eq!(p("0.0.0.0/0").nth(u128::from(u32::MAX)), Some("255.255.255.255".parse().unwrap()));
    }
}
