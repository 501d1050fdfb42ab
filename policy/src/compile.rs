//! From policy to an nftables table whose work per packet does not depend on how many policies, rules, pods or peers there are.
//!
//! ```text
//! prerouting -290  from a pod that is not known                  drop, counter unknown_pod
//! input       -10  from a pod in quarantine to this host         drop, counter denied_egress
//! forward     -10  to a pod that is not known                    drop, counter unknown_pod
//!                  from a pod to itself                          accept
//!                  of no connection, from or to a pod with rules drop, counter stateless
//!                  who began the connection   -> its egress chain     one look-up by address
//!                  who answers                -> its ingress chain    one look-up by address
//! egress_P         class of who answers       -> verdict at the port  two look-ups
//! ingress_P        class of who began         -> verdict at the port  two look-ups
//! ```
//!
//! - A *profile* P is what some pods have in common: the same rules in the same order. A pod's chain is that of its profile.
//! - Within a profile, a *class* is what some addresses have in common: the same rules speak of them. A map leads from address
//!   to class; its ranges are made by sweeping once over the ranges of all rules.
//! - What a class may do at which protocol and port is in one map for all profiles.
//!
//! Every packet is judged by the connection it belongs to, its first packets as its last, in both directions: by who began it,
//! who answers after translation, and the port there. So a policy that changes holds for connections that exist, at once and
//! without a look at any of them; and one that began while somebody else had flushed the rules does not go on.
//!
//! This node's own traffic with its pods meets none of this: it is neither forwarded nor, in the direction of the host, from a
//! pod in quarantine.

mod class;
pub mod path;
mod profile;
mod ranges;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use husk_overlay::kernel::Hook;
use husk_overlay::kernel::policy::{
    PolicyAction, PolicyChain, PolicyClass, PolicyElement, PolicyField, PolicyKey, PolicyLog, PolicyMatch, PolicyName,
    PolicyRule, PolicySet, PolicyTable, PolicyValue, PolicyValueKind, PolicyVerdict,
};
use husk_overlay::marks;
use husk_overlay::prefix::Family;

use self::class::Classes;
use self::profile::{Profile, Profiles};
use crate::cluster::Cluster;
use crate::object::Direction;
use crate::rules::rules_of;
use crate::verdict::Verdict;

/// Counter of packets from and to pods of this node that policy denied, by direction.
#[must_use]
pub fn denied_counter(direction: Direction) -> String {
    format!("denied_{direction}")
}

/// Counter of packets from or to addresses of pods whose policy is not known.
pub const UNKNOWN_POD: &str = "unknown_pod";

/// Counter of packets that belong to no connection, from or to pods with rules.
pub const STATELESS: &str = "stateless";

/// Counter of packets that were forwarded.
pub const PASSED: &str = "passed";

/// Begin of the text that comes with a packet that policy denied; the direction follows.
pub const LOG_PREFIX: &str = "husk-denied-";

/// Denied packets that are told to user space per second and direction, and how many at once. All are counted.
const LOG_RATE: (u64, u32) = (100, 200);

/// Octets of a denied packet that user space gets: the headers, with those that an ICMP error quotes.
const LOG_LENGTH: u32 = 256;

/// Before connection tracking (-200), behind antispoofing (-300).
const UNKNOWN_PRIORITY: i32 = -290;

/// Behind destination NAT (-100), so that addresses are those of pods, and before what others filter (0).
const FILTER_PRIORITY: i32 = -10;

/// The name of a set or chain of a direction and family.
fn named(what: impl std::fmt::Display, family: Family) -> PolicyName {
    format!("{what}_{}", family.to_string().to_lowercase()).into()
}

/// The table without any pod: nothing from or to a pod passes.
#[must_use]
pub fn closed(families: &BTreeSet<Family>) -> PolicyTable {
    compile(&Cluster::default(), families)
}

/// The table that enforces the policy of this node's pods.
#[must_use]
pub fn compile(cluster: &Cluster, families: &BTreeSet<Family>) -> PolicyTable {
    let mut classes = Classes::default();
    let mut profiles = Profiles::new(cluster);
    let mut build = Build { table: PolicyTable::default(), families };
    let mut attachments: BTreeMap<(Direction, Family), BTreeMap<PolicyElement, PolicyValue>> = BTreeMap::new();
    let mut isolated = BTreeSet::new();
    let mut quarantined = BTreeSet::new();
    let mut known = BTreeSet::new();
    for (name, local) in cluster.local() {
        known.extend(local.pod.addresses.iter().copied());
        if local.quarantined {
            quarantined.extend(local.pod.addresses.iter().copied());
        }
        for direction in Direction::ALL {
            let rules = rules_of(cluster, name, local, direction).rules;
            if rules.is_empty() {
                continue;
            }
            isolated.extend(local.pod.addresses.iter().copied());
            let chain = profiles.chain(direction, rules, &local.pod);
            for address in &local.pod.addresses {
                let of = attachments.entry((direction, Family::of(*address))).or_default();
                of.insert(PolicyElement::Address(*address), PolicyValue::Verdict(PolicyVerdict::Jump(chain.clone())));
            }
        }
    }
    for (chain, profile) in profiles.compile(families, &mut classes) {
        build.profile(&chain, profile);
    }
    for direction in Direction::ALL {
        build.services(direction, &classes);
        build.denied(direction);
    }
    for family in families {
        for direction in Direction::ALL {
            let elements = attachments.remove(&(direction, *family)).unwrap_or_default();
            let set = PolicySet { key: PolicyKey::Address(*family), value: PolicyValueKind::Verdict, elements };
            build.set(named(direction, *family), set);
        }
        build.addresses("known", *family, &known);
        build.addresses("isolated", *family, &isolated);
        build.addresses("quarantined", *family, &quarantined);
        build.forward(*family, &known);
    }
    build.base();
    build.table
}

struct Build<'a> {
    table: PolicyTable,
    families: &'a BTreeSet<Family>,
}

fn rule(matches: Vec<PolicyMatch>, action: PolicyAction) -> PolicyRule {
    PolicyRule { matches, counter: None, log: None, action }
}

fn goto(chain: impl Into<PolicyName>) -> PolicyAction {
    PolicyAction::Verdict(PolicyVerdict::Goto(chain.into()))
}

fn jump(chain: impl Into<PolicyName>) -> PolicyAction {
    PolicyAction::Verdict(PolicyVerdict::Jump(chain.into()))
}

const ACCEPT: PolicyAction = PolicyAction::Verdict(PolicyVerdict::Accept);

impl Build<'_> {
    fn set(&mut self, name: PolicyName, set: PolicySet) {
        self.table.sets.insert(name, Arc::new(set));
    }

    fn chain(&mut self, name: impl Into<PolicyName>, hook: Option<(Hook, i32)>, rules: Vec<PolicyRule>) {
        self.table.chains.insert(name.into(), Arc::new(PolicyChain { hook, rules }));
    }

    fn addresses(&mut self, name: &str, family: Family, addresses: &BTreeSet<IpAddr>) {
        let of_family = addresses.iter().filter(|address| Family::of(**address) == family);
        let elements = of_family.map(|address| (PolicyElement::Address(*address), PolicyValue::None)).collect();
        let set = PolicySet { key: PolicyKey::Address(family), value: PolicyValueKind::None, elements };
        self.set(named(name, family), set);
    }

    /// What a class may do where.
    fn services(&mut self, direction: Direction, classes: &Classes) {
        let mut elements = BTreeMap::new();
        for (number, class) in &classes.all {
            for service in &class.services {
                let key = PolicyElement::ClassAndService {
                    class: *number,
                    protocols: service.protocols,
                    ports: service.ports,
                };
                let verdict = match service.verdict {
                    Verdict::Allow => PolicyVerdict::Return,
                    Verdict::Deny => PolicyVerdict::Goto(denied_counter(direction).into()),
                };
                elements.insert(key, PolicyValue::Verdict(verdict));
            }
        }
        let set = PolicySet { key: PolicyKey::ClassAndService, value: PolicyValueKind::Verdict, elements };
        self.set(services(direction), set);
    }

    /// Counts, tells and drops.
    fn denied(&mut self, direction: Direction) {
        let counter = denied_counter(direction);
        let log = PolicyLog {
            group: marks::NFLOG_GROUP,
            prefix: format!("{LOG_PREFIX}{direction}"),
            snap_length: LOG_LENGTH,
        };
        let (rate, burst) = LOG_RATE;
        let tell =
            PolicyRule { log: Some(log), ..rule(vec![PolicyMatch::Below { rate, burst }], PolicyAction::Continue) };
        let rules = vec![tell, self.counted_drop(&counter)];
        self.chain(counter, None, rules);
    }

    fn counted_drop(&mut self, counter: &str) -> PolicyRule {
        self.table.counters.insert(counter.to_owned());
        let action = PolicyAction::Verdict(PolicyVerdict::Drop);
        PolicyRule { counter: Some(counter.to_owned()), ..rule(Vec::new(), action) }
    }

    /// The chain of a profile: in every case it comes to a verdict of a map, and if not it denies.
    fn profile(&mut self, chain: &PolicyName, profile: Profile) {
        let direction = profile.direction;
        let mut rules = Vec::new();
        for family in self.families {
            let set = named(chain, *family);
            let field = match direction {
                Direction::Egress => PolicyField::Responder(*family),
                Direction::Ingress => PolicyField::Originator(*family),
            };
            let class = PolicyClass::Of(field, set.clone());
            rules.push(rule(Vec::new(), PolicyAction::Judge { class, services: services(direction) }));
            let elements = profile.peers.get(family).cloned().unwrap_or_default();
            let elements = elements.into_iter().map(|((first, last), class)| {
                let address = |number| ranges::address(*family, number);
                (PolicyElement::AddressRange(address(first), address(last)), PolicyValue::Class(class))
            });
            self.set(
                set,
                PolicySet {
                    key: PolicyKey::AddressRange(*family),
                    value: PolicyValueKind::Class,
                    elements: elements.collect(),
                },
            );
        }
        let class = PolicyClass::Always(profile.others);
        rules.push(rule(Vec::new(), PolicyAction::Judge { class, services: services(direction) }));
        rules.push(rule(Vec::new(), goto(denied_counter(direction))));
        self.chain(chain.clone(), None, rules);
    }

    /// What is forwarded, in one family.
    fn forward(&mut self, family: Family, known: &BTreeSet<IpAddr>) {
        let own = known.iter().filter(|address| Family::of(**address) == family);
        let elements = own.map(|address| (PolicyElement::AddressPair(*address, *address), PolicyValue::None)).collect();
        self.set(
            named("itself", family),
            PolicySet { key: PolicyKey::AddressPair(family), value: PolicyValueKind::None, elements },
        );
        let isolated = |field| PolicyMatch::In(field, named("isolated", family));
        let unknown = PolicyMatch::NotIn(PolicyField::Destination(family), named("known", family));
        let itself = PolicyMatch::In(PolicyField::OriginatorAndResponder(family), named("itself", family));
        let look_up = |field, direction: Direction| PolicyAction::Lookup(field, named(direction, family));
        let rules = vec![
            rule(vec![PolicyMatch::ToPod, unknown], goto(UNKNOWN_POD)),
            rule(vec![itself], ACCEPT),
            rule(vec![PolicyMatch::Stateless, isolated(PolicyField::Source(family))], goto(STATELESS)),
            rule(vec![PolicyMatch::Stateless, isolated(PolicyField::Destination(family))], goto(STATELESS)),
            rule(Vec::new(), look_up(PolicyField::Originator(family), Direction::Egress)),
            rule(Vec::new(), look_up(PolicyField::Responder(family), Direction::Ingress)),
            PolicyRule { counter: Some(PASSED.into()), ..rule(Vec::new(), PolicyAction::Continue) },
        ];
        self.table.counters.insert(PASSED.into());
        self.chain(named("forward", family), None, rules);
    }

    /// The chains that packets meet first.
    fn base(&mut self) {
        for counter in [UNKNOWN_POD, STATELESS] {
            let drop = self.counted_drop(counter);
            self.chain(counter, None, vec![drop]);
        }
        let mut from_pod = Vec::new();
        let mut forward = Vec::new();
        let mut input = Vec::new();
        for family in self.families {
            let known = PolicyMatch::In(PolicyField::Source(*family), named("known", *family));
            from_pod.push(rule(vec![known], ACCEPT));
            forward.push(rule(vec![PolicyMatch::Family(*family)], jump(named("forward", *family))));
            let quarantined = PolicyMatch::In(PolicyField::Originator(*family), named("quarantined", *family));
            let denied = denied_counter(Direction::Egress);
            input.push(rule(vec![PolicyMatch::FromPod, quarantined], goto(denied.clone())));
            // What connection tracking was told to leave alone has no originator, as queries of a name server on the host.
            let source = PolicyMatch::In(PolicyField::Source(*family), named("quarantined", *family));
            input.push(rule(vec![PolicyMatch::FromPod, PolicyMatch::Stateless, source], goto(denied)));
        }
        for family in Family::ALL.into_iter().filter(|family| !self.families.contains(family)) {
            // Pods may still have addresses of a family that the cluster had.
            forward.push(rule(vec![PolicyMatch::Family(family), PolicyMatch::ToPod], goto(UNKNOWN_POD)));
        }
        from_pod.push(rule(Vec::new(), goto(UNKNOWN_POD)));
        self.chain("from_pod", None, from_pod);
        let prerouting = vec![rule(vec![PolicyMatch::FromPod], jump("from_pod"))];
        self.chain("prerouting", Some((Hook::Prerouting, UNKNOWN_PRIORITY)), prerouting);
        self.chain("input", Some((Hook::Input, FILTER_PRIORITY)), input);
        self.chain("forward", Some((Hook::Forward, FILTER_PRIORITY)), forward);
    }
}

/// The map of what classes may do.
fn services(direction: Direction) -> PolicyName {
    format!("services_{direction}").into()
}

#[cfg(test)]
mod tests;
