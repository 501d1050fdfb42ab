//! Ports of hosts that lead to pods: for whom, from where, and until when.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etherparse::{IpNumber, PacketBuilder};
use husk_tests::kernel::{self, Part};
use husk_tests::netns::Netns;
use husk_tests::probe::{Datagram, EchoServer, tcp};
use husk_tests::runtime::{Attachment, Network, Refusal};
use husk_tests::{Capture, Cluster, Family, Host, Mode, Packet, Pod, Signal, eventually, patience};
use serde_json::{Value, json};

/// Where the servers in the pods listen.
const CONTAINER_PORT: u16 = 7000;

/// Bytes of one verified transfer.
const TRANSFER: u64 = 20_000;

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long an answer that will not come is waited for.
const BRIEFLY: Duration = Duration::from_millis(150);

/// A pod with a server in it. The server goes first when both are dropped.
struct Published {
    server: EchoServer,
    pod: Pod,
}

/// A pod that wants ports, not attached yet.
fn wanting(host: &Host, name: &str, mappings: Value) -> Result<Pod> {
    let mut pod = host.sandbox(name)?;
    pod.spec_mut().runtime_config = Some(json!({"portMappings": mappings}));
    Ok(pod)
}

impl Published {
    fn start(host: &Host, name: &str, mappings: Value) -> Result<Self> {
        let mut pod = wanting(host, name, mappings)?;
        pod.add()?.into_result().with_context(|| format!("ADD of {name}"))?;
        let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), CONTAINER_PORT);
        Ok(Self { server: EchoServer::start_on(pod.netns(), at)?, pod })
    }

    fn seen(&self, client: &Netns, at: SocketAddr) -> Result<IpAddr> {
        seen(&self.server, client, at)
    }
}

/// Talks to a server over TCP and UDP and returns the address under which it saw the client, both times.
fn seen(server: &EchoServer, client: &Netns, at: SocketAddr) -> Result<IpAddr> {
    let what = || format!("{} to {at}", client.name());
    let known = server.peers();
    tcp::transfer(client, at, TRANSFER).with_context(what)?;
    let reach = Datagram::to(at).run(client).with_context(what)?;
    ensure!(reach.arrived(), "{}: a datagram: {reach:?}", what());
    let mut new: Vec<IpAddr> =
        server.peers().into_iter().filter(|it| !known.contains(it)).map(|it| unmapped(it.ip())).collect();
    new.dedup();
    ensure!(new.len() == 1, "{}: the pod saw {new:?}", what());
    Ok(new[0])
}

/// A server of both families sees IPv4 clients under addresses of IPv6.
fn unmapped(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Mappings of one port for TCP and UDP.
fn both_protocols(host_port: u16) -> Value {
    json!([
        {"hostPort": host_port, "containerPort": CONTAINER_PORT, "protocol": "tcp"},
        {"hostPort": host_port, "containerPort": CONTAINER_PORT, "protocol": "udp"},
    ])
}

/// True if somebody answers there over TCP.
fn answers(client: &Netns, at: SocketAddr) -> bool {
    tcp::connect(client, at, Duration::from_secs(1)).is_ok()
}

#[test]
fn everybody_reaches_a_mapped_port_in_direct_mode() -> Result<()> {
    everybody(Mode::Direct)
}

#[test]
fn everybody_reaches_a_mapped_port_in_vxlan_mode() -> Result<()> {
    everybody(Mode::Vxlan)
}

/// Where the kernel has ESP; on others these modes are not to be had, which `esp_missing` is about.
#[test]
fn everybody_reaches_a_mapped_port_through_esp_where_there_is_any() -> Result<()> {
    let modes = if kernel::has(Part::Esp)? { &[Mode::Ipsec, Mode::VxlanIpsec][..] } else { &[] };
    modes.iter().try_for_each(|mode| everybody(*mode))
}

#[test]
fn everybody_reaches_a_mapped_port_in_wireguard_mode() -> Result<()> {
    everybody(Mode::Wireguard)
}

/// Clients keep their addresses as far as answers can come back to them.
fn everybody(mode: Mode) -> Result<()> {
    let cluster = Cluster::builder().mode(mode).dual_stack().hosts(2).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let conflist: Value = serde_json::from_str(&std::fs::read_to_string(one.conflist_path())?)?;
    assert_eq!(conflist["plugins"][0]["capabilities"]["portMappings"], true, "runtimes pass on what is declared");
    let web = Published::start(one, "web", both_protocols(8080))?;
    let (near, far) = (one.add_pod("near")?, two.add_pod("far")?);
    let wire = cluster.capture()?;
    for family in Family::ALL {
        let what = |who: &str| format!("{mode}, {family}: {who}");
        let at = SocketAddr::new(one.address(family)?, 8080);
        let own = one.router(family)?;
        let seen = |client: &Netns, at| web.seen(client, at).with_context(|| what(client.name()));
        assert_eq!(seen(two.netns(), at)?, two.address(family)?, "{}", what("another host"));
        assert_eq!(seen(far.netns(), at)?, two.address(family)?, "{}", what("a pod of another host, masqueraded"));
        assert_eq!(seen(near.netns(), at)?, near.address(family)?, "{}", what("a pod of this host"));
        assert_eq!(seen(one.netns(), at)?, at.ip(), "{}", what("the host itself"));
        assert_eq!(seen(web.pod.netns(), at)?, own, "{}", what("the pod itself"));
        assert_eq!(seen(cluster.outside(), at)?, Cluster::gateway(family), "{}", what("the outside"));
        if family == Family::Ipv4 {
            let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8080);
            assert_eq!(seen(one.netns(), loopback)?, own, "{}", what("the host, through loopback"));
        } else {
            let loopback = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 8080);
            assert!(!answers(one.netns(), loopback), "{}", what("::1 leads to no pod"));
        }
        if mode.tunnelled() {
            let inside = SocketAddr::new(own, 8080);
            assert_eq!(seen(far.netns(), inside)?, far.address(family)?, "{}", what("through the tunnel"));
        }
        // The pod's own address and port are what they were, and the mapped port is the host's alone.
        assert_eq!(seen(far.netns(), SocketAddr::new(web.pod.address(family)?, CONTAINER_PORT))?, far.address(family)?);
        assert!(!answers(near.netns(), SocketAddr::new(web.pod.address(family)?, 8080)));
        assert!(!answers(one.netns(), SocketAddr::new(two.address(family)?, 8080)), "the other host has no such port");
    }
    let trace = wire.stop()?;
    if mode.encrypted() {
        assert_eq!(trace.readable(cluster.cluster_cidrs()), 0, "{:?}", trace.kinds());
    }
    web.pod.check()?.into_result()?;
    cluster.ensure_settled()
}

/// A mapping of one address leads from there and from nowhere else, so that two pods can have one port.
#[test]
fn a_mapping_may_be_for_one_address_of_the_host() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).dual_stack().hosts(1).start()?;
    let host = cluster.host(1);
    let [four, six] = [host.address(Family::Ipv4)?, host.address(Family::Ipv6)?];
    let of = |address: &str| {
        json!([
            {"hostPort": 9000, "containerPort": CONTAINER_PORT, "hostIP": address},
            {"hostPort": 9000, "containerPort": CONTAINER_PORT, "hostIP": address, "protocol": "UDP"},
        ])
    };
    let any_of_six = host.huskctl_json(["status"])?["router"]["ipv6"].as_str().context("no router")?.parse()?;
    let pods = [
        (Published::start(host, "loopback", of("127.0.0.1"))?, vec![Ipv4Addr::LOCALHOST.into()]),
        (Published::start(host, "four", of(&four.to_string()))?, vec![four]),
        (Published::start(host, "six", of("::"))?, vec![six, any_of_six]),
    ];
    // One address of IPv6 alone: the others of the host, and its IPv4, have no such port.
    let single = json!([
        {"hostPort": 9001, "containerPort": CONTAINER_PORT, "hostIP": six.to_string()},
        {"hostPort": 9001, "containerPort": CONTAINER_PORT, "hostIP": six.to_string(), "protocol": "udp"},
    ]);
    let single = Published::start(host, "single", single)?;
    let at = SocketAddr::new(six, 9001);
    assert_eq!(single.seen(cluster.outside(), at)?, Cluster::gateway(Family::Ipv6));
    assert_eq!(single.seen(host.netns(), at)?, six);
    for other in [any_of_six, four] {
        assert!(!answers(host.netns(), SocketAddr::new(other, 9001)), "{other} has no such port");
    }
    for (published, addresses) in &pods {
        for address in addresses {
            published.seen(host.netns(), SocketAddr::new(*address, 9000))?;
        }
    }
    assert_eq!(pods[1].0.seen(cluster.outside(), SocketAddr::new(four, 9000))?, Cluster::gateway(Family::Ipv4));
    let routed = |published: &Published| {
        let interface = published.pod.result()["interfaces"][0]["name"].as_str().unwrap_or_default().to_owned();
        host.netns().command("sysctl", ["-n", &format!("net.ipv4.conf.{interface}.route_localnet")])
    };
    let set: Result<Vec<String>> = pods.iter().map(|(published, _)| Ok(routed(published)?.trim().to_owned())).collect();
    assert_eq!(set?, ["1", "0", "0"], "loopback addresses are routed only where they have to be");
    cluster.ensure_settled()
}

/// What is refused, why, and that nothing is left of it.
#[test]
fn a_port_is_one_pods() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let web = Published::start(host, "web", both_protocols(8080))?;
    let refused = |mappings: Value| -> Result<(Option<u64>, String)> {
        let outcome = wanting(host, "other", mappings)?.add()?;
        Ok((outcome.error_code(), outcome.stdout))
    };
    let port = |number: Value| json!({"hostPort": number, "containerPort": 80});
    for (mappings, code, part) in [
        (json!([port(json!(8080))]), 106, "default/web"),
        (json!([{"hostPort": 8080, "containerPort": 80, "hostIP": "192.0.2.77"}]), 106, "192.0.2.77:8080"),
        (json!([{"hostPort": 4789, "containerPort": 80, "protocol": "udp"}]), 106, "tunnel"),
        (json!([port(json!(1)), port(json!(1)), {"hostPort": 1, "containerPort": 81}]), 7, "clashes"),
        (json!([port(json!(0))]), 7, "hostPort"),
        (json!([port(json!(65536))]), 7, "65536"),
        (json!([{"hostPort": 1, "containerPort": 80, "protocol": "icmp"}]), 7, "icmp"),
    ] {
        let (got, said) = refused(mappings.clone())?;
        assert!(got == Some(code) && said.contains(part), "{mappings}: {got:?} {said}");
    }
    let leases = host.huskctl_json(["ipam", "show"])?;
    assert_eq!(leases["leases"].as_array().map(Vec::len), Some(1), "{leases:#}");
    assert_eq!(leases["leases"][0]["portMappings"][0]["hostPort"], 8080, "{leases:#}");

    // With its pod, the claim is gone: at once, for whoever asks for the port next.
    web.pod.del()?.into_result()?;
    let next = Published::start(host, "next", both_protocols(8080))?;
    next.seen(host.netns(), SocketAddr::new(host.address(Family::Ipv4)?, 8080))?;
    Ok(())
}

/// A client of UDP that goes on sending from one port.
struct Chatter {
    socket: UdpSocket,
}

impl Chatter {
    fn start(netns: &Netns, to: SocketAddr) -> Result<Self> {
        let socket = netns.run(|| -> std::io::Result<_> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(to)?;
            Ok(socket)
        })??;
        socket.set_read_timeout(Some(patience(BRIEFLY)))?;
        Ok(Self { socket })
    }

    /// Sends once; true if something came back.
    fn answered(&self) -> bool {
        let mut answer = [0; 64];
        self.socket.send(b"still here").is_ok() && self.socket.recv(&mut answer).is_ok()
    }
}

/// The kernel goes on translating a connection as it began. A client that never pauses must all the same get to the pod that
/// has the port now, and to none when there is none.
#[test]
fn a_client_that_goes_on_sending_gets_to_whom_the_port_belongs() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let at = SocketAddr::new(host.address(Family::Ipv4)?, 5353);
    let chatter = Chatter::start(cluster.outside(), at)?;
    let entries =
        |what: &str| -> Result<bool> { Ok(host.netns().command("cat", ["/proc/net/nf_conntrack"])?.contains(what)) };
    // A connection that begins before there is a mapping.
    assert!(!chatter.answered());

    let first = Published::start(host, "first", both_protocols(5353))?;
    eventually("the first pod's answer", PATIENCE, || Ok(chatter.answered()))?;
    let old = first.pod.address(Family::Ipv4)?;
    assert!(entries(&old.to_string())?, "the connection is known");

    // Its address is taken over by a pod that has no ports but listens to whatever comes.
    first.pod.del()?.into_result()?;
    drop(first);
    eventually("the connection to be forgotten", PATIENCE, || {
        chatter.answered();
        Ok(!entries(&old.to_string())?)
    })?;
    let mut heir = host.sandbox("heir")?;
    heir.spec_mut().runtime_config = Some(json!({"ips": [old.to_string()]}));
    heir.add()?.into_result()?;
    let eavesdropper = EchoServer::start_on(heir.netns(), SocketAddr::new(old, CONTAINER_PORT))?;
    assert!(!chatter.answered());
    assert_eq!(eavesdropper.peers(), []);

    let second = Published::start(host, "second", both_protocols(5353))?;
    eventually("the second pod's answer", PATIENCE, || Ok(chatter.answered()))?;
    assert_eq!((second.server.peers().len(), eavesdropper.peers().len()), (1, 0));

    // The daemon is away while the pod goes; what it left behind is found when it is back.
    host.stop_daemon(Signal::SIGKILL)?;
    second.pod.del()?.into_result()?;
    let stale = second.pod.address(Family::Ipv4)?.to_string();
    drop(second);
    let mapped = || host.program("nft").args(["list", "table", "inet", "husk"]).check();
    assert!(mapped()?.contains("udp . 5353"));
    host.start_daemon()?;
    host.wait_ready()?;
    eventually("the mapping and its connection to be gone", PATIENCE, || {
        chatter.answered();
        Ok(!mapped()?.contains("udp . 5353") && !entries(&stale)?)
    })?;
    cluster.ensure_settled()
}

/// The daemon is killed when it has changed the mappings and has not ended their connections yet: the next one finds nothing to
/// change, and ends them all the same.
#[test]
fn connections_that_a_killed_daemon_left_end_with_the_next_one() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let at = |port| Ok::<_, anyhow::Error>(SocketAddr::new(host.address(Family::Ipv4)?, port));
    let (kept, gone) =
        (Published::start(host, "kept", both_protocols(53))?, Published::start(host, "gone", both_protocols(54))?);
    let (of_kept, of_gone) = (Chatter::start(cluster.outside(), at(53)?)?, Chatter::start(cluster.outside(), at(54)?)?);
    assert!(of_kept.answered() && of_gone.answered());
    let stale = gone.pod.address(Family::Ipv4)?.to_string();
    let known =
        |pod: &str| -> Result<bool> { Ok(host.netns().command("cat", ["/proc/net/nf_conntrack"])?.contains(pod)) };
    host.stop_daemon(Signal::SIGKILL)?;
    gone.pod.del()?.into_result()?;
    for map in ["host_ports_ipv4_to_address", "host_ports_ipv4_to_port"] {
        for protocol in ["tcp", "udp"] {
            let element = format!("{{ {protocol} . 54 }}");
            host.program("nft").args(["delete", "element", "inet", "husk", map, &element]).check()?;
        }
    }
    let hairpin = format!("{{ {stale} . {stale} }}");
    host.program("nft").args(["delete", "element", "inet", "husk", "hairpin_ipv4", &hairpin]).check()?;
    assert!(known(&stale)?, "nobody has ended it yet");
    host.start_daemon()?;
    host.wait_ready()?;
    eventually("the connection to have ended", PATIENCE, || Ok(!known(&stale)?))?;
    assert!(!of_gone.answered());
    // The other one is as it was, to the daemon and to its client.
    assert!(known(&kept.pod.address(Family::Ipv4)?.to_string())? && of_kept.answered());
    assert_eq!(kept.server.peers().len(), 1);
    cluster.ensure_settled()
}

/// A server that is gone with its pod does not say so, and its client would wait for ever: the host, which nobody maps the port of
/// any more, refuses the next packet.
#[test]
fn a_tcp_connection_through_a_mapping_is_cut_with_it() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let web = Published::start(host, "web", both_protocols(8080))?;
    let at = SocketAddr::new(host.address(Family::Ipv4)?, 8080);
    tcp::transfer(cluster.outside(), at, TRANSFER)?;
    let mut stream = tcp::connect(cluster.outside(), at, PATIENCE)?;
    stream.set_read_timeout(Some(patience(BRIEFLY)))?;
    let pod = web.pod.address(Family::Ipv4)?.to_string();
    let known = || -> Result<bool> { Ok(host.netns().command("cat", ["/proc/net/nf_conntrack"])?.contains(&pod)) };
    assert!(known()?);
    web.pod.del()?.into_result()?;
    eventually("the connection to be forgotten", PATIENCE, || Ok(!known()?))?;
    eventually("the client to be told", PATIENCE, || {
        let cut = |error: &std::io::Error| {
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted)
        };
        let mut answer = [0; 64];
        let sent = stream.write(b"still there?");
        Ok(sent.is_err_and(|error| cut(&error)) || stream.read(&mut answer).is_err_and(|error| cut(&error)))
    })?;
    cluster.ensure_settled()
}

/// What an outsider takes away comes back, for connections of before, too; while it is away, CHECK says so.
#[test]
fn mappings_that_an_outsider_removes_come_back() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let web = Published::start(host, "web", both_protocols(8080))?;
    let at = SocketAddr::new(host.address(Family::Ipv4)?, 8080);
    let chatter = Chatter::start(cluster.outside(), at)?;
    assert!(chatter.answered());
    let interface = web.pod.result()["interfaces"][0]["name"].as_str().context("no host interface")?.to_owned();
    let localnet = format!("net.ipv4.conf.{interface}.route_localnet=0");
    for (command, part) in [
        ("nft flush map inet husk host_ports_ipv4_to_address", "host_ports_ipv4_to_address"),
        ("nft flush chain inet husk prerouting-host-ports", "prerouting-host-ports"),
        ("nft delete table inet husk", "table inet husk"),
        (&format!("sysctl -q -w {localnet}"), "route_localnet is 0"),
    ] {
        host.stop_daemon(Signal::SIGTERM)?;
        web.pod.check()?.into_result().context("a daemon that is away is no deviation")?;
        let mut words = command.split(' ');
        host.program(words.next().unwrap_or_default()).args(words).check()?;
        let outcome = web.pod.check()?;
        assert_eq!(outcome.error_code(), Some(103), "{command}: {}", outcome.stdout);
        assert!(outcome.stdout.contains(part), "{command}: {}", outcome.stdout);
        host.start_daemon()?;
        host.wait_ready()?;
        eventually(&format!("{command} to be undone"), PATIENCE, || {
            Ok(web.pod.check()?.success() && answers(cluster.outside(), at) && chatter.answered())
        })?;
    }
    let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8080);
    tcp::transfer(host.netns(), loopback, TRANSFER)?;
    // With the daemon there, nobody has to start it.
    host.program("nft").args(["flush", "ruleset"]).check()?;
    eventually("the flush to be undone", PATIENCE, || Ok(answers(cluster.outside(), at) && chatter.answered()))?;
    cluster.ensure_settled()
}

/// That loopback addresses are routed to a pod must not let the pod reach what listens on its host's.
#[test]
fn a_pod_does_not_reach_what_listens_on_loopback() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let host = cluster.host(1);
    let web = Published::start(host, "web", both_protocols(8080))?;
    let private = EchoServer::start_on(host.netns(), SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0))?;
    let pod = web.pod.netns();
    let own = web.pod.address(Family::Ipv4)?;
    // Before the loopback interface loses its address, which capturing needs to begin.
    let wire = Capture::on(pod, "eth0")?;
    pod.sysctl("net/ipv4/conf/eth0/route_localnet", "1")?;
    pod.ip_batch(&format!(
        "addr del 127.0.0.1/8 dev lo\nroute add 127.0.0.1/32 via 169.254.1.1 dev eth0 onlink src {own}\n"
    ))?;
    let to = private.at(Ipv4Addr::LOCALHOST.into());
    let sent = || -> Result<()> {
        pod.run(|| -> std::io::Result<()> { UdpSocket::bind((own, 0))?.send_to(b"let me in", to).map(drop) })??;
        Ok(())
    };
    sent()?;
    wire.wait_for("the pod's packet", PATIENCE, |packet| packet.ports.is_some_and(|(_, port)| port == to.port()))?;
    std::thread::sleep(patience(BRIEFLY));
    assert_eq!(private.peers(), []);
    // The same packet arrives where nothing stops it.
    host.stop_daemon(Signal::SIGKILL)?;
    host.program("nft").args(["flush", "chain", "inet", "husk", "prerouting-guard"]).check()?;
    eventually("the packet to arrive without the guard", PATIENCE, || {
        sent()?;
        Ok(!private.peers().is_empty())
    })
}

/// Who prefers the reference plugin chains it behind Husk, which is then not told of the ports.
#[test]
fn the_reference_plugin_works_in_the_place_of_it() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).dual_stack().hosts(2).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let mut conflist: Value = serde_json::from_str(&std::fs::read_to_string(one.conflist_path())?)?;
    conflist["plugins"][0]["capabilities"]["portMappings"] = json!(false);
    let portmap = json!({"type": "portmap", "snat": true, "capabilities": {"portMappings": true}});
    // The newest version of the specification that Debian's reference plugins know.
    let network = Network::read(one, &conflist, "1.0.0")?.chained([portmap]);
    let (near, far) = (one.add_pod("near")?, two.add_pod("far")?);
    let sandbox = one.sandbox("web")?;
    let mut web = Attachment::new("web", "eth0", sandbox.netns());
    web.capabilities.insert("portMappings".to_owned(), both_protocols(8080));
    network.add(&mut web)?;
    let leases = one.huskctl_json(["ipam", "show"])?["leases"].to_string();
    assert!(!leases.contains("hostPort"), "{leases}");
    let server = EchoServer::start_on(sandbox.netns(), SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), CONTAINER_PORT))?;
    for family in Family::ALL {
        let at = SocketAddr::new(one.address(family)?, 8080);
        let clients = [cluster.outside(), one.netns(), two.netns(), near.netns(), far.netns(), sandbox.netns()];
        for client in clients {
            seen(&server, client, at)?;
        }
    }
    let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8080);
    seen(&server, one.netns(), loopback)?;
    cluster.ensure_settled()?;
    // Husk finds nothing amiss in what was chained behind it. The CHECK of Debian's plugin (1.1.1) fails wherever there is
    // ip6tables: it looks for the rules of each family in the tables of both.
    if let Err(error) = network.check(&web) {
        assert_eq!(error.downcast::<Refusal>()?.plugin, "portmap");
    }
    // What the daemon puts right leaves the other's rules alone.
    one.program("nft").args(["delete", "table", "inet", "husk"]).check()?;
    eventually("Husk's rules to be back", PATIENCE, || Ok(one.huskctl(["diff"])?.status.code() == Some(0)))?;
    seen(&server, one.netns(), loopback)?;

    network.del(&web)?;
    network.del(&web)?;
    assert!(
        !answers(one.netns(), loopback)
            && !answers(cluster.outside(), SocketAddr::new(one.address(Family::Ipv4)?, 8080))
    );
    cluster.ensure_settled()
}

/// CRC-32c, reflected (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// SCTP's first packet (RFC 9260, sections 3.1 and 3.3.2): the common header, then an INIT chunk.
fn sctp_init(from: u16, to: u16) -> Vec<u8> {
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    // Verification tag and checksum; type, flags and length of the chunk; tag, window, streams and sequence number.
    packet.extend([0; 8]);
    packet.extend([1, 0, 0, 20]);
    packet.extend([0, 0, 0, 7, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1]);
    let checksum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&checksum);
    packet
}

/// The SCTP packet within a captured one.
fn sctp_of(packet: &Packet) -> Option<&[u8]> {
    let ip = packet.bytes.get(if packet.ethernet { 14 } else { 0 }..)?;
    // Where the header tells what follows it, and how long it is without options.
    let (protocol, length) = if ip.first()? >> 4 == 4 { (9, 20) } else { (6, 40) };
    (*ip.get(protocol)? == IpNumber::SCTP.0).then(|| ip.get(length..))?
}

/// Most kernels have no sockets for SCTP; what the rules do with its packets shows all the same.
#[test]
fn sctp_is_mapped_like_the_others() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).dual_stack().hosts(2).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let mappings = json!([{"hostPort": 8080, "containerPort": CONTAINER_PORT, "protocol": "SCTP"}]);
    let pod = Published::start(one, "sctp", mappings)?.pod;
    let status = one.huskctl_json(["status"])?;
    let interface = status["underlayInterface"].as_str().context("no underlay interface")?;
    let link = one.netns().ip_json(["link", "show", "dev", interface])?;
    let mac: Vec<u8> = link[0]["address"]
        .as_str()
        .context("no Ethernet address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let mac: [u8; 6] = mac.as_slice().try_into()?;
    for family in Family::ALL {
        let (from, to) = (two.address(family)?, one.address(family)?);
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], mac);
        let packet = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
            _ => anyhow::bail!("{from} and {to}"),
        };
        let mut frame = Vec::new();
        packet.write(&mut frame, IpNumber::SCTP, &sctp_init(4000, 8080))?;
        let inside = Capture::on(pod.netns(), "eth0")?;
        // The second one meets the connection that the first one began.
        for _ in 0..2 {
            cluster.deliver(1, &frame)?;
        }
        let own = pod.address(family)?;
        for what in ["SCTP for the mapped port", "the next packet of it"] {
            inside.wait_for(&format!("{family}: {what}"), PATIENCE, |packet| {
                let Some(sctp) = sctp_of(packet) else { return false };
                let mut unsigned = sctp.to_vec();
                unsigned[8..12].fill(0);
                let translated = packet.addresses == Some((from, own)) && sctp[2..4] == CONTAINER_PORT.to_be_bytes();
                translated && sctp[8..12] == crc32c(&unsigned).to_le_bytes()
            })?;
        }
    }
    Ok(())
}
