//! The end-to-end harness: a cluster of hosts on one machine, each host a network namespace with its own mounts.
//!
//! ```no_run
//! use husk_tests::{Cluster, Family, Mode, probe};
//!
//! fn main() -> anyhow::Result<()> {
//!     let cluster = Cluster::builder().mode(Mode::Wireguard).underlay(Family::Ipv6).hosts(2).start()?;
//!     let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
//!     let wire = cluster.capture()?;
//!     let reply = probe::Echo::to(b.address(Family::Ipv4)?).packet_size(a.mtu()?).run(a.netns())?;
//!     assert!(reply.arrived(), "{reply:?}");
//!     assert_eq!(wire.stop()?.fragments(), 0);
//!     Ok(())
//! }
//! ```
//!
//! Reading order: [`scope`] names everything a run makes, so that a later run can sweep what a killed one left;
//! [`process`] runs programs with a time limit; [`netns`] is a network namespace; [`host`] a machine in the test and
//! [`cluster`] several of them on one underlay; [`cni`] and [`pod`] play the container runtime; [`probe`] are the
//! questions asked from inside a namespace and [`capture`] what was seen on the wire. [`demo`] shows all of it to people.

pub mod capture;
pub mod cluster;
pub mod cni;
pub mod demo;
pub mod host;
pub mod netns;
pub mod packet;
pub mod pod;
pub mod probe;
pub mod process;
pub mod scope;
pub mod steady;

pub use capture::{Capture, Trace};
pub use cluster::{Cluster, ClusterBuilder, MODES};
pub use cni::{CniOutcome, PodSpec};
pub use host::Host;
pub use husk_overlay::mode::Mode;
pub use husk_overlay::prefix::{Family, Prefix};
pub use netns::Netns;
pub use nix::sys::signal::Signal;
pub use packet::{Kind, Packet};
pub use pod::Pod;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks `question` every few milliseconds until it answers `true`; an error after `limit` names `what` was awaited.
///
/// # Errors
/// When the time is over, or at once when the question itself fails.
pub fn eventually(what: &str, limit: Duration, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if question()? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("gave up after {limit:?} waiting for {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
