//! `huskd health`: what the probes of a container ask.

use std::path::PathBuf;

use anyhow::{Result, bail};
use husk_overlay::ipc::{Request, Response, SOCKET_FILE};
use husk_overlay::marks;

use crate::huskctl::exchange;

/// What is asked.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Directory of the daemon's socket
    #[arg(long, env = "HUSK_RUN_DIRECTORY", default_value = marks::RUN_DIRECTORY)]
    run_directory: PathBuf,
    /// Whether pods can be added, instead of whether the daemon is alive
    #[arg(long)]
    ready: bool,
}

/// Succeeds if the daemon is alive: its loop answers, whatever is wrong with the node; or if it is ready.
///
/// # Errors
/// Why not.
pub fn run(options: &Options) -> Result<()> {
    let request = if options.ready { Request::Ready } else { Request::Status };
    match exchange(&options.run_directory.join(SOCKET_FILE), &request)? {
        Response::NotReady { reason, .. } if options.ready => bail!("not ready: {reason}"),
        Response::Refused { reason } => bail!("{reason}"),
        _ => Ok(()),
    }
}
