//! WireGuard devices of the kernel, each test in network namespaces of its own: what is applied is read back, changes are as
//! small as they should be, and nobody who is to stay loses anything meanwhile.
//!
//! A kernel without WireGuard can prove only that its absence is reported as what it is. Each test then says so on standard
//! error and checks that; with `HUSK_TEST_KERNEL_WIREGUARD=required` in the environment it fails instead. `hack/vm` runs
//! them on a kernel that has it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use husk_dataplane::Sweep;
use husk_dataplane::error::Error;
use husk_dataplane::kernel::{Actual, Change, Kernel as _, Table, diff_table};
use husk_dataplane::linux::Linux;
use husk_dataplane::netns::Netns;
use husk_dataplane::reconcile::{Outcome, reconcile};
use husk_dataplane::wireguard::{KeyRing, Wireguard, WireguardAction, WireguardChange, WireguardState};
use husk_overlay::kernel::{Address, Desired, Link, LinkKind, Route, RouteKey, RouteTarget, WireguardDevice};
use husk_overlay::keys::{PrivateKey, PublicKey};
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Prefix;

/// What a WireGuard device takes. The other tables have tests of their own and need not be read again and again.
const TABLES: [Table; 5] = [Table::Links, Table::Wireguard, Table::Napi, Table::Addresses, Table::Routes];

const PORT: u16 = 51820;

/// How long a handshake may take on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test in a namespace of a kernel that has WireGuard; elsewhere, checks what it says of that.
fn with_wireguard(body: impl FnOnce(&mut Linux) + Send) {
    let namespace = Netns::new_unnamed().unwrap();
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    namespace
        .run_in(|| {
            ip("link set lo up");
            let mut linux = linux();
            match linux.wireguard().unwrap().kernel_support() {
                Ok(()) => body(&mut linux),
                Err(error) => absent(&test, &mut linux, &error),
            }
        })
        .unwrap();
}

/// A kernel without WireGuard: support, reading and configuring each say what is the matter.
fn absent(test: &str, linux: &mut Linux, error: &Error) {
    assert!(
        std::env::var_os("HUSK_TEST_KERNEL_WIREGUARD").is_none(),
        "HUSK_TEST_KERNEL_WIREGUARD is set, and yet: {error}"
    );
    // Not by a macro, whose output the test harness keeps to itself when a test passes.
    let words = format!("{test}: NOT TESTED, only that its absence is reported: {error}\n");
    std::io::stderr().write_all(words.as_bytes()).unwrap();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert!(error.remedy().contains("userspace device"), "{}", error.remedy());
    let wireguard = linux.wireguard().unwrap();
    assert_eq!(wireguard.read(&name("husk-wg0"), false).unwrap(), None);
    let change = change(WireguardAction::SetListenPort { listen_port: PORT });
    let results = wireguard.apply(&[change], &KeyRing::default());
    assert!(matches!(results.as_slice(), [Err(Error::Unsupported { .. })]), "{results:?}");
    let outcome = reconcile(linux, &alone(1), &ring(&[1]), Sweep::Allowed);
    assert!(!outcome.is_clean(), "no device, and yet no failure");
}

fn linux() -> Linux {
    Linux::open(Path::new("/nonexistent")).unwrap()
}

/// Runs `ip` in the namespace of the calling thread; its output.
fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

fn wg(arguments: &str) -> String {
    run("wg", arguments)
}

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; iproute2 and wireguard-tools are needed"));
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

fn prefixes<const N: usize>(all: [&str; N]) -> BTreeSet<Prefix> {
    all.iter().map(|text| text.parse().unwrap()).collect()
}

fn private_key(seed: u8) -> PrivateKey {
    PrivateKey::from_random([seed; 32]).unwrap()
}

fn public_key(seed: u8) -> PublicKey {
    private_key(seed).public()
}

fn ring(seeds: &[u8]) -> KeyRing {
    seeds.iter().map(|seed| private_key(*seed)).collect()
}

/// A public key that nobody has the private key of.
fn stranger(number: usize) -> PublicKey {
    PublicKey::from_bytes(husk_overlay::digest::sha256(&["peer", &number.to_string()])).unwrap()
}

fn peer<const N: usize>(endpoint: &str, allowed_ips: [&str; N]) -> husk_overlay::kernel::WireguardPeer {
    husk_overlay::kernel::WireguardPeer {
        endpoint: Some(endpoint.parse().unwrap()),
        allowed_ips: prefixes(allowed_ips),
        keepalive: 0,
    }
}

fn change(action: WireguardAction) -> WireguardChange {
    WireguardChange { interface: name("husk-wg0"), userspace: false, action }
}

/// A device without peers.
fn alone(seed: u8) -> Desired {
    let link = Link { kind: LinkKind::Wireguard, mtu: 1420, mac: None, threaded_napi: true };
    let device =
        WireguardDevice { userspace: false, public_key: public_key(seed), listen_port: PORT, peers: BTreeMap::new() };
    Desired {
        links: [(name("husk-wg0"), link)].into(),
        wireguard: [(name("husk-wg0"), device)].into(),
        ..Desired::default()
    }
}

/// A device with a peer of each underlay family.
fn with_two_peers() -> Desired {
    let mut desired = alone(1);
    let peers = &mut device(&mut desired).peers;
    peers.insert(stranger(1), peer("192.0.2.1:51820", ["10.42.1.0/26", "10.42.1.64/26", "fd42:0:0:1::/122"]));
    let mut second = peer("[2001:db8::2]:51821", ["10.42.2.0/26"]);
    second.keepalive = 25;
    peers.insert(stranger(2), second);
    desired
}

fn device(desired: &mut Desired) -> &mut WireguardDevice {
    desired.wireguard.get_mut(&name("husk-wg0")).unwrap()
}

fn allowed_ips(desired: &mut Desired, number: usize) -> &mut BTreeSet<Prefix> {
    &mut device(desired).peers.get_mut(&stranger(number)).unwrap().allowed_ips
}

fn state(linux: &mut Linux) -> WireguardState {
    linux.wireguard().unwrap().read(&name("husk-wg0"), false).unwrap().unwrap()
}

fn pass(linux: &mut Linux, desired: &Desired, keys: &KeyRing) -> Outcome {
    let outcome = reconcile(linux, desired, keys, Sweep::Allowed);
    assert!(outcome.is_clean(), "{:?}", outcome.failures);
    outcome
}

fn differences(linux: &mut Linux, desired: &Desired) -> Vec<Change> {
    let mut actual = Actual::default();
    for table in TABLES {
        linux.read(table, desired, &mut actual).unwrap();
    }
    TABLES.into_iter().flat_map(|table| diff_table(table, desired, &actual, Sweep::Allowed)).collect()
}

/// Makes the kernel as desired, and checks that it then is, to the letter. How many changes to WireGuard that took.
fn settle(linux: &mut Linux, desired: &Desired) -> usize {
    let outcome = pass(linux, desired, &ring(&[1]));
    assert_eq!(differences(linux, desired), []);
    for (interface, device) in &desired.wireguard {
        let found = linux.wireguard().unwrap().read(interface, false).unwrap().unwrap();
        assert_eq!(found.device(false).as_ref(), Some(device));
    }
    outcome.applied.get(&Table::Wireguard).copied().unwrap_or(0)
}

fn index(interface: &str) -> u32 {
    ip(&format!("-o link show dev {interface}")).split(':').next().unwrap().parse().unwrap()
}

#[test]
fn a_device_is_made_tuned_alive_and_removed() {
    with_wireguard(|linux| {
        ip("link add stranger type wireguard");
        let strangers = ip("-d link show dev stranger");
        let mut desired = with_two_peers();
        settle(linux, &desired);
        let first = index("husk-wg0");
        let shown = ip("-d addr show dev husk-wg0");
        assert!(shown.contains("wireguard") && shown.contains("mtu 1420") && shown.contains("UP"), "{shown}");
        assert!(!shown.contains("inet6"), "no link-local address: {shown}");

        desired.links.get_mut(&name("husk-wg0")).unwrap().mtu = 1300;
        assert_eq!(pass(linux, &desired, &ring(&[1])).applied, [(Table::Links, 1)].into());
        // Set down by an outsider: peers and key stay, and so does the port, though the socket is closed meanwhile.
        ip("link set husk-wg0 down");
        assert_eq!(pass(linux, &desired, &ring(&[1])).applied, [(Table::Links, 1)].into());
        settle(linux, &desired);
        assert_eq!(index("husk-wg0"), first);

        // Under our name, but no WireGuard device.
        ip("link del husk-wg0");
        ip("link add husk-wg0 type veth peer name other");
        settle(linux, &desired);
        assert!(ip("-d link show dev husk-wg0").contains("wireguard"));

        let outcome = pass(linux, &Desired::default(), &KeyRing::default());
        assert_eq!(outcome.applied, [(Table::Links, 1)].into());
        assert_eq!(linux.wireguard().unwrap().read(&name("husk-wg0"), false).unwrap(), None);
        assert_eq!(ip("-d link show dev stranger"), strangers);
    });
}

#[test]
fn what_is_configured_is_what_wg_shows() {
    with_wireguard(|linux| {
        let desired = with_two_peers();
        settle(linux, &desired);
        assert_eq!(wg("show husk-wg0 public-key").trim(), public_key(1).to_string());
        assert_eq!(wg("show husk-wg0 listen-port").trim(), PORT.to_string());
        assert_eq!(wg("show husk-wg0 fwmark").trim(), "off");
        let lines = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (one, two) = (stranger(1), stranger(2));
        let expected = [format!("{one}\t192.0.2.1:51820"), format!("{two}\t[2001:db8::2]:51821")].into();
        assert_eq!(lines(wg("show husk-wg0 endpoints")), expected);
        let expected = [format!("{one}\toff"), format!("{two}\t25")].into();
        assert_eq!(lines(wg("show husk-wg0 persistent-keepalive")), expected);
        let shown = lines(wg("show husk-wg0 allowed-ips"));
        let shown: BTreeSet<BTreeSet<&str>> = shown.iter().map(|line| line.split_whitespace().collect()).collect();
        let (one, two) = (one.to_string(), two.to_string());
        let expected = [
            [one.as_str(), "10.42.1.0/26", "10.42.1.64/26", "fd42:0:0:1::/122"].into(),
            [&*two, "10.42.2.0/26"].into(),
        ];
        assert_eq!(shown, expected.into());
    });
}

#[test]
fn one_difference_is_one_change() {
    with_wireguard(|linux| {
        let mut desired = with_two_peers();
        settle(linux, &desired);
        // One prefix more, one less, one that changes hands: and nobody is left over of how the kernel was told.
        allowed_ips(&mut desired, 1).insert("10.42.9.0/26".parse().unwrap());
        assert_eq!(settle(linux, &desired), 1);
        allowed_ips(&mut desired, 1).remove(&"10.42.1.64/26".parse().unwrap());
        assert_eq!(settle(linux, &desired), 1);
        allowed_ips(&mut desired, 1).remove(&"fd42:0:0:1::/122".parse().unwrap());
        assert_eq!(settle(linux, &desired), 1);
        assert_eq!(state(linux).peers.len(), 2);
        let moved = "10.42.9.0/26".parse().unwrap();
        allowed_ips(&mut desired, 1).remove(&moved);
        allowed_ips(&mut desired, 2).insert(moved);
        // What the one gains, and what the other was told to leave, which by then has happened.
        assert!(settle(linux, &desired) <= 2);
        // The last prefix, a peer without any, all of them from another.
        allowed_ips(&mut desired, 1).clear();
        assert_eq!(settle(linux, &desired), 1);
        *allowed_ips(&mut desired, 1) = std::mem::take(allowed_ips(&mut desired, 2));
        assert!(settle(linux, &desired) <= 2);

        device(&mut desired).peers.get_mut(&stranger(1)).unwrap().endpoint = Some("192.0.2.77:7".parse().unwrap());
        assert_eq!(settle(linux, &desired), 1);
        device(&mut desired).peers.get_mut(&stranger(2)).unwrap().keepalive = 0;
        assert_eq!(settle(linux, &desired), 1);
        device(&mut desired).listen_port = 51999;
        assert_eq!(settle(linux, &desired), 1);
        device(&mut desired).peers.remove(&stranger(1));
        assert_eq!(settle(linux, &desired), 1);
        assert_eq!(settle(linux, &desired), 0);
    });
}

#[test]
fn what_an_outsider_changes_comes_back() {
    with_wireguard(|linux| {
        let desired = with_two_peers();
        settle(linux, &desired);
        let (one, two) = (stranger(1), stranger(2));
        let secret = std::env::temp_dir().join(format!("husk-psk-{}", std::process::id()));
        std::fs::write(&secret, "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n").unwrap();
        let secret_file = secret.display().to_string();
        for (what, changes) in [
            (format!("set husk-wg0 peer {one} remove"), 1),
            (format!("set husk-wg0 peer {one} endpoint 192.0.2.99:9"), 1),
            (format!("set husk-wg0 peer {two} allowed-ips 10.42.2.0/26,10.77.0.0/16"), 1),
            (format!("set husk-wg0 peer {two} allowed-ips 10.99.0.0/16"), 1),
            // Taken from its owner too: the one gets it back, the other is told to leave it.
            (format!("set husk-wg0 peer {two} allowed-ips 10.42.2.0/26,10.42.1.0/26"), 2),
            (format!("set husk-wg0 peer {two} persistent-keepalive 7 preshared-key {secret_file}"), 1),
            (format!("set husk-wg0 peer {} allowed-ips 10.42.1.0/26", stranger(3)), 2),
            (format!("set husk-wg0 fwmark 0x77 listen-port 7777 private-key {secret_file}"), 3),
        ] {
            wg(&what);
            assert_eq!(settle(linux, &desired), changes, "{what}");
            assert_eq!(state(linux).preshared, BTreeSet::new(), "{what}");
            assert_eq!(state(linux).firewall_mark, 0, "{what}");
        }
        std::fs::remove_file(secret).unwrap();
        let gone = linux.delete_interfaces(&[name("husk-wg0")]);
        assert!(gone.iter().all(Result::is_ok), "{gone:?}");
        settle(linux, &desired);
    });
}

/// The kernel refuses a packet that no peer has the address of (`wg_xmit` in drivers/net/wireguard/device.c, `ENOKEY`), and
/// tells the sender. So a sender who is never refused has seen that there was an owner all the time.
#[test]
fn a_prefix_that_stays_or_moves_has_an_owner_all_the_time() {
    with_wireguard(|linux| {
        let mut desired = with_two_peers();
        let over = |text: &str| {
            let target = RouteTarget::Interface { interface: name("husk-wg0"), via: None, onlink: false };
            let key = RouteKey { table: 254, destination: text.parse().unwrap(), metric: 0 };
            (key, Route { target, source: None, mtu: None })
        };
        desired.routes = [over("10.42.0.0/16")].into();
        let own = Address { interface: name("husk-wg0"), address: "10.42.0.1".parse().unwrap(), length: 32 };
        desired.addresses = [own].into();
        // Somewhere to send to: nobody answers there, which costs nothing but a handshake's first message.
        ip("addr add 192.0.2.9/24 dev lo");
        ip("-6 addr add 2001:db8::9/64 dev lo");
        allowed_ips(&mut desired, 1).insert("10.42.9.0/26".parse().unwrap());
        settle(linux, &desired);

        let socket = UdpSocket::bind("10.42.0.1:0").unwrap();
        let elsewhere = socket.send_to(b"x", "10.42.200.1:9").unwrap_err();
        assert_eq!(elsewhere.raw_os_error(), Some(libc::ENOKEY), "the sender is told: {elsewhere}");

        let (done, sent) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut refusals = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    for to in ["10.42.1.1:9", "10.42.9.1:9"] {
                        if let Err(error) = socket.send_to(b"x", to) {
                            refusals.push(format!("{to}: {error}"));
                        }
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
                refusals
            });
            let (comes_and_goes, moves) = ("10.42.1.64/26".parse().unwrap(), "10.42.9.0/26".parse().unwrap());
            for round in 0..60 {
                let (from, to) = if round % 2 == 0 { (1, 2) } else { (2, 1) };
                assert!(allowed_ips(&mut desired, from).remove(&moves));
                allowed_ips(&mut desired, to).insert(moves);
                if !allowed_ips(&mut desired, 1).remove(&comes_and_goes) {
                    allowed_ips(&mut desired, 1).insert(comes_and_goes);
                }
                let before = sent.load(Ordering::Relaxed);
                pass(linux, &desired, &ring(&[1]));
                assert_eq!(state(linux).device(false).as_ref(), desired.wireguard.get(&name("husk-wg0")));
                while sent.load(Ordering::Relaxed) < before + 4 {
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(sender.join().unwrap(), Vec::<String>::new(), "of {}", sent.load(Ordering::Relaxed));
        });
    });
}

#[test]
fn a_thousand_peers_are_read_back_to_the_letter_and_one_more_is_one_change() {
    with_wireguard(|linux| {
        let mut desired = alone(1);
        let mut add = |number: usize| {
            let (high, low) = (number / 256, number % 256);
            let endpoint = if number.is_multiple_of(2) {
                format!("192.0.{}.{low}:51820", 2 + high)
            } else {
                format!("[2001:db8::{number:x}]:51820")
            };
            let allowed = [format!("10.{}.{low}.0/26", 100 + high), format!("fd42:{number:x}::/122")];
            let mut configuration = peer(&endpoint, []);
            configuration.allowed_ips = allowed.iter().map(|text| text.parse().unwrap()).collect();
            device(&mut desired).peers.insert(stranger(number), configuration);
            desired.clone()
        };
        let mut thousand = Desired::default();
        for number in 0..1000 {
            thousand = add(number);
        }
        // Key, port and the peers.
        assert_eq!(settle(linux, &thousand), 1002);
        assert_eq!(wg("show husk-wg0 peers").lines().count(), 1000);
        let one_more = add(1000);
        assert_eq!(settle(linux, &one_more), 1);
        assert_eq!(settle(linux, &thousand), 1);
        // From a thousand to none at once.
        assert_eq!(settle(linux, &alone(1)), 1000);
    });
}

/// More prefixes than fit into one message of the kernel's dump, and than we put into one of ours.
#[test]
fn a_peer_may_have_thousands_of_prefixes() {
    with_wireguard(|linux| {
        let mut desired = with_two_peers();
        for number in 0..2500 {
            let text = if number % 2 == 0 {
                format!("10.{}.{}.0/26", 100 + number / 256, number % 256)
            } else {
                format!("fd42:{number:x}::/122")
            };
            allowed_ips(&mut desired, 1).insert(text.parse().unwrap());
        }
        settle(linux, &desired);
        // All but one, which takes several messages too.
        let all = std::mem::take(allowed_ips(&mut desired, 1));
        *allowed_ips(&mut desired, 1) = prefixes(["10.42.1.0/26"]);
        assert_eq!(settle(linux, &desired), 1);
        // And all of them from one peer to the other.
        *allowed_ips(&mut desired, 1) = all;
        settle(linux, &desired);
        let all = std::mem::take(allowed_ips(&mut desired, 1));
        allowed_ips(&mut desired, 2).extend(all);
        settle(linux, &desired);
    });
}

#[test]
fn threaded_napi_is_on_once_there_is_a_peer() {
    with_wireguard(|linux| {
        let threaded = |linux: &mut Linux, desired: &Desired| {
            let mut actual = Actual::default();
            linux.read(Table::Napi, desired, &mut actual).unwrap();
            actual.napi.get(&name("husk-wg0")).copied()
        };
        settle(linux, &alone(1));
        let desired = with_two_peers();
        settle(linux, &desired);
        assert_eq!(threaded(linux, &desired), Some(true));
        // It stays on for peers that come later, also when all went before.
        settle(linux, &alone(1));
        settle(linux, &desired);
        assert_eq!(threaded(linux, &desired), Some(true));
    });
}

#[test]
fn a_change_to_a_device_that_is_gone_says_which() {
    with_wireguard(|linux| {
        let action = WireguardAction::SetListenPort { listen_port: PORT };
        let error = linux.wireguard().unwrap().apply(&[change(action)], &KeyRing::default()).remove(0).unwrap_err();
        assert_eq!(error.errno(), Some(nix::errno::Errno::ENODEV), "{error:?}");
        assert!(error.to_string().contains("husk-wg0"), "{error}");
        ip("link add husk-wg0 type veth peer name other");
        let error = linux.wireguard().unwrap().read(&name("husk-wg0"), false).unwrap_err();
        assert!(error.to_string().contains("husk-wg0"), "{error}");
        let action = WireguardAction::SetPrivateKey { public_key: public_key(9) };
        let error = linux.wireguard().unwrap().apply(&[change(action)], &ring(&[1])).remove(0).unwrap_err();
        assert!(matches!(error, Error::NoPrivateKey { .. }), "{error:?}");
    });
}

/// One of two hosts that are peers of each other, host 1 or 2.
fn one_of_two(own: u8) -> Desired {
    let other = 3 - own;
    let mut desired = alone(own);
    let configuration = peer(&format!("192.168.7.{other}:{PORT}"), [&*format!("10.42.{other}.0/26")]);
    device(&mut desired).peers.insert(public_key(other), configuration);
    let address = format!("10.42.{own}.1").parse().unwrap();
    desired.addresses = [Address { interface: name("husk-wg0"), address, length: 32 }].into();
    let target = RouteTarget::Interface { interface: name("husk-wg0"), via: None, onlink: false };
    let key = RouteKey { table: 254, destination: format!("10.42.{other}.0/26").parse().unwrap(), metric: 0 };
    desired.routes = [(key, Route { target, source: None, mtu: None })].into();
    desired
}

/// Sends until the other end gets something.
fn deliver(from: &Netns, to: &UdpSocket, address: SocketAddr) {
    let sender = from.run_in(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        sender.send_to(b"hello", address).unwrap();
        if to.recv(&mut [0; 16]).is_ok() {
            return;
        }
        assert!(Instant::now() < end, "nothing arrived within {PATIENCE:?}");
    }
}

#[test]
fn changes_to_a_peer_leave_its_session_alone() {
    with_wireguard(|linux| {
        let far = Netns::new_unnamed().unwrap();
        let own = Netns::current().unwrap();
        ip("link add eth0 type veth peer name far0");
        ip("addr add 192.168.7.1/24 dev eth0");
        ip("link set eth0 up");
        ip(&format!("link set far0 netns /proc/{}/fd/{}", std::process::id(), far.as_fd().as_raw_fd()));
        let far_socket = far
            .run_in(|| {
                ip("addr add 192.168.7.2/24 dev far0");
                ip("link set far0 up");
                let mut far_linux = self::linux();
                pass(&mut far_linux, &one_of_two(2), &ring(&[2]));
                UdpSocket::bind("10.42.2.1:7000").unwrap()
            })
            .unwrap();
        let mut desired = one_of_two(1);
        settle(linux, &desired);
        assert_eq!(state(linux).status[&public_key(2)].last_handshake, None);

        deliver(&own, &far_socket, "10.42.2.1:7000".parse().unwrap());
        let before = state(linux).status[&public_key(2)];
        assert!(before.last_handshake.is_some(), "{before:?}");
        assert!(before.sent_bytes > 0 && before.received_bytes > 0, "{before:?}");
        assert_eq!(before.endpoint, Some("192.168.7.2:51820".parse().unwrap()));

        let peer = device(&mut desired).peers.get_mut(&public_key(2)).unwrap();
        peer.allowed_ips.insert("10.42.77.0/26".parse().unwrap());
        peer.keepalive = 25;
        settle(linux, &desired);
        device(&mut desired).peers.get_mut(&public_key(2)).unwrap().allowed_ips = prefixes(["10.42.2.0/26"]);
        settle(linux, &desired);
        deliver(&own, &far_socket, "10.42.2.1:7000".parse().unwrap());
        let after = state(linux).status[&public_key(2)];
        assert_eq!(after.last_handshake, before.last_handshake, "the same session");
        assert!(after.sent_bytes > before.sent_bytes, "{after:?}");
    });
}

/// `Wireguard` by itself, as the daemon asks whether the kernel has it: the answer holds for the whole machine.
#[test]
fn support_is_the_same_in_every_namespace() {
    let ask = || Wireguard::open(Path::new("/nonexistent")).unwrap().kernel_support().is_ok();
    let (first, second) = (Netns::new_unnamed().unwrap(), Netns::new_unnamed().unwrap());
    assert_eq!(first.run_in(ask).unwrap(), second.run_in(ask).unwrap());
}
