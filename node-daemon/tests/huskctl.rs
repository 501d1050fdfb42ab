//! The command `huskctl` against a daemon that gives canned answers.

// clippy.toml allows this in test functions; what they call belongs to the test as well.
#![allow(clippy::unwrap_used)]

mod canned;

use std::os::unix::net::UnixListener;
use std::time::Duration;

use husk_node_daemon::keys::Technology;
use husk_node_daemon::report::{
    AssociationReport, BlockReport, Counter, DiffReport, Direction, EpochReport, IpamReport, KeysReport, KeysSummary,
    LastPass, MismatchKind, MtuMismatch, MtuOrigin, MtuReport, MtuSource, PathReport, PeerKeysReport, PeerReport,
    PeerState, PoolReport, ProbeStarted, RotationDue, RotationReport, Status, WhatIfReport,
};
use husk_overlay::endpoint::{AttachmentId, Endpoint, NetnsIdentity};
use husk_overlay::esp::Aead;
use husk_overlay::ipc::{Request, Response, SOCKET_FILE};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::keys::PrivateKey;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::{Stack, ledger};
use husk_overlay::name::{ContainerId, InterfaceName, NetworkName, NodeName};
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::probe::{Path, Report, Standing};
use husk_overlay::record::{DualStack, Pool};
use serde::Serialize;
use serde_json::json;

use canned::{huskctl, run, run_against, run_along, words};

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn dual(four: &str, six: &str) -> DualStack {
    DualStack { ipv4: Some(four.parse().unwrap()), ipv6: Some(six.parse().unwrap()) }
}

fn status() -> Status {
    Status {
        node: NodeName::new("alpha").unwrap(),
        version: "9.9.9".into(),
        mode: Mode::Wireguard,
        encrypted: true,
        wireguard_device: Some("userspace".into()),
        cipher: None,
        udp_encapsulation: None,
        keys: Some(KeysSummary { newest: Some(4), age: Some(7200), rotating: false }),
        ready: true,
        reason: None,
        addresses: dual("192.0.2.1", "2001:db8::1"),
        underlay_interface: Some(InterfaceName::new("eth0").unwrap()),
        underlay_mtu: 1500,
        pod_mtu: Some(1440),
        blocks: [prefix("10.42.0.0/26"), prefix("fd42::/122")].into(),
        router: dual("10.42.0.0", "fd42::"),
        endpoints: 2,
        peers: (3, 4),
        source: "directory /etc/husk/cluster".into(),
        passes: 17,
        last_pass: LastPass { microseconds: 12_345, changes: 5, failures: 1 },
        counters: [
            ("plaintext_out".to_owned(), Counter { packets: 3, bytes: 2048 }),
            ("spoofed".to_owned(), Counter::default()),
        ]
        .into(),
        xfrm_errors: [].into(),
        issues: Vec::new(),
    }
}

fn issue(severity: Severity) -> Issue {
    Issue {
        severity,
        kind: IssueKind::NoRouteToPeer,
        subject: "beta".into(),
        message: "this host has no route to 192.0.2.2".into(),
        remedy: "check the underlay's routes on this host".into(),
    }
}

fn peer(name: &str, state: PeerState) -> PeerReport {
    PeerReport {
        node: NodeName::new(name).unwrap(),
        state,
        reason: None,
        endpoint: Some("192.0.2.2:51820".into()),
        public_key: Some(PrivateKey::from_random([1; 32]).unwrap().public()),
        handshake_age: Some(75),
        received_age: None,
        received: Some(1536),
        sent: Some(10),
        mtu: Some(1440),
        paths: [].into(),
        router: DualStack::default(),
        blocks: [prefix("10.42.0.64/26")].into(),
    }
}

fn ipam(findings: Vec<String>) -> IpamReport {
    let id = AttachmentId {
        network: NetworkName::new("husk").unwrap(),
        container_id: ContainerId::new("c0ffee").unwrap(),
        ifname: InterfaceName::new("eth0").unwrap(),
    };
    let lease = Endpoint {
        addresses: dual("10.42.0.5", "fd42::5"),
        pod_mac: id.pod_mac(),
        host_interface: id.host_interface(),
        netns: NetnsIdentity { path: "/run/netns/x".into(), device: 4, inode: 1 },
        pod_namespace: Some("default".into()),
        pod_name: Some("web-0".into()),
        pod_uid: None,
        port_mappings: Vec::new(),
        bandwidth: None,
        id,
    };
    let cidr = prefix("10.42.0.0/16");
    IpamReport {
        pools: vec![PoolReport {
            pool: Pool { name: "default-ipv4".into(), cidr, block_length: 26, disabled: false },
            used_blocks: 3,
            total_blocks: 1024,
        }],
        blocks: vec![BlockReport { block: prefix("10.42.0.0/26"), leased: 1, total: 63 }],
        leases: vec![lease],
        findings,
    }
}

fn mtu(underlay: u32) -> MtuReport {
    MtuReport {
        node: NodeName::new("alpha").unwrap(),
        own: true,
        address: Some("192.0.2.1".parse().unwrap()),
        ledger: ledger(&Mode::Wireguard.stack(false), Family::Ipv4, underlay),
        sources: vec![source(eth0(), underlay)],
        probed: None,
        mtu: None,
        mismatches: Vec::new(),
    }
}

fn eth0() -> MtuOrigin {
    MtuOrigin::Interface { interface: InterfaceName::new("eth0").unwrap() }
}

fn source(origin: MtuOrigin, bytes: u32) -> MtuSource {
    MtuSource { origin, bytes }
}

fn mismatch(severity: Severity, kind: MismatchKind) -> MtuMismatch {
    MtuMismatch { severity, kind, message: "these differ".into(), remedy: "make them one".into() }
}

#[test]
fn status_tells_a_person_how_the_node_is() {
    let ran = run(&status(), &["status"]);
    assert_eq!((ran.request, ran.status, ran.errors.as_str()), (Request::Status, 0, ""));
    assert_eq!(
        words(&ran.text),
        [
            "Node: alpha (huskd 9.9.9)",
            "Ready: yes",
            "Mode: wireguard",
            "Encryption: WireGuard (userspace device)",
            "Keys: epoch 4, 2 h old",
            "Underlay: 192.0.2.1, 2001:db8::1 on eth0, MTU 1500",
            "Pod MTU: 1440",
            "Blocks: 10.42.0.0/26, fd42::/122",
            "Router addresses: 10.42.0.0, fd42::",
            "Pods: 2",
            "Peers: 3 of 4 routed",
            "Source: directory /etc/husk/cluster",
            "Last pass: #17 in 12.3 ms, 5 changes, 1 failures",
            "Dropped (plaintext_out): 3 packets, 2.0 KiB",
            "No issues.",
        ]
    );
}

#[test]
fn status_exits_with_1_when_something_is_wrong() {
    let warned = Status { issues: vec![issue(Severity::Warning)], ..status() };
    let ran = run(&warned, &["status"]);
    assert_eq!(ran.status, 0);
    let told = words(&ran.text).split_off(14);
    assert_eq!(
        told,
        [
            "Issues (1):",
            "warning NoRouteToPeer beta: this host has no route to 192.0.2.2",
            "-> check the underlay's routes on this host",
        ]
    );
    let failing = Status { issues: vec![issue(Severity::Error)], ..status() };
    let ran = run(&failing, &["status"]);
    assert_eq!((ran.status, ran.text.contains("  ERROR NoRouteToPeer beta")), (1, true), "{}", ran.text);
    let waiting = Status { ready: false, reason: Some("no blocks".into()), pod_mtu: None, ..status() };
    let ran = run(&waiting, &["status"]);
    assert_eq!(ran.status, 1);
    assert!(words(&ran.text).contains(&"Ready: NO: no blocks".to_owned()));
    assert!(words(&ran.text).contains(&"Pod MTU: -".to_owned()));
    let plain = Status { mode: Mode::Vxlan, encrypted: false, wireguard_device: None, keys: None, ..status() };
    let lines = words(&run(&plain, &["status"]).text);
    assert!(lines.contains(&"Encryption: none".to_owned()) && lines.contains(&"Keys: none".to_owned()));
}

#[test]
fn status_names_the_cipher_and_what_ipsec_did_not_let_through() {
    let ipsec = Status {
        mode: Mode::Ipsec,
        wireguard_device: None,
        cipher: Some(Aead::AesGcm256),
        udp_encapsulation: Some(4500),
        keys: Some(KeysSummary { newest: Some(7), age: Some(60), rotating: true }),
        xfrm_errors: [("XfrmInNoPols".to_owned(), 12)].into(),
        ..status()
    };
    let lines = words(&run(&ipsec, &["status"]).text);
    for line in [
        "Encryption: IPsec (aes-gcm-256, in UDP at port 4500)",
        "Keys: epoch 7, 60 s old, a rotation is under way",
        "IPsec errors (XfrmInNoPols): 12 packets",
    ] {
        assert!(lines.contains(&line.to_owned()), "{line}: {lines:?}");
    }
}

#[test]
fn peers_are_a_row_each() {
    let refused = PeerReport {
        reason: Some("the node publishes no WireGuard key".into()),
        endpoint: None,
        handshake_age: None,
        received: None,
        sent: None,
        mtu: None,
        blocks: [].into(),
        ..peer("gamma", PeerState::Refused)
    };
    let ran = run(&vec![peer("beta", PeerState::Connected), refused], &["peers"]);
    assert_eq!((ran.request, ran.status), (Request::Peers, 1));
    assert_eq!(
        words(&ran.text),
        [
            "PEER STATE ENDPOINT HANDSHAKE RECEIVED SENT MTU RTT LOSS PATH BLOCKS REASON",
            "beta connected 192.0.2.2:51820 75 s 1.5 KiB 10 B 1440 - - - 10.42.0.64/26",
            "gamma REFUSED - - - - - - - - - the node publishes no WireGuard key",
        ]
    );
    assert_eq!(run(&vec![peer("beta", PeerState::Idle)], &["peers"]).status, 0);
    let heard = PeerReport { handshake_age: None, received_age: Some(3), ..peer("beta", PeerState::Connected) };
    let waiting = PeerReport { handshake_age: None, ..peer("gamma", PeerState::Waiting) };
    let lines = words(&run(&vec![heard, waiting], &["peers"]).text);
    assert!(lines[0].contains("ENDPOINT LAST PACKET RECEIVED"), "{lines:?}");
    assert!(lines[1].starts_with("beta connected 192.0.2.2:51820 3 s "), "{lines:?}");
    assert!(lines[2].starts_with("gamma waiting for keys 192.0.2.2:51820 - "), "{lines:?}");
    let alone = run(&Vec::<PeerReport>::new(), &["peers"]);
    assert_eq!((alone.status, alone.text.contains("alone")), (0, true));
}

#[test]
fn the_ledger_adds_up_line_by_line() {
    let ran = run(&vec![mtu(1500)], &["mtu"]);
    assert_eq!((ran.request, ran.status), (Request::Mtu, 0));
    let lines = words(&ran.text);
    assert_eq!(lines[0], "alpha (this node: MTU of its pods)");
    assert_eq!(lines[1], "BYTES LEFT");
    assert_eq!(lines[2], "underlay MTU (eth0) 1500");
    assert_eq!(lines.last().unwrap(), "pod packet 1440");
    let taken: u32 =
        lines.iter().filter_map(|line| line.rsplit_once(" -")).map(|(_, it)| it.parse::<u32>().unwrap()).sum();
    assert_eq!(taken, 60);
    assert_eq!(run(&vec![mtu(40)], &["mtu"]).status, 1);
    // A stack of nothing costs nothing.
    let bare = MtuReport { ledger: ledger(&Stack(vec![]), Family::Ipv6, 1500), own: false, ..mtu(1500) };
    assert_eq!(words(&run(&vec![bare], &["mtu"]).text).first().unwrap(), "to alpha");
}

#[test]
fn the_ledger_tells_who_decides_and_what_does_not_go_together() {
    let limited = MtuReport {
        own: false,
        sources: vec![source(eth0(), 1500), source(MtuOrigin::PeerRecord, 1400)],
        probed: Some(1300),
        mismatches: vec![
            mismatch(Severity::Warning, MismatchKind::UnderlayDiffers),
            mismatch(Severity::Warning, MismatchKind::PathLimited),
        ],
        ..mtu(1400)
    };
    let ran = run(&vec![limited.clone()], &["mtu"]);
    assert_eq!(ran.status, 0, "with lower routes traffic flows");
    let lines = words(&ran.text);
    assert_eq!(lines[2], "underlay MTU (peer's record; eth0 has 1500) 1400");
    let end = lines.len() - 6..;
    assert_eq!(
        lines[end],
        [
            "pod packet 1340",
            "passes the path 1300",
            "warning these differ",
            "-> make them one",
            "warning these differ",
            "-> make them one"
        ]
    );
    let small = MtuReport { mismatches: vec![mismatch(Severity::Error, MismatchKind::TooSmall)], ..limited };
    let ran = run(&vec![small], &["mtu"]);
    assert_eq!((ran.status, ran.text.contains("ERROR these differ")), (1, true), "{}", ran.text);
}

#[test]
fn what_if_needs_no_daemon_and_says_what_is_wrong_with_the_question() {
    let nowhere = std::path::Path::new("/nonexistent");
    let asked = huskctl(nowhere, &["mtu", "--what-if", "mode=vxlan-ipsec,underlay=9001,family=ipv4"]);
    assert_eq!(asked.status.code(), Some(0), "{asked:?}");
    let lines = words(&String::from_utf8(asked.stdout).unwrap());
    let expected = ledger(&Mode::VxlanIpsec.stack(false), Family::Ipv4, 9001).inner.unwrap();
    assert_eq!(lines[0], "vxlan-ipsec over IPv4 (VXLAN in ESP transport AES-GCM)");
    assert_eq!(*lines.last().unwrap(), format!("pod packet {expected}"));

    let small = huskctl(nowhere, &["-o", "json", "mtu", "--what-if", "mode=vxlan,underlay=1345"]);
    assert_eq!(small.status.code(), Some(1));
    let rows: Vec<WhatIfReport> = serde_json::from_slice(&small.stdout).unwrap();
    let refused: Vec<usize> = rows.iter().map(|row| row.refused.len()).collect();
    assert_eq!(refused, [0, 1], "1345 is enough for VXLAN over IPv4, and 5 too little over IPv6");

    let wrong = huskctl(nowhere, &["mtu", "--what-if", "mode=vxlan,mtu=1500"]);
    assert_eq!(wrong.status.code(), Some(2));
    let told = String::from_utf8(wrong.stderr).unwrap();
    assert!(told.contains("\"mtu\" is not known: mode, underlay, family and udp are"), "{told}");
}

fn path(family: Family, standing: Standing, concluded: u64) -> PathReport {
    let passes = match standing {
        Standing::Verified => Some(1440),
        Standing::Limited { passes } => Some(passes),
        _ => None,
    };
    PathReport {
        path: Path { peer: NodeName::new("beta").unwrap(), family },
        report: Report {
            standing,
            promised: 1440,
            passes,
            rtt: Some(Duration::from_micros(1234)),
            loss_per_mille: Some(15),
            clock_skew: None,
            sent: 9,
            answered: 8,
            since: Duration::from_secs(1),
            concluded: Some(Duration::from_secs(concluded)),
        },
    }
}

#[test]
fn peers_tell_what_probing_found() {
    let both = |four: Standing, six: Standing| PeerReport {
        paths: [(Family::Ipv4, path(Family::Ipv4, four, 1).report), (Family::Ipv6, path(Family::Ipv6, six, 1).report)]
            .into(),
        ..peer("beta", PeerState::Connected)
    };
    let limited = Standing::Limited { passes: 1372 };
    for (report, expected) in [
        (peer("beta", PeerState::Connected), "1440 - - - 10.42.0.64/26"),
        (both(Standing::Verified, Standing::Verified), "1440 1.2 ms 1.5 % ok 10.42.0.64/26"),
        (both(limited, limited), "1440 1.2 ms 1.5 % ONLY 1372 of 1440 10.42.0.64/26"),
        (
            both(Standing::Searching { passes: 1280, fails: 1441 }, Standing::Unreachable),
            "1440 1.2 ms 1.5 % IPv4 SEARCHING 1280 to 1440, IPv6 NO ANSWER 10.42.0.64/26",
        ),
    ] {
        let ran = run(&vec![report], &["peers"]);
        let line = words(&ran.text)[1].clone();
        assert!(line.ends_with(expected), "{line}");
    }
}

#[test]
fn a_probe_is_followed_until_it_is_known_what_passes() {
    let begun = ProbeStarted { peer: NodeName::new("beta").unwrap(), begun: Duration::from_secs(100) };
    let answers = |states: &[[PathReport; 2]]| {
        let begun = serde_json::to_value(&begun).unwrap();
        let state = |paths: &[PathReport; 2]| serde_json::to_value(paths).unwrap();
        [begun].into_iter().chain(states.iter().map(state)).collect::<Vec<_>>()
    };
    let both = |standing, concluded| Family::ALL.map(|family| path(family, standing, concluded));
    let (well, searching) = (Standing::Verified, Standing::Searching { passes: 1280, fails: 1441 });
    // What was known before somebody asked is no answer.
    let ran = run_along(answers(&[both(well, 99), both(well, 101)]), &["mtu", "probe", "beta"]);
    assert_eq!((ran.status, words(&ran.text)[1].as_str()), (0, "IPv4 1440 1440 1.2 ms 1.5 % ok"), "{}", ran.errors);
    assert_eq!(ran.errors, "IPv4: trying 1440 bytes; IPv6: trying 1440 bytes\n");

    let limited = Standing::Limited { passes: 1372 };
    let ran =
        run_along(answers(&[both(searching, 99), both(limited, 130)]), &["--output", "json", "mtu", "probe", "beta"]);
    assert_eq!(ran.status, 1);
    assert!(ran.errors.starts_with("IPv4: 1280 bytes pass, 1441 do not, 160 sizes are open; IPv6:"), "{}", ran.errors);
    let printed: serde_json::Value = serde_json::from_str(&ran.text).unwrap();
    assert_eq!((&printed["finished"], &printed["peer"]), (&true.into(), &"beta".into()));
    assert_eq!(printed["paths"].as_array().unwrap().len(), 2);
    assert_eq!(printed["paths"][0]["standing"]["passes"], 1372);

    // The number to set is that of the peer's ledger.
    let row = MtuReport { node: NodeName::new("beta").unwrap(), own: false, ..mtu(1500) };
    let rows = serde_json::to_value([mtu(1500), row]).unwrap();
    let ran = run_along([answers(&[both(limited, 130)]), vec![rows]].concat(), &["mtu", "probe", "beta"]);
    assert_eq!((ran.status, ran.text.contains("or set underlay.mtu to 1432 on the node")), (1, true), "{}", ran.text);

    let ran = run_along(answers(&[both(Standing::Unreachable, 101)]), &["mtu", "probe", "beta"]);
    assert_eq!((ran.status, ran.text.contains("is huskd running on beta")), (1, true), "{}", ran.text);
    let ran = run_along(answers(&[both(searching, 99)]), &["mtu", "probe", "beta", "--timeout", "1"]);
    assert_eq!((ran.status, ran.text.contains("Not finished within 1 s")), (1, true), "{}", ran.text);
    let refused = run_against(Response::Refused { reason: "no such node".into() }, &["mtu", "probe", "delta"]);
    assert_eq!((refused.status, refused.request), (3, Request::ProbePeer { peer: "delta".into() }));
}

#[test]
fn diff_exits_with_1_exactly_when_something_would_change() {
    let ran = run(&DiffReport { changes: vec![] }, &["diff"]);
    assert_eq!((ran.request, ran.status), (Request::Diff, 0));
    assert_eq!(ran.text, "Nothing: the kernel is as it should be.\n");
    let ran = run(&DiffReport { changes: vec!["add a".into(), "remove b".into()] }, &["diff"]);
    assert_eq!((ran.status, ran.text.as_str()), (1, "add a\nremove b\n"));
}

#[test]
fn ipam_shows_pools_blocks_and_leases_and_checks_them() {
    let ran = run(&ipam(vec!["wrong".into()]), &["ipam", "show"]);
    assert_eq!((ran.request, ran.status), (Request::Ipam, 0));
    let lines = words(&ran.text);
    assert_eq!(
        lines[..4],
        [
            "POOL CIDR BLOCK BLOCKS USED",
            "default-ipv4 10.42.0.0/16 /26 3 of 1024",
            "OWN BLOCK LEASED ADDRESSES",
            "10.42.0.0/26 1 63"
        ]
    );
    assert!(
        lines[5].starts_with("default/web-0 10.42.0.5, fd42::5 husk") && lines[5].ends_with(" c0ffee"),
        "{lines:?}"
    );
    let ran = run(&ipam(vec!["wrong".into()]), &["ipam", "check"]);
    assert_eq!((ran.status, ran.text.as_str()), (1, "wrong\n"));
    let ran = run(&ipam(vec![]), &["ipam", "check"]);
    assert_eq!((ran.status, ran.text.as_str()), (0, "Leases, blocks and interfaces agree.\n"));
}

fn epoch(number: u64, unconfirmed: &[&str]) -> EpochReport {
    EpochReport {
        epoch: number,
        public_key: PrivateKey::from_random([1; 32]).unwrap().public(),
        age: 90,
        published: true,
        confirmed: [NodeName::new("beta").unwrap()].into(),
        unconfirmed: unconfirmed.iter().map(|name| NodeName::new(name).unwrap()).collect(),
    }
}

fn keys(epochs: Vec<EpochReport>) -> KeysReport {
    let peer = PeerKeysReport {
        node: NodeName::new("beta").unwrap(),
        published: vec![2],
        sending_own: Some(1),
        sending_peer: Some(2),
        confirmed: None,
        refused: None,
    };
    let association = AssociationReport {
        peer: Some(peer.node.clone()),
        direction: Direction::In,
        spi: 0xabcd,
        source: "192.0.2.2".parse().unwrap(),
        destination: "192.0.2.1".parse().unwrap(),
        own_epoch: Some(1),
        peer_epoch: Some(2),
        packets: 5,
        bytes: 1536,
        quiet: 7,
    };
    KeysReport {
        mode: Mode::Ipsec,
        technology: Technology::Esp,
        cipher: Some(Aead::AesGcm128),
        settled: epochs.len() == 1,
        epochs,
        requested: false,
        waiting: None,
        due: Some(RotationDue { earliest: 43_200, latest: 86_400 }),
        peers: vec![peer],
        associations: vec![association],
    }
}

#[test]
fn keys_are_shown_with_who_uses_them() {
    let ran = run(&keys(vec![epoch(1, &[]), epoch(2, &["gamma", "delta"])]), &["keys", "status"]);
    assert_eq!((ran.request, ran.status), (Request::Keys, 0));
    let lines = words(&ran.text);
    assert_eq!(
        lines[0],
        "Mode ipsec, IPsec (aes-gcm-128). The newest key will be replaced in 12 h to 24 h, or once it has protected as much as it may. A rotation is under way."
    );
    assert_eq!(lines[1], "EPOCH AGE PUBLISHED CONFIRMED BY WAITING FOR PUBLIC KEY");
    assert!(lines[2].starts_with("1 90 s yes beta - "), "{lines:?}");
    assert!(lines[3].starts_with("2 90 s yes beta delta, gamma "), "{lines:?}");
    assert_eq!(lines[4..], ["PEER ITS EPOCHS SENDING OWN SENDING ITS CONFIRMED REASON", "beta 2 1 2 -"]);
    let ran = run(&keys(vec![epoch(1, &[])]), &["keys", "status", "--verbose"]);
    let lines = words(&ran.text);
    assert_eq!(lines.last().unwrap(), "beta in 0x0000abcd 192.0.2.2 192.0.2.1 1 2 5 1.5 KiB 7 s");
    assert!(!lines[0].contains("under way"), "{lines:?}");
}

fn rotation(begun: Option<u64>) -> RotationReport {
    let waiting = begun.is_none().then(|| "gamma still uses the epoch before 1".to_owned());
    RotationReport { technology: Technology::Esp, begun, target: 2, waiting }
}

#[test]
fn a_rotation_says_what_it_does() {
    let ran = run(&rotation(Some(2)), &["keys", "rotate"]);
    assert_eq!((ran.request, ran.status, ran.text.as_str()), (Request::RotateKeys, 0, "Begun: epoch 2.\n"));
    let ran = run(&rotation(None), &["keys", "rotate"]);
    assert_eq!(ran.text, "Asked for; epoch 2 has to wait: gamma still uses the epoch before 1.\n");
    let refused = run_against(Response::Refused { reason: "mode vxlan has no keys".into() }, &["keys", "rotate"]);
    assert_eq!(refused.status, 3);
}

#[test]
fn a_rotation_is_waited_for_with_its_progress_told() {
    let json = |report: KeysReport| serde_json::to_value(report).unwrap();
    let unpublished = keys(vec![epoch(1, &[]), EpochReport { published: false, ..epoch(2, &[]) }]);
    let reports = vec![
        serde_json::to_value(rotation(None)).unwrap(),
        json(KeysReport { waiting: Some("gamma is slow".into()), ..keys(vec![epoch(1, &[])]) }),
        json(unpublished),
        json(keys(vec![epoch(1, &[]), epoch(2, &["gamma"])])),
        json(keys(vec![epoch(1, &[]), epoch(2, &["gamma"])])),
        json(keys(vec![epoch(1, &[]), epoch(2, &[])])),
        json(keys(vec![epoch(2, &[])])),
    ];
    let ran = run_along(reports, &["keys", "rotate", "--wait", "--timeout", "30"]);
    assert_eq!(ran.status, 0, "{}", ran.errors);
    assert!(ran.text.starts_with("Done: epoch 2 is the only one, after "), "{}", ran.text);
    let told: Vec<&str> = ran.errors.lines().collect();
    assert_eq!(
        told,
        [
            "Asked for; epoch 2 has to wait: gamma still uses the epoch before 1.",
            "Waiting: gamma is slow.",
            "Waiting: epoch 2 is not published yet; it has to be receivable from all peers first.",
            "Waiting: gamma is not using epoch 2 yet.",
            "Waiting: all peers use epoch 2; epoch 1 goes when it was quiet for the grace period.",
        ]
    );
}

#[test]
fn a_rotation_that_takes_too_long_is_status_1_with_who_has_not_confirmed() {
    let reports = vec![
        serde_json::to_value(rotation(Some(2))).unwrap(),
        serde_json::to_value(keys(vec![epoch(1, &[]), epoch(2, &["gamma", "delta"])])).unwrap(),
    ];
    let ran = run_along(reports.clone(), &["keys", "rotate", "--wait", "--timeout", "1"]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.text.starts_with("Not finished within 1 s. Waiting: delta, gamma are not using epoch 2 yet."),
        "{}",
        ran.text
    );
    assert!(ran.text.contains("not confirmed: gamma; is its daemon running"), "{}", ran.text);
    let ran = run_along(reports, &["-o", "json", "keys", "rotate", "--wait", "--timeout", "0"]);
    assert_eq!(ran.status, 1);
    let report: KeysReport = serde_json::from_str(&ran.text).unwrap();
    assert_eq!(report.epochs[1].unconfirmed.len(), 2);
}

#[test]
fn json_is_the_report_as_the_daemon_gave_it() {
    fn same<T: Serialize>(report: &T, arguments: &[&str]) {
        let ran = run(report, &[arguments, &["--output", "json"]].concat());
        let printed: serde_json::Value = serde_json::from_str(&ran.text).unwrap();
        assert_eq!(printed, serde_json::to_value(report).unwrap(), "{arguments:?}");
        assert!(ran.text.ends_with('\n'));
    }
    same(&status(), &["status"]);
    same(&vec![peer("beta", PeerState::Connected)], &["peers"]);
    same(&vec![mtu(1500)], &["mtu"]);
    same(&keys(vec![epoch(1, &["gamma"])]), &["keys", "status"]);
    same(&rotation(Some(2)), &["keys", "rotate"]);
    same(&DiffReport { changes: vec!["add a".into()] }, &["diff"]);
    same(&ipam(vec![]), &["ipam", "show"]);
    let findings = run(&ipam(vec!["wrong".into()]), &["-o", "json", "ipam", "check"]);
    assert_eq!(serde_json::from_str::<Vec<String>>(&findings.text).unwrap(), ["wrong"]);
    assert_eq!(findings.status, 1);
}

#[test]
fn an_absent_daemon_is_status_3_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [&["status"][..], &["ipam", "check", "--output", "json"]] {
        let output = huskctl(directory.path(), arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(output.stdout.is_empty());
        for part in ["huskctl: no daemon answers", directory.path().to_str().unwrap(), "systemctl status huskd"] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
    }
    // A socket that nobody listens on any more.
    drop(UnixListener::bind(directory.path().join(SOCKET_FILE)).unwrap());
    assert_eq!(huskctl(directory.path(), &["status"]).status.code(), Some(3));
}

#[test]
fn a_daemon_that_refuses_or_is_not_understood_is_status_3() {
    let refused = run_against(Response::Refused { reason: "the daemon is stopping".into() }, &["status"]);
    assert_eq!((refused.status, refused.errors.as_str()), (3, "huskctl: the daemon is stopping\n"));
    let early = Response::NotReady { reason: "no pass yet".into(), issues: vec![] };
    assert_eq!(run_against(early, &["peers"]).status, 3);
    for strange in [Response::Done, Response::Report { report: json!({ "node": 7 }) }] {
        let ran = run_against(strange, &["status"]);
        assert_eq!(ran.status, 3);
        assert!(ran.errors.contains("of one version"), "{}", ran.errors);
    }
}

#[test]
fn what_cannot_be_written_is_status_3_and_what_is_not_read_is_none() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let program = || std::process::Command::new(env!("CARGO_BIN_EXE_huskctl"));
    let ran = program().args(["schema", "status"]).stdout(full()).output().unwrap();
    let errors = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(3), "{errors}");
    assert!(errors.contains("cannot write to standard output") && errors.contains("No space left"), "{errors}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran = program().args(["schema", "status"]).stdout(writer).output().unwrap();
    assert_eq!((ran.status.code(), ran.stderr), (Some(0), Vec::new()));
}

#[test]
fn wrong_usage_is_status_2() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [
        &[][..],
        &["fly"],
        &["ipam"],
        &["status", "--output", "xml"],
        &["diff", "now"],
        &["keys"],
        &["keys", "rotate", "--timeout", "5"],
        &["mtu", "probe", "beta", "--timeout", "0"],
        &["trace", "a", "b"],
        &["trace", "a", "127.0.0.1", "--port", "80"],
        &["trace", "a", "10.42.0.2:80"],
        &["doctor", "--only", "daemon,nothing"],
    ] {
        let output = huskctl(directory.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("--help") || errors.contains("Usage"), "{errors}");
        assert!(arguments.first() != Some(&"trace") || errors.contains("Usage: huskctl trace"), "{errors}");
    }
    assert_eq!(huskctl(directory.path(), &["--help"]).status.code(), Some(0));
}

#[test]
fn what_looks_at_the_host_refuses_to_take_another_network_namespace_for_it() {
    let elsewhere = json!({ "path": "/proc/thread-self/ns/net", "device": 4, "inode": 1 });
    for arguments in
        [&["doctor"][..], &["doctor", "--fix", "--yes"], &["support-bundle"], &["ipam", "release", "10.42.0.2"]]
    {
        let ran = run_along(vec![elsewhere.clone()], arguments);
        assert_eq!((ran.status, ran.text.as_str()), (3, ""), "{arguments:?}");
        let told = ran.errors;
        assert!(
            told.contains("runs in another network namespace (net:[") && told.contains("than the daemon (net:[1])"),
            "{told}"
        );
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}
