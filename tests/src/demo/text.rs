//! The report as people read it.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle, presets};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;

use super::report::{Check, Checks, Pair, Report};
use super::speed::median;

/// Columns of a rule; every part of the report fits in it with up to four hosts.
const WIDTH: usize = 100;

/// The report as text, coloured if standard output is a terminal and nobody minds (<https://no-color.org>).
#[must_use]
pub fn text(report: &Report) -> String {
    let unwanted = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    Writer { color: std::io::stdout().is_terminal() && !unwanted("NO_COLOR") && !dumb }.report(report)
}

/// Failures shown to people: the first ones tell, a hundred hide them.
const SHOWN: usize = 12;

/// Said of WireGuard in a process of its own.
const USERSPACE_NOTE: &str = "\n  This kernel has no WireGuard, so the bundled userspace device \
    carries the packets; where a kernel\n  has it, Husk uses the kernel's.";

#[derive(Debug, Clone, Copy)]
enum Paint {
    Bold,
    Dim,
    Green,
    Red,
}

#[derive(Debug, Clone, Copy)]
struct Writer {
    color: bool,
}

impl Writer {
    fn paint(self, paint: Paint, text: &str) -> String {
        // Select Graphic Rendition, ECMA-48.
        let code = match paint {
            Paint::Bold => 1,
            Paint::Dim => 2,
            Paint::Green => 32,
            Paint::Red => 31,
        };
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Signs are coloured after the layout, which counts columns.
    fn signs(self, text: &str) -> String {
        let green = text.replace('✓', &self.paint(Paint::Green, "✓"));
        green.replace('✗', &self.paint(Paint::Red, "✗"))
    }

    fn heading(self, title: &str, note: &str) -> String {
        // Two dashes, three blanks around and between, and the dot.
        let rest = WIDTH.saturating_sub(title.chars().count() + note.chars().count() + 7);
        let [before, after] = ["──".to_owned(), "─".repeat(rest)].map(|rule| self.paint(Paint::Dim, &rule));
        format!("\n{before} {} · {note} {after}\n\n", self.paint(Paint::Bold, title))
    }

    fn report(self, report: &Report) -> String {
        let mut text = self.headline(report);
        text += &self.matrix(report);
        text += &self.beyond(report);
        text += &self.ledger(report);
        text += &self.throughput(report);
        text += &self.wire(report);
        text += &self.own_host(report);
        text += &self.kept(report);
        text += &self.verdict(report);
        text
    }

    fn headline(self, report: &Report) -> String {
        let device = report.wireguard_device().map(|device| format!(" ({device} device)")).unwrap_or_default();
        format!(
            "\n{}  {} hosts, {} pods, mode {}{device}, underlay {} with MTU {}\n",
            self.paint(Paint::Bold, "Husk"),
            report.hosts.len(),
            report.pods.len(),
            report.mode,
            report.underlay,
            report.underlay_mtu,
        )
    }

    fn matrix(self, report: &Report) -> String {
        let note = format!("{} pairs of pods", report.pairs.len());
        let mut text = self.heading("Who reaches whom", &note);
        let names = report.pods.iter().map(|pod| pod.name.clone());
        let header = ["FROM", "HOST", "IPv4", "IPv6"].map(str::to_owned);
        let mut matrix = table(header.into_iter().chain(names));
        for from in &report.pods {
            let address = |family| from.addresses.get(&family).map(ToString::to_string).unwrap_or_default();
            let mut row = vec![from.name.clone(), from.host.clone(), address(Family::Ipv4), address(Family::Ipv6)];
            row.extend(report.pods.iter().map(|to| {
                let pair = report.pairs.iter().find(|pair| pair.from == from.name && pair.to == to.name);
                pair.map_or_else(|| "·".to_owned(), marks)
            }));
            matrix.add_row(row);
        }
        text += &self.signs(&indent(&matrix));
        let mtu = report.pods.first().map_or(0, |pod| pod.mtu);
        let mut sums = table(["", "IPv4", "IPv6"].map(str::to_owned));
        let questions: [(String, Pick); 3] = [
            ("TCP there and back, every byte verified".to_owned(), |checks| &checks.tcp),
            (format!("packet of {mtu} bytes, DF: passes whole"), |checks| &checks.full_mtu),
            (format!("packet of {} bytes, DF: refused by the pod's own kernel", mtu + 1), |checks| {
                &checks.oversize_refused
            }),
        ];
        for (title, pick) in questions {
            let count = |family| {
                let asked = report.pairs.iter().filter_map(|pair| pair.families.get(&family));
                tally(asked.map(pick))
            };
            sums.add_row(vec![title, count(Family::Ipv4), count(Family::Ipv6)]);
        }
        text + "\n" + &self.signs(&indent(&sums)) + "\n  Two signs per pair: IPv4, IPv6.\n"
    }

    fn beyond(self, report: &Report) -> String {
        let mut rows = table(["FROM", "TO", "IPv4", "IPv6"].map(str::to_owned));
        for row in &report.beyond {
            let count = |family| {
                let asked = row.families.get(&family);
                asked.map_or_else(|| format!("no {family} underlay"), |asked| tally(asked.iter().map(|one| &one.check)))
            };
            rows.add_row(vec![row.from.to_owned(), row.to.clone(), count(Family::Ipv4), count(Family::Ipv6)]);
        }
        self.heading("Beyond pods", "TCP, every byte verified") + &self.signs(&indent(&rows))
    }

    fn ledger(self, report: &Report) -> String {
        let mut text = self.heading("Where the bytes of a full packet go", "huskctl mtu");
        let Ok(ledger) = report.ledger() else { return text + "  no ledger\n" };
        let mut rows = table(["", "BYTES", "LEFT"].map(str::to_owned));
        rows.add_row(vec!["underlay MTU".to_owned(), String::new(), ledger.underlay_mtu.to_string()]);
        let mut left = ledger.underlay_mtu;
        for entry in &ledger.entries {
            for part in entry.parts.iter().filter(|part| part.bytes > 0) {
                left = left.saturating_sub(part.bytes);
                rows.add_row(vec![part.component.to_string(), format!("-{}", part.bytes), left.to_string()]);
            }
        }
        let inner = ledger.inner.map_or_else(|| "nothing".to_owned(), |inner| inner.to_string());
        rows.add_row(vec!["pod MTU".to_owned(), String::new(), inner]);
        for column in [1, 2] {
            if let Some(column) = rows.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        text += &indent(&rows);
        text
    }

    fn throughput(self, report: &Report) -> String {
        let heading = self.heading("Throughput", "one TCP connection, median, measured in turns");
        let Some(speed) = &report.throughput else {
            return heading + "  not measured, since something does not hold: see below\n";
        };
        let mut rows = table(["", "Mbit/s", "EACH ROUND"].map(str::to_owned));
        let megabits = |bits: f64| format!("{:.0}", bits / 1e6);
        let rounds = |all: &[f64]| all.iter().map(|one| megabits(*one)).collect::<Vec<_>>().join("  ");
        let overlay = format!("pod {} to pod {}", speed.from, speed.to);
        rows.add_row(vec![overlay, megabits(speed.overlay_bits_per_second), rounds(&speed.overlay_rounds)]);
        let underlay = "host to host, bare underlay".to_owned();
        rows.add_row(vec![underlay, megabits(speed.underlay_bits_per_second), rounds(&speed.underlay_rounds)]);
        if let Some(column) = rows.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let note = format!(
            "\n  The overlay carries {:.0} % of what the bare underlay does. Both ends share this machine's processors.{}\n",
            speed.ratio * 100.0,
            if report.is_userspace() { USERSPACE_NOTE } else { "" }
        );
        heading + &indent(&rows) + &note
    }

    fn wire(self, report: &Report) -> String {
        let wire = &report.wire;
        let note = format!("{} packets, from before the first daemon on", wire.packets);
        let mut rows = table(["PACKETS", "", "SHOW POD ADDRESSES", "SHOW THE PODS' MARKER"].map(str::to_owned));
        let outside = ("to and from the outside, masqueraded".to_owned(), wire.outside);
        let all = wire.between_hosts.iter().map(|(kind, count)| (kind.clone(), *count)).chain([outside]);
        for (kind, count) in all.filter(|(_, count)| count.packets > 0) {
            let numbers = [count.readable, count.with_marker].map(|number| number.to_string());
            let [readable, marker] = numbers;
            rows.add_row(vec![count.packets.to_string(), kind, readable, marker]);
        }
        for column in [0, 2, 3] {
            if let Some(column) = rows.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let fits = if wire.largest_packet == report.full_packet() { "✓" } else { "✗" };
        let whole = if wire.fragments == 0 { "✓" } else { "✗" };
        let sizes = format!(
            "\n  {fits} Largest packet: {} bytes, on an underlay with MTU {}.\n  {whole} Fragments: {}.\n",
            wire.largest_packet, report.underlay_mtu, wire.fragments
        );
        self.heading("What the wire saw", &note) + &indent(&rows) + &self.signs(&(sizes + &confidentiality(report)))
    }

    fn own_host(self, report: &Report) -> String {
        let host = &report.own_host;
        let text: String = [&host.status_text, &host.peers_text]
            .into_iter()
            .map(|text| text.trim_matches('\n').lines().map(indented).collect::<String>())
            .collect::<Vec<_>>()
            .join("\n");
        self.heading(&format!("What {} says", host.name), "huskctl status, huskctl peers") + &text
    }

    fn kept(self, report: &Report) -> String {
        let Some(kept) = &report.kept else { return String::new() };
        let mut text = self.heading("Left up, as asked", "these work as they are");
        let width = kept.hints.iter().map(|hint| hint.purpose.chars().count()).max().unwrap_or(0);
        for hint in &kept.hints {
            let purpose = format!("{:width$}", hint.purpose);
            let _ = writeln!(text, "  {purpose}  {}", self.paint(Paint::Bold, &hint.command));
        }
        text
    }

    fn verdict(self, report: &Report) -> String {
        let seconds: f64 = report.phases.iter().map(|phase| phase.seconds).sum();
        let plugin = median(&report.plugin_milliseconds);
        let asked = report.pairs.len() * Family::ALL.len() * 3
            + report.beyond.iter().flat_map(|row| row.families.values().flatten()).count();
        if report.passed {
            let verdict = format!("✓ Everything holds: {asked} questions asked.");
            let verdict = self.paint(Paint::Green, &verdict);
            return format!(
                "\n{verdict} {seconds:.1} s in all; the plugin took {plugin:.0} ms to add a pod (median).\n"
            );
        }
        let heading = format!("✗ {} of the things that should hold did not:", report.failures.len());
        let mut text = format!("\n{}\n", self.paint(Paint::Red, &heading));
        for failure in report.failures.iter().take(SHOWN) {
            let _ = writeln!(
                text,
                "\n  {}\n    expected: {}\n    got:      {}",
                self.paint(Paint::Bold, &failure.what),
                failure.expected,
                failure.got
            );
        }
        if let more @ 1.. = report.failures.len().saturating_sub(SHOWN) {
            let _ = writeln!(text, "\n  … and {more} more; --output json lists them all.");
        }
        if let Some(logs) = &report.logs {
            let _ = writeln!(text, "\n  The logs of the daemons are in {}.", logs.display());
        }
        text
    }
}

/// What the capture says about secrecy, in the words that fit the mode.
fn confidentiality(report: &Report) -> String {
    let total = report.wire.total();
    let control = report.wire.outside.with_marker;
    if !report.encrypted {
        let what = match report.mode {
            Mode::Direct => "sends pod packets as they are",
            _ => "wraps pod packets and does not encrypt them",
        };
        return format!(
            "  ! Not encrypted: mode {} {what}. Anybody on the wire can read what pods\n    send: {} packets show it. \
             The default, mode wireguard, encrypts.\n",
            report.mode, total.with_marker
        );
    }
    if control == 0 {
        return "  ✗ No verdict: the capture did not even see what goes to the outside in the clear.\n".to_owned();
    }
    if total.with_marker == 0 && total.readable == 0 {
        return format!(
            "  ✓ Encrypted: between hosts nothing showed a pod's address, and the marker that every payload carries was\n    \
             never seen. (The capture does see it where it should: in {control} packets to and from the outside.)\n",
        );
    }
    format!(
        "  ✗ NOT ENCRYPTED although mode {} must: {} packets between hosts show pod addresses, {} the pods' marker.\n",
        report.mode, total.readable, total.with_marker
    )
}

/// Picks one of a pair's checks.
type Pick = fn(&Checks) -> &Check;

/// A sign for each family.
fn marks(pair: &Pair) -> String {
    Family::ALL.iter().map(|family| pair.families.get(family).map_or('?', |checks| sign(checks.all()))).collect()
}

fn sign(check: &Check) -> char {
    match check {
        Check::Held => '✓',
        Check::Failed { .. } => '✗',
        Check::NotAsked => '?',
    }
}

fn tally<'a>(answers: impl Iterator<Item = &'a Check>) -> String {
    let (held, asked) = answers.fold((0, 0), |(held, asked), one| (held + usize::from(*one == Check::Held), asked + 1));
    format!("{} {held} of {asked}", if held == asked { '✓' } else { '✗' })
}

fn table(header: impl IntoIterator<Item = String>) -> Table {
    const STYLE: TableStyle = presets::NOTHING.header_separator(LineStyle::none().fill('─').junction('─'));
    let mut table = Table::new();
    table
        .load_style(STYLE)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.into_iter().collect::<Vec<_>>());
    table
}

fn indent(table: &Table) -> String {
    table.lines().map(|line| indented(&line)).collect()
}

fn indented(line: &str) -> String {
    // Lines of tables begin with a blank.
    let margin = if line.starts_with(' ') { " " } else { "  " };
    format!("{margin}{line}").trim_end().to_owned() + "\n"
}
