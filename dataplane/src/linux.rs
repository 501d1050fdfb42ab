//! The real kernel.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_overlay::kernel::Desired;
use husk_overlay::kernel::policy::PolicyTable;
use husk_overlay::name::InterfaceName;
use nix::errno::Errno;

use crate::conntrack::{Connections, Mappings};
use crate::error::Error;
use crate::interfaces::{Interfaces, dump_links};
use crate::kernel::{Actual, Change, Kernel, Table};
use crate::links::LinkChange;
use crate::netlink::{Protocol, Socket};
use crate::step::{Step, perform};
use crate::sweep::Sweep;
use crate::sysfs::Sysfs;
use crate::wireguard::{KeyRing, Wireguard, WireguardChange};
use crate::xfrm::{self, Xfrm};
use crate::{addresses, fdb, links, napi, neighbours, nft, offload, policy, routes, sysctl};

/// The kernel's tables in one network namespace.
///
/// Netlink sockets stay in the namespace they were opened in, but `nft` and `/proc/sys` look at that of the calling thread:
/// use the value only on threads of the namespace it was opened in.
pub struct Linux {
    route: Socket,
    interfaces: Option<Interfaces>,
    wireguard: Option<Wireguard>,
    xfrm: Option<Xfrm>,
    offloads: Option<offload::Offloads>,
    control_sockets: PathBuf,
    sysfs: Option<Sysfs>,
    nft: nft::Reader,
    policy: policy::Live,
    /// What the policy table was to be when it was read last.
    desired_policy: Option<Arc<PolicyTable>>,
    connections: Connections,
}

impl Linux {
    /// Access to the calling thread's network namespace. Control sockets of userspace WireGuard devices are looked for in
    /// `control_sockets`, usually [`husk_overlay::marks::WIREGUARD_SOCKET_DIRECTORY`].
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open(control_sockets: &Path) -> Result<Self, Error> {
        let sysfs = Sysfs::mount()
            .inspect_err(
                |error| tracing::debug!(%error, "no sysfs of this network namespace: threaded NAPI is left alone"),
            )
            .ok();
        Ok(Self {
            route: Socket::open(Protocol::Route)?,
            interfaces: None,
            wireguard: None,
            xfrm: None,
            offloads: None,
            control_sockets: control_sockets.to_owned(),
            sysfs,
            nft: nft::Reader::default(),
            policy: policy::Live::owning(),
            desired_policy: None,
            connections: Connections::default(),
        })
    }

    /// The rtnetlink socket, for look-ups outside the tables, such as [`crate::underlay`].
    pub fn route_socket(&mut self) -> &mut Socket {
        &mut self.route
    }

    /// Access to WireGuard devices.
    ///
    /// # Errors
    /// [`Error::Socket`] when no generic netlink socket can be had.
    pub fn wireguard(&mut self) -> Result<&mut Wireguard, Error> {
        match &mut self.wireguard {
            Some(wireguard) => Ok(wireguard),
            none => Ok(none.insert(Wireguard::open(&self.control_sockets)?)),
        }
    }

    /// Deletes interfaces by name, in as few messages as possible; those that are not there are fine.
    pub fn delete_interfaces(&mut self, interfaces: &[InterfaceName]) -> Vec<Result<(), Error>> {
        self.interfaces = None;
        perform(&mut self.route, interfaces.iter().map(|interface| Ok(vec![links::remove(interface)])).collect())
    }

    fn known_interfaces(&mut self) -> Result<Interfaces, Error> {
        if let Some(interfaces) = &self.interfaces {
            return Ok(interfaces.clone());
        }
        let interfaces = Interfaces::of(&dump_links(&mut self.route)?);
        self.interfaces = Some(interfaces.clone());
        Ok(interfaces)
    }

    fn read_links(&mut self, actual: &mut Actual) -> Result<(), Error> {
        let messages = dump_links(&mut self.route)?;
        self.interfaces = Some(Interfaces::of(&messages));
        actual.links = links::tunnels(&messages);
        Ok(())
    }

    fn offloads(&mut self) -> Result<&mut offload::Offloads, Error> {
        match &mut self.offloads {
            Some(offloads) => Ok(offloads),
            none => Ok(none.insert(offload::Offloads::open()?)),
        }
    }

    fn read_offload(&mut self, desired: &Desired, actual: &mut Actual) -> Result<(), Error> {
        let mut devices = BTreeMap::new();
        for interface in desired.offload.keys() {
            if let Some(on) = self.offloads()?.read(interface)? {
                devices.insert(interface.clone(), on);
            }
        }
        actual.offload = devices;
        Ok(())
    }

    fn read_wireguard(&mut self, desired: &Desired, actual: &mut Actual) -> Result<(), Error> {
        let mut devices = BTreeMap::new();
        for (interface, device) in &desired.wireguard {
            if let Some(state) = self.wireguard()?.read(interface, device.userspace)? {
                devices.insert(interface.clone(), state);
            }
        }
        actual.wireguard = devices;
        Ok(())
    }

    /// Changes of rtnetlink tables as requests, all in as few datagrams as possible.
    fn apply_rtnetlink(&mut self, changes: &[Change]) -> Vec<Result<(), Error>> {
        let mut plan = match self.rtnetlink_steps(changes) {
            Ok(plan) => plan,
            Err(error) => return fail_all(changes.len(), error),
        };
        let unknown = |result: &Result<_, Error>| matches!(result, Err(error) if error.errno() == Some(Errno::ENODEV));
        if plan.iter().any(unknown) {
            // The interface may have come since the links were read: that of a pod does at any time.
            self.interfaces = None;
            plan = match self.rtnetlink_steps(changes) {
                Ok(plan) => plan,
                Err(error) => return fail_all(changes.len(), error),
            };
        }
        let results = perform(&mut self.route, plan);
        if changes.iter().any(|change| change.table() == Table::Links) {
            self.interfaces = None;
        }
        results
    }

    /// What each change takes, with the interfaces that are known.
    fn rtnetlink_steps(&mut self, changes: &[Change]) -> Result<Vec<Result<Vec<Step>, Error>>, Error> {
        let interfaces = self.known_interfaces()?;
        Ok(changes.iter().map(|change| steps(change, &interfaces)).collect())
    }

    fn apply_wireguard(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let changes: Vec<WireguardChange> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Wireguard(change) => Some(change.clone()),
                _ => None,
            })
            .collect();
        match self.wireguard() {
            Ok(wireguard) => wireguard.apply(&changes, keys),
            Err(error) => fail_all(changes.len(), error),
        }
    }

    /// Access to IPsec; none where the kernel has nothing of it, unless that is wanted.
    fn xfrm(&mut self, wanted: bool) -> Result<Option<&mut Xfrm>, Error> {
        match &mut self.xfrm {
            Some(xfrm) => Ok(Some(xfrm)),
            none if wanted || xfrm::is_present() => Ok(Some(none.insert(Xfrm::open()?))),
            _ => Ok(None),
        }
    }

    /// Changes of one of the two IPsec tables.
    fn apply_xfrm(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let (mut states, mut policies) = (Vec::new(), Vec::new());
        for change in changes {
            match change {
                Change::XfrmState(change) => states.push(change.clone()),
                Change::XfrmPolicy(change) => policies.push(change.clone()),
                _ => {}
            }
        }
        match self.xfrm(true) {
            Ok(Some(xfrm)) if policies.is_empty() => xfrm.apply_states(&states, keys),
            Ok(Some(xfrm)) => xfrm.apply_policies(&policies),
            Ok(None) => Vec::new(),
            Err(error) => fail_all(changes.len(), error),
        }
    }

    fn apply_policy(&mut self, changes: &[Change]) -> Vec<Result<(), Error>> {
        let transaction: Vec<_> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Policy(change) => Some(change.clone()),
                _ => None,
            })
            .collect();
        match self.policy.apply(&transaction, self.desired_policy.as_deref()) {
            Ok(applied) => {
                tracing::debug!(applied.bytes, applied.replaced, "changed the policy table");
                changes.iter().map(|_| Ok(())).collect()
            }
            Err(error) => fail_all(changes.len(), error),
        }
    }

    fn apply_one_by_one(&mut self, change: &Change) -> Result<(), Error> {
        match (change, &self.sysfs) {
            (Change::Sysctl(change), _) => sysctl::apply(change),
            (Change::Offload(change), _) => self.offloads()?.apply(change),
            (Change::Napi(change), Some(sysfs)) => napi::apply(sysfs, change),
            _ => Ok(()),
        }
    }
}

impl Kernel for Linux {
    fn read(&mut self, table: Table, desired: &Desired, actual: &mut Actual) -> Result<(), Error> {
        match table {
            Table::Sysctls => actual.sysctls = sysctl::read(desired.sysctls.keys())?,
            Table::Nft => actual.nft = self.nft.read()?,
            Table::Policy => {
                self.desired_policy.clone_from(&desired.policy);
                actual.policy = self.policy.read()?;
            }
            Table::Links => self.read_links(actual)?,
            Table::Offload => self.read_offload(desired, actual)?,
            Table::Wireguard => self.read_wireguard(desired, actual)?,
            Table::XfrmStates => {
                let wanted = !desired.xfrm_states.is_empty();
                actual.xfrm_states = self.xfrm(wanted)?.map(Xfrm::states).transpose()?.unwrap_or_default();
            }
            Table::XfrmPolicies => {
                let wanted = !desired.xfrm_policies.is_empty();
                actual.xfrm_policies = self.xfrm(wanted)?.map(Xfrm::policies).transpose()?.unwrap_or_default();
            }
            Table::Napi => {
                actual.napi = self.sysfs.as_ref().map(|sysfs| napi::read(sysfs, desired)).unwrap_or_default();
            }
            Table::Addresses => {
                let interfaces = self.known_interfaces()?;
                actual.addresses = addresses::read(&mut self.route, &interfaces)?;
            }
            Table::Neighbours => {
                let interfaces = self.known_interfaces()?.without_successors(&desired.known_pods);
                actual.neighbours = neighbours::read(&mut self.route, &interfaces)?;
            }
            Table::Fdb => {
                let interfaces = self.known_interfaces()?;
                actual.fdb = fdb::read(&mut self.route, &interfaces)?;
            }
            Table::Routes => {
                let interfaces = self.known_interfaces()?.without_successors(&desired.known_pods);
                actual.routes = routes::read(&mut self.route, &interfaces)?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(changes.len());
        for group in changes.chunk_by(|one, next| one.table() == next.table()) {
            match group[0].table() {
                Table::Sysctls | Table::Offload | Table::Napi => {
                    results.extend(group.iter().map(|change| self.apply_one_by_one(change)));
                }
                Table::XfrmStates | Table::XfrmPolicies => results.extend(self.apply_xfrm(group, keys)),
                Table::Nft => results.extend(apply_nft(group, &mut self.connections)),
                Table::Policy => results.extend(self.apply_policy(group)),
                Table::Wireguard => results.extend(self.apply_wireguard(group, keys)),
                Table::Links | Table::Addresses | Table::Neighbours | Table::Fdb | Table::Routes => {
                    results.extend(self.apply_rtnetlink(group));
                }
            }
        }
        results
    }

    fn settle_connections(&mut self, desired: &Desired, sweep: Sweep) -> Result<(), Error> {
        let whole = self.connections.are_unknown() && sweep == Sweep::Allowed;
        let mappings = if whole { Some(Mappings::of(self.nft.read()?.as_ref(), desired)) } else { None };
        let count = self.connections.settle(mappings.as_ref())?;
        if count > 0 {
            tracing::info!(count, "ended connections that contradict the port mappings");
        }
        Ok(())
    }
}

fn steps(change: &Change, interfaces: &Interfaces) -> Result<Vec<Step>, Error> {
    match change {
        Change::Link(LinkChange::Await { interface }) => {
            Err(Error::WaitingForUserspaceDevice { interface: interface.to_string() })
        }
        Change::Link(change) => Ok(links::steps(change)),
        Change::Address(change) => addresses::steps(change, interfaces),
        Change::Neighbour(change) => neighbours::steps(change, interfaces),
        Change::Fdb(change) => fdb::steps(change, interfaces),
        Change::Route(change) => routes::steps(change, interfaces),
        Change::Sysctl(_)
        | Change::Offload(_)
        | Change::Nft(_)
        | Change::Policy(_)
        | Change::Wireguard(_)
        | Change::XfrmState(_)
        | Change::XfrmPolicy(_)
        | Change::Napi(_) => Ok(Vec::new()),
    }
}

fn apply_nft(changes: &[Change], connections: &mut Connections) -> Vec<Result<(), Error>> {
    let transaction: Vec<_> = changes
        .iter()
        .filter_map(|change| match change {
            Change::Nft(change) => Some(change.clone()),
            _ => None,
        })
        .collect();
    match nft::apply(&transaction) {
        Ok(()) => {
            connections.note(&transaction);
            changes.iter().map(|_| Ok(())).collect()
        }
        Err(error) => fail_all(changes.len(), error),
    }
}

/// The error for the first of several changes that failed together, and for the others the word that they did.
fn fail_all(count: usize, error: Error) -> Vec<Result<(), Error>> {
    let mut error = Some(error);
    (0..count).map(|_| Err(error.take().unwrap_or(Error::WithTheOthers))).collect()
}
