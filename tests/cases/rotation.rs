//! Rotation of WireGuard keys under traffic, with the device this kernel offers: in the tier vm that is the kernel's.

use anyhow::Result;
use husk_tests::{Cluster, Family, patience};

#[path = "rotation/story.rs"]
mod story;

use story::{MORE_STALL, Rounds};

/// Ten generations: of two that two hosts ask for at once, the second may be another one.
const TEN: Rounds = Rounds { in_turns: 3, at_once: 4, more_stall: MORE_STALL };

#[test]
fn wireguard_keys_change_unnoticed() -> Result<()> {
    story::tell(Cluster::builder(), TEN)
}

#[test]
fn wireguard_keys_change_unnoticed_over_ipv6_in_userspace() -> Result<()> {
    // An emulated processor encrypts as slowly as it does everything else.
    let rounds = Rounds { in_turns: 1, at_once: 0, more_stall: patience(MORE_STALL) };
    story::tell(Cluster::builder().underlay(Family::Ipv6).userspace_wireguard(), rounds)
}
