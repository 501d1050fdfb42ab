//! ESP in UDP (RFC 3948), for networks that drop ESP: it arrives only while somebody keeps a UDP socket open that was made
//! for it. This process does nothing else, `huskd udp-encapsulation --port 4500`, a [companion](crate::companion) of the
//! daemon: the kernel does all the work, and goes on doing it while the daemon is dead or restarted.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use husk_dataplane::xfrm;
use husk_overlay::marks;
use husk_overlay::prefix::Family;
use nix::errno::Errno;

use crate::companion::{Job, Ownership, Process, detach, stop_signal};

/// Family of the underlay, as a command line has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Underlay {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

impl From<Underlay> for Family {
    fn from(underlay: Underlay) -> Self {
        match underlay {
            Underlay::Ipv4 => Self::Ipv4,
            Underlay::Ipv6 => Self::Ipv6,
        }
    }
}

/// What the process needs to know to start.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// UDP port at which ESP in UDP arrives
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Family of the underlay
    #[arg(long, value_enum, default_value_t = Underlay::Ipv4)]
    pub family: Underlay,
    /// Run directory of the daemon, for the lock and the log; must not survive a reboot
    #[arg(long, default_value = marks::RUN_DIRECTORY)]
    pub run_directory: PathBuf,
}

/// Keeps the socket open until SIGTERM or SIGINT.
///
/// # Errors
/// When another process does it already, the port is taken, or the kernel has no ESP in UDP.
pub async fn run(options: Options) -> Result<()> {
    detach();
    let stopped = stop_signal()?;
    let (port, family) = (options.port, options.family.into());
    let job = Job::UdpEncapsulation { port, family };
    let mut ownership = Ownership::take(&Process::new(&job, &options.run_directory))?;
    let _socket = open(port, family)?;
    ownership.ready()?;
    tracing::info!(port, %family, "the kernel takes ESP in UDP");
    let name = stopped.await;
    tracing::info!(port, signal = name, "stopping");
    Ok(())
}

fn open(port: u16, family: Family) -> Result<UdpSocket> {
    xfrm::encapsulation_socket(SocketAddr::new(family.unspecified(), port)).map_err(|error| match error.errno() {
        Some(Errno::EADDRINUSE) => anyhow::anyhow!(
            "UDP port {port} is taken by another program: `ss -ulpn 'sport = :{port}'` says by which; an IKE daemon has 4500"
        ),
        _ => error.into(),
    })
    .with_context(|| format!("no ESP in UDP over {family}"))
}

#[cfg(test)]
mod tests {
    use husk_dataplane::netns::Netns;

    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_port_that_is_taken_is_named_with_how_to_find_out_by_whom() {
        let ran = Netns::new_unnamed().unwrap().run_in(|| {
            let taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 4500)).unwrap();
            let error = format!("{:#}", open(4500, Family::Ipv4).unwrap_err());
            assert!(error.contains("port 4500 is taken") && error.contains("ss -ulpn"), "{error}");
            drop(taken);
        });
        ran.unwrap();
    }
}
