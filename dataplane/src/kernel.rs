//! The kernel as a set of tables that are read and changed: what the real one and the fake one have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use husk_overlay::kernel::{
    Address, Desired, NeighbourKey, RouteKey, RouteTarget, XfrmAction, XfrmPolicyKey, XfrmStateKey,
};
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use serde::{Deserialize, Serialize};

use crate::addresses::{self, AddressChange};
use crate::error::Error;
use crate::fdb::{self, ActualFdb, FdbChange};
use crate::interfaces;
use crate::links::{self, ActualLink, LinkChange};
use crate::napi::{self, NapiChange};
use crate::neighbours::{self, NeighbourChange};
use crate::nft::{self, NftChange, NftState};
use crate::offload::{self, OffloadChange};
use crate::policy::{self, ActualPolicy, PolicyChange};
use crate::routes::{self, ActualRoute, RouteChange};
use crate::sweep::Sweep;
use crate::sysctl::{self, SysctlChange};
use crate::wireguard::{self, KeyRing, WireguardAction, WireguardChange, WireguardState};
use crate::xfrm::{self, ActualXfrmPolicy, ActualXfrmState, XfrmPolicyChange, XfrmStateChange};

/// A table, in the order in which changes are made: what protects comes before what forwards, what is referred to before
/// what refers to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Table {
    /// The nftables table `inet husk`.
    Nft,
    /// The nftables table `inet husk-policy`.
    Policy,
    /// Tunnel devices.
    Links,
    /// Offload of tunnel devices.
    Offload,
    /// Kernel parameters. They turn forwarding on, so that what protects is in place before; and a parameter of a device
    /// needs the device.
    Sysctls,
    /// WireGuard keys and peers.
    Wireguard,
    /// IPsec security associations. Made before the policies that refer to them, and removed after those.
    XfrmStates,
    /// IPsec policies.
    XfrmPolicies,
    /// Threaded NAPI of tunnel devices.
    Napi,
    /// Addresses on tunnel devices.
    Addresses,
    /// Permanent neighbours.
    Neighbours,
    /// VXLAN forwarding entries.
    Fdb,
    /// Routes.
    Routes,
}

impl Table {
    /// All tables in the order in which changes are made.
    pub const ALL: [Self; 13] = [
        Self::Nft,
        Self::Policy,
        Self::Links,
        Self::Offload,
        Self::Sysctls,
        Self::Wireguard,
        Self::XfrmStates,
        Self::XfrmPolicies,
        Self::Napi,
        Self::Addresses,
        Self::Neighbours,
        Self::Fdb,
        Self::Routes,
    ];
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sysctls => "sysctls",
            Self::Nft => "nft",
            Self::Policy => "policy",
            Self::Links => "links",
            Self::Offload => "offload",
            Self::Wireguard => "wireguard",
            Self::XfrmStates => "xfrm states",
            Self::XfrmPolicies => "xfrm policies",
            Self::Napi => "napi",
            Self::Addresses => "addresses",
            Self::Neighbours => "neighbours",
            Self::Fdb => "fdb",
            Self::Routes => "routes",
        })
    }
}

/// What the kernel holds of what carries our marks, and of the parameters that were asked for. Holds no secret.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Actual {
    /// Tables that were not read, or could not be: nothing is known of them and nothing is changed in them.
    pub unread: BTreeSet<Table>,
    /// Values of the desired kernel parameters.
    pub sysctls: BTreeMap<String, String>,
    /// The nftables table.
    pub nft: Option<NftState>,
    /// The nftables table that enforces network policy.
    pub policy: Option<Arc<ActualPolicy>>,
    /// Tunnel devices.
    pub links: BTreeMap<InterfaceName, ActualLink>,
    /// Offload of the devices of which it is desired to be on or off, where it is known.
    pub offload: BTreeMap<InterfaceName, bool>,
    /// The desired WireGuard devices.
    pub wireguard: BTreeMap<InterfaceName, WireguardState>,
    /// IPsec security associations with our request id.
    pub xfrm_states: BTreeMap<XfrmStateKey, ActualXfrmState>,
    /// IPsec policies of ours.
    pub xfrm_policies: BTreeMap<XfrmPolicyKey, ActualXfrmPolicy>,
    /// Threaded NAPI, where it is known.
    pub napi: BTreeMap<InterfaceName, bool>,
    /// Addresses on tunnel devices.
    pub addresses: BTreeSet<Address>,
    /// Permanent neighbours on tunnel and pod interfaces.
    pub neighbours: BTreeMap<NeighbourKey, MacAddress>,
    /// Forwarding entries of tunnel devices.
    pub fdb: ActualFdb,
    /// Routes with our protocol number.
    pub routes: BTreeMap<RouteKey, ActualRoute>,
}

/// One change to one table, as `huskctl diff` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Change {
    /// A kernel parameter.
    Sysctl(SysctlChange),
    /// The nftables table.
    Nft(NftChange),
    /// The nftables table that enforces network policy.
    Policy(PolicyChange),
    /// A tunnel device.
    Link(LinkChange),
    /// Offload of a tunnel device.
    Offload(OffloadChange),
    /// A WireGuard key or peer.
    Wireguard(WireguardChange),
    /// An IPsec security association.
    XfrmState(XfrmStateChange),
    /// An IPsec policy.
    XfrmPolicy(XfrmPolicyChange),
    /// Threaded NAPI.
    Napi(NapiChange),
    /// An address.
    Address(AddressChange),
    /// A neighbour entry.
    Neighbour(NeighbourChange),
    /// A forwarding entry.
    Fdb(FdbChange),
    /// A route.
    Route(RouteChange),
}

impl Change {
    /// Table it changes.
    #[must_use]
    pub fn table(&self) -> Table {
        match self {
            Self::Sysctl(_) => Table::Sysctls,
            Self::Nft(_) => Table::Nft,
            Self::Policy(_) => Table::Policy,
            Self::Link(_) => Table::Links,
            Self::Offload(_) => Table::Offload,
            Self::Wireguard(_) => Table::Wireguard,
            Self::XfrmState(_) => Table::XfrmStates,
            Self::XfrmPolicy(_) => Table::XfrmPolicies,
            Self::Napi(_) => Table::Napi,
            Self::Address(_) => Table::Addresses,
            Self::Neighbour(_) => Table::Neighbours,
            Self::Fdb(_) => Table::Fdb,
            Self::Route(_) => Table::Routes,
        }
    }

    /// True if it takes something away that nothing desired takes the place of. Such changes come last, in the reverse
    /// order of tables, so that what replaces them is there before; and only when sweeping is allowed.
    #[must_use]
    pub fn is_removal(&self) -> bool {
        match self {
            Self::Sysctl(_) | Self::Offload(_) | Self::Napi(_) => false,
            // Changes within an nftables table belong together in one transaction.
            Self::Nft(change) => matches!(change, NftChange::DeleteTable),
            Self::Policy(change) => matches!(change, PolicyChange::DeleteTable),
            Self::Link(change) => matches!(change, LinkChange::Remove { .. }),
            Self::Wireguard(change) => matches!(change.action, WireguardAction::RemovePeer { .. }),
            Self::XfrmState(change) => matches!(change, XfrmStateChange::Remove { .. }),
            Self::XfrmPolicy(change) => matches!(change, XfrmPolicyChange::Remove { .. }),
            Self::Address(change) => matches!(change, AddressChange::Remove(_)),
            Self::Neighbour(change) => matches!(change, NeighbourChange::Remove { .. }),
            Self::Fdb(change) => matches!(change, FdbChange::Remove { .. }),
            Self::Route(change) => matches!(change, RouteChange::Remove { .. }),
        }
    }

    /// True for the making of an unreachable route, which needs no device and comes before all devices: a packet for a peer
    /// that is not set up yet must not find the default route.
    #[must_use]
    pub fn makes_unreachable(&self) -> bool {
        let Self::Route(change) = self else { return false };
        change.route().is_some_and(|route| route.target == RouteTarget::Unreachable)
    }

    /// True for an IPsec policy that keeps plaintext from leaving or arriving.
    #[must_use]
    pub fn blocks(&self) -> bool {
        let Self::XfrmPolicy(change) = self else { return false };
        change.policy().is_some_and(|policy| policy.action == XfrmAction::Block)
    }

    /// True if packets may go where they could not go before: forwarding is turned on, or a route leads somewhere. Such a
    /// change waits until everything that protects is in place.
    #[must_use]
    pub fn opens(&self) -> bool {
        match self {
            Self::Sysctl(change) => change.turns_forwarding_on(),
            Self::Route(change) => change.route().is_some_and(|route| route.target != RouteTarget::Unreachable),
            _ => false,
        }
    }

    /// True if a route goes, by itself or with its device: packets then find the next one that matches, which is the default
    /// route where there is no floor of unreachable routes.
    pub(crate) fn uncovers(&self) -> bool {
        match self {
            Self::Link(change) => matches!(change, LinkChange::Remove { .. } | LinkChange::Recreate { .. }),
            Self::Route(change) => matches!(change, RouteChange::Remove { .. }),
            _ => false,
        }
    }

    /// Interface whose removal takes the object of this change with it.
    pub(crate) fn carrier(&self) -> Option<&InterfaceName> {
        match self {
            Self::Address(change) => Some(&change.address().interface),
            Self::Neighbour(change) => Some(&change.key().interface),
            Self::Fdb(change) => Some(&change.key().interface),
            Self::Wireguard(change) => Some(&change.interface),
            _ => None,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(change) => change.fmt(f),
            Self::Nft(change) => change.fmt(f),
            Self::Policy(change) => change.fmt(f),
            Self::Link(change) => change.fmt(f),
            Self::Offload(change) => change.fmt(f),
            Self::Wireguard(change) => change.fmt(f),
            Self::XfrmState(change) => change.fmt(f),
            Self::XfrmPolicy(change) => change.fmt(f),
            Self::Napi(change) => change.fmt(f),
            Self::Address(change) => change.fmt(f),
            Self::Neighbour(change) => change.fmt(f),
            Self::Fdb(change) => change.fmt(f),
            Self::Route(change) => change.fmt(f),
        }
    }
}

/// A kernel: the real one ([`crate::linux::Linux`]) or the one for tests ([`crate::fake::FakeKernel`]).
pub trait Kernel {
    /// Reads a table into its place in `actual`. `desired` says which parameters to look at and how WireGuard devices are
    /// reached; it does not limit what is found.
    ///
    /// # Errors
    /// When the table could not be read whole; its place in `actual` is as it was.
    fn read(&mut self, table: Table, desired: &Desired, actual: &mut Actual) -> Result<(), Error>;

    /// Makes changes in order; one result for each. A failed change does not stop the others, except within an nftables
    /// table, which changes as a whole or not at all. Those of the policy table are from what was read last, on the way to
    /// what was desired then.
    fn apply(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>>;

    /// Ends the connections that contradict the port mappings as they are now: once for all that was before, as soon as
    /// sweeping is allowed, then for each change. What fails is done the next time.
    ///
    /// # Errors
    /// When connections that should have ended may go on.
    fn settle_connections(&mut self, desired: &Desired, sweep: Sweep) -> Result<(), Error>;
}

/// What has to change in one table, removals last.
#[must_use]
pub fn diff_table(table: Table, desired: &Desired, actual: &Actual, sweep: Sweep) -> Vec<Change> {
    match table {
        Table::Sysctls => {
            let mut changes = sysctl::diff(&desired.sysctls, &actual.sysctls);
            // Turning IPv6 forwarding on drops the default routes of interfaces whose accept_ra is not 2 by then
            // (net/ipv6/route.c `rt6_purge_dflt_routers`): forwarding comes last.
            changes.sort_by_key(|change| sysctl::is_forwarding(&change.path));
            wrap(changes, Change::Sysctl)
        }
        Table::Nft => {
            let mut changes = nft::diff(desired.nft.as_ref(), actual.nft.as_ref());
            if sweep == Sweep::Withheld {
                changes.retain(|change| !matches!(change, NftChange::DeleteTable | NftChange::DeleteElements { .. }));
                changes = nft::without_removed_mappings(changes);
            }
            wrap(changes, Change::Nft)
        }
        Table::Policy => {
            let mut changes = policy::diff(desired.policy.as_deref(), actual.policy.as_deref());
            // Not a matter of the sweep: what is known of policy is enforced as a whole.
            if desired.policy_is_unknown {
                changes = policy::without_removals(changes);
                // One that is in force is better than none, whosever it is.
                if actual.policy.as_ref().is_some_and(|table| !table.dormant) {
                    changes.retain(|change| !matches!(change, PolicyChange::ReplaceTable { .. }));
                }
            }
            wrap(changes, Change::Policy)
        }
        Table::Links => wrap(links::diff(&desired.links, &actual.links, sweep), Change::Link),
        Table::Offload => wrap(offload::diff(&desired.offload, &actual.offload), Change::Offload),
        Table::Wireguard => {
            let devices = desired.wireguard.iter();
            let mut changes: Vec<_> = devices
                .flat_map(|(interface, device)| wireguard::diff(interface, device, actual.wireguard.get(interface)))
                .collect();
            if sweep == Sweep::Withheld {
                changes.retain(|change| !matches!(change.action, WireguardAction::RemovePeer { .. }));
            }
            wrap(changes, Change::Wireguard)
        }
        Table::XfrmStates => {
            wrap(xfrm::diff_states(&desired.xfrm_states, &actual.xfrm_states, sweep), Change::XfrmState)
        }
        Table::XfrmPolicies => {
            wrap(xfrm::diff_policies(&desired.xfrm_policies, &actual.xfrm_policies, sweep), Change::XfrmPolicy)
        }
        Table::Napi => wrap(napi::diff(desired, &actual.napi), Change::Napi),
        Table::Addresses => wrap(addresses::diff(&desired.addresses, &actual.addresses, sweep), Change::Address),
        Table::Neighbours => {
            let mut changes = neighbours::diff(&desired.neighbours, &actual.neighbours, sweep);
            changes.retain(|change| match change {
                NeighbourChange::Remove { key } => !is_younger_than_plan(&key.interface, desired),
                NeighbourChange::Set { .. } => true,
            });
            wrap(changes, Change::Neighbour)
        }
        Table::Fdb => wrap(fdb::diff(&desired.fdb, &actual.fdb, sweep), Change::Fdb),
        Table::Routes => {
            let mut changes = routes::diff(&desired.routes, &actual.routes, sweep);
            changes.retain(|change| match change {
                RouteChange::Remove { key } => {
                    let interface = actual.routes.get(key).and_then(ActualRoute::interface);
                    !interface.is_some_and(|interface| is_younger_than_plan(interface, desired))
                }
                _ => true,
            });
            wrap(changes, Change::Route)
        }
    }
}

/// True for the interface of a pod that was wired after the plan was made: the plan knows nothing of it, so that what hangs
/// on it is not what the plan left out on purpose.
fn is_younger_than_plan(interface: &InterfaceName, desired: &Desired) -> bool {
    let name = interface.as_str();
    name.starts_with(interfaces::UNKNOWN)
        || marks::is_pod_interface(name) && !desired.known_pods.contains_key(interface)
}

fn wrap<T>(changes: Vec<T>, make: impl Fn(T) -> Change) -> Vec<Change> {
    changes.into_iter().map(make).collect()
}

/// What has to change in all tables that were read, in the order of tables.
#[must_use]
pub fn diff(desired: &Desired, actual: &Actual, sweep: Sweep) -> Vec<Change> {
    let known = Table::ALL.into_iter().filter(|table| !actual.unread.contains(table));
    known.flat_map(|table| diff_table(table, desired, actual, sweep)).collect()
}
