//! The daemon itself: its configuration, and whether it answers.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};
use crate::files;
use crate::programs::{self, Keep, Limits};
use husk_overlay::config::Config;
use husk_overlay::ipc::SOCKET_FILE;
use husk_overlay::issue::Severity;

/// The configuration file can be used.
pub(super) const CONFIGURATION: Check =
    Check { id: "configuration", title: "the daemon's configuration file can be used", look: configuration };

/// The daemon answers and is ready.
pub(super) const CHECK: Check = Check { id: "daemon", title: "the daemon runs, answers and takes pods", look: daemon };

/// Name of the systemd unit (manifests/systemd/huskd.service).
const UNIT: &str = "huskd.service";

/// Where systemd shows that it runs as the first process (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// Lines of the log that are shown.
const LOG_LINES: usize = 5;

/// Limits of a program that is only asked something.
pub(super) const LIMITS: Limits = Limits { time: Duration::from_secs(5), bytes: 64 << 10 };

/// Reads the configuration file.
pub(super) fn read_config(evidence: &Evidence) -> Result<Config, String> {
    let file = evidence.places.config.display().to_string();
    match files::read_text(&evidence.places.config, 1 << 20) {
        Ok(Some(text)) => Config::parse(&file, &text).map_err(|errors| errors.to_string()),
        Ok(None) => Err(format!("{file} does not exist")),
        Err(error) => Err(error.to_string()),
    }
}

fn configuration(evidence: &Evidence) -> Looked {
    let file = evidence.places.config.display();
    let Err(reason) = read_config(evidence) else { return Ok(Outcome::well(format!("{file}"))) };
    let fix = Fix::by_hand(
        format!("mend {file}; `huskd example-config` prints every key with its default"),
        [Action::run_on_host("huskd", ["check-config".to_owned(), "--config".to_owned(), file.to_string()])],
        "only you know what it should say",
    );
    let cause = "the daemon cannot start with this configuration, or goes on with the one before it";
    Ok(Outcome::of(vec![Finding::error(cause, reason.lines().map(str::to_owned).collect(), fix)], ""))
}

fn daemon(evidence: &Evidence) -> Looked {
    if let Err(why) = evidence.reachable() {
        return Ok(Outcome::of(vec![silent(evidence, why)], ""));
    }
    let status = match evidence.status() {
        Ok(status) => status,
        Err(Unknown(reason)) => {
            let words = "wait a few seconds; if it stays so, its log says what it waits for";
            let cause = "the daemon answers and cannot say yet how the node is: no pod can be added";
            return Ok(Outcome::of(vec![Finding::blocking(cause, vec![reason], Fix::words(words))], ""));
        }
    };
    let mut findings = Vec::new();
    if !status.ready {
        let issues = status.issues.iter().filter(|issue| issue.severity == Severity::Blocking);
        let (told, remedies): (Vec<_>, Vec<_>) = issues.map(|it| (it.to_string(), it.remedy.clone())).unzip();
        let reason = status.reason.clone().unwrap_or_else(|| "it does not say why".into());
        let words = remedies.first().cloned().unwrap_or_else(|| "see its log".into());
        findings.push(Finding::blocking(format!("the node takes no pods: {reason}"), told, Fix::words(words)));
    }
    Ok(Outcome::of(findings, format!("huskd {} answers and is ready", status.version)))
}

/// A daemon that does not answer.
fn silent(evidence: &Evidence, why: String) -> Finding {
    let mut told = vec![why];
    let systemd = evidence.host.is_here() && evidence.host.exists(SYSTEMD).unwrap_or(false);
    let unit =
        systemd.then(|| systemctl(&["show", UNIT, "--property=LoadState,ActiveState,SubState,Result"])).flatten();
    // Something listens, though nothing came from it.
    let hangs = UnixStream::connect(evidence.places.run_directory.join(SOCKET_FILE)).is_ok();
    let (what, start) = if hangs { ("the daemon hangs", "restart it") } else { ("no daemon answers", "start it") };
    let cause =
        format!("{what}: pods that run go on, but none can be added, and nothing follows what changes in the cluster");
    let fix = match unit {
        Some(unit) if !unit.contains("LoadState=not-found") => {
            told.push(format!("{UNIT}: {}", unit.split_whitespace().collect::<Vec<_>>().join(" ")));
            told.extend(last_lines());
            Fix::safe(start, [Action::run_on_host("systemctl", ["restart", UNIT])])
        }
        _ => Fix::by_hand(
            format!(
                "{start}: on a host `huskd run`, better as the unit manifests/systemd/huskd.service; in Kubernetes look at its pod"
            ),
            [Action::run_on_host(
                "kubectl",
                "-n husk-system get pods -l app.kubernetes.io/name=husk -o wide".split(' '),
            )],
            "how it is started here is not known",
        ),
    };
    Finding::blocking(cause, told, fix)
}

fn systemctl(arguments: &[&str]) -> Option<String> {
    asked(Command::new("systemctl").args(arguments), LIMITS)
}

fn last_lines() -> Vec<String> {
    let lines = LOG_LINES.to_string();
    let log = asked(Command::new("journalctl").args(["-u", UNIT, "-n", &lines, "-o", "cat", "--no-pager"]), LIMITS);
    log.unwrap_or_default().lines().take(LOG_LINES).map(str::to_owned).collect()
}

/// What a program says that is only asked; none if it fails, or does not answer in time.
pub(super) fn asked(command: &mut Command, limits: Limits) -> Option<String> {
    let ran = programs::run(command.env("PATH", programs::search_path()), Keep::Beginning, limits).ok()?;
    (ran.status == Some(0)).then(|| String::from_utf8_lossy(&ran.output.content).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_that_hangs_says_nothing_and_is_not_waited_for() {
        let limits = Limits { time: Duration::from_millis(100), ..LIMITS };
        assert_eq!(asked(Command::new("sh").args(["-c", "echo LoadState=loaded; sleep 600"]), limits), None);
        assert_eq!(asked(Command::new("sh").args(["-c", "echo well"]), LIMITS).as_deref(), Some("well\n"));
        assert_eq!(asked(Command::new("sh").args(["-c", "echo ill; exit 1"]), LIMITS), None);
    }
}
