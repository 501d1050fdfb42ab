//! Four figures that say enough of many: how most are, and how the worst is.

/// Figures over a number of values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Distribution {
    min: f64,
    median: f64,
    p99: f64,
    max: f64,
}

impl Distribution {
    /// Of these values; none of no values. Values that are no numbers do not count.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.filter(|value| !value.is_nan()).collect();
        values.sort_by(f64::total_cmp);
        // The value that at least so many per cent of all do not exceed (nearest rank).
        let rank = |per_cent: usize| values.get((values.len() * per_cent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { min: *values.first()?, median: rank(50)?, p99: rank(99)?, max: *values.last()? })
    }

    /// By name.
    pub(super) fn figures(&self) -> [(&'static str, f64); 4] {
        [("min", self.min), ("median", self.median), ("p99", self.p99), ("max", self.max)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_values_that_occur() {
        assert_eq!(Distribution::of(std::iter::empty()), None);
        let one = Distribution::of([7.0].into_iter()).unwrap();
        assert_eq!(one.figures().map(|(_, value)| value), [7.0; 4]);
        let many = Distribution::of((1..=1000).rev().map(f64::from).chain([f64::NAN])).unwrap();
        assert_eq!(many, Distribution { min: 1.0, median: 500.0, p99: 990.0, max: 1000.0 });
    }
}
