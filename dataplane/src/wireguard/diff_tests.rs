use proptest::prelude::*;

use super::*;

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number + 1; 32]).unwrap()
}

fn interface() -> InterfaceName {
    InterfaceName::new("husk-wg0").unwrap()
}

fn prefix(number: u8) -> Prefix {
    format!("10.42.{number}.0/24").parse().unwrap()
}

fn peer(prefixes: &[u8]) -> WireguardPeer {
    WireguardPeer {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 1], 51820))),
        allowed_ips: prefixes.iter().map(|number| prefix(*number)).collect(),
        keepalive: 0,
    }
}

fn device(peers: &[(u8, &[u8])]) -> WireguardDevice {
    WireguardDevice {
        userspace: false,
        public_key: key(200),
        listen_port: 51820,
        peers: peers.iter().map(|(number, prefixes)| (key(*number), peer(prefixes))).collect(),
    }
}

fn state(device: &WireguardDevice) -> WireguardState {
    let mut state = WireguardState::default();
    diff(&interface(), device, None).iter().for_each(|change| change.action.apply_to(&mut state));
    assert_eq!(state.device(false).as_ref(), Some(device));
    state
}

fn words(desired: &WireguardDevice, actual: &WireguardState) -> Vec<String> {
    diff(&interface(), desired, Some(actual)).iter().map(ToString::to_string).collect()
}

#[test]
fn one_more_peer_among_a_thousand_is_one_change() {
    let many: BTreeMap<_, _> = (0_u32..1000)
        .map(|number| {
            let mut bytes = [7; 32];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            let block = Prefix::containing((0x0a00_0000 + (number << 8)).to_be_bytes().into(), 24).unwrap();
            let peer = WireguardPeer { allowed_ips: [block].into(), ..peer(&[]) };
            (PublicKey::from_bytes(bytes).unwrap(), peer)
        })
        .collect();
    let mut desired = WireguardDevice { peers: many, ..device(&[]) };
    let actual = state(&desired);
    assert_eq!(words(&desired, &actual), Vec::<String>::new());
    desired.peers.insert(key(1), peer(&[250]));
    assert_eq!(
        words(&desired, &actual),
        [
            "wireguard device husk-wg0: add peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= at 192.0.2.1:51820 for 10.42.250.0/24"
        ]
    );
}

#[test]
fn only_what_differs_is_set() {
    let desired = device(&[(1, &[1, 2]), (2, &[3])]);
    let mut actual = state(&desired);
    actual.listen_port = 1;
    actual.firewall_mark = 7;
    actual.preshared.insert(key(2));
    let roamed = actual.peers.get_mut(&key(1)).unwrap();
    roamed.endpoint = Some(SocketAddr::from(([198, 51, 100, 1], 1024)));
    roamed.keepalive = 25;
    roamed.allowed_ips = [prefix(1), prefix(9)].into();
    let one = key(1);
    let two = key(2);
    assert_eq!(
        words(&desired, &actual),
        [
            "wireguard device husk-wg0: listen on UDP port 51820".to_owned(),
            "wireguard device husk-wg0: clear the firewall mark".to_owned(),
            format!("wireguard device husk-wg0: peer {two}: remove a preshared key"),
            format!(
                "wireguard device husk-wg0: peer {one}: send to 192.0.2.1:51820; no keepalive; allow 10.42.2.0/24; \
                 no longer allow 10.42.9.0/24"
            ),
        ]
    );
}

#[test]
fn a_peer_that_roams_is_followed_while_it_has_a_session_and_looked_for_afterwards() {
    let desired = device(&[(1, &[1])]);
    let elsewhere = SocketAddr::from(([198, 51, 100, 1], 1024));
    let handshake = Duration::from_secs(1_700_000_000);
    let brought_back = |last_handshake, read_at| {
        let mut actual = WireguardState { read_at, ..state(&desired) };
        actual.peers.get_mut(&key(1)).unwrap().endpoint = Some(elsewhere);
        actual.status.get_mut(&key(1)).unwrap().last_handshake = last_handshake;
        let changes = diff(&interface(), &desired, Some(&actual));
        let back = set_endpoint(&interface(), false, key(1), SocketAddr::from(([192, 0, 2, 1], 51820)));
        assert!(changes.is_empty() || changes == [back], "{changes:?}");
        !changes.is_empty()
    };
    let seconds = Duration::from_secs;
    assert!(!brought_back(Some(handshake), handshake));
    assert!(!brought_back(Some(handshake), handshake + seconds(179)));
    assert!(brought_back(Some(handshake), handshake + seconds(180)));
    assert!(brought_back(None, handshake));
    assert!(!brought_back(Some(handshake), handshake - seconds(2)), "clocks are set by a little all the time");
    assert!(brought_back(Some(handshake), handshake - seconds(3600)), "the age is unknown");
}

#[test]
fn a_session_protects_nothing_but_the_endpoint() {
    let desired = device(&[(1, &[1])]);
    let mut actual = state(&device(&[(1, &[])]));
    actual.read_at = Duration::from_secs(1_700_000_000);
    actual.status.get_mut(&key(1)).unwrap().last_handshake = Some(actual.read_at);
    actual.peers.get_mut(&key(1)).unwrap().endpoint = Some(SocketAddr::from(([198, 51, 100, 1], 1024)));
    let one = key(1);
    assert_eq!(words(&desired, &actual), [format!("wireguard device husk-wg0: peer {one}: allow 10.42.1.0/24")]);
}

#[test]
fn a_prefix_that_moves_is_given_before_its_old_owner_goes_or_is_told() {
    let actual = state(&device(&[(1, &[1, 2]), (2, &[3]), (3, &[4])]));
    let desired = device(&[(1, &[1]), (2, &[2, 3]), (4, &[4])]);
    let actions: Vec<_> = diff(&interface(), &desired, Some(&actual)).into_iter().map(|change| change.action).collect();
    let moves = |update: &PeerUpdate| update.allowed_ips.as_ref().unwrap().moved.contains(&prefix(2));
    assert!(
        matches!(
            actions.as_slice(),
            [
                WireguardAction::UpdatePeer { public_key: gains, .. },
                WireguardAction::AddPeer { .. },
                WireguardAction::UpdatePeer { public_key: loses, update },
                WireguardAction::RemovePeer { .. },
            ] if *gains == key(2) && *loses == key(1) && moves(update)
        ),
        "{actions:?}"
    );
}

fn any_device() -> impl Strategy<Value = WireguardDevice> {
    // Every prefix has at most one owner, as the plan guarantees.
    (prop::collection::btree_set(0_u8..5, 0..5), prop::collection::vec(0_u8..6, 8), any::<bool>()).prop_map(
        |(peers, owners, keepalive)| {
            let mut desired = device(&peers.iter().map(|number| (*number, [].as_slice())).collect::<Vec<_>>());
            for (number, owner) in (0..).zip(owners) {
                if let Some(peer) = desired.peers.get_mut(&key(owner)) {
                    peer.allowed_ips.insert(prefix(number));
                    peer.keepalive = if keepalive { 25 } else { 0 };
                }
            }
            desired
        },
    )
}

proptest! {
    #[test]
    fn changes_lead_to_the_desired_state_and_nobody_misses_a_prefix_meanwhile(from in any_device(), to in any_device()) {
        let before = state(&from);
        let mut now = before.clone();
        for change in diff(&interface(), &to, Some(&before)) {
            change.action.apply_to(&mut now);
            for (key, desired) in &to.peers {
                let kept = before.peers.get(key).map(|peer| peer.allowed_ips.intersection(&desired.allowed_ips));
                for prefix in kept.into_iter().flatten() {
                    prop_assert!(now.peers[key].allowed_ips.contains(prefix));
                }
            }
            for prefix in from.peers.values().flat_map(|peer| &peer.allowed_ips) {
                if to.peers.values().any(|peer| peer.allowed_ips.contains(prefix)) {
                    let owners = now.peers.values().filter(|peer| peer.allowed_ips.contains(prefix)).count();
                    prop_assert_eq!(owners, 1, "{} without an owner", prefix);
                }
            }
        }
        prop_assert_eq!(now.device(false), Some(to.clone()));
        prop_assert_eq!(diff(&interface(), &to, Some(&now)), vec![]);
    }
}
