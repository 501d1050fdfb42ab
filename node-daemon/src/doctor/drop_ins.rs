//! Configuration of the host's services that is spread over directories: systemd's way (systemd.unit(5), sysctl.d(5)), which
//! NetworkManager shares.

use std::collections::BTreeMap;

use super::Unknown;
use super::host::HostFiles;

/// A line `key=value` of an ini file, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Section, without brackets.
    pub(super) section: String,
    /// Key as it is written.
    pub(super) key: String,
    /// Value.
    pub(super) value: String,
    /// File and line.
    pub(super) place: String,
}

/// Files in force, sorted by name, as path and text: of two with one name that of the earlier directory counts.
pub(super) fn in_force(host: &HostFiles, directories: &[&str], suffix: &str) -> Result<Vec<(String, String)>, Unknown> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for directory in directories {
        for name in host.list(directory)?.into_iter().flatten().filter(|name| name.ends_with(suffix)) {
            files.entry(name.clone()).or_insert_with(|| format!("{directory}/{name}"));
        }
    }
    let mut texts = Vec::new();
    for path in files.into_values() {
        // One that leads nowhere says nothing.
        if let Some(text) = host.read(&path)? {
            texts.push((path, text));
        }
    }
    Ok(texts)
}

/// The lines of an ini file.
pub(super) fn entries(path: &str, text: &str) -> Vec<Entry> {
    let mut section = String::new();
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with(['#', ';'])) {
            entries.push(Entry {
                section: section.clone(),
                key: key.trim().to_owned(),
                value: value.trim().to_owned(),
                place: format!("{path}:{}: {line}", number + 1),
            });
        }
    }
    entries
}

/// A truth value as systemd and NetworkManager read it.
pub(super) fn is_false(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "no" | "n" | "false" | "f" | "off" | "0")
}

/// Shell patterns with `*` and `?` (glob(7)); brackets are taken as they are written.
pub(super) fn glob(pattern: &str, name: &str) -> bool {
    fn matches(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => {
                matches(rest, name) || name.split_first().is_some_and(|(_, more)| matches(pattern, more))
            }
            (Some((b'?', rest)), Some((_, more))) => matches(rest, more),
            (Some((one, rest)), Some((other, more))) if one == other => matches(rest, more),
            _ => false,
        }
    }
    matches(pattern.as_bytes(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_a_shell() {
        for (pattern, name, is) in [
            ("*", "husk-vx", true),
            ("husk*", "husk-vx", true),
            ("e*", "husk", false),
            ("husk-??", "husk-vx", true),
            ("", "", true),
        ] {
            assert_eq!(glob(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn the_earlier_directory_wins_and_names_sort() {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("etc/x/20-a.conf", "[A]\nk = etc\n"),
            ("usr/x/20-a.conf", "[A]\nk=usr\n"),
            ("usr/x/10-b.conf", "#k=1\nj=2\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let files = in_force(&HostFiles::new(root.path()), &["/etc/x", "/run/x", "/usr/x"], ".conf").unwrap();
        let all: Vec<Entry> = files.iter().flat_map(|(path, text)| entries(path, text)).collect();
        let told: Vec<(&str, &str, &str)> =
            all.iter().map(|it| (it.section.as_str(), it.key.as_str(), it.value.as_str())).collect();
        assert_eq!(told, [("", "j", "2"), ("A", "k", "etc")]);
        assert_eq!(all[1].place, "/etc/x/20-a.conf:2: k = etc");
    }
}
