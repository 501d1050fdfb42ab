//! What probes cost besides themselves: with WireGuard, a handshake with the peer if there is no young session.
//!
//! A session lasts three minutes, and who sends under one that is older than two makes another (WireGuard's paper, section 6.1). To
//! a peer with whom there is no other traffic, a probe is then five packets instead of two: initiation and response, the probe,
//! its answer, and ten seconds later a keepalive, since the answer was answered by nothing (section 6.5). Whether there was other
//! traffic is not known here: the prober reckons with a handshake whenever it has made none for so long itself, which at worst is
//! one too many.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::name::NodeName;

/// Age from which on who sends makes a new session (`REKEY_AFTER_TIME`).
const RENEWED: Duration = Duration::from_secs(120);

/// Packets of a probe with its answer, and of the handshake with its keepalive.
pub(super) const EXCHANGE: u32 = 2;
pub(super) const HANDSHAKE: u32 = 3;

/// When sessions were made, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    made: BTreeMap<NodeName, Duration>,
}

impl Sessions {
    /// A packet is sent to a peer now. True if that takes a handshake.
    pub(super) fn send(&mut self, peer: &NodeName, now: Duration) -> bool {
        match self.made.get_mut(peer) {
            Some(made) if now < *made + RENEWED => return false,
            Some(made) => *made = now,
            None => {
                self.made.insert(peer.clone(), now);
            }
        }
        true
    }

    /// Forgets all peers but these.
    pub(super) fn retain(&mut self, is_there: impl Fn(&NodeName) -> bool) {
        self.made.retain(|peer, _| is_there(peer));
    }
}

/// Longest time between two checks of a path, if each of `paths` is to have its turn at the cost of so many `packets` per second;
/// `peers` of them cost handshakes.
pub(super) fn interval(paths: usize, peers: usize, packets: u32) -> Duration {
    let number = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let (paths, packets) = (number(paths), f64::from(packets));
    // Checked more often than sessions are renewed, a peer costs a handshake only now and then.
    let left = packets - number(peers) * f64::from(HANDSHAKE) / RENEWED.as_secs_f64();
    let often = paths * f64::from(EXCHANGE) / left.max(1.0);
    let rarely = paths * f64::from(EXCHANGE + if peers > 0 { HANDSHAKE } else { 0 }) / packets;
    Duration::from_secs_f64(if often <= RENEWED.as_secs_f64() { often } else { rarely })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_is_reckoned_with_where_the_last_is_old() {
        let mut sessions = Sessions::default();
        let peer = NodeName::new("host1").unwrap();
        let at = Duration::from_secs;
        assert!(sessions.send(&peer, at(1000)) && !sessions.send(&peer, at(1119)) && sessions.send(&peer, at(1120)));
        assert!(!sessions.send(&peer, at(1239)));
        sessions.retain(|_| false);
        assert!(sessions.send(&peer, at(1239)));
    }

    #[test]
    fn intervals_grow_with_what_checks_cost() {
        // 32 checks per second without handshakes.
        assert_eq!(interval(320, 0, 64), Duration::from_secs(10));
        assert_eq!(interval(10_000, 0, 64).as_secs(), 312);
        let with = |peers| interval(peers * 2, peers, 64).as_secs_f64();
        assert!((5.0..5.4).contains(&with(80)), "{}", with(80));
        // Every check a handshake: five packets.
        assert_eq!(interval(10_000, 5000, 64).as_secs(), 781);
        let growing = (1..5000).map(with).is_sorted();
        assert!(growing);
    }
}
