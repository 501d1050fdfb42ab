//! Tunnel devices.
//!
//! A device is ours by its name. VXLAN and kernel WireGuard devices are created, tuned and deleted here; the TUN device of a
//! userspace WireGuard process appears and goes with that process and is only tuned. Kind, VNI, port and local address
//! cannot be changed on a living device (drivers/net/vxlan `vxlan_changelink`): other values mean delete and create.
//!
//! Tunnel devices carry no automatic IPv6 link-local address: nobody talks to it, and router solicitations out of a tunnel
//! are noise. The kernel takes the generation mode only on an existing device (net/core/rtnetlink.c `do_setlink`), so a
//! device is created down, then told, then set up; the three messages share a datagram.
//!
//! What a VXLAN device sends carries DF. Without it, over IPv4, a router whose next link takes less cuts the packet in two and
//! nobody is told; with it, the router says what fits, the kernel passes that on to who sent the packet inside
//! (net/ipv4/ip_tunnel_core.c `skb_tunnel_check_pmtu`), and the next one fits. RFC 7348, section 4.3, lets a receiver discard
//! fragments. Over IPv6 routers never cut, and the flag means nothing.

use std::collections::BTreeMap;
use std::fmt;

use husk_overlay::kernel::{Link, LinkKind};
use husk_overlay::mac::MacAddress;
use husk_overlay::name::InterfaceName;
use serde::Serialize;

use crate::sweep::Sweep;

mod message;

pub(crate) use message::{remove, steps, tunnels};

/// A tunnel device as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ActualLink {
    /// Kind and what cannot be changed.
    pub kind: ActualKind,
    /// MTU in bytes.
    pub mtu: u32,
    /// Ethernet address, if the device has one.
    pub mac: Option<MacAddress>,
    /// Administratively up.
    pub up: bool,
    /// The kernel makes an IPv6 link-local address for it.
    pub link_local: bool,
    /// A VXLAN device that lets routers cut its packets.
    pub fragmentable: bool,
}

impl ActualLink {
    /// What a device is like that was just made as desired.
    #[must_use]
    pub fn made_of(link: &Link) -> Self {
        Self {
            kind: ActualKind::Known(link.kind.clone()),
            mtu: link.mtu,
            mac: link.mac,
            up: true,
            link_local: false,
            fragmentable: false,
        }
    }
}

/// Kind of a device that has a name of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ActualKind {
    /// A kind that Husk uses, set up as Husk does.
    Known(LinkKind),
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for ActualKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(kind) => write_kind(f, kind),
            Self::Other(words) => f.write_str(words),
        }
    }
}

/// A change to a tunnel device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LinkChange {
    /// Create it.
    Create {
        /// Name.
        interface: InterfaceName,
        /// What it shall be.
        link: Link,
    },
    /// Delete it and create it anew.
    Recreate {
        /// Name.
        interface: InterfaceName,
        /// What it shall be.
        link: Link,
        /// What it was.
        was: ActualKind,
    },
    /// Change what can be changed on a living device.
    Tune {
        /// Name.
        interface: InterfaceName,
        /// What to change.
        tuning: LinkTuning,
    },
    /// Wait for a userspace process to create it.
    Await {
        /// Name.
        interface: InterfaceName,
    },
    /// Delete it.
    Remove {
        /// Name.
        interface: InterfaceName,
    },
}

/// What to change on a living device; what is none or false stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkTuning {
    /// New MTU in bytes.
    pub mtu: Option<u32>,
    /// New Ethernet address.
    pub mac: Option<MacAddress>,
    /// Stop making an IPv6 link-local address.
    pub no_link_local: bool,
    /// Have VXLAN packets carry DF.
    pub dont_fragment: bool,
    /// Set it up.
    pub up: bool,
}

impl LinkChange {
    /// Device it is about.
    #[must_use]
    pub fn interface(&self) -> &InterfaceName {
        match self {
            Self::Create { interface, .. }
            | Self::Recreate { interface, .. }
            | Self::Tune { interface, .. }
            | Self::Await { interface }
            | Self::Remove { interface } => interface,
        }
    }
}

impl fmt::Display for LinkChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { interface, link } => {
                write!(f, "create link {interface} ")?;
                write_link(f, link)
            }
            Self::Recreate { interface, link, was } => {
                write!(f, "recreate link {interface} ")?;
                write_link(f, link)?;
                write!(f, " (was {was})")
            }
            Self::Tune { interface, tuning } => {
                write!(f, "tune link {interface}")?;
                if let Some(mtu) = tuning.mtu {
                    write!(f, " mtu {mtu}")?;
                }
                if let Some(mac) = tuning.mac {
                    write!(f, " address {mac}")?;
                }
                if tuning.no_link_local {
                    f.write_str(" addrgenmode none")?;
                }
                if tuning.dont_fragment {
                    f.write_str(" df set")?;
                }
                if tuning.up { f.write_str(" up") } else { Ok(()) }
            }
            Self::Await { interface } => write!(f, "await link {interface} of a userspace process"),
            Self::Remove { interface } => write!(f, "remove link {interface}"),
        }
    }
}

fn write_link(f: &mut fmt::Formatter<'_>, link: &Link) -> fmt::Result {
    write_kind(f, &link.kind)?;
    write!(f, " mtu {}", link.mtu)?;
    link.mac.map_or(Ok(()), |mac| write!(f, " address {mac}"))
}

fn write_kind(f: &mut fmt::Formatter<'_>, kind: &LinkKind) -> fmt::Result {
    match kind {
        LinkKind::Vxlan { vni, port, local } => write!(f, "vxlan id {vni} dstport {port} local {local}"),
        LinkKind::Wireguard => f.write_str("wireguard"),
        LinkKind::Xfrm { if_id } => write!(f, "xfrm if_id {if_id:#x}"),
        LinkKind::WireguardUserspace => f.write_str("tun of a userspace WireGuard process"),
    }
}

/// What has to change for the tunnel devices to be as desired.
#[must_use]
pub fn diff(
    desired: &BTreeMap<InterfaceName, Link>,
    actual: &BTreeMap<InterfaceName, ActualLink>,
    sweep: Sweep,
) -> Vec<LinkChange> {
    let wanted = desired.iter().filter_map(|(interface, link)| diff_one(interface, link, actual.get(interface)));
    let swept = actual.iter().filter(|(interface, found)| {
        // A TUN device goes with the process that holds it.
        sweep == Sweep::Allowed
            && !desired.contains_key(*interface)
            && found.kind != ActualKind::Known(LinkKind::WireguardUserspace)
    });
    let removed = swept.map(|(interface, _)| LinkChange::Remove { interface: interface.clone() });
    wanted.chain(removed).collect()
}

fn diff_one(interface: &InterfaceName, link: &Link, found: Option<&ActualLink>) -> Option<LinkChange> {
    let interface = interface.clone();
    let Some(found) = found else {
        return Some(if link.kind == LinkKind::WireguardUserspace {
            LinkChange::Await { interface }
        } else {
            LinkChange::Create { interface, link: link.clone() }
        });
    };
    if found.kind != ActualKind::Known(link.kind.clone()) {
        return Some(if link.kind == LinkKind::WireguardUserspace {
            // The name is taken by a device that no process can adopt; the process makes its own once it is free.
            LinkChange::Remove { interface }
        } else if found.kind == ActualKind::Known(LinkKind::WireguardUserspace) {
            // Refused by the kernel as long as the process lives: stopping it is not this table's business.
            LinkChange::Create { interface, link: link.clone() }
        } else {
            LinkChange::Recreate { interface, link: link.clone(), was: found.kind.clone() }
        });
    }
    let tuning = LinkTuning {
        mtu: (found.mtu != link.mtu).then_some(link.mtu),
        mac: link.mac.filter(|mac| found.mac != Some(*mac)),
        no_link_local: found.link_local,
        dont_fragment: found.fragmentable,
        up: !found.up,
    };
    (tuning != LinkTuning::default()).then_some(LinkChange::Tune { interface, tuning })
}
