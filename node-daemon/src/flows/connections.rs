//! Connections of pods: those that begin and end, as the kernel tells of them.
//!
//! Whoever listens to the kernel's connection tracking makes it tell of every connection of the host, which costs each of them
//! some microseconds. So the daemon listens only while somebody follows flows ([`Interest`]), or they are logged; else its
//! thread sleeps. It is the daemon that listens rather than `huskctl`, because it knows the pods' names, and because many who
//! follow cost no more than one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use husk_dataplane::connections::{Listed, Tracked, Tuple};
use jiff::Timestamp;

/// How long the daemon goes on listening after somebody has asked for connections.
const INTEREST: Duration = Duration::from_secs(10);

/// Connections that are remembered, with 150 bytes each. Of more than these the beginning is not known when they end, and
/// after a loss they are not missed.
pub(super) const REMEMBERED: usize = 65_536;

/// Whether somebody wants to know.
#[derive(Debug, Default)]
pub(super) struct Interest {
    asked: Mutex<Option<Instant>>,
    awakened: Condvar,
    /// They are logged.
    always: AtomicBool,
}

impl Interest {
    /// Somebody asks now.
    pub(super) fn ask(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.awakened.notify_all();
    }

    /// Somebody wants to know for good.
    pub(super) fn last(&self) {
        // Under the lock, so that nobody falls asleep between the look and the call.
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        self.always.store(true, Ordering::Relaxed);
        drop(asked);
        self.awakened.notify_all();
    }

    /// True while somebody wants to know.
    pub(super) fn is_there(&self) -> bool {
        self.is_there_for(*self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_there_for(&self, asked: Option<Instant>) -> bool {
        self.always.load(Ordering::Relaxed) || asked.is_some_and(|asked| asked.elapsed() < INTEREST)
    }

    /// Sleeps until somebody wants to know.
    pub(super) fn wait(&self) {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.awakened.wait_while(asked, |asked| !self.is_there_for(*asked));
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// A connection that has begun or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) connection: Tracked,
    pub(super) ended: bool,
    /// How long it lasted; none for one that has begun, and where its beginning is not known.
    pub(super) lasted: Option<Duration>,
}

/// What is known of connections, to tell how long one lasted and what was missed.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<Tuple, Seen>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    connection: Tracked,
    /// When it began; none if that was before anybody listened.
    began: Option<Timestamp>,
}

impl Known {
    /// Takes what there was when listening began: of these, the beginning is not news.
    pub(super) fn begin(&mut self, all: impl IntoIterator<Item = Tracked>) {
        for connection in all {
            self.remember(connection, None);
        }
    }

    /// Takes a connection that has begun.
    pub(super) fn began(&mut self, connection: Tracked, now: Timestamp) -> Change {
        self.remember(connection, Some(now));
        Change { connection, ended: false, lasted: None }
    }

    /// Takes a connection that has ended.
    pub(super) fn ended(&mut self, connection: Tracked, now: Timestamp) -> Change {
        let seen = self.0.remove(&connection.original);
        let told = connection.began.and_then(|began| Timestamp::from_duration(began.try_into().ok()?).ok());
        let began = told.or_else(|| seen.and_then(|seen| seen.began));
        let lasted = began.and_then(|began| Duration::try_from(now.duration_since(began)).ok());
        Change { connection, ended: true, lasted }
    }

    /// How many more can be remembered.
    pub(super) fn room(&self) -> usize {
        REMEMBERED.saturating_sub(self.0.len())
    }

    /// True for a connection that [`Known::catch_up`] has to hear of: one that is known, or for which there is room yet.
    pub(super) fn asks_for(&self, connection: &Tracked, room: &mut usize) -> bool {
        if self.0.contains_key(&connection.original) {
            return true;
        }
        let has_room = *room > 0;
        *room = room.saturating_sub(1);
        has_room
    }

    /// After a loss: what has begun and ended meanwhile, as far as the connections there are now tell.
    pub(super) fn catch_up(&mut self, listed: &Listed, now: Timestamp) -> Vec<Change> {
        let all: HashMap<Tuple, Tracked> = listed.connections.iter().map(|it| (it.original, *it)).collect();
        // Of what was left off nobody knows whether it is gone.
        let is_gone = |tuple: &Tuple| listed.left_off == 0 && !all.contains_key(tuple);
        let gone: Vec<Tracked> =
            self.0.iter().filter(|(tuple, _)| is_gone(tuple)).map(|(_, seen)| seen.connection).collect();
        // What it carried in the end, nobody knows.
        let mut changes: Vec<Change> =
            gone.into_iter().map(|it| self.ended(Tracked { counts: None, ..it }, now)).collect();
        for (tuple, connection) in all {
            // With a memory that is full, one that is not known need not be new.
            if !self.0.contains_key(&tuple) && self.0.len() < REMEMBERED {
                changes.push(self.began(connection, now));
            }
        }
        changes
    }

    fn remember(&mut self, connection: Tracked, began: Option<Timestamp>) {
        if self.0.len() < REMEMBERED || self.0.contains_key(&connection.original) {
            self.0.insert(connection.original, Seen { connection, began });
        }
    }
}

/// The two that a connection is between, translation of service addresses undone.
pub(super) fn ends(connection: &Tracked) -> [IpAddr; 2] {
    [connection.original.source, connection.answer.source]
}

#[cfg(test)]
pub(super) mod tests {
    use husk_dataplane::connections::Count;

    use super::*;

    pub(in crate::flows) fn tracked(port: u16) -> Tracked {
        let (source, destination) = ("10.0.0.1".parse().unwrap(), "192.0.2.7".parse().unwrap());
        let original = Tuple { source, destination, protocol: 6, ports: Some((port, 443)), icmp: None };
        let answer = Tuple { source: destination, destination: source, ports: Some((443, port)), ..original };
        Tracked { original, answer, counts: None, began: None }
    }

    fn listed(connections: impl IntoIterator<Item = Tracked>) -> Listed {
        Listed { connections: connections.into_iter().collect(), left_off: 0 }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn how_long_a_connection_lasted_is_known_if_its_beginning_was_seen() {
        let mut known = Known::default();
        known.begin([tracked(1)]);
        assert_eq!(known.began(tracked(2), at(10)).lasted, None);
        assert_eq!(known.ended(tracked(1), at(12)).lasted, None, "it began before anybody listened");
        assert_eq!(known.ended(tracked(2), at(13)).lasted, Some(Duration::from_secs(3)));
        let told = Tracked { began: Some(Duration::from_secs(5)), ..tracked(3) };
        assert_eq!(known.ended(told, at(13)).lasted, Some(Duration::from_secs(8)), "the kernel told");
        assert_eq!(known.ended(told, at(4)).lasted, None, "the clock was set back");
    }

    #[test]
    fn what_was_lost_is_found_out_from_what_there_is() {
        let mut known = Known::default();
        known.begin([tracked(1)]);
        known.began(tracked(2), at(10));
        let counted = Tracked { counts: Some((Count::default(), Count::default())), ..tracked(3) };
        let there = listed([tracked(2), counted]);
        let mut changes = known.catch_up(&there, at(20));
        changes.sort_by_key(|change| !change.ended);
        let expected = [
            Change { connection: tracked(1), ended: true, lasted: None },
            Change { connection: counted, ended: false, lasted: None },
        ];
        assert_eq!(changes, expected);
        assert!(known.catch_up(&there, at(21)).is_empty(), "all of that is known now");
        let part = Listed { left_off: 1, ..listed([tracked(2)]) };
        assert!(known.catch_up(&part, at(22)).is_empty(), "what was left off may be there");
    }

    #[test]
    fn memory_is_bounded() {
        let mut known = Known::default();
        let many = (0..=u16::MAX).map(tracked).chain((0..9).map(|port| {
            let mut other = tracked(port);
            other.original.protocol = 17;
            other
        }));
        let many: Vec<Tracked> = many.collect();
        known.begin(many.iter().copied());
        assert_eq!(known.0.len(), REMEMBERED);
        let mut room = known.room();
        let asked: Vec<Tracked> = many.iter().copied().filter(|it| known.asks_for(it, &mut room)).collect();
        assert_eq!(asked.len(), REMEMBERED, "those that are known, and no more");
        for there in [listed(asked), listed(many)] {
            assert!(known.catch_up(&there, at(1)).is_empty(), "what there was no room for is not taken for new");
        }
        let (mut room, few) = (2, Known::default());
        assert_eq!((1..9).filter(|port| few.asks_for(&tracked(*port), &mut room)).count(), 2);
    }

    #[test]
    fn interest_begins_with_a_question() {
        let interest = std::sync::Arc::new(Interest::default());
        assert!(!interest.is_there());
        let theirs = std::sync::Arc::clone(&interest);
        let waiting = std::thread::spawn(move || theirs.wait());
        interest.ask();
        waiting.join().unwrap();
        assert!(interest.is_there());
        let logged = Interest::default();
        logged.last();
        logged.wait();
    }
}
