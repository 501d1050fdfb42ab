//! What the tests share: a kernel that has ESP, two nodes with keys, and what they should have of each other.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use husk_dataplane::Sweep;
use husk_dataplane::error::Error;
use husk_dataplane::kernel::{Actual, Change, Kernel as _, Table, diff_table};
use husk_dataplane::linux::Linux;
use husk_dataplane::netns::Netns;
use husk_dataplane::reconcile::{Outcome, reconcile};
use husk_dataplane::wireguard::KeyRing;
use husk_dataplane::xfrm::{self, Needs};
use husk_overlay::esp::{self, Aead, Association, EspEnd, PresharedKey};
use husk_overlay::kernel::{
    Desired, XfrmAction, XfrmDirection, XfrmParameters, XfrmPolicy, XfrmPolicyKey, XfrmState, XfrmStateKey,
    XfrmTemplate,
};
use husk_overlay::keys::PrivateKey;
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::{Family, Prefix};

/// Tables these tests are about; the others have tests of their own.
pub(crate) const TABLES: [Table; 3] = [Table::Links, Table::XfrmStates, Table::XfrmPolicies];

pub(crate) const VXLAN_PORT: u16 = 4789;

pub(crate) fn everything() -> Needs {
    Needs { families: Family::ALL.into(), cipher: Aead::AesGcm256, mode: EspMode::Tunnel, udp: true }
}

/// Runs a test in a namespace of a kernel that has ESP and the xfrm interface; elsewhere, checks what is said of that.
pub(crate) fn with_esp(body: impl FnOnce(&mut Linux) + Send) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    match xfrm::support(&everything()) {
        Ok(()) => in_a_namespace(body),
        Err(error) => absent(&test, &error),
    }
}

pub(crate) fn in_a_namespace(body: impl FnOnce(&mut Linux) + Send) {
    let namespace = Netns::new_unnamed().unwrap();
    let run = || {
        ip("link set lo up");
        body(&mut linux());
    };
    namespace.run_in(run).unwrap();
}

/// True where nothing may be missing.
pub(crate) fn is_full() -> bool {
    ["HUSK_TEST_KERNEL", "HUSK_TEST_KERNEL_WIREGUARD"].iter().any(|name| std::env::var_os(name).is_some())
}

fn absent(test: &str, error: &Error) {
    assert!(!is_full(), "the kernel should have everything, and yet: {error}");
    // Not by a macro, whose output the test harness keeps to itself when a test passes.
    let words = format!("{test}: NOT TESTED, only that its absence is reported: {error}\n");
    std::io::stderr().write_all(words.as_bytes()).unwrap();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    in_a_namespace(|linux| {
        let (a, b) = nodes(Family::Ipv4);
        let mut desired = Desired::default();
        tunnel(1).add(&mut desired, &a, &b);
        let outcome = reconcile(linux, &desired, &a.keys(), Sweep::Allowed);
        let told: Vec<_> = outcome.failures.iter().map(ToString::to_string).collect();
        assert!(told.iter().any(|text| text.starts_with("cannot add the association 0x")), "{told:?}");
    });
}

pub(crate) fn linux() -> Linux {
    Linux::open(Path::new("/nonexistent")).unwrap()
}

/// Runs `ip` in the namespace of the calling thread; its output.
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; iproute2, iputils and nftables are needed"));
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

/// A node.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) address: IpAddr,
}

impl Node {
    pub(crate) fn private(&self, epoch: u64) -> PrivateKey {
        let mut bytes = [self.number; 32];
        bytes[0] = u8::try_from(epoch).unwrap();
        PrivateKey::from_random(bytes).unwrap()
    }

    /// All that the node may know: its own private keys, not those of the other.
    pub(crate) fn keys(&self) -> KeyRing {
        let ring: KeyRing = (1..8).map(|epoch| self.private(epoch)).collect();
        ring.with_preshared(PresharedKey::new(b"the cluster's secret".to_vec()))
    }

    fn end(&self, epoch: u64) -> EspEnd {
        EspEnd {
            node: NodeName::new(&format!("node-{}", self.number)).unwrap(),
            epoch,
            address: self.address,
            public_key: self.private(epoch).public(),
        }
    }

    /// Pods' addresses.
    pub(crate) fn block(&self, family: Family) -> Prefix {
        match family {
            Family::Ipv4 => format!("10.42.{}.0/24", self.number).parse().unwrap(),
            Family::Ipv6 => format!("fd42:0:0:{}::/64", self.number).parse().unwrap(),
        }
    }

    /// Address of the host itself within the block.
    pub(crate) fn router(&self, family: Family) -> IpAddr {
        self.block(family).nth(1).unwrap()
    }
}

/// Two nodes whose underlay is of one family.
pub(crate) fn nodes(underlay: Family) -> (Node, Node) {
    let node = |number: u8| {
        let address = match underlay {
            Family::Ipv4 => IpAddr::from([192, 168, 7, number]),
            Family::Ipv6 => format!("2001:db8:7::{number}").parse().unwrap(),
        };
        Node { number, address }
    };
    (node(1), node(2))
}

/// How two nodes protect what they send each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Protection {
    pub(crate) mode: EspMode,
    pub(crate) cipher: Aead,
    pub(crate) udp: Option<(u16, u16)>,
    pub(crate) epoch: u64,
}

pub(crate) fn tunnel(epoch: u64) -> Protection {
    Protection { mode: EspMode::Tunnel, cipher: Aead::AesGcm128, udp: None, epoch }
}

pub(crate) fn transport(epoch: u64) -> Protection {
    Protection { mode: EspMode::Transport, ..tunnel(epoch) }
}

impl Protection {
    fn if_id(self) -> u32 {
        match self.mode {
            EspMode::Tunnel => marks::XFRM_IF_ID,
            EspMode::Transport => 0,
        }
    }

    pub(crate) fn state(self, from: &Node, to: &Node) -> (XfrmStateKey, XfrmState) {
        let association =
            Association { sender: from.end(self.epoch), receiver: to.end(self.epoch), cipher: self.cipher };
        let key = XfrmStateKey { destination: to.address, spi: esp::spi(&association, 0, 32) };
        let parameters = XfrmParameters {
            source: from.address,
            mode: self.mode,
            if_id: self.if_id(),
            cipher: self.cipher,
            replay_window: 1024,
            udp: self.udp,
        };
        (key, XfrmState { parameters, association, fresh: true })
    }

    fn template(self, from: &Node, to: &Node, spi: Option<u32>) -> XfrmPolicy {
        let template = XfrmTemplate { source: from.address, destination: to.address, mode: self.mode, spi };
        XfrmPolicy { priority: 100, action: XfrmAction::Protect(template) }
    }

    /// What `own` should have of `peer`.
    pub(crate) fn add(self, desired: &mut Desired, own: &Node, peer: &Node) {
        let (out, state) = self.state(own, peer);
        desired.xfrm_states.insert(out, state);
        desired.xfrm_states.extend([self.state(peer, own)]);
        self.add_policies(desired, own, peer, out.spi);
    }

    /// The policies alone; what is sent is protected by the association with the SPI.
    pub(crate) fn add_policies(self, desired: &mut Desired, own: &Node, peer: &Node, spi: u32) {
        let policies = &mut desired.xfrm_policies;
        let out = self.template(own, peer, Some(spi));
        let back = self.template(peer, own, None);
        let key = |direction, source, destination| XfrmPolicyKey {
            direction,
            source,
            destination,
            udp_port: (self.mode == EspMode::Transport).then_some(VXLAN_PORT),
            if_id: self.if_id(),
        };
        match self.mode {
            EspMode::Tunnel => {
                for family in Family::ALL {
                    let (any, block) = (Prefix::default_route(family), peer.block(family));
                    policies.insert(key(XfrmDirection::Out, any, block), out.clone());
                    policies.insert(key(XfrmDirection::In, block, any), back.clone());
                    policies.insert(key(XfrmDirection::Forward, block, any), back.clone());
                }
            }
            EspMode::Transport => {
                let (here, there) = (Prefix::host(own.address), Prefix::host(peer.address));
                let any = Prefix::default_route(here.family());
                policies.insert(key(XfrmDirection::Out, here, there), out);
                policies.insert(key(XfrmDirection::In, there, here), back);
                let block = XfrmPolicy { priority: marks::XFRM_BLOCK_PRIORITY, action: XfrmAction::Block };
                policies.insert(key(XfrmDirection::Out, any, any), block.clone());
                policies.insert(key(XfrmDirection::In, any, any), block);
            }
        }
    }
}

pub(crate) fn pass(linux: &mut Linux, desired: &Desired, keys: &KeyRing) -> Outcome {
    let outcome = reconcile(linux, desired, keys, Sweep::Allowed);
    assert!(outcome.is_clean(), "{:?}", outcome.failures);
    outcome
}

pub(crate) fn read(linux: &mut Linux, desired: &Desired) -> Actual {
    let mut actual = Actual::default();
    for table in TABLES {
        linux.read(table, desired, &mut actual).unwrap();
    }
    actual
}

pub(crate) fn differences(linux: &mut Linux, desired: &Desired) -> Vec<Change> {
    let actual = read(linux, desired);
    TABLES.into_iter().flat_map(|table| diff_table(table, desired, &actual, Sweep::Allowed)).collect()
}

/// Makes the kernel as desired, and checks that it then reads as desired.
pub(crate) fn settle(linux: &mut Linux, desired: &Desired, keys: &KeyRing) -> Outcome {
    let outcome = pass(linux, desired, keys);
    let actual = read(linux, desired);
    let states: BTreeMap<_, _> =
        actual.xfrm_states.iter().map(|(key, found)| (*key, found.parameters.clone().unwrap())).collect();
    let wanted = desired.xfrm_states.iter().map(|(key, state)| (*key, state.parameters.clone())).collect();
    assert_eq!(states, wanted);
    let policies: BTreeMap<_, _> =
        actual.xfrm_policies.iter().map(|(key, found)| (*key, found.clone().unwrap())).collect();
    assert_eq!(policies, desired.xfrm_policies);
    assert_eq!(differences(linux, desired), []);
    outcome
}
