//! What becomes of a packet, hop by hop: everything this node knows of the way between two ends, joined to one answer.
//!
//! [`Evidence`] is what was looked at, in the cluster's state and in the kernel; [`hops`] makes sense of it and looks at nothing
//! itself. Each hop either passes packets, is broken with a cause and a remedy, has no part in the connection, or is not for
//! this node to judge, which the answer says.
//!
//! ```text
//!  here:   source  antispoofing  egress policy  route  MTU  firewall  other firewalls  tunnel  underlay  NAT  live probe
//!  there:                                                                                      ingress policy  destination
//! ```
//! Where the source is on another node, the hops of this node are those of the answers and of the last ones.

mod evidence;
mod filters;
mod local;
mod path;
mod remote;
#[cfg(test)]
mod tests;
mod translation;

use crate::report::{Hop, HopName, HopStanding, Place};

pub use evidence::{
    Device, EndpointEvidence, Entries, Evidence, Guard, PeerEvidence, RouteEvidence, Tunnel, TunnelKind,
    UnderlayEvidence,
};
pub(crate) use filters::{Filters, filtered};
pub use remote::{Knock, Knocks, knocked};
pub use translation::{may_be_translated, translated, translated_to, translation, untranslated};

/// The hops of a connection, in the order in which its first packet passes them.
#[must_use]
pub fn hops(evidence: &Evidence) -> Vec<Hop> {
    vec![
        local::source(evidence),
        local::antispoofing(evidence),
        local::policy(evidence, HopName::EgressPolicy),
        path::route(evidence),
        path::mtu(evidence),
        path::firewall(evidence),
        filters::other_firewalls(evidence),
        remote::tunnel(evidence),
        remote::underlay(evidence),
        path::nat(evidence),
        remote::probe(evidence),
        local::policy(evidence, HopName::IngressPolicy),
        local::destination(evidence),
    ]
}

/// The first hop that is broken.
#[must_use]
pub fn first_broken(hops: &[Hop]) -> Option<HopName> {
    hops.iter().find(|hop| matches!(hop.standing, HopStanding::Broken { .. })).map(|hop| hop.name)
}

/// Which part of the way is on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// All of it.
    Within,
    /// From here to elsewhere.
    Out,
    /// From elsewhere to here.
    In,
    /// None of it.
    Elsewhere,
}

impl Course {
    /// Of a connection between two places.
    #[must_use]
    pub fn between(source: &Place, destination: &Place) -> Self {
        let is_here = |place: &Place| matches!(place, Place::PodHere | Place::ThisNode);
        match (is_here(source), is_here(destination)) {
            (true, true) => Self::Within,
            (true, false) => Self::Out,
            (false, true) => Self::In,
            (false, false) => Self::Elsewhere,
        }
    }
}

fn hop(name: HopName, standing: HopStanding, evidence: Vec<String>) -> Hop {
    Hop { name, standing, evidence }
}

fn passes(name: HopName, evidence: Vec<String>) -> Hop {
    hop(name, HopStanding::Passes, evidence)
}

fn not_here(name: HopName, why: impl Into<String>) -> Hop {
    hop(name, HopStanding::NotHere, vec![why.into()])
}

fn unknown(name: HopName, why: impl Into<String>, evidence: Vec<String>) -> Hop {
    hop(name, HopStanding::Unknown { why: why.into() }, evidence)
}

fn broken(name: HopName, cause: impl Into<String>, remedy: impl Into<String>, evidence: Vec<String>) -> Hop {
    hop(name, HopStanding::Broken { cause: cause.into(), remedy: remedy.into(), commands: Vec::new() }, evidence)
}
