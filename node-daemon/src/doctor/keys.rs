//! Keys that get too old, rotations that do not end, and packets that IPsec does not let through.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use husk_dataplane::xfrm;
use husk_overlay::config::Config;
use husk_overlay::name::NodeName;

use super::issues::{self, Teller};
use super::words::{age, several};
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Places, restart};
use crate::report::{EpochReport, KeysReport};

/// Keys.
pub(super) const CHECK: Check =
    Check { id: "keys", title: "keys are renewed in time, and every peer uses the newest", look: keys };

/// IPsec's counters.
pub(super) const XFRM_ERRORS: Check =
    Check { id: "xfrm-errors", title: "IPsec lets every packet through", look: xfrm_errors };

/// How long the counters of IPsec are watched.
const WATCHED: Duration = Duration::from_secs(2);

/// A new key that peers do not use after so many times `keys.grace` is late: a rotation takes about one.
const LATE: u64 = 10;

/// Seconds by which a key may outlive its interval: passes are seconds apart, and what a rotation waits for takes its time.
const OVERDUE: u64 = 300;

fn keys(evidence: &Evidence) -> Looked {
    let (status, config) = (evidence.status()?, evidence.config()?);
    if !status.encrypted {
        return Ok(Outcome::does_not_apply(format!("mode {} has no keys", status.mode)));
    }
    let report = evidence.keys()?;
    let mut findings = issues::findings(evidence, Teller::Keys)?;
    findings.extend(judge(report, config, &evidence.places));
    let newest = report.epochs.last();
    let seen = newest.map_or_else(|| "no key yet".to_owned(), |it| format!("epoch {}, {} old", it.epoch, age(it.age)));
    Ok(Outcome::of(findings, seen))
}

fn judge(report: &KeysReport, config: &Config, places: &Places) -> Vec<Finding> {
    let rotation = &config.rotation;
    let mut findings = Vec::new();
    let Some(newest) = report.epochs.last() else { return findings };
    let late = newest.age >= u64::from(rotation.grace).saturating_mul(LATE);
    let behind: Vec<&NodeName> = report.epochs.iter().flat_map(|it| &it.unconfirmed).collect();
    let mut told = report.epochs.iter().map(epoch).collect::<Vec<_>>();
    told.extend(report.waiting.iter().map(|why| format!("the next rotation waits: {why}")));
    if !newest.published && late {
        findings.push(Finding::error(
            format!(
                "the key of epoch {} was made {} ago and is not published yet: nobody can use it",
                newest.epoch,
                age(newest.age)
            ),
            told.clone(),
            Fix::by_hand(
                "the cluster source does not take the node's record: see `huskctl status`, and the daemon's log",
                [places.huskctl(&["status"])],
                "it depends on what the source says",
            ),
        ));
    } else if let Some(first) = behind.first().filter(|_| late) {
        let mut names = behind.clone();
        names.sort();
        names.dedup();
        let over = newest.age >= u64::from(rotation.hard_lifetime);
        let cause = format!(
            "{} do not use the key of epoch {}, which is {} old: the rotation does not end",
            several(&names),
            newest.epoch,
            age(newest.age)
        );
        let words = format!(
            "their daemons do not run, or do not hear of changes in the cluster: start them; look at {first} first"
        );
        let fix = Fix::by_hand(words, [restart::of_node(config, first.as_str())], "it is to be done for each of them");
        let limit = format!(
            "the old key ends {} after it was replaced (keys.hardLifetime); until then traffic goes on under it",
            age(rotation.hard_lifetime.into())
        );
        let told = [told.clone(), vec![limit]].concat();
        findings.push(if over { Finding::error(cause, told, fix) } else { Finding::warning(cause, told, fix) });
    }
    let expired = rotation.interval.is_some_and(|interval| newest.age > u64::from(interval) + OVERDUE);
    if expired {
        findings.push(Finding::warning(
            format!(
                "the newest key is {} old, and should have been replaced: the same key protects more and more traffic",
                age(newest.age)
            ),
            [told, vec![format!("keys.rotation is {}", age(rotation.interval.unwrap_or_default().into()))]].concat(),
            Fix::safe("ask for a new one; the answer says what it waits for", [places.huskctl(&["keys", "rotate"])]),
        ));
    }
    findings
}

fn epoch(it: &EpochReport) -> String {
    let mut text = format!("epoch {}: {} old, used by {} peers", it.epoch, age(it.age), it.confirmed.len());
    if !it.unconfirmed.is_empty() {
        text += &format!(", not by {}", several(&it.unconfirmed.iter().collect::<Vec<_>>()));
    }
    text
}

fn xfrm_errors(evidence: &Evidence) -> Looked {
    let mode = evidence.config()?.mode;
    if !mode.uses_esp() {
        return Ok(Outcome::does_not_apply(format!("mode {mode} does not use IPsec")));
    }
    let before = xfrm::statistics();
    if before.is_empty() {
        return Ok(Outcome::does_not_apply("this kernel counts nothing of IPsec (CONFIG_XFRM_STATISTICS)"));
    }
    // The counters begin with the boot, and what went wrong once may be long over.
    thread::sleep(WATCHED);
    let findings = growing(&before, &xfrm::statistics(), &evidence.places);
    let past: Vec<String> =
        before.iter().filter(|(_, count)| **count > 0).map(|(name, count)| format!("{name} {count}")).collect();
    let seen = match past.as_slice() {
        [] => "no packet was ever refused".to_owned(),
        past => format!("none is refused now; since boot there were {}", several(past)),
    };
    Ok(Outcome::of(findings, seen))
}

fn growing(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, places: &Places) -> Vec<Finding> {
    let finding = |(name, count): (&String, &u64)| {
        let more = count.saturating_sub(before.get(name).copied().unwrap_or_default());
        if more == 0 {
            return None;
        }
        let (meaning, words, action) = meaning(name, places);
        let told = format!("/proc/net/xfrm_stat: {name} {count}, {more} more within {} s", WATCHED.as_secs());
        let fix = match action {
            Some(action) => Fix::by_hand(words, [action], "this only shows more"),
            None => Fix::words(words),
        };
        Some(Finding::error(format!("IPsec refuses packets: {meaning}"), vec![told], fix))
    };
    after.iter().filter_map(finding).collect()
}

/// What a counter counts (Documentation/networking/xfrm_proc.rst of the kernel), and what to do.
fn meaning(counter: &str, places: &Places) -> (&'static str, &'static str, Option<Action>) {
    let huskctl = |arguments: &[&str]| Some(places.huskctl(arguments));
    let ip = |arguments: &[&str]| Some(Action::run("ip", arguments.iter().copied()));
    match counter {
        "XfrmInNoStates" => (
            "packets come for associations that this host does not have; the sender uses keys that are gone here, as \
             after a reboot",
            "it ends by itself when the sender has heard of this host's new keys; if it does not, look whether the \
             sender's daemon runs",
            huskctl(&["keys", "status", "--verbose"]),
        ),
        "XfrmInStateProtoError" => (
            "packets fail their integrity check: they were changed on the way, or the two sides have different keys",
            "see that the preshared key, if any, is the same on both nodes, then make new keys",
            huskctl(&["keys", "rotate"]),
        ),
        "XfrmInStateSeqError" => (
            "packets come twice or too late for the replay window",
            "if the network reorders that much, raise ipsec.replayWindow; else somebody sends recorded packets again",
            huskctl(&["keys", "status", "--verbose"]),
        ),
        "XfrmInStateExpired" | "XfrmOutStateExpired" | "XfrmInStateInvalid" | "XfrmOutStateInvalid" => (
            "an association has ended while it was still used",
            "a new key replaces it; if it stays, look at the rotation",
            huskctl(&["keys", "status", "--verbose"]),
        ),
        "XfrmInNoPols" | "XfrmInTmplMismatch" => (
            "packets were decrypted, and no policy lets in what was inside, or they came in the clear where ESP is required",
            "see whether a policy is missing or somebody else's is in the way",
            ip(&["xfrm", "policy"]),
        ),
        "XfrmInPolBlock" | "XfrmOutPolBlock" => (
            "a policy blocks them: Husk's own for peers without keys, which keeps plaintext from leaving, or somebody else's",
            "look which policies have action block, and at `huskctl peers` for those that wait for keys",
            ip(&["xfrm", "policy"]),
        ),
        "XfrmOutNoStates" | "XfrmAcquireError" => (
            "packets are to be encrypted, and there is no association to do it with",
            "look who has no keys yet; an association that somebody deleted is replaced within seconds",
            huskctl(&["keys", "status"]),
        ),
        "XfrmOutStateSeqError" => (
            "the sequence numbers of an association are used up",
            "make new keys; ipsec.maxPackets should have done so before",
            huskctl(&["keys", "rotate"]),
        ),
        "XfrmInBufferError" | "XfrmInError" | "XfrmOutError" | "XfrmOutBundleGenError" | "XfrmOutBundleCheckError" => (
            "the kernel had no memory for them, or no route for what comes out",
            "look at the host's memory, and whether the underlay's routes change all the time",
            ip(&["route", "show"]),
        ),
        "XfrmInHdrError" | "XfrmInStateProtoDisabled" | "XfrmInStateModeError" | "XfrmInStateMismatch" => (
            "packets do not have the form that their association demands, for example with UDP encapsulation on one side only",
            "see that ipsec.udpEncapsulation and the mode are the same on all nodes",
            huskctl(&["status"]),
        ),
        _ => (
            "the kernel counts an error (Documentation/networking/xfrm_proc.rst tells which)",
            "look at the associations and policies",
            ip(&["-s", "xfrm", "state"]),
        ),
    }
}

#[cfg(test)]
mod tests {
    use husk_overlay::config::RotationConfig;
    use husk_overlay::esp::Aead;
    use husk_overlay::issue::Severity;
    use husk_overlay::keys::PrivateKey;
    use husk_overlay::mode::Mode;

    use super::*;
    use crate::keys::Technology;

    fn report(epochs: &[(u64, u64, &[&str])]) -> KeysReport {
        let epoch = |(epoch, age, unconfirmed): &(u64, u64, &[&str])| EpochReport {
            epoch: *epoch,
            public_key: PrivateKey::from_random([1; 32]).unwrap().public(),
            age: *age,
            published: true,
            confirmed: [].into(),
            unconfirmed: unconfirmed.iter().map(|name| NodeName::new(name).unwrap()).collect(),
        };
        KeysReport {
            mode: Mode::Ipsec,
            technology: Technology::Esp,
            cipher: Some(Aead::default()),
            epochs: epochs.iter().map(epoch).collect(),
            settled: false,
            requested: false,
            waiting: None,
            due: None,
            peers: Vec::new(),
            associations: Vec::new(),
        }
    }

    fn config(interval: Option<u32>) -> Config {
        let rotation = RotationConfig { interval, grace: 30, hard_lifetime: 86_400 };
        Config { rotation, ..Config::new(vec!["10.42.0.0/16".parse().unwrap()]) }
    }

    fn judged(epochs: &[(u64, u64, &[&str])]) -> Vec<Finding> {
        judge(&report(epochs), &config(Some(86_400)), &Places::of_tests())
    }

    #[test]
    fn a_rotation_that_takes_its_time_is_well_and_one_that_does_not_end_is_not() {
        assert!(judged(&[(1, 50_000, &[])]).is_empty());
        assert!(judged(&[(1, 50_000, &[]), (2, 299, &["b"])]).is_empty());
        let stuck = judged(&[(1, 50_000, &[]), (2, 300, &["b"])]).remove(0);
        assert_eq!(stuck.severity, Severity::Warning);
        assert!(stuck.cause.contains("b do not use the key of epoch 2"), "{}", stuck.cause);
        assert_eq!(judged(&[(2, 86_400, &["b"])]).remove(0).severity, Severity::Error);
        let mut unpublished = report(&[(2, 300, &[])]);
        unpublished.epochs[0].published = false;
        assert!(judge(&unpublished, &config(None), &Places::of_tests())[0].cause.contains("not published"));
    }

    #[test]
    fn a_key_beyond_its_interval_is_found_and_the_fix_asks_for_another() {
        assert!(judged(&[(1, 86_500, &[])]).is_empty(), "a little late is well");
        let old = judged(&[(1, 90_000, &[])]).remove(0);
        assert_eq!(old.fix.commands, ["huskctl keys rotate"]);
        assert!(old.fix.is_safe());
    }

    #[test]
    fn only_counters_that_grow_are_found() {
        let before = BTreeMap::from([("XfrmInNoStates".to_owned(), 7), ("XfrmOutNoStates".to_owned(), 1)]);
        let mut after = before.clone();
        assert!(growing(&before, &after, &Places::of_tests()).is_empty());
        after.insert("XfrmInNoStates".into(), 9);
        let found = growing(&before, &after, &Places::of_tests());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].evidence, ["/proc/net/xfrm_stat: XfrmInNoStates 9, 2 more within 2 s"]);
        after.insert("XfrmSomethingNew".into(), 1);
        assert!(growing(&before, &after, &Places::of_tests())[1].cause.contains("xfrm_proc.rst"));
    }
}
