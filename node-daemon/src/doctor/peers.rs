//! Peers that do not answer: whether the host is down, its daemon, or something between the two drops the tunnel's packets.
//!
//! Probes go through the tunnel to the peer's daemon. Where they are not answered, two pings tell more: one to the peer's underlay
//! address, outside of the tunnel, and one to its address inside the overlay, which the peer's kernel answers without the daemon.
//! Who may not ping knocks at a port instead.
//!
//! | underlay answers | tunnel answers | what it is |
//! |---|---|---|
//! | yes | yes | the daemon of the peer does not run |
//! | yes | no | the tunnel's packets are dropped |
//! | no | – | the host is down, or cut off |

mod silent;
mod verdict;

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use husk_overlay::ipc::Request;
use husk_overlay::name::NodeName;
use husk_overlay::probe::Standing;

use self::silent::{Silent, Verdict, evidence_of, examine};
use self::verdict::{Carrier, finding};
use super::issues::{self, Teller};
use super::words::several;
use super::{Check, Evidence, Finding, Fix, Looked, Outcome, Unknown, firewall};
use crate::report::{PeerReport, PeerState, ProbeStarted};

/// The check.
pub(super) const CHECK: Check =
    Check { id: "peers", title: "every peer answers, and nothing drops the tunnel's packets on the way", look };

/// Peers that are looked at one by one: where more do not answer, the first of them tell why.
const EXAMINED: usize = 16;

/// How long an answer to a probe may take.
const ANSWER: Duration = Duration::from_secs(1);

fn look(evidence: &Evidence) -> Looked {
    let peers = evidence.peers()?;
    if peers.is_empty() {
        return Ok(Outcome::does_not_apply("this node is alone in its cluster"));
    }
    let mut findings = issues::findings(evidence, Teller::Peers)?;
    findings.extend(without_keys(peers));
    let silent = still_silent(evidence, peers.iter().filter(|peer| is_silent(peer)).collect())?;
    if !silent.is_empty() {
        findings.extend(of_silent(evidence, &silent)?);
    }
    findings.extend(half_silent(peers));
    let answering = peers.iter().filter(|peer| peer.paths.values().any(|it| it.answered > 0)).count();
    Ok(Outcome::of(findings, format!("{answering} of {} peers have answered", peers.len())))
}

fn is_unreachable(standing: Standing) -> bool {
    standing == Standing::Unreachable
}

/// Nothing that is sent to it is answered.
fn is_silent(peer: &PeerReport) -> bool {
    !peer.paths.is_empty() && peer.paths.values().all(|it| is_unreachable(it.standing))
}

/// Those that do not answer now either: what is known of them may be as old as the time between two checks of a path.
fn still_silent(evidence: &Evidence, silent: Vec<&PeerReport>) -> Result<Vec<PeerReport>, Unknown> {
    if silent.is_empty() {
        return Ok(Vec::new());
    }
    let names: BTreeSet<&NodeName> = silent.iter().map(|peer| &peer.node).collect();
    for peer in names.iter().take(EXAMINED) {
        // One that is not probed any more is not there any more, either.
        let _ = evidence.ask::<ProbeStarted>(&Request::ProbePeer { peer: peer.to_string() });
    }
    thread::sleep(ANSWER);
    let now: Vec<PeerReport> = evidence.ask(&Request::Peers)?;
    Ok(now.into_iter().filter(|peer| names.contains(&peer.node) && is_silent(peer)).collect())
}

fn of_silent(evidence: &Evidence, silent: &[PeerReport]) -> Result<Vec<Finding>, Unknown> {
    let examined = examine(evidence, silent)?;
    let config = evidence.config()?;
    let mode = evidence.status()?.mode;
    let probes_dropped = LazyCell::new(|| firewall::drops_probes(evidence));
    let mut by_verdict: BTreeMap<Verdict, Vec<&Silent>> = BTreeMap::new();
    for one in &examined {
        by_verdict.entry(one.verdict(mode, || *probes_dropped)).or_default().push(one);
    }
    let more = silent.len().saturating_sub(examined.len());
    let own = evidence.status()?.addresses.get(config.underlay.family);
    let reports: BTreeMap<&NodeName, &PeerReport> = silent.iter().map(|peer| (&peer.node, peer)).collect();
    let finding = |(verdict, of): (Verdict, Vec<&Silent>)| {
        let mut told: Vec<String> = of.iter().map(|one| evidence_of(one, reports.get(&one.node).copied())).collect();
        if more > 0 {
            told.push(format!("{more} more peers do not answer (huskctl peers), which were not looked at"));
        }
        finding(verdict, &of, told, &Carrier { mode, config, own })
    };
    Ok(by_verdict.into_iter().map(finding).collect())
}

/// Peers whose keys, or to whom the own ones, are not there yet.
fn without_keys(peers: &[PeerReport]) -> Option<Finding> {
    let waiting: Vec<&NodeName> =
        peers.iter().filter(|peer| peer.state == PeerState::Waiting).map(|peer| &peer.node).collect();
    let first = waiting.first()?;
    Some(Finding::error(
        format!(
            "nothing can be sent to {}: the keys that both sides need are not published or not installed",
            several(&waiting)
        ),
        vec!["huskctl peers: waiting".into()],
        Fix::words(format!(
            "it takes some seconds after a node has joined; if it stays, look at `huskctl keys status` here and on \
             {first}, whose daemon may not run"
        )),
    ))
}

/// Peers that answer in one family and not in the other.
fn half_silent(peers: &[PeerReport]) -> Option<Finding> {
    let half = peers.iter().filter(|peer| !is_silent(peer)).flat_map(|peer| {
        let dead = peer.paths.iter().filter(|(_, it)| is_unreachable(it.standing));
        dead.map(|(family, _)| format!("{} ({family})", peer.node))
    });
    let half: Vec<String> = half.collect();
    if half.is_empty() {
        return None;
    }
    Some(Finding::error(
        "some peers answer in one family of addresses and not in the other, through one tunnel",
        vec![format!("probes not answered by {}", several(&half))],
        Fix::words(
            "run `huskctl doctor` on that peer: a rule of its firewall may drop this family, or its kernel parameter \
             disable_ipv6 is set",
        ),
    ))
}
