//! Numbers that look random: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). Its
//! numbers do not repeat before all of them have occurred. Whoever sees some can compute the others; probes travel inside the
//! tunnel, whose business it is that only peers see them.

use std::time::Duration;

/// A source of numbers.
#[derive(Debug)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Any duration up to this one, in steps of a 1024th.
    pub(super) fn up_to(&mut self, duration: Duration) -> Duration {
        let steps = u32::try_from(self.number() % 1025).unwrap_or(0);
        duration / 1024 * steps
    }

    /// Any duration between four fifths of this one and all of it, so that what began together does not go on together.
    pub(super) fn about(&mut self, duration: Duration) -> Duration {
        duration - self.up_to(duration / 5)
    }
}
