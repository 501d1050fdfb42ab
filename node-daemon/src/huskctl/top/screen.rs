//! What `huskctl top` shows, and how it fits a terminal.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table};

use super::super::style;
use super::super::style::{Tone, paint};
use super::super::tables::{bytes, milliseconds, or_dash, percent, table};
use crate::report::{PeerState, Top, TopLink, TopPeer, TopPod};

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// The size of the terminal now.
pub(super) fn size() -> Size {
    let (columns, rows) = terminal_size::terminal_size().map_or((80, 24), |(columns, rows)| (columns.0, rows.0));
    Size { columns: columns.into(), rows: rows.into() }
}

/// Lines that are no rows of peers or pods, tunnels apart: the first one, and before each table a blank one and its header.
const HEADER: usize = 1;
const TABLE_HEADER: usize = 2;

/// How many rows of peers and of pods fit. Each gets half, and what the other does not need.
pub(super) fn room(top: &Top, size: Size) -> (usize, usize) {
    let (peers, pods) = (top.peers.len(), top.pods.len());
    let tables = usize::from(peers > 0) + usize::from(pods > 0);
    // The last line is the cursor's; a table that is cut has one that says so.
    let taken = HEADER + top.tunnels.len() + note(top).lines().count() + tables * (TABLE_HEADER + 1) + 1;
    let rows = size.rows.saturating_sub(taken).max(2);
    let half = rows / 2;
    if peers <= half {
        (peers, pods.min(rows - peers))
    } else if pods <= half {
        (peers.min(rows - pods), pods)
    } else {
        (rows - half, half)
    }
}

/// Everything, with marks for colours.
pub(super) fn text(top: &Top) -> String {
    let mut text = format!(
        "{}, mode {}, {}, {}, {:.1} s\n",
        paint(Tone::Strong, &top.node),
        top.mode,
        counted(top.peer_count, "peer"),
        counted(top.pod_count, "pod"),
        top.seconds,
    );
    for link in &top.tunnels {
        let _ = writeln!(text, "{}", tunnel(link));
    }
    text += &note(top);
    if !top.peers.is_empty() {
        let _ = write!(text, "\n{}", peers(&top.peers));
        text += &rest(top.peers.len(), top.peer_count, "peer");
    }
    if !top.pods.is_empty() {
        let _ = write!(text, "\n{}", pods(&top.pods));
        text += &rest(top.pods.len(), top.pod_count, "pod");
    }
    text
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn rest(shown: usize, all: usize, what: &str) -> String {
    match all.saturating_sub(shown) {
        0 => String::new(),
        1 => paint(Tone::Faint, format!("and 1 more {what}")) + "\n",
        more => paint(Tone::Faint, format!("and {more} more {what}s")) + "\n",
    }
}

/// What is not counted.
fn note(top: &Top) -> String {
    let known = top.mode.uses_wireguard() || top.mode.uses_esp();
    if known || top.peers.is_empty() {
        return String::new();
    }
    let instead = if top.tunnels.is_empty() { "" } else { "; the tunnel's are those of all together" };
    paint(Tone::Faint, format!("mode {} has no counters per peer{instead}", top.mode)) + "\n"
}

fn tunnel(link: &TopLink) -> String {
    let rates = link.rates;
    let dropped = match rates.dropped_per_second {
        Some(dropped @ 1..) => format!(", {}", paint(Tone::Bad, format!("{dropped} dropped/s"))),
        _ => String::new(),
    };
    format!(
        "{}: received {}, sent {}, {} packets/s{dropped}",
        link.counted.interface,
        per_second(rates.received_per_second),
        per_second(rates.sent_per_second),
        or_dash(rates.packets_per_second),
    )
}

fn per_second(rate: Option<u64>) -> String {
    rate.map_or_else(|| "-".into(), |rate| format!("{}/s", bytes(rate)))
}

/// Numbers stand below one another.
fn finished(mut rows: Table, names: usize) -> String {
    for column in rows.column_iter_mut().skip(names) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{}\n", rows.trim_fmt())
}

fn peers(peers: &[TopPeer]) -> String {
    let mut rows = table(&["PEER", "STATE", "RECEIVED", "SENT", "RTT", "LOSS", "TOTAL IN", "TOTAL OUT"]);
    for TopPeer { counted, rates } in peers {
        let loss = counted.loss_per_mille.map(|loss| match loss {
            0 => percent(0),
            loss => paint(Tone::Warning, percent(loss)),
        });
        rows.add_row([
            counted.node.to_string(),
            state(counted.state),
            per_second(rates.received_per_second),
            per_second(rates.sent_per_second),
            or_dash(counted.rtt.map(milliseconds)),
            or_dash(loss),
            or_dash(counted.received.map(bytes)),
            or_dash(counted.sent.map(bytes)),
        ]);
    }
    finished(rows, 2)
}

fn state(state: PeerState) -> String {
    match state {
        PeerState::Connected => "connected".into(),
        PeerState::Idle => "idle".into(),
        PeerState::Waiting => paint(Tone::Warning, "WAITING"),
        PeerState::Configured => "configured".into(),
        PeerState::Refused => paint(Tone::Bad, "REFUSED"),
    }
}

fn pods(pods: &[TopPod]) -> String {
    let mut rows = table(&["POD", "RECEIVED", "SENT", "PACKETS/S", "DROPPED", "TOTAL IN", "TOTAL OUT"]);
    for TopPod { counted, rates } in pods {
        let dropped = counted.totals.map(|totals| match rates.dropped_per_second {
            Some(1..) => paint(Tone::Warning, totals.dropped),
            _ => totals.dropped.to_string(),
        });
        rows.add_row([
            counted.pod.clone(),
            per_second(rates.received_per_second),
            per_second(rates.sent_per_second),
            or_dash(rates.packets_per_second),
            or_dash(dropped),
            or_dash(counted.totals.map(|totals| bytes(totals.received))),
            or_dash(counted.totals.map(|totals| bytes(totals.sent))),
        ]);
    }
    finished(rows, 1)
}

/// Cuts what would not fit, so that no line takes two and the first one stays on the screen.
pub(super) fn fit(text: &str, size: Size) -> String {
    let lines = text.lines().take(size.rows.saturating_sub(1));
    lines.fold(String::new(), |text, line| text + &cut(line, size.columns) + "\n")
}

/// The first characters of a line; marks for colours take no room.
fn cut(line: &str, columns: usize) -> String {
    let mut room = columns;
    let fits = |character: &char| {
        if style::is_mark(*character) {
            return true;
        }
        let fits = room > 0;
        room = room.saturating_sub(1);
        fits
    };
    line.chars().filter(fits).collect()
}

/// Erases the rest of a line, and the rest of the screen (ECMA-48, EL and ED); the cursor to the upper left corner (CUP).
const ERASE_LINE: &str = "\x1b[K";
const ERASE_BELOW: &str = "\x1b[J";
const HOME: &str = "\x1b[H";
const ERASE_ALL: &str = "\x1b[2J";

/// What writes a picture over the one before.
pub(super) fn over(text: &str, first: bool) -> String {
    let mut out = String::from(if first { ERASE_ALL } else { "" });
    out += HOME;
    for line in text.lines() {
        out += line;
        out += ERASE_LINE;
        out += "\n";
    }
    out + ERASE_BELOW
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::{counted, example};
    use super::*;

    fn large() -> Top {
        let (peers, pods) = (vec![Some(0); 5000], vec![0; 100]);
        let before = counted(0, &peers, &pods);
        let peers: Vec<_> = (0..5000).map(|number| Some(number * 1024)).collect();
        example(&before, &counted(1000, &peers, &(0..100).collect::<Vec<_>>()))
    }

    #[test]
    fn a_cluster_of_thousands_fits_any_screen() {
        let whole = large();
        for (columns, rows) in [(80, 24), (200, 60), (40, 10), (20, 3)] {
            let size = Size { columns, rows };
            let mut top = whole.clone();
            let (peers, pods) = room(&top, size);
            top.peers.truncate(peers);
            top.pods.truncate(pods);
            let shown = style::finish(&fit(&text(&top), size), false);
            assert!(shown.lines().count() < rows, "{size:?}: {shown}");
            assert!(shown.lines().all(|line| line.chars().count() <= columns), "{size:?}: {shown}");
            if rows >= 24 {
                assert!(shown.contains("more peers") && shown.contains("more pods"), "{shown}");
                assert_eq!(shown.lines().count(), rows - 1, "all of the screen is used: {shown}");
            }
        }
    }

    #[test]
    fn what_one_table_does_not_need_the_other_has() {
        let top = |peers: usize, pods: usize| {
            example(&counted(0, &[], &[]), &counted(1000, &vec![None; peers], &vec![0; pods]))
        };
        let room = |peers, pods| room(&top(peers, pods), Size { columns: 80, rows: 29 });
        assert_eq!(room(5, 5), (5, 5));
        assert_eq!(room(500, 5), (15, 5));
        assert_eq!(room(5, 500), (5, 15));
        assert_eq!(room(500, 500), (10, 10));
    }

    #[test]
    fn pictures_are_for_people() {
        let before = counted(0, &[Some(0), None], &[0]);
        let shown = style::finish(&text(&example(&before, &counted(1000, &[Some(2048), None], &[3]))), false);
        let expected = "\
node-a, mode wireguard, 2 peers, 1 pod, 1.0 s
husk-wg0: received 976.5 KiB/s, sent 1.9 MiB/s, 2000 packets/s, 500 dropped/s

 PEER    STATE       RECEIVED       SENT     RTT   LOSS  TOTAL IN  TOTAL OUT
 node-0  connected  2.0 KiB/s  4.0 KiB/s  0.1 ms  0.5 %   2.0 KiB    4.0 KiB
 node-1  connected          -          -  0.1 ms      -         -          -

 POD          RECEIVED       SENT  PACKETS/S  DROPPED  TOTAL IN  TOTAL OUT
 shop/pod-0  2.9 KiB/s  5.8 KiB/s          6        1   2.9 KiB    5.8 KiB
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn modes_that_do_not_count_by_peer_say_so() {
        let mut top = example(&counted(0, &[None], &[]), &counted(1000, &[None], &[]));
        top.mode = husk_overlay::mode::Mode::Vxlan;
        assert!(text(&top).contains("mode vxlan has no counters per peer; the tunnel's are"));
    }

    #[test]
    fn a_picture_leaves_nothing_of_the_one_before() {
        assert_eq!(over("a\nb\n", false), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert!(over("a\n", true).starts_with("\x1b[2J"));
    }
}
