//! How fast probes may be sent: a bucket of tokens, counted in time.

use std::time::Duration;

use super::PROBES_PER_SECOND;
use super::sessions::{EXCHANGE, HANDSHAKE};

/// Probes that may be sent at once after a quiet time.
const BURST: u32 = 4;

/// Time that earns one probe. What is saved up counts among the probes of a second, too.
const COST: Duration = Duration::from_nanos(1_000_000_000 / (PROBES_PER_SECOND - BURST) as u64);

/// What was earned and not spent.
#[derive(Debug, Default)]
pub(super) struct Pace {
    credit: Duration,
    /// What handshakes have cost, which is earned before the next probe.
    debt: Duration,
    credited: Duration,
}

impl Pace {
    /// Time has passed.
    pub(super) fn earn(&mut self, now: Duration) {
        let earned = now.saturating_sub(self.credited);
        let paid = earned.min(self.debt);
        self.debt -= paid;
        self.credit = (COST * BURST).min(self.credit + (earned - paid));
        self.credited = self.credited.max(now);
    }

    /// Whether a probe may be sent.
    pub(super) fn affords(&self) -> bool {
        self.debt.is_zero() && self.credit >= COST
    }

    /// A probe was sent, with a handshake before it or without.
    pub(super) fn spend(&mut self, handshake: bool) {
        self.credit = self.credit.saturating_sub(COST);
        if handshake {
            self.debt += COST * HANDSHAKE / EXCHANGE;
        }
    }

    /// When the next probe may be sent, as time since boot.
    pub(super) fn next(&self) -> Duration {
        self.credited + self.debt + COST.saturating_sub(self.credit)
    }
}
