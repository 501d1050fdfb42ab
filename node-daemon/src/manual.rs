//! Manual pages and shell completion, made of the same definitions as `--help`.

pub mod huskd;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Command, ValueEnum};
use clap_complete::aot;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

/// Date of the pages: that of the version. A date of the day they are made would make two builds differ.
const DATE: &str = "2026-11-28";

/// Shells whose completion is known to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// For /usr/share/bash-completion/completions/NAME, or: source <(NAME completion bash)
    Bash,
    /// For a directory of $fpath, as file _NAME, or: source <(NAME completion zsh)
    Zsh,
    /// For ~/.config/fish/completions/NAME.fish, or: NAME completion fish | source
    Fish,
}

/// A script that completes a command's subcommands and options.
#[must_use]
pub fn completion(shell: Shell, mut command: Command) -> String {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    match shell {
        Shell::Bash => aot::generate(aot::Bash, &mut command, name, &mut script),
        Shell::Zsh => aot::generate(aot::Zsh, &mut command, name, &mut script),
        Shell::Fish => aot::generate(aot::Fish, &mut command, name, &mut script),
    }
    String::from_utf8_lossy(&script).into_owned()
}

/// A part of a manual page besides what the definition of a command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Heading, in capitals.
    pub heading: &'static str,
    /// What is under it.
    pub content: Vec<Paragraph>,
}

/// A paragraph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Paragraph {
    /// Running text.
    Text(String),
    /// A term and what it means.
    Term(String, String),
    /// Lines to be shown as they are.
    Literal(String),
}

/// Manual pages of a command and all its subcommands.
pub struct Manual {
    /// The command.
    pub command: Command,
    /// Section of the manual: 1 for commands of users, 8 for those of administrators.
    pub section: u8,
    /// What a page has besides. It is asked with the words of the command after its name, none for the command itself.
    pub besides: fn(&str) -> Vec<Section>,
}

impl Manual {
    /// Writes a page for the command and one for each subcommand into a directory, and returns their paths.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let written = self.pages().into_iter().map(|(name, text)| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        });
        written.collect()
    }

    /// File names and contents, sorted.
    #[must_use]
    pub fn pages(&self) -> Vec<(String, Vec<u8>)> {
        let mut command = self.command.clone().disable_help_subcommand(true);
        command.build();
        let mut pages = Vec::new();
        self.add(&command, "", &mut pages);
        pages.sort();
        pages
    }

    fn add(&self, command: &Command, words: &str, pages: &mut Vec<(String, Vec<u8>)>) {
        for below in command.get_subcommands().filter(|it| !it.is_hide_set()) {
            let words = format!("{words} {}", below.get_name());
            self.add(below, words.trim_start(), pages);
        }
        let name = format!("{}.{}", command.get_display_name().unwrap_or(command.get_name()), self.section);
        pages.push((name, self.page(command, words)));
    }

    fn page(&self, command: &Command, words: &str) -> Vec<u8> {
        let root = self.command.get_name();
        let source = format!("Husk {}", self.command.get_version().unwrap_or_default());
        let man =
            Man::new(command.clone()).section(self.section.to_string()).date(DATE).source(source).manual("Husk Manual");
        let mut page = Vec::new();
        // Writing to memory does not fail.
        let rendered = (|| -> io::Result<()> {
            man.render_title(&mut page)?;
            man.render_name_section(&mut page)?;
            man.render_synopsis_section(&mut page)?;
            man.render_description_section(&mut page)?;
            if command.get_arguments().any(|argument| !argument.is_hide_set()) {
                man.render_options_section(&mut page)?;
            }
            if command.get_subcommands().any(|below| !below.is_hide_set()) {
                man.render_subcommands_section(&mut page)?;
            }
            let mut roff = Roff::new();
            for section in (self.besides)(words) {
                roff.control("SH", [section.heading]);
                for (number, paragraph) in section.content.iter().enumerate() {
                    paragraph.render(&mut roff, number == 0);
                }
            }
            if !words.is_empty() {
                roff.control("SH", ["SEE ALSO"]);
                roff.text([bold(root), roman(format!("({})", self.section))]);
            }
            roff.to_writer(&mut page)
        })();
        rendered.expect("memory takes all of it");
        tidy(&String::from_utf8_lossy(&page)).into_bytes()
    }
}

/// What the parts of a page bring along each, once; and an empty line as mandoc wants it.
fn tidy(page: &str) -> String {
    const APOSTROPHES: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
    format!("{APOSTROPHES}{}", page.replace(APOSTROPHES, "").replace(".br\n\n.br\n", ".sp\n"))
}

impl Paragraph {
    /// The first one of a section follows its heading at once.
    fn render(&self, roff: &mut Roff, first: bool) {
        if !first && !matches!(self, Self::Term(..)) {
            roff.control("PP", []);
        }
        match self {
            Self::Text(text) => {
                roff.text([roman(text)]);
            }
            Self::Term(term, meaning) => {
                roff.control("TP", []);
                roff.text([bold(term)]);
                roff.text([roman(meaning)]);
            }
            Self::Literal(lines) => {
                roff.control("nf", []);
                roff.control("RS", ["4"]);
                for line in lines.lines() {
                    roff.text([Inline::Roman(line.to_owned())]);
                }
                roff.control("RE", []);
                roff.control("fi", []);
            }
        }
    }
}
