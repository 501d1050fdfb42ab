use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::esp::Aead;
use crate::issue::{Issue, IssueKind};
use crate::mac::MacAddress;
use crate::record::{DualStack, EspEpochRecord, EspRecord, Snapshot, WireguardRecord};

const KEY: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

const NODE: &str = r#"apiVersion: husk.dev/v1alpha1
kind: OverlayNode
metadata:
  name: node-a
  creationTimestamp: 2026-01-31T12:00:00Z
spec:
  instance: 0123456789abcdef0123456789abcdef
  addresses:
    ipv4: 192.0.2.1
    ipv6: 2001:db8::1
  underlayMtu: 1500
  blocks:
    - 10.42.0.64/26
    - fd42::80/122
  router:
    ipv4: 10.42.0.64
    ipv6: fd42::80
  vxlanMac: 02:00:5e:10:00:01
  wireguard:
    - slot: 0
      generation: 6
      port: 51820
      publicKey: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
  esp:
    cipher: aes-gcm-256
    udpPort: 4500
    epochs:
      - epoch: 41
        publicKey: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
        spiSalt: 18446744073709551615
      - epoch: 42
        publicKey: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
        spiSalt: 9007199254740993
"#;

fn record() -> NodeRecord {
    NodeRecord {
        name: "node-a".parse().unwrap(),
        instance: "0123456789abcdef0123456789abcdef".parse().unwrap(),
        created: "2026-01-31T12:00:00Z".parse().unwrap(),
        addresses: DualStack { ipv4: Some("192.0.2.1".parse().unwrap()), ipv6: Some("2001:db8::1".parse().unwrap()) },
        underlay_mtu: 1500,
        blocks: ["10.42.0.64/26", "fd42::80/122"].map(|block| block.parse().unwrap()).into(),
        router: DualStack { ipv4: Some("10.42.0.64".parse().unwrap()), ipv6: Some("fd42::80".parse().unwrap()) },
        vxlan_mac: Some("02:00:5e:10:00:01".parse().unwrap()),
        wireguard: vec![WireguardRecord { slot: 0, generation: 6, port: 51820, public_key: KEY.parse().unwrap() }],
        esp: Some(EspRecord {
            cipher: Aead::AesGcm256,
            udp_port: Some(4500),
            epochs: vec![
                EspEpochRecord { epoch: 41, public_key: KEY.parse().unwrap(), spi_salt: u64::MAX },
                // Not a number that 53 bits of mantissa hold.
                EspEpochRecord { epoch: 42, public_key: KEY.parse().unwrap(), spi_salt: (1 << 53) + 1 },
            ],
        }),
    }
}

fn p(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn n(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn parse_clean(text: &str) -> Vec<Manifest> {
    let parsed = parse_all("file.yaml", text);
    assert_eq!(parsed.issues, [], "{text}");
    parsed.manifests
}

fn only_issue(text: &str) -> Issue {
    let Parsed { manifests, mut issues, .. } = parse_all("nodes/a.yaml", text);
    assert_eq!((manifests.len(), issues.len()), (0, 1), "{text}: {issues:#?}");
    issues.remove(0)
}

#[test]
fn a_node_is_read_and_written() {
    assert_eq!(parse_clean(NODE), [Manifest::Node(record())]);
    assert_eq!(parse_clean(&Manifest::Node(record()).to_yaml()), [Manifest::Node(record())]);
    let json = serde_json::to_string(&record()).unwrap();
    assert!(json.contains("18446744073709551615") && json.contains("9007199254740993"), "{json}");
    assert_eq!(serde_json::from_str::<NodeRecord>(&json).unwrap(), record());
}

#[test]
fn a_node_without_esp_or_its_parts_is_read_and_written() {
    let mut plain = record();
    let esp = plain.esp.as_mut().unwrap();
    (esp.cipher, esp.udp_port) = (Aead::AesGcm128, None);
    esp.epochs.clear();
    for record in [plain.clone(), NodeRecord { esp: None, ..plain }] {
        let text = Manifest::Node(record.clone()).to_yaml();
        assert!(!text.contains("udpPort"), "{text}");
        assert_eq!(text.contains("esp"), record.esp.is_some(), "{text}");
        assert_eq!(parse_clean(&text), [Manifest::Node(record)]);
    }
}

#[test]
fn the_text_of_a_block_is_stable() {
    assert_eq!(
        block(p("10.42.0.64/26"), &n("node-a")).to_yaml(),
        "apiVersion: husk.dev/v1alpha1\nkind: AddressBlock\nmetadata:\n  name: 10.42.0.64-26\nspec:\n  cidr: 10.42.0.64/26\n  node: node-a\n"
    );
}

#[test]
fn a_pool_without_block_length_has_blocks_of_64() {
    let pool = |cidr: &str, rest: &str| {
        let text = format!(
            "apiVersion: husk.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: p}}\nspec: {{cidr: '{cidr}'{rest}}}\n"
        );
        let [Manifest::Pool(pool)] = &parse_clean(&text)[..] else { panic!("{text}") };
        (pool.block_length, pool.disabled)
    };
    assert_eq!(pool("10.42.0.0/16", ""), (26, false));
    assert_eq!(pool("fd42::/48", ""), (122, false));
    assert_eq!(pool("10.42.0.0/16", ", blockLength: 16, disabled: true"), (16, true));
}

#[test]
fn names_of_blocks_are_names_of_objects_and_unique() {
    for (cidr, name) in [
        ("10.42.0.64/26", "10.42.0.64-26"),
        ("fd42::80/122", "fd42--80-122"),
        ("fd42::/64", "fd42---64"),
        ("::1:0/112", "0--1-0-112"),
    ] {
        assert_eq!(block_name(p(cidr)), name);
        assert!(NodeName::new(name).is_ok(), "{name}");
    }
}

#[test]
fn objects_of_others_and_unknown_fields_are_passed_over() {
    let text = format!(
        "apiVersion: v1\nkind: ConfigMap\ndata: {{a: b}}\n---\n{NODE}  colour: blue\nstatus: {{phase: x}}\n---\n\
         apiVersion: apps/v1\nkind: DaemonSet\n---\n# nothing\n"
    );
    assert_eq!(parse_clean(&text), [Manifest::Node(record())]);
}

#[test]
fn what_policy_is_made_of_is_handed_on_as_it_is() {
    let policy =
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {podSelector: {}, x: 1}\n";
    let text = format!(
        "{policy}---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n---\n{NODE}---\n\
         apiVersion: v1\nkind: Pod\n---\napiVersion: v1\nkind: Namespace\n---\napiVersion: v1\nkind: Secret\n---\n\
         apiVersion: networking.k8s.io/v1\nkind: Ingress\n"
    );
    let parsed = parse_all("f", &text);
    assert_eq!((parsed.manifests, parsed.issues), (vec![Manifest::Node(record())], vec![]));
    let kinds: Vec<&str> = parsed.policy_objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["NetworkPolicy", "ClusterNetworkPolicy", "Pod", "Namespace"]);
    assert_eq!(parsed.policy_objects[0]["spec"], serde_json::json!({ "podSelector": {}, "x": 1 }));
}

#[test]
fn a_policy_with_a_key_twice_is_handed_on_with_what_no_reader_knows_and_a_pod_is_not() {
    let text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {ingress: [{from: [], from: []}]}\n";
    let parsed = parse_all("f", text);
    assert_eq!(parsed.issues.len(), 1);
    assert!(parsed.issues[0].message.contains("NetworkPolicy p: spec.ingress[0].from: the key occurs twice"));
    assert_eq!(parsed.policy_objects[0]["spec"]["ingress"][0], serde_json::json!({ "from": [], "from (again)": [] }));
    let parsed = parse_all("f", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, name: q}\n");
    assert_eq!((parsed.issues.len(), parsed.policy_objects.len()), (1, 0));
}

#[test]
fn a_broken_document_hides_no_other() {
    let Parsed { manifests, issues, .. } = parse_all("all.yaml", &format!("a: [\n---\n{NODE}---\n- 1\n"));
    assert_eq!(manifests, [Manifest::Node(record())]);
    assert_eq!(issues.len(), 2, "{issues:#?}");
    assert!(issues[0].message.contains("line "), "{}", issues[0]);
}

/// What is replaced in the node's manifest, by what, and what the message and the remedy say.
const WRONG: &[(&str, &str, &str, &str)] = &[
    ("v1alpha1", "v9", "apiVersion: \"husk.dev/v9\": this version of Husk reads", "upgrade"),
    (
        "kind: OverlayNode",
        "kind: OverlayNod",
        "kind: \"OverlayNod\": this version of Husk knows no such kind",
        "upgrade",
    ),
    ("kind: OverlayNode\n", "", "kind: the key is missing", "one of OverlayNode"),
    ("apiVersion: husk.dev/v1alpha1\n", "", "apiVersion: the key is missing", "husk.dev/v1alpha1"),
    ("name: node-a", "name: Node_A", "metadata.name: \"Node_A\": node name", "the node's name"),
    ("  name: node-a\n", "", "metadata.name: the key is missing", "the node's name"),
    (
        "creationTimestamp: 2026-01-31T12:00:00Z",
        "creationTimestamp: yesterday",
        "metadata.creationTimestamp: \"yesterday\"",
        "2026-01-31",
    ),
    ("  creationTimestamp: 2026-01-31T12:00:00Z\n", "", "metadata.creationTimestamp: the key is missing", "2026"),
    ("ipv4: 192.0.2.1", "ipv4: 192.0.2", "spec.addresses.ipv4: \"192.0.2\"", "one IPv4 address"),
    ("ipv4: 192.0.2.1", "ipv4: 1", "spec.addresses.ipv4: 1: an IPv4 address is expected", "quotes"),
    ("underlayMtu: 1500", "underlayMtu: 0", "spec.underlayMtu: 0: an MTU in bytes is at least 1", "from 1"),
    ("underlayMtu: 1500", "underlayMtu: '1500'", "spec.underlayMtu: \"1500\": a whole number", "without quotes"),
    ("  underlayMtu: 1500\n", "", "spec.underlayMtu: the key is missing", "the MTU"),
    ("- 10.42.0.64/26", "- 10.42.0.65/26", "spec.blocks[0]: \"10.42.0.65/26\"", "write 10.42.0.64/26"),
    ("- 10.42.0.64/26", "- {}", "spec.blocks[0]: {}: a CIDR is expected", "in quotes"),
    ("vxlanMac: 02:", "vxlanMac: 01:", "spec.vxlanMac: \"01:00:5e:10:00:01\": no device", "VXLAN"),
    ("vxlanMac: 02:", "vxlanMac: 0g:", "spec.vxlanMac: \"0g:", "hexadecimal"),
    ("slot: 0", "slot: 2", "spec.wireguard[0].slot: 2: a node has two", "from 0 to 1"),
    ("generation: 6", "generation: -6", "spec.wireguard[0].generation: -6", "from 0"),
    ("generation: 6", "generation: 7", "spec.wireguard[0].slot: 0: generation 7 belongs to device 1", "the generation"),
    ("cipher: aes-gcm-256", "cipher: aes-gcm", "spec.esp.cipher: \"aes-gcm\"", "aes-gcm-128, aes-gcm-256"),
    ("    cipher: aes-gcm-256\n", "", "spec.esp.cipher: the key is missing", "configured with"),
    ("udpPort: 4500", "udpPort: 0", "spec.esp.udpPort: 0: a UDP port has 16 bits", "from 1 to 65535"),
    ("    epochs:\n", "    epochs: 7\n    older:\n", "spec.esp.epochs: 7: a list of epochs", "'- '"),
    ("epoch: 41\n", "epoch: 42\n", "spec.esp.epochs: a list: the numbers of the epochs do not ascend", "oldest first"),
    ("epoch: 41\n", "epoch: 43\n", "spec.esp.epochs: a list: the numbers of the epochs do not ascend", "oldest first"),
    ("epoch: 41\n", "epoch: -1\n", "spec.esp.epochs[0].epoch: -1: an epoch has 64 bits", "from 0"),
    ("spiSalt: 18446744073709551615", "spiSalt: 18446744073709551616", "spec.esp.epochs[0].spiSalt", "709551615"),
    ("spiSalt: 18446744073709551615", "spiSalt: 1.5", "spec.esp.epochs[0].spiSalt: 1.5: a whole number", "from 0"),
    ("        spiSalt: 18446744073709551615\n", "", "spec.esp.epochs[0].spiSalt: the key is missing", "the salt"),
    (
        "      - epoch: 41\n        publicKey: hS",
        "      - epoch: 41\n        publicKey: ",
        "spec.esp.epochs[0].publicKey: \"DwC",
        "in base64",
    ),
    (
        "    epochs:\n",
        "    epochs:\n      - {epoch: 1, publicKey: \"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\", spiSalt: 0}\n",
        "spec.esp.epochs: a list: a node publishes 2 epochs at most, and there are 3",
        "newest",
    ),
    ("port: 51820", "port: 65536", "spec.wireguard[0].port: 65536", "65535"),
    ("      port: 51820\n", "", "spec.wireguard[0].port: the key is missing", "UDP port"),
    ("publicKey: h", "publicKey: ", "spec.wireguard[0].publicKey: \"SDw", "wg show"),
    (
        "    - slot: 0\n",
        "    - slot: 0\n      slot: 1\n",
        "spec.wireguard[0].slot: 1: the key occurs twice",
        "one of the two",
    ),
];

#[test]
fn every_wrong_value_is_an_issue_with_file_key_value_and_remedy() {
    for (from, to, message, remedy) in WRONG {
        assert!(NODE.contains(from), "{from}");
        let issue = only_issue(&NODE.replacen(from, to, 1));
        assert_eq!((issue.kind, issue.subject.as_str()), (IssueKind::BadManifest, "nodes/a.yaml"));
        assert!(issue.message.contains(message), "{issue}");
        assert!(issue.remedy.contains(remedy), "{issue}");
    }
    let message = only_issue(&NODE.replace("1500", "0")).message;
    assert!(message.starts_with("OverlayNode node-a: spec.underlayMtu: 0: "), "{message}");
}

#[test]
fn two_devices_of_one_slot_are_an_issue() {
    let (before, devices) = NODE.split_once("wireguard:\n").unwrap();
    let (device, after) = devices.split_once("  esp:\n").unwrap();
    let twice = format!("{before}wireguard:\n{device}{device}  esp:\n{after}");
    assert!(only_issue(&twice).message.contains("the same slot"));
}

#[test]
fn a_block_whose_name_is_not_its_cidr_is_an_issue() {
    let text = block(p("10.42.0.64/26"), &n("node-a")).to_yaml().replace("name: 10.42.0.64-26", "name: 10.42.0.0-26");
    let issue = only_issue(&text);
    assert!(
        issue.message.contains("metadata.name: \"10.42.0.0-26\"") && issue.remedy.contains("10.42.0.64-26"),
        "{issue}"
    );
}

#[test]
fn a_pool_that_has_no_room_for_blocks_is_an_issue() {
    let text = "apiVersion: husk.dev/v1alpha1\nkind: AddressPool\nmetadata: {name: p}\nspec: {cidr: 10.42.0.0/28}\n";
    assert!(only_issue(text).remedy.contains("from 28 to 30"), "{}", only_issue(text));
    let text = text.replace("/28}", "/16, blockLength: 31}");
    assert!(only_issue(&text).message.contains("spec.blockLength: 31"), "{}", only_issue(&text));
    let text = text.replace("name: p", "name: P");
    assert_eq!(parse_all("f", &text).issues.len(), 2);
}

#[test]
fn garbage_is_bounded() {
    let Parsed { manifests, issues, .. } = parse_all("f", &"[\n---\n".repeat(5_000));
    assert_eq!((manifests.len(), issues.len()), (0, 101));
    assert!(issues[100].message.contains("4900 more"), "{}", issues[100]);
}

#[test]
fn of_manifests_that_differ_one_wins_and_an_issue_says_so() {
    let late = NodeRecord { created: "2026-02-01T00:00:00Z".parse().unwrap(), underlay_mtu: 9000, ..record() };
    let mut rotated = record();
    rotated.wireguard[0].generation = 8;
    let all = [
        Manifest::Node(late),
        Manifest::Node(record()),
        Manifest::Node(rotated.clone()),
        block(p("10.42.0.64/26"), &n("node-b")),
        block(p("10.42.0.64/26"), &n("node-a")),
    ];
    let snapshot = snapshot_from(all);
    assert_eq!(snapshot.nodes[&n("node-a")], rotated);
    assert_eq!(snapshot.blocks[&p("10.42.0.64/26")], n("node-a"));
    let subjects: Vec<&str> = snapshot.issues.iter().map(|issue| issue.subject.as_str()).collect();
    assert_eq!(subjects, ["AddressBlock 10.42.0.64/26", "OverlayNode node-a"]);
    assert!(snapshot.issues[1].message.starts_with("3 manifests"));
}

#[test]
fn of_manifests_with_different_epochs_the_newest_wins() {
    let (mut older, mut newer) = (record(), record());
    older.esp.as_mut().unwrap().epochs.pop();
    newer.esp.as_mut().unwrap().epochs.remove(0);
    let all = [older.clone(), newer.clone(), older].map(Manifest::Node);
    assert_eq!(snapshot_from(all).nodes[&n("node-a")], newer);
}

/// Names that YAML could take for something else.
fn name() -> impl Strategy<Value = NodeName> {
    let tricky = ["null", "true", "no", "on", "y", "n", "1", "007", "1e3", "0x10", "1.5", "0o7", "inf", "12.0e1"];
    prop_oneof![
        prop::sample::select(tricky.to_vec()).prop_map(n),
        "[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?(\\.[a-z0-9]{1,4})?".prop_map(|text| n(&text)),
    ]
}

fn prefix() -> impl Strategy<Value = Prefix> {
    prop_oneof![
        (any::<u32>(), 0..=32_u8).prop_map(|(bits, length)| (std::net::Ipv4Addr::from(bits).into(), length)),
        (any::<u128>(), 0..=128_u8).prop_map(|(bits, length)| (std::net::Ipv6Addr::from(bits).into(), length)),
    ]
    .prop_map(|(address, length)| Prefix::containing(address, length).unwrap())
}

fn dual_stack() -> impl Strategy<Value = DualStack> {
    (any::<Option<std::net::Ipv4Addr>>(), any::<Option<std::net::Ipv6Addr>>())
        .prop_map(|(ipv4, ipv6)| DualStack { ipv4, ipv6 })
}

prop_compose! {
    fn esp()(
        strong in any::<bool>(),
        udp_port in prop::option::of(1_u16..),
        epochs in prop::collection::btree_map(any::<u64>(), (1_u8.., any::<u64>()), 0..3),
    ) -> EspRecord {
        let epoch = |(epoch, (key, spi_salt))| EspEpochRecord {
            epoch,
            public_key: crate::keys::PublicKey::from_bytes([key; 32]).unwrap(),
            spi_salt,
        };
        EspRecord {
            cipher: if strong { Aead::AesGcm256 } else { Aead::AesGcm128 },
            udp_port,
            epochs: epochs.into_iter().map(epoch).collect(),
        }
    }
}

prop_compose! {
    fn node()(
        name in name(),
        created in -10_000_000_000_i64..10_000_000_000,
        nanosecond in prop_oneof![Just(0_i32), 1..999_999_999],
        addresses in dual_stack(),
        underlay_mtu in 1_u32..,
        blocks in prop::collection::btree_set(prefix(), 0..4),
        router in dual_stack(),
        vxlan_mac in any::<Option<[u8; 6]>>(),
        wireguard in prop::collection::btree_map(0..2_u8, (any::<u64>(), 1_u16.., 1_u8..), 0..3),
        esp in prop::option::of(esp()),
    ) -> NodeRecord {
        NodeRecord {
            instance: record().instance,
            name,
            created: jiff::Timestamp::new(created, if created < 0 { -nanosecond } else { nanosecond }).unwrap(),
            addresses,
            underlay_mtu,
            blocks,
            router,
            vxlan_mac: vxlan_mac.map(MacAddress).filter(|mac| mac.is_unicast()),
            wireguard: wireguard
                .into_iter()
                .map(|(slot, (generation, port, key))| WireguardRecord {
                    slot,
                    generation: generation & !1 | u64::from(slot),
                    port,
                    public_key: crate::keys::PublicKey::from_bytes([key; 32]).unwrap(),
                })
                .collect(),
            esp,
        }
    }
}

fn pool() -> impl Strategy<Value = Pool> {
    (name(), prefix(), any::<bool>(), any::<prop::sample::Index>())
        .prop_filter("room for a block", |(_, cidr, ..)| cidr.length().max(1) <= cidr.family().bits() - 2)
        .prop_map(|(name, cidr, disabled, index)| {
            let shortest = cidr.length().max(1);
            let choices = usize::from(cidr.family().bits() - 2 - shortest) + 1;
            let block_length = shortest + u8::try_from(index.index(choices)).unwrap();
            Pool { name: name.to_string(), cidr, block_length, disabled }
        })
}

fn manifest() -> impl Strategy<Value = Manifest> {
    prop_oneof![
        node().prop_map(Manifest::Node),
        pool().prop_map(Manifest::Pool),
        (prefix(), name()).prop_map(|(cidr, node)| Manifest::Block { cidr, node }),
    ]
}

/// A few objects with manifests that contradict each other: names and CIDRs are few.
fn cluster() -> impl Strategy<Value = Vec<Manifest>> {
    let few = prop::sample::select(vec!["a", "b", "c"]);
    let small = (manifest(), few, 0..3_u8).prop_map(|(manifest, name, index)| match manifest {
        Manifest::Node(record) => Manifest::Node(NodeRecord { name: n(name), ..record }),
        Manifest::Pool(pool) => Manifest::Pool(Pool { name: name.to_owned(), ..pool }),
        Manifest::Block { node, .. } => Manifest::Block { cidr: p(&format!("10.42.{index}.0/26")), node },
    });
    prop::collection::vec(small, 0..12)
}

/// What a source makes of files: each holds some documents.
fn snapshot_of(files: &[Vec<&Manifest>]) -> Snapshot {
    snapshot_from(files.iter().flat_map(|file| {
        let texts: Vec<String> = file.iter().map(|manifest| manifest.to_yaml()).collect();
        parse_clean(&texts.join("---\n"))
    }))
}

fn check_total(text: &str) {
    let Parsed { manifests, issues, .. } = parse_all("the-file", text);
    for issue in issues {
        assert_eq!((issue.kind, issue.subject.as_str()), (IssueKind::BadManifest, "the-file"));
        assert!(!issue.message.is_empty() && !issue.remedy.is_empty(), "{issue}");
    }
    for manifest in manifests {
        assert_eq!(parse_clean(&manifest.to_yaml()), [manifest]);
    }
}

proptest! {
    #[test]
    fn every_manifest_round_trips(manifest in manifest()) {
        let text = manifest.to_yaml();
        prop_assert_eq!(&text, &manifest.clone().to_yaml());
        prop_assert_eq!(parse_clean(&text), [manifest]);
    }

    #[test]
    fn names_of_different_blocks_differ(a in prefix(), b in prefix()) {
        prop_assert_eq!(a == b, block_name(a) == block_name(b));
        prop_assert!(NodeName::new(&block_name(a)).is_ok(), "{}", block_name(a));
    }

    #[test]
    fn order_split_and_repetition_make_no_difference(
        cluster in cluster(),
        order in any::<prop::sample::Index>(),
        cuts in prop::collection::vec(any::<bool>(), 24),
        repeated in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let plain = snapshot_from(cluster.clone());
        let mut shuffled: Vec<&Manifest> = cluster.iter().collect();
        if !cluster.is_empty() {
            shuffled.extend(repeated.iter().map(|index| index.get(&cluster)));
            let middle = order.index(shuffled.len());
            shuffled.rotate_left(middle);
            shuffled[..middle].reverse();
        }
        let mut files = vec![vec![]];
        for (manifest, cut) in shuffled.into_iter().zip(cuts) {
            if cut {
                files.push(vec![]);
            }
            files.last_mut().unwrap().push(manifest);
        }
        prop_assert_eq!(snapshot_of(&files), plain);
    }

    #[test]
    fn every_object_is_in_the_snapshot(cluster in cluster()) {
        let snapshot = snapshot_from(cluster.clone());
        let mut names = BTreeSet::new();
        for manifest in &cluster {
            names.insert((manifest.kind(), manifest.name()));
            let kept = match manifest {
                Manifest::Node(record) => snapshot.nodes.contains_key(&record.name),
                Manifest::Pool(pool) => snapshot.pools.contains_key(&pool.name),
                Manifest::Block { cidr, .. } => snapshot.blocks.contains_key(cidr),
            };
            prop_assert!(kept);
        }
        prop_assert_eq!(names.len(), snapshot.nodes.len() + snapshot.pools.len() + snapshot.blocks.len());
    }

    #[test]
    fn any_text_is_manifests_or_issues(text in "\\PC*") {
        check_total(&text);
    }

    #[test]
    fn anything_like_a_manifest_is_manifests_or_issues(
        text in "(apiVersion: husk.dev/v1alpha1\n|kind: (OverlayNode|AddressPool|AddressBlock|x)\n|metadata:|spec:|  name: |---\n|[-:#&*!|>'\"%@`{}\\[\\], \n]|[a-z0-9]{1,4}){0,40}",
    ) {
        check_total(&text);
    }

    #[test]
    fn a_damaged_manifest_is_manifests_or_issues(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..3_u8, any::<char>()), 1..6),
    ) {
        let mut text: Vec<char> = NODE.chars().collect();
        for (place, what, with) in changes {
            let place = place.index(text.len());
            match what {
                0 => text[place] = with,
                1 => text.insert(place, with),
                _ => drop(text.drain(place..(place + 12).min(text.len()))),
            }
        }
        check_total(&text.into_iter().collect::<String>());
    }
}

#[test]
fn an_api_servers_object_reads_as_the_same_manifest() {
    let mut object = Manifest::Node(record()).to_json();
    assert_eq!(object["metadata"]["creationTimestamp"], serde_json::Value::Null, "the server says when");
    object["metadata"]["creationTimestamp"] = "2026-01-31T12:00:00Z".into();
    object["metadata"]["managedFields"] = serde_json::json!([{ "manager": "husk" }]);
    object["status"] = serde_json::json!({ "issues": 0 });
    assert_eq!(from_json("OverlayNode node-a", &object), Ok(Some(Manifest::Node(record()))));
    for manifest in [
        block(p("fd42::40/122"), &n("a")),
        Manifest::Pool(Pool { name: "b".into(), cidr: p("10.0.0.0/8"), block_length: 24, disabled: true }),
    ] {
        assert_eq!(from_json("", &manifest.to_json()), Ok(Some(manifest)));
    }
    object["spec"]["underlayMtu"] = 1.5.into();
    let issues = from_json("OverlayNode node-a", &object).unwrap_err();
    assert_eq!((issues.len(), issues[0].subject.as_str()), (1, "OverlayNode node-a"));
    assert!(issues[0].message.contains("spec.underlayMtu"), "{issues:?}");
    let foreign = serde_json::json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" } });
    assert_eq!(from_json("", &foreign), Ok(None));
}
