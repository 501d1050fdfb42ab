//! `huskctl capture` sees the packets of whom it was asked for, on both sides of the tunnel, and proves what the wire can read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::pod::await_answers_among;
use husk_tests::probe::Echo;
use husk_tests::process::{self, Output};
use husk_tests::{Cluster, Family, Host, Mode, Pod};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(15);

/// Bytes of a pcap file's header, and of a packet's.
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;

#[test]
fn packets_are_captured_in_vxlan_mode() -> Result<()> {
    let stage = Stage::start(Mode::Vxlan)?;
    stage.sides("husk-vx", "VXLAN 4242")?;
    let outer = stage.json(&["host2", "--outer", "--count", "4"])?;
    let pings = || outer.iter().filter(|it| it["protocol"] == "VXLAN 4242" && it["inside"]["protocol"] == "ICMP");
    ensure!(pings().next().is_some(), "{outer:#?}");
    for packet in pings() {
        let ends = [&packet["inside"]["source"]["name"], &packet["inside"]["destination"]["name"]];
        ensure!(ends.iter().any(|name| **name == "default/a"), "{packet}");
    }
    stage.files()?;
    stage.mistakes()?;
    let verified = stage.one().huskctl(["capture", "host2", "--verify-encrypted"])?;
    eprintln!("{}", verified.stdout);
    ensure!(verified.status.code() == Some(1) && verified.stdout.contains("PLAINTEXT"), "{verified:?}");
    ensure!(verified.stdout.contains("10 packets held the marker"), "{verified:?}");
    stage.cluster.ensure_settled()
}

#[test]
fn packets_are_captured_in_wireguard_mode() -> Result<()> {
    let stage = Stage::start(Mode::Wireguard)?;
    stage.sides("husk-wg", "WireGuard data")?;
    let verified = stage.one().huskctl(["capture", "host2", "--verify-encrypted"])?;
    eprintln!("{}", verified.stdout);
    ensure!(verified.status.code() == Some(0) && verified.stdout.contains("ENCRYPTED"), "{verified:?}");
    ensure!(verified.stdout.contains("0 packets held the marker"), "{verified:?}");
    // Datagrams that do not come out prove nothing, whatever others send to the node meanwhile: large packets of a pod.
    let netns = stage.one().netns();
    let chain = "type filter hook egress device \"husk-wg0\" priority 0; udp dport 4875 meta length 320-1430 drop";
    netns.command("nft", [format!("table netdev between {{ chain c {{ {chain}; }}; }}").as_str()])?;
    let verify = || stage.one().huskctl(["capture", "host2", "--verify-encrypted", "-o", "json"]);
    let verified = stage.pinging(500, verify)?;
    let verified: Value = serde_json::from_str(&verified.stdout)?;
    ensure!(verified["verdict"] == "unproven" && verified["withMarker"] == 0, "{verified}");
    ensure!(verified["recognised"].as_u64() < Some(10), "{verified}");
    ensure!(verified["packets"]["WireGuard data"].as_u64() > Some(20), "{verified}");
    netns.command("nft", ["delete table netdev between"])?;
    stage.cluster.ensure_settled()
}

/// Two hosts with a pod each.
struct Stage {
    cluster: Cluster,
    a: Pod,
    b: Pod,
}

impl Stage {
    fn start(mode: Mode) -> Result<Self> {
        let cluster = Cluster::builder().mode(mode).hosts(2).start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        await_answers_among(&[&a, &b], PATIENCE)?;
        Ok(Self { cluster, a, b })
    }

    fn one(&self) -> &Host {
        self.cluster.host(1)
    }

    /// Captures while the one pod pings the other.
    fn capture(&self, arguments: &[&str]) -> Result<Output> {
        self.pinging(100, || self.one().huskctl(["capture"].into_iter().chain(arguments.iter().copied())))
    }

    /// The one pod pings the other meanwhile, with packets of so many bytes.
    fn pinging(&self, size: usize, work: impl FnOnce() -> Result<Output>) -> Result<Output> {
        let done = AtomicBool::new(false);
        let to = self.b.address(Family::Ipv4)?;
        thread::scope(|scope| {
            let pinging = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Acquire) {
                    Echo::to(to).packet_size(size).limit(Duration::from_millis(200)).run(self.a.netns())?;
                    thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            });
            let captured = work();
            done.store(true, Ordering::Release);
            pinging.join().map_err(|_| anyhow!("the thread that pings panicked"))??;
            captured
        })
    }

    fn json(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let output = self.capture(&[arguments, &["--output", "json"]].concat())?;
        ensure!(output.status.code() == Some(0), "{output:?}");
        output.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// A pod, another node and this one, inside the tunnel and outside of it.
    fn sides(&self, tunnel: &str, protocol: &str) -> Result<()> {
        let (own, theirs) = (self.a.address(Family::Ipv4)?.to_string(), self.b.address(Family::Ipv4)?.to_string());
        let is_between = |packet: &Value| {
            let ends = [&packet["source"]["address"], &packet["destination"]["address"]];
            ends.contains(&&Value::from(own.as_str())) && ends.contains(&&Value::from(theirs.as_str()))
        };
        let filter = format!("icmp and host {theirs}");
        for target in ["default/a", "host2", "host"] {
            let seen = self.json(&[target, "--count", "4", "--filter", &filter])?;
            ensure!(seen.len() == 4 && seen.iter().all(|it| it["protocol"] == "ICMP" && is_between(it)), "{seen:#?}");
            ensure!(seen.iter().any(|it| it["outgoing"] == true) && seen.iter().any(|it| it["outgoing"] == false));
            let is_tunnel = |it: &Value| it["interface"].as_str().is_some_and(|name| name.starts_with(tunnel));
            ensure!(seen.iter().all(|it| is_tunnel(it) == (target != "default/a")), "{seen:#?}");
            let names = seen.iter().flat_map(|it| [&it["source"]["name"], &it["destination"]["name"]]);
            ensure!(names.into_iter().any(|name| name == "default/a"), "{seen:#?}");

            let seen = self.json(&[target, "--outer", "--count", "6"])?;
            ensure!(seen.len() == 6 && seen.iter().all(|it| it["interface"] == "eth0"), "{seen:#?}");
            ensure!(seen.iter().any(|it| it["protocol"] == protocol), "{seen:#?}");
            ensure!(seen.iter().all(|it| !is_between(it)), "{seen:#?}");
            ensure!(seen.iter().any(|it| it["source"]["name"] == "host2"), "{seen:#?}");
        }
        let table = self.capture(&["default/a", "--count", "3"])?;
        eprintln!("{}{}", table.stderr, table.stdout);
        ensure!(table.stderr.contains("capturing packets of the pod default/a on husk"), "{table:?}");
        ensure!(table.stderr.contains("3 packets; that is as many as were asked for"), "{table:?}");
        let quiet = self.capture(&["default/a", "--duration", "1", "--filter", "proto 47"])?;
        ensure!(quiet.stdout.is_empty() && quiet.stderr.contains("0 packets; the time is over"), "{quiet:?}");
        let outer = self.capture(&["a", "--outer", "--count", "1"])?;
        ensure!(outer.stderr.contains("cannot be told from those of others"), "{outer:?}");
        Ok(())
    }

    /// Files, standard output, and Ctrl-C.
    fn files(&self) -> Result<()> {
        let path = self.cluster.scope().directory().join("a.pcap");
        let name = path.to_str().context("a path of text")?;
        let written = self.capture(&["default/a", "--count", "3", "-w", name])?;
        ensure!(written.status.code() == Some(0) && written.stdout.is_empty(), "{written:?}");
        ensure!(fs::metadata(&path)?.permissions().mode() & 0o777 == 0o600);
        let whole = lengths(&fs::read(&path)?)?;
        ensure!(whole.len() == 3 && whole.iter().all(|(kept, length)| kept == length), "{whole:?}");
        let again = self.capture(&["default/a", "--count", "3", "-w", name])?;
        ensure!(again.status.code() == Some(3) && again.stderr.contains("exists already"), "{again:?}");

        // With 50 bytes around it, no packet is as small as that.
        let file = self.cluster.scope().directory().join("cut.pcap");
        let cut = file.to_str().context("a path of text")?;
        let output = self.capture(&["host2", "--outer", "--count", "3", "--snaplen", "64", "-w", cut])?;
        let cut = lengths(&fs::read(&file)?)?;
        ensure!(cut.len() == 3 && cut.iter().all(|(kept, length)| *kept == 64 && *length > 64), "{cut:?} {output:?}");

        let huskctl = process::binary("huskctl")?;
        let huskctl = huskctl.to_str().context("a path of text")?;
        // A disk without room, which nobody else sees.
        let script = format!("mount -t tmpfs -o size=4k none /mnt && exec {huskctl} capture default/a -w /mnt/a.pcap");
        let full = self.pinging(100, || {
            self.one().program("unshare").args(["-m", "sh", "-c", &script]).limit(Duration::from_secs(60)).run()
        })?;
        ensure!(full.status.code() == Some(3) && full.stderr.contains("packets are in it"), "{full:?}");
        ensure!(full.stderr.contains("No space left on device"), "{full:?}");

        let arguments = ["--preserve-status", "-s", "INT", "2", huskctl, "capture", "default/a"];
        let interrupted = self.one().program("timeout").args(arguments).run()?;
        ensure!(
            interrupted.status.code() == Some(0) && interrupted.stderr.contains("; interrupted"),
            "{interrupted:?}"
        );
        let piped = format!("{huskctl} capture default/a --duration 2 -w - | head -c 24 | od -An -tx1 -N4");
        let piped = self.one().program("sh").args(["-c", &piped]).run()?;
        ensure!(piped.stdout.split_whitespace().eq(["4d", "3c", "b2", "a1"]), "{piped:?}");
        Ok(())
    }

    fn mistakes(&self) -> Result<()> {
        let one = self.one();
        let unknown = one.huskctl(["capture", "nobody"])?;
        ensure!(unknown.status.code() == Some(3) && unknown.stderr.contains("huskctl ipam show"), "{unknown:?}");
        let pod = one.huskctl(["capture", "default/a", "--verify-encrypted"])?;
        ensure!(pod.status.code() == Some(3) && pod.stderr.contains("huskctl peers"), "{pod:?}");
        for arguments in [&["--filter", "greater 9"][..], &["--inner", "--outer"], &["--verify-encrypted", "--outer"]] {
            let output = one.huskctl(["capture", "host2"].into_iter().chain(arguments.iter().copied()))?;
            ensure!(output.status.code() == Some(2), "{arguments:?}: {output:?}");
        }
        Ok(())
    }
}

/// How many bytes of each packet a pcap file of Ethernet with nanoseconds has, and how many the packet had.
fn lengths(mut file: &[u8]) -> Result<Vec<(u32, u32)>> {
    let number = |bytes: &[u8], at: usize| -> Result<u32> {
        let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk()).context("the file is cut short")?;
        Ok(u32::from_le_bytes(*bytes))
    };
    ensure!((number(file, 0)?, number(file, 20)?) == (0xa1b2_3c4d, 1), "no such header");
    file = &file[FILE_HEADER..];
    let mut packets = Vec::new();
    while !file.is_empty() {
        ensure!(number(file, 4)? < 1_000_000_000, "nanoseconds");
        let (kept, length) = (number(file, 8)?, number(file, 12)?);
        packets.push((kept, length));
        file = file.get(PACKET_HEADER + usize::try_from(kept)?..).context("the file is cut short")?;
    }
    Ok(packets)
}
