//! What the kernel holds after a pass, whatever happened before it.

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_dataplane::links::ActualKind;
use husk_dataplane::routes::ActualRoute;
use husk_overlay::facts::WireguardSupport;
use husk_overlay::issue::{IssueKind, Severity};
use husk_overlay::kernel::{LinkKind, Route, RouteKey, RouteTarget};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::NodeRecord;
use nix::errno::Errno;

use super::bed::{Asked, Bed, blocks, id, interface, name, prefix, public_key, record};

const MODES: [Mode; 3] = [Mode::Direct, Mode::Vxlan, Mode::Wireguard];

fn has_route(bed: &Bed, destination: Prefix) -> bool {
    bed.kernel.state().own.routes.keys().any(|key| key.destination == destination)
}

fn with_pod(mode: Mode, nodes: u16) -> Bed {
    let mut bed = Bed::new(mode, nodes);
    bed.pass();
    bed.lease("pod").unwrap();
    bed.plug("pod");
    bed.pass();
    bed
}

#[test]
fn one_pass_converges_and_the_next_changes_nothing() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 4);
        assert!(bed.changes_of_a_pass() > 0);
        for peer in 1..4 {
            for block in blocks(peer) {
                assert!(has_route(&bed, block), "{mode}: {block}");
            }
        }
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
        assert_eq!(bed.own_record().unwrap().blocks, blocks(0), "{mode}");
        assert!(bed.state.borrow().ready, "{mode}: {:?}", bed.state.borrow().reason);
    }
}

#[test]
fn a_userspace_device_is_started_once_and_anew_when_it_is_gone() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.node.state().wireguard = WireguardSupport::Userspace;
    bed.pass();
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(bed.node.state().started_devices, 1);
    bed.kernel.state().remove_link(&interface("husk-wg0"));
    bed.pass();
    assert_eq!(bed.node.state().started_devices, 2);
    assert!(has_route(&bed, *blocks(1).first().unwrap()));
}

/// The kind of the tunnel device, if there is one.
fn tunnel(bed: &Bed) -> Option<ActualKind> {
    bed.kernel.state().own.links.get(&interface("husk-wg0")).map(|link| link.kind.clone())
}

#[test]
fn a_userspace_device_makes_room_for_the_kernels() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.node.state().wireguard = WireguardSupport::Userspace;
    bed.pass();
    assert_eq!(tunnel(&bed), Some(ActualKind::Known(LinkKind::WireguardUserspace)));
    // The module was loaded, and the daemon starts anew.
    bed.node.state().wireguard = WireguardSupport::Kernel;
    bed.restart();
    bed.node.state().device_fails = true;
    bed.pass();
    let reason = bed.state.borrow().reason.clone().unwrap();
    assert!(reason.contains("keeps the name from the kernel's: it ignores every signal"), "{reason}");
    bed.node.state().device_fails = false;
    bed.pass();
    assert_eq!(tunnel(&bed), Some(ActualKind::Known(LinkKind::Wireguard)));
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    assert!(has_route(&bed, *blocks(1).first().unwrap()));
    assert_eq!(bed.changes_of_a_pass(), 0);
}

#[test]
fn a_userspace_device_goes_with_the_mode_but_not_for_want_of_knowledge() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.node.state().wireguard = WireguardSupport::Userspace;
    bed.pass();
    let userspace = Some(ActualKind::Known(LinkKind::WireguardUserspace));
    // Nothing can be had of WireGuard at the moment: what runs goes on.
    bed.node.state().wireguard = WireguardSupport::Unavailable { reason: "it is gone".into() };
    bed.pass();
    assert_eq!(tunnel(&bed), userspace);
    bed.config.mode = Mode::Vxlan;
    bed.restart();
    bed.source.state().down = true;
    bed.pass();
    assert_eq!(tunnel(&bed), userspace, "the source has not delivered yet");
    bed.source.state().down = false;
    bed.pass();
    assert_eq!(tunnel(&bed), None);
}

#[test]
fn what_is_lost_in_the_kernel_comes_back_in_the_next_pass() {
    for mode in MODES {
        let mut bed = with_pod(mode, 3);
        let whole = bed.kernel.state().own.clone();
        for table in Table::ALL {
            bed.kernel.flush(table);
            bed.pass();
            assert_eq!(bed.kernel.state().own, whole, "{mode}: {table}");
            assert!(bed.state.borrow().ready, "{mode}: {table}");
        }
    }
}

#[test]
fn what_an_outsider_adds_under_our_mark_goes_and_what_is_foreign_stays() {
    let mut bed = with_pod(Mode::Vxlan, 3);
    let whole = bed.kernel.state().own.clone();
    let key = |text: &str| RouteKey { table: 254, destination: prefix(text), metric: 0 };
    let leading_to = |name: &str| Route {
        target: RouteTarget::Interface { interface: interface(name), via: None, onlink: false },
        source: None,
        mtu: None,
    };
    bed.kernel.state().own.routes.insert(key("203.0.113.0/24"), ActualRoute::Plain(leading_to("husk-vx")));
    bed.kernel.state().foreign_routes.insert(key("198.51.100.0/24"), leading_to("eth0"));
    let foreign = bed.kernel.state().foreign_routes.clone();
    bed.pass();
    assert_eq!(bed.kernel.state().own, whole);
    assert_eq!(bed.kernel.state().foreign_routes, foreign);
}

#[test]
fn a_pod_that_is_being_wired_keeps_the_routes_the_plugin_made() {
    let mut bed = with_pod(Mode::Wireguard, 2);
    // The interface and its route appear after the facts were gathered, before the routes are read.
    let host_interface = id("new").host_interface();
    bed.plug("new");
    bed.node.state().not_seen_yet.insert(host_interface.clone());
    let destination = Prefix::host("10.64.0.9".parse().unwrap());
    let target = RouteTarget::Interface { interface: host_interface, via: None, onlink: false };
    let route = ActualRoute::Plain(Route { target, source: None, mtu: None });
    bed.kernel.state().own.routes.insert(RouteKey { table: 254, destination, metric: 0 }, route);
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert!(has_route(&bed, destination));
    // An interface that was seen and has no lease is an orphan: its route goes.
    bed.node.state().not_seen_yet.clear();
    bed.pass();
    assert!(!has_route(&bed, destination));
}

#[test]
fn the_route_of_a_pod_comes_with_its_interface_and_goes_with_its_lease() {
    let mut bed = with_pod(Mode::Direct, 2);
    let lease = bed.leases().find(&id("pod")).unwrap().unwrap();
    let destinations: Vec<Prefix> = lease.addresses.iter().map(Prefix::host).collect();
    assert!(destinations.iter().all(|it| has_route(&bed, *it)));
    bed.unplug("pod");
    bed.pass();
    assert!(!destinations.iter().any(|it| has_route(&bed, *it)));
    bed.plug("pod");
    bed.pass();
    assert!(destinations.iter().all(|it| has_route(&bed, *it)));
    bed.release("pod");
    bed.pass();
    assert!(!destinations.iter().any(|it| has_route(&bed, *it)));
}

#[test]
fn leases_that_cannot_be_listed_take_no_route_from_any_pod() {
    let mut bed = with_pod(Mode::Wireguard, 2);
    let whole = bed.kernel.state().own.clone();
    let folder = bed.leases().directory().to_owned();
    let aside = bed.directory.path().join("aside");
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::write(&folder, "in the way").unwrap();
    // A daemon that never saw the leases is worse off than one that remembers them.
    bed.restart();
    bed.pass();
    assert_eq!(bed.kernel.state().own, whole);
    assert!(bed.issues().contains(&IssueKind::BadLease));
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&aside, &folder).unwrap();
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert!(bed.issues().is_empty(), "{:?}", bed.issues());
}

#[test]
fn a_kernel_that_refuses_one_table_gets_the_others_and_all_once_it_relents() {
    for mode in MODES {
        let whole = {
            let bed = with_pod(mode, 3);
            bed.kernel.state().own.clone()
        };
        for table in Table::ALL {
            for fault in [Fault::Change(table), Fault::Read(table)] {
                let mut bed = with_pod(mode, 3);
                for table in Table::ALL {
                    bed.kernel.flush(table);
                }
                bed.kernel.inject(fault, Errno::EPERM);
                bed.pass();
                let state = bed.state.borrow().clone();
                let failed: Vec<_> = state.issues.iter().filter(|it| it.kind == IssueKind::ApplyFailed).collect();
                let touched = matches!(fault, Fault::Read(_)) || used(&whole, table);
                assert_eq!(!failed.is_empty(), touched, "{mode}: {fault:?}: {:?}", state.issues);
                assert!(failed.iter().all(|it| !it.remedy.is_empty() && it.message.contains("kernel refused")));
                if table != Table::Nft {
                    assert_eq!(bed.kernel.state().own.nft, whole.nft, "{mode}: {fault:?}");
                }
                let blocking = failed.iter().any(|it| it.severity == Severity::Blocking);
                assert_eq!(state.ready, !blocking, "{mode}: {fault:?}");
                assert_eq!(bed.node_file().is_some(), !blocking, "{mode}: {fault:?}");
                bed.kernel.heal();
                bed.pass();
                assert_eq!(bed.kernel.state().own, whole, "{mode}: {fault:?}");
                assert!(bed.state.borrow().ready);
            }
        }
    }
}

fn used(actual: &husk_dataplane::kernel::Actual, table: Table) -> bool {
    match table {
        Table::Nft => actual.nft.is_some(),
        Table::Policy => actual.policy.is_some(),
        Table::Links => !actual.links.is_empty(),
        Table::Sysctls => !actual.sysctls.is_empty(),
        Table::Wireguard => !actual.wireguard.is_empty(),
        Table::XfrmStates => !actual.xfrm_states.is_empty(),
        Table::XfrmPolicies => !actual.xfrm_policies.is_empty(),
        Table::Offload => actual.offload.values().any(|on| !*on),
        Table::Napi => actual.napi.values().any(|threaded| *threaded),
        Table::Addresses => !actual.addresses.is_empty(),
        Table::Neighbours => !actual.neighbours.is_empty(),
        Table::Fdb => !actual.fdb.is_empty(),
        Table::Routes => !actual.routes.is_empty(),
    }
}

#[test]
fn one_refusal_anywhere_is_made_good_by_the_next_pass() {
    let whole = {
        let bed = with_pod(Mode::Vxlan, 3);
        bed.kernel.state().own.clone()
    };
    let all = {
        let mut bed = Bed::new(Mode::Vxlan, 3);
        bed.changes_of_a_pass()
    };
    for nth in 0..all {
        let mut bed = Bed::new(Mode::Vxlan, 3);
        bed.kernel.inject(Fault::NthChange(nth), Errno::ENOBUFS);
        bed.pass();
        assert!(bed.issues().contains(&IssueKind::ApplyFailed), "change {nth}");
        bed.pass();
        bed.lease("pod").unwrap();
        bed.plug("pod");
        bed.pass();
        assert_eq!(bed.kernel.state().own, whole, "change {nth}");
        assert!(bed.issues().is_empty());
    }
}

#[test]
fn one_node_among_five_thousand_costs_its_own_changes() {
    const NODES: u16 = 5_000;
    // An element of the list of nodes, two routes, and: of WireGuard a peer, of VXLAN two neighbours and a forwarding entry.
    for (mode, cost) in [(Mode::Wireguard, 4), (Mode::Vxlan, 6)] {
        let mut bed = Bed::new(mode, NODES);
        bed.pass();
        assert_eq!(bed.issues(), [].into());
        bed.allocate(NODES);
        bed.join(NODES);
        let batches = bed.kernel.state().counters.batches;
        let started = std::time::Instant::now();
        assert_eq!(bed.changes_of_a_pass(), cost, "{mode}");
        eprintln!("{mode}: a pass with {NODES} peers takes {:?}", started.elapsed());
        assert!(bed.kernel.state().counters.batches - batches <= 5, "{mode}");
        bed.leave(NODES);
        assert_eq!(bed.changes_of_a_pass(), cost, "{mode}");
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
    }
}

#[test]
fn nothing_is_swept_before_the_first_full_list() {
    for mode in MODES {
        let mut bed = with_pod(mode, 4);
        let whole = bed.kernel.state().own.clone();
        bed.source.state().down = true;
        bed.leave(3);

        // The last snapshot is known: everything is as it was, and pods can be added.
        bed.restart();
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
        assert!(bed.state.borrow().ready, "{mode}: {:?}", bed.state.borrow().reason);
        assert!(bed.issues().contains(&IssueKind::SourceUnavailable));

        // Nothing is known: what is there stays, what is missing of the floor comes back, pods wait.
        std::fs::remove_file(bed.directory.path().join("snapshot.json")).unwrap();
        bed.kernel.flush(Table::Nft);
        bed.restart();
        bed.pass();
        let state = bed.state.borrow().clone();
        assert!(!state.ready && state.reason.unwrap().contains("not available"), "{mode}");
        assert_eq!(bed.node_file(), None);
        let own = bed.kernel.state().own.clone();
        assert!(own.nft.is_some());
        assert_eq!(
            (own.routes, own.links.len(), own.fdb),
            (whole.routes.clone(), whole.links.len(), whole.fdb),
            "{mode}"
        );
        assert_eq!(own.wireguard, whole.wireguard, "{mode}");
        assert_eq!(bed.published().len(), 1, "{mode}");

        // The list comes, without the node that left meanwhile.
        bed.source.state().down = false;
        bed.pass();
        assert!(bed.state.borrow().ready, "{mode}: {:?}", bed.state.borrow().reason);
        assert!(blocks(3).iter().all(|block| !has_route(&bed, *block)), "{mode}");
        assert!(blocks(2).iter().all(|block| has_route(&bed, *block)), "{mode}");
    }
}

#[test]
fn a_garbled_last_snapshot_is_as_good_as_none() {
    let mut bed = with_pod(Mode::Wireguard, 3);
    let whole = bed.kernel.state().own.clone();
    for garbage in [&b"{"[..], b"\xff\xfe", b"", b"{\"nodes\":{\"host1\":{}}}"] {
        std::fs::write(bed.directory.path().join("snapshot.json"), garbage).unwrap();
        bed.source.state().down = true;
        bed.restart();
        bed.pass();
        assert_eq!(bed.kernel.state().own.routes, whole.routes);
        bed.source.state().down = false;
        bed.pass();
        assert_eq!(bed.kernel.state().own, whole);
    }
}

#[test]
fn a_source_that_goes_away_changes_nothing_but_what_is_said() {
    let mut bed = with_pod(Mode::Wireguard, 3);
    let whole = bed.kernel.state().own.clone();
    bed.source.state().down = true;
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(bed.kernel.state().own, whole);
    assert!(bed.state.borrow().ready);
    assert_eq!(bed.issues(), [IssueKind::SourceUnavailable].into());

    // The node itself is still kept right, though nobody can be told.
    bed.node.state().underlay_mtu = 1400;
    bed.pass();
    assert_eq!(bed.kernel.state().own.links[&interface("husk-wg0")].mtu, 1340);
    assert_eq!(bed.node_file().unwrap().pod_mtu, 1340);
    assert_eq!(bed.published().len(), 1);

    bed.source.state().down = false;
    bed.pass();
    assert_eq!(bed.own_record().unwrap().underlay_mtu, 1400);
    assert!(bed.issues().is_empty());
}

#[test]
fn the_record_is_published_after_the_kernel_can_receive_and_only_when_it_changed() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    bed.pass();
    bed.pass();
    bed.join(2);
    bed.pass();
    assert_eq!(bed.published().len(), 1);
    let Asked::Publish { record: first, kernel } = bed.source.state().log[0].clone() else {
        panic!("nothing else yet")
    };
    let device = &kernel.own.wireguard[&interface("husk-wg0")];
    assert_eq!(device.public_key, Some(public_key(0)));
    assert_eq!(device.peers.len(), 2);
    assert!(kernel.own.nft.is_some());
    assert_eq!(first, of_wireguard(record(0)));

    // A new key that the kernel does not take is not told to anybody.
    bed.node.state().key = 77;
    bed.kernel.inject(Fault::Change(Table::Wireguard), Errno::ENOMEM);
    bed.pass();
    assert_eq!(bed.own_record().unwrap().wireguard[0].public_key, public_key(0));
    bed.kernel.heal();
    bed.pass();
    assert_eq!(bed.own_record().unwrap().wireguard[0].public_key, public_key(77));
    assert_eq!(bed.published().len(), 2);

    // Somebody else's hand in the own record.
    bed.source.state().snapshot.nodes.remove(&name(0));
    bed.pass();
    assert_eq!(bed.published().len(), 3);
    assert_eq!(bed.own_record().unwrap().created, first.created);
}

/// What a node in mode `wireguard` publishes of a record that is complete for every mode.
fn of_wireguard(record: NodeRecord) -> NodeRecord {
    NodeRecord { vxlan_mac: None, ..record }
}

#[test]
fn a_record_that_cannot_be_written_is_an_issue_until_it_can() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    bed.source.state().read_only = true;
    bed.pass();
    assert_eq!(bed.issues(), [IssueKind::SourceUnavailable].into());
    assert_eq!(bed.own_record(), None);
    bed.source.state().read_only = false;
    bed.pass();
    assert_eq!(bed.own_record(), Some(NodeRecord { wireguard: Vec::new(), ..record(0) }));
    assert!(bed.issues().is_empty());
}

#[test]
fn a_node_keeps_its_seniority_when_its_record_is_lost_while_it_restarts() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    let mut senior = of_wireguard(record(0));
    senior.created = jiff::Timestamp::from_second(1_799_999_999).unwrap();
    bed.source.state().snapshot.nodes.insert(name(0), senior.clone());
    bed.pass();
    bed.source.state().snapshot.nodes.remove(&name(0));
    bed.restart();
    bed.pass();
    assert_eq!(bed.own_record(), Some(senior));
}
