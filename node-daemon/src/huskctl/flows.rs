//! `huskctl flows`: asks again and again for what is new, and prints it as it comes.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use husk_overlay::ipc::Request;
use husk_policy::cluster::DEFAULT_NAMESPACE;

use super::{Output, Show, ask, tables};
use crate::report::{Flow, FlowEnd, FlowsReport};

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(500);

/// Which flows.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Go on with those that come, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Only denied ones; the kernel tells of no others yet
    #[arg(long)]
    denied: bool,
    /// Only from or to this pod: NAMESPACE/NAME, NAME in the namespace default, or an address
    #[arg(long)]
    pod: Option<String>,
    /// How many of those that were recorded already; the daemon keeps 10,000
    #[arg(long, default_value_t = 100)]
    last: usize,
}

impl Options {
    fn wants(&self, flow: &Flow) -> bool {
        self.pod.as_deref().is_none_or(|pod| [&flow.source, &flow.destination].into_iter().any(|end| is(end, pod)))
    }
}

fn is(end: &FlowEnd, pod: &str) -> bool {
    if let Ok(address) = pod.parse::<IpAddr>() {
        return end.address == address;
    }
    let (namespace, name) = pod.split_once('/').unwrap_or((DEFAULT_NAMESPACE, pod));
    end.namespace.as_deref() == Some(namespace) && end.pod.as_deref() == Some(name)
}

pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let mut reader = Reader { socket, denied: options.denied, after: 0, lost: 0 };
    let (recorded, report) = reader.read()?;
    tell(report.unavailable.iter().map(|reason| format!("huskctl: flows are not recorded: {reason}")));
    let mut flows: Vec<Flow> = recorded.into_iter().filter(|flow| options.wants(flow)).collect();
    flows.drain(..flows.len().saturating_sub(options.last));
    if !options.follow {
        tell(lost(report.lost));
        return Ok((text(show, &flows, true)?, report.unavailable.is_some()));
    }
    let mut first = true;
    loop {
        let text = text(show, &flows, first)?;
        let mut out = std::io::stdout();
        if !text.is_empty() && out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            // A reader that closed the pipe has read enough.
            return Ok((String::new(), false));
        }
        first = false;
        std::thread::sleep(POLL);
        let before = reader.lost;
        let (new, report) = reader.read()?;
        tell(lost(report.lost.saturating_sub(before)));
        flows = new.into_iter().filter(|flow| options.wants(flow)).collect();
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

fn lost(count: u64) -> Option<String> {
    (count > 0).then(|| format!("huskctl: {count} flows were lost: they came faster than they could be recorded"))
}

fn tell(lines: impl IntoIterator<Item = String>) {
    for line in lines {
        // Who does not read this has the counters.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Reads on where it was.
struct Reader<'a> {
    socket: &'a Path,
    denied: bool,
    after: u64,
    lost: u64,
}

impl Reader<'_> {
    /// All that is new, and the last answer.
    fn read(&mut self) -> anyhow::Result<(Vec<Flow>, FlowsReport)> {
        let mut all = Vec::new();
        loop {
            let request = Request::Flows { after: Some(self.after), denied: self.denied };
            let mut report: FlowsReport = ask(self.socket, &request)?;
            if report.newest < self.after {
                // The daemon is another one, and counts anew.
                (self.after, self.lost) = (0, 0);
                continue;
            }
            let Some(last) = report.flows.last().map(|flow| flow.sequence) else {
                self.lost = report.lost;
                return Ok((all, report));
            };
            self.after = last;
            all.append(&mut report.flows);
            if last >= report.newest {
                self.lost = report.lost;
                return Ok((all, report));
            }
        }
    }
}
