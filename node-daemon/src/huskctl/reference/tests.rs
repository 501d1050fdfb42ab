//! What is said of the commands, against the commands and the documentation.

use std::collections::BTreeSet;

use super::*;
use crate::huskctl::schemas;

/// Commands without subcommands that have to be given.
fn commands(command: &Command, words: &str, all: &mut BTreeSet<String>) {
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        let words = format!("{words} {}", below.get_name());
        let words = words.trim_start();
        if !below.is_subcommand_required_set() {
            all.insert(words.to_owned());
        }
        commands(below, words, all);
    }
}

#[test]
fn every_command_has_its_entry_and_every_entry_its_command() {
    let mut defined = BTreeSet::new();
    commands(&Arguments::command(), "", &mut defined);
    let told: BTreeSet<String> = ENTRIES.iter().map(|entry| entry.command.to_owned()).collect();
    assert_eq!(told, defined);
    assert_eq!(told.len(), ENTRIES.len(), "one is there twice");
}

#[test]
fn every_report_has_a_schema_and_every_schema_a_command() {
    let mut told: BTreeSet<&str> = ENTRIES.iter().flat_map(|entry| entry.schemas).copied().collect();
    // The lines of the log files that the daemon writes.
    told.insert("log");
    let defined: BTreeSet<&str> = schemas::ALL.iter().map(|(name, _)| *name).collect();
    assert_eq!(told, defined);
}

#[test]
fn examples_are_commands_that_exist() {
    let definition = command();
    for entry in ENTRIES {
        assert!(!entry.examples.is_empty(), "{}", entry.command);
        for (_, line) in entry.examples {
            let (_, line) = line.split_once("huskctl").unwrap();
            let line = line.split(['|', '>', ')']).next().unwrap();
            // What a shell does with quotes.
            let line = line.replace("'port 5432'", "port\u{a0}5432");
            let words = line.split(' ').filter(|word| !word.is_empty()).map(|word| word.replace('\u{a0}', " "));
            let words = std::iter::once("huskctl".to_owned()).chain(words);
            let parsed = definition.clone().try_get_matches_from(words).unwrap_or_else(|error| panic!("{error}"));
            let mut path = Vec::new();
            let mut matches = Some(&parsed);
            while let Some((name, below)) = matches.and_then(|it| it.subcommand()) {
                path.push(name.to_owned());
                matches = Some(below);
            }
            assert_eq!(path.join(" "), entry.command, "{line}");
        }
    }
}

#[test]
fn the_documentation_has_every_command() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/huskctl.md");
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(&table()), "docs/huskctl.md lacks this table:\n{}", table());
    // However the lines are broken.
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(&text).contains(&words(SEVERITIES)), "docs/huskctl.md lacks: {SEVERITIES}");
    for entry in ENTRIES {
        let heading = format!("\n### huskctl {}\n", entry.command);
        assert!(text.contains(&heading), "docs/huskctl.md lacks {heading:?}");
    }
    for line in text.lines().filter_map(|line| line.strip_prefix("### huskctl ")) {
        assert!(ENTRIES.iter().any(|entry| entry.command == line), "docs/huskctl.md has a command too many: {line}");
    }
}

#[test]
fn every_command_has_a_page_with_its_sections() {
    let pages = manual().pages();
    let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
    for entry in ENTRIES {
        let name = format!("huskctl-{}.1", entry.command.replace(' ', "-"));
        let at = names.iter().position(|it| **it == name).unwrap_or_else(|| panic!("{name} is not in {names:?}"));
        let text = String::from_utf8(pages[at].1.clone()).unwrap();
        for heading in ["NAME", "SYNOPSIS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"] {
            assert!(
                text.contains(&format!(".SH {heading}\n")) || text.contains(&format!(".SH \"{heading}\"\n")),
                "{name}: {heading}"
            );
        }
    }
    assert!(names.contains(&"huskctl.1"));
}
