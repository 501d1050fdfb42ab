//! What checks look at, gathered when it is first asked for and then kept, so that all checks of a run see the same.

use std::cell::OnceCell;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use husk_dataplane::nft;
use husk_overlay::config::Config;
use husk_overlay::ipc::{Request, Response, SOCKET_FILE};
use husk_overlay::marks;
use serde::de::DeserializeOwned;

use super::host::HostFiles;
use super::{Action, Unknown};
use crate::firewall::Ruleset;
use crate::huskctl::exchange;
use crate::report::{IpamReport, KeysReport, MtuReport, PeerReport, Status};

/// Where evidence is found.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directory of the daemon's socket.
    pub run_directory: PathBuf,
    /// What has to survive a reboot.
    pub state_directory: PathBuf,
    /// The daemon's configuration file.
    pub config: PathBuf,
    /// Root of the host's files.
    pub host_root: PathBuf,
    /// How a shell finds `huskctl`.
    pub huskctl: String,
}

impl Places {
    /// A question to this daemon, asked by this very program.
    pub(super) fn huskctl(&self, arguments: &[&str]) -> Action {
        let elsewhere = self.run_directory_elsewhere().map(|it| it.display().to_string());
        let told = elsewhere.into_iter().flat_map(|it| ["--run-directory".to_owned(), it]);
        Action::run(&self.huskctl, arguments.iter().map(|&word| word.to_owned()).chain(told))
    }

    /// Releases the lease of an address.
    pub(super) fn release_lease(&self, address: IpAddr) -> Action {
        let run_directory = self.run_directory_elsewhere().map(Path::to_owned);
        Action::ReleaseLease { program: self.huskctl.clone(), address, run_directory }
    }

    /// The usual ones.
    #[cfg(test)]
    pub(super) fn of_tests() -> Self {
        Self {
            run_directory: marks::RUN_DIRECTORY.into(),
            state_directory: marks::STATE_DIRECTORY.into(),
            config: crate::daemon::CONFIG_FILE.into(),
            host_root: "/".into(),
            huskctl: "huskctl".into(),
        }
    }

    fn run_directory_elsewhere(&self) -> Option<&Path> {
        Some(self.run_directory.as_path()).filter(|it| *it != Path::new(marks::RUN_DIRECTORY))
    }
}

/// What checks look at. The kernel is asked directly, in the calling thread's network namespace.
#[derive(Debug)]
pub struct Evidence {
    /// Where it is found.
    pub places: Places,
    /// Files of the host.
    pub host: HostFiles,
    config: OnceCell<Result<Config, Unknown>>,
    unreachable: OnceCell<String>,
    status: OnceCell<Result<Status, Unknown>>,
    peers: OnceCell<Result<Vec<PeerReport>, Unknown>>,
    mtu: OnceCell<Result<Vec<MtuReport>, Unknown>>,
    ipam: OnceCell<Result<IpamReport, Unknown>>,
    keys: OnceCell<Result<KeysReport, Unknown>>,
    ruleset: OnceCell<Result<Ruleset, Unknown>>,
}

impl Evidence {
    /// Nothing is looked at yet.
    #[must_use]
    pub fn new(places: Places) -> Self {
        Self {
            host: HostFiles::new(&places.host_root),
            places,
            config: OnceCell::new(),
            unreachable: OnceCell::new(),
            status: OnceCell::new(),
            peers: OnceCell::new(),
            mtu: OnceCell::new(),
            ipam: OnceCell::new(),
            keys: OnceCell::new(),
            ruleset: OnceCell::new(),
        }
    }

    /// The daemon's configuration, as the file has it now.
    ///
    /// # Errors
    /// When it is missing or has a mistake in it, which the check `configuration` tells.
    pub fn config(&self) -> Result<&Config, Unknown> {
        known(self.config.get_or_init(|| {
            super::daemon::read_config(self).map_err(|_| {
                let file = self.places.config.display();
                Unknown(format!("{file} cannot be used, see the check {}", super::daemon::CONFIGURATION.id))
            })
        }))
    }

    /// What `huskctl status` prints.
    ///
    /// # Errors
    /// When the daemon does not answer, or has not finished its first pass.
    pub fn status(&self) -> Result<&Status, Unknown> {
        known(self.status.get_or_init(|| self.ask(&Request::Status)))
    }

    /// What `huskctl peers` prints.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn peers(&self) -> Result<&[PeerReport], Unknown> {
        known(self.peers.get_or_init(|| self.ask(&Request::Peers))).map(Vec::as_slice)
    }

    /// What `huskctl mtu` prints.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn mtu(&self) -> Result<&[MtuReport], Unknown> {
        known(self.mtu.get_or_init(|| self.ask(&Request::Mtu))).map(Vec::as_slice)
    }

    /// What `huskctl ipam show` prints.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn ipam(&self) -> Result<&IpamReport, Unknown> {
        known(self.ipam.get_or_init(|| self.ask(&Request::Ipam)))
    }

    /// What `huskctl keys status` prints.
    ///
    /// # Errors
    /// As [`Self::status`], and in modes without keys.
    pub fn keys(&self) -> Result<&KeysReport, Unknown> {
        known(self.keys.get_or_init(|| self.ask(&Request::Keys)))
    }

    /// nftables rules of others: listing them takes seconds on a host of many services.
    pub(super) fn ruleset(&self) -> Result<&Ruleset, Unknown> {
        known(self.ruleset.get_or_init(|| Ok(Ruleset::parse(&nft::ruleset()?))))
    }

    /// Why the daemon cannot be asked, once it was tried; the check `daemon` tells it, all others refer to that.
    ///
    /// # Errors
    /// The reason.
    pub fn reachable(&self) -> Result<(), String> {
        // Any question will do, and this one is asked anyway.
        let _ = self.status();
        self.unreachable.get().map_or(Ok(()), |why| Err(why.clone()))
    }

    /// Asks the daemon anything. One that did not answer is not asked again: it may take half a minute each time.
    ///
    /// # Errors
    /// When it does not answer, or refuses.
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Unknown> {
        let refer = || Unknown(format!("the daemon does not answer, see the check {}", super::daemon::CHECK.id));
        if self.unreachable.get().is_some() {
            return Err(refer());
        }
        match exchange(&self.places.run_directory.join(SOCKET_FILE), request) {
            Ok(Response::Report { report }) => serde_json::from_value(report).map_err(|error| {
                Unknown(format!(
                    "the daemon's answer is not understood ({error}); huskctl and huskd should be of one version"
                ))
            }),
            Ok(Response::Refused { reason } | Response::NotReady { reason, .. }) => Err(Unknown(reason)),
            Ok(Response::Done) => Err(Unknown::because("the daemon answered something else")),
            Err(error) => {
                // The first reason is the one that counts.
                let _ = self.unreachable.set(format!("{error:#}"));
                Err(refer())
            }
        }
    }
}

fn known<T>(gathered: &Result<T, Unknown>) -> Result<&T, Unknown> {
    gathered.as_ref().map_err(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_goes_to_the_daemon_that_was_looked_at() {
        let mut places = Places::of_tests();
        assert_eq!(places.huskctl(&["keys", "rotate"]).to_string(), "huskctl keys rotate");
        places.run_directory = "/run/other".into();
        places.huskctl = "/opt/huskctl".into();
        let elsewhere = "/opt/huskctl keys rotate --run-directory /run/other";
        assert_eq!(places.huskctl(&["keys", "rotate"]).to_string(), elsewhere);
        let release = places.release_lease("fd42::1".parse().unwrap()).to_string();
        assert_eq!(release, "/opt/huskctl ipam release fd42::1 --run-directory /run/other");
    }
}
