//! `huskctl doctor`: looks at everything around the overlay that is known to break it, and says what mends it.
//!
//! - A [`Check`] gathers what it needs from [`Evidence`] and judges it by a pure function. It never changes anything.
//! - What it finds has a cause, the evidence as it stands on the host, and a [`Fix`]: typed actions, which are printed as commands
//!   and, if they are safe, applied by `--fix` (`repair`). What is printed and what is done cannot differ.
//! - Evidence is what the daemon answers, the files of the host (below `--host-root`), and the kernel as the calling network
//!   namespace shows it. Each part may be missing: a check that cannot look is [`Outcome::Unknown`] with the reason, never well.
//! - After a fix the check looks again, with fresh evidence; only that tells whether it helped.
//!
//! To add a check: a module with a `pub(super) const CHECK: Check`, its place in [`CHECKS`], a section in `docs/doctor.md`, and a
//! breakage of its name in `tests/cases/doctor`. Tests compare the three lists.

mod cni_config;
mod conntrack;
mod daemon;
mod drop_ins;
mod evidence;
mod firewall;
mod host;
mod issues;
mod kernel_features;
mod keys;
mod leases;
mod network_manager;
mod other_cni;
mod overlap;
mod parameters;
mod paths;
mod peers;
mod pools;
mod repair;
mod restart;
mod room;
mod systemd;
mod versions;
mod words;

use husk_overlay::issue::Severity;

pub use self::evidence::{Evidence, Places};
pub use self::host::HostFiles;
pub use self::repair::{Answer, repair};
pub use crate::report::{Action, CheckListing, CheckReport, DoctorReport, Finding, Fix, Outcome};

/// All checks, in the order in which they are made and told: the daemon, the host, its kernel, firewalls, peers, addresses.
pub const CHECKS: &[Check] = &[
    daemon::CONFIGURATION,
    daemon::CHECK,
    kernel_features::CHECK,
    parameters::FORWARDING,
    parameters::REVERSE_PATH,
    systemd::MAC_ADDRESSES,
    systemd::NETWORKD,
    network_manager::CHECK,
    firewall::RULES,
    firewall::BACKENDS,
    conntrack::CHECK,
    other_cni::CHECK,
    cni_config::CHECK,
    room::DISK,
    room::MEMORY,
    versions::CHECK,
    versions::NODE_FILE_CHECK,
    peers::CHECK,
    paths::PATHS,
    paths::MTU,
    paths::CLOCKS,
    issues::OFFLOAD,
    keys::CHECK,
    keys::XFRM_ERRORS,
    issues::DUPLICATES,
    overlap::CHECK,
    pools::CHECK,
    leases::CHECK,
    issues::REST,
];

/// Files that fixes write below `/etc`; they go with `huskd cleanup`.
pub const WRITTEN: &[&str] = &[
    "/etc/NetworkManager/conf.d/zz-husk.conf",
    "/etc/modules-load.d/husk.conf",
    "/etc/sysctl.d/zz-husk-conntrack.conf",
    "/etc/sysctl.d/zz-husk-forwarding.conf",
    "/etc/sysctl.d/zz-husk-rp-filter.conf",
    "/etc/systemd/network/00-husk.network",
    "/etc/systemd/network/10-husk.link",
    "/etc/systemd/networkd.conf.d/zz-husk.conf",
];

/// Something that is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Stable name, lower case with dashes.
    pub id: &'static str,
    /// What is looked at, a few words.
    pub title: &'static str,
    /// Looks. `Err` becomes [`Outcome::Unknown`], so that what is missing ends a check with `?`.
    pub look: fn(&Evidence) -> Looked,
}

/// What a check returns.
pub type Looked = Result<Outcome, Unknown>;

/// Why something could not be looked at, and how it could be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unknown(pub String);

impl Unknown {
    /// With this reason.
    pub fn because(reason: impl ToString) -> Self {
        Self(reason.to_string())
    }
}

impl From<husk_dataplane::Error> for Unknown {
    fn from(error: husk_dataplane::Error) -> Self {
        Self(format!("{error}; {}", error.remedy_once()))
    }
}

impl From<std::io::Error> for Unknown {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

impl Outcome {
    /// Nothing is wrong; says what was seen.
    pub fn well(seen: impl Into<String>) -> Self {
        Self::Well { seen: seen.into() }
    }

    /// It cannot be wrong here.
    pub fn does_not_apply(why: impl Into<String>) -> Self {
        Self::DoesNotApply { why: why.into() }
    }

    /// What was found; well, with what was seen, if nothing was.
    pub fn of(findings: Vec<Finding>, seen: impl Into<String>) -> Self {
        if findings.is_empty() { Self::well(seen) } else { Self::Found { findings } }
    }
}

impl Finding {
    /// Traffic flows; somebody ought to look.
    pub fn warning(cause: impl Into<String>, evidence: Vec<String>, fix: Fix) -> Self {
        Self { severity: Severity::Warning, cause: cause.into(), evidence, fix }
    }

    /// Some traffic does not flow.
    pub fn error(cause: impl Into<String>, evidence: Vec<String>, fix: Fix) -> Self {
        Self { severity: Severity::Error, cause: cause.into(), evidence, fix }
    }

    /// The node cannot serve pods.
    pub fn blocking(cause: impl Into<String>, evidence: Vec<String>, fix: Fix) -> Self {
        Self { severity: Severity::Blocking, cause: cause.into(), evidence, fix }
    }
}

impl Check {
    /// Looks, and reports.
    #[must_use]
    pub fn report(&self, evidence: &Evidence) -> CheckReport {
        let outcome = (self.look)(evidence).unwrap_or_else(|Unknown(why)| Outcome::Unknown { why });
        CheckReport { id: self.id.to_owned(), title: self.title.to_owned(), outcome }
    }
}

/// The checks of these names, all of them for no name, in the order of [`CHECKS`].
#[must_use]
pub fn chosen(only: &[String]) -> Vec<Check> {
    CHECKS.iter().filter(|check| only.is_empty() || only.iter().any(|id| id == check.id)).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_check_has_its_section_in_the_documentation() {
        let text = include_str!("../../docs/doctor.md");
        let sections: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).collect();
        let checks: Vec<&str> = CHECKS.iter().map(|check| check.id).collect();
        assert_eq!(sections, checks);
    }

    #[test]
    fn names_are_unique_and_stable_in_form() {
        let ids: BTreeSet<&str> = CHECKS.iter().map(|check| check.id).collect();
        assert_eq!(ids.len(), CHECKS.len());
        for check in CHECKS {
            assert!(check.id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{}", check.id);
            assert!(!check.title.is_empty() && !check.title.ends_with('.'), "{}", check.title);
        }
    }
}
