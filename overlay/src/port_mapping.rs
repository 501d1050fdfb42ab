//! Port mappings: ports of the host that lead to ports of a pod (`hostPort` of Kubernetes, `runtimeConfig.portMappings` of the
//! CNI conventions).

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use crate::prefix::Family;

/// Protocol of the transport layer that has ports. The texts are those of the CNI conventions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum TransportProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl TransportProtocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IANA's protocol number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Name as the conventions write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The protocol of a name, whose case does not matter: Kubernetes writes capitals.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for TransportProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A port of the host that leads to a port of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Protocol.
    #[serde(default)]
    pub protocol: TransportProtocol,
    /// Port of the host.
    pub host_port: NonZeroU16,
    /// Address of the host. None stands for all local addresses of both families, the unspecified address of a family for all
    /// of that family.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// Port of the pod.
    pub container_port: NonZeroU16,
}

impl PortMapping {
    /// The one address of the host that is meant; none for all.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.host_ip.filter(|address| !address.is_unspecified())
    }

    /// True if it is about addresses of this family.
    #[must_use]
    pub fn serves(&self, family: Family) -> bool {
        self.host_ip.is_none_or(|address| Family::of(address) == family)
    }

    /// True if there is a packet that both claim. One that means a single address clashes with one that means all: which of
    /// two pods gets a packet must not depend on the address a client happens to use.
    #[must_use]
    pub fn clashes_with(&self, other: &Self) -> bool {
        let both_serve = Family::ALL.into_iter().any(|family| self.serves(family) && other.serves(family));
        let addresses_meet = match (self.address(), other.address()) {
            (Some(one), Some(another)) => one == another,
            _ => true,
        };
        self.protocol == other.protocol && self.host_port == other.host_port && both_serve && addresses_meet
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(IpAddr::V6(address)) => write!(f, "{} [{address}]:{}", self.protocol, self.host_port)?,
            Some(address) => write!(f, "{} {address}:{}", self.protocol, self.host_port)?,
            None => write!(f, "{} port {}", self.protocol, self.host_port)?,
        }
        write!(f, " to {}", self.container_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: TransportProtocol, port: u16, host_ip: &str) -> PortMapping {
        PortMapping {
            protocol,
            host_port: NonZeroU16::new(port).unwrap(),
            host_ip: (!host_ip.is_empty()).then(|| host_ip.parse().unwrap()),
            container_port: NonZeroU16::new(80).unwrap(),
        }
    }

    #[test]
    fn mappings_clash_when_a_packet_could_be_for_both() {
        use TransportProtocol::{Tcp, Udp};
        for (one, other, clash) in [
            ((Tcp, 80, ""), (Tcp, 80, ""), true),
            ((Tcp, 80, ""), (Udp, 80, ""), false),
            ((Tcp, 80, ""), (Tcp, 81, ""), false),
            ((Tcp, 80, ""), (Tcp, 80, "192.0.2.1"), true),
            ((Tcp, 80, ""), (Tcp, 80, "2001:db8::1"), true),
            ((Tcp, 80, "0.0.0.0"), (Tcp, 80, "192.0.2.1"), true),
            ((Tcp, 80, "0.0.0.0"), (Tcp, 80, "2001:db8::1"), false),
            ((Tcp, 80, "0.0.0.0"), (Tcp, 80, "::"), false),
            ((Tcp, 80, "0.0.0.0"), (Tcp, 80, ""), true),
            ((Tcp, 80, "192.0.2.1"), (Tcp, 80, "192.0.2.1"), true),
            ((Tcp, 80, "192.0.2.1"), (Tcp, 80, "192.0.2.2"), false),
        ] {
            let (one, other) = (mapping(one.0, one.1, one.2), mapping(other.0, other.1, other.2));
            assert_eq!((one.clashes_with(&other), other.clashes_with(&one)), (clash, clash), "{one} and {other}");
        }
    }

    #[test]
    fn a_mapping_reads_as_the_conventions_write_it() {
        let text = r#"{"protocol":"udp","hostPort":53,"hostIP":"::","containerPort":5353}"#;
        let read: PortMapping = serde_json::from_str(text).unwrap();
        assert_eq!((read.address(), read.serves(Family::Ipv4), read.serves(Family::Ipv6)), (None, false, true));
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert_eq!(read.to_string(), "udp [::]:53 to 5353");
        assert!(serde_json::from_str::<PortMapping>(r#"{"hostPort":0,"containerPort":1}"#).is_err());
        assert_eq!(TransportProtocol::of_name("SCTP"), Some(TransportProtocol::Sctp));
        assert_eq!(TransportProtocol::of_name("icmp"), None);
    }
}
