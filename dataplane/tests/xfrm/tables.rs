//! The two tables and the interface, read and changed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use husk_dataplane::Sweep;
use husk_dataplane::error::Error;
use husk_dataplane::events::{Monitor, Subject};
use husk_dataplane::kernel::{Change, Kernel as _, Table};
use husk_dataplane::links::LinkChange;
use husk_dataplane::netns::Netns;
use husk_dataplane::reconcile::reconcile;
use husk_dataplane::wireguard::KeyRing;
use husk_dataplane::xfrm::{self, Needs, Xfrm, XfrmPolicyChange};
use husk_overlay::esp::Aead;
use husk_overlay::kernel::{Desired, Link, LinkKind, XfrmAction, XfrmDirection};
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::prefix::Family;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bed::{
    Node, Protection, differences, everything, in_a_namespace, ip, is_full, linux, name, nodes, pass, read, settle,
    transport, tunnel, with_esp,
};

/// Two modes, two families, two ciphers, with and without UDP.
fn protections() -> Vec<(Family, Protection)> {
    let mut all = Vec::new();
    for family in Family::ALL {
        for mode in [EspMode::Tunnel, EspMode::Transport] {
            for cipher in Aead::ALL {
                for udp in [None, Some((4500, 4501))] {
                    all.push((family, Protection { mode, cipher, udp, epoch: 1 }));
                }
            }
        }
    }
    all
}

fn only_policies(protection: Protection, family: Family) -> Desired {
    let (a, b) = nodes(family);
    let mut desired = Desired::default();
    protection.add_policies(&mut desired, &a, &b, 4711);
    desired
}

#[test]
fn policies_are_read_back() {
    in_a_namespace(|linux| {
        for (family, protection) in protections() {
            let desired = only_policies(protection, family);
            settle(linux, &desired, &KeyRing::default());
            assert_eq!(pass(linux, &desired, &KeyRing::default()).changes(), 0, "{family} {protection:?}");
        }
        settle(linux, &Desired::default(), &KeyRing::default());
        assert_eq!(ip("xfrm policy"), "");
    });
}

#[test]
fn another_spi_is_one_message_and_there_is_never_no_policy() {
    in_a_namespace(|linux| {
        let mut desired = only_policies(tunnel(1), Family::Ipv4);
        settle(linux, &desired, &KeyRing::default());
        let out = |desired: &mut Desired, spi| {
            for (key, policy) in &mut desired.xfrm_policies {
                if let (XfrmDirection::Out, XfrmAction::Protect(template)) = (key.direction, &mut policy.action)
                    && key.destination.family() == Family::Ipv4
                {
                    template.spi = Some(spi);
                }
            }
        };
        out(&mut desired, 4712);
        let changes = differences(linux, &desired);
        assert!(matches!(changes.as_slice(), [Change::XfrmPolicy(XfrmPolicyChange::Replace { .. })]), "{changes:?}");
        // What the kernel announces: an update, no removal and no new one.
        let mut news = xfrm_monitor();
        settle(linux, &desired, &KeyRing::default());
        assert_eq!(kinds(&mut news), [0x19]);
    });
}

/// A socket that hears what happens to policies.
fn xfrm_monitor() -> netlink_sys::Socket {
    let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_XFRM).unwrap();
    socket.bind_auto().unwrap();
    socket.add_membership(4).unwrap();
    socket.set_non_blocking(true).unwrap();
    socket
}

/// Types of the messages that wait.
fn kinds(socket: &mut netlink_sys::Socket) -> Vec<u16> {
    let mut buffer = [0_u8; 4096];
    let mut kinds = Vec::new();
    while socket.recv(&mut buffer.as_mut_slice(), 0).is_ok() {
        kinds.push(u16::from_ne_bytes([buffer[4], buffer[5]]));
    }
    kinds
}

#[test]
fn what_others_have_is_left_alone() {
    in_a_namespace(|linux| {
        let theirs = "dir out src 10.9.0.0/16 dst 10.8.0.0/16";
        ip(&format!("xfrm policy add {theirs} tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 mode tunnel"));
        ip("xfrm policy add dir out src 10.9.0.0/16 dst 10.7.0.0/16 action block");
        let before = ip("xfrm policy");
        settle(linux, &only_policies(tunnel(1), Family::Ipv4), &KeyRing::default());
        settle(linux, &Desired::default(), &KeyRing::default());
        assert_eq!(ip("xfrm policy"), before);
        // A stranger's policy for the very packets of ours.
        ip("xfrm policy add dir out src 192.168.7.1/32 dst 192.168.7.2/32 proto udp dport 4789 priority 5 \
            tmpl src 192.168.7.1 dst 192.168.7.2 proto esp reqid 7 mode transport");
        let before = ip("xfrm policy list src 192.168.7.1/32");
        let desired = only_policies(transport(1), Family::Ipv4);
        let outcome = reconcile(linux, &desired, &KeyRing::default(), Sweep::Allowed);
        let told: Vec<_> = outcome.failures.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("the out policy from 192.168.7.1/32 to 192.168.7.2/32 UDP port 4789"), "{told:?}");
        assert_eq!(outcome.failures[0].error.errno(), Some(Errno::EEXIST));
        assert_eq!(ip("xfrm policy list src 192.168.7.1/32"), before);
    });
}

#[test]
fn a_policy_that_was_tampered_with_is_mended_in_one_step() {
    in_a_namespace(|linux| {
        let desired = only_policies(tunnel(1), Family::Ipv4);
        settle(linux, &desired, &KeyRing::default());
        ip("xfrm policy update dir in src 10.42.2.0/24 dst 0.0.0.0/0 if_id 0x6875736b priority 100 \
            tmpl src 192.168.7.2 dst 192.168.7.1 proto esp reqid 0x6875736b mode tunnel level use");
        let changes = differences(linux, &desired);
        assert!(matches!(changes.as_slice(), [Change::XfrmPolicy(XfrmPolicyChange::Replace { .. })]), "{changes:?}");
        settle(linux, &desired, &KeyRing::default());
    });
}

#[test]
fn events_wake_when_a_policy_goes() {
    in_a_namespace(|linux| {
        settle(linux, &only_policies(tunnel(1), Family::Ipv4), &KeyRing::default());
        let monitor = Monitor::open(Subject::Ipsec).unwrap();
        assert!(!monitor.drain().unwrap());
        ip("xfrm policy flush");
        let mut ready = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::from(10_000_u16)).unwrap(), 1);
        assert!(monitor.drain().unwrap());
        assert!(!monitor.drain().unwrap());
    });
}

#[test]
fn support_is_told_by_what_is_missing() {
    match xfrm::support(&everything()) {
        Ok(()) => {
            for (family, protection) in protections() {
                let Protection { mode, cipher, udp, .. } = protection;
                let needs = Needs { families: [family].into(), cipher, mode, udp: udp.is_some() };
                xfrm::support(&needs).unwrap();
            }
        }
        Err(error) => {
            assert!(!is_full(), "{error}");
            assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.starts_with("cannot find the kernel's IPsec: it has no "), "{text}");
            assert!(text.contains("xfrm interfaces (xfrm_interface)"), "{text}");
            assert!(error.remedy().contains("xfrm_interface") && error.remedy().contains("CONFIG_INET_ESP"));
            // Transport mode does without the interface.
            let needs = Needs { mode: EspMode::Transport, ..everything() };
            let text = xfrm::support(&needs).unwrap_err().to_string();
            assert!(!text.contains("interface"), "{text}");
        }
    }
}

#[test]
fn without_privilege_there_is_no_answer_rather_than_a_no() {
    // A user namespace of its own has no privilege over the network namespace it was made in, and may make none inside a
    // thread that lost its capabilities.
    let answer = std::thread::spawn(|| {
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
        drop_capabilities();
        xfrm::support(&everything())
    });
    let error = answer.join().unwrap().unwrap_err();
    assert!(!matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert_eq!(error.errno(), Some(Errno::EPERM), "{error}");
}

/// Drops the effective and permitted capabilities of the calling thread.
#[allow(unsafe_code)]
fn drop_capabilities() {
    #[repr(C)]
    struct Header(u32, i32);
    // Version 3 (include/uapi/linux/capability.h), the calling thread, two words of three sets.
    let (header, data) = (Header(0x2008_0522, 0), [0_u32; 6]);
    // SAFETY: both point to structures of the layout that version 3 has, and the kernel only reads them.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const data) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn statistics_have_the_kernels_names() {
    in_a_namespace(|_| {
        let all = xfrm::statistics();
        assert!(
            all.is_empty() || all.get("XfrmInNoPols") == Some(&0) && all.get("XfrmOutPolBlock") == Some(&0),
            "{all:?}"
        );
        assert!(!is_full() || !all.is_empty());
    });
}

#[test]
fn encapsulation_sockets_are_had_for_both_families_and_a_taken_port_is_told() {
    in_a_namespace(|_| {
        let local = |text: &str| text.parse::<SocketAddr>().unwrap();
        let socket = xfrm::encapsulation_socket(local("0.0.0.0:4500")).unwrap();
        assert_eq!(socket.local_addr().unwrap().port(), 4500);
        let _six = xfrm::encapsulation_socket(local("[::]:4500")).unwrap();
        let error = xfrm::encapsulation_socket(local("127.0.0.1:4500")).unwrap_err();
        assert_eq!(error.to_string(), "cannot bind a UDP socket: Address already in use (os error 98)");
    });
}

#[test]
fn associations_are_read_back() {
    with_esp(|linux| {
        for (family, protection) in protections() {
            let (a, b) = nodes(family);
            let mut desired = Desired::default();
            protection.add(&mut desired, &a, &b);
            settle(linux, &desired, &a.keys());
            assert_eq!(pass(linux, &desired, &a.keys()).changes(), 0, "{family} {protection:?}");
            settle(linux, &Desired::default(), &a.keys());
        }
        assert_eq!(ip("xfrm state"), "");
    });
}

#[test]
fn both_ends_derive_the_same_key() {
    with_esp(|linux| {
        let (a, b) = nodes(Family::Ipv4);
        let mut shown = Vec::new();
        for (own, peer) in [(&a, &b), (&b, &a)] {
            let mut desired = Desired::default();
            tunnel(1).add(&mut desired, own, peer);
            settle(linux, &desired, &own.keys());
            let text = ip("xfrm state");
            let mut keys: Vec<_> = text.lines().filter(|line| line.contains("aead")).map(str::to_owned).collect();
            keys.sort();
            assert_eq!(keys.len(), 2);
            assert_ne!(keys[0], keys[1], "one for each direction");
            shown.push(keys);
            settle(linux, &Desired::default(), &own.keys());
        }
        assert_eq!(shown[0], shown[1]);
    });
}

#[test]
fn an_association_under_our_request_id_that_is_not_ours_goes_and_a_strangers_stays() {
    with_esp(|linux| {
        let add = |spi: u32, reqid: u32, more: &str| {
            ip(&format!(
                "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi {spi} reqid {reqid} mode tunnel \
                 aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128 {more}"
            ));
        };
        add(300, 7, "");
        let theirs = ip("xfrm state");
        add(301, marks::XFRM_REQID, "");
        let found = read(linux, &Desired::default()).xfrm_states;
        assert_eq!(found.len(), 1);
        assert!(found.values().all(|found| found.parameters.is_none()));
        settle(linux, &Desired::default(), &KeyRing::default());
        assert_eq!(ip("xfrm state"), theirs);
    });
}

#[test]
fn the_interface_is_read_back_and_made_anew_for_another_id() {
    with_esp(|linux| {
        let link = |mtu, if_id| Link { kind: LinkKind::Xfrm { if_id }, mtu, mac: None, threaded_napi: false };
        let desired = |mtu, if_id| Desired {
            links: [(name(marks::XFRM_INTERFACE), link(mtu, if_id))].into(),
            ..Desired::default()
        };
        settle(linux, &desired(1400, marks::XFRM_IF_ID), &KeyRing::default());
        let shown = ip("-d link show dev husk-ipsec");
        assert!(shown.contains("UP") && shown.contains("if_id 0x6875736b"), "{shown}");
        assert_eq!(ip("-6 address show dev husk-ipsec"), "", "no link-local address");
        let found = read(linux, &Desired::default()).links;
        assert_eq!(found.len(), 1);
        let changes = differences(linux, &desired(1300, marks::XFRM_IF_ID));
        assert!(matches!(changes.as_slice(), [Change::Link(LinkChange::Tune { .. })]), "{changes:?}");
        settle(linux, &desired(1300, marks::XFRM_IF_ID), &KeyRing::default());
        let changes = differences(linux, &desired(1300, 7));
        assert!(matches!(changes.as_slice(), [Change::Link(LinkChange::Recreate { .. })]), "{changes:?}");
        settle(linux, &desired(1300, 7), &KeyRing::default());
        settle(linux, &Desired::default(), &KeyRing::default());
    });
}

/// A thousand peers of which each has four associations and three policies.
#[test]
fn thousands_are_installed_read_and_removed_in_a_bounded_time() {
    with_esp(|linux| {
        let (own, _) = nodes(Family::Ipv4);
        let mut desired = Desired::default();
        for number in 0..1000_u16 {
            let [high, low] = number.to_be_bytes();
            let peer = Node { number: 2, address: [172, 16, high, low].into() };
            for epoch in [1, 2] {
                let protection = tunnel(epoch);
                desired.xfrm_states.extend([protection.state(&own, &peer), protection.state(&peer, &own)]);
            }
            let mut policies = Desired::default();
            transport(1).add_policies(&mut policies, &own, &peer, 4711);
            desired.xfrm_policies.append(&mut policies.xfrm_policies);
        }
        let mut times = BTreeMap::new();
        let mut timed = |what: &'static str, body: &mut dyn FnMut()| {
            let start = Instant::now();
            body();
            times.insert(what, start.elapsed());
        };
        let keys = own.keys();
        timed("install", &mut || drop(pass(linux, &desired, &keys)));
        timed("read", &mut || drop(read(linux, &desired)));
        timed("nothing to do", &mut || assert_eq!(pass(linux, &desired, &keys).changes(), 0));
        timed("remove", &mut || drop(pass(linux, &Desired::default(), &keys)));
        eprintln!("{} associations, {} policies: {times:?}", desired.xfrm_states.len(), desired.xfrm_policies.len());
        assert!(times["read"] < Duration::from_secs(10), "{times:?}");
        assert_eq!(read(linux, &Desired::default()).xfrm_states, BTreeMap::new());
    });
}

/// Twenty thousand policies, which every kernel here can hold.
#[test]
fn a_long_dump_is_read_whole() {
    in_a_namespace(|linux| {
        let mut desired = Desired::default();
        for number in 0..10_000_u16 {
            let [high, low] = number.to_be_bytes();
            let mut policies = Desired::default();
            let (own, _) = nodes(Family::Ipv4);
            let peer = Node { number: 2, address: [172, 16, high, low].into() };
            transport(1).add_policies(&mut policies, &own, &peer, 4711);
            desired.xfrm_policies.append(&mut policies.xfrm_policies);
        }
        assert_eq!(desired.xfrm_policies.len(), 20_002);
        settle(linux, &desired, &KeyRing::default());
        let start = Instant::now();
        read(linux, &desired);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    });
}

#[test]
fn a_kernel_without_the_protocol_at_hand_is_not_made_to_load_it() {
    // A thread of its own namespace in which nobody asked for the protocol yet; where it is built in, it is at hand always.
    let namespace = Netns::new_unnamed().unwrap();
    namespace
        .run_in(|| {
            let before = xfrm::is_present();
            let mut actual = husk_dataplane::kernel::Actual::default();
            for table in [Table::XfrmStates, Table::XfrmPolicies] {
                linux().read(table, &Desired::default(), &mut actual).unwrap();
            }
            assert_eq!(xfrm::is_present(), before);
            Xfrm::open().unwrap();
            assert!(xfrm::is_present());
        })
        .unwrap();
}
