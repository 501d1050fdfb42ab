//! Pure tests of what has to change.

use husk_overlay::esp::{Aead, Association, EspEnd};
use husk_overlay::kernel::{XfrmAction, XfrmDirection, XfrmParameters};
use husk_overlay::keys::PrivateKey;
use husk_overlay::mtu::EspMode;
use husk_overlay::name::NodeName;

use super::*;

fn key(spi: u32) -> XfrmStateKey {
    XfrmStateKey { destination: "192.0.2.2".parse().unwrap(), spi }
}

fn state() -> XfrmState {
    let end = |node: &str, address: &str| EspEnd {
        node: NodeName::new(node).unwrap(),
        epoch: 1,
        address: address.parse().unwrap(),
        public_key: PrivateKey::from_random([1; 32]).unwrap().public(),
    };
    let parameters = XfrmParameters {
        source: "192.0.2.1".parse().unwrap(),
        mode: EspMode::Tunnel,
        if_id: 7,
        cipher: Aead::AesGcm128,
        replay_window: 64,
        udp: None,
    };
    let association =
        Association { sender: end("a", "192.0.2.1"), receiver: end("b", "192.0.2.2"), cipher: Aead::AesGcm128 };
    XfrmState { parameters, association, fresh: true }
}

fn found(parameters: Option<XfrmParameters>) -> ActualXfrmState {
    ActualXfrmState { parameters, source: "192.0.2.1".parse().unwrap(), packets: 9, bytes: 900, undecryptable: 0 }
}

#[test]
fn what_is_missing_is_added_and_what_is_unwanted_goes_if_sweeping_is_allowed() {
    let desired = BTreeMap::from([(key(256), state()), (key(257), state())]);
    let good = found(Some(state().parameters));
    let actual = BTreeMap::from([(key(257), good.clone()), (key(258), good)]);
    let add = XfrmStateChange::Add { key: key(256), state: Box::new(state()) };
    let remove = XfrmStateChange::Remove { key: key(258) };
    assert_eq!(diff_states(&desired, &actual, Sweep::Allowed), [add.clone(), remove]);
    assert_eq!(diff_states(&desired, &actual, Sweep::Withheld), [add]);
}

#[test]
fn what_was_there_when_the_plan_was_made_and_has_vanished_is_not_made_anew() {
    let desired = BTreeMap::from([(key(256), XfrmState { fresh: false, ..state() })]);
    assert_eq!(diff_states(&desired, &BTreeMap::new(), Sweep::Allowed), []);
    let actual = BTreeMap::from([(key(256), found(Some(state().parameters)))]);
    assert_eq!(diff_states(&desired, &actual, Sweep::Allowed), []);
}

#[test]
fn an_association_that_differs_goes_and_is_not_made_anew_under_its_key() {
    let desired = BTreeMap::from([(key(256), state())]);
    let wider = XfrmParameters { replay_window: 128, ..state().parameters };
    for parameters in [None, Some(wider)] {
        let actual = BTreeMap::from([(key(256), found(parameters))]);
        let changes = diff_states(&desired, &actual, Sweep::Allowed);
        assert_eq!(changes, [XfrmStateChange::Remove { key: key(256) }]);
        assert_eq!(diff_states(&desired, &actual, Sweep::Withheld), []);
    }
}

#[test]
fn a_policy_that_differs_is_replaced_in_one_step() {
    let key = |destination: &str| XfrmPolicyKey {
        direction: XfrmDirection::Out,
        source: "0.0.0.0/0".parse().unwrap(),
        destination: destination.parse().unwrap(),
        udp_port: None,
        if_id: 7,
    };
    let policy = |priority| XfrmPolicy { priority, action: XfrmAction::Block };
    let desired = BTreeMap::from([
        (key("10.0.0.0/24"), policy(1)),
        (key("10.0.1.0/24"), policy(1)),
        (key("10.0.2.0/24"), policy(1)),
        (key("10.0.3.0/24"), policy(1)),
    ]);
    let actual = BTreeMap::from([
        (key("10.0.1.0/24"), Some(policy(2))),
        (key("10.0.2.0/24"), None),
        (key("10.0.3.0/24"), Some(policy(1))),
        (key("10.0.4.0/24"), Some(policy(1))),
    ]);
    let set = [
        XfrmPolicyChange::Add { key: key("10.0.0.0/24"), policy: policy(1) },
        XfrmPolicyChange::Replace { key: key("10.0.1.0/24"), policy: policy(1) },
        XfrmPolicyChange::Replace { key: key("10.0.2.0/24"), policy: policy(1) },
    ];
    assert_eq!(diff_policies(&desired, &actual, Sweep::Withheld), set);
    let all: Vec<_> = set.into_iter().chain([XfrmPolicyChange::Remove { key: key("10.0.4.0/24") }]).collect();
    assert_eq!(diff_policies(&desired, &actual, Sweep::Allowed), all);
}
