//! A mesh whose manifests others write too, and what its hosts say of that.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::manifest::Manifest;
use husk_overlay::record::NodeRecord;
use husk_tests::steady::{Tunnel, issues};
use husk_tests::{Cluster, Host, Pod, eventually};

use crate::{NEXT_TICK, SOON};

/// How long an answer that is dropped is waited for.
const DROPPED: Duration = Duration::from_millis(200);

/// A mesh of three, of which the third joined last, and one pod on each host.
pub(crate) struct Mesh {
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) c: Pod,
    pub(crate) cluster: Cluster,
}

impl Mesh {
    pub(crate) fn start() -> Result<Self> {
        let mut cluster = Cluster::builder().hosts(2).start()?;
        let third = cluster.add_host()?;
        join(cluster.host(third))?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        let mesh = Self { a, b, c: cluster.host(3).add_pod("c")?, cluster };
        mesh.third_is_reached("at the start")?;
        Ok(mesh)
    }

    pub(crate) fn host(&self, number: usize) -> &Host {
        self.cluster.host(number)
    }

    pub(crate) fn third_is_reached(&self, when: &str) -> Result<()> {
        all_reached(&self.a, &self.c, when)?;
        all_reached(&self.c, &self.b, when)
    }

    pub(crate) fn third_is_not_reached(&self) -> Result<()> {
        eventually("host1 to drop the thief's packets", SOON, || Ok(!self.a.reaches(&self.c, DROPPED)?))
    }

    pub(crate) fn record(&self, number: usize) -> Result<NodeRecord> {
        self.cluster.record(number)
    }
}

pub(crate) fn join(host: &Host) -> Result<()> {
    host.start()?;
    host.wait_ready()
}

pub(crate) fn all_reached(from: &Pod, to: &Pod, when: &str) -> Result<()> {
    from.await_answer_of(to, SOON).with_context(|| when.to_owned())
}

/// Puts a manifest in place in one step, as a careful writer does.
pub(crate) fn put(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_file_name(".being-written");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path).with_context(|| format!("writing {}", path.display()))
}

pub(crate) fn put_record(path: &Path, record: &NodeRecord) -> Result<()> {
    put(path, &Manifest::Node(record.clone()).to_yaml())
}

/// Waits until these hosts report an issue of this kind about this subject, whose message has `part`.
pub(crate) fn reported(hosts: &[&Host], kind: &str, subject: &str, part: &str) -> Result<()> {
    for host in hosts {
        let mut last = Vec::new();
        let found = eventually("the issue", SOON, || {
            last = issues(host)?;
            Ok(last.iter().any(|(it, about, why)| it == kind && about.contains(subject) && why.contains(part)))
        });
        found.with_context(|| format!("{} reports no {kind} of {subject} with {part:?}: {last:?}", host.name()))?;
    }
    Ok(())
}

/// Waits until these hosts report nothing of what is published; a host without a daemon is missed as long as it has none.
pub(crate) fn nothing_reported(hosts: &[&Host]) -> Result<()> {
    for host in hosts {
        let mut last = Vec::new();
        let found = eventually("an end of issues", NEXT_TICK, || {
            last = issues(host)?;
            last.retain(|(kind, ..)| kind != "PeerSilent");
            Ok(last.is_empty())
        });
        found.with_context(|| format!("{} still reports {last:?}", host.name()))?;
    }
    Ok(())
}

/// The peers of a host, as `huskctl peers` lists them.
pub(crate) fn peer_names(host: &Host) -> Result<Vec<String>> {
    let peers = host.huskctl_json(["peers"])?;
    let rows = peers.as_array().context("peers are no list")?.iter();
    Ok(rows.filter_map(|row| row["node"].as_str().map(str::to_owned)).collect())
}

/// That a host kept its device and, with the peer of that key, its session.
pub(crate) fn is_untouched(before: &Tunnel, after: &Tunnel, with: &str) -> Result<()> {
    ensure!(before.index == after.index, "the device was made anew: {before:?}, {after:?}");
    ensure!(before.handshakes.get(with) == after.handshakes.get(with), "the session is another: {before:?}, {after:?}");
    Ok(())
}

pub(crate) fn key_of(record: &NodeRecord) -> String {
    record.wireguard.iter().map(|device| device.public_key.to_string()).collect()
}
