//! The store as a whole.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;

use husk_overlay::issue::IssueKind;
use husk_overlay::name::{ContainerId, InterfaceName, NetworkName};
use husk_overlay::port_mapping::{PortMapping, TransportProtocol};
use proptest::prelude::*;

use super::*;
use crate::Shortage;

/// A node with blocks, and its store in a directory of its own.
struct Node {
    directory: tempfile::TempDir,
    blocks: Vec<Prefix>,
    families: BTreeSet<Family>,
    reserved: DualStack,
    cool_down: Duration,
}

impl Node {
    fn new(blocks: &[&str]) -> Self {
        let blocks: Vec<Prefix> = blocks.iter().map(|block| block.parse().unwrap()).collect();
        Self {
            directory: tempfile::tempdir().unwrap(),
            families: blocks.iter().map(Prefix::family).collect(),
            reserved: husk_overlay::plan::router_addresses(&blocks.iter().copied().collect()),
            blocks,
            cool_down: Duration::from_secs(30),
        }
    }

    fn store(&self) -> LeaseStore {
        LeaseStore::new(self.directory.path().join("leases"), DEFAULT_LOCK_WAIT)
    }

    fn supply(&self) -> Supply<'_> {
        Supply { blocks: &self.blocks, families: &self.families, reserved: self.reserved, cool_down: self.cool_down }
    }

    fn allocate(&self, demand: &Demand, now: u64) -> Result<Lease, Error> {
        self.store().lock()?.allocate(&self.supply(), demand, BootTime(now))
    }

    fn ipv4(&self, name: &str, now: u64) -> String {
        self.allocate(&demand(name), now).unwrap().endpoint.addresses.ipv4.unwrap().to_string()
    }

    fn release(&self, name: &str, now: u64) -> Option<DualStack> {
        self.store().release(&id(name), BootTime(now)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.store().directory())
            .unwrap()
            .map(|item| item.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn id(name: &str) -> AttachmentId {
    AttachmentId {
        network: NetworkName::new("husk").unwrap(),
        container_id: ContainerId::new(name).unwrap(),
        ifname: InterfaceName::new("eth0").unwrap(),
    }
}

fn demand(name: &str) -> Demand {
    let netns = NetnsIdentity { path: format!("/run/netns/{name}"), device: 4, inode: 7 };
    Demand {
        pod_namespace: Some("default".to_owned()),
        pod_name: Some(name.to_owned()),
        pod_uid: Some(format!("uid-of-{name}")),
        ..Demand::plain(id(name), netns)
    }
}

fn wanting(name: &str, addresses: &[&str]) -> Demand {
    Demand { addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(), ..demand(name) }
}

#[test]
fn a_lease_is_what_the_daemon_loads() {
    let node = Node::new(&["10.42.0.64/26", "fd42::40/122"]);
    let lease = node.allocate(&demand("a"), 5).unwrap();
    assert_eq!(
        lease.endpoint.addresses.iter().map(|it| it.to_string()).collect::<Vec<_>>(),
        ["10.42.0.65", "fd42::41"]
    );

    let leases = node.store().load().unwrap();
    assert_eq!(leases.endpoints, [(id("a"), lease.endpoint.clone())].into());
    assert_eq!(leases.created, [(id("a"), BootTime(5))].into());
    assert_eq!(leases.issues, []);
    assert_eq!(node.store().find(&id("a")).unwrap(), Some(lease.endpoint));
    assert_eq!(node.store().find(&id("b")).unwrap(), None);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(node.store().directory()), 0o700);
    for name in node.names() {
        assert_eq!(mode(&node.store().directory().join(name)), 0o600);
    }
}

fn publishing(name: &str, host_port: u16, host_ip: &str) -> Demand {
    let port = |number| std::num::NonZeroU16::new(number).unwrap();
    let host_ip = (!host_ip.is_empty()).then(|| host_ip.parse().unwrap());
    let protocol = TransportProtocol::Tcp;
    let mapping = PortMapping { protocol, host_port: port(host_port), host_ip, container_port: port(80) };
    Demand { port_mappings: vec![mapping], ..demand(name) }
}

#[test]
fn a_port_of_the_host_is_leased_to_one_pod() {
    let node = Node::new(&["10.42.0.64/26"]);
    let web = node.allocate(&publishing("web", 8080, ""), 0).unwrap();
    assert_eq!(node.store().load().unwrap().endpoints[&id("web")].port_mappings, web.endpoint.port_mappings);
    for address in ["", "0.0.0.0", "192.0.2.1"] {
        let error = node.allocate(&publishing("other", 8080, address), 0).unwrap_err();
        assert!(matches!(&error, Error::PortClaimed(clash) if clash.holder == id("web")), "{error}");
        assert!(error.to_string().contains("8080") && error.to_string().contains("default/web"), "{error}");
    }
    assert_eq!(node.store().find(&id("other")).unwrap(), None);
    node.allocate(&publishing("elsewhere", 8081, ""), 0).unwrap();
    node.allocate(&publishing("one", 8082, "192.0.2.1"), 0).unwrap();
    node.allocate(&publishing("two", 8082, "192.0.2.2"), 0).unwrap();
    node.release("web", 1).unwrap();
    node.allocate(&publishing("other", 8080, ""), 2).unwrap();
}

/// Leases outlive an upgrade of the plugin.
#[test]
fn a_lease_of_a_release_without_port_mappings_is_read() {
    let node = Node::new(&["10.42.0.64/26"]);
    drop(node.allocate(&publishing("a", 8080, ""), 0).unwrap());
    let file = node.names().into_iter().find(|name| name.contains("10.42.0.65")).unwrap();
    let path = node.store().directory().join(file);
    let mut content: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(content.as_object_mut().unwrap().remove("portMappings").is_some());
    fs::write(&path, content.to_string()).unwrap();
    let leases = node.store().load().unwrap();
    assert_eq!(leases.issues, []);
    assert_eq!(leases.endpoints[&id("a")].port_mappings, []);
    node.allocate(&publishing("b", 8080, ""), 0).unwrap();
}

#[test]
fn one_family_alone_works() {
    let lease = Node::new(&["fd42::/122"]).allocate(&demand("a"), 0).unwrap();
    assert_eq!(lease.endpoint.addresses, DualStack { ipv4: None, ipv6: Some("fd42::1".parse().unwrap()) });
    let lease = Node::new(&["10.42.0.0/26"]).allocate(&demand("a"), 0).unwrap();
    assert_eq!(lease.endpoint.addresses, DualStack { ipv4: Some("10.42.0.1".parse().unwrap()), ipv6: None });
}

#[test]
fn a_second_lease_for_an_attachment_is_refused() {
    let node = Node::new(&["10.42.0.0/26"]);
    node.allocate(&demand("a"), 0).unwrap();
    assert!(matches!(node.allocate(&demand("a"), 1), Err(Error::AlreadyLeased { .. })));
    assert_eq!(node.store().load().unwrap().endpoints.len(), 1);
}

#[test]
fn addresses_go_round_and_rest() {
    let mut node = Node::new(&["10.42.0.0/29"]);
    node.cool_down = Duration::from_secs(10);
    assert_eq!(node.ipv4("a", 0), "10.42.0.1");
    assert!(node.release("a", 1_000).is_some());
    // The cursor moves on although .1 is free, and comes round to it after it has rested.
    let rest: Vec<String> = (2..8).map(|n| node.ipv4(&format!("pod{n}"), 2_000)).collect();
    assert_eq!(rest, (2..8).map(|n| format!("10.42.0.{n}")).collect::<Vec<_>>());
    assert!(matches!(node.allocate(&demand("b"), 10_999), Err(Error::Exhausted(_))));
    assert_eq!(node.ipv4("b", 11_000), "10.42.0.1");
    assert!(!node.names().iter().any(|name| name.contains("released")), "{:?}", node.names());
}

#[test]
fn without_a_cool_down_an_address_comes_back_at_once() {
    let mut node = Node::new(&["10.42.0.0/31"]);
    node.cool_down = Duration::ZERO;
    for round in 0..3 {
        assert_eq!(node.ipv4("a", round), "10.42.0.1");
        node.release("a", round);
    }
}

#[test]
fn a_cursor_that_is_lost_costs_nothing_but_order() {
    let node = Node::new(&["10.42.0.0/29"]);
    node.ipv4("a", 0);
    fs::write(node.store().directory().join("cursors"), b"{garbage").unwrap();
    assert_eq!(node.ipv4("b", 0), "10.42.0.2");
}

#[test]
fn the_longest_rested_address_serves_when_the_caller_insists() {
    let node = Node::new(&["10.42.0.0/30"]);
    for name in ["a", "b", "c"] {
        node.ipv4(name, 0);
    }
    node.release("b", 1_000);
    node.release("a", 2_000);
    let Err(Error::Exhausted(shortages)) = node.allocate(&demand("d"), 3_000) else { panic!("expected exhaustion") };
    assert_eq!(shortages, [Shortage { family: Family::Ipv4, blocks: node.blocks.clone(), leased: 1, cooling: 2 }]);
    let insist = |name: &str| Demand { allow_cooling: true, ..demand(name) };
    let got = |name: &str| node.allocate(&insist(name), 3_000).unwrap().endpoint.addresses.ipv4.unwrap().to_string();
    assert_eq!(got("d"), "10.42.0.2");
    assert_eq!(got("e"), "10.42.0.1");
    let Err(Error::Exhausted(shortages)) = node.allocate(&insist("f"), 3_000) else { panic!("expected exhaustion") };
    assert_eq!((shortages[0].leased, shortages[0].cooling), (3, 0));
}

#[test]
fn later_blocks_serve_when_earlier_ones_are_full() {
    let mut node = Node::new(&["10.42.0.0/31"]);
    node.ipv4("a", 0);
    let error = node.allocate(&demand("b"), 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no pod address left (IPv4: 1 leased, 0 cooling down in 10.42.0.0/31); the node needs another block: enlarge the \
         pool or add one, or run fewer pods here"
    );
    node.blocks.push("10.42.7.0/31".parse().unwrap());
    assert_eq!(node.ipv4("b", 0), "10.42.7.0");
}

#[test]
fn dual_stack_is_all_or_nothing() {
    let mut node = Node::new(&["10.42.0.0/26", "fd42::/127"]);
    node.allocate(&demand("a"), 0).unwrap();
    let Err(Error::Exhausted(shortages)) = node.allocate(&demand("b"), 0) else { panic!("expected exhaustion") };
    assert_eq!(shortages.iter().map(|it| it.family).collect::<Vec<_>>(), [Family::Ipv6]);
    assert_eq!(node.store().load().unwrap().leased.len(), 2);
    node.blocks.remove(0);
    let Err(Error::Exhausted(shortages)) = node.allocate(&demand("b"), 0) else { panic!("expected exhaustion") };
    assert!(shortages[0].blocks.is_empty() && shortages.len() == 2);
}

#[test]
fn requested_addresses() {
    let node = Node::new(&["10.42.0.0/26", "fd42::/122"]);
    let lease = node.allocate(&wanting("a", &["10.42.0.9"]), 0).unwrap();
    assert_eq!(lease.endpoint.addresses.iter().map(|it| it.to_string()).collect::<Vec<_>>(), ["10.42.0.9", "fd42::1"]);
    assert!(matches!(node.allocate(&wanting("b", &["10.42.0.9"]), 0), Err(Error::Taken { .. })));
    assert!(matches!(node.allocate(&wanting("b", &["10.42.0.0"]), 0), Err(Error::Reserved(_))));
    assert!(matches!(node.allocate(&wanting("b", &["10.43.0.1"]), 0), Err(Error::NotOurs { .. })));
    assert!(matches!(node.allocate(&wanting("b", &["10.42.0.5", "10.42.0.6"]), 0), Err(Error::TwoOfAFamily { .. })));
    let ipv6 = Node::new(&["fd42::/122"]);
    assert!(matches!(ipv6.allocate(&wanting("b", &["10.42.0.5"]), 0), Err(Error::FamilyNotServed(_))));
}

#[test]
fn release_is_idempotent_and_creates_nothing() {
    let node = Node::new(&["10.42.0.0/26"]);
    assert_eq!(node.release("a", 0), None);
    assert!(!node.store().directory().exists());
    node.ipv4("a", 0);
    assert!(node.release("a", 1).is_some());
    assert_eq!(node.release("a", 2), None);
}

#[test]
fn damaged_leases_keep_their_addresses_and_are_shown() {
    let node = Node::new(&["10.42.0.0/29"]);
    for name in ["a", "b", "c", "d"] {
        node.ipv4(name, 0);
    }
    let file = |name: &str| node.store().lease_file(&id(name)).unwrap().unwrap().0;
    fs::write(file("a"), b"\0garbage").unwrap();
    fs::write(file("b"), b"{\"version\": 2}").unwrap();
    let other = fs::read(file("d")).unwrap();
    fs::write(file("c"), other).unwrap();
    fs::write(node.store().directory().join("README"), b"hello").unwrap();

    let leases = node.store().load().unwrap();
    assert_eq!(leases.endpoints.keys().cloned().collect::<Vec<_>>(), [id("d")]);
    assert_eq!(leases.leased.len(), 4);
    assert!(leases.issues.iter().all(|issue| issue.kind == IssueKind::BadLease));
    let messages: Vec<&str> = leases.issues.iter().map(|issue| issue.message.as_str()).collect();
    assert_eq!(messages.len(), 4, "{messages:?}");
    for part in ["version is 2", "contradict", "not made by Husk", "10.42.0.1 stays taken"] {
        assert!(messages.iter().any(|message| message.contains(part)), "{part}: {messages:?}");
    }
    assert_eq!(node.ipv4("e", 0), "10.42.0.5");
    assert!(node.release("a", 0).is_some(), "DEL must get rid of a damaged lease");
}

#[test]
fn of_two_leases_with_one_address_the_older_wins() {
    let node = Node::new(&["10.42.0.0/29"]);
    node.ipv4("young", 9);
    let (path, _) = node.store().lease_file(&id("young")).unwrap().unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let old_name = name.replace(&file_name::key(&id("young")), &file_name::key(&id("old")));
    let mut record = record::read(&path).unwrap();
    record.created = 3;
    record.endpoint.id = id("old");
    record.endpoint.host_interface = id("old").host_interface();
    fs::write(path.with_file_name(old_name), serde_json::to_vec(&record).unwrap()).unwrap();

    let leases = node.store().load().unwrap();
    assert_eq!(leases.endpoints.keys().cloned().collect::<Vec<_>>(), [id("old")]);
    assert!(leases.issues[0].message.contains("also leased"), "{}", leases.issues[0]);
}

#[test]
fn what_is_being_wired_is_neither_collected_nor_reclaimed() {
    let node = Node::new(&["10.42.0.0/26"]);
    let store = node.store();
    let collectable = |valid: &[&str], started: Duration| -> Vec<AttachmentId> {
        let valid = valid.iter().map(|name| id(name)).collect();
        let network = NetworkName::new("husk").unwrap();
        let (garbage, issues) = store.lock().unwrap().collectable(&network, &valid, started).unwrap();
        assert_eq!(issues, []);
        garbage.into_iter().map(|it| it.endpoint.id).collect()
    };
    // The making of the lease has a time of the test, the end of the wiring a real one.
    let before = since_boot();
    let later = Duration::MAX;
    let lease = node.allocate(&demand("a"), 0).unwrap();
    let endpoint = lease.endpoint.clone();
    let reclaim = |exists: bool| store.lock().unwrap().reclaim(&endpoint, exists, BootTime(2)).unwrap();
    assert!(store.is_being_wired(&id("a")).unwrap());
    assert!(collectable(&[], later).is_empty());
    assert!(!reclaim(false));

    drop(lease);
    assert!(!store.is_being_wired(&id("a")).unwrap());
    assert!(collectable(&["a"], later).is_empty(), "valid");
    assert!(collectable(&[], Duration::ZERO).is_empty(), "younger than the collection");
    assert!(collectable(&[], before).is_empty(), "older, but its wiring ended when the collection had begun");
    // However shortly before a collection: the moment after is late enough.
    assert_eq!(collectable(&[], since_boot()), [id("a")]);
    let other = NetworkName::new("other").unwrap();
    assert!(store.lock().unwrap().collectable(&other, &BTreeSet::new(), later).unwrap().0.is_empty());
    assert!(!reclaim(true));
    assert!(reclaim(false), "the namespace path does not exist, nor does the interface");
    assert!(!reclaim(false));
}

#[test]
fn what_was_found_to_be_garbage_is_not_what_was_made_since() {
    let node = Node::new(&["10.42.0.0/26"]);
    let (store, network) = (node.store(), NetworkName::new("husk").unwrap());
    // The same attachment in the same namespace, and the same address, which it insists on.
    let wanted = Demand { addresses: vec!["10.42.0.9".parse().unwrap()], ..demand("a") };
    drop(node.allocate(&wanted, 1).unwrap());
    let locked = store.lock().unwrap();
    let (found, _) = locked.collectable(&network, &BTreeSet::new(), Duration::MAX).unwrap();
    assert!(locked.is_unchanged(&found[0]).unwrap());
    locked.release(&id("a"), BootTime(2)).unwrap();
    assert!(!locked.is_unchanged(&found[0]).unwrap());
    drop(locked);
    drop(node.allocate(&wanted, 3).unwrap());
    assert!(!store.lock().unwrap().collect(&found[0], BootTime(4)).unwrap());
    assert!(store.has_lease(&id("a")).unwrap());
    let (found, _) = store.lock().unwrap().collectable(&network, &BTreeSet::new(), Duration::MAX).unwrap();
    assert!(store.lock().unwrap().collect(&found[0], BootTime(4)).unwrap());
    assert!(!store.has_lease(&id("a")).unwrap());
}

#[test]
fn what_is_no_file_is_no_lease_and_holds_nobody_up() {
    let node = Node::new(&["10.42.0.0/26"]);
    drop(node.allocate(&demand("a"), 0).unwrap());
    let name = |last: u8| node.store().directory().join(format!("{last:016x}_10.42.0.{last}_-.json"));
    nix::unistd::mkfifo(&name(11), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::create_dir(name(12)).unwrap();
    std::os::unix::fs::symlink("/nonexistent", name(13)).unwrap();
    std::os::unix::fs::symlink(name(14), name(14)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(name(15)).unwrap());
    fs::File::create(name(16)).unwrap().set_len(1 << 40).unwrap();

    let leases = node.store().load().unwrap();
    let told: Vec<String> = leases.issues.iter().map(|issue| issue.subject.clone()).collect();
    assert_eq!(told, (11..=16).map(|last| name(last).display().to_string()).collect::<Vec<_>>());
    assert_eq!((leases.endpoints.len(), leases.leased.len()), (1, 7));
    let network = NetworkName::new("husk").unwrap();
    let (garbage, issues) =
        node.store().lock().unwrap().collectable(&network, &BTreeSet::new(), Duration::MAX).unwrap();
    assert_eq!((garbage.len(), issues), (1, leases.issues));
}

#[test]
fn a_lease_knows_what_became_of_it() {
    let node = Node::new(&["10.42.0.0/26"]);
    let first = node.allocate(&demand("a"), 0).unwrap();
    let standing = |lease: &Lease| node.store().standing(lease).unwrap();
    assert_eq!(standing(&first), Standing::Held);
    node.release("a", 1);
    assert_eq!(standing(&first), Standing::Released);
    let second = node.allocate(&demand("a"), 2).unwrap();
    assert_eq!((standing(&first), standing(&second)), (Standing::Replaced, Standing::Held));
}

#[test]
fn a_lease_that_cannot_be_examined_does_not_count_as_released() {
    let node = Node::new(&["10.42.0.0/26"]);
    let lease = node.allocate(&demand("a"), 0).unwrap();
    // A symbolic link to itself leads nowhere that could be compared.
    let path = node.store().lease_file(&id("a")).unwrap().unwrap().0;
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(matches!(node.store().standing(&lease), Err(Error::Io { operation: "examine", .. })));
}

#[test]
fn the_lease_of_an_add_that_was_killed_can_be_collected() {
    let node = Node::new(&["10.42.0.0/26"]);
    // Nothing is dropped: no word of the end of the wiring.
    let lease = node.allocate(&demand("a"), 0).unwrap();
    let file = node.store().lease_file(&id("a")).unwrap().unwrap().0;
    let content = fs::read(&file).unwrap();
    drop(lease);
    fs::write(&file, content).unwrap();
    let network = NetworkName::new("husk").unwrap();
    let (found, _) =
        node.store().lock().unwrap().collectable(&network, &BTreeSet::new(), Duration::from_millis(1)).unwrap();
    assert_eq!(found.into_iter().map(|it| it.endpoint.id).collect::<Vec<_>>(), [id("a")]);
}

#[test]
fn whoever_comes_next_removes_what_a_killed_process_left_half_written() {
    let node = Node::new(&["10.42.0.0/26"]);
    let file = node.store().directory().join("new");
    let litter = || fs::write(&file, b"{").unwrap();
    let lease = node.allocate(&demand("a"), 0).unwrap();
    litter();
    node.release("never-added", 1);
    assert!(!file.exists(), "the DEL of an attachment without a lease");
    litter();
    node.release("a", 2);
    assert!(!file.exists(), "a DEL");
    litter();
    node.store().sweep().unwrap();
    assert!(!file.exists(), "the daemon");
    drop(lease);
    node.store().sweep().unwrap();
    // Whoever writes holds the lock: what he writes stays.
    let writer = node.store();
    let writer = writer.lock().unwrap();
    litter();
    node.store().sweep().unwrap();
    node.release("never-added", 3);
    assert!(file.exists());
    writer.sweep().unwrap();
    assert!(!file.exists());
}

#[test]
fn addresses_in_use_include_resting_and_damaged_ones() {
    let node = Node::new(&["10.42.0.0/29"]);
    for name in ["a", "b", "c"] {
        node.ipv4(name, 0);
    }
    node.release("a", 1_000);
    fs::write(node.store().lease_file(&id("b")).unwrap().unwrap().0, b"").unwrap();
    let store = node.store();
    let in_use = |now: u64| store.lock().unwrap().addresses(Duration::from_secs(30), BootTime(now)).unwrap();
    assert_eq!(in_use(2_000).len(), 3);
    assert_eq!(in_use(31_000).len(), 2);
}

#[test]
fn concurrent_allocations_get_distinct_addresses() {
    let node = Node::new(&["10.42.0.0/26", "fd42::/122"]);
    let seen = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (node, seen) = (&node, &seen);
            scope.spawn(move || {
                for round in 0..7 {
                    let lease = node.allocate(&demand(&format!("pod{thread}-{round}")), 0).unwrap();
                    seen.lock().unwrap().extend(lease.endpoint.addresses.iter());
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 112);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 112);
}

/// One step of a node's life.
#[derive(Debug, Clone)]
enum Step {
    Add(u8),
    AddInsisting(u8),
    Delete(u8),
    Wait(u64),
    /// A writer died before its rename.
    CrashInWrite(Vec<u8>),
    /// The file of cursors is lost.
    LoseCursors,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u8..24).prop_map(Step::Add),
        1 => (0_u8..24).prop_map(Step::AddInsisting),
        4 => (0_u8..24).prop_map(Step::Delete),
        2 => (0_u64..20_000).prop_map(Step::Wait),
        1 => proptest::collection::vec(any::<u8>(), 0..8).prop_map(Step::CrashInWrite),
        1 => Just(Step::LoseCursors),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever happens: no address twice, none lost, none used before it rested, and exhaustion only when it is true.
    #[test]
    fn the_store_agrees_with_a_model(steps in proptest::collection::vec(step(), 1..80)) {
        let mut node = Node::new(&["10.42.0.0/29", "10.42.1.0/30", "fd42::/124"]);
        node.cool_down = Duration::from_secs(10);
        let mut now = 0;
        let mut held: BTreeMap<AttachmentId, DualStack> = BTreeMap::new();
        let mut released: BTreeMap<IpAddr, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Wait(milliseconds) => now += milliseconds,
                Step::CrashInWrite(rest) => {
                    drop(node.store().lock().unwrap());
                    fs::write(node.store().directory().join(file_name::temporary()), rest).unwrap();
                }
                Step::LoseCursors => { let _ = fs::remove_file(node.store().directory().join(file_name::CURSORS)); }
                Step::Delete(name) => {
                    let id = id(&format!("pod{name}"));
                    let gone = node.store().release(&id, BootTime(now)).unwrap();
                    prop_assert_eq!(gone, held.remove(&id));
                    released.extend(gone.iter().flat_map(DualStack::iter).map(|address| (address, now)));
                }
                Step::Add(name) | Step::AddInsisting(name) => {
                    let insist = matches!(step, Step::AddInsisting(_));
                    let demand = Demand { allow_cooling: insist, ..demand(&format!("pod{name}")) };
                    let taken = |address: &IpAddr| held.values().any(|it| it.iter().any(|own| own == *address));
                    let rested = |address: &IpAddr| released.get(address).is_none_or(|at| now - at >= 10_000);
                    match node.allocate(&demand, now) {
                        Ok(lease) => {
                            let addresses = lease.endpoint.addresses;
                            prop_assert!(addresses.ipv4.is_some() && addresses.ipv6.is_some());
                            for address in addresses.iter() {
                                prop_assert!(!taken(&address), "{} twice", address);
                                prop_assert!(insist || rested(&address), "{} did not rest", address);
                                prop_assert!(node.reserved.iter().all(|own| own != address));
                                prop_assert!(node.blocks.iter().any(|block| block.contains(address)));
                            }
                            prop_assert!(held.insert(demand.id, addresses).is_none());
                        }
                        Err(Error::AlreadyLeased { id, .. }) => prop_assert!(held.contains_key(&id)),
                        Err(Error::Exhausted(shortages)) => {
                            for shortage in shortages {
                                let free = node.blocks.iter().filter(|block| block.family() == shortage.family)
                                    .flat_map(|block| (0..block.size()).filter_map(|index| block.nth(index)))
                                    .filter(|it| node.reserved.iter().all(|own| own != *it))
                                    .filter(|it| !taken(it) && (insist || rested(it)));
                                prop_assert_eq!(free.count(), 0);
                            }
                        }
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
            }
            let leases = node.store().load().unwrap();
            prop_assert_eq!(&leases.issues, &[]);
            let stored: BTreeMap<AttachmentId, DualStack> =
                leases.endpoints.into_iter().map(|(id, endpoint)| (id, endpoint.addresses)).collect();
            prop_assert_eq!(&stored, &held);
        }
    }

    #[test]
    fn no_content_panics(content in proptest::collection::vec(any::<u8>(), 0..200)) {
        let node = Node::new(&["10.42.0.0/29"]);
        node.ipv4("a", 0);
        fs::write(node.store().lease_file(&id("a")).unwrap().unwrap().0, content).unwrap();
        prop_assert_eq!(node.store().load().unwrap().leased.len(), 1);
    }
}

#[test]
fn a_cleared_store_gives_every_address_away_again() {
    let node = Node::new(&["10.42.0.0/30"]);
    for name in ["a", "b", "c"] {
        node.ipv4(name, 1_000_000);
    }
    node.release("c", 1_000_001);
    assert!(node.allocate(&demand("d"), 1_000_002).is_err());
    let foreign = node.store().directory().join("notes.txt");
    fs::write(&foreign, "not ours").unwrap();
    node.store().lock().unwrap().clear().unwrap();
    assert!(node.store().load().unwrap().endpoints.is_empty());
    // As after a reboot, the clock has begun anew.
    for name in ["d", "e", "f"] {
        node.ipv4(name, 5);
    }
    assert!(foreign.exists());
}

/// Somebody made a directory where the store wants a file: whoever reads the error has to know which one is in the way.
#[test]
fn a_directory_in_the_way_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let store = LeaseStore::new(directory.path(), DEFAULT_LOCK_WAIT);
    let in_the_way = directory.path().join(file_name::temporary());
    fs::create_dir(&in_the_way).unwrap();
    let locked = store.lock().unwrap();
    let error = locked.replace(&directory.path().join("lease"), b"x").unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == in_the_way), "{error}");
    // It is not ours to remove, with whatever it has in it.
    let error = locked.sweep().unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == in_the_way), "{error}");
}
