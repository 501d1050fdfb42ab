//! The table of connections: when it is full, new connections are dropped.

use std::fs;

use husk_dataplane::sysctl;

use super::parameters::set;
use super::room::meminfo;
use super::{Check, Evidence, Finding, Fix, HostFiles, Looked, Outcome};
use crate::huskctl::bytes;

/// How full it is.
pub(super) const CHECK: Check = Check { id: "conntrack", title: "the table of connections has room for more", look };

const COUNT: &str = "net/netfilter/nf_conntrack_count";
const MAX: &str = "net/netfilter/nf_conntrack_max";
const BUCKETS: &str = "net/netfilter/nf_conntrack_buckets";

/// Hundredths of the table in use from which it is told, and from which it is an error.
const FULL: (u64, u64) = (80, 95);

/// Bytes of an entry: `struct nf_conn` of 6.x on 64 bits is 256, or 320 with all that a distribution turns on (/proc/slabinfo has it);
/// its extensions are an allocation of their own, of 128 where addresses are translated and connections watched
/// (net/netfilter/nf_conntrack_extend.c).
const ENTRY: u64 = 320 + 128;

/// A share of the memory that is available, 1 of so many, beyond which a person decides: a table that is full for ever, of somebody who
/// floods it, would else be doubled until nothing is left.
const SHARE: u64 = 16;

/// Connections that an entry of the hash table has at most in the kernel's own proportion, of older kernels
/// (`nf_conntrack_init_start` in net/netfilter/nf_conntrack_core.c).
const PER_BUCKET: u64 = 4;

fn look(evidence: &Evidence) -> Looked {
    let values = sysctl::read([COUNT, MAX])?;
    let value = |path: &str| values.get(path).and_then(|text| text.parse::<u64>().ok());
    let (Some(count), Some(max)) = (value(COUNT), value(MAX)) else {
        return Ok(Outcome::does_not_apply("the kernel tracks no connections here"));
    };
    let dropped = fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack").map_or(0, |text| dropped(&text));
    let lost = if dropped > 0 {
        format!("; {dropped} packets were dropped since boot as there was no room")
    } else {
        String::new()
    };
    // 0 means no limit (Documentation/networking/nf_conntrack-sysctl.rst).
    if max == 0 || count * 100 < max * FULL.0 {
        return Ok(Outcome::well(format!("{count} of {max} connections{lost}")));
    }
    let percent = count * 100 / max;
    let cause = format!(
        "the table of connections is {percent} % full: when it is full, new connections of all pods and of the host are dropped"
    );
    let evidence_lines = vec![format!("{COUNT} = {count}"), format!("{MAX} = {max}{lost}")];
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text, "MemAvailable"));
    let buckets = sysctl::read([BUCKETS])?.get(BUCKETS).and_then(|text| text.parse().ok());
    let fix = double(max, available, buckets, &evidence.host);
    let finding = if percent >= FULL.1 { Finding::error } else { Finding::warning };
    Ok(Outcome::of(vec![finding(cause, evidence_lines, fix)], ""))
}

/// Twice the limit, as far as there is memory for it.
fn double(max: u64, available: Option<u64>, buckets: Option<u64>, host: &HostFiles) -> Fix {
    let larger = max.saturating_mul(2);
    let room = larger.saturating_mul(ENTRY);
    let mut words = format!(
        "double it, which may take {} of memory, about {ENTRY} bytes a connection; and look for who opens so many (conntrack -L), and \
         whether kube-proxy sets the limit (--conntrack-max-per-core)",
        bytes(room)
    );
    if let Some(buckets) = buckets.filter(|buckets| larger > buckets.saturating_mul(PER_BUCKET)) {
        let wanted = larger.div_ceil(PER_BUCKET);
        words += &format!(
            ". The hash table has {buckets} entries, and grows too slow for that many: set {BUCKETS} to {wanted} as well, and \
             `options nf_conntrack hashsize={wanted}` in /etc/modprobe.d for later"
        );
    }
    let fix = set(&words, &[MAX.to_owned()], &larger.to_string(), host, "zz-husk-conntrack.conf");
    match available {
        Some(available) if room <= available / SHARE => fix,
        Some(available) => Fix::by_hand(
            fix.words,
            fix.actions,
            format!(
                "it may take {} of the {} that are available: that is for you to say",
                bytes(room),
                bytes(available)
            ),
        ),
        None => Fix::by_hand(fix.words, fix.actions, "how much memory is available is not known"),
    }
}

/// Packets dropped for want of room, over all processors: hexadecimal columns under their names.
fn dropped(text: &str) -> u64 {
    let mut lines = text.lines();
    let Some(at) = lines.next().and_then(|names| names.split_whitespace().position(|name| name == "drop")) else {
        return 0;
    };
    lines.filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(at)?, 16).ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_doubled_while_there_is_memory_for_it() {
        let host = HostFiles::new(tempfile::tempdir().unwrap().path());
        let double = |max, available| double(max, available, Some(65_536), &host);
        let few = double(131_072, Some(8 << 30));
        assert!(few.is_safe() && few.words.contains("112.0 MiB"), "{few:?}");
        assert_eq!(few.commands, ["sysctl -w net/netfilter/nf_conntrack_max=262144"]);
        assert!(!few.words.contains("hashsize"), "the kernel's own proportion: {}", few.words);
        // Again and again, as who floods it would have it.
        let many = double(1 << 21, Some(8 << 30));
        assert!(many.by_hand.as_ref().is_some_and(|why| why.contains("1.7 GiB of the 8.0 GiB")), "{many:?}");
        assert!(many.words.contains("hashsize=1048576"), "{}", many.words);
        assert!(!double(131_072, None).is_safe());
        assert!(!double(u64::MAX, Some(u64::MAX)).is_safe());
    }

    #[test]
    fn drops_are_added_up_over_processors() {
        let text = "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop\n\
                    00000002 00000000 0 0 0 0 0 0 0 0 0000000a 0\n00000002 00000000 0 0 0 0 0 0 0 0 00000001 0\n";
        assert_eq!(dropped(text), 11);
        assert_eq!(dropped(""), 0);
    }
}
