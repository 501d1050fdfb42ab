//! `huskctl top`: what is going through the tunnels and to the pods, again and again.
//!
//! The daemon tells what was counted so far, this program makes rates of it: nobody who does not look costs anything. The
//! screen is only ever written over from its upper left corner, so that there is nothing to restore at the end, however it
//! comes; the last picture stays.

mod rates;
mod screen;

use std::io::IsTerminal as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use husk_overlay::ipc::Request;

use self::rates::top;
use self::screen::Size;
use super::following::{Answered, ask_on};
use super::{Output, Show, ask, style};
use crate::report::{Counted, Top};

/// Rows of each table where there is no screen to fill.
const ROWS: usize = 50;

/// What to show.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Seconds between two looks
    #[arg(long, default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Look once: the rates of one interval. So it is too where the output is no terminal, unless with --batch or -o json
    #[arg(long)]
    once: bool,
    /// Go on, one picture below the other
    #[arg(long, conflicts_with = "once")]
    batch: bool,
    /// Only peers
    #[arg(long, conflicts_with = "pods")]
    peers: bool,
    /// Only pods
    #[arg(long)]
    pods: bool,
    /// What comes first
    #[arg(long, value_enum, default_value_t = Key::Traffic)]
    sort: Key,
    /// Rows of each table; by default as many as fit on the terminal, else 50, and all with -o json
    #[arg(long, value_name = "ROWS")]
    limit: Option<usize>,
}

/// Orders of rows; the most comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Key {
    /// Bytes per second in both directions
    Traffic,
    /// Bytes per second received
    Received,
    /// Bytes per second sent
    Sent,
    /// Probes lost on the way to a peer; packets dropped at a pod
    Loss,
    /// Round-trip time to a peer
    Rtt,
    /// Name, from a to z
    Name,
}

/// Shortest interval: the kernel and the daemon are asked that often.
const SHORTEST: f64 = 0.2;
const LONGEST: f64 = 3600.0;

fn interval(text: &str) -> Result<Duration, String> {
    let wrong = || format!("write a number of seconds from {SHORTEST} to {LONGEST}");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    if (SHORTEST..=LONGEST).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let terminal = std::io::stdout().is_terminal();
    let lines = show.output == Output::Json;
    let once = options.once || !(terminal || options.batch || lines);
    let live = terminal && !once && !options.batch && !lines;
    let mut before: Counted = ask(socket, &Request::Top)?;
    let mut first = true;
    loop {
        thread::sleep(options.interval);
        let Answered { answer: now, restarted } = ask_on::<Counted>(socket, &Request::Top)?;
        if restarted {
            // Between what two daemons have counted there is no rate.
            before = now;
            continue;
        }
        let top = shown(&before, &now, options);
        let text = match (lines, live) {
            (true, _) => serde_json::to_string(&top)? + "\n",
            (false, true) => {
                let size = screen::size();
                screen::over(&show.finish(&screen::fit(&screen::text(&limited(top, options, Some(size))), size)), first)
            }
            (false, false) => {
                let blank = if first { "" } else { "\n" };
                format!("{blank}{}", show.finish(&screen::text(&limited(top, options, None))))
            }
        };
        if once {
            return Ok((text, false));
        }
        if !style::print(&text)? {
            return Ok((String::new(), false));
        }
        first = false;
        before = now;
    }
}

/// What is asked for, in the order that is asked for; JSON has all of it.
fn shown(before: &Counted, now: &Counted, options: &Options) -> Top {
    let mut top = top(before, now, jiff::Timestamp::now());
    if options.pods {
        top.peers.clear();
        top.tunnels.clear();
    }
    if options.peers {
        top.pods.clear();
    }
    rates::sort(&mut top, options.sort);
    if let Some(limit) = options.limit {
        top.peers.truncate(limit);
        top.pods.truncate(limit);
    }
    top
}

/// As many rows as there is room for.
fn limited(mut top: Top, options: &Options, size: Option<Size>) -> Top {
    if options.limit.is_none() {
        let (peers, pods) = match size {
            Some(size) => screen::room(&top, size),
            None => (ROWS, ROWS),
        };
        top.peers.truncate(peers);
        top.pods.truncate(pods);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_that_make_sense() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "0.1", "-1", "nan", "inf", "3601", "soon", ""] {
            assert!(interval(wrong).unwrap_err().contains("from 0.2 to 3600"), "{wrong}");
        }
    }
}
