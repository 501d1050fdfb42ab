//! What a person sees while the demo works, on standard error: a line per phase, and on a terminal a spinner that says
//! what is being done right now.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::report::Phase;

/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// The phases so far.
#[derive(Debug)]
pub(super) struct Progress {
    terminal: bool,
    phases: Vec<Phase>,
}

/// The phase that is running.
#[derive(Debug)]
pub(super) struct Step {
    title: String,
    bar: ProgressBar,
}

impl Progress {
    pub(super) fn start() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), phases: Vec::new() }
    }

    /// Does `work` and says what it was and how long it took.
    pub(super) fn phase<T>(&mut self, title: &str, work: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        let step = Step { title: title.to_owned(), bar: self.bar(title) };
        let done = work(&step);
        step.bar.finish_and_clear();
        let seconds = started.elapsed().as_secs_f64();
        let sign = if done.is_ok() { '✓' } else { '✗' };
        // Standard error may be closed; the work is worth finishing all the same.
        let _ = writeln!(std::io::stderr(), "{sign} {title:<56} {seconds:>5.1} s");
        self.phases.push(Phase { title: title.to_owned(), seconds });
        done
    }

    /// All phases in order.
    pub(super) fn finish(self) -> Vec<Phase> {
        self.phases
    }

    fn bar(&self, title: &str) -> ProgressBar {
        if !self.terminal {
            return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.set_message(title.to_owned());
        bar.enable_steady_tick(TICK);
        bar
    }
}

impl Step {
    /// Says what is being done now.
    pub(super) fn show(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.title));
    }
}
