//! What routers have said of the paths to the peers.
//!
//! A router that cannot forward a tunnel packet tells this host, whose kernel keeps to it; the pod that sent the packet inside
//! hears of it only if the route into the tunnel gets the smaller MTU. So what the kernel has learned counts like the MTU of the
//! underlay's route, until it forgets it and tries again, ten minutes later.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_dataplane::netlink::Socket;
use husk_dataplane::underlay;
use husk_overlay::config::Config;
use husk_overlay::facts::{RouteLimit, UnderlayRoute};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;

/// Path MTUs to peers.
pub(super) struct Paths {
    /// Family of the tunnels' outer packets; none in a mode without tunnels, where pods hear the routers themselves.
    family: Option<Family>,
    /// Least MTU in bytes that is believed.
    floor: u32,
    /// What was last found, by underlay address of a peer; none for one of which nothing was learned.
    found: BTreeMap<IpAddr, Option<u32>>,
    /// The same, of the last pass that was carried out.
    applied: BTreeMap<IpAddr, Option<u32>>,
}

impl Paths {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            family: Some(config.underlay.family).filter(|_| config.mode != Mode::Direct),
            floor: config.least_underlay_mtu(),
            found: BTreeMap::new(),
            applied: BTreeMap::new(),
        }
    }

    /// Lowers the MTU of routes to what is known of the paths. What would leave less than the overlay can work with is not
    /// believed: anybody can send such an error, and who sends a true one has made the overlay useless anyway. Where the kernel
    /// does not answer, what it said last counts.
    pub(super) fn lower(&mut self, socket: &mut Socket, routes: &mut BTreeMap<IpAddr, UnderlayRoute>) {
        let Some(family) = self.family else { return };
        match underlay::path_mtus(socket, family) {
            Ok(learned) => {
                self.found = routes.keys().map(|address| (*address, self.believed(&learned, *address))).collect();
            }
            Err(error) => tracing::warn!(%error, "what routers said of the paths to peers cannot be read"),
        }
        for (address, route) in routes {
            if let Some(Some(mtu)) = self.found.get(address)
                && *mtu < route.mtu
            {
                tracing::debug!(%address, mtu, "a router on the way to a peer takes less than the link");
                (route.mtu, route.limited_by) = (*mtu, RouteLimit::Router);
            }
        }
    }

    /// What was found is in force.
    pub(super) fn carried_out(&mut self) {
        self.applied.clone_from(&self.found);
    }

    /// Whether the kernel knows something else than what is in force. Where it does not answer, the next pass asks again.
    pub(super) fn changed(&self, socket: &mut Socket) -> bool {
        let Some(family) = self.family.filter(|_| !self.applied.is_empty()) else { return false };
        let Ok(learned) = underlay::path_mtus(socket, family) else { return false };
        self.applied.iter().any(|(address, before)| self.believed(&learned, *address) != *before)
    }

    /// What the kernel has learned of the path to an address, unless it is too little to be true.
    fn believed(&self, learned: &BTreeMap<IpAddr, u32>, address: IpAddr) -> Option<u32> {
        learned.get(&address).copied().filter(|mtu| *mtu >= self.floor)
    }
}
