//! `huskctl capture`: packets as pods see them, or as the network between the nodes does, without knowing which interface that is.
//!
//! The daemon tells where they pass; the sockets are this program's own, which needs `CAP_NET_RAW` and the host's network
//! namespace. Which packets are meant is decided in the kernel ([`husk_dataplane::capture::Filter`]).

mod decode;
mod expression;
mod pcap;
mod session;
mod verify;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use husk_dataplane::capture::{Captured, Filter, Statistics, WHOLE};
use husk_overlay::ipc::Request;

use self::decode::Decoder;
pub(super) use self::decode::Packet;
use self::pcap::PcapWriter;
use self::session::{End, Limits, Session};
pub(super) use self::verify::Verified;
use super::{Output, Show, ask, standpoint};
use crate::report::{CaptureReport, Tap};

/// Whose packets, and what to do with them.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Whose: a pod of this node (NAMESPACE/NAME, NAME in the namespace default, or an address), another node by its name, or host
    /// for all tunnels of this node
    target: String,
    /// As the pods see them; this is the default
    #[arg(long, conflicts_with = "outer")]
    inner: bool,
    /// As the network between the nodes sees them
    #[arg(long)]
    outer: bool,
    /// Write them to this new file in the pcap format, or with - to standard output: huskctl capture a -w - | wireshark -k -i -
    #[arg(long, short, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Stop after so many packets; 0 for any number
    #[arg(long, short, value_name = "N", default_value_t = 10_000)]
    count: u64,
    /// Stop after so many seconds; 0 for any time
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    duration: u64,
    /// Only packets that are all of this, joined with and: host ADDRESS, net PREFIX, port NUMBER, proto NUMBER, tcp, udp, sctp,
    /// icmp, esp; of --outer packets the outermost header counts
    #[arg(long, value_name = "EXPRESSION", value_parser = expression::parse)]
    filter: Option<Filter>,
    /// Keep only so many bytes of each packet
    #[arg(long, value_name = "BYTES", default_value_t = WHOLE, value_parser = clap::value_parser!(u32).range(64..=i64::from(WHOLE)))]
    snaplen: u32,
    /// Send datagrams with a random marker through the tunnel to the node, and look for them on the wire
    #[arg(long, conflicts_with_all = ["inner", "outer", "write", "filter", "snaplen", "count", "duration"])]
    verify_encrypted: bool,
}

/// The text to print in the end, and whether something was found.
pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let report: CaptureReport = ask(socket, &Request::Capture { target: options.target.clone() })?;
    standpoint::ensure_here(socket)?;
    if options.verify_encrypted {
        return verify::run(&report, show);
    }
    let taps = if options.outer { &report.outer } else { &report.inner };
    anyhow::ensure!(
        !taps.is_empty(),
        "there is no interface yet on which packets of {} pass; see huskctl status",
        report.target
    );
    let filter = options.filter.clone().unwrap_or_default();
    let mut session = Session::open(taps, &filter, options.snaplen)?;
    tell(&beginning(&report, taps, options.outer));
    let limits = Limits {
        count: (options.count > 0).then_some(options.count),
        time: (options.duration > 0).then(|| Duration::from_secs(options.duration)),
    };
    let side = if options.outer { "outer" } else { "inner" };
    let decoder = Decoder { side, ports: &report.ports, names: &report.names };
    let end = match &options.write {
        Some(path) => write(&mut session, path, &limits)?,
        None => print(&mut session, &decoder, show, &limits)?,
    };
    let statistics = session.statistics()?;
    tell(&ending(&session, &end, statistics));
    Ok((String::new(), statistics.lost > 0))
}

fn beginning(report: &CaptureReport, taps: &[Tap], outer: bool) -> String {
    let interfaces: Vec<String> = taps.iter().map(|tap| tap.interface.to_string()).collect();
    let note = report.outer_note.as_ref().filter(|_| outer).map(|note| format!("; {note}")).unwrap_or_default();
    format!("capturing packets of {} on {}{note}; Ctrl-C ends it", report.target, interfaces.join(", "))
}

fn ending(session: &Session, end: &End, statistics: Statistics) -> String {
    let packets = session.taken();
    let why = match end {
        End::Enough => "that is as many as were asked for (--count)",
        End::Time => "the time is over (--duration)",
        End::Interrupted => "interrupted",
        End::Unread => "nobody reads them any more",
        End::Gone => "the interface is gone or down",
    };
    let mut text = format!("{packets} packets; {why}");
    if statistics.lost > 0 {
        text += &format!(
            "; {} MORE WERE LOST, as they came faster than they were read: use --filter or --snaplen",
            statistics.lost
        );
    }
    if session.largest() > WIRE {
        text += &format!(
            "; the largest has {} bytes: the device was handed it whole, and it is cut for the wire (or was joined) later",
            session.largest()
        );
    }
    text
}

/// Bytes that are written to a file at once, if they come that fast.
const BUFFER: usize = 1 << 18;

/// What no wire takes: larger packets are seen before they are segmented, or after they were joined.
const WIRE: usize = 9216;

fn tell(line: &str) {
    // Who does not read this has the packets.
    let _ = writeln!(io::stderr(), "huskctl: {line}");
}

/// Ends the capture quietly where the reader has gone.
fn unless_unread(written: io::Result<()>) -> io::Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

fn write(session: &mut Session, path: &Path, limits: &Limits) -> anyhow::Result<End> {
    let link = session.link()?;
    let to_stdout = path == Path::new("-");
    let what = if to_stdout { "standard output".to_owned() } else { path.display().to_string() };
    let out: Box<dyn io::Write> = if to_stdout { Box::new(io::stdout().lock()) } else { Box::new(pcap::create(path)?) };
    let mut pcap = PcapWriter::begin(io::BufWriter::with_capacity(BUFFER, out), link)
        .with_context(|| format!("cannot write {what}"))?;
    let end = session.run(limits, |seen| {
        unless_unread(match seen {
            Some(it) => pcap.packet(&it.captured, it.bytes),
            None => pcap.flush(),
        })
    });
    let end = end.with_context(|| format!("cannot write {what}; {} packets are in it", pcap.packets()))?;
    if !to_stdout {
        tell(&format!("written to {what}"));
    }
    Ok(end)
}

fn print(session: &mut Session, decoder: &Decoder<'_>, show: &Show, limits: &Limits) -> anyhow::Result<End> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let end = session.run(limits, |seen| {
        let Some(it) = seen else { return unless_unread(out.flush()) };
        let packet = decoder.decode(it.interface, &it.captured, it.bytes);
        unless_unread(match show.output {
            Output::Table => writeln!(out, "{packet}"),
            Output::Json => {
                serde_json::to_writer(&mut out, &packet).map_err(io::Error::from).and_then(|()| writeln!(out))
            }
        })
    });
    end.context("cannot print packets")
}

/// A packet with what is known of it.
#[derive(Debug, Clone, Copy)]
struct Seen<'a> {
    interface: &'a str,
    captured: Captured,
    bytes: &'a [u8],
}
