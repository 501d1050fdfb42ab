//! News that something changed in the kernel, without saying what: a reason to look.
//!
//! The kernel announces changes to multicast groups (rtnetlink(7), include/uapi/linux/rtnetlink.h `enum rtnetlink_groups`,
//! include/uapi/linux/netfilter/nfnetlink.h `enum nfnetlink_groups`, include/uapi/linux/xfrm.h `enum xfrm_nlgroups`). What
//! is announced is thrown away: a pass reads the tables anyway, and news that were lost for want of buffer space (`ENOBUFS`)
//! are news as well.
//!
//! Only what happens without anybody changing anything is no news: that neighbours of the underlay are resolved, go stale and
//! are looked for again, many times a second on a busy host, and that the kernel clones a route to remember a path MTU. A
//! neighbour counts if it is permanent or carries our protocol number: the kernel announces the end of a permanent neighbour
//! as that of one in state `NUD_FAILED` (net/core/neighbour.c `neigh_delete`), which the many others are, too.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use husk_overlay::marks;
use netlink_packet_core::NlasIterator;
use zeroize::Zeroizing;

use crate::error::Error;
use crate::netlink::{Frame, Protocol, frames};
use crate::xfrm;

const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV4_RULE: u32 = 8;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
/// What router advertisements say, the MTU among it. Who writes the parameter `mtu` of an interface is not announced.
const RTNLGRP_IPV6_IFINFO: u32 = 12;
const RTNLGRP_IPV6_RULE: u32 = 19;
/// Kernel parameters of interfaces and of all, forwarding among them.
const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
const NFNLGRP_NFTABLES: u32 = 7;
/// Without `XFRMNLGRP_ACQUIRE`: as long as nobody listens to that, the kernel does not wait for somebody to negotiate an
/// association that is missing (net/xfrm/xfrm_state.c `xfrm_state_find`).
const XFRMNLGRP_EXPIRE: u32 = 2;
const XFRMNLGRP_SA: u32 = 3;
const XFRMNLGRP_POLICY: u32 = 4;

/// Bound on the datagrams taken in one go. A receive buffer holds a few hundred: only a flood faster than this loop reaches
/// it.
const MOST_AT_ONCE: usize = 1 << 16;

/// Bytes of a datagram that are looked at. News about routes and neighbours take a few hundred; what is cut off counts.
const LOOKED_AT: usize = 4096;

/// Types of rtnetlink messages (include/uapi/linux/rtnetlink.h).
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
/// The kernel asks user space to resolve a neighbour.
const RTM_GETNEIGH: u16 = 30;

/// Where `struct ndmsg` has `ndm_state` (include/uapi/linux/neighbour.h), and its length.
const NDM_STATE: usize = 8;
const NDM_LENGTH: usize = 12;
const NUD_PERMANENT: u16 = 0x80;
const NDA_PROTOCOL: u16 = 12;

/// Where `struct rtmsg` has `rtm_flags`.
const RTM_FLAGS: usize = 8;
const RTM_F_CLONED: u32 = 0x200;

/// What to be told about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Links, addresses, routes, rules, neighbours, forwarding, and what routers advertise.
    Network,
    /// nftables rules.
    Nftables,
    /// IPsec associations and policies. Listening makes the kernel load what it has of IPsec; a kernel that has none of it
    /// is not worth a warning: see [`Monitor::open`].
    Ipsec,
}

/// A socket that becomes readable when something may have changed in its network namespace; [`Monitor::drain`] tells whether
/// it did. It does not block: wrap it in a poller.
#[derive(Debug)]
pub struct Monitor {
    subject: Subject,
    socket: netlink_sys::Socket,
}

impl Monitor {
    /// Subscribes in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`]; [`Error::Unsupported`] for IPsec in a kernel that has none.
    pub fn open(subject: Subject) -> Result<Self, Error> {
        let (protocol, groups): (_, &[u32]) = match subject {
            Subject::Network => (
                Protocol::Route,
                &[
                    RTNLGRP_LINK,
                    RTNLGRP_NEIGH,
                    RTNLGRP_IPV4_IFADDR,
                    RTNLGRP_IPV4_ROUTE,
                    RTNLGRP_IPV4_RULE,
                    RTNLGRP_IPV6_IFADDR,
                    RTNLGRP_IPV6_ROUTE,
                    RTNLGRP_IPV6_IFINFO,
                    RTNLGRP_IPV6_RULE,
                    RTNLGRP_IPV4_NETCONF,
                    RTNLGRP_IPV6_NETCONF,
                ],
            ),
            Subject::Nftables => (Protocol::Netfilter, &[NFNLGRP_NFTABLES]),
            Subject::Ipsec => (Protocol::Xfrm, &[XFRMNLGRP_EXPIRE, XFRMNLGRP_SA, XFRMNLGRP_POLICY]),
        };
        let failed = |operation| move |source| Error::Socket { operation, protocol: protocol.name(), source };
        let opened = netlink_sys::Socket::new(protocol.number()).map_err(failed("open"));
        let mut socket =
            opened.map_err(|error| if subject == Subject::Ipsec { xfrm::explain(error) } else { error })?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.set_non_blocking(true).map_err(failed("set O_NONBLOCK on"))?;
        for group in groups {
            socket.add_membership(*group).map_err(failed("subscribe to events of"))?;
        }
        Ok(Self { subject, socket })
    }

    /// Takes the announcements that wait; true if there was news among them. Costs no memory, whatever their number.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn drain(&self) -> io::Result<bool> {
        let mut news = false;
        // News about an association hold its key.
        let mut buffer = Zeroizing::new([0_u8; LOOKED_AT]);
        for _ in 0..MOST_AT_ONCE {
            // Without MSG_TRUNC the rest of a datagram that does not fit is thrown away.
            match self.socket.recv(&mut buffer.as_mut_slice(), 0) {
                Ok(length) => news = news || self.subject != Subject::Network || is_news(&buffer[..length]),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => news = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(news)
    }
}

/// True unless a datagram of rtnetlink says nothing but what happens all the time.
fn is_news(datagram: &[u8]) -> bool {
    frames(datagram).any(|frame| frame.map_or(true, |frame| is_change(&frame)))
}

/// What cannot be understood counts.
fn is_change(frame: &Frame<'_>) -> bool {
    let flags = || frame.payload.get(RTM_FLAGS..RTM_FLAGS + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let state = || frame.payload.get(NDM_STATE..NDM_STATE + 2)?.try_into().ok().map(u16::from_ne_bytes);
    match frame.kind {
        RTM_NEWROUTE | RTM_DELROUTE => flags().is_none_or(|flags| flags & RTM_F_CLONED == 0),
        RTM_NEWNEIGH | RTM_DELNEIGH => state().is_none_or(|state| state & NUD_PERMANENT != 0) || is_ours(frame.payload),
        RTM_GETNEIGH => false,
        _ => true,
    }
}

/// True for a neighbour that carries our protocol number, whatever has become of it.
fn is_ours(neighbour: &[u8]) -> bool {
    let attributes = NlasIterator::new(neighbour.get(NDM_LENGTH..).unwrap_or_default());
    let mut known = attributes.map_while(Result::ok);
    known.any(|attribute| attribute.kind() == NDA_PROTOCOL && attribute.value() == [marks::ROUTE_PROTOCOL])
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], payload].concat()
    }

    fn route(kind: u16, flags: u32) -> Vec<u8> {
        message(kind, &[&[10, 128, 0, 0, 254, 2, 0, 1][..], &flags.to_ne_bytes()].concat())
    }

    fn neighbour(kind: u16, state: u16, protocol: Option<u8>) -> Vec<u8> {
        let mut payload = [&[2, 0, 0, 0, 3, 0, 0, 0][..], &state.to_ne_bytes(), &[0, 1]].concat();
        if let Some(protocol) = protocol {
            payload.extend(5_u16.to_ne_bytes());
            payload.extend(NDA_PROTOCOL.to_ne_bytes());
            payload.extend([protocol, 0, 0, 0]);
        }
        message(kind, &payload)
    }

    #[test]
    fn what_happens_all_the_time_is_no_news() {
        let (reachable, failed) = (0x02, 0x20);
        for kind in [RTM_NEWROUTE, RTM_DELROUTE] {
            assert!(is_news(&route(kind, 0)));
            assert!(!is_news(&route(kind, RTM_F_CLONED)), "a path MTU is no change");
        }
        for kind in [RTM_NEWNEIGH, RTM_DELNEIGH] {
            assert!(is_news(&neighbour(kind, NUD_PERMANENT, None)));
            assert!(!is_news(&neighbour(kind, reachable, None)));
            assert!(!is_news(&neighbour(kind, failed, Some(marks::ROUTE_PROTOCOL + 1))));
            assert!(
                is_news(&neighbour(kind, failed, Some(marks::ROUTE_PROTOCOL))),
                "ours that went or is no longer permanent"
            );
        }
        assert!(!is_news(&neighbour(RTM_GETNEIGH, 0, None)));
        let both = [neighbour(RTM_NEWNEIGH, reachable, None), route(RTM_NEWROUTE, 0)].concat();
        assert!(is_news(&both), "one of several suffices");
    }

    proptest! {
        #[test]
        fn what_cannot_be_understood_counts(datagram in proptest::collection::vec(any::<u8>(), 1..16)) {
            prop_assert!(is_news(&datagram));
        }

        #[test]
        fn garbage_never_panics(kind in 20..40_u16, payload in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = is_news(&message(kind, &payload));
        }
    }
}
