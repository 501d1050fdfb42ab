//! What is said of every command besides its options: examples, what its exit status means, what `-o json` prints. `--help`,
//! the manual pages and the table in `docs/huskctl.md` are made of this.

use std::fmt::Write as _;

use clap::{Command, CommandFactory as _};

use super::Arguments;
use crate::manual::{Manual, Paragraph, Section};

/// A command.
pub(super) struct Entry {
    /// The words after `huskctl`.
    pub(super) command: &'static str,
    /// What `-o json` prints: names of JSON Schemas ([`super::schemas`]); more than one where options decide. None where there is
    /// no report.
    pub(super) schemas: &'static [&'static str],
    /// When the exit status is 1; none if it never is.
    pub(super) found: Option<&'static str>,
    /// What it is for, and the command.
    pub(super) examples: &'static [(&'static str, &'static str)],
}

/// Every command.
pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        command: "status",
        schemas: &["status"],
        found: Some("the node is not ready, or an issue is more than a warning"),
        examples: &[
            ("Is anything wrong on this node?", "huskctl status"),
            ("The kinds of issues, for a script", "huskctl status -o json | jq -r '.issues[].kind'"),
        ],
    },
    Entry {
        command: "peers",
        schemas: &["peers"],
        found: Some("a peer is refused"),
        examples: &[("How is every other node reached?", "huskctl peers")],
    },
    Entry {
        command: "mtu",
        schemas: &["mtu", "mtu-what-if"],
        found: Some("too little is left for a family, or something else about an MTU is more than a warning"),
        examples: &[
            ("Where do the bytes of a full-sized packet go?", "huskctl mtu"),
            ("What would be left in another mode?", "huskctl mtu --what-if mode=vxlan-ipsec,underlay=9001"),
        ],
    },
    Entry {
        command: "mtu probe",
        schemas: &["mtu-probe"],
        found: Some("less passes than is promised, or it is not known what does"),
        examples: &[("What does the path to a node really carry?", "huskctl mtu probe node-b")],
    },
    Entry {
        command: "diff",
        schemas: &["diff"],
        found: Some("the daemon would change something"),
        examples: &[("Is the kernel as it should be?", "huskctl diff")],
    },
    Entry {
        command: "ipam show",
        schemas: &["ipam"],
        found: None,
        examples: &[("Who has which address?", "huskctl ipam show")],
    },
    Entry {
        command: "ipam check",
        schemas: &["ipam-check"],
        found: Some("leases, blocks and interfaces contradict each other"),
        examples: &[("Do leases and interfaces agree?", "huskctl ipam check")],
    },
    Entry {
        command: "ipam release",
        schemas: &["ipam-release"],
        found: None,
        examples: &[(
            "Give back the address of a pod that is gone and was never deleted",
            "huskctl ipam release 10.42.36.65",
        )],
    },
    Entry {
        command: "keys status",
        schemas: &["keys"],
        found: None,
        examples: &[
            ("How old are the keys, is a rotation stuck, on whom?", "huskctl keys status"),
            ("Every IPsec association", "huskctl keys status --verbose"),
        ],
    },
    Entry {
        command: "keys rotate",
        schemas: &["rotation", "keys"],
        found: Some("with --wait: the old key is still there when the time is over"),
        examples: &[("New keys now, and wait until the old ones are gone", "huskctl keys rotate --wait")],
    },
    Entry {
        command: "policy list",
        schemas: &["policy"],
        found: Some("policy is not known, of some pods not known, or not understood"),
        examples: &[("Which policies select pods of this node?", "huskctl policy list")],
    },
    Entry {
        command: "policy show",
        schemas: &["pod-policy"],
        found: Some("the pod's rules are not in the kernel"),
        examples: &[("Which rules does a pod have?", "huskctl policy show shop/web-0")],
    },
    Entry {
        command: "trace",
        schemas: &["trace"],
        found: Some("a hop is broken, or denies the connection"),
        examples: &[
            ("Why can't this pod reach that one?", "huskctl trace shop/web-0 shop/db-0 --port 5432"),
            (
                "Does a packet of this size pass, looked at now?",
                "huskctl trace web-0 db-0 --port 5432 --size 1440 --probe",
            ),
        ],
    },
    Entry {
        command: "capture",
        schemas: &["captured", "encrypted"],
        found: Some("packets were lost; with --verify-encrypted: plaintext was seen, or nothing is proven"),
        examples: &[
            ("What a pod sends and gets", "huskctl capture shop/web-0 --filter 'port 5432'"),
            ("What the network sees of it, in a file", "huskctl capture shop/web-0 --outer --write web-0.pcap"),
            ("Is what goes to a node encrypted?", "huskctl capture node-b --verify-encrypted"),
        ],
    },
    Entry {
        command: "flows",
        schemas: &["flow"],
        found: Some("flows are not recorded"),
        examples: &[
            ("What has policy denied to or from a pod?", "huskctl flows --denied --pod shop/web-0"),
            ("Go on with those that come, a line of JSON each", "huskctl flows --follow -o json"),
        ],
    },
    Entry {
        command: "top",
        schemas: &["top"],
        found: None,
        examples: &[
            ("What goes through the tunnels and to pods, as it happens?", "huskctl top"),
            ("One moment, for a script", "huskctl top --once -o json"),
        ],
    },
    Entry { command: "ui", schemas: &["ui"], found: None, examples: &[("Where is this node's page?", "huskctl ui")] },
    Entry {
        command: "quarantine",
        schemas: &["quarantine", "quarantined"],
        found: Some("the kernel does not have it yet, or the pod's label keeps it cut off"),
        examples: &[
            ("Cut a pod off at once", "huskctl quarantine shop/web-0"),
            ("Let it onto the network again", "huskctl quarantine shop/web-0 --release"),
        ],
    },
    Entry {
        command: "doctor",
        schemas: &["doctor", "doctor-checks"],
        found: Some("something was found that is more than a warning, and is still there"),
        examples: &[
            ("What around the overlay is known to break it?", "huskctl doctor"),
            ("Mend what is safe to mend, asking before each", "huskctl doctor --fix"),
        ],
    },
    Entry {
        command: "support-bundle",
        schemas: &["support-bundle"],
        found: Some("something was left out because it held a secret"),
        examples: &[
            ("All that somebody needs who is to help", "sudo huskctl support-bundle"),
            ("The same, to a file of that name", "sudo huskctl support-bundle --file /tmp/node-a.tar.gz"),
        ],
    },
    Entry {
        command: "schema",
        schemas: &[],
        found: None,
        examples: &[
            ("Names of all schemas", "huskctl schema"),
            ("What huskctl peers -o json prints", "huskctl schema peers"),
        ],
    },
    Entry {
        command: "completion",
        schemas: &[],
        found: None,
        examples: &[
            ("In this shell", "source <(huskctl completion bash)"),
            ("For all of this host", "huskctl completion bash > /usr/share/bash-completion/completions/huskctl"),
        ],
    },
    Entry {
        command: "man",
        schemas: &[],
        found: None,
        examples: &[("For all of this host", "huskctl man /usr/local/share/man/man1")],
    },
];

/// What the exit status means where nothing was found, and else.
const WELL: &str = "all is well";
const FOUND: &str = "something was found (a difference, an issue that is more than a warning, a contradiction), is denied or is not finished";
const USAGE: &str = "wrong usage";
const REFUSED: &str = "the daemon does not answer or refuses, or what was asked for could not be done";

/// How much what was found hurts, and what that has to do with the exit status: for all commands that tell it.
const SEVERITIES: &str = "What is wrong is a warning (traffic flows as it should; somebody ought to look), an ERROR (some traffic does not \
     flow) or BLOCKS (the node takes no pods), and is the same in status, mtu, doctor, the page and the metrics. A warning alone leaves \
     the exit status 0.";

/// Environment variables, and what they do.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("HUSK_RUN_DIRECTORY", "Directory of the daemon's socket, as --run-directory."),
    ("NO_COLOR", "If it is not empty, no colours (https://no-color.org)."),
    ("CLICOLOR_FORCE", "If it is not empty, colours also where standard output is no terminal."),
];

/// Files that huskctl reads, or that answer a reader's next question.
const FILES: &[(&str, &str)] = &[
    ("/run/husk/daemon.sock", "Socket of the daemon; root alone may open it."),
    ("/etc/husk/config.yaml", "Configuration of the daemon; see huskd example-config."),
    ("/run/husk/node.json", "What the daemon tells the CNI plugin."),
    ("/run/husk/leases", "Addresses of the pods of this node, a file each."),
    ("/run/husk/keys", "Private keys; no command of huskctl prints any of them."),
    ("/var/lib/husk", "What survives a reboot: the last snapshot of the cluster, the last good configuration."),
];

/// The definition of `huskctl` with all that is said here.
#[must_use]
pub(super) fn command() -> Command {
    let command = Arguments::command();
    let statuses = exit_statuses(Some(FOUND), &command);
    ENTRIES.iter().fold(command.after_long_help(statuses), |command, entry| {
        let words: Vec<&str> = entry.command.split(' ').collect();
        attach(command, &words, entry)
    })
}

fn attach(command: Command, words: &[&str], entry: &Entry) -> Command {
    let Some((first, rest)) = words.split_first() else {
        let short = examples(entry, &command);
        let long = format!("{short}\n\n{}", exit_statuses(entry.found, &command));
        return command.after_help(short).after_long_help(long);
    };
    command.mut_subcommand(first, |below| attach(below, rest, entry))
}

fn examples(entry: &Entry, command: &Command) -> String {
    let heading = command.get_styles().get_header();
    let mut text = format!("{heading}Examples:{heading:#}");
    for (what, line) in entry.examples {
        let _ = write!(text, "\n  # {what}\n  {line}");
    }
    text
}

fn exit_statuses(found: Option<&str>, command: &Command) -> String {
    let heading = command.get_styles().get_header();
    let mut text = format!("{heading}Exit status:{heading:#}");
    for (status, meaning) in statuses(found) {
        let _ = write!(text, "\n  {status}  {meaning}");
    }
    text
}

fn statuses(found: Option<&str>) -> Vec<(u8, String)> {
    let found = found.map(|found| (1, found.to_owned()));
    let all = [(0, WELL.to_owned())].into_iter().chain(found);
    all.chain([(2, USAGE.to_owned()), (3, REFUSED.to_owned())]).collect()
}

/// The manual.
#[must_use]
pub(super) fn manual() -> Manual {
    Manual { command: command(), section: 1, besides }
}

fn besides(words: &str) -> Vec<Section> {
    let terms = |terms: &[(&str, &str)]| {
        terms.iter().map(|(term, meaning)| Paragraph::Term((*term).into(), (*meaning).into())).collect()
    };
    let entry = ENTRIES.iter().find(|entry| entry.command == words);
    let found = entry.map_or(Some(FOUND), |entry| entry.found);
    let statuses = statuses(found).into_iter().map(|(status, meaning)| Paragraph::Term(status.to_string(), meaning));
    let mut sections = vec![Section { heading: "EXIT STATUS", content: statuses.collect() }];
    if words.is_empty() {
        sections[0].content.push(Paragraph::Text(SEVERITIES.into()));
        sections.push(Section { heading: "ENVIRONMENT", content: terms(ENVIRONMENT) });
        sections.push(Section { heading: "FILES", content: terms(FILES) });
    }
    if let Some(entry) = entry {
        if let [_, ..] = entry.schemas {
            let text = format!("With --output json: {}.", in_words(entry.schemas));
            sections.push(Section { heading: "OUTPUT", content: vec![Paragraph::Text(text)] });
        }
        let examples = entry.examples.iter();
        let examples =
            examples.flat_map(|(what, line)| [Paragraph::Text(sentence(what)), Paragraph::Literal((*line).into())]);
        sections.push(Section { heading: "EXAMPLES", content: examples.collect() });
    }
    sections
}

/// Questions are whole; what else introduces an example ends with a colon.
fn sentence(what: &str) -> String {
    if what.ends_with('?') { what.to_owned() } else { format!("{what}:") }
}

fn in_words(schemas: &[&str]) -> String {
    let named: Vec<String> = schemas.iter().map(|name| format!("what `huskctl schema {name}` describes")).collect();
    named.join(", or ")
}

/// The table of `docs/huskctl.md`: command, schema, exit status 1.
#[cfg(test)]
fn table() -> String {
    let mut text = "| command | `-o json` prints | exit status 1 |\n|---|---|---|\n".to_owned();
    for entry in ENTRIES {
        let schemas: Vec<String> = entry.schemas.iter().map(|name| format!("[`{name}`](schema/{name}.json)")).collect();
        let schemas = if schemas.is_empty() { "–".to_owned() } else { schemas.join(", ") };
        let _ = writeln!(text, "| `huskctl {}` | {schemas} | {} |", entry.command, entry.found.unwrap_or("never"));
    }
    text
}

#[cfg(test)]
mod tests;
