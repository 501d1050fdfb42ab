//! What the device reads from and writes to: the library's TUN device and UDP socket, with what a node's network needs
//! beyond them.
//!
//! - A packet is padded only as far as every path can carry it. The library pads to 16 bytes within the TUN device's MTU;
//!   a route to a peer behind a smaller MTU would then lead to packets of up to 15 bytes more than its path takes.
//! - A packet of any size is read whole. The library reads the TUN device into buffers of 4096 bytes, which cuts those of an
//!   underlay with jumbo frames short.
//! - One peer that cannot be sent to costs no other peer a packet. The library drops the rest of a batch.
//! - A packet the kernel does not take, because the device is down for instance, is lost alone.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::tun::{AbstractDevice as _, AsyncDevice};
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use gotatun::udp::socket::{UdpSocket, UdpSocketFactory};
use gotatun::udp::{UdpRecv, UdpSend, UdpTransportFactory, UdpTransportFactoryParams};
use husk_overlay::name::InterfaceName;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use tokio::io::Interest;
use tokio::sync::watch;

/// The smallest MTU a path may have to carry IPv6 (RFC 8200 section 5), a multiple of 16. Packets up to it are padded,
/// larger ones are not: they tell their length modulo 16, and they fit whatever the route allowed.
const PADDED_UP_TO: u16 = 1280;

/// What to ask of the kernel; it grants up to net.core.rmem_max and wmem_max.
const SOCKET_BUFFER: usize = 4 << 20;

/// How many datagrams go to the kernel in one call.
const BATCH: usize = 64;

/// The largest MTU a TUN device can have (`MAX_MTU`, 65535, drivers/net/tun.c).
const LARGEST_PACKET: usize = 65535;

/// How soon a change of the TUN device's MTU, and its end, are noticed.
const DEVICE_POLL: Duration = Duration::from_millis(100);

/// How long a socket that is being replaced may take to close, and how often that is tried.
const CLOSING: Duration = Duration::from_secs(1);
const CLOSING_POLL: Duration = Duration::from_millis(1);

/// Pause before a socket that failed to receive is read again.
const RECEIVE_RETRY: Duration = Duration::from_millis(20);

/// Says when and why the device cannot go on.
pub(super) struct Failure(watch::Receiver<Option<String>>);

impl Failure {
    /// Completes with the reason.
    pub(super) async fn occurred(&mut self) -> String {
        match self.0.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the device was dropped".to_owned(),
        }
    }
}

/// The TUN device.
#[derive(Clone)]
pub(super) struct Tunnel {
    device: Arc<AsyncDevice>,
    padding: MtuWatcher,
    buffer: Vec<u8>,
}

impl Tunnel {
    /// Wraps the device of that name.
    pub(super) fn new(device: AsyncDevice, interface: &InterfaceName) -> io::Result<(Self, Failure)> {
        let device = Arc::new(device);
        let (padding, changes) = watch::channel(padded_up_to(&device).unwrap_or(PADDED_UP_TO));
        let failure = watch_device(Arc::downgrade(&device), padding, interface)?;
        Ok((Self { device, padding: changes.into(), buffer: vec![0; LARGEST_PACKET] }, failure))
    }
}

fn padded_up_to(device: &AsyncDevice) -> Option<u16> {
    device.mtu().ok().map(|mtu| mtu.min(PADDED_UP_TO))
}

/// Follows the interface's MTU, and looks whether it is still there. The library does not notice its end: the kernel reports
/// it to epoll as an error without readability, for which a read does not wake.
fn watch_device(
    device: Weak<AsyncDevice>,
    padding: watch::Sender<u16>,
    interface: &InterfaceName,
) -> io::Result<Failure> {
    let index = if_nametoindex(interface.as_str())?;
    let interface = interface.clone();
    let (failed, failure) = watch::channel(None);
    tokio::spawn(async move {
        while if_nametoindex(interface.as_str()) == Ok(index) {
            if let Some(new) = device.upgrade().and_then(|device| padded_up_to(&device)) {
                padding.send_if_modified(|old| std::mem::replace(old, new) != new);
            }
            tokio::time::sleep(DEVICE_POLL).await;
        }
        failed.send_replace(Some("the TUN device was deleted or renamed".to_owned()));
    });
    Ok(Failure(failure))
}

impl IpSend for Tunnel {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        // The library would end the device for some errors. A packet is lost alone; the end of the device is watched for.
        let _ = self.device.send(&packet.into_bytes()).await;
        Ok(())
    }
}

impl IpRecv for Tunnel {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        let length = self.device.recv(&mut self.buffer).await?;
        let mut packet = pool.get();
        packet.buf_mut().clear();
        packet.buf_mut().extend_from_slice(&self.buffer[..length]);
        // What is no IP packet concerns nobody.
        Ok(packet.try_into_ip().ok().into_iter())
    }

    fn mtu(&self) -> MtuWatcher {
        self.padding.clone()
    }
}

/// Makes the UDP socket: one for both families, or for IPv4 alone where the kernel has no IPv6.
pub(super) struct Sockets(UdpSocketFactory);

impl Sockets {
    pub(super) fn new() -> Self {
        Self(UdpSocketFactory { recv_buffer_size: Some(SOCKET_BUFFER), send_buffer_size: Some(SOCKET_BUFFER) })
    }
}

/// Whether a port can be had. The library closes the socket it has before it opens another, so ask before.
pub(super) async fn try_port(port: u16) -> io::Result<()> {
    let params = UdpTransportFactoryParams { addr: None, port, fwmark: None };
    UdpSocketFactory::default().bind(&params).await.map(drop)
}

impl UdpTransportFactory for Sockets {
    type Send = Sender;
    type Recv = Receiver;

    async fn bind(&mut self, params: &UdpTransportFactoryParams) -> io::Result<(Sender, Receiver)> {
        // The library does not wait for the tasks that hold the former socket, and may ask for the same port again.
        let end = Instant::now() + CLOSING;
        loop {
            match self.0.bind(params).await {
                Ok((send, receive)) => return Ok((Sender(send), Receiver(receive))),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                    tokio::time::sleep(CLOSING_POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The sending side of the socket.
#[derive(Clone)]
pub(super) struct Sender(UdpSocket);

impl Sender {
    /// Sends what it can of a batch in one call; returns how many datagrams are dealt with. If the first cannot be sent
    /// the kernel says why and sends nothing: that one is dropped.
    async fn send_some(&self, packets: &[(Packet, SocketAddr)]) -> usize {
        let socket = self.0.socket();
        let targets: Vec<_> = packets.iter().map(|(_, target)| Some(SockaddrStorage::from(*target))).collect();
        let slices: Vec<_> = packets.iter().map(|(packet, _)| [IoSlice::new(packet)]).collect();
        let sent = socket
            .async_io(Interest::WRITABLE, || {
                let mut headers = MultiHeaders::preallocate(slices.len(), None);
                let sent =
                    sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &targets, [], MsgFlags::MSG_DONTWAIT)?.count();
                Ok(sent)
            })
            .await;
        sent.unwrap_or(1).max(1)
    }
}

impl UdpSend for Sender {
    type SendManyBuf = ();

    async fn send_to(&self, packet: Packet, destination: SocketAddr) -> io::Result<()> {
        self.0.send_to(packet, destination).await
    }

    fn max_number_of_packets_to_send(&self) -> usize {
        BATCH
    }

    async fn send_many_to(&self, (): &mut (), packets: &mut Vec<(Packet, SocketAddr)>) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = packets.get(done..).filter(|rest| !rest.is_empty()) {
            done += self.send_some(rest).await;
        }
        packets.clear();
        Ok(())
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.0.local_addr().map(Some)
    }

    fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        self.0.set_fwmark(mark)
    }
}

/// The receiving side of the socket. The library ends the device on the first error of a socket; none that an unconnected
/// UDP socket reports is final.
pub(super) struct Receiver(UdpSocket);

impl UdpRecv for Receiver {
    type RecvManyBuf = <UdpSocket as UdpRecv>::RecvManyBuf;

    async fn recv_from(&mut self, pool: &mut PacketBufPool) -> io::Result<(Packet, SocketAddr)> {
        loop {
            match self.0.recv_from(pool).await {
                Ok(received) => return Ok(received),
                Err(_) => tokio::time::sleep(RECEIVE_RETRY).await,
            }
        }
    }

    async fn recv_many_from(
        &mut self,
        buffers: &mut Self::RecvManyBuf,
        pool: &mut PacketBufPool,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        while self.0.recv_many_from(buffers, pool, packets).await.is_err() {
            tokio::time::sleep(RECEIVE_RETRY).await;
        }
        Ok(())
    }

    fn enable_udp_gro(&self) -> io::Result<()> {
        self.0.enable_udp_gro()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn a_datagram_that_cannot_be_sent_is_lost_alone() {
        let receiver = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let params = UdpTransportFactoryParams { addr: None, port: 0, fwmark: None };
        let (sender, _) = Sockets::new().bind(&params).await.unwrap();
        let pool = PacketBufPool::<4096>::new(8);
        let good = receiver.local_addr().unwrap();
        // The kernel refuses port 0 with EINVAL.
        let bad = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut packets: Vec<(Packet, SocketAddr)> = [(1, bad), (2, good), (3, bad), (4, bad), (5, good)]
            .map(|(mark, target)| {
                let mut packet = pool.get();
                packet.truncate(1);
                packet[0] = mark;
                (packet, target)
            })
            .into();
        sender.send_many_to(&mut (), &mut packets).await.unwrap();
        assert!(packets.is_empty());
        let mut seen = [0; 2];
        for slot in &mut seen {
            let receive = receiver.recv_from(std::slice::from_mut(slot));
            tokio::time::timeout(Duration::from_secs(5), receive).await.unwrap().unwrap();
        }
        assert_eq!(seen, [2, 5]);
    }
}
