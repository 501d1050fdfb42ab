//! Blocks: claimed one at a time, given back in the order that lets no pod fall between.

use std::collections::BTreeSet;

use husk_overlay::config::{BlockOrigin, Config};
use husk_overlay::ipc::Response;
use husk_overlay::issue::IssueKind;
use husk_overlay::mode::Mode;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::Pool;

use super::bed::{Bed, address, blocks, name, prefix};

/// Four blocks of each family, no cool-down.
fn small() -> Config {
    let mut config = Config::new(vec![prefix("10.64.0.0/24"), prefix("fd42::/120")]);
    config.mode = Mode::Wireguard;
    config.ipam.cool_down = 0;
    config
}

/// Blocks of 4 addresses out of one IPv4 CIDR of 4 blocks.
fn tiny() -> Config {
    let mut config = Config::new(vec![prefix("10.64.0.0/28")]);
    config.mode = Mode::Wireguard;
    config.ipam.cool_down = 0;
    config.block_lengths.ipv4 = 30;
    config
}

fn four() -> BTreeSet<Family> {
    BTreeSet::from([Family::Ipv4])
}

/// Leases until nothing is left; returns the names of the pods.
fn fill(bed: &Bed, tag: &str) -> Vec<String> {
    let names = (0..).map(|index| format!("{tag}{index}"));
    names.take_while(|pod| bed.lease(pod).is_ok()).collect()
}

#[test]
fn a_node_claims_one_block_of_each_family_and_keeps_them() {
    let mut bed = Bed::of(small());
    bed.pass();
    assert_eq!(bed.claims(), [prefix("10.64.0.0/26"), prefix("fd42::/122")]);
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    assert_eq!(bed.node_file().unwrap().blocks, bed.owned());
    assert_eq!(bed.own_record().unwrap().blocks, bed.owned().into_iter().collect());
    bed.pass();
    bed.restart();
    bed.pass();
    assert_eq!(bed.claims().len(), 2);
}

#[test]
fn a_lost_race_moves_on_to_the_next_block() {
    let mut bed = Bed::of(small());
    bed.source.state().lost = [prefix("10.64.0.0/26"), prefix("10.64.0.64/26")].into();
    bed.pass();
    assert_eq!(bed.owned(), [prefix("10.64.0.128/26"), prefix("fd42::/122")]);
    assert!(bed.state.borrow().ready);
}

#[test]
fn a_source_that_lists_late_is_not_asked_for_block_after_block() {
    let mut bed = Bed::of(small());
    let empty = bed.source.state().snapshot.clone();
    bed.source.state().stale = Some(empty);
    for _ in 0..5 {
        bed.pass();
    }
    assert_eq!(bed.claims().len(), 2);
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    bed.source.state().stale = None;
    bed.pass();
    assert_eq!(bed.node_file().unwrap().blocks, bed.owned());
    // Once listed, the list's word counts: somebody took the blocks away.
    bed.source.state().snapshot.blocks.clear();
    bed.pass();
    assert_eq!(bed.claims().len(), 4);
}

#[test]
fn nothing_is_claimed_while_the_source_is_away() {
    let mut bed = Bed::of(small());
    bed.source.state().down = true;
    bed.pass();
    assert!(bed.claims().is_empty());
    assert!(matches!(bed.engine.more_blocks(&four()), Response::NotReady { .. }));
    bed.source.state().down = false;
    bed.source.state().read_only = true;
    bed.pass();
    assert!(bed.issues().contains(&IssueKind::SourceUnavailable) && !bed.issues().contains(&IssueKind::PoolExhausted));
    assert!(!bed.state.borrow().ready);
    bed.source.state().read_only = false;
    bed.pass();
    assert!(bed.state.borrow().ready);
}

#[test]
fn an_exhausted_pool_is_a_reason_with_a_remedy() {
    let mut bed = Bed::of(small());
    bed.source.state().snapshot.blocks.insert(prefix("10.64.0.0/24"), name(5));
    bed.pass();
    let reason = bed.state.borrow().reason.clone().unwrap();
    assert!(reason.contains("every IPv4 block") && reason.contains("clusterCIDRs"), "{reason}");
    assert!(bed.issues().contains(&IssueKind::PoolExhausted));
    // The other family was claimed once, not in every pass.
    bed.pass();
    assert_eq!(bed.owned(), [prefix("fd42::/122")]);
    // The node is known to the others all the same.
    assert!(bed.own_record().is_some());
    bed.source.state().snapshot.blocks.remove(&prefix("10.64.0.0/24"));
    bed.pass();
    assert!(bed.state.borrow().ready);
}

#[test]
fn pools_of_the_source_replace_those_of_the_configuration() {
    let mut bed = Bed::of(small());
    let pool = |name: &str, cidr: &str, block_length, disabled| {
        (name.to_owned(), Pool { name: name.to_owned(), cidr: prefix(cidr), block_length, disabled })
    };
    bed.source.state().snapshot.pools = [
        // Outside the cluster CIDRs: a block of it would be no use, and the node would claim one after the other.
        pool("a-foreign", "10.99.0.0/16", 26, false),
        pool("b-too-wide", "10.0.0.0/8", 26, false),
        pool("c-off", "10.64.0.0/25", 27, true),
        pool("d-four", "10.64.0.128/25", 27, false),
        pool("e-six", "fd42::80/121", 124, false),
    ]
    .into();
    bed.pass();
    bed.pass();
    assert_eq!(bed.owned(), [prefix("10.64.0.128/27"), prefix("fd42::80/124")]);
    assert!(bed.state.borrow().ready);
    let subjects: Vec<String> = bed.state.borrow().issues.iter().map(|issue| issue.subject.clone()).collect();
    assert_eq!(subjects, ["AddressPool a-foreign", "AddressPool b-too-wide"]);
}

#[test]
fn a_block_outside_the_cluster_cidrs_does_not_count() {
    // The configuration's CIDR was changed; a block of the old one is still the node's.
    let mut bed = Bed::of(small());
    bed.source.state().snapshot.blocks.insert(prefix("10.1.0.0/26"), name(0));
    bed.pass();
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    assert!(bed.owned().contains(&prefix("10.64.0.0/26")));
    bed.pass();
    assert_eq!(bed.claims().len(), 2);
}

#[test]
fn more_blocks_come_on_request_and_the_nodes_own_address_stays() {
    let mut bed = Bed::of(tiny());
    bed.source.state().snapshot.blocks.insert(prefix("10.64.0.0/30"), name(9));
    bed.source.state().lost = [prefix("10.64.0.4/30")].into();
    bed.pass();
    let router = bed.node_file().unwrap().router;
    assert_eq!(bed.owned(), [prefix("10.64.0.8/30")]);
    assert_eq!(fill(&bed, "a").len(), 3);
    // A block below the node's first one is free again; taken, its first address would become the node's own.
    bed.source.state().snapshot.blocks.remove(&prefix("10.64.0.4/30"));
    assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    assert_eq!(bed.owned(), [prefix("10.64.0.8/30"), prefix("10.64.0.12/30")]);
    let file = bed.node_file().unwrap();
    assert_eq!((file.blocks, file.router), (bed.owned(), router));
    assert_eq!(bed.own_record().unwrap().blocks, bed.owned().into_iter().collect());
    assert_eq!(fill(&bed, "b").len(), 4);
}

#[test]
fn pods_that_run_out_together_get_one_block_together() {
    let mut bed = Bed::of(tiny());
    bed.pass();
    fill(&bed, "a");
    for _ in 0..10 {
        assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    }
    assert_eq!(bed.owned().len(), 2);
    fill(&bed, "b");
    assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    assert_eq!(bed.owned().len(), 3);
    fill(&bed, "c");
    assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    let last = fill(&bed, "d");
    let Response::Refused { reason } = bed.engine.more_blocks(&four()) else { panic!("there are four blocks") };
    assert!(reason.contains("every IPv4 block") && reason.contains("AddressPool"), "{reason}");
    // Out of blocks for more pods is no reason to fail those that are served, but people are told, for as long as it is so.
    assert!(bed.state.borrow().ready);
    assert_eq!(bed.issues(), [IssueKind::PoolExhausted].into());
    bed.release(&last[0]);
    bed.pass();
    assert!(bed.issues().is_empty());
}

#[test]
fn addresses_that_rest_are_no_addresses_left() {
    let mut config = tiny();
    config.ipam.cool_down = 3600;
    let mut bed = Bed::of(config);
    bed.pass();
    for pod in fill(&bed, "a") {
        bed.release(&pod);
    }
    assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    assert_eq!(bed.owned().len(), 2);
    // And a block in which addresses rest is not empty.
    bed.pass();
    assert_eq!(bed.owned().len(), 2);
}

#[test]
fn a_family_the_cluster_does_not_have_is_not_claimed() {
    let mut bed = Bed::of(tiny());
    bed.pass();
    assert_eq!(bed.engine.more_blocks(&BTreeSet::from([Family::Ipv6])), Response::Done);
    assert_eq!(bed.owned().len(), 1);
}

/// Two blocks, the second one just fallen empty.
fn with_an_empty_block() -> (Bed, Prefix) {
    let mut bed = Bed::of(tiny());
    bed.pass();
    let first = fill(&bed, "a");
    assert_eq!(bed.engine.more_blocks(&four()), Response::Done);
    bed.lease("b").unwrap();
    let second = *bed.owned().last().unwrap();
    bed.release("b");
    for pod in &first[..2] {
        bed.release(pod);
    }
    (bed, second)
}

#[test]
fn an_empty_block_goes_back_after_record_and_node_json_stopped_naming_it() {
    let (mut bed, second) = with_an_empty_block();
    bed.pass();
    let releases = bed.releases();
    let [(block, node_file, record)] = releases.as_slice() else { panic!("{releases:?}") };
    assert_eq!(*block, second);
    assert!(!node_file.as_ref().unwrap().blocks.contains(&second));
    assert!(!record.as_ref().unwrap().blocks.contains(&second));
    assert_eq!(bed.owned().len(), 1);
    bed.pass();
    bed.pass();
    assert_eq!(bed.releases().len(), 1);
    assert_eq!(bed.node_file().unwrap().blocks, bed.owned());
}

#[test]
fn the_block_of_the_published_router_address_stays_and_a_lower_one_goes() {
    let mut bed = Bed::of(tiny());
    let (lower, higher) = (prefix("10.64.0.0/30"), prefix("10.64.0.8/30"));
    bed.source.state().snapshot.blocks.insert(higher, name(0));
    bed.pass();
    let router = bed.node_file().unwrap().router;
    assert_eq!(router.iter().collect::<Vec<_>>(), [higher.address()]);
    // A block below it, which an administrator gave to the node.
    bed.source.state().snapshot.blocks.insert(lower, name(0));
    bed.restart();
    bed.pass();
    bed.pass();
    assert_eq!(bed.owned(), [higher]);
    assert_eq!(bed.node_file().unwrap().router, router);
    assert_eq!(bed.own_record().unwrap().router, router);
}

#[test]
fn the_last_block_and_one_that_is_needed_stay() {
    let mut bed = Bed::of(tiny());
    bed.pass();
    let pods = fill(&bed, "a");
    bed.engine.more_blocks(&four());
    bed.pass();
    assert_eq!(bed.owned().len(), 2, "the first block is full");
    for pod in pods {
        bed.release(&pod);
    }
    bed.pass();
    assert_eq!(bed.owned(), [prefix("10.64.0.0/30")]);
}

#[test]
fn a_block_leased_from_just_before_node_json_changed_is_taken_up_again() {
    let (mut bed, second) = with_an_empty_block();
    // The pass chooses the block, and a plugin that read the old node.json leases from it before the daemon looks again.
    bed.engine.read_source();
    bed.engine.retire_blocks();
    bed.lease_from("late", &[second], Vec::new()).unwrap();
    bed.pass();
    assert!(bed.releases().is_empty());
    assert_eq!(bed.owned().len(), 2);
    bed.pass();
    assert_eq!(bed.node_file().unwrap().blocks, bed.owned());
    assert!(bed.own_record().unwrap().blocks.contains(&second));
}

#[test]
fn no_block_goes_back_while_record_or_node_json_may_still_name_it() {
    // The record cannot be written.
    let (mut bed, second) = with_an_empty_block();
    bed.source.state().read_only = true;
    bed.pass();
    assert!(bed.own_record().unwrap().blocks.contains(&second));
    assert!(bed.releases().is_empty() && bed.owned().contains(&second));
    bed.source.state().read_only = false;
    bed.pass();
    assert_eq!(bed.releases().len(), 1);

    // node.json can neither be written nor removed.
    let (mut bed, second) = with_an_empty_block();
    let node_file = bed.directory.path().join("node.json");
    std::fs::remove_file(&node_file).unwrap();
    std::fs::create_dir(&node_file).unwrap();
    bed.pass();
    assert!(bed.releases().is_empty() && bed.owned().contains(&second));
    assert!(!bed.state.borrow().ready);
    std::fs::remove_dir(&node_file).unwrap();
    bed.pass();
    assert_eq!(bed.releases().len(), 1);
}

#[test]
fn a_released_block_that_is_still_listed_is_not_ours() {
    let (mut bed, second) = with_an_empty_block();
    let listed = bed.source.state().snapshot.clone();
    bed.source.state().stale = Some(listed);
    bed.pass();
    assert_eq!(bed.releases().len(), 1);
    // Somebody else has it by now; the list says so only later.
    bed.source.state().snapshot.blocks.insert(second, name(6));
    bed.pass();
    assert!(!bed.node_file().unwrap().blocks.contains(&second));
    bed.source.state().stale = None;
    bed.pass();
    assert_eq!(bed.source.state().snapshot.blocks[&second], name(6));
    assert!(!bed.node_file().unwrap().blocks.contains(&second));
}

#[test]
fn another_nodes_claim_to_our_block_changes_nothing_for_us() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    bed.pass();
    let whole = bed.kernel.state().own.clone();
    let mut thief = super::bed::record(2);
    thief.blocks.extend(blocks(0));
    bed.source.state().snapshot.nodes.insert(name(2), thief);
    bed.pass();
    assert_eq!(bed.kernel.state().own, whole);
    assert!(bed.issues().contains(&IssueKind::DuplicateBlock));
    assert_eq!(bed.own_record().unwrap().addresses, address(0));
    assert!(bed.state.borrow().ready);
}

/// Blocks as Kubernetes gives them to nodes.
fn of_nodes() -> Bed {
    let mut config = small();
    config.ipam.blocks = BlockOrigin::NodeCidrs;
    Bed::of(config)
}

#[test]
fn a_block_with_pods_that_the_source_forgot_is_claimed_again() {
    let mut bed = Bed::of(small());
    bed.pass();
    bed.lease("pod").unwrap();
    let owned = bed.owned();
    // As a source that was restored from an older state, also while no daemon ran.
    for restart in [false, true] {
        bed.pass();
        bed.source.state().snapshot.blocks.clear();
        let claims = bed.claims().len();
        if restart {
            bed.restart();
        }
        bed.pass();
        assert_eq!(bed.owned(), owned, "restarted: {restart}");
        assert_eq!(bed.claims()[claims..], owned);
        assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    }
}

#[test]
fn a_block_with_pods_that_somebody_else_has_by_now_is_an_issue_until_the_pods_are_gone() {
    let mut bed = Bed::of(small());
    bed.pass();
    bed.lease("pod").unwrap();
    let lost = prefix("10.64.0.0/26");
    bed.source.state().snapshot.blocks.insert(lost, name(7));
    for _ in 0..2 {
        bed.pass();
        let issues = bed.state.borrow().issues.clone();
        let issue = issues.iter().find(|issue| issue.kind == IssueKind::BlockLost).expect("the loss is told");
        assert!(issue.message.contains(&name(7).to_string()) && issue.subject.contains("10.64.0.0/26"), "{issue}");
    }
    assert!(!bed.owned().contains(&lost) && bed.state.borrow().ready, "new pods get addresses of another block");
    bed.release("pod");
    bed.pass();
    assert!(bed.state.borrow().issues.iter().all(|issue| issue.kind != IssueKind::BlockLost));
}

#[test]
fn cidrs_of_nodes_are_waited_for_and_never_claimed_nor_given_back() {
    let mut bed = of_nodes();
    bed.pass();
    let reason = bed.state.borrow().reason.clone().unwrap();
    assert!(reason.contains("podCIDRs") && reason.contains("--allocate-node-cidrs"), "{reason}");
    assert!(bed.own_record().is_some(), "others can reach the node already");
    let cidrs = [prefix("10.64.0.0/30"), prefix("10.64.0.16/30"), prefix("fd42::/122")];
    bed.source.state().snapshot.blocks.extend(cidrs.map(|cidr| (cidr, name(0))));
    bed.pass();
    assert!(bed.state.borrow().ready, "{:?}", bed.state.borrow().reason);
    assert_eq!(bed.owned(), cidrs);
    fill(&bed, "pod");
    bed.pass();
    let Response::Refused { reason } = bed.engine.more_blocks(&four()) else { panic!("there are no more") };
    assert!(reason.contains("node-cidrs") && reason.contains("--node-cidr-mask-size"), "{reason}");
    assert!(bed.claims().is_empty() && bed.releases().is_empty());
}
