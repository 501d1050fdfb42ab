//! Who is answered, and how often.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// Answers per second to one peer, and how many at once after a quiet time: more than a peer that searches sends, which has
/// [`husk_overlay::probe::PROBES_PER_SECOND`] for all its paths.
const OF_PEER: Rate = Rate { per_second: 50, burst: 50 };

/// The same to all peers together. In a cluster where every node checks its paths in turn 40 come per second on the average;
/// when a node's own path has broken, many search at once.
const OF_ALL: Rate = Rate { per_second: 400, burst: 400 };

#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: u32,
    burst: u32,
}

/// A bucket of tokens, counted in time: an answer costs the time in which another token comes.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// When it will be full, as time since boot.
    full: Duration,
}

impl Bucket {
    fn has(&self, rate: Rate, now: Duration) -> bool {
        let cost = Duration::from_secs(1) / rate.per_second;
        self.full.max(now) + cost <= now + cost * rate.burst
    }

    fn take(&mut self, rate: Rate, now: Duration) {
        self.full = self.full.max(now) + Duration::from_secs(1) / rate.per_second;
    }
}

/// Knows the peers, and what they were answered.
#[derive(Debug, Default)]
pub(super) struct Responder {
    peers: BTreeSet<IpAddr>,
    buckets: BTreeMap<IpAddr, Bucket>,
    all: Bucket,
}

impl Responder {
    /// Addresses that are answered, no others.
    pub(super) fn answer_only(&mut self, peers: BTreeSet<IpAddr>) {
        self.buckets.retain(|peer, _| peers.contains(peer));
        self.peers = peers;
    }

    /// True for a peer's address.
    pub(super) fn knows(&self, address: IpAddr) -> bool {
        self.peers.contains(&address)
    }

    /// Whether a peer is answered now; an answer that is granted counts as given.
    pub(super) fn may_answer(&mut self, peer: IpAddr, now: Duration) -> bool {
        if !self.knows(peer) || !self.all.has(OF_ALL, now) {
            return false;
        }
        let bucket = self.buckets.entry(peer).or_default();
        if !bucket.has(OF_PEER, now) {
            return false;
        }
        bucket.take(OF_PEER, now);
        self.all.take(OF_ALL, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn peer(number: u16) -> IpAddr {
        let [high, low] = number.to_be_bytes();
        Ipv4Addr::new(10, 42, high, low).into()
    }

    fn answered(responder: &mut Responder, from: IpAddr, questions: u32, now: Duration) -> u32 {
        (0..questions).map(|_| u32::from(responder.may_answer(from, now))).sum()
    }

    #[test]
    fn strangers_get_nothing_and_those_who_left_neither() {
        let mut responder = Responder::default();
        let now = Duration::from_secs(1000);
        assert!(!responder.may_answer(peer(1), now));
        responder.answer_only([peer(1), peer(2)].into());
        assert!(responder.knows(peer(1)) && responder.may_answer(peer(1), now) && responder.may_answer(peer(2), now));
        responder.answer_only([peer(2)].into());
        assert!(!responder.knows(peer(1)) && !responder.may_answer(peer(1), now));
    }

    #[test]
    fn one_who_floods_gets_its_share_and_keeps_nobody_else_from_theirs() {
        let mut responder = Responder::default();
        responder.answer_only([peer(1), peer(2)].into());
        let now = Duration::from_secs(1000);
        assert_eq!(answered(&mut responder, peer(1), 1000, now), 50);
        assert_eq!(answered(&mut responder, peer(2), 10, now), 10);
        assert_eq!(answered(&mut responder, peer(1), 1000, now + Duration::from_millis(100)), 5);
        assert_eq!(answered(&mut responder, peer(1), 1000, now + Duration::from_secs(60)), 50, "no more is saved up");
        // A clock that stands still, or is read a little late, gives nothing away.
        assert_eq!(answered(&mut responder, peer(1), 1000, now), 0);
    }

    #[test]
    fn all_together_get_no_more_than_the_node_can_spare() {
        let mut responder = Responder::default();
        responder.answer_only((0..5000).map(peer).collect());
        let second = |responder: &mut Responder, now| -> u32 {
            (0..5000).map(|number| answered(responder, peer(number), 2, now)).sum()
        };
        assert_eq!(second(&mut responder, Duration::from_secs(10)), 400);
        assert_eq!(second(&mut responder, Duration::from_secs(11)), 400);
    }
}
