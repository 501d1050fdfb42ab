//! `huskctl doctor`: what was looked at, what was found, and what mends it.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use husk_overlay::issue::Severity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `huskctl doctor`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DoctorReport {
    /// Every check that was made, in the order of `huskctl doctor --list`.
    pub checks: Vec<CheckReport>,
    /// What `--fix` did, in the order it was done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repairs: Vec<RepairReport>,
}

impl DoctorReport {
    /// Something was found that is more than a warning and is still there, or a fix is not in force yet.
    #[must_use]
    pub fn hurts(&self) -> bool {
        let hurts = |finding: &Finding| finding.severity >= Severity::Error;
        let pending = |repair: &RepairReport| matches!(repair.result, RepairResult::Pending { .. });
        self.repairs.iter().any(pending)
            || self.checks.iter().any(|check| match &check.outcome {
                Outcome::Found { findings } => findings.iter().any(hurts),
                Outcome::Well { .. } | Outcome::DoesNotApply { .. } | Outcome::Unknown { .. } => false,
            })
    }
}

/// One check and its outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckReport {
    /// Stable name, as `--only` takes it.
    pub id: String,
    /// What is looked at.
    pub title: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A row of `huskctl doctor --list`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckListing {
    /// Stable name.
    pub id: String,
    /// What is looked at.
    pub title: String,
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", tag = "outcome")]
pub enum Outcome {
    /// Nothing is wrong.
    Well {
        /// What was seen, a few words.
        seen: String,
    },
    /// Something is wrong. Never empty.
    Found {
        /// What.
        findings: Vec<Finding>,
    },
    /// It cannot be wrong here: another mode, a program that does not run.
    DoesNotApply {
        /// Why.
        why: String,
    },
    /// It could not be looked at.
    Unknown {
        /// Why, and how it could be.
        why: String,
    },
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How much it hurts.
    pub severity: Severity,
    /// What is wrong, and what comes of it; one or two sentences.
    pub cause: String,
    /// Where that was seen: a file and its line, a rule, a counter, a number. As it stands there.
    pub evidence: Vec<String>,
    /// What mends it.
    pub fix: Fix,
}

/// What mends a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fix {
    /// What to do, one sentence.
    pub words: String,
    /// Exactly that; empty where it takes a decision or hands.
    pub actions: Vec<Action>,
    /// The same as commands for a shell, in order.
    pub commands: Vec<String>,
    /// Why `--fix` leaves it to a person; none if it is safe: it disturbs no traffic that flows, takes away nothing of others,
    /// and can be undone.
    pub by_hand: Option<String>,
}

impl Fix {
    /// A fix that `--fix` may apply.
    #[must_use]
    pub fn safe(words: impl Into<String>, actions: impl IntoIterator<Item = Action>) -> Self {
        let actions: Vec<Action> = actions.into_iter().collect();
        let commands = actions.iter().map(ToString::to_string).collect();
        Self { words: words.into(), actions, commands, by_hand: None }
    }

    /// A fix that takes a person, with the reason.
    #[must_use]
    pub fn by_hand(
        words: impl Into<String>,
        actions: impl IntoIterator<Item = Action>,
        because: impl Into<String>,
    ) -> Self {
        Self { by_hand: Some(because.into()), ..Self::safe(words, actions) }
    }

    /// Words alone: there is no command for it.
    #[must_use]
    pub fn words(words: impl Into<String>) -> Self {
        Self::by_hand(words, [], "there is no command for it")
    }

    /// `--fix` may apply it.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.by_hand.is_none() && !self.actions.is_empty()
    }
}

/// A step of a fix. Its [`Display`](fmt::Display) is a command for a shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "action")]
pub enum Action {
    /// Writes a file of the host's, with mode 0644, and the directories it needs.
    WriteFile {
        /// Absolute path on the host.
        path: PathBuf,
        /// All of it.
        contents: String,
    },
    /// Gives a file of the host's another name in its directory.
    RenameFile {
        /// Absolute path on the host.
        from: PathBuf,
        /// Absolute path on the host.
        to: PathBuf,
    },
    /// Sets a kernel parameter of the network namespace; it does not survive a reboot.
    SetSysctl {
        /// Path below `/proc/sys`, which begins with `net/`.
        path: String,
        /// Value.
        value: String,
    },
    /// Releases the lease of a pod that is gone, under the lock of the lease store and if that is still so then; its addresses rest.
    ReleaseLease {
        /// How a shell finds `huskctl`.
        program: String,
        /// An address of the lease.
        address: IpAddr,
        /// Directory of the daemon's socket, below which the leases are; none for the usual one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run_directory: Option<PathBuf>,
    },
    /// Runs a program that works on the network namespace: `ip`, `nft`.
    Run {
        /// Name.
        program: String,
        /// Arguments.
        arguments: Vec<String>,
    },
    /// Runs a program of the host's, which works on its services or its kernel: `systemctl`, `modprobe`.
    RunOnHost {
        /// Name.
        program: String,
        /// Arguments.
        arguments: Vec<String>,
    },
    /// Runs a program of the host's that makes a service take up the files before it, of which nothing is in force until then.
    TakeUp {
        /// Name.
        program: String,
        /// Arguments.
        arguments: Vec<String>,
        /// It may disturb traffic: `--fix` leaves the time for it to a person.
        disturbs: bool,
    },
}

impl Action {
    /// A program that works on the network namespace.
    #[must_use]
    pub fn run<S: Into<String>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        Self::Run { program: program.to_owned(), arguments: arguments.into_iter().map(Into::into).collect() }
    }

    /// A program of the host's that makes a service read its files again, and disturbs nothing.
    #[must_use]
    pub fn reload<S: Into<String>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Self::TakeUp { program: program.to_owned(), arguments, disturbs: false }
    }

    /// A start of a unit of the host's anew, at a time that a person chooses.
    #[must_use]
    pub fn restart_later(unit: &str) -> Self {
        Self::TakeUp { program: "systemctl".into(), arguments: vec!["restart".into(), unit.into()], disturbs: true }
    }

    /// A program of the host's.
    #[must_use]
    pub fn run_on_host<S: Into<String>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        Self::RunOnHost { program: program.to_owned(), arguments: arguments.into_iter().map(Into::into).collect() }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WriteFile { path, contents } => {
                let parent = path.parent().unwrap_or(path).display().to_string();
                let (parent, path) = (quoted(&parent), quoted(&path.display().to_string()));
                write!(f, "mkdir -p {parent} && cat > {path} <<'END'\n{}\nEND", contents.trim_end_matches('\n'))
            }
            Self::RenameFile { from, to } => {
                write!(f, "mv {} {}", quoted(&from.display().to_string()), quoted(&to.display().to_string()))
            }
            Self::SetSysctl { path, value } => write!(f, "sysctl -w {}", quoted(&format!("{path}={value}"))),
            Self::ReleaseLease { program, address, run_directory } => {
                write!(f, "{} ipam release {address}", quoted(program))?;
                run_directory
                    .iter()
                    .try_for_each(|it| write!(f, " --run-directory {}", quoted(&it.display().to_string())))
            }
            Self::Run { program, arguments }
            | Self::RunOnHost { program, arguments }
            | Self::TakeUp { program, arguments, .. } => {
                f.write_str(&quoted(program))?;
                arguments.iter().try_for_each(|argument| write!(f, " {}", quoted(argument)))
            }
        }
    }
}

/// A word as a shell takes it for itself.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:=,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What `--fix` did about a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepairReport {
    /// The check that found it.
    pub id: String,
    /// What it was.
    pub cause: String,
    /// What became of it.
    #[serde(flatten)]
    pub result: RepairResult,
}

/// What became of a fix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum RepairResult {
    /// Applied, and the check does not find it any more.
    Gone {
        /// What is left to do on the host so that it lasts, as commands.
        left: Vec<String>,
    },
    /// Its files are written, and in force when this was done; until then it is as it was, though the files are in order.
    Pending {
        /// What is left to do on the host, as commands.
        left: Vec<String>,
    },
    /// Applied, and the check finds it still.
    StillThere {
        /// What is left to do on the host for it to take effect, as commands.
        left: Vec<String>,
    },
    /// A step failed; those after it were not tried.
    Failed {
        /// Which, and why.
        error: String,
    },
    /// A person has to do it.
    ByHand {
        /// Why.
        because: String,
    },
    /// Somebody was asked, and said no.
    Declined,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_commands_a_shell_takes_as_they_are_meant() {
        let write = Action::WriteFile { path: "/etc/a b/c.conf".into(), contents: "one\n$two\n".into() };
        assert_eq!(write.to_string(), "mkdir -p '/etc/a b' && cat > '/etc/a b/c.conf' <<'END'\none\n$two\nEND");
        let nft = Action::run("nft", ["insert", "rule", "ip", "filter", "FORWARD", "iifname", "\"husk*\"", "accept"]);
        assert_eq!(nft.to_string(), "nft insert rule ip filter FORWARD iifname '\"husk*\"' accept");
        let sysctl = Action::SetSysctl { path: "net/ipv4/conf/eth0.1/rp_filter".into(), value: "2".into() };
        assert_eq!(sysctl.to_string(), "sysctl -w net/ipv4/conf/eth0.1/rp_filter=2");
        let release = |program: &str, run_directory| Action::ReleaseLease {
            program: program.into(),
            address: "10.42.0.1".parse().unwrap(),
            run_directory,
        };
        assert_eq!(release("huskctl", None).to_string(), "huskctl ipam release 10.42.0.1");
        let elsewhere = release("/opt/my husk/huskctl", Some("/run/other".into())).to_string();
        assert_eq!(elsewhere, "'/opt/my husk/huskctl' ipam release 10.42.0.1 --run-directory /run/other");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
