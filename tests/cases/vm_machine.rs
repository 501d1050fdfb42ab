//! The machine that the tier vm runs in is what the other cases take it for: a kernel that has what the host's may lack, all
//! of it loaded by asking for it, and a clock that is right.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use husk_tests::netns::Netns;
use husk_tests::patience;
use husk_tests::scope::Scope;

/// Any key for AES-GCM-128 as the kernel's rfc4106 takes it: 16 bytes and a salt of 4.
const KEY: &str = "0x000102030405060708090a0b0c0d0e0f10111213";

#[test]
fn the_kernel_makes_every_device_and_state_that_the_modes_need() -> Result<()> {
    let scope = Scope::new()?;
    let netns = Netns::create(&scope.name("machine"))?;
    netns.ip_batch(
        "link add wg type wireguard\nlink add esp type xfrm dev lo if_id 7\nlink add vx type vxlan id 7 dstport 4789",
    )?;
    for (algorithm, key) in [("128", KEY.to_owned()), ("256", format!("{KEY}1415161718191a1b1c1d1e1f20212223"))] {
        for (family, source, destination) in [("v4", "192.0.2.1", "192.0.2.2"), ("v6", "2001:db8::1", "2001:db8::2")] {
            for mode in ["tunnel", "transport"] {
                let state = format!(
                    "xfrm state add src {source} dst {destination} proto esp spi 0x{algorithm}{} mode {mode} reqid 1 \
                     replay-window 1024 flag esn aead rfc4106(gcm(aes)) {key} 128",
                    if mode == "tunnel" { 1 } else { 2 },
                );
                netns.ip_batch(&state).with_context(|| format!("AES-GCM-{algorithm} over {family} in {mode} mode"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_clock_is_right() -> Result<()> {
    // The file system is the host's, and so is the time at which it was last written to.
    let known: SystemTime = fs::metadata(std::env::current_exe()?)?.modified()?;
    ensure!(SystemTime::now() > known, "the clock is behind a file that exists: {known:?}");
    let started = (std::time::Instant::now(), SystemTime::now());
    std::thread::sleep(Duration::from_millis(500));
    let (steady, wall) = (started.0.elapsed(), started.1.elapsed().context("the clock went backwards")?);
    ensure!(steady.abs_diff(wall) < Duration::from_millis(50), "{steady:?} by one clock, {wall:?} by the other");
    ensure!(steady < patience(Duration::from_secs(1)), "half a second took {steady:?}");
    Ok(())
}
