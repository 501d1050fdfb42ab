//! What the page shows, cut down to what a person can read: the JSON of `/api/state`, and what the templates render.

use std::cmp::Reverse;

use husk_overlay::issue::Issue;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use serde::Serialize;

use crate::flows::{Flow, Kinds};
use crate::metrics::gather::Gathering;
use crate::metrics::{PathSample, PeerSample, Sample, standing_name, state_name};
use crate::report::PeerState;

/// Rows of peers; a search finds the others.
pub(super) const ROWS: usize = 100;

/// Denied flows, the newest.
const FLOWS: usize = 50;

/// Issues, the worst.
const ISSUES: usize = 50;

/// Longest text that is searched for, in bytes.
const LONGEST_SEARCH: usize = 100;

/// Loss above which a path counts as troubled.
const LOSSY: f64 = 0.05;

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Query {
    /// Text that peers have to have in their name, address or state.
    pub(super) search: String,
}

impl Query {
    /// Of the query of an address (WHATWG URL, `application/x-www-form-urlencoded`).
    pub(super) fn parse(query: &str) -> Self {
        let search = query.split('&').find_map(|pair| pair.strip_prefix("q=")).map(decode).unwrap_or_default();
        let end = search.floor_char_boundary(LONGEST_SEARCH);
        Self { search: search[..end].trim().to_lowercase() }
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let code = digit(rest.next()).zip(digit(rest.next())).map(|(high, low)| high * 16 + low);
                code.and_then(|code| u8::try_from(code).ok()).unwrap_or(b'?')
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How a peer is doing, in a colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Health {
    /// Everything as it should be.
    Well,
    /// Nothing was heard from it for a while, and nothing is wrong.
    Quiet,
    /// It works, less well than it should.
    Troubled,
    /// It does not work.
    Broken,
}

impl Health {
    pub(super) const ALL: [Self; 4] = [Self::Well, Self::Quiet, Self::Troubled, Self::Broken];

    /// The class in the style sheet.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Quiet => "quiet",
            Self::Troubled => "troubled",
            Self::Broken => "broken",
        }
    }

    /// In a word, for people.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Quiet => "quiet",
            Self::Troubled => "impaired",
            Self::Broken => "not reached",
        }
    }

    fn of(peer: &PeerSample) -> Self {
        let of_path = |path: &PathSample| match standing_name(path.standing) {
            "unreachable" => Self::Broken,
            "limited" | "searching" => Self::Troubled,
            _ if path.loss().is_some_and(|loss| loss > LOSSY) => Self::Troubled,
            "verified" => Self::Well,
            _ => Self::Quiet,
        };
        let of_paths = peer.paths.iter().map(of_path).max();
        match peer.state {
            PeerState::Refused => Self::Broken,
            PeerState::Waiting => Self::Troubled,
            // A path that was proven says more than how long ago the last handshake was.
            PeerState::Connected | PeerState::Configured => of_paths.unwrap_or(Self::Well),
            PeerState::Idle => of_paths.unwrap_or(Self::Quiet),
        }
    }
}

/// A peer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PeerView {
    /// Name.
    pub(super) node: NodeName,
    /// Its health.
    pub(super) health: Health,
    /// Its state, or what is wrong with the path to it, in a word.
    pub(super) state: &'static str,
    /// Why it is refused, if it is.
    pub(super) reason: Option<String>,
    /// Underlay address.
    pub(super) address: Option<String>,
    /// Round-trip time of the slower path, in milliseconds.
    pub(super) rtt_ms: Option<f64>,
    /// Loss of the worse path, from 0 to 1.
    pub(super) loss: Option<f64>,
    /// MTU in bytes of the routes to it.
    pub(super) mtu: Option<u32>,
    /// Bytes that it should be, where less passes.
    pub(super) promised: Option<u32>,
    /// Seconds since it was last heard from.
    pub(super) heard: Option<u64>,
}

impl PeerView {
    fn of(peer: &PeerSample, age: std::time::Duration) -> Self {
        let health = Health::of(peer);
        let worst = peer.paths.iter().map(|path| standing_name(path.standing));
        let trouble = worst.filter(|standing| ["unreachable", "limited", "searching"].contains(standing)).max();
        let rtt = peer.paths.iter().filter_map(|path| path.rtt).max();
        let limited = peer.paths.iter().filter(|path| path.passes.is_some_and(|passes| passes < path.promised));
        Self {
            node: peer.node.clone(),
            health,
            state: if peer.state == PeerState::Refused { "refused" } else { trouble.unwrap_or(state_name(peer.state)) },
            reason: peer.reason.clone(),
            address: peer.address.map(|address| address.to_string()),
            rtt_ms: rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
            loss: peer.paths.iter().filter_map(PathSample::loss).reduce(f64::max),
            mtu: peer.mtu,
            promised: limited.map(|path| path.promised).max(),
            heard: peer.heard.map(|heard| (heard + age).as_secs()),
        }
    }

    fn matches(&self, search: &str) -> bool {
        let in_address = || self.address.as_ref().is_some_and(|address| address.contains(search));
        self.node.as_str().contains(search)
            || self.state.contains(search)
            || self.health.word() == search
            || in_address()
    }
}

/// Everything on the page.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct View {
    /// Name of this node.
    pub(super) node: NodeName,
    /// Version of the daemon.
    pub(super) version: &'static str,
    /// Mode.
    pub(super) mode: Mode,
    /// It encrypts.
    pub(super) encrypted: bool,
    /// Pods can be added.
    pub(super) ready: bool,
    /// Why not.
    pub(super) reason: Option<String>,
    /// The cluster source answers.
    pub(super) source_up: bool,
    /// Pods of this node.
    pub(super) pods: usize,
    /// MTU in bytes of pods.
    pub(super) pod_mtu: Option<u32>,
    /// Seconds since the own key was made.
    pub(super) key_age: Option<u64>,
    /// Seconds since this was so.
    pub(super) age: u64,
    /// The other nodes, those in trouble first, then by name; those that were searched for, and a bounded number.
    pub(super) peers: Vec<PeerView>,
    /// How many were searched for.
    pub(super) found: usize,
    /// How many there are.
    pub(super) all: usize,
    /// How many are how well.
    pub(super) counts: Vec<(Health, usize)>,
    /// Every peer's health in the order of names, for the map.
    #[serde(skip)]
    pub(super) cells: Vec<(NodeName, Health)>,
    /// What was searched for.
    pub(super) search: String,
    /// What is wrong, the worst first.
    pub(super) issues: Vec<Issue>,
    /// How many issues there are.
    pub(super) all_issues: usize,
    /// Denied flows, the newest first.
    pub(super) flows: Vec<Flow>,
    /// Why none are recorded, where that is so.
    pub(super) flows_unavailable: Option<String>,
    /// Policy is enforced.
    pub(super) policy: bool,
}

impl View {
    /// Of what is known now.
    pub(super) fn of(gathering: &Gathering, query: &Query) -> Self {
        let (sample, age) = gathering.live.sample();
        let mut flows = gathering.flows.report(None, Kinds { denied: true, connections: false }, false);
        flows.flows.reverse();
        flows.flows.truncate(FLOWS);
        let state = gathering.states.borrow();
        let (ready, reason) = (state.ready, state.reason.clone());
        drop(state);
        let mut issues = gathering.issues();
        issues.sort_by_key(|issue| Reverse(issue.severity));
        let all_issues = issues.len();
        issues.truncate(ISSUES);
        let peers = Peers::of(&sample, age, query);
        let fixed = &gathering.fixed;
        Self {
            node: fixed.node.clone(),
            version: env!("CARGO_PKG_VERSION"),
            mode: fixed.mode,
            encrypted: fixed.mode.encrypted(),
            ready,
            reason: reason.filter(|_| !ready),
            source_up: sample.source.up,
            pods: sample.endpoints,
            pod_mtu: sample.pod_mtu,
            key_age: sample.keys.and_then(|keys| keys.age).map(|own| (own + age).as_secs()),
            age: age.as_secs(),
            peers: peers.rows,
            found: peers.found,
            all: sample.peers.len(),
            counts: peers.counts,
            cells: peers.cells,
            search: query.search.clone(),
            issues,
            all_issues,
            flows: flows.flows,
            flows_unavailable: flows.unavailable,
            policy: fixed.policy,
        }
    }
}

struct Peers {
    rows: Vec<PeerView>,
    found: usize,
    counts: Vec<(Health, usize)>,
    cells: Vec<(NodeName, Health)>,
}

impl Peers {
    fn of(sample: &Sample, age: std::time::Duration, query: &Query) -> Self {
        let all: Vec<PeerView> = sample.peers.iter().map(|peer| PeerView::of(peer, age)).collect();
        let cells: Vec<_> = all.iter().map(|peer| (peer.node.clone(), peer.health)).collect();
        let count = |health: Health| cells.iter().filter(|(_, cell)| *cell == health).count();
        let counts = Health::ALL.into_iter().map(|health| (health, count(health))).collect();
        let mut rows: Vec<PeerView> = all.into_iter().filter(|peer| peer.matches(&query.search)).collect();
        let found = rows.len();
        // Stable: those of one health stay in the order of their names.
        rows.sort_by_key(|peer| Reverse(peer.health));
        rows.truncate(ROWS);
        Self { rows, found, counts, cells }
    }
}
