//! Sets of addresses as ranges of numbers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_overlay::prefix::{Family, Prefix};

/// First and last number of a range.
pub(super) type Range = (u128, u128);

/// Ranges of addresses of one family: in order, without overlaps, and with a gap between one and the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<Range>);

/// An address as a number.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(it) => it.to_bits().into(),
        IpAddr::V6(it) => it.to_bits(),
    }
}

/// A number as an address.
pub(super) fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        Family::Ipv6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// The highest number of a family.
pub(super) fn highest(family: Family) -> u128 {
    match family {
        Family::Ipv4 => u32::MAX.into(),
        Family::Ipv6 => u128::MAX,
    }
}

/// First and last address of a prefix.
pub(super) fn of_prefix(prefix: &Prefix) -> Range {
    let first = number(prefix.address());
    let host_bits = prefix.family().bits() - prefix.length();
    let size = if host_bits == 128 { u128::MAX } else { (1 << host_bits) - 1 };
    (first, first | size)
}

impl Ranges {
    /// What all of them hold together.
    pub(super) fn union(all: impl IntoIterator<Item = Range>) -> Self {
        let mut all: Vec<Range> = all.into_iter().collect();
        all.sort_unstable();
        let mut merged: Vec<Range> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// What this holds and the other does not.
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        for &(first, last) in &self.0 {
            let mut next = Some(first);
            for &(from, to) in other.0.iter().filter(|(from, to)| *to >= first && *from <= last) {
                let Some(start) = next else { break };
                if from > start {
                    left.push((start, from - 1));
                }
                next = to.checked_add(1).filter(|after| *after <= last);
            }
            left.extend(next.map(|start| (start, last)));
        }
        Self(left)
    }

    /// The ranges in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range> {
        self.0.iter().copied()
    }

    /// True if it holds the number.
    pub(super) fn contains(&self, number: u128) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= number);
        after > 0 && self.0[after - 1].1 >= number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Ranges> {
        prop::collection::vec((0_u128..40, 0_u128..8), 0..6)
            .prop_map(|all| Ranges::union(all.into_iter().map(|(first, length)| (first, first + length))))
    }

    proptest! {
        #[test]
        fn union_and_difference_are_those_of_sets(one in ranges(), other in ranges()) {
            let both = Ranges::union(one.iter().chain(other.iter()));
            let left = one.without(&other);
            for number in 0..60 {
                prop_assert_eq!(both.contains(number), one.contains(number) || other.contains(number));
                prop_assert_eq!(left.contains(number), one.contains(number) && !other.contains(number));
            }
            for all in [&both, &left] {
                prop_assert!(all.0.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{:?}", all);
            }
        }
    }

    #[test]
    fn the_ends_of_a_family_are_addresses_too() {
        let all = |text: &str| Ranges::union([of_prefix(&text.parse().unwrap())]);
        let top = Ranges::union([(u128::MAX, u128::MAX)]);
        assert_eq!(all("::/0").without(&top).0, [(0, u128::MAX - 1)]);
        assert_eq!(all("::/0").without(&all("::/1")).0, [(1 << 127, u128::MAX)]);
        assert_eq!(all("::/0").without(&all("::/0")).0, []);
        assert_eq!(all("0.0.0.0/0").0, [(0, highest(Family::Ipv4))]);
        assert_eq!(address(Family::Ipv4, number("10.0.0.7".parse().unwrap())).to_string(), "10.0.0.7");
    }
}
