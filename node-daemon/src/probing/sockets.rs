//! A socket for each own address that probes are sent from.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use husk_dataplane::probe::ProbeSocket;
use husk_overlay::marks;

use super::RETRY;

/// Sockets by address.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    bound: BTreeMap<IpAddr, ProbeSocket>,
    /// Addresses without a socket, and whether the log says why.
    missing: BTreeMap<IpAddr, bool>,
    /// When they were tried last, as time since boot.
    tried: Option<Duration>,
}

impl Sockets {
    /// Closes sockets at addresses that are no longer wanted; those that are wanted and not bound are tried next.
    pub(super) fn want(&mut self, own: BTreeSet<IpAddr>) {
        self.bound.retain(|address, _| own.contains(address));
        self.missing.retain(|address, _| own.contains(address));
        for address in own.into_iter().filter(|address| !self.bound.contains_key(address)) {
            self.missing.entry(address).or_insert(false);
        }
        self.tried = None;
    }

    /// Binds what is missing, unless that was tried just now.
    pub(super) fn bind_missing(&mut self, now: Duration) {
        if self.missing.is_empty() || self.tried.is_some_and(|tried| now < tried + RETRY) {
            return;
        }
        self.tried = Some(now);
        let bound = &mut self.bound;
        self.missing.retain(|address, told| match ProbeSocket::bind(*address, marks::PROBE_PORT) {
            Ok(socket) => {
                bound.insert(*address, socket);
                false
            }
            Err(error) if *told => {
                tracing::debug!(%error, "still no probes from this address");
                true
            }
            Err(error) => {
                // An address that was just planned may take a moment to come.
                tracing::info!(%error, remedy = error.remedy(), "no probes from this address yet; it is tried again");
                *told = true;
                true
            }
        });
    }

    /// Makes the socket at an address anew.
    pub(super) fn give_up(&mut self, own: IpAddr) {
        if self.bound.remove(&own).is_some() {
            self.missing.insert(own, true);
        }
    }

    /// When something is to be tried again, as time since boot.
    pub(super) fn next_try(&self) -> Option<Duration> {
        if self.missing.is_empty() { None } else { Some(self.tried.map_or(Duration::ZERO, |tried| tried + RETRY)) }
    }

    /// The socket at an own address.
    pub(super) fn at(&self, own: IpAddr) -> Option<&ProbeSocket> {
        self.bound.get(&own)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &ProbeSocket> {
        self.bound.values()
    }
}
