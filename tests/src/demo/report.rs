//! What the demo found out: the JSON of `--output json` and the source of what people read.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use husk_overlay::mode::Mode;
use husk_overlay::mtu::{Ledger, underlay_needed};
use husk_overlay::prefix::Family;
use serde::Serialize;
use serde_json::Value;

use super::{Plan, wire};
use crate::{Cluster, Pod};

/// Everything the demo found out.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// True if everything that should hold in this mode held.
    pub passed: bool,
    /// What did not hold.
    pub failures: Vec<Failure>,
    pub(super) mode: Mode,
    pub(super) encrypted: bool,
    pub(super) underlay: Family,
    /// Bytes.
    pub(super) underlay_mtu: usize,
    pub(super) hosts: Vec<String>,
    pub(super) pods: Vec<PodEntry>,
    /// Duration of each ADD.
    pub(super) plugin_milliseconds: Vec<f64>,
    pub(super) pairs: Vec<Pair>,
    pub(super) beyond: Vec<Beyond>,
    pub(super) throughput: Option<Throughput>,
    pub(super) wire: wire::Wire,
    /// What `huskctl` says on the first host.
    pub(super) own_host: OwnHost,
    pub(super) phases: Vec<Phase>,
    /// Directory of the daemons' logs, if something failed.
    pub(super) logs: Option<PathBuf>,
    pub(super) kept: Option<Kept>,
}

/// Something that did not hold.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    pub(super) what: String,
    pub(super) expected: String,
    pub(super) got: String,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodEntry {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) addresses: BTreeMap<Family, IpAddr>,
    /// What the kernel has for the pod's interface, in bytes.
    pub(super) mtu: usize,
}

/// What one pod can do with another, by family.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pair {
    pub(super) from: String,
    pub(super) to: String,
    #[serde(flatten)]
    pub(super) families: BTreeMap<Family, Checks>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Checks {
    /// A verified transfer there and back.
    pub(super) tcp: Check,
    /// A packet of exactly the pod MTU that must not be fragmented is answered in full.
    pub(super) full_mtu: Check,
    /// One byte more is refused by the sender's own kernel, which names the right MTU.
    pub(super) oversize_refused: Check,
}

impl Checks {
    /// The checks with what people call them.
    pub(super) fn named(&self) -> [(&'static str, &Check); 3] {
        [("TCP", &self.tcp), ("full-MTU packet", &self.full_mtu), ("MTU + 1", &self.oversize_refused)]
    }

    /// All of them in one: failed if one is, else unknown if one is.
    pub(super) fn all(&self) -> &Check {
        let [tcp, full_mtu, oversize_refused] = [&self.tcp, &self.full_mtu, &self.oversize_refused];
        let worst = [tcp, full_mtu, oversize_refused].into_iter().max_by_key(|check| match check {
            Check::Held => 0,
            Check::NotAsked => 1,
            Check::Failed { .. } => 2,
        });
        worst.unwrap_or(tcp)
    }
}

/// The answer to one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "answer")]
pub(super) enum Check {
    Held,
    Failed {
        expected: String,
        got: String,
    },
    /// There was no time left.
    NotAsked,
}

impl Check {
    pub(super) fn failed(expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Failed { expected: expected.into(), got: got.into() }
    }
}

/// A kind of question about more than pods, asked of all it concerns.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Beyond {
    pub(super) from: &'static str,
    pub(super) to: String,
    #[serde(flatten)]
    pub(super) families: BTreeMap<Family, Vec<Asked>>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Asked {
    pub(super) from: String,
    pub(super) to: String,
    #[serde(flatten)]
    pub(super) check: Check,
}

/// Bits per second.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Throughput {
    pub(super) from: String,
    pub(super) to: String,
    /// Median.
    pub(super) overlay_bits_per_second: f64,
    /// Median.
    pub(super) underlay_bits_per_second: f64,
    pub(super) ratio: f64,
    pub(super) overlay_rounds: Vec<f64>,
    pub(super) underlay_rounds: Vec<f64>,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct OwnHost {
    pub(super) name: String,
    pub(super) status: Value,
    pub(super) peers: Value,
    pub(super) mtu: Value,
    #[serde(skip)]
    pub(super) status_text: String,
    #[serde(skip)]
    pub(super) peers_text: String,
}

/// How long a part of the demo took.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Phase {
    pub(super) title: String,
    pub(super) seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Kept {
    /// What every name begins with.
    pub(super) prefix: String,
    pub(super) hints: Vec<Hint>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hint {
    pub(super) purpose: String,
    pub(super) command: String,
}

impl Report {
    pub(super) fn new(plan: &Plan, cluster: &Cluster, pods: &[(usize, Pod)]) -> Result<Self> {
        let entry = |(number, pod): &(usize, Pod)| -> Result<PodEntry> {
            let addresses = Family::ALL.map(|family| Ok((family, pod.address(family)?)));
            Ok(PodEntry {
                name: pod.name().to_owned(),
                host: cluster.host(*number).name().to_owned(),
                addresses: addresses.into_iter().collect::<Result<_>>()?,
                mtu: pod.mtu()?,
            })
        };
        Ok(Self {
            passed: false,
            failures: Vec::new(),
            mode: plan.mode,
            encrypted: plan.mode.encrypted(),
            underlay: plan.underlay,
            underlay_mtu: plan.mtu,
            hosts: cluster.hosts().iter().map(|host| host.name().to_owned()).collect(),
            pods: pods.iter().map(entry).collect::<Result<_>>()?,
            plugin_milliseconds: Vec::new(),
            pairs: Vec::new(),
            beyond: Vec::new(),
            throughput: None,
            wire: wire::Wire::default(),
            own_host: OwnHost::default(),
            phases: Vec::new(),
            logs: None,
            kept: None,
        })
    }

    pub(super) fn fail(&mut self, what: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) {
        self.failures.push(Failure { what: what.into(), expected: expected.into(), got: got.into() });
    }

    /// Which WireGuard device serves, in modes that use one.
    pub(super) fn wireguard_device(&self) -> Option<&str> {
        self.own_host.status["wireguardDevice"].as_str()
    }

    pub(super) fn is_userspace(&self) -> bool {
        self.wireguard_device() == Some("userspace")
    }

    /// Where the bytes of a full packet go, as the first host's daemon says.
    pub(super) fn ledger(&self) -> Result<Ledger> {
        let rows = self.own_host.mtu.as_array();
        let own = rows.into_iter().flatten().find(|row| row["own"] == true);
        let own = own.with_context(|| format!("`huskctl mtu` has no row of the own node: {}", self.own_host.mtu))?;
        serde_json::from_value(own["ledger"].clone()).context("reading the ledger of `huskctl mtu`")
    }

    /// The kernel has what the ledger says.
    pub(super) fn check_mtu(&mut self) {
        let said = match self.ledger() {
            Ok(ledger) => ledger.inner.and_then(|inner| usize::try_from(inner).ok()),
            Err(error) => return self.fail("the MTU ledger", "a readable one", format!("{error:#}")),
        };
        for pod in self.pods.clone() {
            if said != Some(pod.mtu) {
                let said = said.map_or_else(|| "none".to_owned(), |said| said.to_string());
                let what = format!("MTU of pod {}", pod.name);
                self.fail(what, format!("{said}, as the ledger says"), pod.mtu.to_string());
            }
        }
    }

    pub(super) fn check_reach(&mut self) {
        let place = |name: &str| {
            let pod = self.pods.iter().find(|pod| pod.name == name);
            pod.map_or_else(|| name.to_owned(), |pod| format!("{name} ({})", pod.host))
        };
        let mut found = Vec::new();
        let mut not_asked = 0;
        let mut note = |check: &Check, what: &dyn Fn() -> String| match check {
            Check::Held => {}
            Check::NotAsked => not_asked += 1,
            Check::Failed { expected, got } => {
                found.push(Failure { what: what(), expected: expected.clone(), got: got.clone() });
            }
        };
        for pair in &self.pairs {
            for (family, checks) in &pair.families {
                for (name, check) in checks.named() {
                    note(check, &|| format!("pod {} → pod {}, {family}, {name}", place(&pair.from), place(&pair.to)));
                }
            }
        }
        for row in &self.beyond {
            for (family, asked) in &row.families {
                for one in asked {
                    let what = || format!("{} → {}, {family}, {}", place(&one.from), place(&one.to), row.to);
                    note(&one.check, &what);
                }
            }
        }
        self.failures.extend(found);
        if not_asked > 0 {
            self.fail("questions", "time to ask all", format!("{not_asked} not asked, waiting took too long"));
        }
    }

    /// Length of the largest packet that fits the underlay: what ESP pads to four bytes may leave up to three of them.
    pub(super) fn full_packet(&self) -> usize {
        let needed = |ledger: Ledger| Some(underlay_needed(&ledger.stack, ledger.outer, ledger.inner?));
        let needed = self.ledger().ok().and_then(needed).and_then(|needed| usize::try_from(needed).ok());
        needed.unwrap_or(self.underlay_mtu)
    }

    pub(super) fn check_wire(&mut self) {
        let problems = self.wire.problems(self.mode, self.full_packet());
        self.failures.extend(problems);
    }

    /// No issue on a host, and no packet that its own rules had to drop.
    pub(super) fn check_status(&mut self, host: &str, status: &Value) {
        let issues = status["issues"].as_array().map(Vec::as_slice).unwrap_or_default();
        let messages: Vec<_> = issues.iter().filter_map(|issue| issue["message"].as_str()).collect();
        if !messages.is_empty() {
            self.fail(format!("`huskctl status` on {host}"), "no issues", messages.join("; "));
        }
        for (name, counter) in status["counters"].as_object().into_iter().flatten() {
            let packets = counter["packets"].as_u64().unwrap_or(0);
            if packets > 0 {
                let what = format!("packets that {host} dropped as {name}");
                self.fail(what, "none, nobody does anything forbidden here", packets.to_string());
            }
        }
    }
}
