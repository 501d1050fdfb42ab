//! A configuration that changes while the daemon runs, as that of a mounted `ConfigMap` does.
//!
//! A good one is taken into use by starting anew in the same process, which no packet notices. A bad one is refused: the
//! daemon goes on with what it has, and says so. The last good one is kept in the state directory, so that a daemon that is
//! started while the file is bad, by a reboot for example, does not leave the node without a network.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use husk_overlay::config::Config;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use tokio::sync::{Notify, watch as issue_watch};

use crate::daemon::Options;
use crate::line_log::{Event, Logs};
use crate::{files, watch};

/// File in the state directory that holds the last good configuration.
pub const LAST_GOOD_FILE: &str = "config.yaml";

/// The configuration to start with.
#[derive(Debug)]
pub struct Chosen {
    /// The configuration.
    pub config: Config,
    /// Its text.
    pub text: String,
    /// Why it is not the one of the file.
    pub issue: Option<Issue>,
}

/// Reads the configuration; a bad one is replaced by the last good one if changes are to be followed.
///
/// # Errors
/// When there is no good one.
pub fn choose(options: &Options, follow: bool) -> Result<Chosen> {
    match options.read_config_text().and_then(|text| Ok((options.parse_config(&text)?, text))) {
        Ok((config, text)) => Ok(Chosen { config, text, issue: None }),
        Err(error) if follow => instead(options, error),
        Err(error) => Err(error),
    }
}

/// The last good configuration, in place of one with which the daemon cannot start.
///
/// # Errors
/// The one given, when there is none.
pub fn instead(options: &Options, error: anyhow::Error) -> Result<Chosen> {
    let kept = files::read_text(&last_good(options), 1 << 20).ok().flatten();
    let Some((text, Ok(config))) = kept.map(|text| (text.clone(), options.parse_config(&text))) else {
        return Err(error.context("there is no earlier configuration to go on with"));
    };
    Ok(Chosen { config, text, issue: Some(refused(&options.config, &error)) })
}

/// Keeps the text of a configuration with which the daemon has started.
fn keep(options: &Options, text: &str) {
    let file = last_good(options);
    if std::fs::read_to_string(&file).is_ok_and(|kept| kept == text) {
        return;
    }
    // A disk that is full is no reason not to start.
    if let Err(error) = files::replace(&file, text.as_bytes(), 0o600) {
        tracing::warn!(%error, "the configuration is not kept for a start without it");
    }
}

fn last_good(options: &Options) -> PathBuf {
    options.state_directory.join(LAST_GOOD_FILE)
}

fn refused(file: &Path, error: &anyhow::Error) -> Issue {
    Issue {
        severity: Severity::Error,
        kind: IssueKind::BadConfig,
        subject: file.display().to_string(),
        message: format!("it is refused, and the last good configuration stays in force: {error:#}"),
        remedy: "correct it; it is read again at once, nothing has to be restarted".into(),
    }
}

/// Follows the configuration file.
pub struct Follower {
    changed: Arc<Notify>,
    issues: issue_watch::Receiver<Option<Issue>>,
}

impl Follower {
    /// Starts to follow, or to do nothing. `text` is what the daemon has started with, `issue` why it is not what stands in the
    /// file.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(options: &Options, text: String, issue: Option<Issue>, follow: bool) -> Result<Self> {
        let (sender, issues) = issue_watch::channel(issue.clone());
        let changed = Arc::new(Notify::new());
        if follow {
            keep(options, &text);
            let (options, tell) = (options.clone(), Arc::clone(&changed));
            // What could not be started with is not tried again before it changes.
            let in_vain = issue.as_ref().and_then(|_| options.read_config_text().ok());
            let folder = options.config.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned);
            let look = move || match look(&options, &text, in_vain.as_deref()) {
                Seen::Unchanged => {}
                Seen::Same => {
                    sender.send_if_modified(|issue| issue.take().is_some());
                }
                Seen::New => tell.notify_one(),
                Seen::Bad(issue) => {
                    let is_new = sender.send_if_modified(|before| {
                        let is_new = before.as_ref() != Some(&issue);
                        *before = Some(issue.clone());
                        is_new
                    });
                    if is_new {
                        tracing::error!("{issue}");
                    }
                }
            };
            watch::folders("husk-config", vec![folder], watch::RENEWAL, look).context("cannot start a thread")?;
        }
        Ok(Self { changed, issues })
    }

    /// Completes when there is another good configuration than the one in force.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
    }

    /// What is wrong with the file.
    #[must_use]
    pub fn issues(&self) -> issue_watch::Receiver<Option<Issue>> {
        self.issues.clone()
    }
}

/// Logs when a configuration is refused, and when the file is good again.
pub async fn log_refusals(mut issues: issue_watch::Receiver<Option<Issue>>, logs: Logs) {
    let mut known = None;
    loop {
        let now = issues.borrow_and_update().clone();
        if now != known {
            let (before, now) = (known.take(), now.clone());
            before.into_iter().for_each(|issue| logs.decision(|| Event::IssueCleared { issue }));
            now.into_iter().for_each(|issue| logs.decision(|| Event::IssueRaised { issue }));
        }
        known = now;
        if issues.changed().await.is_err() {
            return;
        }
    }
}

enum Seen {
    Unchanged,
    Same,
    New,
    Bad(Issue),
}

fn look(options: &Options, in_force: &str, in_vain: Option<&str>) -> Seen {
    if in_vain.is_some() && options.read_config_text().ok().as_deref() == in_vain {
        return Seen::Unchanged;
    }
    let read = options.read_config_text().and_then(|text| Ok((options.parse_config(&text)?, text)));
    match read {
        // The same but for comments is the same.
        Ok((config, text)) if text == in_force || options.parse_config(in_force).is_ok_and(|old| old == config) => {
            Seen::Same
        }
        Ok(_) => Seen::New,
        Err(error) => Seen::Bad(refused(&options.config, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "clusterCIDRs: [10.42.0.0/16]\n";
    const OTHER: &str = "clusterCIDRs: [10.42.0.0/16]\nmode: vxlan\n";

    fn options(directory: &Path) -> Options {
        Options {
            config: directory.join("config.yaml"),
            run_directory: directory.join("run"),
            state_directory: directory.join("state"),
            node_name: None,
            proc_sys: "/proc/sys".into(),
        }
    }

    #[test]
    fn a_bad_file_leaves_the_last_good_configuration_in_force() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        std::fs::create_dir(&options.state_directory).unwrap();
        std::fs::write(&options.config, "mode: nonsense\n").unwrap();
        let error = format!("{:#}", choose(&options, true).unwrap_err());
        assert!(error.contains("no earlier configuration") && error.contains("nonsense"), "{error}");
        std::fs::write(&options.config, OTHER).unwrap();
        let chosen = choose(&options, true).unwrap();
        assert!(chosen.issue.is_none());
        assert!(!last_good(&options).exists(), "nobody has started with it yet");
        keep(&options, &chosen.text);
        for bad in ["mode: nonsense\n", "", "\u{0}"] {
            std::fs::write(&options.config, bad).unwrap();
            let chosen = choose(&options, true).unwrap();
            assert_eq!(chosen.text, OTHER);
            assert_eq!(chosen.issue.unwrap().kind, IssueKind::BadConfig);
            assert!(choose(&options, false).is_err(), "a person who starts it wants to know");
        }
        std::fs::remove_file(&options.config).unwrap();
        assert_eq!(choose(&options, true).unwrap().text, OTHER);
    }

    #[tokio::test]
    async fn changes_are_seen_and_bad_ones_told() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        std::fs::create_dir(&options.state_directory).unwrap();
        std::fs::write(&options.config, GOOD).unwrap();
        let mut follower = Follower::start(&options, GOOD.into(), None, true).unwrap();
        let mut issues = follower.issues();
        files::replace(&options.config, b"mode: nonsense\n", 0o644).unwrap();
        let told = issues.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert!(told.message.contains("nonsense") && told.message.contains("stays in force"), "{told}");
        files::replace(&options.config, format!("# a comment\n{GOOD}").as_bytes(), 0o644).unwrap();
        issues.wait_for(Option::is_none).await.unwrap();
        files::replace(&options.config, OTHER.as_bytes(), 0o644).unwrap();
        follower.changed().await;
    }

    #[tokio::test]
    async fn what_could_not_be_started_with_waits_for_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        std::fs::create_dir(&options.state_directory).unwrap();
        keep(&options, GOOD);
        // It reads well, but names a key that is not there.
        std::fs::write(&options.config, OTHER).unwrap();
        let chosen = instead(&options, anyhow::anyhow!("no such key")).unwrap();
        assert_eq!(chosen.text, GOOD);
        assert!(chosen.issue.as_ref().unwrap().message.contains("no such key"));
        assert!(matches!(look(&options, GOOD, Some(OTHER)), Seen::Unchanged));
        let mut follower = Follower::start(&options, chosen.text, chosen.issue, true).unwrap();
        files::replace(&options.config, format!("{OTHER}vxlan: {{vni: 7}}\n").as_bytes(), 0o644).unwrap();
        follower.changed().await;
    }
}
