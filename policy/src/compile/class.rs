//! Classes: what a peer may do, whatever its address. All peers of which the same rules speak are of one class.

use std::collections::BTreeMap;

use husk_overlay::digest;
use serde::Serialize;

use crate::object::Protocol;
use crate::rules::{Effect, Level};
use crate::verdict::Verdict;

/// Ports of a protocol, first and last.
pub(super) type Ports = (Protocol, u16, u16);

/// A rule, as far as it concerns a peer that it means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(super) struct Service {
    pub(super) level: Level,
    pub(super) effect: Effect,
    /// None means everything, also what has no ports.
    pub(super) ports: Option<Vec<Ports>>,
}

impl Service {
    fn matches(&self, at: Option<(Protocol, u16)>) -> bool {
        match (&self.ports, at) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(ports), Some((protocol, port))) => {
                ports.iter().any(|(of, first, last)| *of == protocol && (*first..=*last).contains(&port))
            }
        }
    }
}

/// What a peer may do: every protocol and port, with the verdict. Ranges do not overlap, and nothing is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Class {
    pub(super) services: Vec<ClassService>,
}

/// Protocols and ports, first and last, with their verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct ClassService {
    pub(super) protocols: (u8, u8),
    pub(super) ports: (u16, u16),
    pub(super) verdict: Verdict,
}

const ALL_PORTS: (u16, u16) = (0, u16::MAX);

impl Class {
    /// The class of peers that these rules speak of, in the order in which they are asked.
    pub(super) fn of<'a>(rules: impl Iterator<Item = &'a Service> + Clone) -> Self {
        let other = decide(rules.clone(), None);
        let mut services: Vec<ClassService> = Vec::new();
        let mut next = 0_u8;
        for protocol in Protocol::ALL {
            let number = protocol.number();
            push(&mut services, ClassService { protocols: (next, number - 1), ports: ALL_PORTS, verdict: other });
            for (ports, verdict) in ports_of(rules.clone(), protocol) {
                push(&mut services, ClassService { protocols: (number, number), ports, verdict });
            }
            next = number + 1;
        }
        push(&mut services, ClassService { protocols: (next, u8::MAX), ports: ALL_PORTS, verdict: other });
        Self { services }
    }

    /// Number of the class, out of its content, so that it is the same on every node and in every pass.
    pub(super) fn number(&self) -> u32 {
        let text = serde_json::to_string(self).expect("a structure of numbers has a JSON form");
        u32::from_str_radix(&digest::hex(&["policy-class", &text])[..8], 16).expect("eight hexadecimal digits")
    }
}

/// Adds a service; one that says the same of the next protocols as the last one is made part of it.
fn push(services: &mut Vec<ClassService>, new: ClassService) {
    match services.last_mut() {
        Some(last)
            if last.verdict == new.verdict
                && last.ports == ALL_PORTS
                && new.ports == ALL_PORTS
                && last.protocols.1 + 1 == new.protocols.0 =>
        {
            last.protocols.1 = new.protocols.1;
        }
        _ => services.push(new),
    }
}

fn ports_of<'a>(rules: impl Iterator<Item = &'a Service> + Clone, protocol: Protocol) -> Vec<((u16, u16), Verdict)> {
    // Where a verdict may begin: at the first port of a range, and behind its last.
    let ranges = rules.clone().filter_map(|rule| rule.ports.as_ref()).flatten().filter(|(of, ..)| *of == protocol);
    let mut starts: Vec<u16> =
        ranges.flat_map(|(_, first, last)| [Some(*first), last.checked_add(1)]).flatten().collect();
    starts.push(0);
    starts.sort_unstable();
    starts.dedup();
    let mut all: Vec<((u16, u16), Verdict)> = Vec::new();
    for (index, first) in starts.iter().enumerate() {
        let last = starts.get(index + 1).map_or(u16::MAX, |next| next - 1);
        let verdict = decide(rules.clone(), Some((protocol, *first)));
        match all.last_mut() {
            Some((range, before)) if *before == verdict => range.1 = last,
            _ => all.push(((*first, last), verdict)),
        }
    }
    all
}

/// The verdict of rules on a port, or on what has no ports.
fn decide<'a>(rules: impl Iterator<Item = &'a Service>, at: Option<(Protocol, u16)>) -> Verdict {
    let mut passed = None;
    for rule in rules.filter(|rule| rule.matches(at)) {
        match rule.effect {
            _ if passed == Some(rule.level) => {}
            Effect::Allow => return Verdict::Allow,
            Effect::Deny => return Verdict::Deny,
            Effect::Pass => passed = Some(rule.level),
        }
    }
    Verdict::Allow
}

/// Classes by number.
#[derive(Debug, Default)]
pub(super) struct Classes {
    pub(super) all: BTreeMap<u32, Class>,
}

impl Classes {
    /// The number of a class, which is another one than its own where two share theirs.
    pub(super) fn number(&mut self, class: Class) -> u32 {
        let mut number = class.number();
        while self.all.get(&number).is_some_and(|known| *known != class) {
            number = number.wrapping_add(1);
        }
        self.all.insert(number, class);
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(ports: &[Ports]) -> Service {
        Service { level: Level::NetworkPolicy, effect: Effect::Allow, ports: Some(ports.to_vec()) }
    }

    fn deny() -> Service {
        Service { level: Level::NetworkPolicy, effect: Effect::Deny, ports: None }
    }

    fn shown(rules: &[Service]) -> Vec<String> {
        let line = |it: &ClassService| {
            let (ClassService { protocols, ports, verdict }, sign) =
                (it, if it.verdict == Verdict::Allow { '+' } else { '-' });
            let _ = verdict;
            format!("{sign}{}-{}:{}-{}", protocols.0, protocols.1, ports.0, ports.1)
        };
        Class::of(rules.iter()).services.iter().map(line).collect()
    }

    #[test]
    fn a_class_is_a_partition_in_few_pieces() {
        assert_eq!(shown(&[]), ["+0-255:0-65535"]);
        assert_eq!(shown(&[deny()]), ["-0-255:0-65535"]);
        assert_eq!(
            shown(&[allow(&[(Protocol::Tcp, 80, 90)]), deny()]),
            ["-0-5:0-65535", "-6-6:0-79", "+6-6:80-90", "-6-6:91-65535", "-7-255:0-65535"]
        );
        let ends = [(Protocol::Sctp, 0, 0), (Protocol::Sctp, 65535, 65535), (Protocol::Udp, 0, 65535)];
        assert_eq!(
            shown(&[allow(&ends), deny()]),
            [
                "-0-16:0-65535",
                "+17-17:0-65535",
                "-18-131:0-65535",
                "+132-132:0-0",
                "-132-132:1-65534",
                "+132-132:65535-65535",
                "-133-255:0-65535"
            ]
        );
    }

    #[test]
    fn two_classes_of_one_number_are_told_apart() {
        let (mut classes, class) = (Classes::default(), Class::of([deny()].iter()));
        classes.all.insert(class.number(), Class::of([].iter()));
        assert_eq!(classes.number(class.clone()), class.number().wrapping_add(1));
        assert_eq!(classes.number(class.clone()), class.number().wrapping_add(1));
    }
}
