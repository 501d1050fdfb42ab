//! Values with their places, and what is wrong with them.

use std::fmt;

use husk_overlay::issue::{Issue, IssueKind, Severity};
use serde_json::{Map, Value};

/// Issues that one object can have. Nobody reads more.
const MAX_ISSUES: usize = 20;

/// Characters of a text that a message repeats.
const SHOWN: usize = 80;

/// Path of a value within its object, such as `spec.ingress[0].from[1]`.
#[derive(Clone, Copy)]
enum Place<'p> {
    Root(&'p str),
    Key(&'p Place<'p>, &'p str),
    Item(&'p Place<'p>, usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(key) => f.write_str(key),
            Self::Key(parent, key) => write!(f, "{parent}.{key}"),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// What is wrong with a value. Who reads it decides what becomes of it.
#[derive(Debug)]
pub(super) struct Fault {
    place: String,
    value: Option<String>,
    reason: String,
    remedy: String,
}

/// A value with its place.
#[derive(Clone, Copy)]
pub(super) struct Spot<'p> {
    value: &'p Value,
    place: Place<'p>,
}

impl<'p> Spot<'p> {
    pub(super) fn root(key: &'p str, value: &'p Value) -> Self {
        Self { value, place: Place::Root(key) }
    }

    pub(super) fn fault(&self, reason: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault {
            place: self.place.to_string(),
            value: Some(shown(self.value)),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }

    fn wrong_type(&self, expected: &str) -> Fault {
        self.fault(format!("{expected} is expected here"), format!("write {expected}"))
    }

    pub(super) fn map(&self) -> Result<Fields<'_>, Fault> {
        let entries = self.value.as_object().ok_or_else(|| self.wrong_type("a map"))?;
        Ok(Fields { place: &self.place, entries })
    }

    /// The map of a value that may have these keys only.
    pub(super) fn map_of(&self, known: &[&str]) -> Result<Fields<'_>, Fault> {
        let fields = self.map()?;
        fields.only(known)?;
        Ok(fields)
    }

    pub(super) fn items(&self) -> Result<impl ExactSizeIterator<Item = Spot<'_>>, Fault> {
        let items = self.value.as_array().ok_or_else(|| self.wrong_type("a list"))?;
        Ok(items.iter().enumerate().map(|(index, value)| Spot { value, place: Place::Item(&self.place, index) }))
    }

    pub(super) fn text(&self) -> Result<&'p str, Fault> {
        self.value.as_str().ok_or_else(|| self.wrong_type("text"))
    }

    /// A text that is not empty.
    pub(super) fn name(&self) -> Result<&'p str, Fault> {
        match self.text()? {
            "" => Err(self.fault("a name has at least one character", "write a name")),
            name => Ok(name),
        }
    }

    /// A whole number; none for whatever else.
    pub(super) fn whole(&self) -> Option<i64> {
        self.value.as_i64()
    }

    pub(super) fn is_null(&self) -> bool {
        self.value.is_null()
    }

    pub(super) fn is_text(&self) -> bool {
        self.value.is_string()
    }
}

/// The fields of a map.
#[derive(Clone, Copy)]
pub(super) struct Fields<'p> {
    place: &'p Place<'p>,
    entries: &'p Map<String, Value>,
}

impl<'p> Fields<'p> {
    fn spot(&self, key: &'p str, value: &'p Value) -> Spot<'p> {
        Spot { value, place: Place::Key(self.place, key) }
    }

    /// The value of a key. What is null is not there.
    pub(super) fn get(&self, key: &'static str) -> Option<Spot<'p>> {
        self.entries.get(key).filter(|value| !value.is_null()).map(|value| self.spot(key, value))
    }

    pub(super) fn required(&self, key: &'static str) -> Result<Spot<'p>, Fault> {
        self.get(key).ok_or_else(|| self.missing(key))
    }

    pub(super) fn missing(&self, key: &str) -> Fault {
        Fault {
            place: Place::Key(self.place, key).to_string(),
            value: None,
            reason: "the key is missing".to_owned(),
            remedy: format!("write {key}"),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&'p str, Spot<'p>)> {
        let fields = *self;
        self.entries.iter().map(move |(key, value)| (key.as_str(), fields.spot(key, value)))
    }

    /// A key of a newer version may change the meaning of all others.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Fault> {
        let Some((_, spot)) = self.entries().find(|(key, _)| !known.contains(key)) else { return Ok(()) };
        let remedy = format!("correct the key, which is one of {}, or upgrade Husk", known.join(", "));
        Err(spot.fault("this version of Husk knows no such key here", remedy))
    }
}

/// Short, on one line, for messages.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) if text.chars().count() > SHOWN => {
            format!("{:?}…", text.chars().take(SHOWN).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Array(items) if !items.is_empty() => "a list".to_owned(),
        Value::Object(entries) if !entries.is_empty() => "a map".to_owned(),
        other => other.to_string(),
    }
}

/// The faults of one object.
pub(super) struct Faults {
    subject: String,
    issues: Vec<Issue>,
    more: usize,
}

impl Faults {
    pub(super) fn new(subject: String) -> Self {
        Self { subject, issues: Vec::new(), more: 0 }
    }

    fn push(&mut self, message: String, remedy: String) {
        let subject = self.subject.clone();
        self.issues.push(Issue { severity: Severity::Error, kind: IssueKind::BadPolicy, subject, message, remedy });
    }

    /// Notes a fault and what it means for traffic.
    pub(super) fn add(&mut self, fault: Fault, consequence: &str) {
        if self.issues.len() >= MAX_ISSUES {
            self.more += 1;
            return;
        }
        let value = fault.value.map(|value| format!("{value}: ")).unwrap_or_default();
        self.push(format!("{}: {value}{}; {consequence}", fault.place, fault.reason), fault.remedy);
    }

    /// What was understood; none, with a note, for a fault.
    pub(super) fn settle<T>(&mut self, result: Result<T, Fault>, consequence: &str) -> Option<T> {
        result.map_err(|fault| self.add(fault, consequence)).ok()
    }

    pub(super) fn into_issues(mut self) -> Vec<Issue> {
        if self.more > 0 {
            let message = format!("{} more problems are in the object; each is closed", self.more);
            self.push(message, "correct those that are shown first".to_owned());
        }
        self.issues
    }
}
