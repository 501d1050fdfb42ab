//! Profiles: what pods with the same rules have in common.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use husk_overlay::digest;
use husk_overlay::kernel::policy::PolicyName;
use husk_overlay::prefix::Family;
use serde::Serialize;

use super::class::{Class, Classes, Ports, Service};
use super::ranges::{self, Range, Ranges};
use crate::cluster::Cluster;
use crate::object::{Direction, ObjectName, Peer, Pod, PolicyRule, PortMatch};
use crate::rules::{Effect, Level, Rule, means_pod, named_ports};

/// Hexadecimal digits in the name of a profile: 128 bits, so that nobody finds rules of the same name as somebody else's.
const NAME_DIGITS: usize = 32;

/// A profile, compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Profile {
    pub(super) direction: Direction,
    /// Classes of peers by ranges of addresses.
    pub(super) peers: BTreeMap<Family, Vec<(Range, u32)>>,
    /// Class of all others.
    pub(super) others: u32,
}

/// A rule without its origin, and with ports by number wherever they are the pod's own: what makes pods alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Likeness {
    level: Level,
    effect: Effect,
    matches: PolicyRule,
}

/// The profiles of a node.
pub(super) struct Profiles<'a> {
    all: BTreeMap<PolicyName, (Direction, Vec<Likeness>)>,
    peers: Peers<'a>,
}

impl<'a> Profiles<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        Self { all: BTreeMap::new(), peers: Peers::new(cluster) }
    }

    /// The name of the chain for a pod with these rules.
    pub(super) fn chain(&mut self, direction: Direction, rules: Vec<Rule>, pod: &Pod) -> PolicyName {
        let alike = |rule: Rule| {
            let mut matches = rule.matches;
            if direction == Direction::Ingress {
                let resolve = |ports: Vec<PortMatch>| ports.iter().flat_map(|port| named_ports(pod, port)).collect();
                matches.ports = matches.ports.map(resolve);
            }
            Likeness { level: rule.level, effect: rule.effect, matches }
        };
        let rules: Vec<Likeness> = rules.into_iter().map(alike).collect();
        let text = serde_json::to_string(&rules).expect("structures of texts and numbers have a JSON form");
        let digest = digest::hex(&["policy-profile", &text]);
        let name: PolicyName = format!("{direction}_{}", &digest[..NAME_DIGITS]).into();
        self.all.entry(name.clone()).or_insert((direction, rules));
        name
    }

    pub(super) fn compile(&mut self, families: &BTreeSet<Family>, classes: &mut Classes) -> Vec<(PolicyName, Profile)> {
        let all = std::mem::take(&mut self.all);
        let compile = |(name, (direction, rules)): (PolicyName, (Direction, Vec<Likeness>))| {
            let profile = self.peers.profile(direction, &rules, families, classes);
            (name, profile)
        };
        all.into_iter().map(compile).collect()
    }
}

/// A pod that rules may mean.
struct Candidate<'a> {
    name: &'a ObjectName,
    pod: &'a Pod,
    addresses: Vec<IpAddr>,
}

/// Finds whom rules mean.
struct Peers<'a> {
    cluster: &'a Cluster,
    candidates: Vec<Candidate<'a>>,
    /// Indices of the candidates of a namespace.
    by_namespace: HashMap<&'a str, Vec<usize>>,
    /// Indices of the candidates that a peer means.
    meant: HashMap<Peer, Vec<usize>>,
}

/// A rule as it concerns some addresses.
struct Reach {
    service: Service,
    /// None means all addresses.
    addresses: Option<BTreeMap<Family, Ranges>>,
}

impl<'a> Peers<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let candidates: Vec<Candidate<'a>> = cluster
            .pods()
            .map(|(name, pod, addresses)| Candidate { name, pod, addresses: addresses.collect() })
            .filter(|candidate| !candidate.addresses.is_empty())
            .collect();
        let mut by_namespace: HashMap<&'a str, Vec<usize>> = HashMap::new();
        for (index, candidate) in candidates.iter().enumerate() {
            by_namespace.entry(&candidate.name.namespace).or_default().push(index);
        }
        Self { cluster, candidates, by_namespace, meant: HashMap::new() }
    }

    fn meant(&mut self, peer: &Peer) -> &[usize] {
        if !self.meant.contains_key(peer) {
            let found = self.find(peer);
            self.meant.insert(peer.clone(), found);
        }
        &self.meant[peer]
    }

    fn find(&self, peer: &Peer) -> Vec<usize> {
        let mut found: Vec<usize> = Vec::new();
        for members in self.by_namespace.values() {
            let Some(first) = members.first() else { continue };
            // Whether the namespace is meant is the same for all of its pods.
            let Peer::Pods { namespaces, .. } = peer else { return found };
            let anybody =
                Peer::Pods { namespaces: namespaces.clone(), pods: crate::selector::LabelSelector::default() };
            let Candidate { name, pod, .. } = &self.candidates[*first];
            if means_pod(&anybody, self.cluster, name, pod) {
                let Peer::Pods { pods, .. } = peer else { return found };
                found.extend(members.iter().filter(|index| pods.selects(&self.candidates[**index].pod.labels)));
            }
        }
        found.sort_unstable();
        found
    }

    fn profile(
        &mut self,
        direction: Direction,
        rules: &[Likeness],
        families: &BTreeSet<Family>,
        classes: &mut Classes,
    ) -> Profile {
        let reaches: Vec<Reach> = rules.iter().flat_map(|rule| self.reaches(rule)).collect();
        let mut numbers: HashMap<Vec<bool>, u32> = HashMap::new();
        let mut number_of = |active: &[bool]| {
            if let Some(known) = numbers.get(active) {
                return *known;
            }
            let rules = reaches.iter().zip(active).filter(|(_, active)| **active).map(|(reach, _)| &reach.service);
            let number = classes.number(Class::of(rules));
            numbers.insert(active.to_vec(), number);
            number
        };
        let everywhere: Vec<bool> = reaches.iter().map(|reach| reach.addresses.is_none()).collect();
        let others = number_of(&everywhere);
        let peers = families.iter().map(|family| {
            let classified = sweep(*family, &reaches, &everywhere, &mut number_of);
            (*family, classified.into_iter().filter(|(_, class)| *class != others).collect())
        });
        Profile { direction, peers: peers.collect(), others }
    }

    /// What a rule comes to: one part for the ports that have numbers, and one for each meaning of those that have names.
    fn reaches(&mut self, rule: &Likeness) -> Vec<Reach> {
        let service = |ports| Service { level: rule.level, effect: rule.effect, ports };
        let Some(ports) = &rule.matches.ports else {
            return vec![Reach { service: service(None), addresses: self.addresses(rule.matches.peers.as_deref()) }];
        };
        let numbers: Vec<Ports> = ports.iter().filter_map(numeric).collect();
        let mut all = Vec::new();
        if !numbers.is_empty() {
            let addresses = self.addresses(rule.matches.peers.as_deref());
            all.push(Reach { service: service(Some(numbers)), addresses });
        }
        for name in ports.iter().filter(|port| matches!(port, PortMatch::Named(..))) {
            for (ports, addresses) in self.named(name, rule.matches.peers.as_deref()) {
                let addresses = Some(by_family(addresses.into_iter()));
                all.push(Reach { service: service(Some(ports)), addresses });
            }
        }
        all
    }

    /// Addresses of peers; none for all addresses.
    fn addresses(&mut self, peers: Option<&[Peer]>) -> Option<BTreeMap<Family, Ranges>> {
        let peers = peers?;
        let mut all: BTreeMap<Family, Vec<Range>> = BTreeMap::new();
        for peer in peers {
            if let Peer::Block { cidr, except } = peer {
                let block = Ranges::union([ranges::of_prefix(cidr)]);
                let except = Ranges::union(except.iter().map(ranges::of_prefix));
                all.entry(cidr.family()).or_default().extend(block.without(&except).iter());
                continue;
            }
            let meant = self.meant(peer).to_vec();
            for address in meant.into_iter().flat_map(|index| &self.candidates[index].addresses) {
                let number = ranges::number(*address);
                all.entry(Family::of(*address)).or_default().push((number, number));
            }
        }
        Some(all.into_iter().map(|(family, all)| (family, Ranges::union(all))).collect())
    }

    /// The peers that have a port of that name, by what the name means there.
    fn named(&mut self, name: &PortMatch, peers: Option<&[Peer]>) -> BTreeMap<Vec<Ports>, Vec<IpAddr>> {
        let reached = self.addresses(peers);
        let mut all: BTreeMap<Vec<Ports>, Vec<IpAddr>> = BTreeMap::new();
        for candidate in &self.candidates {
            let ports: Vec<Ports> = named_ports(candidate.pod, name).iter().filter_map(numeric).collect();
            if ports.is_empty() {
                continue;
            }
            let is_reached = |address: &&IpAddr| {
                reached.as_ref().is_none_or(|reached| {
                    let ranges = reached.get(&Family::of(**address));
                    ranges.is_some_and(|ranges| ranges.contains(ranges::number(**address)))
                })
            };
            let addresses: Vec<IpAddr> = candidate.addresses.iter().filter(is_reached).copied().collect();
            if !addresses.is_empty() {
                all.entry(ports).or_default().extend(addresses);
            }
        }
        all
    }
}

fn by_family(addresses: impl Iterator<Item = IpAddr>) -> BTreeMap<Family, Ranges> {
    let mut all: BTreeMap<Family, Vec<Range>> = BTreeMap::new();
    for address in addresses {
        let number = ranges::number(address);
        all.entry(Family::of(address)).or_default().push((number, number));
    }
    all.into_iter().map(|(family, all)| (family, Ranges::union(all))).collect()
}

fn numeric(port: &PortMatch) -> Option<Ports> {
    match port {
        PortMatch::All(protocol) => Some((*protocol, 0, u16::MAX)),
        PortMatch::Range(protocol, first, last) => Some((*protocol, *first, *last)),
        PortMatch::Named(..) => None,
    }
}

/// Goes once over all addresses of a family, from one place where some rule begins or ends to the next.
fn sweep(
    family: Family,
    reaches: &[Reach],
    everywhere: &[bool],
    number_of: &mut impl FnMut(&[bool]) -> u32,
) -> Vec<(Range, u32)> {
    let mut turns: Vec<(u128, usize)> = Vec::new();
    for (index, reach) in reaches.iter().enumerate() {
        let ranges = reach.addresses.as_ref().and_then(|all| all.get(&family));
        for (first, last) in ranges.into_iter().flat_map(Ranges::iter) {
            turns.push((first, index));
            // Ranges of one rule have gaps between them: the rule turns at each of their ends.
            turns.extend(last.checked_add(1).filter(|next| *next <= ranges::highest(family)).map(|next| (next, index)));
        }
    }
    turns.sort_unstable();
    let mut active = everywhere.to_vec();
    let mut classified: Vec<(Range, u32)> = Vec::new();
    let mut at = 0;
    while at < turns.len() {
        let first = turns[at].0;
        while let Some((_, index)) = turns.get(at).filter(|(turn, _)| *turn == first) {
            active[*index] = !active[*index];
            at += 1;
        }
        let last = turns.get(at).map_or(ranges::highest(family), |(next, _)| next - 1);
        let class = number_of(&active);
        match classified.last_mut() {
            Some(((_, end), before)) if *before == class && *end + 1 == first => *end = last,
            _ => classified.push(((first, last), class)),
        }
    }
    classified
}
