//! Colours, sparingly: what is wrong stands out, what is well does not ask for attention.
//!
//! A text is marked where it is made and painted where it is written. The marks are characters without width, so that the
//! columns of a table are as wide with them as without; whether they become colours is decided once, for the whole output.
//! What comes from elsewhere (a peer's record, a name in a manifest) can therefore not paint, nor move the cursor.

use std::fmt::Write as _;
use std::io::Write as _;

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};
use clap::ValueEnum;
use husk_overlay::issue::Severity;

/// When to use colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Colour {
    /// On a terminal, unless `NO_COLOR` is set; anywhere if `CLICOLOR_FORCE` is
    #[default]
    Auto,
    /// Anywhere
    Always,
    /// Nowhere
    Never,
}

impl Colour {
    /// Whether standard output gets colours: <https://no-color.org>, <https://bixense.com/clicolors>.
    pub(super) fn is_on(self) -> bool {
        match self {
            Self::Auto => AutoStream::choice(&std::io::stdout()) != anstream::ColorChoice::Never,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// What a piece of text is to the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Warning,
    /// Wrong.
    Bad,
    /// A heading.
    Strong,
    /// Of little interest.
    Faint,
}

/// Characters that nobody writes: Unicode discourages them (the "deprecated format characters", chapter 23.3), and they have no
/// width. One begins each tone, the last one ends all.
const BEGIN: [(char, Tone); 5] = [
    ('\u{206A}', Tone::Good),
    ('\u{206B}', Tone::Warning),
    ('\u{206C}', Tone::Bad),
    ('\u{206D}', Tone::Strong),
    ('\u{206E}', Tone::Faint),
];
const END: char = '\u{206F}';

impl Tone {
    fn style(self) -> Style {
        match self {
            Self::Good => AnsiColor::Green.on_default(),
            Self::Warning => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default().bold(),
            Self::Strong => Style::new().bold(),
            Self::Faint => Style::new().dimmed(),
        }
    }
}

impl From<Severity> for Tone {
    fn from(severity: Severity) -> Self {
        match severity {
            Severity::Warning => Self::Warning,
            Severity::Error | Severity::Blocking => Self::Bad,
        }
    }
}

/// Marks a text. Marks do not nest.
pub(super) fn paint(tone: Tone, text: impl std::fmt::Display) -> String {
    let begin = BEGIN.iter().find(|(_, it)| *it == tone).map_or(END, |(mark, _)| *mark);
    format!("{begin}{text}{END}")
}

/// True for a character that marks a text and has no width.
pub(super) fn is_mark(character: char) -> bool {
    character == END || BEGIN.iter().any(|(mark, _)| *mark == character)
}

/// Makes colours of the marks, or nothing; control characters, which none of our texts has, become U+FFFD.
pub(super) fn finish(text: &str, coloured: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        let begun = BEGIN.iter().find(|(mark, _)| *mark == character);
        match (begun, character) {
            (Some((_, tone)), _) if coloured => {
                let _ = write!(out, "{}", tone.style());
            }
            (None, END) if coloured => {
                let _ = write!(out, "{}", anstyle::Reset);
            }
            (Some(_), _) | (None, END) => {}
            (None, '\n' | '\t') => out.push(character),
            (None, _) if character.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            (None, _) => out.push(character),
        }
    }
    out
}

/// Writes to standard output. A reader that closed the pipe has read enough: then false.
///
/// # Errors
/// When it cannot be written for another reason, as on a full disk: what was asked for would be missing, or be half of it.
pub(super) fn print(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output")),
    }
}

/// Writes lines to standard error, beside what is asked for: who does not read them misses nothing of that.
pub(super) fn tell(lines: impl IntoIterator<Item = String>) {
    for line in lines {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::huskctl::tables::table;

    #[test]
    fn columns_are_as_wide_with_marks_as_without() {
        let rows = |state: &str| {
            let mut table = table(&["PEER", "STATE", "MTU"]);
            table.add_row(["alpha", state, "1440"]).add_row(["beta", "-", "1440"]);
            table.trim_fmt()
        };
        let plain = rows("REFUSED");
        for (_, tone) in BEGIN {
            let marked = rows(&paint(tone, "REFUSED"));
            assert_ne!(marked, plain);
            assert_eq!(finish(&marked, false), finish(&plain, false));
            let coloured = finish(&marked, true);
            assert!(coloured.contains("REFUSED\u{1b}[0m"), "{coloured:?}");
            assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), finish(&plain, false));
        }
    }

    #[test]
    fn what_comes_from_elsewhere_cannot_move_the_cursor() {
        let evil = "node\u{1b}[2J\r\u{7}\u{9b}1m\tx\n";
        for coloured in [false, true] {
            assert_eq!(finish(evil, coloured), "node\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}1m\tx\n");
        }
    }

    #[test]
    fn severities_have_their_tones() {
        assert_eq!(Tone::from(Severity::Warning), Tone::Warning);
        assert_eq!(Tone::from(Severity::Blocking), Tone::Bad);
    }
}
