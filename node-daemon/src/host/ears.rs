//! Whether this host hears probes at all: a firewall of its own may let nothing to their port.
//!
//! Each peer that probes this host sends it packets through the tunnel, and Husk's own rules count them as they arrive, before
//! the chains in which people filter. Where they go on arriving, while the sockets get none of them and no path is known to be
//! answered, somebody in between drops them. That a peer does not answer, since it is down or its own firewall drops, is not
//! taken for that: from such a peer nothing arrives.

/// Packets that have to arrive and not be heard.
const ENOUGH: u64 = 3;

/// What was counted when every path had fallen silent.
#[derive(Debug, Default)]
pub(super) struct Ears {
    silent_since: Option<Count>,
}

/// Packets so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    /// That arrived.
    pub(super) arrived: u64,
    /// That sockets got.
    pub(super) heard: u64,
}

impl Ears {
    /// Whether the host is deaf. `now` is what has been counted, if every path is silent.
    pub(super) fn are_stopped(&mut self, now: Option<Count>) -> bool {
        let Some(now) = now else {
            self.silent_since = None;
            return false;
        };
        let since = self.silent_since.get_or_insert(now);
        // One that is heard late had arrived before; and whoever makes the table anew begins to count at nought.
        if since.heard != now.heard || now.arrived < since.arrived {
            *since = now;
        }
        now.arrived - since.arrived >= ENOUGH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(arrived: u64, heard: u64) -> Option<Count> {
        Some(Count { arrived, heard })
    }

    #[test]
    fn what_arrives_and_is_not_heard_makes_deaf_and_the_first_that_is_heard_ends_it() {
        let mut ears = Ears::default();
        assert!(!ears.are_stopped(None));
        assert!(!ears.are_stopped(count(100, 90)), "what was before does not count");
        assert!(!ears.are_stopped(count(102, 90)));
        assert!(ears.are_stopped(count(103, 90)) && ears.are_stopped(count(103, 90)));
        assert!(!ears.are_stopped(count(104, 91)));
        assert!(ears.are_stopped(count(107, 91)));
        assert!(!ears.are_stopped(None), "a path is answered");
        assert!(!ears.are_stopped(count(200, 91)));
    }

    #[test]
    fn peers_that_are_down_and_counters_made_anew_are_no_sign() {
        let mut ears = Ears::default();
        assert!(!ears.are_stopped(count(100, 100)) && !ears.are_stopped(count(100, 100)));
        assert!(!ears.are_stopped(count(0, 100)) && !ears.are_stopped(count(2, 100)));
        assert!(ears.are_stopped(count(3, 100)));
    }
}
