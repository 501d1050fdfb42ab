//! `huskctl trace` names the hop that is broken: what is whole passes, and what is broken for real, one thing after another, is
//! found where it is. Only such things are broken as the daemon does not mend by itself.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_tests::firewall::{self, At};
use husk_tests::policy::scene::{Scene, Service, answers};
use husk_tests::process::binary;
use husk_tests::{Cluster, Family, Host, Mode, Signal, eventually};
use serde_json::{Value, json};

/// How long what is broken may take to be found: as long as a neighbour is asked again, and as probes are given up.
const FOUND: Duration = Duration::from_secs(40);

/// How long what is whole again may take.
const WHOLE: Duration = Duration::from_secs(40);

/// What a trace says.
#[derive(Debug)]
struct Traced {
    report: Value,
    status: Option<i32>,
}

impl Traced {
    fn ask(host: &Host, source: &str, destination: &str, options: &[&str]) -> Result<Self> {
        let arguments = ["trace", source, destination, "--port", "80", "--output", "json"];
        let output = host.huskctl(arguments.into_iter().chain(options.iter().copied()))?;
        let report = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        Ok(Self { report, status: output.status.code() })
    }

    fn broken(&self) -> Option<&str> {
        self.report["broken"].as_str()
    }

    fn hop(&self, name: &str) -> &Value {
        let hops = self.report["hops"].as_array();
        hops.into_iter().flatten().find(|hop| hop["name"] == name).unwrap_or(&Value::Null)
    }

    /// It is broken at this hop first, for a cause and with a remedy that say these words.
    fn ensure_broken(&self, name: &str, cause: &str, remedy: &str) -> Result<()> {
        ensure!(self.broken() == Some(name) && self.status == Some(1), "{name}: {self:#?}");
        let hop = self.hop(name);
        for (field, words) in [("cause", cause), ("remedy", remedy)] {
            ensure!(hop[field].as_str().is_some_and(|told| told.contains(words)), "{name}, {words:?}: {hop:#}");
        }
        Ok(())
    }

    /// Nothing is broken, and these hops pass.
    fn ensure_passes(&self, names: &[&str]) -> Result<()> {
        ensure!(self.broken().is_none() && self.status == Some(0), "{self:#?}");
        for name in names {
            ensure!(self.hop(name)["standing"] == "passes", "{name}: {self:#?}");
        }
        Ok(())
    }
}

fn await_broken(host: &Host, name: &str) -> Result<Traced> {
    let mut last = None;
    eventually(&format!("the {name} to be found"), FOUND, || {
        let traced = Traced::ask(host, "default/web", "default/far", &["--probe"])?;
        let found = traced.broken() == Some(name);
        last = Some(traced);
        Ok(found)
    })
    .with_context(|| format!("{last:#?}"))?;
    last.context("it was asked")
}

fn await_whole(host: &Host) -> Result<()> {
    let mut last = None;
    eventually("the connection to be whole", WHOLE, || {
        let traced = Traced::ask(host, "default/web", "default/far", &["--probe"])?;
        let whole = traced.broken().is_none() && traced.hop("probe")["standing"] == "passes";
        last = Some(traced);
        Ok(whole)
    })
    .with_context(|| format!("{last:#?}"))
}

/// UDP port of the tunnels.
fn port(mode: Mode) -> u16 {
    if mode == Mode::Vxlan { 4789 } else { 51820 }
}

/// A firewall between the two hosts.
fn block(cluster: &Cluster, on: bool) -> Result<()> {
    let netns = cluster.host(2).netns();
    if !on {
        return firewall::lift(netns);
    }
    // Either generation of WireGuard.
    let port = port(cluster.mode());
    firewall::raise(netns, At::Path, &[&format!("iifname eth0 udp dport {port}-{} drop", port + 1)])
}

#[test]
fn a_vxlan_connection_is_traced() -> Result<()> {
    let scene = Scene::start(Mode::Vxlan)?;
    whole(&scene)?;
    of_icmp(&scene)?;
    through_a_service(&scene)?;
    through_a_node_port(&scene)?;
    other_firewalls(&scene)?;
    unanswered(&scene)?;
    from_elsewhere(&scene)?;
    of_this_node(&scene)?;
    filtered(&scene)?;
    cut_off(&scene)?;
    without_daemon(&scene)?;
    refused(&scene)?;
    unplugged(&scene)
}

#[test]
fn a_wireguard_connection_is_traced() -> Result<()> {
    let scene = Scene::start(Mode::Wireguard)?;
    whole(&scene)?;
    filtered(&scene)?;
    refused(&scene)
}

/// What goes there passes, and what is answered does not come back: the tunnel's device does not forward.
fn unanswered(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let set = |on: u8| one.netns().command("sysctl", ["-qw", &format!("net.ipv4.conf.husk-vx.forwarding={on}")]);
    set(0)?;
    let traced = Traced::ask(one, "default/web", "default/far", &[])?;
    traced.ensure_broken("route", "answers, which arrives by husk-vx", "huskctl doctor")?;
    set(1)?;
    await_whole(one)
}

/// What is whole passes, between all sorts of ends.
fn whole(scene: &Scene) -> Result<()> {
    let (cluster, one) = (&scene.cluster, scene.cluster.host(1));
    await_whole(one)?;
    let local = ["source", "antispoofing", "egressPolicy", "route", "mtu", "firewall", "otherFirewalls"];
    let remote = ["tunnel", "underlay", "probe"];
    let traced = Traced::ask(one, "default/web", "default/far", &[])?;
    traced.ensure_passes(&[&local[..], &remote].concat())?;
    // What the other node decides is its word.
    ensure!(traced.hop("ingressPolicy")["standing"] == "unknown", "{traced:#?}");
    let why = traced.hop("ingressPolicy")["why"].to_string();
    ensure!(why.contains("node host2 decides, and should allow it"), "{why}");
    ensure!(traced.hop("nat")["standing"] == "notHere", "{traced:#?}");
    let why = traced.hop("destination")["why"].to_string();
    ensure!(why.contains("node host2 knows; run there: huskctl trace default/web default/far"), "{why}");
    await_whole(cluster.host(2))?;
    let there = Traced::ask(cluster.host(2), "default/web", "default/far", &[])?;
    let decided = ["route", "ingressPolicy", "destination", "firewall", "otherFirewalls"];
    there.ensure_passes(&[&remote[..], &decided].concat())?;

    Traced::ask(one, "default/web", "default/near", &[])?.ensure_passes(&[&local[..], &["destination"]].concat())?;
    Traced::ask(one, "host", "default/web", &[])?.ensure_passes(&[
        "source",
        "route",
        "destination",
        "ingressPolicy",
    ])?;
    let traced = Traced::ask(one, "host", "default/far", &[])?;
    traced.ensure_passes(&["source", "route", "tunnel", "underlay", "probe"])?;
    let router = one.router(Family::Ipv4)?.to_string();
    ensure!(traced.report["source"]["address"] == router.as_str(), "{traced:#?}");
    Traced::ask(one, "default/web", "host1", &[])?.ensure_passes(&["source", "route", "destination"])?;
    let traced = Traced::ask(one, "default/web", "host2", &[])?;
    traced.ensure_passes(&["source", "route", "nat"])?;
    ensure!(traced.report["destination"]["address"] == cluster.host(2).address(Family::Ipv4)?.to_string().as_str());
    let [web, far] = ["web", "far"].map(|name| scene.pod(name).address(Family::Ipv6).map(|it| it.to_string()));
    Traced::ask(one, &web?, &far?, &["--probe"])?.ensure_passes(&[&local[..], &remote].concat())?;

    let outside = Cluster::outside_address(Family::Ipv4).to_string();
    let traced = Traced::ask(one, "default/web", &outside, &[])?;
    traced.ensure_passes(&[&local[..], &["nat"]].concat())?;
    ensure!(traced.hop("nat")["evidence"].to_string().contains("the address of eth0 (masquerade)"), "{traced:#?}");
    ensure!(traced.hop("tunnel")["standing"] == "notHere", "{traced:#?}");
    eprintln!("{}", one.huskctl(["trace", "default/web", &outside, "--port", "80"])?.stdout);
    let text = one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?.stdout;
    eprintln!("{text}");
    let lead = "PASSES as far as this node knows  TCP";
    ensure!(text.starts_with(lead) && text.contains("ok  tunnel"), "{text}");
    let open = "Nothing that this node can see is broken; it cannot tell: ingress policy, destination.";
    ensure!(text.contains(open), "{text}");
    let text = one.huskctl(["trace", "default/web", "default/near", "--port", "80"])?.stdout;
    ensure!(text.starts_with("PASSES  TCP") && text.ends_with("Every hop passes it.\n"), "{text}");
    Ok(())
}

/// What has no ports has its name, and who is not known here is not said not to exist.
fn of_icmp(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    for (family, name) in [(Family::Ipv4, "ICMP"), (Family::Ipv6, "ICMPv6")] {
        let [web, far] =
            [scene.pod("web").address(family)?, scene.pod("far").address(family)?].map(|it| it.to_string());
        let text = one.huskctl(["trace", &web, &far, "--protocol", "icmp"])?.stdout;
        ensure!(text.contains(&format!("{name} {web} -> {far}\n")), "{text}");
    }
    let refused = one.huskctl(["trace", "default/web", "cart", "--port", "80"])?;
    let told =
        ["no pod default/cart is known on this node", "ask on that node", "nor is it a node's name", "of a Service"];
    ensure!(refused.status.code() == Some(3) && told.iter().all(|it| refused.stderr.contains(it)), "{refused:?}");
    Ok(())
}

/// A Service's address is followed to the pod that its connections go to; before there is one, the answer says what to do.
fn through_a_service(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let service = "10.96.0.10";
    let far = scene.pod("far").address(Family::Ipv4)?;
    let chain = "chain nat { type nat hook prerouting priority dstnat;";
    let rules = format!("table ip services {{ {chain} ip daddr {service} tcp dport 80 dnat to {far}:8080; }}; }}");
    one.netns().command("nft", [rules.as_str()])?;
    let traced = Traced::ask(one, "default/web", service, &[])?;
    ensure!(traced.report["translated"].is_null(), "{traced:#?}");
    let told = traced.hop("destination")["evidence"].to_string();
    ensure!(told.contains("no connection to it is translated now, so connect once"), "{told}");

    ensure!(answers(scene.pod("web").netns(), Service::Tcp(80), service.parse()?)?, "the service does not answer");
    let traced = Traced::ask(one, "default/web", service, &["--probe"])?;
    traced.ensure_passes(&["source", "egressPolicy", "route", "tunnel", "probe", "nat"])?;
    let became = format!("10.96.0.10:80 became {far}:8080 for 1 of 1 connections");
    ensure!(traced.hop("nat")["evidence"].to_string().contains(&became), "{traced:#?}");
    ensure!(traced.report["destination"]["pod"]["name"] == "far", "{traced:#?}");
    let text = one.huskctl(["trace", "default/web", service, "--port", "80"])?.stdout;
    eprintln!("{text}");
    ensure!(text.contains("via  10.96.0.10:80, translated"), "{text}");
    one.netns().command("nft", ["delete", "table", "ip", "services"])?;
    Ok(())
}

/// A NodePort, by rules as kube-proxy makes them in mode nftables (pkg/proxy/nftables), is followed alike.
fn through_a_node_port(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let (node, far) = (one.address(Family::Ipv4)?, scene.pod("far").address(Family::Ipv4)?);
    let rules = format!(
        "table ip kube-proxy {{
            set nodeport-ips {{ type ipv4_addr; elements = {{ {node} }}; }}
            chain mark-for-masquerade {{ mark set mark or 0x4000; }}
            chain endpoint-1 {{ ip saddr {far} jump mark-for-masquerade; meta l4proto tcp dnat to {far}:8080; }}
            chain service-1 {{ numgen random mod 1 vmap {{ 0 : goto endpoint-1 }}; }}
            chain external-1 {{ jump mark-for-masquerade; goto service-1; }}
            map service-nodeports {{
                type inet_proto . inet_service : verdict; elements = {{ tcp . 30080 : goto external-1 }};
            }}
            chain services {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports; }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain masquerading {{ mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random; }}
            chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
            chain reject-chain {{ reject; }}
            map no-endpoint-services {{
                type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ 10.96.0.77 . tcp . 80 : goto reject-chain }};
            }}
            chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
            chain filter-forward {{ type filter hook forward priority filter; ct state new jump service-endpoints-check; }}
        }}"
    );
    one.netns().command("nft", [rules.as_str()])?;
    let to = node.to_string();
    let trace = || one.huskctl_json(["trace", "default/web", &to, "--port", "30080"]);
    ensure!(trace()?["translated"].is_null(), "nobody has connected yet");
    ensure!(answers(scene.pod("web").netns(), Service::Tcp(30080), node)?, "the NodePort does not answer");
    let report = trace()?;
    let translated = &report["translated"];
    ensure!(translated["to"] == format!("{far}:8080") && report["destination"]["pod"]["name"] == "far", "{report:#}");
    ensure!(report["broken"].is_null(), "{report:#}");
    // Whom the other end sees is not the pod.
    let router = one.router(Family::Ipv4)?.to_string();
    ensure!(translated["masqueraded"] == router.as_str(), "{report:#}");
    let text = one.huskctl(["trace", "default/web", &to, "--port", "30080"])?.stdout;
    ensure!(text.contains(&format!("the source became {router}, which the other end and its policy see")), "{text}");
    eprintln!("{text}");
    // A Service without endpoints is refused by kube-proxy, and that is what is told.
    let traced = Traced::ask(one, "default/web", "10.96.0.77", &[])?;
    traced.ensure_broken(
        "otherFirewalls",
        "chain reject-chain (nftables table ip kube-proxy, hook forward) drops",
        "",
    )?;
    one.netns().command("nft", ["delete", "table", "ip", "kube-proxy"])?;
    Ok(())
}

/// What another table drops no rule of ours can save, and that is what is told, with commands that mend it.
fn other_firewalls(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let (web, far) = (scene.pod("web"), scene.pod("far").address(Family::Ipv4)?);
    let arrives = || answers(web.netns(), Service::Tcp(80), far);
    let drops_pods = "table ip company { chain FORWARD { type filter hook forward priority 0; policy drop; oifname docker0 accept; }; }";
    let drops_one = format!(
        "table inet company {{ chain services {{ ip daddr {far} tcp dport 80 drop; }}; chain forward {{ type filter hook forward priority 0; \
         jump services; }}; }}"
    );
    for (rules, cause) in [
        (drops_pods, "the policy of chain FORWARD (nftables table ip company"),
        (&drops_one, "of chain services (nftables"),
    ] {
        one.netns().command("nft", [rules])?;
        ensure!(!arrives()?, "{rules} should drop it");
        let traced = Traced::ask(one, "default/web", "default/far", &[])?;
        traced.ensure_broken("otherFirewalls", cause, "accept them in")?;
        let text = one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?;
        let lead = "The first hop that is broken is the other firewalls: ";
        ensure!(text.status.code() == Some(1) && text.stdout.starts_with("BROKEN  TCP"), "{text:?}");
        ensure!(text.stdout.contains(lead), "{text:?}");
        eprintln!("{}", text.stdout);
        // As somebody who pastes them.
        let commands = traced.hop("otherFirewalls")["commands"].as_array().context("a remedy has commands")?.clone();
        for command in commands.iter().filter_map(Value::as_str) {
            one.program("/bin/sh").args(["-ec", command]).check().with_context(|| command.to_owned())?;
        }
        ensure!(!commands.is_empty() && arrives()?, "{commands:?} should let it pass");
        Traced::ask(one, "default/web", "default/far", &[])?.ensure_passes(&["otherFirewalls"])?;
        let table: Vec<&str> = rules.split_whitespace().skip(1).take(2).collect();
        one.netns().command("nft", [format!("delete table {}", table.join(" ")).as_str()])?;
    }
    // The tunnel's own packets, of which neither pod nor host is the sender.
    firewall::raise(one.netns(), At::Input, &["udp dport 4789 drop"])?;
    let traced = Traced::ask(one, "default/web", "default/far", &[])?;
    traced.ensure_broken("otherFirewalls", "drops the tunnels' packets (UDP port 4789)", "accept them in c")?;
    firewall::lift(one.netns())?;
    await_whole(one)
}

/// In another network namespace than the daemon's nothing is taken for the host, whose is told how to be entered.
fn from_elsewhere(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let huskctl = binary("huskctl")?;
    let huskctl = huskctl.to_str().context("a path of letters")?;
    let away =
        |unshare: &[&str], command: &[&str]| one.program("unshare").args(unshare).args([huskctl]).args(command).run();
    let doctor = ["doctor", "--only", "daemon", "--only", "leases", "-o", "json"];
    for command in [&doctor[..], &["support-bundle"], &["capture", "host"], &["ipam", "release", "10.42.0.2"]] {
        let refused = away(&["--net"], command)?;
        let told = refused.stderr.contains("runs in another network namespace (net:[");
        ensure!(refused.status.code() == Some(3) && refused.stdout.is_empty() && told, "{command:?}: {refused:?}");
    }
    let refused = away(&["--net"], &doctor)?;
    eprintln!("{}", refused.stderr);
    let (_, instead) = refused.stderr.trim().split_once("Run: ").context("it says what to run")?;
    let obeyed = one.program("unshare").args(["--net", "sh", "-ec", instead]).run()?;
    let report: Value = serde_json::from_str(&obeyed.stdout).with_context(|| format!("{obeyed:?}"))?;
    ensure!(report["checks"].as_array().is_some_and(|it| it.iter().all(|it| it["outcome"] == "well")), "{report:#}");
    // Where the daemon's process cannot be seen there is no such command.
    let refused = away(&["--net", "--pid", "--fork", "--mount-proc"], &doctor)?;
    ensure!(refused.status.code() == Some(3) && refused.stderr.contains("kubectl -n husk-system exec"), "{refused:?}");
    // The same namespace seen from another pid namespace is the same.
    let seen = away(&["--pid", "--fork", "--mount-proc"], &doctor)?;
    ensure!(seen.status.code() == Some(0), "{seen:?}");
    // The daemon is asked from anywhere; what huskctl would look at itself is left open.
    let traced = away(&["--net"], &["trace", "default/web", "default/near", "--port", "80", "-o", "json"])?;
    let traced = Traced { report: serde_json::from_str(&traced.stdout)?, status: traced.status.code() };
    traced.ensure_passes(&["source", "firewall", "destination"])?;
    let why = traced.hop("otherFirewalls")["why"].to_string();
    ensure!(why.contains("could not be looked at: this command looks at the host itself"), "{why}");
    Ok(())
}

/// What is broken on the node that is asked.
fn of_this_node(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let traced = Traced::ask(one, "default/web", "default/far", &["--size", "1600"])?;
    traced.ensure_broken("mtu", "a packet of 1600 bytes does not fit", "send at most 1450 bytes")?;
    let traced = Traced::ask(one, &Cluster::outside_address(Family::Ipv4).to_string(), "default/web", &[])?;
    traced.ensure_broken("firewall", "to a pod's own address are dropped", "Service")?;

    let nobody = nobodys_address(&scene.cluster)?.to_string();
    let traced = Traced::ask(one, "default/web", &nobody, &[])?;
    traced.ensure_broken("route", &format!("no node of the cluster owns {nobody}"), "huskctl peers")?;

    let web = json!({"matchLabels": {"app": "web"}});
    scene.policy("default", "closed", &json!({"podSelector": web, "policyTypes": ["Egress"]}))?;
    let mut traced = None;
    eventually("the policy to be in force", FOUND, || {
        let answer = Traced::ask(one, "default/web", "default/far", &[])?;
        let denied = answer.broken() == Some("egressPolicy");
        traced = Some(answer);
        Ok(denied)
    })?;
    let traced = traced.context("it was asked")?;
    traced.ensure_broken("egressPolicy", "default deny by: default/closed", "huskctl policy show default/web")?;
    eprintln!("{}", one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?.stdout);
    scene.clear()?;
    await_whole(one)
}

/// An address of the cluster that is in no node's block.
fn nobodys_address(cluster: &Cluster) -> Result<IpAddr> {
    let mut blocks = cluster.host(1).blocks()?;
    blocks.extend(cluster.host(2).blocks()?);
    let cidrs = cluster.cluster_cidrs();
    let cidr = cidrs.iter().find(|it| it.family() == Family::Ipv4).context("the cluster has IPv4")?;
    let IpAddr::V4(first) = cidr.address() else { bail!("{cidr} is of IPv4") };
    let mut candidates = (0..4).map(|number| IpAddr::from((u32::from(first) + 9 + number * 64).to_be_bytes()));
    candidates.find(|it| !blocks.iter().any(|block| block.contains(*it))).context("two of four blocks are free")
}

/// A firewall on the way takes the tunnel's packets, and nothing else.
fn filtered(scene: &Scene) -> Result<()> {
    let (cluster, one) = (&scene.cluster, scene.cluster.host(1));
    block(cluster, true)?;
    let traced = await_broken(one, "probe")?;
    let port = port(cluster.mode());
    traced.ensure_broken("probe", "packets of the tunnel are filtered on the way", &format!("UDP {port}"))?;
    traced.ensure_broken("probe", "no probe is answered by host2", "host2")?;
    eprintln!("{}", one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?.stdout);
    block(cluster, false)?;
    await_whole(one)
}

/// The other host is not on the network any more.
fn cut_off(scene: &Scene) -> Result<()> {
    let (cluster, one) = (&scene.cluster, scene.cluster.host(1));
    cluster.set_cable(2, false)?;
    // The kernel forgets and asks for the neighbour in turns; as it asks, the underlay is what is broken.
    let mut last = None;
    eventually("the cable to be missed", FOUND, || {
        let traced = Traced::ask(one, "default/web", "default/far", &["--probe"])?;
        let missed = traced.ensure_broken("underlay", "does not answer on eth0", "is host2 up").is_ok()
            || traced
                .ensure_broken("probe", "does not answer on the underlay either", "is host2 (192.0.2.2) up")
                .is_ok();
        last = Some(traced);
        Ok(missed)
    })
    .with_context(|| format!("{last:#?}"))?;
    cluster.set_cable(2, true)?;
    await_whole(one)
}

/// The data plane of a host whose daemon is dead goes on, and that is what is told.
fn without_daemon(scene: &Scene) -> Result<()> {
    let (cluster, one) = (&scene.cluster, scene.cluster.host(1));
    cluster.host(2).stop_daemon(Signal::SIGKILL)?;
    let mut told = String::new();
    eventually("the daemon to be missed", FOUND, || {
        let traced = Traced::ask(one, "default/web", "default/far", &["--probe"])?;
        traced.ensure_passes(&["tunnel", "underlay"])?;
        told = traced.hop("probe").to_string();
        Ok(told.contains("host2 answers through the tunnel (TCP), its daemon does not"))
    })
    .context(told)?;
    eprintln!("{}", one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?.stdout);
    cluster.host(2).start_daemon()?;
    cluster.host(2).wait_ready()?;
    await_whole(one)
}

/// The other node claims an address that is this one's.
fn refused(scene: &Scene) -> Result<()> {
    let (cluster, one) = (&scene.cluster, scene.cluster.host(1));
    cluster.host(2).stop_daemon(Signal::SIGKILL)?;
    let path = cluster.record_path(2);
    let record = fs::read_to_string(&path)?;
    let [own, theirs] = [one, cluster.host(2)].map(|host| host.address(Family::Ipv4).map(|it| it.to_string()));
    fs::write(&path, record.replace(&theirs?, &own?))?;
    let traced = await_broken(one, "route")?;
    traced.ensure_broken(
        "route",
        "nothing is sent to host2: the node claims the underlay address",
        "address of its own",
    )?;
    fs::write(&path, record)?;
    cluster.host(2).start_daemon()?;
    cluster.host(2).wait_ready()?;
    await_whole(one)
}

/// Somebody sets the interface inside a pod down.
fn unplugged(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    scene.pod("web").netns().command("ip", ["link", "set", "eth0", "down"])?;
    let traced = Traced::ask(one, "default/web", "default/far", &[])?;
    traced.ensure_broken("source", "in the pod, the interface eth0 is down", "delete the pod")?;
    let text = one.huskctl(["trace", "default/web", "default/far", "--port", "80"])?;
    ensure!(
        text.stdout.starts_with("BROKEN  TCP") && text.stdout.contains("The first hop that is broken is the source"),
        "{text:?}"
    );
    // The end tells it all, and the line of the hop the cause alone.
    ensure!(text.stdout.matches("lacks the address").count() == 1, "{text:?}");
    eprintln!("{}", text.stdout);
    Ok(())
}
