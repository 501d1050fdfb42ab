//! Addresses that somebody makes others on the way, as kube-proxy does with those of Services.
//!
//! Nobody but that somebody knows which pod the next connection to a Service goes to. But the kernel tracks the connections there
//! are with both addresses, whatever translates them (iptables, nftables or IPVS): where those went is what a trace goes on
//! with, and says so.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use husk_dataplane::connections::Tracked;
use husk_policy::object::Protocol;
use husk_policy::verdict::Connection;

use super::local::OUTSIDE;
use crate::report::{Hop, HopName, HopStanding, Place, TraceReport, Translation};

/// True where the destination may be an address that is translated: one that is no pod's.
#[must_use]
pub fn may_be_translated(report: &TraceReport) -> bool {
    let is_candidate = match report.destination.place {
        Place::External => true,
        // A NodePort; where a port of Husk's own leads to is known already.
        Place::ThisNode => {
            report.hops.iter().any(|hop| hop.name == HopName::Nat && hop.standing == HopStanding::NotHere)
        }
        _ => false,
    };
    is_candidate && Protocol::of(report.connection.protocol).is_some()
}

/// Where a tracked connection to this destination really went, if that was translated.
#[must_use]
pub fn translated_to(tracked: &Tracked, wanted: &Connection) -> Option<SocketAddr> {
    let to = &tracked.original;
    if (to.destination, to.protocol) != (wanted.responder, wanted.protocol) || to.ports?.1 != wanted.port {
        return None;
    }
    let answers = SocketAddr::new(tracked.answer.source, tracked.answer.ports?.0);
    (answers != SocketAddr::new(wanted.responder, wanted.port)).then_some(answers)
}

/// Where most connections to this destination went, those of this source above all.
#[must_use]
pub fn translation(tracked: &[Tracked], wanted: &Connection) -> Option<Translation> {
    let mut counts: BTreeMap<SocketAddr, (u64, u64)> = BTreeMap::new();
    let mut sources: BTreeMap<SocketAddr, IpAddr> = BTreeMap::new();
    for connection in tracked {
        let Some(to) = translated_to(connection, wanted) else { continue };
        let (own, all) = counts.entry(to).or_default();
        let is_own = connection.original.source == wanted.originator;
        *own += u64::from(is_own);
        *all += 1;
        if is_own && connection.answer.destination != wanted.originator {
            sources.insert(to, connection.answer.destination);
        }
    }
    let of = counts.values().map(|(_, all)| all).sum();
    let (to, (_, connections)) = counts.into_iter().max_by_key(|(_, counts)| *counts)?;
    let from = SocketAddr::new(wanted.responder, wanted.port);
    Some(Translation { from, to, connections, of, masqueraded: sources.remove(&to) })
}

/// Adds to the report of the way to where a destination leads that it was another that was asked for.
pub fn translated(report: &mut TraceReport, translation: Translation) {
    let Translation { from, to, connections, of, masqueraded } = &translation;
    let behind = masqueraded.map(|source| {
        format!("the source became {source}, which the other end and its policy see: trace from there, too")
    });
    let told = format!(
        "{from} became {to} for {connections} of {of} connections that this node tracks, as a Service's address does; others may be led elsewhere"
    );
    if let Some(hop) = hop(report, HopName::Nat) {
        if hop.standing == HopStanding::NotHere {
            hop.evidence.clear();
            hop.standing = HopStanding::Passes;
        }
        hop.evidence.splice(0..0, std::iter::once(told).chain(behind));
    }
    report.translated = Some(translation);
}

/// Adds what it means that no tracked connection tells of a translation, or why those could not be looked at.
pub fn untranslated(report: &mut TraceReport, unreadable: Option<&str>) {
    // An address of the cluster that nobody has is no Service's.
    let is_outside = |hop: &Hop| matches!(&hop.standing, HopStanding::Unknown { why } if why == OUTSIDE);
    let Some(at_destination) = hop(report, HopName::Destination).filter(|hop| is_outside(hop)) else { return };
    let why = match unreadable {
        None => "no connection to it is translated now".to_owned(),
        Some(reason) => format!("which connections are translated could not be read ({reason})"),
    };
    let told = format!(
        "if it is a Service's address, kube-proxy makes it a pod's before anything else sees the packet: {why}, so connect once and \
         trace again, or trace a pod behind it (kubectl get endpointslices -A)"
    );
    at_destination.evidence.push(told.clone());
    // There may be no route to what is only a name for pods.
    if let Some(Hop { standing: HopStanding::Broken { remedy, .. }, .. }) = hop(report, HopName::Route) {
        *remedy = format!("{remedy}; {told}");
    }
}

fn hop(report: &mut TraceReport, name: HopName) -> Option<&mut Hop> {
    report.hops.iter_mut().find(|hop| hop.name == name)
}

#[cfg(test)]
mod tests {
    use husk_dataplane::connections::Tuple;

    use super::*;

    const SERVICE: &str = "10.96.0.10";

    fn wanted() -> Connection {
        let [originator, responder] = ["10.42.0.2", SERVICE].map(|it| it.parse().unwrap());
        Connection { originator, responder, protocol: 6, port: 443 }
    }

    fn tracked(from: &str, to: (&str, u16), answers: (&str, u16)) -> Tracked {
        let [source, destination, answering] = [from, to.0, answers.0].map(|it| it.parse().unwrap());
        let original = Tuple { source, destination, protocol: 6, ports: Some((40_000, to.1)), icmp: None };
        let answer = Tuple { source: answering, destination: source, ports: Some((answers.1, 40_000)), ..original };
        Tracked { original, answer, counts: None, began: None }
    }

    #[test]
    fn most_connections_count_and_those_of_the_source_count_more() {
        let service = (SERVICE, 443);
        let mut all = vec![
            tracked("10.42.0.9", service, ("10.42.1.2", 8443)),
            tracked("10.42.0.8", service, ("10.42.1.2", 8443)),
            tracked("10.42.0.7", service, ("10.42.1.3", 8443)),
            // Another port, another address, and one that is not translated.
            tracked("10.42.0.2", (SERVICE, 80), ("10.42.1.4", 80)),
            tracked("10.42.0.2", ("10.96.0.11", 443), ("10.42.1.5", 443)),
            tracked("10.42.0.2", service, service),
        ];
        let found = translation(&all, &wanted()).unwrap();
        assert_eq!((found.from.to_string(), found.to.to_string()), ("10.96.0.10:443".into(), "10.42.1.2:8443".into()));
        assert_eq!((found.connections, found.of), (2, 3));
        all.push(tracked("10.42.0.2", service, ("10.42.1.3", 8443)));
        all.push(tracked("10.42.0.9", service, ("10.42.1.2", 8443)));
        let found = translation(&all, &wanted()).unwrap();
        assert_eq!((found.to.to_string(), found.connections, found.of), ("10.42.1.3:8443".into(), 2, 5));
        assert_eq!(translation(&all[3..6], &wanted()), None);
        assert_eq!(found.masqueraded, None);
        let mut masqueraded = tracked("10.42.0.2", service, ("10.42.1.3", 8443));
        masqueraded.answer.destination = "10.42.0.1".parse().unwrap();
        let found = translation(&[masqueraded], &wanted()).unwrap();
        assert_eq!(found.masqueraded, Some("10.42.0.1".parse().unwrap()));
    }
}
