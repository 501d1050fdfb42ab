//! Questions asked from inside a namespace, with sockets of our own: what an assertion rests on is in this module.
//!
//! Every payload carries [`payload::MARKER`], so that a capture can tell whether it crossed the wire in the clear.

mod datagram;
mod echo;
pub mod payload;
mod question;
mod server;
mod socket;
mod stream;
pub mod tcp;

pub use datagram::Datagram;
pub use echo::Echo;
pub use question::Question;
pub use server::EchoServer;
pub use socket::path_mtu;
pub use stream::{Report, Stream};

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;

use crate::netns::Netns;

/// How long a probe waits for its answer unless told otherwise.
pub const TIME_LIMIT: Duration = Duration::from_secs(2);

/// What became of a single packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The answer came.
    Answered {
        /// Time from sending to the answer.
        after: Duration,
        /// Length of the answer's IP packet.
        packet_size: usize,
    },
    /// The packet is larger than the path takes (`EMSGSIZE`).
    TooBig {
        /// The MTU that the sender's kernel now has for the path.
        path_mtu: usize,
        /// True if the sender's own kernel refused it, false if an ICMP error came back.
        local: bool,
    },
    /// The kernel refused to send, or an ICMP error came back.
    Refused(Errno),
    /// Nothing came back within the time limit.
    Silent,
}

impl Reach {
    /// True if the answer came.
    #[must_use]
    pub fn arrived(&self) -> bool {
        matches!(self, Self::Answered { .. })
    }
}

/// A packet of exactly the MTU passes; for one byte more the own kernel names the MTU.
///
/// # Errors
/// When the harness fails.
///
/// # Panics
/// When it is not so.
pub fn assert_exact(from: &Netns, to: IpAddr, mtu: usize) -> Result<()> {
    let from_to = format!("{} to {to}", from.name());
    let reach = Echo::to(to).packet_size(mtu).run(from)?;
    assert!(matches!(reach, Reach::Answered { packet_size, .. } if packet_size == mtu), "{from_to}, {mtu}: {reach:?}");
    let reach = Echo::to(to).packet_size(mtu + 1).run(from)?;
    assert_eq!(reach, Reach::TooBig { path_mtu: mtu, local: true }, "{from_to}, {} bytes", mtu + 1);
    Ok(())
}
