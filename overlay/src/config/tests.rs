use proptest::prelude::*;

use super::*;

fn errors(text: &str) -> Vec<ConfigError> {
    match Config::parse("/etc/husk/config.yaml", text) {
        Ok(config) => panic!("{text:?} is accepted as {config:?}"),
        Err(errors) => errors.0,
    }
}

/// The one error of a configuration that is complete but for the given lines.
fn only_error(lines: &str) -> ConfigError {
    let text = if lines.contains("clusterCIDRs") {
        lines.to_owned()
    } else {
        format!("clusterCIDRs: [10.42.0.0/16, \"fd42::/48\"]\n{lines}\n")
    };
    let mut all = errors(&text);
    assert_eq!(all.len(), 1, "{text}: {all:#?}");
    all.remove(0)
}

#[test]
fn the_example_spells_out_the_defaults() {
    let cidrs = vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()];
    assert_eq!(Config::parse("example", EXAMPLE), Ok(Config::new(cidrs)));
}

#[test]
fn what_the_example_comments_out_is_valid_too() {
    let keys =
        ["name: node-a", "interface: eth0", "addresses: {", "mtu: 1500", "presharedKeyFile: ", "flows: ", "audit: "];
    let text = keys.iter().fold(EXAMPLE.to_owned(), |text, key| text.replace(&format!("# {key}"), key));
    let config = Config::parse("example", &text).unwrap();
    assert_eq!(config.node_name.unwrap().as_str(), "node-a");
    assert_eq!(config.underlay.interface.unwrap().as_str(), "eth0");
    assert_eq!(config.underlay.addresses.ipv4, Some("192.0.2.10".parse().unwrap()));
    assert_eq!(config.underlay.addresses.ipv6, Some("2001:db8::10".parse().unwrap()));
    assert_eq!(config.underlay.mtu, Some(1500));
    assert_eq!(config.ipsec.preshared_key_file, Some("/etc/husk/preshared-key".into()));
    assert_eq!(config.logs.flows, Some("/var/log/husk/flows.jsonl".into()));
    assert_eq!(config.logs.audit, Some("/var/log/husk/audit.jsonl".into()));
}

#[test]
fn the_example_explains_every_mode_and_leaves_out_what_only_tests_need() {
    for mode in Mode::ALL {
        assert!(EXAMPLE.contains(&format!("#   {mode} ")), "{mode}");
        let text = EXAMPLE.replace("mode: wireguard", &format!("mode: {mode}"));
        assert_eq!(Config::parse("example", &text).unwrap().mode, mode);
    }
    assert!(!EXAMPLE.contains("spiBits"));
}

#[test]
fn every_key_is_read() {
    let text = r"
clusterCIDRs: ['fd00:1::/64', 10.1.0.0/20]
mode: vxlan
blockLengths: {ipv4: 24, ipv6: 120}
node: {name: n1.example}
underlay: {family: ipv6, interface: bond0.7, addresses: {ipv4: 192.0.2.1, ipv6: '2001:db8::1'}, mtu: 9000}
source: {directory: {path: /srv/husk}}
vxlan: {vni: 7, port: 8472}
wireguard: {port: 7000, device: userspace, keepalive: 25}
ipsec:
  cipher: aes-gcm-256
  udpEncapsulation: 4500
  replayWindow: 2048
  presharedKeyFile: /etc/husk/psk
  maxPackets: 1000
  maxBytes: 1000000
  spiBits: 8
keys: {rotation: 60, grace: 2, hardLifetime: 90}
masquerade: false
policy: {enabled: false, quarantineAllowed: [192.0.2.0/24]}
ipam: {blocks: pools, coolDown: 5, releaseAfter: 60}
cni: {binDirectory: /b, configDirectory: /c, network: pods}
log: {format: json, level: trace}
logs: {flows: /f, audit: /a, connections: false, maxBytes: 65536, keep: 0}
metrics: {listen: '192.0.2.1:1', perPeer: true}
ui: {listen: '[::1]:2'}
";
    let expected = Config {
        mode: Mode::Vxlan,
        cluster_cidrs: vec!["10.1.0.0/20".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        block_lengths: BlockLengths { ipv4: 24, ipv6: 120 },
        node_name: Some("n1.example".parse().unwrap()),
        underlay: UnderlayConfig {
            family: Family::Ipv6,
            interface: Some("bond0.7".parse().unwrap()),
            addresses: DualStack {
                ipv4: Some("192.0.2.1".parse().unwrap()),
                ipv6: Some("2001:db8::1".parse().unwrap()),
            },
            mtu: Some(9000),
        },
        source: SourceConfig::Directory { path: "/srv/husk".into() },
        vxlan: VxlanConfig { vni: 7, port: 8472 },
        wireguard: WireguardConfig { port: 7000, device: WireguardChoice::Userspace, keepalive: 25 },
        ipsec: IpsecConfig {
            cipher: Aead::AesGcm256,
            udp_port: Some(4500),
            replay_window: 2048,
            preshared_key_file: Some("/etc/husk/psk".into()),
            max_packets: 1_000,
            max_bytes: 1_000_000,
            spi_bits: 8,
        },
        rotation: RotationConfig { interval: Some(60), grace: 2, hard_lifetime: 90 },
        masquerade: false,
        policy: PolicyConfig { enabled: false, quarantine_allowed: BTreeSet::from(["192.0.2.0/24".parse().unwrap()]) },
        ipam: IpamConfig { blocks: BlockOrigin::Pools, cool_down: 5, release_after: 60 },
        cni: CniConfig { bin_directory: "/b".into(), config_directory: "/c".into(), network: "pods".parse().unwrap() },
        log: LogConfig { format: LogFormat::Json, level: LogLevel::Trace },
        logs: DecisionLogs {
            flows: Some("/f".into()),
            audit: Some("/a".into()),
            connections: false,
            limits: LogLimits { bytes: 65_536, keep: 0 },
        },
        metrics: MetricsConfig { listen: Some("192.0.2.1:1".parse().unwrap()), per_peer: true },
        ui: UiConfig { listen: Some("[::1]:2".parse().unwrap()) },
    };
    assert_eq!(Config::parse("x", text), Ok(expected));
}

/// Lines, key path of the error, its kind, a part of the reason, a part of the remedy.
const WRONG: &[(&str, &str, Problem, &str, &str)] = {
    use Problem::{BadValue, Conflict, Missing, UnknownKey, WrongType};
    &[
        ("clusterCIDRs: []", "clusterCIDRs", Missing, "at least one", "10.42.0.0/16"),
        ("clusterCIDRs:", "clusterCIDRs", Missing, "at least one", "10.42.0.0/16"),
        ("clusterCIDRs: 10.42.0.0/16", "clusterCIDRs", WrongType, "a list", "clusterCIDRs: ["),
        ("clusterCIDRs: [1]", "clusterCIDRs[0]", WrongType, "a CIDR", "clusterCIDRs: ["),
        ("clusterCIDRs: [10.42.0.0]", "clusterCIDRs[0]", BadValue, "is not a CIDR", "address/length"),
        ("clusterCIDRs: [10.42.1.0/16]", "clusterCIDRs[0]", BadValue, "behind its length", "write 10.42.0.0/16"),
        ("clusterCIDRs: [10.42.0.0/16, 10.42.0.0/16]", "clusterCIDRs[1]", Conflict, "twice", "one of the two"),
        ("clusterCIDRs: [10.42.0.0/16, 10.42.8.0/24]", "clusterCIDRs[1]", Conflict, "overlaps 10.42.0.0/16", "larger"),
        ("clusterCIDRs: [10.42.0.0/16, 10.8.0.0/16]", "clusterCIDRs[1]", Conflict, "another IPv4 CIDR", "large enough"),
        ("clusterCIDRs: ['fd42::/48', 'fd43::/48']", "clusterCIDRs[1]", Conflict, "another IPv6 CIDR", "large enough"),
        ("clusterCIDRs: [127.0.0.0/8]", "clusterCIDRs[0]", BadValue, "loopback", "private range"),
        ("clusterCIDRs: [169.254.0.0/20]", "clusterCIDRs[0]", BadValue, "link-local", "private range"),
        ("clusterCIDRs: [239.0.0.0/8]", "clusterCIDRs[0]", BadValue, "multicast", "private range"),
        ("clusterCIDRs: [0.0.0.0/0]", "clusterCIDRs[0]", BadValue, "unspecified", "private range"),
        ("clusterCIDRs: ['fe80::/64']", "clusterCIDRs[0]", BadValue, "link-local", "private range"),
        ("clusterCIDRs: ['ff00::/16']", "clusterCIDRs[0]", BadValue, "multicast", "private range"),
        ("clusterCIDRs: ['::ffff:10.0.0.0/104']", "clusterCIDRs[0]", BadValue, "IPv4-mapped", "private range"),
        ("clusterCIDRs: [10.42.0.0/26]", "blockLengths.ipv4", Conflict, "default block length 26", "from 27 to 30"),
        ("clusterCIDRs: [10.42.0.0/30]", "blockLengths.ipv4", Conflict, "no room", "use a larger cluster CIDR"),
        ("mode: vxlan_ipsec", "mode", BadValue, "this word", "did you mean vxlan-ipsec?"),
        ("mode: wiregaurd", "mode", BadValue, "this word", "did you mean wireguard?"),
        ("mode: 3", "mode", WrongType, "one of direct, vxlan", "'3'"),
        ("mode: [vxlan]", "mode", WrongType, "a list is given", "one text"),
        ("blockLengths: {ipv4: 31}", "blockLengths.ipv4", BadValue, "at least four", "from 1 to 30"),
        ("blockLengths: {ipv6: 127}", "blockLengths.ipv6", BadValue, "at least four", "from 1 to 126"),
        ("blockLengths: {ipv4: 16}", "blockLengths.ipv4", Conflict, "no room", "from 17 to 30"),
        ("blockLengths: {ipv6: 40}", "blockLengths.ipv6", Conflict, "fd42::/48", "from 49 to 126"),
        ("blockLengths: {ipv4: -1}", "blockLengths.ipv4", BadValue, "at least four", "from 1"),
        ("blockLengths: 26", "blockLengths", WrongType, "a map", "indented"),
        ("blockLength: {ipv4: 24}", "blockLength", UnknownKey, "no such key", "did you mean blockLengths?"),
        ("cluster_cidrs: []", "cluster_cidrs", UnknownKey, "no such key", "did you mean clusterCIDRs?"),
        ("colour: blue", "colour", UnknownKey, "no such key", "mode, clusterCIDRs"),
        ("wireguard: {prot: 1}", "wireguard.prot", UnknownKey, "no such key", "port, device, keepalive"),
        ("node: {name: Node_A}", "node.name", BadValue, "not valid", "the name the node has"),
        ("node: {name: 12}", "node.name", WrongType, "a number is given", "'12'"),
        ("underlay: {family: ipv5}", "underlay.family", BadValue, "this word", "did you mean ipv4?"),
        ("underlay: {interface: a/b}", "underlay.interface", BadValue, "not valid", "ip link"),
        ("underlay: {interface: lo}", "underlay.interface", BadValue, "loopback", "reaches the other nodes"),
        ("underlay: {interface: husk-wg0}", "underlay.interface", BadValue, "Husk's own", "other nodes"),
        (
            "underlay: {addresses: {ipv4: 'fd00::1'}}",
            "underlay.addresses.ipv4",
            BadValue,
            "an IPv6 address",
            "key ipv6",
        ),
        (
            "underlay: {addresses: {ipv6: 192.0.2.1}}",
            "underlay.addresses.ipv6",
            BadValue,
            "an IPv4 address",
            "key ipv4",
        ),
        (
            "underlay: {addresses: {ipv4: 192.0.2.1/24}}",
            "underlay.addresses.ipv4",
            BadValue,
            "no address",
            "prefix length",
        ),
        ("underlay: {addresses: {ipv4: 127.0.0.1}}", "underlay.addresses.ipv4", BadValue, "loopback", "can reach"),
        ("underlay: {addresses: {ipv6: 'fe80::1'}}", "underlay.addresses.ipv6", BadValue, "link-local", "can reach"),
        (
            "underlay: {addresses: {ipv4: 10.42.0.1}}",
            "underlay.addresses.ipv4",
            Conflict,
            "cluster CIDR 10.42.0.0/16",
            "no node",
        ),
        ("underlay: {mtu: 575}", "underlay.mtu", BadValue, "576", "from 576 to 65535"),
        ("underlay: {mtu: 65536}", "underlay.mtu", BadValue, "65535", "from 576 to 65535"),
        ("underlay: {mtu: 1279, family: ipv6}", "underlay.mtu", BadValue, "1280", "from 1280"),
        ("underlay: {mtu: 1500.5}", "underlay.mtu", WrongType, "a whole number", "from 576"),
        ("underlay: {mtu: '1500'}", "underlay.mtu", WrongType, "text is given", "without quotes"),
        ("source: {directory: {path: cluster}}", "source.directory.path", BadValue, "relative", "from / on"),
        ("source: {directory: {path: ''}}", "source.directory.path", BadValue, "relative", "from / on"),
        ("source: {etcd: {}}", "source.etcd", UnknownKey, "no such key", "directory"),
        ("logs: {flows: flows.jsonl}", "logs.flows", BadValue, "relative", "from / on"),
        ("logs: {flows: /l, audit: /l}", "logs.audit", Conflict, "same file", "two files"),
        ("logs: {maxBytes: 100}", "logs.maxBytes", BadValue, "few hundred lines", "from 65536"),
        ("logs: {keep: 100}", "logs.keep", BadValue, "two digits", "from 0 to 99"),
        ("vxlan: {vni: 16777216}", "vxlan.vni", BadValue, "24 bits", "16777215"),
        ("vxlan: {vni: 0}", "vxlan.vni", BadValue, "24 bits", "from 1"),
        ("vxlan: {port: 0}", "vxlan.port", BadValue, "0 is none", "from 1 to 65535"),
        ("vxlan: {port: 65536}", "vxlan.port", BadValue, "16 bits", "from 1 to 65535"),
        ("wireguard: {port: 0}", "wireguard.port", BadValue, "0 is none", "from 1 to 65534"),
        ("wireguard: {port: 65535}", "wireguard.port", BadValue, "second device", "from 1 to 65534"),
        ("vxlan: {port: 7001}\nwireguard: {port: 7000}", "wireguard.port", Conflict, "7000 and 7001", "collide"),
        ("vxlan: {port: 7000}\nwireguard: {port: 7000}", "wireguard.port", Conflict, "7000 and 7001", "collide"),
        ("wireguard: {device: user-space!}", "wireguard.device", BadValue, "this word", "did you mean userspace?"),
        ("wireguard: {keepalive: 65536}", "wireguard.keepalive", BadValue, "16 bits", "65535"),
        ("ipsec: {cipher: aes-cbc}", "ipsec.cipher", BadValue, "this word", "aes-gcm-128, aes-gcm-256"),
        ("ipsec: {cipher: 128}", "ipsec.cipher", WrongType, "one of aes-gcm-128", "'128'"),
        ("ipsec: {udpEncapsulation: 65536}", "ipsec.udpEncapsulation", BadValue, "0 is off", "from 0 to 65535"),
        ("ipsec: {udpEncapsulation: true}", "ipsec.udpEncapsulation", WrongType, "a whole number", "from 0"),
        (
            "mode: vxlan-ipsec\nipsec: {udpEncapsulation: 4789}",
            "ipsec.udpEncapsulation",
            Conflict,
            "vxlan.port is 4789",
            "collide",
        ),
        (
            "vxlan: {port: 4500}\nipsec: {udpEncapsulation: 4500}",
            "ipsec.udpEncapsulation",
            Conflict,
            "vxlan.port is 4500",
            "collide",
        ),
        (
            "wireguard: {port: 4500}\nipsec: {udpEncapsulation: 4500}",
            "ipsec.udpEncapsulation",
            Conflict,
            "4500 and 4501",
            "collide",
        ),
        (
            "wireguard: {port: 4499}\nipsec: {udpEncapsulation: 4500}",
            "ipsec.udpEncapsulation",
            Conflict,
            "4499 and 4500",
            "collide",
        ),
        ("ipsec: {replayWindow: 992}", "ipsec.replayWindow", BadValue, "1024", "from 1024 to 4096"),
        ("ipsec: {replayWindow: 4128}", "ipsec.replayWindow", BadValue, "4096 at most", "from 1024 to 4096"),
        ("ipsec: {replayWindow: 1025}", "ipsec.replayWindow", BadValue, "words of 32", "write 1056"),
        ("ipsec: {presharedKeyFile: psk}", "ipsec.presharedKeyFile", BadValue, "relative", "from / on"),
        ("ipsec: {maxPackets: 999}", "ipsec.maxPackets", BadValue, "margin", "from 1000 to 68719476736"),
        ("ipsec: {maxPackets: 68719476737}", "ipsec.maxPackets", BadValue, "margin", "68719476736"),
        ("ipsec: {maxBytes: 70368744177665}", "ipsec.maxBytes", BadValue, "margin", "from 1000000 to 70368744177664"),
        ("ipsec: {maxBytes: 1G}", "ipsec.maxBytes", WrongType, "a whole number", "without quotes"),
        ("ipsec: {spiBits: 3}", "ipsec.spiBits", BadValue, "32 bits", "from 4 to 32"),
        ("ipsec: {spiBits: 33}", "ipsec.spiBits", BadValue, "32 bits", "from 4 to 32"),
        ("ipsec: {chipher: x}", "ipsec.chipher", UnknownKey, "no such key", "did you mean cipher?"),
        ("keys: {rotation: 59}", "keys.rotation", BadValue, "be over", "from 60 on, or 0"),
        ("keys: {rotation: 31536001}", "keys.rotation", BadValue, "once a year", "from 0 to 31536000"),
        ("keys: {rotation: 24h}", "keys.rotation", WrongType, "a whole number", "from 0"),
        ("keys: {grace: 0}", "keys.grace", BadValue, "under way", "from 1 to 3600"),
        ("keys: {rotation: 60, grace: 60}", "keys.grace", Conflict, "keys.rotation is 60", "shorter grace"),
        ("keys: {hardLifetime: 1}", "keys.hardLifetime", BadValue, "a year", "from 2"),
        ("keys: {hardLifetime: 30}", "keys.hardLifetime", Conflict, "the default keys.grace, 30 s", "longer lifetime"),
        ("keys: {grace: 5, hardLifetime: 5}", "keys.hardLifetime", Conflict, "before keys.grace, 5 s", "shorter grace"),
        ("keys: {lifetime: 5}", "keys.lifetime", UnknownKey, "no such key", "rotation, grace, hardLifetime"),
        ("masquerade: yes", "masquerade", WrongType, "text is given", "true or false"),
        ("ipam: {coolDown: 86401}", "ipam.coolDown", BadValue, "a day", "86400"),
        ("ipam: {cooldown: 3}", "ipam.cooldown", UnknownKey, "no such key", "did you mean coolDown?"),
        ("cni: {binDirectory: bin}", "cni.binDirectory", BadValue, "relative", "from / on"),
        ("cni: {configDirectory: \"/a\\0b\"}", "cni.configDirectory", BadValue, "control characters", "printable"),
        ("cni: {network: a/b}", "cni.network", BadValue, "not valid", "husk"),
        ("log: {level: verbose}", "log.level", BadValue, "this word", "error, warn, info"),
        ("log: {format: JSON}", "log.format", BadValue, "this word", "did you mean json?"),
        ("log: {level: info, level: debug}", "log.level", Conflict, "twice", "one of the two"),
    ]
};

#[test]
fn every_wrong_value_is_named_with_reason_and_remedy() {
    for (lines, key, problem, reason, remedy) in WRONG {
        let error = only_error(lines);
        assert_eq!((error.key.as_str(), error.problem), (*key, *problem), "{lines}: {error}");
        assert!(error.reason.contains(reason), "{lines}: {error}");
        assert!(error.remedy.contains(remedy), "{lines}: {error}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("/etc/husk/config.yaml: {key}: ")), "{text}");
    }
}

#[test]
fn the_value_is_shown_as_it_was_given() {
    assert_eq!(
        only_error("wireguard: {port: 65535}").to_string(),
        "/etc/husk/config.yaml: wireguard.port: 65535: a UDP port has 16 bits, 0 is none, and the second device takes \
         the port behind this one; write a whole number from 1 to 65534, without quotes"
    );
    assert_eq!(only_error("node: {name: \"a\\nb\"}").value.as_deref(), Some("\"a\\nb\""));
    assert_eq!(only_error("\"a\\e[31m\\nb\": 1").key, "a\\u{1b}[31m\\nb");
}

#[test]
fn a_configuration_without_anything_asks_for_the_cidrs() {
    for text in ["", "# nothing\n", "---\n", "{}"] {
        let all = errors(text);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].key.as_str(), all[0].problem), ("clusterCIDRs", Problem::Missing));
        assert!(all[0].remedy.contains("clusterCIDRs: [10.42.0.0/16"), "{}", all[0]);
    }
}

#[test]
fn what_is_no_map_is_no_configuration() {
    for text in ["[]", "mode", "12"] {
        assert!(errors(text).iter().any(|error| error.key.is_empty() && error.problem == Problem::WrongType), "{text}");
    }
}

#[test]
fn all_problems_are_reported_at_once() {
    let text =
        "mode: ip-sec\nclusterCIDRs: [10.42.0.1/16, x]\nwireguard: {port: 0, prot: 1}\nlog: {level: 1}\nnode: []\n";
    let keys: Vec<String> = errors(text).into_iter().map(|error| error.key).collect();
    assert_eq!(
        keys,
        ["mode", "clusterCIDRs[0]", "clusterCIDRs[1]", "node", "wireguard.port", "wireguard.prot", "log.level"]
    );
}

#[test]
fn broken_yaml_is_located() {
    let all = errors("mode: vxlan\nclusterCIDRs: [10.42.0.0/16\nlog: {}\n");
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].problem, Problem::Syntax);
    assert!(all[0].reason.contains("line ") && all[0].reason.contains("column "), "{}", all[0]);
    let two = errors("mode: vxlan\n---\nmode: direct\n");
    assert_eq!(two[0].problem, Problem::Syntax, "{two:?}");
}

#[test]
fn garbage_is_bounded() {
    let many: String = (0..50_000).map(|n| format!("key{n}: 1\n")).collect();
    assert!(errors(&many).len() <= 100);
    assert_eq!(errors(&"x".repeat(2 << 20))[0].problem, Problem::Syntax);
}

#[test]
fn sections_without_keys_are_as_if_absent() {
    let config =
        Config::parse("x", "clusterCIDRs: [10.42.0.0/16]\nlog:\nnode:\nunderlay:\n  addresses:\nmode:\n").unwrap();
    assert_eq!(config, Config::new(vec!["10.42.0.0/16".parse().unwrap()]));
}

#[test]
fn one_port_alone_never_collides() {
    assert!(Config::parse("x", "clusterCIDRs: [10.42.0.0/16]\nvxlan: {port: 51820}\n").is_ok());
    assert!(Config::parse("x", "clusterCIDRs: [10.42.0.0/16]\nwireguard: {port: 4789}\n").is_ok());
    for lines in ["ipsec: {udpEncapsulation: 51820}", "ipsec: {udpEncapsulation: 4789}", "wireguard: {port: 4500}"] {
        assert!(Config::parse("x", &format!("clusterCIDRs: [10.42.0.0/16]\n{lines}\n")).is_ok(), "{lines}");
    }
}

#[test]
fn zero_turns_off() {
    let text = "clusterCIDRs: [10.42.0.0/16]\nipsec: {udpEncapsulation: 0}\nkeys: {rotation: 0, grace: 3600}\n";
    let config = Config::parse("x", text).unwrap();
    assert_eq!((config.ipsec.udp_port, config.rotation.interval), (None, None));
}

/// A valid configuration with a few bytes replaced, inserted or taken out.
fn mutated(changes: &[(usize, u8, char)]) -> String {
    let mut text: Vec<char> = EXAMPLE.chars().collect();
    for (place, what, with) in changes {
        let place = place % text.len();
        match what % 3 {
            0 => text[place] = *with,
            1 => text.insert(place, *with),
            _ => drop(text.drain(place..(place + 20).min(text.len()))),
        }
    }
    text.into_iter().collect()
}

fn check_total(text: &str) {
    match Config::parse("the-file", text) {
        Ok(config) => {
            assert!((1..=2).contains(&config.cluster_cidrs.len()));
            assert!(config.cluster_cidrs.is_sorted());
            assert!(config.wireguard.port < u16::MAX);
            assert!(config.ipsec.replay_window.is_multiple_of(32) && config.ipsec.replay_window <= 4096);
            assert!(config.rotation.grace < config.rotation.hard_lifetime);
            assert!(config.rotation.interval.is_none_or(|interval| interval >= 60));
            for cidr in &config.cluster_cidrs {
                assert!(config.block_lengths.get(cidr.family()) > cidr.length());
            }
        }
        Err(errors) => {
            assert!(!errors.0.is_empty());
            assert!(errors.to_string().lines().all(|line| line.starts_with("the-file: ")), "{errors}");
            assert!(errors.0.iter().all(|error| !error.reason.is_empty() && !error.remedy.is_empty()), "{errors}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_text_is_a_configuration_or_an_error(text in "\\PC*") {
        check_total(&text);
    }

    #[test]
    fn anything_like_yaml_is_a_configuration_or_an_error(text in "([a-zA-Z]{0,4}|[-:#&*!|>'\"%@`{}\\[\\], \n]|clusterCIDRs: |mode: ){0,60}") {
        check_total(&text);
    }

    #[test]
    fn a_damaged_configuration_is_a_configuration_or_an_error(
        changes in prop::collection::vec((any::<usize>(), any::<u8>(), any::<char>()), 1..6),
    ) {
        check_total(&mutated(&changes));
    }
}

#[test]
fn kubernetes_is_a_source_with_or_without_a_kubeconfig() {
    let source = |lines: &str| {
        let text = format!("clusterCIDRs: [10.244.0.0/16]\n{lines}\n");
        Config::parse("config", &text).unwrap().source
    };
    assert_eq!(source("source: {kubernetes: {}}"), SourceConfig::Kubernetes { kubeconfig: None });
    let kubeconfig = Some("/etc/husk/kubeconfig".into());
    assert_eq!(
        source("source: {kubernetes: {kubeconfig: /etc/husk/kubeconfig}}"),
        SourceConfig::Kubernetes { kubeconfig }
    );
    let error = only_error("source: {kubernetes: {}, directory: {path: /srv/husk}}");
    assert!(error.reason.contains("one source") && error.key == "source.directory", "{error:?}");
    assert_eq!(only_error("source: {kubernetes: {kubeconfig: x}}").key, "source.kubernetes.kubeconfig");
    assert_eq!(only_error("source: {kubernets: {}}").key, "source.kubernets");
}

#[test]
fn only_kubernetes_gives_cidrs_to_nodes() {
    let text =
        "clusterCIDRs: [10.244.0.0/16]\nsource: {kubernetes: {}}\nipam: {blocks: node-cidrs, releaseAfter: 10}\n";
    let ipam = Config::parse("config", text).unwrap().ipam;
    assert_eq!(ipam, IpamConfig { blocks: BlockOrigin::NodeCidrs, cool_down: 30, release_after: 10 });
    let error = only_error("ipam: {blocks: node-cidrs}");
    assert!(error.reason.contains("only Kubernetes") && error.remedy.contains("pools"), "{error:?}");
    assert_eq!(only_error("ipam: {releaseAfter: 9}").key, "ipam.releaseAfter");
}

#[test]
fn what_is_served_over_http_is_checked() {
    let parse = |text: &str| Config::parse("c", &format!("clusterCIDRs: [10.42.0.0/16]\n{text}"));
    let off = parse("metrics: {listen: off}\nui: {listen: \"\"}").unwrap();
    assert_eq!((off.metrics.listen, off.ui.listen), (None, None));
    let open = parse("metrics: {listen: \"[::]:9100\", perPeer: true}\nui: {listen: \"[::1]:1\"}").unwrap();
    assert_eq!(open.metrics, MetricsConfig { listen: Some("[::]:9100".parse().unwrap()), per_peer: true });
    assert_eq!(open.ui.listen, Some("[::1]:1".parse().unwrap()));
    for (text, expected) in [
        ("metrics: {listen: localhost}", "no address with a port"),
        ("metrics: {listen: \"127.0.0.1:0\"}", "port 0"),
        ("metrics: {listen: 9472}", "an address with a port"),
        ("metrics: {perPeers: true}", "perPeer"),
        ("ui: {listen: \"0.0.0.0:9473\"}", "only loopback"),
        ("ui: {listen: \"192.0.2.1:9473\"}", "ssh -L"),
        ("metrics: {listen: \"127.0.0.1:9473\"}\nui: {listen: \"127.0.0.1:9473\"}", "another port"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}
