//! A UDP datagram with an exact packet size, to an [`EchoServer`](super::EchoServer).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use husk_overlay::prefix::Family;

use super::socket::{Exchange, Protocol, header};
use super::{Reach, TIME_LIMIT, payload};
use crate::netns::Netns;

/// Length of a UDP header.
const UDP_HEADER: usize = 8;

/// A datagram that must not be fragmented.
#[derive(Debug, Clone, Copy)]
pub struct Datagram {
    to: SocketAddr,
    from: Option<IpAddr>,
    packet_size: usize,
    limit: Duration,
}

impl Datagram {
    /// A datagram in an IP packet of 100 bytes.
    #[must_use]
    pub fn to(to: SocketAddr) -> Self {
        Self { to, from: None, packet_size: 100, limit: TIME_LIMIT }
    }

    /// The source address; the kernel chooses otherwise.
    #[must_use]
    pub fn from(mut self, from: IpAddr) -> Self {
        self.from = Some(from);
        self
    }

    /// The length of the whole IP packet, its header included.
    #[must_use]
    pub fn packet_size(mut self, bytes: usize) -> Self {
        self.packet_size = bytes;
        self
    }

    /// How long to wait for the answer; two seconds otherwise.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sends the datagram from a namespace and waits for the server's echo.
    ///
    /// # Errors
    /// When the harness fails; whatever becomes of the packet is an answer.
    pub fn run(&self, netns: &Netns) -> Result<Reach> {
        let headers = header(Family::of(self.to.ip())) + UDP_HEADER;
        ensure!(self.packet_size >= headers, "a datagram has at least {headers} bytes");
        let body = payload::of_length(self.packet_size - headers);
        let exchange = Exchange {
            netns,
            protocol: Protocol::Udp(self.to.port()),
            to: self.to.ip(),
            from: self.from,
            dont_fragment: true,
            limit: self.limit,
        };
        exchange.run(&body, |received| (received == body).then_some(received.len() + headers))
    }
}
