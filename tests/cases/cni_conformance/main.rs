//! What the CNI specification asks of a plugin, gone through point by point: in every version of the specification that Husk
//! knows, for pods with IPv4, with IPv6 and with both, called as a runtime calls it.
//!
//! [`add`], [`capabilities`], [`del`], [`check`], [`errors`] and [`others`] hold the points of the specification. What needs a
//! host of its own is beside them: [`networks`] side by side, [`chain`] with the reference plugins behind, [`status`] without
//! daemon or addresses, [`deadlines`] with a daemon or a lock that hangs.

mod add;
mod bed;
mod capabilities;
mod chain;
mod check;
mod deadlines;
mod del;
mod errors;
mod networks;
mod others;
mod status;

use anyhow::{Result, ensure};
use husk_tests::Family;
use husk_tests::runtime::{Attachment, Network, VERSIONS};

use bed::Bed;

/// How binding a point is (RFC 2119).
#[derive(Debug, Clone, Copy)]
enum Level {
    Must,
    Should,
}
use Level::{Must, Should};

/// A point of the specification.
struct Point {
    level: Level,
    /// What is asked, in the words of the specification as far as they fit a line.
    text: &'static str,
    /// The first version that asks it.
    since: &'static str,
    holds: fn(&Case<'_>) -> Result<()>,
}

/// One point in one version on one host.
struct Case<'a> {
    bed: &'a Bed,
    network: Network<'a>,
}

impl Case<'_> {
    /// A pod that has been added, alone in its list.
    fn added(&self) -> Result<(husk_tests::Pod, Attachment)> {
        let (pod, mut attachment) = self.bed.sandbox()?;
        self.network.add(&mut attachment)?;
        Ok((pod, attachment))
    }
}

fn checklist() -> impl Iterator<Item = &'static Point> {
    [add::POINTS, capabilities::POINTS, del::POINTS, check::POINTS, errors::POINTS, others::POINTS]
        .into_iter()
        .flatten()
}

fn go_through(families: &[Family]) -> Result<()> {
    let bed = Bed::start(families)?;
    let mut failures = Vec::new();
    for version in VERSIONS {
        for point in checklist().filter(|point| version >= point.since) {
            let case = Case { bed: &bed, network: bed.network(version)? };
            ensure!(case.network.version() == version, "the list offers no {version}");
            if let Err(error) = (point.holds)(&case).and_then(|()| bed.ensure_empty()) {
                failures.push(format!("{version} {families:?} {:?}: {}: {error:#}", point.level, point.text));
                // What one point left must not fail the others.
                bed.network("1.1.0")?.gc(&[]).ok();
            }
        }
    }
    ensure!(failures.is_empty(), "{} points fail:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn ipv4_only() -> Result<()> {
    go_through(&[Family::Ipv4])
}

#[test]
fn ipv6_only() -> Result<()> {
    go_through(&[Family::Ipv6])
}

#[test]
fn dual_stack() -> Result<()> {
    go_through(&Family::ALL)
}
