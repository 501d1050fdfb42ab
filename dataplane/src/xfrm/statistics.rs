//! What the kernel counts of packets that IPsec did not let through, and why.

use std::collections::BTreeMap;

/// Counters of the calling thread's network namespace under the kernel's names, for example `XfrmInNoPols`
/// (Documentation/networking/xfrm_proc.rst), in packets. Empty where the kernel keeps none (`CONFIG_XFRM_STATISTICS`).
#[must_use]
pub fn statistics() -> BTreeMap<String, u64> {
    parse(&std::fs::read_to_string("/proc/thread-self/net/xfrm_stat").unwrap_or_default())
}

fn parse(text: &str) -> BTreeMap<String, u64> {
    let counter = |line: &str| {
        let (name, value) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(counter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_the_kernels() {
        let text = "XfrmInError             \t0\nXfrmInNoPols            \t17\nwhat is this\n\n";
        let expected = [("XfrmInError".to_owned(), 0), ("XfrmInNoPols".to_owned(), 17)];
        assert_eq!(parse(text), BTreeMap::from(expected));
        assert_eq!(parse(""), BTreeMap::new());
    }
}
