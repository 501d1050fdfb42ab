use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::Barrier;
use std::time::Duration;

use husk_overlay::keys::PrivateKey;
use husk_overlay::record::{DualStack, WireguardRecord};
use proptest::prelude::*;

use super::*;

fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn record(name: &str) -> NodeRecord {
    NodeRecord {
        instance: "0123456789abcdef".parse().unwrap(),
        name: node(name),
        created: jiff::Timestamp::from_second(1_000).unwrap(),
        addresses: DualStack { ipv4: Some("192.0.2.1".parse().unwrap()), ipv6: None },
        underlay_mtu: 1500,
        blocks: [prefix("10.42.0.0/26")].into(),
        router: DualStack { ipv4: Some("10.42.0.0".parse().unwrap()), ipv6: None },
        vxlan_mac: None,
        wireguard: vec![WireguardRecord {
            slot: 0,
            generation: 0,
            port: 51820,
            public_key: PrivateKey::from_random([3; 32]).unwrap().public(),
        }],
        esp: None,
    }
}

fn open() -> (tempfile::TempDir, DirectorySource) {
    let directory = tempfile::tempdir().unwrap();
    let source = DirectorySource::open(directory.path(), false).unwrap();
    (directory, source)
}

fn subjects(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.issues.iter().map(|issue| issue.subject.as_str()).collect()
}

/// Every file below a folder with its content; temporary ones included.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(content(&path));
        } else {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}

/// Gives a file a time stamp that is long past, as most files have it.
fn age(path: &Path) {
    let past = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::options().write(true).open(path).unwrap().set_modified(past).unwrap();
}

#[test]
fn what_is_published_claimed_and_released_is_seen_by_the_others() {
    let (directory, mut one) = open();
    let mut other = DirectorySource::open(directory.path(), true).unwrap();
    one.publish(&record("a")).unwrap();
    assert_eq!(one.claim(prefix("10.42.0.0/26"), &node("a")).unwrap(), Claim::Granted);
    assert_eq!(one.claim(prefix("fd42::/122"), &node("a")).unwrap(), Claim::Granted);
    let seen = other.snapshot().unwrap();
    assert_eq!(seen.nodes, [(node("a"), record("a"))].into());
    assert_eq!(seen.blocks, [(prefix("10.42.0.0/26"), node("a")), (prefix("fd42::/122"), node("a"))].into());
    assert_eq!(seen.issues, []);
    one.release(prefix("fd42::/122"), &node("a")).unwrap();
    one.release(prefix("fd42::/122"), &node("a")).unwrap();
    one.withdraw(&node("a")).unwrap();
    one.withdraw(&node("a")).unwrap();
    let seen = other.snapshot().unwrap();
    assert_eq!((seen.nodes.len(), seen.blocks.len()), (0, 1));
}

#[test]
fn a_block_is_granted_to_one_of_many_and_its_file_names_that_one() {
    const NODES: usize = 8;
    let (directory, _) = open();
    for round in 0..20_u128 {
        let block = prefix("10.42.0.0/16").subnet(26, round).unwrap();
        let start = Barrier::new(NODES);
        let granted: Vec<NodeName> = std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..NODES)
                .map(|index| {
                    let (start, root) = (&start, directory.path());
                    scope.spawn(move || {
                        let (name, mut source) =
                            (node(&format!("host{index}")), DirectorySource::open(root, true).unwrap());
                        start.wait();
                        (source.claim(block, &name).unwrap() == Claim::Granted).then_some(name)
                    })
                })
                .collect();
            lanes.into_iter().filter_map(|lane| lane.join().unwrap()).collect()
        });
        let [winner] = granted.as_slice() else { panic!("granted to {granted:?}") };
        let snapshot = DirectorySource::open(directory.path(), true).unwrap().snapshot().unwrap();
        assert_eq!(snapshot.blocks.get(&block), Some(winner));
    }
    assert!(content(directory.path()).keys().all(|path| !path.to_string_lossy().contains("husk-tmp")));
}

#[test]
fn a_reader_sees_the_old_record_or_the_new_one() {
    let (directory, mut writer) = open();
    let mut reader = DirectorySource::open(directory.path(), true).unwrap();
    writer.publish(&record("a")).unwrap();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            for mtu in 0..200_u32 {
                let mut record = record("a");
                record.underlay_mtu = 1300 + mtu;
                record.blocks.extend((0..u128::from(mtu)).filter_map(|index| prefix("10.43.0.0/16").subnet(26, index)));
                writer.publish(&record).unwrap();
            }
        });
        while !writing.is_finished() {
            let snapshot = reader.snapshot().unwrap();
            assert_eq!(snapshot.issues, []);
            let seen = &snapshot.nodes[&node("a")];
            let expected =
                if seen.underlay_mtu == 1500 && seen.blocks.len() == 1 { 1 } else { seen.underlay_mtu - 1299 };
            assert_eq!(seen.blocks.len(), expected as usize);
        }
    });
    assert_eq!(reader.snapshot().unwrap().nodes[&node("a")].underlay_mtu, 1499);
}

#[test]
fn a_node_gives_back_only_what_its_own_lock_file_names() {
    let (directory, mut source) = open();
    let block = prefix("10.42.0.0/26");
    source.claim(block, &node("other")).unwrap();
    // A manifest elsewhere says that the block is ours; the lock file is still the other's.
    fs::write(directory.path().join("more.yaml"), manifest::block(block, &node("a")).to_yaml()).unwrap();
    let seen = source.snapshot().unwrap();
    assert_eq!(seen.blocks[&block], node("other"));
    assert_eq!(subjects(&seen), ["more.yaml"]);
    source.release(block, &node("a")).unwrap();
    source.release(prefix("10.42.9.0/26"), &node("a")).unwrap();
    fs::write(directory.path().join("blocks/10.42.1.0-26.yaml"), "{").unwrap();
    source.release(prefix("10.42.1.0/26"), &node("a")).unwrap();
    assert!(directory.path().join("blocks/10.42.0.0-26.yaml").exists());
    assert!(directory.path().join("blocks/10.42.1.0-26.yaml").exists());
    assert_eq!(source.claim(prefix("10.42.1.0/26"), &node("a")).unwrap(), Claim::Taken);
}

#[test]
fn odd_files_are_issues_and_hide_no_other() {
    let (directory, mut source) = open();
    source.publish(&record("a")).unwrap();
    let root = directory.path();
    let whole = Manifest::Node(record("b")).to_yaml();
    fs::write(root.join("nodes/half.yaml"), &whole[..whole.find("spec").unwrap()]).unwrap();
    fs::write(root.join("nodes/.husk-tmp-1-b.yaml"), &whole).unwrap();
    fs::write(root.join("nodes/.hidden.yaml"), &whole).unwrap();
    fs::write(root.join("nodes/b.yaml~"), &whole).unwrap();
    fs::write(root.join("garbage.yaml"), [0xff, 0xfe, 0, 1]).unwrap();
    File::create(root.join("huge.yaml")).unwrap().set_len(LARGEST_FILE + 1).unwrap();
    fs::create_dir(root.join("nodes/folder.yaml")).unwrap();
    symlink("nowhere", root.join("dangling.yaml")).unwrap();
    symlink("circle.yaml", root.join("circle.yaml")).unwrap();
    symlink(".", root.join("here")).unwrap();
    symlink("..", root.join("nodes/up")).unwrap();
    nix::unistd::mkfifo(&root.join("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let snapshot = source.snapshot().unwrap();
    assert_eq!(snapshot.nodes.keys().collect::<Vec<_>>(), [&node("a")]);
    let mut found: Vec<&str> = subjects(&snapshot).into_iter().filter(|it| !it.starts_with("here/")).collect();
    found.dedup();
    let expected = [
        "circle.yaml",
        "dangling.yaml",
        "garbage.yaml",
        "huge.yaml",
        "nodes/folder.yaml",
        "nodes/half.yaml",
        "pipe.yaml",
    ];
    assert_eq!(found, expected, "{:#?}", snapshot.issues);
    assert!(snapshot.issues.iter().all(|it| it.kind == IssueKind::BadManifest && !it.remedy.is_empty()));
}

#[test]
fn a_folder_of_people_is_read_one_level_deep() {
    let (directory, mut source) = open();
    let pool = |name: &str, cidr: &str| {
        format!(
            "apiVersion: {}\nkind: AddressPool\nmetadata: {{name: {name}}}\nspec: {{cidr: {cidr}}}\n",
            manifest::API_VERSION
        )
    };
    fs::create_dir_all(directory.path().join("pools.yaml/deeper")).unwrap();
    fs::write(directory.path().join("pools.yaml/one.yml"), pool("one", "10.50.0.0/16")).unwrap();
    fs::write(directory.path().join("pools.yaml/deeper/two.yaml"), pool("two", "10.51.0.0/16")).unwrap();
    let snapshot = source.snapshot().unwrap();
    assert_eq!(snapshot.pools.keys().collect::<Vec<_>>(), ["one"]);
    assert_eq!(snapshot.issues, []);
}

#[test]
fn an_unreadable_file_is_an_issue_until_it_can_be_read() {
    let (directory, mut source) = open();
    source.publish(&record("a")).unwrap();
    let path = directory.path().join("nodes/a.yaml");
    age(&path);
    fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
    let readable = File::open(&path).is_ok();
    let snapshot = source.snapshot().unwrap();
    // Root reads everything: then there is nothing to complain of.
    assert_eq!(snapshot.nodes.is_empty(), !readable);
    assert_eq!(snapshot.issues.is_empty(), readable);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(source.snapshot().unwrap().nodes.len(), 1);
}

#[test]
fn an_unmounted_share_is_unavailable_and_nothing_is_written_to_its_mount_point() {
    let (directory, mut source) = open();
    source.publish(&record("a")).unwrap();
    let whole = content(directory.path());
    for gone in [MARKER, "nodes", "blocks"] {
        let aside = directory.path().join(".aside");
        fs::rename(directory.path().join(gone), &aside).unwrap();
        let left = content(directory.path());
        let block = prefix("10.42.0.0/26");
        let errors = [
            source.snapshot().map(drop),
            source.publish(&record("b")),
            source.claim(block, &node("b")).map(drop),
            source.release(block, &node("a")),
            source.withdraw(&node("a")),
        ];
        for error in errors {
            let error = error.unwrap_err();
            assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
            assert!(error.to_string().contains(gone), "{error}");
        }
        assert_eq!(content(directory.path()), left, "without {gone}");
        // A daemon that starts meanwhile and knows the cluster makes no new one of the empty mount point.
        DirectorySource::open(directory.path(), true).unwrap();
        assert_eq!(content(directory.path()), left, "without {gone}");
        fs::rename(&aside, directory.path().join(gone)).unwrap();
        assert_eq!(source.snapshot().unwrap().nodes.len(), 1);
    }
    assert_eq!(content(directory.path()), whole);
    fs::remove_dir_all(directory.path()).unwrap();
    assert!(matches!(source.snapshot(), Err(SourceError::Unavailable { .. })));
}

#[test]
fn only_files_with_a_new_stamp_are_parsed_again() {
    let (directory, mut source) = open();
    source.publish(&record("a")).unwrap();
    let path = directory.path().join("nodes/a.yaml");
    age(&path);
    let mtu = |source: &mut DirectorySource| source.snapshot().unwrap().nodes[&node("a")].underlay_mtu;
    assert_eq!(mtu(&mut source), 1500);
    // In place, of the same size, with the old stamp: nothing tells that the file has to be read.
    let changed = fs::read_to_string(&path).unwrap().replace("1500", "1400");
    fs::write(&path, changed).unwrap();
    age(&path);
    assert_eq!(mtu(&mut source), 1500);
    let touched = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_001);
    File::options().write(true).open(&path).unwrap().set_modified(touched).unwrap();
    assert_eq!(mtu(&mut source), 1400);
    source.publish(&record("a")).unwrap();
    assert_eq!(mtu(&mut source), 1500);
    fs::remove_file(&path).unwrap();
    assert!(source.snapshot().unwrap().nodes.is_empty());
}

#[test]
fn the_snapshot_is_put_together_again_only_when_something_changed() {
    let (directory, mut source) = open();
    let root = directory.path();
    source.publish(&record("a")).unwrap();
    age(&root.join("nodes/a.yaml"));
    let kept = |source: &mut DirectorySource| {
        source.refresh().unwrap();
        source.assembled.is_some()
    };
    let first = source.snapshot().unwrap();
    assert!(kept(&mut source));
    // A new file, and for as long as its time stamp proves nothing it is read again, with nothing new in it.
    source.publish(&record("b")).unwrap();
    assert!(!kept(&mut source));
    let second = source.snapshot().unwrap();
    assert_eq!(second.nodes.len(), 2);
    assert!(kept(&mut source));
    assert_eq!(source.snapshot().unwrap(), second);
    // New content, a file less, and what is no file: each counts.
    let mut changed = record("b");
    changed.underlay_mtu = 1400;
    source.publish(&changed).unwrap();
    assert!(!kept(&mut source));
    assert_eq!(source.snapshot().unwrap().nodes[&node("b")].underlay_mtu, 1400);
    source.withdraw(&node("b")).unwrap();
    assert!(!kept(&mut source));
    assert_eq!(source.snapshot().unwrap(), first);
    symlink("nowhere", root.join("dangling.yaml")).unwrap();
    assert!(!kept(&mut source));
    assert_eq!(subjects(&source.snapshot().unwrap()), ["dangling.yaml"]);
    fs::write(root.join("nowhere"), "{").unwrap();
    assert!(!kept(&mut source));
    assert_eq!(subjects(&source.snapshot().unwrap()), ["dangling.yaml"]);
    fs::remove_file(root.join("dangling.yaml")).unwrap();
    assert!(!kept(&mut source));
    assert_eq!(source.snapshot().unwrap(), first);
    assert!(kept(&mut source));
}

#[test]
fn a_file_changed_twice_within_a_tick_of_the_clock_is_noticed() {
    let (directory, mut source) = open();
    source.publish(&record("a")).unwrap();
    let path = directory.path().join("nodes/a.yaml");
    let now = SystemTime::now();
    let stamp = |time| File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    for time in [now, now + Duration::from_secs(3600)] {
        source.publish(&record("a")).unwrap();
        stamp(time);
        assert_eq!(source.snapshot().unwrap().nodes[&node("a")].underlay_mtu, 1500);
        let changed = fs::read_to_string(&path).unwrap().replace("1500", "1400");
        fs::write(&path, changed).unwrap();
        stamp(time);
        assert_eq!(source.snapshot().unwrap().nodes[&node("a")].underlay_mtu, 1400);
    }
}

#[test]
fn what_killed_writers_left_goes_when_it_is_old() {
    let (directory, _) = open();
    let old = directory.path().join("nodes/.husk-tmp-1-a.yaml");
    let new = directory.path().join("blocks/.husk-tmp-2-b.yaml");
    fs::write(&old, "x").unwrap();
    fs::write(&new, "x").unwrap();
    age(&old);
    DirectorySource::open(directory.path(), true).unwrap();
    assert!(!old.exists() && new.exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_content_and_no_name_panics(
        files in proptest::collection::vec(("[a-z.:/ ~-]{0,12}", proptest::collection::vec(any::<u8>(), 0..200), any::<bool>()), 0..6),
    ) {
        let (directory, mut source) = open();
        source.publish(&record("a")).unwrap();
        for (name, bytes, inside) in files {
            let folder = directory.path().join(if inside { "nodes" } else { "." });
            let name = name.replace('/', "_");
            if name != "a" {
                fs::write(folder.join(format!("{name}.yaml")), bytes).unwrap();
            }
        }
        let snapshot = source.snapshot().unwrap();
        prop_assert_eq!(snapshot.nodes.get(&node("a")), Some(&record("a")));
        prop_assert_eq!(source.snapshot().unwrap(), snapshot);
    }
}

fn policy(namespace: &str, ingress: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: {namespace}, name: p}}\n\
         spec: {{ingress: {ingress}}}\n"
    )
}

#[test]
fn objects_of_policy_are_the_same_value_until_a_file_with_some_changes() {
    let (directory, mut source) = open();
    let first = source.policy_objects().unwrap();
    assert_eq!(*first, Objects::default());
    let file = directory.path().join("policy.yaml");
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: web, labels: {app: web}}\nspec: {nodeName: a}\n";
    fs::write(&file, format!("{pod}---\n{}", policy("shop", "[{}]"))).unwrap();
    let second = source.policy_objects().unwrap();
    assert_eq!((second.pods.len(), second.network_policies.len(), second.issues.len()), (1, 1, 0));
    assert_eq!(second.namespaces.keys().collect::<Vec<_>>(), ["shop"], "a namespace with pods is there");
    // Neither time nor what is no policy changes anything, whoever reads the files first.
    source.publish(&record("a")).unwrap();
    source.snapshot().unwrap();
    age(&file);
    assert!(Arc::ptr_eq(&second, &source.policy_objects().unwrap()));
    fs::write(&file, policy("shop", "[{}]")).unwrap();
    source.snapshot().unwrap();
    let third = source.policy_objects().unwrap();
    assert_eq!((third.pods.len(), third.namespaces.len()), (0, 0));
    fs::remove_file(&file).unwrap();
    source.snapshot().unwrap();
    assert_eq!(*source.policy_objects().unwrap(), Objects::default());
    assert_eq!(source.snapshot().unwrap().nodes.len(), 1);
}

#[test]
fn policies_that_make_no_sense_are_closed_and_those_that_differ_are_told() {
    let (directory, mut source) = open();
    fs::write(directory.path().join("a.yaml"), policy("shop", "[{from: [{}]}]")).unwrap();
    fs::write(directory.path().join("b.yaml"), policy("bank", "[{ports: [], ports: []}]")).unwrap();
    fs::write(directory.path().join("c.yaml"), policy("shop", "[{}]")).unwrap();
    let objects = source.policy_objects().unwrap();
    let told: Vec<(IssueKind, &str)> = objects.issues.iter().map(|it| (it.kind, it.subject.as_str())).collect();
    assert_eq!(
        told,
        [
            (IssueKind::BadManifest, "NetworkPolicy shop/p"),
            (IssueKind::BadPolicy, "NetworkPolicy bank/p"),
            (IssueKind::BadPolicy, "NetworkPolicy shop/p")
        ]
    );
    let peers = |namespace: &str| {
        let policy = objects.network_policies.values().zip(objects.network_policies.keys());
        let mut found = policy.filter(|(_, name)| name.namespace == namespace).map(|(policy, _)| policy);
        found.next().unwrap().ingress.clone().unwrap()[0].peers.clone()
    };
    assert_eq!(peers("bank"), Some(vec![]), "a key that is given twice closes the rule");
    assert_eq!(peers("shop"), Some(vec![]));
    assert_eq!(subjects(&source.snapshot().unwrap()), ["b.yaml"]);
}

/// An editor that writes half a file, or a person who types a tab into it, takes no policy out of force.
#[test]
fn a_file_that_breaks_keeps_the_policies_it_had() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = DirectorySource::open(directory.path(), false).unwrap();
    let file = directory.path().join("policies.yaml");
    let policy = |name: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: default}}\nspec: {{podSelector: {{}}}}\n"
        )
    };
    let names = |source: &mut DirectorySource| -> Vec<String> {
        source.policy_objects().unwrap().network_policies.keys().map(ToString::to_string).collect()
    };
    std::fs::write(&file, policy("a") + "---\n" + &policy("b")).unwrap();
    assert_eq!(names(&mut source), ["default/a", "default/b"]);
    std::fs::write(&file, policy("a") + "---\nspec:\n\tpodSelector: {}\n").unwrap();
    assert_eq!(names(&mut source), ["default/a", "default/b"]);
    assert!(!source.snapshot().unwrap().issues.is_empty(), "and it is told");
    std::fs::write(&file, policy("a")).unwrap();
    assert_eq!(names(&mut source), ["default/a"]);
}
