//! The search for the largest packet that passes: many sizes at once, round by round, until one byte is between what passes
//! and what does not.
//!
//! An answer is a proof, and proves all smaller sizes with it. A missing answer is none: every size is sent twice in a round,
//! and what is missed twice counts as too large for the time being. If a round errs there, the search ends too low; the next
//! byte above is then doubted thoroughly ([`super::suspicion`]), is answered, and the search goes on from there.

use std::collections::{BTreeSet, VecDeque};

use super::wire::SMALL;

/// Sizes of a round: 64 thousand sizes take five rounds, the 160 between IPv6's least and an Ethernet's most take two.
const WIDTH: u32 = 12;

/// How often a size is sent in a round.
const COPIES: usize = 2;

/// Rounds in a row without any answer that make a path unreachable.
const SILENT: u8 = 2;

/// Rounds after which it is given up: the path changes faster than it can be measured.
const MOST: u8 = 32;

/// What a search has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is more to send, or outcomes are awaited.
    Going,
    /// One byte is between what passes and what does not.
    Narrow,
    /// Nothing passes.
    Silent,
    /// It leads nowhere.
    Undecided,
}

/// A search.
#[derive(Debug)]
pub(super) struct Search {
    /// Bytes of the largest packet that was answered; one less than the floor if none of the floor's size was.
    pub(super) low: u32,
    /// Bytes of the smallest packet that counts as too large; one more than promised if none does.
    pub(super) high: u32,
    /// The size that the search began with, if it did with a guess.
    pub(super) guess: Option<u32>,
    round: BTreeSet<u32>,
    queue: VecDeque<u32>,
    open: usize,
    heard: bool,
    silent: u8,
    rounds: u8,
}

impl Search {
    /// Begins between two sizes. `guess` is what passes elsewhere: often the same router is in the way.
    pub(super) fn new(low: u32, high: u32, guess: Option<u32>) -> Self {
        let round = BTreeSet::new();
        let guess = guess.filter(|guess| (low + 1..high).contains(guess));
        let queue = VecDeque::new();
        let mut search = Self { low, high, guess, round, queue, open: 0, heard: false, silent: 0, rounds: 0 };
        match guess {
            Some(guess) => search.send([guess, guess + 1].into_iter().filter(|size| *size < high).collect()),
            None => search.send(search.spread()),
        }
        search
    }

    /// The next size to send; none while outcomes are awaited.
    pub(super) fn fire(&mut self) -> Option<u32> {
        let size = self.queue.pop_front()?;
        self.open += 1;
        Some(size)
    }

    /// Something is left to send.
    pub(super) fn is_due(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The outcome of a probe.
    pub(super) fn outcome(&mut self, size: u32, answered: bool) -> Progress {
        self.open = self.open.saturating_sub(1);
        if answered {
            self.heard = true;
            if size != SMALL {
                self.low = self.low.max(size);
                let low = self.low;
                self.queue.retain(|size| *size > low || *size == SMALL);
            }
        }
        if self.open > 0 || !self.queue.is_empty() { Progress::Going } else { self.end_round() }
    }

    fn end_round(&mut self) -> Progress {
        self.rounds += 1;
        self.silent = if self.heard { 0 } else { self.silent + 1 };
        if self.silent >= SILENT {
            return Progress::Silent;
        }
        if self.heard {
            // An answer above what was believed too large refutes that.
            self.high = self.round.range(self.low + 1..).next().map_or(self.high, |missed| self.high.min(*missed));
        }
        if self.high <= self.low + 1 {
            return Progress::Narrow;
        }
        if self.rounds >= MOST {
            return Progress::Undecided;
        }
        self.send(self.spread());
        Progress::Going
    }

    /// Sizes between the bounds at equal distances, the bounds' neighbours included.
    fn spread(&self) -> BTreeSet<u32> {
        let (first, last) = (self.low + 1, self.high.saturating_sub(1).max(self.low + 1));
        let steps = WIDTH.min(last - first).max(1);
        let at = |step: u32| {
            first + u32::try_from(u64::from(last - first) * u64::from(step) / u64::from(steps)).unwrap_or(0)
        };
        (0..=steps).map(at).collect()
    }

    fn send(&mut self, round: BTreeSet<u32>) {
        self.heard = false;
        for _ in 0..COPIES {
            self.queue.push_back(SMALL);
            // The largest first: the first answer spares the smaller ones.
            self.queue.extend(round.iter().rev());
        }
        self.round = round;
    }
}
