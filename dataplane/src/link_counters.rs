//! What the kernel counts of our interfaces: packets, bytes and drops of every pod's and every tunnel's.

use std::collections::BTreeMap;

use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, Stats64};

use crate::error::Error;
use crate::interfaces::name_of;
use crate::netlink::{Protocol, Request, Socket};

/// Counters of an interface, as its host sees it: what a pod sends is received by its host interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Packets received.
    pub received_packets: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Packets that were dropped in either direction, errors among them.
    pub dropped: u64,
}

/// Counters of Husk's interfaces in the calling thread's network namespace.
///
/// # Errors
/// Those of a broken netlink exchange.
pub fn read() -> Result<BTreeMap<InterfaceName, LinkCounters>, Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    let request = Request {
        operation: "read",
        object: "counters of links".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetLink(LinkMessage::default()),
    };
    let links = socket.dump_shared(request)?.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => counters_of(&link),
        _ => None,
    });
    Ok(links.collect())
}

fn counters_of(link: &LinkMessage) -> Option<(InterfaceName, LinkCounters)> {
    let name = name_of(link).filter(|name| marks::is_pod_interface(name) || marks::is_tunnel_interface(name))?;
    let counted = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(counted) => Some(*counted),
        _ => None,
    })?;
    let Stats64 { rx_packets, tx_packets, rx_bytes, tx_bytes, .. } = counted;
    let dropped = [counted.rx_dropped, counted.tx_dropped, counted.rx_errors, counted.tx_errors];
    let counters = LinkCounters {
        received_packets: rx_packets,
        received_bytes: rx_bytes,
        sent_packets: tx_packets,
        sent_bytes: tx_bytes,
        dropped: dropped.into_iter().fold(0, u64::saturating_add),
    };
    Some((InterfaceName::new(name).ok()?, counters))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::netns::Netns;

    fn ip(arguments: &str) {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
    }

    #[test]
    fn our_interfaces_are_counted_and_no_others() {
        let world = || {
            let pod = marks::pod_interface("husk", "a", "eth0").to_string();
            ip(&format!("link add {pod} type veth peer name other"));
            ip(&format!("link set {pod} up"));
            ip("link set other up");
            ip("address add 192.0.2.1/24 dev other");
            // Somebody is asked for; nobody answers.
            let _ = Command::new("ping").args(["-c1", "-W1", "192.0.2.2"]).output().unwrap();
            let counters = read().unwrap();
            assert_eq!(counters.keys().map(ToString::to_string).collect::<Vec<_>>(), std::slice::from_ref(&pod));
            let counted = counters.into_values().next().unwrap();
            assert!(counted.received_packets > 0 && counted.received_bytes > 0, "{counted:?}");
        };
        Netns::new_unnamed().unwrap().run_in(world).unwrap();
    }
}
