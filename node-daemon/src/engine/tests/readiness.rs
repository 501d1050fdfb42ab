//! When `node.json` is there, what it says, and what STATUS and ADD are told when it is not.

use std::time::Duration;

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_overlay::facts::WireguardSupport;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::DualStack;
use nix::errno::Errno;

use super::bed::{Bed, blocks, config, id, record};
use crate::engine::Handle;

#[test]
fn node_json_and_conflist_appear_when_the_node_is_ready() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    assert_eq!(bed.node_file(), None);
    assert!(matches!(bed.ask(Request::Ready), Response::NotReady { .. }));
    bed.pass();
    let file = bed.node_file().unwrap();
    assert_eq!(file.version, husk_overlay::ipc::VERSION);
    assert_eq!(file.boot_id, "this-boot");
    assert_eq!(file.pod_mtu, 1440);
    assert_eq!(file.blocks, blocks(0).into_iter().collect::<Vec<Prefix>>());
    assert_eq!(file.router, record(0).router);
    assert_eq!(file.cluster_cidrs, config(Mode::Wireguard).cluster_cidrs);
    assert_eq!(file.cool_down, 30);
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(bed.conflist()).unwrap()).unwrap();
    assert_eq!(list["plugins"][0]["type"], "husk");
    assert_eq!(bed.ask(Request::Ready), Response::Done);
}

/// How to break a node, what its reason must say, and how to mend it.
type Breakage = (&'static str, fn(&mut Bed), fn(&mut Bed));

const BREAKAGES: [Breakage; 11] = [
    (
        "address to build tunnels from",
        |bed| bed.node.state().addresses = DualStack::default(),
        |bed| {
            bed.node.state().addresses = record(0).addresses;
        },
    ),
    ("too small", |bed| bed.node.state().underlay_mtu = 1300, |bed| bed.node.state().underlay_mtu = 1500),
    (
        "inside the cluster CIDR",
        |bed| bed.node.state().addresses.set("10.64.3.3".parse().unwrap()),
        |bed| bed.node.state().addresses = record(0).addresses,
    ),
    (
        "no WireGuard device can be had: it is gone",
        |bed| bed.node.state().wireguard = WireguardSupport::Unavailable { reason: "it is gone".into() },
        |bed| bed.node.state().wireguard = WireguardSupport::Kernel,
    ),
    (
        "does not start: no /dev/net/tun",
        |bed| {
            bed.node.state().wireguard = WireguardSupport::Userspace;
            bed.node.state().device_fails = true;
        },
        |bed| {
            bed.node.state().wireguard = WireguardSupport::Kernel;
            bed.node.state().device_fails = false;
        },
    ),
    ("no netlink today", |bed| bed.node.state().blind = Some("no netlink today"), |bed| bed.node.state().blind = None),
    ("on fire", |bed| bed.node.state().keyless = true, |bed| bed.node.state().keyless = false),
    (
        "nft",
        |bed| {
            bed.kernel.flush(Table::Nft);
            bed.kernel.inject(Fault::Change(Table::Nft), Errno::EPERM);
        },
        |bed| bed.kernel.heal(),
    ),
    ("cannot be read", |bed| bed.kernel.inject(Fault::Read(Table::Links), Errno::EINTR), |bed| bed.kernel.heal()),
    (
        "block",
        |bed| {
            bed.source.state().snapshot.blocks.clear();
            bed.source.state().snapshot.blocks.insert(bed.config.cluster_cidrs[0], super::bed::name(7));
        },
        |bed| {
            bed.source.state().snapshot.blocks.clear();
            bed.allocate(0);
        },
    ),
    (
        "not available",
        |bed| {
            // Nothing is known of the cluster: neither by the source nor from before.
            bed.source.state().down = true;
            std::fs::remove_file(bed.directory.path().join("snapshot.json")).unwrap();
            bed.restart();
        },
        |bed| bed.source.state().down = false,
    ),
];

#[test]
fn node_json_goes_with_readiness_and_the_reason_is_told() {
    for (reason, breaks, mends) in BREAKAGES {
        let mut bed = Bed::new(Mode::Wireguard, 2);
        bed.pass();
        bed.lease("pod").unwrap();
        assert_eq!(bed.ask(Request::Ready), Response::Done, "{reason}");
        breaks(&mut bed);
        bed.pass();
        assert_eq!(bed.node_file(), None, "{reason}");
        assert!(bed.conflist().exists(), "the runtime goes on asking STATUS: {reason}");
        assert_eq!(bed.state.borrow().node_file, None, "{reason}");
        for request in [Request::Ready, Request::Admit { id: id("pod") }] {
            let Response::NotReady { reason: told, .. } = bed.ask(request) else { panic!("ready without {reason}") };
            let expected = if reason == "cannot be read" { "read" } else { reason };
            assert!(told.contains(expected), "{reason}: {told}");
        }
        mends(&mut bed);
        bed.pass();
        assert!(bed.node_file().is_some(), "{reason}: {:?}", bed.state.borrow().reason);
        assert_eq!(bed.ask(Request::Ready), Response::Done, "{reason}");
    }
}

#[test]
fn a_pass_that_is_given_up_leaves_the_data_plane_alone() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    bed.pass();
    let whole = bed.kernel.state().own.clone();
    bed.leave(2);
    bed.node.state().blind = Some("no netlink today");
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(bed.kernel.state().own, whole);
    assert_eq!(bed.state.borrow().passes, 2);
}

#[test]
fn node_json_that_cannot_be_written_does_not_stay_outdated() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    // The network configuration cannot be written: its folder's place is taken.
    std::fs::remove_dir_all(bed.conflist().parent().unwrap()).unwrap();
    std::fs::write(bed.conflist().parent().unwrap(), "in the way").unwrap();
    bed.node.state().underlay_mtu = 1450;
    bed.pass();
    assert_eq!(bed.node_file(), None);
    let reason = bed.state.borrow().reason.clone().unwrap();
    assert!(reason.contains("net.d"), "{reason}");
    std::fs::remove_file(bed.conflist().parent().unwrap()).unwrap();
    bed.pass();
    assert_eq!(bed.node_file().unwrap().pod_mtu, 1390);
    assert!(bed.conflist().exists());
}

#[test]
fn a_pod_is_admitted_by_its_lease_in_a_block_the_node_owns() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    bed.lease("good").unwrap();
    bed.pass();
    assert_eq!(bed.ask(Request::Admit { id: id("good") }), Response::Done);
    let Response::Refused { reason } = bed.ask(Request::Admit { id: id("stranger") }) else { panic!("no lease") };
    assert!(reason.contains("husk/stranger/eth0"), "{reason}");
    // Leased from blocks that were the node's when the plugin read node.json.
    let before: Vec<Prefix> = blocks(40).into_iter().collect();
    bed.lease_from("late", &before, Vec::new()).unwrap();
    bed.pass();
    let Response::NotReady { reason, .. } = bed.ask(Request::Admit { id: id("late") }) else { panic!("not its block") };
    assert!(reason.contains("no block of this node"), "{reason}");
}

#[test]
fn a_damaged_lease_is_refused_with_its_file() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    bed.lease("pod").unwrap();
    let folder = bed.leases().directory().to_owned();
    let file = std::fs::read_dir(folder)
        .unwrap()
        .map(|it| it.unwrap().path())
        .find(|path| path.extension().is_some_and(|end| end == "json") && path.to_string_lossy().contains('_'))
        .unwrap();
    std::fs::write(&file, "{").unwrap();
    let Response::Refused { reason } = bed.ask(Request::Admit { id: id("pod") }) else { panic!("damaged") };
    assert!(reason.contains(file.to_str().unwrap()), "{reason}");
}

/// A pass that saw an earlier interface of that name says nothing of this one's ports, though they are the same.
#[test]
fn an_answer_about_ports_is_about_the_interface_that_is_there() {
    let mut bed = Bed::new(Mode::Direct, 1);
    bed.pass();
    bed.lease_with_port("pod", 8080);
    bed.plug("pod");
    bed.pass();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ask = |handle: Handle| {
        let answer = async move { handle.answer(Request::Admit { id: id("pod") }).await };
        runtime.block_on(async { tokio::time::timeout(Duration::from_millis(200), answer).await.ok() })
    };
    // What the node saw of interfaces has the index 7.
    assert_eq!(ask(bed.handle().seeing(|_| Ok(Some(7)))), Some(Response::Done));
    assert_eq!(ask(bed.handle().seeing(|_| Ok(Some(8)))), None, "it waits for a pass");
    let Some(Response::Refused { reason }) = ask(bed.handle().seeing(|_| Ok(None))) else { panic!("it is gone") };
    assert!(reason.contains("is gone"), "{reason}");
}
