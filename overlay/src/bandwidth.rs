//! Limits on what a pod receives and sends, as a container runtime asks for them.
//!
//! The conventions of CNI (`bandwidth` in CONVENTIONS.md of containernetworking/cni) count rates in bits per second and bursts
//! in bits. A limit is a token bucket: `burst` bits may pass at once, and the bucket fills at `rate`.

use serde::{Deserialize, Serialize};

/// Slowest and fastest rate in bits per second: what Kubernetes takes for the annotations `kubernetes.io/ingress-bandwidth`
/// and `kubernetes.io/egress-bandwidth` (`minRsrc` and `maxRsrc` in pkg/util/bandwidth/utils.go).
pub const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// A burst in bits from which on it stands for "none was asked for". Kubernetes' annotations know rates only, and runtimes
/// fill in what they take for no limit: the kubelet's own CNI client 2³¹ − 1 (`math.MaxInt32` in
/// pkg/kubelet/dockershim/network/cni/cni.go), containerd 2³² − 1 (`math.MaxUint32` in its CRI service), CRI-O eight times
/// that. Taken at its word, a pod limited to 10 Mbit/s could send 256 MiB before the limit was felt.
pub const NO_BURST: u64 = i32::MAX as u64;

/// Smallest burst in bytes: the largest frame an interface of MTU 65,535 has. The kernel drops what exceeds the burst, so that
/// a smaller one would cut a pod off; and the MTU of a pod may change while it lives.
pub const LEAST_BURST: u64 = 65_535 + 14;

/// Share of a second whose traffic may pass at once where no burst was asked for: a tenth.
const DEFAULT_BURST_FRACTION: u64 = 10;

/// Limits of one attachment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// What the pod receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// What the pod sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

/// A limit in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "Written")]
pub struct Limit {
    /// Bits per second.
    rate: u64,
    /// Bits.
    burst: u64,
}

/// A limit as it is written, before it is checked.
#[derive(Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
struct Written {
    rate: u64,
    burst: u64,
}

/// A limit that no interface can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// The rate is outside [`RATES`].
    #[error("a rate must lie between {} and {} bits per second", RATES.start(), RATES.end())]
    Rate,
}

impl Limit {
    /// A limit to `rate` bits per second. A burst, in bits, of 0 or of at least [`NO_BURST`] is one that nobody asked for; then
    /// a tenth of a second's traffic may pass at once. Less than [`LEAST_BURST`] is raised to that.
    ///
    /// # Errors
    /// [`LimitError::Rate`].
    pub fn new(rate: u64, burst: u64) -> Result<Self, LimitError> {
        if !RATES.contains(&rate) {
            return Err(LimitError::Rate);
        }
        let burst = if (1..NO_BURST).contains(&burst) { burst } else { rate / DEFAULT_BURST_FRACTION };
        // The kernel counts it in 32 bits of bytes (`TCA_TBF_BURST`).
        let bytes = (burst / 8).clamp(LEAST_BURST, u32::MAX.into());
        Ok(Self { rate, burst: bytes * 8 })
    }

    /// Bits per second.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Bytes that may pass at once.
    #[must_use]
    pub fn burst_bytes(&self) -> u32 {
        u32::try_from(self.burst / 8).unwrap_or(u32::MAX)
    }
}

impl TryFrom<Written> for Limit {
    type Error = LimitError;

    /// What was written was complete: a large burst is meant.
    fn try_from(Written { rate, burst }: Written) -> Result<Self, LimitError> {
        let limit = Self::new(rate, NO_BURST)?;
        let bytes = (burst / 8).clamp(LEAST_BURST, u32::MAX.into());
        Ok(Self { burst: bytes * 8, ..limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_runtimes_send_for_no_burst_becomes_a_tenth_of_a_second() {
        for none in [0, NO_BURST, u32::MAX.into(), u64::MAX] {
            assert_eq!(Limit::new(10_000_000, none).unwrap().burst_bytes(), 125_000, "{none}");
        }
        assert_eq!(Limit::new(10_000_000, 8_000_000).unwrap().burst_bytes(), 1_000_000);
    }

    #[test]
    fn a_burst_holds_the_largest_frame() {
        assert_eq!(Limit::new(1_000, 0).unwrap().burst_bytes(), 65_549);
        assert_eq!(Limit::new(1_000_000, 12_000).unwrap().burst_bytes(), 65_549);
    }

    #[test]
    fn rates_are_those_of_kubernetes() {
        for rate in [0, 999, 1_000_000_000_000_001, u64::MAX] {
            assert_eq!(Limit::new(rate, 0), Err(LimitError::Rate), "{rate}");
        }
        assert_eq!(Limit::new(1_000_000_000_000_000, 0).unwrap().burst_bytes(), u32::MAX);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(rate in RATES, burst in any::<u64>()) {
            let bandwidth = Bandwidth { ingress: Some(Limit::new(rate, burst).unwrap()), egress: None };
            let text = serde_json::to_string(&bandwidth).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bandwidth>(&text).unwrap(), bandwidth);
        }
    }
}
