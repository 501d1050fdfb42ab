//! `huskctl flows`: asks again and again for what is new, and prints it as it comes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use husk_overlay::ipc::Request;
use husk_overlay::prefix::Prefix;
use husk_policy::cluster::DEFAULT_NAMESPACE;

use super::following::{Answered, ask_on};
use super::style::tell;
use super::{Output, Show, ask, style, tables};
use crate::report::{Flow, FlowEnd, FlowVerdict, FlowsReport, PeerReport};

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(500);

/// Which flows.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Go on with those that come, until interrupted. Connections that begin and end are recorded only while somebody follows
    /// them, or while they are logged (logs.flows)
    #[arg(long, short)]
    follow: bool,
    /// Only what policy denied, and others that are asked for
    #[arg(long)]
    denied: bool,
    /// Only connections that began, and others that are asked for
    #[arg(long)]
    new: bool,
    /// Only connections that ended, and others that are asked for
    #[arg(long)]
    closed: bool,
    /// Only from or to this pod: NAMESPACE/NAME, NAME in the namespace default, or an address
    #[arg(long)]
    pod: Option<String>,
    /// Only from or to pods of this node
    #[arg(long, value_name = "NODE")]
    peer: Option<String>,
    /// How many of those that were recorded already; the daemon keeps 10,000 of what was denied, and 10,000 of connections
    #[arg(long, default_value_t = 100)]
    last: usize,
}

impl Options {
    /// True if this kind is asked for; without any, all are.
    fn wants(&self, verdict: FlowVerdict) -> bool {
        let asked =
            [(self.denied, FlowVerdict::Denied), (self.new, FlowVerdict::New), (self.closed, FlowVerdict::Closed)];
        asked.iter().all(|(asked, _)| !asked) || asked.contains(&(true, verdict))
    }

    fn wants_connections(&self) -> bool {
        self.wants(FlowVerdict::New) || self.wants(FlowVerdict::Closed)
    }
}

/// What is shown.
struct Filter<'a> {
    options: &'a Options,
    /// Blocks of the node that is asked for.
    blocks: Option<BTreeSet<Prefix>>,
}

impl<'a> Filter<'a> {
    fn new(socket: &Path, options: &'a Options) -> anyhow::Result<Self> {
        let blocks = options.peer.as_deref().map(|peer| blocks_of(socket, peer)).transpose()?;
        Ok(Self { options, blocks })
    }

    fn wants(&self, flow: &Flow) -> bool {
        let ends = [&flow.source, &flow.destination];
        let blocks = self.blocks.as_ref();
        self.options.wants(flow.verdict)
            && self.options.pod.as_deref().is_none_or(|pod| ends.into_iter().any(|end| is(end, pod)))
            && blocks
                .is_none_or(|blocks| ends.into_iter().any(|end| blocks.iter().any(|block| block.contains(end.address))))
    }
}

/// Where addresses of a node's pods lie.
fn blocks_of(socket: &Path, node: &str) -> anyhow::Result<BTreeSet<Prefix>> {
    let peers: Vec<PeerReport> = ask(socket, &Request::Peers)?;
    let found = peers.into_iter().find(|peer| peer.node.as_str() == node).map(|peer| peer.blocks);
    found.with_context(|| format!("{node:?} is no other node of the cluster; huskctl peers lists them"))
}

fn is(end: &FlowEnd, pod: &str) -> bool {
    if let Ok(address) = pod.parse::<IpAddr>() {
        return end.address == address;
    }
    let (namespace, name) = pod.split_once('/').unwrap_or((DEFAULT_NAMESPACE, pod));
    end.namespace.as_deref() == Some(namespace) && end.pod.as_deref() == Some(name)
}

pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let filter = Filter::new(socket, options)?;
    let mut reader = Reader { socket, options, after: 0, lost: 0, has_begun: false };
    let Read { flows: recorded, report, lost: so_far, .. } = reader.read()?;
    tell(report.unavailable.iter().map(|reason| unavailable(reason)));
    let mut flows: Vec<Flow> = recorded.into_iter().filter(|flow| filter.wants(flow)).collect();
    flows.drain(..flows.len().saturating_sub(options.last));
    if !options.follow {
        tell(lost(so_far));
        if options.wants_connections() && !report.listening && report.unavailable.is_none() {
            let hint =
                "connections are recorded only while somebody follows them (--follow), or they are logged (logs.flows)";
            tell([format!("huskctl: {hint}")]);
        }
        let text = match show.output {
            Output::Table if flows.is_empty() => match &options.pod {
                // Of a name that is mistyped there are none, either.
                Some(pod) => {
                    format!("No flows of {pod} were recorded; huskctl ipam show has the names of this node's pods.\n")
                }
                None => "No flows were recorded.\n".to_owned(),
            },
            _ => text(show, &flows, true)?,
        };
        return Ok((text, report.unavailable.is_some()));
    }
    let mut first = true;
    let (mut listening, mut reason) = (false, report.unavailable);
    loop {
        let text = text(show, &flows, first)?;
        if !text.is_empty() && !style::print(&text)? {
            return Ok((String::new(), false));
        }
        first = false;
        std::thread::sleep(POLL);
        let Read { flows: new, report, lost: since, by_another } = reader.read()?;
        tell(lost(since));
        // The daemon finds out only when somebody follows, and goes on trying.
        if report.unavailable != reason {
            tell(report.unavailable.iter().map(|reason| unavailable(reason)));
            reason = report.unavailable;
        }
        if report.listening && (by_another || !listening) && options.wants_connections() {
            tell(["huskctl: connections are recorded from here on".to_owned()]);
        }
        listening = report.listening;
        flows = new.into_iter().filter(|flow| filter.wants(flow)).collect();
    }
}

/// One line per flow.
fn text(show: &Show, flows: &[Flow], with_header: bool) -> anyhow::Result<String> {
    match show.output {
        Output::Table => Ok(show.finish(&tables::flows(flows, with_header))),
        Output::Json => {
            let mut text = String::new();
            for flow in flows {
                text += &serde_json::to_string(flow)?;
                text += "\n";
            }
            Ok(text)
        }
    }
}

fn unavailable(reason: &str) -> String {
    format!("huskctl: flows are not recorded: {reason}")
}

fn lost(count: u64) -> Option<String> {
    (count > 0).then(|| format!("huskctl: {count} flows were lost: they came faster than they could be recorded"))
}

/// Reads on where it was.
struct Reader<'a> {
    socket: &'a Path,
    options: &'a Options,
    after: u64,
    lost: u64,
    /// The daemon has answered before: if it is away now, it is waited for.
    has_begun: bool,
}

/// What is new.
struct Read {
    flows: Vec<Flow>,
    /// The last answer.
    report: FlowsReport,
    /// Flows lost since the reading before.
    lost: u64,
    /// The daemon is another one than that of the reading before.
    by_another: bool,
}

impl Reader<'_> {
    fn read(&mut self) -> anyhow::Result<Read> {
        let mut all = Vec::new();
        let (mut before, mut by_another) = (self.lost, false);
        loop {
            let request = Request::Flows {
                after: Some(self.after),
                denied: self.options.wants(FlowVerdict::Denied),
                connections: self.options.wants_connections(),
                follow: self.options.follow,
            };
            let Answered { answer: mut report, restarted } = if self.has_begun {
                ask_on::<FlowsReport>(self.socket, &request)?
            } else {
                Answered { answer: ask(self.socket, &request)?, restarted: false }
            };
            self.has_begun = true;
            by_another |= restarted;
            if restarted && (self.after, self.lost) != (0, 0) || report.newest < self.after {
                // The daemon is another one, and counts anew.
                (self.after, self.lost, before, by_another) = (0, 0, 0, true);
                continue;
            }
            let last = report.flows.last().map(|flow| flow.sequence);
            all.append(&mut report.flows);
            self.lost = report.lost;
            match last.filter(|_| report.more) {
                Some(last) => self.after = last,
                None => {
                    self.after = report.newest;
                    return Ok(Read { flows: all, lost: report.lost.saturating_sub(before), report, by_another });
                }
            }
        }
    }
}
