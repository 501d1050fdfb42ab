//! A typed reader of fields: takes values out of a YAML tree by key and records everything that is wrong, each problem
//! with the path of its key, instead of stopping at the first.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::{ConfigError, Problem};
use crate::yaml::Value;

/// What is wrong with the value at a place.
pub(crate) struct Complaint {
    /// Kind.
    pub(crate) problem: Problem,
    /// What is wrong.
    pub(crate) reason: String,
    /// What to do.
    pub(crate) remedy: String,
}

impl Complaint {
    pub(crate) fn bad(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { problem: Problem::BadValue, reason: reason.into(), remedy: remedy.into() }
    }

    pub(crate) fn conflict(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { problem: Problem::Conflict, reason: reason.into(), remedy: remedy.into() }
    }

    pub(crate) fn wrong_type(value: &Value, expected: &str, remedy: impl Into<String>) -> Self {
        let given = match value {
            Value::Null => "nothing",
            Value::Bool(_) => "true or false",
            Value::Integer(_) | Value::Float(_) => "a number",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        };
        Self {
            problem: Problem::WrongType,
            reason: format!("{expected} is expected here and {given} is given"),
            remedy: remedy.into(),
        }
    }
}

/// Problems of one file that are reported. Garbage has a problem per line, and nobody reads more.
const MAX_PROBLEMS: usize = 100;

/// The problems of one file.
pub(crate) struct Problems<'a> {
    file: &'a str,
    found: Vec<ConfigError>,
}

impl<'a> Problems<'a> {
    pub(crate) fn new(file: &'a str) -> Self {
        Self { file, found: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    fn is_full(&self) -> bool {
        self.found.len() >= MAX_PROBLEMS
    }

    pub(crate) fn into_errors(self) -> Vec<ConfigError> {
        self.found
    }

    /// Records a problem. `value` is none when there is no value to show.
    pub(crate) fn add(&mut self, key: &str, value: Option<&dyn fmt::Display>, complaint: Complaint) {
        if self.is_full() {
            return;
        }
        self.found.push(ConfigError {
            file: self.file.to_owned(),
            key: key.to_owned(),
            problem: complaint.problem,
            value: value.map(ToString::to_string),
            reason: complaint.reason,
            remedy: complaint.remedy,
        });
    }
}

/// What happens with keys nobody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnknownKeys {
    /// They are problems: a typing error must not silently mean the default.
    Refused,
    /// They are ignored: a newer version may have written them.
    Ignored,
}

/// The keys of one map. A key without a value (`key:`) counts as absent.
pub(crate) struct Fields<'a, 'p> {
    problems: &'a mut Problems<'p>,
    path: String,
    entries: &'a [(String, Value)],
    known: Vec<&'static str>,
    unknown_keys: UnknownKeys,
}

impl<'a, 'p> Fields<'a, 'p> {
    /// The fields of a document. One that is not a map is a problem, and reads as empty.
    pub(crate) fn of_document(value: &'a Value, problems: &'a mut Problems<'p>, unknown_keys: UnknownKeys) -> Self {
        Self::of(Some(value), String::new(), problems, unknown_keys)
    }

    fn of(value: Option<&'a Value>, path: String, problems: &'a mut Problems<'p>, unknown_keys: UnknownKeys) -> Self {
        let entries: &[(String, Value)] = match value {
            Some(Value::Map(entries)) => entries,
            None | Some(Value::Null) => &[],
            Some(other) => {
                let remedy = "write keys with values below it, indented, as in 'key: value'";
                problems.add(&path, Some(other), Complaint::wrong_type(other, "a map", remedy));
                &[]
            }
        };
        let fields = Self { problems, path, entries, known: Vec::new(), unknown_keys };
        fields.check_duplicates()
    }

    fn check_duplicates(self) -> Self {
        let mut seen = BTreeSet::new();
        for (key, value) in self.entries {
            if !seen.insert(key) {
                let complaint = Complaint::conflict("the key occurs twice", "keep one of the two");
                self.problems.add(&join(&self.path, key), Some(value), complaint);
            }
        }
        self
    }

    /// Full path of a key.
    pub(crate) fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// The value of a key, if it has one.
    pub(crate) fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        let (_, value) = self.entries.iter().find(|(name, _)| name == key)?;
        Some(value).filter(|value| **value != Value::Null)
    }

    /// Records a problem with the value of a key.
    pub(crate) fn complain(&mut self, key: &'static str, complaint: Complaint) {
        let value = self.value(key);
        self.problems.add(&self.path_of(key), value.map(|value| value as &dyn fmt::Display), complaint);
    }

    /// Records that a key is not there.
    pub(crate) fn missing(&mut self, key: &'static str, reason: &str, remedy: &str) {
        let complaint = Complaint { problem: Problem::Missing, reason: reason.to_owned(), remedy: remedy.to_owned() };
        self.problems.add(&self.path_of(key), None, complaint);
    }

    /// The map below a key; empty when there is none. Call [`Fields::finish`] on it.
    pub(crate) fn section(&mut self, key: &'static str) -> Fields<'_, 'p> {
        let value = self.value(key);
        Fields::of(value, self.path_of(key), self.problems, self.unknown_keys)
    }

    /// Text.
    pub(crate) fn text(&mut self, key: &'static str, expected: &str) -> Option<&'a str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            other => {
                let complaint = Complaint::wrong_type(other, expected, quoting_remedy(other));
                self.complain(key, complaint);
                None
            }
        }
    }

    /// A value with a text form of its own.
    pub(crate) fn parsed<T>(&mut self, key: &'static str, expected: &str, remedy: &str) -> Option<T>
    where
        T: FromStr<Err: fmt::Display>,
    {
        let text = self.text(key, expected)?;
        match text.parse() {
            Ok(it) => Some(it),
            Err(error) => {
                self.complain(key, Complaint::bad(error.to_string(), remedy));
                None
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let text = self.text(key, &format!("one of {}", words.join(", ")))?;
        if let Some((_, it)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*it);
        }
        let remedy = match closest(text, &words) {
            Some(word) => format!("did you mean {word}? The words are {}", words.join(", ")),
            None => format!("write one of {}", words.join(", ")),
        };
        self.complain(key, Complaint::bad("the key does not take this word", remedy));
        None
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, key: &'static str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(it) => Some(*it),
            other => {
                let complaint = Complaint::wrong_type(other, "true or false", "write true or false, without quotes");
                self.complain(key, complaint);
                None
            }
        }
    }

    /// A whole number within bounds; `why` says where they come from.
    pub(crate) fn number<T>(&mut self, key: &'static str, bounds: RangeInclusive<T>, why: &str) -> Option<T>
    where
        T: Copy + Into<i128> + TryFrom<i128>,
    {
        let bounds: RangeInclusive<i128> = (*bounds.start()).into()..=(*bounds.end()).into();
        let remedy = format!("write a whole number from {} to {}, without quotes", bounds.start(), bounds.end());
        match self.value(key)? {
            Value::Integer(it) if bounds.contains(it) => T::try_from(*it).ok(),
            Value::Integer(_) => {
                self.complain(key, Complaint::bad(why, remedy));
                None
            }
            other => {
                self.complain(key, Complaint::wrong_type(other, "a whole number", remedy));
                None
            }
        }
    }

    /// A list, item by item: `read` gets each item and returns what it makes of it. Items it complains about are left
    /// out.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        example: &str,
        mut read: impl FnMut(&'a Value) -> Result<T, Complaint>,
    ) -> Option<Vec<T>> {
        let items = match self.value(key)? {
            Value::List(items) => items,
            other => {
                let complaint = Complaint::wrong_type(other, expected, format!("write for example {example}"));
                self.complain(key, complaint);
                return None;
            }
        };
        let mut all = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match read(item) {
                Ok(it) => all.push(it),
                Err(complaint) => self.problems.add(&format!("{}[{index}]", self.path_of(key)), Some(item), complaint),
            }
        }
        Some(all)
    }

    /// A list of maps: `read` gets the fields of each, which are finished for it.
    pub(crate) fn sections<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        mut read: impl FnMut(&mut Fields<'_, 'p>) -> Option<T>,
    ) -> Vec<T> {
        let items = match self.value(key) {
            None => return Vec::new(),
            Some(Value::List(items)) => items,
            Some(other) => {
                let complaint = Complaint::wrong_type(other, expected, "write each item behind a '- '");
                self.complain(key, complaint);
                return Vec::new();
            }
        };
        let mut all = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let path = format!("{}[{index}]", self.path_of(key));
            let mut fields = Fields::of(Some(item), path, self.problems, self.unknown_keys);
            let it = read(&mut fields);
            fields.finish();
            all.extend(it);
        }
        all
    }

    /// Records the keys nobody asked for.
    pub(crate) fn finish(self) {
        if self.unknown_keys == UnknownKeys::Ignored {
            return;
        }
        for (key, value) in self.entries {
            if self.problems.is_full() {
                return;
            }
            if self.known.contains(&key.as_str()) {
                continue;
            }
            let remedy = match closest(key, &self.known) {
                Some(word) => format!("did you mean {word}? Otherwise remove it"),
                None => format!("remove it; the keys here are {}", self.known.join(", ")),
            };
            let complaint =
                Complaint { problem: Problem::UnknownKey, reason: "there is no such key here".to_owned(), remedy };
            self.problems.add(&join(&self.path, key), Some(value), complaint);
        }
    }
}

/// The remedy for a value that is no text but stands where text belongs.
pub(crate) fn quoting_remedy(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Integer(_) | Value::Float(_) => format!("put it in quotes: '{value}'"),
        Value::Null | Value::Text(_) | Value::List(_) | Value::Map(_) => "write one text".to_owned(),
    }
}

fn join(path: &str, key: &str) -> String {
    // A key may be any text; what a terminal gets to see is a line of it.
    let shown: String = key.chars().take(64).flat_map(char::escape_debug).collect();
    let key = shown.as_str();
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The word that was probably meant: equal but for case and separators, or few typing errors away.
fn closest<'w>(given: &str, words: &[&'w str]) -> Option<&'w str> {
    let plain = |text: &str| -> Vec<char> {
        text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).take(64).collect()
    };
    let given = plain(given);
    words
        .iter()
        .map(|word| (distance(&given, &plain(word)), *word))
        .filter(|(errors, word)| *errors <= word.len().div_ceil(4))
        .min_by_key(|(errors, _)| *errors)
        .map(|(_, word)| word)
}

/// Typing errors between two words: letters inserted, left out or replaced (Levenshtein's distance).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_word_is_what_was_meant() {
        let words = ["clusterCIDRs", "mode", "vxlan", "wireguard", "mtu"];
        for (given, meant) in [
            ("cluster_cidrs", Some("clusterCIDRs")),
            ("clusterCIDR", Some("clusterCIDRs")),
            ("clustercidr", Some("clusterCIDRs")),
            ("modus", None),
            ("wiregaurd", Some("wireguard")),
            ("MTU", Some("mtu")),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(closest(given, &words), meant, "{given}");
        }
    }

    #[test]
    fn distances() {
        let d = |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!(d("kitten", "sitting"), 3);
        assert_eq!(d("", "abc"), 3);
        assert_eq!(d("abc", ""), 3);
        assert_eq!(d("same", "same"), 0);
    }
}
