//! What can be said of a single packet that is to be answered, whatever it carries.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::socket::{Exchange, Protocol};
use super::{TIME_LIMIT, payload};
use crate::netns::Netns;

/// A packet to somewhere that is to be answered: an [`Echo`](super::Echo) or a [`Datagram`](super::Datagram).
#[derive(Debug, Clone, Copy)]
pub struct Question<To> {
    pub(super) to: To,
    from: Option<IpAddr>,
    packet_size: usize,
    pub(super) dont_fragment: bool,
    limit: Duration,
}

impl<To> Question<To> {
    /// In an IP packet of 100 bytes that must not be fragmented.
    pub(super) fn new(to: To) -> Self {
        Self { to, from: None, packet_size: 100, dont_fragment: true, limit: TIME_LIMIT }
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

    /// The payload that makes the packet as long as it is to be behind `headers` bytes.
    pub(super) fn payload(&self, headers: usize) -> Result<Vec<u8>> {
        ensure!(self.packet_size >= headers, "the packet has at least {headers} bytes of headers");
        Ok(payload::of_length(self.packet_size - headers))
    }

    /// The question as it is put to a namespace's kernel.
    pub(super) fn exchange<'a>(&self, netns: &'a Netns, protocol: Protocol, to: IpAddr) -> Exchange<'a> {
        let (from, dont_fragment, limit) = (self.from, self.dont_fragment, self.limit);
        Exchange { netns, protocol, to, from, dont_fragment, limit }
    }
}
