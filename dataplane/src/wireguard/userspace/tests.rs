use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use husk_overlay::kernel::{WireguardDevice, WireguardPeer};
use husk_overlay::keys::PrivateKey;
use proptest::prelude::*;

use super::super::{AllowedIpsUpdate, WireguardChange, WireguardPeerStatus, diff};
use nix::sys::socket::bind;

use super::*;
use crate::netns::Netns;

fn private_key_of(number: u8) -> PrivateKey {
    PrivateKey::from_random([number + 1; 32]).unwrap()
}

fn key(number: u8) -> PublicKey {
    private_key_of(number).public()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn peer(prefixes: &[&str]) -> WireguardPeer {
    WireguardPeer {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 1], 51820))),
        allowed_ips: prefixes.iter().map(|text| prefix(text)).collect(),
        keepalive: 0,
    }
}

fn interface() -> InterfaceName {
    InterfaceName::new("husk-wg0").unwrap()
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("husk-uapi-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn text_of(actions: &[WireguardAction], removal: Removal) -> String {
    let keys: KeyRing = (0..4).map(private_key_of).collect();
    let actions: Vec<_> = actions.iter().collect();
    request(&actions, removal, &interface(), &keys).unwrap().to_string()
}

fn hex(key: &PublicKey) -> String {
    Hex(key.as_bytes()).to_string()
}

#[test]
fn requests_are_those_of_the_protocol() {
    let update = PeerUpdate {
        clear_preshared_key: true,
        keepalive: Some(25),
        allowed_ips: Some(AllowedIpsUpdate {
            add: [prefix("10.1.0.0/24")].into(),
            remove: [prefix("10.2.0.0/24")].into(),
            moved: [prefix("10.3.0.0/24")].into(),
            result: [prefix("10.0.0.0/24"), prefix("10.1.0.0/24")].into(),
        }),
        ..PeerUpdate::default()
    };
    let actions = [
        WireguardAction::SetListenPort { listen_port: 51820 },
        WireguardAction::SetPrivateKey { public_key: key(0) },
        WireguardAction::ClearFirewallMark,
        WireguardAction::AddPeer { public_key: key(1), peer: peer(&["10.9.0.0/24", "fd42::/64"]) },
        WireguardAction::UpdatePeer { public_key: key(2), update },
        WireguardAction::RemovePeer { public_key: key(3) },
    ];
    let before = format!(
        "set=1\nprivate_key={}\nlisten_port=51820\nfwmark=\n\
         public_key={}\nendpoint=192.0.2.1:51820\npersistent_keepalive_interval=0\n\
         allowed_ip=10.9.0.0/24\nallowed_ip=fd42::/64\n\
         public_key={}\nupdate_only=true\npreshared_key={}\npersistent_keepalive_interval=25\n",
        Hex(private_key_of(0).expose()),
        hex(&key(1)),
        hex(&key(2)),
        "0".repeat(64),
    );
    let after = format!("public_key={}\nremove=true\n\n", hex(&key(3)));
    let single = "allowed_ip=10.1.0.0/24\nallowed_ip=-10.2.0.0/24\n";
    assert_eq!(text_of(&actions, Removal::Single), format!("{before}{single}{after}"));
    let replace = "replace_allowed_ips=true\nallowed_ip=10.0.0.0/24\nallowed_ip=10.1.0.0/24\n";
    assert_eq!(text_of(&actions, Removal::Replace), format!("{before}{replace}{after}"));
}

#[test]
fn an_answer_is_read_and_never_quoted() {
    let secret = "7".repeat(64);
    let text = format!(
        "private_key={secret}\nlisten_port=7\nfwmark=0x10\npublic_key={}\npreshared_key={secret}\nendpoint=[fe80::1%eth0]:1\n\
         last_handshake_time_sec=3\nlast_handshake_time_nsec=4\nrx_bytes=5\ntx_bytes=6\nprotocol_version=1\nnew_key=1\n\
         persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/8\nerrno=0\n\n",
        hex(&key(1))
    );
    let (state, errno) = decode::answer(text.as_bytes()).unwrap();
    assert_eq!((errno, state.listen_port, state.firewall_mark), (0, 7, 16));
    assert_eq!(state.public_key, Some(PrivateKey::from_random([0x77; 32]).unwrap().public()));
    assert_eq!(state.preshared, [key(1)].into());
    let expected = WireguardPeerStatus {
        last_handshake: Some(Duration::new(3, 4)),
        received_bytes: 5,
        sent_bytes: 6,
        endpoint: None,
    };
    assert_eq!(state.status[&key(1)], expected);
    for broken in ["private_key=7777\n", "no equals sign 7777\n", "listen_port=7777777\n", "allowed_ip=7777\n", ""] {
        let whole = format!("public_key={}\n{broken}\n", hex(&key(1)));
        let reason = decode::answer(whole.as_bytes()).unwrap_err();
        assert!(!reason.contains("7777"), "{reason}");
    }
}

/// An answer as a process would give it for a state.
fn render(private: &PrivateKey, state: &WireguardState) -> String {
    let mut text = format!("private_key={}\nlisten_port={}\n", Hex(private.expose()), state.listen_port);
    if state.firewall_mark != 0 {
        line(&mut text, "fwmark", state.firewall_mark);
    }
    for (key, peer) in &state.peers {
        line(&mut text, "public_key", hex(key));
        if let Some(endpoint) = peer.endpoint {
            line(&mut text, "endpoint", endpoint);
        }
        line(&mut text, "persistent_keepalive_interval", peer.keepalive);
        allowed_ips(&mut text, &peer.allowed_ips);
        let status = &state.status[key];
        let handshake = status.last_handshake.unwrap_or_default();
        line(&mut text, "last_handshake_time_sec", handshake.as_secs());
        line(&mut text, "last_handshake_time_nsec", handshake.subsec_nanos());
        line(&mut text, "rx_bytes", status.received_bytes);
        line(&mut text, "tx_bytes", status.sent_bytes);
    }
    text + "errno=0\n\n"
}

fn any_peer() -> impl Strategy<Value = (WireguardPeer, WireguardPeerStatus)> {
    let prefixes = prop::collection::btree_set(
        (any::<[u8; 4]>(), 0_u8..=32).prop_map(|(address, length)| Prefix::containing(address.into(), length).unwrap()),
        0..4,
    );
    let endpoint = prop::option::of((any::<std::net::IpAddr>(), any::<u16>()).prop_map(SocketAddr::from));
    let handshake = prop::option::of((1_u64..1 << 40, 0_u32..1_000_000_000));
    (endpoint, prefixes, any::<u16>(), handshake, any::<(u64, u64)>()).prop_map(
        |(endpoint, allowed_ips, keepalive, handshake, (received_bytes, sent_bytes))| {
            let last_handshake = handshake.map(|(seconds, nanoseconds)| Duration::new(seconds, nanoseconds));
            let status = WireguardPeerStatus { last_handshake, received_bytes, sent_bytes, endpoint };
            (WireguardPeer { endpoint, allowed_ips, keepalive }, status)
        },
    )
}

proptest! {
    #[test]
    fn answers_round_trip(
        listen_port: u16,
        firewall_mark: u32,
        peers in prop::collection::btree_map(any::<[u8; 32]>().prop_filter_map("zero", |it| PublicKey::from_bytes(it).ok()), any_peer(), 0..5),
    ) {
        let private = private_key_of(1);
        let (configured, status): (BTreeMap<_, _>, BTreeMap<_, _>) =
            peers.into_iter().map(|(key, (peer, status))| ((key, peer), (key, status))).unzip();
        let state = WireguardState {
            public_key: Some(private.public()), listen_port, firewall_mark, peers: configured, status,
            ..WireguardState::default()
        };
        prop_assert_eq!(decode::answer(render(&private, &state).as_bytes()), Ok((state, 0)));
    }

    #[test]
    fn garbage_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(decode::answer(&bytes));
    }

    #[test]
    fn nearly_right_answers_do_not_panic(lines in prop::collection::vec(
        (prop::sample::select(vec!["errno", "public_key", "private_key", "endpoint", "allowed_ip", "fwmark", "rx_bytes",
            "last_handshake_time_sec", "last_handshake_time_nsec", "preshared_key", "listen_port"]),
         prop_oneof!["[0-9a-f]{64}", "[0-9.:/-]{0,20}", "\\PC{0,64}", Just("é".repeat(32)), Just("18446744073709551615".to_owned())]), 0..12)) {
        let text: String = lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        drop(decode::answer(text.as_bytes()));
    }
}

#[test]
fn no_socket_and_a_dead_one_are_no_device() {
    let folder = Folder::new();
    let devices = UserspaceDevices::new(&folder.0);
    let action = WireguardAction::RemovePeer { public_key: key(1) };
    let is_absent = || {
        assert_eq!(devices.read(&interface()).unwrap(), None);
        let results = devices.apply(&interface(), &[&action], &KeyRing::default());
        assert!(matches!(results.as_slice(), [Err(Error::WaitingForUserspaceDevice { .. })]), "{results:?}");
    };
    is_absent();
    // Nobody ever listens on it: a listener that is closed here would live on for a moment in what another test just forked.
    let dead = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(dead.as_raw_fd(), &UnixAddr::new(&devices.path(&interface())).unwrap()).unwrap();
    is_absent();
}

#[test]
fn a_refused_request_is_sent_again_change_by_change() {
    let folder = Folder::new();
    let devices = UserspaceDevices::new(&folder.0);
    let listener = UnixListener::bind(devices.path(&interface())).unwrap();
    let refused = hex(&key(2));
    let process = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for _ in 0..4 {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = io::BufReader::new(stream);
            let mut request = String::new();
            while !request.ends_with("\n\n") {
                assert!(reader.read_line(&mut request).unwrap() > 0);
            }
            let errno = if request.contains(&refused) { 22 } else { 0 };
            reader.get_mut().write_all(format!("errno={errno}\n\n").as_bytes()).unwrap();
            requests.push(request);
        }
        requests
    });
    let remove = |number| WireguardAction::RemovePeer { public_key: key(number) };
    let actions = [remove(1), remove(2), remove(3)];
    let results = devices.apply(&interface(), &actions.iter().collect::<Vec<_>>(), &KeyRing::default());
    assert!(results[0].is_ok() && results[2].is_ok());
    let error = results[1].as_ref().unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EINVAL));
    assert!(error.to_string().contains(&key(2).to_string()), "{error}");
    let requests = process.join().unwrap();
    assert_eq!(requests[1], format!("set=1\npublic_key={}\nremove=true\n\n", hex(&key(1))));
}

/// A userspace WireGuard process in a namespace of its own; it goes with the value.
struct Process {
    child: Child,
    interface: InterfaceName,
    namespace: Netns,
}

impl Process {
    /// Debian's wireguard-go, which puts its socket into the usual folder.
    fn start(name: &str) -> Self {
        let interface = InterfaceName::new(name).unwrap();
        let namespace = Netns::new_unnamed().unwrap();
        let child = namespace
            .run_in(|| {
                Command::new("wireguard-go")
                    .args(["--foreground", name])
                    .env("WG_PROCESS_FOREGROUND", "1")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("wireguard-go is installed (package wireguard-go)")
            })
            .unwrap();
        let process = Self { child, interface, namespace };
        let deadline = Instant::now() + Duration::from_secs(10);
        while process.devices().read(&process.interface).unwrap().is_none() {
            assert!(Instant::now() < deadline, "wireguard-go did not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        process
    }

    fn devices(&self) -> UserspaceDevices {
        UserspaceDevices::new(Path::new(husk_overlay::marks::WIREGUARD_SOCKET_DIRECTORY))
    }

    fn converge(&self, desired: &WireguardDevice, keys: &KeyRing) -> Vec<WireguardChange> {
        let devices = self.devices();
        let before = devices.read(&self.interface).unwrap();
        let changes = diff(&self.interface, desired, before.as_ref());
        let actions: Vec<_> = changes.iter().map(|change| &change.action).collect();
        for result in devices.apply(&self.interface, &actions, keys) {
            result.unwrap();
        }
        let after = devices.read(&self.interface).unwrap().unwrap();
        assert_eq!(after.device(true).as_ref(), Some(desired));
        assert_eq!(diff(&self.interface, desired, Some(&after)), []);
        changes
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_file(self.devices().path(&self.interface)));
        // The namespace, with the device in it, goes when its last file is closed.
        let _ = &self.namespace;
    }
}

#[test]
fn a_foreign_process_is_configured_like_ours() {
    let process = Process::start(&format!("hk{}", std::process::id()));
    let keys: KeyRing = (0..2).map(private_key_of).collect();
    let mut desired = WireguardDevice {
        userspace: true,
        public_key: key(0),
        listen_port: 51820,
        peers: [
            (key(1), peer(&["10.1.0.0/24", "10.2.0.0/24", "fd42::/64"])),
            (key(2), peer(&["10.3.0.0/24"])),
            (key(3), peer(&[])),
        ]
        .into(),
    };
    assert_eq!(process.converge(&desired, &keys).len(), 5);
    // One prefix moves, one goes, one comes; endpoint and keepalive change; a peer goes.
    let one = desired.peers.get_mut(&key(1)).unwrap();
    one.allowed_ips = [prefix("10.1.0.0/24"), prefix("10.4.0.0/24")].into();
    one.keepalive = 25;
    one.endpoint = Some("[2001:db8::1]:4500".parse().unwrap());
    desired.peers.get_mut(&key(2)).unwrap().allowed_ips.insert(prefix("10.2.0.0/24"));
    desired.peers.remove(&key(3));
    assert_eq!(process.converge(&desired, &keys).len(), 3);
    // Another key and port.
    desired.public_key = key(1);
    desired.peers.remove(&key(1));
    desired.listen_port = 51821;
    process.converge(&desired, &keys);
    assert_eq!(process.converge(&desired, &keys), []);
}
