//! Rotation of IPsec keys under traffic.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use husk_tests::kernel::{self, Part};
use husk_tests::{Cluster, Family, Mode};

#[path = "rotation/story.rs"]
mod story;

use story::{MORE_STALL, Rounds};

/// Traffic is to notice rotations, not what else this machine does.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn ipsec_keys_change_unnoticed() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    kernel::require(&[Part::Esp])?;
    story::tell(Cluster::builder().mode(Mode::Ipsec), Rounds { in_turns: 2, at_once: 8, more_stall: MORE_STALL })
}

#[test]
fn vxlan_ipsec_keys_change_unnoticed() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    kernel::require(&[Part::Esp])?;
    story::tell(
        Cluster::builder().mode(Mode::VxlanIpsec).underlay(Family::Ipv6),
        Rounds { in_turns: 1, at_once: 9, more_stall: MORE_STALL },
    )
}
