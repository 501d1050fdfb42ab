//! Words that several checks use.

use std::fmt::Display;

/// Names that are told; a cluster may have thousands.
const TOLD: usize = 5;

/// Findings of one kind that are told one by one.
pub(super) const MOST_FINDINGS: usize = 10;

/// The first of many names, and how many more there are.
pub(super) fn several<T: Display>(names: &[T]) -> String {
    let told: Vec<String> = names.iter().take(TOLD).map(ToString::to_string).collect();
    match names.len().saturating_sub(TOLD) {
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

/// A number of peers.
pub(super) fn peers(number: usize) -> String {
    if number == 1 { "1 peer".into() } else { format!("{number} peers") }
}

/// Seconds in the unit a person would choose.
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_there_are_it_stays_one_line() {
        assert_eq!(several(&["a", "b"]), "a, b");
        assert_eq!(several(&(0..5000).collect::<Vec<_>>()), "0, 1, 2, 3, 4 and 4995 more");
        assert_eq!((age(59), age(3600), age(86400 * 3)), ("59 s".into(), "60 min".into(), "3 d".into()));
    }
}
