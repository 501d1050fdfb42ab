//! Gets one item, within limits of time and size.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{redact, scrape};
use crate::files;
use crate::programs::{self, Keep, Kept, Limits, Ran};

/// Most files of a listing or a walk.
const MOST_FILES: usize = 50_000;

/// Largest kernel parameter that is read, in bytes.
const LARGEST_PARAMETER: u64 = 4 << 10;

/// Kernel parameters that are secrets: the key of TCP Fast Open cookies, and what stable IPv6 addresses are made with.
const SECRET_PARAMETERS: [&str; 3] = ["tcp_fastopen_key", "stable_secret", "ipv6_stable_secret"];

/// What an item is got from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Output of a program, whose exit status may be one of these.
    Program { program: PathBuf, arguments: Vec<String>, statuses: &'static [i32], keep: Keep },
    /// A file, its end where it is large.
    File { path: PathBuf },
    /// A YAML or JSON file, without its secrets.
    Structured { path: PathBuf },
    /// All YAML or JSON files of some folders, one after the other, without their secrets; a file is named before its content.
    Folders { paths: Vec<PathBuf> },
    /// What files there are below some folders, with modes, owners and sizes; not what is in them.
    Listing { paths: Vec<PathBuf> },
    /// Kernel parameters below a folder of /proc/sys.
    Parameters { path: PathBuf },
    /// The metrics that are served there.
    Metrics { address: SocketAddr },
}

impl Source {
    /// Gets the item.
    ///
    /// # Errors
    /// Why it cannot be had, in words.
    pub(super) fn gather(&self, limits: Limits) -> Result<Kept, String> {
        match self {
            Self::Program { program, arguments, statuses, keep } => run(program, arguments, statuses, *keep, limits),
            Self::File { path } => tail(path, limits.bytes).map_err(|error| failed(path, &error)),
            Self::Structured { path } => structured(path, limits.bytes).map(|text| bounded(text.into_bytes(), limits)),
            Self::Folders { paths } => Ok(bounded(folders(paths, limits.bytes)?.into_bytes(), limits)),
            Self::Listing { paths } => Ok(bounded(listing(paths).into_bytes(), limits)),
            Self::Metrics { address } => scrape::scrape(*address, limits),
            Self::Parameters { path } => Ok(bounded(parameters(path)?.into_bytes(), limits)),
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> String {
    format!("cannot read {}: {error}", path.display())
}

fn bounded(mut content: Vec<u8>, limits: Limits) -> Kept {
    let most = usize::try_from(limits.bytes).unwrap_or(usize::MAX);
    let truncated = content.len() > most;
    content.truncate(most);
    Kept { content, truncated }
}

/// The end of a file. Those of /proc have no length and are read from their beginning.
fn tail(path: &Path, most: u64) -> io::Result<Kept> {
    let mut file = files::open_regular(path)?;
    let truncated = file.metadata()?.len() > most;
    if truncated {
        file.seek(SeekFrom::End(-i64::try_from(most).unwrap_or(i64::MAX)))?;
    }
    let mut content = Vec::new();
    file.take(most).read_to_end(&mut content)?;
    Ok(Kept { content, truncated })
}

fn structured(path: &Path, most: u64) -> Result<String, String> {
    let Kept { content, truncated } = tail(path, most).map_err(|error| failed(path, &error))?;
    if truncated {
        return Err(format!("{} is larger than {most} bytes", path.display()));
    }
    let text = String::from_utf8(content).map_err(|_| format!("{} is no text", path.display()))?;
    let redacted = redact::structured(&text).map_err(|reason| format!("{} is left out: {reason}", path.display()))?;
    Ok(redacted.text)
}

fn folders(paths: &[PathBuf], most: u64) -> Result<String, String> {
    let mut text = String::new();
    let mut found = false;
    for folder in paths {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        found = true;
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|it| it.is_file()).collect();
        files.sort();
        for path in files {
            if text.len() as u64 > most {
                return Ok(text);
            }
            text += &format!("---\n# {}\n", path.display());
            match structured(&path, most) {
                Ok(content) => text += &content,
                Err(reason) => text += &format!("# {reason}\n"),
            }
        }
    }
    let names = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    if found { Ok(text) } else { Err(format!("there is no {}", names())) }
}

fn listing(paths: &[PathBuf]) -> String {
    let mut text = String::new();
    let mut waiting: Vec<PathBuf> = paths.iter().rev().cloned().collect();
    let mut lines = 0;
    while let Some(path) = waiting.pop() {
        lines += 1;
        if lines > MOST_FILES {
            return text + "and more\n";
        }
        match fs::symlink_metadata(&path) {
            Ok(found) => {
                let mode = found.permissions().mode();
                let (user, group, size) = (found.uid(), found.gid(), found.len());
                text += &format!("{mode:06o} {user}:{group} {size:>10} {}\n", path.display());
                if found.is_dir() {
                    let entries = fs::read_dir(&path).into_iter().flatten().flatten();
                    let mut below: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
                    below.sort_by(|one, other| other.cmp(one));
                    waiting.append(&mut below);
                }
            }
            Err(error) => text += &format!("{}: {error}\n", path.display()),
        }
    }
    text
}

fn parameters(root: &Path) -> Result<String, String> {
    fs::read_dir(root).map_err(|error| failed(root, &error))?;
    let base = root.parent().unwrap_or(root);
    let mut lines = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(folder) = waiting.pop() {
        for path in fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                waiting.push(path);
                continue;
            }
            let name = path.strip_prefix(base).unwrap_or(&path).display().to_string();
            let last = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if SECRET_PARAMETERS.contains(&last.as_str()) {
                lines.push(format!("{name} = {}", redact::REDACTED));
            } else if let Some(value) = parameter(&path) {
                lines.push(format!("{name} = {value}"));
            }
            if lines.len() > MOST_FILES {
                break;
            }
        }
    }
    lines.sort();
    Ok(lines.join("\n") + "\n")
}

/// The value of a parameter; none for one that can only be written.
fn parameter(path: &Path) -> Option<String> {
    let mut value = String::new();
    File::open(path).ok()?.take(LARGEST_PARAMETER).read_to_string(&mut value).ok()?;
    Some(value.trim().replace('\n', " "))
}

fn run(program: &Path, arguments: &[String], statuses: &[i32], keep: Keep, limits: Limits) -> Result<Kept, String> {
    let name = program.display();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", programs::search_path())
        .env("LC_ALL", "C")
        // By these the doctor knows whether it sees the host's files.
        .envs(
            ["KUBERNETES_SERVICE_HOST", "HUSK_HOST_ROOT", "HUSK_PROC_SYS"]
                .into_iter()
                .filter_map(|name| std::env::var_os(name).map(|value| (name, value))),
        )
        // wg show prints keys where this says so; the caller's environment must not.
        .env("WG_HIDE_KEYS", "always");
    let Ran { output, complaint, status } =
        programs::run(&mut command, keep, limits).map_err(|failure| failure.to_string())?;
    // One of which there was too much was stopped.
    if output.truncated || status.is_some_and(|status| statuses.contains(&status)) {
        return Ok(output);
    }
    let complaint = redact::long_numbers(&complaint);
    let status = status.map_or_else(|| "it was killed".to_owned(), |status| format!("exit status {status}"));
    Err(if complaint.is_empty() { format!("{name}: {status}") } else { format!("{name}: {complaint} ({status})") })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMITS: Limits = Limits { time: Duration::from_secs(60), bytes: 1000 };

    fn shell(script: &str) -> Result<String, String> {
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        let program = Source::Program { program: "sh".into(), arguments, statuses: &[0, 1], keep: Keep::Beginning };
        program.gather(LIMITS).map(|it| String::from_utf8(it.content).unwrap())
    }

    #[test]
    fn programs_end_as_they_may_or_their_complaints_are_told_without_numbers() {
        assert_eq!(shell("echo well; exit 1").unwrap(), "well\n");
        let error = shell("echo no such thing >&2; exit 7").unwrap_err();
        assert_eq!(error, "sh: no such thing (exit status 7)");
        let key = "0x00112233445566778899aabbccddeeff";
        assert!(!shell(&format!("echo {key} >&2; exit 7")).unwrap_err().contains(key));
    }

    #[test]
    fn a_pipe_in_the_place_of_a_file_does_not_hang_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.jsonl");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        for source in [Source::File { path: path.clone() }, Source::Structured { path: path.clone() }] {
            let error = source.gather(LIMITS).unwrap_err();
            assert_eq!(error, format!("cannot read {}: it is no regular file", path.display()));
        }
    }

    #[test]
    fn the_callers_environment_does_not_make_wg_print_keys() {
        assert_eq!(shell("echo $WG_HIDE_KEYS $HOME").unwrap(), "always\n");
    }

    #[test]
    fn files_are_read_from_their_end_and_without_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.conf");
        fs::write(&path, "x".repeat(999) + "end\n").unwrap();
        let read = Source::File { path: path.clone() }.gather(LIMITS).unwrap();
        assert!(read.truncated && read.content.ends_with(b"end\n") && read.content.len() == 1000);
        fs::write(&path, "{\"token\": \"abcdef\", \"type\": \"husk\"}").unwrap();
        fs::write(directory.path().join("b.yaml"), "a: [unclosed hunter2").unwrap();
        let folders = Source::Folders { paths: vec!["/nonexistent".into(), directory.path().to_owned()] };
        let text = String::from_utf8(folders.gather(LIMITS).unwrap().content).unwrap();
        assert!(text.contains("type: husk") && text.contains("b.yaml is left out"), "{text}");
        assert!(!text.contains("abcdef") && !text.contains("hunter2"), "{text}");
        let none = Source::Folders { paths: vec!["/nonexistent".into()] };
        assert_eq!(none.gather(LIMITS).unwrap_err(), "there is no /nonexistent");
        let listing = listing(&[directory.path().to_owned(), "/nonexistent".into()]);
        assert!(listing.contains("100644 ") && listing.contains("/nonexistent: No such file"), "{listing}");
    }

    #[test]
    fn kernel_parameters_are_told_but_not_those_that_are_secret() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("net/ipv4");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("ip_forward"), "1\n").unwrap();
        fs::write(folder.join("tcp_fastopen_key"), "00112233-44556677-8899aabb-ccddeeff\n").unwrap();
        let text = parameters(&directory.path().join("net")).unwrap();
        assert_eq!(text, "net/ipv4/ip_forward = 1\nnet/ipv4/tcp_fastopen_key = <redacted>\n");
        assert!(parameters(Path::new("/nonexistent")).is_err());
    }
}
