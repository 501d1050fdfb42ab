//! Routes with our protocol number, in any table.
//!
//! - They are recognised by [`husk_overlay::marks::ROUTE_PROTOCOL`] alone; kernels from 4.20 on filter the dump by it.
//! - A route that is not there is added exclusively: where a stranger's route has the same key, the kernel refuses, and the
//!   stranger's route stays.
//! - A route that differs is replaced in one message (`NLM_F_REPLACE`), so that no packet finds it missing. IPv4 replaces the
//!   first route of the same prefix, TOS and metric; IPv6 the first of the same prefix and metric, also when one is
//!   unreachable and the other is not (net/ipv6/ip6_fib.c `fib6_add_rt2node`).
//! - The kernel writes an unreachable IPv6 route as one over `lo`, and shows IPv6 metric 0 as 1024; both are read back as
//!   what was meant.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use husk_overlay::kernel::{Route, RouteKey, RouteTarget};
use netlink_packet_route::route::RouteHeader;
use serde::Serialize;

use crate::sweep::Sweep;

pub mod foreign;
mod message;

pub(crate) use message::{Parts, address_family, ip_address, mtu_of, read, route_address, steps};

/// A route of ours as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ActualRoute {
    /// One that Husk could have written.
    Plain(Route),
    /// One that carries our protocol number but has what Husk never writes, in words.
    Other(String),
}

impl ActualRoute {
    /// Interface it leads to, if it is a plain route that leads to one.
    pub(crate) fn interface(&self) -> Option<&husk_overlay::name::InterfaceName> {
        match self {
            Self::Plain(Route { target: RouteTarget::Interface { interface, .. }, .. }) => Some(interface),
            Self::Plain(_) | Self::Other(_) => None,
        }
    }
}

/// A change to a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteChange {
    /// Add it.
    Add {
        /// Key.
        key: RouteKey,
        /// What it shall be.
        route: Route,
    },
    /// Replace what is there in one step.
    Replace {
        /// Key.
        key: RouteKey,
        /// What it shall be.
        route: Route,
        /// What it was.
        was: Route,
    },
    /// Remove what is there, which cannot be replaced in one step, and add it.
    Rebuild {
        /// Key.
        key: RouteKey,
        /// What it shall be.
        route: Route,
        /// What it was.
        was: String,
    },
    /// Remove it.
    Remove {
        /// Key.
        key: RouteKey,
    },
}

impl RouteChange {
    /// Key of the route it is about.
    #[must_use]
    pub fn key(&self) -> &RouteKey {
        match self {
            Self::Add { key, .. }
            | Self::Replace { key, .. }
            | Self::Rebuild { key, .. }
            | Self::Remove { key, .. } => key,
        }
    }

    /// The route that will be there.
    #[must_use]
    pub fn route(&self) -> Option<&Route> {
        match self {
            Self::Add { route, .. } | Self::Replace { route, .. } | Self::Rebuild { route, .. } => Some(route),
            Self::Remove { .. } => None,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add route",
            Self::Replace { .. } => "replace route",
            Self::Rebuild { .. } => "rebuild route",
            Self::Remove { .. } => "remove route",
        }
    }

    fn object(&self) -> String {
        Described { key: self.key(), route: self.route() }.to_string()
    }
}

impl fmt::Display for RouteChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation(), self.object())?;
        match self {
            Self::Replace { key, was, .. } => write!(f, " (was {})", Described { key, route: Some(was) }),
            Self::Rebuild { was, .. } => write!(f, " (was {was})"),
            _ => Ok(()),
        }
    }
}

/// A route in the words of `ip route`.
struct Described<'a> {
    key: &'a RouteKey,
    route: Option<&'a Route>,
}

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteKey { table, destination, metric } = self.key;
        if let Some(Route { target: RouteTarget::Unreachable, .. }) = self.route {
            f.write_str("unreachable ")?;
        }
        write!(f, "{destination}")?;
        if let Some(Route { target, source, mtu }) = self.route {
            if let RouteTarget::Interface { interface, via, onlink } = target {
                if let Some(via) = via {
                    write!(f, " via {via}")?;
                }
                write!(f, " dev {interface}{}", if *onlink { " onlink" } else { "" })?;
            }
            if let Some(source) = source {
                write!(f, " src {source}")?;
            }
            if let Some(mtu) = mtu {
                write!(f, " mtu {mtu}")?;
            }
        }
        if *table != u32::from(RouteHeader::RT_TABLE_MAIN) {
            write!(f, " table {table}")?;
        }
        if *metric != 0 { write!(f, " metric {metric}") } else { Ok(()) }
    }
}

/// What has to change for the routes to be as desired.
#[must_use]
pub fn diff(
    desired: &BTreeMap<RouteKey, Route>,
    actual: &BTreeMap<RouteKey, ActualRoute>,
    sweep: Sweep,
) -> Vec<RouteChange> {
    let wanted = desired.iter().filter_map(|(key, route)| {
        let (key, route) = (key.clone(), route.clone());
        match actual.get(&key) {
            None => Some(RouteChange::Add { key, route }),
            Some(ActualRoute::Plain(found)) if *found == route => None,
            Some(ActualRoute::Plain(found)) if moves_onlink_gateway(&key, found, &route) => {
                let was = Described { key: &key, route: Some(found) }.to_string();
                Some(RouteChange::Rebuild { key, route, was })
            }
            Some(ActualRoute::Plain(found)) => Some(RouteChange::Replace { key, route, was: found.clone() }),
            Some(ActualRoute::Other(words)) => Some(RouteChange::Rebuild { key, route, was: words.clone() }),
        }
    });
    let swept = actual.keys().filter(|key| sweep == Sweep::Allowed && !desired.contains_key(key));
    wanted.chain(swept.map(|key| RouteChange::Remove { key: key.clone() })).collect()
}

/// IPv6 refuses an on-link gateway that a route over another device leads to (net/ipv6/route.c
/// `ip6_route_check_nh_onlink`), and a gateway within its own destination is led to by the very route that is to be replaced.
fn moves_onlink_gateway(key: &RouteKey, found: &Route, wanted: &Route) -> bool {
    match (&found.target, &wanted.target) {
        (
            RouteTarget::Interface { interface: old, .. },
            RouteTarget::Interface { interface: new, via: Some(IpAddr::V6(via)), onlink: true },
        ) => old != new && key.destination.contains(IpAddr::V6(*via)),
        _ => false,
    }
}
