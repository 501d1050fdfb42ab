//! When a size counts as swallowed: the only decision of probing that lowers an MTU.
//!
//! A probe that nobody answered means little: networks lose packets at random, in bursts, and for as long as a link is down.
//! What only a black hole does is to lose the large and not the small. A size in doubt is therefore sent in *pairs*: a probe
//! of that size, and at once a small one. A pair is
//!
//! - *evidence* if the small probe was answered and the large one was not,
//! - nothing if neither was: the path was down or crowded, whatever the sizes,
//! - the end of the doubt if the large one was answered, whenever that is.
//!
//! A limit takes two such verdicts (the second one may follow a little later where a size that passes elsewhere is answered here
//! after the first: that much is used at once), of six pieces of evidence each: one against the size that is promised, which begins a
//! search, and one against one byte more than what the search found to pass, which ends it. Both speak against what is
//! promised, since what swallows a size swallows every larger one. How likely are they without a black hole? Let each
//! exchange fail with probability p, one like the other, large or small. Of the pairs that mean something, p (1 - p) of
//! (1 - p²) are evidence, that is p / (1 + p), and the others end the doubt:
//!
//! | lost each way | p | p / (1 + p) | one verdict: to the power of 6 | both: of 12 |
//! |---|---|---|---|---|
//! | 1 % | 0.0199 | 0.0195 | 5.5e-11 | 3.0e-21 |
//! | 5 % | 0.0975 | 0.0888 | 4.9e-7 | 2.4e-13 |
//! | 10 % | 0.19 | 0.160 | 1.7e-5 | 2.8e-10 |
//!
//! Doubts begin with a full-sized probe that was lost, at most [`PROBES_PER_SECOND`](super::PROBES_PER_SECOND) × p times per
//! second on a whole node: one that does nothing else takes 5 % of loss for a black hole once in 34,000 years
//! (1 / (40 × 0.0975 × 2.4e-13) seconds), and 10 % once in 15 years. It would take that back within half a minute, too, since
//! limits are tried again.

use std::time::Duration;

/// Pairs that have to be evidence for a verdict.
const NEEDED: usize = 6;

/// Time between two pairs.
const PACE: Duration = Duration::from_millis(250);

/// Pairs in a row without any answer that make a path unreachable.
const SILENT: usize = 4;

/// Pairs after which it is given up: the path is too bad to tell anything.
const MOST: usize = 48;

/// What became of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Open,
    Answered,
    Missed,
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    large: Outcome,
    small: Outcome,
}

impl Pair {
    fn is_open(self) -> bool {
        self.large == Outcome::Open || self.small == Outcome::Open
    }

    fn is_evidence(self) -> bool {
        self.large == Outcome::Missed && self.small == Outcome::Answered
    }
}

/// What is to be thought of the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// Not known yet.
    Open,
    /// It is swallowed, and smaller ones are not.
    Swallowed,
    /// Nothing passes.
    Silent,
    /// Too few answers to tell.
    Undecided,
}

/// A size in doubt.
#[derive(Debug)]
pub(super) struct Suspicion {
    /// Bytes of the packets in doubt.
    pub(super) size: u32,
    pairs: Vec<Pair>,
    /// The small probe of the last pair is not sent yet.
    half: bool,
    next: Duration,
}

impl Suspicion {
    /// Begins to doubt.
    pub(super) fn new(size: u32, now: Duration) -> Self {
        Self { size, pairs: Vec::new(), half: false, next: now }
    }

    /// When to send the next probe; none while outcomes are awaited.
    pub(super) fn due(&self) -> Option<Duration> {
        let hopeful = self.count(Pair::is_evidence) + self.count(Pair::is_open);
        let enough = hopeful >= NEEDED || self.pairs.len() >= MOST;
        (self.half || !enough).then_some(self.next)
    }

    /// The next probe: which pair it belongs to, and whether it is the small one.
    pub(super) fn fire(&mut self, now: Duration) -> (usize, bool) {
        if self.half {
            self.half = false;
            self.next = now + PACE;
        } else {
            self.pairs.push(Pair { large: Outcome::Open, small: Outcome::Open });
            self.half = true;
            self.next = now;
        }
        (self.pairs.len() - 1, !self.half)
    }

    /// The outcome of a probe; an answer to a large one ends the doubt and is not told here.
    pub(super) fn outcome(&mut self, pair: usize, small: bool, answered: bool) {
        let outcome = if answered { Outcome::Answered } else { Outcome::Missed };
        let Some(pair) = self.pairs.get_mut(pair) else { return };
        if small { pair.small = outcome } else { pair.large = outcome }
    }

    pub(super) fn judgement(&self) -> Judgement {
        let closed = || self.pairs.iter().filter(|pair| !pair.is_open());
        let silent = closed().rev().take_while(|pair| pair.small == Outcome::Missed).count();
        if self.count(Pair::is_evidence) >= NEEDED {
            Judgement::Swallowed
        } else if silent >= SILENT {
            Judgement::Silent
        } else if self.pairs.len() >= MOST && self.count(Pair::is_open) == 0 {
            Judgement::Undecided
        } else {
            Judgement::Open
        }
    }

    fn count(&self, kind: impl Fn(Pair) -> bool) -> usize {
        self.pairs.iter().filter(|pair| kind(**pair)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pairs_whose_small_probe_was_answered_are_evidence() {
        let mut suspicion = Suspicion::new(1440, Duration::ZERO);
        for round in 1..=NEEDED {
            for small_answered in [false, false, true] {
                assert_eq!(suspicion.judgement(), Judgement::Open, "round {round}");
                let (pair, _) = suspicion.fire(Duration::ZERO);
                assert_eq!(suspicion.fire(Duration::ZERO), (pair, true));
                suspicion.outcome(pair, false, false);
                suspicion.outcome(pair, true, small_answered);
            }
        }
        assert_eq!(suspicion.judgement(), Judgement::Swallowed);
    }
}
