//! Tunnel devices as rtnetlink messages (rtnetlink(7), include/uapi/linux/if_link.h), both ways.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::kernel::{Link, LinkKind};
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, InfoXfrm, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, VxlanDf,
};

use super::{ActualKind, ActualLink, LinkChange};
use crate::interfaces::name_of;
use crate::netlink::Request;
use crate::step::{Step, Tolerance};

/// Interface an xfrm interface is bound to (`IFLA_XFRM_LINK`): the loopback interface, whose index is 1 in every namespace.
/// Kernels before 5.3 want one that exists, and an interface of the underlay would tie the tunnel to it; what leaves is
/// routed by the address of the association's other end, whatever is named here.
const XFRM_PARENT: u32 = 1;

/// Tunnel devices among all links.
pub(crate) fn tunnels(links: &[LinkMessage]) -> BTreeMap<InterfaceName, ActualLink> {
    let named = links.iter().filter_map(|link| {
        let name = name_of(link).filter(|name| marks::is_tunnel_interface(name))?;
        Some((InterfaceName::new(name).ok()?, actual(link)))
    });
    named.collect()
}

fn actual(link: &LinkMessage) -> ActualLink {
    let mut found = ActualLink {
        kind: ActualKind::Other("a device without a kind".to_owned()),
        mtu: 0,
        mac: None,
        up: link.header.flags.contains(LinkFlags::Up),
        link_local: false,
        fragmentable: false,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Address(bytes) => found.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress),
            LinkAttribute::LinkInfo(infos) => {
                found.kind = actual_kind(infos);
                found.fragmentable = is_fragmentable(infos);
            }
            LinkAttribute::AfSpecUnspec(families) => found.link_local = makes_link_local(families),
            _ => {}
        }
    }
    found
}

fn actual_kind(infos: &[LinkInfo]) -> ActualKind {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Wireguard) => ActualKind::Known(LinkKind::Wireguard),
        Some(InfoKind::Tun) => ActualKind::Known(LinkKind::WireguardUserspace),
        Some(InfoKind::Vxlan) => infos
            .iter()
            .find_map(|info| match info {
                LinkInfo::Data(InfoData::Vxlan(data)) => Some(vxlan_kind(data)),
                _ => None,
            })
            .unwrap_or_else(|| ActualKind::Other("vxlan without parameters".to_owned())),
        Some(InfoKind::Xfrm) => infos
            .iter()
            .find_map(|info| match info {
                LinkInfo::Data(InfoData::Xfrm(data)) => Some(xfrm_kind(data)),
                _ => None,
            })
            .unwrap_or_else(|| ActualKind::Other("xfrm without parameters".to_owned())),
        Some(other) => ActualKind::Other(other.to_string()),
        None => ActualKind::Other("a device without a kind".to_owned()),
    }
}

fn vxlan_kind(data: &[InfoVxlan]) -> ActualKind {
    let (mut vni, mut port, mut local) = (None, None, None);
    for attribute in data {
        match attribute {
            InfoVxlan::Id(value) => vni = Some(*value),
            InfoVxlan::Port(value) => port = Some(*value),
            InfoVxlan::Local(value) => local = Some(IpAddr::V4(*value)),
            InfoVxlan::Local6(value) => local = Some(IpAddr::V6(*value)),
            InfoVxlan::Learning(true) => return ActualKind::Other("vxlan with learning".to_owned()),
            InfoVxlan::CollectMetadata(true) => return ActualKind::Other("vxlan external".to_owned()),
            InfoVxlan::Group(_) | InfoVxlan::Group6(_) => {
                return ActualKind::Other("vxlan with a default destination".to_owned());
            }
            InfoVxlan::Link(index) if *index != 0 => {
                return ActualKind::Other("vxlan bound to an interface".to_owned());
            }
            _ => {}
        }
    }
    match (vni, port, local) {
        (Some(vni), Some(port), Some(local)) => ActualKind::Known(LinkKind::Vxlan { vni, port, local }),
        _ => ActualKind::Other("vxlan without local address".to_owned()),
    }
}

/// VXLAN with any other value of DF than the one that Husk sets.
fn is_fragmentable(infos: &[LinkInfo]) -> bool {
    infos.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => !data.contains(&InfoVxlan::Df(VxlanDf::Set)),
        _ => false,
    })
}

fn xfrm_kind(data: &[InfoXfrm]) -> ActualKind {
    let (mut id, mut parent) = (0, 0);
    for attribute in data {
        match attribute {
            InfoXfrm::IfId(value) => id = *value,
            InfoXfrm::Link(value) => parent = *value,
            _ => {}
        }
    }
    if parent == XFRM_PARENT {
        ActualKind::Known(LinkKind::Xfrm { if_id: id })
    } else {
        ActualKind::Other(format!("xfrm bound to interface {parent}"))
    }
}

fn makes_link_local(families: &[AfSpecUnspec]) -> bool {
    let configuration = families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(attributes) => attributes.iter().find_map(|attribute| match attribute {
            AfSpecInet6::DevConf(configuration) => Some(configuration),
            _ => None,
        }),
        _ => None,
    });
    // No IPv6 on the device: nothing to turn off.
    configuration.is_some_and(|conf| conf.addr_gen_mode != i32::from(u8::from(&In6AddrGenMode::None)))
}

/// The requests that make a change.
pub(crate) fn steps(change: &LinkChange) -> Vec<Step> {
    let object = change.interface().to_string();
    match change {
        LinkChange::Create { interface, link } => create(interface, link),
        LinkChange::Recreate { interface, link, .. } => {
            let mut steps = vec![remove(interface)];
            steps.extend(create(interface, link));
            steps
        }
        LinkChange::Tune { interface, tuning } => {
            let mut message = named(interface);
            message.attributes.extend(tuning.mtu.map(LinkAttribute::Mtu));
            message.attributes.extend(tuning.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
            if tuning.no_link_local {
                message.attributes.push(no_link_local());
            }
            if tuning.dont_fragment {
                // Only what is named changes (drivers/net/vxlan `vxlan_nl2conf` starts from what the device has).
                let data = InfoData::Vxlan(vec![InfoVxlan::Df(VxlanDf::Set)]);
                let info = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(data)];
                message.attributes.push(LinkAttribute::LinkInfo(info));
            }
            if tuning.up {
                set_up(&mut message);
            }
            // What belongs to a kind of device changes with this message only (net/core/rtnetlink.c, `rtnl_changelink`). Nothing
            // is created without the flag for it.
            let tune = if tuning.dont_fragment { RouteNetlinkMessage::NewLink } else { RouteNetlinkMessage::SetLink };
            vec![Step::strict("tune link", object, 0, tune(message))]
        }
        LinkChange::Await { .. } => Vec::new(),
        LinkChange::Remove { interface } => vec![remove(interface)],
    }
}

/// The request that deletes a link by name; nothing to delete is fine.
pub(crate) fn remove(interface: &InterfaceName) -> Step {
    let request = Request {
        operation: "remove link",
        object: interface.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::DelLink(named(interface)),
    };
    Step { request, tolerance: Tolerance::Absent }
}

fn create(interface: &InterfaceName, link: &Link) -> Vec<Step> {
    let mut message = named(interface);
    message.attributes.push(LinkAttribute::Mtu(link.mtu));
    message.attributes.extend(link.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    message.attributes.push(LinkAttribute::LinkInfo(link_info(&link.kind)));
    let mut mode = named(interface);
    mode.attributes.push(no_link_local());
    let mut up = named(interface);
    set_up(&mut up);
    let object = interface.to_string();
    vec![
        Step::strict("create link", object.clone(), NLM_F_CREATE | NLM_F_EXCL, RouteNetlinkMessage::NewLink(message)),
        // A kernel without IPv6, or an MTU below its minimum, refuses this; if it matters, the next reading shows it.
        Step {
            request: Request {
                operation: "tune link",
                object: object.clone(),
                flags: 0,
                message: RouteNetlinkMessage::SetLink(mode),
            },
            tolerance: Tolerance::Anything,
        },
        Step::strict("set up link", object, 0, RouteNetlinkMessage::SetLink(up)),
    ]
}

fn link_info(kind: &LinkKind) -> Vec<LinkInfo> {
    match kind {
        LinkKind::Vxlan { vni, port, local } => {
            let local = match local {
                IpAddr::V4(address) => InfoVxlan::Local(*address),
                IpAddr::V6(address) => InfoVxlan::Local6(*address),
            };
            let data = vec![
                InfoVxlan::Id(*vni),
                local,
                InfoVxlan::Port(*port),
                InfoVxlan::Learning(false),
                InfoVxlan::Df(VxlanDf::Set),
            ];
            vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]
        }
        LinkKind::Wireguard => vec![LinkInfo::Kind(InfoKind::Wireguard)],
        LinkKind::WireguardUserspace => vec![LinkInfo::Kind(InfoKind::Tun)],
        LinkKind::Xfrm { if_id } => {
            let data = vec![InfoXfrm::Link(XFRM_PARENT), InfoXfrm::IfId(*if_id)];
            vec![LinkInfo::Kind(InfoKind::Xfrm), LinkInfo::Data(InfoData::Xfrm(data))]
        }
    }
}

fn named(interface: &InterfaceName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(interface.to_string()));
    message
}

fn no_link_local() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])])
}

fn set_up(message: &mut LinkMessage) {
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
}
