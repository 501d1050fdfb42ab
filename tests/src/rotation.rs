//! The keys that hosts have published, and when a rotation of theirs is over. Both are told by the node records, which are
//! what the other hosts go by: for IPsec an epoch is a node's own, for WireGuard a generation is numbered alike on all.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PublicKey;

use crate::cluster::Cluster;
use crate::eventually;
use crate::host::Host;

/// The public keys a host can receive under, by epoch.
///
/// # Errors
/// When it has published none.
pub fn published(cluster: &Cluster, number: usize) -> Result<BTreeMap<u64, PublicKey>> {
    let record = cluster.record(number)?;
    let keys: BTreeMap<_, _> = match &record.esp {
        Some(esp) => esp.epochs.iter().map(|epoch| (epoch.epoch, epoch.public_key)).collect(),
        None => record.wireguard.iter().map(|device| (device.generation, device.public_key)).collect(),
    };
    ensure!(!keys.is_empty(), "host{number} has published no key");
    Ok(keys)
}

/// The newest epoch a host has published.
///
/// # Errors
/// As [`published`].
pub fn newest(cluster: &Cluster, number: usize) -> Result<u64> {
    published(cluster, number)?.into_keys().next_back().context("no epoch")
}

/// Asks a host for a new key, as an operator does.
///
/// # Errors
/// When `huskctl keys rotate` fails.
pub fn request(host: &Host) -> Result<()> {
    let output = host.huskctl(["keys", "rotate"])?;
    let name = host.name();
    ensure!(output.status.success(), "`huskctl keys rotate` on {name}: {}{}", output.stdout, output.stderr);
    Ok(())
}

/// Waits until a host has published a newer epoch than `before` and nothing else any more.
///
/// # Errors
/// When it has not in time; the error tells what its daemon says.
pub fn over(cluster: &Cluster, number: usize, before: u64, limit: Duration) -> Result<()> {
    let done = eventually("a rotation to be over", limit, || {
        let keys = published(cluster, number)?;
        Ok(keys.len() == 1 && keys.keys().all(|epoch| *epoch > before))
    });
    done.with_context(|| {
        let said = cluster.hosts().iter().map(|host| {
            let said = host.huskctl(["keys", "status"]).map(|output| output.stdout + &output.stderr);
            format!("`huskctl keys status` on {} says: {}", host.name(), said.unwrap_or_default())
        });
        format!("host{number}, beyond epoch {before}; {}", said.collect::<Vec<_>>().join("\n"))
    })
}

/// Rotates the keys of these hosts at once and waits until all is over. A WireGuard generation that another host has begun
/// counts.
///
/// # Errors
/// When a host does not take the request, or does not come to an end in time.
pub fn rotate(cluster: &Cluster, numbers: &[usize], limit: Duration) -> Result<()> {
    let before = numbers.iter().map(|number| newest(cluster, *number)).collect::<Result<Vec<_>>>()?;
    for number in numbers {
        request(cluster.host(*number))?;
    }
    numbers.iter().zip(before).try_for_each(|(number, before)| over(cluster, *number, before, limit))
}
