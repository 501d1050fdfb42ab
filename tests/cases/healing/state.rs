//! What of Husk is in a host's kernel, for comparing before and after.

use std::fs;

use anyhow::{Context, Result};
use husk_tests::Host;
use serde_json::Value;

/// Everything of Husk that `ip`, `bridge`, `nft` and `wg` show of a host, without counters and ages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct State(pub(crate) Vec<(&'static str, Vec<String>)>);

impl State {
    pub(crate) fn of(host: &Host) -> Result<Self> {
        let run = |program: &str, arguments: &str| -> Result<Vec<String>> {
            let text = host.program(program).args(arguments.split(' ')).check()?;
            Ok(text.lines().map(|line| line.trim().to_owned()).collect())
        };
        let of_husk = |lines: Vec<String>| lines.into_iter().filter(|line| line.contains("husk")).collect();
        let links = host.netns().ip_json(["link", "show"])?;
        let links = links.as_array().into_iter().flatten().map(|link| {
            let flags = link["flags"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let up = flags.into_iter().any(|flag| flag == "UP");
            format!("{} mtu {} {} up {up}", link["ifname"], link["mtu"], link["address"])
        });
        let mut state = vec![
            ("links", links.filter(|link| link.contains("husk")).collect()),
            ("addresses", without_index(of_husk(run("ip", "-o addr show")?))),
            ("routes", run("ip", "route show table all proto 72")?),
            ("IPv6 routes", run("ip", "-6 route show table all proto 72")?),
            // The plugin's entries carry no protocol number, the daemon's do; who made one is no difference.
            ("neighbours", without_protocol(of_husk(run("ip", "neigh show nud permanent")?))),
            ("forwarding", of_husk(run("bridge", "fdb show")?)),
            ("rules", run("nft", "--stateless list table inet husk").unwrap_or_default()),
            ("sysctls", vec![sysctl(host, "net/ipv4/ip_forward")?, sysctl(host, "net/ipv6/conf/all/forwarding")?]),
        ];
        if links_name(&state).contains("husk-wg0") {
            for part in ["peers", "allowed-ips", "endpoints", "listen-port", "public-key"] {
                state.push((part, run("wg", &format!("show husk-wg0 {part}")).unwrap_or_default()));
            }
        }
        // What was made anew has another index, and comes elsewhere in a listing.
        state.iter_mut().for_each(|(_, lines)| lines.sort());
        Ok(Self(state))
    }

    pub(crate) fn difference(&self, other: &Self) -> String {
        let parts = self.0.iter().map(|(name, before)| {
            let after = other.0.iter().find(|(it, _)| it == name).map(|(_, lines)| lines.clone()).unwrap_or_default();
            let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
            let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
            if lost.is_empty() && new.is_empty() { String::new() } else { format!("{name}: -{lost:?} +{new:?} ") }
        });
        parts.collect()
    }
}

fn without_index(lines: Vec<String>) -> Vec<String> {
    let rest = |line: &String| line.split_once(": ").map_or(String::new(), |(_, rest)| rest.to_owned());
    lines.iter().map(rest).collect()
}

fn without_protocol(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().map(|line| line.trim_end_matches("proto 72").trim_end().to_owned()).collect()
}

fn links_name(state: &[(&'static str, Vec<String>)]) -> String {
    state.first().map(|(_, links)| links.join(" ")).unwrap_or_default()
}

pub(crate) fn sysctl(host: &Host, key: &str) -> Result<String> {
    let path = format!("/proc/sys/{key}");
    let value = host.netns().run(|| fs::read_to_string(path))?;
    Ok(value.with_context(|| format!("reading {key}"))?.trim().to_owned())
}
