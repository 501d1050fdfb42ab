//! An attachment whose plugin is interrupted again and again: what it left on the host and in the pod, and whether a recovery
//! brought everything back.
//!
//! A [`Victim`] is an attachment on a host that has another one, the bystander, which nothing may touch. [`Points`] enumerates
//! the system calls to interrupt: for each number from the first call of that number on, until a run ends without having made
//! the next one. So it needs no list that could be out of date: what only some runs do is found in the run that does it.

mod points;
mod remains;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use serde_json::{Value, json};

pub use self::points::{Points, likely_errors};
pub use self::remains::Remains;
use crate::cni::CniOutcome;
use crate::eventually;
use crate::host::{Host, LEASE_DIRECTORY};
use crate::pod::Pod;
use crate::syscalls::{Call, Interference, Traced};

/// How long a daemon may take to follow what attachments did.
const DAEMON_LIMIT: Duration = Duration::from_secs(15);

/// What the runtime asks for besides addresses, so that there is more to be interrupted: limits, and maybe a port of the host. An
/// ADD with a port waits for a pass of the daemon, and takes several times as long.
#[must_use]
pub fn requests(host_port: Option<u16>) -> Value {
    let mapping = |port| json!({"hostPort": port, "containerPort": 80, "protocol": "tcp"});
    json!({
        "portMappings": host_port.map(mapping).into_iter().collect::<Vec<_>>(),
        "bandwidth": {"ingressRate": 1_000_000_000, "ingressBurst": 80_000_000, "egressRate": 1_000_000_000, "egressBurst": 80_000_000},
    })
}

/// An attachment to be interrupted.
#[derive(Debug)]
pub struct Victim<'a> {
    /// Where.
    pub host: &'a Host,
    /// Its pod.
    pub pod: Pod,
    bystander: &'a Pod,
    before: Remains,
}

impl<'a> Victim<'a> {
    /// A pod with [`requests`] that is not attached yet, on a host where nothing else goes on but the bystander.
    ///
    /// # Errors
    /// When the pod's namespace cannot be made.
    pub fn new(host: &'a Host, bystander: &'a Pod, host_port: Option<u16>) -> Result<Self> {
        let mut pod = host.sandbox("victim")?;
        pod.spec_mut().runtime_config = Some(requests(host_port));
        let before = Remains::of(host, Some(&pod))?;
        Ok(Self { host, pod, bystander, before })
    }

    /// Calls the plugin and interferes: ADD as for the first time, GC with the bystander alone valid.
    ///
    /// # Errors
    /// When it cannot be traced.
    pub fn interrupt(&mut self, command: &str, interference: Interference) -> Result<(CniOutcome, Traced)> {
        self.trace(command, Some(interference))
    }

    /// The system calls of a command that nothing interferes with.
    ///
    /// # Errors
    /// When it fails.
    pub fn undisturbed(&mut self, command: &str) -> Result<Vec<Call>> {
        let (outcome, run) = self.trace(command, None)?;
        succeeded(command, &outcome)?;
        Ok(run.calls)
    }

    fn trace(&mut self, command: &str, interference: Option<Interference>) -> Result<(CniOutcome, Traced)> {
        match command {
            "GC" => self.host.cni_gc_traced(&[self.bystander.spec()], interference),
            "ADD" => {
                self.pod.spec_mut().prev_result = None;
                self.host.cni_traced(command, self.pod.spec(), interference)
            }
            _ => self.host.cni_traced(command, self.pod.spec(), interference),
        }
    }

    /// What is there now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn remains(&self) -> Result<Remains> {
        Remains::of(self.host, Some(&self.pod))
    }

    /// What holds at any moment: no address leased twice, no interface without its lease, the bystander as it was.
    ///
    /// # Errors
    /// What does not hold.
    pub fn consistent(&self) -> Result<Remains> {
        let now = self.remains()?;
        let leased = now.leased()?;
        let wired = now.interfaces.len() > self.before.interfaces.len();
        let has_lease = leased.len() > self.before.leased()?.len();
        ensure!(has_lease || !wired, "an interface without a lease: {now:?}");
        ensure!(has_lease || now.inside.is_empty(), "an interface in the pod without a lease: {now:?}");
        ensure!(now.interfaces.is_superset(&self.before.interfaces), "the bystander lost its interface: {now:?}");
        ensure!(now.files.is_superset(&self.before.files), "the bystander lost its lease: {now:?}");
        Ok(now)
    }

    /// Everything is as it was before the pod was attached for the first time.
    ///
    /// # Errors
    /// What is not.
    pub fn gone(&self) -> Result<()> {
        let now = self.remains()?;
        ensure!(now == self.before, "residue: there was {:?}, now there is {now:?}", self.before);
        Ok(())
    }

    /// Calls DEL, which has to succeed and to leave nothing.
    ///
    /// # Errors
    /// When it does not.
    pub fn delete(&self) -> Result<()> {
        succeeded("DEL", &self.pod.del()?)?;
        self.gone().context("after DEL")
    }

    /// Calls GC, for which the bystander alone is valid; it has to succeed and to leave nothing else.
    ///
    /// # Errors
    /// When it does not.
    pub fn collect(&self) -> Result<()> {
        succeeded("GC", &self.host.cni_gc(&[self.bystander.spec()])?)?;
        self.gone().context("after GC")
    }

    /// Calls ADD and CHECK, which have to succeed.
    ///
    /// # Errors
    /// When one does not, or an address is in use.
    pub fn attach(&mut self) -> Result<()> {
        let outcome = self.add()?;
        succeeded("ADD", &outcome)?;
        self.attached()
    }

    /// Calls ADD as for the first time: a runtime forgets the result of an ADD with the attachment.
    ///
    /// # Errors
    /// When the plugin cannot be run; its refusal is an outcome.
    pub fn add(&mut self) -> Result<CniOutcome> {
        self.pod.spec_mut().prev_result = None;
        self.pod.add()
    }

    /// An attachment that a traced ADD reported is complete.
    ///
    /// # Errors
    /// What CHECK says.
    pub fn attached_as(&mut self, outcome: &CniOutcome) -> Result<()> {
        self.pod.spec_mut().prev_result = Some(outcome.json.clone());
        self.checked()?;
        self.consistent().map(drop)
    }

    /// An attachment that ADD reported is complete.
    ///
    /// # Errors
    /// What CHECK says.
    pub fn attached(&self) -> Result<()> {
        self.checked()?;
        self.consistent()?;
        let (own, others) = (self.pod.addresses(), self.bystander.addresses());
        ensure!(own.len() == others.len(), "{own:?} are not all addresses of a pod");
        ensure!(own.iter().all(|address| !others.contains(address)), "{own:?} are the bystander's");
        Ok(())
    }

    /// CHECK finds what ADD made.
    fn checked(&self) -> Result<()> {
        succeeded("CHECK", &self.pod.check()?)
    }

    /// Calls ADD without a DEL before, as a runtime that tries again does: it works, or refuses since the attachment exists.
    /// Returns whether it works.
    ///
    /// # Errors
    /// When it does neither.
    pub fn try_again(&mut self) -> Result<bool> {
        let wired = self.remains()?.interfaces.len() > self.before.interfaces.len();
        let outcome = self.add()?;
        if outcome.success() {
            self.attached()?;
            return Ok(true);
        }
        valid_error("ADD", &outcome)?;
        ensure!(wired && outcome.error_code() == Some(101), "ADD without DEL said {}", outcome.stdout);
        Ok(false)
    }
}

/// What [`Interference::Fail`] and [`Interference::Refuse`] did to a call is said: on what, and why.
///
/// # Errors
/// What is not said.
pub fn explains(outcome: &CniOutcome, interference: Interference, hit: &Call) -> Result<()> {
    let said = format!("{}; {}", outcome.json["msg"], outcome.json["details"]);
    let why = match interference {
        Interference::Fail(_, errno) => std::io::Error::from(errno).to_string(),
        _ => std::io::Error::from(Errno::EOPNOTSUPP).to_string(),
    };
    let why = why.split(" (os error").next().unwrap_or_default();
    ensure!(said.contains(why), "{said:?} does not say {why:?}");
    let object = hit.object.as_str();
    let on = match (interference, object) {
        (Interference::Refuse(..), _) => said.contains("the kernel refused to "),
        // Where the name is not yet that of the file to be, the directory tells.
        (_, _) if object.starts_with(LEASE_DIRECTORY) => said.contains(LEASE_DIRECTORY),
        (_, _) if object.starts_with('/') && !object.starts_with("/proc/thread-self") => said.contains(object),
        (_, _) if object.starts_with("socket:") => {
            said.contains("NETLINK_ROUTE socket") || said.contains("huskd") || said.contains("daemon.sock")
        }
        _ => true,
    };
    ensure!(on, "{said:?} does not say on what: {object:?}");
    Ok(())
}

/// A command that has to succeed.
///
/// # Errors
/// What it said.
pub fn succeeded(command: &str, outcome: &CniOutcome) -> Result<()> {
    outcome.succeeded().with_context(|| command.to_owned())
}

/// A failure as the specification wants it: an error in JSON with a code and a reason, no panic.
///
/// # Errors
/// What is wrong with it.
pub fn valid_error(command: &str, outcome: &CniOutcome) -> Result<()> {
    let said = || format!("{command} said {:?} {:?} {:?}", outcome.status, outcome.stdout, outcome.stderr);
    ensure!(outcome.status == Some(1), "no orderly failure: {}", said());
    ensure!(!outcome.stderr.contains("panicked"), "a panic: {}", said());
    let (code, reason) = (outcome.json["code"].as_u64(), outcome.json["msg"].as_str().unwrap_or_default());
    ensure!(outcome.json["cniVersion"].is_string() && code.is_some() && !reason.is_empty(), "{}", said());
    Ok(())
}

/// The daemon knows of the bystander only, the kernel's tables are as the daemon wants them and as they were before.
///
/// # Errors
/// What is not so, in time.
pub fn settled(host: &Host, bystander: &Pod, before: &str) -> Result<()> {
    let mut last = String::new();
    eventually("the daemon to have followed", DAEMON_LIMIT, || {
        let leased = leased(host)?;
        let (diff, now) = (host.huskctl(["diff"])?, tables(host)?);
        // It tells of the last pass, which may have looked before the pod that came last had its interface.
        let check = host.huskctl(["ipam", "check"])?;
        last = format!(
            "{leased} leased, diff says {}{}, ipam check says {}{}, tables:\n{now}",
            diff.stdout, diff.stderr, check.stdout, check.stderr
        );
        let content = diff.status.code() == Some(0) && check.status.code() == Some(0);
        Ok(leased == bystander.addresses().len() as u64 && content && now == before)
    })
    .with_context(|| format!("{last}\nand before:\n{before}"))
}

/// A pod with [`requests`] that stays, after the daemon has followed. It also keeps the chains for ports of the host from being
/// made and removed with every other pod, which the kernel takes its time for.
///
/// # Errors
/// When it cannot be added.
pub fn bystander(host: &Host) -> Result<Pod> {
    let mut pod = host.sandbox("bystander")?;
    pod.spec_mut().runtime_config = Some(requests(Some(8079)));
    pod.add()?.into_result()?;
    settled(host, &pod, &tables(host)?)?;
    Ok(pod)
}

fn leased(host: &Host) -> Result<u64> {
    let shown = host.huskctl_json(["ipam", "show"])?;
    let blocks: Vec<&Value> = shown["blocks"].as_array().into_iter().flatten().collect();
    Ok(blocks.iter().filter_map(|block| block["leased"].as_u64()).sum())
}

/// The kernel's tables on a host: firewall with the elements of its sets and maps, permanent neighbours, routes and links.
///
/// # Errors
/// When one cannot be read.
pub fn tables(host: &Host) -> Result<String> {
    let mut text = host.netns().command("nft", ["-s", "list", "ruleset"])?;
    for what in [
        &["-o", "link", "show"][..],
        &["neigh", "show", "nud", "permanent"],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["rule", "show"],
    ] {
        let mut lines: Vec<String> = host.ip(what.iter().copied())?.lines().map(str::to_owned).collect();
        lines.sort();
        text += &lines.join("\n");
        text.push('\n');
    }
    Ok(text)
}
