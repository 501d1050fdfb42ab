//! The host's addresses and interfaces: where others reach the node, and what else is on it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Result;
use husk_dataplane::sysctl;
use husk_dataplane::underlay::{self, HostAddress, Interface};
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};

use super::Host;

impl Host {
    /// The node's underlay address of a family: configured, else the one in use as long as it is there, else on the
    /// configured interface, else where the default route leaves, else the only one there is.
    pub(super) fn choose_address(&mut self, family: Family, all: &[HostAddress]) -> Result<Option<IpAddr>> {
        if let Some(configured) = self.config.underlay.addresses.get(family) {
            return Ok(self.configured_address(configured, all));
        }
        let ours = |interface: &InterfaceName| interface.as_str().starts_with(marks::INTERFACE_PREFIX);
        let wanted = self.config.underlay.interface.as_ref();
        // Other nodes do not reach this one at an address of the cluster, which somebody put on a bridge or on loopback.
        // Where there is no other, one of the tunnels' family counts, so that the plan can tell what is wrong with it.
        let inside = |it: &&HostAddress| self.config.cluster_cidrs.iter().any(|cidr| cidr.contains(it.address));
        let (overlapping, mut usable): (Vec<&HostAddress>, Vec<_>) = all
            .iter()
            .filter(|it| it.lasting && Family::of(it.address) == family && !ours(&it.interface))
            .filter(|it| wanted.is_none_or(|wanted| it.interface == *wanted))
            .partition(inside);
        if usable.is_empty() && family == self.config.underlay.family {
            usable = overlapping;
        }
        if let Some(kept) = self.chosen.get(family).filter(|kept| usable.iter().any(|it| it.address == *kept)) {
            return Ok(Some(kept));
        }
        if let Some(route) = underlay::default_route(&mut self.socket, family)? {
            if usable.iter().any(|it| it.address == route.source) {
                return Ok(Some(route.source));
            }
            if let Some(there) = usable.iter().find(|it| it.interface == route.interface) {
                return Ok(Some(there.address));
            }
        }
        match usable.as_slice() {
            [only] => Ok(Some(only.address)),
            [first, ..] if wanted.is_some() => Ok(Some(first.address)),
            _ => Ok(None),
        }
    }

    /// A configured address counts only where an interface has it: nobody else would get an answer from it.
    fn configured_address(&mut self, configured: IpAddr, all: &[HostAddress]) -> Option<IpAddr> {
        if all.iter().any(|it| it.address == configured) {
            self.missing.remove(&configured);
            return Some(configured);
        }
        if self.missing.insert(configured) {
            tracing::error!(
                address = %configured,
                "no interface has the address that underlay.addresses names; give it to one, or correct the configuration"
            );
        }
        None
    }
}

/// The interface with an address.
pub(super) fn carrier_of<'a>(
    address: IpAddr,
    all: &[HostAddress],
    interfaces: &'a [Interface],
) -> Option<&'a Interface> {
    let name = &all.iter().find(|it| it.address == address)?.interface;
    interfaces.iter().find(|interface| interface.name == *name)
}

/// Networks on the host's own interfaces.
pub(super) fn foreign_prefixes(all: &[HostAddress], interfaces: &[Interface]) -> BTreeSet<Prefix> {
    let counts = |name: &InterfaceName| {
        interfaces.iter().any(|interface| interface.name == *name && !interface.loopback && !interface.is_husk())
    };
    all.iter()
        .filter(|it| it.lasting && counts(&it.interface))
        .filter_map(|it| Prefix::containing(it.address, it.length).ok())
        .collect()
}

/// Interfaces of the host whose `accept_ra` is 1 or was made 2 by Husk: 1 stops working once the host forwards
/// (Documentation/networking/ip-sysctl.rst), and their default routes would go.
pub(super) fn advertised(interfaces: &[Interface]) -> BTreeSet<InterfaceName> {
    let foreign = interfaces.iter().filter(|interface| !interface.loopback && !interface.is_husk());
    let accepts = |interface: &&Interface| {
        let path = format!("net/ipv6/conf/{}/accept_ra", interface.name);
        let found = sysctl::read([&path]).unwrap_or_default();
        found.get(&path).is_some_and(|value| value == "1" || value == "2")
    };
    foreign.filter(accepts).map(|interface| interface.name.clone()).collect()
}
