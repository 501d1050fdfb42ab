//! ICMP echo (RFC 792, RFC 4443): whether a host answers at all, when its tunnel does not.
//!
//! A datagram socket of ICMP needs no privilege, but a group in `net.ipv4.ping_group_range`, which systemd sets to all of them;
//! a raw one needs `CAP_NET_RAW`. Either will do.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use husk_overlay::prefix::Family;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::error::Error;

/// How often those that have not answered are asked.
const ROUNDS: u32 = 3;

/// How long an answer is waited for in each round.
const ROUND: Duration = Duration::from_millis(400);

/// Most hosts that are asked at once.
pub const MOST: usize = 64;

/// Bytes of an echo message without data.
const HEADER: usize = 8;

/// Which of these addresses, at most [`MOST`] of them, answer within about a second, from the calling thread's network
/// namespace.
///
/// # Errors
/// [`Error::Socket`] when no socket for it can be had.
pub fn answering(addresses: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, Error> {
    let mut answered = BTreeSet::new();
    for family in Family::ALL {
        let of_family: Vec<IpAddr> =
            addresses.iter().copied().filter(|it| Family::of(*it) == family).take(MOST).collect();
        if !of_family.is_empty() {
            Echoes::open(family)?.ask(&of_family, &mut answered)?;
        }
    }
    Ok(answered)
}

/// A socket, which `std` calls one of UDP: it sends and receives alike.
struct Echoes {
    socket: UdpSocket,
    family: Family,
    /// It tells of answers to everybody, with their IPv4 headers.
    raw: bool,
}

impl Echoes {
    fn open(family: Family) -> Result<Self, Error> {
        let (domain, protocol) = match family {
            Family::Ipv4 => (AddressFamily::Inet, SockProtocol::Icmp),
            Family::Ipv6 => (AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let open = |kind| socket(domain, kind, SockFlag::SOCK_CLOEXEC, protocol);
        let (opened, raw) = match open(SockType::Datagram) {
            Ok(opened) => (Ok(opened), false),
            Err(_) => (open(SockType::Raw), true),
        };
        let opened = opened.map_err(|errno| failed("open", errno.into()))?;
        Ok(Self { socket: UdpSocket::from(opened), family, raw })
    }

    fn ask(&self, addresses: &[IpAddr], answered: &mut BTreeSet<IpAddr>) -> Result<(), Error> {
        for _ in 0..ROUNDS {
            let open = |answered: &BTreeSet<IpAddr>| addresses.iter().any(|it| !answered.contains(it));
            for (number, address) in (0_u16..).zip(addresses).filter(|(_, address)| !answered.contains(address)) {
                // No way there is no answer either.
                let _ = self.socket.send_to(&self.request(number), SocketAddr::new(*address, 0));
            }
            let deadline = Instant::now() + ROUND;
            while open(answered) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                self.socket.set_read_timeout(Some(left)).map_err(|source| failed("set up", source))?;
                answered.extend(self.receive()?.filter(|from| addresses.contains(from)));
            }
        }
        Ok(())
    }

    fn request(&self, sequence: u16) -> [u8; HEADER] {
        let kind = match self.family {
            Family::Ipv4 => 8,
            Family::Ipv6 => 128,
        };
        let mut message = [0; HEADER];
        message[0] = kind;
        message[4..6].copy_from_slice(&identifier().to_be_bytes());
        message[6..8].copy_from_slice(&sequence.to_be_bytes());
        // The kernel fills it in for IPv6 and for datagram sockets.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    }

    /// Who answered; none when nothing came in time, or something else did.
    fn receive(&self) -> Result<Option<IpAddr>, Error> {
        let mut buffer = [0; 256];
        match self.socket.recv_from(&mut buffer) {
            Ok((length, from)) => Ok(self.is_answer(&buffer[..length]).then_some(from.ip())),
            // An ICMP error that came back, for example that a host cannot be reached, is no answer.
            Err(error) if error.kind() != ErrorKind::InvalidInput => Ok(None),
            Err(source) => Err(failed("read from", source)),
        }
    }

    fn is_answer(&self, bytes: &[u8]) -> bool {
        let message = match (self.raw, self.family, bytes) {
            (true, Family::Ipv4, [first, ..]) => bytes.get(usize::from(first & 0xf) * 4..).unwrap_or_default(),
            _ => bytes,
        };
        let kind = match self.family {
            Family::Ipv4 => 0,
            Family::Ipv6 => 129,
        };
        match message {
            [told, 0, _, _, high, low, _, _, ..] if *told == kind => {
                // The kernel chooses another identifier for a datagram socket, and passes on no others.
                !self.raw || u16::from_be_bytes([*high, *low]) == identifier()
            }
            _ => false,
        }
    }
}

/// Distinguishes the answers to this process.
fn identifier() -> u16 {
    let [.., high, low] = std::process::id().to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// The Internet checksum (RFC 1071) of a message of even length.
fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(folded & 0xffff).unwrap_or_default()
}

fn failed(operation: &'static str, source: io::Error) -> Error {
    Error::Socket { operation, protocol: "ICMP", source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Netns;

    #[test]
    fn the_own_addresses_answer_and_others_do_not() {
        let netns = Netns::new_unnamed().unwrap();
        let up = || std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success();
        assert!(netns.run_in(up).unwrap());
        let own: BTreeSet<IpAddr> = ["127.0.0.1", "127.0.0.9", "::1"].map(|it| it.parse().unwrap()).into();
        let strangers: BTreeSet<IpAddr> = ["192.0.2.1", "2001:db8::1"].map(|it| it.parse().unwrap()).into();
        let all = own.union(&strangers).copied().collect();
        assert_eq!(netns.run_in(|| answering(&all)).unwrap().unwrap(), own, "with a raw socket");
        netns.run_in(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")).unwrap().unwrap();
        assert_eq!(netns.run_in(|| answering(&all)).unwrap().unwrap(), own, "with a datagram socket");
    }

    #[test]
    fn a_checksum_makes_the_sum_of_all_words_come_out_even() {
        assert_eq!(checksum(&[8, 0, 0, 0, 0x12, 0x34, 0, 1]), !(0x0800 + 0x1234 + 1));
        assert_eq!(checksum(&[0xff, 0xff, 0x00, 0x02]), !2);
    }
}
