//! A host in a network namespace of its own, which ends with the test. Needs root and the tool ip.

use std::process::Command;

use husk_overlay::endpoint::{AttachmentId, NetnsIdentity};
use husk_overlay::facts::WireguardSupport;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use nix::errno::Errno;

use super::support::support_of;
use super::*;

/// Runs a test as a host with an underlay interface.
fn as_host(mode: Mode, configure: impl Fn(&mut Config) + Sync, test: impl FnOnce(&mut Host, &Path) + Send) {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handle = runtime.handle().clone();
    let namespace = Netns::new_unnamed().unwrap();
    let ran = namespace.run_in(|| {
        ip("link add eth0 type veth peer name peer0");
        ip("link set peer0 up");
        ip("link set eth0 up");
        ip("addr add 192.0.2.1/24 dev eth0");
        let mut config = Config::new(vec!["10.64.0.0/10".parse().unwrap()]);
        config.mode = mode;
        configure(&mut config);
        let identity = Identity::load(NodeName::new("host1").unwrap(), directory.path()).unwrap();
        let sysctls = directory.path().join("sysctls.json");
        let companions = Companions { run_directory: directory.path().to_owned(), runtime: handle, tunnels: None };
        let mut host = Host::new(&config, identity, companions, sysctls).unwrap();
        test(&mut host, directory.path());
    });
    ran.unwrap();
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip(8) of iproute2 must be installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn facts(host: &mut Host) -> Facts {
    host.facts(&Snapshot::default(), jiff::Timestamp::UNIX_EPOCH).unwrap()
}

#[test]
fn only_a_kernel_that_says_so_has_no_wireguard() {
    let unsupported =
        || Error::Unsupported { operation: "find", object: "it".into(), reason: "none".into(), remedy: "-" };
    let interrupted = || Error::TimedOut { operation: "find", object: "it".into(), seconds: 5 };
    assert_eq!(support_of(Ok(()), false).unwrap(), WireguardSupport::Kernel);
    assert_eq!(support_of(Err(unsupported()), true).unwrap(), WireguardSupport::Userspace);
    assert!(matches!(support_of(Err(unsupported()), false).unwrap(), WireguardSupport::Unavailable { .. }));
    assert!(support_of(Err(interrupted()), true).is_err());
    assert!(support_of(Err(interrupted()), false).is_err());
}

#[test]
fn a_configured_address_counts_while_an_interface_has_it() {
    let configured: IpAddr = "192.0.2.9".parse().unwrap();
    as_host(
        Mode::Direct,
        |config| config.underlay.addresses.set(configured),
        |host, _| {
            assert_eq!(facts(host).addresses, DualStack::default());
            ip("addr add 192.0.2.9/24 dev eth0");
            let found = facts(host);
            assert_eq!(found.addresses, [configured].into_iter().collect());
            assert_eq!(found.underlay_interface, Some("eth0".parse().unwrap()));
            ip("addr del 192.0.2.9/24 dev eth0");
            assert_eq!(facts(host).addresses, DualStack::default());
        },
    );
}

#[test]
fn a_key_that_cannot_be_read_fails_the_facts() {
    as_host(
        Mode::Wireguard,
        |_| {},
        |host, directory| {
            let path = directory.join("keys/wireguard-0.key");
            std::os::unix::fs::symlink("wireguard-0.key", &path).unwrap();
            let error = host.facts(&Snapshot::default(), jiff::Timestamp::UNIX_EPOCH).unwrap_err();
            assert!(format!("{error:#}").contains("wireguard-0.key"), "{error:#}");
        },
    );
}

#[test]
fn a_living_pod_gets_its_mtu_at_both_ends_and_another_namespace_is_left_alone() {
    as_host(
        Mode::Direct,
        |_| {},
        |host, _| {
            let id = AttachmentId {
                network: "husk".parse().unwrap(),
                container_id: "pod".parse().unwrap(),
                ifname: "eth0".parse().unwrap(),
            };
            let pod = Netns::new_unnamed().unwrap();
            // The namespace lives as long as this descriptor, by which it is found.
            let descriptor = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&pod));
            let path = format!("/proc/{}/fd/{descriptor}", std::process::id());
            let mut endpoint = Endpoint {
                addresses: ["10.64.0.5".parse().unwrap()].into_iter().collect(),
                pod_mac: id.pod_mac(),
                host_interface: id.host_interface(),
                netns: NetnsIdentity { path, ..pod.identity().unwrap() },
                pod_namespace: None,
                pod_name: None,
                pod_uid: None,
                port_mappings: Vec::new(),
                bandwidth: None,
                id,
            };
            let spec = PodSpec {
                host_interface: endpoint.host_interface.clone(),
                host_mac: endpoint.id.host_mac(),
                alias: String::new(),
                pod_interface: endpoint.id.ifname.clone(),
                pod_mac: endpoint.pod_mac,
                addresses: endpoint.addresses,
                mtu: 1500,
                bandwidth: None,
                loopback: false,
            };
            pod::attach(&spec, &pod).unwrap();
            assert_eq!(host.pod_interfaces().unwrap(), BTreeMap::from([(spec.host_interface.clone(), 1500)]));
            host.set_pod_mtu(&endpoint, 1390).unwrap();
            let tuned = PodSpec { mtu: 1390, ..spec };
            assert_eq!(pod::check(&tuned, &pod, &pod::PodMtu::OneOf(vec![tuned.mtu])).unwrap(), Vec::<String>::new());
            assert_eq!(host.pod_interfaces().unwrap()[&tuned.host_interface], 1390);

            endpoint.netns.inode += 1;
            let error = host.set_pod_mtu(&endpoint, 1300).unwrap_err().to_string();
            assert!(error.contains("another one than the pod was connected in"), "{error}");
            assert_eq!(host.pod_interfaces().unwrap()[&tuned.host_interface], 1390);
            endpoint.netns.inode -= 1;
            pod::detach(&tuned.host_interface).unwrap();
            assert_eq!(host.set_pod_mtu(&endpoint, 1300).unwrap_err().errno(), Some(Errno::ENODEV));
        },
    );
}
