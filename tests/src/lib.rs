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
//! [`cluster`] several of them on one underlay; [`cni`] and [`pod`] play the container runtime, [`runtime`] plays it in full;
//! [`probe`] are the questions asked from inside a namespace, [`load`] many of them all the time; [`capture`] is what was seen on the wire,
//! [`leak`] whether it told of pods; [`paths`] is what daemons and kernels know of the ways between hosts, [`forgery`] what they are not to
//! believe of them. [`kernel`] tells what the kernel can do, [`xfrm`] what it does with ESP, [`rotation`] which keys hosts have, [`secret`] how one could be written down. [`kubernetes`] makes nodes of a
//! real Kubernetes cluster of the hosts. [`demo`] shows all of it to people, [`mod@bench`] measures it; [`supervise`] leaves
//! nothing of programs that people may end at any moment. [`policy`] is what network policy means, for random clusters.

pub mod bench;
pub mod capture;
pub mod cluster;
pub mod cni;
mod control_groups;
pub mod crash;
pub mod cri;
pub mod demo;
pub mod engine;
pub mod forgery;
pub mod host;
pub mod http;
mod inject;
pub mod kernel;
pub mod kubernetes;
pub mod leak;
pub mod load;
pub mod netns;
pub mod packet;
pub mod paths;
pub mod pod;
pub mod policy;
pub mod probe;
pub mod process;
pub mod rotation;
pub mod runtime;
pub mod scope;
pub mod secret;
pub mod state;
pub mod steady;
pub mod supervise;
pub mod syscalls;
pub mod xfrm;

pub use capture::{Capture, Trace};
pub use cluster::{Cluster, ClusterBuilder, ESP_MODES, MODES};
pub use cni::{CniOutcome, PodSpec};
pub use host::Host;
pub use husk_overlay::mode::Mode;
pub use husk_overlay::prefix::{Family, Prefix};
pub use leak::Leak;
pub use load::Load;
pub use netns::Netns;
pub use nix::sys::signal::Signal;
pub use packet::{Kind, Packet};
pub use pod::Pod;

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A time limit as this machine needs it: `HUSK_TEST_TIME_SCALE` (1 if unset) times as long. An emulated processor is slower
/// by such a factor. It stretches how long something may take, never how long something has to last.
///
/// # Panics
/// When the variable holds anything but a whole number above zero.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    limit * *TIME_SCALE
}

/// A rate of packets as this machine can carry it: `HUSK_TEST_TIME_SCALE` times lower. At the full rate an emulated processor
/// would do nothing else, and full queues drop what no failure did.
///
/// # Panics
/// As [`patience`].
#[must_use]
pub fn pace(per_second: u32) -> u32 {
    (per_second / *TIME_SCALE).max(1)
}

static TIME_SCALE: LazyLock<u32> = LazyLock::new(|| {
    let scale = std::env::var("HUSK_TEST_TIME_SCALE").unwrap_or_else(|_| "1".to_owned());
    scale.parse().ok().filter(|scale| *scale > 0).expect("HUSK_TEST_TIME_SCALE is a whole number above zero")
});

/// Asks `question` every few milliseconds until it answers `true`; an error after `limit`, with [`patience`], names `what`
/// was awaited.
///
/// # Errors
/// When the time is over, or at once when the question itself fails.
pub fn eventually(what: &str, limit: Duration, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    let limit = patience(limit);
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
