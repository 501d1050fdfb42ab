//! The bundled userspace WireGuard device as a process, in network, mount and PID namespaces made for each test.
//!
//! Needs root, /dev/net/tun, and the tools ip, wg, ping, tcpdump, unshare and nsenter; without them the tests fail.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "helpers of tests may fail like tests")]

use std::io::{BufRead as _, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const HUSKD: &str = env!("CARGO_BIN_EXE_huskd");
const INTERFACE: &str = "husk-wg0";
const SOCKET: &str = "/run/wireguard/husk-wg0.sock";
const LIMIT: Duration = Duration::from_secs(10);

/// Waits for what another process does; panics with `what` when it does not.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "did not happen within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host: namespaces held by a process that ends when its standard input closes, which is when the test ends, however
/// it does. With it ends every process in its PID namespace.
struct Host {
    holder: Child,
    init: String,
}

impl Host {
    fn new() -> Self {
        let setup =
            "mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && ip link set lo up && echo up && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"])
            .args(["sh", "-c", setup])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1) of util-linux must be installed");
        let mut said = [0; 3];
        let read = holder.stdout.as_mut().unwrap().read_exact(&mut said);
        assert!(read.is_ok() && &said == b"up\n", "no namespaces: these tests need root");
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let init = std::fs::read_to_string(children).unwrap().trim().to_owned();
        Self { holder, init }
    }

    /// Two hosts with an underlay of MTU 1500 between them.
    fn pair() -> [Self; 2] {
        let hosts = [Self::new(), Self::new()];
        let [a, b] = &hosts;
        let link = format!("ip link add eth0 type veth peer name eth0 netns {}", b.init);
        check(&a.outside(&link));
        for (host, number) in hosts.iter().zip(1..) {
            host.run("ip link set eth0 up");
            host.run(&format!("ip address add 192.0.2.{number}/24 dev eth0"));
            host.run(&format!("ip address add fd99::{number}/64 dev eth0 nodad"));
        }
        hosts
    }

    /// In the host's network, but with process ids as this test sees them.
    fn outside(&self, command: &str) -> Output {
        let mut words = vec!["-t", &self.init, "-n"];
        words.extend(command.split(' '));
        Command::new("nsenter").args(words).output().expect("nsenter(1) of util-linux must be installed")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init, "-n", "-m", "-p", "--", program]);
        command
    }

    fn output(&self, command: &str) -> Output {
        self.command("sh").args(["-c", command]).output().unwrap()
    }

    /// Runs a command that has to succeed; returns what it printed.
    fn run(&self, command: &str) -> String {
        let output = self.output(command);
        assert!(output.status.success(), "{command}");
        check(&output)
    }

    fn exists(&self, path: &str) -> bool {
        self.output(&format!("test -e {path}")).status.success()
    }

    fn device_command(&self) -> Command {
        let mut command = self.command(HUSKD);
        command.args(["wireguard-userspace", "--interface", INTERFACE]).env_remove("RUST_BACKTRACE");
        command
    }

    /// Starts the device and waits until it answers.
    fn start(&self) -> Device<'_> {
        let child = self.device_command().stderr(Stdio::piped()).spawn().unwrap();
        let mut device = Device { host: self, child };
        eventually("the device answers", || {
            if let Some(status) = device.child.try_wait().unwrap() {
                panic!("the device ended with {status}: {}", device.said());
            }
            self.output(&format!("wg show {INTERFACE}")).status.success()
        });
        device
    }

    /// Runs the device where it must refuse to run; returns what it says.
    fn refused(&self, mut command: Command) -> String {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "it ran: {said}");
        said
    }

    /// Sends a request to the control socket; returns the response.
    fn ask(&self, request: &str) -> String {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1])\n\
                      s.sendall(sys.stdin.buffer.read());b=b''\n\
                      while not b.endswith(b'\\n\\n'):\n d=s.recv(65536)\n if not d: break\n b+=d\n\
                      sys.stdout.buffer.write(b)";
        let mut asker = self
            .command("python3")
            .args(["-c", script, SOCKET])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        asker.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
        check(&asker.wait_with_output().unwrap())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn check(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running device.
struct Device<'a> {
    host: &'a Host,
    child: Child,
}

impl Device<'_> {
    fn signal(&self, name: &str) {
        // The child is nsenter; the device is the one process of that name in its PID namespace.
        self.host.run(&format!("kill -{name} $(pgrep -x huskd)"));
    }

    fn wait(&mut self) -> bool {
        let mut status = None;
        eventually("the device ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

/// Gives both devices keys, each other as peer over the given underlay family, addresses and an MTU.
fn connect(hosts: &[Host; 2], ipv6_underlay: bool, mtu: u16) -> [String; 2] {
    let keys = [0, 1].map(|at: usize| {
        let private = hosts[at].run("umask 077; wg genkey | tee /run/key");
        hosts[at].run(&format!("echo '{}' | wg pubkey", private.trim())).trim().to_owned()
    });
    for (at, number) in [(0_usize, 1), (1, 2)] {
        let other = 3 - number;
        let endpoint = if ipv6_underlay { format!("[fd99::{other}]:51820") } else { format!("192.0.2.{other}:51820") };
        hosts[at].run(&format!(
            "wg set {INTERFACE} private-key /run/key listen-port 51820 peer {} endpoint {endpoint} \
             allowed-ips 10.9.0.{other}/32,fd09::{other}/128 && ip link set {INTERFACE} mtu {mtu} up && \
             ip address add 10.9.0.{number}/24 dev {INTERFACE} && ip address add fd09::{number}/64 dev {INTERFACE} nodad",
            keys[1 - at]
        ));
    }
    keys
}

/// The key as the control protocol writes it.
fn hexadecimal(host: &Host, key: &str) -> String {
    host.run(&format!("echo {key} | base64 -d | od -An -tx1 | tr -d ' \\n'"))
}

/// Counts IP fragments that pass the host's underlay interface while `during` runs.
fn fragments(host: &Host, during: impl FnOnce()) -> usize {
    // Plain echo requests are captured too: one that is sent last tells when everything before it has been seen.
    let filter = "(ip[6:2] & 0x3fff != 0) or ip6 proto 44 or icmp[icmptype] == icmp-echo";
    let mut capture = host
        .command("tcpdump")
        .args(["-n", "-l", "--immediate-mode", "-i", "eth0", filter])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = std::io::BufReader::new(capture.stderr.take().unwrap()).lines();
    assert!(errors.any(|line| line.unwrap().starts_with("listening on")), "tcpdump must be installed");
    during();
    host.run("ping -c 1 192.0.2.1 && ping -c 1 192.0.2.2");
    let lines = std::io::BufReader::new(capture.stdout.take().unwrap()).lines();
    let count = lines.map_while(Result::ok).take_while(|line| !line.contains("ICMP echo request")).count();
    capture.kill().unwrap();
    capture.wait().unwrap();
    count
}

#[test]
fn two_devices_carry_full_packets_of_both_families_unfragmented() {
    // The device MTU is exact for the underlay, and lowered just before: neither may matter.
    for (ipv6_underlay, mtu) in [(false, 1440_u16), (true, 1420)] {
        let hosts = Host::pair();
        let _devices = [hosts[0].start(), hosts[1].start()];
        let count = fragments(&hosts[1], || {
            let keys = connect(&hosts, ipv6_underlay, mtu);
            // Also lengths that padding to 16 bytes would carry over the edge.
            for length in [mtu, mtu - 1, mtu - 7, mtu - 15, 1281, 84] {
                hosts[0].run(&format!("ping -M do -c 1 -W 5 -s {} 10.9.0.2", length - 28));
                hosts[0].run(&format!("ping -M do -c 1 -W 5 -s {} fd09::2", length - 48));
            }
            let refused = hosts[0].output(&format!("ping -M do -c 1 -W 1 -s {} 10.9.0.2", mtu - 27));
            assert!(String::from_utf8_lossy(&refused.stderr).contains(&format!("mtu={mtu}")), "{refused:?}");
            let shown = hosts[0].run("wg show");
            for part in [&keys[0], &keys[1], "listening port: 51820", "latest handshake", "10.9.0.2/32, fd09::2/128"] {
                assert!(shown.contains(part), "{part}: {shown}");
            }
        });
        assert_eq!(count, 0, "fragments on the underlay, IPv6: {ipv6_underlay}");
    }
}

#[test]
fn changes_disturb_nobody() {
    let hosts = Host::pair();
    let _devices = [hosts[0].start(), hosts[1].start()];
    let keys = connect(&hosts, false, 1440);
    hosts[0].run("ping -c 1 -W 5 10.9.0.2");
    let peer = hexadecimal(&hosts[0], &keys[1]);
    let third = hexadecimal(&hosts[0], hosts[0].run("wg genkey | wg pubkey").trim());
    let key = hexadecimal(&hosts[0], hosts[0].run("cat /run/key").trim());

    let mut flood = hosts[0]
        .command("ping")
        .args(["-f", "-i", "0.002", "-c", "1500", "10.9.0.2"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    for request in [
        format!("set=1\npublic_key={third}\nendpoint=192.0.2.9:9\nallowed_ip=10.8.0.0/24\n\n"),
        // The prefix moves to the peer under flood and back, then goes with its owner.
        format!("set=1\npublic_key={peer}\nallowed_ip=10.8.0.0/24\n\n"),
        format!("set=1\npublic_key={third}\nallowed_ip=10.8.0.0/24\n\n"),
        format!("set=1\npublic_key={peer}\nallowed_ip=10.7.0.0/24\n\n"),
        format!("set=1\npublic_key={peer}\nallowed_ip=-10.7.0.0/24\n\n"),
        format!("set=1\npublic_key={peer}\nupdate_only=true\nendpoint=192.0.2.2:51820\n\n"),
        format!("set=1\npublic_key={peer}\npersistent_keepalive_interval=25\n\n"),
        format!(
            "set=1\npublic_key={peer}\nreplace_allowed_ips=true\nallowed_ip=10.9.0.2/32\nallowed_ip=fd09::2/128\n\n"
        ),
        format!("set=1\nprivate_key={key}\nlisten_port=51820\n\n"),
        "set=1\nfwmark=7\n\n".to_owned(),
        format!("set=1\npublic_key={third}\nremove=true\n\n"),
    ] {
        assert_eq!(hosts[0].ask(&request), "errno=0\n\n", "{}", request.replace(&key, "KEY"));
    }
    assert!(flood.try_wait().unwrap().is_none(), "the changes outlasted the flood");
    let summary = check(&flood.wait_with_output().unwrap());
    assert!(summary.contains("1500 received"), "{summary}");

    let state = hosts[0].ask("get=1\n\n");
    assert_eq!(state.matches("allowed_ip=").count(), 2, "{}", state.replace(&key, "KEY"));
    assert!(state.contains("fwmark=7\n") && state.contains("persistent_keepalive_interval=25\n"));
    assert!(!state.contains("rx_bytes=0\n") && !state.contains("last_handshake_time_sec=0\n"));
    // A refused request names no key and applies nothing.
    let bad = format!("set=1\nlisten_port=9\npublic_key={peer}\nremove=true\nallowed_ip=nonsense\n\n");
    assert_eq!(hosts[0].ask(&bad), "errno=-22\n\n");
    assert_eq!(hosts[0].ask("get=1\n\n").matches("listen_port=51820").count(), 1);
    hosts[0].run("ping -c 1 -W 5 10.9.0.2");
}

#[test]
fn a_taken_port_leaves_the_old_socket_working() {
    let hosts = Host::pair();
    let _devices = [hosts[0].start(), hosts[1].start()];
    connect(&hosts, false, 1440);
    hosts[0].run("ping -c 1 -W 5 10.9.0.2");
    hosts[0].run("ip link add husk-vx type vxlan id 1 dstport 4789 local 192.0.2.1 && ip link set husk-vx up");
    assert_eq!(hosts[0].ask("set=1\nlisten_port=4789\n\n"), "errno=-98\n\n");
    assert!(hosts[0].ask("get=1\n\n").contains("listen_port=51820\n"));
    hosts[0].run("ping -c 1 -W 5 10.9.0.2");
    // Another port and back, and another key at the same port: the new socket must not trip over the old one.
    for _ in 0..10 {
        for port in [51999, 51820] {
            assert_eq!(hosts[0].ask(&format!("set=1\nlisten_port={port}\n\n")), "errno=0\n\n");
            hosts[0].run("ping -c 1 -W 5 10.9.0.2");
        }
        let key = hexadecimal(&hosts[0], hosts[0].run("wg genkey").trim());
        assert_eq!(hosts[0].ask(&format!("set=1\nprivate_key={key}\n\n")), "errno=0\n\n");
        let bound = hosts[0].run("ss -Huan");
        assert!(bound.contains("*:51820"), "{bound}");
        let key = hexadecimal(&hosts[0], hosts[0].run("cat /run/key").trim());
        assert_eq!(hosts[0].ask(&format!("set=1\nprivate_key={key}\n\n")), "errno=0\n\n");
        hosts[0].run("ping -c 1 -W 5 10.9.0.2");
    }
}

#[test]
fn one_process_per_interface_and_names_of_others_are_refused() {
    let host = Host::new();
    let mut device = host.start();
    let said = host.refused(host.device_command());
    assert!(said.contains("already serves husk-wg0") && said.contains("pid "), "{said}");
    assert!(host.output(&format!("wg show {INTERFACE}")).status.success());
    device.signal("TERM");
    assert!(device.wait());

    host.run(&format!("ip link add {INTERFACE} type vxlan id 1 dstport 4789"));
    let said = host.refused(host.device_command());
    assert!(said.contains("exists already (a vxlan device)") && said.contains("ip link delete"), "{said}");
    host.run(&format!("ip link delete {INTERFACE}"));

    let mut powerless = host.command("setpriv");
    powerless.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", HUSKD]);
    powerless.args(["wireguard-userspace", "--interface", INTERFACE]).env_remove("RUST_BACKTRACE");
    let said = host.refused(powerless);
    assert!(said.contains("CAP_NET_ADMIN"), "{said}");

    host.run("mount -t tmpfs tmpfs /dev/net");
    let said = host.refused(host.device_command());
    assert!(said.contains("modprobe tun"), "{said}");
}

#[test]
fn signals_and_ends() {
    let host = Host::new();
    let mut device = host.start();
    assert_eq!(host.run("stat -c %a /run/wireguard /run/wireguard/husk-wg0.sock").trim(), "700\n600");
    device.signal("HUP");
    device.signal("PIPE");
    assert!(host.output(&format!("wg show {INTERFACE}")).status.success());
    device.signal("TERM");
    assert!(device.wait(), "SIGTERM is a clean end");
    let left = host.run("ls -A /run/wireguard /run/husk/wireguard; ip -o link | grep -c husk || true");
    assert_eq!(left, "/run/husk/wireguard:\n\n/run/wireguard:\n0\n");

    let mut device = host.start();
    device.signal("KILL");
    device.wait();
    assert!(host.exists(SOCKET), "a killed process leaves its socket");
    let mut device = host.start();

    host.run(&format!("ip link delete {INTERFACE}"));
    assert!(!device.wait(), "the end of the TUN device is an error");
    let said = device.said();
    assert!(said.contains("deleted"), "{said}");
    assert!(!host.exists(SOCKET));
}

/// Set for the run of this test program that plays the parent.
const PARENT: &str = "HUSK_TEST_PARENT";

#[test]
fn a_spawned_process_outlives_its_parent() {
    if std::env::var_os(PARENT).is_some() {
        spawn_and_die();
    }
    let host = Host::new();
    let program = std::env::current_exe().unwrap();
    let mut parent = host.command(program.to_str().unwrap());
    parent.args(["--exact", "a_spawned_process_outlives_its_parent", "--nocapture"]).env(PARENT, "1");
    let output = parent.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success(), "the parent kills itself");
    assert!(String::from_utf8_lossy(&output.stdout).contains("the device is ready"), "{output:?}");
    host.run(&format!("wg show {INTERFACE}"));
    let log = host.run("cat /run/husk/wireguard/husk-wg0.log");
    assert!(log.contains("is ready"), "{log}");
    let ids = host.run("ps -o pid=,sid= -C huskd");
    let mut ids = ids.split_whitespace();
    assert_eq!(ids.next(), ids.next(), "it leads its own session");
}

/// The parent: starts the device, tries to start another, dies by SIGKILL.
fn spawn_and_die() {
    use husk_node_daemon::companion::{Answer, Job, Process};
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let job = Job::WireguardUserspace { interface: INTERFACE.parse().unwrap() };
        let process = Process::new(&job, Path::new("/run/husk"));
        assert_eq!(process.ask(), Answer::Absent);
        let mut child = process.spawn(Path::new(HUSKD)).unwrap();
        process.wait_ready(&mut child, LIMIT).await.unwrap();
        assert_eq!(process.ask(), Answer::Alive);
        let mut second = process.spawn(Path::new(HUSKD)).unwrap();
        assert!(!second.wait().await.unwrap().success());
        println!("the device is ready");
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).unwrap();
    });
}

#[test]
fn lock_and_log_follow_the_daemons_run_directory() {
    let host = Host::new();
    let mut command = host.device_command();
    command.args(["--run-directory", "/run/elsewhere"]).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let _device = Device { host: &host, child };
    eventually("the device answers", || host.output(&format!("wg show {INTERFACE}")).status.success());
    assert!(host.exists("/run/elsewhere/wireguard/husk-wg0.lock"));
    assert!(!host.exists("/run/husk"));
}

/// A daemon on a host of its own, run from a copy of the program, with a userspace device.
struct Daemon<'a> {
    host: &'a Host,
    child: Child,
}

impl<'a> Daemon<'a> {
    const PROGRAM: &'static str = "/run/program/huskd";

    fn options(host: &Host, mode: &str) -> String {
        host.run("mkdir -p /run/program /run/cluster /run/state");
        let config = format!(
            "clusterCIDRs: [10.64.0.0/16]\nmode: {mode}\nwireguard: {{device: userspace}}\n\
             node: {{name: host1}}\nunderlay: {{interface: eth0}}\nsource: {{directory: {{path: /run/cluster}}}}\n\
             cni: {{configDirectory: /run/net.d, binDirectory: /run/bin}}\n"
        );
        host.run(&format!("printf '{config}' > /run/config.yaml"));
        "--config /run/config.yaml --run-directory /run/elsewhere --state-directory /run/state".to_owned()
    }

    fn start(host: &'a Host, mode: &str) -> Self {
        let options = Self::options(host, mode);
        host.run(&format!("rm -f {0} && cp {HUSKD} {0}", Self::PROGRAM));
        let run = format!("exec {} run {options} >> /run/daemon.log 2>&1", Self::PROGRAM);
        Self { host, child: host.command("sh").args(["-c", &run]).spawn().unwrap() }
    }

    fn device(&self) -> Option<String> {
        let found = self.host.output("cat /run/elsewhere/wireguard/husk-wg0.lock");
        let id = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        let lives = !id.is_empty() && self.host.output(&format!("kill -0 {id}")).status.success();
        (lives && self.host.output(&format!("grep -q {INTERFACE} /proc/{id}/cmdline")).status.success()).then_some(id)
    }

    fn wait_ready(&self) {
        eventually("node.json is there", || self.host.exists("/run/elsewhere/node.json"));
    }

    fn wait_for_another_device(&self, old: &str) {
        let end = Instant::now() + 3 * LIMIT;
        while self.device().is_none_or(|device| device == old) {
            assert!(Instant::now() < end, "the device was not started anew");
            std::thread::sleep(Duration::from_millis(20));
        }
        eventually("the device is set up", || {
            let shown = self.host.output(&format!("timeout 1 wg show {INTERFACE} listen-port"));
            String::from_utf8_lossy(&shown.stdout).trim() == "51820"
        });
    }

    fn stop(mut self) {
        self.host.run("kill -TERM $(pgrep -f 'huskd ru[n]')");
        eventually("the daemon ends", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", String::from_utf8_lossy(&self.host.output("cat /run/daemon.log").stdout));
        }
    }
}

#[test]
fn a_daemon_keeps_its_device_alive_through_everything_and_ends_it_with_the_mode() {
    let [host, _other] = Host::pair();
    let daemon = Daemon::start(&host, "wireguard");
    daemon.wait_ready();
    let first = daemon.device().unwrap();
    assert_eq!(host.run(&format!("cat /proc/{first}/comm")).trim(), "huskd");
    assert!(!host.exists("/run/husk"), "everything lies in the configured run directory");

    // An upgrade has replaced the program: the running daemon still starts devices, from what it is itself.
    host.run(&format!("rm {0} && echo garbage > {0}", Daemon::PROGRAM));
    host.run(&format!("kill -KILL {first}"));
    daemon.wait_for_another_device(&first);

    // A device that hangs is killed and started anew.
    let second = daemon.device().unwrap();
    host.run(&format!("kill -STOP {second}"));
    daemon.wait_for_another_device(&second);

    // So is one whose socket somebody removed.
    let third = daemon.device().unwrap();
    host.run(&format!("rm {SOCKET}"));
    daemon.wait_for_another_device(&third);
    let fourth = daemon.device().unwrap();
    daemon.stop();
    host.run(&format!("kill -0 {fourth}"));

    // In another mode nobody needs the process, which would keep the port and the name.
    let daemon = Daemon::start(&host, "vxlan");
    eventually("the device's process ends", || daemon.device().is_none());
    daemon.wait_ready();
    assert!(!host.output(&format!("ip link show {INTERFACE}")).status.success());
    daemon.stop();

    let options = Daemon::options(&host, "vxlan");
    host.run(&format!("{} cleanup {options}", Daemon::PROGRAM));
    assert!(!host.exists("/run/wireguard"), "nobody else's socket lies there");
}
