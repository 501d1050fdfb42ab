//! `huskctl mtu`: the byte ledger for every peer, for what could be, and the path to a peer as it really is.

mod probe;
mod what_if;

use std::path::Path;

use husk_overlay::ipc::Request;
use husk_overlay::issue::Severity;

pub(super) use self::probe::Outcome as Probed;
use self::what_if::WhatIf;
use super::{Show, ask, tables};
use crate::report::MtuReport;

/// What to tell.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Options {
    /// The ledger of something else, without asking the daemon: mode=MODE,underlay=BYTES, and if wanted family=ipv4 or
    /// family=ipv6 (of the underlay; without it both) and udp=PORT (ESP in UDP).
    ///
    /// For example: huskctl mtu --what-if mode=vxlan-ipsec,underlay=9001
    #[arg(long, value_name = "KEY=VALUE,...")]
    what_if: Option<WhatIf>,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do besides.
#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Sends packets of the promised size to a peer now, and if they vanish looks for the size that passes; the range that is
    /// still open is told on standard error
    Probe(probe::Options),
}

pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    if let Some(Command::Probe(options)) = &options.command {
        return probe::run(socket, options, show);
    }
    if let Some(what_if) = &options.what_if {
        let rows = what_if.report();
        let wrong = rows.iter().any(|row| !row.refused.is_empty());
        return Ok((show.text(&rows, |rows| tables::what_if(rows))?, wrong));
    }
    let rows: Vec<MtuReport> = ask(socket, &Request::Mtu)?;
    let hurts = |row: &MtuReport| row.mismatches.iter().any(|it| it.severity >= Severity::Error);
    let wrong = rows.iter().any(|row| row.ledger.inner.is_none() || hurts(row));
    Ok((show.text(&rows, |rows| tables::mtu(rows))?, wrong))
}
