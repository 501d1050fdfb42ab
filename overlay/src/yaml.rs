//! YAML as an untyped tree, with bounds: what configuration and manifests are read from.
//!
//! The tree keeps what a typed deserialiser throws away and people need to hear about: keys that occur twice, values of
//! the wrong type, keys nobody asked for. Text from outside is bounded in depth, size and alias expansion.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Options, SnippetMode, UserMessageFormatter};

/// Nesting that a document may have; manifests and configuration need five.
const MAX_DEPTH: usize = 24;

/// Values that a document may have: room for a node with ten thousand blocks.
const MAX_NODES: usize = 100_000;

/// Values that aliases may add to a document. Manifests made by tools use a few, alias bombs need exponentially many.
const MAX_ALIASED: usize = 10_000;

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// Nothing: `key:`, `null` or `~`.
    Null,
    /// `true` or `false`; the YAML 1.1 forms (`yes`, `on`) are text, as in YAML 1.2.
    Bool(bool),
    /// A whole number.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Self>),
    /// A map in the order of the text; keys may occur more than once.
    Map(Vec<(String, Self)>),
}

impl fmt::Display for Value {
    /// Short, on one line, for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Characters of a text that a message repeats.
        const SHOWN: usize = 80;
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(it) => write!(f, "{it}"),
            Self::Integer(it) => write!(f, "{it}"),
            Self::Float(it) => write!(f, "{it:?}"),
            Self::Text(it) if it.chars().count() > SHOWN => {
                write!(f, "{:?}…", it.chars().take(SHOWN).collect::<String>())
            }
            Self::Text(it) => write!(f, "{it:?}"),
            Self::List(it) if it.is_empty() => f.write_str("[]"),
            Self::List(_) => f.write_str("a list"),
            Self::Map(it) if it.is_empty() => f.write_str("{}"),
            Self::Map(_) => f.write_str("a map"),
        }
    }
}

impl From<&serde_json::Value> for Value {
    fn from(json: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match json {
            Json::Null => Self::Null,
            Json::Bool(it) => Self::Bool(*it),
            Json::Number(it) => match it.as_i128() {
                Some(whole) => Self::Integer(whole),
                None => Self::Float(it.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(it) => Self::Text(it.clone()),
            Json::Array(items) => Self::List(items.iter().map(Self::from).collect()),
            Json::Object(entries) => {
                Self::Map(entries.iter().map(|(key, value)| (key.clone(), Self::from(value))).collect())
            }
        }
    }
}

impl Value {
    /// The same as JSON. Of a key that occurs several times in a map, what comes first has the key, and every other value has one
    /// that no API knows, so that who reads strictly notices; the paths of such keys are added to `repeated`.
    ///
    /// What JSON cannot say of numbers becomes text, which is no number and no name.
    pub(crate) fn to_json(&self, path: &str, repeated: &mut Vec<String>) -> serde_json::Value {
        use serde_json::{Number, Value as Json};
        let no_number = |text: String| Json::String(format!("{text} (no number)"));
        match self {
            Self::Null => Json::Null,
            Self::Bool(it) => Json::Bool(*it),
            Self::Integer(it) => Number::from_i128(*it).map_or_else(|| no_number(it.to_string()), Json::Number),
            Self::Float(it) => Number::from_f64(*it).map_or_else(|| no_number(it.to_string()), Json::Number),
            Self::Text(it) => Json::String(it.clone()),
            Self::List(items) => {
                let items = items.iter().enumerate();
                Json::Array(items.map(|(index, item)| item.to_json(&format!("{path}[{index}]"), repeated)).collect())
            }
            Self::Map(entries) => {
                let mut map = serde_json::Map::new();
                for (key, value) in entries {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    let value = value.to_json(&path, repeated);
                    let mut unique = key.clone();
                    while map.contains_key(&unique) {
                        unique += " (again)";
                    }
                    if unique != *key {
                        repeated.push(path);
                    }
                    map.insert(unique, value);
                }
                Json::Object(map)
            }
        }
    }
}

/// A document of a text, or why it cannot be read: one sentence with line and column.
pub(crate) type Document = Result<Value, String>;

/// Reads a text that holds one document. Empty text is [`Value::Null`].
pub(crate) fn document(text: &str) -> Document {
    read(text, 0)
}

/// Reads every document of a text; one that cannot be read does not hide the others.
///
/// The text is split at document markers before it is parsed: `---` at the start of a line is one wherever it stands,
/// also inside a scalar (YAML 1.2.2, section 9.1.2 and rule 206). Documents without content are left out.
pub(crate) fn documents(text: &str) -> Vec<Document> {
    split(text)
        .into_iter()
        .map(|(line, document)| read(document, line))
        .filter(|document| !matches!(document, Ok(Value::Null)))
        .collect()
}

/// Documents with the number of lines before each.
fn split(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line) = (0, 0);
    let (mut offset, mut line) = (0, 0);
    for full in text.split_inclusive('\n') {
        let marker =
            full.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        // What stands before the first marker may be directives, which belong to the document behind it.
        let directives = start == 0 && text[..offset].lines().all(is_prelude);
        if marker && !directives {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, line);
        }
        offset += full.len();
        line += 1;
    }
    documents.push((start_line, &text[start..]));
    documents
}

fn is_prelude(line: &str) -> bool {
    line.trim().is_empty() || line.starts_with(['%', '#'])
}

fn read(text: &str, lines_before: u64) -> Document {
    // Strips the byte order mark, which is no content.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let rendered = error.render_with_options(serde_saphyr::render_options! {
            formatter: &UserMessageFormatter,
            snippets: SnippetMode::Off,
            line_offset: lines_before,
        });
        rendered.split_whitespace().collect::<Vec<_>>().join(" ")
    })
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: MAX_DEPTH, max_nodes: MAX_NODES },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIASED },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        emit_comments: false,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tree;

        impl<'de> Visitor<'de> for Tree {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any YAML value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
                Value::deserialize(deserializer)
            }

            fn visit_bool<E>(self, it: bool) -> Result<Value, E> {
                Ok(Value::Bool(it))
            }

            fn visit_i64<E>(self, it: i64) -> Result<Value, E> {
                Ok(Value::Integer(it.into()))
            }

            fn visit_u64<E>(self, it: u64) -> Result<Value, E> {
                Ok(Value::Integer(it.into()))
            }

            fn visit_f64<E>(self, it: f64) -> Result<Value, E> {
                Ok(Value::Float(it))
            }

            fn visit_str<E>(self, it: &str) -> Result<Value, E> {
                Ok(Value::Text(it.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = list.next_element()? {
                    all.push(item);
                }
                Ok(Value::List(all))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut all = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    all.push(entry);
                }
                Ok(Value::Map(all))
            }
        }

        deserializer.deserialize_any(Tree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_types() {
        let text = "a: 1\nb: -2\nc: 1.5\nd: yes\ne: true\nf: 007\ng: 1_000\nh: '1'\ni:\nj: [x, {}]\nk: 0x10\n8: .nan\n";
        let Ok(Value::Map(map)) = document(text) else { panic!("{:?}", document(text)) };
        let shown: Vec<String> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(
            shown,
            [
                "a=1",
                "b=-2",
                "c=1.5",
                "d=\"yes\"",
                "e=true",
                "f=\"007\"",
                "g=\"1_000\"",
                "h=\"1\"",
                "i=null",
                "j=a list",
                "k=16",
                "8=NaN"
            ]
        );
    }

    #[test]
    fn keys_that_occur_twice_are_kept() {
        let Ok(Value::Map(map)) = document("a: 1\nb: 2\na: 3\n") else { panic!() };
        assert_eq!(map.iter().filter(|(key, _)| key == "a").count(), 2);
    }

    #[test]
    fn json_says_the_same_and_keeps_what_it_cannot_say_apart() {
        let json = |text: &str| {
            let mut repeated = Vec::new();
            (document(text).unwrap().to_json("", &mut repeated), repeated)
        };
        let text = "a: [1, -2, 1.5, true, x, {}]\nb:\n";
        assert_eq!(json(text), (serde_json::json!({ "a": [1, -2, 1.5, true, "x", {}], "b": null }), vec![]));
        let (value, repeated) = json("a: [{b: 1, b: 2, b: 3}]\n");
        assert_eq!(value, serde_json::json!({ "a": [{ "b": 1, "b (again)": 2, "b (again) (again)": 3 }] }));
        assert_eq!(repeated, ["a[0].b", "a[0].b"]);
        let (value, _) = json("[.nan, .inf]");
        let no_number = |it: &serde_json::Value| it.as_str().is_some_and(|it| it.contains("(no number)"));
        assert!(value.as_array().unwrap().iter().all(no_number), "{value}");
    }

    #[test]
    fn nothing_is_null() {
        for text in ["", "\n", "# comment\n", "---\n", "\u{feff}", "~"] {
            assert_eq!(document(text), Ok(Value::Null), "{text:?}");
            assert_eq!(documents(text), vec![], "{text:?}");
        }
    }

    #[test]
    fn errors_say_where_in_the_whole_text() {
        let error = document("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(error.contains("line ") && error.contains("column "), "{error}");
        let all = documents("a: 1\n---\nb: 2\n---\nx: *nobody\n---\nc: 3\n");
        assert_eq!(all.len(), 4);
        assert!(all[2].as_ref().unwrap_err().contains("line 5"), "{all:?}");
        assert!(all[3].is_ok());
    }

    #[test]
    fn documents_are_split_at_markers_only() {
        let text = "%YAML 1.2\n# licence\n---\na: '---'\nb: |\n  ---\n  x\n--- # second\nc: 1\n---\n---d: 1\n";
        let all = documents(text);
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(all.iter().all(Result::is_ok), "{all:?}");
    }

    #[test]
    fn bombs_are_bounded() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let alias = format!("*a{}", level - 1);
            bomb += &format!("a{level}: &a{level} [{}]\n", vec![alias; 9].join(", "));
        }
        assert!(document(&bomb).is_err());
        assert!(document(&"[".repeat(10_000)).is_err());
        assert!(document(&format!("{}{}", "[".repeat(30), "]".repeat(30))).is_err());
        assert!(document(&"a:\n".repeat(200_000)).is_err());
    }
}
