//! `huskctl trace`: asks the daemon for the way of a connection, and looks itself at what may be much or take long: where tracked
//! connections lead, what rules of others drop, whether the other node answers a knock where it answers no probes. From another
//! network namespace than the daemon's it looks at none of these, and says so.

use std::cell::LazyCell;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::error::ErrorKind as Wrong;
use clap::{Args, ValueEnum};
use husk_dataplane::{connections, nft};
use husk_overlay::ipc::Request;
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::prefix::Family;
use husk_policy::object::Protocol;
use husk_policy::verdict::Verdict;

use super::{Show, ask, standpoint, tables};
use crate::firewall::{Ruleset, legacy_tables};
use crate::knock::knock;
use crate::report::{HopName, HopStanding, Live, PathReport, ProbeStarted, TracePeer, TraceReport};
use crate::trace::{
    Filters, Knock, Knocks, filtered, knocked, may_be_translated, translated, translated_to, translation, untranslated,
};

/// How long a probe that was asked for may take. A path that is whole is verified within two seconds, one that is cut is given
/// up within ten or so; the search for a size, which takes longer, is not waited for.
const PROBING: Duration = Duration::from_secs(20);

/// Most connections to an address that are looked at to learn where it leads.
const TRANSLATED: usize = 4096;

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(200);

/// A connection.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Who begins it: a pod as NAMESPACE/NAME or NAME, any address, the name of a node, or host for this one
    source: String,
    /// Whom it is for, alike; the address of a service is followed to where connections to it go that there are now
    destination: String,
    /// Port of the destination; TCP, UDP and SCTP need it
    #[arg(long)]
    port: Option<u16>,
    /// Protocol
    #[arg(long, visible_alias = "proto", value_enum, default_value_t = TraceProtocol::Tcp)]
    protocol: TraceProtocol,
    /// Bytes of a packet, IP header included: does it fit
    #[arg(long)]
    size: Option<u32>,
    /// Probe the path to the other node now, instead of telling what was found last
    #[arg(long)]
    probe: bool,
    /// Also what has no part in the connection, and every rule of policy that was asked
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TraceProtocol {
    Tcp,
    Udp,
    Sctp,
    /// ICMP; ICMPv6 between addresses of IPv6
    Icmp,
}

impl TraceProtocol {
    /// IANA protocol number. Policy knows no difference between ICMP and ICMPv6, as neither has ports.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Icmp => 1,
        }
    }
}

impl Options {
    /// What of it does not go together: ports, and protocols that have none; addresses that lead to no other host.
    pub(super) fn check(&self) -> Result<(), (Wrong, &'static str)> {
        for end in [&self.source, &self.destination] {
            if end.parse::<SocketAddr>().is_ok() {
                return Err((
                    Wrong::ValueValidation,
                    "an address goes without its port: name that of the destination with --port",
                ));
            }
            let address = end.parse::<IpAddr>();
            if address.is_ok_and(|it| it.is_loopback() || it.is_unspecified() || it.is_multicast()) {
                return Err((
                    Wrong::ValueValidation,
                    "loopback, multicast and unspecified addresses lead to no one pod or host: nothing of Husk is on the way",
                ));
            }
        }
        match (Protocol::of(self.protocol.number()), self.port) {
            (None, Some(_)) => Err((Wrong::ArgumentConflict, "ICMP has no ports: leave --port away")),
            (Some(_), None) => Err((
                Wrong::MissingRequiredArgument,
                "TCP, UDP and SCTP have ports: name that of the destination with --port, or choose --protocol icmp",
            )),
            _ => Ok(()),
        }
    }
}

/// The text to print, and whether the connection is broken or denied.
pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let request = Request::Trace {
        source: options.source.clone(),
        destination: options.destination.clone(),
        protocol: options.protocol.number(),
        port: options.port,
        size: options.size,
    };
    let elsewhere = LazyCell::new(|| standpoint::elsewhere(socket).map(|it| it.to_string()));
    let elsewhere = || elsewhere.as_deref();
    let (request, mut report) = beyond_translation(socket, request, elsewhere)?;
    if options.probe
        && let Some(peer) = &report.peer
        && await_probe(socket, peer, Family::of(report.connection.responder))
    {
        let translation = report.translated.take();
        report = ask(socket, &request)?;
        if let Some(translation) = translation {
            translated(&mut report, translation);
        }
    }
    if report.crossing.is_some() {
        look_at_filters(&mut report, elsewhere());
    }
    if let Some(peer) = report.peer.clone().filter(|_| is_unanswered(&report) && elsewhere().is_none()) {
        knocked(&mut report, &peer, knock_at_node(&peer));
    }
    let wrong = report.broken.is_some()
        || report.verdict == Verdict::Deny
        || report.sides.iter().any(|it| matches!(it.live, Live::Differs { .. }));
    Ok((show.text(&report, |report| tables::trace(report, options.verbose))?, wrong))
}

/// Asks, and asks again for where the destination leads, if connections that there are tell that it is translated. They are
/// looked at here and not by the daemon, as a host may have a million of them.
fn beyond_translation<'a>(
    socket: &Path,
    request: Request,
    elsewhere: impl Fn() -> Option<&'a str>,
) -> anyhow::Result<(Request, TraceReport)> {
    let mut report: TraceReport = ask(socket, &request)?;
    if !may_be_translated(&report) {
        return Ok((request, report));
    }
    if let Some(why) = elsewhere() {
        untranslated(&mut report, Some(why));
        return Ok((request, report));
    }
    let wanted = report.connection;
    let found = connections::list(TRANSLATED, |it| translated_to(it, &wanted).is_some());
    match found.map(|listed| translation(&listed.connections, &wanted)) {
        Ok(Some(found)) => {
            let Request::Trace { source, protocol, size, .. } = request else { return Ok((request, report)) };
            let (destination, port) = (found.to.ip().to_string(), Some(found.to.port()));
            let request = Request::Trace { source, destination, protocol, port, size };
            let mut behind = ask(socket, &request)?;
            translated(&mut behind, found);
            return Ok((request, behind));
        }
        Ok(None) => untranslated(&mut report, None),
        Err(error) => untranslated(&mut report, Some(&error.to_string())),
    }
    Ok((request, report))
}

/// Looks at the rules of others on this host.
fn look_at_filters(report: &mut TraceReport, elsewhere: Option<&str>) {
    let ruleset = match elsewhere {
        Some(why) => Err(why.to_owned()),
        None => nft::ruleset().map(|it| Ruleset::parse(&it)).map_err(|error| error.to_string()),
    };
    // Without /proc nothing of this would have come so far.
    let legacy = legacy_tables().unwrap_or_default();
    filtered(report, &Filters { ruleset: ruleset.as_ref().map_err(String::as_str), legacy: &legacy });
}

/// Has the path probed. False if it is not: the report tells why.
fn await_probe(socket: &Path, peer: &TracePeer, family: Family) -> bool {
    let Ok(started) = ask::<ProbeStarted>(socket, &Request::ProbePeer { peer: peer.node.to_string() }) else {
        return false;
    };
    // Who does not read this has the result.
    let _ = writeln!(std::io::stderr(), "probing the path to {} ...", peer.node);
    let asked = Instant::now();
    while asked.elapsed() < PROBING {
        let Ok(paths) = ask::<Vec<PathReport>>(socket, &Request::Probes) else { return false };
        let of_path = paths.iter().find(|it| it.path.peer == started.peer && it.path.family == family);
        match of_path {
            None => return false,
            Some(it) if it.report.concluded.is_some_and(|concluded| concluded > started.begun) => return true,
            Some(_) => thread::sleep(POLL),
        }
    }
    true
}

fn is_unanswered(report: &TraceReport) -> bool {
    let probe = report.hops.iter().find(|hop| hop.name == HopName::Probe);
    probe.is_some_and(|hop| matches!(hop.standing, HopStanding::Broken { .. }))
}

/// Knocks inside the tunnel and on the underlay at once.
fn knock_at_node(peer: &TracePeer) -> Knocks {
    let at = |address: Option<IpAddr>, port: u16| {
        let address = SocketAddr::new(address?, port);
        thread::Builder::new().name("knock".into()).spawn(move || knock(address)).ok()
    };
    // No tunnel listens for TCP: its port is as closed as any, and nobody takes the knock for something else.
    let (inside, underlay) = (at(peer.inside, PROBE_PORT), at(peer.underlay, peer.port.unwrap_or(PROBE_PORT)));
    let found = |knocking: Option<thread::JoinHandle<Option<Knock>>>| knocking?.join().ok().flatten();
    Knocks { inside: found(inside), underlay: found(underlay) }
}
