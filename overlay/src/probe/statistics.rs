//! What is counted on a path.

use std::time::Duration;

use super::ClockSkew;

/// Exchanges that the loss is a share of: the last so many.
const WINDOW: u32 = u128::BITS;

/// Counts of a path.
#[derive(Debug, Clone, Default)]
pub(super) struct Statistics {
    pub(super) sent: u64,
    pub(super) answered: u64,
    /// By the last answer that told the time.
    pub(super) clock_skew: Option<ClockSkew>,
    rtt: Option<Duration>,
    /// The last exchanges, a bit each: set if it failed. The newest is the lowest.
    failures: u128,
    exchanges: u32,
    /// Probes that were lost, or swallowed: not known yet.
    doubtful: u32,
}

impl Statistics {
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    pub(super) fn loss_per_mille(&self) -> Option<u16> {
        let share = (self.failures.count_ones() * 1000).checked_div(self.exchanges)?;
        Some(u16::try_from(share).unwrap_or(1000))
    }

    /// A probe came back after this time.
    pub(super) fn answer(&mut self, after: Duration) {
        self.answered += 1;
        self.rtt = Some(self.rtt.map_or(after, |smoothed| (smoothed * 7 + after) / 8));
    }

    /// An exchange that passes or fails by chance, not by its size.
    pub(super) fn exchange(&mut self, failed: bool) {
        self.failures = self.failures << 1 | u128::from(failed);
        self.exchanges = (self.exchanges + 1).min(WINDOW);
    }

    /// The peer answers again after a time in which nothing was answered, which was no loss on the way.
    pub(super) fn begin_anew(&mut self) {
        (self.failures, self.exchanges) = (0, 0);
    }

    /// A probe was lost, and it may be for its size.
    pub(super) fn doubt(&mut self) {
        self.doubtful += 1;
    }

    /// Whether the doubtful ones were lost by chance is known now.
    pub(super) fn settle(&mut self, by_chance: bool) {
        let doubtful = std::mem::take(&mut self.doubtful);
        for _ in 0..doubtful.min(WINDOW) {
            if by_chance {
                self.exchange(true);
            }
        }
    }
}
