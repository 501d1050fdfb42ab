//! How far a peer's wall clock is from the own one, from the time in an answer: it was read after the probe left and before the
//! answer came, so the middle of the two is wrong by at most half the round trip.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a peer's wall clock differs from the own one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ClockSkew {
    /// Milliseconds by which the peer's clock is ahead; negative if it is behind.
    pub ahead: i64,
    /// Milliseconds by which that may be wrong: half the round trip, rounded up.
    pub within: u64,
}

impl ClockSkew {
    /// From the time in an answer (`theirs`), the own wall clock when it came (`ours`), both as time since 1970, and the round trip.
    #[must_use]
    pub fn new(theirs: Duration, ours: Duration, rtt: Duration) -> Self {
        // A lying answer says any time at all; what does not fit is cut.
        let milliseconds = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let half = u64::try_from((rtt / 2).as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
        Self { ahead: milliseconds(theirs).saturating_sub(milliseconds(ours.saturating_sub(rtt / 2))), within: half }
    }

    /// Milliseconds by which the two clocks differ at least.
    #[must_use]
    pub fn at_least(&self) -> u64 {
        self.ahead.unsigned_abs().saturating_sub(self.within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn the_true_difference_is_always_within_what_is_told() {
        const NOW: u64 = 1_800_000_000_000;
        for ahead in [-90_000_i64, -1, 0, 1, 3_600_000] {
            // However the round trip is shared between the way there and the way back.
            for (there, back) in [(0, 0), (0, 80), (80, 0), (7, 8)] {
                let answered = NOW + there;
                let theirs = ms(answered.checked_add_signed(ahead).unwrap());
                let skew = ClockSkew::new(theirs, ms(answered + back), ms(there + back));
                assert!(skew.ahead.abs_diff(ahead) <= skew.within, "{ahead} {there} {back}: {skew:?}");
                assert!(skew.at_least() <= ahead.unsigned_abs(), "{skew:?}");
            }
        }
    }

    #[test]
    fn any_time_can_be_told() {
        let far = Duration::from_micros(u64::MAX);
        assert!(ClockSkew::new(far, Duration::ZERO, ms(1)).at_least() > 1_000_000);
        assert!(ClockSkew::new(Duration::MAX, Duration::ZERO, Duration::ZERO).ahead == i64::MAX);
        assert!(ClockSkew::new(Duration::ZERO, Duration::MAX, Duration::MAX).ahead <= 0);
    }
}
