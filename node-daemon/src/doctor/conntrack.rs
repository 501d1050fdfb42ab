//! The table of connections: when it is full, new connections are dropped.

use std::fs;

use husk_dataplane::sysctl;

use super::parameters::set;
use super::{Check, Evidence, Finding, Looked, Outcome};

/// How full it is.
pub(super) const CHECK: Check = Check { id: "conntrack", title: "the table of connections has room for more", look };

const COUNT: &str = "net/netfilter/nf_conntrack_count";
const MAX: &str = "net/netfilter/nf_conntrack_max";

/// Hundredths of the table in use from which it is told, and from which it is an error.
const FULL: (u64, u64) = (80, 95);

/// Bytes of an entry, its extensions left out: `struct nf_conn` of 6.x on 64 bits, as /proc/slabinfo has it.
const ENTRY: u64 = 320;

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
    let larger = max.saturating_mul(2);
    let words = format!(
        "double it, which may take {} MiB of memory; and look for who opens so many connections (conntrack -L), and whether \
         kube-proxy sets the limit (--conntrack-max-per-core)",
        larger * ENTRY >> 20
    );
    let fix = set(&words, &[MAX.to_owned()], &larger.to_string(), &evidence.host, "zz-husk-conntrack.conf")?;
    let finding = if percent >= FULL.1 { Finding::error } else { Finding::warning };
    Ok(Outcome::of(vec![finding(cause, evidence_lines, fix)], ""))
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
    #[test]
    fn drops_are_added_up_over_processors() {
        let text = "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop\n\
                    00000002 00000000 0 0 0 0 0 0 0 0 0000000a 0\n00000002 00000000 0 0 0 0 0 0 0 0 00000001 0\n";
        assert_eq!(super::dropped(text), 11);
        assert_eq!(super::dropped(""), 0);
    }
}
