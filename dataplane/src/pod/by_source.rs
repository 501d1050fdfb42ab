//! The default route of an interface that is not the pod's first (a second network next to the one with the default route, as
//! Multus makes them).
//!
//! A pod has one default route in its main table: that of whoever came first, be it another plugin's. An interface that comes
//! later is still reachable and still has to answer, from its own address and by its own interface: the host takes packets of
//! an address from that address's interface only. So its default route lies in a table of its own, which a rule chooses for
//! its address:
//!
//! ```text
//!  pod      main table   default via 169.254.1.1 dev eth0
//!           rule 7200    from 10.42.0.6 lookup 7203
//!           table 7203   default via 169.254.1.1 dev net1      (7200 + index of net1)
//! ```
//!
//! A rule outlives its interface until the pod ends: DEL does not enter the pod. It then leads to an empty table, which is as
//! good as no rule.

use std::net::IpAddr;

use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteAttribute;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use nix::errno::Errno;

use super::request;
use crate::error::Error;
use crate::netlink::{Request, Socket};

/// Priority of the rules, before that of the main table (32766, `fib_default_rules_init` in net/ipv4/fib_rules.c); and base
/// of the tables' numbers. Both are the pod's own business, whose namespace is new.
pub(super) const PRIORITY: u32 = 7200;

/// Number of the table of an interface.
pub(super) fn table(index: u32) -> u32 {
    PRIORITY.saturating_add(index)
}

/// Routes what is sent from `address` by an interface, whatever the main table says.
pub(super) fn route(socket: &mut Socket, index: u32, interface: &InterfaceName, address: IpAddr) -> Result<(), Error> {
    let gateway = request::gateway(Family::of(address));
    let mut default = request::add_default_route(index, interface, gateway);
    default.object = format!("{} table {}", default.object, table(index));
    if let RouteNetlinkMessage::NewRoute(message) = &mut default.message {
        // The header has room for small numbers only.
        message.header.table = 0;
        message.attributes.push(RouteAttribute::Table(table(index)));
    }
    let [routed, ruled] =
        <[_; 2]>::try_from(socket.batch(vec![default, rule(index, address)])).expect("there is one result per request");
    routed?;
    match ruled {
        // Of an earlier attachment with this address and, as numbers are used again, this table.
        Err(error) if error.errno() == Some(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

fn rule(index: u32, address: IpAddr) -> Request<RouteNetlinkMessage> {
    let mut message = RuleMessage::default();
    message.header.family = request::kernel_family(Family::of(address));
    message.header.src_len = Family::of(address).bits();
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Source(address), RuleAttribute::Priority(PRIORITY), RuleAttribute::Table(table(index))];
    Request {
        operation: "add rule",
        object: format!("from {address} lookup {}", table(index)),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewRule(message),
    }
}

/// True if `message` is the rule for an address and an interface.
pub(super) fn is_rule(message: &RouteNetlinkMessage, index: u32, address: IpAddr) -> bool {
    let RouteNetlinkMessage::NewRule(rule) = message else { return false };
    let has = |wanted: &RuleAttribute| rule.attributes.contains(wanted);
    rule.header.src_len == Family::of(address).bits()
        && has(&RuleAttribute::Source(address))
        && has(&RuleAttribute::Table(table(index)))
}
