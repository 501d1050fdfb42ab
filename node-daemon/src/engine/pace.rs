//! How often the loop looks at what the kernel reports no event for, and how much it says about the same thing.
//!
//! A difference that a look finds makes a pass at once. One that passes do not mend, or that somebody else makes again and
//! again, would make passes without end: so the looks become rarer while passes that nobody else asked for come to the same.

use std::time::Duration;

/// Shortest time between two looks at WireGuard peers.
const SHORTEST: Duration = Duration::from_millis(400);

/// Shortest time between two looks while a rotation of keys waits for counters.
const ATTENTIVE: Duration = Duration::from_millis(200);

/// Longest time that fruitless passes put off the next look by; passes for other reasons come all the same.
const LONGEST: Duration = Duration::from_secs(30);

/// So many passes of the same kind that mended what they found are taken for coincidence. Only then is somebody thought to
/// undo them for good.
const COINCIDENCES: u32 = 8;

/// Why there is a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Cause {
    /// Something happened, or somebody asked.
    #[default]
    Event,
    /// A look found a difference, or time went by.
    OwnAccord,
}

/// The pace of a loop.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// How long a look takes: falls at once and rises slowly, since a busy machine makes single looks slow, never fast.
    look: Duration,
    /// Digest of what the last pass changed and could not change; none when there was nothing to do.
    outcome: Option<u64>,
    /// Passes of the loop's own accord that came to the same as the one before, in a row.
    repeated: u32,
    /// The last pass left something as it should not be.
    failing: bool,
    cause: Cause,
}

impl Pace {
    /// Time from now to the next look. A big mesh takes longer to look at, and is looked at less often: at most a twentieth
    /// of a core. Only what the look itself took counts; a pass may have waited for a process to start.
    pub(super) fn interval(&self, attentive: bool) -> Duration {
        let shortest = if attentive { ATTENTIVE } else { SHORTEST };
        let usual = shortest.max(self.look.saturating_mul(20));
        usual.max(usual.saturating_mul(2_u32.saturating_pow(self.futile())).min(LONGEST))
    }

    /// Passes in a row that there was no point in.
    fn futile(&self) -> u32 {
        if self.failing { self.repeated } else { self.repeated.saturating_sub(COINCIDENCES) }
    }

    /// A look found everything as it should be.
    pub(super) fn all_is_well(&mut self, took: Duration) {
        self.look = if took < self.look { took } else { self.look + (took - self.look) / 4 };
        self.repeated = 0;
    }

    /// A pass begins.
    pub(super) fn begin(&mut self, cause: Cause) {
        self.cause = cause;
    }

    /// A pass has ended; true if there was no point in it: it came to the same as those before, and nothing had happened in
    /// between.
    pub(super) fn ended(&mut self, outcome: Option<u64>, failing: bool) -> bool {
        self.failing = failing;
        let cause = std::mem::take(&mut self.cause);
        let same = outcome.is_some() && outcome == self.outcome;
        self.outcome = outcome;
        match (same, cause) {
            (true, Cause::OwnAccord) => self.repeated = self.repeated.saturating_add(1),
            // Neither mended nor new: who has tried in vain for long does not begin anew for an event about something else.
            (true, Cause::Event) => {}
            (false, _) => self.repeated = 0,
        }
        cause == Cause::OwnAccord && self.futile() > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(pace: &mut Pace, cause: Cause, outcome: Option<u64>) -> bool {
        pace.begin(cause);
        pace.ended(outcome, true)
    }

    #[test]
    fn what_cannot_be_mended_is_looked_at_ever_more_rarely() {
        let mut pace = Pace::default();
        let mut intervals = Vec::new();
        for _ in 0..10 {
            pass(&mut pace, Cause::OwnAccord, Some(7));
            intervals.push(pace.interval(false).as_millis());
        }
        assert_eq!(intervals, [400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000, 30_000]);
        pass(&mut pace, Cause::Event, Some(7));
        assert_eq!(pace.interval(false), LONGEST);
        // Something else is wrong now.
        pass(&mut pace, Cause::OwnAccord, Some(8));
        assert_eq!(pace.interval(false), SHORTEST);
    }

    #[test]
    fn who_mends_again_and_again_is_patient_for_a_while() {
        let mut pace = Pace::default();
        for _ in 0..=COINCIDENCES {
            assert_eq!(pace.interval(false), SHORTEST);
            pace.begin(Cause::OwnAccord);
            pace.ended(Some(7), false);
        }
        for _ in 0..20 {
            pace.begin(Cause::OwnAccord);
            pace.ended(Some(7), false);
        }
        assert_eq!(pace.interval(false), LONGEST);
    }

    #[test]
    fn a_mended_difference_starts_anew() {
        let mut pace = Pace::default();
        for _ in 0..3 {
            pass(&mut pace, Cause::OwnAccord, Some(7));
        }
        pass(&mut pace, Cause::OwnAccord, None);
        assert_eq!(pace.interval(false), SHORTEST);
        for _ in 0..3 {
            pass(&mut pace, Cause::OwnAccord, Some(7));
            pace.all_is_well(Duration::from_millis(1));
        }
        assert_eq!(pace.interval(false), SHORTEST);
    }

    #[test]
    fn only_repetitions_without_an_event_are_said_quietly() {
        let mut pace = Pace::default();
        assert!(!pass(&mut pace, Cause::OwnAccord, Some(7)));
        assert!(pass(&mut pace, Cause::OwnAccord, Some(7)));
        assert!(!pass(&mut pace, Cause::Event, Some(7)));
        assert!(!pass(&mut pace, Cause::OwnAccord, None));
        assert!(!pass(&mut pace, Cause::OwnAccord, None));
    }

    #[test]
    fn a_look_that_takes_long_is_rare() {
        let mut pace = Pace::default();
        assert_eq!(pace.interval(true), ATTENTIVE);
        pace.all_is_well(Duration::from_millis(80));
        assert_eq!(pace.interval(false), SHORTEST, "one slow look says nothing");
        for _ in 0..50 {
            pace.all_is_well(Duration::from_secs(3));
        }
        assert!(pace.interval(false) > Duration::from_secs(55), "{:?}", pace.interval(false));
        pace.all_is_well(Duration::from_millis(100));
        assert_eq!(pace.interval(false), Duration::from_secs(2));
    }
}
