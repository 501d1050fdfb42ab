//! Throughput of the overlay beside that of the bare underlay. Machines are noisy: both are measured in turns, and the
//! median counts. Offloads are on, as they are on machines that carry much; the capture is over by then.

use std::time::Duration;

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;

use super::Plan;
use super::progress::Step;
use super::report::Throughput;
use crate::probe::tcp;
use crate::{Cluster, Pod};

/// Measurements of each kind.
const ROUNDS: usize = 3;

/// How long one measurement sends.
const TIME: Duration = Duration::from_millis(800);

/// Measures from the first pod of the first host to the first pod of the second, and from host to host.
pub(super) fn measure(plan: &Plan, cluster: &Cluster, pods: &[(usize, Pod)], step: &Step) -> Result<Throughput> {
    let first_of = |host| pods.iter().find(|(number, _)| *number == host).map(|(_, pod)| pod).context("no pod");
    let (from, to) = (first_of(1)?, first_of(2)?);
    let (one, two) = (cluster.host(1), cluster.host(2));
    let (mut overlay, mut underlay) = (Vec::new(), Vec::new());
    cluster.set_offload(true)?;
    for round in 1..=ROUNDS {
        step.show(&format!("pod to pod, {round} of {ROUNDS}"));
        overlay.push(tcp::throughput(from.netns(), to.netns(), to.address(Family::Ipv4)?, TIME)?);
        step.show(&format!("host to host, {round} of {ROUNDS}"));
        underlay.push(tcp::throughput(one.netns(), two.netns(), two.address(plan.underlay)?, TIME)?);
    }
    cluster.set_offload(false)?;
    let (overlay_median, underlay_median) = (median(&overlay), median(&underlay));
    Ok(Throughput {
        from: from.name().to_owned(),
        to: to.name().to_owned(),
        overlay_bits_per_second: overlay_median,
        underlay_bits_per_second: underlay_median,
        ratio: overlay_median / underlay_median,
        overlay_rounds: overlay,
        underlay_rounds: underlay,
    })
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len() / 2, sorted.len() % 2) {
        (0, 0) => 0.0,
        (middle, 0) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (middle, _) => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_is_in_the_middle() {
        for (values, expected) in [(vec![], 0.0), (vec![3.0], 3.0), (vec![4.0, 1.0], 2.5), (vec![9.0, 1.0, 2.0], 2.0)] {
            assert!((super::median(&values) - expected).abs() < f64::EPSILON, "{values:?}");
        }
    }
}
