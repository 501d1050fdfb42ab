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

use std::time::Duration;

use nix::errno::Errno;

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
