//! CHECK, with every deviation made for real.

use anyhow::{Context, Result, ensure};
use husk_tests::Family;
use husk_tests::runtime::{Attachment, refusal};
use serde_json::json;

use crate::bed::{Stopped, host_end, step};
use crate::{Case, Must, Point, Should};

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "CHECK right after ADD succeeds and prints nothing, alone and in a chain",
        since: "0.4.0",
        holds: right_after_add,
    },
    Point { level: Must, text: "CHECK consults prevResult, and needs it", since: "0.4.0", holds: needs_the_result },
    Point {
        level: Must,
        text: "CHECK allows a plugin behind to have modified resources, such as routes",
        since: "0.4.0",
        holds: modified_behind,
    },
    Point {
        level: Must,
        text: "CHECK allows a plugin behind to have modified the interface's MTU, and compares with what it reported",
        since: "0.4.0",
        holds: mtu_of_a_plugin_behind,
    },
    Point {
        level: Should,
        text: "CHECK tells when a plugin behind changed what the host needs to know, the Ethernet address",
        since: "0.4.0",
        holds: mac_of_a_plugin_behind,
    },
    Point {
        level: Should,
        text: "CHECK fails when interface, address, route, neighbour, MTU, host side or lease are missing or not as made",
        since: "0.4.0",
        holds: deviations,
    },
];

fn right_after_add(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    case.network.check(&attachment)?;
    case.network.check(&attachment)?;
    case.network.del(&attachment)
}

fn needs_the_result(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let without = refusal(case.network.check(&Attachment { cached: None, ..attachment.clone() }))?;
    ensure!(without.outcome.error_code() == Some(7) && without.to_string().contains("prevResult"), "{without}");
    let mut foreign = attachment.clone();
    let cached = foreign.cached.as_mut().context("nothing was added")?;
    for ip in cached["ips"].as_array_mut().context("ips")? {
        ip["address"] = json!(if ip["address"].as_str().is_some_and(|it| it.contains(':')) {
            "fd42::ffff/128"
        } else {
            "10.42.255.9/32"
        });
    }
    let refused = refusal(case.network.check(&foreign))?;
    ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains("prevResult"), "{refused}");
    case.network.del(&attachment)
}

fn modified_behind(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    let behind = step(json!({
        "inPod": [
            "ip address add 192.0.2.7/24 dev eth0",
            "ip route add 198.51.100.0/24 dev eth0",
            "ip route add unreachable 203.0.113.0/24",
            "ip -6 address add 2001:db8::7/64 dev eth0 nodad",
            "ip -6 route add 2001:db8:1::/64 dev eth0",
            "ip neigh add 192.0.2.8 lladdr 02:00:00:00:00:08 dev eth0",
            "ip link add extra type bridge",
        ],
        "result": {"interfaces": [{"name": "extra", "sandbox": "x"}]},
    }));
    let chain = case.network.chained([behind]);
    chain.add(&mut attachment)?;
    chain.check(&attachment)?;
    chain.del(&attachment)
}

/// The reference plugin `tuning` behind Husk's, which reports an MTU only in results that have a place for one.
fn mtu_of_a_plugin_behind(case: &Case<'_>) -> Result<()> {
    let (pod, mut attachment) = case.bed.sandbox()?;
    // Debian's reference plugins know no later version than 1.0.0.
    if case.network.speaks("1.1.0") {
        let chain = case.network.chained([step(json!({"inPod": ["ip link set eth0 mtu 1300"]}))]);
        chain.add(&mut attachment)?;
        let cached = attachment.cached.as_mut().context("nothing was added")?;
        let interfaces = cached["interfaces"].as_array_mut().context("interfaces")?;
        interfaces.iter_mut().filter(|it| it["name"] == "eth0").for_each(|it| it["mtu"] = json!(1300));
        chain.check(&attachment)?;
        pod.netns().command("ip", ["link", "set", "eth0", "mtu", "1299"])?;
        let refused = refusal(chain.check(&attachment))?;
        ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains("MTU 1299"), "{refused}");
    } else {
        let chain = case.network.chained([json!({"type": "tuning", "mtu": 1300})]);
        chain.add(&mut attachment)?;
        chain.check(&attachment)?;
    }
    case.network.del(&attachment)
}

/// What would be reported as a mere difference: that the host knows the pod by its old address.
fn mac_of_a_plugin_behind(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.added()?;
    let cached = attachment.cached.as_mut().context("nothing was added")?;
    let interfaces = cached["interfaces"].as_array_mut().context("interfaces")?;
    interfaces.iter_mut().filter(|it| it["name"] == "eth0").for_each(|it| it["mac"] = json!("02:00:00:00:09:09"));
    let refused = refusal(case.network.check(&attachment))?;
    ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains("capability mac"), "{refused}");
    case.network.del(&attachment)
}

/// A change by hand, and what CHECK has to say of it. `HOST` is the host end, `V4` and `V6` are the pod's addresses.
struct Deviation {
    on_host: bool,
    command: &'static str,
    said: &'static str,
}

const fn in_pod(command: &'static str, said: &'static str) -> Deviation {
    Deviation { on_host: false, command, said }
}

const fn on_host(command: &'static str, said: &'static str) -> Deviation {
    Deviation { on_host: true, command, said }
}

const ALWAYS: &[Deviation] = &[
    in_pod("ip link del eth0", "eth0 is missing"),
    in_pod("ip link set eth0 down", "eth0 is down"),
    in_pod("ip link set eth0 mtu 9000", "MTU 9000"),
    in_pod("ip link set eth0 address 02:00:00:00:09:09", "Ethernet address"),
    in_pod("ip link set eth0 name eth9", "eth0 is missing"),
    on_host("ip link set HOST mtu 1300", "MTU 1300"),
    on_host("ip link set HOST down", "HOST is down"),
];

/// In versions whose results tell an MTU; without one, a plugin behind may have made it smaller.
const TOLD: &[Deviation] = &[in_pod("ip link set eth0 mtu 1300", "MTU 1300")];

const IPV4: &[Deviation] = &[
    in_pod("ip address del V4/32 dev eth0", "lacks the address V4"),
    in_pod("ip route del default", "default via 169.254.1.1"),
    in_pod("ip neigh del 169.254.1.1 dev eth0", "neighbour 169.254.1.1"),
    in_pod("ip neigh replace 169.254.1.1 lladdr 02:00:00:00:09:09 dev eth0", "neighbour 169.254.1.1"),
    on_host("ip route del V4 proto 72", "route V4/32"),
    on_host("ip neigh del V4 dev HOST", "neighbour V4"),
];

const IPV6: &[Deviation] = &[
    in_pod("ip address del V6/128 dev eth0", "lacks the address V6"),
    in_pod("ip -6 route del default", "default via fe80::1"),
    in_pod("ip neigh del fe80::1 dev eth0", "neighbour fe80::1"),
    on_host("ip route del V6 proto 72", "route V6/128"),
    on_host("ip neigh del V6 dev HOST", "neighbour V6"),
];

fn deviations(case: &Case<'_>) -> Result<()> {
    let of_family = |family| if family == Family::Ipv4 { IPV4 } else { IPV6 };
    let by_family = case.bed.families.iter().flat_map(|family| of_family(*family));
    let told = if case.network.speaks("1.1.0") { TOLD } else { &[] };
    for deviation in ALWAYS.iter().chain(told).chain(by_family) {
        one(case, deviation).with_context(|| deviation.command.to_owned())?;
    }
    lease_is_gone(case).context("lease removed")?;
    another_namespace(case).context("another namespace under the path")
}

fn one(case: &Case<'_>, deviation: &Deviation) -> Result<()> {
    let (pod, attachment) = case.added()?;
    let host_end = host_end(&attachment)?;
    let of = |colon: bool| -> Result<String> {
        let found = attachment.addresses()?.into_iter().find(|it| it.contains(':') == colon);
        Ok(found.unwrap_or_default().split('/').next().unwrap_or_default().to_owned())
    };
    let (v4, v6) = (of(false)?, of(true)?);
    let fill = |text: &str| text.replace("HOST", &host_end).replace("V4", &v4).replace("V6", &v6);
    // The daemon puts right what is its own to put right, the host's side, and is to be caught out: it stands still meanwhile.
    let daemon = deviation.on_host.then(|| Stopped::daemon(case.bed)).transpose()?;
    let netns = if deviation.on_host { case.bed.host().netns() } else { pod.netns() };
    let command = fill(deviation.command);
    netns.command("ip", command.split_ascii_whitespace().skip(1))?;
    let refused = refusal(case.network.check(&attachment))?;
    drop(daemon);
    let said = fill(deviation.said);
    ensure!(refused.outcome.error_code() == Some(103), "{refused}");
    ensure!(refused.to_string().contains(&said), "no {said:?} in {refused}");
    case.network.del(&attachment)
}

fn lease_is_gone(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let (path, _) = case.bed.lease(&attachment)?.context("no lease")?;
    std::fs::remove_file(path)?;
    let refused = refusal(case.network.check(&attachment))?;
    ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains("no lease"), "{refused}");
    case.network.del(&attachment)
}

fn another_namespace(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let (other, _) = case.bed.sandbox()?;
    let mut elsewhere = attachment.clone();
    elsewhere.netns = other.netns().path().display().to_string();
    if let Some(interfaces) = elsewhere.cached.as_mut().and_then(|it| it["interfaces"].as_array_mut()) {
        interfaces.iter_mut().filter(|it| it["name"] == "eth0").for_each(|it| it["sandbox"] = json!(elsewhere.netns));
    }
    let refused = refusal(case.network.check(&elsewhere))?;
    ensure!(refused.to_string().contains("not the network namespace that was connected"), "{refused}");
    case.network.del(&attachment)
}
