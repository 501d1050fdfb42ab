//! A host as a network namespace, pods as others, a daemon that says what the test wants, and the plugin as a process.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its world up has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use husk_dataplane::netns::Netns;
use husk_overlay::ipc::{LEASE_DIRECTORY, NODE_FILE, NodeFile, Request, Response, SOCKET_FILE, VERSION};
use husk_overlay::ipc::{read_message, write_message};
use husk_overlay::plan::router_addresses;
use husk_overlay::prefix::{Family, Prefix};
use serde_json::{Value, json};

pub(crate) const MTU: u32 = 1420;

/// A host with its run directory.
pub(crate) struct Host {
    pub(crate) netns: Netns,
    pub(crate) run_directory: tempfile::TempDir,
    /// What the daemon was asked, in order.
    pub(crate) asked: Arc<Mutex<Vec<Request>>>,
}

/// How a call of the plugin ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    /// Standard output; null if there was none.
    pub(crate) output: Value,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn code(&self) -> u64 {
        assert!(!self.success, "{self:?}");
        self.output["code"].as_u64().unwrap_or_else(|| panic!("no error code: {self:?}"))
    }

    pub(crate) fn message(&self) -> String {
        format!("{}; {}", self.output["msg"].as_str().unwrap(), self.output["details"].as_str().unwrap())
    }

    pub(crate) fn ok(self) -> Value {
        assert!(self.success, "{self:?}");
        self.output
    }

    /// The addresses of a result, without lengths.
    pub(crate) fn addresses(self) -> Vec<String> {
        let result = self.ok();
        let ips = result["ips"].as_array().unwrap();
        ips.iter().map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned()).collect()
    }
}

impl Host {
    pub(crate) fn new() -> Self {
        let host = Self {
            netns: Netns::new_unnamed().unwrap(),
            run_directory: tempfile::tempdir().unwrap(),
            asked: Arc::default(),
        };
        host.write_node_file(&["10.42.0.0/26", "fd42::/122"], |_| ());
        host
    }

    /// A host whose daemon says yes to everything.
    pub(crate) fn ready() -> Self {
        let host = Self::new();
        host.serve(|_| Some(Response::Done));
        host
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.run_directory.path().join(name)
    }

    pub(crate) fn write_node_file(&self, blocks: &[&str], change: impl FnOnce(&mut NodeFile)) {
        let blocks: Vec<Prefix> = blocks.iter().map(|block| block.parse().unwrap()).collect();
        let mut node = NodeFile {
            version: VERSION,
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned(),
            pod_mtu: MTU,
            families: blocks.iter().map(Prefix::family).collect::<BTreeSet<Family>>(),
            router: router_addresses(&blocks.iter().copied().collect()),
            blocks,
            cluster_cidrs: Vec::new(),
            cool_down: 30,
            tunnel_ports: [4789].into(),
        };
        change(&mut node);
        fs::write(self.file(NODE_FILE), serde_json::to_vec(&node).unwrap()).unwrap();
    }

    /// Serves the daemon's socket until the test ends; no answer means that the connection is closed without one.
    pub(crate) fn serve(&self, answer: impl Fn(&Request) -> Option<Response> + Send + Sync + 'static) {
        let listener = UnixListener::bind(self.file(SOCKET_FILE)).unwrap();
        let (asked, answer) = (Arc::clone(&self.asked), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, asked, answer) = (stream.unwrap(), Arc::clone(&asked), Arc::clone(&answer));
                std::thread::spawn(move || {
                    let Ok(request) = read_message::<Request>(&mut stream) else { return };
                    asked.lock().unwrap().push(request.clone());
                    if let Some(response) = answer(&request) {
                        // A plugin that was killed does not read its answer.
                        let _ = write_message(&mut stream, &response);
                    }
                });
            }
        });
    }

    /// Waits until the daemon was asked such a thing: nobody waits for an answer to what is only told.
    pub(crate) fn await_asked(&self, wanted: impl Fn(&Request) -> bool) {
        let begun = std::time::Instant::now();
        while !self.asked.lock().unwrap().iter().any(&wanted) {
            assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", self.asked.lock().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    pub(crate) fn conf(&self, extra: Value) -> Value {
        let mut conf = json!({
            "cniVersion": "1.1.0", "name": "husk", "type": "husk", "runDirectory": self.run_directory.path(),
        });
        conf.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        conf
    }

    /// Starts the plugin on the host.
    pub(crate) fn start(&self, variables: &[(&str, &str)], stdin: &[u8]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-cni"));
        command.env_clear().envs(variables.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.netns.run_in(move || command.spawn().unwrap()).unwrap();
        // A plugin that refuses its environment does not read its input to the end.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        child
    }

    pub(crate) fn call(&self, variables: &[(&str, &str)], stdin: &[u8]) -> Outcome {
        outcome(self.start(variables, stdin))
    }

    pub(crate) fn add_with(&self, pod: &Pod, extra: Value) -> Outcome {
        outcome(self.start_add(pod, extra))
    }

    pub(crate) fn start_add(&self, pod: &Pod, extra: Value) -> Child {
        let variables = pod.variables("ADD");
        let borrowed: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.start(&borrowed, self.conf(extra).to_string().as_bytes())
    }

    pub(crate) fn add(&self, pod: &Pod) -> Outcome {
        self.add_with(pod, json!({}))
    }

    pub(crate) fn command(&self, command: &str, pod: &Pod, extra: Value) -> Outcome {
        let variables = pod.variables(command);
        let borrowed: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.call(&borrowed, self.conf(extra).to_string().as_bytes())
    }

    pub(crate) fn del(&self, pod: &Pod) -> Outcome {
        self.command("DEL", pod, json!({}))
    }

    /// Calls a command that needs no attachment.
    pub(crate) fn plain(&self, command: &str, extra: Value) -> Outcome {
        self.call(&[("CNI_COMMAND", command)], self.conf(extra).to_string().as_bytes())
    }

    pub(crate) fn gc(&self, valid: &[&Pod], extra: Value) -> Outcome {
        let valid: Vec<Value> =
            valid.iter().map(|pod| json!({"containerID": pod.container_id, "ifname": "eth0"})).collect();
        let mut fields = json!({"cni.dev/valid-attachments": valid});
        fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        self.plain("GC", fields)
    }

    /// Runs a command line on the host.
    pub(crate) fn run(&self, line: &str) -> String {
        run(&self.netns, line)
    }

    /// Container ids that have a host interface, sorted.
    pub(crate) fn wired(&self) -> Vec<String> {
        let found = self.netns.run_in(husk_dataplane::pod::host_interfaces).unwrap().unwrap();
        let mut ids: Vec<String> = found.iter().map(|it| it.alias.split('/').nth(1).unwrap().to_owned()).collect();
        ids.sort();
        ids
    }

    pub(crate) fn store(&self) -> husk_ipam::lease::LeaseStore {
        husk_ipam::lease::LeaseStore::new(self.file(LEASE_DIRECTORY), husk_ipam::lease::DEFAULT_LOCK_WAIT)
    }

    /// Container ids that have a lease, sorted.
    pub(crate) fn leased(&self) -> Vec<String> {
        let leases = self.store().load().unwrap();
        assert_eq!(leases.issues, []);
        leases.endpoints.keys().map(|id| id.container_id.to_string()).collect()
    }

    /// Asserts that nothing of any pod is left on the host.
    pub(crate) fn assert_empty(&self) {
        assert_eq!(self.wired(), [""; 0]);
        assert_eq!(self.leased(), [""; 0]);
        assert_eq!(self.run("ip route show table all proto 72"), "");
    }
}

/// A pod's sandbox. Its path leads to a descriptor of this process: with the value, the path is gone.
pub(crate) struct Pod {
    pub(crate) container_id: String,
    pub(crate) netns: Netns,
}

impl Pod {
    pub(crate) fn new(container_id: &str) -> Self {
        Self { container_id: container_id.to_owned(), netns: Netns::new_unnamed().unwrap() }
    }

    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_fd().as_raw_fd())
    }

    pub(crate) fn variables(&self, command: &str) -> Vec<(&'static str, String)> {
        vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", self.container_id.clone()),
            ("CNI_NETNS", self.path()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}", self.container_id)),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
        ]
    }

    pub(crate) fn run(&self, line: &str) -> String {
        run(&self.netns, line)
    }

    pub(crate) fn interfaces(&self) -> usize {
        self.run("ip -o link").lines().count()
    }
}

pub(crate) fn run(netns: &Netns, line: &str) -> String {
    let output = netns
        .run_in(|| {
            let mut words = line.split_ascii_whitespace();
            Command::new(words.next().unwrap()).args(words).output().unwrap()
        })
        .unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn outcome(child: Child) -> Outcome {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    Outcome {
        success: output.status.success(),
        output: if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() },
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
