//! The ways to peers, as the daemon's plan and its probes have them: MTU, what passes, losses, and the clocks at their ends.

use std::collections::BTreeMap;

use husk_overlay::config::Config;
use husk_overlay::mtu;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{ClockSkew, Report, Standing};

use super::issues::{self, Teller};
use super::words::{peers, several};
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};
use crate::report::{MismatchKind, MtuOrigin, MtuReport, PeerReport};

/// MTU.
pub(super) const MTU: Check =
    Check { id: "mtu", title: "the MTU of this host's underlay, its routes and its peers' go together", look: mtu };

/// What passes.
pub(super) const PATHS: Check =
    Check { id: "paths", title: "the paths to peers carry full-sized packets, and lose none", look: paths };

/// Wall clocks.
pub(super) const CLOCKS: Check =
    Check { id: "clocks", title: "this host's clock agrees with those of its peers", look: clocks };

/// Probes to a peer before its losses say anything.
const ENOUGH: u64 = 20;

/// Lost exchanges of a thousand from which on people notice.
const LOSS: u16 = 50;

/// Lost exchanges of a thousand from which on TCP hardly moves.
const HEAVY_LOSS: u16 = 200;

/// Milliseconds from which on clocks differ enough to harm: a certificate or a token made on one host is not valid yet on
/// another, leases are taken for expired, and logs of two nodes cannot be laid side by side.
const SKEW: u64 = 1000;

fn mtu(evidence: &Evidence) -> Looked {
    let rows = evidence.mtu()?;
    let mut findings = issues::findings(evidence, Teller::Mtu)?;
    findings.extend(mismatches(rows));
    let own = rows.iter().find(|row| row.own);
    let pods = own.and_then(|row| row.mtu).map_or_else(|| "no".into(), |mtu| mtu.to_string());
    let underlay = own.map_or(0, |row| row.ledger.underlay_mtu);
    Ok(Outcome::of(
        findings,
        format!("underlay {underlay} bytes, pods {pods}, {} looked at", peers(rows.len().max(1) - 1)),
    ))
}

/// What does not go together, told once however many peers it is about.
fn mismatches(rows: &[MtuReport]) -> Vec<Finding> {
    let mut alike: BTreeMap<(&str, &str), (Vec<&MtuReport>, MismatchKind)> = BTreeMap::new();
    for row in rows {
        // What a path swallows is told by the check of paths.
        for it in row.mismatches.iter().filter(|it| it.kind != MismatchKind::PathLimited) {
            alike.entry((&it.message, &it.remedy)).or_insert_with(|| (Vec::new(), it.kind)).0.push(row);
        }
    }
    // What is configured and cannot be had, and what is refused, are issues of the daemon already.
    alike.retain(|_, (_, kind)| !matches!(kind, MismatchKind::ConfiguredTooLarge | MismatchKind::TooSmall));
    let finding = |((message, remedy), (rows, kind)): ((&str, &str), (Vec<&MtuReport>, MismatchKind))| {
        let names: Vec<String> = rows.iter().map(|row| row.node.to_string()).collect();
        let mut told = vec![format!("towards {}", several(&names))];
        told.extend(rows.first().iter().flat_map(|row| row.sources.iter().map(source)));
        let fix = match rows.first().and_then(|row| remedy_of(row, kind)) {
            Some(action) => Fix::by_hand(remedy, [action], "which of the two is right only you know"),
            None => Fix::words(remedy),
        };
        Finding::warning(message, told, fix)
    };
    alike.into_iter().map(finding).collect()
}

fn source(source: &crate::report::MtuSource) -> String {
    let bytes = source.bytes;
    match &source.origin {
        MtuOrigin::Interface { interface } => format!("{interface} of this host: {bytes} bytes"),
        MtuOrigin::Route { interface } => format!("the route by {interface}: {bytes} bytes"),
        MtuOrigin::RouteAttribute { interface } => {
            format!("the mtu attribute of the route by {interface}: {bytes} bytes")
        }
        MtuOrigin::Router { interface } => format!("a router on the path by {interface}: {bytes} bytes"),
        MtuOrigin::Configuration => format!("underlay.mtu: {bytes} bytes"),
        MtuOrigin::PeerRecord => format!("published by the peer: {bytes} bytes"),
    }
}

/// Where this host is the smaller one.
fn remedy_of(row: &MtuReport, kind: MismatchKind) -> Option<Action> {
    let published = row.sources.iter().find(|it| it.origin == MtuOrigin::PeerRecord)?.bytes;
    let own = row.sources.iter().find_map(|it| match &it.origin {
        MtuOrigin::Interface { interface } => Some((interface, it.bytes)),
        _ => None,
    });
    let (interface, _) = own.filter(|(_, bytes)| *bytes < published && kind == MismatchKind::UnderlayDiffers)?;
    let bytes = published.to_string();
    Some(Action::run("ip", ["link", "set", "dev", interface.as_str(), "mtu", &bytes]))
}

fn paths(evidence: &Evidence) -> Looked {
    let peers = evidence.peers()?;
    let mut findings = Vec::new();
    let mut verified = 0;
    // By what is found, since a switch between two halves of a cluster limits thousands of paths.
    let mut limited: BTreeMap<Vanishing, Vec<String>> = BTreeMap::new();
    let (mut some, mut heavy) = (Vec::new(), Vec::new());
    for (peer, family, report) in all(peers) {
        let promised = report.promised;
        match report.standing {
            Standing::Limited { passes } => {
                let what = Vanishing { searched: false, passes, promised };
                limited.entry(what).or_default().push(format!("{peer} ({family})"));
            }
            Standing::Searching { passes, .. } => {
                let passes = passes.max(report.passes.unwrap_or_default());
                let what = Vanishing { searched: true, passes, promised };
                limited.entry(what).or_default().push(format!("{peer} ({family})"));
            }
            Standing::Verified => verified += 1,
            Standing::Unknown | Standing::Unreachable => {}
        }
        let tells = report.standing != Standing::Unreachable && report.sent >= ENOUGH;
        let lost = report.loss_per_mille.filter(|_| tells).unwrap_or(0);
        let told = || format!("{peer} ({family}): {}.{} %", lost / 10, lost % 10);
        match lost {
            HEAVY_LOSS.. => heavy.push(told()),
            LOSS.. => some.push(told()),
            _ => {}
        }
    }
    let config = evidence.config().ok();
    let file = evidence.places.config.display().to_string();
    findings.extend(limited.iter().map(|(what, names)| what.finding(names, config, &file)));
    if !heavy.is_empty() {
        let cause = "so many packets are lost on the way that connections hardly move";
        findings.push(Finding::error(cause, vec![format!("probes lost lately to {}", several(&heavy))], loss_fix()));
    }
    if !some.is_empty() {
        let cause = "packets are lost on the way, which makes connections slow";
        findings.push(Finding::warning(cause, vec![format!("probes lost lately to {}", several(&some))], loss_fix()));
    }
    let all = all(peers).count();
    if all == 0 {
        return Ok(Outcome::does_not_apply("there is no path to probe"));
    }
    if verified == 0 && findings.is_empty() {
        let why = "no peer has answered a full-sized packet yet, or none answers at all, which the check peers tells";
        return Err(Unknown::because(why));
    }
    Ok(Outcome::of(findings, format!("{verified} of {all} paths carry what was promised")))
}

/// What vanishes on the way to some peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Vanishing {
    /// What passes is still being looked for.
    searched: bool,
    /// Bytes of the largest packet known to pass; nothing is known if this is 0.
    passes: u32,
    promised: u32,
}

impl Vanishing {
    fn finding(self, names: &[String], config: Option<&Config>, file: &str) -> Finding {
        let Self { searched, passes, promised } = self;
        let told = vec![format!("probes to {}", several(names))];
        if searched {
            let known = match passes {
                0 => "what passes is being looked for".to_owned(),
                _ => format!("those of {passes} bytes pass, and more is being looked for"),
            };
            let cause = format!(
                "packets of {promised} bytes vanish on the way without a word, though the underlay promised to carry them; {known}"
            );
            let fix = "wait for the end of the search, which takes some seconds: `huskctl mtu probe NODE` shows it";
            return Finding::error(cause, told, Fix::words(fix));
        }
        let (floor, underlay) = config.map_or((0, None), |config| {
            let floor = config.families().map(mtu::minimum).min().unwrap_or(mtu::MINIMUM_IPV4);
            let needed = |passes| mtu::underlay_needed(&config.stack(), config.underlay.family, passes);
            (floor, (passes > floor).then(|| needed(passes)))
        });
        let fix = match underlay {
            Some(underlay) => Fix::words(format!(
                "raise the MTU of what lies between the two nodes; or say in {file}, on both, what it carries: \
                 `underlay: {{mtu: {underlay}}}`, and restart huskd. Look again with `huskctl mtu probe NODE`"
            )),
            None => Fix::words("raise the MTU of what lies between the two nodes"),
        };
        let cause = format!(
            "packets of more than {passes} bytes vanish on the way without a word, though the underlay promised {promised}; \
             routes were lowered to what passes"
        );
        // As the issue PathMtu is: with lower routes traffic flows, as long as that leaves enough to work with.
        if passes > floor { Finding::warning(cause, told, fix) } else { Finding::error(cause, told, fix) }
    }
}

fn loss_fix() -> Fix {
    Fix::by_hand(
        "look for errors and drops of the network cards on both nodes, and for an overloaded link between them; \
         `huskctl peers` shows how it goes on",
        [Action::run("ip", ["-s", "-s", "link", "show"])],
        "what loses them is outside of this host, or its hardware",
    )
}

fn all(peers: &[PeerReport]) -> impl Iterator<Item = (&husk_overlay::name::NodeName, Family, &Report)> {
    peers.iter().flat_map(|peer| peer.paths.iter().map(|(family, report)| (&peer.node, *family, report)))
}

fn clocks(evidence: &Evidence) -> Looked {
    // Both families tell of one clock: the one that is known more exactly counts.
    let skew = |peer: &PeerReport| peer.paths.values().filter_map(|it| it.clock_skew).min_by_key(|it| it.within);
    let all = evidence.peers()?;
    let known: Vec<(String, ClockSkew)> =
        all.iter().filter_map(|peer| Some((peer.node.to_string(), skew(peer)?))).collect();
    if known.is_empty() {
        return Ok(Outcome::does_not_apply("no peer has told its time yet"));
    }
    let largest = known.iter().map(|(_, skew)| skew.at_least()).max().unwrap_or_default();
    let seen = format!("this clock and those of {} differ by less than {} ms", peers(known.len()), largest.max(1));
    Ok(Outcome::of(skewed(&known), seen))
}

fn skewed(known: &[(String, ClockSkew)]) -> Vec<Finding> {
    let off: Vec<&(String, ClockSkew)> = known.iter().filter(|(_, skew)| skew.at_least() > SKEW).collect();
    if off.is_empty() {
        return Vec::new();
    }
    let direction = |(_, skew): &&(String, ClockSkew)| if skew.ahead > 0 { "ahead" } else { "behind" };
    let told = off.iter().map(|it| {
        let (name, skew) = it;
        format!("{name}: {} ms {} (± {} ms)", skew.ahead.unsigned_abs(), direction(it), skew.within)
    });
    let told: Vec<String> = told.collect();
    let same = off.iter().all(|it| direction(it) == direction(&off[0]));
    // Where most peers differ in one direction, it is this clock that is wrong.
    let (cause, words, hosts) = if same && off.len() >= 2 && off.len() * 2 > known.len() {
        let own = if direction(&off[0]) == "ahead" { "behind" } else { "ahead of" };
        (format!("this host's clock is {own} those of {} of {} peers", off.len(), known.len()), "this host", "")
    } else {
        (
            format!("the clocks of {} of {} peers differ from this host's", off.len(), known.len()),
            "the host that is wrong",
            "on that host: ",
        )
    };
    let harm = "certificates and tokens made on one may not be valid on the other, leases expire early or late, and \
                logs cannot be compared";
    let fix = Fix::by_hand(
        format!(
            "{hosts}have a time service set the clock of {words}: systemd-timesyncd as below, or chrony (`chronyc makestep`)"
        ),
        [
            Action::run_on_host("timedatectl", ["set-ntp", "true"]),
            Action::run_on_host("timedatectl", ["timesync-status"]),
        ],
        "a clock that jumps disturbs what runs",
    );
    vec![Finding::warning(format!("{cause}: {harm}"), vec![several(&told)], fix)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skew(name: &str, ahead: i64) -> (String, ClockSkew) {
        (name.into(), ClockSkew { ahead, within: 2 })
    }

    #[test]
    fn a_second_is_too_much_and_it_is_told_whose_clock_it_is() {
        assert!(skewed(&[skew("a", 900), skew("b", -1001)]).is_empty());
        let one = skewed(&[skew("a", 5000), skew("b", 0), skew("c", 3)]).remove(0);
        assert!(one.cause.contains("1 of 3 peers differ") && one.evidence[0] == "a: 5000 ms ahead (± 2 ms)", "{one:?}");
        let own = skewed(&[skew("a", 5000), skew("b", 5001), skew("c", 3)]).remove(0);
        assert!(own.cause.starts_with("this host's clock is behind those of 2 of 3"), "{own:?}");
        let own = skewed(&[skew("a", -5000), skew("b", -5001)]).remove(0);
        assert!(own.cause.starts_with("this host's clock is ahead of those of 2 of 2"), "{own:?}");
        let both = skewed(&[skew("a", -5000), skew("b", 5001)]).remove(0);
        assert!(both.cause.contains("2 of 2 peers differ"), "{both:?}");
    }
}
