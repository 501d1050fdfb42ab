//! How long a counter has stood still: the kernel counts packets and bytes, and says nothing of when.
//!
//! Nothing is known of the time before a counter was first seen, nor of that before the daemon started: all are taken to have
//! counted just then. That keeps keys longer than necessary, never shorter.

use std::collections::BTreeMap;
use std::time::Duration;

/// Counters by key.
#[derive(Debug)]
pub(super) struct Quiet<K>(BTreeMap<K, Seen>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    count: u64,
    /// When it was first seen, as time since boot.
    first: Duration,
    /// When it last counted, as time since boot.
    at: Duration,
}

/// What is known of a counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Watched {
    /// How long it has stood still.
    pub(super) quiet: Duration,
    /// How long it has been there.
    pub(super) age: Duration,
}

impl<K> Default for Quiet<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Copy> Quiet<K> {
    /// Takes what the counters say now, all of them, and says what is known of each. `counts` says of a step from one
    /// value to another whether it is one that counts; a counter that went back always does, being another one by now.
    pub(super) fn observe(
        &mut self,
        now: Duration,
        counters: &BTreeMap<K, u64>,
        counts: impl Fn(&K, u64) -> bool,
    ) -> BTreeMap<K, Watched> {
        self.0.retain(|key, _| counters.contains_key(key));
        let mut quiet = BTreeMap::new();
        for (key, count) in counters {
            let seen = self.0.entry(*key).or_insert(Seen { count: *count, first: now, at: now });
            let step = count.checked_sub(seen.count);
            if step.is_none_or(|step| step > 0 && counts(key, step)) {
                seen.at = now;
            }
            seen.count = *count;
            quiet.insert(*key, Watched { quiet: now.saturating_sub(seen.at), age: now.saturating_sub(seen.first) });
        }
        quiet
    }
}

/// Bytes of a WireGuard handshake's messages (WireGuard paper, sections 5.4.2 and 5.4.3).
const INITIATION: u64 = 148;
const RESPONSE: u64 = 92;

/// Bytes of a keepalive: a data message without payload (`message_data_len(0)` in drivers/net/wireguard/messages.h).
const KEEPALIVE: u64 = 32;

/// What a device counts of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    /// All of it: the kernel, and the userspace device for what it sends.
    Message,
    /// What is in it: the userspace device, for what it receives. A keepalive counts nothing.
    Payload,
}

/// True if so many more bytes mean that a WireGuard session was used for more than keeping it up.
///
/// A packet inside is at least 20 bytes long, and is padded to a multiple of 16 unless it is as long as the MTU lets it be:
/// with the 32 bytes around it it counts 64 or more, else 32 or more, and a multiple of 16. Handshakes count none of those.
/// What could be either, as the 240 bytes of two messages of a handshake, is taken for use.
pub(super) fn is_use(step: u64, measure: Measure) -> bool {
    match (step, measure) {
        (INITIATION | RESPONSE, _) => false,
        (KEEPALIVE, Measure::Message) => false,
        (_, Measure::Message) => step != INITIATION + KEEPALIVE && step != RESPONSE + KEEPALIVE,
        (_, Measure::Payload) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn seconds(quiet: &mut Quiet<char>, now: u64, counters: &[(char, u64)]) -> Vec<(char, u64)> {
        let counters = counters.iter().copied().collect();
        let found = quiet.observe(at(now), &counters, |_, step| step >= 10);
        found.into_iter().map(|(key, watched)| (key, watched.quiet.as_secs())).collect()
    }

    #[test]
    fn a_counter_is_quiet_from_its_last_step_that_counts() {
        let mut quiet = Quiet::default();
        assert_eq!(seconds(&mut quiet, 100, &[('a', 7)]), [('a', 0)], "nothing is known of the time before");
        assert_eq!(seconds(&mut quiet, 105, &[('a', 7), ('b', 0)]), [('a', 5), ('b', 0)]);
        assert_eq!(seconds(&mut quiet, 109, &[('a', 16), ('b', 10)]), [('a', 9), ('b', 0)], "9 do not count, 10 do");
        // Steps that do not count never add up to one that does.
        assert_eq!(seconds(&mut quiet, 110, &[('a', 25), ('b', 10)]), [('a', 10), ('b', 1)]);
        assert_eq!(seconds(&mut quiet, 111, &[('a', 24), ('b', 10)]), [('a', 0), ('b', 2)], "another counter");
        assert_eq!(seconds(&mut quiet, 112, &[('b', 10)]), [('b', 3)]);
        assert_eq!(seconds(&mut quiet, 120, &[('a', 24), ('b', 10)]), [('a', 0), ('b', 11)], "what comes back is new");
    }

    #[test]
    fn a_clock_that_stands_still_makes_nothing_older() {
        let mut quiet = Quiet::default();
        seconds(&mut quiet, 100, &[('a', 0)]);
        assert_eq!(seconds(&mut quiet, 90, &[('a', 0)]), [('a', 0)]);
    }

    #[test]
    fn every_packet_is_use_and_what_keeps_a_session_up_is_not() {
        for payload in (32..=1424).step_by(16) {
            assert!(is_use(payload + 32, Measure::Message), "{payload}");
            assert!(is_use(payload, Measure::Payload), "{payload}");
        }
        // As long as the MTU lets it be: not padded.
        for exact in [1280, 1420, 1432, 1440, 8920] {
            assert!(is_use(exact + 32, Measure::Message) && is_use(exact, Measure::Payload));
        }
        for idle in [148, 92, 32, 180, 124] {
            assert!(!is_use(idle, Measure::Message), "{idle}");
        }
        assert!(!is_use(148, Measure::Payload) && !is_use(92, Measure::Payload));
    }
}
