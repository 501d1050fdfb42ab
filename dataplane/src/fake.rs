//! A kernel for tests: it keeps tables in memory, with those rules of the real one that matter to a reconciler, and fails
//! on demand.
//!
//! A handle is cheap to clone: a test keeps one and hands another to what it tests. Strangers' interfaces and routes can be
//! put in; nothing that Husk does may change them.

mod xfrm;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_overlay::kernel::{Desired, LinkKind, Route, RouteKey, RouteTarget, XfrmStateKey};
use husk_overlay::name::InterfaceName;
use nix::errno::Errno;

use crate::addresses::AddressChange;
use crate::error::{Error, Refusal};
use crate::fdb::FdbChange;
use crate::kernel::{Actual, Change, Kernel, Table};
use crate::links::{ActualKind, ActualLink, LinkChange};
use crate::neighbours::NeighbourChange;
use crate::routes::{ActualRoute, RouteChange};
use crate::sweep::Sweep;
use crate::wireguard::{KeyRing, WireguardAction, WireguardState};

/// Something that shall go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every change to a table is refused.
    Change(Table),
    /// The nth change from now on, counted from 0 over all tables, is refused; once.
    NthChange(u64),
    /// Every reading of a table fails, as one that is interrupted again and again.
    Read(Table),
    /// The nth reading from now on, counted from 0 over all tables, fails; once.
    NthRead(u64),
    /// Connections that contradict the port mappings cannot be ended.
    Connections,
}

/// What was asked of the kernel so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tables read.
    pub reads: u64,
    /// Changes asked for, refused ones included.
    pub changes: u64,
    /// Calls of `apply`, each about one datagram or program on a real kernel.
    pub batches: u64,
}

/// State of a [`FakeKernel`]. Tests may look at it and change it as an outsider would.
#[derive(Debug, Clone, Default)]
pub struct FakeState {
    /// What carries Husk's marks, kernel parameters included.
    pub own: Actual,
    /// Interfaces that are no tunnels: the underlay's and those of pods.
    pub interfaces: BTreeSet<InterfaceName>,
    /// Routes with other protocol numbers.
    pub foreign_routes: BTreeMap<RouteKey, Route>,
    /// What was asked so far.
    pub counters: Counters,
    /// What the clock says when a WireGuard device is read, as time since the Unix epoch.
    pub now: Duration,
    /// Every association that was ever installed, in order. One that is in here twice had its sequence numbers start anew.
    pub installed_associations: Vec<XfrmStateKey>,
    faults: Vec<(Fault, Errno)>,
}

/// A handle to a fake kernel.
#[derive(Debug, Clone, Default)]
pub struct FakeKernel(Arc<Mutex<FakeState>>);

impl FakeKernel {
    /// A kernel with the given interfaces that are no tunnels.
    #[must_use]
    pub fn with_interfaces<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let kernel = Self::default();
        kernel.state().interfaces =
            names.into_iter().map(|name| InterfaceName::new(name).expect("a test names interfaces validly")).collect();
        kernel
    }

    /// The state, locked as long as the guard lives.
    pub fn state(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets something go wrong from now on.
    pub fn inject(&self, fault: Fault, errno: Errno) {
        self.state().faults.push((fault, errno));
    }

    /// Lets nothing go wrong any more.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Empties a table, as an outsider's flush.
    pub fn flush(&self, table: Table) {
        self.state().flush(table);
    }

    /// Lets a userspace WireGuard process create its device.
    pub fn create_userspace_device(&self, interface: &InterfaceName, mtu: u32) {
        let kind = ActualKind::Known(LinkKind::WireguardUserspace);
        let link = ActualLink { kind, mtu, mac: None, up: false, link_local: true, fragmentable: false };
        self.state().own.links.insert(interface.clone(), link);
    }
}

impl Kernel for FakeKernel {
    fn read(&mut self, table: Table, desired: &Desired, actual: &mut Actual) -> Result<(), Error> {
        let mut state = self.state();
        state.counters.reads += 1;
        state.fail_read(table)?;
        let own = &state.own;
        match table {
            Table::Sysctls => {
                actual.sysctls = own
                    .sysctls
                    .iter()
                    .filter(|(path, _)| desired.sysctls.contains_key(*path))
                    .map(|(path, value)| (path.clone(), value.clone()))
                    .collect();
            }
            Table::Nft => actual.nft.clone_from(&own.nft),
            Table::Policy => actual.policy.clone_from(&own.policy),
            Table::Links => actual.links.clone_from(&own.links),
            Table::Offload => {
                let desired = own.offload.iter().filter(|(interface, _)| desired.offload.contains_key(*interface));
                actual.offload = desired.map(|(interface, on)| (interface.clone(), *on)).collect();
            }
            Table::Wireguard => actual.wireguard = state.wireguard_devices(desired),
            Table::XfrmStates => actual.xfrm_states.clone_from(&own.xfrm_states),
            Table::XfrmPolicies => actual.xfrm_policies.clone_from(&own.xfrm_policies),
            Table::Napi => actual.napi.clone_from(&own.napi),
            Table::Addresses => actual.addresses.clone_from(&own.addresses),
            Table::Neighbours => actual.neighbours.clone_from(&own.neighbours),
            Table::Fdb => actual.fdb.clone_from(&own.fdb),
            Table::Routes => actual.routes.clone_from(&own.routes),
        }
        Ok(())
    }

    fn apply(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let mut state = self.state();
        state.counters.batches += 1;
        let mut results = Vec::with_capacity(changes.len());
        for group in changes.chunk_by(|one, next| one.table() == next.table()) {
            // An nftables table changes as a whole or not at all.
            let is_one = matches!(group[0].table(), Table::Nft | Table::Policy);
            let before = is_one.then(|| (state.own.nft.clone(), state.own.policy.clone()));
            let outcome: Vec<_> = group.iter().map(|change| state.change(change, keys)).collect();
            match before {
                Some((nft, policy)) if outcome.iter().any(Result::is_err) => {
                    (state.own.nft, state.own.policy) = (nft, policy);
                    results.extend(outcome.into_iter().map(|result| result.and(Err(Error::WithTheOthers))));
                }
                _ => results.extend(outcome),
            }
        }
        results
    }

    fn settle_connections(&mut self, _: &Desired, _: Sweep) -> Result<(), Error> {
        let state = self.state();
        let failed = state.faults.iter().find(|(fault, _)| *fault == Fault::Connections);
        failed.map_or(Ok(()), |(_, errno)| Err(refusal("list", "connections to mapped ports".to_owned(), *errno)))
    }
}

impl FakeState {
    fn fail_read(&mut self, table: Table) -> Result<(), Error> {
        let mut failed = None;
        self.faults.retain_mut(|(fault, errno)| match fault {
            Fault::Read(which) if *which == table => {
                failed = Some(*errno);
                true
            }
            Fault::NthRead(0) => {
                failed = Some(*errno);
                false
            }
            Fault::NthRead(left) => {
                *left -= 1;
                true
            }
            _ => true,
        });
        failed.map_or(Ok(()), |errno| Err(refusal("read", table.to_string(), errno)))
    }

    fn fail_change(&mut self, change: &Change) -> Result<(), Error> {
        let mut failed = None;
        self.faults.retain_mut(|(fault, errno)| match fault {
            Fault::Change(which) if *which == change.table() => {
                failed = Some(*errno);
                true
            }
            Fault::NthChange(0) => {
                failed = Some(*errno);
                false
            }
            Fault::NthChange(left) => {
                *left -= 1;
                true
            }
            _ => true,
        });
        failed.map_or(Ok(()), |errno| Err(refused(change, errno)))
    }

    fn change(&mut self, change: &Change, keys: &KeyRing) -> Result<(), Error> {
        self.counters.changes += 1;
        self.fail_change(change)?;
        match change {
            Change::Sysctl(it) => it.apply_to(&mut self.own.sysctls),
            Change::Nft(it) => it.apply_to(&mut self.own.nft),
            Change::Policy(it) => it.apply_to(&mut self.own.policy),
            Change::Link(it) => self.change_link(change, it)?,
            Change::Offload(it) => {
                self.need(change, &it.interface)?;
                self.own.offload.insert(it.interface.clone(), it.on);
            }
            Change::Wireguard(it) => {
                if let WireguardAction::SetPrivateKey { public_key } = &it.action
                    && keys.get(public_key).is_none()
                {
                    return Err(Error::NoPrivateKey { interface: it.interface.to_string() });
                }
                self.need(change, &it.interface)?;
                it.action.apply_to(self.own.wireguard.entry(it.interface.clone()).or_default());
            }
            Change::XfrmState(it) => self.change_xfrm_state(change, it, keys)?,
            Change::XfrmPolicy(it) => self.change_xfrm_policy(change, it)?,
            Change::Napi(it) => {
                self.own.napi.insert(it.interface.clone(), true);
            }
            Change::Address(AddressChange::Add(address)) => {
                self.need(change, &address.interface)?;
                self.own.addresses.insert(address.clone());
            }
            Change::Address(AddressChange::Remove(address)) => {
                self.own.addresses.remove(address);
            }
            Change::Neighbour(NeighbourChange::Set { key, mac }) => {
                self.need(change, &key.interface)?;
                self.own.neighbours.insert(key.clone(), *mac);
            }
            Change::Neighbour(NeighbourChange::Remove { key }) => {
                self.own.neighbours.remove(key);
            }
            Change::Fdb(FdbChange::Set { key, destination }) => {
                self.need_vxlan(change, &key.interface)?;
                let all = self.own.fdb.entry(key.clone()).or_default();
                if key.mac.is_unicast() {
                    all.clear();
                }
                all.insert(*destination);
            }
            Change::Fdb(FdbChange::Remove { key, destination }) => {
                if let Some(all) = self.own.fdb.get_mut(key) {
                    all.remove(destination);
                    if all.is_empty() {
                        self.own.fdb.remove(key);
                    }
                }
            }
            Change::Route(it) => self.change_route(change, it)?,
        }
        Ok(())
    }

    fn change_link(&mut self, change: &Change, link_change: &LinkChange) -> Result<(), Error> {
        match link_change {
            LinkChange::Create { interface, .. } if self.exists(interface) => {
                return Err(refused(change, Errno::EEXIST));
            }
            LinkChange::Create { interface, link } => self.add_link(interface, link),
            LinkChange::Recreate { interface, link, .. } => {
                self.remove_link(interface);
                self.add_link(interface, link);
            }
            LinkChange::Tune { interface, tuning } => {
                let link = self.own.links.get_mut(interface).ok_or_else(|| refused(change, Errno::ENODEV))?;
                link.mtu = tuning.mtu.unwrap_or(link.mtu);
                link.mac = tuning.mac.or(link.mac);
                link.up |= tuning.up;
                link.link_local &= !tuning.no_link_local;
                link.fragmentable &= !tuning.dont_fragment;
            }
            LinkChange::Await { interface } => {
                return Err(Error::WaitingForUserspaceDevice { interface: interface.to_string() });
            }
            LinkChange::Remove { interface } => self.remove_link(interface),
        }
        Ok(())
    }

    fn add_link(&mut self, interface: &InterfaceName, link: &husk_overlay::kernel::Link) {
        self.own.links.insert(interface.clone(), ActualLink::made_of(link));
        self.own.napi.insert(interface.clone(), false);
        self.own.offload.insert(interface.clone(), true);
    }

    /// Deletes an interface and, as the kernel does, all that it carries.
    pub fn remove_link(&mut self, interface: &InterfaceName) {
        self.interfaces.remove(interface);
        self.own.links.remove(interface);
        self.own.napi.remove(interface);
        self.own.offload.remove(interface);
        self.own.wireguard.remove(interface);
        self.own.addresses.retain(|address| address.interface != *interface);
        self.own.neighbours.retain(|key, _| key.interface != *interface);
        self.own.fdb.retain(|key, _| key.interface != *interface);
        let leads_there = |route: &Route| matches!(&route.target, RouteTarget::Interface { interface: name, .. } if name == interface);
        self.own.routes.retain(|_, route| !matches!(route, ActualRoute::Plain(route) if leads_there(route)));
        self.foreign_routes.retain(|_, route| !leads_there(route));
    }

    fn change_route(&mut self, change: &Change, route_change: &RouteChange) -> Result<(), Error> {
        let key = route_change.key();
        let Some(route) = route_change.route() else {
            self.own.routes.remove(key);
            return Ok(());
        };
        if let RouteTarget::Interface { interface, .. } = &route.target {
            self.need(change, interface)?;
            if self.own.links.get(interface).is_some_and(|link| !link.up) {
                return Err(refused(change, Errno::ENETDOWN));
            }
        }
        let taken = self.foreign_routes.contains_key(key)
            || matches!(route_change, RouteChange::Add { .. }) && self.own.routes.contains_key(key);
        if taken {
            return Err(refused(change, Errno::EEXIST));
        }
        self.own.routes.insert(key.clone(), ActualRoute::Plain(route.clone()));
        Ok(())
    }

    fn flush(&mut self, table: Table) {
        match table {
            Table::Sysctls => self.own.sysctls.clear(),
            Table::Nft => self.own.nft = None,
            Table::Policy => self.own.policy = None,
            Table::Links => {
                let links: Vec<_> = self.own.links.keys().cloned().collect();
                links.iter().for_each(|interface| self.remove_link(interface));
            }
            Table::Wireguard => self.own.wireguard.clear(),
            Table::XfrmStates => self.own.xfrm_states.clear(),
            Table::XfrmPolicies => self.own.xfrm_policies.clear(),
            Table::Offload => self.own.offload.values_mut().for_each(|on| *on = true),
            Table::Napi => self.own.napi.values_mut().for_each(|threaded| *threaded = false),
            Table::Addresses => self.own.addresses.clear(),
            Table::Neighbours => self.own.neighbours.clear(),
            Table::Fdb => self.own.fdb.clear(),
            Table::Routes => self.own.routes.clear(),
        }
    }

    fn wireguard_devices(&self, desired: &Desired) -> BTreeMap<InterfaceName, WireguardState> {
        let present = desired.wireguard.keys().filter(|interface| self.own.links.contains_key(*interface));
        let read = |interface| {
            let device = self.own.wireguard.get(interface).cloned().unwrap_or_default();
            WireguardState { read_at: self.now, ..device }
        };
        present.map(|interface| (interface.clone(), read(interface))).collect()
    }

    fn exists(&self, interface: &InterfaceName) -> bool {
        self.own.links.contains_key(interface) || self.interfaces.contains(interface)
    }

    fn need(&self, change: &Change, interface: &InterfaceName) -> Result<(), Error> {
        if self.exists(interface) { Ok(()) } else { Err(refused(change, Errno::ENODEV)) }
    }

    fn need_vxlan(&self, change: &Change, interface: &InterfaceName) -> Result<(), Error> {
        self.need(change, interface)?;
        match self.own.links.get(interface).map(|link| &link.kind) {
            Some(ActualKind::Known(LinkKind::Vxlan { .. })) => Ok(()),
            _ => Err(refused(change, Errno::EOPNOTSUPP)),
        }
    }
}

fn refused(change: &Change, errno: Errno) -> Error {
    refusal("make the change", format!("\"{change}\""), errno)
}

fn refusal(operation: &'static str, object: String, errno: Errno) -> Error {
    Error::Refused(Refusal { operation, object, errno, explanation: None })
}
