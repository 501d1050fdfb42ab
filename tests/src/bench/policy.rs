//! What policy costs: to make and to load a large table, to change a little of it, and per packet.
//!
//! The cluster is made up, the kernel is real: a network namespace forwards between two others, as a node does between two pods,
//! with the table that Husk makes for such a node. Per packet the table of one policy competes with that of ten thousand, and
//! with none, in turns within one run; what counts are the ratios.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_dataplane::policy::{Live, diff};
use husk_overlay::endpoint::{AttachmentId, Endpoint, Endpoints, NetnsIdentity};
use husk_overlay::kernel::policy::{PolicyElement, PolicyTable, PolicyValueKind};
use husk_overlay::name::{ContainerId, InterfaceName, NetworkName};
use husk_overlay::prefix::Family;
use husk_policy::cluster::{Cluster, Membership, Quarantine};
use husk_policy::compile::compile;
use husk_policy::object::{
    NamespaceChoice, NetworkPolicy, ObjectName, Objects, Peer, Pod, PolicyRule, PortMatch, Protocol,
};
use husk_policy::selector::{LabelSelector, Operator, Requirement};
use serde_json::{Value, json};

use super::report::table;
use crate::netns::Netns;
use crate::scope::Scope;

/// What is to be measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Pods of the cluster.
    pub pods: usize,
    /// Policies of the cluster.
    pub policies: usize,
    /// Pods of the node.
    pub local: usize,
    /// Rounds per packet; in each, every table is met.
    pub rounds: usize,
    /// Packets of a round.
    pub packets: usize,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    plan: Plan,
    /// Ranges of addresses in the sets of peers, and addresses in them.
    ranges: usize,
    peers: usize,
    /// From objects to the table.
    compile: Duration,
    /// From nothing to the table in the kernel, and octets of netlink.
    load: (Duration, usize),
    /// Reading all of it back, as after somebody else's change.
    read: Duration,
    /// One label of one pod: making the table, changing the kernel, octets.
    label: (Duration, Duration, usize),
    /// One more pod on the node.
    pod: (Duration, Duration, usize),
    /// One more policy.
    policy: (Duration, Duration, usize),
    /// Memory in KiB that the objects and the table take of this process.
    memory: u64,
    /// Nanoseconds per packet, by what it meets: the medians of the rounds.
    packets: Vec<(String, u64)>,
}

/// Pods with this label are meant by one policy in ten of their namespace.
const KINDS: usize = 10;

/// Namespaces of the cluster.
const NAMESPACES: usize = 100;

fn labelled(key: &str, value: String) -> LabelSelector {
    let requirement = Requirement { key: key.to_owned(), operator: Operator::In(BTreeSet::from([value])) };
    LabelSelector { requirements: BTreeSet::from([requirement]) }
}

fn address(number: usize) -> IpAddr {
    // Every other address, so that no two of them make a range.
    Ipv4Addr::from_bits(0x0a2a_0000 + 2 * u32::try_from(number).unwrap_or(u32::MAX)).into()
}

fn name(number: usize) -> ObjectName {
    ObjectName::new(&format!("ns{}", number % NAMESPACES), &format!("pod{number}"))
}

/// A cluster in which every pod of the node is selected by some policies, each of which means a tenth of all pods.
fn objects(plan: &Plan) -> Objects {
    let mut objects = Objects::default();
    for number in 0..NAMESPACES {
        let labels = [("stage".to_owned(), format!("s{}", number % KINDS))].into();
        objects.namespaces.insert(format!("ns{number}"), labels);
    }
    for number in 0..plan.pods {
        let kind = number / NAMESPACES % KINDS;
        let pod = Pod {
            labels: [("kind".to_owned(), format!("k{kind}"))].into(),
            addresses: BTreeSet::from([address(number)]),
            ..Pod::default()
        };
        objects.pods.insert(name(number), Arc::new(pod));
    }
    for number in 0..plan.policies {
        let (policy_name, policy) = policy(number);
        objects.network_policies.insert(policy_name, Arc::new(policy));
    }
    objects
}

/// The pods of a kind in a namespace may be talked to by those of a kind in all of them, at a port.
fn policy(number: usize) -> (ObjectName, NetworkPolicy) {
    let kind = number / NAMESPACES % KINDS;
    let peer = Peer::Pods {
        namespaces: NamespaceChoice::Selected(LabelSelector::default()),
        pods: labelled("kind", format!("k{}", (kind + number) % KINDS)),
    };
    let port = u16::try_from(1000 + number % 50_000).unwrap_or(u16::MAX);
    let rule = PolicyRule { peers: Some(vec![peer]), ports: Some(vec![PortMatch::Range(Protocol::Tcp, port, port)]) };
    let policy =
        NetworkPolicy { selector: labelled("kind", format!("k{kind}")), ingress: Some(vec![rule]), egress: None };
    (ObjectName::new(&format!("ns{}", number % NAMESPACES), &format!("policy{number}")), policy)
}

fn endpoint(pod: &ObjectName, address: IpAddr) -> Endpoint {
    let id = AttachmentId {
        network: NetworkName::new("husk").expect("letters"),
        container_id: ContainerId::new(pod.name.as_str()).expect("letters and digits"),
        ifname: InterfaceName::new("eth0").expect("letters and digits"),
    };
    Endpoint {
        addresses: [address].into_iter().collect(),
        pod_mac: id.pod_mac(),
        host_interface: id.host_interface(),
        netns: NetnsIdentity { path: String::new(), device: 0, inode: 0 },
        pod_namespace: Some(pod.namespace.clone()),
        pod_name: Some(pod.name.clone()),
        pod_uid: None,
        port_mappings: Vec::new(),
        bandwidth: None,
        id,
    }
}

fn endpoints(numbers: impl Iterator<Item = usize>) -> Endpoints {
    numbers.map(|number| endpoint(&name(number), address(number))).map(|it| (it.id.clone(), it)).collect()
}

fn families() -> BTreeSet<Family> {
    BTreeSet::from([Family::Ipv4])
}

fn made(objects: &Arc<Objects>, endpoints: &Endpoints) -> (Arc<PolicyTable>, Duration) {
    let started = Instant::now();
    let asked = Quarantine::default();
    let cluster = Cluster::new(Arc::clone(objects), endpoints, Membership::Objects, &asked);
    let table = Arc::new(compile(&cluster, &families()));
    (table, started.elapsed())
}

/// Brings a table into the kernel; how long that took, and octets of netlink.
fn program(live: &mut Live, table: &PolicyTable) -> Result<(Duration, usize)> {
    let started = Instant::now();
    let actual = live.read()?;
    let changes = diff(Some(table), actual.as_deref());
    let applied = live.apply(&changes, Some(table))?;
    ensure!(!applied.replaced, "the kernel did not take the changes one by one");
    Ok((started.elapsed(), applied.bytes))
}

/// Memory of this process in KiB.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Measures; `progress` is told what goes on.
///
/// # Errors
/// When a namespace cannot be made, or the kernel does not take what it should.
pub fn run(plan: &Plan, progress: impl Fn(&str) + Sync) -> Result<Report> {
    let scope = Scope::new()?;
    let before = resident()?;
    progress("making up a cluster");
    let mut objects = Arc::new(objects(plan));
    let own = endpoints(0..plan.local);
    let (mut all, compiled) = made(&objects, &own);
    let memory = resident()?.saturating_sub(before);
    let ranges = ranges(&all);
    let node = Netns::create(&scope.name("node"))?;
    progress("loading its policy");
    let changed = node.run(|| -> Result<_> {
        let mut live = Live::default();
        let load = program(&mut live, &all)?;
        let started = Instant::now();
        Live::default().read()?;
        let read = started.elapsed();
        let mut change = |objects: &Arc<Objects>, own: &Endpoints| -> Result<_> {
            let (table, compiled) = made(objects, own);
            let (took, bytes) = program(&mut live, &table)?;
            all = table;
            Ok((compiled, took, bytes))
        };
        progress("changing a little of it");
        let changed = Arc::make_mut(&mut objects);
        let labels = [("kind".to_owned(), "k9".to_owned())].into();
        let addresses = BTreeSet::from([address(plan.pods - 100 * KINDS)]);
        changed.pods.insert(name(plan.pods - 100 * KINDS), Arc::new(Pod { labels, addresses, ..Pod::default() }));
        let label = change(&objects, &own)?;
        let own = endpoints((0..plan.local).chain([plan.pods - 1]));
        let pod = change(&objects, &own)?;
        let (added, policy) = policy(plan.policies);
        Arc::make_mut(&mut objects).network_policies.insert(added, Arc::new(policy));
        let policy = change(&objects, &own)?;
        Ok((load, read, label, pod, policy))
    })??;
    let (load, read, label, pod, policy) = changed;
    let packets = per_packet(plan, &scope, &progress)?;
    let (ranges, peers) = ranges;
    Ok(Report { plan: *plan, ranges, peers, compile: compiled, load, read, label, pod, policy, memory, packets })
}

/// Ranges in the sets of peers, and the pods' addresses they stand for.
fn ranges(table: &PolicyTable) -> (usize, usize) {
    let sets = table.sets.values().filter(|set| set.value == PolicyValueKind::Class);
    let elements = || sets.clone().flat_map(|set| set.elements.keys());
    let addresses = elements().map(|element| match element {
        PolicyElement::AddressRange(IpAddr::V4(first), IpAddr::V4(last)) => last.to_bits() - first.to_bits() + 1,
        _ => 0,
    });
    (elements().count(), addresses.map(|count| usize::try_from(count).unwrap_or(usize::MAX)).sum())
}

/// Two pods with a node between them.
struct Path {
    node: Netns,
    sender: UdpSocket,
    receiver: UdpSocket,
    _pods: [Netns; 2],
}

const PORT: u16 = 1000;

impl Path {
    fn make(scope: &Scope) -> Result<Self> {
        let node = Netns::create(&scope.name("forwards"))?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        let pods = [Netns::create(&scope.name("one"))?, Netns::create(&scope.name("two"))?];
        for (number, pod) in pods.iter().enumerate() {
            // Names as those of pods, since the rules go by them.
            let host = format!("husk0000000000{number}");
            let own = address(number);
            node.ip_batch(&format!(
                "link add {host} type veth peer name eth0 netns {}\nlink set {host} up",
                pod.name()
            ))?;
            pod.ip_batch(&format!("addr add {own}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1"))?;
            node.ip_batch(&format!("addr add 169.254.1.1/32 dev {host}\nroute add {own} dev {host}"))?;
        }
        let open =
            |pod: &Netns, own| -> Result<UdpSocket> { Ok(pod.run(|| UdpSocket::bind(SocketAddr::new(own, PORT)))??) };
        let (sender, receiver) = (open(&pods[0], address(0))?, open(&pods[1], address(1))?);
        sender.connect(SocketAddr::new(address(1), PORT))?;
        receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self { node, sender, receiver, _pods: pods })
    }

    /// Nanoseconds per packet. On its way through the node it stays on the processor of who sends it.
    fn measure(&self, packets: usize) -> Result<u64> {
        let payload = [0; 64];
        self.sender.send(&payload)?;
        self.receiver.recv(&mut [0; 64]).context("the path does not carry what policy allows")?;
        let started = Instant::now();
        for _ in 0..packets {
            self.sender.send(&payload)?;
        }
        let took = started.elapsed();
        self.receiver.set_nonblocking(true)?;
        while self.receiver.recv(&mut [0; 64]).is_ok() {}
        self.receiver.set_nonblocking(false)?;
        Ok(u64::try_from(took.as_nanos() / packets as u128).unwrap_or(u64::MAX))
    }
}

/// The table of a node with two pods, the second of which is selected by this many policies, each with its own peers and port.
fn crowded(policies: usize) -> Arc<PolicyTable> {
    let mut objects = Objects::default();
    objects.namespaces.insert("ns0".to_owned(), BTreeMap::new());
    for number in [0, 1] {
        let labels = [("kind".to_owned(), format!("k{number}"))].into();
        let pod = Pod { labels, addresses: BTreeSet::from([address(number)]), ..Pod::default() };
        objects.pods.insert(ObjectName::new("ns0", &format!("pod{number}")), Arc::new(pod));
    }
    for number in 0..policies {
        let cidr = husk_overlay::prefix::Prefix::host(address(number));
        let peer = Peer::Block { cidr, except: BTreeSet::new() };
        let port = PORT + u16::try_from(number % 1000).unwrap_or_default();
        let rule =
            PolicyRule { peers: Some(vec![peer]), ports: Some(vec![PortMatch::Range(Protocol::Udp, port, port)]) };
        let policy = NetworkPolicy { selector: labelled("kind", "k1".into()), ingress: Some(vec![rule]), egress: None };
        objects.network_policies.insert(ObjectName::new("ns0", &format!("policy{number}")), Arc::new(policy));
    }
    let own = [0, 1].map(|number| endpoint(&ObjectName::new("ns0", &format!("pod{number}")), address(number)));
    let own: Endpoints = own.into_iter().map(|it| (it.id.clone(), it)).collect();
    made(&Arc::new(objects), &own).0
}

fn per_packet(plan: &Plan, scope: &Scope, progress: &(impl Fn(&str) + Sync)) -> Result<Vec<(String, u64)>> {
    let path = Path::make(scope)?;
    let counts = [0, 1, 100, 10_000];
    let tables: Vec<Arc<PolicyTable>> = counts.iter().map(|count| crowded(*count)).collect();
    let mut times: Vec<Vec<u64>> = vec![Vec::new(); counts.len() + 2];
    // Connection tracking alone is what policy has to be measured against: a node has it in any case.
    let tracking = "table inet tracking { chain c { type filter hook forward priority 0; ct state new counter; }; }";
    path.node.run(|| -> Result<()> {
        let mut live = Live::default();
        for round in 0..plan.rounds {
            progress(&format!("packets: round {} of {}", round + 1, plan.rounds));
            times[0].push(path.measure(plan.packets)?);
            path.node.command("nft", [tracking])?;
            times[1].push(path.measure(plan.packets)?);
            path.node.command("nft", ["delete table inet tracking"])?;
            for (table, times) in tables.iter().zip(&mut times[2..]) {
                program(&mut live, table)?;
                times.push(path.measure(plan.packets)?);
            }
            let actual = live.read()?;
            live.apply(&diff(None, actual.as_deref()), None)?;
        }
        Ok(())
    })??;
    let names = ["no rules".to_owned(), "connection tracking alone".to_owned()];
    let names = names.into_iter().chain(counts.iter().map(|count| format!("{count} policies of one pod")));
    let median = |mut all: Vec<u64>| {
        all.sort_unstable();
        all[all.len() / 2]
    };
    Ok(names.zip(times.into_iter().map(median)).collect())
}

impl Report {
    /// All of it as JSON. Times are in microseconds, of packets in nanoseconds.
    #[must_use]
    pub fn json(&self) -> Value {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let change = |(compile, apply, bytes): (Duration, Duration, usize)| json!({"compile": micros(compile), "apply": micros(apply), "bytes": bytes});
        json!({
            "pods": self.plan.pods, "policies": self.plan.policies, "localPods": self.plan.local,
            "peers": self.peers, "compile": micros(self.compile), "load": micros(self.load.0), "loadBytes": self.load.1,
            "read": micros(self.read), "label": change(self.label), "pod": change(self.pod), "policy": change(self.policy),
            "memoryKiB": self.memory,
            "packets": self.packets.iter().map(|(name, nanoseconds)| json!({"name": name, "nanoseconds": nanoseconds})).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { pods, policies, local, .. } = self.plan;
        writeln!(
            f,
            "{policies} policies, {pods} pods, {local} of them on this node; {} peers in {} ranges",
            self.peers, self.ranges
        )?;
        let mut changes = table(["", "make", "load", "netlink"]);
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        changes.add_row(["all of it".to_owned(), ms(self.compile), ms(self.load.0), format!("{} bytes", self.load.1)]);
        for (what, (compile, apply, bytes)) in
            [("one label of one pod", self.label), ("one more pod", self.pod), ("one more policy", self.policy)]
        {
            changes.add_row([what.to_owned(), ms(compile), ms(apply), format!("{bytes} bytes")]);
        }
        changes.add_row(["reading all of it".to_owned(), String::new(), ms(self.read), String::new()]);
        writeln!(f, "{changes}\nmemory of objects and table: {:.1} MiB\n", self.memory as f64 / 1024.0)?;
        let floor = self.packets.get(1).map_or(1, |(_, time)| *time).max(1) as f64;
        let mut packets = table(["a packet between two pods", "time", "ratio"]);
        for (name, time) in &self.packets {
            packets.add_row([name.clone(), format!("{time} ns"), format!("{:.2}", *time as f64 / floor)]);
        }
        writeln!(f, "{packets}")
    }
}
