//! Keys of ESP: from the first to the last pass of a rotation, and that no association is ever installed twice.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_dataplane::xfrm::ActualXfrmState;
use husk_overlay::facts::AssociationStage;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::kernel::{RouteTarget, XfrmStateKey};
use husk_overlay::mode::Mode;
use nix::errno::Errno;

use super::bed::{Bed, address, esp_record, name};
use super::inbox::Running;
use crate::report::{KeysReport, PeerReport, PeerState, RotationReport, Status};

const MODES: [Mode; 2] = [Mode::Ipsec, Mode::VxlanIpsec];

/// Passes as the loop would make them: at once while they get on, and one more.
pub(super) fn settle(bed: &mut Bed) {
    for _ in 0..20 {
        bed.pass();
        if !bed.engine.keeping.hurries() {
            break;
        }
    }
    bed.pass();
    let installed = bed.kernel.state().installed_associations.clone();
    let distinct: BTreeSet<XfrmStateKey> = installed.iter().copied().collect();
    assert_eq!(installed.len(), distinct.len(), "an association was installed twice");
}

fn held(bed: &Bed) -> Vec<u64> {
    let mut state = bed.node.state();
    let now = state.uptime;
    state.keys.epochs(now).unwrap().into_keys().collect()
}

fn published(bed: &Bed) -> Vec<u64> {
    bed.own_record().and_then(|it| it.esp).map(|esp| esp.epochs.iter().map(|it| it.epoch).collect()).unwrap_or_default()
}

/// Every peer has sent a packet under the newest own epoch.
fn receive(bed: &Bed) {
    let newest = held(bed).pop();
    let last = bed.engine.last.as_ref().unwrap();
    let inbound: Vec<XfrmStateKey> = last
        .plan
        .desired
        .xfrm_states
        .iter()
        .filter(|(_, state)| {
            state.association.receiver.node == name(0) && Some(state.association.receiver.epoch) == newest
        })
        .map(|(key, _)| *key)
        .collect();
    let mut kernel = bed.kernel.state();
    for key in inbound {
        if let Some(state) = kernel.own.xfrm_states.get_mut(&key) {
            (state.packets, state.bytes) = (state.packets + 1, state.bytes + 100);
        }
    }
}

fn later(bed: &Bed, seconds: u64) {
    bed.node.state().uptime += Duration::from_secs(seconds);
}

fn report<T: serde::de::DeserializeOwned>(bed: &mut Bed, request: Request) -> T {
    let (answer, mut receiver) = tokio::sync::oneshot::channel();
    bed.engine.answer(crate::engine::Ask { request, answer });
    match receiver.try_recv().unwrap() {
        Response::Report { report } => serde_json::from_value(report).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// The routes that lead somewhere.
fn routes(bed: &Bed) -> usize {
    let last = bed.engine.last.as_ref().unwrap();
    last.plan.desired.routes.values().filter(|route| route.target != RouteTarget::Unreachable).count()
}

#[test]
fn the_first_key_is_made_installed_and_published_in_that_order() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        bed.pass();
        assert_eq!((held(&bed).len(), held(&bed)), (1, published(&bed)), "{mode}: in one pass");
        settle(&mut bed);
        assert_eq!(held(&bed), published(&bed), "{mode}");
        // What the source was told, the kernel could receive by then.
        let own: Vec<_> = bed.source.state().log.clone();
        let first = own.iter().find_map(|asked| match asked {
            super::bed::Asked::Publish { record, kernel }
                if record.esp.as_ref().is_some_and(|it| !it.epochs.is_empty()) =>
            {
                Some(kernel.own.xfrm_states.len())
            }
            _ => None,
        });
        assert!(first.is_some_and(|installed| installed >= 2), "{mode}: {first:?}");
        let spent = bed.node.state().keys.spent();
        let spent: BTreeSet<XfrmStateKey> = spent.values().map(|spent| spent.key).collect();
        let installed: BTreeSet<XfrmStateKey> = bed.kernel.state().own.xfrm_states.keys().copied().collect();
        assert_eq!(installed.len(), 4, "{mode}: one in and one out for each of two peers");
        assert!(installed.iter().all(|key| spent.contains(key)), "{mode}");
        assert!(bed.issues().is_empty(), "{mode}: {:?}", bed.state.borrow().issues);
        assert!(routes(&bed) >= 4, "{mode}");
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
        let greeted: BTreeSet<_> = bed.node.state().greeted.iter().copied().collect();
        assert_eq!(greeted.len(), 2, "{mode}: both peers are shown that the keys work");
    }
}

#[test]
fn a_peer_that_cannot_be_sent_to_yet_counts_as_one_without_a_route() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        let mut counted = BTreeSet::new();
        for _ in 0..5 {
            bed.pass();
            let status: Status = report(&mut bed, Request::Status);
            assert_eq!(
                status.peers.0 == 2,
                routes(&bed) >= 4,
                "{mode}: {:?} with {} routes",
                status.peers,
                routes(&bed)
            );
            counted.insert(status.peers.0);
        }
        assert_eq!(counted, [0, 2].into(), "{mode}");
    }
}

#[test]
fn a_rotation_that_is_asked_for_ends_with_the_new_key_alone() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        settle(&mut bed);
        receive(&bed);
        later(&bed, 100);
        settle(&mut bed);
        let before = held(&bed);
        let keys: KeysReport = report(&mut bed, Request::Keys);
        assert!(keys.settled, "{mode}: {keys:?}");
        let rotation: RotationReport = report(&mut bed, Request::RotateKeys);
        assert_eq!(rotation.begun, Some(before[0] + 1), "{mode}");
        assert_eq!(rotation.target, before[0] + 1);
        settle(&mut bed);
        assert_eq!(published(&bed), [before[0], before[0] + 1], "{mode}: receivable, hence published");
        let keys: KeysReport = report(&mut bed, Request::Keys);
        assert!(!keys.settled && !keys.requested);
        assert_eq!(keys.epochs[1].unconfirmed, [name(1), name(2)].into(), "{mode}");
        bed.node.state().greeted.clear();
        bed.pass();
        assert_eq!(bed.node.state().greeted.len(), 2, "{mode}: who has not confirmed is probed");
        receive(&bed);
        settle(&mut bed);
        let keys: KeysReport = report(&mut bed, Request::Keys);
        let sending: Vec<_> = keys.peers.iter().map(|peer| peer.sending_own).collect();
        assert_eq!(sending, [Some(before[0] + 1); 2], "{mode}: confirmed, hence used");
        // Nothing comes under the old one any more.
        for _ in 0..3 {
            later(&bed, 40);
            settle(&mut bed);
        }
        assert_eq!((held(&bed), published(&bed)), (vec![before[0] + 1], vec![before[0] + 1]), "{mode}");
        assert!(bed.issues().is_empty(), "{mode}: {:?}", bed.state.borrow().issues);
        let keys: KeysReport = report(&mut bed, Request::Keys);
        assert!(keys.settled, "{mode}: {keys:?}");
        assert_eq!(bed.kernel.state().own.xfrm_states.len(), 4, "{mode}");
    }
}

#[test]
fn associations_that_were_flushed_come_back_under_other_keys() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        settle(&mut bed);
        let before = held(&bed);
        let flushed: BTreeSet<XfrmStateKey> = bed.kernel.state().own.xfrm_states.keys().copied().collect();
        later(&bed, 60);
        bed.kernel.flush(Table::XfrmStates);
        settle(&mut bed);
        later(&bed, 10);
        settle(&mut bed);
        assert!(held(&bed).last() > before.last(), "{mode}: {:?}", held(&bed));
        let now: BTreeSet<XfrmStateKey> = bed.kernel.state().own.xfrm_states.keys().copied().collect();
        assert!(now.is_disjoint(&flushed) && now.len() >= 4, "{mode}: {now:?}");
    }
}

#[test]
fn what_cannot_be_written_down_is_not_done() {
    let mut bed = Bed::new(Mode::Ipsec, 3);
    bed.node.state().notes_fail = true;
    settle(&mut bed);
    assert_eq!(bed.kernel.state().own.xfrm_states.len(), 0);
    assert_eq!(published(&bed), [0; 0]);
    let reason = bed.state.borrow().reason.clone().unwrap();
    assert!(reason.contains("written down") && reason.contains("no space left"), "{reason}");
    bed.node.state().notes_fail = false;
    settle(&mut bed);
    assert_eq!(bed.kernel.state().own.xfrm_states.len(), 4);
    assert!(bed.state.borrow().ready);
    // Later too: a peer that joins is not reached, the others are.
    bed.node.state().notes_fail = true;
    bed.allocate(3);
    bed.join(3);
    // What protects needs no writing, and is kept up meanwhile; what there is stays.
    bed.kernel.state().own.nft = None;
    let policies = bed.kernel.state().own.xfrm_policies.clone();
    settle(&mut bed);
    assert!(bed.kernel.state().own.nft.is_some());
    let kernel = bed.kernel.state();
    assert_eq!(kernel.own.xfrm_states.len(), 4);
    assert!(policies.iter().all(|(key, policy)| kernel.own.xfrm_policies.get(key) == Some(policy)));
    drop(kernel);
    assert!(!bed.engine.keeping.hurries(), "what cannot be done is not hurried");
}

#[test]
fn a_daemon_that_died_between_writing_and_installing_leaves_nothing_that_is_used_twice() {
    let mut bed = Bed::new(Mode::Ipsec, 3);
    // A key and nothing else.
    bed.engine.read_source();
    bed.node.state().keys.begin(1, Duration::ZERO).unwrap();
    let (facts, plan) = {
        let facts = bed.engine.facts().unwrap();
        let plan = bed.engine.plan(&facts);
        (facts, plan)
    };
    assert!(!plan.rotation.spend.is_empty());
    bed.engine.write_ahead(&facts, &plan).unwrap();
    let written: BTreeSet<XfrmStateKey> =
        plan.rotation.spend.values().filter(|it| it.stage == AssociationStage::Used).map(|it| it.key).collect();
    bed.restart();
    for _ in 0..4 {
        settle(&mut bed);
        later(&bed, 10);
    }
    assert!(bed.kernel.state().installed_associations.iter().all(|key| !written.contains(key)));
    assert_eq!(bed.kernel.state().own.xfrm_states.len(), 4);
}

#[test]
fn a_daemon_that_starts_adopts_what_there_is() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        settle(&mut bed);
        let (keys, kernel) = (held(&bed), bed.kernel.state().own.clone());
        bed.restart();
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
        settle(&mut bed);
        assert_eq!((held(&bed), &bed.kernel.state().own), (keys, &kernel), "{mode}");
        // Also when the cluster is not there.
        bed.source.state().down = true;
        bed.restart();
        assert_eq!(bed.changes_of_a_pass(), 0, "{mode}");
    }
}

#[test]
fn another_configuration_of_associations_takes_another_key() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    settle(&mut bed);
    let before = bed.node.state().keys.epochs(Duration::ZERO).unwrap();
    bed.config.ipsec.replay_window = 1024;
    bed.restart();
    settle(&mut bed);
    let after = bed.node.state().keys.epochs(Duration::ZERO).unwrap();
    assert!(after.values().all(|new| before.values().all(|old| old.public_key != new.public_key)));
    assert_eq!(after.len(), 1);
}

#[test]
fn an_association_that_the_kernel_refuses_is_tried_again_under_the_same_key() {
    let mut bed = Bed::new(Mode::Ipsec, 3);
    bed.kernel.inject(Fault::Change(Table::XfrmStates), Errno::ENOMEM);
    bed.pass();
    let first = held(&bed);
    for _ in 0..5 {
        bed.pass();
        later(&bed, 10);
    }
    assert_eq!(held(&bed), first, "nothing was installed, so that nothing is lost");
    bed.kernel.heal();
    settle(&mut bed);
    assert_eq!((held(&bed), published(&bed)), (first.clone(), first));
    assert_eq!(bed.kernel.state().own.xfrm_states.len(), 4);
}

#[test]
fn a_kernel_without_esp_blocks_and_nothing_leaves_unprotected() {
    for mode in MODES {
        let mut bed = Bed::new(mode, 3);
        bed.node.state().esp_unavailable = Some("it has no ESP over IPv4 (esp4)".into());
        settle(&mut bed);
        let Response::NotReady { reason, issues } = bed.ask(Request::Ready) else { panic!("{mode}: ready") };
        assert!(reason.contains("esp4"), "{mode}: {reason}");
        assert!(
            issues.iter().any(|it| it.kind == IssueKind::EncapsulationUnavailable && it.severity == Severity::Blocking)
        );
        let kernel = bed.kernel.state();
        assert!(kernel.own.nft.is_some(), "{mode}");
        assert_eq!(kernel.own.xfrm_states.len(), 0, "{mode}");
        drop(kernel);
        assert_eq!(routes(&bed), 0, "{mode}: nothing leads anywhere");
        assert_eq!(published(&bed), [0; 0], "{mode}");
    }
}

#[test]
fn a_key_that_cannot_be_made_costs_no_more_passes_than_anything_else() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    bed.node.state().keys_fail = true;
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.passes > 0);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(running.passes() <= 4, "{} passes", running.passes());
    assert!(bed.node.state().key_actions <= 4);
    let blocked = bed
        .state
        .borrow()
        .issues
        .iter()
        .any(|it| it.severity == Severity::Blocking && it.message.contains("the disk is full"));
    assert!(blocked, "{:?}", bed.state.borrow().issues);
    bed.node.state().keys_fail = false;
    let started = Instant::now();
    running.handle.waker().wake();
    while bed.kernel.state().own.xfrm_states.len() < 2 {
        assert!(started.elapsed() < Duration::from_secs(3), "passes follow each other at once");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn counters_that_a_rotation_waits_for_are_noticed_without_an_event() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    settle(&mut bed);
    receive(&bed);
    later(&bed, 100);
    settle(&mut bed);
    let _: RotationReport = report(&mut bed, Request::RotateKeys);
    settle(&mut bed);
    assert!(!bed.engine.rotation_moved(None), "nothing new");
    bed.node.state().greeted.clear();
    assert!(!bed.engine.rotation_moved(None));
    assert_eq!(bed.node.state().greeted.len(), 1, "a look probes who has not confirmed");
    receive(&bed);
    assert!(bed.engine.rotation_moved(None), "a packet came");
    settle(&mut bed);
    later(&bed, 29);
    assert!(!bed.engine.rotation_moved(None));
    bed.node.state().greeted.clear();
    // A rotation that waits for long is not pushed on with every look.
    later(&bed, 60);
    assert!(!bed.engine.rotation_moved(None));
    assert!(bed.node.state().greeted.is_empty());
}

#[test]
fn an_event_storm_of_rotations_is_bounded() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    settle(&mut bed);
    let before = held(&bed);
    for _ in 0..10 {
        let _: RotationReport = report(&mut bed, Request::RotateKeys);
    }
    assert!(held(&bed).len() <= 2, "{:?}", held(&bed));
    let rotation: RotationReport = report(&mut bed, Request::RotateKeys);
    assert_eq!(rotation.begun, None);
    assert!(rotation.waiting.is_some(), "it says what it waits for");
    assert!(held(&bed).last() <= before.last().map(|last| last + 1).as_ref());
}

#[test]
fn a_request_is_served_by_a_key_that_nobody_knows_of_yet() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    settle(&mut bed);
    receive(&bed);
    later(&bed, 100);
    settle(&mut bed);
    // Two ask, one right after the other.
    let rotations: [RotationReport; 2] = [(); 2].map(|()| report(&mut bed, Request::RotateKeys));
    assert_eq!(rotations[0].begun, held(&bed).pop());
    assert_eq!(rotations[0].target, rotations[1].target);
    settle(&mut bed);
    let keys: KeysReport = report(&mut bed, Request::Keys);
    assert!(!keys.requested && keys.waiting.is_none(), "no other key is wanted: {keys:?}");
}

#[test]
fn udp_encapsulation_has_its_process_as_long_as_it_is_configured() {
    let mut bed = Bed::new(Mode::Ipsec, 2);
    bed.config.ipsec.udp_port = Some(4500);
    bed.restart();
    bed.node.state().udp_fails = Some("UDP port 4500 is taken");
    bed.pass();
    let state = bed.state.borrow().clone();
    assert!(!state.ready);
    let issue = state.issues.iter().find(|it| it.subject == "UDP encapsulation").unwrap();
    assert_eq!((issue.kind, issue.severity), (IssueKind::EncapsulationUnavailable, Severity::Blocking));
    assert!(issue.remedy.contains("ss -ulpn"), "{issue}");
    bed.node.state().udp_fails = None;
    bed.pass();
    assert_eq!(bed.node.state().udp_port, Some(4500));
    bed.config.ipsec.udp_port = None;
    bed.restart();
    bed.pass();
    assert_eq!(bed.node.state().udp_port, None);
}

#[test]
fn reports_say_what_is_used_with_whom() {
    let mut bed = Bed::new(Mode::Ipsec, 3);
    bed.source.state().snapshot.nodes.get_mut(&name(2)).unwrap().esp = Some(esp_record(2, &[]));
    bed.node.state().xfrm_errors = [("XfrmInNoPols".to_owned(), 3), ("XfrmInError".to_owned(), 0)].into();
    settle(&mut bed);
    let status: Status = report(&mut bed, Request::Status);
    assert_eq!(status.cipher, Some(husk_overlay::esp::Aead::AesGcm128));
    assert_eq!(status.xfrm_errors, [("XfrmInNoPols".to_owned(), 3)].into());
    assert_eq!(status.keys.unwrap().newest, held(&bed).pop());
    receive(&bed);
    bed.pass();
    later(&bed, 10);
    let peers: Vec<PeerReport> = report(&mut bed, Request::Peers);
    assert_eq!((peers[0].state, peers[1].state), (PeerState::Connected, PeerState::Waiting));
    assert_eq!((peers[0].received, peers[0].received_age), (Some(100), Some(10)));
    later(&bed, 180);
    let peers: Vec<PeerReport> = report(&mut bed, Request::Peers);
    assert_eq!(peers[0].state, PeerState::Idle);
    let keys: KeysReport = report(&mut bed, Request::Keys);
    assert_eq!(keys.associations.len(), 2);
    assert!(keys.associations.iter().all(|it| it.peer == Some(name(1)) && it.own_epoch == held(&bed).pop()));
    let [from, to] = [address(1), address(0)].map(|it| it.iter().next().unwrap());
    assert_eq!((keys.associations[0].source, keys.associations[0].destination), (from, to));
    let due = keys.due.unwrap();
    assert!(due.earliest < due.latest && due.latest <= 24 * 60 * 60, "{due:?}");
}

#[test]
fn a_peer_of_which_nothing_can_be_decrypted_is_told_of() {
    let mut bed = Bed::new(Mode::Ipsec, 3);
    settle(&mut bed);
    let of_the_first = |bed: &Bed, change: fn(&mut ActualXfrmState)| {
        let from = address(1).iter().next().unwrap();
        bed.kernel.state().own.xfrm_states.values_mut().filter(|state| state.source == from).for_each(change);
    };
    let told = |bed: &Bed| -> Vec<Issue> { bed.state.borrow().issues.clone() };
    of_the_first(&bed, |state| state.undecryptable = 7);
    bed.pass();
    let [issue] = &told(&bed)[..] else { panic!("{:?}", told(&bed)) };
    assert_eq!((issue.kind, issue.severity), (IssueKind::KeyMismatch, Severity::Error));
    assert_eq!(issue.subject, name(1).to_string());
    assert!(issue.message.contains("7 failed"), "{issue}");
    assert!(issue.remedy.contains("ipsec.presharedKeyFile is not set on this node"), "{issue}");
    bed.engine.parts.config.ipsec.preshared_key_file = Some("/etc/husk/secret".into());
    bed.pass();
    assert!(told(&bed)[0].remedy.contains("the same secret into /etc/husk/secret"), "{}", told(&bed)[0]);
    // One packet that could be decrypted proves that the keys are alike: the others are somebody else's.
    of_the_first(&bed, |state| state.packets = 1);
    bed.pass();
    assert_eq!(told(&bed), []);
}

#[test]
fn a_mode_without_keys_says_so() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    bed.pass();
    for request in [Request::Keys, Request::RotateKeys] {
        let (answer, mut receiver) = tokio::sync::oneshot::channel();
        bed.engine.answer(crate::engine::Ask { request, answer });
        let Response::Refused { reason } = receiver.try_recv().unwrap() else { panic!("not refused") };
        assert!(reason.contains("mode vxlan does not encrypt"), "{reason}");
    }
}
