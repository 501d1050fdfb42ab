//! A UDP datagram with an exact packet size, to an [`EchoServer`](super::EchoServer).

use std::net::SocketAddr;

use anyhow::Result;
use husk_overlay::prefix::Family;

use super::Reach;
use super::question::Question;
use super::socket::{Protocol, header};
use crate::netns::Netns;

/// Length of a UDP header.
pub(super) const UDP_HEADER: usize = 8;

/// A datagram that must not be fragmented.
pub type Datagram = Question<SocketAddr>;

impl Datagram {
    /// A datagram in an IP packet of 100 bytes.
    #[must_use]
    pub fn to(to: SocketAddr) -> Self {
        Self::new(to)
    }

    /// Sends the datagram from a namespace and waits for the server's echo.
    ///
    /// # Errors
    /// When the harness fails; whatever becomes of the packet is an answer.
    pub fn run(&self, netns: &Netns) -> Result<Reach> {
        let (to, port) = (self.to.ip(), self.to.port());
        let headers = header(Family::of(to)) + UDP_HEADER;
        let body = self.payload(headers)?;
        self.exchange(netns, Protocol::Udp(port), to)
            .run(&body, |received| (received == body).then_some(received.len() + headers))
    }
}
