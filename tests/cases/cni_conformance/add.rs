//! ADD.

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::{Attachment, refusal};
use husk_tests::{Family, Pod};
use serde_json::{Value, json};

use crate::bed::{host_end, noted, step};
use crate::{Case, Must, Point, Should};

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "ADD creates the interface CNI_IFNAME in CNI_NETNS, ready when it returns",
        since: "0.3.1",
        holds: creates_the_interface,
    },
    Point {
        level: Must,
        text: "the result has the configuration's cniVersion, and the keys of that version",
        since: "0.3.1",
        holds: result_of_the_version,
    },
    Point {
        level: Must,
        text: "an interface of that name that exists already is an error, and stays",
        since: "0.3.1",
        holds: existing_interface,
    },
    Point {
        level: Must,
        text: "one container may be added more than once, each time with another interface name",
        since: "0.3.1",
        holds: second_interface,
    },
    Point {
        level: Must,
        text: "prevResult is passed through, with our modifications included",
        since: "0.3.1",
        holds: previous_result,
    },
    Point {
        level: Must,
        text: "a plugin behind gets our result as prevResult, and runtimeConfig only for what it declares",
        since: "0.3.1",
        holds: followed,
    },
    Point {
        level: Must,
        text: "state is kept by network name, container id and interface name",
        since: "0.3.1",
        holds: primary_key,
    },
    Point {
        level: Should,
        text: "runtimeConfig.ips and runtimeConfig.mac are heeded, before args and CNI_ARGS",
        since: "0.3.1",
        holds: requested,
    },
    Point {
        level: Should,
        text: "dns of the configuration is in the result, overridden by runtimeConfig.dns",
        since: "0.3.1",
        holds: name_service,
    },
    Point {
        level: Must,
        text: "args, reserved keys and keys of CNI_ARGS that mean nothing to us are ignored",
        since: "0.3.1",
        holds: ignored,
    },
    Point {
        level: Must,
        text: "a failed ADD leaves nothing, and DEL after it succeeds",
        since: "0.3.1",
        holds: failed,
    },
];

fn creates_the_interface(case: &Case<'_>) -> Result<()> {
    let (pod, attachment) = case.added()?;
    let link = pod.netns().ip_json(["link", "show", "dev", "eth0"])?;
    ensure!(link[0]["operstate"] == "UP", "{link}");
    for address in attachment.addresses()? {
        let shown = pod.netns().ip_json(["address", "show", "dev", "eth0", "to", &address])?;
        ensure!(shown[0]["addr_info"][0]["local"].is_string(), "{address} is not on eth0: {shown}");
        let host = address.split('/').next().unwrap_or_default();
        let route = case.bed.host().netns().ip_json(["route", "get", host])?;
        ensure!(route[0]["dev"] == host_end(&attachment)?, "{route}");
    }
    case.network.del(&attachment)
}

fn result_of_the_version(case: &Case<'_>) -> Result<()> {
    let (pod, attachment) = case.added()?;
    let result = attachment.cached.clone().context("no result")?;
    ensure!(result["cniVersion"] == case.network.version(), "{result}");
    let (index, reported) = attachment.reported()?;
    let host_end = host_end(&attachment)?;
    let interfaces = result["interfaces"].as_array().context("interfaces")?;
    ensure!(interfaces.len() == 2, "{result}");
    for interface in interfaces {
        let in_pod = interface == reported;
        let netns = if in_pod { pod.netns() } else { case.bed.host().netns() };
        let name = interface["name"].as_str().context("name")?;
        ensure!(in_pod || name == host_end, "{result}");
        let link = netns.ip_json(["link", "show", "dev", name])?;
        ensure!(interface["mac"] == link[0]["address"], "{interface} is not {link}");
        if case.network.speaks("1.1.0") {
            ensure!(interface["mtu"] == link[0]["mtu"], "{interface} is not {link}");
        } else {
            ensure!(interface.get("mtu").is_none(), "{interface}");
        }
    }
    let ips = result["ips"].as_array().context("ips")?;
    ensure!(ips.len() == case.bed.families.len(), "{result}");
    for (ip, family) in ips.iter().zip(&case.bed.families) {
        let (length, gateway, number) = match family {
            Family::Ipv4 => ("/32", "169.254.1.1", "4"),
            Family::Ipv6 => ("/128", "fe80::1", "6"),
        };
        ensure!(ip["address"].as_str().is_some_and(|it| it.ends_with(length)), "{ip}");
        ensure!(ip["gateway"] == gateway && ip["interface"] == index, "{ip}");
        if case.network.speaks("1.0.0") {
            ensure!(ip.get("version").is_none(), "{ip}");
        } else {
            ensure!(ip["version"] == number, "{ip}");
        }
    }
    let routes = result["routes"].as_array().context("routes")?;
    let expected = case.bed.families.iter().map(|family| match family {
        Family::Ipv4 => json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1"}),
        Family::Ipv6 => json!({"dst": "::/0", "gw": "fe80::1"}),
    });
    ensure!(*routes == expected.collect::<Vec<_>>(), "{result}");
    ensure!(result["dns"].is_object(), "{result}");
    case.network.del(&attachment)
}

fn existing_interface(case: &Case<'_>) -> Result<()> {
    let (pod, mut attachment) = case.bed.sandbox()?;
    pod.netns().command("ip", ["link", "add", "eth0", "type", "bridge"])?;
    let refused = refusal(case.network.add(&mut attachment))?;
    ensure!(refused.outcome.error_code() == Some(101), "{refused}");
    ensure!(refused.to_string().contains("eth0"), "{refused}");
    case.network.del(&attachment)?;
    pod.netns().command("ip", ["link", "show", "eth0", "type", "bridge"])?;
    pod.netns().command("ip", ["link", "del", "eth0"])?;

    case.network.add(&mut attachment)?;
    let again = refusal(case.network.add(&mut attachment.clone()))?;
    ensure!(again.outcome.error_code() == Some(101), "{again}");
    if case.network.speaks("0.4.0") {
        case.network.check(&attachment)?;
    }
    case.network.del(&attachment)
}

fn second_interface(case: &Case<'_>) -> Result<()> {
    let (pod, first) = case.added()?;
    let mut second = Attachment { ifname: "eth1".to_owned(), cached: None, ..first.clone() };
    case.network.add(&mut second)?;
    let (one, two) = (first.addresses()?, second.addresses()?);
    ensure!(two.len() == case.bed.families.len() && one.iter().all(|it| !two.contains(it)), "{one:?} {two:?}");
    for attachment in [&first, &second] {
        if case.network.speaks("0.4.0") {
            case.network.check(attachment)?;
        }
    }
    case.network.del(&first)?;
    pod.netns().command("ip", ["link", "show", "eth1"])?;
    if case.network.speaks("0.4.0") {
        case.network.check(&second)?;
    }
    case.network.del(&second)
}

fn previous_result(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    let mut before = json!({
        "interfaces": [{"name": "other0", "mac": "02:00:00:00:00:01"}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}],
        "routes": [{"dst": "198.51.100.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    if !case.network.speaks("1.0.0") {
        before["ips"][0]["version"] = json!("4");
    }
    let chain = case.network.behind(step(json!({"result": before})));
    let result = chain.add(&mut attachment)?;
    for key in ["interfaces", "ips", "routes"] {
        ensure!(result[key][0] == before[key][0], "{key}: {result}");
        ensure!(result[key].as_array().is_some_and(|list| list.len() > 1), "{key}: {result}");
    }
    ensure!(result["dns"] == before["dns"], "{result}");
    let (index, _) = attachment.reported()?;
    ensure!(index == 2 && result["ips"][1]["interface"] == 2, "{result}");
    if case.network.speaks("0.4.0") {
        chain.check(&attachment)?;
    }
    chain.del(&attachment)
}

fn followed(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    let log = case.bed.run_file("followed.log");
    std::fs::remove_file(&log).ok();
    let requested = free_addresses(case)?;
    attachment.capabilities.insert("ips".to_owned(), json!(requested));
    attachment.capabilities.insert("nonsense".to_owned(), json!(1));
    let behind = step(json!({"log": "/run/husk/followed.log", "capabilities": {"nonsense": true}}));
    let chain = case.network.chained([behind]);
    let result = chain.add(&mut attachment)?;
    chain.del(&attachment)?;
    let notes = noted(&log)?;
    let [add, del] = &notes[..] else { anyhow::bail!("{notes:?}") };
    ensure!(add["configuration"]["prevResult"] == result, "{add}");
    ensure!(add["configuration"]["runtimeConfig"] == json!({"nonsense": 1}), "{add}");
    ensure!(attachment.addresses()?.iter().all(|it| requested.iter().any(|wish| it.starts_with(wish))), "{result}");
    let previous = &del["configuration"]["prevResult"];
    ensure!(*previous == if case.network.speaks("0.4.0") { result } else { Value::Null }, "{del}");
    Ok(())
}

fn primary_key(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let (_, lease) = case.bed.lease(&attachment)?.context("no lease")?;
    let key = json!([lease["network"], lease["containerId"], lease["ifname"]]);
    ensure!(key == json!([case.network.name(), attachment.container_id, attachment.ifname]), "{lease}");
    case.network.del(&attachment)
}

/// Addresses of the node's blocks that no pod has; the last ones are far from the next in turn.
fn free_addresses(case: &Case<'_>) -> Result<Vec<String>> {
    let (_pod, attachment) = case.added()?;
    let addresses = attachment.addresses()?;
    case.network.del(&attachment)?;
    // A resting address may be requested.
    Ok(addresses.iter().filter_map(|it| it.split('/').next()).map(str::to_owned).collect())
}

fn requested(case: &Case<'_>) -> Result<()> {
    let wishes = [free_addresses(case)?, free_addresses(case)?, free_addresses(case)?];
    let mac = "02:00:5e:10:20:30";
    let (_pod, attachment) = case.bed.sandbox()?;
    let bare = |attachment: &Attachment| -> Result<Vec<String>> {
        Ok(attachment.addresses()?.iter().filter_map(|it| it.split('/').next()).map(str::to_owned).collect())
    };
    // All three at once, then two of them, then the last.
    for (from, wish) in wishes.iter().enumerate() {
        let mut config = case.network.husk_config(&attachment);
        if from == 0 {
            config["runtimeConfig"] = json!({"ips": wishes[0], "mac": mac});
        }
        if from <= 1 {
            config["args"] = json!({"cni": {"ips": wishes[1], "mac": "02:00:5e:10:20:32"}});
        }
        let mut variables = attachment.environment();
        variables.insert("CNI_COMMAND", "ADD".to_owned());
        variables.insert("CNI_ARGS", format!("IgnoreUnknown=1;IP={};MAC=02:00:5e:10:20:31", wishes[2].join(",")));
        let result = case.network.call_husk(&variables, &config.to_string())?.into_result()?;
        let added = Attachment { cached: Some(result), ..attachment.clone() };
        ensure!(bare(&added)? == *wish, "{from}: {:?} instead of {wish:?}", added.addresses()?);
        let expected = [mac, "02:00:5e:10:20:32", "02:00:5e:10:20:31"][from];
        ensure!(added.reported()?.1["mac"] == expected, "{from}: {:?}", added.reported()?);
        case.network.del(&added)?;
    }
    Ok(())
}

fn name_service(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.bed.sandbox()?;
    let mut config = case.network.husk_config(&attachment);
    config["dns"] =
        json!({"nameservers": ["10.0.0.1"], "domain": "cluster.local", "search": ["a.local"], "options": ["ndots:5"]});
    config["runtimeConfig"] = json!({"dns": {"servers": ["10.0.0.2"], "searches": ["b.local"]}});
    let result = call(case, &attachment, &config)?.into_result()?;
    let expected = json!({
        "nameservers": ["10.0.0.2"], "domain": "cluster.local", "search": ["b.local"], "options": ["ndots:5"],
    });
    ensure!(result["dns"] == expected, "{result}");
    case.network.del(&attachment)
}

fn ignored(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    attachment.args.push_str(";VENDOR_KEY=7;EMPTY=");
    let mut config = case.network.husk_config(&attachment);
    config["args"] = json!({"labels": {"a": "b"}, "cni": {"labels": [{"key": "k", "value": "v"}]}});
    config["cni.dev/from-the-future"] = json!({"x": 1});
    call(case, &attachment, &config)?.into_result()?;
    case.network.del(&attachment)
}

fn failed(case: &Case<'_>) -> Result<()> {
    let (pod, mut attachment) = case.bed.sandbox()?;
    let chain = case.network.chained([step(json!({"fail": true}))]);
    let refused = refusal(chain.add(&mut attachment))?;
    ensure!(refused.plugin == "step", "{refused}");
    // It was not ours that failed: what is ours goes with the DEL.
    ensure!(case.bed.lease(&attachment)?.is_some());
    chain.del(&attachment)?;
    lacks(&pod, "eth0")?;

    let mut config = case.network.husk_config(&attachment);
    config["runtimeConfig"] = json!({"ips": ["192.0.2.1"]});
    let outcome = call(case, &attachment, &config)?;
    ensure!(!outcome.success() && outcome.stdout.contains("192.0.2.1"), "{outcome:?}");
    case.bed.ensure_empty()?;
    lacks(&pod, "eth0")?;
    case.network.del(&attachment)
}

/// Calls Husk's ADD with a configuration.
fn call(case: &Case<'_>, attachment: &Attachment, config: &Value) -> Result<husk_tests::CniOutcome> {
    let mut variables = attachment.environment();
    variables.insert("CNI_COMMAND", "ADD".to_owned());
    case.network.call_husk(&variables, &config.to_string())
}

pub(crate) fn lacks(pod: &Pod, interface: &str) -> Result<()> {
    let links = pod.netns().ip_json(["link", "show"])?;
    ensure!(links.as_array().is_some_and(|all| all.iter().all(|it| it["ifname"] != interface)), "{links}");
    Ok(())
}
