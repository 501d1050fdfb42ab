//! The daemon with its cluster directory on a share whose server does not answer.
//!
//! The share is a FUSE mount whose other end reads no request: a call into it waits until it is answered or its process is
//! killed, as in a hard NFS mount. Needs root and /dev/fuse; without them the tests fail.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail like tests")]

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use husk_overlay::ipc::{self, Request, Response, SOCKET_FILE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(10);

/// What the daemon may take to end after SIGTERM, with room for a busy machine.
const STOP_LIMIT: Duration = Duration::from_secs(6);

/// Namespaces with the hung share in them, held by a process that ends when its standard input closes.
struct Host {
    directory: tempfile::TempDir,
    holder: Child,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        // Whoever holds the descriptor is the server; this one only holds it.
        let setup = "exec 3<>/dev/fuse && ip link set lo up && \
                     mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hung \"$0\" && echo up && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c", setup])
            .arg(&share)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1) of util-linux must be installed");
        let mut said = [0; 3];
        let read = holder.stdout.as_mut().unwrap().read_exact(&mut said);
        assert!(read.is_ok() && &said == b"up\n", "no namespaces or no FUSE: these tests need root and /dev/fuse");
        Self { directory, holder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits for what another process does; panics with `what` and the daemon's log when it does not.
    fn eventually(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !condition() {
            assert!(Instant::now() < end, "did not happen within {LIMIT:?}: {what}; the daemon's log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the daemon with this folder of the share as cluster directory.
    fn start(&self, folder: &str) -> Daemon<'_> {
        let config = format!(
            "mode: direct\nclusterCIDRs: [10.42.0.0/16]\nnode: {{name: a}}\n\
             source: {{directory: {{path: {}}}}}\ncni: {{configDirectory: {}}}\nlog: {{level: debug}}\n",
            self.path("share").join(folder).display(),
            self.path("net.d").display()
        );
        fs::write(self.path("config.yaml"), config).unwrap();
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net", "--mount", "--"]);
        command.arg(env!("CARGO_BIN_EXE_huskd")).arg("run");
        for (option, file) in [("--config", "config.yaml"), ("--run-directory", "run"), ("--state-directory", "state")]
        {
            command.arg(option).arg(self.path(file));
        }
        let log = fs::File::create(self.path("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().expect("nsenter(1) of util-linux is installed");
        Daemon { host: self, child }
    }

    /// True if nft did that to the daemon's table.
    fn nft(&self, action: &str) -> bool {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.holder.id().to_string(),
            "--net",
            "--",
            "nft",
            action,
            "table",
            "inet",
            "husk",
        ]);
        command.output().expect("nsenter(1) of util-linux is installed").status.success()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// Dropping it ends the process.
struct Daemon<'a> {
    host: &'a Host,
    child: Child,
}

impl Daemon<'_> {
    fn ask(&self, request: &Request) -> Option<Response> {
        let mut stream = UnixStream::connect(self.host.path("run").join(SOCKET_FILE)).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        ipc::write_message(&mut stream, request).ok()?;
        ipc::read_message(&mut stream).ok()
    }

    fn stop(&mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        let end = Instant::now() + STOP_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "SIGTERM does not end it; its log:\n{}", self.host.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_share_that_hangs_holds_up_neither_the_start_nor_the_loop_nor_the_end() {
    let host = Host::new();
    // Whether the cluster was seen before decides what a start does with the directory.
    for joined in [false, true] {
        if joined {
            fs::write(host.path("state/snapshot.json"), r#"{"nodes":{},"pools":{},"blocks":{},"issues":[]}"#).unwrap();
        }
        let mut daemon = host.start("cluster");
        host.eventually("the loop makes passes, answers, and says what is wrong", || {
            assert_eq!(daemon.child.try_wait().unwrap(), None, "it ended; its log:\n{}", host.log());
            let Some(Response::Report { report }) = daemon.ask(&Request::Status) else { return false };
            report.to_string().contains("does not answer; opening it takes longer")
        });
        let asked = Instant::now();
        for _ in 0..20 {
            assert!(matches!(daemon.ask(&Request::Status), Some(Response::Report { .. })));
        }
        assert!(asked.elapsed() < LIMIT);
        // What needs no cluster is in the kernel, and the kernel's events are heard: by the loop's tick alone, the second
        // and the third time would take five seconds each.
        host.eventually("the rules are there", || host.nft("list"));
        let healing = Instant::now();
        for _ in 0..3 {
            assert!(host.nft("delete"));
            host.eventually("the rules are back", || host.nft("list"));
        }
        assert!(healing.elapsed() < Duration::from_secs(8), "{:?}; its log:\n{}", healing.elapsed(), host.log());
        assert_eq!(daemon.stop().code(), Some(0), "{}", host.log());
        assert!(!host.path("run").join(SOCKET_FILE).exists());
    }
}
